"""The closed-form mean finds linear and quadratic laws, and leaves out what does not help."""

import math

import pytest
import torch

from hpc_closure.closure.composed import regression
from hpc_closure.closure.composed.regression import TermRegression, term_names
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.features import Features, carried, feature_spectra
from hpc_closure.closure.fields.modes import band
from hpc_closure.spectral.equations.two_layer import TwoLayerQG

B = band(10)


def states(count, seed=0):
    k2 = B.grid.integer_k2.double()
    return (
        keyed_noise.white_spectra(B, seed, "state", range(count), 0) * (1 + k2) ** -1.5 * (k2 > 0)
    )


def noise(count, level):
    k2 = B.grid.integer_k2.double()
    return level * keyed_noise.white_spectra(B, 9, "noise", range(count), 0) * torch.exp(-0.1 * k2)


def advection(w_hat):
    u, v, _, w_x, w_y = B.to_physical(feature_spectra(w_hat, B), 32).unbind(-3)
    return -B.to_spectral(u * w_x + v * w_y)


def test_linear_law():
    w_hat = states(400)
    target = -1e-3 * B.grid.k2 * w_hat + noise(400, 0.02)
    library = TermRegression(B, "quadratic")
    halves = [(w_hat[:200, None], target[:200]), (w_hat[200:, None], target[200:])]
    assert library.fit(halves) == ["w"]
    symbol = B.spread(library.coefficients[library.names.index("w")])
    exact = -1e-3 * B.grid.k2
    assert ((symbol - exact).abs() <= 0.003 * exact.abs() + 1e-4).all()
    error = library(w_hat[:, None]) - (-1e-3 * B.grid.k2 * w_hat)
    assert float((error.abs().square() * B.weights).sum()) < 2e-3 * float(
        (noise(400, 0.02).abs().square() * B.weights).sum()
    )


def test_coefficients_that_are_no_polynomial_are_free():
    w_hat = states(400)
    symbol = torch.cos(B.grid.integer_k2.double()) + 2
    library = TermRegression(B, "quadratic")
    assert library.fit([(w_hat[:, None], symbol * w_hat + noise(400, 0.002))]) == ["w"]
    found = B.spread(library.coefficients[library.names.index("w")])
    seen = B.grid.integer_k2 > 0
    assert ((found - symbol)[seen].abs() < 0.05 * symbol[seen]).all()


def test_quadratic_law():
    w_hat = states(300)
    clean = advection(w_hat)
    target = clean + noise(300, 0.003)
    library = TermRegression(B, "quadratic")
    assert sorted(library.fit([(w_hat[:, None], target)])) == ["u*w_x", "v*w_y"]
    fresh = states(50, seed=1)
    error = library(fresh[:, None]) - advection(fresh)
    assert float(error.norm()) < 0.01 * float(advection(fresh).norm())


WIDE, HALF_VISCOSITY = band(42), -0.5e-3


def steep(count, seed, level=1e-4):
    """(frames, target) of a damping and noise, in single precision: round-off from |k| = 20 on."""
    k2 = WIDE.grid.integer_k2.double()
    w_hat = keyed_noise.white_spectra(WIDE, seed, "state", range(count), 0)
    w_hat = w_hat * torch.exp(-0.8 * k2.sqrt()) * (k2 > 0)
    white = keyed_noise.white_spectra(WIDE, seed, "noise", range(count), 0)
    target = HALF_VISCOSITY * WIDE.grid.k2 * w_hat + level * white * torch.exp(-0.1 * k2)
    stored = [WIDE.to_physical(one, 128).float().double() for one in (w_hat, target)]
    state, target = (WIDE.to_spectral(one) for one in stored)
    return state[:, None], target


def ratio(library, mode):
    """Coefficient of w in a mode, in units of the exact one."""
    symbol = WIDE.spread(library.coefficients[library.names.index("w")])
    return float(symbol[mode] / (HALF_VISCOSITY * WIDE.grid.k2[mode]))


