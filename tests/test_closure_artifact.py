"""One file in, one closure out; the contract of ``Closure.sample``."""

import json
import math
import re
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from closure_case import batches_of, fitted, law_of, states_of

import hpc_closure
from hpc_closure.closure import artifact
from hpc_closure.closure.artifact import build
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import Sensors, read_regular, regular_positions
from hpc_closure.closure.gaussian.exact import ExactLaw
from hpc_closure.closure.header import Header, read_header, shipped
from hpc_closure.closure.model import Request
from hpc_closure.closure.part_report import describe
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.spectral.modes.grid import hermitian
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

FINE = torch.zeros(32, 32, dtype=torch.float64)


TARGET = {"kind": "diffusion", "interval": 1, "dt": 1e-3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    law = law_of()
    model = fitted(law)
    model.begin("check", batches_of(law, 50))
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    artifact.save(model, path, target=TARGET, provenance={"seed": 0})
    return law, model, path


@pytest.fixture(scope="module")
def learned(saved, tmp_path_factory):
    """A file whose generator acts, as if it had learned something."""
    law, model, _ = saved
    acting = build(model.config, law.grid.size)
    ones = torch.ones(model.frame.kept.grid.num_shells).double()
    acting.adopt(replace(model.statistics, score_gain=ones))
    torch.nn.init.normal_(acting.residual.network.head.weight, std=0.3)
    path = tmp_path_factory.mktemp("learned") / "model.safetensors"
    artifact.save(acting, path, target=TARGET, provenance={})
    return path


def test_loads_to_the_same_closure(saved):
    _, model, path = saved
    closure = hpc_closure.load(path)
    state = states_of(1)[0]
    expected = model.sample_batch(Request(state[None], members=range(4), seed=2))
    assert torch.equal(closure.sample(state, members=4, seed=2), expected)
    assert closure.config["width"] == 8 and closure.target["kind"] == "diffusion"
    assert read_header(path).provenance == {"seed": 0}


def test_weights_that_no_sample_evaluates_are_not_in_the_file(saved, learned):
    _, model, path = saved
    closed, acting = hpc_closure.load(path), hpc_closure.load(learned)
    assert closed.evaluations() == closed.evaluations(8) == 0
    assert closed.model.num_parameters() == 0 < model.num_parameters()
    told = {part.name: part.acts for part in closed.parts()}
    assert told["mean: regression"] and not told["residual: score"] and not told["mean: fno"]
    assert describe(closed.parts()).startswith("closed form: mean: regression (w)")
    assert acting.evaluations() == acting.config["function_evaluations"] == 4
    assert acting.evaluations(8) == 8
    assert acting.model.num_parameters() == sum(w.numel() for w in model.residual.parameters())
    assert describe(acting.parts()).startswith("parts that act")


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


@pytest.mark.parametrize("grid", [32, 28, 48])
@pytest.mark.parametrize("acts", [False, True])
@pytest.mark.parametrize("number", [0, 4])
def test_fields_and_spectra_give_the_same_draw(saved, learned, grid, acts, number):
    """The same request in either form, on any grid, with sensors and without."""
    closure = hpc_closure.load(learned if acts else saved[2])
    solver = band(retained_modes(grid))
    states = solver.to_physical(solver.to_spectral(states_of(3, size=grid)), grid)
    sensors = read_regular(torch.ones(3, grid, grid).double(), number) if number else None
    drawn = closure.sample(states, members=[4, 5, 6], seed=2, call=3, interval=2, sensors=sensors)
    request = Request(
        solver.to_spectral(states),
        [4, 5, 6],
        2,
        3,
        sensors,
        interval_ratio=closure.interval_ratio(2),
    )
    drawn_hat = closure.sample_hat(request)
    assert drawn_hat.dtype == torch.complex128 and drawn_hat.shape == (3, *solver.shape)
    expected = solver.to_spectral(drawn)
    error = (drawn_hat - expected).abs().max() / expected.abs().max()
    assert float(error) < (1e-5 if acts else 1e-12)  # a network works in single precision
    assert torch.equal(drawn_hat, hermitian(drawn_hat))


def test_the_published_model_takes_spectra_too():
    config = {"preset": "published", "width": 4, "modes": 4, "layers": 1}
    model = build({**config, "conditions": {"sensors": "none"}}, 32)
    closure = artifact.Closure(model.eval(), Header({}, 32, 1.0, {"interval": 1}, {}))
    states = states_of(2)
    b = band(10)
    request = Request(b.to_spectral(states), [0, 1], 5)
    expected = b.to_spectral(closure.sample(states, members=2, seed=5))
    assert torch.allclose(closure.sample_hat(request), expected, atol=1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(state="vorticity"), r"state is a str; expected a tensor \(2K \+ 1, K \+ 1\) or"),
        (dict(state=FINE), r"state holds float64; expected complex spectra \(sample takes fields"),
        (dict(state=torch.zeros(21, 12)), r"expected \(2K \+ 1, K \+ 1\)"),
        (dict(state=torch.zeros(1, 1)), r"shape \(1, 1\), expected \(2K \+ 1, K \+ 1\)"),
        (dict(state=torch.zeros(1, 3, 21, 11)), r"shape \(1, 3, 21, 11\), expected"),
        (dict(state=torch.zeros(2, 21, 11)), "one row per member"),
        (dict(state=torch.full((21, 11), math.nan)), "blown up"),
        (dict(members=[]), "at least one"),
        (dict(members=[-1, 0, 1]), "ids from 0 on"),
        (dict(call=-1), "call=-1: expected an integer"),
        (dict(sensors=FINE), "sensors is a Tensor"),
        (dict(state=torch.zeros(11, 6)), "at least 22"),
        (dict(history=FINE), "history holds float64"),
        (dict(history=torch.zeros(21, 11)), r"expected \(H, 2K \+ 1, K \+ 1\) or \(M, H"),
        (dict(history=torch.zeros(1, 21, 11)), "conditions.previous_states=0"),
    ],
)
def test_misuse_with_spectra_is_the_same_line(saved, change, message):
    request = Request(torch.zeros(21, 11).to(torch.complex128), [0, 1, 2])
    for name, value in change.items():
        if isinstance(value, torch.Tensor) and value is not FINE:
            change = {**change, name: value.to(torch.complex128)}
    with pytest.raises(ValueError, match=message):
        hpc_closure.load(saved[2]).sample_hat(replace(request, **change))


