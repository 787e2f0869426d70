"""Twins under one resolved flow: growth rates known in closed form, and errors of the options."""

import pytest

from hpc_closure.bench.physics import synchronisation
from hpc_closure.experiment.schema import Experiment

VISCOSITY, DRAG = 0.2, 0.1


def experiment(energy: float, **physics) -> Experiment:
    return Experiment(
        physics={
            "viscosity": VISCOSITY,
            "drag": DRAG,
            "forcing": {"kind": "none"},
            "noise": {"kind": "none"},
            "initial": {"kind": "band", "wavenumber": 4, "width": 3, "energy": energy},
            "length": 6.283185307179586,
            **physics,
        },
        generate={
            "grid": 24,
            "dt": 0.01,
            "scheme": "cn_ab2",
            "closure": "subgrid",
            "interval": 10,
            "t_end": 60.0,
            "record": {"every": 0.1, "grid": 12},
        },
        model={"conditions": {"sensors": "none"}},
        rollout={"every": 0.1, "interval": 10, "baselines": ["none"]},
    )


def test_at_rest_the_slowest_unresolved_mode_decays_by_viscosity_and_drag():
    case = synchronisation.Case((2, 3), members=2, spin_up=0.0, span=20.0)
    for row in synchronisation.run(experiment(1e-16), case):
        slowest = (row["cut"] + 1) ** 2
        assert row["growth"] == pytest.approx(-(VISCOSITY * slowest + DRAG), rel=0.03)


def test_a_small_cut_off_leaves_more_open_than_a_large_one(tmp_path):
    case = synchronisation.Case((2, 5), members=2, spin_up=4.0, span=8.0)
    forcing = {"kind": "ring", "wavenumber": 2, "width": 0.5, "amplitude": 1.0}
    flow = experiment(2.0, viscosity=5e-3, forcing=forcing)
    small, large = records = synchronisation.run(flow, case)
    assert small["growth"] > large["growth"] + 0.1
    assert 0 < large["width"] < small["width"] < 1.2
    synchronisation.draw(records, tmp_path / "twins.png")
    assert (tmp_path / "twins.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuts": (9,)}, "--cuts 9: expected wavenumbers from 1 to 6"),
        ({"span": 0.25}, "--span 0.25: expected a multiple of the closure interval, 0.1"),
    ],
)
def test_options_out_of_range_are_one_line(change, message):
    settings = {"cuts": (2,), "members": 1, "spin_up": 0.0, "span": 1.0} | change
    with pytest.raises(ValueError, match=message):
        synchronisation.run(experiment(1e-16), synchronisation.Case(**settings))


def test_a_cut_off_below_the_forcing_is_one_line():
    forcing = {"kind": "ring", "wavenumber": 3, "width": 0.5, "amplitude": 1.0}
    case = synchronisation.Case((2,), members=1, spin_up=0.0, span=1.0)
    with pytest.raises(
        ValueError, match=r"--cuts 2: physics.forcing.kind=ring: mode .* is beyond"
    ):
        synchronisation.run(experiment(1e-16, forcing=forcing), case)
