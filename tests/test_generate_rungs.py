"""Bare solvers on other grids: steps, beginnings, drains, and the pilot that finds them."""

import json

import numpy as np
import pytest
import torch

from hpc_closure.closure.targets import reduced_problem
from hpc_closure.experiment import reading
from hpc_closure.experiment.choices import Choices
from hpc_closure.generate import pilot, rungs
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work import hdf5

# turbulence under steady forcing, whose unresolved scales follow the resolved ones
STEADY = """
base: subgrid_quick
name: steady
root: {root}
physics: {{viscosity: 5e-4}}
generate: {{grid: 72, members: 6, t_end: 9.0, dt: 4e-3, interval: 40,
           record: {{start: 6.0, every: 0.16, grid: 24}}}}
train: {{split: [0.34, 0.16, 0.5], steps: 4, batch: 4}}
pilot: {{initial_conditions: 4, members: 3, spinup: 1.92}}
replicas: {{members: 3, spinup: 0.96}}
rollout: {{members: 3, initial_conditions: 3, t_start: 7.92, t_end: 8.88, every: 0.16,
          interval: 40,
          rungs: [{{grid: 40, start: synchronised, drain: true}}]}}
evaluate: {{lead_times: [0.16, 0.32, 0.96], samples: 8, members: 4, formats: []}}
cluster: {{members_per_block: 6, device: cpu, threads: 1}}
"""

# eddies of two layers, whose potential vorticities differ in size
LAYERS = """
base: two_layer_quick
name: layers
root: {root}
model: {{conditions: {{previous_closures: 0}}}}
generate: {{grid: 48, members: 4, t_end: 32.0, dt: 0.1, interval: 4,
           record: {{start: 8.0, every: 2.0, grid: 24}}}}
train: {{split: [0.5, 0.25, 0.25], steps: 4, batch: 4}}
reduced: {{step: auto}}
pilot: {{initial_conditions: 3, members: 3}}
replicas: {{members: 2, spinup: 4.0}}
rollout: {{members: 2, initial_conditions: 1, t_start: 20.0, t_end: 32.0, every: 2.0, interval: 4,
          rungs: [{{grid: 32, start: moved, drain: true}}]}}
evaluate: {{lead_times: [2, 4], formats: []}}
cluster: {{members_per_block: 4, device: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An experiment whose data, pilot and replicas are there."""
    folder = tmp_path_factory.mktemp("rungs")
    path = folder / "steady.yaml"
    path.write_text(STEADY.format(root=folder / "runs"))
    experiment = reading.load(path)
    assert generate.run(experiment) == 0
    return experiment


@pytest.fixture(scope="module")
def trials(made):
    return pilot.Trials(made)


def error(trials, problem, start, past=0.0):
    """Fair CRPS by lead time of a rung of the pilot's starts, (leads,)."""
    return trials.errors(trials.run(problem, start, past, 3)).mean(1)


def test_the_step_is_the_longest_that_leaves_the_bare_errors_alone(made, trials):
    choice = Choices(made)._of("reduced")
    assert choice.stride > 1 and made.generate.interval % choice.stride == 0

    def errors(stride):
        return trials.errors(trials.run(reduced_problem(made.problem, 24, "subgrid", stride)))

    least, informative = errors(1), trials.informative(errors(1))
    ratio = (errors(choice.stride).mean(1) / least.mean(1))[informative]
    assert (ratio - 1).abs().max() <= 0.01
    longer = [n for n in range(choice.stride + 1, 41) if 40 % n == 0]
    for stride in longer:
        ratio = (errors(stride).mean(1) / least.mean(1))[informative]
        assert not (ratio - 1).abs().max() <= 0.01, stride
    assert 0 < choice.cfl < 2


def test_the_target_is_the_defect_of_the_map_with_that_step(made):
    """Stored states are one interval apart: the reduced map and the closure lead to the next."""
    from hpc_closure.data.reader import DataSet

    stride, data = Choices(made).stride, DataSet(made.folder / "data")
    with hdf5.open_hdf5(next(iter(sorted((made.folder / "data").glob("block_*.h5"))))) as file:
        assert file.attrs["stride"] == stride
    reduced = reduced_problem(made.problem, 24, "subgrid", stride)
    solver = Simulation(reduced, [0], 0)
    start, end = (torch.from_numpy(data.read(0, at)).double()[None] for at in (3, 4))
    closure = torch.from_numpy(data.read(0, 3, "closure")).double()[None]
    solver.load_state(0, solver.transform.to_spectral(start))
    solver.advance(reduced.steps_in(0.16))
    found = solver.transform.to_physical(solver.state) + 0.16 * closure
    size = end.std()
    assert (found - end).abs().max() < 1e-5 * size
    at_the_dns_step = Simulation(reduced_problem(made.problem, 24, "subgrid"), [0], 0)
    at_the_dns_step.load_state(0, solver.transform.to_spectral(start)).advance(40)
    other = solver.transform.to_physical(at_the_dns_step.state) + 0.16 * closure
    assert (other - end).abs().max() > 1e-4 * size


