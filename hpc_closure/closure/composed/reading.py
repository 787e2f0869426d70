"""Inputs of the phases of a composite closure: snapshots as spectra, residuals, training draws."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_closure.closure.composed.generators import Generator
from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.composed.statistics import Batch
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.sensors import TrainingLayout, choose_layouts
from hpc_closure.closure.gaussian.conditioning import GeneratorConditions, Observed
from hpc_closure.closure.gaussian.residual_coordinates import StateConditions
from hpc_closure.closure.reductions import Reader

__all__ = ["CHECK_SEED", "Residuals", "residuals", "snapshots", "training_draws"]

CHECK_SEED = 20240807  # seed of the draws for unseen snapshots


class Residuals(NamedTuple):
    """Residuals of the mean for a batch.

    Attributes:
        encoding: conditions from the states.
        q_hat: (B, ...) spectra of q.
        ids: ids of the draws for these snapshots.
        batch: the batch.
    """

    encoding: StateConditions
    q_hat: Tensor
    ids: range
    batch: Batch


def snapshots(model: CompositeClosure, reader: Reader) -> Iterable[tuple[Tensor, Tensor, Batch]]:
    """Yield (frames, target spectra, batch) of every batch, float64, on the model's device."""
    device = model.device
    for batch in Batch.read(reader):
        earlier = (
            None if fields is None else fields.to(device)
            for fields in (batch.history, batch.previous)
        )
        frames_hat = model.frames(batch.state.to(device).double(), *earlier)
        yield frames_hat, model.band.to_spectral(batch.target.to(device).double()), batch


def residuals(model: CompositeClosure, reader: Reader) -> Iterable[Residuals]:
    """Yield q of every batch, with the encoding of its states."""
    first = reader.first
    for frames_hat, target_hat, batch in snapshots(model, reader):
        encoding, ids = model.encode(frames_hat), range(first, first + len(target_hat))
        first += len(target_hat)
        q_hat = model.frame.standardise(target_hat - encoding.mean_hat, encoding.log_amplitude)
        yield Residuals(encoding, q_hat, ids, batch)


def training_draws(
    model: CompositeClosure,
    encoding: StateConditions,
    target_hat: Tensor,
    key: keyed_noise.Key,
    layouts: tuple[TrainingLayout, ...],
) -> tuple[GeneratorConditions, Tensor, Tensor, Tensor]:
    """Draw the arguments of a generator's loss: conditions, x0, base noise and uniforms.

    Half of the samples have sensors, in layouts chosen from a fixed list, so that one model serves
    with and without sensors. Every draw is keyed by (seed, step, sample).

    Args:
        model: a model with a generator.
        encoding: conditions from the states.
        target_hat: spectra (B, ...) of the closures.
        key: key of the draws.
        layouts: layouts of sensors to choose from.
    """
    assert isinstance(model.residual, Generator)
    frame = model.frame
    residual = target_hat - encoding.mean_hat
    x0 = frame.standardise(residual, encoding.log_amplitude).to(torch.complex128)
    uniform = keyed_noise.uniforms(*key)  # on the host, which chooses the layouts
    streams = range(keyed_noise.STREAM_STEP, keyed_noise.STREAM_STEP + model.residual.noises)
    z = torch.stack([model.base_noise(frame.law, key, stream) for stream in streams])
    if model.sensors_allowed == "none":
        absent = model.conditioning.absent(frame, encoding.features)
        conditions = model.posterior(encoding, Observed(absent), [])
        return conditions, x0, z, uniform[:, 0].to(x0.device)
    chosen = choose_layouts(uniform[:, 1], model.sensors_allowed, layouts)
    observed = model.conditioning.observe_training(frame, encoding, x0, z, chosen, key)
    conditions = model.posterior(encoding, observed, list(observed.gains))
    return conditions, x0 - observed.mean, z, uniform[:, 0].to(x0.device)
