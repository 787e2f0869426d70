r"""Noise and damping per shell with which long coupled runs have the energy of the DNS.

A closure that is right over a few calls may let the energy of a shell drift over hundreds: its
error in the energy budget of a shell is small beside what passes through, and adds up until the
shell's own transfer balances it. So the reduced solver runs from states of the validation
trajectories, with draws of the closure, far longer than in training. A shell with too much energy
loses the noise that was added for the spread of short runs. If that does not suffice it gets a
damping rate :math:`\delta`, and one with too little energy a growth rate: the closure's mean is
:math:`-\delta\,\hat w` more. That is a change of the regression's coefficient of the state, so
draws cost as much as before. Drains of bare solvers (:mod:`hpc_closure.generate.pilot`) do the
same, and are fitted one interval ahead.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.composed.reading import snapshots
from hpc_closure.closure.composed.statistics import Statistics
from hpc_closure.closure.fitting.phases import rounded
from hpc_closure.closure.fitting.steady import ERRORS, LongRuns, RunResult
from hpc_closure.closure.model import ClosedFormPhase
from hpc_closure.closure.reductions import Reader

__all__ = ["BalanceEnergy", "damp"]

ROUNDS = 12  # largest number of trial runs
GAIN = 0.5  # first change of a rate, in damping rates of the DNS's closure, per log of the energy
FLOOR = 0.05  # least such damping rate, in rms of the closure over that of the state
SLOWER, FASTER = 0.4, 1.5  # factors of a shell's gain after a change of sign, and without one
NEAR = 0.05  # relative error of a shell's energy that is left
LEAST = 0.1  # trained factors of a coefficient are taken to be at least as large


@dataclass(frozen=True, kw_only=True)
class BalanceEnergy(ClosedFormPhase):
    """Change noise and damping of each shell until long coupled runs have the DNS's energy."""

    name: str = "balance"
    share: float = 0.0
    members: str = "valid"
    long_runs: LongRuns

    def begin(self, model: CompositeClosure, reader: Reader) -> dict[str, Any]:
        """Lower the noise, then find rates, and use the best; returns noise and all trials."""
        found = self.lower_noise(model, reader)
        plain, gain = model.statistics, GAIN * damping(model, reader)[1:]
        rates, before = torch.zeros(model.band.grid.num_shells, dtype=torch.float64), None
        tried = [(rates.clone(), found)]
        best, result = tried[0]
        while len(tried) < ROUNDS and bool(off(result).any()):
            wrong = off(found)
            if found.lost or worst(found) > worst(result) + NEAR:
                # too far: from the best rates again, more slowly
                rates, wrong, before = best.clone(), off(result), None
                gain *= SLOWER
            elif before is not None:
                gain *= torch.where(wrong * before < 0, SLOWER, FASTER)
            rates[1:] += gain * wrong
            damp(model, plain, rates)
            before, found = wrong, self.long_runs.run(model, reader)
            tried.append((rates.clone(), found))
            best, result = min(tried, key=lambda trial: (trial[1].lost, worst(trial[1])))
        damp(model, plain, best)
        noise = plain.trajectory_noise
        report = {} if noise is None else {"noise": rounded(noise)}
        return {**report, "tried": [in_words(*each) for each in tried]}

    def lower_noise(self, model: CompositeClosure, reader: Reader) -> RunResult:
        """Undo the scaling of the noise in shells with too much energy; returns the last run.

        Noise that is scaled to the spread of ensembles feeds a shell over hundreds of calls.
        """
        found, noise = self.long_runs.run(model, reader), model.statistics.trajectory_noise
        heavy = off(found) > 0
        if noise is None or not bool((heavy & (noise[1:] > 1)).any()):
            return found
        noise = noise.clone()
        noise[1:] = torch.where(heavy, noise[1:].clamp(max=1.0), noise[1:])
        model.statistics = replace(model.statistics, trajectory_noise=noise)
        return self.long_runs.run(model, reader)


def worst(found: RunResult) -> float:
    """Return the largest error of a shell's energy, as a logarithm; 0 if all may be chance."""
    return float(off(found).abs().max())


def damping(model: CompositeClosure, reader: Reader) -> Tensor:
    """Compute the size (shells,) of the rates at which the DNS's closures damp or feed a shell.

    It is at least FLOOR times the closure's rms over the state's.
    """
    work, closure, power = torch.zeros(3, model.band.grid.num_shells, dtype=torch.float64)
    for frames_hat, target_hat, _ in snapshots(model, reader):
        state = frames_hat[:, 0]
        for total, product in (
            (work, (target_hat * state.conj()).real),
            (closure, target_hat.abs().square()),
            (power, state.abs().square()),
        ):
            total += model.band.grid.shell_sum(product).flatten(0, -2).sum(0).cpu()
    work, closure, power = reader.sum(work, closure, power)
    power = power.clamp(min=1e-300)
    return torch.maximum(work.abs() / power, FLOOR * (closure / power).sqrt())


def off(found: RunResult) -> Tensor:
    """Return the logarithm (shells,) of energy over that of the DNS, 0 where it may be chance."""
    wrong = found.ratio.clamp(min=1e-3).log()
    least = (ERRORS * found.error / found.ratio.clamp(min=1e-3)).clamp(min=NEAR)
    return torch.where(found.judged & (wrong.abs() > least), wrong, 0.0)


def damp(model: CompositeClosure, plain: Statistics, rates: Tensor) -> None:
    """Give a model the statistics ``plain`` with damping rates (shells,) of the state added."""
    library, coefficients = model.library, plain.library.clone()
    row = library.names.index("u") if library.is_vector else model.feature_set.own
    if model.adjustment is not None:
        factors = model.adjustment().terms.detach().double().cpu()
        rates = rates / factors[row].clamp(min=LEAST)
    coefficients[row] -= rates[model.band.group_shell]
    model.adopt(replace(plain, library=coefficients))


def in_words(rates: Tensor, found: RunResult) -> dict[str, Any]:
    """Describe rates and results of a trial, for the log."""
    return {
        "rates": [float(f"{rate:.3g}") for rate in rates[1:].tolist()],
        "energy": [round(float(value), 3) for value in found.ratio],
        "error": [round(float(value), 3) for value in found.error],
        "rescaled_share": round(found.rescaled, 4),
        "lost": found.lost,
    }
