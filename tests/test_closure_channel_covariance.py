"""A covariance across channels for every wavevector: estimated, chosen, and drawn."""

import math

import pytest
import torch

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.gaussian.channel_covariance import (
    ChannelCovariance,
    Grouping,
    apply_channels,
    coherence,
    covariance,
    remove_channels,
)
from hpc_closure.closure.reductions import Reader

B = band(5)
NOBODY = Reader([])
LAYERS = ("pseudo-scalar", "pseudo-scalar")
VECTOR = ("vector x", "vector y")
PHASE = math.radians(60)
SPECTRUM = (1.0 + B.grid.integer_k2.double()) ** -1.5


def white(channels, number, start=0, of=B):
    """White noise (number, channels, modes) of real fields."""
    ids = range(start, start + number)
    draws = [keyed_noise.white_spectra(of, 0, "test", ids, item) for item in range(channels)]
    return torch.stack(draws, dim=1)


def layers(number, start=0, turned=PHASE, shared=0.8):
    """Draws of two layers with a coherence ``shared`` and a phase odd in kx."""
    first, second = white(2, number, start).unbind(1)
    phase = turned * torch.sign(B.grid.integer_kx.double()).expand(B.shape)
    second = shared * torch.exp(-1j * phase) * first + (1 - shared**2) ** 0.5 * second
    return torch.stack([first, 2 * second], dim=1) * SPECTRUM.sqrt()


def solenoidal(number, start=0, scale=None):
    """Velocities (number, 2, modes) of stream functions times ``scale`` (2K + 1, K + 1)."""
    psi = white(1, number, start)[:, 0] * SPECTRUM * (1.0 if scale is None else scale)
    kx, ky = B.grid.integer_kx, B.grid.integer_ky
    return torch.stack([-1j * ky * psi, 1j * kx * psi], dim=1)


def mean_square(q_hat):
    return q_hat.abs().square().mean(0)


def estimated(q_hat, kinds, members=None, variance=None):
    """Statistics, factors and variances that snapshots give."""
    statistics = ChannelCovariance(B, kinds)
    statistics.add(q_hat, members)
    variance = mean_square(q_hat) if variance is None else variance
    return statistics, statistics.factors(NOBODY, variance), variance


def moments(q_hat):
    return torch.einsum("bixy,bjxy->ijxy", q_hat, q_hat.conj()) / len(q_hat)


def angle_apart(first, second):
    return torch.angle(torch.exp(1j * (first - second))).abs()


def test_layers_have_the_coherence_and_the_phase_of_their_exact_law():
    statistics, factors, variance = estimated(layers(3000), LAYERS)
    assert statistics.grouping == "zonal"
    size, phase = (one[0, 1] for one in coherence(covariance(factors, variance)))
    sign = torch.sign(B.grid.integer_kx.double()).expand(B.shape)
    away = torch.ones(B.shape, dtype=torch.bool)
    away[0, 0] = False  # one real number per snapshot: half of the others' precision
    assert float((size - 0.8).abs()[away].max()) < 0.03
    assert float(angle_apart(phase, PHASE * sign)[away].max()) < math.radians(3)
    assert float((size - 0.8).abs()[0, 0]) < 0.05 and float(phase[0, 0]) == 0


def is_of_real_fields(factors):
    """Whether F(-k) is exactly the conjugate of F(k)."""
    real, imaginary = factors[..., 0]
    return (
        torch.equal(real[..., 6:], real[..., 1:6].flip(-1))
        and torch.equal(imaginary[..., 6:], -imaginary[..., 1:6].flip(-1))
        and not imaginary[..., 0].any()
    )


def test_draws_have_the_covariance_and_are_real_fields():
    q_hat = layers(2000)
    variance = B.spread(B.by_group(mean_square(q_hat)) / B.group_size)
    _, factors, _ = estimated(q_hat, LAYERS, variance=variance)
    assert is_of_real_fields(factors)
    drawn = apply_channels(factors, variance.sqrt() * white(2, 4000, 10_000))
    assert torch.allclose(drawn[:, :, 6:, 0], drawn[:, :, 1:6, 0].flip(-1).conj(), atol=1e-12)
    s, seen = covariance(factors, variance), moments(drawn)
    scale = torch.diagonal(s, dim1=0, dim2=1).real.sqrt().movedim(-1, 0)
    error = ((seen - s) / (scale[:, None] * scale)).abs()
    assert float(error.max()) < 5 * (2 / 4000) ** 0.5  # the mean is real: twice the variance
    assert float(error.square().mean().sqrt()) < 1.2 * 4000**-0.5
    assert not factors[:, 0, 1].any()  # lower triangular


