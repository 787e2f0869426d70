r"""Functional closures: eddy viscosities whose constants are tuned in coupled runs.

Each one is a deterministic function U of the resolved vorticity w:

* ``smagorinsky``: :math:`U = \nabla\cdot(\nu\nabla w)`, :math:`\nu = (c\Delta)^2 |S|` (Smagorinsky
  1963; |S| the rate of strain);
* ``leith``: the same with :math:`\nu = (c\Delta)^3 |\nabla w|` (Leith, Physica D 1996);
* ``dynamic_smagorinsky``, ``dynamic_leith``: :math:`c^2` or :math:`c^3` is computed from the flow
  by the identity of Germano et al. (Phys. Fluids A 1991) in the least-squares form of Lilly
  (1992), with a sharp test filter at half of the modes and means over the square, clipped at
  zero. No constant is tuned;
* ``jansen_held``: a biharmonic Smagorinsky viscosity :math:`-\nabla^2(\nu_4\nabla^2 w)`,
  :math:`\nu_4 = (c\Delta)^4 |S|`, plus a negative viscosity, uniform in space, that returns a
  share of the dissipated energy to the large scales (Jansen and Held, Ocean Modelling 2014).

:math:`\Delta` is the spacing of the reduced solver's grid. The constants are tuned in coupled runs
(:mod:`hpc_closure.train.tuning`), not fitted one step ahead.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.fields.features import carried, divergence, feature_spectra, gradient
from hpc_closure.closure.fields.members import each_member
from hpc_closure.closure.fields.modes import Band, band
from hpc_closure.closure.model import ClosureModel, Phase, Request
from hpc_closure.closure.part_report import PartReport
from hpc_closure.spectral.modes.grid import hermitian, resize

__all__ = ["FunctionalModel", "candidates"]

CONSTANTS = tuple(round(0.06 * 1.3**step, 3) for step in range(12))  # c, 0.06 to 1.08
RETURNED = (0.0, 0.5, 0.8, 0.9, 1.0)  # returned shares of the dissipated energy
TEST_FILTER = 2  # width of the test filter over that of the grid


def candidates(config: dict[str, Any]) -> list[tuple[float, ...]]:
    """List the constants to try: (c,), for ``jansen_held`` (c, share), () for dynamic models.

    A constant that the configuration fixes has a single value.
    """
    kind = config["preset"]
    if kind.startswith("dynamic_"):
        return [()]
    choices = [CONSTANTS if config["constant"] is None else (float(config["constant"]),)]
    if kind == "jansen_held":
        share = config["returned"]
        choices.append(RETURNED if share is None else (float(share),))
    return list(product(*choices))


class FunctionalModel(ClosureModel):
    """Eddy-viscosity closure; see the module's docstring.

    Attributes:
        constants: c, for ``jansen_held`` also the returned share; the first candidate until tuned.
    """

    def __init__(self, config: dict[str, Any], grid: int, length: float = 1.0):
        super().__init__(config, grid, length)
        self.band = band((grid - 1) // 3, length)
        self.kind, self.constants = config["preset"], candidates(config)[0]
        self.width = length / grid

    def parts(self) -> list[PartReport]:
        named = zip(("c", "returned"), self.constants)
        values = ", ".join(f"{name} = {value:g}" for name, value in named)
        return [
            PartReport(self.kind.replace("_", " "), False, True, (), values or "c of the flow")
        ]

    def phase_named(self, name: str) -> Phase:
        raise ValueError(f"model.preset={self.kind} has no phase {name!r}: it is tuned")

    def saved_statistics(self, spacing: float | None = None) -> dict[str, Tensor]:
        return {"constants": torch.tensor(self.constants, dtype=torch.float64)}

    def load_statistics(self, tensors: dict[str, Tensor]) -> None:
        self.constants = tuple(tensors["constants"].tolist())

    @property
    def score_active(self) -> bool:
        return False

    def tendency(self, w_hat: Tensor, constants: Sequence[Tensor | float]) -> Tensor:
        """Compute spectra (B, 2K + 1, K + 1) of U in the model's band.

        Args:
            w_hat: spectra (B, 2K + 1, K + 1) of the vorticity.
            constants: numbers, or tensors (B, 1, 1) with a value per row.
        """
        b, delta = self.band, self.width
        if self.kind == "smagorinsky":
            return constants[0] ** 2 * viscous(w_hat, b, delta, strain_rate)
        if self.kind == "leith":
            return constants[0] ** 3 * viscous(w_hat, b, delta, slope)
        if self.kind == "jansen_held":
            return backscatter(w_hat, b, delta, *constants)
        return germano(w_hat, b, delta, strain_rate if "smag" in self.kind else slope)

    @torch.no_grad()
    def sample_hat(self, request: Request) -> Tensor:
        modes, count = request.state.shape[-1] - 1, len(request.members)
        u_hat = self.tendency(resize(request.state, self.band.modes), self.constants)
        return each_member(hermitian(resize(u_hat, modes)), count)

    @torch.no_grad()
    def sample_batch(self, request: Request) -> Tensor:
        """Repeat the deterministic U for every member."""
        size, count = request.state.shape[-1], len(request.members)
        u_hat = self.tendency(self.band.to_spectral(request.state), self.constants)
        field = self.band.to_physical(u_hat, size).to(request.state)
        return each_member(field, count)


def strain_rate(w_hat: Tensor, band: Band, delta: float) -> Tensor:
    r"""Compute :math:`\Delta^2 |S|`, fields (B, n, n); :math:`|S|^2 = 4 u_x^2 + (u_y + v_x)^2`."""
    kx, ky = (band.on(name, w_hat.device, w_hat.real.dtype) for name in ("kx", "ky"))
    u, v = feature_spectra(w_hat, band)[:, :2].unbind(1)
    parts = torch.stack([2j * kx * u, 1j * (ky * u + kx * v)], dim=1)
    return delta**2 * torch.hypot(*band.to_physical(parts, band.grid.size).unbind(1))


def slope(w_hat: Tensor, band: Band, delta: float) -> Tensor:
    r"""Compute :math:`\Delta^3 |\nabla w|`, fields (B, n, n)."""
    return delta**3 * torch.hypot(*gradient(w_hat, band).unbind(1))


def viscous(w_hat: Tensor, band: Band, delta: float, viscosity) -> Tensor:
    r"""Compute spectra (B, ...) of :math:`\nabla\cdot(\nu\nabla w)` for c = 1.

    Args:
        w_hat: (B, ...).
        band: band of w.
        delta: width of the filter.
        viscosity: :func:`strain_rate` or :func:`slope`.
    """
    nu = viscosity(w_hat, band, delta)[:, None]
    return divergence(nu * gradient(w_hat, band), band)


def mean_product(one: Tensor, other: Tensor, band: Band) -> Tensor:
    """Average the product of two fields over the square, from their spectra; (B, 1, 1)."""
    weights = band.on("weights", one.device, one.real.dtype)
    return ((one.conj() * other).real * weights).sum((-2, -1), keepdim=True)


def backscatter(
    w_hat: Tensor, band: Band, delta: float, c: Tensor | float, returned: Tensor | float
) -> Tensor:
    """Compute spectra (B, ...) of a biharmonic viscosity plus the energy-returning negative one.

    Args:
        w_hat: (B, ...).
        band: band of w.
        delta: width of the filter.
        c: constant of the biharmonic viscosity.
        returned: share of the dissipated energy that is returned.
    """
    k2 = band.on("k2", w_hat.device, w_hat.real.dtype)
    inverse = band.on("inverse_k2", w_hat.device, w_hat.real.dtype)
    curvature = band.to_physical(-k2 * w_hat, band.grid.size)
    nu = delta**2 * strain_rate(w_hat, band, delta)
    drained = c**4 * k2 * band.to_spectral(nu * curvature)
    taken = -mean_product(inverse * w_hat, drained, band)  # energy: the mean of psi U
    negative = returned * taken / mean_product(w_hat, w_hat, band).clamp(min=1e-300)
    return drained + negative * k2 * w_hat


def germano(w_hat: Tensor, band: Band, delta: float, viscosity) -> Tensor:
    """Compute spectra (B, ...) of a viscous term with a dynamic constant per row (Germano)."""

    def test(spectra: Tensor) -> Tensor:
        return resize(resize(spectra, band.modes // TEST_FILTER), band.modes)

    coarse = test(w_hat)
    subgrid_term = viscous(w_hat, band, delta, viscosity)
    # d(test)/dt + J(test) = U(test), and the test filter of dw/dt + J(w) = U(w)
    advected, advected_coarse = (carried(one, one[:, None], band)[:, 0] for one in (w_hat, coarse))
    stress = test(advected - advected_coarse)
    model = test(viscous(coarse, band, TEST_FILTER * delta, viscosity) - subgrid_term)
    share = mean_product(stress, model, band)
    return (share / mean_product(model, model, band).clamp(min=1e-300)).clamp(min=0) * subgrid_term
