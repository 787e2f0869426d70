r"""The vorticity equation on a periodic square.

.. math::
   w_t + u\cdot\nabla w + \beta_y v = \nu\Delta w - \nu_h(-\Delta)^p w - \alpha w + f + \beta\xi,
   \qquad -\Delta\psi = w,\quad u = (\psi_y, -\psi_x)

An equation is a class with ``dimensions``, the ``parameters`` that it takes from the problem, its
eigenvalues ``linear``, its ``nonlinear`` term and its ``speed``; ``EQUATIONS`` lists them.
:mod:`kuramoto_sivashinsky` is another one in one file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpc_closure.spectral.advection import FORMS
from hpc_closure.spectral.kuramoto_sivashinsky import KuramotoSivashinsky1D
from hpc_closure.spectral.transform import Transform


class Vorticity2D:
    """Linear symbol and nonlinear term of the vorticity equation.

    Args:
        transform: transform of the grid (precision, device and slabs come from it).
        viscosity: ``nu``, length^2 / time.
        hyperviscosity: ``nu_h``, length^(2p) / time.
        hyperviscosity_order: ``p`` in ``-nu_h k^(2p)``.
        drag: ``alpha``, 1 / time.
        beta: planetary vorticity gradient ``beta_y``, 1 / (length time).
        form: form of the nonlinear term, see :mod:`advection`.
    """

    dimensions = 2
    parameters = ("viscosity", "hyperviscosity", "hyperviscosity_order", "drag", "beta", "form")

    def __init__(
        self,
        transform: Transform,
        *,
        viscosity: float,
        hyperviscosity: float = 0.0,
        hyperviscosity_order: int = 4,
        drag: float = 0.0,
        beta: float = 0.0,
        form: str = "basdevant",
    ):
        if form not in FORMS:
            raise ValueError(f"form must be one of {sorted(FORMS)}, got {form!r}")
        grid = transform.grid
        self.transform = transform
        self.advection = FORMS[form](transform)
        k2 = grid.k2
        damping = -viscosity * k2 - drag
        if hyperviscosity:
            damping = damping - hyperviscosity * k2**hyperviscosity_order
        rossby = beta * grid.kx * grid.inverse_k2
        # Eigenvalue of the linear part per mode, whole retained shape, complex128.
        self.linear = torch.complex(damping, rossby + torch.zeros_like(k2))

    def nonlinear(self, w: Tensor, out: Tensor) -> Tensor:
        """``out = -(u . grad w)`` as real pairs ``(members, 2K + 1, columns, 2)``."""
        return self.advection.tendency(w, out)

    def speed(self, w: Tensor) -> Tensor:
        """Largest ``|u| + |v|`` of each member on this rank's rows, ``(members,)``."""
        velocity = self.advection.velocity(w).abs_()
        return velocity[0].add_(velocity[1]).amax((-2, -1))


EQUATIONS: dict[str, Any] = {
    "vorticity2d": Vorticity2D,
    "kuramoto_sivashinsky1d": KuramotoSivashinsky1D,
}
