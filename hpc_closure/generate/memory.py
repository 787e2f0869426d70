"""Memory of a run of the solver, from its settings alone; without torch."""

from __future__ import annotations

import math

from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.problem import Problem

#: work spectra of a step and spectra of past steps, by scheme; as in :mod:`spectral.schemes`
REGISTERS = {"etdrk4": 6, "imex_rk3": 8, "rk4": 4}  # else two
PAST = {"cn_ab2": 1, "ab3": 2, "ab3_plain": 2}  # else none
CHUNK_POINTS = 1 << 16  # as in spectral.simulation
LANES, PRODUCTS = 8, 5  # as in spectral.cpu.cube_kernels


def of_run(problem: Problem) -> tuple[int, int]:
    """Return the bytes that each member adds and those of the work arrays of a thread.

    Tables of the scheme and the library are not counted. Fields of two dimensions are never whole
    in memory where compiled functions exist; those of three dimensions are, one member at a time.
    """
    word = 8 if problem.precision == "float64" else 4
    sizes, channels = problem.sizes, len(problem.physics.channels)
    *others, last = (retained_modes(size) for size in sizes)
    columns = math.prod(2 * modes + 1 for modes in others)
    spectrum = 2 * word * channels * columns * (last + 1)
    member = spectrum * (1 + PAST.get(problem.scheme, 0))
    chunk = max(1, CHUNK_POINTS // (channels * math.prod(sizes)))
    work = chunk * spectrum * (1 + REGISTERS.get(problem.scheme, 2))  # and what is held in a step
    if len(sizes) == 3:
        blocks = -(-(last + 1) // LANES)
        work += word * sizes[0] * PRODUCTS * blocks * (2 * others[1] + 1) * 2 * LANES
    return member, work


def line(problem: Problem) -> str:
    """Return the memory in words."""
    member, work = (number / 2**20 for number in of_run(problem))
    return f"memory: {member:.3g} MiB per member, {work:.3g} MiB of work arrays per thread"
