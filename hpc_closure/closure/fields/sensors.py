"""Point sensors: layouts, positions, readings with errors, interpolation, training layouts.

A layout is an object such as the experiment's ``SensorLayout``, with attributes ``layout``
(regular or scattered), ``number`` (per side if regular, else in total) and ``noise`` (standard
deviation of the error over the rms of the field). :class:`Sensors` are readings of a layout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.spectral.noise.counters import standard_normals

__all__ = [
    "Sensors",
    "fourier_interpolation",
    "layout_name",
    "observe",
    "read_regular",
    "regular_positions",
]


@dataclass(frozen=True)
class Sensors:
    """Point values of the true closure.

    Args:
        values: (..., S), a row per state, in the convention of the target U; of a state of C
            fields (..., C, S), because a sensor reads all fields at its place.
        positions: (S, 2) coordinates (x, y), any real numbers, because the domain is periodic; on
            a line (S, 1), of three sides (S, 3).
        noise_std: standard deviation of the sensors' errors, in units of U; 0 = exact. Of C
            fields a number for all of them, or C numbers.
    """

    values: Any
    positions: Any
    noise_std: Any = 0.0

    def __post_init__(self):
        values = torch.as_tensor(self.values)
        positions = torch.as_tensor(self.positions, dtype=torch.float64).cpu()
        if positions.ndim != 2 or positions.shape[-1] not in (1, 2, 3) or not len(positions):
            raise ValueError(
                f"sensor positions have shape {tuple(positions.shape)}, expected (S, 2), on a "
                "line (S, 1), of three sides (S, 3)"
            )
        if values.ndim < 1 or values.shape[-1] != len(positions):
            raise ValueError(
                f"{len(positions)} sensor positions but values of shape {tuple(values.shape)}; "
                "expected (..., S)"
            )
        try:
            noise = tuple(map(float, np.ravel(np.asarray(self.noise_std, dtype=float))))
        except (TypeError, ValueError):
            noise = ()
        if not noise or not all(0 <= one < float("inf") for one in noise):
            raise ValueError(f"sensor noise_std={self.noise_std}, expected a number >= 0")
        if len(noise) > 1 and (values.ndim < 2 or values.shape[-2] != len(noise)):
            raise ValueError(
                f"{len(noise)} numbers in noise_std but values of shape {tuple(values.shape)}; "
                "expected one number, or one for each field of (..., C, S)"
            )
        if not torch.isfinite(values).all() or not torch.isfinite(positions).all():
            raise ValueError("sensor values and positions must be finite; drop the silent sensors")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "noise_std", noise[0] if len(set(noise)) == 1 else noise)

    @property
    def exact(self) -> bool:
        """Whether the sensors have no errors."""
        return self.noise_std == 0

    def variances(self, fields: int = 1) -> Tensor:
        """Return the variance of each reading's error, (fields S,) float64, field by field."""
        std = torch.tensor(self.noise_std, dtype=torch.float64).expand(fields)
        return std.square().repeat_interleave(len(self.positions))

    @property
    def key(self) -> tuple:
        """Hashable identity of the layout: positions and noise, which determine the gain."""
        return (self.positions.numpy().tobytes(), self.noise_std)

    def rows(self, index) -> "Sensors":
        """Select the readings of some states."""
        return replace(self, values=self.values[index])


# ---- positions ----------------------------------------------------------------------------------


def regular_positions(per_side: int, length: float = 1.0, dimensions: int = 2) -> Tensor:
    """Compute positions (per_side^2, 2), float64, of a regular layout from the origin.

    On a line they are (per_side, 1), of three sides (per_side^3, 3).
    """
    x = torch.arange(per_side, dtype=torch.float64) * (length / per_side)
    return torch.cartesian_prod(*[x] * dimensions).reshape(-1, dimensions)


def regular_side(positions: Tensor) -> int | None:
    """Return the sensors per side of a regular layout from the origin; None for other layouts."""
    side = math.isqrt(len(positions))
    if side * side != len(positions) or positions.shape[-1] != 2:
        return None
    length = float(positions.max()) * side / max(1, side - 1)
    expected = regular_positions(side, length)
    return side if torch.allclose(positions, expected, atol=1e-9 * max(1, length)) else None


