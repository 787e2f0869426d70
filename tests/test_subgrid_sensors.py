"""Sensors of subgrid closures: readings of the start's own closures, alone and in coupled runs."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import members_of

from hpc_closure.closure.artifact import load
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import Sensors, observe, values_at
from hpc_closure.closure.model import Request
from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.data.writer import BlockWriter
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.rollout.block import coupled_run, start
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options

PLANE = """
name: plane
root: {root}
seed: 5
physics: {{viscosity: 1.0e-3, drag: 0.1, forcing: {{kind: ring, wavenumber: 3, amplitude: 1.0}},
          noise: {{kind: none}}, initial: {{kind: band, wavenumber: 3, width: 1, energy: 0.02}}}}
generate: {{grid: 32, dt: 1.0e-2, scheme: cn_ab2, members: 12, t_end: 2.6, closure: subgrid,
           interval: 10, certificate: reported, record: {{start: 0.5, every: 0.1, grid: 16}}}}
model: {{preset: gaussian, conditions: {{sensors: optional, previous_closures: 1}}}}
train: {{split: [0.5, 0.25, 0.25], steps: 4, batch: 8}}
reduced: {{step: 1}}
replicas: {{members: 3, spinup: 0.5}}
rollout: {{members: 4, initial_conditions: 3, t_start: 1.6, t_end: 2.6, every: 0.1, interval: 10,
          baselines: [none, mean_gp], rungs: []}}
