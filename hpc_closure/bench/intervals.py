"""How often 95 % intervals of scores hold the truth, for few trajectories.

A score is a ratio of means over trajectories, or its root. Each trajectory's values are skewed, as
mean squares are: gamma laws of shape 4, times a lognormal scale that numerator and denominator
share; at a scale of 1 one or two trajectories carry the sum. Beside the intervals of this package
(:mod:`hpc_closure.evaluate.scores.intervals`): the percentile and the BCa bootstrap over
trajectories (Efron, J. Am. Stat. Assoc. 82 (1987) 171), as scipy has them.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from hpc_closure.evaluate.scores.intervals import MIN_BLOCKS, block_interval

COLUMNS = {"score": "", "scale": ".1f", "blocks": "d"} | dict.fromkeys(
    ("percentile", "bca", "t"), ".3f"
)
FORMULAS = {
    "ratio": lambda a, b: a / b,
    "root": lambda a, b: (a / b) ** 0.5,
}
SCALES = (0.3, 1.0)  # standard deviation of the logarithm of the shared scale
SHAPE = 4
RESAMPLES = 500
CHUNK = 500  # data sets at a time


def run(blocks: Sequence[int], repeats: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records: the share of ``repeats`` intervals that hold the true score, 1.

    Raises:
        ValueError: fewer blocks than an interval needs.
    """
    if min(blocks) < MIN_BLOCKS:
        raise ValueError(f"--blocks {min(blocks)}: an interval needs at least {MIN_BLOCKS}")
    rng = np.random.default_rng(seed)
    records = []
    for score, formula in FORMULAS.items():
        for scale in SCALES:
            for number in blocks:
                shared = np.exp(scale * rng.standard_normal((number, repeats)))
                a, b = (shared * rng.gamma(SHAPE, 1 / SHAPE, shared.shape) for _ in range(2))
                _, low, high = block_interval(
                    {"a": torch.from_numpy(a), "b": torch.from_numpy(b)},
                    torch.arange(number),
                    lambda means, form=formula: form(means["a"], means["b"]),  # type: ignore
                )
                records.append(
                    {
                        "score": score,
                        "scale": scale,
                        "blocks": number,
                        "percentile": _bootstrap(a, b, formula, "percentile", seed),
                        "bca": _bootstrap(a, b, formula, "BCa", seed),
                        "t": _holding(low.numpy(), high.numpy()),
                    }
                )
    return records


def _bootstrap(a: np.ndarray, b: np.ndarray, formula, method: str, seed: int) -> float:
    """Share of the bootstrap's intervals that hold 1; ``a`` and ``b`` (blocks, repeats)."""
    shares = []
    for start in range(0, a.shape[1], CHUNK):
        chosen = slice(start, start + CHUNK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # no interval: not held
            found = stats.bootstrap(
                (a[:, chosen], b[:, chosen]),
                lambda a, b, axis: formula(a.mean(axis), b.mean(axis)),
                axis=0,
                paired=True,
                method=method,
                n_resamples=RESAMPLES,
                random_state=seed,
            )
        shares.append(_holding(*found.confidence_interval) * a[:, chosen].shape[1])
    return sum(shares) / a.shape[1]


def _holding(low: np.ndarray, high: np.ndarray) -> float:
    return float(np.mean((low <= 1) & (1 <= high)))
