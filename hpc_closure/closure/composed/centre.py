"""Conditional mean of a generator's draws as a function of the state, to be subtracted from them.

A score that is trained on some thousand closures has an error in the conditional mean of its
draws, about a hundredth of their variance. The error is negligible in one call, but a coupled run
repeats it in every call. If another part is the mean, the mean of the draws should be zero. Then
the error can be measured without data, because a trained generator makes as many draws as needed.
Draws are made in pairs with base noise z and -z, because the mean of a pair has an eighth of the
variance of a draw. A perceptron of the summary numbers of the state (:meth:`Band.summary`) learns
the means of pairs on training states. Other states decide whether it acts.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from hpc_closure.closure.composed.part_selection import ByMember, Gate, significant
from hpc_closure.closure.fields.modes import Band
from hpc_closure.closure.networks.blocks import perceptron
from hpc_closure.closure.reductions import Reader

__all__ = ["CentreGate", "fit", "mean_of"]

HIDDEN, STEPS, BATCH, RATE = 64, 3000, 256, 3e-3
DECAY = 1.0  # weight decay, strong because every pair is a single noisy draw about the mean
SEED = 20261129


def fit(numbers: Tensor, means: Tensor, channels: int = 1) -> list[Tensor]:
    """Fit the perceptron to numbers (N, 51) of states and means (N, 25) of pairs.

    Of C ``channels`` they are (N, 51 C) and (N, 25 C); on a line and a cube they are others.

    Returns:
        Three matrices (inputs + 1, outputs), float64, the biases last.
    """
    by_channel = means.std(0).unflatten(0, (channels, -1)).amax(-1, keepdim=True)
    each = means.shape[1] // channels
    scale = by_channel.clamp(min=1e-300).expand(-1, each).flatten()
    numbers, scaled_means = numbers.float(), (means / scale).float()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = perceptron(numbers.shape[1], scaled_means.shape[1], HIDDEN).float()
        adam = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
        for step in range(STEPS):
            adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            batch = torch.randint(len(numbers), (BATCH,))
            adam.zero_grad()
            (net(numbers[batch]) - scaled_means[batch]).square().sum(1).mean().backward()
            adam.step()
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    matrices = [
        torch.cat([layer.weight.mT, layer.bias[None]]).detach().double() for layer in layers
    ]
    return [*matrices[:-1], matrices[-1] * scale]


def mean_of(weights: list[Tensor], numbers: Tensor) -> Tensor:
    """Evaluate the perceptron: means (B, 25) of states with numbers (B, 51)."""
    for number, weight in enumerate(weights):
        numbers = torch.addmm(weight[-1], gelu(numbers) if number else numbers, weight[:-1])
    return numbers


class CentreGate(Gate):
    """Decide on unseen members whether the learned mean of draws is subtracted.

    The mean of their draws must come nearer to zero, and their closures must not move farther from
    the mean of the draws.

    Args:
        kept: band of the residual.
        variance: (C,) pointwise variance of each channel, in units of which channels are averaged;
            None for one field.
    """

    def __init__(self, kept: Band, variance: Tensor | None = None):
        self.kept, self.variance = kept, variance
        # decrease of the draws' squared mean, increase of the error, square of the mean
        self.changes = ByMember()
        # squared mean of draws before and after, power of the residuals
        self.squares = torch.zeros(3, dtype=torch.float64)
        channels = () if variance is None else variance.shape
        self.powers = torch.zeros(2, *channels, kept.grid.num_shells, dtype=torch.float64)
        super().__init__(self.changes)

    def add(self, q_hat: Tensor, drawn: Tensor, mean_hat: Tensor, members: Tensor | None) -> None:
        """Add residuals (B, ...), centred draws (B, 2, pairs, ...), subtracted means (B, ...)."""
        halves = drawn.mean(1).unflatten(1, (2, -1)).mean(2)  # with independent errors
        after, before = halves.unbind(1), (halves + mean_hat[:, None]).unbind(1)
        then, now = self._inner(*before), self._inner(*after)
        was, is_now = (
            q_hat - (first_half + second_half) / 2 for first_half, second_half in (before, after)
        )
        farther = self._inner(is_now, is_now) - self._inner(was, was)
        size = self._inner(mean_hat, mean_hat)
        self.changes.add(torch.stack([then - now, farther, size], dim=1), members)
        self.squares += torch.stack(
            [value.sum() for value in (then, now, self._inner(q_hat, q_hat))]
        )
        first = drawn[:, 0, 0]
        for power, q in zip(self.powers, (first + mean_hat, first)):
            power += self.kept.grid.shell_sum(q.abs().square()).sum(0).cpu()

    def _inner(self, first: Tensor, second: Tensor) -> Tensor:
        power = self.kept.grid.shell_sum((first.conj() * second).real).sum(-1).cpu()
        return power if self.variance is None else (power / self.variance).mean(-1)

    def collect(self, reader: Reader) -> None:
        super().collect(reader)
        self.squares, self.powers = reader.sum(self.squares, self.powers)

    def acts(self) -> bool:
        """Return whether the mean is subtracted."""
        nearer, farther, size = self.changes.sums().T
        # means are large in few members, which would otherwise dominate the uncertainty of the sum
        scale = size + size.mean()
        return bool(significant(nearer / scale)) and not bool(significant(farther / scale))

    def shares(self) -> list[float]:
        """Return the squared mean of draws before and after, over the power of the residuals."""
        return (self.squares[:2] / self.squares[2]).tolist()

    def spread(self) -> Tensor:
        """Return (shells,) factors of the spread that restore the power of the subtracted mean."""
        before, after = self.powers
        return torch.where(after > 0, before / after.clamp(min=1e-300), 1.0).sqrt()
