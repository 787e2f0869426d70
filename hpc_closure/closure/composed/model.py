"""How a closure model of parts in a row (:mod:`drawing`) is fitted, phase by phase.

A trained part acts as far as it helps on members that it has not seen (:mod:`gate`), or always.
What few steps and a finite network leave of too little spread is made up on the same members:
without sensors, and with the model's own sampler, each shell of q is scaled to the variance seen.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure.composed.drawing import DrawingModel
from hpc_closure.closure.composed.generators import Gaussian, Generator, Modes
from hpc_closure.closure.composed.learned_score import LearnedScore
from hpc_closure.closure.composed.mixture import Mixture, principal
from hpc_closure.closure.composed.numbers import NumberMean
from hpc_closure.closure.composed.part_selection import ImprovementGate, ShareGate, ShellGate
from hpc_closure.closure.composed.rollout_training import Scale, Trajectories
from hpc_closure.closure.composed.statistics import Batch, Statistics, generator_grid
from hpc_closure.closure.composed.steady import ROUNDS, LongRuns, in_words, lower
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.losses import crps, energy_score
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import choose_layouts
from hpc_closure.closure.gaussian.conditioning import Learned, Posterior
from hpc_closure.closure.gaussian.kriging import BaseLaw
from hpc_closure.closure.gaussian.memory import LagCorrelation, Tags
from hpc_closure.closure.gaussian.mode_covariance import ModeCovariance
from hpc_closure.closure.gaussian.residual_coordinates import Encoding
from hpc_closure.closure.model import Phase, Through
from hpc_closure.closure.networks.blocks import LARGEST
from hpc_closure.closure.reductions import Batches, Reader
from hpc_closure.experiment.models import NETWORKS
from hpc_closure.spectral.modes.grid import resize

__all__ = ["ComposedModel"]

CHECK_SEED = 20240807
RARE = 3e-3  # share of the closures that have a larger shell than a draw that is left as it is
TURNS = 4  # of numbers and regression, each fitted to what the other leaves
CHECK_DRAWS = 4  # samples of each unseen snapshot whose score judges it
CHECKS = 2  # noise levels at which each unseen snapshot judges the generator
# of the mean's weights: every target is one draw about it, which they would learn by heart, and a
# coupled run amplifies slopes that are not there (the amplitude, which it made worse, has none)
DECAY = {"fno": 3.0, "cnn": 0.3}
TRAJECTORY, NOISE = "trajectory", "noise"  # the phases through the solver
STEADY = "steady"
SPREAD = 0.15  # steps in which the spread of a score is learned again, over the others'
CALIBRATIONS = 3  # times that the noise of coupled runs is brought nearer to their error,
MOST = 2.0  # by at most this factor in all


class ComposedModel(DrawingModel):
    """See the module's docstring; arguments as of :class:`~.drawing.DrawingModel`."""

    def __init__(self, config: dict[str, Any], grid: int, length: float = 1.0):
        super().__init__(config, grid, length)
        self.phases = self._phases(config["shares"])
        self.trajectories: Trajectories | None = None
        #: closure intervals from one snapshot to the next, where only they tell of a memory;
        #: None where the closure is known to be white in time
        self.recorded_every: float | None = None
        self.long_runs: LongRuns | None = None

    def _phases(self, shares: tuple[float, float]) -> tuple[Phase, ...]:
        trained = bool(self.mean or self.amplitude)
        mean = Phase("mean", shares[0] if trained else 0.0, "fit", sampled=False)
        if not isinstance(self.residual, Generator):
            return mean, Phase("law", 0.0, "hold")
        # members that no network has seen are as good as those held back
        likely = isinstance(self.residual, Mixture)
        generator = Phase("generator", shares[1], "hold" if trained else "train", best=likely)
        check = Phase("check", 0.0, "valid")
        if not isinstance(self.residual, LearnedScore):
            return mean, generator, check
        return mean, generator, Phase("spread", SPREAD * shares[1], "valid"), check

    def take_mean(self, other: "ComposedModel") -> bool:
        """Have the mean of a trained model, in place of training one; False where it cannot tell.

        A network that does not act is not in its file, and is none of this model's then. The
        members that it was judged on are those that what is about it is fitted on.

        Raises:
            ValueError: its mean is of another kind or size.
        """
        if other.statistics.summary_mean is None:
            return False
        if other.mean is None:
            self.mean = None
            self.config["mean"] = [one for one in self.config["mean"] if one not in NETWORKS]
        keys = ["mean", "library", "dimensions"]
        keys += ["width", "modes", "mean_layers"] if other.mean is not None else []
        for key in keys:
            if self.config[key] != other.config[key]:
                raise ValueError(
                    f"use.mean: its {key} is {other.config[key]}, this model's {self.config[key]}"
                )
        if self.amplitude is not None or self.num_features != other.num_features:
            raise ValueError("use.mean: it reads other conditions, or this model has an amplitude")
        if self.mean is not None and other.mean is not None:
            self.mean.load_state_dict(other.mean.state_dict())
        mine = {f.name for f in fields(Statistics)}
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
        kept = {name: getattr(other.statistics, name) for name in mine if name.startswith(fitted)}
        self.adopt(Statistics(**kept))
        self.phases = tuple(phase for phase in self.phases if phase.name != "mean")
        return True

    # ---- phases ---------------------------------------------------------------------------------

    def keep_steady(self, long_runs: LongRuns) -> None:
        """Choose how much of the mean's network acts, in long coupled runs of validation members.

        Then the residual's law is learned again. Nothing is chosen where no network reads closures
        alone, or where a generator is trained on what the network leaves.
        """
        reads = self.previous and not self.history and self.sensors_allowed != "required"
        if not reads or self.mean is None or isinstance(self.residual, Generator):
            return
        self.long_runs = long_runs
        (law,) = (phase for phase in self.phases if phase.name == "law")
        self.phases = (*self.phases, Phase(STEADY, 0.0, "valid"), law)

    def train_through(self, trajectories: Trajectories, through: Through) -> None:
        """Add two last phases: training through the solver, and the noise's size, from coupled
        runs of members that the rest has not seen."""
        self.trajectories = trajectories
        self.phases = (*self.phases, Phase(TRAJECTORY, 0.0, "train", through=through))
        if self.config["residual"] != "none":
            judged = replace(through, steps=0)
            self.phases = (*self.phases, Phase(NOISE, 0.0, "valid", through=judged))

    def begin(self, phase: str, reader: Batches) -> dict[str, Any]:
        """Start ``mean``, ``generator`` (``law`` where none is trained) or ``check``."""
        work = {
            "mean": self.fit_mean,
            "generator": self.fit_law,
            "law": self.fit_law,
            "spread": lambda reader: {},
            "check": self.check_generator,
            STEADY: self.choose_share,
            TRAJECTORY: self.score_trajectories,
            NOISE: self.calibrate_noise,
        }
        if phase not in work:
            raise ValueError(f"phase {phase!r}, expected one of {', '.join(work)}")
        self.phase = phase
        with torch.no_grad():
            report = work[phase](Reader.of(reader))
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters_of(phase):
            parameter.requires_grad_(True)
        return report

    def parameters_of(self, phase: str) -> list[nn.Parameter]:
        """``mean``: of mean and amplitude, ``generator``: of the residual, ``spread``: of c,
        ``trajectory``: of the mean and the adjustment of closed forms."""
        if phase == "spread" and isinstance(self.residual, LearnedScore):
            return self.residual.spread_parameters()
        trained = {
            "mean": (self.mean, self.amplitude),
            "generator": (self.residual,),
            TRAJECTORY: (self.mean, self.adjustment),
        }
        return [
            weight
            for part in trained.get(phase, ())
            if part is not None
            for weight in part.parameters()
        ]

    def weight_decay(self, name: str) -> float:
        return DECAY[self.mean.kind] if self.mean and name.startswith("mean.") else 0.0

    def loss_per_sample(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        if self.phase == "mean" and self.parameters_of("mean"):
            return self.mean_loss(batch)
        if self.phase in ("generator", "spread"):
            return self.generator_loss(batch, seed, step)
        if self.phase == TRAJECTORY and self.trajectories is not None:
            told = self.statistics
            assert told.trajectory_scale is not None and told.trajectory_power is not None
            scale = Scale(told.trajectory_scale, told.trajectory_power)
            return self.trajectories.loss(self, batch, scale, seed, step)
        raise ValueError(f"phase {self.phase!r} has no loss; call begin('mean', reader) first")

    def compact(self) -> "ComposedModel":
        config = dict(self.config)
        gains = {part.name.split(":")[0]: part.acts for part in self.parts() if part.trained}
        small = copy.copy(self)
        small._modules, small.replayed = dict(self._modules), None
        if self.mean is not None and not gains["mean"]:
            config["mean"] = [name for name in config["mean"] if name not in NETWORKS]
            small.mean = None
        if self.amplitude is not None and not gains["amplitude"]:
            config["amplitude"] = "none"
            small.amplitude = None
        if isinstance(self.residual, Generator) and not gains["residual"]:
            config["residual"] = "gaussian"
            small.residual = Gaussian()
        closed = small.mean is None and small.amplitude is None and "numbers" not in config["mean"]
        if closed and isinstance(small.residual, Gaussian):
            small.statistics = replace(self.statistics, summary_mean=None, summary_std=None)
        small.config = config
        return small

    # ---- mean and amplitude ---------------------------------------------------------------------

    def snapshots(self, reader: Reader) -> Iterable[tuple[Tensor, Tensor, Batch]]:
        """(frames, target spectra, batch) of every batch, float64, on the model's device."""
        device = self.device
        for batch in Batch.read(reader):
            earlier = (
                None if one is None else one.to(device) for one in (batch.history, batch.previous)
            )
            frames_hat = self.frames(batch.state.to(device).double(), *earlier)
            yield frames_hat, self.band.to_spectral(batch.target.to(device).double()), batch

    def fit_mean(self, reader: Reader) -> dict[str, Any]:
        """Scales, regression, first residual spectrum and the generator's grid (``fit``)."""
        b = self.band
        own = self._fit_numbers(reader)
        active = self.library.active if own else self._fit_library(reader)
        power = torch.zeros(self.num_features, dtype=torch.float64)
        state = torch.zeros(len(b.group_k2), dtype=torch.float64)
        spectrum = torch.zeros(len(b.group_k2), dtype=torch.float64)
        total = torch.zeros(len(b.group_k2), dtype=torch.float64)
        shells: list[Tensor] = []
        num, summary = 0, []
        for frames_hat, target_hat, _ in self.snapshots(reader):
            summary.append(b.summary(frames_hat[:, 0]).cpu())
            moved = self._moved(frames_hat)
            features = b.by_group(self.feature_spectra(frames_hat, moved).abs().square())
            power += features.sum((0, -1)).cpu()
            state += features[:, self.own].sum(0).cpu()
            residual = target_hat - self.library(frames_hat, moved)
            by_numbers = self._told_by_numbers(frames_hat[:, 0])
            residual = residual if by_numbers is None else residual - by_numbers
            spectrum += b.by_group(residual.abs().square()).sum(0).cpu()
            total += b.by_group(target_hat.abs().square()).sum(0).cpu()
            shells.append(b.grid.shell_sum(target_hat.abs().square()).cpu())
            num += len(target_hat)
        power, state, spectrum, total, num = reader.sum(power, state, spectrum, total, num)
        numbers = torch.cat(reader.every(summary))
        rms, variance = (power / num).sqrt(), spectrum / num
        told = numbers.shape[1] > 0  # on a line no network reads any
        smallest = torch.full_like(numbers[0], 1e-6)
        smallest[:LARGEST] *= rms[self.own]
        if not float(total.sum()) > 0:
            raise ValueError("the closure targets are all zero: nothing to learn")
        modes, size, tail = generator_grid(b, variance, self.config["modes"])
        kept = band(modes, self.length, self.dimensions)
        per_mode, state_modes = (
            resize(b.spread(part / b.group_size), modes) for part in (variance, state / num)
        )
        reads = isinstance(self.conditioning, Learned)
        largest = mean = None
        if self.previous:
            largest, mean = _sizes(torch.cat(reader.every(shells)))
        self.adopt(
            Statistics(
                library=self.library.coefficients,
                **own,
                features_rms=rms.clamp(min=1e-30),
                summary_mean=numbers.mean(0) if told else None,
                summary_std=torch.maximum(numbers.std(0), smallest) if told else None,
                state_spectrum=kept.by_group(state_modes) / kept.group_size if reads else None,
                target_rms=float((total.sum() / num).sqrt()),
                target_largest=largest,
                target_mean=mean,
                first_spectrum=kept.by_group(per_mode) / kept.group_size,
                first_tail=tail,
                first_snapshots=float(num),
                generator_modes=modes,
                generator_size=size,
            )
        )
        memory = {}
        if self.previous:
            memory["spectral_radius"] = round(float(self.library.spectral_radius().max()), 3)
        return {
            "terms": active,
            **memory,
            "residual": math.sqrt(float(variance.sum()) / float(total.sum() / num)),
            "generator_grid": size,
            "generator_modes": modes,
            "snapshots": num,
        }

    def _fit_library(self, reader: Reader) -> list[str]:
        """Fit the regression to what the functions of numbers leave; its terms."""

        def pairs():
            for frames_hat, target_hat, _ in self.snapshots(reader):
                told = self._told_by_numbers(frames_hat[:, 0])
                yield frames_hat, target_hat if told is None else target_hat - told

        return self.library.fit(pairs(), reader)

    def _fit_numbers(self, reader: Reader) -> dict[str, Any]:
        """Statistics of the mean of the largest modes, where the mean has such a part.

        In turns with the regression, the numbers first: what either does not have, the other makes
        up for by terms that merely go with it.
        """
        self.statistics = replace(self.statistics, numbers_mean=None, numbers_scale=None)
        if "numbers" not in self.config["mean"]:
            return {}
        b, num = self.band, 0
        square = torch.zeros(2 * LARGEST + 1, dtype=torch.float64)
        for frames_hat, _, _ in self.snapshots(reader):
            square += b.summary(frames_hat[:, 0]).square().sum(0).cpu()
            num += len(frames_hat)
        square, num = reader.sum(square, num)
        scale = (square / num).sqrt().clamp(min=1e-30)
        self.statistics = replace(self.statistics, numbers_scale=scale)
        for turn in range(TURNS):
            mean = NumberMean()
            for frames_hat, target_hat, _ in self.snapshots(reader):
                left = target_hat
                if turn:
                    left = target_hat - self.library(frames_hat, self._moved(frames_hat))
                mean.add(self._numbers(frames_hat[:, 0]), b.largest(left))
            coefficients = mean.coefficients(reader)
            self.statistics = replace(self.statistics, numbers_mean=coefficients)
            self._fit_library(reader)
        return {"numbers_mean": coefficients, "numbers_scale": scale}

    def _frames_of(self, batch: dict[str, Any]) -> Tensor:
        return self.frames(batch["state"], batch.get("history"), batch.get("previous"))

    def mean_loss(self, batch: dict[str, Any]) -> Tensor:
        """Loss (B,) of mean and amplitude; 1 + 1/2 where they add nothing."""
        encoding, frame = self.encode(self._frames_of(batch)), self.frame
        left = self.band.to_spectral(batch["target"]) - encoding.mean_hat
        left = resize(left, frame.kept.modes).to(torch.complex64)
        loss = left.real.new_zeros(len(left))
        if self.mean is not None:
            guess = self.mean(frame, encoding)
            loss = loss + self.mean.loss(frame, left, guess)
            left = left - self.mean.correction(frame, guess.detach())
        if self.amplitude is not None:
            loss = loss + self.amplitude.loss(frame, left, self.amplitude(encoding))
        return loss

    # ---- the law of the residual ----------------------------------------------------------------

    def fit_law(self, reader: Reader) -> dict[str, Any]:
        """Gains of mean and amplitude, and the law of the residual (``hold``)."""
        self.statistics = replace(self.statistics, mean_gain=None, amplitude_gain=None)
        if self.mean is not None:
            self._judge_mean(reader)
        if self.amplitude is not None:
            self._judge_amplitude(reader)
        frame, s = self.frame, self.statistics
        kept = frame.kept
        power = torch.zeros(len(kept.group_k2), dtype=torch.float64)
        plain_power, tail, num = torch.zeros_like(power), 0.0, 0
        exceeded = torch.zeros(1 + self.guarded, dtype=torch.float64)
        memory = LagCorrelation(kept)
        for frames_hat, target_hat, batch in self.snapshots(reader):
            encoding = self.encode(frames_hat)
            residual = target_hat - encoding.mean_hat
            q_hat = frame.standardise(residual, encoding.log_amplitude)
            power += kept.by_group(q_hat.abs().square()).sum(0).cpu()
            if not isinstance(self.residual, LearnedScore):  # whose mean is not known yet
                memory.add(q_hat, self._tags(batch))
            far = self._beyond(target_hat)[0]
            exceeded[1:] += far.sum(0).cpu()
            exceeded[0] += far.any(-1).sum().cpu()
            inside = resize(residual, kept.modes)
            plain_power += kept.by_group(inside.abs().square()).sum(0).cpu()
            beyond = residual - resize(inside, self.band.modes)
            tail += float(self.band.by_group(beyond.abs().square()).sum())
            num += len(q_hat)
        power, plain_power, tail, num = reader.sum(power, plain_power, tail, num)
        self._collect(memory, reader)
        (exceeded,) = reader.sum(exceeded)
        spectrum, tail = power / num / kept.group_size, tail / num
        if self._modes_of(self.mean_gain, power) is None and not self.amplitude_share:
            # nothing was learned by gradients: the members of ``fit`` are as good as unseen
            share = num / (num + s.first_snapshots)
            spectrum = share * spectrum + (1 - share) * s.first_spectrum
            tail = share * tail + (1 - share) * s.first_tail
        by_mode = self._law_by_mode(reader, spectrum)
        self.adopt(
            replace(
                s,
                target_beyond=exceeded / num if self.guarded else None,
                **by_mode,
                law_spectrum=spectrum,
                law_tail=tail,
                plain_spectrum=plain_power / num / kept.group_size,
                memory_times=memory.times(),
                score_gain=None,
            )
        )
        gains: dict[str, Any] = {"amplitude_gain": self.amplitude_share}
        if s.mean_gain is not None:
            gains["mean_gain"] = _rounded(s.mean_gain)
        return {
            **gains,
            "memory": _rounded(self.statistics.memory_times, 2),
            "residual": math.sqrt(kept.variance(spectrum) + tail) / s.target_rms,
            "snapshots": num,
        }

    @property
    def _white(self) -> bool:
        """Whether the noise is to have no memory."""
        off = self.config.get("memory") == "off" or self.config["residual"] == "none"
        return bool(self.previous) or off

    def _law_by_mode(self, reader: Reader, spectrum: Tensor) -> dict[str, Any]:
        """Statistics of the law by wavevector, of a residual that is drawn from it."""
        if not isinstance(self.residual, (Modes, Mixture)):
            return {}
        kept = self.frame.kept
        law = BaseLaw(kept, spectrum)
        modes = ModeCovariance(kept)
        largest = torch.zeros(LARGEST, LARGEST, dtype=torch.float64)
        for encoding, q_hat, _, _ in self._residuals(reader):
            modes.add(q_hat)
            numbers = kept.largest(q_hat * law.modes("whiten", q_hat)).double()
            largest += (numbers.mT @ numbers).cpu()
        largest, num = reader.sum(largest, modes.number)
        out = {"law_modes": modes.factors(reader, kept.spread(spectrum))}
        if isinstance(self.residual, Mixture) and self.residual.components == 2:
            out["law_offset"] = principal(largest / num)
        return out

    def _tags(self, batch: Batch) -> Tags:
        """What tells neighbours; nothing where the noise is to have no memory."""
        return None if self._white else batch.tags

    def _collect(self, memory: LagCorrelation, reader: Reader) -> None:
        """What all processes have seen of the memory, and whether that is enough."""
        memory.collect(reader)
        # the mean of a score with learned sensors is known from the check on
        now = isinstance(self.residual, LearnedScore) == (self.phase == "check")
        if self.recorded_every is not None and not self._white and now:
            memory.demand(self.recorded_every)

    def _judge_mean(self, reader: Reader) -> None:
        """Gain per shell of the mean's network on what the regression leaves.

        Where it reads closures of its own, also the range of what it reads and gives here.
        """
        frame, gate = self.frame, ShellGate(self.frame.kept)
        assert self.mean is not None
        read, given = self._place.new_zeros(self.num_features), self._place.new_zeros(())
        for frames_hat, target_hat, batch in self.snapshots(reader):
            encoding = self.encode(frames_hat)
            field = self.mean.field(encoding)
            read = torch.maximum(
                read, encoding.features[:, : self.num_features].abs().amax((0, 2, 3))
            )
            given = torch.maximum(given, field.abs().max())
            output = self.mean.spectra(frame, encoding, field).to(torch.complex128)
            residual = resize(target_hat - encoding.mean_hat, frame.kept.modes)
            white = residual * frame.first.modes("whiten", residual)
            gate.add(white, output * frame.first.modes("mask", residual), batch.members)
        gate.collect(reader)
        read, given = reader.largest(read, given)
        gain = gate.gains() if self.gated else torch.ones(frame.kept.grid.num_shells).double()
        self.statistics = replace(
            self.statistics, mean_gain=gain, mean_members=float(gate.members)
        )
        if self.previous:
            self.statistics = replace(
                self.statistics,
                features_largest=read.double().cpu(),
                mean_largest=float(given),
            )

    def choose_share(self, reader: Reader) -> dict[str, Any]:
        """Share of the mean's network that long coupled runs bear, per shell (``valid``)."""
        assert self.long_runs is not None
        expected = self.expected_back
        assert expected is not None
        share = torch.ones(self.guarded, dtype=torch.float64)
        tried = []
        for _ in range(ROUNDS):
            self.statistics = replace(self.statistics, mean_share=share)
            found = self.long_runs.run(self, reader)
            tried.append((share, found))
            less = lower(share, found, float(expected[0]))
            if less is None or bool((less == share).all()):
                break
            share = less
        if bool((share == 1).all()):
            self.statistics = replace(self.statistics, mean_share=None)
        return {"expected_back": round(float(expected[0]), 4), "tried": in_words(tried)}

    def _judge_amplitude(self, reader: Reader) -> None:
        """Share of log D."""
        frame, gate = self.frame, ShareGate(self.frame.first)
        assert self.amplitude is not None
        for frames_hat, target_hat, batch in self.snapshots(reader):
            encoding = self.encode(frames_hat)
            residual = resize(target_hat - encoding.mean_hat, frame.kept.modes)
            gate.add(self.amplitude(encoding).double(), frame.field(residual), batch.members)
        gate.collect(reader)
        self.statistics = replace(
            self.statistics,
            amplitude_gain=gate.share() if self.gated else 1.0,
            amplitude_members=float(gate.members),
        )

    # ---- the generator --------------------------------------------------------------------------

    def generator_loss(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Loss (B,) of the generator (:class:`~.residual.Generator`).

        Half of the samples see sensors, in layouts drawn from a fixed list, so that one model
        serves with and without them. Every draw is keyed by (seed, step, sample).
        """
        assert isinstance(self.residual, Generator)
        key = keyed_noise.Key(seed, "train", [int(i) for i in batch["sample_index"]], step)
        with torch.no_grad():
            encoding = self.encode(self._frames_of(batch))
            target_hat = self.band.to_spectral(batch["target"])
            drawn = self._training_draws(encoding, target_hat, key, keyed_noise.STREAM_STEP)
        if self.phase == "spread" and isinstance(self.residual, LearnedScore):
            return self.residual.spread_loss(self.frame, *drawn[:2])
        return self.residual.loss(self.frame, *drawn)

    def _training_draws(
        self, encoding: Encoding, target_hat: Tensor, key: keyed_noise.Key, stream: int
    ) -> tuple[Posterior, Tensor, Tensor, Tensor]:
        """Arguments of a generator's loss: given, x0, base noise and uniforms."""
        assert isinstance(self.residual, Generator)
        frame = self.frame
        residual = target_hat - encoding.mean_hat
        x0 = frame.standardise(residual, encoding.log_amplitude).to(torch.complex128)
        uniform = keyed_noise.uniforms(*key)  # layouts are chosen by the host
        noises = range(self.residual.noises)
        z = torch.stack([self.base_noise(frame.law, key, stream + i) for i in noises])
        shown = self.conditioning.layouts
        if self.phase == "spread":  # rare layouts need their spread as much as common ones
            shown = tuple(layout._replace(weight=1.0) for layout in shown)
        layouts = choose_layouts(uniform[:, 1], self.sensors_allowed, shown)
        seen = self.conditioning.observe_training(frame, encoding, x0, z, layouts, key)
        given = self.posterior(encoding, seen, list(seen.gains))
        return given, x0 - seen.mean, z, uniform[:, 0].to(x0.device)

    def check_generator(self, reader: Reader) -> dict[str, Any]:
        """Gains of the generator and of its samples' spread (``valid``)."""
        assert isinstance(self.residual, Generator)
        frame, ones = self.frame, torch.ones(self.frame.kept.grid.num_shells).double()
        self.statistics = replace(self.statistics, score_gain=ones, score_spread=None)
        gate, first = self.residual.gate(frame), reader.first
        for _ in range(CHECKS):
            for frames_hat, target_hat, batch in self.snapshots(reader):
                key = keyed_noise.Key(
                    CHECK_SEED, "check", range(first, first + len(target_hat)), 0
                )
                first += len(target_hat)
                encoding = self.encode(frames_hat)
                drawn = self._training_draws(encoding, target_hat, key, keyed_noise.STREAM_STEP)
                gate.add(*self.residual.evidence(frame, *drawn), batch.members)
            first += reader.others
        gate.collect(reader)
        gated = self.gated and self.residual.judged
        gain = gate.gains() if gated else ones
        self.statistics = replace(
            self.statistics, score_gain=gain, score_members=float(gate.members)
        )
        report = {
            "score_gain": _rounded(gain),
            "members": gate.members,
            "snapshots": (first - reader.first) // CHECKS,
        }
        if self.score_active and self.sensors_allowed != "required":
            spread = self._spread_gain(reader)
            self.statistics = replace(self.statistics, score_spread=spread)
            report["spread_gain"] = _rounded(spread)
            report["memory"] = _rounded(self.statistics.memory_times, 2)
            if gated and not self._samples_improve(reader):
                none = torch.zeros_like(gain)
                self.statistics = replace(self.statistics, score_gain=none, score_spread=None)
                report["score_gain"] = "none: its samples are no better than the Gaussian law's"
        return report

    def _residuals(self, reader: Reader) -> Iterable[tuple[Encoding, Tensor, range, Batch]]:
        """(encoding, spectra of q, ids of the draws, batch) of every batch."""
        first = reader.first
        for frames_hat, target_hat, batch in self.snapshots(reader):
            encoding, ids = self.encode(frames_hat), range(first, first + len(target_hat))
            residual = target_hat - encoding.mean_hat
            first += len(target_hat)
            yield encoding, self.frame.standardise(residual, encoding.log_amplitude), ids, batch

    def _samples_improve(self, reader: Reader) -> bool:
        """Whether q as the generator draws it scores better than as its base law does.

        By the energy score of fields, which sees two peaks of a pattern, or by the CRPS of points,
        which sees a spread that differs by place. A velocity may be nearer to the truth, and few
        steps along it end farther.
        """
        frame = self.frame
        fields, points = ImprovementGate(frame.kept), ImprovementGate(frame.kept)
        for encoding, q_hat, ids, batch in self._residuals(reader):
            truth = frame.field(q_hat.to(torch.complex128))
            keys = [keyed_noise.Key(CHECK_SEED, "check", ids, 2 + i) for i in range(CHECK_DRAWS)]
            plain = [self.base_noise(frame.law, key, keyed_noise.STREAM_BASE) for key in keys]
            drawn = [self.generate(encoding, z).q for z in plain]
            sets = [frame.field(torch.stack(qs).to(torch.complex128)) for qs in (plain, drawn)]
            for gate, score in ((fields, energy_score), (points, crps)):
                before, after = (score(one, truth) for one in sets)
                gate.add(before, after, batch.members)
        fields.collect(reader)
        points.collect(reader)
        return bool(fields.gains().any() or points.gains().any())

    def _spread_gain(self, reader: Reader) -> Tensor:
        """Standard deviation of D q over that of D times the generator's samples, per shell.

        Both about the generator's mean, where it has one; what is left of the residual then tells
        its memory, too.
        """
        frame = self.frame
        kept, memory = frame.kept, LagCorrelation(frame.kept)
        seen = torch.zeros(kept.grid.num_shells, dtype=torch.float64)
        drawn = torch.zeros_like(seen)
        for encoding, q_hat, ids, batch in self._residuals(reader):
            z = self.base_noise(
                frame.law, keyed_noise.Key(CHECK_SEED, "check", ids, 1), keyed_noise.STREAM_BASE
            )
            made = self.generate(encoding, z)
            memory.add(q_hat - made.mean, self._tags(batch))
            about = made.mean if made.sharp else 0.0
            for power, q in ((seen, q_hat - about), (drawn, made.q - about)):
                u_hat = resize(frame.amplify(q, encoding.log_amplitude), kept.modes)
                power += kept.grid.shell_sum(u_hat.abs().square().double()).sum(0).cpu()
        self._collect(memory, reader)
        seen, drawn = reader.sum(seen, drawn)
        self.adopt(replace(self.statistics, memory_times=memory.times()))
        ratio = (seen / drawn.clamp(min=1e-300)).sqrt()
        # where D carries more from other shells than there is, no factor of q would help
        return torch.where((seen > 0) & (drawn > 0), ratio.clamp(0.9, 2.0), 1.0)

    # ---- through the solver ---------------------------------------------------------------------

    def score_trajectories(self, reader: Reader) -> dict[str, Any]:
        """Scores of coupled ensembles as they are, before they are trained."""
        assert self.trajectories is not None
        reader = reader.kept()
        scale = self.trajectories.scale(self, reader, CHECK_SEED)
        if not bool(scale.crps.isfinite().all()):
            lost = int(scale.crps.isfinite().sum()) + 1
            raise ValueError(
                f"coupled runs of the model are not finite by closure call {lost}: training "
                f"through the solver starts from runs that hold; lower train.trajectory.calls"
            )
        self.statistics = replace(
            self.statistics, trajectory_scale=scale.crps, trajectory_power=scale.power
        )
        (starts,) = reader.sum(sum(len(batch["state"]) for batch in reader))
        return {"crps": _rounded(scale.crps, 4), "starts": starts}

    def calibrate_noise(self, reader: Reader) -> dict[str, Any]:
        """Size of the noise per shell with which coupled ensembles spread as their means err.

        An ensemble trained on its own starts spreads too little on others, and a score that is at
        its minimum hardly tells.
        """
        assert self.trajectories is not None
        reader = reader.kept()
        factor = torch.ones(self.band.grid.num_shells, dtype=torch.float64)
        told = []
        for _ in range(CALIBRATIONS):
            ratio = self.trajectories.spread_skill(self, reader, CHECK_SEED)
            told.append(float(ratio.log().mean().exp()))
            factor[1:] = (factor[1:] / ratio).clamp(1 / MOST, MOST)
            self.statistics = replace(self.statistics, trajectory_noise=factor.clone())
        return {"spread_skill": [round(one, 3) for one in told], "noise_factor": _rounded(factor)}


def _sizes(shells: Tensor) -> tuple[Tensor, Tensor]:
    """Power of a shell that hardly a closure exceeds, and its mean, of (snapshots, shells)."""
    last = len(shells) - 1
    return shells.sort(0).values[last - int(RARE * last)], shells.mean(0)


def _rounded(values: Tensor, digits: int = 3) -> list[float]:
    return [round(float(value), digits) for value in values]
