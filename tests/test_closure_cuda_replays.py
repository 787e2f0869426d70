"""Draws that are recorded once: the same numbers as draws, of new states and noise."""

import copy
from dataclasses import replace

import pytest
import torch
from closure_case import with_generator
from recorded import PRESETS, model_of, recording

from hpc_closure.closure.cuda import replays
from hpc_closure.closure.cuda.replays import MOST_GRAPHS, Replayed
from hpc_closure.closure.model import Request
from hpc_closure.closure.networks.compiled import compiling


@pytest.fixture
def recorded(monkeypatch):
    """Graphs are played on the CPU, and used there; the list of them."""
    found = []

    monkeypatch.setattr(replays, "record", recording(found))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with compiling.off():  # on a device there are operations of torch
        yield found


def drawing(model, call, seed=0, **more):
    modes = (model.grid - 1) // 3
    generator = torch.Generator().manual_seed(seed)
    shape = 3, 2 * modes + 1, modes + 1
    state = torch.randn(shape, generator=generator, dtype=torch.complex128)
    if model.previous:
        more["previous"] = state[:, None] * torch.arange(1, 1 + model.previous)[:, None, None]
    return Request(state, members=[0, 1, 2], call=call, **more)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_replay_is_a_draw_of_what_it_is_given(preset, recorded):
    model = model_of(preset)
    calls = [drawing(model, 0), drawing(model, 1), drawing(model, 1, seed=5)]
    expected = [model.sample_hat(asked) for asked in calls]
    before, model.replayed = model.num_rescaled, Replayed()
    found = [model.sample_hat(asked) for asked in calls]
    assert len(recorded) == 1 and len(recorded[0].operations) > 20
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)
    assert model.num_rescaled == 2 * before
    assert not torch.equal(expected[0], expected[1])


def test_what_is_no_tensor_is_recorded_apart(recorded):
    model = with_generator("default")
    asked = [
        drawing(model, 0),
        drawing(model, 0, interval_ratio=4.0),
        drawing(model, 0, evaluations=1),
    ]
    asked.append(drawing(model, 0, method="mean_gp"))
    expected = [model.sample_hat(one) for one in asked]
    model.replayed = Replayed()
    for _ in range(2):
        found = [model.sample_hat(one) for one in asked]
        assert all(torch.equal(*pair) for pair in zip(found, expected))
    assert len(recorded) == len(asked)


def test_a_copy_of_a_model_has_graphs_of_its_own(recorded):
    model = with_generator("default")
    model.replayed, asked = Replayed(), drawing(model, 0)
    expected = model.sample_hat(asked)
    other = copy.deepcopy(model)
    assert torch.equal(other.sample_hat(asked), expected)
    assert len(recorded) == 2


def test_a_large_draw_is_not_recorded(recorded, monkeypatch):
    model = with_generator("default")
    model.replayed, asked = Replayed(), drawing(model, 0)
    monkeypatch.setattr(replays, "LARGE", 3 * 21 * 11)
    model.sample_hat(asked)
    assert not recorded
    monkeypatch.setattr(replays, "LARGE", 10 * 3 * 21 * 11)
    model.sample_hat(asked)
    assert recorded


def test_few_are_kept(recorded):
    model = with_generator("default")
    model.replayed = Replayed()
    for number in range(1, MOST_GRAPHS + 3):
        model.sample_hat(drawing(model, 0, evaluations=number))
    model.sample_hat(drawing(model, 0, evaluations=1))
    assert len(recorded) == MOST_GRAPHS + 3


def test_what_cannot_be_recorded_is_drawn_all_the_same(recorded, monkeypatch, caplog):
    def refuse(run, warm, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(replays, "record", refuse)
    model = with_generator("default")
    asked = drawing(model, 0)
    expected, model.replayed = model.sample_hat(asked), Replayed()
    for _ in range(2):
        assert torch.equal(model.sample_hat(asked), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("preset", ["default", "fno_score", "one_pass"])
def test_a_graph_on_a_device_draws_the_same(preset):
    model = with_generator(preset).to("cuda")
    calls = [drawing(model, call, seed) for call, seed in ((0, 0), (1, 0), (2, 5))]
    calls = [replace(asked, state=asked.state.cuda()) for asked in calls]
    expected = [model.sample_hat(asked) for asked in calls]
    model.replayed = Replayed()
    found = [model.sample_hat(asked) for asked in calls]
    assert [one is not None for one in model.replayed._recorded.values()] == [True]
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
