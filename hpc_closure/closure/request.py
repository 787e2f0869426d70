"""Check a caller's request; each error is one line.

Only shapes that every model needs are checked here. A model itself checks what depends on its
training (grid, history, sensors).
"""

import operator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.fields.sensors import Sensors
from hpc_closure.closure.model import Request

__all__ = ["fields", "spectra", "lists", "check", "interval_of", "member_ids"]

PAST = ("history", "previous")  # attributes of a request with fields before its state


def fields(
    name: str, value: Any, channels: int = 1, dimensions: int = 2, equal: bool = True
) -> Tensor:
    """Check real fields on an even grid; returns them as a tensor.

    Args:
        name: ``state`` for (n, n) or (M, n, n), ``history`` and ``previous`` for (H, n, n) or
            (M, H, n, n).
        channels: number C of fields of a state; for C > 1 they are (C, n, n) in place of (n, n).
        dimensions: number of sides: on a line fields are (n,) in place of (n, n), of three sides
            (n, n, n).
        value: numpy array, tensor, or an object that torch converts to one.
        equal: whether all sides have equally many points.

    Raises:
        ValueError: the values are not numbers, not real or not finite, or the grid is odd or not
            square.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        # torch supports neither foreign byte orders nor negative strides
        value = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        kind = type(value).__name__
        raise ValueError(
            f"{name} is a {kind}; expected an array or tensor "
            f"{_shapes(name, 'n', channels, dimensions)} of numbers"
        ) from None
    if tensor.is_complex():
        raise ValueError(f"{name} is complex; expected real fields (sample_hat takes spectra)")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} holds {_kind(tensor)}; expected floating-point numbers")
    sides = tensor.shape[-dimensions:]
    fits = tensor.numel() > 0 and (not equal or sides == sides[-1:] * dimensions)
    _check_shape(name, tensor, "n", fits, channels, dimensions)
    odd = [points for points in sides[::-1] if points % 2]
    if odd:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: the closure needs an even number of points "
            f"per side, not {odd[0]}"
        )
    return _finite(name, tensor)


def spectra(
    name: str, value: Any, channels: int = 1, dimensions: int = 2, equal: bool = True
) -> Tensor:
    """Check retained spectra, complex, of a request; arguments and errors as of :func:`fields`."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        shapes = _shapes(name, "K + 1", channels, dimensions)
        raise ValueError(f"{name} is a {kind}; expected a tensor {shapes}")
    if not value.is_complex():
        raise ValueError(
            f"{name} holds {_kind(value)}; expected complex spectra (sample takes fields)"
        )
    columns = value.shape[-1] if value.ndim else 0
    sides = tuple(value.shape[-dimensions:])
    both = (2 * columns - 1,) * (dimensions - 1)  # sides with both signs
    retained = columns > 1 and sides == (*both, columns)
    if not equal:
        retained = columns > 1 and all(number % 2 for number in sides[:-1])
    _check_shape(name, value, "K + 1", retained, channels, dimensions)
    return _finite(name, value)


def lists(members: Any) -> tuple[Any, int | None]:
    """Flatten members given as one list of ids per state; returns ids and number of lists.

    Members in another form are returned unchanged, with None.

    Raises:
        ValueError: the lists differ in length.
    """
    try:
        listed = np.ndim(members) == 2
    except ValueError:
        raise ValueError(
            "members holds lists of different lengths: expected as many ids for every state"
        ) from None
    return (
        ([member for ids in members for member in ids], len(members))
        if listed
        else (members, None)
    )


def check(
    request: Request,
    states: int | None = None,
    channels: int = 1,
    dimensions: int = 2,
    equal: bool = True,
) -> Request:
    """Check a request; returns it with its members' ids as a list.

    Args:
        request: the caller's request.
        states: number of lists in which the members were given; None = one list for all states.
        channels: number of fields of a state.
        dimensions: number of sides.
        equal: as of :func:`fields`, which has checked it.

    Raises:
        ValueError: states, members, numbers or sensors are invalid, or do not fit one another.
    """
    members = member_ids(request.members)
    _integer("seed", request.seed, 0)
    _integer("call", request.call, 0)
    if request.evaluations is not None:
        _integer("evaluations", request.evaluations, 1)
    if request.sensors is not None and not isinstance(request.sensors, Sensors):
        kind = type(request.sensors).__name__
        raise ValueError(f"sensors is a {kind}; expected Sensors(values, positions) or None")
    state = request.state
    alone = dimensions + (channels > 1)  # axes of a single state
    rows = 1 if state.ndim == alone else len(state)
    if states is None and rows not in (1, len(members)):
        raise ValueError(f"{rows} states for {len(members)} members: one row per member")
    if states is not None and rows != states:
        raise ValueError(f"{rows} states for {states} lists of members: one row per list")
    if request.sensors is not None:
        lead = request.sensors.values.shape[: -2 if channels > 1 else -1]
        readings = lead.numel()
        if readings not in (1, rows, rows if states else len(members)):
            raise ValueError(f"sensors hold {readings} rows of readings for {rows} states")
    for name in PAST:
        past = getattr(request, name)
        if past is None:
            continue
        if past.shape[-dimensions:] != state.shape[-dimensions:]:
            raise ValueError(
                f"{name} has shape {tuple(past.shape)}, state {tuple(state.shape)}: "
                "expected the same grid"
            )
        earlier = 1 if past.ndim == alone + 1 else len(past)
        if earlier != rows:
            raise ValueError(f"{name} of {earlier} states for {rows}: expected one for each")
    return replace(request, members=members)


def interval_of(requested: Any) -> int | None:
    """Check the solver steps for which a draw is held; returns None unchanged.

    Raises:
        ValueError: it is not an integer of at least 1.
    """
    return None if requested is None else _integer("interval", requested, 1)


def member_ids(requested: Any) -> list[int]:
    """Check members, a number or ids; returns the ids. Raises ValueError if they are invalid."""
    number = isinstance(requested, (int, np.integer)) and not isinstance(requested, bool)
    try:
        ids = [operator.index(member) for member in (range(requested) if number else requested)]
    except TypeError:
        ids = [-1]
    if any(member < 0 for member in ids):
        raise ValueError(f"members={requested!r}: expected how many, or their ids from 0 on")
    if not ids:
        raise ValueError(f"members={requested!r}: at least one sample must be asked for")
    return ids


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number < 1 << 63:
        raise ValueError(f"{name}={value!r}: expected an integer from {least} on")
    return number


def _shapes(name: str, last: str, channels: int, dimensions: int) -> str:
    """Write the shapes of a state or of past fields; ``last`` is that of the last side."""
    other = "n" if last == "n" else "2K + 1"
    shape = ", ".join([*[other] * (dimensions - 1), last])
    shape = f"{channels}, {shape}" if channels > 1 else shape
    if dimensions == 1 and channels == 1 and name == "state":
        return f"({shape},) or (M, {shape})"
    return f"({shape}) or (M, {shape})" if name == "state" else f"(H, {shape}) or (M, H, {shape})"


def _check_shape(
    name: str, tensor: Tensor, last: str, fits: bool, channels: int, dimensions: int
) -> None:
    most = dimensions + (1 if name == "state" else 2) + (channels > 1)
    if fits and tensor.ndim in (most - 1, most):
        if channels == 1 or tensor.shape[-1 - dimensions] == channels:
            return
    shapes = _shapes(name, last, channels, dimensions)
    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shapes}")


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has non-finite values: the solver has blown up")
    return tensor


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
