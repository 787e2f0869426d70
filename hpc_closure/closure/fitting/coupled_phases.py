"""Phases that fit a composite closure in coupled runs of the reduced solver.

=========== ======== ===========================================================================
phase       members  fits
=========== ======== ===========================================================================
steady      valid    the share of the mean's network for long runs (:mod:`steady`)
law         hold     the law of the residual, again
trajectory  train    the mean's network, the factors of regression and noise, by gradients
                     through the solver (:mod:`rollout_training`)
noise       valid    the noise amplitude, so that the spread of ensembles matches their error
balance     valid    noise and a damping rate per shell for long runs (:mod:`balance`)
=========== ======== ===========================================================================
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure.composed.generators import Generator
from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.composed.reading import CHECK_SEED
from hpc_closure.closure.fitting.phases import FitLaw, rounded, weights_of
from hpc_closure.closure.fitting.rollout_training import RolloutLoss, Scale
from hpc_closure.closure.fitting.steady import ROUNDS, LongRuns, in_words, lower
from hpc_closure.closure.model import ClosedFormPhase, Phase, RolloutTraining
from hpc_closure.closure.reductions import Reader

__all__ = [
    "CalibrateNoise",
    "ChooseShare",
    "TrainThroughSolver",
    "choose_share",
    "train_through",
]

CALIBRATIONS = 3  # rescalings of the noise of coupled runs,
MOST = 2.0  # and their largest total factor


def choose_share(model: CompositeClosure, long_runs: LongRuns) -> None:
    """Add the phases that set the share of the mean's network in long coupled runs.

    The law of the residual is then fitted again. No phase is added if the network does not read
    previous closures alone, or if a generator is trained on the network's residual.
    """
    reads = model.previous and not model.history and model.sensors_allowed != "required"
    if reads and model.mean is not None and not isinstance(model.residual, Generator):
        model.phases = (*model.phases, ChooseShare(long_runs=long_runs), FitLaw())


def train_through(
    model: CompositeClosure,
    trajectories: RolloutLoss,
    through: RolloutTraining,
    balance: Phase | None = None,
) -> None:
    """Add last phases: training through the solver, calibration of the noise, ``balance``."""
    model.phases = (*model.phases, TrainThroughSolver(through=through, trajectories=trajectories))
    if model.config["residual"] != "none":
        judged = replace(through, steps=0)
        model.phases = (*model.phases, CalibrateNoise(through=judged, trajectories=trajectories))
    if balance is not None:
        model.phases = (*model.phases, balance)


@dataclass(frozen=True, kw_only=True)
class ChooseShare(ClosedFormPhase):
    """Choose per shell the share of the mean's network at which long coupled runs are stable."""

    name: str = "steady"
    share: float = 0.0
    members: str = "valid"
    long_runs: LongRuns

    def begin(self, model: CompositeClosure, reader: Reader) -> dict[str, Any]:
        expected = model.expected_rescaled
        assert expected is not None
        share = torch.ones(model.guarded, dtype=torch.float64)
        tried = []
        for _ in range(ROUNDS):
            model.statistics = replace(model.statistics, mean_share=share)
            found = self.long_runs.run(model, reader)
            tried.append((share, found))
            less = lower(share, found, float(expected[0]))
            if less is None or bool((less == share).all()):
                break
            share = less
        if bool((share == 1).all()):
            model.statistics = replace(model.statistics, mean_share=None)
        return {"expected_rescaled": round(float(expected[0]), 4), "tried": in_words(tried)}


@dataclass(frozen=True, kw_only=True)
class TrainThroughSolver(Phase):
    """Train on scores of coupled ensembles against the DNS."""

    name: str = "trajectory"
    share: float = 0.0
    members: str = "train"
    through: RolloutTraining
    trajectories: RolloutLoss

    def begin(self, model: CompositeClosure, reader: Reader) -> dict[str, Any]:
        """Score coupled ensembles before training, as units of the loss."""
        reader = reader.in_memory()
        scale = self.trajectories.scale(model, reader, CHECK_SEED)
        if not bool(scale.crps.isfinite().all()):
            lost = int(scale.crps.isfinite().sum()) + 1
            raise ValueError(
                f"coupled runs of the model are not finite by closure call {lost}: training "
                f"through the solver needs stable runs; lower train.rollout_training.horizon"
            )
        model.statistics = replace(
            model.statistics, trajectory_scale=scale.crps, trajectory_power=scale.power
        )
        (starts,) = reader.sum(sum(len(batch["state"]) for batch in reader))
        return {"crps": rounded(scale.crps, 4), "starts": starts}

    def loss(self, model: CompositeClosure, batch: dict, seed: int, step: int) -> Tensor:
        """Compute the loss (B,) of :class:`~.rollout_training.RolloutLoss`."""
        statistics = model.statistics
        assert statistics.trajectory_scale is not None and statistics.trajectory_power is not None
        scale = Scale(statistics.trajectory_scale, statistics.trajectory_power)
        return self.trajectories.loss(model, batch, scale, seed, step)

    def parameters(self, model: CompositeClosure) -> list[nn.Parameter]:
        return weights_of(model.mean, model.adjustment)


@dataclass(frozen=True, kw_only=True)
class CalibrateNoise(ClosedFormPhase):
    """Scale the noise per shell until the spread of coupled ensembles matches their error.

    This uses unseen members: an ensemble is underdispersive beyond the starts of its training, and
    a score near its minimum hardly depends on the spread.
    """

    name: str = "noise"
    share: float = 0.0
    members: str = "valid"
    through: RolloutTraining
    trajectories: RolloutLoss

    def begin(self, model: CompositeClosure, reader: Reader) -> dict[str, Any]:
        reader = reader.in_memory()
        factor = torch.ones(model.band.grid.num_shells, dtype=torch.float64)
        ratios = []
        for _ in range(CALIBRATIONS):
            ratio = self.trajectories.spread_skill(model, reader, CHECK_SEED)
            ratios.append(float(ratio.log().mean().exp()))
            factor[1:] = (factor[1:] / ratio).clamp(1 / MOST, MOST)
            model.statistics = replace(model.statistics, trajectory_noise=factor.clone())
        return {
            "spread_skill": [round(ratio_mean, 3) for ratio_mean in ratios],
            "noise_factor": rounded(factor),
        }
