r"""Random part of an exact law of the closure: the mean of the noise over an interval.

There is a class for each kind of noise. With :math:`q \sim N(0, \beta^2 Q / m)`, the mean of
:math:`\beta\xi` over m steps, and P the cut to the solver's modes, the fluctuation is

* :class:`Homogeneous`: q;
* :class:`Shaped`: :math:`P(D q)`, :math:`D = 1 + c|w|/\mathrm{rms}(w)`: Gaussian with a
  state-dependent covariance :math:`P D Q D P`;
* :class:`Mixed`: :math:`b_1 q + a\phi` with probability p(w), else :math:`b_2 q - a\phi`.

Point sensors condition each of them exactly: by kriging under Q; by kriging under :math:`PDQDP`,
separately for each state; by Bayes' rule for the regime, with the likelihood of the readings in
each, and kriging within the regime.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.sensors import Sensors
from hpc_closure.closure.gaussian.kriging import NUGGET, Kriging, StationaryGaussian
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.noise.draws import NoiseModel
from hpc_closure.spectral.noise.laws import Noise
from hpc_closure.spectral.noise.state_dependent import Amplitude, Regimes

CHUNK = 64  # modes whose fields are in memory at a time


@dataclass(frozen=True)
class Seen:
    """Innovations: readings minus the removed term.

    Attributes:
        sensors: the readings, with their layout.
        beyond: (B, S) float64, readings minus the removed term.
    """

    sensors: Sensors
    beyond: Tensor

    @property
    def error_variance(self) -> Tensor:
        """Variance of the sensors' errors, (S,) float64."""
        number = len(self.sensors.positions)
        return torch.full((number,), self.sensors.noise_std**2, dtype=torch.float64)

    def errors(self, key: keyed_noise.Key) -> Tensor | float:
        """Draw the sensors' errors, (B, S); 0.0 if the sensors are exact."""
        if not self.sensors.noise_std:
            return 0.0
        return keyed_noise.normals(*key, len(self.sensors.positions)) * self.sensors.noise_std


class Homogeneous:
    """Fluctuation q: state-independent noise.

    Args:
        law: law of q.
        model: the noise on the grid of the states.
        transform: transform of that grid.
    """

    #: whether the fluctuation is Gaussian with one covariance for all states
    homogeneous = True

    def __init__(self, law: StationaryGaussian, model: NoiseModel, transform: Transform):
        self.law, self.band, self.model, self.transform = law, law.band, model, transform
        self._kriging: tuple[tuple, list[Kriging]] | None = None  # key and gains of last layout

    @staticmethod
    def refusal(noise: Noise, dt: float, interval: int) -> str | None:
        """Return why no law is known for this interval; None if one is."""
        return None

    def mean_hat(self, w_hat: Tensor, seen: Seen | None) -> Tensor:
        """Compute spectra (B, 2K + 1, K + 1) of the mean given states and innovations."""
        if seen is None:
            return torch.zeros_like(w_hat)
        return self.kriging(seen)[0].field(seen.beyond)

    def draw_hat(
        self, w_hat: Tensor, keys: Sequence[keyed_noise.Key], seen: Seen | None
    ) -> list[Tensor]:
        """Draw, for each key, a fluctuation per state; spectra (B, 2K + 1, K + 1)."""
        drawn = [self.noise(key) for key in keys]
        if seen is None:
            return drawn
        kriging, known = self.kriging(seen)[0], self.mean_hat(w_hat, seen)
        pairs = zip(keys, drawn)
        return [known + kriging.remove(noise, _tensor(seen.errors(key))) for key, noise in pairs]

    def variance_at(self, w_hat: Tensor) -> Tensor:
        """Compute the pointwise variance given states, without sensors, (B, n, n)."""
        size = self.transform.grid.size
        return torch.full((len(w_hat), size, size), self.law.variance, dtype=torch.float64)

    def noise(self, key: keyed_noise.Key) -> Tensor:
        """Draw spectra (len(key.ids), 2K + 1, K + 1) of q."""
        return self.law.coloured(keyed_noise.white_spectra(self.band, *key))

    def kriging(self, seen: Seen) -> list[Kriging]:
        """Return each component's kriging for the sensors' layout; caches the last layout."""
        if self._kriging is None or self._kriging[0] != seen.sensors.key:
            positions, error = seen.sensors.positions, seen.error_variance
            made = [Kriging(law, positions, error) for law in self.components]
            self._kriging = seen.sensors.key, made
        return self._kriging[1]

    @property
    def components(self) -> list[StationaryGaussian]:
        """Gaussian laws of which the fluctuation is a mixture."""
        return [self.law]


