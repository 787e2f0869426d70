"""The equations, one file each; importing this package registers them."""

from hpc_closure.spectral.equations.base import Equation

# Error lines list the equations in this order.
# isort: off
from hpc_closure.spectral.equations.vorticity import Vorticity2D
from hpc_closure.spectral.equations.kuramoto_sivashinsky import KuramotoSivashinsky1D
from hpc_closure.spectral.equations.burgers import Burgers1D

__all__ = ["Burgers1D", "Equation", "KuramotoSivashinsky1D", "Vorticity2D"]
