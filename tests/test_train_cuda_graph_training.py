"""Networks that are replayed in training: the losses of a training in which they are not."""

import copy
from collections import Counter

import pytest
import torch
from recorded import Graph, Recorder, play_graphs
from train_case import losses, needs_deepspeed, small_model, training_data

from hpc_closure.closure.networks.blocks import ScoreNetwork
from hpc_closure.closure.networks.layers import CheckpointedModule
from hpc_closure.experiment.schema import Train
from hpc_closure.spectral import switches
from hpc_closure.train import processes, trainer
from hpc_closure.train.cuda import cuda_graph_training as graphs
from hpc_closure.train.processes import Processes
from hpc_closure.work import log

GPU = torch.device("cuda")
PRESETS = ["default", "fno_score", "one_pass", "published", "trajectory"]


@pytest.fixture
def played(monkeypatch):
    """Networks are captured on the CPU, in graphs that are played; what was warned of."""
    play_graphs(monkeypatch)

    def possible(settings, device, *processes):
        return possible_on_a_gpu(settings, GPU, *processes)

    possible_on_a_gpu, warned = graphs.possible, []
    monkeypatch.setattr(graphs, "possible", possible)
    monkeypatch.setattr(log.get(), "warning", warned.append)
    with switches.only("captured"):
        yield warned


def uncaptured_losses(*args, **more):
    with switches.only():
        return losses(*args, **more)


class Training:
    """Steps of a preset's generator."""

    def __init__(self, preset="default", **settings):
        self.model, self.samples = small_model(preset), training_data().train
        asked = {"batch": 8, "engine": "torch", "schedule": "constant", **settings}
        self.engine = trainer.start_engine(self.model, Train(**asked), Processes())
        self.done = 0

    def steps(self, count):
        seen = []
        for _ in range(count):
            batch = self.samples.batch(8 * self.done, 8)
            seen.append(float(self.engine.step([(batch, 1, self.done)], 1e-3)))
            self.done += 1
        return seen


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_are_those_of_a_training_that_is_not_captured(preset, played):
    expected = uncaptured_losses("torch", 0, Processes(), preset=preset)
    assert not Graph.made
    assert losses("torch", 0, Processes(), preset=preset) == expected
    assert Graph.made and not played


@needs_deepspeed
@pytest.mark.parametrize("stage", range(4))
def test_gradients_reach_deepspeed(stage, played):
    """Its hooks see them; stage 3, which takes weights away between layers, is left alone.

    So are stages 1 and 2 of several processes.
    """
    found = processes.join("cpu")
    try:
        expected = uncaptured_losses("deepspeed", stage, found, preset="fno_score")
        assert losses("deepspeed", stage, found, preset="fno_score") == expected
    finally:
        processes.leave()
    assert bool(Graph.made) == (stage < 3) and not played


@pytest.mark.parametrize("stage, processes", [(1, 2), (2, 2), (3, 1)])
def test_who_must_have_gradients_in_one_order_replays_nothing(stage, processes):
    assert not graphs.possible(Train(), GPU, stage, processes)
    assert graphs.possible(Train(), GPU, 0, processes)


@pytest.mark.parametrize("preset, passes", [("default", 2), ("fno_score", 3), ("one_pass", 5)])
def test_every_pass_is_recorded_compared_and_replayed(preset, passes, played):
    training = Training(preset)
    training.steps(1)  # as it is
    assert not Graph.made
    training.steps(1)
    assert Counter(graph.replays for graph in Graph.made) == {0: 2 * passes}
    training.steps(1)
    assert Counter(graph.replays for graph in Graph.made) == {1: 2 * passes}
    training.steps(3)
    assert Counter(graph.replays for graph in Graph.made) == {4: 2 * passes}
    assert not played


def test_weights_in_bfloat16_are_cast_in_every_step(played):
    with switches.only():
        expected = Training(precision="bfloat16").steps(6)
    assert Training(precision="bfloat16").steps(6) == expected
    assert {graph.replays for graph in Graph.made} == {4} and not played


def test_another_size_has_graphs_of_its_own(played):
    training = Training()
    training.steps(3)
    before = len(Graph.made)
    batch = training.samples.batch(0, 4)
    with switches.only():
        expected = training.engine.loss(batch, 1, 0).item()
    assert training.engine.loss(batch, 1, 0).item() == expected
    assert len(Graph.made) == 2 * before


def test_what_was_recorded_wrongly_is_not_used(played, monkeypatch):
    """As if the recording had kept the numbers of its step."""
    with switches.only():
        expected = Training().steps(5)
    monkeypatch.setattr(Recorder, "replay", lambda self: None)
    training = Training()
    assert training.steps(5) == expected
    assert len(played) == 1 and "ScoreNetwork differs from what was recorded" in played[0]
    assert not any(one._graphs for one in training.engine.captures.passes)