def test_saving_leaves_the_model_as_it_was(saved, tmp_path):
    """The spacing of the snapshots is the file's, told by the target."""
    model = saved[1]
    before = model.saved_statistics()
    target = {"kind": "diffusion", "interval": 2, "dt": 1e-3, "every": 0.1}
    artifact.save(model, tmp_path / "model.safetensors", target=target, provenance={})
    after = model.saved_statistics()
    assert before.keys() == after.keys() and "memory/spacing" not in after
    assert all(torch.equal(before[key], after[key]) for key in before)
    loaded = hpc_closure.load(tmp_path / "model.safetensors").model
    assert loaded.statistics.memory_spacing == pytest.approx(50)


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
        # no fields
        (
            dict(state="vorticity"),
            r"state is a str; expected an array or tensor \(n, n\) or \(M, n",
        ),
        (dict(state=object()), "state is a object; expected an array or tensor"),
        (dict(state=None), "state is a NoneType; expected an array or tensor"),
        (dict(state=np.array([["a"] * 32] * 32)), "state is a ndarray; .* of numbers"),
        (dict(state=FINE.to(torch.complex64)), "state is complex; expected real fields"),
        (dict(state=FINE.numpy() + 0j), "state is complex; expected real fields"),
        (dict(state=FINE.long()), "state holds int64; expected floating-point numbers"),
        (dict(state=FINE > 0), "state holds bool; expected floating-point numbers"),
        # shapes and grids
        (
            dict(state=torch.zeros(32)),
            r"state has shape \(32,\), expected \(n, n\) or \(M, n, n\)",
        ),
        (dict(state=torch.zeros(())), r"state has shape \(\), expected"),
        (dict(state=torch.zeros(0, 0)), r"state has shape \(0, 0\), expected"),
        (dict(state=torch.zeros(32, 30)), r"state has shape \(32, 30\), expected"),
        (dict(state=torch.zeros(1, 1, 32, 32)), r"state has shape \(1, 1, 32, 32\), expected"),
        (dict(state=torch.zeros(33, 33)), "an even number of points per side, not 33"),
        (dict(state=torch.zeros(23, 23)), "an even number of points per side, not 23"),
        (
            dict(state=torch.zeros(20, 20)),
            "field is 20x20; a band of 10 modes needs .* at least 22",
        ),
        (dict(state=torch.zeros(2, 32, 32), members=3), "2 states for 3 members: one row per mem"),
        # no numbers
        (
            dict(state=torch.full((32, 32), math.nan)),
            "state has non-finite values: the solver has",
        ),
        (dict(state=torch.full((32, 32), math.inf)), "state has non-finite values"),
        (dict(history=torch.full((1, 32, 32), math.nan)), "history has non-finite values"),
        # members, call, interval, evaluations
        (dict(members=0), "members=0: at least one sample must be asked for"),
        (dict(members=-2), "members=-2: at least one"),
        (dict(members=[]), r"members=\[\]: at least one"),
        (dict(members=[0, -1]), r"members=\[0, -1\]: expected how many, or their ids from 0 on"),
        (dict(members=2.0), "members=2.0: expected how many"),
        (dict(members="2"), "members='2': expected how many"),
        (dict(members=True), "members=True: expected how many"),
        (dict(members=[0.5]), r"members=\[0.5\]: expected how many"),
        (dict(members=[[0, 1], [2]]), "lists of different lengths: expected as many ids for ever"),
        (dict(members=[[0, 1]] * 2), "1 states for 2 lists of members: one row per list"),
        (dict(members=[[], []]), "at least one sample must be asked for"),
        (dict(seed=-1), "seed=-1: expected an integer from 0 on"),
        (dict(seed="a"), "seed='a': expected an integer from 0 on"),
        (dict(call=-1), "call=-1: expected an integer from 0 on"),
        (dict(call=1.5), "call=1.5: expected an integer"),
        (dict(interval=0), "interval=0: expected an integer from 1 on"),
        (dict(evaluations=0), "evaluations=0: expected an integer from 1 on"),
        # conditions
        (
            dict(sensors=torch.zeros(16)),
            r"sensors is a Tensor; expected Sensors\(values, positions",
        ),
        (
            dict(sensors=Sensors(torch.zeros(3, 4), torch.zeros(4, 2)), members=[[0, 1, 2]]),
            "sensors hold 3 rows of readings for 1 states",
        ),
        (dict(history="past"), r"history is a str; expected an array or tensor \(H, n, n\) or"),
        (dict(history=torch.zeros(32, 32)), r"history has shape \(32, 32\), expected \(H, n, n\)"),
        (dict(history=torch.zeros(1, 24, 24)), "expected the same grid"),
        (
            dict(history=torch.zeros(2, 1, 32, 32)),
            "history of 2 states for 1: expected one for ea",
        ),
        (dict(history=torch.zeros(1, 32, 32)), "conditions.previous_states=0"),
    ],
    ids=lambda one: one if isinstance(one, str) else "-".join(one),
)
def test_misuse_is_one_clear_line(saved, call, message):
    with pytest.raises(ValueError, match=message) as error:
        hpc_closure.load(saved[2]).sample(**{"state": FINE, **call})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("acts", [False, True])
