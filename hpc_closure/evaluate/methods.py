"""Who answers: the model and everything that stands beside it in the tables.

A method for generated closures is ``sample(indices, members) -> (members, s, n, n)`` on the
:class:`~hpc_closure.evaluate.context.Snapshots`, (1, s, n, n) for a point forecast.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.closure.artifact import Closure
from hpc_closure.closure.compatibility import has_mean_gp
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import Sensors, fourier_interpolation, layout_name, observe
from hpc_closure.closure.gaussian.exact import ExactLaw
from hpc_closure.evaluate.context import Inputs, Snapshots
from hpc_closure.evaluate.scores.rank_histogram import fourier_coordinates
from hpc_closure.spectral.modes.resolution import retained_modes

NO_MEAN_GP = "the model has no mean and Gaussian law of its own"
# values of fields drawn at once: on a CPU more leave its caches, on a GPU fewer leave it idle
BATCH_VALUES = {"cpu": 2**17, "cuda": 2**21}
RANKED_SHELLS = 6  # shells beyond hold less than 2e-4 of the published noise's variance

Method = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Moments:
    """What is known exactly about p(U | y).

    Attributes:
        mean: indices (s,) -> conditional mean (s, n, n).
        variance: pointwise variance averaged over the grid: a number, or indices -> (s,).
        variance_at: indices -> pointwise variance (s, n, n).
        whiten: fields (..., n, n) -> coordinates (..., d) that are independent under the law
            (:func:`~hpc_closure.evaluate.scores.rank_histogram.fourier_coordinates`); None = one
            pixel per field.
    """

    mean: Callable[[Tensor], Tensor]
    variance: float | Callable[[Tensor], Tensor] | None = None
    variance_at: Callable[[Tensor], Tensor] | None = None
    whiten: Callable[[Tensor], Tensor] | None = None


class Methods:
    """The methods on one grid with one sensor layout.

    Args:
        inputs: what the evaluation reads.
        snapshots: what is answered.
        layout: of the sensors, or None.
        pool: (P, n, n) closures that climatology draws from.
    """

    def __init__(self, inputs: Inputs, snapshots: Snapshots, layout, pool: Tensor):
        self.inputs, self.snapshots = inputs, snapshots
        self.layout, self.pool = layout, pool
        experiment = inputs.experiment
        self.sensors_in_words = layout_name(layout)
        self.seed = experiment.evaluate.seed
        self.grid = snapshots.states.shape[-1]
        self.readings = None
        if layout is not None:
            rows = range(len(snapshots.states))
            length = experiment.physics.length
            self.readings = observe(snapshots.closures, layout, experiment.seed, rows, 0, length)
        problem = experiment.problem.replace(grid=self.grid)
        self.law = ExactLaw.of(problem, inputs.target, experiment.generate.interval)
        refusals = {name: self._refusal(one) for name, one in inputs.compared.items()}
        self.refusals = {name: reason for name, reason in refusals.items() if reason}
        self._last: tuple[Tensor, Tensor] | None = None  # block and variance

    def sensors(self, index) -> Sensors | None:
        """Readings of some snapshots."""
        if self.readings is None:
            return None
        return self.readings.rows(index)

    @property
    def samplers(self) -> dict[str, Method]:
        """Methods by name, those that apply; each looks at the stop flag before it answers."""
        closure, options = self.inputs.closure, self.inputs.experiment.evaluate.sampler.options()
        samplers: dict[str, Method] = {}
        samplers[self.inputs.model] = partial(self.drawn, closure, options)
        if has_mean_gp(closure.config):
            # the same noise as the model's: what differs is the generator's work
            samplers["mean_gp"] = partial(self.drawn, closure, {"method": "mean_gp"})
        for name, other in self.inputs.compared.items():
            if name not in self.refusals:
                samplers[name] = partial(self.drawn, other, {})
        samplers |= {"none": self.none, "climatology": self.climatology}
        if self.law is not None:
            samplers |= {"oracle": self.oracle, "physics": self.physics}
        elif self.inputs.replicas is not None:
            samplers["oracle"] = self.replicas
        if self._regular:
            samplers["fourier"] = self.fourier
        return {name: self._stoppable(sample) for name, sample in samplers.items()}

    def _stoppable(self, sample: Method) -> Method:
        def checked(indices: Tensor, members: int) -> Tensor:
            self.inputs.stop.check()
            return sample(indices, members)

        return checked

    @property
    def absent(self) -> dict[str, str]:
        """Methods that do not apply, and why."""
        reasons = dict(self.refusals)
        if not has_mean_gp(self.inputs.closure.config):
            reasons["mean_gp"] = NO_MEAN_GP
        if self.layout is None:
            reasons["fourier"] = "there are no sensors"
        elif not self._regular:
            reasons["fourier"] = "the layout is scattered"
        if self.law is None:
            reasons["physics"] = "no exact law is known for this closure"
            if self.inputs.replicas is None:
                reasons["oracle"] = reasons["physics"] + ", and there are no replicas"
        return reasons

    def _refusal(self, closure: Closure) -> str:
        """Why a compared closure does not answer with this layout; "" where it does."""
        spacing = self.inputs.experiment.generate.spacing
        conditions, every = closure.config["conditions"], closure.target.get("every")
        if (conditions["history"] or conditions.get("previous")) and every != spacing:
            return f"it reads states {every} apart, the stored ones are {spacing:g} apart"
        here = self.inputs.experiment.train_grid
        if self.inputs.target == "subgrid" and closure.header.size != here:
            return f"it is what a solver on {closure.header.size}^2 lacks, not one on {here}^2"
        try:
            self.drawn(closure, {}, torch.tensor([0]), 1)
        except ValueError as error:  # its own words for conditions that are not those it knows
            return str(error)
        return ""

    @property
    def _regular(self) -> bool:
        return self.layout is not None and self.layout.layout == "regular"

    def moments(self) -> Moments | None:
        """The exact law in the words of the scores."""
        law, states = self.law, self.snapshots.states
        if law is None:
            return None
        free = self.layout is None  # sensors leave almost no variance in the large scales
        shells = min(RANKED_SHELLS, self.grid // 2 - 1)
        # coordinates of another law are not independent: one pixel per field
        whiten = (lambda fields: fourier_coordinates(fields, shells)) if law.homogeneous else None

        def variance(indices: Tensor) -> Tensor:
            return self._variance_at(indices).mean((-2, -1))

        return Moments(
            mean=lambda indices: law.mean(states[indices], self.sensors(indices)),
            variance=(law.variance if law.homogeneous else variance) if free else None,
            variance_at=self._variance_at if free else None,
            whiten=whiten if free else None,
        )

    def _variance_at(self, indices: Tensor) -> Tensor:
        """The law's pointwise variance; the last block's is kept, for several ask for it."""
        assert self.law is not None
        if self._last is None or not torch.equal(self._last[0], indices):
            self._last = indices, self.law.variance_at(self.snapshots.states[indices])
        return self._last[1]

    # the methods

    def drawn(
        self, closure: Closure, options: Mapping[str, Any], indices: Tensor, members: int
    ) -> Tensor:
        """Samples of a trained closure, of several snapshots at once."""
        states, out = self.snapshots.states, []
        at_once = max(1, BATCH_VALUES[closure.device.type] // (members * states[0].numel()))
        for part in indices.split(at_once):
            self.inputs.stop.check()
            out.append(self._batch(closure, options, part, members))
        return torch.cat(out).transpose(0, 1).contiguous()

    def _batch(
        self, closure: Closure, options: Mapping[str, Any], indices: Tensor, members: int
    ) -> Tensor:
        """Samples of a few snapshots, (s, members, n, n)."""
        ids = [
            [keyed_noise.pair(member, i) for member in range(members)] for i in indices.tolist()
        ]
        history, previous = self._past(closure, indices)
        if previous is not None and self.inputs.experiment.rollout.last_closures == "moved":
            # as in the coupled run, others for each member: a state of its own for each
            indices = indices.repeat_interleave(members)
            ids = [[one] for row in ids for one in row]
            previous = self._moved(previous.repeat_interleave(members, 0), ids)
            history = None if history is None else history.repeat_interleave(members, 0)
        drawn = closure.sample(
            self.snapshots.states[indices],
            sensors=self.sensors(indices),
            history=history,
            previous=previous,
            members=ids,
            seed=self.seed,
            **options,
        )
        return drawn.reshape(-1, members, *drawn.shape[-2:])

    def _past(self, closure: Closure, indices: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """History (s, H, n, n) and last closures (s, P, n, n) where a closure reads them."""
        conditions = closure.config["conditions"]
        stored = (("history", self.snapshots.history), ("previous", self.snapshots.previous))
        history, previous = (
            (
                fields[indices][:, : conditions[name]]
                if conditions.get(name) and fields is not None
                else None
            )
            for name, fields in stored
        )
        return history, previous

    def _moved(self, closures: Tensor, ids: list[list[int]]) -> Tensor:
        """Closures (B, P, n, n) moved in space, each row by a distance of its own."""
        physics = self.inputs.experiment.physics
        own = band(retained_modes(self.grid), physics.length, physics.dimensions)
        factors = keyed_noise.moves(own.grid, self.seed, "evaluate", [one for (one,) in ids])
        moved = own.to_spectral(closures.double()) * factors[:, None]
        return own.to_physical(moved, self.grid).to(closures)

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

    def replicas(self, indices: Tensor, members: int) -> Tensor:
        """Closures of the DNS that share the resolved past of a snapshot, but the truth's."""
        inputs, keys = self.inputs, self.snapshots.keys
        drawn = [inputs.closures_of_replicas(keys[i], self.grid)[1:] for i in indices.tolist()]
        return torch.stack(drawn, dim=1)

    def physics(self, indices: Tensor, members: int) -> Tensor:
        assert self.law is not None
        regular = self.sensors(indices) if self._regular else None
        return self.law.known_term(self.snapshots.states[indices], regular)[None]

    def fourier(self, indices: Tensor, members: int) -> Tensor:
        sensors = self.sensors(indices)
        assert sensors is not None
        return fourier_interpolation(sensors, self.grid)[None]

    def climatology(self, indices: Tensor, members: int) -> Tensor:
        """Closures of the training members, other ones for every snapshot."""
        rng = np.random.default_rng((self.seed, int(indices[0])))
        picks = rng.integers(len(self.pool), size=(members, len(indices)))
        return self.pool[torch.from_numpy(picks)]
