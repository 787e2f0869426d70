"""Sensors: one layout is the same points for whoever asks, and readings are the field's values."""

import pytest
import torch

from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import (
    KRIGED_LAYOUTS,
    LEARNED_LAYOUTS,
    Sensors,
    choose_layouts,
    layout_name,
    observe,
    read_regular,
    regular_positions,
    regular_side,
    training_layout,
    values_at,
)
from hpc_closure.experiment.schema import SensorLayout


def fields(count=3, size=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("length", [1.0, 2.5])
def test_a_regular_layout_is_the_same_however_it_is_asked_for(length):
    field = fields()
    observed = observe(field, SensorLayout(number=8), 0, range(3), 0, (length, length))
    read = read_regular(field, 8, length)
    assert torch.equal(observed.values, read.values)
    assert torch.allclose(observed.positions, read.positions, atol=1e-15)
    assert torch.equal(values_at(field, read.positions, length), read.values)
    assert regular_side(read.positions) == 8


@pytest.mark.parametrize("layout", [{"number": 6}, {"layout": "scattered", "number": 15}])
def test_positions_are_where_the_values_were_read(layout):
    """In units of the square's side: a field of another length gives the same values there."""
    b = band(7, length=3.0)
    field = b.to_physical(b.to_spectral(fields()), 24)
    sensors = observe(field, SensorLayout(**layout), 4, range(3), 0, (3.0, 3.0))
    values = b.at(b.to_spectral(field), b.phases(sensors.positions))
    assert torch.allclose(values, sensors.values, atol=1e-12)


def test_errors_have_the_stated_size_and_belong_to_row_and_call():
    field = fields(size=24)
    layout = SensorLayout(number=24, noise=0.5)
    one, two = (observe(field, layout, 4, range(3), call) for call in (0, 1))
    errors = one.values - field.flatten(1)
    assert float(errors.std() / one.noise_std) == pytest.approx(1, abs=0.1)
    assert one.noise_std == pytest.approx(0.5 * float(field.square().mean().sqrt()))
    assert not torch.equal(one.values, two.values)
    again = observe(field[1:2], layout, 4, [1], 0).values - field[1:2].flatten(1)
    assert torch.allclose(again / again.std(), errors[1:2] / errors[1:2].std())


def test_rows_are_readings_of_some_states():
    sensors = Sensors(torch.arange(6.0).view(3, 2), torch.zeros(2, 2), 0.1)
    assert torch.equal(sensors.rows([2]).values, torch.tensor([[4.0, 5.0]]))
    assert sensors.rows([2]).noise_std == 0.1


def test_what_is_not_a_regular_square_from_the_origin_is_told_apart():
    assert regular_side(regular_positions(1)) == 1
    assert regular_side(regular_positions(4)[:-1]) is None
    assert regular_side(regular_positions(4) + 0.1) is None


def test_names():
    layouts = [SensorLayout(), SensorLayout(layout="scattered", number=64, noise=0.05), None]
    assert [layout_name(one) for one in layouts] == ["16x16", "64 scattered, noise 0.05", "none"]


def test_layouts_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ValueError, match="5 per side do not divide the 24"):
        observe(fields(), SensorLayout(number=5), 0, range(3), 0)
    with pytest.raises(ValueError, match="577 points do not fit"):
        observe(fields(), SensorLayout(layout="scattered", number=577), 0, range(3), 0)


@pytest.mark.parametrize("layouts", [KRIGED_LAYOUTS, LEARNED_LAYOUTS])
def test_training_sees_every_layout_by_its_weight_and_none(layouts):
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    every = range(1, 1 + len(layouts))
    required = torch.bincount(choose_layouts(uniform, "required", layouts))
    assert required[0] == 0
    weights = torch.tensor([layout.weight for layout in layouts])
    assert torch.allclose(required[1:] / 20_000, weights / weights.sum(), atol=1e-3)
    optional = torch.bincount(choose_layouts(uniform, "optional", layouts))
    assert optional[0] == 10_000 and (optional[1:] > 0).all() and len(optional) == 1 + len(every)
    assert set(choose_layouts(uniform, "none", layouts).tolist()) == {0}
    for layout in layouts:
        shown = training_layout(layout, 3, 2.0, 0.25)
        assert shown.noise_std == layout.noise * 0.25
        count = layout.size**2 if layout.kind == "regular" else layout.size
        assert shown.positions.shape == (count, 2) and float(shown.positions.max()) < 2.0
        moved = not torch.equal(shown.positions, training_layout(layout, 4, 2.0, 0.25).positions)
        assert moved == (layout.kind == "scattered")


@pytest.mark.parametrize("sides", [1, 2, 3])
@pytest.mark.parametrize("layout", [{"number": 4}, {"layout": "scattered", "number": 5}])
def test_every_field_is_read_at_places_of_one_to_three_sides(sides, layout):
    generator = torch.Generator().manual_seed(1)
    b = band(3, 2.0, sides)
    field = torch.randn(2, 3, *(8,) * sides, generator=generator, dtype=torch.float64)
    field = b.to_physical(b.to_spectral(field), 8)
    sensors = observe(field, SensorLayout(**layout), 4, range(2), 0, (2.0,) * sides)
    number = 4 ** sides if sensors.positions.shape[0] != 5 else 5
    assert sensors.values.shape == (2, 3, number) and sensors.positions.shape == (number, sides)
    assert len({tuple(place) for place in sensors.positions.tolist()}) == number
    values = b.values(b.to_spectral(field), sensors.positions)
    assert torch.allclose(values, sensors.values, atol=1e-12)


def test_errors_of_each_field_are_a_multiple_of_its_own_rms():
    field = torch.stack([fields(), 100 * fields()], dim=1)
    layout = SensorLayout(number=24, noise=0.5)
    sensors = observe(field, layout, 4, range(3), 0)
    errors = sensors.values - field.flatten(2)
    small, large = sensors.noise_std
    assert large == pytest.approx(100 * small)
    for number, std in enumerate(sensors.noise_std):
        assert float(errors[:, number].std() / std) == pytest.approx(1, abs=0.1)
    variances = sensors.variances(2)
    assert variances.shape == (2 * 24**2,) and float(variances[-1]) == pytest.approx(large**2)
    fixed = observe(field, layout, 4, range(3), 0, rms=torch.tensor([2.0, 4.0]))
    assert fixed.noise_std == (1.0, 2.0)


def test_readings_that_do_not_fit_are_one_line():
    with pytest.raises(ValueError, match=r"expected \(S, 2\), on a line \(S, 1\)"):
        Sensors(torch.zeros(3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="2 numbers in noise_std but values of shape"):
        Sensors(torch.zeros(3), torch.zeros(3, 2), (0.1, 0.2))
    with pytest.raises(ValueError, match="noise_std=-1, expected a number >= 0"):
        Sensors(torch.zeros(3), torch.zeros(3, 2), -1)
