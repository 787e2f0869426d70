"""Switches of the GPU code that no GPU has run yet: each is off until HPC_CLOSURE_CUDA names it.

Without a switch a GPU runs the operations of PyTorch one after another, as a CPU does. What the
switches add lives in three folders, ``spectral/cuda``, ``closure/cuda`` and ``train/cuda``, which
nothing imports while its switch is off. The variable belongs to the job, like OMP_NUM_THREADS: it
is in no experiment and no hash, and a run writes it into its provenance.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

VARIABLE = "HPC_CLOSURE_CUDA"
GRAPHS, FUSED, REPLAYS, CAPTURED = "graphs", "fused", "replays", "captured"
SWITCHES = {
    GRAPHS: "CUDA graphs of solver steps",
    FUSED: "Triton kernels of solver steps and of base noise",
    REPLAYS: "CUDA graphs of closure draws",
    CAPTURED: "CUDA graphs of networks in training",
}

#: hold it to allocate pinned memory: an allocation by another thread spoils a recording
pinning = threading.RLock()

_forced: frozenset[str] | None = None


def active() -> frozenset[str]:
    """Return the names of the switches that are on.

    Raises:
        ValueError: HPC_CLOSURE_CUDA names something else.
    """
    return _parse(os.environ.get(VARIABLE, "")) if _forced is None else _forced


def is_on(name: str) -> bool:
    """Return whether a switch is on."""
    return name in active()


@contextmanager
def only(*names: str) -> Iterator[None]:
    """Turn on these switches and no others, in all threads, whatever the environment says.

    Raises:
        ValueError: a name is no switch.
    """
    global _forced
    before, _forced = _forced, _parse(",".join(names))
    try:
        yield
    finally:
        _forced = before


@lru_cache
def _parse(text: str) -> frozenset[str]:
    names = [word.strip() for word in text.split(",") if word.strip()]
    for name in names:
        if name not in SWITCHES:
            raise ValueError(
                f"{VARIABLE}={text}: {name!r} is no switch; expected some of "
                f"{', '.join(SWITCHES)}, with commas, or nothing"
            )
    return frozenset(names)