evaluate: {{lead_times: [0.1, 1.0], samples: 12, members: 4, formats: []}}
cluster: {{members_per_block: 4, device: cpu, threads: 1, checkpoint_every: 0.001}}
"""
LAYERS = [
    "name=layers",
    "physics={equation: two_layer_qg, deformation_radius: 0.5, mean_flow: [0.3, 0], "
    "viscosity: 2.0e-3, hyperviscosity: 1.0e-8, length: 6.283185307179586, forcing: {kind: none}, "
    "noise: {kind: ring, wavenumber: 2.5, width: 0.5, energy_rate: 0.1}, "
    "initial: {kind: band, wavenumber: 4, energy: 0.3}}",
    "replicas.members=0",
]
CUBE = [
    "name=cube",
    "physics={equation: navier_stokes_3d, length: 6.283185307179586, viscosity: 0.02, "
    "forcing: {kind: power, power: 0.2, reach: 1.5}, noise: {kind: none}, "
    "initial: {kind: band, wavenumber: 2, width: 1.0, energy: 0.3}}",
    "generate.scheme=etdrk4",
    "generate.grid=16",
    "generate.record.grid=8",
    "replicas.members=0",
]
LINE = [
    "name=line",
    "physics={equation: burgers1d, length: 1.0, viscosity: 1.0e-3, forcing: {kind: none}, "
    "noise: {kind: none}, initial: {kind: line, amplitude: 0.5}}",
    "generate.grid=64",
    "generate.dt=1.0e-3",
    "generate.interval=100",
    "rollout.interval=100",
    "replicas.members=0",
]
READ = "rollout.sensors={number: 8}"
SCORED = "evaluate.sensors=[{number: 8}]"
FREE = ["use.data=plane", "use.model=plane", "rollout.last_closures=own"]


def run_verbs(path, changes, *verbs):
    experiment = reading.load(path, changes)
    for verb in verbs:
        assert verb.run(experiment, Options(verbosity=-1)) == 0
    return experiment


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensors")
    path = folder / "experiment.yaml"
    path.write_text(PLANE.format(root=folder / "runs"))
    return path


@pytest.fixture(scope="module")
def plane(path):
    return run_verbs(path, [], generate, train)


@pytest.fixture(scope="module")
def free(path, plane):
    return run_verbs(path, [*FREE, "name=free"], rollout)


@pytest.fixture(scope="module")
def read(path, free):
    """A run with 8 x 8 sensors, evaluated beside a run without."""
    more = ["name=read", READ, "evaluate.sensors=[{number: 8}]", "evaluate.compare.free=free"]
    return run_verbs(path, [*FREE, *more], rollout, evaluate)


def crps(experiment, **columns):
    scores = pd.read_csv(Run.of(experiment).scores_csv, keep_default_na=False)
    scores = scores[(scores.score == "crps") & (scores["shell"] == "")]
    for name, value in columns.items():
        scores = scores[scores[name].astype(str) == str(value)]
    return scores.set_index("method")["value"].astype(float)


def test_the_coupled_run_reads_the_stored_closure_of_each_coming_interval(plane, path):
    experiment = reading.load(path, [*FREE, READ])
    closure, data = load(Run.of(plane).model), DataSet(Run.of(plane).data)
    run = coupled_run(experiment, closure, data, range(6), "cpu")
    seen = []
    for process in run.processes.values():
        draw = process.draw_hat
        process.draw_hat = lambda state, sensors, *rest, _draw=draw, **more: (
            seen.append(sensors),
            _draw(state, sensors, *rest, **more),
        )[1]
    start(run, data, experiment)
    run.advance(2)
    index = data.time_index(1.6)
    for call, sensors in enumerate(seen[1::2]):  # mean_gp is drawn before
        for row, (case, _) in enumerate(run.rows):
            stored = data.read(case, index + call, "closure", 16)
            assert np.array_equal(sensors.values[row], stored[::2, ::2].flatten())
    # a draw has the values that were read
    last = run.processes["model"].closures[0]
    drawn = run.simulations["model"].transform.to_physical(last)
    error = drawn[:, ::2, ::2].flatten(1) - seen[-1].values
    assert float(error.abs().max()) < 1e-3 * float(seen[-1].values.std())


def test_a_run_that_reads_is_nearer_to_the_trajectory_and_in_tables_of_its_own(read):
    for lead, share in (("0.1", 0.93), ("0.5", 0.8), ("1.0", 0.8)):
        score = crps(read, stage="coupled", lead_time=lead)
        assert score["model"] < share * score["free"] < share * score["none"]
        assert "oracle" not in score.index
    without, seen = (crps(read, stage="generated", sensors=one) for one in ("none", "8x8"))
    assert seen["model"] < 0.8 * without["model"]
    assert "oracle" in without.index and "oracle" not in seen.index
    page = Run.of(read).report.read_text()
    assert "8x8, 16² grid; truth: the start&#39;s own trajectory" in page
    assert "no sensors, 16² grid; truth: a replica" in page
    assert "The coupled run of free reads no sensors." in page
    # the truth of the scores is the stored trajectory, not a replica
    ensemble = CoupledEnsemble(sorted(Run.of(read).rollout.glob("block_*.h5")))
    data = DataSet(Run.of(reading.load(Run.of(read).config)).data)
    last = ensemble.index(1.0)
    truth = torch.from_numpy(ensemble.read("truth", last)[0]).double()
    for row, case in enumerate(ensemble.cases):
        assert np.array_equal(truth[row], data.read(case, data.time_index(2.6), "state", 16))
    members = torch.from_numpy(ensemble.read("model", last)).double()
    between = (members[:, None] - members[None]).abs().mean((-2, -1)).sum((0, 1)) / (2 * 4 * 3)
    expected = ((members - truth).abs().mean((-2, -1)).mean(0) - between).mean()
    assert crps(read, stage="coupled", lead_time="1.0")["model"] == pytest.approx(float(expected))


def test_a_run_without_sensors_does_not_take_one_that_reads_into_its_table(path, read):
    free = run_verbs(path, [*FREE, "name=free", "evaluate.compare.read=read"], evaluate)
    assert "read" not in crps(free, stage="coupled", lead_time="1.0").index
    page = Run.of(free).report.read_text()
    assert "its coupled run reads sensors, so its truth is the start&#39;s own trajectory" in page


def test_a_killed_run_with_noisy_sensors_goes_on_to_the_same_bits(path, plane, monkeypatch):
    noisy = "rollout.sensors={layout: scattered, number: 20, noise: 0.3}"

    def named(name, *changes):
        return reading.load(path, [*FREE, f"name={name}", noisy, *changes])

    whole = named("whole")
    assert rollout.run(whole, Options(verbosity=-1)) == 0
    expected = members_of(Run.of(whole).rollout)
    write = BlockWriter.write

    def fails(self, index, *rest):
        if index == 3:
            raise RuntimeError("pulled the plug")
        write(self, index, *rest)

    crashed = named("crashed")
    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "write", fails)
        assert rollout.run(crashed, Options(verbosity=-1)) == 3
    assert rollout.run(crashed, Options(verbosity=-1, retry_failed=True)) == 0
    assert members_of(Run.of(crashed).rollout) == expected and expected
    # errors do not depend on the block that a start is in; draws do by round-off only
    pairs = named("pairs", "cluster.members_per_block=2")
    assert rollout.run(pairs, Options(verbosity=-1)) == 0
    one, other = (
        CoupledEnsemble(sorted(Run.of(each).rollout.glob("block_*.h5"))).read("model", 2)
        for each in (whole, pairs)
    )
    assert np.allclose(one, other, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize(
    "changes", [LAYERS, CUBE, LINE], ids=["two fields", "three sides", "a line"]
)
def test_fields_of_one_to_three_sides_are_conditioned(path, changes):
    """Draws have the values that all fields have at the sensors, and runs read them."""
    experiment = run_verbs(path, changes, generate, train)
    folder, grid = Run.of(experiment), experiment.train_grid
    closure, data = load(folder.model), DataSet(folder.data)
    sides = experiment.physics.dimensions
    layout = reading.load(path, [*changes, "rollout.sensors={number: 4}"]).rollout.sensors
    index = data.time_index(1.6)
    state, truth, previous = (
        torch.from_numpy(data.read(9, index - lag, name, grid)[None]).double()
        for lag, name in ((0, "state"), (0, "closure"), (1, "closure"))
    )
    length = experiment.physics.length
    sensors = observe(truth, layout, 0, [0], 0, (length,) * sides)
    request = Request(state, range(40), seed=1, previous=previous[:, None])
    blind = closure.model.sample_batch(request)
    beyond: list[torch.Tensor] = []  # a draw with a rescaled shell does not have the values read
    drawn = closure.model.sample_batch(
        replace(request, sensors=sensors, on_rescaled=beyond.append)
    )
    inside = ~beyond[0].any(1)
    assert int(inside.sum()) > 20
    drawn = drawn[inside]
    places = sensors.positions
    at = [values_of(one, places, length, sides) for one in (drawn, truth)]
    assert float((at[0] - at[1]).abs().max()) < 2e-3 * float(truth.std())
    # elsewhere the readings help, and the spread is the smaller for it
    error, before = ((one.mean(0) - truth[0]).square().mean() for one in (drawn, blind))
    assert float(error) < 0.8 * float(before)
    assert float(drawn.var(0).mean()) < 0.8 * float(blind.var(0).mean())
    out = closure.sample(
        state[0].numpy(), previous=previous.numpy()[0][None], sensors=sensors, members=2
    )
    assert out.shape == (2, *truth.shape[1:])
    coupled = reading.load(path, [*changes, "rollout.sensors={number: 4, noise: 0.1}"])
    run = coupled_run(coupled, closure, data, range(6), "cpu")
    start(run, data, coupled)
    run.advance(2)
    assert bool(run.fields()["model"].isfinite().all())
    if sides == 2:
        more = ["use.model=layers", "name=scored", "use.data=layers", READ, "rollout.members=2"]
        scored = run_verbs(path, [*changes, *more, SCORED], rollout, evaluate)
        for layer in ("q_upper", "q_lower"):
            without, seen = (
                crps(scored, stage="generated", sensors=one, channel=layer)
                for one in ("none", "8x8")
            )
            assert seen["model"] < 0.8 * without["model"] and "fourier" not in seen.index
            leads = crps(scored, stage="coupled", lead_time="0.1", channel=layer)
            assert leads["model"] < leads["none"]
    if sides == 3:
        b = band(2, length, 3)
        spectra = b.to_spectral(drawn)
        flux = sum(k * one for k, one in zip(b.grid.k, spectra.unbind(1)))
        assert float(flux.abs().max()) < 1e-9 * float(spectra.abs().max())
    with pytest.raises(ValueError, match=r"expected \(S, "):
        wrong = Sensors(torch.zeros(2), torch.zeros(2, 2 if sides != 2 else 3))
        closure.model.sample_batch(replace(request, sensors=wrong))


def values_of(field, positions, length, sides):
    """Values of fields at sensors, of any number of sides."""
    if sides == 2:
        return values_at(field, positions, length)
    b = band((field.shape[-1] - 1) // 2, length, sides)
    return b.values(b.to_spectral(field), positions)


MODEL = ["model.conditions.sensors=optional", "model.preset=gaussian", READ, "rollout.rungs=[]"]


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            [
                "generate.record.every=0.4",
                "rollout.every=0.4",
                "model.conditions.previous_closures=0",
                "replicas.members=0",
                "evaluate.lead_times=[0.4]",
            ],
            "rollout.sensors reads the stored closure of every interval: set generate.record",
        ),
        (
            ["rollout.interval=50", "model.conditions.previous_closures=0"],
            "rollout.sensors reads closures of generate.interval=100 steps",
        ),
        (
            ["rollout.after_release=0.4", "rollout.members=4", "evaluate.lead_times=[1]"],
            "rollout.after_release=0.4 members begin in states of replicas: remove one of them",
        ),
        (["rollout.sensors.number=5"], "5 sensors per side do not divide the 32 points"),
        (["evaluate.sensors=[{number: 5}]"], "evaluate.sensors: 5 sensors per side do not divide"),
        (["model.conditions.sensors=none"], "rollout.sensors is set but model.conditions.sensors"),
    ],
    ids=str,
)
def test_what_sensors_cannot_read_is_one_line(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        reading.load("subgrid_quick", [*MODEL, *changes])
    assert "\n" not in str(error.value)


def test_a_model_that_was_trained_without_sensors_is_one_line(path, plane):
    run_verbs(path, ["use.data=plane", "name=deaf", "model.conditions.sensors=none"], train)
    deaf = reading.load(path, ["use.data=plane", "use.model=deaf", "name=wrong", READ])
    with pytest.raises(
        ValueError, match="deaf: trained with conditions.sensors=none, but rollout"
    ):
        rollout.run(deaf, Options(verbosity=-1))
