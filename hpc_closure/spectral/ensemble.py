"""Members of one problem and their states; a solver of this package or of a user advances them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Problem


class Ensemble:
    """Members of one problem: their states, and how a caller advances, saves and loads them.

    Args:
        problem: the recipe.
        members: member ids, the leading axis of every array.
        seed: seed of the experiment.
        device: ``cpu`` or a CUDA device.
        comm: mpi4py communicator whose ranks share each field (slabs), or None.
        stage: stage of the pipeline, part of the Philox key.

    Attributes:
        pairs: states as real pairs (members, *channel_shape, ..., 2).
        step_index: steps taken since t = 0.
    """

    def __init__(
        self,
        problem: Problem,
        members: Sequence[int],
        seed: int,
        *,
        device="cpu",
        comm=None,
        stage: str = "generate",
    ):
        if not len(members):
            raise ValueError("a simulation needs at least one member")
        self.problem, self.members, self.seed, self.stage = problem, list(members), seed, stage
        self.grid = problem.make_grid()
        self.device, self.comm = torch.device(device), comm
        self.transform = Transform(self.grid, problem.precision, device, comm)
        self.step_index = 0
        self.channel_shape = problem.physics.channel_shape
        shape = (len(self.members), *self.channel_shape, *self.transform.shape, 2)
        self.pairs = torch.zeros(shape, dtype=self.transform.real, device=self.device)

    def advance(self, num_steps: int, tendency_hat: Tensor | None = None) -> Self:
        """Take ``num_steps`` steps of ``problem.dt``.

        Args:
            num_steps: number of steps.
            tendency_hat: closure U_hat ``(members, 2K + 1, K + 1)``, added to the right-hand side
                and constant over these steps. On slabs this rank's columns.
        """
        raise NotImplementedError

    def load_state(
        self,
        step_index: int,
        w_hat: np.ndarray | Tensor,
        rates: np.ndarray | None = None,
        **memory: np.ndarray | Tensor,
    ) -> Self:
        """Continue from :meth:`save_state`, or from full retained spectra of another run.

        Args:
            step_index: steps taken since t = 0.
            w_hat: ``(members, 2K + 1, K + 1)`` complex.
            rates: state of a forcing that has one; without it the forcing starts anew.
            memory: what the solver keeps of past steps, such as spectra that a scheme needs;
                without it the solver starts anew.
        """
        raise NotImplementedError

    def save_state(self) -> dict[str, Any]:
        """Return all that a bit-exact restart needs: ``ensemble.load_state(**saved)``.

        The spectra are full ones, on every rank.
        """
        raise NotImplementedError

    def forget(self) -> Self:
        """Discard what the solver keeps of past steps: the next step is a first step."""
        raise NotImplementedError

    @property
    def time(self) -> float:
        """Return the time of the state."""
        return self.step_index * self.problem.dt

    @property
    def state(self) -> Tensor:
        """Return the retained spectra ``(members, 2K + 1, K + 1)`` complex, a view.

        States of C > 1 channels are ``(members, C, 2K + 1, K + 1)``, here and below. On slabs they
        are this rank's columns.
        """
        return torch.view_as_complex(self.pairs)

    def fields(self, names: Sequence[str], size: int | None = None) -> dict[str, Tensor]:
        """Return full physical fields by name, on every rank.

        Args:
            names: names of channels, ``(members, n, n)``; ``streamfunction`` and ``velocity``
                ``(members, 2, n, n)``, of an equation with several channels as its ``derived``
                defines them; on a line ``state`` ``(members, n)``.
            size: points per side; by default those of the grid.
        """
        out = {}
        for name in names:
            field = self.transform.to_physical(self.field_spectra(name), size)
            out[name] = self.transform.gather_field(field)
        return out

    def field_spectra(self, name: str) -> Tensor:
        """Return the spectra of a field of :meth:`fields`; on slabs this rank's columns.

        Raises:
            ValueError: no such field in these dimensions.
        """
        grid, local, w = self.grid, self.transform.local, self.state
        if self.channel_shape:
            channels = [channel.name for channel in self.problem.physics.channels]
            if name in channels:
                return w[:, channels.index(name)]
            return torch.view_as_complex(self._derived(name))
        if name in ("vorticity", "state"):
            return w
        if grid.dimensions == 2 and name in ("streamfunction", "velocity"):
            psi = w * local(grid.inverse_k2).to(self.pairs)
            if name == "streamfunction":
                return psi
            kx, ky = grid.kx.to(psi), local(grid.ky).to(psi)
            return torch.stack([1j * ky * psi, -1j * kx * psi], 1)
        raise ValueError(f"unknown field {name!r} in {grid.dimensions} dimensions")

    def diverged(self) -> Tensor:
        """Return which members have diverged, ``(members,)`` bool, on the device.

        On slabs only this rank's columns are tested.
        """
        return ~self.pairs.flatten(1).square().sum(1).isfinite()

    def mark_lost(self) -> np.ndarray:
        """Set the state of diverged members to NaN; returns which ones, ``(members,)`` bool.

        A member has diverged if its state, or the square of its state, is not finite. On slabs
        every rank must call.
        """
        lost = self.transform.maximum(self.diverged().cpu().numpy().astype(np.int64)) > 0
        if lost.any():
            self.pairs[torch.from_numpy(lost).to(self.device)] = torch.nan
        return lost

    def _derived(self, name: str) -> Tensor:
        """Return the pairs of a field that states of several channels determine.

        Raises:
            ValueError: there is no such field.
        """
        raise ValueError(f"unknown field {name!r}")

    def _checked_pairs(self, full: np.ndarray | Tensor) -> Tensor:
        """Return this rank's real pairs of the full spectra of all members.

        Raises:
            ValueError: the spectra have another shape.
        """
        full = torch.as_tensor(full)
        expected = (len(self.members), *self.channel_shape, *self.grid.shape)
        if tuple(full.shape) != expected:
            raise ValueError(f"expected spectra of shape {expected}, got {tuple(full.shape)}")
        return self._local_pairs(full)

    def _local_pairs(self, full: Tensor) -> Tensor:
        """Return this rank's columns of full spectra as real pairs."""
        columns = self.transform.local(full).to(self.device, self.transform.complex)
        return torch.view_as_real(columns.contiguous())
