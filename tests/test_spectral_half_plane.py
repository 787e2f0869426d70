"""Draws for half-plane wavevectors make real fields of the stated variance."""

import numpy as np
import pytest
import torch

from hpc_closure.closure.fields.modes import Band
from hpc_closure.spectral.modes.grid import hermitian
from hpc_closure.spectral.modes.half_plane import ModeDraws, ring, wavevectors_within
from hpc_closure.spectral.noise.counters import complex_normals, key_of


def draws_of(modes, num=400):
    vectors = wavevectors_within(modes)
    draws = ModeDraws(vectors, modes)
    values = draws.empty(num)
    values[:, :-1] = complex_normals(key_of(3, "test", 0), 7, 0, num, len(vectors))
    values[:, :-1] *= np.sqrt(0.5)
    return draws, values


@pytest.mark.parametrize("modes", [1, 4, 7])
def test_all_modes_fill_the_spectrum_of_a_real_field(modes):
    draws, values = draws_of(modes)
    box = draws.place(values)
    assert draws.box == (2 * modes + 1, modes + 1) == box.shape[1:]
    assert torch.equal(hermitian(torch.from_numpy(box)), torch.from_numpy(box))
    power = (np.abs(box) ** 2).mean(0)  # one in the mean for every mode, the mean too
    assert abs(power - 1).max() < 5 * np.sqrt(2 / 400)
    assert len(np.unique(box[0, :, 1:])) == (2 * modes + 1) * modes  # no draw is used twice


def test_draws_fill_the_spectrum_of_a_real_field_in_a_cube():
    vectors = wavevectors_within(3, dimensions=3)
    draws = ModeDraws(vectors, 3)
    values = draws.empty(300)
    values[:, :-1] = complex_normals(key_of(3, "test", 0), 7, 0, 300, len(vectors)) * 0.5**0.5
    box = torch.from_numpy(draws.place(values))
    assert box.shape == (300, 7, 7, 4)
    assert torch.equal(hermitian(box, 3), box)
    assert abs(box.abs().square().mean(0) - 1).max() < 5.5 * (2 / 300) ** 0.5
    fields = torch.fft.irfftn(draws.spread(box[:2], (9, 9, 5)), s=(9, 9, 9), norm="forward")
    expected = (box[:2].abs().square() * torch.tensor([1.0, 2, 2, 2])).sum((1, 2, 3))
    torch.testing.assert_close(fields.square().mean((1, 2, 3)), expected)


@pytest.mark.parametrize("halves", [None, slice(1, 2), slice(2, 6)])
@pytest.mark.parametrize("columns", [slice(0, 11), slice(0, 2), slice(1, 9), slice(10, 11)])
def test_draws_are_added_to_the_modes_of_a_rank(columns, halves):
    draws = ModeDraws(ring(2, 0.5, 3), 5)
    rate = torch.randn(2, 3, *draws.box, 2)
    base, here = torch.randn(2, 3, 11, 11, 6, 2), halves or slice(0, 6)
    whole = torch.view_as_real(draws.spread(torch.view_as_complex(rate), (11, 11, 6)))
    out = base[:, :, :, columns, here].clone()
    draws.add(base[:, :, :, columns, here], rate, out, columns, halves)
    assert torch.equal(out, (base + whole)[:, :, :, columns, here])


def test_white_spectra_of_a_band_are_these_draws():
    draws, values = draws_of(5, 6)
    normals = values[:, :-1] / np.sqrt(0.5)
    scaled = draws.empty(6)
    scaled[:, :-1] = normals * np.sqrt(0.5)
    white = Band(5).white(normals)
    assert torch.equal(white, torch.from_numpy(draws.place(scaled)))