def test_independent_isotropic_channels_have_no_finer_grouping():
    for number in (200, 4000):
        q_hat = white(2, number) * SPECTRUM.sqrt()
        assert estimated(q_hat, LAYERS)[0].grouping == "isotropic"
        statistics, factors, variance = estimated(q_hat, ("scalar", "pseudo-scalar"))
        assert statistics.grouping == "isotropic"
        assert not covariance(factors, variance)[0, 1].any()


def test_a_scalar_and_a_pseudo_scalar_that_are_alike_lack_reflection():
    q_hat = layers(1000, turned=0.0)
    statistics, factors, variance = estimated(q_hat, ("scalar", "pseudo-scalar"))
    assert statistics.grouping == "isotropic_handed"
    size, phase = coherence(covariance(factors, variance))
    assert float((size[0, 1] - 0.8).abs().max()) < 0.05 and not phase[0, 1].any()


def test_a_single_wave_that_is_coherent_has_a_matrix_of_its_own():
    q_hat = white(2, 3000) * SPECTRUM.sqrt()
    wave = q_hat[:, 0, 2, 3].clone()
    q_hat[:, 1, 2, 3] = 0.9 * 1j * wave + (1 - 0.9**2) ** 0.5 * q_hat[:, 1, 2, 3]
    q_hat[:, :, :, 0] += 1e-6j  # round-off that no real field has
    statistics, factors, variance = estimated(q_hat, LAYERS)
    assert is_of_real_fields(factors)
    assert statistics.grouping == "mode" and statistics.chosen.towards == "isotropic"
    assert statistics.chosen.earlier > 0
    size, phase = coherence(covariance(factors, variance))
    # shrinkage that serves the other modes costs this one some coherence
    assert 0.6 < float(size[0, 1, 2, 3]) < 0.95
    assert float(phase[0, 1, 2, 3]) == pytest.approx(-math.pi / 2, abs=0.05)
    assert float(size[0, 1, -2, 3]) < 0.1


def divergence(q_hat):
    """Rms divergence over the rms of the gradient."""
    kx, ky, weights = B.grid.integer_kx, B.grid.integer_ky, B.weights
    along = (kx * q_hat[:, 0] + ky * q_hat[:, 1]).abs().square() * weights
    gradient = q_hat.abs().square().sum(1) * B.grid.integer_k2 * weights
    return float((along.sum() / gradient.sum()).sqrt())


SHEARED = 1.0 + 0.5 * torch.sign(B.grid.integer_ky - B.grid.integer_kx.abs())


@pytest.mark.parametrize("number", [60, 3000])
@pytest.mark.parametrize("scale, grouping", [(None, "isotropic"), (SHEARED, "zonal")])
def test_a_solenoidal_vector_stays_solenoidal(scale, grouping, number):
    q_hat = solenoidal(number, scale=scale)
    q_hat[:, :, 0, 0] = 0.3 * white(2, number, 60_000)[:, :, 0, 0]
    # single precision of the data, and one variance per |k|^2
    variance = B.spread(B.by_group(mean_square(q_hat)) / B.group_size)
    q_hat = (q_hat + 1e-7 * white(2, number, 50_000)).to(torch.complex64)
    statistics, factors, _ = estimated(q_hat, VECTOR, variance=variance)
    if number == 3000:
        assert statistics.grouping == grouping
    z = variance.sqrt() * white(2, 2000, 10_000)
    assert divergence(z) > 0.5
    drawn = apply_channels(factors, z)
    assert divergence(drawn) < 1e-12
    assert divergence(apply_channels(factors, z.to(torch.complex64))) < 1e-6
    if number == 3000:
        power, truth = (B.by_group(mean_square(one).sum(0).double()) for one in (drawn, q_hat))
        assert torch.allclose(power, truth, rtol=0.15)
        ratio = mean_square(drawn)[1, 1, 4] / mean_square(drawn)[0, 4, 1]  # turned by 90 degrees
        want = 1.0 if scale is None else 9.0
        assert float(ratio) == pytest.approx(want, rel=0.2)
    again = apply_channels(factors, remove_channels(factors, drawn))
    assert torch.allclose(again, drawn, atol=1e-12)