class Shaped(Homogeneous):
    """Fluctuation P(D q): noise times a state-dependent field."""

    homogeneous = False

    def __init__(self, law, model, transform):
        super().__init__(law, model, transform)
        response = model.response([0])
        assert isinstance(response, Amplitude)
        self.response = response

    def factor(self, w_hat: Tensor) -> Tensor:
        """Compute D, (B, n, n)."""
        return self.response.factor(w_hat, self.transform)

    def product(self, factor: Tensor, q_hat: Tensor) -> Tensor:
        """Compute spectra of P(D q)."""
        return self.transform.to_spectral(factor * self.transform.to_physical(q_hat))

    def mean_hat(self, w_hat, seen):
        if seen is None:
            return torch.zeros_like(w_hat)
        out = []
        for row, factor in enumerate(self.factor(w_hat)):
            posterior = ShapedKriging(self, factor, seen)
            out.append(self.product(factor, posterior.field(seen.beyond[row])))
        return torch.stack(out)

    def draw_hat(self, w_hat, keys, seen):
        factor, drawn = self.factor(w_hat), [self.noise(key) for key in keys]
        if seen is not None:
            errors = [seen.errors(key) for key in keys]
            for row, one in enumerate(factor):
                posterior = ShapedKriging(self, one, seen)
                for noise, error in zip(drawn, errors):
                    off = error if isinstance(error, float) else error[row]
                    values = posterior.at_sensors(noise[row]) + off
                    noise[row] += posterior.field(seen.beyond[row] - values)
        return [self.product(factor, noise) for noise in drawn]

    def variance_at(self, w_hat):
        factor, modes = self.factor(w_hat), self._modes()
        out = torch.zeros_like(factor)
        for start in range(0, len(modes), CHUNK):
            fields = self.transform.to_physical(modes[start : start + CHUNK])
            for row, one in enumerate(factor):
                cut = self.transform.to_physical(self.transform.to_spectral(one * fields))
                out[row] += cut.square().sum(0)
        return out

    def _modes(self) -> Tensor:
        """Compute spectra of f_j, sines and cosines with q = sum z_j f_j, z_j standard normal."""
        std, draws_of = self.model.std, self.model.draws
        scale = (self.law.variance / self.law.band.variance(self._full())) ** 0.5
        unit = torch.eye(len(std) + 1, dtype=torch.complex128)[:-1].numpy()
        real = draws_of.place(unit * (std[:, None] * scale * 0.5**0.5))
        imaginary = draws_of.place(1j * unit * (std[:, None] * scale * 0.5**0.5))
        both = self.model.spread(real), self.model.spread(imaginary)
        modes = torch.cat(both)
        return modes[modes.abs().amax((-2, -1)) > 0]

    def _full(self) -> Tensor:
        """Compute the spectrum (groups,) of one step's noise."""
        return self.band.by_group(self.model.std_hat**2) / self.band.group_size


class ShapedKriging:
    """Conditioning of q on point values of P(D q), for one state.

    Sensor s reads :math:`\\langle D\\kappa_s, q\\rangle`, with :math:`\\kappa_s` the band-limited
    delta function at its position. This is
    :class:`~hpc_closure.closure.gaussian.kriging.Kriging` with :math:`D\\kappa_s` in place of
    :math:`\\kappa_s`.

    Args:
        shaped: the law.
        factor: D, (n, n).
        seen: layout and errors of the sensors.
    """

    def __init__(self, shaped: Shaped, factor: Tensor, seen: Seen):
        law, band, transform = shaped.law, shaped.band, shaped.transform
        phases = band.phases(seen.sensors.positions).unflatten(-1, (*band.shape, 2))
        delta = transform.to_physical(torch.view_as_complex(phases.contiguous()))
        functionals = torch.view_as_real(transform.to_spectral(factor * delta)).flatten(1)
        variance = band.spread(law.spectrum).flatten().repeat_interleave(2)
        self._drawn = variance > 0
        self._functionals, self._variance = functionals[:, self._drawn], variance[self._drawn]
        weights = band.weights.flatten().repeat_interleave(2)[self._drawn]
        self._weighted = self._functionals * weights
        covariance = (self._weighted * self._variance) @ self._functionals.T
        matrix = covariance + torch.diag(seen.error_variance + NUGGET * law.variance)
        factorised, info = torch.linalg.cholesky_ex(matrix)
        if int(info):  # coincident sensors, or more exact sensors than modes; as in Kriging
            number = len(matrix)
            more = 1e-8 * law.variance * torch.eye(number, dtype=torch.float64)
            factorised = torch.linalg.cholesky(matrix + more)
        self.factor, self.shape = factorised, band.shape

    def at_sensors(self, q_hat: Tensor) -> Tensor:
        """Compute readings (S,) of a q, spectrum (2K + 1, K + 1)."""
        return self._weighted @ torch.view_as_real(q_hat).flatten()[self._drawn]

    def field(self, values: Tensor) -> Tensor:
        """Compute the posterior mean of q, spectrum (2K + 1, K + 1), given readings (S,)."""
        alpha = torch.cholesky_solve(values[:, None], self.factor)[:, 0]
        pairs = torch.zeros(len(self._drawn), dtype=torch.float64)
        pairs[self._drawn] = self._variance * (alpha @ self._functionals)
        return torch.view_as_complex(pairs.unflatten(-1, (*self.shape, 2)))


