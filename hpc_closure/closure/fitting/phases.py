"""Phases that fit a composite closure, in the order in which they run.

========== ========= ==========================================================================
phase      members   fits
========== ========= ==========================================================================
mean       fit       scales and regression in closed form; networks of mean and amplitude
law        hold      gains of these networks, law of the residual
generator  hold      the same, then the generator of the residual; on all training members if
                     the model trains nothing before
spread     valid     the spread of a score that reads sensors, again
check      valid     gains of the generator and factors of its draws' spread
centre     train     mean of the generator's draws, from its draws (:mod:`centre`)
centred    valid     whether that mean is subtracted
========== ========= ==========================================================================

:mod:`coupled_phases` has the phases that run the reduced solver. A trained part acts as far as it
improves predictions on unseen members (:mod:`judging`), or always without a gate. Few steps and a
finite network give too little spread. The check phase corrects this on the same members: without
sensors and with the model's sampler settings, each shell of q is scaled to the true variance.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure.composed import centre
from hpc_closure.closure.composed.copula import fit_copula
from hpc_closure.closure.composed.generators import Generator, Modes, Resampled
from hpc_closure.closure.composed.learned_score import PosteriorScore
from hpc_closure.closure.composed.mixture import Mixture, principal
from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.composed.numbers import NumberMean
from hpc_closure.closure.composed.point_mixture import PointMixture
from hpc_closure.closure.composed.reading import CHECK_SEED, residuals, snapshots, training_draws
from hpc_closure.closure.composed.statistics import NO_CENTRE, Batch, Statistics, generator_grid
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band, largest_count
from hpc_closure.closure.fitting.judging import (
    check_memory,
    judge_amplitude,
    judge_generator,
    judge_mean,
    judge_spread,
    samples_improve,
)
from hpc_closure.closure.gaussian.channel_covariance import ChannelCovariance
from hpc_closure.closure.gaussian.conditioning import Learned
from hpc_closure.closure.gaussian.kriging import StationaryGaussian
from hpc_closure.closure.gaussian.memory import LagCorrelation
from hpc_closure.closure.gaussian.mode_covariance import ModeCovariance
from hpc_closure.closure.gaussian.residual_coordinates import StateConditions
from hpc_closure.closure.model import ClosedFormPhase, Phase
from hpc_closure.closure.reductions import Reader
from hpc_closure.experiment.kinds import fields_of
from hpc_closure.experiment.models import closed_mean

__all__ = [
    "Check",
    "FitGenerator",
    "FitLaw",
    "FitMean",
    "FitSpread",
    "JudgeCentre",
    "LearnCentre",
    "compose",
    "take_mean",
]

RARE = 3e-3  # share of the training closures that exceed the range of a shell
TURNS = 4  # alternations of numbers and regression, each fitted to the other's residual
PAIRS = 4  # largest number of pairs of draws per training state for the mean of draws,
MOST_PAIRS = 2**16  # and in total; above it fewer pairs per state, then fewer states
UNSEEN_PAIRS = 8  # pairs of draws per state on which that mean is judged
SPREAD = 0.15  # steps of the spread phase over those of the generator


def compose(config: dict[str, Any], grid: int, length: float = 1.0) -> CompositeClosure:
    """Build a composite closure and the phases that fit it; arguments are those of the class."""
    model = CompositeClosure(config, grid, length)
    of_mean, of_generator = config["shares"]
    trained = bool(model.mean or model.amplitude)
    mean = FitMean(share=of_mean if trained else 0.0)
    if not isinstance(model.residual, Generator):
        model.phases = (mean, FitLaw())
        return model
    # if no network is trained before, all training members are unseen
    members = "hold" if trained else "train"
    likely = isinstance(model.residual, (Mixture, PointMixture))
    generator = FitGenerator(share=of_generator, members=members, best=likely)
    spread = FitSpread(share=SPREAD * of_generator)
    model.phases = (mean, generator, Check())
    if isinstance(model.residual, PosteriorScore):
        model.phases = (mean, generator, spread, Check())
    elif not likely:  # the mean of a mixture is exact
        model.phases = (mean, generator, Check(), LearnCentre(), JudgeCentre())
    return model


def take_mean(model: CompositeClosure, other: CompositeClosure) -> bool:
    """Use the mean of a trained model instead of training one; returns False if it has none.

    A network that does not act is not in the other model's file, and is then removed from this
    model as well. The law of the residual is fitted on the members on which that mean was judged.

    Raises:
        ValueError: the means differ in kind or size.
    """
    if other.statistics.summary_mean is None:
        return False
    if other.mean is None:
        model.mean = None
        model.config["mean"] = closed_mean(model.config)
    keys = ["mean", "regression_terms", "dimensions"]
    keys += ["width", "modes", "mean_layers"] if other.mean is not None else []
    for key in keys:
        if model.config[key] != other.config[key]:
            raise ValueError(
                f"use.mean: its {key} is {other.config[key]}, this model's {model.config[key]}"
            )
    if model.amplitude is not None or model.num_features != other.num_features:
        raise ValueError(
            "use.mean: that model reads other conditions, or this model has an amplitude: set "
            "model.conditions as there and model.amplitude to none"
        )
    if model.mean is not None and other.mean is not None:
        model.mean.load_state_dict(other.mean.state_dict())
    fitted = (
        "library",
        "numbers",
        "features",
        "summary",
        "state",
        "target",
        "first",
        "generator",
    )
    names = [field.name for field in fields(Statistics) if field.name.startswith(fitted)]
    model.adopt(Statistics(**{name: getattr(other.statistics, name) for name in names}))
    model.phases = tuple(phase for phase in model.phases if not isinstance(phase, FitMean))
    return True


def rounded(values: Tensor, digits: int = 3) -> list:
    """Round values (n,), or (C, n) of channels, for a log."""
    if values.ndim > 1:
        return [rounded(each, digits) for each in values]
    return [round(float(value), digits) for value in values]


# ---- mean and amplitude -------------------------------------------------------------------------


@dataclass(frozen=True)
class FitMean(Phase):
    """Fit scales, regression, first residual spectrum and the generator's grid, then networks."""

    name: str = "mean"
    share: float = 0.0
    members: str = "fit"
    sampled: bool = False

    def begin(self, model: CompositeClosure, reader: Reader) -> dict[str, Any]:
        b = model.band
        number_statistics = fit_numbers(model, reader)
        active = model.library.active if number_statistics else fit_library(model, reader)
        power = torch.zeros(model.num_features, dtype=torch.float64)
        state = torch.zeros(*model.channel_shape, len(b.group_k2), dtype=torch.float64)
        spectrum, total = torch.zeros_like(state), torch.zeros_like(state)
        shells: list[Tensor] = []
        none = torch.zeros(1, *model.channel_shape, *b.shape, dtype=torch.complex128)
        # largest power of each shell of the states, and minus the least
        reach = torch.full((2, *model.shell_power(none).shape[1:]), -torch.inf).double()
        num, summary, own = 0, [], model.feature_set.own
        for frames_hat, target_hat, _ in snapshots(model, reader):
            summary.append(b.summary(frames_hat[:, 0]).flatten(1).cpu())
            advected = model.advected(frames_hat)
            features = b.by_group(model.feature_spectra(frames_hat, advected).abs().square())
            power += features.sum((0, -1)).cpu()
            state += features[:, own].sum(0).cpu()
            residual = target_hat - model.library(frames_hat, advected)
            by_numbers = model.mean_by_numbers(frames_hat[:, 0])
            residual = residual if by_numbers is None else residual - by_numbers
            spectrum += b.by_group(residual.abs().square()).sum(0).cpu()
            total += b.by_group(target_hat.abs().square()).sum(0).cpu()
            shells.append(model.shell_power(target_hat).cpu())
            of_states = model.shell_power(frames_hat[:, 0]).cpu().double()
            both = torch.stack([of_states.amax(0), -of_states.amin(0)])
            reach = torch.maximum(reach, both)
            num += len(target_hat)
        power, state, spectrum, total, num = reader.sum(power, state, spectrum, total, num)
        numbers = torch.cat(reader.every(summary))
        (reach,) = reader.largest(reach)
        rms, variance = (power / num).sqrt(), spectrum / num
        has_numbers = model.dimensions > 1 or model.has_networks  # closed forms read none
        smallest = torch.full_like(numbers[0], 1e-6)
        if has_numbers:
            by_field = smallest.unflatten(0, (*model.channel_shape, -1))
            by_field[..., : largest_count(model.dimensions)] *= rms[own][..., None]
        if not float(total.sum()) > 0:
            raise ValueError("the closure targets are all zero: nothing to learn")
        modes, size, tail = generator_grid(b, variance, model.config["modes"])
        inner = band(b.proportional(modes), model.length, model.dimensions)
        per_mode, state_modes = (
            inner.resized(b.spread(part / b.group_size)) for part in (variance, state / num)
        )
        reads = isinstance(model.conditioning, Learned)
        largest = mean = None
        if model.previous:
            largest, mean = shell_sizes(torch.cat(reader.every(shells)))
        model.adopt(
            Statistics(
                library=model.library.coefficients,
                **number_statistics,
                features_rms=rms.clamp(min=1e-30),
                summary_mean=numbers.mean(0) if has_numbers else None,
                summary_std=torch.maximum(numbers.std(0), smallest) if has_numbers else None,
                state_spectrum=inner.by_group(state_modes) / inner.group_size if reads else None,
                state_least=-reach[1],
                state_largest=reach[0],
                target_rms=float((total.sum() / num).sqrt()),
                target_largest=largest,
                target_mean=mean,
                first_spectrum=inner.by_group(per_mode) / inner.group_size,
                first_tail=tail,
                first_snapshots=float(num),
                generator_modes=modes,
                generator_size=size,
            )
        )
        memory = {}
        if model.previous:
            memory["spectral_radius"] = round(float(model.library.spectral_radius().max()), 3)
        return {
            "terms": active,
            **memory,
            "residual": _left(variance.sum(-1), total.sum(-1) / num),
            "generator_grid": size,
            "generator_modes": modes,
            "snapshots": num,
        }

    def loss(self, model: CompositeClosure, batch: dict, seed: int, step: int) -> Tensor:
        """Compute the loss (B,) of mean and amplitude; 1 + 1/2 where they add nothing."""
        if not self.parameters(model):
            return super().loss(model, batch, seed, step)
        encoding, frame = _encode(model, batch), model.frame
        left = model.band.to_spectral(batch["target"]) - encoding.mean_hat
        left = frame.kept.resized(left).to(torch.complex64)
        loss = left.real.new_zeros(len(left))
        if model.mean is not None:
            guess = model.mean(frame, encoding)
            loss = loss + model.mean.loss(frame, left, guess)
            left = left - model.mean.correction(frame, guess.detach())
        if model.amplitude is not None:
            loss = loss + model.amplitude.loss(frame, left, model.amplitude(encoding))
        return loss

    def parameters(self, model: CompositeClosure) -> list[nn.Parameter]:
        return weights_of(model.mean, model.amplitude)


