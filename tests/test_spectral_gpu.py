"""The GPU's parts: kernels and replays, on the CPU where that can be; graphs on a GPU."""

import contextlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from advection_oracles import in_form, oracle_forms  # noqa: F401

from hpc_closure.spectral.cuda.steps import DeviceNoise, GraphSteps
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
from hpc_closure.spectral.cuda.steps import DeviceNoise, FusedStep, GraphSteps
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
        chosen = GraphSteps(
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
from hpc_closure.spectral.cuda.draws import DeviceDraws, member_keys
for one in (band(7), band(7, 1.0, 1)):
    ids = [draws.pair(3, member) for member in range(5)]
    keys = member_keys(4, "sample", tuple(ids), "cpu")
    on = DeviceDraws(one.half_plane, np.ones(one.half_plane.box), torch.device("cpu"))
    out = torch.empty(1, 5, *one.shape, 2, dtype=torch.float64)
    for item in (0, 7, 1 << 33):
        drawn = torch.view_as_complex(on.fill(out, keys, draws.STREAM_BASE, item=item)[0])
        host = draws.white_spectra(one, 4, "sample", ids, item)
        assert (drawn - host).abs().max() < 1e-14 * host.abs().max()
print("equal")
"""


def test_kernels_are_the_cpus_step_to_round_off():
    # Triton's interpreter runs the kernels on CPU tensors.
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
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
def test_replayed_steps_are_the_cpus(change, monkeypatch):
    """All that surrounds a graph, bit for bit: steps are repeated instead of replayed."""

    def repeat(self, step, steps):
        assert not self.scheme.is_starting  # a graph has no other first step

        def run():
            for offset in range(steps):
                step.step(offset)
            self._row.add_(steps)

        run()  # warms up
        return run

    monkeypatch.setattr(GraphSteps, "_capture", repeat)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    # a refined path is drawn on the host, which needs no Triton
    problem = PUBLISHED.replace(path_dt=2e-3, **change)
    truth = Simulation(problem, [0, 3, 8], 4, threads=1).initialise()
    sim = Simulation(problem, [0, 3, 8], 4, threads=1).initialise()
    worker = sim._workers[0]
    sim._graphs = GraphSteps(sim.pairs, worker.equation, worker.nonlinear, sim.scheme, sim.rates)
    extra = None
    for steps in (1, 37, 5):
        truth.advance(steps, extra)
        sim.advance(steps, extra)
        extra = 0.01 * truth.state
        assert torch.equal(sim.state, truth.state)
    saved = sim.save_state()
    assert sim.load_state(**saved).advance(3).step_index == 46
    assert torch.equal(sim.state, truth.advance(3).state)
    sim.load_state(0, truth.state)  # a fresh history, in the same graphs
    assert torch.equal(sim.advance(20).state, truth.load_state(0, truth.state).advance(20).state)


def cases():
    yield "published", {}
    yield "single", {"precision": "float32"}
    yield "ring", {"noise": RING, "drag": 0.1}
    yield "refined", {"path_dt": 4e-3}
    yield "coloured", {
        "noise": {"kind": "ornstein_uhlenbeck", "wavenumber": 4, "rms": 1, "correlation_time": 0.1}
    }
    yield "adaptive", {"dt": 8e-3, "cfl": 0.01, "max_level": 6}
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


@pytest.mark.gpu
@pytest.mark.parametrize("change", [c for _, c in cases()], ids=[name for name, _ in cases()])
@pytest.mark.usefixtures("oracle_forms")
def test_gpu_is_the_cpu_to_round_off(change):
    skip_without_gpu("cuda")
    form = change.get("form", "basdevant")
    problem = in_form(PUBLISHED.replace(**{**change, "form": "basdevant"}), form)
    cpu = Simulation(problem, [0, 3, 8], 4).initialise()
    gpu = Simulation(problem, [0, 3, 8], 4, device="cuda").initialise()
    extra = None
    for steps in (1, 37, 5):
        cpu.advance(steps, extra)
        gpu.advance(steps, None if extra is None else extra.cuda())
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
    block = DeviceNoise(sim.rates, sim.pairs)
    block.draw(first, 4)
    drawn = torch.view_as_real(torch.from_numpy(sim.noise.draw(sim.members, first, 4)))
    assert (block.rates[:4].cpu() - drawn).abs().max() < 1e-14 * drawn.abs().max()


@pytest.mark.gpu
def test_gpu_restart_and_pieces():
    skip_without_gpu("cuda")
    straight = Simulation(PUBLISHED, [0, 1], 4, device="cuda").initialise().advance(40)
    pieces = Simulation(PUBLISHED, [0, 1], 4, device="cuda").initialise().advance(13)
    resumed = Simulation(PUBLISHED, [0, 1], 4, device="cuda").load_state(**pieces.save_state())
    resumed.advance(20).advance(7)
    torch.testing.assert_close(resumed.state, straight.state, rtol=1e-12, atol=1e-15)


@pytest.mark.gpu
@pytest.mark.parametrize("grid, members", [(64, 1), (64, 130), (128, 64), (128, 65), (256, 16)])
def test_single_precision_batches_agree_with_one_member(grid, members):
    # irfft2 in complex64 was found wrong for spectra that are not Hermitian in some batches.
    skip_without_gpu("cuda")
    problem = PUBLISHED.replace(grid=grid, precision="float32")
    batch = Simulation(problem, range(members), 4, device="cuda").initialise().advance(20)
    alone = Simulation(problem, [members - 1], 4).initialise().advance(20)
    error = (batch.state[-1].cpu() - alone.state[0]).abs().max()
    assert error < 1e-5 * alone.state.abs().max()