@pytest.mark.parametrize("seed", range(3))
def test_a_polynomial_holds_where_the_training_saw_round_off(seed):
    """The shipped closure once gave nothing at (20, 1), where half the viscosity is."""
    library = TermRegression(WIDE, "linear")
    assert library.fit([steep(100, seed)]) == ["w"]
    for mode in [(5, 0), (19, 3), (20, 1), (30, 0), (42, 42), (-42, 42)]:
        assert ratio(library, mode) == pytest.approx(1, abs=1e-3), mode


@pytest.mark.parametrize("level", [1.0, 100.0])
def test_a_polynomial_whose_sign_is_not_known_is_not_used_beyond(monkeypatch, level):
    """Degree 2 where the law has 1: near the law, or nothing beyond; never a growth."""
    found = {}

    def degree_2(gram, cross, power, counts, k2):
        found["fit"] = fit = regression._Fit(gram, cross, power, counts, k2, 2)
        return fit.coefficients([2])

    monkeypatch.setattr(regression, "select", degree_2)
    for seed in range(4):
        library = TermRegression(WIDE, "linear")
        library.fit([steep(100, seed, level)])
        told = [ratio(library, (k, 0)) for k in range(22, 43)]
        assert all(one == 0 or 0 < one < 2 for one in told), told
        assert (told[-1] == 0) == (level == 100.0)
        # the standard errors are what the coefficients differ by
        fit = found["fit"]
        law = HALF_VISCOSITY * (2 * math.pi) ** 2 * WIDE.group_k2
        sigma = ((fit.polynomials([2]) @ fit.powers.T)[0] - law) / fit.errors([2])[0]
        assert 1e-3 < float(sigma[-1].abs()) < 4


def test_free_coefficients_stay_zero_where_nothing_was_seen():
    state, target = steep(100, 0)
    wild = target + (torch.cos(WIDE.grid.integer_k2.double()) + 2) * state[:, 0]
    library = TermRegression(WIDE, "linear")
    assert library.fit([(state, wild)]) == ["w"]
    assert abs(ratio(library, (5, 0))) > 0 and ratio(library, (30, 0)) == 0.0


def test_history_is_found():
    w_hat = states(300).reshape(150, 2, *B.shape)
    target = 0.5 * w_hat[:, 1] + 0.1 * w_hat[:, 0]
    library = TermRegression(B, "linear", history=1)
    assert sorted(library.fit([(w_hat, target)])) == ["w", "w[-1]"]
    assert torch.allclose(library(w_hat), target, atol=1e-9)


def test_pure_noise_leaves_nothing():
    library = TermRegression(B, "quadratic")
    assert library.fit([(states(200)[:, None], noise(200, 1.0))]) == []
    assert float(library(states(5)[:, None]).abs().max()) == 0.0


def test_names():
    assert len(term_names("quadratic", history=2)) == 5 + 2 + 15
    assert term_names("none") == []
    assert math.comb(6, 2) == 15


def test_every_previous_closure_is_a_term_and_so_is_its_advection():
    """U = .6 U[-1] - .3 U[-3] + 2 (-u.grad U[-2]) + noise: these, no others, with their values."""
    count, w_hat = 400, states(400)
    last = torch.stack([noise(3 * count, 1.0)[i * count : (i + 1) * count] for i in range(3)], 1)
    moved = carried(w_hat, last, B)
    target = (
        0.6 * last[:, 0] - 0.3 * last[:, 2] + 2 * moved[:, 1] + noise(4 * count, 0.02)[-count:]
    )
    library = TermRegression(B, "linear", previous=3)
    frames = torch.cat([w_hat[:, None], last], 1)
    assert library.fit([(frames, target)]) == ["U[-1]", "U[-3]", "u.grad U[-2]"]
    for name, value in (("U[-1]", 0.6), ("U[-3]", -0.3), ("u.grad U[-2]", 2.0)):
        found = library.coefficients[library.names.index(name)]
        assert torch.allclose(found, torch.full_like(found, value), atol=0.02)
    # by hand: the flow of the state carries the closure
    u, v = B.to_physical(feature_spectra(w_hat, B)[:, :2], 32).unbind(1)
    slope = [B.to_physical(1j * B.on(k, w_hat.device, w_hat.real.dtype) * last[:, 1], 32)
             for k in ("kx", "ky")]  # fmt: skip
    assert torch.allclose(moved[:, 1], -B.to_spectral(u * slope[0] + v * slope[1]), atol=1e-12)


