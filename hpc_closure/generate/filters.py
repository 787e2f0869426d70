"""Filtered fields: what large-eddy simulation resolves, stored on the small grid that it needs."""

import torch

from hpc_closure.experiment.schema import Filter
from hpc_closure.spectral.modes.grid import Grid, resize
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Problem


class Filtered:
    """One filter of a flow.

    The field is stored on the smallest even grid that retains the passed modes (2/3 rule), so it
    is a state of the solver on that grid; at most on the grid of the flow itself.

    Args:
        filter: kind and width.
        problem: the flow.
        device: torch device.

    Attributes:
        name: of the data set.
        modes: highest integer wavenumber kept.
        grid: points per side.
    """

    def __init__(self, filter: Filter, problem: Problem, device="cpu"):
        self.name, dimensions = filter.name, problem.dimensions
        most = problem.make_grid().modes
        self.modes = min(filter.modes(problem.length), most)
        self.grid = filter.points(problem.length, problem.grid)
        grid = Grid(self.grid, problem.length, dimensions)
        self.transform = Transform(grid, problem.precision, device)
        inside = (grid.integer_kx.abs() <= self.modes) & (grid.integer_ky <= self.modes)
        passed = inside.double()
        if filter.kind == "gaussian":
            passed = passed * torch.exp(grid.k2 * (-(filter.width**2) / 24))
        self.factor = passed.to(self.transform.device, self.transform.real)[..., None]

    def field(self, w_hat: torch.Tensor) -> torch.Tensor:
        """Filtered fields (B, m, m) of whole retained spectra."""
        cut = resize(w_hat, self.transform.grid.modes, self.transform.grid.dimensions)
        passed = torch.view_as_real(cut) * self.factor
        return self.transform.to_physical(torch.view_as_complex(passed))
