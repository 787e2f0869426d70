r"""Losses of the default model.

``mean``: whitened square error of the mean network plus the likelihood of its amplitude.
``generator``: score matching as a velocity, :math:`|F(x_t, t) - (\cos t\,z - \sin t\,x_0)|^2` in
whitened units, with base noise z and residual :math:`x_0` conditioned on the same sensors; or,
for the one-pass ensemble, almost-fair CRPS plus a spectral energy score.

Half of the samples see sensors, in layouts drawn from a fixed list, so that one model serves with
and without them. Every draw is keyed by (seed, step, sample).
"""

import math
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure import draws
from hpc_closure.closure.loss import (
    ALMOST_FAIR,
    crps,
    gaussian_likelihood,
    spectral_energy_score,
    spectral_square,
)
from hpc_closure.closure.sensors import choose_layouts, training_layout
from hpc_closure.spectral.grid import resize

__all__ = ["mean_loss", "generator_loss"]

CRPS_MEMBERS = 4


def mean_loss(model, batch: dict[str, Any], seed: int, step: int) -> Tensor:
    """Loss (B,) of the mean network; 1 (+ 1/2 with an amplitude) where it adds nothing."""
    encoding = model.encode(batch["state"], batch.get("history"), raw=True)
    residual = model.band.to_spectral(batch["target"]) - encoding.mean_hat
    residual = resize(residual, model.residual_band.modes).to(torch.complex64)
    guess = model.residual_band.to_spectral(encoding.raw[:, 0])
    white = residual * model.first.modes("whiten", residual) - guess
    loss = spectral_square(model.residual_band, white, model.first.modes("importance", guess))
    if model.config["amplitude"]:
        left = residual - guess.detach() * model.first.modes("colour", guess)
        field = model.residual_band.to_physical(left, model.size) / math.sqrt(model.first.variance)
        loss = loss + gaussian_likelihood(field, model.log_amplitude(encoding.raw))
    return loss


def generator_loss(model, batch: dict[str, Any], seed: int, step: int) -> Tensor:
    """Loss (B,) of the generator; 1 where it adds nothing to a Gaussian law without sensors."""
    ids = [int(i) for i in batch["sample_index"]]
    with torch.no_grad():
        encoding = model.encode(batch["state"], batch.get("history"))
        residual = model.band.to_spectral(batch["target"]) - encoding.mean_hat
        x0 = model.standardise(residual, encoding.log_amplitude).to(torch.complex128)
        choice = draws.uniforms(seed, "train", ids, step).to(x0.device)
        score = model.config["generator"] == "score"
        z = torch.stack(
            [
                model.base_noise(seed, "train", ids, step, draws.STREAM_STEP + i, like=x0)
                for i in range(1 if score else CRPS_MEMBERS)
            ]
        )
        layouts = choose_layouts(choice[:, 1].cpu(), model.sensors_allowed)
        kriged, std, gains = observe_training(model, encoding, x0, z, layouts, ids, seed, step)
        x0, z = (x0 - kriged).to(torch.complex64), z.to(torch.complex64)
    encoded = model.encode_conditions(encoding, kriged, std)
    whiten, importance = model.law.modes("whiten", x0), model.law.modes("importance", x0)
    if score:
        angle = (choice[:, 0] * (math.pi / 2)).to(x0.real)
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        guess = model.whitened_velocity(cos * x0 + sin * z[0], angle, encoded)
        guess = project_groups(model, guess, gains)
        error = (guess - (cos * z[0] - sin * x0)) * whiten
        return spectral_square(model.residual_band, error, importance)
    angle = torch.full((1,), math.pi / 2, device=x0.device)
    members = torch.stack(
        [
            one + project_groups(model, model.whitened_velocity(one, angle, encoded), gains)
            for one in z
        ]
    )
    scale = math.sqrt(model.law.variance)
    fields = model.residual_band.to_physical(members, model.size) / scale
    truth = model.residual_band.to_physical(x0, model.size) / scale
    return crps(fields, truth, ALMOST_FAIR) + spectral_energy_score(
        model.residual_band, members * whiten, x0 * whiten, importance, ALMOST_FAIR
    )


def observe_training(model, encoding, x0, z, layouts, ids, seed, step):
    """Condition a batch on the training layouts; ``z`` (N, B, ...) is conditioned in place.

    Returns:
        kriged fields (B, ...), posterior std (B, g, g), list of (rows, gain).
    """
    kriged = torch.zeros_like(x0)
    std = torch.ones(len(x0), model.size, model.size, dtype=torch.float64, device=x0.device)
    gains = []
    for number in sorted(set(layouts.tolist()) - {0}):
        rows = torch.nonzero(layouts == number)[:, 0].to(x0.device)
        log = None if encoding.log_amplitude is None else encoding.log_amplitude[rows]
        sensors = training_layout(number, model.length, math.sqrt(model.law.variance))
        gain = model.kriging(sensors, log, x0.device)
        error = gain.error.sqrt().expand(len(rows), -1)
        keys = [ids[i] for i in rows.tolist()]
        noise = draws.normals(seed, "train", keys, step, (1 + len(z)) * error.shape[-1])
        first, *others = noise.to(error).chunk(1 + len(z), dim=-1)
        kriged[rows] = gain.field(gain.at_sensors(x0[rows]) + first * error)
        std[rows] = gain.std(model.size)
        for one, other in zip(z, others):
            one[rows] = gain.remove(one[rows], other * error)
        gains.append((rows, gain))
    return kriged, std, gains


def project_groups(model, white_hat: Tensor, gains) -> Tensor:
    """:meth:`DefaultModel.project` where every layout has its own rows of the batch."""
    out = model.project(white_hat, None)
    for rows, gain in gains:
        out = out.index_copy(0, rows, gain.remove(out[rows]).to(out.dtype))
    return out
