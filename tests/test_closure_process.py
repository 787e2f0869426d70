"""A closure in time: what it keeps from call to call, its state, other array libraries."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closure_case import fitted, law_of, states_of
from safetensors import safe_open
from safetensors.torch import save as serialize

import hpc_closure
from hpc_closure.closure import artifact
from hpc_closure.closure.model import Request
from hpc_closure.closure.process import Memory, Process
from hpc_closure.spectral.modes.grid import to_fields, to_spectra

MEMBERS, SIDE = 3, 32


@pytest.fixture(scope="module")
def closure():
    """The shipped closure that reads its last draws."""
    loaded = hpc_closure.load("subgrid_backscatter")
    assert loaded.config["conditions"]["previous_closures"] > 0
    return loaded


def states(number: int, members: int = MEMBERS) -> np.ndarray:
    """Return smooth fields (number, members, n, n)."""
    draws = torch.randn(number, members, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    return to_fields(to_spectra(draws.double(), 6), SIDE).numpy() * 4


def begun(closure, members=MEMBERS, seed=2):
    process = closure.process(members, seed=seed)
    past = states(process.memory.previous + 1)[1:]
    return process.begin(closures=0.05 * past)


def test_a_process_equals_calls_that_count_and_remember_by_hand(closure):
    process, previous = begun(closure), list(0.05 * states(closure_memory(closure) + 1)[1:])
    for call, state in enumerate(states(4)):
        drawn = process(state)
        request = Request(
            to_spectra(torch.from_numpy(state), 10),
            range(MEMBERS),
            2,
            call,
            previous=torch.stack([to_spectra(torch.as_tensor(u), 10) for u in previous], 1),
        )
        expected = to_fields(closure.sample_hat(request), SIDE).numpy()
        assert np.allclose(drawn, expected, atol=1e-12 * np.abs(expected).max())
        previous = [drawn, *previous[:-1]]
    assert process.calls == 4


def closure_memory(closure) -> int:
    return closure.config["conditions"]["previous_closures"]


def test_a_saved_process_continues_bit_for_bit(closure, tmp_path):
    whole = begun(closure)
    fields = states(5)
    expected = [whole(state) for state in fields]
    first = begun(closure)
    for state in fields[:2]:
        first(state)
    first.save(tmp_path / "process.safetensors")
    second = closure.process(MEMBERS, seed=2).load(tmp_path / "process.safetensors")
    assert second.calls == 2
    for state, drawn in zip(fields[2:], expected[2:]):
        assert np.array_equal(second(state), drawn)


def test_a_stored_process_of_others_is_refused(closure, tmp_path):
    path = tmp_path / "process.safetensors"
    begun(closure).save(path)
    with pytest.raises(ValueError, match="has seed=2, this one seed=3"):
        closure.process(MEMBERS, seed=3).load(path)
    with pytest.raises(ValueError, match=r"members=\[0, 1, 2\]"):
        closure.process(5, seed=2).load(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="not a whole file of a process"):
        closure.process(MEMBERS, seed=2).load(path)
    model = hpc_closure.closure.artifact.shipped_model("subgrid_backscatter")
    with pytest.raises(ValueError, match="not a file of a process"):
        closure.process(MEMBERS, seed=2).load(model)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"seed": None}, "the stored process lacks 'seed'"),
        ({"calls": None}, "has calls=None, not a number"),
        ({"calls": '"two"'}, "has calls='two', not a number"),
        ({"members": "[0, 1"}, r"its header has members=\[0, 1, expected JSON"),
    ],
)
def test_a_damaged_header_of_a_stored_process_is_one_line(closure, tmp_path, entries, message):
    path = tmp_path / "process.safetensors"
    begun(closure).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **entries}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    metadata = {name: text for name, text in metadata.items() if text is not None}
    path.write_bytes(serialize(tensors, metadata=metadata))
    with pytest.raises(ValueError, match=message) as caught:
        closure.process(MEMBERS, seed=2).load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and "save it again" in line


def test_a_foreign_tensor_in_a_stored_process_is_named(closure, tmp_path):
    path = tmp_path / "process.safetensors"
    begun(closure).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    path.write_bytes(serialize({"weights": torch.zeros(3)}, metadata=metadata))
    with pytest.raises(ValueError, match="its tensor 'weights' is not of a process"):
        closure.process(MEMBERS, seed=2).load(path)


def test_a_past_that_is_missing_is_named(closure):
    process = closure.process(MEMBERS)
    with pytest.raises(ValueError, match=r"reads 4 earlier closures, the process has 0: call"):
        process(states(1)[0])
    with pytest.raises(ValueError, match="has 2 fields, expected 4"):
        process.begin(closures=states(2))
    with pytest.raises(ValueError, match="a row for each of the 3 members"):
        begun(closure)(states(1, members=2)[0])


def test_a_member_that_fails_leaves_zeros_and_the_others_go_on(closure):
    """The draw shows the failure; the memory of the others is unchanged."""

    class Failing:
        config = closure.config
        channels = 1

        def interval_ratio(self, interval):
            return 1.0

        def sample_hat(self, request):
            drawn = closure.sample_hat(request)
            if request.call == 1:
                drawn[1] = torch.nan
            return drawn

    sound, failing = begun(closure), begun(closure)
    failing.closure = Failing()
    for state in states(2):
        expected, drawn = sound(state), failing(state)
    assert np.isnan(drawn[1]).all() and np.array_equal(drawn[[0, 2]], expected[[0, 2]])
    assert not failing.closures[0][1].any()
    again = failing(states(3)[2])
    assert np.isfinite(again).all()
    assert np.array_equal(again[[0, 2]], sound(states(3)[2])[[0, 2]])


def test_earlier_states_are_a_lag_apart():
    seen = []

    class Reader:
        def interval_ratio(self, interval):
            return 1.0

        def sample_hat(self, request):
            seen.append(request.history[:, :, 0, 1].real.clone())
            return torch.zeros_like(request.state)

    process = Process(Reader(), [0], 0, 1, memory=Memory(frames=2, lag=2))
    wave = np.cos(2 * np.pi * np.arange(8) / 8)[None] * np.ones((8, 1))
    process.begin(states=[number * 2 * wave[None] for number in range(4)])
    for number in range(4, 7):
        process(number * 2 * wave[None])
    assert np.allclose([row[0].tolist() for row in seen], [[2, 0], [3, 1], [4, 2]])


def test_the_lag_is_a_whole_number_of_calls():
    closure = SimpleNamespace(
        config={"conditions": {"previous_states": 2}}, target={"every": 0.1, "dt": 0.01}
    )
    assert Memory.of(closure, 5) == Memory(2, 2)
    with pytest.raises(ValueError, match="not a whole number of closure intervals of 0.04"):
        Memory.of(closure, 4)
    with pytest.raises(ValueError, match="not a whole number"):
        Memory.of(closure, 40)


class Foreign:
    """An array of another library, as DLPack and the array interface standard define it."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()

    def __array_namespace__(self):
        return SimpleNamespace(from_dlpack=lambda tensor: Foreign(tensor.clone()))


