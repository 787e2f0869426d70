"""Arrays of numpy, torch and JAX: how states cross on the same memory where that is possible."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

LIBRARIES = ("numpy", "torch", "jax")


def library_of(array: Any) -> str:
    """Return the library of an array: ``numpy``, ``torch`` or ``jax``.

    Raises:
        TypeError: it is of none of them.
    """
    if isinstance(array, Tensor):
        return "torch"
    if isinstance(array, np.ndarray):
        return "numpy"
    if "jax" in sys.modules and isinstance(array, sys.modules["jax"].Array):
        return "jax"
    raise TypeError(f"a {type(array).__name__}, expected an array of numpy, torch or JAX")


def to_library(tensor: Tensor, library: str) -> Any:
    """Return a tensor as an array of a library, on the same memory where that is possible."""
    if library == "torch":
        return tensor
    tensor = tensor.detach().contiguous()
    if library == "numpy":
        return tensor.cpu().numpy()
    jax = sys.modules["jax"]
    try:
        return jax.dlpack.from_dlpack(tensor)
    except Exception:  # JAX without this device, or memory that it cannot share
        return jax.numpy.asarray(tensor.cpu().numpy())


def to_torch(array: Any) -> Tensor:
    """Return an array of numpy, torch or JAX as a tensor, on the same memory where possible.

    Raises:
        TypeError: it is an array of another library.
    """
    library = library_of(array)
    if library == "torch":
        return array
    if library == "jax":
        return torch.from_dlpack(array.block_until_ready())
    with warnings.catch_warnings():  # nothing here writes into it
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def tree_of(library: str) -> Any:
    """Return (flatten, unflatten) of nested containers of arrays."""
    if library == "jax":
        tree = sys.modules["jax"].tree_util
        return tree.tree_flatten, lambda leaves, form: tree.tree_unflatten(form, leaves)
    import torch.utils._pytree as tree

    return tree.tree_flatten, tree.tree_unflatten
