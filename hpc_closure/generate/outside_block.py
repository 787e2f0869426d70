"""Closure targets of stored trajectories of others: the defect of a reduced solver, by blocks."""

import numpy as np
import torch

from hpc_closure.closure.targets import reduced_problem, users_solver
from hpc_closure.data.forecasts import Forecaster
from hpc_closure.data.layout import STATE, Layout, by_data_set, data_sets
from hpc_closure.data.outside.view import OutsideData
from hpc_closure.data.writer import BlockWriter
from hpc_closure.experiment.schema import Experiment
from hpc_closure.experiment.user_modules import load_python
from hpc_closure.spectral.modes.grid import Grid, resize, to_fields, to_spectra
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.outside.arrays import to_library, to_torch
from hpc_closure.work import log
from hpc_closure.work.block import Block


class Coarsening:
    """The map K from stored fields to states of the reduced solver.

    It is ``data.filter``; without, ``coarse`` of the user's solver; without, the truncation to the
    modes of the reduced grid.

    Raises:
        ValueError: there is no such function.
    """

    def __init__(self, experiment: Experiment):
        data, self.sides = experiment.data, experiment.physics.dimensions
        assert data is not None
        self.grid, self.several = experiment.data_grid, bool(experiment.physics.channel_shape)
        self.name, self._map, self._library = "", None, "numpy"
        settings = data.filter
        if settings is not None and settings.python:
            self.name = f"data.filter.python={settings.python}"
            key, expected = "data.filter.python", "a function of fields (B, C, *sides)"
            self._map = load_python(key, settings.python, expected, callable)
        elif settings is None and experiment.reduced.python:
            solver = users_solver(experiment.reduced.python)
            if hasattr(solver.solver, "coarse"):
                self.name, self._map = f"{solver.name}: coarse", solver.solver.coarse
                self._library = solver.library or "numpy"
        modes = retained_modes(self.grid)
        self.modes = min(modes, settings.modes or modes) if settings else modes
        self.factor: torch.Tensor | None = None
        if settings is not None and settings.kind == "gaussian":
            k2 = Grid(self.grid, experiment.physics.length, self.sides).k2
            own = torch.exp(-k2 * float(settings.width or 0.0) ** 2 / 24)
            self.factor = resize(own, self.modes, self.sides)

    def __call__(self, fine: np.ndarray) -> np.ndarray:
        """Return states (B, ..., m, m) of fields (B, ..., n, n), float64.

        Raises:
            ValueError: the user's function returns another shape.
        """
        fields = torch.from_numpy(np.ascontiguousarray(fine)).double()
        if self._map is not None:
            return self._of_user(fields)
        spectra = to_spectra(fields, self.modes, self.sides)
        if self.factor is not None:
            spectra = spectra * self.factor
        return to_fields(spectra, self.grid, self.sides).numpy()

    def _of_user(self, fields: torch.Tensor) -> np.ndarray:
        assert self._map is not None
        shape = (*fields.shape[: -self.sides], *[self.grid] * self.sides)
        out = self._map(to_library(fields, self._library))
        try:
            states = to_torch(out).double().numpy()
        except TypeError as error:
            raise ValueError(f"{self.name} returned {error}") from None
        if states.shape != shape:
            raise ValueError(
                f"{self.name} returned the shape {states.shape} for {tuple(fields.shape)}, "
                f"expected {shape}: fields on {self.grid} points per side (reduced.grid)"
            )
        return states


def _finite(values: np.ndarray) -> np.ndarray:
    """Return which members of fields (B, ...) are finite, (B,)."""
    return np.isfinite(values).reshape(len(values), -1).all(1)