@pytest.mark.parametrize("which", [0, 1, -1], ids=["forward", "backward", "last"])
def test_one_wrong_pass_is_enough(which, played, monkeypatch):
    with switches.only():
        expected = Training().steps(5)
    training = Training()
    training.steps(2)
    monkeypatch.setattr(Graph.made[which].recorder, "replay", lambda: None)
    assert training.steps(3) == expected[2:]
    assert len(played) == 1


@pytest.mark.parametrize("name", ["encoded_maps", "forward"])
def test_after_a_recording_that_failed_nothing_is_replayed(name, played, monkeypatch):
    """The first of the two was recorded by then, or is not tried."""
    with switches.only():
        expected = Training().steps(6)
    make, streams = torch.cuda.make_graphed_callables, []

    def refuse(function, *args, **more):
        if function.method.__name__ == name:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return make(function, *args, **more)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    assert Training().steps(6) == expected
    assert [graph.replays for graph in Graph.made] == [0, 0] * (name == "forward")
    assert streams == ["before"]
    assert len(played) == 1 and "when stream is capturing): slower" in played[0]


def test_where_there_is_no_room_nothing_is_recorded(played, monkeypatch):
    monkeypatch.setattr(graphs, "_has_room", lambda: False)
    Training().steps(4)
    assert not Graph.made and not played


@pytest.mark.parametrize("most, room", [(32, True), (34, False)])
def test_room_is_for_a_step_its_graphs_and_more(most, room, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 100))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: most)
    assert graphs._has_room() == room


def test_a_copy_trains_its_own_weights(played):
    training = Training()
    training.steps(4)
    made = len(Graph.made)
    other = copy.deepcopy(training.model)
    batch = training.samples.batch(0, 8)
    loss = other.loss(batch, 1, 0)
    loss.backward()
    mine = {name for name, one in other.named_parameters() if one.grad is not None}
    assert mine and not any(one.grad is not None for one in training.model.parameters())
    assert len(Graph.made) == made


def test_weights_that_move_are_recorded_again(played):
    training = Training()
    training.steps(4)
    made = len(Graph.made)
    for weight in training.model.parameters():
        weight.data = weight.data.clone()
    with switches.only():
        expected = training.engine.loss(training.samples.batch(0, 8), 1, 0).item()
    assert training.engine.loss(training.samples.batch(0, 8), 1, 0).item() == expected
    assert len(Graph.made) == 2 * made


def test_what_a_recording_has_read_is_left_alone(played):
    """A graph has memory of its own: batches that live on the device are read again."""
    training = Training("published")
    first = training.samples.batch(0, 8)
    before = {name: first[name].clone() for name in ("state", "target")}
    for step in range(4):
        batch = first if step == 1 else training.samples.batch(8 * step, 8)
        training.engine.step([(batch, 1, step)], 1e-3)
    assert all(torch.equal(first[name], value) for name, value in before.items())
    assert {graph.replays for graph in Graph.made} == {2}


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"recompute": True}])
def test_what_is_not_recorded(settings, played):
    assert Training(**settings).engine.captures is None


def test_nothing_is_recorded_on_a_cpu_or_without_the_switch(monkeypatch):
    with switches.only("captured"):
        assert Training().engine.captures is None
    monkeypatch.setattr(graphs, "possible", lambda *of: True)
    with switches.only("graphs", "fused", "replays"):
        assert Training().engine.captures is None


def test_without_a_backward_pass_networks_are_called_as_they_are(played):
    training = Training()
    with torch.no_grad():
        training.engine.loss(training.samples.batch(0, 8), 1, 0)
    assert not Graph.made


def test_a_closed_engine_leaves_the_model_as_it_was(played):
    training = Training()
    training.steps(3)
    networks = [one for one in training.model.modules() if isinstance(one, ScoreNetwork)]
    assert all(isinstance(one.forward, graphs.Captured) for one in networks) and networks
    training.engine.close()
    for one in training.model.modules():
        if isinstance(one, CheckpointedModule):
            assert not set(one.passes) & set(vars(one))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_losses_on_a_device(preset, precision, monkeypatch):
    found, warned, replayed = Processes(device=torch.device("cuda")), [], []
    agrees = graphs.Captured._agrees

    def noted(self, *given):
        replayed.append(self.name)
        return agrees(self, *given)

    monkeypatch.setattr(graphs.Captured, "_agrees", noted)
    monkeypatch.setattr(log.get(), "warning", warned.append)
    expected = uncaptured_losses("torch", 0, found, preset=preset, precision=precision)
    with switches.only("captured"):
        seen = losses("torch", 0, found, preset=preset, precision=precision)
    assert seen == pytest.approx(expected, rel=1e-4 if precision == "float32" else 2e-2)
    assert not warned and replayed