@pytest.mark.parametrize("number", [0, 4])
def test_lists_of_members_share_a_state(saved, learned, acts, number):
    closure = hpc_closure.load(learned if acts else saved[2])
    states, ids = states_of(3), [[4, 9], [0, 1], [7, 2]]
    read = read_regular(states.roll(3, -1), number) if number else None
    together = closure.sample(states.numpy(), members=np.array(ids), seed=2, sensors=read)
    assert isinstance(together, np.ndarray) and together.shape == (3, 2, 32, 32)
    for row, mine in enumerate(ids):
        sensors = read and read.rows(row)
        alone = closure.sample(states[row].numpy(), members=mine, seed=2, sensors=sensors)
        error = np.abs(together[row] - alone).max() / np.abs(alone).max()
        assert error < (1e-5 if acts else 1e-12)  # a network works in single precision


def test_what_means_the_same_is_the_same(saved):
    """Lists of ids in any form of integers; arrays with the other byte order or turned over."""
    closure = hpc_closure.load(saved[2])
    state = states_of(1)[0].numpy()
    expected = closure.sample(state, members=3)
    for members in (np.int64(3), range(3), (0, 1, 2), np.arange(3), torch.arange(3)):
        assert np.array_equal(closure.sample(state, members=members), expected)
    assert np.array_equal(closure.sample(state.astype(">f8"), members=3), expected)
    assert np.array_equal(closure.sample(state[::-1].copy()[::-1], members=3), expected)


def beyond(share, grid=64, seed=3):
    """A state on a finer grid with a share of its variance outside the band of 10 modes."""
    inner, own = band(10), band(retained_modes(grid))
    state = inner.to_physical(inner.to_spectral(states_of(1, size=grid)), grid)[0]
    rough = torch.randn(grid, grid, generator=torch.Generator().manual_seed(seed)).double()
    w_hat = own.to_spectral(rough)
    w_hat[..., :11, :11] = w_hat[..., -10:, :11] = 0
    rough = own.to_physical(w_hat, grid)
    return state + rough * (share / (1 - share) * state.var() / rough.var()).sqrt()


