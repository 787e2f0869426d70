r"""Compute the rates at which a closure adds enstrophy and energy to the resolved flow, per shell.

The reduced solver alone would reach the state :math:`\tilde w`. A closure U that acts for a time
:math:`\tau` changes it to :math:`\tilde w + \tau U`. The closure therefore adds to a mode, per
unit time, the enstrophy

.. math:: \mathrm{Re}(\tilde w^* U) + \tfrac{\tau}{2} |U|^2.

The second term is the contribution of noise (Ito). Divided by :math:`k^2` the rate is that of
energy. This is for the vorticity of a plane. The state of other numbers of sides is a velocity,
and the expression is the energy itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.intervals import interval_columns
from hpc_closure.evaluate.scores.pointwise import distance
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.evaluate.scores.spectra import power, scaled_k2, transform

SCORES = tuple(
    Score(
        name=name,
        heading=heading,
        meaning=meaning,
        table="Budget of the closure",
        requires="the state that a closure is added to (generated)",
    )
    for name, heading, meaning in (
        (
            "energy_transfer_ratio",
            "energy, ratio",
            "energy that the closure adds to the resolved flow over what the true closure adds; "
            "ill-conditioned where gains and losses nearly cancel",
        ),
        (
            "energy_transfer_distance",
            "energy, distance",
            "relative distance between the spectrum of that rate over shells and the truth's",
        ),
        ("enstrophy_transfer_ratio", "enstrophy, ratio", "the same of enstrophy"),
        ("enstrophy_transfer_distance", "enstrophy, distance", "the same of enstrophy"),
    )
)


@dataclass(frozen=True)
class Origin:
    """Trajectories and states to which held-out closures belong.

    Attributes:
        trajectories: trajectory of each closure (S,); None = each from a different one.
        states: states (S, n, n) to which the closures are added; None = unknown.
        span: time for which a closure acts.
        reference: closures (P, n, n) of other members; None = unknown.
    """

    trajectories: Tensor | None = None
    states: Tensor | None = None
    span: float = 0.0
    reference: Tensor | None = None


class Budget:
    """Budgets of all methods and of the truth, accumulated block by block.

    Args:
        span: time for which a closure acts.
    """

    def __init__(self, span: float):
        self.span = span
        self._truth: dict[str, list[Tensor]] = {}
        self._by_method: dict[str, dict[str, list[Tensor]]] = {}
        self._state: Tensor
        self._true: Truth

    def begin(self, truth: Truth, states: Tensor) -> None:
        """Begin a block: the true closures and the states (s, n, n) to which they are added."""
        self._state, self._true = transform(states.double().cpu(), truth.dimensions), truth
        self._append(self._truth, truth.hat, power(truth.hat))

    def add(self, method: str, forecast: Forecast) -> None:
        """Add a method's closures for the block."""
        self._append(self._by_method.setdefault(method, {}), forecast.mean_hat, forecast.energy)

    def _append(self, into: dict[str, list[Tensor]], mean: Tensor, energy: Tensor) -> None:
        """Append the rates per shell, from the mean coefficients and mean squared coefficients."""
        density = (self._state.conj() * mean.cpu()).real + 0.5 * self.span * energy.cpu()
        quantities = {"energy": density}
        if self._true.dimensions == 2:
            k2 = scaled_k2(tuple(self._true.fields.shape[1:]), self._true.lengths)
            to_energy = torch.where(k2 > 0, k2, torch.inf).reciprocal()
            quantities = {"energy": density * to_energy, "enstrophy": density}
        for quantity, part in quantities.items():
            rate = self._true.per_shell(part).nan_to_num(nan=torch.inf)
            into.setdefault(quantity, []).append(rate)

    def transfer(self, method: str) -> dict[str, Tensor]:
        """Return rates (S, shells): ``own_energy``, ``truth_energy``, and those of enstrophy."""
        return {
            f"{whose}_{quantity}": torch.cat(parts)
            for whose, rates in (("own", self._by_method[method]), ("truth", self._truth))
            for quantity, parts in rates.items()
        }

    def scores(self, method: str, blocks: Tensor) -> Iterator[dict]:
        """Yield columns ``score, value, low, high``; nothing if a sample is not finite.

        Args:
            method: name of the method.
            blocks: trajectory of each sample (S,), for the intervals.
        """
        rates = self.transfer(method)
        if not all(bool(part.isfinite().all()) for part in rates.values()):
            return
        for quantity in ("energy", "enstrophy"):
            own, truth = f"own_{quantity}", f"truth_{quantity}"
            if own not in rates:
                continue
            forms = {
                "ratio": lambda s, a=own, b=truth: s[a].sum(-1) / s[b].sum(-1),  # type: ignore
                "distance": lambda s, a=own, b=truth: distance(s[a], s[b]),  # type: ignore
            }
            for name, form in forms.items():
                numbers = interval_columns(rates, blocks, form)
                yield {"score": f"{quantity}_transfer_{name}", **numbers}
