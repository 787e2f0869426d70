"""How often 95 % intervals of scores hold the truth, beside those of the bootstrap.

A score is a ratio of means over trajectories, or its root. Values of a trajectory are skewed, as
mean squares are: gamma laws of shape 4, times a lognormal scale that numerator and denominator
share; at a scale of 1 one or two trajectories carry the sum.
"""

import warnings

import numpy as np
import torch
from scipy import stats

from hpc_closure.evaluate.scores.intervals import block_interval

FORMULAS = {"ratio": lambda a, b: a / b, "root": lambda a, b: (a / b) ** 0.5}
REPEATS, CHUNK = 2000, 500
# standard deviation of the logarithm of the scale -> how seldom and how often ours may hold it
BOUNDS = {0.3: (0.92, 0.97), 1.0: (0.89, 0.95)}


def test_intervals_hold_the_truth_more_often_than_a_bootstrap():
    """Of 4 to 20 trajectories; percentile and BCa (Efron, J. Am. Stat. Assoc. 82 (1987) 171)."""
    rng = np.random.default_rng(0)
    for score, formula in FORMULAS.items():
        for scale, (low, high) in BOUNDS.items():
            for number in (4, 5, 8, 20):
                case = f"{score}, scale {scale}, {number} trajectories"
                shared = np.exp(scale * rng.standard_normal((number, REPEATS)))
                a, b = (shared * rng.gamma(4, 1 / 4, shared.shape) for _ in range(2))
                ours = covered_by_blocks(a, b, formula)
                assert low < ours < high, case
                for method in ("percentile", "BCa"):
                    theirs = covered_by_bootstrap(a, b, formula, method)
                    assert theirs < ours, f"{case}, {method}"
                    if number < 8:
                        assert theirs < 0.87, f"{case}, {method}"


def covered_by_blocks(a: np.ndarray, b: np.ndarray, formula) -> float:
    """Share of this package's intervals that hold 1; ``a``, ``b`` (trajectories, repeats)."""
    values = {"a": torch.from_numpy(a), "b": torch.from_numpy(b)}
    _, low, high = block_interval(
        values, torch.arange(len(a)), lambda means: formula(means["a"], means["b"])
    )
    return share_holding(low.numpy(), high.numpy())


def covered_by_bootstrap(a: np.ndarray, b: np.ndarray, formula, method: str) -> float:
    """Share of a bootstrap's intervals over trajectories that hold 1."""
    shares = []
    for start in range(0, REPEATS, CHUNK):
        part = slice(start, start + CHUNK)
        with warnings.catch_warnings():
            # an interval that cannot be formed does not hold it
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                (a[:, part], b[:, part]),
                lambda a, b, axis: formula(a.mean(axis), b.mean(axis)),
                axis=0,
                paired=True,
                method=method,
                n_resamples=500,
                random_state=0,
            )
        shares.append(share_holding(*found.confidence_interval))
    return sum(shares) / len(shares)


def share_holding(low: np.ndarray, high: np.ndarray) -> float:
    return float(np.mean((low <= 1) & (1 <= high)))
