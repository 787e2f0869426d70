"""The problem of a reduced solver that a user wrote."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from hpc_closure.spectral.outside.solver import OutsideSolver
from hpc_closure.spectral.problem import Problem


class OutsideProblem(Problem):
    """A reduced problem whose solver is a user's; ``dt`` is its step.

    Attributes:
        solver: the solver.
    """

    solver: Any = Field(exclude=True)

    @classmethod
    def of_solver(cls, problem: Problem, grid: int, solver: OutsideSolver) -> OutsideProblem:
        """Return the reduced problem of a full one on a grid of ``grid`` points per side."""
        bare = problem.physics.without_noise()
        settings = {**problem.recipe(), "grid": grid, "cfl": None, **bare}
        return cls(**{**settings, "dt": solver.dt, "solver": solver})

    def replace(self, **changes: Any) -> OutsideProblem:
        return type(self)(**{**self.recipe(), "solver": self.solver, **changes})

    def steps_in(self, span: float) -> int:
        try:
            return super().steps_in(span)
        except ValueError:
            raise ValueError(
                f"{self.solver.name}: its dt={self.dt:g} does not divide the closure interval "
                f"generate.interval * generate.dt = {span:g}; change one of them"
            ) from None

    def make_equation(self, transform):
        raise ValueError(f"{self.solver.name} solves this problem, not the solver of the package")