@pytest.mark.parametrize("share", [1e-5, 0.3])
def test_what_lies_outside_the_band_is_told_once_or_refused(saved, caplog, share):
    state, own = beyond(share), band(21)
    message = rf"{share:.2g} of the state's variance is outside the model's band of 10 modes .*32"
    asks = Request(own.to_spectral(state), [0, 1])
    for ask in ("sample", "sample_hat"):
        closure = hpc_closure.load(saved[2])
        call = {
            "sample": lambda **more: closure.sample(state, members=2, **more),
            "sample_hat": lambda **more: closure.sample_hat(asks, **more),
        }[ask]
        with pytest.raises(ValueError, match=message):
            call(strict=True)
        caplog.clear()
        first, second = call(), call()
        assert len(caplog.records) == 1 and torch.equal(first, second)
        assert re.match(message, caplog.records[0].getMessage())
        with pytest.raises(ValueError, match=message):  # told or not
            call(strict=True)


def test_a_state_within_the_band_is_not_told(saved, caplog):
    """Nor one whose rest is below a millionth, nor a constant, nor a coarser grid's."""
    closure = hpc_closure.load(saved[2])
    for state in (states_of(1)[0], beyond(1e-8), beyond(1e-8).float(), 1 + 0 * beyond(0.1)):
        closure.sample(state, members=1, strict=True)
        size = len(state)
        spectra = band(retained_modes(size)).to_spectral(state)
        closure.sample_hat(Request(spectra, [0]), strict=True)
    closure.sample(band(10).to_physical(band(10).to_spectral(states_of(1)), 22)[0], members=1)
    assert not caplog.records


def test_the_largest_share_of_the_rows_counts(saved):
    states = torch.stack([beyond(0.0), beyond(0.2)])
    with pytest.raises(ValueError, match="0.2 of the state's variance"):
        hpc_closure.load(saved[2]).sample(states, members=2, strict=True)


def test_every_row_is_looked_at_where_the_call_is_strict(saved, caplog):
    """A warning looks at every third of 20 states; a strict call at all."""
    states = beyond(0.0).expand(20, 64, 64).clone()
    states[1] = beyond(0.2)
    closure = hpc_closure.load(saved[2])
    closure.sample(states, members=20)
    assert not caplog.records
    with pytest.raises(ValueError, match="0.2 of the state's variance"):
        closure.sample(states, members=20, strict=True)
    states[3] = states[1]
    closure.sample(states, members=20)
    assert len(caplog.records) == 1


def test_shares_count_every_mode_once():
    """White noise on a grid of even size, the last column of a whole spectrum included."""
    field = torch.randn(24, 24, generator=torch.Generator().manual_seed(0)).double()
    full = torch.fft.fft2(field).abs().square()
    k = torch.fft.fftfreq(24, 1 / 24).abs()
    outside = (k[:, None] > 6) | (k > 6)
    expected = full[outside].sum() / (full.sum() - full[0, 0])
    share = band(6).share_beyond(torch.fft.rfft2(field), 24)
    assert float(share) == pytest.approx(float(expected), rel=1e-12)


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


SHIPPED = {
    "convection": "convection_64",
    "diffusion": "diffusion_64",
    "subgrid_backscatter": "far_ring_quick",
    "two_regimes": "two_regimes_64",
}


@pytest.mark.parametrize("name, preset", SHIPPED.items())
def test_shipped_models_are_those_of_the_shipped_presets(name, preset):
    """Made by ``generate`` and ``train`` of the preset as it is now; nothing of the maker's."""
    assert shipped() == list(SHIPPED)
    path = Run.of(reading.load(preset, [f"use.model={name}"])).model
    provenance = read_header(path).provenance
    assert provenance["hashes"]["train"] == reading.load(preset).stage_hash("train")
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


def test_the_shipped_model_of_two_regimes_draws_both():
    """Its wave's amplitude, state by state, is distributed as the exact law's."""
    problem, count = reading.load("two_regimes_64").problem, 200
    flow = Simulation(problem, range(6), seed=11).initialise()
    flow.advance(2500)
    states = flow.transform.to_physical(flow.state)
    law, closure = ExactLaw(problem, "diffusion", interval=10), hpc_closure.load("two_regimes")
    wave = torch.cos(torch.arange(64, dtype=torch.float64) * (2 * torch.pi / 64))[:, None]

    def waves(fields):
        """(members, states), sorted over members."""
        return (wave * fields.double()).mean((-2, -1)).sort(0).values

    def drawn(**options):
        return torch.stack([closure.sample(one, members=count, **options) for one in states], 1)

    truth = waves(law.sample(states, members=range(count), seed=3))
    own, plain = (
        float((waves(fields) - truth).abs().mean() / truth.std())
        for fields in (drawn(), drawn(method="mean_gp"))
    )
    assert own < 0.25 < 0.4 < plain


def test_who_draws_keeps_freed_memory(monkeypatch):
    """Draws of many members take twice the time without."""
    asked = []
    monkeypatch.setattr(artifact, "keep_freed_memory", lambda: asked.append(True))
    hpc_closure.load("diffusion")
    assert asked
