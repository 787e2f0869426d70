"""Every public path on a device that is only played: nothing is left on the host, or read from it.

The folders of GPU code that is off by default are taken away. What a rehearsal cannot show:
numbers, the backward pass (autograd wants a device), graphs and kernels.
"""

import copy
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import trajectory_case
from closure_case import SIZE, SMALL, batches_of, law_of, with_generator
from recorded import PRESETS, Recorder, model_of, recording
from rehearsal import DEVICE, Rehearsal, move, without_cuda_folders
from torch._subclasses.fake_tensor import DataDependentOutputException
from train_case import Memory as Store

from hpc_closure.closure.artifact import build
from hpc_closure.closure.cuda import replays
from hpc_closure.closure.cuda.replays import Replayed
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.fields.sensors import Sensors, regular_positions
from hpc_closure.closure.model import Request
from hpc_closure.closure.process import Memory
from hpc_closure.data.samples import Share, TrainingSet
from hpc_closure.experiment.choices import Choice
from hpc_closure.experiment.schema import Rollout, Rung, Train
from hpc_closure.rollout.coupling import CoupledRun, Coupling
from hpc_closure.spectral import switches
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.train.cuda import cuda_graph_training
from hpc_closure.train.engine import Loss

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")

NOISES = {
    "none": {"kind": "none"},
    "white": {"kind": "q_wiener", "amplitude": 5e-4, "draws": 10, "correlation": 0.005},
    "ring": {"kind": "ring", "wavenumber": 6, "width": 1, "energy_rate": 0.02},
}


@pytest.fixture(autouse=True)
def plain():
    """Take the folders of GPU code away: nothing but PyTorch is left."""
    with without_cuda_folders():
        yield


@pytest.fixture
def played():
    """Work on the device."""
    with Rehearsal() as rehearsal:
        yield rehearsal


def test_a_tensor_on_the_host_is_refused_and_so_is_a_look(played):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.zeros(3, device=DEVICE) + torch.ones(3)
    with pytest.raises(DataDependentOutputException):
        float(torch.zeros(3, device=DEVICE).sum())
    assert float(torch.ones(3).sum()) == 3


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("scheme", ["cn_euler", "cn_ab2", "etdrk4", "imex_rk3"])
def test_the_solver_takes_steps(played, scheme, noise):
    problem = Problem(
        grid=16, scheme=scheme, noise=NOISES[noise], forcing={"kind": "published"}, drag=0.1
    )
    simulation = Simulation(problem, [0, 5], 1, device=DEVICE).initialise().advance(3)
    assert str(simulation.state.device) == DEVICE
    simulation.advance(2, torch.zeros_like(simulation.state))


def request(size, **more):
    modes = (size - 1) // 3
    state = torch.zeros(3, 2 * modes + 1, modes + 1, dtype=torch.complex128, device=DEVICE)
    return Request(state, members=[0, 1, 2], **more)


def phases_of(preset):
    """(name, model) of each phase that trains, begun with numbers."""
    torch.manual_seed(0)
    sizes = {**SMALL, "mean_layers": None} if preset == "published" else SMALL
    model, law = build({**sizes, "preset": preset}, SIZE), law_of()
    for first, phase in enumerate(model.phases):
        model.begin(phase.name, batches_of(law, 120, first=10_000 * first))
        if phase.share and phase.parameters(model):
            yield phase.name, copy.deepcopy(model)


@pytest.mark.parametrize("sensors", [False, True], ids=["alone", "sensors"])
@pytest.mark.parametrize("preset", ["default", "fno_score", "one_pass"])
def test_a_model_with_a_generator_samples(preset, sensors):
    model = with_generator(preset)
    with Rehearsal(), torch.no_grad():
        move(model)
        seen = None
        if sensors:
            seen = Sensors(torch.zeros(3, 16), regular_positions(4, 1.0))
        drawn = model.sample_hat(request(SIZE, sensors=seen))
    assert str(drawn.device) == DEVICE and drawn.dtype == torch.complex128


@pytest.mark.parametrize("preset", ["default", "fno_score", "one_pass", "published"])
def test_every_phase_has_its_loss_on_the_device(preset):
    index, device = torch.arange(4), torch.device(DEVICE)
    for _, model in phases_of(preset):
        with Rehearsal():
            fields = {
                name: torch.zeros(4, SIZE, SIZE, device=DEVICE) for name in ("state", "target")
            }
            move(model)
            for precision in ("float32", "bfloat16"):
                asked = Loss(model, device, precision)
                loss = asked({**fields, "sample_index": index}, 0, 0)
                assert str(loss.device) == DEVICE and loss.requires_grad


@pytest.mark.parametrize("preset", ["gaussian", "convolutional"])
def test_a_model_of_the_last_closures_samples_and_trains_through_the_solver(preset, played):
    with played.off():
        model = trajectory_case.fitted(preset)
        samples = trajectory_case.data().train.followed(4)
        batch = samples.gather(samples.some(8))
        model.begin("trajectory", lambda: [batch])
    move(model)
    batch = {
        name: value if name == "sample_index" else value.to(DEVICE)
        for name, value in batch.items()
    }
    for precision in ("float32", "bfloat16"):
        loss = Loss(model, torch.device(DEVICE), precision)(batch, 0, 0)
        assert str(loss.device) == DEVICE and loss.requires_grad
    with torch.no_grad():
        asked = request(trajectory_case.GRID)
        asked = replace(asked, previous=torch.stack([asked.state] * trajectory_case.PREVIOUS, 1))
        drawn = model.eval().sample_hat(asked)
    assert str(drawn.device) == DEVICE


