"""Coupled ensembles with gradients: they are the coupled run, and their gradients are true."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trajectory_case as case

from hpc_closure.closure.artifact import Closure, load, save
from hpc_closure.closure.fitting import rollout_training
from hpc_closure.closure.header import Header
from hpc_closure.closure.process import Memory
from hpc_closure.closure.reductions import Reader
from hpc_closure.experiment.schema import Rollout
from hpc_closure.rollout.coupling import CoupledRun, Coupling
from hpc_closure.spectral.modes.grid import to_spectra

CALLS = 6
DT = case.PROBLEM.dt
TARGET = {"kind": "subgrid", "interval": case.INTERVAL, "dt": DT, "every": case.INTERVAL * DT}


def batch_of(count=3, calls=CALLS):
    part = case.data().valid.followed(calls)
    return part.gather(part.some(count))


def runs_of(model):
    """The coupled ensembles that train a model."""
    return model.phase_named("trajectory").trajectories


def untouched(model):
    """Nothing that gradients have learned: the last layer of a network starts at zero."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "head" in name or "adjustment" in name:
                generator = torch.Generator().manual_seed(len(name))
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
    gain = torch.ones(model.frame.kept.grid.num_shells).double()
    model.adopt(replace(model.statistics, mean_gain=gain))
    return model


@pytest.mark.parametrize("residual", ["gaussian", "none"])
def test_it_is_the_coupled_run(residual, monkeypatch):
    """The same states call by call, with the noise of the same keys and the last closures."""
    model = untouched(case.fitted(residual=residual, precision="float64"))
    batch = batch_of()
    cases = [int(number) for number in batch["sample_index"]]
    monkeypatch.setattr(rollout_training, "STAGE", "sample")
    with torch.no_grad():
        ours = case.trajectories(2, "float64").run(model, batch, seed=7, step=0)
    rows = [(one, member) for member in range(2) for one in cases]
    settings = Rollout(interval=case.INTERVAL, baselines=())
    coupling = Coupling(case.PROBLEM, "subgrid", case.GRID, 7, settings, Memory(previous=2))
    header = Header(model.config, case.GRID, 1.0, TARGET, {})
    run = CoupledRun(coupling, Closure(model.eval(), header), rows, cases)
    closures = batch["previous"].double().numpy().swapaxes(0, 1)
    run.start(batch["state"].double().numpy(), 0, closures=closures)
    for call in range(CALLS):
        run.advance()
        theirs = run.fields()["model"].unflatten(0, (2, len(cases)))
        assert np.allclose(ours[call], theirs, rtol=0, atol=1e-5 * theirs.abs().max())
    members = ours[-1, 0] - ours[-1, 1]
    assert (members.abs().max() > 1e-3) == (residual == "gaussian")