def remembering(*lags):
    library = TermRegression(B, "linear", previous=len(lags))
    coefficients = torch.zeros_like(library.coefficients)
    for lag, value in enumerate(lags, 1):
        coefficients[library.names.index(f"U[-{lag}]")] = value
    coefficients[library.names.index("w")] = 3.0
    return TermRegression(B, "linear", previous=len(lags), coefficients=coefficients)


@pytest.mark.parametrize(
    "lags, radius", [((0.7,), 0.7), ((-0.7,), 0.7), ((1.1, -0.3), 0.6), ((0.0, -1.21), 1.1)]
)
def test_the_spectral_radius_is_that_of_the_recursion(lags, radius):
    """(z - .5)(z - .6) = z^2 - 1.1 z + .3."""
    found = remembering(*lags).spectral_radius()
    assert torch.allclose(found, torch.full_like(found, radius))
    assert not TermRegression(B, "linear").spectral_radius().any()


def test_a_memory_that_would_grow_is_brought_back():
    library = remembering(1.5, 0.2)
    ones = torch.ones(len(library.names), B.grid.num_shells)
    ones[:, 3:] = 0.5  # there it would not
    factors = library.bounded(ones)
    radius = library.spectral_radius(factors)
    assert torch.allclose(radius[:3], torch.full((3,), regression.LARGEST_RADIUS).double())
    assert torch.equal(factors[:, 3:], ones[:, 3:])
    others = [number for number, name in enumerate(library.names) if "U[" not in name]
    assert torch.equal(factors[others], ones[others])


def test_the_radius_is_computed_once_for_equal_factors(monkeypatch):
    """Also where weights change behind autograd's back."""
    library, calls = remembering(1.5, 0.2), []
    plain = library.spectral_radius
    monkeypatch.setattr(library, "spectral_radius", lambda f: calls.append(1) or plain(f))
    factors = torch.ones(len(library.names), B.grid.num_shells)
    first = library.bounded(factors)
    assert torch.equal(library.bounded(factors.clone()), first) and len(calls) == 1
    factors.data.mul_(0.8)
    again = library.bounded(factors)
    assert len(calls) == 2 and not torch.equal(again, first)
    assert torch.equal(again, remembering(1.5, 0.2).bounded(factors))


def test_a_fit_has_no_memory_that_grows():
    last = noise(300, 1.0)
    library = TermRegression(B, "linear", previous=1)
    library.fit([(torch.stack([states(300), last], 1), 1.3 * last + noise(600, 0.01)[300:])])
    assert torch.allclose(library.spectral_radius().max(), torch.tensor(0.999).double())


# ---- several fields -----------------------------------------------------------------------------

LAYERS = TwoLayerQG(
    length=1.0, deformation_radius=0.1, depth_ratio=0.25, beta=3.0, mean_flow=(0.3, 0.05)
)
OF_LAYERS = Features(B, LAYERS)


def of_layers(previous, coefficients=None, kind="linear"):
    return TermRegression(B, kind, 0, previous, coefficients, features=OF_LAYERS)


def pairs(values):
    """Spectra (2 S, ...) as those of two layers, (S, 2, ...)."""
    return values.unflatten(0, (-1, 2))