def _left(variance: Any, total: Any) -> Any:
    """Return the rms of a residual over that of the closure; a list of several channels."""
    share = (torch.as_tensor(variance) / torch.as_tensor(total).clamp(min=1e-300)).sqrt()
    return rounded(share, 4) if share.ndim else float(share)


def weights_of(*parts: nn.Module | None) -> list[nn.Parameter]:
    """List the weights of the parts that exist."""
    return [weight for part in parts if part is not None for weight in part.parameters()]


def _encode(model: CompositeClosure, batch: dict[str, Any]) -> StateConditions:
    """Encode the states of a training batch."""
    return model.encode(model.frames(batch["state"], batch.get("history"), batch.get("previous")))


def fit_library(model: CompositeClosure, reader: Reader) -> list[str]:
    """Fit the regression to the residual of the functions of numbers; returns its terms."""

    def pairs() -> Iterable[tuple[Tensor, Tensor]]:
        for frames_hat, target_hat, _ in snapshots(model, reader):
            by_numbers = model.mean_by_numbers(frames_hat[:, 0])
            yield frames_hat, target_hat if by_numbers is None else target_hat - by_numbers

    return model.library.fit(pairs(), reader)


def fit_numbers(model: CompositeClosure, reader: Reader) -> dict[str, Any]:
    """Fit the mean of the largest modes by summary numbers; returns its statistics.

    The dictionary is empty if the mean has no such part. Numbers and regression are fitted in
    turns, numbers first, because either would otherwise represent the other's part by correlated
    terms.
    """
    model.statistics = replace(model.statistics, numbers_mean=None, numbers_scale=None)
    if "numbers" not in model.config["mean"]:
        return {}
    b, num = model.band, 0
    square = torch.zeros(2 * largest_count(model.dimensions) + 1, dtype=torch.float64)
    for frames_hat, _, _ in snapshots(model, reader):
        square += b.summary(frames_hat[:, 0]).square().sum(0).cpu()
        num += len(frames_hat)
    square, num = reader.sum(square, num)
    scale = (square / num).sqrt().clamp(min=1e-30)
    model.statistics = replace(model.statistics, numbers_scale=scale)
    for turn in range(TURNS):
        mean = NumberMean()
        for frames_hat, target_hat, _ in snapshots(model, reader):
            left = target_hat
            if turn:
                left = target_hat - model.library(frames_hat, model.advected(frames_hat))
            mean.add(model.scaled_numbers(frames_hat[:, 0]), b.largest(left))
        coefficients = mean.coefficients(reader)
        model.statistics = replace(model.statistics, numbers_mean=coefficients)
        fit_library(model, reader)
    return {"numbers_mean": coefficients, "numbers_scale": scale}


