"""Advance the members of an ensemble by a user's solver."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.ensemble import Ensemble
from hpc_closure.spectral.modes.grid import to_fields, to_spectra
from hpc_closure.spectral.outside.arrays import tree_of
from hpc_closure.spectral.outside.problem import OutsideProblem
from hpc_closure.spectral.outside.solver import OutsideSolver, Through


class OutsideSimulation(Ensemble):
    """Members of one problem, advanced together by a user's solver.

    The solver takes and returns fields on the reduced grid; between its calls the states are
    retained spectra, as everywhere in the package. Lost members reach it as zeros.
    """

    problem: OutsideProblem

    def __init__(self, problem: OutsideProblem, members, seed: int, **settings: Any):
        settings.pop("threads", None)
        super().__init__(problem, members, seed, **settings)
        self._hidden: Any = None  # what the solver keeps besides the fields

    @property
    def solver(self) -> OutsideSolver:
        """The user's solver."""
        return self.problem.solver

    def advance(self, num_steps: int, tendency_hat: Tensor | None = None) -> OutsideSimulation:
        """Take ``num_steps`` steps of the solver's ``dt``.

        Raises:
            ValueError: ``num_steps`` is negative, or there is a closure to hold inside the steps.
        """
        if num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {num_steps}")
        if tendency_hat is not None:
            raise ValueError(f"{self.solver.name}: a closure is added after its steps, not inside")
        if not num_steps:
            return self
        lost = self.diverged()
        gone = bool(lost.any())
        fields = self.fields_of(self.state)
        if gone:
            fields[lost] = 0.0
        ends, self._hidden = self.solver.advance(fields, num_steps, self._hidden)
        ends = ends.to(self.device, self.transform.real)
        spectra = self.transform.analyse(ends.reshape(1, -1, *self.grid.sizes))
        self.pairs.copy_(spectra.reshape(self.pairs.shape))
        if gone:
            self.pairs[lost] = torch.nan
        self.step_index += num_steps
        return self

    def fields_of(self, spectra: Tensor) -> Tensor:
        """Return the fields (members, ..., n, n) that the solver takes."""
        return self.transform.to_physical(spectra).to(self.solver.dtype)

    def spectra_of(self, fields: Tensor) -> Tensor:
        """Return retained spectra (members, ...) of fields that the solver returned."""
        return self.transform.to_spectral(fields.to(self.device, self.transform.real))

    def load_state(self, step_index, w_hat, rates=None, **memory):
        self.step_index, self._hidden = int(step_index), None
        self.pairs.copy_(self._checked_pairs(w_hat))
        if memory:
            fields = self.fields_of(self.state)
            _, template = self.solver.advance(fields, 1)
            flatten, unflatten = tree_of(self.solver.library)
            leaves, form = flatten(template)
            self._hidden = unflatten(
                [_like(memory[f"hidden_{place}"], leaf) for place, leaf in enumerate(leaves)], form
            )
        return self

    def forget(self) -> OutsideSimulation:
        self._hidden = None
        return self

    def save_state(self) -> dict[str, Any]:
        saved: dict[str, Any] = {
            "step_index": self.step_index,
            "w_hat": self.transform.gather(self.state).cpu().numpy().copy(),
        }
        if self._hidden is not None:
            leaves, _ = tree_of(self.solver.library)[0](self._hidden)
            for place, leaf in enumerate(leaves):
                leaf = leaf.cpu().numpy() if isinstance(leaf, Tensor) else leaf
                saved[f"hidden_{place}"] = np.array(leaf)
        return saved


def _like(stored: np.ndarray, leaf: Any) -> Any:
    """Return a stored leaf of a state in the library of ``leaf``; numbers become numbers."""
    if isinstance(leaf, (int, float, bool)):
        return type(leaf)(stored)
    if isinstance(leaf, Tensor):
        return torch.as_tensor(stored, device=leaf.device)
    if isinstance(leaf, np.ndarray):
        return np.asarray(stored)
    return leaf.__array_namespace__().asarray(stored)


class OutsideGradient:
    """A user's solver with gradients, as :class:`~spectral.differentiable.DifferentiableSolver`.

    Args:
        problem: the reduced problem.
        device: ``cpu`` or a CUDA device.

    Raises:
        ValueError: the solver has no gradient.
    """

    def __init__(self, problem: OutsideProblem, device="cpu"):
        self.problem, self.grid, self.device = problem, problem.make_grid(), torch.device(device)
        single = problem.precision == "float32"
        self.complex = torch.complex64 if single else torch.complex128
        shape = (1, *problem.physics.channel_shape, *problem.sizes)
        zeros = torch.zeros(shape, dtype=problem.solver.dtype, device=self.device)
        problem.solver.check_gradient(zeros)

    def advance(
        self,
        w_hat: Tensor,
        steps: int,
        tendency_hat: Tensor | None = None,
        past: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Take ``steps`` steps; returns spectra (members, 2K + 1, K + 1), and None.

        Raises:
            ValueError: there is a closure to hold inside the steps.
        """
        if tendency_hat is not None:
            raise ValueError(
                f"{self.problem.solver.name}: a closure is added after its steps, not inside"
            )
        with torch.autocast(w_hat.device.type, enabled=False):
            fields = to_fields(w_hat, self.grid.sizes).to(self.problem.solver.dtype)
            ends = Through.apply(fields, self.problem.solver, steps)
            return to_spectra(ends, self.grid.mode_counts).to(self.complex), None