def test_a_closure_of_a_layer_is_carried_by_the_flow_and_the_mean_flow_of_its_layer():
    state, last = pairs(states(8)), pairs(states(8, seed=3))[:, None]
    moved = OF_LAYERS.carried(state, last)
    assert moved.shape == (4, 1, 2, *B.shape)
    i_k = [1j * B.on(name, state.device, torch.float64) for name in ("kx", "ky")]
    psi = torch.einsum("lcxy,bcxy->blxy", LAYERS.stream_factors(B.grid).to(state), state)
    for layer in (0, 1):  # Features: u = psi_y, v = -psi_x, where the solver's psi has the minus
        u, v = (B.to_physical(part * psi[:, layer], 32) for part in (i_k[1], -i_k[0]))
        slopes = [B.to_physical(part * last[:, 0, layer], 32) for part in i_k]
        exact = -B.to_spectral((u + LAYERS.mean_flow[layer]) * slopes[0] + v * slopes[1])
        assert torch.allclose(moved[:, 0, layer], exact, atol=1e-12)


def test_each_layer_finds_the_previous_closures_of_both():
    """U = A U[-1] + (0.02, 0) (-u.grad U_q_lower[-2]) + noise: these terms, with their values."""
    count = 400
    state = pairs(states(2 * count))
    last = torch.stack([pairs(noise(4 * count, 1.0)[i::2]) for i in (0, 1)], 1)
    moved = OF_LAYERS.carried(state, last)
    matrix = torch.tensor([[0.6, -0.3], [0.5, 0.2]], dtype=torch.complex128)
    target = torch.einsum("ij,bjxy->bixy", matrix, last[:, 0])
    target[:, 0] += 0.02 * moved[:, 1, 1]
    target = target + pairs(noise(6 * count, 0.02)[-2 * count :])
    library = of_layers(2)
    frames = torch.cat([state[:, None], last], 1)
    expected = ["U_q_upper[-1]", "U_q_lower[-1]", "u.grad U_q_lower[-2]"]
    assert library.fit([(frames, target)]) == expected
    values = torch.tensor([[0.6, -0.3, 0.02], [0.5, 0.2, 0.0]]).double()
    for number, name in enumerate(expected):
        found = library.coefficients[:, library.names.index(name)]
        assert torch.allclose(found, values[:, number, None].expand_as(found), atol=0.02)
    fresh = library(frames[:5], moved[:5])
    assert torch.equal(fresh, library(frames[:5]))


def remembering_layers(*matrices):
    coefficients = torch.zeros_like(of_layers(len(matrices)).coefficients)
    names = of_layers(len(matrices)).names
    for lag, matrix in enumerate(matrices, 1):
        for field, layer in enumerate(("q_upper", "q_lower")):
            row = names.index(f"U_{layer}[-{lag}]")
            coefficients[:, row] = torch.tensor(matrix).double()[:, field, None]
    return of_layers(len(matrices), coefficients)


@pytest.mark.parametrize(
    "matrices, radius",
    [
        (([[0.0, 0.9], [-0.4, 0.0]],), 0.6),  # a pair +-0.6 i, of which neither layer alone knows
        (([[0.9, 0.0], [5.0, 0.2]],), 0.9),
        (([[1.1, 0.0], [0.0, 0.0]], [[-0.3, 0.0], [0.0, 0.81]]), 0.9),  # z^2 = 0.81
    ],
)
def test_the_radius_of_a_vector_recursion_is_that_of_its_companion_matrix(matrices, radius):
    found = remembering_layers(*matrices).spectral_radius()
    assert torch.allclose(found, torch.full_like(found, radius))


def test_a_vector_recursion_that_would_grow_is_brought_back():
    library = remembering_layers([[0.0, 2.0], [-1.0, 0.0]], [[0.1, 0.0], [0.0, 0.1]])
    ones = torch.ones(len(library.names), B.grid.num_shells)
    assert float(library.spectral_radius().min()) > 1.3
    radius = library.spectral_radius(library.bounded(ones))
    assert torch.allclose(radius, torch.full_like(radius, regression.LARGEST_RADIUS), atol=1e-6)


def test_a_fit_of_several_fields_has_no_memory_that_grows():
    count = 300
    last = pairs(noise(2 * count, 1.0))
    target = torch.stack([1.2 * last[:, 1], 1.2 * last[:, 0]], 1)
    library = of_layers(1)
    library.fit([(torch.stack([pairs(states(2 * count)), last], 1), target)])
    assert torch.allclose(library.spectral_radius().max(), torch.tensor(0.999).double())
