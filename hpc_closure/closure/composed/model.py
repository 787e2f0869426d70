r"""A closure composed of parts, each chosen in the experiment.

.. math:: U = m(V) + D(V)\,q, \qquad q \sim p(q\,|\,V, y)

* mean m: a regression on generic terms (:mod:`regression`), a network for its residual
  (:mod:`mean`), both or neither;
* amplitude D: a field from such a network, or 1;
* base law: q is N(0, Q) with the spectrum and the memory of the residual
  (:mod:`~hpc_closure.closure.gaussian.kriging`, :mod:`~hpc_closure.closure.gaussian.memory`);
  alone it is the baseline ``mean_gp``;
* sensors: kriged under the base law, or learned
  (:mod:`~hpc_closure.closure.gaussian.conditioning`);
* residual: the non-Gaussian part, learned by a score or in one pass (:mod:`generators`), or none.
  Without noise the closure is the mean alone, a deterministic closure.

:mod:`phases` fits it.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpc_closure.closure.composed import centre
from hpc_closure.closure.composed.generators import (
    Drawn,
    Gaussian,
    Generator,
    Modes,
    Resampled,
    Residual,
    SamplerSettings,
)
from hpc_closure.closure.composed.mean import NetworkAmplitude, NetworkMean
from hpc_closure.closure.composed.mixture import Mixture
from hpc_closure.closure.composed.numbers import candidates
from hpc_closure.closure.composed.part_selection import LEAST
from hpc_closure.closure.composed.point_mixture import PointMixture
from hpc_closure.closure.composed.regression import TermRegression
from hpc_closure.closure.composed.statistics import Adjustment, Statistics, acts
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.features import (
    Features,
    coordinates,
    physics_estimate,
)
from hpc_closure.closure.fields.members import each_member, for_members
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.persistence import position, share_of_mean
from hpc_closure.closure.fields.sensors import Sensors
from hpc_closure.closure.gaussian.channel_covariance import apply_channels, remove_channels
from hpc_closure.closure.gaussian.conditioning import (
    Conditioning,
    GeneratorConditions,
    Kriged,
    Learned,
    Observed,
    TrainingObserved,
)
from hpc_closure.closure.gaussian.kriging import StationaryGaussian
from hpc_closure.closure.gaussian.memory import knot_spacing
from hpc_closure.closure.gaussian.mode_covariance import apply_factors
from hpc_closure.closure.gaussian.residual_coordinates import ResidualCoordinates, StateConditions
from hpc_closure.closure.model import ClosureModel, Request
from hpc_closure.closure.networks.blocks import PLACES
from hpc_closure.closure.part_report import PartReport
from hpc_closure.experiment.kinds import (
    ResidualKind,
    channel_shape_of,
    equation_of,
    fields_of,
    find,
    whole_fields,
)
from hpc_closure.experiment.models import closed_mean, network_of
from hpc_closure.spectral.modes.grid import mode_counts, to_device_cached
from hpc_closure.spectral.modes.resolution import retained_modes

__all__ = ["CompositeClosure"]

BEYOND = 6.0  # bound of a state's summary numbers, in standard deviations
NOTHING = 1e-9  # share of a closure's power that counts as round-off
SINGLE = 1e-5  # round-off of the power of a state in single precision
FAR = 10.0  # bound of a condition channel, in root mean squares
MEAN_GP = "mean_gp"


@dataclass(frozen=True)
class Drawing:
    """Settings of a draw, which it depends on besides tensors.

    Attributes:
        interval_ratio: averaging time in trained intervals.
        members: number of members.
        baseline: whether only the mean and a stationary Gaussian process are drawn.
        effort: settings of the sampler.
    """

    interval_ratio: float
    members: int
    baseline: bool
    effort: SamplerSettings


class CompositeClosure(ClosureModel):
    """Draws U = m(V) + D(V) q for states V; :func:`~.phases.compose` adds the phases that fit it.

    Args:
        config: configuration from :func:`hpc_closure.experiment.models.resolve`.
        grid, length: see :class:`~hpc_closure.closure.model.ClosureModel`.
    """

    def __init__(self, config: dict[str, Any], grid: int, length: float = 1.0):
        super().__init__(config, grid, length)
        self.dimensions = int(config["dimensions"])
        self.band = band(retained_modes(grid), length, self.dimensions)
        self.feature_set = Features(self.band, equation_of(config))
        fields = fields_of(config)
        #: () of one field, (C,) of C channels; an axis of states, closures and residuals
        self.channel_shape = channel_shape_of(config)
        #: index of each channel's field, where the components of a vector are one field
        self.whole = whole_fields(config)
        conditions = config["conditions"]
        self.history = int(conditions["previous_states"])
        self.previous = int(conditions.get("previous_closures", 0))  # missing in old model files
        self.sensors_allowed = conditions["sensors"]
        self.granted: dict | None = conditions["physics_estimate"] or None
        self.gated = config["validate_parts"] == "on"
        earlier = fields * (self.history + 2 * self.previous)
        self.num_features = len(self.feature_set.names) + bool(self.granted) + earlier
        channels = self.num_features + PLACES * self.dimensions
        self.mean, self.amplitude = None, None
        network = network_of(config)
        if network is not None:
            self.mean = NetworkMean(network, channels, config)
        if config["amplitude"] != "none":
            self.amplitude = NetworkAmplitude(config["amplitude"], channels, config)
        self.kriged = Kriged()
        self.conditioning: Conditioning = self.kriged
        if config["sensors"] == "learned":
            self.conditioning = Learned()
        channels += self.conditioning.channels + fields
        residual = find(ResidualKind, config["residual"], "model.residual")
        self.residual: Residual = residual.build(channels, self.config, self.band)
        self.statistics = Statistics()
        self._scales: dict[float, Tensor] = {}
        #: calls between the knots of noise with memory, of all shells that have such noise
        self.knot_spacings: list[float] = []
        self.library = self._library()
        self.adjustment: Adjustment | None = None
        if config["adjusted"]:
            terms, shells = len(self.library.names), self.band.grid.num_shells
            self.adjustment = Adjustment(terms, shells, noise=config["residual"] != "none")
        self.frame: ResidualCoordinates
        #: closure intervals between snapshots, if memory can be measured from them only;
        #: None if the closure is known to be white in time
        self.recorded_every: float | None = None

    def weight_decay(self, name: str) -> float:
        return self.mean.decay if self.mean and name.startswith("mean.") else 0.0

    def compact(self) -> "CompositeClosure":
        config = dict(self.config)
        acts = {part.name.split(":")[0]: part.acts for part in self.parts() if part.trained}
        small = copy.copy(self)
        small._modules, small.replayed = dict(self._modules), None
        if self.mean is not None and not acts["mean"]:
            config["mean"] = closed_mean(config)
            small.mean = None
        if self.amplitude is not None and not acts["amplitude"]:
            config["amplitude"] = "none"
            small.amplitude = None
        if isinstance(self.residual, Generator) and not acts["residual"]:
            config["residual"] = "gaussian"
            small.residual = Gaussian()
        closed = small.mean is None and small.amplitude is None and "numbers" not in config["mean"]
        if closed and isinstance(small.residual, Gaussian):
            small.statistics = replace(self.statistics, summary_mean=None, summary_std=None)
        small.config = config
        return small

    # ---- closed-form statistics -----------------------------------------------------------------

    def saved_statistics(self, spacing: float | None = None) -> dict[str, Tensor]:
        statistics = self.statistics
        if spacing is not None and statistics.memory_times is not None:
            statistics = replace(statistics, memory_spacing=spacing)
        return statistics.to_tensors()

    def load_statistics(self, tensors: dict[str, Tensor]) -> None:
        self.adopt(Statistics.from_tensors(tensors))

    def adopt(self, statistics: Statistics) -> None:
        """Set the statistics, and rebuild everything that depends on them."""
        self.statistics = s = statistics
        self._scales.clear()
        self.library = self._library(s.library)
        self.kriged.clear()
        if self.mean is not None and s.mean_largest is not None:
            self.mean.farthest = s.mean_largest
        if s.generator_size is None:
            return
        inner = band(self.band.proportional(s.generator_modes), self.length, self.dimensions)
        first = law = plain = StationaryGaussian(inner, s.first_spectrum, s.first_tail)
        if s.law_spectrum is not None:
            law = StationaryGaussian(inner, s.law_spectrum, s.law_tail)
            plain = StationaryGaussian(inner, s.plain_spectrum, s.law_tail)
            self.knots = knot_spacing(s.memory_times, s.memory_spacing or 0.0)
            self.knot_spacings = sorted(set(self.knots[self.knots > 0].tolist()))
        copula = None
        if s.copula_spectrum is not None:
            copula = StationaryGaussian(inner, s.copula_spectrum)
        state_std = None if s.state_spectrum is None else inner.spread(s.state_spectrum.sqrt())
        self.frame = ResidualCoordinates(
            self.band,
            inner,
            self.band.proportional(s.generator_size, 2),
            first,
            law,
            plain,
            state_std,
            s.law_modes,
            s.law_offset,
            s.law_channels,
            s.plain_channels,
            copula,
            s.copula_channels,
        )

    def _library(self, coefficients: Tensor | None = None) -> TermRegression:
        kind = self.config["regression_terms"] if "regression" in self.config["mean"] else "none"
        estimate = self.estimate if self.granted else None
        if kind == "none":
            estimate = None
        features = self.feature_set
        return TermRegression(
            self.band, kind, self.history, self.previous, coefficients, estimate, features
        )

    def estimate(self, w_hat: Tensor) -> Tensor:
        """Compute the estimate of the closure that ``conditions.physics_estimate`` allows."""
        return physics_estimate(w_hat, self.band, **(self.granted or {}))

    @property
    def has_networks(self) -> bool:
        """Whether any part reads the condition channels; a mixture reads summary numbers only."""
        reads = isinstance(self.residual, Generator) and not isinstance(self.residual, Mixture)
        return bool(self.mean or self.amplitude) or reads

    @property
    def guarded(self) -> int:
        largest = self.statistics.target_largest
        return 0 if largest is None else largest.shape[-1]

    @property
    def expected_rescaled(self) -> Tensor | None:
        return self.statistics.target_beyond

    @property
    def score_active(self) -> bool:
        """Whether a generator acts; otherwise it is not evaluated."""
        if not isinstance(self.residual, Generator):
            return False
        gain = self.statistics.score_gain
        return gain is None or acts(gain)

    @property
    def mean_gain(self) -> Tensor | None:
        """Gain (shells,) of the mean's network; None before it is judged.

        It is the gain one call ahead, times the share at which coupled runs are stable.
        """
        return self.statistics.mean_gain_in_use

    @property
    def is_white(self) -> bool:
        """Whether the noise has no memory, because previous closures carry it or it is off."""
        off = self.config.get("noise_memory") == "off" or self.config["residual"] == "none"
        return bool(self.previous) or off

    @property
    def amplitude_share(self) -> float:
        """Share of log D in use; 0 = D is 1."""
        return self.statistics.amplitude_gain or 0.0

    def gain_by_mode(self, shells: Tensor | None, like: Tensor) -> Tensor | None:
        """Expand gains (shells,) of a trained part to modes; None if they are zero everywhere."""
        if shells is None or not acts(shells):
            return None
        places = to_device_cached(self.frame.kept.grid.shell(), like)
        return to_device_cached(shells, like)[..., places]

    def parts(self) -> list[PartReport]:
        s, config = self.statistics, self.config
        out = []
        if "regression" in config["mean"]:
            terms = ", ".join(self.library.active)
            out.append(PartReport("mean: regression", False, bool(terms), (), terms or "no term"))
        if "numbers" in config["mean"]:
            num_terms = 0 if s.numbers_mean is None else int((s.numbers_mean != 0).sum())
            out.append(PartReport("mean: numbers", False, num_terms > 0, (), f"{num_terms} terms"))
        if self.mean is not None:
            out.append(
                self._report_trained(f"mean: {self.mean.kind}", self.mean_gain, s.mean_members)
            )
        if self.amplitude is not None:
            gain = torch.tensor([self.amplitude_share])
            name = f"amplitude: {config['amplitude']}"
            out.append(self._report_trained(name, gain, s.amplitude_members))
        if config["residual"] == "modes":
            out.append(PartReport("Gaussian law by wavevector", False, True))
        elif config["residual"] == "resampled":
            out.append(PartReport("residuals of the training, resampled", False, True))
        elif config["residual"] != "none":
            out.append(PartReport("Gaussian process", False, True))
        if self.sensors_allowed != "none":
            learned = config["sensors"] == "learned"
            acts = self.score_active or not learned
            out.append(PartReport(f"sensors: {config['sensors']}", learned, acts))
        if isinstance(self.residual, Generator):
            name = f"residual: {config['residual']}"
            if isinstance(self.residual, Mixture):
                name += f" of {self.residual.components}"
            out.append(self._report_trained(name, s.score_gain, s.score_members))
            if self.centre_weights is not None:
                out.append(PartReport("residual: centred", False, True))
        if self.adjustment is not None:
            acts = any(bool(weight.any()) for weight in self.adjustment.parameters())
            name = "training through the solver"
            out.append(PartReport(name, True, acts, (), str(self.adjustment) if acts else ""))
        return out

    def _report_trained(self, name: str, gain: Tensor | None, members: float | None) -> PartReport:
        gains = () if gain is None else tuple(gain.flatten().tolist())
        acts = any(gains)
        note = ""
        if not acts:
            note = "not judged yet" if members is None else "no significant gain"
            if members is not None and members < LEAST:
                note = f"judged on {members:.0f} members, needs {LEAST}"
        elif not self.gated:
            note = "not gated"
        return PartReport(name, True, acts, gains, note)

    # ---- conditions from a state ----------------------------------------------------------------

    def frames(
        self, state: Tensor, history: Tensor | None = None, previous: Tensor | None = None
    ) -> Tensor:
        """Stack states and earlier fields as spectra (B, 1 + H + P, ...) in the model's band.

        Args:
            state: (B, n, n), of C channels (B, C, n, n).
            history: earlier states (B, H, n, n) or (B, H, C, n, n).
            previous: previous closures (B, P, n, n).
        """
        if state.dtype not in (torch.float32, torch.float64):
            state = state.float()
        return self.band.to_spectral(self._stack(state, history, previous))

    def frames_hat(
        self, state: Tensor, history: Tensor | None = None, previous: Tensor | None = None
    ) -> Tensor:
        """Stack as :meth:`frames`, from retained spectra of any number of modes."""
        return self.band.resized(self._stack(state, history, previous))

    def _stack(self, state: Tensor, history: Tensor | None, previous: Tensor | None) -> Tensor:
        stack = [state[:, None]]
        for name, key, frames, wanted in (
            ("history", "previous_states", history, self.history),
            ("previous", "previous_closures", previous, self.previous),
        ):
            number = 0 if frames is None else frames.shape[1]
            if number != wanted:
                raise ValueError(
                    f"{name} has {number} frames, this model was built with "
                    f"conditions.{key}={wanted}"
                )
            if frames is not None:
                stack.append(frames.to(state))
        return torch.cat(stack, dim=1)

    def encode(self, frames_hat: Tensor) -> StateConditions:
        """Compute mean, features and amplitude of states; ``frames_hat`` is of :meth:`frames`.

        Trained parts act according to their gain.
        """
        state_hat, moved = frames_hat[:, 0], None
        summary = self.state_numbers(state_hat)
        features = summary.new_zeros(len(state_hat), 0, *[1] * len(self.band.axes))
        if self.has_networks:
            moved = self.advected(frames_hat)
            features = self.features(frames_hat, moved)
        mean_hat = self.library(frames_hat, moved, self._factors())
        by_numbers = self.mean_by_numbers(state_hat)
        if by_numbers is not None:
            mean_hat = mean_hat + by_numbers.to(mean_hat)
        encoding = StateConditions(state_hat, mean_hat, features, summary)
        gain = self.gain_by_mode(self.mean_gain, encoding.features)
        if self.mean is not None and gain is not None:
            correction = self.mean.correction(self.frame, self.mean(self.frame, encoding) * gain)
            correction = self.band.resized(correction)
            mean_hat = encoding.mean_hat + correction.to(encoding.mean_hat.dtype)
            encoding.mean_hat = self.feature_set.projected(mean_hat)
        if self.amplitude is not None and self.amplitude_share:
            encoding.log_amplitude = self.amplitude_share * self.amplitude(encoding)
        return encoding

    def scaled_numbers(self, state_hat: Tensor) -> Tensor:
        """Divide summary numbers of states by their scales; returns (B, 51)."""
        assert self.statistics.numbers_scale is not None
        numbers = self.band.summary(state_hat)
        return numbers / to_device_cached(self.statistics.numbers_scale, numbers)

    def mean_by_numbers(self, state_hat: Tensor) -> Tensor | None:
        """Compute the mean of the largest modes from summary numbers, spectra (B, ...).

        None if the mean has no such part.
        """
        coefficients = self.statistics.numbers_mean
        if coefficients is None:
            return None
        terms = candidates(self.scaled_numbers(state_hat))
        return self.band.place_largest(terms @ to_device_cached(coefficients, terms))

    def _factors(self) -> Tensor | None:
        """Return factors (terms, shells) of the regression's coefficients; None if not trained."""
        if self.adjustment is None:
            return None
        adjustment, library = self.adjustment, self.library
        if self.replayed is None:
            return library.bounded(adjustment().terms)
        return self.replayed.once("factors", lambda: library.bounded(adjustment().terms))

    def state_numbers(self, state_hat: Tensor) -> Tensor:
        """Standardise summary numbers of states, (B, 51); (B, 0) if no network reads them."""
        mean, std, like = self.statistics.summary_mean, self.statistics.summary_std, state_hat.real
        if mean is None or std is None:
            return like.new_zeros(len(like), 0)
        mean, std = to_device_cached(mean, like), to_device_cached(std, like)
        numbers = (self.band.summary(state_hat).flatten(1) - mean) / std
        return numbers.clamp(-BEYOND, BEYOND).to(self._place)

    def advected(self, frames_hat: Tensor) -> Tensor | None:
        """Compute the advection of previous closures; None if not read.

        It is (B, P, ...), of C fields (B, P, C, ...).
        """
        if not self.previous:
            return None
        return self.feature_set.carried(frames_hat[:, 0], frames_hat[:, 1 + self.history :])

    def feature_spectra(self, frames_hat: Tensor, moved: Tensor | None) -> Tensor:
        """Compute spectra (B, F, 2K + 1, K + 1) of features of states and earlier fields."""
        w_hat = frames_hat[:, 0]
        spectra = [self.feature_set.spectra(w_hat)]
        if self.granted:
            spectra.append(self.estimate(w_hat)[:, None])
        spectra.append(frames_hat[:, 1:].flatten(1, -1 - len(self.band.axes)))
        if moved is not None:
            spectra.append(moved.flatten(1, -1 - len(self.band.axes)))
        return torch.cat(spectra, dim=1)

    def features(self, frames_hat: Tensor, moved: Tensor | None) -> Tensor:
        """Compute normalised condition channels (B, C, g, g) on the generator's grid."""
        spectra = self.feature_spectra(frames_hat, moved)
        scale = to_device_cached(self.statistics.features_rms, frames_hat)
        size = self.frame.size
        fields = self.band.to_physical(spectra, size) / self.band.each(scale)
        fields = fields.to(self._place)
        largest = self.statistics.features_largest
        far: Any = FAR
        if largest is not None:
            far = self.band.each(to_device_cached(largest, fields))
        fields = fields.clamp(-far, far)
        places = coordinates(self.frame.points, fields)
        places = places.expand(len(fields), *places.shape)
        return torch.cat([fields, places], dim=1)

    # ---- base noise -----------------------------------------------------------------------------

    def base_noise(self, law: StationaryGaussian, key: keyed_noise.Key, stream: int) -> Tensor:
        """Draw base noise of a law, spectra (ids, ...) complex128."""
        return self.joined(law, self.independent_noise(law, key, stream))

    def independent_noise(
        self, law: StationaryGaussian, key: keyed_noise.Key, stream: int
    ) -> Tensor:
        """Draw base noise as :meth:`base_noise`, with independent channels.

        If the residual has a law by wavevector, the noise is drawn from it. The mean mode is real;
        its imaginary part holds the standard normal by which a mixture chooses a component.
        """
        if self._is_of_residual(law) and isinstance(self.residual, Resampled):
            return self.resampled(key, stream)
        white = keyed_noise.white_fields(
            self.frame.kept, key, stream, self.device, self.channel_shape
        )
        choice = None
        if self._is_of_residual(law) and isinstance(self.residual, Mixture):
            choice = keyed_noise.normals(*key, 1, stream=keyed_noise.STREAM_COMPONENT)[:, 0]
        return self.coloured(law, white, choice)

    def _is_of_residual(self, law: StationaryGaussian) -> bool:
        return law is self.frame.law and law is not self.frame.plain

    def coloured(
        self, law: StationaryGaussian, white: Tensor, choice: Tensor | None = None
    ) -> Tensor:
        """Turn white noise (M, ...) into base noise of a law, with independent channels.

        Args:
            law: the law.
            white: spectra, complex128.
            choice: standard normals (M,) by which a mixture chooses components; else None.
        """
        noise = law.coloured(white)
        is_by_mode = self._is_of_residual(law) and isinstance(self.residual, Modes)
        if is_by_mode and self.frame.factors is not None:
            return apply_factors(to_device_cached(self.frame.factors, noise), noise)
        if choice is not None:
            noise.flatten(1)[:, 0].imag.copy_(choice)
        return noise

    def joined(self, law: StationaryGaussian, noise: Tensor) -> Tensor:
        """Correlate the independent channels of base noise of a law; one field is unchanged."""
        is_plain = law is self.frame.plain and law is not self.frame.law
        if isinstance(self.residual, Resampled) and not is_plain:
            return noise
        factors = self.frame.plain_channels if is_plain else self.frame.channels
        return noise if factors is None else apply_channels(factors, noise)

    def apart(self, q_hat: Tensor) -> Tensor:
        """Remove the correlation of channels from residuals; inverse of :meth:`joined`."""
        factors = self.frame.channels
        return q_hat if factors is None else remove_channels(factors, q_hat)

    def resampled(self, key: keyed_noise.Key, stream: int) -> Tensor:
        """Draw residuals of the training, spectra (ids, ...) complex128, moved at random."""
        archive = self.statistics.law_archive
        assert archive is not None
        stage = f"{key.stage} {stream} {key.item}"
        numbers = keyed_noise.uniforms(key.seed, stage, key.ids, 0)[:, 2]
        rows = (numbers * len(archive)).long()
        moves = keyed_noise.moves(self.frame.kept.grid, key.seed, stage, key.ids)
        drawn = torch.view_as_complex(archive[rows].double().contiguous())
        shape = len(rows), *[1] * len(self.channel_shape), *moves.shape[1:]
        return self.frame.kept.hermitian(drawn * moves.view(shape)).to(self.device)

    def noise_of_call(self, request: Request, law: StationaryGaussian) -> Tensor:
        """Draw the base noise of a call, with the residual's memory if it has any."""
        key = keyed_noise.Key(request.seed, request.stage, request.members, request.call)
        draws, turns = [self.independent_noise(law, key, keyed_noise.STREAM_BASE)], []
        for knots in self.knot_spacings:
            first, cos, sin = position(request.call * request.interval_ratio, knots)
            stream = keyed_noise.STREAM_MEMORY + round(math.log2(knots))
            draws += [
                self.independent_noise(law, key._replace(item=first + i), stream) for i in (0, 1)
            ]
            turns.append((cos, sin))
        return self.noise_of_draws(law, draws, turns)

    def noise_of_draws(
        self, law: StationaryGaussian, draws: Sequence[Tensor], turns: Sequence[Any]
    ) -> Tensor:
        """Assemble the base noise of a call from independent draws, as a function of tensors.

        Args:
            law: law of the draws.
            draws: draws (M, ...): that of the call, and for each of :attr:`knot_spacings` those of
                the knots before and after it.
            turns: (cos, sin) of the call's place between the knots, for each spacing.
        """
        noise = draws[0]
        if turns:
            shell = to_device_cached(self.frame.kept.grid.shell(), noise)
        for number, (knots, (cos, sin)) in enumerate(zip(self.knot_spacings, turns)):
            at_knot, at_next = draws[1 + 2 * number : 3 + 2 * number]
            rows = (self.knots == knots).to(noise.device)[..., shell]
            noise = torch.where(rows, cos * at_knot + sin * at_next, noise)
        noise = self.joined(law, noise)
        if self.adjustment is None:
            return noise
        factor = self.adjustment().noise
        if self.statistics.trajectory_noise is not None:
            factor = factor * to_device_cached(self.statistics.trajectory_noise, factor)
        shell = to_device_cached(self.frame.kept.grid.shell(), factor)
        return noise * factor[shell].to(noise.real)

    def scale_of(self, interval_ratio: float) -> Tensor | None:
        """Compute factors (shells,) of the residual's std for another averaging time.

        They follow from each shell's memory: white shells average out, persistent shells hardly.
        None for the trained interval.
        """
        if interval_ratio == 1:
            return None
        if interval_ratio not in self._scales:
            s = self.statistics
            spacing = s.memory_spacing or 0.0
            rho = torch.exp(-1 / (s.memory_times * spacing).clamp(min=1e-3))
            rho = torch.where(self.knots > 0, rho, 0.0)
            self._scales[interval_ratio] = share_of_mean(rho, interval_ratio).sqrt()
        return self._scales[interval_ratio]

    def _rescale(self, q_hat: Tensor, interval_ratio: float) -> Tensor:
        """Rescale residuals (M, ...) from the trained interval to another averaging time."""
        scale = self.scale_of(interval_ratio)
        return q_hat if scale is None else q_hat * self.frame.each_mode(scale, q_hat)

    # ---- sampling -------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_batch(self, request: Request) -> Tensor:
        """Draw U (members, n, n), see :class:`~hpc_closure.closure.model.ClosureModel`.

        ``method="mean_gp"`` is the baseline of that name: the mean and a stationary Gaussian
        process, with sensors kriged under it, without generator and amplitude.
        """
        frames_hat = self.frames(request.state, request.history, request.previous)
        points = request.state.shape[-self.dimensions :]
        return self.band.to_physical(self._draw(frames_hat, request), points)

    @torch.no_grad()
    def sample_hat(self, request: Request) -> Tensor:
        return self.draw_hat(request)

    def draw_hat(self, request: Request) -> Tensor:
        """Draw as :meth:`sample_hat`, with gradients."""
        caller = band(mode_counts(request.state, self.dimensions), self.length, self.dimensions)
        self.band.check_grid(*caller.points(request.grid or caller.grid.sizes))
        frames_hat = self.frames_hat(request.state, request.history, request.previous)
        u_hat = self._draw(frames_hat, request)
        # without a transform the column ky = 0 need not be that of a real field
        return caller.hermitian(caller.resized(u_hat))

    def _draw(self, frames_hat: Tensor, request: Request) -> Tensor:
        """Draw spectra of U (members, ...) in the model's band."""
        sensors, baseline = request.sensors, request.method == MEAN_GP
        if sensors is not None:
            self._check_sensors(sensors, baseline)
        if sensors is None and self.sensors_allowed == "required":
            raise ValueError(
                "this model was trained with conditions.sensors=required: pass "
                "sensors=Sensors(values, positions)"
            )
        if sensors is not None and self.sensors_allowed == "none":
            raise ValueError(
                "this model was trained with conditions.sensors=none: pass sensors=None"
            )
        effort = SamplerSettings(request.method, request.evaluations)
        how = Drawing(request.interval_ratio, len(request.members), baseline, effort)
        if self.config["residual"] == "none" and not baseline:
            inputs: tuple[Tensor, ...] = (frames_hat,)
        else:
            inputs = frames_hat, self.noise_of_call(request, self._law(how))
        if sensors is None:
            drawn, beyond = self.draw_without_sensors(how, *inputs)
        else:
            drawn, beyond = self._draw_with_sensors(how, request, *inputs)
        self._num_rescaled = beyond.any(-1).sum() + self._num_rescaled.to(beyond.device)
        if request.on_rescaled is not None and self.guarded:
            request.on_rescaled(beyond)
        return drawn

    def _check_sensors(self, sensors: Sensors, baseline: bool) -> None:
        """Raise ValueError unless the readings have the sides and fields of this model."""
        sides, fields = sensors.positions.shape[-1], self.channel_shape
        if sides != self.dimensions:
            raise ValueError(
                f"sensor positions have {sides} coordinates, this model's flow has "
                f"{self.dimensions} dimensions: expected (S, {self.dimensions})"
            )
        if fields and sensors.values.shape[-2:-1] != fields:
            raise ValueError(
                f"sensor values have shape {tuple(sensors.values.shape)}, expected (..., "
                f"{fields[0]}, S): every sensor reads all fields of the state"
            )
        if (fields or sides != 2) and self.score_active and not baseline:
            raise ValueError(
                f"a model with residual {self.config['residual']} is conditioned on sensors only "
                "for one field in two dimensions: pass sensors=None"
            )

    def draw_without_sensors(self, how: Drawing, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Draw closures without sensors, as a function of tensors, and mark rescaled shells.

        Args:
            how: all settings that the draw depends on.
            inputs: stacked states, and base noise unless the residual is none.
        """

        def function(frames_hat: Tensor, z: Tensor | None = None) -> tuple[Tensor, ...]:
            return self._closures(self._encoding(frames_hat, how), how, z)

        if self.replayed is None or not inputs[0].is_cuda or torch.is_grad_enabled():
            return function(*inputs)
        return self.replayed(function, how, *inputs)

    def _draw_with_sensors(
        self, how: Drawing, request: Request, frames_hat: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        encoding, observed = self._encoding(frames_hat, how), None
        if z is not None:
            law = self._law(how)
            conditioning = self.kriged if how.baseline else self.conditioning
            assert request.sensors is not None
            scale = self.scale_of(how.interval_ratio)
            observed = conditioning.observe(self.frame, encoding, request.sensors, scale, law)
            key = keyed_noise.Key(request.seed, request.stage, request.members, request.call)
            z = observed.condition(z, key)
        return self._closures(encoding, how, z, observed)

    def _law(self, how: Drawing) -> StationaryGaussian:
        return self.frame.plain if how.baseline else self.frame.law

    def _encoding(self, frames_hat: Tensor, how: Drawing) -> StateConditions:
        encoding = self.encode(frames_hat)
        return replace(encoding, log_amplitude=None) if how.baseline else encoding

    def _closures(
        self,
        encoding: StateConditions,
        how: Drawing,
        z: Tensor | None,
        observed: Observed | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Turn base noise into closures, or return means without it, and mark rescaled shells."""
        if z is None:
            drawn, beyond = self._rescale_into_range(encoding.mean_hat)
            return each_member(drawn, how.members), each_member(beyond, how.members)
        if self.score_active and not how.baseline:
            made = self.generate(encoding, z, observed, how.effort)
            q_hat = made.rescaled(self._rescale, how.interval_ratio)
        else:
            q_hat = self._rescale(z, how.interval_ratio)
        if observed is not None and observed.mean is not None:
            q_hat = q_hat + self._rescale(
                for_members(observed.mean, how.members), how.interval_ratio
            )
        mean_hat = for_members(encoding.mean_hat, how.members)
        q_hat = q_hat.to(mean_hat.dtype)
        u_hat = mean_hat + self.frame.amplify(q_hat, encoding.log_amplitude)
        return self._rescale_into_range(self.feature_set.projected(u_hat))

    def _rescale_into_range(self, u_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Rescale shells of closures (B, ...) that exceed nearly all of the training closures.

        If a model reads previous closures, these may grow from call to call in a flow unlike the
        training flows. A closure limited to the edge of the range would stay there and accelerate
        the flow. Therefore a shell beyond the range is rescaled to its mean size, from which it
        follows the flow again. The second value, (B, shells) bool, marks these shells;
        ``num_rescaled`` counts the draws.
        """
        far, factor = self.beyond(u_hat)
        if not self.guarded:
            return u_hat, far
        places = to_device_cached(self.band.grid.shell(), factor)
        return u_hat * factor[..., places].to(u_hat.real), far

    def beyond(self, u_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Mark shells of closures beyond the range, (B, shells), with factors to rescale them.

        The factors are (B, shells), of C fields (B, C, shells). A shell of several fields is
        marked if one of them is beyond its own range, and only this field is rescaled; the
        components of a vector are one field here, so a vector without divergence stays without.
        Without a range both are (B, 0).
        """
        largest, mean = self.statistics.target_largest, self.statistics.target_mean
        if largest is None or mean is None:
            none = torch.zeros(len(u_hat), 0, dtype=torch.bool, device=u_hat.device)
            return none, none
        shell = self.shell_power(u_hat)
        largest, mean = to_device_cached(largest, shell), to_device_cached(mean, shell)
        least = NOTHING * mean.sum(-1, keepdim=True)  # shell 0 has round-off only
        far = shell > torch.maximum(largest, least)
        size = torch.where(far, shell, 1.0)
        factor = torch.where(far, torch.maximum(mean, least) / size, 1.0).sqrt()
        if not self.channel_shape:
            return far, factor
        return far.any(1), factor[:, self.whole]

    @property
    def has_range(self) -> bool:
        return self.statistics.state_least is not None

    def beyond_training(self, state_hat: Tensor) -> Tensor | None:
        least, largest = self.statistics.state_least, self.statistics.state_largest
        if least is None or largest is None:
            return None
        shell = self.shell_power(self.band.resized(state_hat))
        least, largest = to_device_cached(least, shell), to_device_cached(largest, shell)
        floor = NOTHING * largest.sum(-1, keepdim=True)  # round-off has no range
        above = shell > (1 + SINGLE) * torch.maximum(largest, floor)
        out = above | ((shell < (1 - SINGLE) * least) & (least > floor))
        return out.any(1) if self.channel_shape else out

    def shell_power(self, u_hat: Tensor) -> Tensor:
        """Compute the power of each shell of closures or states, (B, shells).

        Of C fields it is (B, F, shells), where the components of a vector are one of F fields.
        """
        power = self.band.grid.shell_sum(u_hat.abs().square())
        if not self.channel_shape:
            return power
        out = power.new_zeros(len(power), max(self.whole) + 1, power.shape[-1])
        return out.index_add_(1, torch.tensor(self.whole, device=power.device), power)

    def generate(
        self,
        encoding: StateConditions,
        z: Tensor,
        observed: Observed | None = None,
        effort: SamplerSettings = SamplerSettings(),
    ) -> Drawn:
        """Transform base noise z (M, ...) into residuals minus their kriged mean.

        Args:
            encoding: conditions from the states.
            z: base noise.
            observed: information of sensors.
            effort: settings of the sampler.
        """
        information = observed or Observed(self.conditioning.absent(self.frame, encoding.features))
        gains = [] if information.gain is None else [(None, information.gain)]
        conditions = self.posterior(encoding, information, gains)
        if not self.score_active:
            return Drawn(z)
        shells = self.gain_by_mode(self.statistics.score_gain, z)
        if shells is None:  # not judged yet
            shells = torch.ones((), device=z.device)
        drawn = self.residual.draw(self.frame, conditions, z, shells, effort)
        # the spread was calibrated for the model's sampler settings, without sensors
        is_default = effort in (
            SamplerSettings(),
            SamplerSettings(self.config["method"], self.config["function_evaluations"]),
        )
        spread = self.gain_by_mode(self.statistics.score_spread, z)
        if spread is None or observed is not None or not is_default:
            spread = torch.ones((), device=z.device)
        q_hat = drawn.spread(spread)
        mean_hat = self.centre_of(encoding) if observed is None and is_default else None
        if mean_hat is None:
            return replace(drawn, q=q_hat)
        return Drawn(q_hat - for_members(mean_hat, len(q_hat)))

    @property
    def centre_weights(self) -> list[Tensor] | None:
        """Weights of the perceptron for the mean of the generator's draws; None if none acts."""
        s = self.statistics
        if s.centre_inner is None or s.centre_middle is None or s.centre_outer is None:
            return None
        return [s.centre_inner, s.centre_middle, s.centre_outer]

    def centre_of(self, encoding: StateConditions) -> Tensor | None:
        """Return the mean (B, ...) of the generator's draws, spectra of q; None for zero."""
        weights, numbers = self.centre_weights, encoding.summary
        if weights is None:
            return None
        largest = centre.mean_of(
            [to_device_cached(weight, numbers) for weight in weights], numbers
        )
        largest = largest.unflatten(1, (*self.channel_shape, -1))
        return self.frame.kept.place_largest(largest)

    def posterior(
        self, encoding: StateConditions, information: Observed | TrainingObserved, gains: list
    ) -> GeneratorConditions:
        """Assemble the inputs of a generator: features, information of sensors, log D."""
        fields = information.fields
        features, log = encoding.features, encoding.log_amplitude
        if isinstance(self.residual, (Mixture, PointMixture)):
            return GeneratorConditions(features, encoding.summary, gains, information.readings)
        if log is None:
            log = features.new_zeros(1, *self.channel_shape, *self.frame.points)
        log = log if self.channel_shape else log[:, None]
        parts = (features, fields, log.to(features))
        count = max(map(len, parts))
        channels = torch.cat([part.expand(count, *part.shape[1:]) for part in parts], dim=1)
        white = None
        if isinstance(self.conditioning, Learned):
            white = self.frame.whiten_state(encoding.state_hat)
        return GeneratorConditions(channels, encoding.summary, gains, information.readings, white)
