"""Who answers: the model and everything that stands beside it in the tables.

A contender for generated closures is ``sample(indices, members) -> (members, s, n, n)`` on
:class:`Snapshots`; see :func:`hpc_closure.evaluate.generated.score_generated`.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.baselines import fourier, physics
from hpc_closure.closure.conditions import Sensors
from hpc_closure.closure.exact import ExactLaw
from hpc_closure.closure.sensors import describe, observe
from hpc_closure.data.reader import DataSet
from hpc_closure.evaluate.generated import Law
from hpc_closure.evaluate.rank_histogram import fourier_coordinates
from hpc_closure.evaluate.rows import GRANTED
from hpc_closure.generate.dns import full_problem
from hpc_closure.work.stop import Stop

ROW = 1_000_003  # a member's id on snapshot i is member * ROW + i, so no two draws are the same
POOL = 512  # closures that climatology draws from
RANKED_SHELLS = 6  # shells beyond hold less than 2e-4 of the published noise's variance


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

    @classmethod
    def read(cls, data: DataSet, members, indices: range, grid: int, count: int, history: int):
        """Up to ``count`` snapshots of ``members`` at the stored times ``indices``."""
        indices = range(max(indices.start, history), indices.stop)
        total = len(members) * len(indices)
        count = min(count, total)
        if not count:
            raise ValueError("there are no held-out snapshots; see train.split and train.window")
        chosen = [divmod(number * total // count, len(indices)) for number in range(count)]
        keys = [(members[m], indices[t]) for m, t in chosen]

        def fields(name, lag=0):
            rows = [data.read(member, index - lag, name, grid) for member, index in keys]
            return torch.from_numpy(np.stack(rows))

        earlier = [fields("vorticity", lag) for lag in range(1, history + 1)]
        return cls(
            fields("vorticity"),
            fields("closure"),
            torch.stack(earlier, dim=1) if earlier else None,
            torch.tensor([member for member, _ in keys]),
        )


def name_of(closure) -> str:
    """The method's name of a trained closure."""
    return GRANTED if closure.config["conditions"]["physics"] else "model"


def climatology_pool(data: DataSet, members, indices: range, grid: int, seed: int) -> Tensor:
    """Closures (P, n, n) of random members and stored times, which climatology draws from."""
    rng = np.random.default_rng(seed)
    count = min(POOL, len(members) * len(indices))
    keys = rng.choice(len(members) * len(indices), count, replace=False)
    picks = [divmod(int(key), len(indices)) for key in sorted(keys)]
    fields = [data.read(members[m], indices[t], "closure", grid) for m, t in picks]
    return torch.from_numpy(np.stack(fields))


class Contenders:
    """The contenders of one grid and one sensor layout.

    Args:
        experiment: the experiment.
        closure: the loaded model.
        snapshots: what is answered.
        layout: of the sensors, or None.
        pool: (P, n, n), see :func:`climatology_pool`.
        stop: looked at before every answer.
    """

    def __init__(
        self, experiment, closure, snapshots: Snapshots, layout, pool: Tensor, stop: Stop
    ):
        self.experiment, self.closure, self.snapshots = experiment, closure, snapshots
        self.layout, self.pool, self.stop = layout, pool, stop
        self.name = describe(layout)
        self.seed = experiment.evaluate.seed
        self.grid = snapshots.states.shape[-1]
        self.readings = None
        if layout is not None:
            rows = range(len(snapshots.states))
            length = experiment.physics.length
            self.readings = observe(snapshots.closures, layout, experiment.seed, rows, 0, length)
        problem = replace(full_problem(experiment), grid=self.grid)
        generate = experiment.generate
        self.law = ExactLaw.of(problem, generate.closure, generate.interval)

    def sensors(self, index) -> Sensors | None:
        """Readings of some snapshots."""
        if self.readings is None:
            return None
        values, positions, noise_std = self.readings
        return Sensors(values[index], positions, noise_std)

    @property
    def samplers(self) -> dict:
        """Method -> sampler, those that apply."""
        own = name_of(self.closure)
        found = {own: self.model, "none": self.none, "climatology": self.climatology}
        if self.law is not None:
            found |= {"oracle": self.oracle, "physics": self.physics}
        if self._regular:
            found["fourier"] = self.fourier
        return {name: self._stoppable(sample) for name, sample in found.items()}

    def _stoppable(self, sample):
        def watched(indices: Tensor, members: int) -> Tensor:
            self.stop.check()
            return sample(indices, members)

        return watched

    @property
    def absent(self) -> dict[str, str]:
        """Methods that do not apply, and why."""
        reasons = {}
        if self.layout is None:
            reasons["fourier"] = "there are no sensors"
        elif not self._regular:
            reasons["fourier"] = "the layout is scattered"
        if self.law is None:
            reasons["oracle"] = reasons["physics"] = "no exact law is known for this closure"
        return reasons

    @property
    def _regular(self) -> bool:
        return self.layout is not None and self.layout.layout == "regular"

    def reference(self) -> Law | None:
        """The exact law in the words of the scores."""
        law, states = self.law, self.snapshots.states
        if law is None:
            return None
        free = self.layout is None  # sensors leave almost no variance in the large scales
        shells = min(RANKED_SHELLS, self.grid // 2 - 1)
        return Law(
            mean=lambda indices: law.mean(states[indices], self.sensors(indices)),
            variance=law.variance if free else None,
            whiten=(lambda fields: fourier_coordinates(fields, shells)) if free else None,
        )

    # the contenders

    def model(self, indices: Tensor, members: int) -> Tensor:
        drawn, history = [], self.snapshots.history
        for index in indices.tolist():
            self.stop.check()
            drawn.append(
                self.closure.sample(
                    self.snapshots.states[index],
                    sensors=self.sensors(index),
                    history=None if history is None else history[index],
                    members=[member * ROW + index for member in range(members)],
                    seed=self.seed,
                    **self.experiment.evaluate.sampler.options(),
                )
            )
        return torch.stack(drawn, dim=1)

    def none(self, indices: Tensor, members: int) -> Tensor:
        return torch.zeros_like(self.snapshots.closures[indices])[None]

    def oracle(self, indices: Tensor, members: int) -> Tensor:
        assert self.law is not None
        return self.law.sample(
            self.snapshots.states[indices],
            members=range(members),
            seed=self.seed,
            call=int(indices[0]),
            sensors=self.sensors(indices),
        )

    def physics(self, indices: Tensor, members: int) -> Tensor:
        assert self.law is not None
        regular = self.sensors(indices) if self._regular else None
        return physics(self.law, self.snapshots.states[indices], regular)[None]

    def fourier(self, indices: Tensor, members: int) -> Tensor:
        sensors = self.sensors(indices)
        assert sensors is not None
        return fourier(sensors, self.grid)[None]

    def climatology(self, indices: Tensor, members: int) -> Tensor:
        """Closures of the training members, other ones for every snapshot."""
        rng = np.random.default_rng((self.seed, int(indices[0])))
        picks = rng.integers(len(self.pool), size=(members, len(indices)))
        return self.pool[torch.from_numpy(picks)]
