r"""What a closure brings to the resolved flow: its budget of enstrophy and energy, per shell.

A closure U that acts for a time :math:`\tau` takes the state :math:`\tilde w`, to which the
reduced solver alone would have come, to :math:`\tilde w + \tau U`. So it brings to a mode, per
unit time and in enstrophy,

.. math:: \mathrm{Re}(\tilde w^* U) + \tfrac{\tau}{2} |U|^2,

of which the second part is what noise brings (Ito). Divided by :math:`k^2` it is energy; on a line
the state is a velocity and this is energy itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.intervals import interval_columns
from hpc_closure.evaluate.scores.pointwise import distance
from hpc_closure.evaluate.scores.record import Score
from hpc_closure.evaluate.scores.spectra import integer_k2, per_shell, power, transform

SCORES = tuple(
    Score(
        name=f"work_{name}",
        heading=heading,
        meaning=meaning,
        table="Budget of the closure",
        requires="the state that a closure is added to (generated)",
    )
    for name, heading, meaning in (
        (
            "energy",
            "energy, ratio",
            "energy that the closure brings to the resolved flow, over what the true one brings; "
            "a ratio of small differences where what it takes and gives is nearly equal",
        ),
        (
            "energy_distance",
            "energy, distance",
            "relative distance of that spectrum, what each shell gets, from the truth's",
        ),
        ("enstrophy", "enstrophy, ratio", "the same of enstrophy"),
        ("enstrophy_distance", "enstrophy, distance", "the same of enstrophy"),
    )
)


@dataclass(frozen=True)
class Origin:
    """Where held-out closures are from.

    Attributes:
        trajectories: (S,) trajectory of each; None = each its own.
        states: (S, n, n) that they are added to; None = not known.
        span: time that each acts for.
    """

    trajectories: Tensor | None = None
    states: Tensor | None = None
    span: float = 0.0


class Budget:
    """Budgets of all methods beside the truth's, taken in block by block.

    Args:
        span: time that a closure acts for.
    """

    def __init__(self, span: float):
        self.span = span
        self._truth: dict[str, list[Tensor]] = {}
        self._own: dict[str, dict[str, list[Tensor]]] = {}
        self._state: Tensor
        self._shape: torch.Size

    def begin(self, truth: Truth, states: Tensor) -> None:
        """Begin a block: the true closures and the states (s, n, n) that they are added to."""
        self._state, self._shape = transform(states.double().cpu()), states.shape[-2:]
        self._take(self._truth, truth.hat, power(truth.hat))

    def add(self, method: str, forecast: Forecast) -> None:
        """Take in a method's closures of the block."""
        self._take(self._own.setdefault(method, {}), forecast.mean_hat, forecast.energy)

    def _take(self, into: dict[str, list[Tensor]], mean: Tensor, energy: Tensor) -> None:
        """What closures bring per shell, from the means of coefficients and of their squares."""
        rows, size = self._shape
        density = (self._state.conj() * mean.cpu()).real + 0.5 * self.span * energy.cpu()
        k2 = integer_k2(size, rows)
        to_energy = torch.where(k2 > 0, k2, torch.inf).reciprocal() if rows > 1 else 1.0
        quantities = {"energy": density * to_energy}
        if rows > 1:
            quantities["enstrophy"] = density
        for quantity, part in quantities.items():
            work = per_shell(part, size).nan_to_num(nan=torch.inf)
            into.setdefault(quantity, []).append(work)

    def work(self, method: str) -> dict[str, Tensor]:
        """Per sample and shell (S, shells): ``own_energy``, ``truth_energy``, enstrophy alike."""
        return {
            f"{whose}_{quantity}": torch.cat(parts)
            for whose, work in (("own", self._own[method]), ("truth", self._truth))
            for quantity, parts in work.items()
        }

    def scores(self, method: str, blocks: Tensor) -> Iterator[dict]:
        """Columns ``score, value, low, high``; nothing where a sample is not finite.

        Args:
            method: whose.
            blocks: (S,).
        """
        work = self.work(method)
        if not all(bool(part.isfinite().all()) for part in work.values()):
            return
        for quantity in ("energy", "enstrophy"):
            own, truth = f"own_{quantity}", f"truth_{quantity}"
            if own not in work:
                continue
            forms = {
                "": lambda s, a=own, b=truth: s[a].sum(-1) / s[b].sum(-1),  # type: ignore
                "_distance": lambda s, a=own, b=truth: distance(s[a], s[b]),  # type: ignore
            }
            for name, form in forms.items():
                numbers = interval_columns(work, blocks, form)
                yield {"score": f"work_{quantity}{name}", **numbers}
