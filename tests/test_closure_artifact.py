"""One file in, one closure out; the contract of ``Closure.sample``."""

import json
import math
import struct
import threading

import numpy as np
import pytest
import torch
from closure_case import batches_of, fitted, law_of, states_of

import hpc_closure
from hpc_closure.closure import artifact
from hpc_closure.closure.exact import ExactLaw
from hpc_closure.closure.sensors import Sensors, regular_positions
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    law = law_of()
    model = fitted(law)
    model.begin("check", batches_of(law, 50))
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    artifact.save(
        model,
        path,
        target={"kind": "diffusion", "interval": 1, "dt": 1e-3},
        provenance={"seed": 0},
    )
    return law, model, path


def test_loads_to_the_same_closure(saved):
    _, model, path = saved
    closure = hpc_closure.load(path)
    state = states_of(1)[0]
    expected = model.sample_batch(state[None], members=range(4), seed=2)
    assert torch.equal(closure.sample(state, members=4, seed=2), expected)
    assert closure.config["width"] == 8 and closure.target["kind"] == "diffusion"
    assert artifact.read_header(path)["provenance"] == {"seed": 0}


def test_a_network_that_is_switched_off_is_not_evaluated(saved):
    closure = hpc_closure.load(saved[2])
    assert closure.evaluations() == closure.evaluations(8) == 0
    closure.model.statistics["score/gain"] = torch.ones_like(
        closure.model.statistics["score/gain"]
    )
    assert closure.evaluations() == closure.config["evaluations"] == 4
    assert closure.evaluations(8) == 8


def test_numpy_and_torch_single_and_double(saved):
    closure = hpc_closure.load(saved[2])
    state = states_of(1)[0]
    double = closure.sample(state, members=3)
    assert double.dtype == torch.float64 and double.shape == (3, 32, 32)
    array = closure.sample(state.numpy(), members=3)
    assert isinstance(array, np.ndarray) and array.dtype == np.float64
    assert np.array_equal(array, double.numpy())
    single = closure.sample(state.float(), members=3)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), double, atol=1e-5 * float(double.abs().max()))


def test_rows_are_members(saved):
    closure = hpc_closure.load(saved[2])
    states = states_of(3)
    rows = closure.sample(states, members=[5, 6, 7], seed=1, call=4)
    alone = closure.sample(states[1], members=[6], seed=1, call=4)
    assert torch.allclose(rows[1], alone[0], atol=1e-12)


def test_calls_may_overlap(saved):
    closure = hpc_closure.load(saved[2])
    states = states_of(4)
    sensors = Sensors(torch.zeros(16), regular_positions(4))
    expected = [closure.sample(s, members=3, sensors=sensors) for s in states]
    found = [None] * 4

    def work(i):
        for _ in range(5):
            found[i] = closure.sample(states[i], members=3, sensors=sensors)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_interval_is_relative_to_the_trained_one(saved):
    closure = hpc_closure.load(saved[2])
    state = states_of(1)[0]
    one = closure.sample(state, members=100)
    four = closure.sample(state, members=100, interval=4)
    assert float(one.var(0).mean() / four.var(0).mean()) == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize(
    "call,message",
    [
        (dict(state=torch.zeros(32)), "expected"),
        (dict(state=torch.zeros(2, 32, 32), members=3), "one row per member"),
        (dict(state=torch.full((32, 32), math.nan)), "blown up"),
        (dict(state=torch.zeros(32, 32), members=0), "at least one"),
        (dict(state=torch.zeros(16, 16)), "at least 22"),
        (dict(state=torch.zeros(32, 32), history=torch.zeros(1, 32, 32)), "conditions.history=0"),
    ],
)
def test_misuse_is_one_clear_line(saved, call, message):
    with pytest.raises(ValueError, match=message) as error:
        hpc_closure.load(saved[2]).sample(**call)
    assert "\n" not in str(error.value)


def test_damaged_and_foreign_files(saved, tmp_path):
    whole = saved[2].read_bytes()
    cases = {
        "truncated": whole[: len(whole) // 2],
        "text": b"not a model",
        "empty": b"",
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            hpc_closure.load(path)
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    (tmp_path / "foreign.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="not a model of this package"):
        hpc_closure.load(tmp_path / "foreign.safetensors")
    with pytest.raises(FileNotFoundError):
        hpc_closure.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kind", ["diffusion", "convection"])
def test_shipped_models_are_those_of_the_shipped_presets(kind):
    """Made by ``generate`` and ``train`` of the preset as it is now; nothing of the maker's."""
    assert artifact.shipped() == ["convection", "diffusion"]
    path = Run.of(reading.load(f"{kind}_64", [f"use.model={kind}"])).model
    provenance = artifact.read_header(path)["provenance"]
    assert provenance["hashes"]["train"] == reading.load(f"{kind}_64").stage_hash("train")
    assert not {"host", "user", "run"} & set(provenance)


@pytest.mark.parametrize("grid", [64, 128])
@pytest.mark.parametrize("kind, bound", [("diffusion", 2.5e-3), ("convection", 8e-3)])
def test_shipped_models_sample_right_after_installation(kind, bound, grid):
    """Developed flow: with sensors near the truth, without them as wide as the exact law."""
    noise = {"kind": "q_wiener", "amplitude": 5e-5, "draws": 10, "correlation": 0.005}
    problem = Problem(grid=grid, noise=noise, forcing={"kind": "published", "amplitude": 0.1})
    flow = Simulation(problem, [0, 1], seed=11).initialise()
    flow.advance(1500)
    states = flow.transform.to_physical(flow.state)
    law, closure = ExactLaw(problem, kind), hpc_closure.load(kind)
    truth = law.sample(states, members=[5], seed=3)[0]
    stride = grid // 16
    values = truth[:, ::stride, ::stride].flatten(1)
    drawn = closure.sample(states, members=2, sensors=Sensors(values, regular_positions(16)))
    error = (drawn - truth).square().mean((-2, -1)).sqrt() / truth.square().mean((-2, -1)).sqrt()
    assert float(error.max()) < bound
    free = closure.sample(states[0], members=64, seed=1)
    assert float(free.var(0).mean() / law.variance) == pytest.approx(1, abs=0.1)