class Mixed(Homogeneous):
    """Mixture of two regimes: b_1 q + a phi with probability p(w), else b_2 q - a phi."""

    homogeneous = False

    def __init__(self, law, model, transform):
        super().__init__(law, model, transform)
        response = model.response([0])
        assert isinstance(response, Regimes)
        self.response = response
        self.pattern = torch.zeros(self.band.shape, dtype=torch.complex128)
        self.pattern[[1, -1], 0] = response.pattern
        self._components = [
            StationaryGaussian(self.band, law.spectrum * size**2)
            for size in response.law.amplitudes
        ]

    @staticmethod
    def refusal(noise, dt, interval):
        steps = noise.steps(dt)
        if interval == steps:
            return None
        return f"interval={interval} steps; a regime lasts physics.noise.hold, {steps} steps"

    @property
    def components(self):
        return self._components

    def probability(self, w_hat: Tensor, seen: Seen | None = None) -> Tensor:
        """Compute P(first regime | states, sensors), (B,)."""
        odds = torch.from_numpy(self.response.log_odds(w_hat.numpy()))
        if seen is not None:
            one, two = (
                _log_likelihood(kriging, values)
                for kriging, values in zip(self.kriging(seen), self._beyond(seen))
            )
            odds = odds + one - two
        return torch.sigmoid(odds)

    def mean_hat(self, w_hat, seen):
        first = self.probability(w_hat, seen)[:, None, None]
        if seen is None:
            return (2 * first - 1) * self.pattern
        one, two = self._centres(seen)
        return first * one + (1 - first) * two

    def draw_hat(self, w_hat, keys, seen):
        probability = self.probability(w_hat, seen)
        if seen is None:
            centres = [self.pattern, -self.pattern]
        else:
            centres = self._centres(seen)
        out = []
        for key in keys:
            noise, errors = self.noise(key), None if seen is None else _tensor(seen.errors(key))
            drawn = []
            for number, (size, centre) in enumerate(zip(self.response.law.amplitudes, centres)):
                one = size * noise
                if seen is not None:
                    one = self.kriging(seen)[number].remove(one, errors)
                drawn.append(one + centre)
            first = keyed_noise.uniforms(*key, 1)[:, 0] < probability
            out.append(torch.where(first[:, None, None], *drawn))
        return out

    def variance_at(self, w_hat):
        first = self.probability(w_hat)[:, None, None]
        one, two = self.response.law.amplitudes
        wave = self.transform.to_physical(self.pattern)
        within = (first * one**2 + (1 - first) * two**2) * self.law.variance
        return within + 4 * first * (1 - first) * wave**2

    def _beyond(self, seen: Seen) -> list[Tensor]:
        """Compute readings minus removed term minus pattern, in each regime."""
        wave = self.band.values(self.pattern, seen.sensors.positions)
        return [seen.beyond - wave, seen.beyond + wave]

    def _centres(self, seen: Seen) -> list[Tensor]:
        """Compute the posterior mean in each regime."""
        krigings, values = self.kriging(seen), self._beyond(seen)
        patterns = (self.pattern, -self.pattern)
        return [wave + one.field(off) for wave, one, off in zip(patterns, krigings, values)]


def _tensor(errors: Tensor | float) -> Tensor | None:
    return None if isinstance(errors, float) else errors


def _log_likelihood(kriging: Kriging, values: Tensor) -> Tensor:
    """Compute the log density (B,) of readings (B, S) under a component, up to a constant."""
    half = torch.linalg.solve_triangular(kriging.factor, values.T, upper=False)
    return -0.5 * half.square().sum(0) - kriging.factor.diagonal().log().sum()


#: fluctuation by kind of noise, where the law is known
FLUCTUATIONS: dict[str, type[Homogeneous]] = {
    "q_wiener": Homogeneous,
    "ring": Homogeneous,
    "state_amplitude": Shaped,
    "two_regimes": Mixed,
}
