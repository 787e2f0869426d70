"""Tensors of the host where they are needed: brought to a device once, not in every call."""

from torch import Tensor

MANY = 1000  # tensors, beyond which what was kept is let go

_kept: dict[tuple, tuple[Tensor, Tensor]] = {}


def placed(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on the device of ``like``, and in its real precision unless it is an integer.

    A tensor is known by its identity: it must not be changed in place.
    """
    dtype = value.dtype
    if dtype.is_floating_point:
        dtype = like.real.dtype if like.is_complex() else like.dtype
    if value.device == like.device and value.dtype == dtype:
        return value
    key = id(value), like.device, dtype
    if key not in _kept:
        if len(_kept) >= MANY:
            _kept.clear()
        _kept[key] = value, value.to(device=like.device, dtype=dtype)
    return _kept[key][1]
