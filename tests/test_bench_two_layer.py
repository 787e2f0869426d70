"""Errors of the climate of two-layer flow."""

import pytest
import torch

from hpc_closure.bench.physics.two_layer import Climate
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation


@pytest.fixture(scope="module")
def flow():
    """Eddies without drag, in which mean shear and advection alone change the energy."""
    problem = Problem(
        grid=32, dt=0.01, equation="two_layer_qg", length=6.0, deformation_radius=0.5,
        depth_ratio=0.25, beta=0.5, mean_flow=(0.7, 0.1), scheme="ab3",
        initial={"kind": "band", "wavenumber": 3, "width": 1, "energy": 1.0},
    )  # fmt: skip
    return Simulation(problem, range(2), 3).initialise().advance(60)


def test_the_budget_is_that_of_the_solver(flow):
    """-depth Re(psi* dq/dt), shell by shell, is transfer and generation."""
    climate = Climate(flow.problem.physics, flow.grid.modes)
    q = flow.state
    kinetic, transfer, generated = climate.budget(q)
    rate = flow.nonlinear_hat() + flow.linear * q
    psi = -torch.einsum("lcxy,bcxy->blxy", climate.factors.to(q), q)
    whole = -flow.grid.shell_sum((climate.depths * (psi.conj() * rate).real).sum(1))
    assert torch.allclose(transfer + generated, whole, atol=1e-12 * float(whole.abs().max()))
    assert float(transfer.sum(1).abs().max()) < 1e-10 * float(transfer.abs().max())
    velocity = flow.fields(["velocity"])["velocity"]
    expected = 0.5 * velocity.square().sum(1).mean((-2, -1))
    assert torch.allclose(kinetic.sum(-1), expected)


def test_errors_are_zero_for_the_same_flow_and_grow_with_the_distance(flow):
    truth, same, other = (Climate(flow.problem.physics, 8) for _ in range(3))
    truth.add(flow.state)
    same.add(flow.state)
    other.add(1.1 * flow.state)
    assert same.errors(truth) == (0.0, 0.0)
    distributional, spectral = other.errors(truth)
    # q, u, v are larger by 0.1 of their size, energies by 0.21 of theirs
    assert 0.07 < distributional < 0.21
    assert spectral == pytest.approx((3 * 0.21 + 0.331) / 4, rel=1e-6)
