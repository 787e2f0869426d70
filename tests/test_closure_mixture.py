"""Mixtures of Gaussian laws: their likelihood, what they learn, and how they are drawn."""

import math

import pytest
import torch
from closure_case import SMALL

import hpc_closure
from hpc_closure.bench.model.known import Known, fit
from hpc_closure.closure import artifact
from hpc_closure.closure.artifact import build
from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fitting.phases import take_mean
from hpc_closure.closure.gaussian.conditioning import Observed
from hpc_closure.closure.model import Request
from hpc_closure.spectral.modes.grid import resize

GRID = 16
NONE = {"conditions": {"sensors": "none"}}


def made(preset, steps, **config):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = {**SMALL, **NONE, "preset": preset, **config}
        return fit(Known("regimes", GRID), samples=1000, steps=steps, batch=32, config=config)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mixture():
    return made("mixture", 400, mean=["regression", "numbers"])


def given(model, states):
    encoding = model.encode(model.frames(states))
    absent = model.conditioning.absent(model.frame, encoding.features)
    return model.posterior(encoding, Observed(absent), [])


@torch.no_grad()
def test_the_loss_is_the_likelihood_of_the_law_that_is_drawn(mixture):
    """Against the density of real numbers: means and covariances of draws of each component."""
    model, frame = mixture, mixture.frame
    states = Known("regimes", GRID).states("test", 1)
    told = given(model, states)
    z = model.base_noise(
        frame.law, keyed_noise.Key(0, "test", range(40_000), 0), keyed_noise.STREAM_BASE
    )
    drawn = model.residual.draw(frame, told, z, torch.ones(()), None).q
    white = frame.law.modes("whiten", z)

    def numbers(q_hat):
        """Four real numbers: a mode with both parts, the pushed one, and the mean."""
        w = (q_hat * white)[:, [1, 2, 0], [0, 1, 0]]
        return torch.stack([w[:, 0].real, w[:, 0].imag, w[:, 1].real, w[:, 2].real], 1).double()

    first = torch.special.ndtr(z[:, 0, 0].imag) < math.exp(
        model.residual.laws(frame, told.summary).log_weights[0, 0]
    )
    share = float(first.double().mean())
    laws = []
    for chosen in (first, ~first):
        x = numbers(drawn[chosen])
        laws.append(torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.mT)))
    one, two = drawn[:1], drawn[1:2].clone()
    # which differ in these numbers alone: the others cancel
    keep = one.clone()
    for row, column in ((1, 0), (2, 1), (0, 0)):
        keep[:, row, column] = two[:, row, column]
    keep[:, -1, 0] = keep[:, 1, 0].conj()
    loss = [
        float(model.residual.loss(frame, told, q.to(torch.complex128), z[None, :1], None))
        for q in (one, keep)
    ]
    real = frame.law.modes("mask", z.real.float()).sum()
    half = frame.law.modes("mask", z.real.float())[frame.kept.modes + 1 :, 0].sum()
    count = float(2 * (real - half) - 1)
    # with the responsibilities that the other numbers leave: of regimes that are far apart, one
    density = [
        float(
            torch.logsumexp(
                torch.stack([laws[i].log_prob(numbers(q)[0]) for i in range(2)])
                + torch.tensor([share, 1 - share]).double().log(),
                0,
            )
        )
        for q in (one, keep)
    ]
    assert loss[1] - loss[0] == pytest.approx((density[0] - density[1]) / count, abs=0.02)


def test_two_regimes_are_found_and_when_each_is_likely(mixture):
    known = Known("regimes", GRID)
    states = known.states("test", 64)
    told = mixture.residual.laws(mixture.frame, given(mixture, states).summary)
    share = told.log_weights[0].exp().double()
    law = known.law.fluctuation.probability(known.law.spectra(states)).double()
    assert abs(float(torch.corrcoef(torch.stack([share, law]))[0, 1])) > 0.95
    assert float(share.min()) < 0.1 < 0.9 < float(share.max())


