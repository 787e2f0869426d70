"""Given what a residual is drawn: state, sensors, in the form that generators read."""

from dataclasses import dataclass

from torch import Tensor

from hpc_closure.closure.conditioning import Reading
from hpc_closure.closure.frame import Frame
from hpc_closure.closure.law import Kriging

__all__ = ["Posterior"]


@dataclass
class Posterior:
    """Given what q is drawn.

    Attributes:
        fields: (B or 1, C, g, g) of the state and the sensors.
        summary: (B or 1, 51) numbers of the state.
        gains: (rows, gain) of what is kriged; rows None = all.
        readings: of sensors that the network itself reads.
        white_state: (B or 1, ...) spectra of the state in the residual band, whitened; None where
            the network does not read it.
    """

    fields: Tensor
    summary: Tensor
    gains: list[tuple[Tensor | None, Kriging]]
    readings: list[Reading]
    white_state: Tensor | None = None

    def project(self, frame: Frame, white_hat: Tensor) -> Tensor:
        """A Q^(1/2) f: colour a whitened spectrum and take the kriged part out of it."""
        out = white_hat * frame.law.modes("colour", white_hat)
        for rows, gain in self.gains:
            if rows is None:
                out = gain.project(out).to(out.dtype)
            else:
                out = out.index_copy(0, rows, gain.project(out[rows]).to(out.dtype))
        return out