def test_a_synchronised_rung_knows_more_than_a_moved_one_and_a_wrong_past_nothing(made, trials):
    problem = rungs.rung_problem(made.problem, 40, 4)
    starts = ("empty", "moved", "synchronised", "mismatched")
    found = {how: error(trials, problem, how, 0.96) for how in starts}
    assert found["synchronised"][0] < 0.6 * found["moved"][0]
    assert found["synchronised"][0] < 0.6 * found["empty"][0]
    assert found["mismatched"][0] > 0.9 * found["moved"][0]
    assert found["mismatched"].mean() > 1.5 * found["synchronised"].mean()


def test_resolved_modes_at_the_start_are_the_starts_own(made, trials):
    for how in ("empty", "moved", "synchronised"):
        problem = rungs.rung_problem(made.problem, 40, 4)
        simulation = Simulation(problem, range(4), 0)
        known = trials.known(0.96)
        rungs.begin(simulation, how, known, torch.arange(4), 100, "rollout", 0.96)
        assert torch.equal(resize(simulation.state, trials.modes), known.now)
        beyond = simulation.state.abs().square().sum() - known.now.abs().square().sum()
        assert (float(beyond) > 0) == (how != "empty")
        assert simulation.step_index == 100


def test_members_differ_by_where_their_unresolved_modes_began(made, trials):
    fields = trials.run(rungs.rung_problem(made.problem, 40, 4), "moved", members=3)
    assert (fields[0.32][0] - fields[0.32][1]).abs().max() > 1e-3
    fields = trials.run(rungs.rung_problem(made.problem, 40, 4), "empty", members=2)
    assert torch.equal(fields[0.32][0], fields[0.32][1])


def test_a_drain_takes_out_what_gathers_at_the_cut_off(made, trials):
    rates = trials.fit_drain(24, Choices(made).stride)
    inner, outer = np.array(rates[1:5]), np.array(rates[6:9])
    assert (outer > 0).all() and outer.mean() > 5 * abs(inner).mean()
    plain, drained, wrong = (
        trials.errors(
            trials.run(rungs.rung_problem(made.problem, 24, 4, [sign * rate for rate in rates]))
        ).mean(1)
        for sign in (0, 1, -1)
    )
    assert drained[-1] < 0.97 * plain[-1] < plain[-1] < wrong[-1]


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """The pilot's trials of an experiment of two layers, whose data are there."""
    folder = tmp_path_factory.mktemp("layers")
    path = folder / "layers.yaml"
    path.write_text(LAYERS.format(root=folder / "runs"))
    experiment = reading.load(path)
    assert generate.run(experiment) == 0
    return pilot.Trials(experiment)


def test_each_field_of_a_state_is_scored_in_its_own_unit(layers):
    stored = torch.from_numpy(layers.pilot.read("model", layers.pilot.index(2.0))[0])
    upper, lower = stored.var((0, -2, -1))
    assert upper > 9 * lower  # else the test below shows nothing
    assert layers.truth[2.0].var((0, -2, -1)).tolist() == pytest.approx([1, 1], rel=0.01)
    fields = layers.run(rungs.rung_problem(layers.problem, 32, 2), "moved", members=3)
    assert fields[4.0].shape == (3, 3, 2, 24, 24)
    errors = layers.errors(fields)
    assert errors.shape == (2, 3) and (errors < 0.2).all() and layers.saturated > 0.5
    choice = Choices(layers.experiment).rung(layers.experiment.rollout.rungs[0])
    assert len(choice.drain) > 10 and np.isfinite(choice.drain).all()


def test_a_drain_is_fitted_to_all_fields_alike(layers, monkeypatch):
    """Layers that decay at two rates; one is ten times as strong."""
    problem = rungs.rung_problem(layers.problem, 32, 1)
    simulation = Simulation(problem, range(3), 0)
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(3, 1, 32, 32, generator=generator, dtype=torch.float64)
    start = simulation.transform.to_spectral(white) * torch.tensor([1e-3, 1e-4])[:, None, None]
    simulation.load_state(0, start).advance(problem.steps_in(layers.span))
    kept = torch.tensor([0.9, 0.7], dtype=torch.float64)
    whole = [start, simulation.state * kept[:, None, None]]
    monkeypatch.setattr(layers, "whole", [resize(each, 15) for each in whole])
    rates = layers.fit_drain(32, 1)
    assert np.mean(rates[2:6]) == pytest.approx(-np.log(0.8) / layers.span, rel=0.2)