def test_a_vector_keeps_its_tie_to_a_scalar():
    # a temperature proportional to the divergence, and a rotational rest
    t, psi, noise = white(3, 3000).unbind(1)
    kx, ky = B.grid.integer_kx, B.grid.integer_ky
    size = B.grid.integer_k2.double().clamp(min=1).sqrt()
    phi = 0.6 * t + 0.8 * noise
    u, v = (-1j * (kx * phi + ky * psi) / size, -1j * (ky * phi - kx * psi) / size)
    q_hat = torch.stack([t, u, v], dim=1)
    q_hat[:, :, 0, 0] = white(3, 3000, 5000)[:, :, 0, 0]
    q_hat = q_hat.to(torch.complex128)
    statistics, factors, variance = estimated(q_hat, ("scalar", *VECTOR))
    assert statistics.grouping == "isotropic"
    assert not covariance(factors, variance)[0, 1:, 0, 0].any()  # a mean flow has a direction
    drawn = apply_channels(factors, variance.sqrt() * white(3, 3000, 20_000))
    along = 1j * (kx * drawn[:, 1] + ky * drawn[:, 2]) / size
    product = (along * drawn[:, 0].conj()).mean(0)
    far = B.grid.integer_k2 > 0
    assert float((product - 0.6)[far].abs().max()) < 5 * 3000**-0.5
    assert float(product[far].mean().real) == pytest.approx(0.6, abs=0.01)
    z = remove_channels(factors, drawn)
    assert torch.allclose(z, variance.sqrt() * white(3, 3000, 20_000))


def test_channels_that_are_not_drawn_are_the_identity():
    variance = mean_square(layers(500))
    variance[1, 2, 3] = 0.0
    _, factors, _ = estimated(layers(500), LAYERS, variance=variance)
    eye = torch.eye(2).double()
    assert torch.equal(factors[0, 1, :, 2, 3], eye[1])
    assert torch.equal(factors[0, :, 1, 2, 3], eye[1])
    s = covariance(factors, variance)[:, :, 2, 3].real
    assert float(s[0, 0]) == pytest.approx(float(variance[0, 2, 3]), rel=0.2) and s[1, 1] == 0
    q_hat = solenoidal(500)
    truth = mean_square(q_hat)
    variance = truth.clone()
    variance[0, 2, 3] = 0.0
    _, factors, _ = estimated(q_hat, VECTOR, variance=variance)
    assert torch.isfinite(factors).all()
    s = covariance(factors, variance).real
    for row, column in ((3, 0), (2, 3)):  # u has no variance at ky = 0
        assert torch.equal(factors[0, 0, :, row, column], eye[0])
        want = pytest.approx(float(truth[1, row, column]), rel=0.2)
        assert float(s[1, 1, row, column]) == want


def test_independent_components_of_equal_variance_are_left_as_they_are():
    q_hat = white(2, 2000) * SPECTRUM.sqrt()
    _, factors, _ = estimated(q_hat, VECTOR)
    eye = torch.eye(2).double()[..., None, None]
    assert float((factors[0] - eye).abs().max()) < 0.1 and float(factors[1].abs().max()) < 0.1


def test_removal_inverts_application_and_both_differentiate():
    _, factors, variance = estimated(layers(500), LAYERS)
    z = variance.sqrt() * white(2, 6).reshape(3, 2, 2, *B.shape)
    for unit in (1.0, 1e9):  # channels may be in units far apart
        scaled = factors.clone()
        scaled[:, 1, 0] *= unit
        z[..., 1, :, :] *= unit
        assert torch.allclose(remove_channels(scaled, apply_channels(scaled, z)), z)
    z[..., 1, :, :] /= 1e9
    single = z.to(torch.complex64)
    back = remove_channels(factors, apply_channels(factors, single))
    assert back.dtype == torch.complex64 and torch.allclose(back, single, atol=1e-5)
    z = z[:1, 0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: torch.view_as_real(apply_channels(factors, q)), z)
    assert torch.autograd.gradcheck(lambda q: torch.view_as_real(remove_channels(factors, q)), z)


class Shared(Reader):
    """Reader of one of two processes, whose reductions add those of the other one."""

    def __init__(self, other):
        super().__init__([])
        self.other = other

    def sum(self, *values):
        others = (torch.view_as_real(self.other.sums), *self.other.numbers, self.other.unnamed)
        return tuple(first + second for first, second in zip(values, others))

    def every(self, values):
        return values + sorted(self.other.members)


