"""Check that the vectors of a data set have the divergence that their equation states."""

from typing import TYPE_CHECKING

import torch

from hpc_closure.spectral.modes.grid import Grid, to_spectra
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.work import log

if TYPE_CHECKING:
    from hpc_closure.data.reader import DataSet
    from hpc_closure.experiment.schema import Experiment

__all__ = ["check_divergence", "divergence_share"]

# root mean square of the divergence over that of the gradient: of single precision, of a vector
NONE, SOME = 1e-3, 1e-2
WORDS = {"state": "velocity", "closure": "closure"}


def check_divergence(experiment: "Experiment", store: "DataSet") -> None:
    """Refuse velocities with divergence if the equation states none, and warn of the reverse.

    Reads the first and the last member at the first and the last stored time. Closures of a
    velocity without divergence are projected, so a model would silently lose a part of such data.

    Raises:
        ValueError: the equation has ``solenoidal = True``, and a velocity or its closure has more
            than ``SOME`` of its gradient as divergence.
    """
    physics, grid = experiment.physics, experiment.train_grid
    places = list(physics.velocity_channels)
    if not places:
        return
    modes = Grid(grid, physics.length, physics.dimensions)
    names = ", ".join(physics.channels[place].name for place in places)
    equation, largest = physics.equation, 0.0
    for member in dict.fromkeys((store.members[0], store.members[-1])):
        for index in dict.fromkeys((0, len(store.times) - 1)):
            for field, word in WORDS.items():
                values = torch.from_numpy(store.read(member, index, field, grid)[places]).double()
                if not bool(values.isfinite().all()):
                    continue
                u_hat = to_spectra(values, retained_modes(grid), physics.dimensions)
                share = float(divergence_share(u_hat, modes))
                largest = max(largest, share)
                if physics.solenoidal and share > SOME:
                    raise ValueError(
                        f"{store.folder}: the {word} ({names}) of member {member} at t = "
                        f"{store.times[index]:g} has a divergence of {share:.2g} of its gradient, "
                        f"expected at most {SOME:g}: {equation} states solenoidal = True; check "
                        "the order of components and axes, project the data, or set solenoidal "
                        "to False"
                    )
    if not physics.solenoidal and largest < NONE:
        log.get().warning(
            f"{store.folder}: the velocity ({names}) and its closure have no divergence, but "
            f"{equation} does not state solenoidal = True: outputs of networks may get some"
        )


def divergence_share(u_hat: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Compute rms divergence over rms gradient of velocities (..., d, *modes); (...), 0 to 1."""
    axis = -1 - grid.dimensions
    k = torch.stack(torch.broadcast_tensors(*grid.k)).to(u_hat.real)
    weights = grid.weights.to(u_hat.real)
    along = (k * u_hat).sum(axis).abs().square() * weights
    whole = k.square().sum(0) * u_hat.abs().square().sum(axis) * weights
    tiny = torch.finfo(whole.dtype).tiny
    return (along.sum(grid.axes) / whole.sum(grid.axes).clamp(min=tiny)).sqrt()
