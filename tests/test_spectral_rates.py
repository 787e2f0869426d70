"""Rates of a stochastic forcing: whoever asks, in whatever pieces, gets the same ones."""

import numpy as np
import pytest
import torch

from hpc_closure.spectral.noise.rates import Rates
from hpc_closure.spectral.problem import Problem

WHITE = {"kind": "ring", "wavenumber": 4, "width": 1, "energy_rate": 0.02}
COLOURED = {"kind": "ornstein_uhlenbeck", "wavenumber": 4, "rms": 0.2, "correlation_time": 0.01}
MEMBERS = [3, 8, 9]


def rates_of(noise, dtype=torch.float64):
    problem = Problem(grid=32, noise=noise)
    rates = Rates(problem.make_noise(5), MEMBERS, torch.empty(0, dtype=dtype))
    rates.load(None)
    return rates


def taken(rates, rows, *pieces, first=0, level=0):
    """Rates of consecutive steps, asked for in pieces."""
    out = []
    for num in pieces:
        out += [rate.clone() for rate in rates.steps(rows, first, num, level)]
        first += num
    return torch.stack(out)


@pytest.mark.parametrize("noise", [WHITE, COLOURED], ids=["white", "coloured"])
def test_rates_do_not_depend_on_the_pieces_or_the_rows(noise):
    whole = taken(rates_of(noise), slice(0, 3), 30)
    assert whole.shape[:2] == (30, 3)
    assert torch.equal(taken(rates_of(noise), slice(0, 3), 1, 1, 1, 5, 2, 20), whole)
    parts = rates_of(noise)
    last = taken(parts, np.array([2]), 30)
    assert torch.equal(last, whole[:, 2:])
    assert torch.equal(taken(parts, slice(0, 2), 12, 18), whole[:, :2])


def test_steps_asked_for_one_by_one_are_drawn_many_at_once(monkeypatch):
    rates, drawn = rates_of(WHITE), []
    draw = type(rates.noise).draw

    def counted(self, members, first, num, level=0):
        drawn.append(num)
        return draw(self, members, first, num, level)

    monkeypatch.setattr(type(rates.noise), "draw", counted)
    taken(rates, slice(0, 3), *[1] * 64)
    assert drawn == [1, 2, 4, 8, 16, 32, 64]
    taken(rates, slice(0, 3), 1, first=500)  # another time: nothing to go on from
    assert drawn[-1] == 1


def test_a_coloured_forcing_goes_on_from_its_saved_state():
    rates, other = rates_of(COLOURED), rates_of(COLOURED)
    whole = taken(rates_of(COLOURED), slice(0, 3), 20)
    first = taken(rates, slice(0, 3), 7)
    saved = rates.save()
    other.load(saved["rates"])
    assert np.array_equal(other.at(7), saved["rates"])
    assert torch.equal(taken(other, slice(0, 3), 13, first=7), whole[7:])
    assert torch.equal(torch.cat([first, taken(rates, slice(0, 3), 13, first=7)]), whole)
    assert rates_of(WHITE).save() == {} and rates_of({"kind": "none"}).save() == {}


def test_a_rate_is_added_in_its_box_on_each_ranks_columns():
    rates = rates_of(WHITE)
    rate = taken(rates, slice(0, 3), 1)[0]
    noise = rates.noise
    whole = torch.view_as_real(noise.spread(torch.view_as_complex(rate).numpy()))
    base = torch.randn(whole.shape, dtype=torch.float64)
    for columns in (slice(0, 11), slice(0, 4), slice(4, 8), slice(8, 11)):
        mine = base[:, :, columns].clone()
        out = mine.clone()
        rates.add(mine, rate, out, columns)
        assert torch.equal(out, mine + whole[:, :, columns])