class OutsideBlock(Block):
    """Filtered states of stored trajectories, with the defect of the reduced solver.

    A step is one stored closure: its state and the state one closure interval later are read.

    Args:
        unit, books, session, domain: see :class:`~hpc_closure.work.block.Block`.
    """

    def __init__(self, unit, books, session, domain):
        super().__init__(unit, books, session, domain)
        experiment: Experiment = session.experiment
        data, generate = experiment.data, experiment.generate
        assert data is not None and data.found is not None
        self.experiment, self.source = experiment, OutsideData(experiment)
        self.coarsen = Coarsening(experiment)
        self.span, self.every = generate.closure_interval, generate.record.every
        self.ahead = round(self.span / data.found.spacing)
        self.between = round(self.every / data.found.spacing)
        self.record_steps = range(0, round(generate.t_end / self.every) + 1)
        problem = reduced_problem(experiment.problem, experiment.data_grid, "subgrid")
        self.solver = Forecaster(problem, self.span)
        self.lost = np.array([member in self.source.lost for member in unit.members])
        self._index, self._next = 0, (-1, np.empty(0))  # index of a stored time, its state

    @property
    def step_index(self) -> int:
        return self._index

    def initialise(self) -> None:
        self._index = 0

    def advance(self, steps: int) -> None:
        self._index += steps

    def record(self):
        now = self._index * self.between
        state, later = self._state(now), self._state(now + self.ahead)
        self._next = now + self.ahead, later
        known = state.copy()
        known[self.lost | ~_finite(state)] = 0.0  # a lost member reaches no solver
        closure = (later - self.solver.after(known)) / self.span
        self._mark_lost(state, closure)
        state, closure = (self._without_lost(one) for one in (state, closure))
        names = self.channels, self.experiment.physics.dimensions
        fields = by_data_set(STATE, state, *names) | by_data_set("closure", closure, *names)
        return fields, {}, {}

    def _state(self, index: int) -> np.ndarray:
        """Read the filtered states of the members at a stored time, (B, ..., m, m)."""
        if self._next[0] == index:
            return self._next[1]
        fine = np.stack([self.source.read(member, index) for member in self.unit.members])
        return self.coarsen(fine)

    def _mark_lost(self, *fields: np.ndarray) -> None:
        """Mark members with values that are not finite, from now on, and log them.

        Raises:
            RuntimeError: all members are lost.
        """
        before = self.lost.copy()
        for values in fields:
            self.lost |= ~_finite(values)
        when = f"at t = {self._index * self.every:g}"
        if self.lost.all() and not before.all():
            raise RuntimeError(
                f"all members of the block have values that are not finite {when}: mend the data, "
                "or the reduced solver (`hpc-closure data check`)"
            )
        for member in np.asarray(self.unit.members)[self.lost & ~before]:
            if self.domain.root:
                log.get().warning(f"member {member} is lost {when}, the others go on without it")

    def _without_lost(self, values: np.ndarray) -> np.ndarray:
        values = values.astype(self.experiment.generate.record.precision)
        values[self.lost] = np.nan
        return values

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the names of the fields of the state; empty if it has one."""
        return self.experiment.physics.channel_names

    def save_state(self) -> dict:
        return {"index": np.array(self._index), "lost": self.lost.copy()}

    def load_state(self, state: dict) -> None:
        self._index, self.lost = int(state["index"]), np.array(state["lost"], dtype=bool)

    def open_writer(self, path) -> BlockWriter:
        experiment = self.experiment
        generate, sides = experiment.generate, experiment.physics.dimensions
        names = data_sets(STATE, self.channels, sides), data_sets("closure", self.channels, sides)
        layout = Layout(
            self.unit.members,
            self.every * np.arange(len(self.record_steps)),
            experiment.data_grid,
            sides,
            generate.record.precision,
            fields=[each for both in names for each in both],
            channels=self.channels,
        )
        attributes = {
            "dataset_name": experiment.name,
            "stage": "generate",
            "closure_kind": generate.closure,
            "interval": generate.interval,
            "length": experiment.physics.length,
            "dt": generate.dt,
            "seed": experiment.seed,
            "recipe": experiment.stage_recipe("generate"),
        }
        return BlockWriter(path, layout, attributes)

    def close(self) -> None:
        self.source.close()