def test_without_its_folder_a_switch_is_an_error_and_without_the_switch_nothing(played):
    """The host draws base noise for the device unless ``fused`` is on."""
    key = 1, "sample", [0, 1], 0
    drawn = keyed_noise.white_spectra(band(4), *key, device=torch.device(DEVICE))
    assert str(drawn.device) == DEVICE and drawn.shape == (2, *band(4).shape)
    with switches.only("fused"), pytest.raises(ModuleNotFoundError, match="spectral.cuda"):
        keyed_noise.white_spectra(band(4), *key, device=torch.device(DEVICE))
    with switches.only("graphs"), pytest.raises(ModuleNotFoundError, match="spectral.cuda"):
        Simulation(Problem(grid=16), [0], 1, device=DEVICE)


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_of_the_host_is_in_the_graph_of_a_draw(preset, monkeypatch):
    model, seen = model_of(preset), []
    monkeypatch.setattr(replays, "record", recording(seen, device=True))
    monkeypatch.setattr(Replayed, "_record", lambda self, *given: replays.Recorded(*given))
    with Rehearsal(), torch.no_grad():
        move(model).replayed = Replayed()
        asked = request(model.grid)
        if model.previous:
            asked = replace(asked, previous=torch.stack([asked.state] * model.previous, 1))
        model.sample_hat(asked)
    assert seen and len(seen[0].operations) > 20


@pytest.mark.parametrize("preset", ["default", "fno_score", "one_pass", "published"])
def test_nothing_of_the_host_is_in_the_graph_of_a_network(preset, monkeypatch):
    index, seen = torch.arange(4), []
    monkeypatch.setattr(cuda_graph_training, "possible", lambda *of: True)

    def graphed(function, inputs, allow_unused_input):
        with Recorder(device=True) as recorder:
            function(*inputs)
        seen.append(len(recorder.operations))

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    for _, model in phases_of(preset):
        with Rehearsal(), switches.only("captured"):
            fields = {
                name: torch.zeros(4, SIZE, SIZE, device=DEVICE) for name in ("state", "target")
            }
            device = torch.device(DEVICE)
            captures = cuda_graph_training.capture(move(model), Train(), device, 0, 1)
            loss = Loss(model, device, "float32", captures)
            for _ in range(cuda_graph_training.FIRST):
                loss({**fields, "sample_index": index}, 0, 0)
    assert seen and min(seen) > 20


class Direct:
    """A model without the looks at numbers of the public door."""

    def __init__(self, model):
        self.model, self.config = model, model.config

    def interval_ratio(self, interval):
        return 1.0

    def averaging_steps(self, interval):
        return interval

    def sample_hat(self, request):
        with torch.no_grad():
            return self.model.sample_hat(request)


def test_a_coupled_interval_with_its_references(played):
    """Nothing is read between the looks for lost members, which ``advance`` makes at its end."""
    with played.off():
        model = trajectory_case.fitted("convolutional").eval()
    cases, rows = [0, 1], [(case, member) for case in (0, 1) for member in range(3)]
    settings = Rollout(interval=trajectory_case.INTERVAL, baselines=("none",))
    rungs = [(Rung(grid=2 * trajectory_case.GRID), Choice(1, 0.1))]
    memory = Memory(previous=trajectory_case.PREVIOUS)
    coupling = Coupling(
        trajectory_case.PROBLEM,
        "subgrid",
        trajectory_case.GRID,
        7,
        settings,
        memory,
        DEVICE,
        rungs=rungs,
    )
    run = CoupledRun(coupling, Direct(move(model)), rows, cases)
    fields = np.zeros((len(cases), trajectory_case.GRID, trajectory_case.GRID))
    run.start(fields, 0, closures=[fields] * trajectory_case.PREVIOUS)
    for _ in range(2):
        run._interval()
    assert {str(field.device) for field in run.fields().values()} == {DEVICE}


def test_for_a_gpu_the_next_batch_is_made_ready_in_the_background(monkeypatch):
    """In pinned memory; the same samples, of every micro-batch, and none is put together twice."""
    pinned, share = [], Share(8, 1, 2)
    firsts = [8 * step + 4 + part for step in range(8) for part in (0, 2)]

    def pin(tensor):
        pinned.append((threading.current_thread().name, tensor))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    plain, part = (TrainingSet(Store(), range(9), budget=40_000) for _ in range(2))
    with Rehearsal():
        part.to(torch.device(DEVICE))
        for first in firsts:
            batch = part.batch(first, 2, share)
            assert str(batch["state"].device) == DEVICE and batch["state"].shape[0] == 2
        part.close()
    batches = [plain.batch(first, 2, share) for first in firsts]
    expected = [batch[key] for batch in batches for key in ("state", "target")]
    assert len(expected) <= len(pinned) <= len(expected) + 2
    for (thread, ours), theirs in zip(pinned, expected):
        assert thread.startswith("pack") and torch.equal(ours, theirs)
    plain.close()
