"""``hpc-closure movie``: the coupled run of an experiment as a film."""

from pathlib import Path

import numpy as np
import torch

from hpc_closure.data.held_out import truth_of
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.evaluate.report import movie
from hpc_closure.evaluate.scores.spectra import shell_power
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.work.options import UsageError
from hpc_closure.work.units import Ledger

FRAMES = 250  # at most


def run(
    experiment: Experiment,
    out: Path | None = None,
    start: int = 0,
    channel: str = "",
    seconds: float = 10.0,
) -> int:
    """Write the film of one start; returns the exit code.

    Args:
        experiment: an experiment with a finished rollout.
        out: file to write, .mp4 or .gif; by default RUN/evaluate/movie.mp4 (or .gif).
        start: number of the start, from 0.
        channel: field of a state of several; by default the first.
        seconds: length of the film.

    Raises:
        UsageError: there is no such start or field, or the state is a line.
        ValueError: there is no rollout, or the file cannot be written.
    """
    if experiment.problem.dimensions == 1:
        raise UsageError(
            "a film shows flows of two or three dimensions; the report draws this line"
        )
    out = out or Run.of(experiment).folder("evaluate") / f"movie{movie.default_format()}"
    film = film_of(experiment, start, channel)
    movie.write(film, out, seconds)
    print(f"{out}: {len(film.lead_times)} frames, {out.stat().st_size / 1e6:.1f} MB")
    return 0


def film_of(experiment: Experiment, start: int, channel: str = "") -> movie.Film:
    """Read the fields and spectra of one start's ensemble and of its truth."""
    ensemble = CoupledEnsemble(_products(experiment, "rollout"))
    found = truth_of(experiment, ensemble)
    if found is None:
        raise ValueError("no truth to film: neither trajectories of the starts nor replicas")
    truth, name = found
    if not 0 <= start < len(ensemble.cases):
        raise UsageError(f"--start {start}: expected 0 to {len(ensemble.cases) - 1}")
    names = ensemble.channels
    if channel and channel not in names:
        raise UsageError(
            f"--channel {channel}: expected one of {', '.join(names) or 'none, it is one field'}"
        )
    place = names.index(channel) if channel else 0
    case, grid = ensemble.cases[start], experiment.known_grid
    lead_times = [float(time - ensemble.start) for time in ensemble.times]
    chosen = movie.sampled(len(lead_times), FRAMES)
    truth.select([case])
    ensemble.select([case])
    fields, truths = [], []
    for index in chosen:
        then = truth.index(lead_times[index])
        members, true = ensemble.read("model", index)[:, 0], truth.read(name, then)[0, 0]
        fields.append(members[:, place] if names else members)
        truths.append(true[place] if names else true)
    members_field, truth_field = np.stack(fields, 1), np.stack(truths)
    box = Grid(grid, experiment.problem.length, experiment.problem.dimensions)
    described = experiment.problem.physics.channels[place]
    return movie.Film(
        lead_times=np.array(lead_times)[chosen],
        truth=truth_field,
        members=members_field,
        shells=np.arange(box.num_shells),
        truth_spectra=spectra_of(truth_field, box),
        spectra=spectra_of(members_field, box),
        quantity=described.name,
        unit=described.unit,
        title=f"{experiment.name}, start {start}",
    )


def spectra_of(fields: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the mean square per shell, (..., shells), of fields (..., *sides)."""
    power = shell_power(torch.from_numpy(fields).double(), grid.dimensions)
    return power[..., : grid.num_shells].numpy()  # the solver retains no mode beyond


def _products(experiment: Experiment, stage: str) -> list[Path]:
    return [product.path for product in Ledger.of(experiment, stage).products()]
