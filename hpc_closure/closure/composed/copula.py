"""Fit the Gaussian field of a point mixture: the covariance of the normal scores of q.

The scores are those of snapshots that the network has not seen. Draws divide them by their rms, so
that only the correlations of the fitted covariance count.
"""

from typing import Any

import torch

from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.composed.point_mixture import PointMixture
from hpc_closure.closure.composed.reading import residuals
from hpc_closure.closure.gaussian.channel_covariance import ChannelCovariance
from hpc_closure.closure.gaussian.conditioning import Observed
from hpc_closure.closure.reductions import Reader

__all__ = ["fit_copula"]


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
        absent = model.conditioning.absent(frame, encoding.features)
        conditions = model.posterior(encoding, Observed(absent), [])
        scores = model.residual.scores(frame, conditions, q_hat)
        scores = scores * frame.law.modes("mask", scores)  # no other modes are drawn
        power += inner.by_group(scores.abs().square()).sum(0).cpu()
        num += len(scores)
        if across is not None:
            across.add(scores, batch.members)
    power, num = reader.sum(power, num)
    spectrum = power / num / inner.group_size
    channels = None if across is None else across.factors(reader, inner.spread(spectrum))
    return {"copula_spectrum": spectrum, "copula_channels": channels}
