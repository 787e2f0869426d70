"""The equations, one file each; importing this package registers them."""

from hpc_closure.spectral.equations.base import Equation

# Error lines list the equations in this order.
# isort: off
from hpc_closure.spectral.equations.vorticity import Vorticity2D
from hpc_closure.spectral.equations.kuramoto_sivashinsky import KuramotoSivashinsky1D
from hpc_closure.spectral.equations.burgers import Burgers1D
from hpc_closure.spectral.equations.two_layer import TwoLayerQG
from hpc_closure.spectral.equations.clouds import Clouds
from hpc_closure.spectral.equations.excitable import Excitable
from hpc_closure.spectral.equations.navier_stokes_3d import NavierStokes3D
from hpc_closure.spectral.equations.external import External

__all__ = [
    "Burgers1D",
    "Clouds",
    "Equation",
    "Excitable",
    "External",
    "KuramotoSivashinsky1D",
    "NavierStokes3D",
    "TwoLayerQG",
    "Vorticity2D",
]
