"""Closures in boxes of unequal sides: the same closure as in the box that they repeat, and turned.

In a box of the twofold length a state may repeat that of the half box. Then terms, eddy
viscosities and laws must be those of the half box.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import four_verbs
from safetensors.torch import load_file

from hpc_closure.closure.artifact import Closure, build, load
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.features import Features, carried
from hpc_closure.closure.fields.modes import Band, band
from hpc_closure.closure.gaussian.channel_covariance import ChannelCovariance
from hpc_closure.closure.header import Header
from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.experiment.models import resolve
from hpc_closure.spectral.equations.two_layer import TwoLayerQG
from hpc_closure.spectral.modes.grid import hermitian
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

RUN = """
name: sides
root: {root}
seed: 5
physics: {{length: [2.0, 1.0], viscosity: 5.0e-4, forcing: {{kind: none}}, noise: {{kind: none}},
          initial: {{kind: band, wavenumber: 8, width: 4, energy: 0.05}}}}
generate: {{grid: [48, 24], dt: 1.0e-2, scheme: cn_ab2, members: 8, t_end: 1.2, interval: 4,
           closure: subgrid, certificate: reported,
           record: {{start: 0.4, every: 0.04, grid: [24, 12]}}}}
model: {{preset: convolutional, width: 4, mean_layers: 2,
        conditions: {{sensors: none, previous_closures: 1}}}}
train: {{split: [0.5, 0.25, 0.25], steps: 3, batch: 4, augment: true}}
reduced: {{step: 2}}
replicas: {{members: 3, spinup: 0.08}}
rollout: {{members: 2, initial_conditions: 2, t_start: 0.6, t_end: 0.84, every: 0.04, interval: 4,
          baselines: [none]}}
