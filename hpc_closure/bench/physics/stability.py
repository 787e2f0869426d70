"""Long coupled runs: number of lost members, and spectra of the others.

Every member runs under the closure from a start of the experiment's rollout, or of the validation
trajectories, far beyond the DNS. The bare solver runs beside it from every start. The square of
the state per shell, averaged over all but the first quarter of the run, is compared with that of
the DNS from the start on, over the trajectories of the same part: enstrophy of a vorticity, energy
of the velocities of a solenoidal flow, and of other states every field's own. Errors are those of
means over trajectories. A lost member is in no spectrum, so the record has their number. If draws
may be rescaled into the range of the training, the record has the rate per shell.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure import artifact
from hpc_closure.closure.compatibility import check_model
from hpc_closure.data.held_out import HeldOut
from hpc_closure.data.layout import COUNTED
from hpc_closure.data.opening import open_data
from hpc_closure.data.reader import DataSet
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.schema import Experiment
from hpc_closure.rollout.block import coupled_run, start, stored
from hpc_closure.spectral.modes.grid import Grid, to_spectra

COLUMNS = {"field": "s", "shell": "d", "dns": ".3e", "share": ".4f"} | dict.fromkeys(
    ("model", "model_error", "none", "none_error", "rescaled_share"), ".3f"
)
SETTLED = 0.25  # share of a run before its spectra are averaged
LOOKS = 200  # largest number of spectra of a run


def run(
    experiment: Experiment,
    members: int,
    steps: int,
    device: str = "cpu",
    report: Callable[[int, int], None] = lambda call, lost: None,
    part: str = "test",
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run the members; returns records, one per field and shell, and remarks.

    Args:
        experiment: a trained experiment with its data.
        members: number of trajectories, distributed over the starts.
        steps: solver steps of each trajectory.
        device: device of the run.
        report: called with closure calls and lost members, at intervals.
        part: part of the data with the starts: ``test``, or ``valid``, on which settings may be
            chosen.

    Raises:
        ValueError: data or model are missing or do not fit.
    """
    check_model(experiment)
    folder = Run.of(experiment)
    held = HeldOut.of(experiment)
    data = open_data(held.experiment, held.run)
    closure = artifact.load(folder.model).to(device)
    rollout = experiment.rollout.model_copy(
        update={"baselines": ("none",), "rungs": (), "after_release": 0.0}
    )
    experiment = experiment.model_copy(update={"rollout": rollout})
    cases = None
    if part != "test":
        cases = data.split(experiment.train.split)[part][: experiment.rollout.initial_conditions]
    coupled = coupled_run(experiment, closure, data, range(members), device, cases)
    start(coupled, data, experiment)
    calls = max(1, steps // rollout.interval)
    stride = max(1, calls // LOOKS)
    calls -= calls % stride
    fields = _fields(experiment)
    names = ("model", "none")
    sums = {name: _Spectra(coupled.simulations[name].grid, len(fields)) for name in names}
    for call in range(stride, calls + 1, stride):
        coupled.advance(stride)
        lost = {name: coupled.simulations[name].mark_lost() for name in sums}
        if call > SETTLED * calls:
            for name, spectra in sums.items():
                spectra.add(coupled.simulations[name].state)
        report(call, int(lost["model"].sum()))
    truth = _of_the_data(experiment, data, coupled.cases, len(fields))
    means = {name: spectra.means for name, spectra in sums.items()}
    records = []
    for index, field in enumerate(fields):
        of_field = {name: values[:, index] for name, values in means.items()}
        named = {"field": field} if field else {}
        records += [named | row for row in _records(truth[:, index], of_field)]
    taken = calls * rollout.interval
    length = f"{taken} steps, {taken * experiment.generate.dt:g} time units"
    remarks = [
        f"{name}: {lost[name].sum()} of {len(lost[name])} trajectories lost in {calls} closure "
        f"calls ({length})"
        for name in sums
    ]
    counts = coupled.rescaled_counts().get(COUNTED["model"])
    if counts is not None:
        remarks.append(_guard(counts, closure.model.expected_rescaled, records))
    return records, remarks


def _guard(counts: np.ndarray, expected: Tensor | None, records: Sequence[dict[str, Any]]) -> str:
    """Describe how many draws were rescaled, and write the rates per shell to their records.

    Args:
        counts: (rows, 2 + shells) of :class:`~hpc_closure.rollout.tally.Tally`.
        expected: (1 + shells,) rates for the DNS's closures, or None.
        records: records, one per shell.
    """
    total = counts.sum(0)
    shares = total[1:] / max(total[0], 1)
    for row in records:
        if row["shell"] + 1 < len(shares):
            row["rescaled_share"] = float(shares[row["shell"] + 1])
    words = f"draws rescaled into the range of the training: {shares[0]:.2%}"
    if expected is None:
        return words
    return f"{words}; of the DNS's own closures {float(expected[0]):.2%} would be"


def _fields(experiment: Experiment) -> tuple[str, ...]:
    """Return the fields with spectra of their own; "" is the only one, or all velocities."""
    physics = experiment.problem.physics
    alone = physics.solenoidal or not physics.channel_shape
    return ("",) if alone else tuple(channel.name for channel in physics.channels)


class _Spectra:
    """Mean square per shell of every trajectory.

    Args:
        grid: grid of the states.
        num_fields: number of fields with spectra of their own; 1 adds those of all.
    """

    def __init__(self, grid: Grid, num_fields: int):
        self.grid, self.num_fields, self.count = grid, num_fields, 0
        self.total = torch.zeros(())

    def add(self, states: Tensor) -> None:
        power = states.abs().square().double().cpu()
        self.total = self.total + 0.5 * self.grid.shell_sum(power)
        self.count += 1

    @property
    def means(self) -> np.ndarray:
        """Means (trajectories, fields, shells) of the trajectories that are not lost."""
        total = self.total / self.count
        total = total.view(len(total), self.num_fields, -1, total.shape[-1]).sum(2)
        means = total.numpy()
        return means[np.isfinite(means).all((1, 2))]


def _of_the_data(
    experiment: Experiment, data: DataSet, cases: list[int], num_fields: int
) -> np.ndarray:
    grid = experiment.problem.replace(grid=experiment.train_grid).make_grid()
    spectra = _Spectra(grid, num_fields)
    for index in range(data.time_index(experiment.rollout.t_start), len(data.times)):
        fields = torch.from_numpy(stored(data, cases, index, grid=grid.size)).double()
        spectra.add(to_spectra(fields, grid.mode_counts))
    return spectra.means


def _records(truth: np.ndarray, runs: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Compute ratios to the truth with standard errors, for shells above round-off."""
    mean = truth.mean(0)
    records = []
    for shell in np.flatnonzero(mean > 1e-12 * mean.sum()):
        row: dict[str, Any] = {"shell": int(shell), "dns": mean[shell]}
        row["share"] = mean[shell] / mean.sum()
        for name, means in runs.items():
            if not len(means):
                row[name] = row[f"{name}_error"] = float("nan")
                continue
            ratio = means[:, shell].mean() / mean[shell]
            ours, theirs = (_relative_error(each[:, shell]) for each in (means, truth))
            row[name], row[f"{name}_error"] = ratio, ratio * math.hypot(ours, theirs)
        records.append(row)
    return records


def _relative_error(values: np.ndarray) -> float:
    """Compute the relative standard error of a mean over trajectories."""
    if len(values) < 2:
        return float("nan")
    return float(values.std(ddof=1) / np.sqrt(len(values)) / values.mean())
