"""Faults of velocities: divergence, exchanged axes, and vectors that are stated as scalars."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hpc_closure.data.outside.sample import Sample
from hpc_closure.experiment.sources.faults import Fault

if TYPE_CHECKING:
    from hpc_closure.experiment.schema import Experiment

NONE, SOME = 1e-2, 0.1  # divergence over gradient that counts as none, and as some


def faults(sample: Sample, experiment: "Experiment") -> Iterator[Fault]:
    """Yield the faults of vectors among the fields of a sample."""
    kinds = [channel.kind for channel in experiment.physics.channels]
    sides = experiment.physics.dimensions
    if sides < 2:
        return
    stated = "vector x" in kinds
    if not stated and len(kinds) < sides:
        return
    first = kinds.index("vector x") if stated else 0
    names = sample.channels[first : first + sides]
    vector = sample.state[:, 0, first : first + sides]
    own, swapped = divergence(vector), divergence(_exchanged(vector))
    if swapped < NONE and own > SOME:
        yield Fault(
            "XY_SWAPPED",
            f"({', '.join(names)}) has a divergence of {own:.2g} of its gradient, and of "
            f"{swapped:.1g} with x and y exchanged",
            "no divergence",
            "exchange x and y in data.dims, or the two variables",
        )
    elif stated and own > NONE:
        yield Fault(
            "DIVERGENT",
            f"({', '.join(names)}) has a divergence of {own:.2g} of its gradient",
            "a velocity without divergence",
            "filter it by a projection, or accept it if the flow is compressible",
        )
    elif not stated and own < NONE:
        kinds_of = ", ".join(f"{name}: vector {side}" for name, side in zip(names, "xyz"))
        yield Fault(
            "VECTOR_AS_SCALARS",
            f"({', '.join(names)}), stated as scalars, has no divergence",
            "the components of a velocity stated as a vector",
            f"state physics.fields={{{kinds_of}}}",
        )


def _exchanged(vector: np.ndarray) -> np.ndarray:
    """Return a vector field (B, D, *points) on exchanged axes x and y."""
    return vector.swapaxes(2, 3)


def divergence(vector: np.ndarray) -> float:
    """Return the root mean square of the divergence over that of the gradient.

    Args:
        vector: (B, D, *points).
    """
    sides, n = vector.shape[1], vector.shape[-1]
    spectra = np.fft.fftn(vector, axes=range(2, 2 + sides))
    waves = np.fft.fftfreq(n, 1 / n)
    waves[n // 2] = 0.0  # the derivative of this mode is not determined
    wave = np.stack(np.meshgrid(*[waves] * sides, indexing="ij"))
    along = np.einsum("d...,bd...->b...", wave, spectra)
    size = (wave**2).sum(0) * (np.abs(spectra) ** 2).sum(1)
    return float(np.sqrt((np.abs(along) ** 2).sum() / max(size.sum(), 1e-300)))
