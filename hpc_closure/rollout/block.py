"""Rollout blocks: rows of the coupled ensemble with their references.

Row ``e`` of the ensemble is member ``e // cases``, started from test trajectory ``e % cases``.
Further members therefore append rows.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from hpc_closure.closure.fields.sensors import rms_of
from hpc_closure.closure.process import Memory
from hpc_closure.data.held_out import HeldOut
from hpc_closure.data.layout import STATE, Layout, SeriesLayout, by_data_set, data_sets
from hpc_closure.data.reader import BESIDE, CoupledEnsemble, DataSet, strided_to
from hpc_closure.data.writer import BlockWriter
from hpc_closure.experiment.checks import check_past, check_previous
from hpc_closure.experiment.choices import Choices
from hpc_closure.generate.rungs import Known
from hpc_closure.rollout.coupling import CoupledRun, Coupling
from hpc_closure.spectral.modes.grid import to_spectra
from hpc_closure.work.block import Block, record_steps, times_of
from hpc_closure.work.hdf5 import open_hdf5


def memory_of(experiment, closure) -> Memory:
    """Return how many earlier states and closures the closure reads, and how far apart.

    Raises:
        ValueError: the closure calls or the stored snapshots do not contain these states.
    """
    generate, rollout = experiment.generate, experiment.rollout
    memory = Memory.of(closure, rollout.interval)
    frames = memory.frames
    if memory.previous:
        check_previous(experiment, memory.previous)
    if not frames:
        return memory
    check_past(experiment, frames)
    every = closure.target["every"]
    least = generate.record.start + frames * every
    if every != generate.spacing or rollout.t_start < least - 1e-9:
        raise ValueError(
            f"the model reads {frames} earlier state(s) {every:g} apart: snapshots must be stored "
            f"{every:g} apart (generate.record) and rollout.t_start be at least {least:g}"
        )
    return memory


def coupled_run(
    experiment,
    closure,
    data: DataSet,
    numbers: Sequence[int],
    device: str,
    cases: Sequence[int] | None = None,
) -> CoupledRun:
    """Build the coupled run of some rows of the ensemble; does not start it.

    Args:
        experiment, closure, data: the experiment, the loaded model, the DNS.
        numbers: row numbers.
        device: torch device.
        cases: trajectories to start from; None = those of the experiment's rollout.
    """
    rollout, test_set, choices = experiment.rollout, HeldOut.of(experiment), Choices(experiment)
    cases = data.starts(test_set.split, rollout.initial_conditions) if cases is None else cases
    rows = [(cases[number % len(cases)], number // len(cases)) for number in numbers]
    used = {case for case, _ in rows}
    mine = [case for case in cases if case in used]
    closures = rms = None
    if rollout.sensors and experiment.generate.closure == "subgrid":
        closures = stored_closures(data, mine, experiment)
        if rollout.sensors.noise:
            rms = closure_rms(data, experiment, test_set)
    coupling = Coupling(
        experiment.problem,
        experiment.generate.closure,
        experiment.train_grid,
        test_set.seed,
        rollout,
        memory_of(experiment, closure),
        device,
        choices.stride,
        experiment.solver.start if experiment.reduced.known else None,
        [(rung, choices.rung(rung)) for rung in rollout.rungs],
        {
            **dict.fromkeys(("model", "mean_gp", "none"), experiment.past_of(experiment.solver)),
            **{rung.name: experiment.past_of(rung) for rung in rollout.rungs},
        },
        closures,
        rms,
    )
    return CoupledRun(coupling, closure, rows, mine)


def stored_closures(
    data: DataSet, cases: Sequence[int], experiment
) -> Callable[[int], torch.Tensor]:
    """Return a function: step of the DNS -> stored closures (cases, n, n) that begin there."""
    dt, grid = experiment.generate.dt, experiment.train_grid

    def read(step: int) -> torch.Tensor:
        index = data.time_index(step * dt)
        return torch.from_numpy(stored(data, cases, index, "closure", grid=grid))

    return read


def closure_rms(data: DataSet, experiment, test_set: HeldOut) -> torch.Tensor:
    """Compute the rms of the closure at the release, (C,) or a number, the unit of sensor errors.

    It is that of all starts of the rollout, so that it depends neither on the block nor on time.
    """
    rollout = experiment.rollout
    cases = data.starts(test_set.split, rollout.initial_conditions)
    index, grid = data.time_index(rollout.t_start), experiment.train_grid
    fields = torch.from_numpy(stored(data, cases, index, "closure", grid=grid))
    return rms_of(fields, experiment.physics.dimensions)


def stored(
    data: DataSet, cases: Sequence[int], index: int, field: str = STATE, *, grid: int
) -> np.ndarray:
    """Read a field of some trajectories at a stored time, (cases, n, n)."""
    return np.stack([data.read(case, index, field, grid) for case in cases])


def start(coupled: CoupledRun, data: DataSet, experiment) -> None:
    """Start a coupled run at ``rollout.begin`` with the earlier states and closures it reads.

    It starts from the states of its cases; with ``rollout.after_release`` each row starts from the
    state of a replica.
    """
    rollout, grid, memory = experiment.rollout, experiment.train_grid, coupled.memory
    if rollout.after_release:
        fields = _of_replicas(experiment, coupled.rows)
    else:
        index = data.time_index(rollout.t_start)

        def fields(back: int, name: str = STATE) -> np.ndarray:
            return stored(data, coupled.cases, index - back, name, grid=grid).astype(np.float64)

    needed = rollout.rungs or experiment.reduced.known
    coupled.start(
        fields(0),
        round(rollout.begin / experiment.generate.dt),
        _earlier([fields(back) for back in range(memory.frames, -1, -1)], coupled),
        [fields(back, "closure") for back in range(1, memory.previous + 1)],
        known_of(data, experiment, coupled.cases) if needed else None,
    )


def _of_replicas(experiment, rows: Sequence[tuple[int, int]]) -> Callable[..., np.ndarray]:
    """Return a reader of replicas' fields (rows, n, n), ``back`` stored times before the start.

    Member m of a start begins in replica 1 + m. Replica 0 is the truth in the scores, so a member
    that began there would know the truth.
    """
    test_set = HeldOut.of(experiment)
    replicas = CoupledEnsemble([product.path for product in test_set.books("replicas").products()])
    replica_of_row = [(case, 1 + member) for case, member in rows]
    sides = experiment.physics.dimensions

    def fields(back: int, name: str = "model") -> np.ndarray:
        lead = experiment.rollout.after_release - back * experiment.generate.spacing
        values = replicas.read_rows(name, replica_of_row, replicas.index(lead))
        values = strided_to(values, experiment.data_grid, experiment.train_grid, sides)
        return values.astype(np.float64)

    return fields


def known_of(data: DataSet, experiment, cases: Sequence[int]) -> Known:
    """Read the spectra from which rungs begin: the past from data, all modes from replicas.

    Raises:
        ValueError: a required state is not stored.
    """
    rollout, problem = experiment.rollout, experiment.problem
    every = experiment.generate.record.every
    known = problem.replace(grid=experiment.known_grid).make_grid()
    runs = [experiment.solver, *rollout.rungs]

    def spectra(fields: np.ndarray, modes: tuple[int, ...]) -> torch.Tensor:
        return to_spectra(torch.from_numpy(fields.astype(np.float64)), modes)

    def resolved(chosen: Sequence[int], time: float) -> torch.Tensor:
        fields = stored(data, chosen, data.time_index(time), grid=experiment.train_grid)
        return spectra(fields, known.mode_counts)

    now = resolved(cases, rollout.t_start)
    if {run.start for run in runs} <= {"empty"}:
        return Known(now)
    test_set = HeldOut.of(experiment)
    ensemble = CoupledEnsemble([product.path for product in test_set.books("replicas").products()])
    full = np.stack([ensemble.read_whole(case, rollout.t_start) for case in cases])
    past: dict[str, list[torch.Tensor]] = {}
    all_cases = data.starts(test_set.split, rollout.initial_conditions)
    following = [all_cases[all_cases.index(case) - 1] for case in cases]
    for how, chosen in (("synchronised", cases), ("mismatched", following)):
        lengths = {experiment.past_of(run) for run in runs if run.start == how}
        number = round(max(lengths, default=0.0) / every)
        times = [rollout.t_start - back * every for back in range(number, 0, -1)]
        past[how] = [resolved(chosen, time) for time in times]
    modes = problem.make_grid().mode_counts
    return Known(now, spectra(full, modes), past["synchronised"], past["mismatched"], every)


def _earlier(states: Sequence[np.ndarray], coupled: CoupledRun) -> Iterator[np.ndarray]:
    """Yield states (cases, n, n) one closure interval apart, oldest first, from stored states.

    States between stored times are interpolated linearly. They are read only until the run has
    states of its own that reach back far enough.
    """
    lag = coupled.memory.lag
    for older, newer in itertools.pairwise(states):
        for call in range(lag):
            share = call / lag
            yield (1 - share) * older + share * newer


class RolloutBlock(Block):
    """Integrate rows of the coupled ensemble from ``rollout.begin`` to ``rollout.t_end``.

    If the model rescales draws, ``series/brought_back`` (and ``brought_back_mean_gp``) counts
    rescaled draws since the start for each row and stored time, (B, T, 2 + shells); see
    :class:`~hpc_closure.rollout.tally.Tally`.

    Args:
        unit, books, session, domain: see :class:`~hpc_closure.work.block.Block`.
        closure: the loaded model.
        data: the DNS, which holds the initial states.
    """

    def __init__(self, unit, books, session, domain, closure, data: DataSet):
        super().__init__(unit, books, session, domain)
        self.experiment = experiment = session.experiment
        rollout, self.dt = experiment.rollout, experiment.generate.dt
        self.data, self.grid, self.stride = data, experiment.train_grid, rollout.interval
        self.sides = experiment.physics.dimensions
        self.record_steps = record_steps(rollout.begin, rollout.t_end, rollout.every, self.dt)
        self.first_step = self.record_steps[0]
        self.coupled = coupled_run(experiment, closure, data, unit.members, session.device)
        self.cases = self.coupled.cases
        self.series: SeriesLayout | None = None  # layout of the counts in the open file

    @property
    def step_index(self) -> int:
        return self.coupled.step_index

    def initialise(self) -> None:
        start(self.coupled, self.data, self.experiment)

    def advance(self, steps: int) -> None:
        self.coupled.advance(steps // self.stride)

    def record(self):
        fields = {
            name: value.cpu().numpy().astype(np.float32)
            for name, value in self.coupled.fields().items()
        }
        references = {name: fields.pop(name) for name in self._references() if name in fields}
        if not self.coupled.exact:
            now = self.step_index * self.dt
            index = self.data.time_index(now)
            references["truth"] = stored(self.data, self.cases, index, grid=self.grid)
        fields[STATE] = fields.pop("model")
        fields, references = (self._by_data_set(values) for values in (fields, references))
        if self.writer is not None and self.series is not None:
            place = self.record_steps.index(self.step_index)
            self.writer.write_series(place, self.coupled.rescaled_counts())
        return fields, {}, references

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the names of the fields of the state; empty if it has one."""
        return self.experiment.physics.channel_names

    def _by_data_set(self, fields: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        by_set: dict[str, np.ndarray] = {}
        for name, values in fields.items():
            by_set |= by_data_set(name, values, self.channels, self.sides)
        return by_set

    def hopeless(self) -> str:
        """Return a message if all trajectories of the model have diverged, else ""."""
        lost = self.coupled.simulations["model"].mark_lost()
        return f"all {len(lost)} trajectories of the model diverged" if lost.all() else ""

    def _references(self) -> Sequence[str]:
        return [name for name in ("none", "truth") if name not in self.coupled.rows_of]

    def save_state(self) -> dict:
        return self.coupled.save_state()

    def load_state(self, state: dict) -> None:
        self.coupled.load_state(state)

    def cost(self) -> dict:
        return dict(self.coupled.seconds)

    def _series(self, path: Path) -> SeriesLayout | None:
        """Return the layout of the counts of rescaled draws; None if nothing is counted.

        A file of an older version without counts continues without them, because its earlier
        draws were not counted.
        """
        widths = {name: counts.shape[1] for name, counts in self.coupled.rescaled_counts().items()}
        begun = [path]
        if self.unit.extends:
            begun.append(self.books.run.product(self.books.stage, self.unit))
        for existing in filter(Path.exists, begun):
            try:
                with open_hdf5(existing) as file:
                    if "t0_fields" in file and "dimensions/series_time" not in file:
                        return None
            except ValueError:  # a damaged file is written again
                continue
        return SeriesLayout(times_of(self.record_steps, self.dt), widths) if widths else None

    def open_writer(self, path) -> BlockWriter:
        experiment = self.experiment
        rollout = experiment.rollout
        beside = [name for name in (*BESIDE, "none") if name in self.coupled.rows_of]
        beside += self.coupled.rungs
        shared = {"truth": len(self.cases)}
        if "none" in self.coupled.simulations and "none" not in beside:
            shared["none"] = len(self.cases)
        rows = self.coupled.rows
        self.series = self._series(path)
        layout = Layout(
            self.unit.members,
            times_of(self.record_steps, self.dt),
            self.grid,
            self.sides,
            fields=[
                each
                for name in (STATE, *beside)
                for each in data_sets(name, self.channels, self.sides)
            ],
            channels=self.channels,
            references={
                each: rows
                for name, rows in shared.items()
                for each in data_sets(name, self.channels, self.sides)
            },
            series=self.series,
        )
        attributes = {
            "dataset_name": experiment.name,
            "stage": "rollout",
            "closure_kind": experiment.generate.closure,
            "interval": rollout.interval,
            "stride": self.coupled.coupling.stride,
            "strides_of_rungs": json.dumps(
                {rung.name: choice.stride for rung, choice in self.coupled.coupling.rungs}
            ),
            "length": experiment.physics.length,
            "dt": self.dt,
            "seed": self.coupled.seed,
            "row_case": [case for case, _ in rows],
            "row_member": [member for _, member in rows],
            "cases": list(self.cases),
            "recipe": experiment.stage_recipe("rollout"),
        }
        if self.coupled.apart:  # lead times count from the release
            attributes["released"] = rollout.t_start
        return BlockWriter(path, layout, attributes)
