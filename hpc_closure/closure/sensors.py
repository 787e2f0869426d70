"""What sensors read off a field: point values, regular or scattered, with their error."""

from collections.abc import Sequence

import numpy as np
import torch

from hpc_closure.spectral.counters import standard_normals


def sensor_points(layout, size: int, seed: int) -> torch.Tensor:
    """Grid points of a layout as integer pairs, (S, 2).

    Regular: ``number`` per side. Scattered: ``number`` in all, distinct, decided by ``seed``.

    Raises:
        ValueError: the layout does not fit on the grid.
    """
    if layout.layout == "regular":
        if size % layout.number:
            raise ValueError(f"sensors: {layout.number} per side do not divide the {size}^2 grid")
        side = torch.arange(0, size, size // layout.number)
        return torch.cartesian_prod(side, side)
    if layout.number > size * size:
        raise ValueError(f"sensors: {layout.number} points do not fit on the {size}^2 grid")
    order = np.argsort(standard_normals(seed, "sensor layout", 0, width=size * size)[0])
    chosen = torch.as_tensor(np.sort(order[: layout.number]))
    return torch.stack([chosen // size, chosen % size], dim=1)


def observe(
    field: torch.Tensor, layout, seed: int, rows: Sequence[int], call: int, length: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Readings of a layout in fields (B, n, n).

    Args:
        field: closure fields.
        layout: object with ``layout, number, noise``; noise is relative to the fields' rms.
        seed, rows, call: key of the sensor error: experiment, one number per field, time.
        length: side of the square.

    Returns:
        Values (B, S), positions (S, 2) and the standard deviation of the error.
    """
    points = sensor_points(layout, field.shape[-1], seed)
    values = field[..., points[:, 0], points[:, 1]]
    noise_std = 0.0
    if layout.noise:
        noise_std = float(layout.noise * field.double().square().mean().sqrt())
        errors = [
            standard_normals(seed, "sensor error", row, first=call, width=len(points))[0]
            for row in rows
        ]
        values = values + noise_std * torch.as_tensor(np.stack(errors)).to(values)
    return values, points.to(torch.float64) * (length / field.shape[-1]), noise_std


def describe(layout) -> str:
    """Short name of a layout for tables: ``16x16``, ``64 scattered``, ``none``."""
    if layout is None:
        return "none"
    name = (
        f"{layout.number}x{layout.number}"
        if layout.layout == "regular"
        else (f"{layout.number} scattered")
    )
    return f"{name}, noise {layout.noise:g}" if layout.noise else name
