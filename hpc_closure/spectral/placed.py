"""Tensors of the host where they are needed: brought to a device once, not in every call."""

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

#: by (device, dtype), as long as the tensor itself is there
_kept = WeakTensorKeyDictionary()


def placed(value: Tensor, like: Tensor) -> Tensor:
    """``value`` on the device of ``like``, and in its real precision unless it is an integer.

    A tensor is known by its identity: it must not be changed in place.
    """
    dtype = value.dtype
    if dtype.is_floating_point:
        dtype = like.real.dtype if like.is_complex() else like.dtype
    if value.device == like.device and value.dtype == dtype:
        return value
    found, key = _kept.setdefault(value, {}), (like.device, dtype)
    if key not in found:
        found[key] = value.to(device=like.device, dtype=dtype)
    return found[key]
