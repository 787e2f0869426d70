"""Methods that are scored: the model and the references beside it in the tables.

A method for generated closures is a function ``sample(indices, members)`` of snapshots of
:class:`~hpc_closure.evaluate.context.Snapshots`. It returns (members, s, n, n), or (1, s, n, n)
for a point forecast; of C channels (members, s, C, n, n).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
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
from hpc_closure.spectral.modes.resolution import per_side, points_of, retained_modes

NO_MEAN_GP = "the model has no mean and Gaussian law of its own"
UNREAD = "replicas are draws of the law without readings, scored in other tables"
# grid values drawn in one batch: on a CPU more exceed its caches, on a GPU fewer leave it idle
BATCH_VALUES = {"cpu": 2**17, "cuda": 2**21}
RANKED_SHELLS = 6  # higher shells hold less than 2e-4 of the published noise's variance

Method = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Moments:
    """Exact moments of p(U | y), the law of the closure under the conditions y.

    Attributes:
        mean: indices (s,) -> conditional mean (s, n, n).
        variance: pointwise variance averaged over the grid: a number, or indices (s,) -> (s,).
        variance_at: indices (s,) -> pointwise variance (s, n, n).
        whiten: fields (..., n, n) -> coordinates (..., d) that are independent under the law
            (:func:`~hpc_closure.evaluate.scores.rank_histogram.fourier_coordinates`); None ranks
            one pixel per field instead.
    """

    mean: Callable[[Tensor], Tensor]
    variance: float | Callable[[Tensor], Tensor] | None = None
    variance_at: Callable[[Tensor], Tensor] | None = None
    whiten: Callable[[Tensor], Tensor] | None = None


class Methods:
    """The methods on one grid with one sensor layout.

    Args:
        inputs: experiment, closures and data.
        snapshots: the held-out states for which closures are sampled.
        layout: sensor layout, or None.
        pool: closures (P, n, n) from which climatology draws.
    """

    def __init__(self, inputs: Inputs, snapshots: Snapshots, layout, pool: Tensor):
        self.inputs, self.snapshots = inputs, snapshots
        self.layout, self.pool = layout, pool
        experiment = inputs.experiment
        self.sides = inputs.dimensions
        self.sensors_in_words = layout_name(layout, self.sides)
        self.seed = experiment.evaluate.seed
        #: points per side of the snapshots; a tuple if sides have different numbers
        self.grid = points_of(snapshots.states.shape, self.sides)
        self.readings = None
        if layout is not None:
            rows = range(len(snapshots.states))
            lengths = experiment.physics.lengths
            self.readings = observe(self.truth, layout, experiment.seed, rows, 0, lengths)
        problem = experiment.problem.replace(grid=self.grid)
        self.law = None  # exact laws are those of one field
        if not inputs.channels:
            self.law = ExactLaw.of(problem, inputs.target, experiment.generate.interval)
        refusals = {name: self._refusal(one) for name, one in inputs.compared.items()}
        self.refusals = {name: reason for name, reason in refusals.items() if reason}
        self._last: tuple[Tensor, Tensor] | None = None  # cache: indices and variance of a block

    @property
    def truth(self) -> Tensor:
        """True closures (S, n, n): with sensors those that they read, of the trajectories."""
        return self.snapshots.closures if self.layout is None else self.snapshots.own

    @cached_property
    def forecasts(self) -> Tensor:
        """States (S, n, n) after an interval of the reduced solver, which some closures read."""
        return self.inputs.forecast(self.snapshots.states).to(self.snapshots.states)

    def sensors(self, index) -> Sensors | None:
        """Return the sensor readings of some snapshots; None without sensors."""
        if self.readings is None:
            return None
        return self.readings.rows(index)

    @property
    def samplers(self) -> dict[str, Method]:
        """Applicable methods by name; each checks the stop flag before it samples."""
        closure, options = self.inputs.closure, self.inputs.experiment.evaluate.sampler.options()
        samplers: dict[str, Method] = {}
        samplers[self.inputs.model] = partial(self.drawn, closure, options)
        if has_mean_gp(closure.config):
            # the same noise as the model's, so that a difference is due to the generator
            samplers["mean_gp"] = partial(self.drawn, closure, {"method": "mean_gp"})
        for name, other in self.inputs.compared.items():
            if name not in self.refusals:
                samplers[name] = partial(self.drawn, other, {})
        samplers |= {"none": self.none, "climatology": self.climatology}
        if self.law is not None:
            samplers |= {"oracle": self.oracle, "physics": self.physics}
        elif self.inputs.replicas is not None and self.layout is None:
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
        """Reason why a method does not apply, by method."""
        reasons = dict(self.refusals)
        if not has_mean_gp(self.inputs.closure.config):
            reasons["mean_gp"] = NO_MEAN_GP
        if self.layout is None:
            reasons["fourier"] = "there are no sensors"
        elif not self._regular:
            reasons["fourier"] = "the layout is scattered"
            if self.layout.layout == "regular":
                reasons["fourier"] = "it is for one field in two dimensions"
        if self.law is None:
            reasons["physics"] = "no exact law is known for this closure"
            if self.inputs.replicas is None:
                reasons["oracle"] = reasons["physics"] + ", and there are no replicas"
            elif self.layout is not None:
                reasons["oracle"] = UNREAD
        return reasons

    def _refusal(self, closure: Closure) -> str:
        """Return why a compared closure cannot be sampled with this layout; "" if it can."""
        spacing = self.inputs.experiment.generate.spacing
        conditions, every = closure.config["conditions"], closure.target.get("every")
        if (
            conditions["previous_states"] or conditions.get("previous_closures")
        ) and every != spacing:
            return f"it reads states {every} apart, the stored ones are {spacing:g} apart"
        here = self.inputs.experiment.train_grid
        if self.inputs.target == "subgrid" and closure.header.size != here:
            return f"it is what a solver on {closure.header.size}^2 lacks, not one on {here}^2"
        try:
            self.drawn(closure, {}, torch.tensor([0]), 1)
        except ValueError as error:  # the closure says which conditions it was trained with
            return str(error)
        return ""

    @property
    def _regular(self) -> bool:
        one_field = not self.inputs.channels and self.sides == 2
        return one_field and self.layout is not None and self.layout.layout == "regular"

    def moments(self) -> Moments | None:
        """Return the moments of the exact law that the scores need; None without an exact law."""
        law, states = self.law, self.snapshots.states
        if law is None:
            return None
        # with sensors the large scales have almost no variance left, and it is not scored
        free = self.layout is None
        shells = min(RANKED_SHELLS, min(per_side(self.grid, self.sides)) // 2 - 1)
        # Fourier coordinates of an inhomogeneous law are dependent: rank one pixel per field
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
        """Compute the law's pointwise variance (s, n, n); cached, for it is read repeatedly."""
        assert self.law is not None
        if self._last is None or not torch.equal(self._last[0], indices):
            self._last = indices, self.law.variance_at(self.snapshots.states[indices])
        return self._last[1]

    # the methods

    def drawn(
        self, closure: Closure, options: Mapping[str, Any], indices: Tensor, members: int
    ) -> Tensor:
        """Draw samples (members, s, n, n) of a trained closure, in batches of snapshots."""
        states, out = self.snapshots.states, []
        at_once = max(1, BATCH_VALUES[closure.device.type] // (members * states[0].numel()))
        for part in indices.split(at_once):
            self.inputs.stop.check()
            out.append(self._batch(closure, options, part, members))
        return torch.cat(out).transpose(0, 1).contiguous()

    def _batch(
        self, closure: Closure, options: Mapping[str, Any], indices: Tensor, members: int
    ) -> Tensor:
        """Draw samples (s, members, n, n) for one batch of snapshots."""
        ids = [
            [keyed_noise.pair(member, i) for member in range(members)] for i in indices.tolist()
        ]
        reads_forecast = closure.config["conditions"].get("forecast")
        states = (self.forecasts if reads_forecast else self.snapshots.states)[indices]
        history, previous = self._past(closure, indices)
        if previous is not None and self.inputs.experiment.rollout.last_closures == "moved":
            # as in the coupled run each member has its own last closures, hence a separate row
            indices = indices.repeat_interleave(members)
            states = states.repeat_interleave(members, 0)
            ids = [[one] for row in ids for one in row]
            previous = self._moved(previous.repeat_interleave(members, 0), ids)
            history = None if history is None else history.repeat_interleave(members, 0)
        drawn = closure.sample(
            states,
            sensors=self.sensors(indices),
            history=history,
            previous=previous,
            members=ids,
            seed=self.seed,
            **options,
        )
        return drawn.reshape(-1, members, *self.snapshots.closures.shape[1:])

    def _past(self, closure: Closure, indices: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return history (s, H, n, n) and last closures (s, P, n, n), None if not read."""
        conditions = closure.config["conditions"]
        stored = (
            ("previous_states", self.snapshots.history),
            ("previous_closures", self.snapshots.previous),
        )
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
        """Translate closures (B, P, n, n), each row by its own random distance."""
        physics = self.inputs.experiment.physics
        modes = band(retained_modes(self.grid), physics.length, physics.dimensions)
        factors = keyed_noise.moves(modes.grid, self.seed, "evaluate", [key for (key,) in ids])
        factors = factors.view(-1, *[1] * (closures.ndim - factors.ndim), *factors.shape[1:])
        moved = modes.to_spectral(closures.double()) * factors
        return modes.to_physical(moved, self.grid).to(closures)

    def none(self, indices: Tensor, members: int) -> Tensor:
        """Return zero closures (1, s, n, n)."""
        return torch.zeros_like(self.snapshots.closures[indices])[None]

    def oracle(self, indices: Tensor, members: int) -> Tensor:
        """Draw from the exact law, (members, s, n, n)."""
        assert self.law is not None
        return self.law.sample(
            self.snapshots.states[indices],
            members=range(members),
            seed=self.seed,
            call=int(indices[0]),
            sensors=self.sensors(indices),
        )

    def replicas(self, indices: Tensor, members: int) -> Tensor:
        """Return the replicas' closures (M - 1, s, n, n) without the one that is the truth."""
        inputs, keys = self.inputs, self.snapshots.keys
        drawn = [inputs.closures_of_replicas(keys[i], self.grid)[1:] for i in indices.tolist()]
        return torch.stack(drawn, dim=1)

    def physics(self, indices: Tensor, members: int) -> Tensor:
        """Return the known term of the closure, (1, s, n, n)."""
        assert self.law is not None
        regular = self.sensors(indices) if self._regular else None
        return self.law.known_term(self.snapshots.states[indices], regular)[None]

    def fourier(self, indices: Tensor, members: int) -> Tensor:
        """Interpolate the readings of a regular sensor lattice, (1, s, n, n)."""
        sensors = self.sensors(indices)
        assert sensors is not None
        return fourier_interpolation(sensors, self.grid)[None]

    def climatology(self, indices: Tensor, members: int) -> Tensor:
        """Draw closures of training members, (members, s, n, n), new ones for each snapshot."""
        rng = np.random.default_rng((self.seed, int(indices[0])))
        picks = rng.integers(len(self.pool), size=(members, len(indices)))
        return self.pool[torch.from_numpy(picks)]
