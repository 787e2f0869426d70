"""Draws for half-plane wavevectors make real fields of the stated variance."""

import numpy as np
import pytest
import torch

from hpc_closure.closure.fields.modes import Band
from hpc_closure.spectral.modes.grid import hermitian
from hpc_closure.spectral.modes.half_plane import ModeDraws, wavevectors_within
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


def test_white_spectra_of_a_band_are_these_draws():
    draws, values = draws_of(5, 6)
    normals = values[:, :-1] / np.sqrt(0.5)
    scaled = draws.empty(6)
    scaled[:, :-1] = normals * np.sqrt(0.5)
    white = Band(5).white(normals)
    assert torch.equal(white, torch.from_numpy(draws.place(scaled)))
