r"""Compare long-time statistics of coupled runs with the filtered DNS: spectra, fluxes and laws.

The statistics are means over the second half of the stored lead times, over members and cases.
With the distance D of a statistic from the truth's, a method's *similarity* is
:math:`1 - D / D_\mathrm{none}`: 1 is perfect, 0 is no better than the bare solver, negative is
worse. Statistics and measure are those of Ross et al., J. Adv. Model. Earth Syst. 15 (2023),
for one layer as in Frezat et al. (arXiv 2111.06841): D is the root mean square over shells for
spectra and fluxes, and the Wasserstein-1 distance for laws. States of velocities have these
statistics for all components together.

The flux through a shell is the rate at which the resolved nonlinear term removes energy (or
enstrophy) from this and all larger scales, :math:`\Pi(k) = -\sum_{k' \le k} T(k')`.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpc_closure.evaluate.scores.intervals import Means, block_interval
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.spectral.diagnostics import diagnostics_of
from hpc_closure.spectral.modes.grid import to_spectra
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

BINS = 1000  # number of bins of a law
REACH = {"values": (-3.0, 3.0)}  # range of the bins in units of the truth's largest absolute value
TOTAL = (0.0, 4.0)  # the same range for energy and enstrophy
SCORES = tuple(
    Score(
        name=f"similarity_{name}",
        heading=heading,
        meaning=meaning,
        table="Similarity of long-time statistics",
        requires="the method ``none`` (coupled)",
    )
    for name, heading, meaning in (
        (
            "energy_spectrum",
            "energy spectrum",
            "similarity 1 - D / D of no closure, second half of the run, D the root mean square "
            "distance over shells from the filtered DNS: 1 is perfect, negative does harm (Ross "
            "et al., JAMES 2023; Frezat et al. 2021)",
        ),
        ("enstrophy_spectrum", "enstrophy spectrum", "the same of enstrophy"),
        ("energy_flux", "energy flux", "the same of the resolved flux through each shell"),
        ("enstrophy_flux", "enstrophy flux", "the same of enstrophy"),
        (
            "values",
            "law of values",
            "similarity of the law of the state at a point, D the Wasserstein-1 distance",
        ),
        ("energy", "law of energy", "the same of a member's energy"),
        ("enstrophy", "law of enstrophy", "the same of a member's enstrophy"),
        ("worst", "worst", "the least of these similarities"),
    )
)


class Flow:
    """Spectra and transfers of states.

    Args:
        problem: problem of the reduced solver, see
            :func:`~hpc_closure.closure.targets.reduced_problem`.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.quantities = ("energy", "enstrophy") if problem.dimensions == 2 else ("energy",)

    def simulation(self, states: Tensor) -> Simulation:
        """Return a simulation of B members in the states (B, n, n), or (B, 3, n, n, n)."""
        simulation = Simulation(self.problem, range(len(states)), 0)
        spectra = to_spectra(states.double().cpu(), simulation.grid.mode_counts)
        return simulation.load_state(0, spectra)

    def measure(self, states: Tensor) -> dict[str, Tensor]:
        """Compute ``energy_spectrum``, ``energy_transfer`` and so on, (B, shells) each."""
        transfers = [f"{quantity}_transfer" for quantity in self.quantities]
        names = [*self.quantities, *transfers]
        by_name = diagnostics_of(self.simulation(states)).spectra(names)
        return {
            name if name in transfers else f"{name}_spectrum": torch.from_numpy(part)
            for name, part in by_name.items()
        }


