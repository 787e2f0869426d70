"""Count draws of a coupled run that were rescaled into the training's range, by row and shell.

The counts of a row depend only on the draws of that row, so they do not depend on blocks,
processes or restarts.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["Tally"]

FIRST = 2  # columns before those of the shells: draws, rescaled draws


class Tally:
    """Counts of draws, of draws rescaled in any shell, and of draws rescaled in each shell.

    Args:
        rows: trajectories.
        shells: shells of a draw; 0 = the model rescales nothing, and nothing is counted.
        device: device of the run; the counts stay there until :meth:`save`.

    Attributes:
        counts: (rows, 2 + shells) int64: draws, rescaled draws, draws rescaled in shell 0, 1, ...
    """

    def __init__(self, rows: int, shells: int, device: str = "cpu"):
        columns = FIRST + shells if shells else 0
        self.counts = torch.zeros(rows, columns, dtype=torch.int64, device=device)

    @property
    def columns(self) -> int:
        """Columns of ``counts``; 0 if nothing is counted."""
        return self.counts.shape[1]

    def add(self, beyond: Tensor, lost: Tensor) -> None:
        """Count one draw of every row that is not lost.

        Args:
            beyond: (rows, shells) bool, shells that were rescaled.
            lost: (rows,) bool, rows that have diverged.
        """
        beyond = beyond.to(self.counts.device)
        any_shell = beyond.any(-1, keepdim=True)
        increments = torch.cat([torch.ones_like(any_shell), any_shell, beyond], dim=-1)
        self.counts += (increments & ~lost[:, None]).to(self.counts)

    def clear(self) -> None:
        """Reset all counts to 0."""
        self.counts.zero_()

    def save(self) -> np.ndarray:
        """Copy the counts (rows, 2 + shells) to numpy, for a restart file."""
        return self.counts.cpu().numpy().copy()

    def load(self, counts: np.ndarray) -> None:
        """Restore counts that :meth:`save` returned."""
        self.counts.copy_(torch.as_tensor(counts))