@pytest.mark.parametrize("named", [True, False])
def test_two_processes_compute_the_factors_of_one(named):
    q_hat = layers(480)
    members = torch.arange(480) // 40 if named else None
    alone, factors, variance = estimated(q_hat, LAYERS, members)
    shares = [ChannelCovariance(B, LAYERS) for _ in range(2)]
    for share, rows in zip(shares, (slice(0, 200), slice(200, None))):
        for some in torch.arange(480)[rows].split(40):
            share.add(q_hat[some], members[some] if named else None)
    for first, second in (shares, reversed(shares)):
        assert torch.allclose(first.factors(Shared(second), variance), factors, atol=1e-12)
        assert first.chosen == alone.chosen and first.grouping == "zonal"


def test_few_members_have_the_coarsest_grouping():
    q_hat = layers(700)
    assert estimated(q_hat, LAYERS, torch.arange(700) % 7)[0].grouping == "isotropic"
    assert estimated(q_hat, LAYERS, 4 * (torch.arange(700) % 20))[0].grouping == "zonal"


def test_correlated_snapshots_are_shrunk_more():
    q_hat = layers(50, shared=0.5)
    chosen = {}
    for times in (1, 20):
        repeated = q_hat.repeat_interleave(times, 0)
        members = torch.arange(50).repeat_interleave(times)
        statistics = estimated(repeated, LAYERS, members)[0]
        assert statistics.grouping == "zonal"
        chosen[times] = statistics.chosen.earlier
    assert chosen == {1: 4, 20: 64}
    half = Grouping("zonal", "isotropic", 100)  # as many as 50 snapshots of kx, ky and kx, -ky
    s = moments(q_hat).flatten(2)
    parts = [statistics._grouped(Grouping(name), s, 50) for name in ("zonal", "isotropic")]
    assert torch.allclose(statistics._grouped(half, s, 50), sum(parts) / 2)


def test_round_off_does_not_choose_the_grouping():
    weak = torch.where(B.grid.integer_k2 > 20, 1e-8, 1.0).double()
    q_hat = white(2, 500) * SPECTRUM.sqrt()
    q_hat = torch.where(weak < 1, layers(500) * weak, q_hat)
    assert estimated(q_hat, LAYERS)[0].grouping == "isotropic"


def test_a_line_has_matrices_that_its_reflection_allows():
    line = band(6, dimensions=1)
    first, second = white(2, 3000, of=line).unbind(1)
    tied = torch.stack([first, 0.6 * 1j * first + 0.8 * second], dim=1)
    tied[..., 0] = torch.stack([first, second], dim=1)[..., 0]
    found = {}
    for kinds in (("scalar", "pseudo-scalar"), ("scalar", "scalar")):
        statistics = ChannelCovariance(line, kinds)
        statistics.add(tied, None)
        s = covariance(statistics.factors(NOBODY, mean_square(tied)), mean_square(tied))
        found[kinds[1]] = statistics.grouping
        assert torch.allclose(s[0, 1, 1:], torch.tensor(-0.6j).to(s), atol=0.08)
    assert found == {"pseudo-scalar": "zonal", "scalar": "mode"}
    with pytest.raises(ValueError, match="a line has no directions"):
        ChannelCovariance(line, VECTOR)


def test_one_channel_is_left_as_it_is():
    q_hat = white(1, 400) * SPECTRUM.sqrt()
    variance = B.spread(B.by_group(mean_square(q_hat)) / B.group_size)
    _, factors, _ = estimated(q_hat, ("scalar",), variance=variance)
    assert torch.allclose(factors[0], torch.ones(()).double(), atol=1e-9)
    assert not factors[1].any()


def test_bad_input_is_one_line():
    for kinds in (("vector x", "scalar"), ("vector y", "vector x"), ("vector x",)):
        with pytest.raises(ValueError, match="followed by its 'vector y'"):
            ChannelCovariance(B, kinds)
    with pytest.raises(ValueError, match="kind of channel 1 is 'tensor', expected scalar"):
        ChannelCovariance(B, ("scalar", "tensor"))
    statistics = ChannelCovariance(B, LAYERS)
    with pytest.raises(ValueError, match=r"expected \(B, 2, 11, 6\)"):
        statistics.add(white(3, 2), None)
    with pytest.raises(ValueError, match="no snapshot was added"):
        statistics.factors(NOBODY, torch.ones(2, *B.shape))
    with pytest.raises(ValueError, match="a variance per channel and mode"):
        statistics.factors(NOBODY, torch.ones(B.shape))
