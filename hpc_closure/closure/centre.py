r"""The mean of what a generator draws, a function of the state's numbers, to be taken out.

A score that is learned from some thousand closures has an error of its own in the conditional mean
of its draws, a hundredth of their variance. In one call it hardly counts; a coupled run makes it
again in every call and adds it up. Where the mean is another part's, that of a draw is known to be
zero, and how far it is from that can be seen without data: draws of a trained generator are as
many as one likes. They are made in pairs, of base noise z and of -z, whose mean varies an eighth
as much as a draw. A perceptron of the numbers of the state (:meth:`Band.summary`) learns these
means; what it has learned on training states it must show on others.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from hpc_closure.closure.band import Band
from hpc_closure.closure.gate import ByMember, Gate, significant
from hpc_closure.closure.network import perceptron
from hpc_closure.closure.reader import Reader

__all__ = ["CentreGate", "fit", "mean_of"]

HIDDEN, STEPS, BATCH, RATE = 64, 3000, 256, 3e-3
DECAY = 1.0  # of the weights: every pair is one draw about the mean
SEED = 20261129


def fit(numbers: Tensor, means: Tensor) -> list[Tensor]:
    """Weights of the perceptron from numbers (N, 51) of states and means (N, 25) of pairs.

    Returns:
        Three matrices (inputs + 1, outputs), float64, the biases last.
    """
    scale = means.std(0).max().clamp(min=1e-300)
    numbers, wanted = numbers.float(), (means / scale).float()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = perceptron(numbers.shape[1], wanted.shape[1], HIDDEN).float()
        adam = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
        for step in range(STEPS):
            adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            some = torch.randint(len(numbers), (BATCH,))
            adam.zero_grad()
            (net(numbers[some]) - wanted[some]).square().sum(1).mean().backward()
            adam.step()
    layers = [one for one in net if isinstance(one, nn.Linear)]
    found = [torch.cat([one.weight.mT, one.bias[None]]).detach().double() for one in layers]
    return [*found[:-1], found[-1] * scale]


def mean_of(weights: list[Tensor], numbers: Tensor) -> Tensor:
    """Means (B, 25) of states with these numbers (B, 51)."""
    for number, one in enumerate(weights):
        numbers = torch.addmm(one[-1], gelu(numbers) if number else numbers, one[:-1])
    return numbers


class CentreGate(Gate):
    """Whether what was learned of the mean of draws is theirs on members that it has not seen.

    The mean of their draws must be nearer to zero without it, and that of their closures must not
    be farther from the mean of the draws.
    """

    def __init__(self, kept: Band):
        self.kept = kept
        self.changes = ByMember()  # nearer by, farther by, square of what was taken out
        self.squares = torch.zeros(3, dtype=torch.float64)  # before, after, of the closures
        self.powers = torch.zeros(2, kept.grid.num_shells, dtype=torch.float64)
        super().__init__(self.changes)

    def add(self, q_hat: Tensor, drawn: Tensor, mean_hat: Tensor, members: Tensor | None) -> None:
        """Take in residuals (B, ...), draws (B, 2, pairs, ...) of centred ones and what was taken
        out of these, (B, ...)."""
        halves = drawn.mean(1).unflatten(1, (2, -1)).mean(2)  # their errors are independent
        after, before = halves.unbind(1), (halves + mean_hat[:, None]).unbind(1)
        then, now = self._inner(*before), self._inner(*after)
        was, is_now = (q_hat - (one + other) / 2 for one, other in (before, after))
        farther = self._inner(is_now, is_now) - self._inner(was, was)
        size = self._inner(mean_hat, mean_hat)
        self.changes.add(torch.stack([then - now, farther, size], dim=1), members)
        self.squares += torch.stack([one.sum() for one in (then, now, self._inner(q_hat, q_hat))])
        first = drawn[:, 0, 0]
        for power, one in zip(self.powers, (first + mean_hat, first)):
            power += self.kept.grid.shell_sum(one.abs().square()).sum(0).cpu()

    def _inner(self, one: Tensor, other: Tensor) -> Tensor:
        return self.kept.grid.shell_sum((one.conj() * other).real).sum(-1).cpu()

    def collect(self, reader: Reader) -> None:
        super().collect(reader)
        self.squares, self.powers = reader.sum(self.squares, self.powers)

    def acts(self) -> bool:
        """Whether it is to be taken out."""
        nearer, farther, size = self.changes.sums().T
        # means are large in few members, whose share would else be the uncertainty of the sum
        scale = size + size.mean()
        return bool(significant(nearer / scale)) and not bool(significant(farther / scale))

    def shares(self) -> list[float]:
        """Square of the mean of draws before and after, over that of the residuals."""
        return (self.squares[:2] / self.squares[2]).tolist()

    def spread(self) -> Tensor:
        """(shells,) factor of the draws' spread that makes up for what is less of a mean."""
        before, after = self.powers
        return torch.where(after > 0, before / after.clamp(min=1e-300), 1.0).sqrt()
