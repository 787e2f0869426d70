"""What an evaluation reads: the experiment, its trained closure, its data and their split."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import hpc_closure
from hpc_closure.closure.part_report import is_closed_form
from hpc_closure.closure.targets import reduced_problem
from hpc_closure.data.held_out import HeldOut
from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.data.samples import Past
from hpc_closure.evaluate import compare
from hpc_closure.evaluate.scores import registry
from hpc_closure.evaluate.scores.budget import Origin
from hpc_closure.evaluate.scores.climate import Flow
from hpc_closure.experiment.choices import Choices
from hpc_closure.experiment.method_names import GRANTED, MODEL
from hpc_closure.experiment.schema import Experiment
from hpc_closure.spectral.modes.grid import to_fields, to_spectra
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.problem import Problem
from hpc_closure.work.session import Session

POOL = 512  # closures that climatology draws from


@dataclass
class Snapshots:
    """Held-out snapshots, evenly spread over trajectories and times.

    Attributes:
        states, closures: (S, n, n).
        history: (S, H, n, n), newest first, or None.
        previous: closures (S, P, n, n), newest first, or None.
        keys: (member, stored time) of each.
    """

    states: Tensor
    closures: Tensor
    history: Tensor | None
    previous: Tensor | None
    keys: list[tuple[int, int]]

    @property
    def trajectories(self) -> Tensor:
        """(S,) member of each."""
        return torch.tensor([member for member, _ in self.keys])


class Inputs:
    """The experiment with its model and data.

    Attributes:
        experiment: the settings.
        run: paths of the run folder.
        stop: looked at between pieces of work; there is nothing to save.
        closure: the trained closure.
        chosen: further closures (``evaluate.compare``) and where they are from.
        compared: these, loaded, by the name of their rows.
        scores: of the modules of ``evaluate.scores``.
        held: where starts, truth and snapshots are from.
        data: the DNS data set of these.
        training: the data set that trained, of which climatology is; mostly the same.
        parts: ``train``, ``valid`` -> members of the latter, ``test`` -> of the former.
        window: indices of the stored times that score.
        replicas: the true ensemble of a subgrid closure; None where there is none.
    """

    def __init__(self, experiment: Experiment, session: Session):
        self.experiment, self.run, self.stop = experiment, session.run, session.stop
        self.device = session.device
        self.closure = hpc_closure.load(self.run.model).to(session.device)
        self.chosen = compare.chosen(experiment)
        self.compared = {
            one.name: hpc_closure.load(one.path).to(session.device) for one in self.chosen
        }
        self.scores = registry.load(experiment.evaluate.scores)
        self.held = HeldOut.of(experiment)
        self.data = self.training = DataSet(self.held.run.data)
        if self.held.second:
            self.training = DataSet(self.run.data)
        tests = self.data.split(self.held.split)["test"]
        self.parts = {**self.training.split(experiment.train.split), "test": tests}
        self.window = self._window(self.data)
        self.replicas = self._replicas()

    def _window(self, data: DataSet) -> range:
        """Indices of a data set's stored times in ``train.window``."""
        window = self.experiment.train.window
        return data.window(*window) if window else range(len(data.times))

    def _replicas(self) -> CoupledEnsemble | None:
        if not self.held.replicas.members:
            return None
        books = self.held.books("replicas")
        if reason := books.incomplete(books.survey()):
            raise ValueError(reason)
        return CoupledEnsemble([product.path for product in books.products()])

    def _keys(self, indices: list[int]) -> list[tuple[int, int]]:
        """(member, stored time) of the snapshots that can be scored.

        Where there are replicas, those of their starts from half of the time on that they are
        pinned, till they are released: before they may remember how they began.
        """
        if self.replicas is None:
            return [(member, index) for member in self.parts["test"] for index in indices]
        half = self.replicas.start - 0.5 * self.held.replicas.pinned
        pinned = self.replicas.times[
            (self.replicas.times >= half - 1e-9)
            & (self.replicas.times < self.replicas.start + 1e-9)
        ]
        now = [index for index in indices if np.abs(pinned - self.data.times[index]).min() < 1e-6]
        return [(case, index) for case in self.replicas.cases for index in now]

    @property
    def model(self) -> str:
        """The method's name of the trained closure."""
        return GRANTED if self.closure.config["conditions"]["physics"] else MODEL

    @property
    def against(self) -> str:
        """The method with which the others are compared start by start."""
        name = self.experiment.evaluate.against
        return self.model if name == MODEL else name

    @property
    def closed(self) -> list[str]:
        """Methods in which no trained part acts."""
        closures = {self.model: self.closure, **self.compared}
        return [name for name, one in closures.items() if is_closed_form(one.parts())]

    @property
    def target(self) -> str:
        """Kind of the closure, e.g. ``diffusion``."""
        return self.experiment.generate.closure

    def snapshots(self, grid: int) -> Snapshots:
        """The held-out snapshots that are scored on a grid, at most ``evaluate.samples``."""
        models = (self.closure, *self.compared.values())
        past = Past(
            *(
                max(closure.config["conditions"].get(key, 0) for closure in models)
                for key in ("history", "previous")
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

        closures = fields("closure")
        if self.replicas is not None:  # truth and reference are draws of one law
            closures = torch.stack([self.closures_of_replicas(key, grid)[0] for key in keys])
        return Snapshots(
            fields("vorticity"),
            closures,
            earlier("vorticity", past.states),
            earlier("closure", past.closures),
            keys,
        )

    def reduced(self, grid: int) -> Problem:
        """What the reduced solver runs on a grid, with its own step."""
        stride = Choices(self.experiment).stride
        return reduced_problem(self.experiment.problem, grid, self.target, stride)

    def cut(self, fields: Tensor) -> Tensor:
        """Fields (..., n, n) of a solver on the grid whose modes a start knows; others as is."""
        known = self.experiment.known_grid
        if fields.shape[-1] == known:
            return fields
        spectra = to_spectra(fields.double(), retained_modes(known))
        return to_fields(spectra, known).to(fields.dtype)

    def origin(self, snapshots: Snapshots) -> Origin:
        """Where snapshots are from, with the states to which the reduced solver takes them."""
        problem, interval = self.experiment.problem, self.experiment.generate.interval
        reduced, span = self.reduced(snapshots.states.shape[-1]), interval * problem.dt
        states = Flow(reduced).after(snapshots.states, reduced.steps_in(span))
        return Origin(snapshots.trajectories, states, span)

    def closures_of_replicas(self, key: tuple[int, int], grid: int) -> Tensor:
        """(M, n, n) at a snapshot; the first stands for the truth, the others are the oracle."""
        assert self.replicas is not None
        case, index = key
        when = self.replicas.index(self.data.times[index] - self.replicas.start)
        stride = self.data.grid // grid
        fields = self.replicas.read_case("closure", case, when)[:, ::stride, ::stride]
        return torch.from_numpy(np.ascontiguousarray(fields))

    def climatology(self, grid: int) -> Tensor:
        """Closures (P, n, n) of random training members and stored times."""
        members, indices = self.parts["train"], self._window(self.training)
        rng = np.random.default_rng(self.experiment.evaluate.seed)
        count = min(POOL, len(members) * len(indices))
        keys = rng.choice(len(members) * len(indices), count, replace=False)
        picks = [divmod(int(key), len(indices)) for key in sorted(keys)]
        fields = [self.training.read(members[m], indices[t], "closure", grid) for m, t in picks]
        return torch.from_numpy(np.stack(fields))
