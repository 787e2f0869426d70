"""Eddy viscosities: what each may do to energy and enstrophy, symmetries, constants of a flow."""

import pytest
import torch
from closure_case import BASELINES, SIZE, states_of

from hpc_closure.closure.artifact import build
from hpc_closure.closure.baselines.eddy_viscosity import slope, strain_rate, viscous
from hpc_closure.closure.fields.features import carried
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.model import Request
from hpc_closure.experiment import reading

B = band((SIZE - 1) // 3)
W = B.to_spectral(states_of(6))


def model(kind, *constants, **settings):
    made = build({"preset": kind, **settings}, SIZE)
    if constants:
        made.constants = constants
    return made


def tendency(kind, *constants, w_hat=W):
    made = model(kind, *constants)
    return made.tendency(w_hat, made.constants)


def mean(one, other):
    """Mean over the square of the product of two fields, (B,)."""
    return ((one.conj() * other).real * B.weights).sum((-2, -1))


@pytest.mark.parametrize("kind", BASELINES)
def test_it_takes_enstrophy(kind):
    constants = {"jansen_held": (0.3, 0.5)}.get(kind, () if "dynamic" in kind else (0.3,))
    taken = mean(W, tendency(kind, *constants))
    assert (taken <= 0).all() and (taken < 0).any()


def test_a_flow_of_one_wave():
    """w = cos(kx): |S| = |cos kx|, so d/dx(-|cos kx| k sin kx), integrated against w by hand."""
    k, x = 2 * torch.pi * 3, torch.arange(SIZE, dtype=torch.float64) / SIZE
    w_hat = B.to_spectral((k * x).cos()[:, None].expand(SIZE, SIZE)[None].contiguous())
    width = 1 / SIZE
    # mean of w U = -(c width)^2 k^2 mean(|cos| sin^2) = -(c width)^2 k^2 2/(3 pi)
    expected = -((0.2 * width) ** 2) * k**2 * 2 / (3 * torch.pi)
    assert float(mean(w_hat, tendency("smagorinsky", 0.2, w_hat=w_hat))) == pytest.approx(
        expected, rel=0.03
    )
    # |grad w| = k |sin|: -(c width)^3 k^3 mean(|sin|^3) = -(c width)^3 k^3 4/(3 pi)
    expected = -((0.2 * width) ** 3) * k**3 * 4 / (3 * torch.pi)
    assert float(mean(w_hat, tendency("leith", 0.2, w_hat=w_hat))) == pytest.approx(
        expected, rel=0.03
    )


def test_jansen_held_returns_the_energy_that_it_takes():
    psi = B.grid.inverse_k2 * W
    alone, share, whole = (
        mean(psi, tendency("jansen_held", 0.5, part)) for part in (0.0, 0.7, 1.0)
    )
    assert (alone < 0).all()
    assert torch.allclose(share, 0.3 * alone, rtol=1e-9)
    assert (whole.abs() < 1e-9 * alone.abs()).all()


@pytest.mark.parametrize("kind", BASELINES)
def test_symmetries(kind):
    constants = {"jansen_held": (0.3, 0.9)}.get(kind, () if "dynamic" in kind else (0.3,))

    def closure(field):
        u_hat = tendency(kind, *constants, w_hat=B.to_spectral(field))
        return B.to_physical(u_hat, SIZE)

    fields = states_of(3)
    plain = closure(fields)
    close = dict(rtol=1e-8, atol=1e-10 * float(plain.abs().max()))
    turned = torch.rot90(fields, 1, (-2, -1))
    assert torch.allclose(torch.rot90(plain, 1, (-2, -1)), closure(turned), **close)
    # a reflection changes the sign of vorticity
    mirrored = -fields.flip(-1)
    assert torch.allclose(-plain.flip(-1), closure(mirrored), **close)
    # time runs twice as fast: two powers of the vorticity; the constants have no dimension
    assert torch.allclose(4 * plain, closure(2 * fields), **close)


@pytest.mark.parametrize(
    "kind, law", [("dynamic_smagorinsky", strain_rate), ("dynamic_leith", slope)]
)
def test_the_dynamic_constant_explains_what_the_test_filter_takes(kind, law):
    """d(Fw)/dt = F[A(w)] + F[U(w)] must be A(Fw) + U(Fw) as nearly as a constant can make it."""
    test = ((B.grid.kx.abs() < 11 * torch.pi) & (B.grid.ky.abs() < 11 * torch.pi)).to(W.real)
    states = B.to_spectral(states_of(60))
    coarse = test * states
    fine_term = viscous(states, B, 1 / SIZE, law)
    coarse_term = viscous(coarse, B, 2 / SIZE, law)
    known = (
        test * (carried(states, states[:, None], B) - carried(coarse, coarse[:, None], B))[:, 0]
    )

    def misfit(constant):
        left = known + constant * test * (fine_term - coarse_term)
        return mean(left, left)

    ratio = mean(fine_term, tendency(kind, w_hat=states)) / mean(fine_term, fine_term)
    assert (ratio > 0).sum() > 5 and (ratio == 0).sum() > 5
    constant = ratio[:, None, None]
    best = misfit(constant)
    for other in (1.05, 0.95):
        assert (misfit(other * constant) > best)[ratio > 0].all()
    # where it is held at zero, any more would be worse
    assert (misfit(torch.full_like(constant, 1e-3)) > best)[ratio == 0].all()


def test_a_state_of_few_modes_has_no_stress():
    low = W * (B.grid.integer_k2 <= 4)
    assert float(tendency("dynamic_smagorinsky", w_hat=low).abs().max()) == 0


def test_it_answers_as_every_closure():
    made = model("smagorinsky", 0.2)
    fields = states_of(1)
    drawn = made.sample_batch(Request(fields, members=[0, 1, 2]))
    assert drawn.shape == (3, SIZE, SIZE) and torch.equal(drawn[0], drawn[2])
    spectra = made.sample_hat(Request(B.to_spectral(fields), members=[0]))
    assert torch.allclose(B.to_physical(spectra, SIZE)[0], drawn[0])
    assert not made.score_active and "c = 0.2" in str(made.parts()[0])


EQUATION = {"equation": "two_layer_qg", "deformation_radius": 0.05, "depth_ratio": 0.25}


def layered(vorticity):
    """Potential vorticity of layers (B, 2, ...) with this relative vorticity."""
    upper = 0.05**-2 / 1.25
    psi = -B.grid.inverse_k2 * vorticity  # of velocities (-psi_y, psi_x)
    coupling = psi.flip(1) - psi
    return vorticity + torch.tensor([upper, 0.25 * upper])[:, None, None] * coupling


@pytest.mark.parametrize("kind", ["smagorinsky", "leith", "jansen_held"])
def test_each_layer_has_the_viscosity_of_its_own_flow(kind):
    constants = {"jansen_held": (0.3, 0.9)}.get(kind, (0.3,))
    layers = W.unflatten(0, (3, 2))
    made = model(kind, *constants, equation=EQUATION)
    found = made.tendency(layered(layers), made.constants)
    expected = torch.stack(
        [tendency(kind, *constants, w_hat=layers[:, layer]) for layer in range(2)], 1
    )
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))
    rows = [torch.full((3, 1, 1), value) for value in constants]  # as they are tuned
    assert torch.allclose(made.tendency(layered(layers), rows), found)
    fields = B.to_physical(layered(layers), SIZE)
    drawn = made.sample_batch(Request(fields[:1], members=[0, 1, 2]))
    assert drawn.shape == (3, 2, SIZE, SIZE) and torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("preset", "changes", "line"),
    [
        (
            "subgrid_quick",
            ["physics.equation=clouds", "model.preset=leith"],
            "each with its own flow; the fields of clouds share one",
        ),
        (
            "two_layer_quick",
            ["model.preset=dynamic_leith"],
            "model.preset=dynamic_leith is for equations of one field",
        ),
    ],
)
def test_fields_for_which_it_is_not(preset, changes, line):
    plain = ["model.conditions.previous_closures=0", "rollout.baselines=[none]"]
    reading.load("two_layer_quick", ["model.preset=leith", *plain])
    with pytest.raises(ValueError, match=line):
        reading.load(preset, [*changes, *plain])


def test_settings_that_it_does_not_have():
    with pytest.raises(
        ValueError, match="backscatter_fraction is no setting of model.preset=leith"
    ):
        model("leith", backscatter_fraction=0.5)
    with pytest.raises(ValueError, match="it is tuned"):
        model("leith").begin("mean", [])
