"""Velocities whose divergence is not what their equation states are refused before training."""

from types import SimpleNamespace

import pytest
import torch
from cube_case import LENGTH, B, CubeLaw, divergence

from hpc_closure.data.divergence import check_divergence, divergence_share
from hpc_closure.spectral.equations.navier_stokes_3d import NavierStokes3D

SIZE = 12


def experiment(solenoidal=NavierStokes3D.solenoidal):
    physics = SimpleNamespace(
        length=LENGTH,
        dimensions=3,
        channels=NavierStokes3D.channels,
        velocity_channels=(0, 1, 2),
        solenoidal=solenoidal,
        equation="flow",
    )
    return SimpleNamespace(physics=physics, train_grid=SIZE)


class Store:
    """Two members at two times; a field may get a gradient, of a share of its size."""

    folder, members, times = "runs/flow/data", [3, 8], [0.0, 2.0]

    def __init__(self, share=0.0, where=(), swapped=False):
        self.share, self.where, self.swapped = share, where, swapped

    def read(self, member, index, field, grid):
        u_hat = CubeLaw().states([member])[0]
        if (member, index, field) in self.where:
            k = torch.stack(torch.broadcast_tensors(*B.grid.k))
            potential = 1j * k * CubeLaw().states([20])[0, :1]
            u_hat = u_hat + self.share * potential
        values = B.to_physical(B.hermitian(u_hat), grid).float()
        return (values[[1, 0, 2]] if self.swapped else values).numpy()


def test_the_share_is_that_of_the_gradient():
    states = CubeLaw().states([1, 2])
    assert float(divergence_share(states, B.grid).max()) < 1e-6
    k = torch.stack(torch.broadcast_tensors(*B.grid.k))
    whole = k * states[:, :1]  # nothing but divergence
    assert torch.allclose(divergence_share(whole, B.grid), torch.ones(2).double())
    mixed = states[:1] + 0.3 * whole[:1]
    assert float(divergence_share(mixed, B.grid)) == pytest.approx(divergence(mixed))


@pytest.mark.parametrize("field, word", [("state", "velocity"), ("closure", "closure")])
@pytest.mark.parametrize("member, index", [(3, 0), (8, 1)])
def test_a_velocity_with_divergence_is_one_line(field, word, member, index):
    store = Store(0.5, {(member, index, field)})
    with pytest.raises(ValueError) as error:
        check_divergence(experiment(), store)
    line = str(error.value)
    assert f"the {word} (u, v, w) of member {member} at t = {2 * index:g} has a div" in line
    assert "solenoidal = True" in line and "\n" not in line


def test_exchanged_components_are_found_and_single_precision_is_not():
    check_divergence(experiment(), Store())
    with pytest.raises(ValueError, match="check the order of components"):
        check_divergence(experiment(), Store(swapped=True))


def test_a_velocity_that_could_be_stated_without_divergence_is_a_warning(caplog):
    with caplog.at_level("WARNING", logger="hpc_closure"):
        check_divergence(experiment(solenoidal=False), Store())
    assert "does not state solenoidal = True" in caplog.text
    caplog.clear()
    check_divergence(experiment(solenoidal=False), Store(0.5, {(3, 0, "state")}))
    assert not caplog.text
