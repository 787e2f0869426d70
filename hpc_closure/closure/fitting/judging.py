"""Gains of the trained parts of a composite closure, from evidence of unseen members.

This module collects the evidence; :mod:`part_selection` makes the decisions.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d, max_pool3d

from hpc_closure.closure.composed.copula import noise_of
from hpc_closure.closure.composed.generators import Generator
from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.composed.part_selection import (
    ImprovementGate,
    PointShareGate,
    ShareGate,
    ShellGate,
)
from hpc_closure.closure.composed.point_mixture import PointMixture
from hpc_closure.closure.composed.reading import CHECK_SEED, residuals, snapshots, training_draws
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.losses import crps, energy_score
from hpc_closure.closure.gaussian.memory import LagCorrelation
from hpc_closure.closure.reductions import Reader

__all__ = [
    "check_memory",
    "judge_amplitude",
    "judge_generator",
    "judge_mean",
    "judge_spread",
    "samples_improve",
]

CHECK_DRAWS = 4  # draws of each unseen snapshot that are scored
PATCH = 4  # points per side of the patches whose extremes are scored
CHECKS = 2  # noise levels at which the generator is judged on each unseen snapshot


def judge_mean(model: CompositeClosure, reader: Reader) -> None:
    """Set the gain per shell of the mean's network, from its fit of the regression's residual.

    If the model reads previous closures, also set the range of the network's inputs and outputs.
    """
    frame, gate = model.frame, ShellGate(model.frame.kept)
    assert model.mean is not None
    read = torch.zeros(model.num_features, device=model.device)
    answered = torch.zeros((), device=model.device)
    for frames_hat, target_hat, batch in snapshots(model, reader):
        encoding = model.encode(frames_hat)
        field = model.mean.field(encoding)
        largest = encoding.features[:, : model.num_features].abs().amax((0, *model.band.axes))
        read = torch.maximum(read, largest)
        answered = torch.maximum(answered, field.abs().max())
        output = model.mean.spectra(frame, encoding, field).to(torch.complex128)
        residual = frame.kept.resized(target_hat - encoding.mean_hat)
        white = residual * frame.first.modes("whiten", residual)
        gate.add(white, output * frame.first.modes("mask", residual), batch.members)
    gate.collect(reader)
    read, answered = reader.largest(read, answered)
    gain = gate.gains() if model.gated else torch.ones(frame.kept.grid.num_shells).double()
    model.statistics = replace(model.statistics, mean_gain=gain, mean_members=float(gate.members))
    if model.previous:
        model.statistics = replace(
            model.statistics,
            features_largest=read.double().cpu(),
            mean_largest=float(answered),
        )


def judge_amplitude(model: CompositeClosure, reader: Reader) -> None:
    """Set the share of log D in use, by the score by which D was fitted."""
    frame, amplitude = model.frame, model.amplitude
    assert amplitude is not None

    def pairs() -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
        for frames_hat, target_hat, batch in snapshots(model, reader):
            encoding = model.encode(frames_hat)
            residual = frame.kept.resized(target_hat - encoding.mean_hat)
            yield amplitude(encoding).double(), frame.field(residual), batch.members

    gate: ShareGate | PointShareGate
    if model.config["amplitude_score"] == "crps":
        gate = PointShareGate(frame.kept)
        for log, field, _ in pairs():
            gate.measure(log, field)
        gate.sum(reader)
    else:
        gate = ShareGate(frame.first)
    for log, field, members in pairs():
        gate.add(log, field, members)
    gate.collect(reader)
    model.statistics = replace(
        model.statistics,
        amplitude_gain=gate.share() if model.gated else 1.0,
        amplitude_members=float(gate.members),
    )


def judge_generator(model: CompositeClosure, reader: Reader) -> tuple[Tensor, int, int]:
    """Judge the generator; returns its gain per shell, the number of members and of snapshots."""
    generator = model.residual
    assert isinstance(generator, Generator)
    frame, gate, first = model.frame, generator.gate(model.frame), reader.first
    for _ in range(CHECKS):
        for frames_hat, target_hat, batch in snapshots(model, reader):
            key = keyed_noise.Key(CHECK_SEED, "check", range(first, first + len(target_hat)), 0)
            first += len(target_hat)
            encoding = model.encode(frames_hat)
            layouts = model.conditioning.layouts
            draws = training_draws(model, encoding, target_hat, key, layouts)
            gate.add(*generator.evidence(frame, *draws), batch.members)
        first += reader.others
    gate.collect(reader)
    everywhere = torch.ones(frame.kept.grid.num_shells).double()
    gain = gate.gains() if model.gated and generator.judged else everywhere
    return gain, gate.members, (first - reader.first) // CHECKS


def samples_improve(model: CompositeClosure, reader: Reader) -> bool:
    """Return whether the generator's draws of q score better than those of the base law.

    Scores are the energy score of fields, which is sensitive to two peaks of a pattern, and the
    CRPS of points, which is sensitive to a spread that depends on position. Of several channels
    the CRPS of extremes counts as well: rare events of a few points change neither of the others.
    This is a separate test, because a better velocity can still give worse draws after few steps.
    """
    frame = model.frame
    scores: list[Callable[[Tensor, Tensor], Tensor]] = [energy_score, crps]
    if model.channel_shape:
        scores.append(extremes_crps)
    gates = [ImprovementGate(frame.kept) for _ in scores]
    for encoding, q_hat, ids, batch in residuals(model, reader):
        truth = frame.field(q_hat.to(torch.complex128))
        scale = frame.law.rms(truth) if model.channel_shape else 1.0
        keys = [keyed_noise.Key(CHECK_SEED, "check", ids, 2 + i) for i in range(CHECK_DRAWS)]
        plain = [model.base_noise(frame.law, key, keyed_noise.STREAM_BASE) for key in keys]
        draws = [model.generate(encoding, z).q for z in plain]
        sets = [frame.field(torch.stack(qs).to(torch.complex128)) for qs in (plain, draws)]
        for gate, score in zip(gates, scores):
            before, after = (score(ensemble / scale, truth / scale) for ensemble in sets)
            gate.add(before, after, batch.members)
    for gate in gates:
        gate.collect(reader)
    return any(bool(gate.gains().any()) for gate in gates)


def extremes_crps(ensemble: Tensor, truth: Tensor) -> Tensor:
    """Compute the CRPS of largest and least values of patches, (S,), units of the truth.

    Args:
        ensemble: (M, S, C, n, n); patches have ``PATCH`` points per side. On a line it is
            (M, S, C, n), on a cube (M, S, C, n, n, n).
        truth: (S, C, n, n).
    """
    pool = {1: max_pool1d, 2: max_pool2d, 3: max_pool3d}[truth.ndim - 2]
    sides = truth.ndim - 2

    def largest(values: Tensor) -> Tensor:
        leading = values.shape[: -1 - sides]
        return pool(values.flatten(0, -2 - sides), PATCH).unflatten(0, leading)

    high = crps(largest(ensemble), largest(truth))
    return 0.5 * (high + crps(largest(-ensemble), largest(-truth)))


def judge_spread(model: CompositeClosure, reader: Reader, is_late: bool) -> Tensor:
    """Compute std ratios (shells,) of D q to D times the generator's draws.

    Both are taken about the generator's mean, if it has one. The memory of the rest of the
    residual, or of the normal scores of a mixture at every point, is set as well.

    Args:
        model: a model with a generator.
        reader: reader of unseen members.
        is_late: whether the residual's memory is checked here (:func:`check_memory`).
    """
    frame = model.frame
    memory = LagCorrelation(frame.kept, model.channel_shape, model.whole)
    shape = *model.channel_shape, frame.kept.grid.num_shells
    true_power = torch.zeros(shape, dtype=torch.float64)
    draws = torch.zeros_like(true_power)
    for encoding, q_hat, ids, batch in residuals(model, reader):
        key = keyed_noise.Key(CHECK_SEED, "check", ids, 1)
        z = model.base_noise(frame.law, key, keyed_noise.STREAM_BASE)
        made = model.generate(encoding, z)
        if isinstance(model.residual, PointMixture):
            rest = noise_of(model, encoding, q_hat)
        else:
            rest = model.apart(q_hat - made.mean)
        memory.add(rest, None if model.is_white else batch.tags)
        about = made.mean if made.sharp else 0.0
        for power, q in ((true_power, q_hat - about), (draws, made.q - about)):
            u_hat = frame.kept.resized(frame.amplify(q, encoding.log_amplitude))
            power += frame.kept.grid.shell_sum(u_hat.abs().square().double()).sum(0).cpu()
    memory.collect(reader)
    if is_late:
        check_memory(model, memory)
    true_power, draws = reader.sum(true_power, draws)
    model.adopt(replace(model.statistics, memory_times=memory.times()))
    ratio = (true_power / draws.clamp(min=1e-300)).sqrt()
    # if D couples more into a shell from others than the shell has, no factor of q helps
    return torch.where((true_power > 0) & (draws > 0), ratio.clamp(0.9, 2.0), 1.0)


def check_memory(model: CompositeClosure, memory: LagCorrelation) -> None:
    """Raise ValueError if the noise's memory must be fitted and the snapshots cannot show it."""
    if model.recorded_every is not None and not model.is_white:
        memory.demand(model.recorded_every)
