"""How far each trained part of a composite closure acts, judged on members it has not seen.

The decisions themselves are in :mod:`part_selection`; here evidence is collected for them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hpc_closure.closure.composed.generators import Generator
from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.composed.part_selection import ImprovementGate, ShareGate, ShellGate
from hpc_closure.closure.composed.reading import CHECK_SEED, residuals, snapshots, training_draws
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.losses import crps, energy_score
from hpc_closure.closure.gaussian.memory import LagCorrelation
from hpc_closure.closure.reductions import Reader
from hpc_closure.spectral.modes.grid import resize

__all__ = [
    "check_memory",
    "judge_amplitude",
    "judge_generator",
    "judge_mean",
    "judge_spread",
    "samples_improve",
]

CHECK_DRAWS = 4  # samples of each unseen snapshot whose score judges it
CHECKS = 2  # noise levels at which each unseen snapshot judges the generator


def judge_mean(model: CompositeClosure, reader: Reader) -> None:
    """Set the gain per shell of the mean's network on what the regression leaves.

    Where it reads closures of its own, also the range of what it reads and answers here.
    """
    frame, gate = model.frame, ShellGate(model.frame.kept)
    assert model.mean is not None
    read = torch.zeros(model.num_features, device=model.device)
    answered = torch.zeros((), device=model.device)
    for frames_hat, target_hat, batch in snapshots(model, reader):
        encoding = model.encode(frames_hat)
        field = model.mean.field(encoding)
        largest = encoding.features[:, : model.num_features].abs().amax((0, 2, 3))
        read = torch.maximum(read, largest)
        answered = torch.maximum(answered, field.abs().max())
        output = model.mean.spectra(frame, encoding, field).to(torch.complex128)
        residual = resize(target_hat - encoding.mean_hat, frame.kept.modes)
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
    """Set the share of log D."""
    frame, gate = model.frame, ShareGate(model.frame.first)
    assert model.amplitude is not None
    for frames_hat, target_hat, batch in snapshots(model, reader):
        encoding = model.encode(frames_hat)
        residual = resize(target_hat - encoding.mean_hat, frame.kept.modes)
        gate.add(model.amplitude(encoding).double(), frame.field(residual), batch.members)
    gate.collect(reader)
    model.statistics = replace(
        model.statistics,
        amplitude_gain=gate.share() if model.gated else 1.0,
        amplitude_members=float(gate.members),
    )


def judge_generator(model: CompositeClosure, reader: Reader) -> tuple[Tensor, int, int]:
    """Weigh the generator; returns its gain per shell, the members and the snapshots."""
    generator = model.residual
    assert isinstance(generator, Generator)
    frame, gate, first = model.frame, generator.gate(model.frame), reader.first
    for _ in range(CHECKS):
        for frames_hat, target_hat, batch in snapshots(model, reader):
            key = keyed_noise.Key(CHECK_SEED, "check", range(first, first + len(target_hat)), 0)
            first += len(target_hat)
            encoding = model.encode(frames_hat)
            layouts = model.conditioning.layouts
            drawn = training_draws(model, encoding, target_hat, key, layouts)
            gate.add(*generator.evidence(frame, *drawn), batch.members)
        first += reader.others
    gate.collect(reader)
    everywhere = torch.ones(frame.kept.grid.num_shells).double()
    gain = gate.gains() if model.gated and generator.judged else everywhere
    return gain, gate.members, (first - reader.first) // CHECKS


def samples_improve(model: CompositeClosure, reader: Reader) -> bool:
    """Decide whether q as the generator draws it scores better than as its base law does.

    By the energy score of fields, which sees two peaks of a pattern, or by the CRPS of points,
    which sees a spread that differs by place. A velocity may be nearer to the truth, and few
    steps along it end farther.
    """
    frame = model.frame
    fields, points = ImprovementGate(frame.kept), ImprovementGate(frame.kept)
    for encoding, q_hat, ids, batch in residuals(model, reader):
        truth = frame.field(q_hat.to(torch.complex128))
        keys = [keyed_noise.Key(CHECK_SEED, "check", ids, 2 + i) for i in range(CHECK_DRAWS)]
        plain = [model.base_noise(frame.law, key, keyed_noise.STREAM_BASE) for key in keys]
        drawn = [model.generate(encoding, z).q for z in plain]
        sets = [frame.field(torch.stack(qs).to(torch.complex128)) for qs in (plain, drawn)]
        for gate, score in ((fields, energy_score), (points, crps)):
            before, after = (score(one, truth) for one in sets)
            gate.add(before, after, batch.members)
    fields.collect(reader)
    points.collect(reader)
    return bool(fields.gains().any() or points.gains().any())


def judge_spread(model: CompositeClosure, reader: Reader, is_late: bool) -> Tensor:
    """Compare the standard deviations of D q and of D times the generator's samples, (shells,).

    Both about the generator's mean, where it has one; what is left of the residual then shows its
    memory, too.

    Args:
        model: with a generator.
        reader: of unseen members.
        is_late: the residual's memory is known only now (:func:`check_memory`).
    """
    frame = model.frame
    memory = LagCorrelation(frame.kept)
    seen = torch.zeros(frame.kept.grid.num_shells, dtype=torch.float64)
    drawn = torch.zeros_like(seen)
    for encoding, q_hat, ids, batch in residuals(model, reader):
        key = keyed_noise.Key(CHECK_SEED, "check", ids, 1)
        z = model.base_noise(frame.law, key, keyed_noise.STREAM_BASE)
        made = model.generate(encoding, z)
        memory.add(q_hat - made.mean, None if model.is_white else batch.tags)
        about = made.mean if made.sharp else 0.0
        for power, q in ((seen, q_hat - about), (drawn, made.q - about)):
            u_hat = resize(frame.amplify(q, encoding.log_amplitude), frame.kept.modes)
            power += frame.kept.grid.shell_sum(u_hat.abs().square().double()).sum(0).cpu()
    memory.collect(reader)
    if is_late:
        check_memory(model, memory)
    seen, drawn = reader.sum(seen, drawn)
    model.adopt(replace(model.statistics, memory_times=memory.times()))
    ratio = (seen / drawn.clamp(min=1e-300)).sqrt()
    # where D carries more from other shells than there is, no factor of q would help
    return torch.where((seen > 0) & (drawn > 0), ratio.clamp(0.9, 2.0), 1.0)


def check_memory(model: CompositeClosure, memory: LagCorrelation) -> None:
    """Raise ValueError where only snapshots can show the noise's memory and these do not."""
    if model.recorded_every is not None and not model.is_white:
        memory.demand(model.recorded_every)
