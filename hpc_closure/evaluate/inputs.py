"""What an evaluation reads: the experiment, its trained closure, its data and their split."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import hpc_closure
from hpc_closure.closure.parts import is_closed_form
from hpc_closure.data.reader import DataSet
from hpc_closure.evaluate import compare
from hpc_closure.evaluate.rows import GRANTED
from hpc_closure.experiment.schema import Experiment
from hpc_closure.work.session import Session

POOL = 512  # closures that climatology draws from


@dataclass
class Snapshots:
    """Held-out snapshots, evenly spread over trajectories and times.

    Attributes:
        states, closures: (S, n, n).
        history: (S, H, n, n), newest first, or None.
        trajectories: (S,) member of each.
    """

    states: Tensor
    closures: Tensor
    history: Tensor | None
    trajectories: Tensor


class Inputs:
    """The experiment with its model and data.

    Attributes:
        experiment: the settings.
        run: paths of the run folder.
        stop: looked at between pieces of work; there is nothing to save.
        closure: the trained closure.
        chosen: further closures (``evaluate.compare``) and where they are from.
        compared: these, loaded, by the name of their rows.
        data: the DNS data set.
        parts: ``train``, ``valid``, ``test`` -> members.
        window: indices of the stored times that train and score.
    """

    def __init__(self, experiment: Experiment, session: Session):
        self.experiment, self.run, self.stop = experiment, session.run, session.stop
        self.closure = hpc_closure.load(self.run.model).to(session.device)
        self.chosen = compare.chosen(experiment)
        self.compared = {
            one.name: hpc_closure.load(one.path).to(session.device) for one in self.chosen
        }
        self.data = DataSet(self.run.data)
        self.parts = self.data.split(experiment.train.split)
        window = experiment.train.window
        self.window = self.data.window(*window) if window else range(len(self.data.times))

    @property
    def model(self) -> str:
        """The method's name of the trained closure."""
        return GRANTED if self.closure.config["conditions"]["physics"] else "model"

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
        members = self.parts["test"]
        closures = (self.closure, *self.compared.values())
        history = max(closure.config["conditions"]["history"] for closure in closures)
        indices = range(max(self.window.start, history), self.window.stop)
        total = len(members) * len(indices)
        count = min(self.experiment.evaluate.samples, total)
        if not count:
            raise ValueError("there are no held-out snapshots; see train.split and train.window")
        chosen = [divmod(number * total // count, len(indices)) for number in range(count)]
        keys = [(members[m], indices[t]) for m, t in chosen]

        def fields(name, lag=0):
            rows = [self.data.read(member, index - lag, name, grid) for member, index in keys]
            return torch.from_numpy(np.stack(rows))

        earlier = [fields("vorticity", lag) for lag in range(1, history + 1)]
        return Snapshots(
            fields("vorticity"),
            fields("closure"),
            torch.stack(earlier, dim=1) if earlier else None,
            torch.tensor([member for member, _ in keys]),
        )

    def climatology(self, grid: int) -> Tensor:
        """Closures (P, n, n) of random training members and stored times."""
        members, indices = self.parts["train"], self.window
        rng = np.random.default_rng(self.experiment.evaluate.seed)
        count = min(POOL, len(members) * len(indices))
        keys = rng.choice(len(members) * len(indices), count, replace=False)
        picks = [divmod(int(key), len(indices)) for key in sorted(keys)]
        fields = [self.data.read(members[m], indices[t], "closure", grid) for m, t in picks]
        return torch.from_numpy(np.stack(fields))
