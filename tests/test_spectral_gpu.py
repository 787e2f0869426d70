"""The GPU's parts: kernels and replays, on the CPU where that can be; graphs on a GPU."""

import contextlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from advection_oracles import in_form, oracle_forms  # noqa: F401

from hpc_closure.spectral import switches
from hpc_closure.spectral.cuda import steps
from hpc_closure.spectral.cuda.steps import DeviceNoise, DeviceSteps
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

WIENER = {"kind": "q_wiener", "amplitude": 5e-4, "draws": 10, "correlation": 0.005}
RING = {"kind": "ring", "wavenumber": 6, "width": 1, "energy_rate": 0.02}
PUBLISHED = Problem(grid=32, forcing={"kind": "published"}, noise=WIENER)


def skip_without_gpu(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


INTERPRETED = """
import numpy as np
import torch
torch.manual_seed(0)
from hpc_closure.spectral.cuda.steps import DeviceNoise, DeviceSteps, FusedStep
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
wiener = {"kind": "q_wiener", "amplitude": 5e-4, "draws": 10, "correlation": 0.005}
ring = {"kind": "ring", "wavenumber": 4, "width": 1, "energy_rate": 0.02}
for noise in (wiener, ring, {"kind": "none"}):
    for closure in (False, True):
        problem = Problem(grid=16, forcing={"kind": "published"}, noise=noise, drag=0.1)
        truth = Simulation(problem, [0, 5, 9], 2, threads=1).initialise().advance(3)
        sim = Simulation(problem, [0, 5, 9], 2, threads=1).load_state(**truth.save_state())
        worker, row = sim._workers[0], torch.zeros(1, dtype=torch.int64)
        chosen = DeviceSteps(
            sim.pairs, worker.equation, worker.nonlinear, sim.scheme, sim.rates
        )
        step, block = chosen.choose_step(), chosen.noise
        assert isinstance(step, FusedStep)
        extra = torch.randn_like(sim.pairs) if closure else 0.0
        if block is not None:
            for first in (123456789012, 3):  # counters beyond 32 bits, too
                block.draw(first, 4)
                drawn = torch.view_as_real(torch.from_numpy(sim.noise.draw(sim.members, first, 4)))
                assert (block.rates[:4] - drawn).abs().max() < 1e-14 * drawn.abs().max()
        step.prepare(truth._base(slice(None), None) + extra)
        for offset in range(4):
            step.step(offset)
        truth.advance(4, torch.view_as_complex(extra) if closure else None)
        assert (sim.state - truth.state).abs().max() < 1e-14 * truth.state.abs().max()
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.spectral.cuda.draws import white_on
for one in (band(7), band(7, 1.0, 1)):
    ids = [keyed_noise.pair(3, member) for member in range(5)]
    for item in (0, 7, 1 << 33):
        stream, key = keyed_noise.STREAM_BASE, (4, "sample", ids)
        drawn = white_on(one.half_plane, torch.device("cpu"), key, stream, item)
        host = keyed_noise.white_spectra(one, *key, item)
        assert (drawn.view(host.shape) - host).abs().max() < 1e-14 * host.abs().max()
print("equal")
"""


def test_kernels_are_the_cpus_step_to_round_off():
    # Triton's interpreter runs the kernels on CPU tensors.
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", switches.VARIABLE: "graphs,fused"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "equal"


SCHEMES = {
    "flux": {"form": "flux"},
    "ab2": {"scheme": "cn_ab2"},
    "etdrk4": {"scheme": "etdrk4", "beta": 5.0},
    "imex_rk3": {"scheme": "imex_rk3"},
    "convection": {"removed": "convection"},
    "single ab2": {"scheme": "cn_ab2", "precision": "float32"},
}


@pytest.mark.parametrize("change", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("on", [["graphs"], ["fused"], ["graphs", "fused"]], ids=",".join)
def test_replayed_steps_are_the_cpus(change, on, monkeypatch):
    """All that surrounds a graph, bit for bit: steps are repeated instead of replayed."""
    recorded = []

    def repeat(run, warm, device):
        warm()
        run()
        recorded.append(run)
        return run

    monkeypatch.setattr(steps, "record", repeat)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    # a refined path is drawn on the host, which needs no Triton
    problem = PUBLISHED.replace(path_dt=2e-3, **change)
    truth = Simulation(problem, [0, 3, 8], 4, threads=1).initialise()
    sim = Simulation(problem, [0, 3, 8], 4, threads=1).initialise()
    worker = sim._workers[0]
    with switches.only(*on):
        sim._device_steps = DeviceSteps(
            sim.pairs, worker.equation, worker.nonlinear, sim.scheme, sim.rates
        )
    extra = None
    for number in (1, 37, 5):
        truth.advance(number, extra)
        sim.advance(number, extra)
        extra = 0.01 * truth.state
        assert torch.equal(sim.state, truth.state)
    saved = sim.save_state()
    assert sim.load_state(**saved).advance(3).step_index == 46
    assert torch.equal(sim.state, truth.advance(3).state)
    sim.load_state(0, truth.state)  # a fresh history, in the same graphs
    assert torch.equal(sim.advance(20).state, truth.load_state(0, truth.state).advance(20).state)
    assert len(recorded) == (2 if "graphs" in on else 0)


def cases():
    yield "published", {}
    yield "single", {"precision": "float32"}
    yield "ring", {"noise": RING, "drag": 0.1}
    yield "refined", {"path_dt": 4e-3}
    yield "coloured", {
        "noise": {"kind": "ornstein_uhlenbeck", "wavenumber": 4, "rms": 1, "correlation_time": 0.1}
    }
    yield "adaptive", {"dt": 8e-3, "cfl": 0.01, "max_refinements": 6}
    for form in ("advective", "flux", "packed"):
        yield form, {"form": form}
    yield "ab2", {"scheme": "cn_ab2"}
    yield "etdrk4", {"scheme": "etdrk4", "beta": 5.0, "hyperviscosity": 1e-10}
    yield "imex_rk3", {"scheme": "imex_rk3"}
    for removed in ("diffusion", "convection"):
        yield removed, {"removed": removed}
    yield "line", {
        "equation": "kuramoto_sivashinsky1d",
        "length": 22.0,
        "scheme": "etdrk4",
        "noise": {"kind": "none"},
        "forcing": {"kind": "none"},
        "initial": {"kind": "line"},
    }


ON = ["", "graphs", "fused", "graphs,fused"]


@pytest.mark.gpu
@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("change", [c for _, c in cases()], ids=[name for name, _ in cases()])
@pytest.mark.usefixtures("oracle_forms")
def test_gpu_is_the_cpu_to_round_off(change, on, monkeypatch):
    skip_without_gpu("cuda")
    monkeypatch.setenv(switches.VARIABLE, on)
    form = change.get("form", "basdevant")
    problem = in_form(PUBLISHED.replace(**{**change, "form": "basdevant"}), form)
    cpu = Simulation(problem, [0, 3, 8], 4).initialise()
    gpu = Simulation(problem, [0, 3, 8], 4, device="cuda").initialise()
    extra = None
    for number in (1, 37, 5):
        cpu.advance(number, extra)
        gpu.advance(number, None if extra is None else extra.cuda())
        extra = 0.01 * cpu.state
    scale = cpu.state.abs().max()
    tolerance = 1e-4 if problem.precision == "float32" else 1e-12
    assert (gpu.state.cpu() - cpu.state).abs().max() < tolerance * scale
    torch.testing.assert_close(
        gpu.noise_hat().cpu(), cpu.noise_hat(), rtol=0, atol=tolerance * float(scale)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("first", [3, 123456789012])
def test_device_draws_are_the_cpus_to_round_off(first):
    skip_without_gpu("cuda")
    sim = Simulation(PUBLISHED, [0, 3, 8], 4, device="cuda").initialise()
    block = DeviceNoise(sim.rates, sim.pairs, fused=True)
    block.draw(first, 4)
    drawn = torch.view_as_real(torch.from_numpy(sim.noise.draw(sim.members, first, 4)))
    assert (block.rates[:4].cpu() - drawn).abs().max() < 1e-14 * drawn.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("on", ON)
def test_gpu_restart_and_pieces(on, monkeypatch):
    skip_without_gpu("cuda")
    monkeypatch.setenv(switches.VARIABLE, on)
    straight = Simulation(PUBLISHED, [0, 1], 4, device="cuda").initialise().advance(40)
    pieces = Simulation(PUBLISHED, [0, 1], 4, device="cuda").initialise().advance(13)
    resumed = Simulation(PUBLISHED, [0, 1], 4, device="cuda").load_state(**pieces.save_state())
    resumed.advance(20).advance(7)
    torch.testing.assert_close(resumed.state, straight.state, rtol=1e-12, atol=1e-15)


@pytest.mark.gpu
@pytest.mark.parametrize("on", ON)
@pytest.mark.parametrize("grid, members", [(64, 1), (64, 130), (128, 64), (128, 65), (256, 16)])
def test_single_precision_batches_agree_with_one_member(grid, members, on, monkeypatch):
    # irfft2 in complex64 was found wrong for spectra that are not Hermitian in some batches.
    skip_without_gpu("cuda")
    monkeypatch.setenv(switches.VARIABLE, on)
    problem = PUBLISHED.replace(grid=grid, precision="float32")
    batch = Simulation(problem, range(members), 4, device="cuda").initialise().advance(20)
    alone = Simulation(problem, [members - 1], 4).initialise().advance(20)
    error = (batch.state[-1].cpu() - alone.state[0]).abs().max()
    assert error < 1e-5 * alone.state.abs().max()
