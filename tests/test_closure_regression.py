"""The closed-form mean finds linear and quadratic laws, and leaves out what does not help."""

import math

import torch

from hpc_closure.closure import draws
from hpc_closure.closure.band import band
from hpc_closure.closure.features import feature_spectra
from hpc_closure.closure.regression import Library, term_names

B = band(10)


def states(count, seed=0):
    k2 = B.grid.integer_k2.double()
    return draws.white_spectra(B, seed, "state", range(count), 0) * (1 + k2) ** -1.5 * (k2 > 0)


def noise(count, level):
    k2 = B.grid.integer_k2.double()
    return level * draws.white_spectra(B, 9, "noise", range(count), 0) * torch.exp(-0.1 * k2)


def advection(w_hat):
    u, v, _, w_x, w_y = B.to_physical(feature_spectra(w_hat, B), 32).unbind(-3)
    return -B.to_spectral(u * w_x + v * w_y)


def test_linear_law():
    w_hat = states(400)
    target = -1e-3 * B.grid.k2 * w_hat + noise(400, 0.02)
    library = Library(B, "quadratic")
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
    library = Library(B, "quadratic")
    assert library.fit([(w_hat[:, None], symbol * w_hat + noise(400, 0.002))]) == ["w"]
    found = B.spread(library.coefficients[library.names.index("w")])
    seen = B.grid.integer_k2 > 0
    assert ((found - symbol)[seen].abs() < 0.05 * symbol[seen]).all()


def test_quadratic_law():
    w_hat = states(300)
    clean = advection(w_hat)
    target = clean + noise(300, 0.003)
    library = Library(B, "quadratic")
    assert sorted(library.fit([(w_hat[:, None], target)])) == ["u*w_x", "v*w_y"]
    fresh = states(50, seed=1)
    error = library(fresh[:, None]) - advection(fresh)
    assert float(error.norm()) < 0.01 * float(advection(fresh).norm())


def test_history_is_found():
    w_hat = states(300).reshape(150, 2, *B.shape)
    target = 0.5 * w_hat[:, 1] + 0.1 * w_hat[:, 0]
    library = Library(B, "linear", history=1)
    assert sorted(library.fit([(w_hat, target)])) == ["w", "w[-1]"]
    assert torch.allclose(library(w_hat), target, atol=1e-9)


def test_pure_noise_leaves_nothing():
    library = Library(B, "quadratic")
    assert library.fit([(states(200)[:, None], noise(200, 1.0))]) == []
    assert float(library(states(5)[:, None]).abs().max()) == 0.0


def test_names():
    assert len(term_names("quadratic", history=2)) == 5 + 2 + 15
    assert term_names("none") == []
    assert math.comb(6, 2) == 15