def grid_points(layout, size: int, seed: int, dimensions: int = 2) -> Tensor:
    """Return the grid points of a layout as integers, (S, 2), one column per side.

    Regular: ``number`` per side. Scattered: ``number`` distinct points, chosen by ``seed``.

    Raises:
        ValueError: the layout does not fit on the grid.
    """
    grid = f"{size}^{dimensions} grid"
    if layout.layout == "regular":
        if size % layout.number:
            raise ValueError(f"sensors: {layout.number} per side do not divide the {grid}")
        side = torch.arange(0, size, size // layout.number)
        return torch.cartesian_prod(*[side] * dimensions).reshape(-1, dimensions)
    points = size**dimensions
    if layout.number > points:
        raise ValueError(f"sensors: {layout.number} points do not fit on the {grid}")
    order = np.argsort(standard_normals(seed, "sensor layout", 0, width=points)[0])
    chosen = np.sort(order[: layout.number])
    return torch.as_tensor(np.stack(np.unravel_index(chosen, (size,) * dimensions), axis=1))


def layout_name(layout, dimensions: int = 2) -> str:
    """Return the short name of a layout for tables: ``16x16``, ``64 scattered``, ``none``."""
    if layout is None:
        return "none"
    regular = layout.layout == "regular"
    sides = "x".join([str(layout.number)] * dimensions) if dimensions > 1 else f"{layout.number}"
    name = sides if regular else f"{layout.number} scattered"
    return f"{name}, noise {layout.noise:g}" if layout.noise else name


# ---- readings -----------------------------------------------------------------------------------


def observe(
    field: Tensor,
    layout,
    seed: int,
    rows: Sequence[int],
    call: int,
    lengths: Sequence[float] = (1.0, 1.0),
    rms: Tensor | None = None,
) -> Sensors:
    """Read fields (B, n, n) with the sensors of a layout, errors included.

    Args:
        field: closure fields; of C fields (B, C, n, n), all of which a sensor reads.
        layout: see the module's docstring.
        seed, rows, call: key of the sensor errors: experiment, a number per field, closure call.
        lengths: length of each side of the box; all are equal.
        rms: root mean square of each field, (C,) or a number, of which the errors are a multiple;
            None = that of ``field``.
    """
    dimensions = len(lengths)
    points = grid_points(layout, field.shape[-1], seed, dimensions)
    strides = torch.tensor([field.shape[-1] ** axis for axis in reversed(range(dimensions))])
    values = field.flatten(-dimensions)[..., (points * strides).sum(1)]
    noise_std: Any = 0.0
    if layout.noise:
        rms = rms_of(field, dimensions) if rms is None else torch.as_tensor(rms)
        noise_std = (layout.noise * rms).tolist()
        errors = keyed_noise.normals(seed, "sensor error", rows, call, values[0].numel())
        std = torch.as_tensor(noise_std, dtype=torch.float64)[..., None]
        values = values + std.to(values) * errors.view(values.shape).to(values)
    return Sensors(values, points.to(torch.float64) * (lengths[0] / field.shape[-1]), noise_std)


def rms_of(field: Tensor, dimensions: int = 2) -> Tensor:
    """Compute the root mean square of fields (B, n, n), a number, or (C,) of (B, C, n, n)."""
    square = field.double().square()
    if field.ndim == 1 + dimensions:
        return square.mean().sqrt()
    return square.movedim(1, 0).flatten(1).mean(1).sqrt()


def subgrid(field: Tensor, per_side: int) -> Tensor:
    """Take the values (..., per_side, per_side) of fields (..., n, n) on a regular subgrid."""
    stride = field.shape[-1] // per_side
    return field[..., ::stride, ::stride]


def read_regular(field: Tensor, per_side: int, length: float = 1.0) -> Sensors:
    """Read fields (B, n, n) without error on a regular subgrid."""
    values = subgrid(field, per_side).flatten(-2)
    return Sensors(values, regular_positions(per_side, length))


def values_at(field: Tensor, positions: Tensor, length: float) -> Tensor:
    """Take the values (..., S) of fields (..., n, n) at the grid points nearest to (S, 2)."""
    size = field.shape[-1]
    cells = torch.round(positions * (size / length)).long() % size
    return field[..., cells[:, 0], cells[:, 1]]


def fourier_interpolation(sensors: Sensors, size: int) -> Tensor:
    """Interpolate readings of a regular layout by periodic Fourier modes, (B, n, n).

    Raises:
        ValueError: the sensors are not a regular layout that starts at the origin.
    """
    count, side = len(sensors.positions), regular_side(sensors.positions)
    if side is None:
        raise ValueError(
            f"{count} sensors are not a regular square layout: nothing to interpolate"
        )
    values = sensors.values.double().reshape(-1, side, side)
    full = torch.fft.fft2(values, norm="forward")
    out = full.new_zeros(len(full), size, size)
    # an even layout's highest mode is shared equally by +k and -k, so that the field is real
    index = torch.fft.fftfreq(side, 1 / side).long()
    for row in (1, -1):
        for column in (1, -1):
            rows, columns = (
                torch.where(2 * index.abs() == side, sign * side // 2, index) % size
                for sign in (row, column)
            )
            out[:, rows[:, None], columns[None, :]] += 0.25 * full
    return torch.fft.ifft2(out, norm="forward").real


# ---- training layouts ---------------------------------------------------------------------------


class TrainingLayout(NamedTuple):
    """Layout used in training.

    Attributes:
        kind: regular or scattered.
        size: sensors per side if regular, else in total.
        noise: standard deviation of the errors over the rms of the residual.
        weight: relative frequency.
    """

    kind: str
    size: int
    noise: float = 0.0
    weight: float = 1.0


KRIGED_LAYOUTS = (
    TrainingLayout("regular", 4),
    TrainingLayout("regular", 8),
    TrainingLayout("scattered", 6),
    TrainingLayout("scattered", 24),
    TrainingLayout("regular", 4, 0.3),
    TrainingLayout("regular", 8, 0.3),
    TrainingLayout("scattered", 12, 0.3),
    TrainingLayout("scattered", 80, 0.1),
)
# a network that learns to interpret sensors needs many layouts
LEARNED_LAYOUTS = (
    TrainingLayout("regular", 16, 0.0, 8.0),
    TrainingLayout("regular", 12),
    TrainingLayout("regular", 8, 0.0, 2.0),
    TrainingLayout("regular", 4),
    TrainingLayout("scattered", 6, 0.0, 0.5),
    TrainingLayout("scattered", 24, 0.0, 0.5),
    TrainingLayout("scattered", 64),
    TrainingLayout("regular", 16, 0.1),
    TrainingLayout("regular", 4, 0.3, 0.5),
    TrainingLayout("regular", 8, 0.3, 0.5),
    TrainingLayout("scattered", 12, 0.3, 0.5),
    TrainingLayout("scattered", 80, 0.1, 0.5),
)
VARIANTS = 16  # sets of positions of every scattered layout that a network learns from
LAYOUT_SEED = 5


@lru_cache(maxsize=512)
def training_layout(layout: TrainingLayout, variant: int, length: float, rms: float) -> Sensors:
    """Return the positions and the noise of a training layout; the values are zero.

    Args:
        layout: the layout.
        variant: number of the set of positions of a scattered layout.
        length: side of the square.
        rms: rms of the residual, the unit of the errors.
    """
    if layout.kind == "regular":
        positions = regular_positions(layout.size, length)
    else:
        item = VARIANTS * layout.size + variant
        positions = (
            keyed_noise.uniforms(LAYOUT_SEED, "layout", range(layout.size), item, 2) * length
        )
    return Sensors(torch.zeros(len(positions)), positions, layout.noise * rms)


def choose_layouts(uniform: Tensor, sensors: str, layouts: Sequence[TrainingLayout]) -> Tensor:
    """Choose the layout number of each sample by uniforms (B,): 0 = no sensors, 1 = the first.

    If ``sensors`` is ``optional``, half of the samples have no sensors.
    """
    if sensors == "none":
        return torch.zeros_like(uniform, dtype=torch.int64)
    share = uniform if sensors == "required" else 2 * uniform
    weights = torch.tensor([layout.weight for layout in layouts], dtype=uniform.dtype)
    edges = (weights.cumsum(0) / weights.sum())[:-1].contiguous()
    chosen = 1 + torch.searchsorted(edges, share.contiguous(), right=True)
    return torch.where(share < 1, chosen, 0)