def test_arrays_of_other_libraries_come_back_as_they_came(closure):
    state = states(1)[0]
    expected = begun(closure)(state)
    tensor = begun(closure)(torch.from_numpy(state))
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), expected)
    single = begun(closure)(state.astype(np.float32))
    assert single.dtype == np.float32
    foreign = begun(closure)(Foreign(torch.from_numpy(state)))
    assert isinstance(foreign, Foreign) and np.array_equal(foreign.values.numpy(), expected)


def test_arrays_of_jax_come_back_as_arrays_of_jax(closure):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    state = states(1)[0]
    drawn = begun(closure)(jax.numpy.asarray(state))
    assert isinstance(drawn, jax.Array)
    assert np.array_equal(np.asarray(drawn), begun(closure)(state))


def test_members_beyond_the_range_of_the_training_are_counted(closure, tmp_path):
    """Old models do not know the range; a trained one holds it, in its file as well."""
    process = begun(closure)
    process(states(1)[0])
    assert process.beyond is None
    model = fitted(law_of(), 60, preset="gaussian")
    target = {"kind": "diffusion", "interval": 1, "dt": 0.01}
    artifact.save(model, tmp_path / "model.safetensors", target=target, provenance={})
    trained = hpc_closure.load(tmp_path / "model.safetensors")
    drawn = trained.process(4)
    drawn(states_of(4).numpy())  # states of the training
    shells = trained.model.band.grid.num_shells
    assert drawn.beyond.shape == (shells,) and not bool(drawn.beyond.any())
    outside = states_of(4).numpy()
    outside[0] *= 100
    outside[1] *= 1e-3
    drawn(outside)
    assert drawn.beyond[1:4].tolist() == [0.5] * 3 and float(drawn.beyond[0]) == 0