def shell_sizes(shells: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the power of a shell that a share ``RARE`` exceeds, and its mean.

    Both are (..., shells).

    Args:
        shells: power of each shell, (snapshots, ..., shells).
    """
    last = len(shells) - 1
    return shells.sort(0).values[last - int(RARE * last)], shells.mean(0)


# ---- the law of the residual, and the generator -------------------------------------------------


@dataclass(frozen=True)
class FitLaw(Phase):
    """Fit the gains of mean and amplitude, and the law of the residual."""

    name: str = "law"
    share: float = 0.0
    members: str = "hold"

    def begin(self, model: CompositeClosure, reader: Reader) -> dict[str, Any]:
        model.statistics = replace(model.statistics, mean_gain=None, amplitude_gain=None)
        if model.mean is not None:
            judge_mean(model, reader)
        if model.amplitude is not None:
            judge_amplitude(model, reader)
        frame, s = model.frame, model.statistics
        inner = frame.kept
        is_late = isinstance(
            model.residual, PosteriorScore
        )  # its mean is known in the check phase
        power = torch.zeros(*model.channel_shape, len(inner.group_k2), dtype=torch.float64)
        plain_power, tail, num = torch.zeros_like(power), 0.0, 0
        exceeded = torch.zeros(1 + model.guarded, dtype=torch.float64)
        memory = LagCorrelation(inner, model.channel_shape, model.whole)
        for frames_hat, target_hat, batch in snapshots(model, reader):
            encoding = model.encode(frames_hat)
            residual = target_hat - encoding.mean_hat
            q_hat = frame.standardise(residual, encoding.log_amplitude)
            power += inner.by_group(q_hat.abs().square()).sum(0).cpu()
            if not is_late:
                memory.add(q_hat, None if model.is_white else batch.tags)
            far = model.beyond(target_hat)[0]
            exceeded[1:] += far.sum(0).cpu()
            exceeded[0] += far.any(-1).sum().cpu()
            inside = inner.resized(residual)
            plain_power += inner.by_group(inside.abs().square()).sum(0).cpu()
            beyond = residual - model.band.resized(inside)
            tail += float(model.band.by_group(beyond.abs().square()).sum())
            num += len(q_hat)
        power, plain_power, tail, num = reader.sum(power, plain_power, tail, num)
        memory.collect(reader)
        if not is_late:
            check_memory(model, memory)
        (exceeded,) = reader.sum(exceeded)
        spectrum, tail = power / num / inner.group_size, tail / num
        if model.gain_by_mode(model.mean_gain, power) is None and not model.amplitude_share:
            # without trained weights the ``fit`` members give an unbiased spectrum as well
            share = num / (num + s.first_snapshots)
            spectrum = share * spectrum + (1 - share) * s.first_spectrum
            tail = share * tail + (1 - share) * s.first_tail
        plain_spectrum = plain_power / num / inner.group_size
        across, grouping = fit_law_across_channels(model, reader, spectrum, plain_spectrum)
        model.adopt(
            replace(
                s,
                target_beyond=exceeded / num if model.guarded else None,
                **fit_law_by_mode(model, reader, spectrum),
                **fit_archive(model, reader, num),
                **across,
                law_spectrum=spectrum,
                law_tail=tail,
                plain_spectrum=plain_spectrum,
                memory_times=memory.times(),
                score_gain=None,
            )
        )
        gains: dict[str, Any] = {"amplitude_gain": model.amplitude_share}
        if s.mean_gain is not None:
            gains["mean_gain"] = rounded(s.mean_gain)
        if grouping:
            gains["across_channels"] = grouping
        return {
            **gains,
            "memory": rounded(model.statistics.memory_times, 2),
            "residual": math.sqrt(power_of(inner.variance(spectrum)) + tail) / s.target_rms,
            "snapshots": num,
        }

    def parameters(self, model: CompositeClosure) -> list[nn.Parameter]:
        return []


def power_of(variance: Any) -> float:
    """Return the variance of a field, or the sum of those of C channels."""
    return float(torch.as_tensor(variance).sum())


def fit_law_across_channels(
    model: CompositeClosure, reader: Reader, spectrum: Tensor, plain_spectrum: Tensor
) -> tuple[dict[str, Any], str]:
    """Fit the laws of q across channels; returns statistics and how modes are grouped.

    Both are empty for one field.
    """
    equation = model.feature_set.equation
    if equation is None:
        return {}, ""
    inner, kinds = model.frame.kept, [channel.kind for channel in equation.channels]
    law, plain = (ChannelCovariance(inner, kinds) for _ in range(2))
    for frames_hat, target_hat, batch in snapshots(model, reader):
        encoding = model.encode(frames_hat)
        residual = target_hat - encoding.mean_hat
        law.add(model.frame.standardise(residual, encoding.log_amplitude), batch.members)
        plain.add(inner.resized(residual), batch.members)
    statistics = {
        "law_channels": law.factors(reader, inner.spread(spectrum)),
        "plain_channels": plain.factors(reader, inner.spread(plain_spectrum)),
    }
    return statistics, law.grouping


def fit_archive(model: CompositeClosure, reader: Reader, num: float) -> dict[str, Any]:
    """Keep residuals q of snapshots, if draws are resampled from them; returns its statistics."""
    if not isinstance(model.residual, Resampled):
        return {}
    every = max(1, -(-round(num) // Resampled.MOST))
    rows = [
        q_hat[[row for row, number in enumerate(ids) if number % every == 0]].cpu()
        for _, q_hat, ids, _ in residuals(model, reader)
    ]
    archive = torch.cat(reader.every(rows))
    return {"law_archive": torch.view_as_real(archive.to(torch.complex64))}


def fit_law_by_mode(model: CompositeClosure, reader: Reader, spectrum: Tensor) -> dict[str, Any]:
    """Fit the law by wavevector, if the residual is drawn from one; returns its statistics."""
    if not isinstance(model.residual, (Modes, Mixture)):
        return {}
    inner = model.frame.kept
    law, modes = StationaryGaussian(inner, spectrum), ModeCovariance(inner)
    count = largest_count(model.dimensions)
    largest = torch.zeros(count, count, dtype=torch.float64)
    for _, q_hat, _, _ in residuals(model, reader):
        modes.add(q_hat)
        numbers = inner.largest(q_hat * law.modes("whiten", q_hat)).double()
        largest += (numbers.mT @ numbers).cpu()
    largest, num = reader.sum(largest, modes.number)
    out = {"law_modes": modes.factors(reader, inner.spread(spectrum))}
    if isinstance(model.residual, Mixture) and model.residual.components == 2:
        out["law_offset"] = principal(largest / num)
    return out


@dataclass(frozen=True)
class FitGenerator(FitLaw):
    """Fit the law of the residual, then the generator of its non-Gaussian part."""

    name: str = "generator"

    def loss(self, model: CompositeClosure, batch: dict, seed: int, step: int) -> Tensor:
        """Compute the loss (B,) of :class:`~.generators.Generator`."""
        assert isinstance(model.residual, Generator)
        layouts = model.conditioning.layouts
        return model.residual.loss(
            model.frame, *_training_draws(model, batch, seed, step, layouts)
        )

    def parameters(self, model: CompositeClosure) -> list[nn.Parameter]:
        return weights_of(model.residual)


def _training_draws(
    model: CompositeClosure, batch: dict, seed: int, step: int, layouts: Any
) -> tuple:
    """Draw the arguments of a generator's loss for a training batch, without gradients."""
    key = keyed_noise.Key(seed, "train", [int(i) for i in batch["sample_index"]], step)
    with torch.no_grad():
        target_hat = model.band.to_spectral(batch["target"])
        return training_draws(model, _encode(model, batch), target_hat, key, layouts)


@dataclass(frozen=True)
class FitSpread(Phase):
    """Fit the spread of a score again, alone, on unseen members."""

    name: str = "spread"
    share: float = 0.0
    members: str = "valid"

    def loss(self, model: CompositeClosure, batch: dict, seed: int, step: int) -> Tensor:
        """Compute the loss (B,) of :meth:`~.learned_score.PosteriorScore.spread_loss`."""
        assert isinstance(model.residual, PosteriorScore)
        # equal weights, because rare layouts need a spread as accurate as common ones
        layouts = tuple(layout._replace(weight=1.0) for layout in model.conditioning.layouts)
        conditions, x0, _, _ = _training_draws(model, batch, seed, step, layouts)
        return model.residual.spread_loss(model.frame, conditions, x0)

    def parameters(self, model: CompositeClosure) -> list[nn.Parameter]:
        assert isinstance(model.residual, PosteriorScore)
        return model.residual.spread_parameters()


@dataclass(frozen=True)
class Check(ClosedFormPhase):
    """Decide in which shells the generator acts, and scale the spread of its draws."""

    name: str = "check"
    share: float = 0.0
    members: str = "valid"

    def begin(self, model: CompositeClosure, reader: Reader) -> dict[str, Any]:
        assert isinstance(model.residual, Generator)
        ones = torch.ones(model.frame.kept.grid.num_shells).double()
        model.statistics = replace(
            model.statistics, score_gain=ones, score_spread=None, **NO_CENTRE
        )
        if isinstance(model.residual, PointMixture):
            model.adopt(replace(model.statistics, **fit_copula(model, reader)))
        gain, members, num = judge_generator(model, reader)
        model.statistics = replace(model.statistics, score_gain=gain, score_members=float(members))
        report = {"score_gain": rounded(gain), "members": members, "snapshots": num}
        if model.score_active and model.sensors_allowed != "required":
            spread = judge_spread(model, reader, isinstance(model.residual, PosteriorScore))
            model.statistics = replace(model.statistics, score_spread=spread)
            report["spread_gain"] = rounded(spread)
            report["memory"] = rounded(model.statistics.memory_times, 2)
            judged = model.gated and model.residual.judged
            if judged and not samples_improve(model, reader):
                none = torch.zeros_like(gain)
                model.statistics = replace(model.statistics, score_gain=none, score_spread=None)
                report["score_gain"] = "none: its samples are no better than the Gaussian law's"
        return report


# ---- mean of the generator's draws --------------------------------------------------------------


@dataclass(frozen=True)
class LearnCentre(ClosedFormPhase):
    """Learn the mean of the generator's draws from its draws, if another part is the mean."""

    name: str = "centre"
    share: float = 0.0
    members: str = "train"

    def begin(self, model: CompositeClosure, reader: Reader) -> dict[str, Any]:
        s = model.statistics = replace(model.statistics, **NO_CENTRE)
        by_network = model.gain_by_mode(model.mean_gain, model._place) is not None
        elsewhere = by_network or s.numbers_mean is not None
        has_numbers = s.summary_mean is not None and model.sensors_allowed != "required"
        if not (has_numbers and model.score_active and elsewhere):
            return {}
        (states,) = reader.sum(sum(len(batch.state) for batch in Batch.read(reader)))
        # a further state is more informative than a further pair of the same state
        pairs = min(PAIRS, max(1, MOST_PAIRS // states))
        spacing = -(-pairs * states // MOST_PAIRS)
        numbers, means = [], []
        for encoding, _, ids, _ in residuals(model, reader):
            rows = [row for row, draw in enumerate(ids) if draw % spacing == 0]
            if rows:
                some = encoding.rows(rows)
                drawn = draw_pairs(model, some, [ids[row] for row in rows], pairs, 0)
                numbers.append(some.summary.cpu())
                means.append(model.frame.kept.largest(drawn.mean((1, 2))).flatten(1).cpu())
        numbers, means = reader.every(numbers), reader.every(means)
        inner, middle, outer = centre.fit(
            torch.cat(numbers), torch.cat(means), fields_of(model.config)
        )
        model.statistics = replace(s, centre_inner=inner, centre_middle=middle, centre_outer=outer)
        return {"pairs": pairs * sum(map(len, numbers))}


@dataclass(frozen=True)
class JudgeCentre(ClosedFormPhase):
    """Subtract the learned mean of draws if unseen members confirm it."""

    name: str = "centred"
    share: float = 0.0
    members: str = "valid"

    def begin(self, model: CompositeClosure, reader: Reader) -> dict[str, Any]:
        if model.centre_weights is None:
            return {}
        variance = model.frame.law.variance if model.channel_shape else None
        gate = centre.CentreGate(model.frame.kept, variance)
        for encoding, q_hat, ids, batch in residuals(model, reader):
            drawn = draw_pairs(model, encoding, ids, UNSEEN_PAIRS, 1)
            mean_hat = model.centre_of(encoding)
            assert mean_hat is not None
            gate.add(q_hat, drawn, mean_hat, batch.members)
        gate.collect(reader)
        s, acts = model.statistics, gate.acts() or not model.gated
        if acts:
            spread = None if s.score_spread is None else s.score_spread * gate.spread()
            model.statistics = replace(s, score_spread=spread, centre_members=float(gate.members))
        else:
            model.statistics = replace(s, **NO_CENTRE)
        before, after = (round(share, 5) for share in gate.shares())
        return {"mean_before": before, "mean_after": after, "acts": acts}


def draw_pairs(
    model: CompositeClosure, encoding: StateConditions, ids: Sequence[int], pairs: int, item: int
) -> Tensor:
    """Draw q for base noise z and -z; returns (states, 2, pairs, ...) complex128."""
    members = [keyed_noise.pair(state, number) for state in ids for number in range(pairs)]
    key = keyed_noise.Key(CHECK_SEED, "centre", members, item)
    z = model.base_noise(model.frame.law, key, keyed_noise.STREAM_BASE).unflatten(0, (-1, pairs))
    q_hat = model.generate(encoding, torch.cat([z, -z], 1).flatten(0, 1)).q
    return q_hat.unflatten(0, (len(ids), 2, pairs)).to(torch.complex128)