evaluate: {{lead_times: [0.04, 0.12], samples: 4, members: 3, formats: [png]}}
cluster: {{members_per_block: 8, device: cpu, threads: 1}}
"""
SQUARE = ["physics.length=1.0", "generate.grid=22", "generate.record.grid=12"]
LISTED = ["physics.length=[1.0,1.0]", "generate.grid=[22,22]", "generate.record.grid=[12,12]"]
LAYERS = {"equation": "two_layer_qg", "deformation_radius": 0.2, "beta": 1.0, "drag": 0.1}
LAYERS |= {"mean_flow": (0.3, 0.1)}


def smooth(b: Band, *lead):
    """Spectra of random states with a steep spectrum of the wavenumber."""
    k2 = b.grid.k2
    white = hermitian(torch.randn(*lead, *b.shape, dtype=torch.complex128), 2)
    return white * torch.exp(-k2 / 800) * (k2 > 0)


def repeated(w_hat, axis):
    """Spectra in the box twice as long on one side, of states that repeat there."""
    own = [w_hat.shape[-2] // 2, w_hat.shape[-1] - 1]
    modes = [2 * count if side == axis else count for side, count in enumerate(own)]
    out = w_hat.new_zeros(*w_hat.shape[:-2], 2 * modes[0] + 1, modes[1] + 1)
    rows = [row * (2 if axis == 0 else 1) for row in (*range(own[0] + 1), *range(-own[0], 0))]
    columns = torch.arange(own[1] + 1) * (2 if axis == 1 else 1)
    out[..., torch.tensor(rows)[:, None] % out.shape[-2], columns] = w_hat
    return out


def tiled(fields, axis):
    return torch.cat([fields, fields], dim=axis - 2)


def boxes(axis):
    """A square of 22 points, and the box that repeats it along one side: (points, lengths).

    They retain 7 modes, and 14 of the long side. The solver has no compiled term of these sizes.
    """
    points, lengths = [22, 22], [1.0, 1.0]
    points[axis], lengths[axis] = 44, 2.0
    return (22, 1.0), (tuple(points), tuple(lengths))


@pytest.mark.parametrize("axis", [0, 1])
def test_features_of_a_state_that_repeats(axis):
    torch.manual_seed(0)
    square = band(7)
    modes = (14, 7) if axis == 0 else (7, 14)
    box = band(modes, boxes(axis)[1][1])
    assert box.modes == modes and box is band(modes, boxes(axis)[1][1])
    for equation in (None, "layers"):
        sets = []
        for b in (square, box):
            if equation:
                sets.append(Features(b, TwoLayerQG(**{**LAYERS, "length": b.length})))
            else:
                sets.append(Features(b))
        channels = (2,) if equation else ()
        states, closures = smooth(square, 3, *channels), smooth(square, 3, 2, *channels)
        for one, other in zip(
            (sets[0].spectra(states), sets[0].carried(states, closures)),
            (
                sets[1].spectra(repeated(states, axis)),
                sets[1].carried(repeated(states, axis), repeated(closures, axis)),
            ),
        ):
            assert torch.allclose(repeated(one, axis), other, atol=1e-12 * float(one.abs().max()))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("preset", ["smagorinsky", "leith", "jansen_held", "dynamic_leith"])
def test_eddy_viscosities_of_a_state_that_repeats(axis, preset):
    torch.manual_seed(1)
    (points, length), (sizes, lengths) = boxes(axis)
    config = resolve({"preset": preset})
    one, other = build(config, points, length), build(config, sizes, lengths)
    assert one.width == other.width
    w_hat = smooth(one.band, 2)
    u_hat = one.tendency(w_hat, one.constants)
    box_hat = other.tendency(repeated(w_hat, axis), other.constants)
    bound = 1e-12 * float(u_hat.abs().max())
    assert torch.allclose(box_hat, repeated(u_hat, axis), atol=bound)
    field = one.band.to_physical(w_hat, 22)
    closure = Closure(other, Header(config, sizes, lengths, {"kind": "subgrid"}, {}))
    drawn = closure.sample(tiled(field, axis), members=2)
    assert torch.allclose(
        drawn, tiled(one.band.to_physical(u_hat, 22), axis), atol=1e-9 * float(drawn.abs().max())
    )


def test_two_layers_that_repeat():
    torch.manual_seed(2)
    quiet = {"forcing": {"kind": "none"}, "noise": {"kind": "none"}, "initial": {"kind": "zero"}}
    numerics = {"dt": 1e-3, "scheme": "ab3", **LAYERS, **quiet}
    square, box = (
        Simulation(Problem(grid=grid, length=length, **numerics), range(2), 0)
        for grid, length in boxes(0)
    )
    w_hat = smooth(band(7), 2, 2)
    square.load_state(0, w_hat).advance(20)
    box.load_state(0, repeated(w_hat, 0)).advance(20)
    expected = repeated(square.state, 0)
    moved = (square.state - w_hat).abs().max()
    assert (box.state - expected).abs().max() < 1e-12 * moved


def test_white_noise_and_the_largest_modes_of_a_box():
    for modes in ((7, 3), (3, 7), (5, 1)):
        b = band(modes, (2.0, 1.0))
        white = keyed_noise.white_spectra(b, 0, "test", range(2000), 0)
        assert torch.equal(b.hermitian(white), white)
        power = white.abs().square().mean(0)
        assert torch.allclose(power, torch.ones_like(power), atol=0.15)
        assert b.to_physical(
            white, tuple(2 * count + 2 for count in modes)
        ).var() == pytest.approx(b.white_rms**2, rel=0.02)
        numbers = torch.randn(4, 25, dtype=torch.float64)
        placed = b.place_largest(numbers)
        assert torch.equal(b.hermitian(placed), placed)
        if min(modes) >= 2:
            assert torch.equal(b.largest(placed), numbers)
    assert band((7, 7), (1.0, 1.0)) is band(7)


def test_a_box_has_the_rotations_of_its_sides():
    """The mean of a vector is isotropic on a square only."""
    vector = ["vector x", "vector y"]
    counts = [
        len(ChannelCovariance(band((7, 7), lengths), vector)._rotations())
        for lengths in ((1.0, 1.0), (2.0, 1.0))
    ]
    assert counts == [4, 2]


def turned(fields):
    """Pseudo-scalars of the mirrored box, in which x is y."""
    return -fields.transpose(-1, -2)


def test_exchanged_axes_give_the_mirrored_closure():
    """Fits to snapshots of a box and to their mirror images are mirror images."""
    torch.manual_seed(3)
    models, b = [], band((7, 3), (2.0, 1.0))
    w_hat = smooth(b, 60)
    advected = carried(w_hat, w_hat[:, None], b)[:, 0]
    noise = smooth(b, 60) * 0.3 * advected.abs().max()
    target = 0.5 * advected + noise - 3.0 * w_hat
    states, targets = (b.to_physical(one, (24, 12)) for one in (w_hat, target))
    config = resolve({"preset": "gaussian", "conditions": {"sensors": "none"}})
    for map_of, size, length in (
        (lambda x: x, (24, 12), (2.0, 1.0)),
        (turned, (12, 24), (1.0, 2.0)),
    ):
        model = build({**config, "noise_memory": "off"}, size, length)
        for phase in model.phases:
            chosen = slice(0, 40) if phase.members == "fit" else slice(40, 60)
            model.begin(phase.name, [(map_of(states[chosen]), map_of(targets[chosen]))])
        models.append(model)
    one, other = (model.statistics for model in models)
    assert one.generator_modes == other.generator_modes
    for name in ("first_spectrum", "law_spectrum"):
        assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-6)
    new = b.to_physical(smooth(b, 3), (24, 12))
    means = []
    for model, map_of in zip(models, (lambda x: x, turned)):
        frames = model.frames(map_of(new), None, None)
        mean = model.encode(frames).mean_hat
        means.append(map_of(model.band.to_physical(mean, map_of(new).shape[-2:])))
    assert torch.allclose(*means, atol=1e-5 * float(means[0].abs().max()))
    size = float(means[0].std())
    assert size > 0.5 * float(targets.std())
    draws = []
    for model, map_of in zip(models, (lambda x: x, turned)):
        closure = Closure(model, Header(config, model.grid, model.length, {"kind": "subgrid"}, {}))
        drawn = closure.sample(map_of(new[0]), members=400, seed=1)
        draws.append(map_of(drawn - drawn.mean(0)).var(0).mean())
    assert draws[0] == pytest.approx(float(draws[1]), rel=0.05)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    experiment = four_verbs(tmp_path_factory.mktemp("box"), RUN)
    return experiment, Run.of(experiment)


def test_all_verbs_in_a_box(run):
    experiment, folder = run
    data = DataSet(folder.data)
    assert data.grid == (24, 12)
    assert data.read(0, 0, "closure").shape == (24, 12)
    closure = load(folder.model)
    assert closure.header.size == (24, 12) and closure.header.length == (2.0, 1.0)
    assert not closure.equal_sides
    state = data.read(1, 3).astype(np.float64)
    drawn = closure.sample(state, previous=state[None], members=3)
    assert drawn.shape == (3, 24, 12) and np.isfinite(drawn).all()
    ensemble = CoupledEnsemble(sorted(folder.rollout.glob("block_*.h5")))
    assert ensemble.read("model", 2).shape[-2:] == (24, 12)
    rows = pd.read_csv(folder.evaluate / "scores.csv")
    kept = rows[rows.score.isin(["crps", "crps_ratio", "spread_skill"])]
    assert {"generated", "coupled"} <= set(kept.stage) and kept.value.notna().any()
    assert (folder.evaluate / "report.html").exists()
    assert set(rows.grid.dropna()) == {12}


def test_a_process_in_a_box_equals_single_draws(run):
    data, closure = DataSet(run[1].data), load(run[1].model)
    state = torch.from_numpy(data.read(1, 3).astype(np.float64))
    last = torch.from_numpy(data.read(1, 2, "closure").astype(np.float64))
    process = closure.process(2, seed=3)
    process.begin(closures=[last.expand(2, -1, -1)])
    drawn = process(state.expand(2, -1, -1))
    single = closure.sample(state, previous=last[None], members=2, seed=3)
    assert torch.allclose(drawn, single, atol=1e-9 * float(single.abs().max()))


def test_lists_of_equal_numbers_give_the_bits_of_numbers(tmp_path):
    made = []
    for name, changes in (("number", SQUARE), ("list", LISTED)):
        (tmp_path / name).mkdir()
        experiment = four_verbs(tmp_path / name, RUN, changes, verbs=3)
        made.append(Run.of(experiment))
    first, second = (DataSet(folder.data) for folder in made)
    for member in range(8):
        for name in ("state", "closure"):
            one, other = (data.read(member, slice(None), name) for data in (first, second))
            assert np.array_equal(one, other)
    weights = [load_file(folder.model) for folder in made]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    runs = [CoupledEnsemble(sorted(each.rollout.glob("block_*.h5"))) for each in made]
    assert np.array_equal(*(each.read("model", 5) for each in runs))


@pytest.mark.parametrize(
    "changes, words",
    [
        (["model.mean=[regression,fno]"], "model.mean=.* needs one number for all sides"),
        (["model.preset=default"], "model.mean=.*regression.*fno.* needs one number for all"),
        (["generate.closure=convection"], "generate.closure=convection needs one number"),
        (["rollout.rungs=[{grid: 48, step: 1}]"], "rollout.rungs=on needs one number for all"),
        (["reduced.known=8"], "reduced.known=8 needs one number for all sides"),
        (["train.opponents=[mixture]"], "train.opponents=on needs one number"),
    ],
)
def test_what_needs_equal_sides_is_one_line(tmp_path, changes, words):
    path = tmp_path / "box.yaml"
    path.write_text(RUN.format(root=tmp_path))
    with pytest.raises(ValueError, match=words) as error:
        reading.load(path, changes)
    assert "\n" not in str(error.value)


def test_a_field_that_is_too_coarse_is_one_line(run):
    closure = load(run[1].model)
    state = np.zeros((24, 6))
    line = "field is 24 x 6; a band of 7 x 3 modes needs at least 16 x 8 points"
    with pytest.raises(ValueError, match=line):
        closure.sample(state, previous=state[None], members=2)
    with pytest.raises(ValueError, match="even number of points per side, not 23"):
        closure.sample(np.zeros((23, 12)), members=2)
