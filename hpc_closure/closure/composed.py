r"""A closure model as parts in a row, each chosen in the experiment.

.. math:: U = m(V) + D(V)\,q, \qquad q \sim p(q\,|\,V, y)

* mean m: a regression on generic terms (:mod:`regression`), a network for what it leaves
  (:mod:`mean`), both or neither;
* amplitude D: a field that such a network gives, or 1;
* base law: q is N(0, Q) with the spectrum and the memory of the residual (:mod:`law`,
  :mod:`residual_memory`); alone it is the baseline ``mean_gp``;
* sensors: kriged under the base law, or learned (:mod:`conditioning`);
* residual: what is not Gaussian, learned by a score or in one pass (:mod:`residual`), or nothing;
  without any noise the mean alone is left, a deterministic closure.

A trained part acts as far as it helps on members that it has not seen (:mod:`gate`), or always.
What few steps and a finite network leave of too little spread is made up on the same members:
without sensors, and with the model's own sampler, each shell of q is scaled to the variance seen.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hpc_closure.closure import draws
from hpc_closure.closure.adjustment import Adjustment
from hpc_closure.closure.band import band
from hpc_closure.closure.conditioning import (
    Conditioning,
    Kriged,
    Learned,
    Observed,
    TrainingObserved,
)
from hpc_closure.closure.features import (
    STATES,
    carried,
    coordinates,
    feature_names,
    feature_spectra,
    physics_estimate,
)
from hpc_closure.closure.frame import Encoding, Frame
from hpc_closure.closure.gate import LEAST, ImprovementGate, ShareGate, ShellGate
from hpc_closure.closure.interface import ClosureModel, Phase, Request, Through
from hpc_closure.closure.law import BaseLaw
from hpc_closure.closure.learned_score import LearnedScore
from hpc_closure.closure.losses import crps, energy_score
from hpc_closure.closure.mean import NetworkAmplitude, NetworkMean
from hpc_closure.closure.network import LARGEST, PLACES
from hpc_closure.closure.parts import PartReport
from hpc_closure.closure.posterior import Posterior
from hpc_closure.closure.reader import Batches, Reader
from hpc_closure.closure.regression import Library
from hpc_closure.closure.residual import (
    Drawn,
    Effort,
    Gaussian,
    Generator,
    OnePass,
    Residual,
    Score,
)
from hpc_closure.closure.residual_memory import LagCorrelation, Tags, knot_spacing, position
from hpc_closure.closure.sensors import choose_layouts
from hpc_closure.closure.shared import each_member, for_members
from hpc_closure.closure.statistics import Batch, Statistics, generator_grid
from hpc_closure.closure.trajectory import Scale, Trajectories
from hpc_closure.experiment.models import NETWORKS, UNTRAINED
from hpc_closure.spectral.grid import hermitian, resize
from hpc_closure.spectral.placed import placed

__all__ = ["ComposedModel"]

CHECK_SEED = 20240807
BEYOND = 6.0  # standard deviations at which a state's numbers are held
NOTHING = 1e-9  # of a closure's power
FAR = 10.0  # root mean squares at which a condition channel is held
RARE = 3e-3  # share of the closures that have a larger shell than a draw that is left as it is
CHECK_DRAWS = 4  # samples of each unseen snapshot whose score judges it
CHECKS = 2  # noise levels at which each unseen snapshot judges the generator
# of the mean's weights: every target is one draw about it, which they would learn by heart, and a
# coupled run amplifies slopes that are not there (the amplitude, which it made worse, has none)
DECAY = {"fno": 3.0, "cnn": 0.3}
MEAN_GP = "mean_gp"
TRAJECTORY, NOISE = "trajectory", "noise"  # the phases through the solver
SPREAD = 0.15  # steps in which the spread of a score is learned again, over the others'
CALIBRATIONS = 3  # times that the noise of coupled runs is brought nearer to their error,
MOST = 2.0  # by at most this factor in all


@dataclass(frozen=True)
class Drawing:
    """What a draw depends on besides tensors.

    Attributes:
        scale: of the residual, for the time that it is held.
        members: how many.
        baseline: mean and stationary Gaussian process alone.
        effort: of the sampler.
    """

    scale: float
    members: int
    baseline: bool
    effort: Effort


class ComposedModel(ClosureModel):
    """See the module's docstring.

    Args:
        config: as :func:`hpc_closure.experiment.models.resolve` gives it.
        grid, length: see :class:`~.interface.ClosureModel`.
    """

    def __init__(self, config: dict[str, Any], grid: int, length: float = 1.0):
        super().__init__(config, grid, length)
        self.dimensions = int(config["dimensions"])
        self.band = band((grid - 1) // 3, length, self.dimensions)
        conditions = config["conditions"]
        self.history = int(conditions["history"])
        self.previous = int(conditions.get("previous", 0))  # models of before it had none
        self.sensors_allowed = conditions["sensors"]
        self.granted: dict | None = conditions["physics"] or None
        self.gated = config["gate"] == "on"
        features = feature_names(self.band)
        self.own = features.index(STATES[self.dimensions])
        self.num_features = len(features) + bool(self.granted) + self.history + 2 * self.previous
        channels = self.num_features + PLACES * self.dimensions
        self.mean, self.amplitude = None, None
        for kind in config["mean"]:
            if kind in NETWORKS:
                self.mean = NetworkMean(kind, channels, config)
        if config["amplitude"] in NETWORKS:
            self.amplitude = NetworkAmplitude(config["amplitude"], channels, config)
        self.kriged = Kriged()
        self.conditioning: Conditioning = self.kriged
        if config["sensors"] == "learned":
            self.conditioning = Learned()
        channels += self.conditioning.channels + 1
        self.residual = self._make_residual(channels)
        self.phases = self._phases(config["shares"])
        self.statistics = Statistics()
        self.library = self._library()
        self.adjustment: Adjustment | None = None
        self.trajectories: Trajectories | None = None
        if config["adjusted"]:
            terms, shells = len(self.library.names), self.band.grid.num_shells
            self.adjustment = Adjustment(terms, shells, noise=config["residual"] != "none")
        self.frame: Frame

    def _make_residual(self, channels: int) -> Residual:
        config = self.config
        if config["residual"] in UNTRAINED:
            return Gaussian()
        if config["residual"] == "crps":
            return OnePass(channels, config)
        if config["sensors"] == "learned":
            return LearnedScore(channels, config, self.band)
        return Score(channels, config)

    def _phases(self, shares: tuple[float, float]) -> tuple[Phase, ...]:
        trained = bool(self.mean or self.amplitude)
        mean = Phase("mean", shares[0] if trained else 0.0, "fit", sampled=False)
        if not isinstance(self.residual, Generator):
            return mean, Phase("law", 0.0, "hold")
        # members that no network has seen are as good as those held back
        generator = Phase("generator", shares[1], "hold" if trained else "train")
        check = Phase("check", 0.0, "valid")
        if not isinstance(self.residual, LearnedScore):
            return mean, generator, check
        return mean, generator, Phase("spread", SPREAD * shares[1], "valid"), check

    # ---- phases ---------------------------------------------------------------------------------

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

    # ---- closed-form statistics -----------------------------------------------------------------

    def saved_statistics(self, spacing: float | None = None) -> dict[str, Tensor]:
        told = self.statistics
        if spacing is not None and told.memory_times is not None:
            told = replace(told, memory_spacing=spacing)
        return told.to_tensors()

    def load_statistics(self, tensors: dict[str, Tensor]) -> None:
        self.adopt(Statistics.from_tensors(tensors))

    def adopt(self, statistics: Statistics) -> None:
        """Take over statistics, and rebuild everything that follows from them."""
        self.statistics = s = statistics
        self.library = self._library(s.library)
        self.kriged.clear()
        if self.mean is not None and s.mean_largest is not None:
            self.mean.farthest = s.mean_largest
        if s.generator_size is None:
            return
        kept = band(s.generator_modes, self.length, self.dimensions)
        first = law = plain = BaseLaw(kept, s.first_spectrum, s.first_tail)
        if s.law_spectrum is not None:
            law = BaseLaw(kept, s.law_spectrum, s.law_tail)
            plain = BaseLaw(kept, s.plain_spectrum, s.law_tail)
            self.knots = knot_spacing(s.memory_times, s.memory_spacing or 0.0)
        state_std = None if s.state_spectrum is None else kept.spread(s.state_spectrum.sqrt())
        self.frame = Frame(self.band, kept, s.generator_size, first, law, plain, state_std)

    def _library(self, coefficients: Tensor | None = None) -> Library:
        kind = self.config["library"] if "regression" in self.config["mean"] else "none"
        estimate = self.estimate if self.granted else None
        if kind == "none":
            estimate = None
        return Library(self.band, kind, self.history, self.previous, coefficients, estimate)

    def estimate(self, w_hat: Tensor) -> Tensor:
        """What physics says of the closure, where ``conditions.physics`` grants it."""
        return physics_estimate(w_hat, self.band, **(self.granted or {}))

    @property
    def has_networks(self) -> bool:
        """Whether anything reads the condition channels."""
        return bool(self.mean or self.amplitude) or isinstance(self.residual, Generator)

    @property
    def score_active(self) -> bool:
        """Whether a generator acts (it is not evaluated otherwise)."""
        if not isinstance(self.residual, Generator):
            return False
        gain = self.statistics.score_gain
        return gain is None or bool((gain != 0).any())

    @property
    def amplitude_share(self) -> float:
        """Share of log D in use; 0 = D is 1."""
        return self.statistics.amplitude_gain or 0.0

    def _modes_of(self, shells: Tensor | None, like: Tensor) -> Tensor | None:
        """Gains (shells,) of a trained part at every mode; None when they are zero everywhere."""
        if shells is None or not bool((shells != 0).any()):
            return None
        return placed(shells, like)[placed(self.frame.kept.grid.shell(), like)]

    def parts(self) -> list[PartReport]:
        s, config = self.statistics, self.config
        out = []
        if "regression" in config["mean"]:
            terms = ", ".join(self.library.active)
            out.append(PartReport("mean: regression", False, bool(terms), (), terms or "no term"))
        if self.mean is not None:
            out.append(self._trained(f"mean: {self.mean.kind}", s.mean_gain, s.mean_members))
        if self.amplitude is not None:
            gain = torch.tensor([self.amplitude_share])
            name = f"amplitude: {config['amplitude']}"
            out.append(self._trained(name, gain, s.amplitude_members))
        if config["residual"] != "none":
            out.append(PartReport("Gaussian process", False, True))
        if self.sensors_allowed != "none":
            learned = config["sensors"] == "learned"
            acts = self.score_active or not learned
            out.append(PartReport(f"sensors: {config['sensors']}", learned, acts))
        if isinstance(self.residual, Generator):
            name = f"residual: {config['residual']}"
            out.append(self._trained(name, s.score_gain, s.score_members))
        if self.adjustment is not None:
            acts = any(bool(weight.any()) for weight in self.adjustment.parameters())
            name = "training through the solver"
            out.append(PartReport(name, True, acts, (), str(self.adjustment) if acts else ""))
        return out

    def _trained(self, name: str, gain: Tensor | None, members: float | None) -> PartReport:
        gains = () if gain is None else tuple(gain.tolist())
        acts = any(gains)
        note = ""
        if not acts:
            note = "not judged yet" if members is None else "no significant gain"
            if members is not None and members < LEAST:
                note = f"{members:.0f} members cannot decide, {LEAST} are needed"
        elif not self.gated:
            note = "not gated"
        return PartReport(name, True, acts, gains, note)

    def compact(self) -> "ComposedModel":
        config = dict(self.config)
        gains = {part.name.split(":")[0]: part.acts for part in self.parts() if part.trained}
        small = copy.copy(self)
        small._modules = dict(self._modules)
        if self.mean is not None and not gains["mean"]:
            config["mean"] = [name for name in config["mean"] if name not in NETWORKS]
            small.mean = None
        if self.amplitude is not None and not gains["amplitude"]:
            config["amplitude"] = "none"
            small.amplitude = None
        if isinstance(self.residual, Generator) and not gains["residual"]:
            config["residual"] = "gaussian"
            small.residual = Gaussian()
        if small.mean is None and small.amplitude is None and isinstance(small.residual, Gaussian):
            small.statistics = replace(self.statistics, summary_mean=None, summary_std=None)
        small.config = config
        return small

    # ---- what a state decides -------------------------------------------------------------------

    def frames(
        self, state: Tensor, history: Tensor | None = None, previous: Tensor | None = None
    ) -> Tensor:
        """Spectra (B, 1 + H + P, ...) in the model's band of fields.

        Args:
            state: (B, n, n).
            history: earlier states (B, H, n, n).
            previous: the last closures (B, P, n, n).
        """
        if state.dtype not in (torch.float32, torch.float64):
            state = state.float()
        return self.band.to_spectral(self._stacked(state, history, previous))

    def frames_hat(
        self, state: Tensor, history: Tensor | None = None, previous: Tensor | None = None
    ) -> Tensor:
        """The same of retained spectra of any number of modes."""
        return resize(self._stacked(state, history, previous), self.band.modes)

    def _stacked(self, state: Tensor, history: Tensor | None, previous: Tensor | None) -> Tensor:
        stack = [state[:, None]]
        for name, given, wanted in (
            ("history", history, self.history),
            ("previous", previous, self.previous),
        ):
            number = 0 if given is None else given.shape[1]
            if number != wanted:
                raise ValueError(
                    f"{name} has {number} frames, this model was built with "
                    f"conditions.{name}={wanted}"
                )
            if given is not None:
                stack.append(given.to(state))
        return torch.cat(stack, dim=1)

    def encode(self, frames_hat: Tensor) -> Encoding:
        """Mean, features and amplitude of states with their history, as :meth:`frames` gives them.

        The trained parts as far as they have a gain.
        """
        s = self.statistics
        state_hat, moved = frames_hat[:, 0], None
        summary = self._summary(state_hat)
        features = summary.new_zeros(len(state_hat), 0, 1, 1)
        if self.has_networks:
            moved = self._moved(frames_hat)
            features = self.features(frames_hat, moved)
        mean_hat = self.library(frames_hat, moved, self._factors())
        encoding = Encoding(state_hat, mean_hat, features, summary)
        gain = self._modes_of(s.mean_gain, encoding.features)
        if self.mean is not None and gain is not None:
            correction = self.mean.correction(self.frame, self.mean(self.frame, encoding) * gain)
            correction = resize(correction, self.band.modes)
            encoding.mean_hat = encoding.mean_hat + correction.to(encoding.mean_hat.dtype)
        if self.amplitude is not None and self.amplitude_share:
            encoding.log_amplitude = self.amplitude_share * self.amplitude(encoding)
        return encoding

    def _factors(self) -> Tensor | None:
        """(terms, shells) of the regression's coefficients, where training has changed them."""
        if self.adjustment is None:
            return None
        adjustment, library = self.adjustment, self.library
        if self.replayed is None:
            return library.bounded(adjustment().terms)
        return self.replayed.once("factors", lambda: library.bounded(adjustment().terms))

    def _summary(self, state_hat: Tensor) -> Tensor:
        """(B, 51) numbers of states about one in size; (B, 0) where no network reads them."""
        mean, std, like = self.statistics.summary_mean, self.statistics.summary_std, state_hat.real
        if mean is None or std is None:
            return like.new_zeros(len(like), 0)
        mean, std = placed(mean, like), placed(std, like)
        numbers = (self.band.summary(state_hat) - mean) / std
        return numbers.clamp(-BEYOND, BEYOND).to(self._place)

    def _moved(self, frames_hat: Tensor) -> Tensor | None:
        """What the flow makes of the last closures, spectra (B, P, ...); None without memory."""
        if not self.previous:
            return None
        return carried(frames_hat[:, 0], frames_hat[:, 1 + self.history :], self.band)

    def feature_spectra(self, frames_hat: Tensor, moved: Tensor | None) -> Tensor:
        """Spectra (B, F, 2K + 1, K + 1) of the features of states with what was before them."""
        w_hat = frames_hat[:, 0]
        spectra = [feature_spectra(w_hat, self.band)]
        if self.granted:
            spectra.append(self.estimate(w_hat)[:, None])
        spectra.append(frames_hat[:, 1:])
        if moved is not None:
            spectra.append(moved)
        return torch.cat(spectra, dim=1)

    def features(self, frames_hat: Tensor, moved: Tensor | None) -> Tensor:
        """Normalised condition channels (B, C, g, g), as the weights, on the generator's grid."""
        spectra = self.feature_spectra(frames_hat, moved)
        scale = placed(self.statistics.features_rms, frames_hat)
        size = self.frame.size
        fields = (self.band.to_physical(spectra, size) / scale[:, None, None]).to(self._place)
        largest = self.statistics.features_largest
        far: Any = FAR if largest is None else placed(largest, fields)[:, None, None]
        fields = fields.clamp(-far, far)
        places = coordinates(size, fields).expand(len(fields), -1, -1, -1)
        return torch.cat([fields, places], dim=1)

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
        active = self.library.fit(((f, t) for f, t, _ in self.snapshots(reader)), reader)
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
        memory = LagCorrelation(kept)
        for frames_hat, target_hat, batch in self.snapshots(reader):
            encoding = self.encode(frames_hat)
            residual = target_hat - encoding.mean_hat
            q_hat = frame.standardise(residual, encoding.log_amplitude)
            power += kept.by_group(q_hat.abs().square()).sum(0).cpu()
            if not isinstance(self.residual, LearnedScore):  # whose mean is not known yet
                memory.add(q_hat, self._tags(batch))
            inside = resize(residual, kept.modes)
            plain_power += kept.by_group(inside.abs().square()).sum(0).cpu()
            beyond = residual - resize(inside, self.band.modes)
            tail += float(self.band.by_group(beyond.abs().square()).sum())
            num += len(q_hat)
        power, plain_power, tail, num = reader.sum(power, plain_power, tail, num)
        memory.collect(reader)
        spectrum, tail = power / num / kept.group_size, tail / num
        if self._modes_of(s.mean_gain, power) is None and not self.amplitude_share:
            # nothing was learned by gradients: the members of ``fit`` are as good as unseen
            share = num / (num + s.first_snapshots)
            spectrum = share * spectrum + (1 - share) * s.first_spectrum
            tail = share * tail + (1 - share) * s.first_tail
        if self.config["base_noise"] == "white":
            level = kept.variance(spectrum) / float(kept.group_size.sum())
            spectrum = torch.full_like(spectrum, level)
        self.adopt(
            replace(
                s,
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

    def _tags(self, batch: Batch) -> Tags:
        """What tells neighbours; nothing where the noise is to have no memory."""
        white = self.previous or self.config.get("memory") == "off"
        return None if white else batch.tags

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

    # ---- base noise -----------------------------------------------------------------------------

    def base_noise(self, law: BaseLaw, key: draws.Key, stream: int) -> Tensor:
        """Draws of a base law, spectra (ids, ...) complex128."""
        return law.coloured(draws.white_spectra(self.frame.kept, *key, stream, self.device))

    def noise_of_call(self, request: Request, law: BaseLaw) -> Tensor:
        """Base noise of a call, with the residual's memory (:mod:`residual_memory`) if any."""
        noise = self._noise_with_memory(request, law)
        if self.adjustment is None:
            return noise
        factor = self.adjustment().noise
        if self.statistics.trajectory_noise is not None:
            factor = factor * self.statistics.trajectory_noise.to(factor)
        return noise * factor[self.frame.kept.grid.shell()].to(noise.real)

    def _noise_with_memory(self, request: Request, law: BaseLaw) -> Tensor:
        key = draws.Key(request.seed, request.stage, request.members, request.call)
        fresh = self.base_noise(law, key, draws.STREAM_BASE)
        if not bool((self.knots > 0).any()):
            return fresh
        shell = self.frame.kept.grid.shell().to(fresh.device)
        for knots in sorted(set(self.knots[self.knots > 0].tolist())):
            first, cos, sin = position(request.call * request.held, knots)
            stream = draws.STREAM_MEMORY + round(math.log2(knots))
            one, two = (self.base_noise(law, key._replace(item=first + i), stream) for i in (0, 1))
            rows = (self.knots == knots).to(fresh.device)[shell]
            fresh = torch.where(rows, cos * one + sin * two, fresh)
        return fresh

    def scale_of(self, held: float) -> float:
        """Factor of the residual's std for another interval: the white part averages out."""
        shares = (
            (self.knots.clamp(min=1.0) / held).clamp(max=1.0)
            if held > 1
            else (torch.where(self.knots > 0, 1.0, 1.0 / held))
        )
        kept = self.frame.kept
        power = kept.by_group(kept.spread(self.frame.law.spectrum))
        shares = shares[kept.group_shell]
        return math.sqrt(float((power * shares).sum() / power.sum()))

    # ---- the generator --------------------------------------------------------------------------

    def posterior(
        self, encoding: Encoding, seen: Observed | TrainingObserved, gains: list
    ) -> Posterior:
        """What a generator reads: features, what sensors say, log D."""
        fields = seen.fields
        features, log = encoding.features, encoding.log_amplitude
        if log is None:
            log = features.new_zeros(1, self.frame.size, self.frame.size)
        parts = (features, fields, log[:, None].to(features))
        count = max(map(len, parts))
        channels = torch.cat([part.expand(count, -1, -1, -1) for part in parts], dim=1)
        white = None
        if isinstance(self.conditioning, Learned):
            white = self.frame.whiten_state(encoding.state_hat)
        return Posterior(channels, encoding.summary, gains, seen.readings, white)

    def generator_loss(self, batch: dict[str, Any], seed: int, step: int) -> Tensor:
        """Loss (B,) of the generator (:class:`~.residual.Generator`).

        Half of the samples see sensors, in layouts drawn from a fixed list, so that one model
        serves with and without them. Every draw is keyed by (seed, step, sample).
        """
        assert isinstance(self.residual, Generator)
        key = draws.Key(seed, "train", [int(i) for i in batch["sample_index"]], step)
        with torch.no_grad():
            encoding = self.encode(self._frames_of(batch))
            target_hat = self.band.to_spectral(batch["target"])
            drawn = self._training_draws(encoding, target_hat, key, draws.STREAM_STEP)
        if self.phase == "spread" and isinstance(self.residual, LearnedScore):
            return self.residual.spread_loss(self.frame, *drawn[:2])
        return self.residual.loss(self.frame, *drawn)

    def _training_draws(
        self, encoding: Encoding, target_hat: Tensor, key: draws.Key, stream: int
    ) -> tuple[Posterior, Tensor, Tensor, Tensor]:
        """Arguments of a generator's loss: given, x0, base noise and uniforms."""
        assert isinstance(self.residual, Generator)
        frame = self.frame
        residual = target_hat - encoding.mean_hat
        x0 = frame.standardise(residual, encoding.log_amplitude).to(torch.complex128)
        uniform = draws.uniforms(*key)  # layouts are chosen by the host
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
                key = draws.Key(CHECK_SEED, "check", range(first, first + len(target_hat)), 0)
                first += len(target_hat)
                encoding = self.encode(frames_hat)
                drawn = self._training_draws(encoding, target_hat, key, draws.STREAM_STEP)
                gate.add(*self.residual.evidence(frame, *drawn), batch.members)
            first += reader.others
        gate.collect(reader)
        gain = gate.gains() if self.gated else ones
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
            if self.gated and not self._samples_improve(reader):
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
            keys = [draws.Key(CHECK_SEED, "check", ids, 2 + i) for i in range(CHECK_DRAWS)]
            plain = [self.base_noise(frame.law, key, draws.STREAM_BASE) for key in keys]
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
                frame.law, draws.Key(CHECK_SEED, "check", ids, 1), draws.STREAM_BASE
            )
            made = self.generate(encoding, z)
            memory.add(q_hat - made.mean, self._tags(batch))
            about = made.mean if made.sharp else 0.0
            for power, q in ((seen, q_hat - about), (drawn, made.q - about)):
                u_hat = resize(frame.amplify(q, encoding.log_amplitude), kept.modes)
                power += kept.grid.shell_sum(u_hat.abs().square().double()).sum(0).cpu()
        memory.collect(reader)
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

    # ---- sampling -------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_batch(self, request: Request) -> Tensor:
        """See :class:`~.interface.ClosureModel`.

        ``method="mean_gp"`` is the baseline of that name: the mean and a stationary Gaussian
        process, with sensors kriged under it; no generator, no amplitude.
        """
        frames_hat = self.frames(request.state, request.history, request.previous)
        return self.band.to_physical(self._draw(frames_hat, request), request.state.shape[-1])

    @torch.no_grad()
    def sample_hat(self, request: Request) -> Tensor:
        return self.draw_hat(request)

    def draw_hat(self, request: Request) -> Tensor:
        """As :meth:`sample_hat`, with gradients."""
        modes = request.state.shape[-1] - 1
        size = request.grid or band(modes).grid.size
        self.band.check_grid(1 if self.dimensions == 1 else size, size)
        frames_hat = self.frames_hat(request.state, request.history, request.previous)
        u_hat = self._draw(frames_hat, request)
        # no transform has made the column ky = 0 that of a real field
        return hermitian(resize(u_hat, modes))

    def _draw(self, frames_hat: Tensor, request: Request) -> Tensor:
        """Spectra of U (members, ...) in the model's band."""
        sensors, baseline = request.sensors, request.method == MEAN_GP
        if sensors is None and self.sensors_allowed == "required":
            raise ValueError("this model was trained with conditions.sensors=required: give some")
        if sensors is not None and self.sensors_allowed == "none":
            raise ValueError("this model was trained with conditions.sensors=none: give none")
        effort = Effort(request.method, request.evaluations)
        how = Drawing(self.scale_of(request.held), len(request.members), baseline, effort)
        if self.config["residual"] == "none" and not baseline:
            inputs: tuple[Tensor, ...] = (frames_hat,)
        else:
            law = self.frame.plain if baseline else self.frame.law
            inputs = frames_hat, self.noise_of_call(request, law)
        if sensors is None:
            drawn, beyond = self._alone(how, *inputs)
        else:
            drawn, beyond = self._beside_sensors(how, request, *inputs)
        self._brought_back = beyond + self._brought_back.to(beyond)
        return drawn

    def _alone(self, how: Drawing, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Closures, and how many were brought back, without sensors: a function of tensors.

        Args:
            how: the rest that it depends on.
            inputs: states with what was before them, and base noise unless nothing is drawn.
        """

        def function(frames_hat: Tensor, z: Tensor | None = None) -> tuple[Tensor, ...]:
            return self._finish(self._encoding(frames_hat, how), how, z)

        if self.replayed is None or not inputs[0].is_cuda or torch.is_grad_enabled():
            return function(*inputs)
        return self.replayed(function, how, *inputs)

    def _beside_sensors(
        self, how: Drawing, request: Request, frames_hat: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        encoding, observed = self._encoding(frames_hat, how), None
        if z is not None:
            law = self.frame.plain if how.baseline else self.frame.law
            conditioning = self.kriged if how.baseline else self.conditioning
            assert request.sensors is not None
            observed = conditioning.observe(self.frame, encoding, request.sensors, how.scale, law)
            key = draws.Key(request.seed, request.stage, request.members, request.call)
            z = observed.condition(z, key)
        return self._finish(encoding, how, z, observed)

    def _encoding(self, frames_hat: Tensor, how: Drawing) -> Encoding:
        encoding = self.encode(frames_hat)
        return replace(encoding, log_amplitude=None) if how.baseline else encoding

    def _finish(
        self,
        encoding: Encoding,
        how: Drawing,
        z: Tensor | None,
        observed: Observed | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Closures of base noise, or their means without, and how many were brought back."""
        if z is None:
            drawn, beyond = self._within_range(encoding.mean_hat)
            return each_member(drawn, how.members), beyond
        if self.score_active and not how.baseline:
            q_hat = self.generate(encoding, z, observed, how.effort).held(how.scale)
        else:
            q_hat = z * how.scale
        if observed is not None and observed.mean is not None:
            q_hat = q_hat + how.scale * for_members(observed.mean, how.members)
        mean_hat = for_members(encoding.mean_hat, how.members)
        q_hat = q_hat.to(mean_hat.dtype)
        return self._within_range(mean_hat + self.frame.amplify(q_hat, encoding.log_amplitude))

    def _within_range(self, u_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Closures (B, ...) none of whose shells is larger than nearly all of the training's.

        Given the last closures, the next may grow from call to call where the flow is as it has
        hardly been seen; left at the edge of the range, it would stay there and spin the flow up.
        So a shell beyond is brought back to its mean size, from where it follows the flow again.
        The second value, which ``brought_back`` adds up, is how many were.
        """
        largest, mean = self.statistics.target_largest, self.statistics.target_mean
        if largest is None or mean is None:
            return u_hat, torch.zeros((), dtype=torch.int64, device=u_hat.device)
        shell = self.band.grid.shell_sum(u_hat.abs().square())
        largest, mean = placed(largest, shell), placed(mean, shell)
        least = NOTHING * mean.sum()  # the mean of a closure is zero but for round-off
        far = shell > largest.clamp(min=least)
        size = torch.where(far, shell, 1.0)
        factor = torch.where(far, mean.clamp(min=least) / size, 1.0).sqrt()
        places = placed(self.band.grid.shell(), shell)
        drawn = u_hat * factor[:, places].to(u_hat.real)
        return drawn, far.any(-1).sum()

    def generate(
        self,
        encoding: Encoding,
        z: Tensor,
        observed: Observed | None = None,
        effort: Effort = Effort(),
    ) -> Drawn:
        """Carry base noise z (M, ...) to residuals, less their kriged mean.

        Args:
            encoding: of the states.
            z: base noise.
            observed: what sensors say.
            effort: of the sampler.
        """
        seen = observed or Observed(self.conditioning.absent(self.frame, encoding.features))
        gains = [] if seen.gain is None else [(None, seen.gain)]
        given = self.posterior(encoding, seen, gains)
        if not self.score_active:
            return Drawn(z)
        shells = self._modes_of(self.statistics.score_gain, z)
        if shells is None:  # not judged yet
            shells = torch.ones((), device=z.device)
        drawn = self.residual.draw(self.frame, given, z, shells, effort)
        # the spread was made up for the model's own sampler, without sensors
        own = effort in (Effort(), Effort(self.config["method"], self.config["evaluations"]))
        spread = self._modes_of(self.statistics.score_spread, z)
        if spread is None or observed is not None or not own:
            spread = torch.ones((), device=z.device)
        return replace(drawn, q=drawn.spread(spread))


def _sizes(shells: Tensor) -> tuple[Tensor, Tensor]:
    """Power of a shell that hardly a closure exceeds, and its mean, of (snapshots, shells)."""
    last = len(shells) - 1
    return shells.sort(0).values[last - int(RARE * last)], shells.mean(0)


def _rounded(values: Tensor, digits: int = 3) -> list[float]:
    return [round(float(value), digits) for value in values]
