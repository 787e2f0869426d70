"""Fit the Gaussian field of a point mixture: the covariance of the normal scores of q.

The scores are those of snapshots that the network has not seen. Draws divide them by their rms, so
that only the correlations of the fitted covariance count.
"""

from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.composed.point_mixture import PointMixture
from hpc_closure.closure.composed.reading import residuals
from hpc_closure.closure.gaussian.channel_covariance import ChannelCovariance, remove_channels
from hpc_closure.closure.gaussian.conditioning import Observed
from hpc_closure.closure.gaussian.residual_coordinates import StateConditions
from hpc_closure.closure.reductions import Reader

__all__ = ["fit_copula", "noise_of"]


def fit_copula(model: CompositeClosure, reader: Reader) -> dict[str, Any]:
    """Fit spectrum and channel factors of the normal scores; returns their statistics.

    Args:
        model: a model whose residual is a :class:`~.point_mixture.PointMixture`.
        reader: reader of unseen members.
    """
    assert isinstance(model.residual, PointMixture)
    frame, equation = model.frame, model.feature_set.equation
    inner, num = frame.kept, 0
    power = torch.zeros(*model.channel_shape, len(inner.group_k2), dtype=torch.float64)
    across = None
    if equation is not None:
        across = ChannelCovariance(inner, [channel.kind for channel in equation.channels])
    for encoding, q_hat, _, batch in residuals(model, reader):
        scores = scores_of(model, encoding, q_hat)
        power += inner.by_group(scores.abs().square()).sum(0).cpu()
        num += len(scores)
        if across is not None:
            across.add(scores, batch.members)
    power, num = reader.sum(power, num)
    spectrum = power / num / inner.group_size
    channels = None if across is None else across.factors(reader, inner.spread(spectrum))
    return {"copula_spectrum": spectrum, "copula_channels": channels}


def scores_of(model: CompositeClosure, encoding: StateConditions, q_hat: Tensor) -> Tensor:
    """Compute the normal scores of residuals, spectra (B, ...) in the modes that are drawn."""
    assert isinstance(model.residual, PointMixture)
    frame = model.frame
    absent = model.conditioning.absent(frame, encoding.features)
    scores = model.residual.scores(frame, model.posterior(encoding, Observed(absent), []), q_hat)
    return scores * frame.law.modes("mask", scores)


def noise_of(model: CompositeClosure, encoding: StateConditions, q_hat: Tensor) -> Tensor:
    """Compute the noise of residuals: their normal scores, with independent channels.

    Base noise has the memory of these, not of q, since q is no linear function of its noise.
    """
    scores, factors = scores_of(model, encoding, q_hat), model.frame.copula_channels
    return scores if factors is None else remove_channels(factors, scores)
