"""Symmetries: maps of solutions to solutions, found from the forcing alone."""

import numpy as np
import pytest
import torch

from hpc_closure.data.symmetry import MAPS, Symmetry

N = 16
X, Y = np.meshgrid(np.arange(N) / N, np.arange(N) / N, indexing="ij")
PUBLISHED = 0.1 * (np.sin(2 * np.pi * (X + Y)) + np.cos(2 * np.pi * (X + Y)))
KOLMOGOROV = -np.cos(8 * np.pi * Y)
RING = np.random.default_rng(0).normal(size=(N, N))


def fields(seed=0, count=3):
    """Smooth random vorticity, (count, N, N)."""
    white = np.random.default_rng(seed).normal(size=(count, N, N))
    k = np.fft.fftfreq(N, 1 / N)
    kept = (np.abs(k)[:, None] <= 5) & (np.arange(N // 2 + 1) <= 5)
    return np.fft.irfft2(np.fft.rfft2(white) * kept, s=(N, N))


def tendency(w, forcing):
    """-u.grad w + nu Lap w + f on the grid, by spectral derivatives."""
    kx = 2 * np.pi * np.fft.fftfreq(N, 1 / N)[:, None]
    ky = 2 * np.pi * np.arange(N // 2 + 1)
    k2 = kx**2 + ky**2
    w_hat = np.fft.rfft2(w)
    psi_hat = w_hat / np.where(k2 == 0, 1, k2)

    def back(values):
        return np.fft.irfft2(values, s=(N, N))

    u, v = back(1j * ky * psi_hat), back(-1j * kx * psi_hat)
    advection = u * back(1j * kx * w_hat) + v * back(1j * ky * w_hat)
    return -advection - 1e-3 * back(k2 * w_hat) + forcing


@pytest.mark.parametrize(
    "forcing, number",
    [(0 * X, 8 * N * N), (PUBLISHED, 4 * N), (KOLMOGOROV, 4 * 4 * N), (RING, 1)],
    ids=["none", "published", "kolmogorov", "ring"],
)
def test_the_equation_commutes_with_every_map(forcing, number):
    symmetry = Symmetry(forcing)
    assert len(symmetry) == number
    w = torch.from_numpy(fields(count=1))
    expected = torch.from_numpy(tendency(w.numpy(), forcing))
    chosen = symmetry.elements[:: max(1, number // 64)]
    for element in chosen:
        moved = symmetry.apply(w, element[None])
        found = tendency(moved.numpy(), forcing)
        np.testing.assert_allclose(
            found, symmetry.apply(expected, element[None]).numpy(), atol=1e-12 * 100
        )


def test_a_wrong_map_is_noticed():
    """The test above can fail: a shift along x alone does not leave the published forcing."""
    symmetry = Symmetry(0 * X)
    w = torch.from_numpy(fields(count=1))
    shift = np.array([[0, 3, 0]])
    found = tendency(symmetry.apply(w, shift).numpy(), PUBLISHED)
    expected = symmetry.apply(torch.from_numpy(tendency(w.numpy(), PUBLISHED)), shift).numpy()
    assert np.abs(found - expected).max() > 0.01


def test_published_translations_are_the_diagonal_ones():
    symmetry = Symmetry(PUBLISHED, reflections=False)
    assert {tuple(row) for row in symmetry.elements[:, 1:]} == {(s, -s % N) for s in range(N)}


def test_identity_and_shapes():
    symmetry = Symmetry(RING)
    assert (symmetry.elements == [[0, 0, 0]]).all() and MAPS[0] == (0, 1, 1)
    w = torch.from_numpy(fields(count=4)).float()
    assert (symmetry.apply(w, symmetry.draw(0, 0, 4)) == w).all()
    history = torch.stack([w, 2 * w], dim=1)
    free = Symmetry(0 * X)
    elements = free.draw(0, 10, 4)
    moved = free.apply(history, elements)
    assert moved.shape == history.shape
    assert (moved[:, 1] == 2 * free.apply(w, elements)).all()


def test_draws_cover_the_group():
    symmetry = Symmetry(PUBLISHED)
    drawn = symmetry.draw(1, 0, 4000)
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == len(symmetry) and counts.min() > 8
    assert (symmetry.draw(1, 100, 5) == drawn[100:105]).all()
