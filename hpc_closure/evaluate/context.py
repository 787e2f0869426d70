"""Load the inputs of an evaluation: experiment, trained closure, data and their split."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import hpc_closure
from hpc_closure.closure.part_report import is_closed_form
from hpc_closure.closure.targets import reduced_problem
from hpc_closure.data.forecasts import Forecaster
from hpc_closure.data.held_out import HeldOut
from hpc_closure.data.opening import open_data
from hpc_closure.data.reader import CoupledEnsemble, DataSet, strided_to
from hpc_closure.data.samples import Past
from hpc_closure.evaluate import compare
from hpc_closure.evaluate.scores import registry
from hpc_closure.evaluate.scores.generated.budget import Origin
from hpc_closure.experiment.choices import Choices
from hpc_closure.experiment.method_names import GRANTED, MODEL
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.modes.grid import to_fields, to_spectra
from hpc_closure.spectral.modes.resolution import per_side, points_of, retained_modes
from hpc_closure.spectral.problem import Problem
from hpc_closure.work.session import Session

POOL = 512  # largest number of training closures from which climatology draws


@dataclass
class Snapshots:
    """Held-out snapshots, evenly spread over trajectories and times.

    Attributes:
        states, closures: (S, n, n), of C channels (S, C, n, n), here and below; with as many
            sides as the flow has.
        history: the H earlier states, (S, H, n, n), newest first, or None.
        previous: the P earlier closures, (S, P, n, n), newest first, or None.
        keys: (member, index of the stored time) of each snapshot.
        own: closures of the trajectories themselves, (S, n, n). With replicas ``closures`` are
            those of the first replica instead. Sensors read these.
    """

    states: Tensor
    closures: Tensor
    history: Tensor | None
    previous: Tensor | None
    keys: list[tuple[int, int]]
    own: Tensor

    @property
    def trajectories(self) -> Tensor:
        """Member of each snapshot, (S,)."""
        return torch.tensor([member for member, _ in self.keys])


class Inputs:
    """The experiment with its models and data.

    Attributes:
        experiment: the settings.
        run: paths of the run folder.
        stop: stop flag, checked between pieces of work; nothing has to be saved.
        closure: the trained closure.
        chosen: closures of ``evaluate.compare`` and ``evaluate.seeds``, with their files.
        compared: the same closures, loaded, by method name.
        scores: scores of the modules in ``evaluate.scores``.
        test_set: source of the starts, the truth and the held-out snapshots.
        data: DNS data set of ``test_set``.
        training: data set of the training, from which climatology draws; usually ``data``.
        parts: members of each part of the split: ``train`` and ``valid`` of ``training``, ``test``
            of ``data``.
        window: indices of the stored times that are scored.
        replicas: the true ensemble of a subgrid closure; None if there is none.
    """

    def __init__(self, experiment: Experiment, session: Session):
        self.experiment, self.run, self.stop = experiment, session.run, session.stop
        self.device = session.device
        self.closure = hpc_closure.load(self.run.model).to(session.device)
        self.chosen = compare.chosen(experiment)
        self.compared = {
            item.name: hpc_closure.load(item.path).to(session.device) for item in self.chosen
        }
        self.scores = registry.load(experiment.evaluate.scores)
        self.test_set = HeldOut.of(experiment)
        self.data = self.training = open_data(self.test_set.experiment, self.test_set.run)
        if self.test_set.second:
            self.training = open_data(experiment)
        tests = self.data.split(self.test_set.split)["test"]
        self.parts = {**self.training.split(experiment.train.split), "test": tests}
        self.window = self._window(self.data)
        self.replicas = self._replicas()

    def _window(self, data: DataSet) -> range:
        """Return the indices of a data set's stored times within ``train.window``."""
        window = self.experiment.train.window
        return data.window(*window) if window else range(len(data.times))

    def _replicas(self) -> CoupledEnsemble | None:
        if not self.test_set.replicas.members:
            return None
        books = self.test_set.books("replicas")
        if reason := books.incomplete(books.survey()):
            raise ValueError(reason)
        return CoupledEnsemble([product.path for product in books.products()])

    def _keys(self, indices: list[int]) -> list[tuple[int, int]]:
        """List (member, stored time) of the snapshots that can be scored.

        With replicas these are snapshots of their starts, from the second half of the nudging to
        the release: earlier replicas may still depend on how they were initialised.
        """
        if self.replicas is None:
            return [(member, index) for member in self.parts["test"] for index in indices]
        half = self.replicas.start - 0.5 * self.test_set.replicas.spinup
        pinned = self.replicas.times[
            (self.replicas.times >= half - 1e-9)
            & (self.replicas.times < self.replicas.start + 1e-9)
        ]
        now = [index for index in indices if np.abs(pinned - self.data.times[index]).min() < 1e-6]
        return [(case, index) for case in self.replicas.cases for index in now]

    @property
    def model(self) -> str:
        """Method name of the trained closure."""
        return GRANTED if self.closure.config["conditions"]["physics_estimate"] else MODEL

    @property
    def against(self) -> str:
        """Method with which the others are compared start by start."""
        name = self.experiment.evaluate.against
        return self.model if name == MODEL else name

    @property
    def closed(self) -> list[str]:
        """Methods in which no trained part acts."""
        closures = {self.model: self.closure, **self.compared}
        return [name for name, closure in closures.items() if is_closed_form(closure.parts())]

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the fields of a state; empty if it has one."""
        return tuple(self.data.channels)

    @property
    def dimensions(self) -> int:
        """Number of sides of the fields."""
        return self.experiment.physics.dimensions

    @property
    def lengths(self) -> tuple[float, ...]:
        """Length of each side."""
        return self.experiment.physics.lengths

    @property
    def target(self) -> str:
        """Kind of the closure, e.g. ``diffusion``."""
        return self.experiment.generate.closure

    def snapshots(self, grid: int) -> Snapshots:
        """Read the held-out snapshots that are scored on a grid, at most ``evaluate.samples``."""
        models = (self.closure, *self.compared.values())
        past = Past(
            *(
                max(closure.config["conditions"].get(key, 0) for closure in models)
                for key in ("previous_states", "previous_closures")
            )
        )
        spacing = self.experiment.generate.spacing
        indices = self.data.with_past(self.window, past.lead, spacing).tolist()
        every = self._keys(indices)
        count = min(self.experiment.evaluate.samples, len(every))
        if not count:
            raise ValueError("there are no held-out snapshots; see train.split and train.window")
        keys = [every[number * len(every) // count] for number in range(count)]

        def fields(name, lag=0):
            rows = [self.data.read(member, index - lag, name, grid) for member, index in keys]
            return torch.from_numpy(np.stack(rows))

        def earlier(name, count):
            before = [fields(name, lag) for lag in range(1, count + 1)]
            return torch.stack(before, dim=1) if before else None

        closures = own = fields("closure")
        if self.replicas is not None:  # truth and reference must be draws of the same law
            closures = torch.stack([self.closures_of_replicas(key, grid)[0] for key in keys])
        return Snapshots(
            fields("state"),
            closures,
            earlier("state", past.states),
            earlier("closure", past.closures),
            keys,
            own,
        )

    def reduced(self, grid: int) -> Problem:
        """Return the problem that the reduced solver integrates on a grid, with its time step."""
        stride = Choices(self.experiment).stride
        return reduced_problem(self.experiment.problem, grid, self.target, stride)

    def equation(self, grid: int) -> Problem | None:
        """Return the problem whose terms this package has; None for equation ``external``."""
        problem = self.experiment.problem.replace(reduced_python="")
        if problem.physics.equation == "external":
            return None
        return reduced_problem(problem, grid, self.target, Choices(self.experiment).stride)

    def cut(self, fields: Tensor) -> Tensor:
        """Truncate fields (..., n, n) to the grid ``known_grid``, whose modes a start fixes."""
        known, sides = self.experiment.known_grid, self.dimensions
        if tuple(fields.shape[-sides:]) == per_side(known, sides):
            return fields
        spectra = to_spectra(fields.double(), retained_modes(known), sides)
        return to_fields(spectra, known, sides).to(fields.dtype)

    def origin(self, snapshots: Snapshots) -> Origin:
        """Return trajectories and, for the budget, the states after a reduced-solver interval.

        The budget is that of one field; with several channels, and without a reduced solver,
        there are no states.
        """
        experiment = self.experiment
        unsolved = experiment.physics.equation == "external" and not experiment.reduced.python
        if self.channels or unsolved:
            return Origin(snapshots.trajectories)
        span = self.experiment.generate.closure_interval
        return Origin(snapshots.trajectories, self.forecast(snapshots.states), span)

    def forecaster(self, grid: int) -> Forecaster:
        """Return the reduced solver on a grid, which advances states by a closure interval."""
        return Forecaster(self.reduced(grid), self.experiment.generate.closure_interval)

    def forecast(self, states: Tensor) -> Tensor:
        """Return states (B, n, n) or (B, C, n, n) after a closure interval, without a closure."""
        points = points_of(states.shape, self.dimensions)
        return torch.from_numpy(self.forecaster(points).after(states.numpy()))

    def closures_of_replicas(self, key: tuple[int, int], grid: int) -> Tensor:
        """Read the replicas' closures (M, n, n), or (M, C, n, n), at a snapshot.

        The first serves as the truth, the others are the members of ``oracle``.
        """
        assert self.replicas is not None
        case, index = key
        when = self.replicas.index(self.data.times[index] - self.replicas.start)
        fields = self.replicas.read_case("closure", case, when)
        fields = strided_to(fields, self.data.grid, grid, self.data.dimensions)
        return torch.from_numpy(np.ascontiguousarray(fields))

    def climatology(self, grid: int) -> Tensor:
        """Read closures (P, n, n) of random training members at random stored times."""
        members, indices = self.parts["train"], self._window(self.training)
        rng = np.random.default_rng(self.experiment.evaluate.seed)
        count = min(POOL, len(members) * len(indices))
        keys = rng.choice(len(members) * len(indices), count, replace=False)
        picks = [divmod(int(key), len(indices)) for key in sorted(keys)]
        fields = [self.training.read(members[m], indices[t], "closure", grid) for m, t in picks]
        return torch.from_numpy(np.stack(fields))
