"""The equations, one file each; importing them makes them known to experiments and problems."""

from hpc_closure.spectral.equations.base import Equation

# Error lines name them in this order.
# isort: off
from hpc_closure.spectral.equations.vorticity import Vorticity2D
from hpc_closure.spectral.equations.kuramoto_sivashinsky import KuramotoSivashinsky1D
from hpc_closure.spectral.equations.burgers import Burgers1D

__all__ = ["Burgers1D", "Equation", "KuramotoSivashinsky1D", "Vorticity2D"]