def test_gradient_of_an_ensemble_score_over_twenty_calls():
    """Against differences, in float64: of the network, of the noise and of the terms."""
    model = untouched(case.fitted(precision="float64").double())
    weights = {name: weight for name, weight in model.named_parameters()}
    batch = batch_of(2, calls=20)
    truth = batch["ahead"].double().swapaxes(0, 1)

    def distance(one, other):
        return (one - other).square().mean((-2, -1)).sqrt()

    def score():  # an energy score: smooth, as the CRPS is not where a member meets the truth
        one, other = runs_of(model).run(model, batch, 3, 1).unbind(1)
        skill = 0.5 * (distance(one, truth) + distance(other, truth))
        return (skill - 0.5 * distance(one, other)).mean()

    gradients = dict(zip(weights, torch.autograd.grad(score(), list(weights.values()))))
    for name, weight in weights.items():
        generator = torch.Generator().manual_seed(1)
        along = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        slope, step = 0.0, 1e-5
        with torch.no_grad():
            for sign in (1, -1):
                weight += sign * step * along
                slope += sign * float(score()) / (2 * step)
                weight -= sign * step * along
        assert float((gradients[name] * along).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_memory_does_not_grow_with_the_steps_of_a_call():
    """What is kept for the gradient is a state a stretch, not the fields of every step."""
    kept = {}
    for steps in (25, 100):
        total = 0

        def keep(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        solver = case.trajectories().solver(torch.device("cpu"))
        state = torch.randn(2, *solver.grid.shape, dtype=torch.complex64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            solver.advance(0.1 * state, steps)
        kept[steps] = total
    state = 2 * 11 * 6 * 8
    assert kept[25] < 6 * state
    assert kept[100] - kept[25] < 3 * 4 * state


def test_draws_of_a_step_are_those_of_no_other_and_of_no_rollout():
    model, batch = case.fitted("gaussian"), batch_of()
    with torch.no_grad():
        one, again, other = (runs_of(model).run(model, batch, 3, step)[0] for step in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-4)


def test_a_start_has_the_same_run_in_any_batch():
    model, batch = case.fitted("gaussian"), batch_of(4)
    half = {key: value[2:] for key, value in batch.items()}
    with torch.no_grad():
        whole, part = (runs_of(model).run(model, one, 3, 1) for one in (batch, half))
    assert torch.allclose(whole[:, :, 2:], part, atol=1e-5)


@pytest.mark.parametrize("members", [1, 2, 5])
def test_errors_of_the_energy_know_no_chance(members, monkeypatch):
    """Of members that scatter about the truth's energy the mean square is 0, whatever they do; of
    those with a tenth too much it is that tenth's square."""
    chance = torch.Generator().manual_seed(3)
    truth = batch_of(1, calls=1)["ahead"].double().expand(4000, 1, -1, -1)
    one = to_spectra(truth, 5).swapaxes(0, 1)
    batch = {"ahead": truth}
    found = []
    for size in (1.0, 1.1):
        factor = size + 0.3 * torch.randn(1, members, 4000, 1, 1, generator=chance).clamp(-3, 3)
        made = case.trajectories(members)
        monkeypatch.setattr(made, "spectra", lambda *_: one[:, None] * factor.sqrt())
        _, errors = made.scores(None, batch, 0, 0)
        found.append(errors.mean((0, 1)) / made.power(one).mean((0, 1)).square())
    noise = 0.09 if members == 1 else 0.0  # one member has no other to tell chance by
    assert torch.allclose(found[0], torch.full_like(found[0], noise), atol=6e-3)
    assert torch.allclose(found[1], torch.full_like(found[1], noise + 0.01), atol=6e-3)


def test_noise_of_the_wrong_size_is_mended():
    """The score is proper: too much noise is unlearned, shell by shell, without being told."""
    model = case.fitted("gaussian")
    with torch.no_grad():
        model.adjustment.log_noise += 0.7
    noise = model.adjustment.log_noise
    optimizer = torch.optim.Adam([noise], lr=0.05)
    part = case.data().train.followed(3)
    model.begin("trajectory", lambda: [part.gather(part.some(48))])
    late = []
    for step in range(40):
        optimizer.zero_grad()
        model.loss(part.batch(12 * step, 12), 1, step).backward()
        optimizer.step()
        late.append(noise.detach().clone())
    power = model.frame.law.spectrum * model.frame.kept.group_size
    left = torch.stack(late[20:]).mean(0)[model.frame.kept.group_shell]
    assert abs(float((power * left).sum() / power.sum())) < 0.2


def test_coupled_ensembles_are_brought_to_spread_as_they_err():
    model = case.fitted("gaussian")
    with torch.no_grad():
        model.adjustment.log_noise -= 0.5
    part = case.data().valid.followed(4)
    batches = [part.gather(part.some(64))]
    before = runs_of(model).spread_skill(model, Reader(batches), 1)
    report = model.begin("noise", batches)
    after = runs_of(model).spread_skill(model, Reader(batches), 1)
    assert before[3:].max() < 0.85
    assert (after[3:] - 1).abs().max() < 0.1 < (before[3:] - 1).abs().min()
    assert report["spread_skill"][0] < report["spread_skill"][-1]
    assert all(0.5 <= factor <= 2 for factor in report["noise_factor"])


def test_what_was_trained_is_in_the_file(tmp_path):
    model = untouched(case.fitted())
    save(model, tmp_path / "model.safetensors", target=TARGET, provenance={})
    read = load(tmp_path / "model.safetensors")
    batch = batch_of()
    with torch.no_grad():
        ours, theirs = (case.trajectories().run(one, batch, 3, 1) for one in (model, read.model))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert any("training through the solver (noise x" in str(part) for part in read.header.parts)


def test_runs_that_do_not_hold_are_refused():
    model = case.fitted("gaussian")
    with torch.no_grad():
        model.adjustment.log_noise += 100.0
    model.adopt(replace(model.statistics, target_largest=None))
    part = case.data().train.followed(4)
    with pytest.raises(ValueError, match="not finite by closure call"):
        model.begin("trajectory", lambda: [part.gather(part.some(4))])