def test_a_drain_damps_each_shell_at_its_rate():
    rates = [0.0, 0.5, 0.0, 2.0]
    problem = Problem(grid=16, dt=1e-3, scheme="cn_ab2", drain=rates)
    still = Problem(grid=16, dt=1e-3, scheme="cn_ab2")
    runs = []
    for one in (problem, still):
        simulation = Simulation(one, [0], 0)
        start = torch.zeros_like(simulation.state)
        for shell in (1, 2, 3):
            start[0, 0, shell] = 1e-6
        runs.append(simulation.load_state(0, start).advance(100).state.clone())
    ratio = (runs[0][0, 0, 1:4] / runs[1][0, 0, 1:4]).real
    assert torch.allclose(ratio, torch.tensor([-0.05, 0.0, -0.2]).double().exp(), rtol=1e-4)
    assert problem.member_hash() != still.member_hash()
    assert "drain" not in json.dumps({"hash": still.member_hash()})


def test_a_forcing_that_a_rung_does_not_resolve_is_not_drawn():
    noise = {"kind": "ring", "wavenumber": 12, "width": 1, "energy_rate": 1e-3}
    problem = Problem(grid=64, dt=1e-3, viscosity=0.0, noise=noise, scheme="cn_ab2")
    assert rungs.rung_problem(problem, 24).physics.noise.kind == "none"
    assert rungs.rung_problem(problem, 48).physics.noise.kind == "ring"


def test_the_pilot_is_in_no_data_set_and_chosen_once(made):
    from hpc_closure.data.reader import CoupledEnsemble, DataSet

    paths = sorted((made.folder / "pilot").glob("block_*.h5"))
    ensemble = CoupledEnsemble(paths)
    assert not set(ensemble.cases) & set(DataSet(made.folder / "data").members)
    before = (made.folder / "pilot" / "choices.json").read_bytes()
    assert generate.run(made) == 0
    assert (made.folder / "pilot" / "choices.json").read_bytes() == before


def test_what_was_not_found_is_one_line(made, tmp_path):
    more = "rollout.rungs=[{grid: 48, start: moved}]"
    other = reading.load(made.folder / "config.yaml", [more])
    with pytest.raises(ValueError, match="no step for rung_48_moved yet; run `hpc-closure gener"):
        Choices(other).rung(other.rollout.rungs[0])
    with pytest.raises(ValueError, match="no step for rung_48_moved yet; run `hpc-closure gener"):
        rollout.check_inputs(other)
    pilot = reading.load(made.folder / "config.yaml", ["pilot.members=5"])
    with pytest.raises(ValueError, match="no step for reduced yet for these settings of the pil"):
        Choices(pilot).check()
    nowhere = reading.load(made.folder / "config.yaml", [f"root={tmp_path}"])
    with pytest.raises(ValueError, match="no step for reduced yet"):
        Choices(nowhere).stride
    nowhere.folder.joinpath("pilot").mkdir(parents=True)
    Choices(nowhere).path.write_text("{broken")
    with pytest.raises(ValueError, match="not a file of pilot choices; remove it"):
        Choices(nowhere)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("reduced.step=3", r"reduced.step=3 does not divide generate.interval=40: one of 1, 2, 4"),
        ("rollout.rungs=[{grid: 16}]", "rung_16_empty has 16 points a side; expected at least"),
        ("rollout.rungs=[{grid: 96}]", "at most the DNS's 72"),
        ("rollout.rungs=[{grid: 40, step: 7}]", "step of rung_40_empty=7 does not divide"),
        ("rollout.rungs=[{grid: 40}, {grid: 40}]", "rung_40_empty is listed twice"),
        (
            "rollout.rungs=[{grid: 40, start: synchronised, past: 1.0}]",
            "past of rung_40_synchronised=1 is not a multiple of 0.16",
        ),
        (
            "rollout.rungs=[{grid: 40, start: synchronised, past: 3.2}]",
            "follows 3.2 of the past before rollout.t_start=7.92, snapshots begin at 6",
        ),
        ("replicas.members=0", "needs the starts' unresolved modes, which the replicas store"),
        ("pilot.spinup=0.5", "pilot.spinup=0.5 is not a multiple of 0.16"),
        ("generate.cfl=0.5", "steps of one length"),
    ],
)
def test_what_cannot_be_is_one_line(made, change, line):
    with pytest.raises(ValueError, match=line):
        reading.load(made.folder / "config.yaml", [change])


def test_other_closures_have_neither_step_nor_rungs():
    for change in ("reduced.step=2", "rollout.rungs=[{grid: 128}]"):
        with pytest.raises(ValueError, match="is for closure subgrid, generate.closure is diff"):
            reading.load("diffusion_64", [change])