@torch.no_grad()
def test_components_are_drawn_as_often_as_they_are_likely(mixture):
    model, frame = mixture, mixture.frame
    states = Known("regimes", GRID).states("test", 64)
    every = model.residual.laws(frame, given(model, states).summary).log_weights[0].exp()
    row = int((every - 0.35).abs().argmin())
    one = given(model, states[row : row + 1])
    z = model.base_noise(
        frame.law, keyed_noise.Key(0, "test", range(4000), 0), keyed_noise.STREAM_BASE
    )
    drawn = model.residual.draw(frame, one, z, torch.ones(()), None).q
    told = model.residual.laws(frame, one.summary)
    apart = (told.means[0] - told.means[1])[0, 1, 0].real
    middle = model.residual._to_residual(frame, told.means.mean(0))[0, 1, 0].real
    share = float((torch.sign(apart) * (drawn[:, 1, 0].real - middle) > 0).double().mean())
    assert 0.2 < float(every[row]) < 0.5
    assert share == pytest.approx(float(every[row]), abs=0.06)


def test_components_are_about_the_mean_that_was_learned(mixture):
    states = Known("regimes", GRID).states("test", 16)
    told = mixture.residual.laws(mixture.frame, given(mixture, states).summary)
    mean = (told.log_weights.exp()[..., None, None] * told.means).sum(0)
    assert float(mean.abs().max()) < 1e-5 * float(told.means.abs().max())
    free = build({**SMALL, **NONE, "preset": "mixture", "mean": ["regression"]}, GRID)
    assert not free.residual.about_mean


def test_a_file_draws_the_same_and_a_member_alone_and_on_any_grid(mixture, tmp_path):
    path = tmp_path / "m.safetensors"
    artifact.save(
        mixture,
        path,
        target={"kind": "diffusion", "dt": 0.01, "interval": 1},
        provenance={},
    )
    closure = hpc_closure.load(path)
    state = Known("regimes", GRID).states("test", 1)[0]
    whole = closure.sample(state, members=8, seed=3, call=2)
    ours = mixture.sample_batch(Request(state[None], range(8), seed=3, call=2))
    assert torch.equal(whole, ours.to(whole))
    assert torch.equal(closure.sample(state, members=[5], seed=3, call=2)[0], whole[5])
    assert not torch.equal(closure.sample(state, members=[5], seed=3, call=3)[0], whole[5])
    band = mixture.band
    finer = band.to_physical(resize(band.to_spectral(state[None]), 15), 48)[0]
    fine = closure.sample(finer, members=8, seed=3, call=2)
    assert torch.allclose(fine[:, ::3, ::3], whole, atol=1e-5 * float(whole.abs().max()))
    assert closure.config["centred"] is True


def test_the_mean_over_a_longer_interval_spreads_less_about_the_same_mean(mixture):
    states = Known("regimes", GRID).states("test", 1).float()
    once, held = (
        mixture.sample_batch(Request(states, range(4000), seed=1, interval_ratio=held))
        for held in (1.0, 4.0)
    )
    assert float(held.var(0).mean() / once.var(0).mean()) == pytest.approx(0.25, rel=0.05)
    away = (held.mean(0) - once.mean(0)).square().mean()
    assert float(away) < 4 * float(once.var(0).mean()) / 4000


def test_what_does_not_fit_is_refused():
    for config, words in (
        (
            {"preset": "mixture", "conditions": {"sensors": "optional"}},
            "cannot be conditioned on sensors",
        ),
        ({"preset": "default", "residual": "mixture", **NONE}, "set model.preset"),
        (
            {"preset": "gaussian_modes", "sensors": "learned"},
            "needs a residual that learns",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            build(config, GRID)


def test_another_model_s_mean_is_taken_over():
    first = made("gaussian_modes", 60, mean=["regression", "fno"], validate_parts="off")
    second = build({**SMALL, **NONE, "preset": "mixture", "mean": ["regression", "fno"]}, GRID)
    assert take_mean(second, first)
    assert [phase.name for phase in second.phases] == ["generator", "check"]
    assert second.statistics.law_modes is None
    data = Known("regimes", GRID).data(200)
    second.begin("generator", data.of("hold").passes)
    frames = first.frames(Known("regimes", GRID).states("test", 4))
    gain = first.statistics.mean_gain
    second.statistics = second.statistics.__class__(
        **{**vars(second.statistics), "mean_gain": gain}
    )
    assert torch.equal(first.encode(frames).mean_hat, second.encode(frames).mean_hat)
    other = build({**SMALL, **NONE, "preset": "mixture", "width": 16}, GRID)
    with pytest.raises(ValueError, match="use.mean: its mean is"):
        take_mean(other, first)
