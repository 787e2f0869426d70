r"""Long-time statistics of coupled runs beside the filtered DNS's: spectra, fluxes and laws.

Taken over the second half of the stored lead times, members and cases alike. With the distance D
of a statistic to the truth's, a method's *similarity* is :math:`1 - D / D_\mathrm{none}`: 1 is
perfect, 0 no better than the bare solver, negative does harm. The statistics and the measure are
those of Ross et al., J. Adv. Model. Earth Syst. 15 (2023), for one layer as Frezat et al. have
them (arXiv 2111.06841): root mean square over shells for spectra and fluxes, the Wasserstein-1
distance for laws.

The flux through a shell is what the resolved nonlinear term takes from it and from all larger
scales, :math:`\Pi(k) = -\sum_{k' \le k} T(k')`.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpc_closure.evaluate.scores.intervals import Means, block_interval
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.spectral.diagnostics import Diagnostics
from hpc_closure.spectral.modes.grid import as_row, from_row, to_fields, to_spectra
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

BINS = 1000  # of a law
REACH = {"values": (-3.0, 3.0)}  # of the bins, in the truth's largest
TOTAL = (0.0, 4.0)  # the same of energy and enstrophy
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
        problem: of the reduced solver, :func:`~hpc_closure.closure.targets.reduced_problem`.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.quantities = ("energy", "enstrophy") if problem.dimensions == 2 else ("energy",)

    def simulation(self, states: Tensor) -> Simulation:
        """One that holds these states (B, n, n), on a line (B, 1, n)."""
        simulation = Simulation(self.problem, range(len(states)), 0)
        dimensions = self.problem.dimensions
        fields = from_row(states.double().cpu(), dimensions)
        spectra = to_spectra(fields, simulation.grid.modes, dimensions)
        return simulation.load_state(0, spectra)

    def measure(self, states: Tensor) -> dict[str, Tensor]:
        """``energy_spectrum``, ``energy_transfer`` and so on, (B, shells) each."""
        transfers = [f"{quantity}_transfer" for quantity in self.quantities]
        names = [*self.quantities, *transfers]
        found = Diagnostics(self.simulation(states)).spectra(names)
        return {
            name if name in transfers else f"{name}_spectrum": torch.from_numpy(part)
            for name, part in found.items()
        }

    def after(self, states: Tensor, steps: int) -> Tensor:
        """States (B, n, n) some solver steps later."""
        simulation = self.simulation(states).advance(steps)
        fields = to_fields(simulation.state, states.shape[-1], self.problem.dimensions)
        return as_row(fields, self.problem.dimensions)


class Climate:
    """Statistics of methods and of the truth, taken in lead time by lead time.

    Args:
        flow: what measures states.
        truth: (cases, L, n, n): the filtered DNS at all lead times.
    """

    def __init__(self, flow: Flow, truth: Tensor):
        self.flow, self.since = flow, truth.shape[1] // 2
        self._number = truth.shape[1] - self.since
        self._sums: dict[str, dict[str, Tensor]] = {}
        spectra = Diagnostics(flow.simulation(truth.flatten(0, 1)))
        largest = {name: spectra.spectrum(name).sum(-1).max() for name in flow.quantities}
        largest["values"] = truth.abs().max()
        self._edges = {
            name: float(size) * torch.linspace(*REACH.get(name, TOTAL), BINS - 1).double()
            for name, size in largest.items()
        }

    def add(self, method: str, index: int, ensemble: Tensor) -> None:
        """Take in members (M, cases, n, n) of lead time ``index``; the first half is let pass."""
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
        """Share (B, BINS) of each field's values in each bin; NaN where one is not finite."""
        counts = torch.zeros(len(values), BINS, dtype=torch.float64)
        counts.scatter_add_(
            1, torch.bucketize(values.contiguous(), self._edges[name]), torch.ones_like(values)
        )
        lost = ~values.isfinite().all(1, keepdim=True)
        return (counts / values.shape[1]).masked_fill(lost, torch.nan)

    def fluxes(self) -> dict[str, dict[str, Tensor]]:
        """{quantity: {method: (shells,)}} of those that lost no member."""
        found = {
            quantity: {
                method: -sums[f"{quantity}_transfer"].mean(0).cumsum(-1) / self._number
                for method, sums in self._sums.items()
            }
            for quantity in self.flow.quantities
        }
        return {
            quantity: {name: flux for name, flux in lines.items() if bool(flux.isfinite().all())}
            for quantity, lines in found.items()
        }

    def similarities(self, blocks: Tensor) -> Iterator[tuple[str, dict]]:
        """Method, and columns ``score, value, low, high``, of all but the bare solver.

        Minus infinity where a member was lost.

        Args:
            blocks: (cases,).
        """
        quantities = self.flow.quantities
        distances: dict[str, Callable[[Tensor], Tensor]] = {
            **{f"{name}_spectrum": _root for name in quantities},
            **{f"{name}_transfer": _of_flux for name in quantities},
            **dict.fromkeys(("values", *quantities), _wasserstein),
        }

        def left(means: Means) -> Tensor:
            """Share of the bare solver's distance that is left, of every statistic; the most."""
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
            found = (torch.full((len(names),), torch.inf),) * 3
            if all(bool(part.isfinite().all()) for part in apart.values()):
                found = block_interval(apart, blocks, left)
            for name, share, least, most in zip(names, *map(Tensor.tolist, found), strict=True):
                if not math.isnan(share):  # the bare solver's is the truth's
                    columns = {"score": f"similarity_{name}", "value": 1 - share}
                    yield method, {**columns, "low": 1 - most, "high": 1 - least}


# ---- distances, of the difference of two statistics (..., shells or bins) ----------------------


def _root(apart: Tensor) -> Tensor:
    return apart.square().sum(-1).sqrt()


def _of_flux(apart: Tensor) -> Tensor:
    return _root(apart.cumsum(-1))


def _wasserstein(apart: Tensor) -> Tensor:
    """Area between two distribution functions, in bins."""
    return apart.cumsum(-1).abs().sum(-1)
