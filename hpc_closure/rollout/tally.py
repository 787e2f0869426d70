"""How often draws of a coupled run were brought back into the training's range, by row and shell.

A row's numbers depend on its own draws only, so blocks, processes and restarts do not change them.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["Tally"]

FIRST = 2  # columns before those of the shells: draws, and those brought back


class Tally:
    """Draws so far, those of them that were brought back in any shell, and in each shell.

    Args:
        rows: trajectories.
        shells: of a draw; 0 = the model brings nothing back, and nothing is counted.
        device: of the run, on which the counts stay until they are asked for.

    Attributes:
        counts: (rows, 2 + shells) int64: draws, those brought back, those of each shell from 0 on.
    """

    def __init__(self, rows: int, shells: int, device: str = "cpu"):
        columns = FIRST + shells if shells else 0
        self.counts = torch.zeros(rows, columns, dtype=torch.int64, device=device)

    @property
    def columns(self) -> int:
        """Numbers of a row; 0 where nothing is counted."""
        return self.counts.shape[1]

    def add(self, beyond: Tensor, lost: Tensor) -> None:
        """Count a draw of every row that is not lost.

        Args:
            beyond: (rows, shells) bool, which shells were brought back.
            lost: (rows,) bool.
        """
        beyond = beyond.to(self.counts.device)
        any_shell = beyond.any(-1, keepdim=True)
        new = torch.cat([torch.ones_like(any_shell), any_shell, beyond], dim=-1)
        self.counts += (new & ~lost[:, None]).to(self.counts)

    def clear(self) -> None:
        """Begin anew."""
        self.counts.zero_()

    def save(self) -> np.ndarray:
        """The counts so far, for a restart file: a copy."""
        return self.counts.cpu().numpy().copy()

    def load(self, counts: np.ndarray) -> None:
        """Go on from what :meth:`save` gave."""
        self.counts.copy_(torch.as_tensor(counts))
