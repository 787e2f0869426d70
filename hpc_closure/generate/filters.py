"""Filtered fields: the part of a flow that large-eddy simulation resolves, on a smaller grid."""

import torch

from hpc_closure.experiment.schema import Filter
from hpc_closure.spectral.modes.grid import Grid, resize
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Problem


class Filtered:
    """Filter a flow and sample it on the smallest even grid that retains the passed modes.

    By the 2/3 rule the filtered field is a state of the solver on that grid. The grid is never
    finer than the grid of the flow.

    Args:
        filter: kind and width.
        problem: the flow.
        device: torch device.

    Attributes:
        name: name of the data set in the file.
        modes: highest integer wavenumber that passes the filter.
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
        """Filter retained spectra (B, 2K + 1, K + 1) of all ranks; returns fields (B, m, m)."""
        cut = resize(w_hat, self.transform.grid.modes, self.transform.grid.dimensions)
        passed = torch.view_as_real(cut) * self.factor
        return self.transform.to_physical(torch.view_as_complex(passed))