class Climate:
    """Statistics of methods and of the truth, accumulated lead time by lead time.

    Args:
        flow: computes spectra and transfers of states.
        truth: filtered DNS at all lead times (cases, L, n, n), or (cases, L, 3, n, n, n).
    """

    def __init__(self, flow: Flow, truth: Tensor):
        self.flow, self.since = flow, truth.shape[1] // 2
        self._number = truth.shape[1] - self.since
        self._sums: dict[str, dict[str, Tensor]] = {}
        spectra = diagnostics_of(flow.simulation(truth.flatten(0, 1)))
        largest = {name: spectra.spectrum(name).sum(-1).max() for name in flow.quantities}
        largest["values"] = truth.abs().max()
        self._edges = {
            name: float(size) * torch.linspace(*REACH.get(name, TOTAL), BINS - 1).double()
            for name, size in largest.items()
        }

    def add(self, method: str, index: int, ensemble: Tensor) -> None:
        """Add members (M, cases, ...) at lead time ``index``; the first half is ignored."""
        if index < self.since:
            return
        cases, flat = ensemble.shape[1], ensemble.flatten(0, 1).cpu().double()
        parts = self.flow.measure(flat)
        totals = {
            name: parts[f"{name}_spectrum"].sum(-1)[:, None] for name in self.flow.quantities
        }
        totals["values"] = flat.flatten(1)
        parts |= {name: self._law(name, values) for name, values in totals.items()}
        sums = self._sums.setdefault(method, {})
        for name, part in parts.items():
            part = part.unflatten(0, (-1, cases)).mean(0).nan_to_num(nan=torch.inf)
            sums[name] = sums[name] + part if name in sums else part

    def _law(self, name: str, values: Tensor) -> Tensor:
        """Return the share (B, BINS) of each field's values per bin; NaN if one is not finite."""
        counts = torch.zeros(len(values), BINS, dtype=torch.float64)
        places = torch.bucketize(values.contiguous(), self._edges[name])
        counts.scatter_add_(1, places, torch.ones_like(values))
        lost = ~values.isfinite().all(1, keepdim=True)
        return (counts / values.shape[1]).masked_fill(lost, torch.nan)

    def fluxes(self) -> dict[str, dict[str, Tensor]]:
        """Return {quantity: {method: flux (shells,)}} of the methods that lost no member."""
        by_quantity = {
            quantity: {
                method: -sums[f"{quantity}_transfer"].mean(0).cumsum(-1) / self._number
                for method, sums in self._sums.items()
            }
            for quantity in self.flow.quantities
        }
        return {
            quantity: {name: flux for name, flux in lines.items() if bool(flux.isfinite().all())}
            for quantity, lines in by_quantity.items()
        }

    def similarities(self, blocks: Tensor) -> Iterator[tuple[str, dict]]:
        """Yield method and columns ``score, value, low, high`` of all methods but the bare solver.

        The value is minus infinity if a member was lost.

        Args:
            blocks: block of each case (cases,), for the intervals.
        """
        quantities = self.flow.quantities
        distances: dict[str, Callable[[Tensor], Tensor]] = {
            **{f"{name}_spectrum": _root for name in quantities},
            **{f"{name}_transfer": _of_flux for name in quantities},
            **dict.fromkeys(("values", *quantities), _wasserstein),
        }

        def left(means: Means) -> Tensor:
            """Return D / D_none of every statistic, and the largest of them as the last."""
            every = [
                distance(means[f"own_{name}"]) / distance(means[f"bare_{name}"])
                for name, distance in distances.items()
            ]
            return torch.stack([*every, torch.stack(every).amax(0)], -1)

        names = [name.replace("transfer", "flux") for name in (*distances, "worst")]
        truth, bare = self._sums["truth"], self._sums["none"]
        for method, sums in self._sums.items():
            if method in ("truth", "none"):
                continue
            apart = {
                f"{which}_{name}": part[name] - truth[name]
                for which, part in (("own", sums), ("bare", bare))
                for name in distances
            }
            ratios = (torch.full((len(names),), torch.inf),) * 3
            if all(bool(part.isfinite().all()) for part in apart.values()):
                ratios = block_interval(apart, blocks, left)
            for name, share, least, most in zip(names, *map(Tensor.tolist, ratios), strict=True):
                if not math.isnan(share):  # 0 / 0: the bare solver equals the truth
                    columns = {"score": f"similarity_{name}", "value": 1 - share}
                    yield method, {**columns, "low": 1 - most, "high": 1 - least}


# ---- distances (...) from the difference of two statistics (..., shells or bins) ----------------


def _root(apart: Tensor) -> Tensor:
    """Return the norm of the difference of two spectra."""
    return apart.square().sum(-1).sqrt()


def _of_flux(apart: Tensor) -> Tensor:
    """Return the norm of the difference of two fluxes, from the difference of the transfers."""
    return _root(apart.cumsum(-1))


def _wasserstein(apart: Tensor) -> Tensor:
    """Return the area between two distribution functions, in bins."""
    return apart.cumsum(-1).abs().sum(-1)
