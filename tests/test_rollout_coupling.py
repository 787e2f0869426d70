"""The coupled run: the true closure gives the truth, the exact law gives the spread."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.gaussian.exact import ExactLaw
from hpc_closure.closure.process import Memory
from hpc_closure.closure.targets import Target, reduced_problem, removed_terms_hat
from hpc_closure.experiment.choices import Choice
from hpc_closure.experiment.schema import Experiment, Rollout, SensorLayout
from hpc_closure.generate.rungs import Known
from hpc_closure.rollout import coupling
from hpc_closure.rollout.block import memory_of, start
from hpc_closure.rollout.coupling import CoupledRun, Coupling
from hpc_closure.spectral.modes.grid import resize
from hpc_closure.spectral.modes.transform import Transform
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation

NOISE = {"kind": "q_wiener", "amplitude": 5e-5, "draws": 10, "correlation": 0.005}
PROBLEM = Problem(grid=32, dt=1e-3, noise=NOISE, forcing={"kind": "published"})


class Exact:
    """The exact law as a closure object."""

    config = {"preset": "default"}

    def __init__(self, problem, kind):
        self.problem, self.kind = problem, kind

    def interval_ratio(self, interval):
        return interval

    def averaging_steps(self, interval):
        return interval

    def sample_hat(self, request):
        law = ExactLaw(self.problem, self.kind, request.interval_ratio)
        seed, sensors = request.seed + 1, request.sensors
        return law.draw_hat(request.state, request.members, seed, request.call, sensors)


def coupled(closure, rows, cases=(7,), *, interval=5, seed=3, memory=Memory(), **settings):
    """A coupled run of PROBLEM; ``problem`` and the keys of ``rollout`` in ``settings``."""
    problem = settings.pop("problem", PROBLEM)
    rollout = Rollout(interval=interval, **settings)
    rungs = [(rung, Choice(1, 0.1)) for rung in rollout.rungs]
    run = Coupling(problem, "diffusion", 32, seed, rollout, memory, rungs=rungs)
    return CoupledRun(run, closure, rows, cases)


def start_state(steps=200):
    simulation = Simulation(PROBLEM, [7], 3).initialise()
    simulation.advance(steps)
    return simulation.fields(["vorticity"])["vorticity"].numpy()


@pytest.mark.parametrize("kind", ["diffusion", "convection"])
def test_the_true_closure_turns_the_reduced_solver_into_the_full_one(kind):
    full = Simulation(PROBLEM, [0, 1], 5).initialise()
    reduced = Simulation(reduced_problem(PROBLEM, 32, kind), [0, 1], 5)
    reduced.load_state(0, full.state.clone())
    for _ in range(20):
        closure = removed_terms_hat(full, kind)
        full.advance(1)
        reduced.advance(1, tendency_hat=closure)
    assert torch.allclose(full.state, reduced.state, rtol=0, atol=1e-14)


def test_the_subgrid_target_is_the_defect_of_the_reduced_map():
    fine = PROBLEM.replace(noise={"kind": "none"}, viscosity=1e-4)
    coarse = reduced_problem(fine, 16, "subgrid")
    simulation = Simulation(fine, [0], 1).initialise()
    simulation.advance(50)
    from hpc_closure.spectral.modes.grid import resize
    from hpc_closure.spectral.modes.resolution import retained_modes

    modes = retained_modes(16)
    before = resize(simulation.state, modes).clone()
    closure = Target("subgrid", 5, coarse).compute(simulation)
    reduced = Simulation(coarse, [0], 1)
    reduced.load_state(0, before)
    reduced.advance(5)
    after = reduced.state + closure * (5 * fine.dt)
    assert torch.allclose(after, resize(simulation.state, modes), rtol=0, atol=1e-15)
    assert closure.abs().max() > 1e-6


def test_the_reduced_solver_leaves_the_filter_to_the_closure():
    problem = Problem(grid=32, scheme="ab3", dt=0.01, viscosity=1e-3)
    assert reduced_problem(problem, 16, "subgrid").scheme == "ab3_plain"
    assert reduced_problem(problem, 16, "convection").scheme == "ab3"
    etdrk4 = problem.replace(scheme="etdrk4")
    assert reduced_problem(etdrk4, 16, "subgrid").scheme == "etdrk4"


def test_a_target_of_several_steps_is_their_mean():
    simulation = Simulation(PROBLEM, [0], 1).initialise()
    other = Simulation(PROBLEM, [0], 1).initialise()
    mean = Target("diffusion", 4).compute(simulation)
    parts = []
    for _ in range(4):
        parts.append(removed_terms_hat(other, "diffusion"))
        other.advance(1)
    assert torch.allclose(mean, torch.stack(parts).mean(0), rtol=0, atol=1e-16)
    assert simulation.step_index == 4


@pytest.mark.parametrize("interval", [1, 5, 20])
def test_spread_does_not_depend_on_the_interval(interval):
    """The exact law, held for m steps with 1/m of the variance, spreads like fresh noise does."""
    rows = [(7, member) for member in range(24)]
    run = coupled(Exact(PROBLEM, "diffusion"), rows, interval=interval)
    run.start(start_state(), 200)
    run.advance(100 // interval)
    fields = run.fields()
    spread = {name: fields[name].var(0).mean().sqrt() for name in ("model", "oracle")}
    assert float(spread["model"] / spread["oracle"]) == pytest.approx(1.0, abs=0.2)
    assert run.step_index == 300


class Still:
    """A closure without noise, zero."""

    config = {"preset": "smagorinsky"}

    def interval_ratio(self, interval):
        return 1.0

    def averaging_steps(self, interval):
        return interval

    def sample_hat(self, request):
        shape = len(request.members), *request.state.shape[1:]
        return request.state.new_zeros(shape)


@pytest.mark.parametrize("begin, differ", [("moved", True), ("empty", False)])
def test_members_without_noise_differ_in_the_modes_that_a_start_does_not_know(begin, differ):
    problem = PROBLEM.replace(grid=48, noise={"kind": "none"}, viscosity=1e-4)
    full = Simulation(problem, [7], 3).initialise().advance(20)
    known = Known(resize(full.state, (5, 5)), full.state.clone())
    settings = Coupling(problem, "subgrid", 32, 3, Rollout(interval=5, rungs=[]), begin=begin)
    run = CoupledRun(settings, Still(), [(7, member) for member in range(3)], [7])
    state = Transform(problem.make_grid()).to_physical(full.state)
    run.start(state[:, ::2, ::2].numpy(), 20, known=known)
    run.advance(1)
    fields = run.fields()["model"]
    assert len(fields) == 3
    assert bool((fields[0] - fields[1]).abs().max() > 1e-6 * fields.std()) is differ


AMPLITUDE = {**NOISE, "kind": "state_amplitude", "strength": 2.0, "amplitude": 1e-3}
REGIMES = {**NOISE, "kind": "two_regimes", "amplitude": 1e-3, "scale": 0.5}


@pytest.mark.parametrize(
    "noise, interval",
    [
        (AMPLITUDE, 1),
        (AMPLITUDE, 5),
        (AMPLITUDE, 20),
        ({**REGIMES, "hold": 5e-3}, 5),
        ({**REGIMES, "hold": 2e-2}, 20),
    ],
    ids=["amplitude-1", "amplitude-5", "amplitude-20", "regimes-5", "regimes-20"],
)
def test_the_exact_law_of_noise_that_follows_the_state_spreads_like_the_oracle(noise, interval):
    """Spread of the exact law as a closure, in total and in the mode that the regimes push."""
    members, problem = 160, PROBLEM.replace(noise=noise)
    rows = [(7, member) for member in range(members)]
    run = coupled(Exact(problem, "diffusion"), rows, interval=interval, problem=problem)
    run.start(start_state(), 200)
    run.advance(100 // interval)
    states = {name: run.simulations[name].state for name in ("model", "oracle")}
    assert not torch.equal(states["model"], states["oracle"])
    weights = run.simulations["model"].grid.weights

    def spread(w_hat, modes):
        return ((w_hat - w_hat.mean(0)).abs().square() * weights)[modes].flatten(1).sum(1)

    everywhere, pushed = (slice(None),), (slice(None), [1, -1], 0)
    for modes in (everywhere, pushed):
        one, two = (spread(states[name], modes) for name in ("model", "oracle"))
        # the ratio of two means of as many members, within four standard errors
        error = (one.var() / one.mean() ** 2 + two.var() / two.mean() ** 2) / members
        assert abs(float(one.mean() / two.mean()) - 1) < 4 * float(error) ** 0.5


def test_sensors_see_the_mean_closure_of_the_coming_interval():
    seen = {}

    class Spy(Exact):
        def sample_hat(self, request):
            seen["sensors"] = request.sensors
            return super().sample_hat(replace(request, sensors=None))

    layout = SensorLayout(layout="regular", number=8)
    run = coupled(Spy(PROBLEM, "diffusion"), [(7, 0)], sensors=layout)
    run.start(start_state(), 200)
    run.advance(1)
    truth = Simulation(PROBLEM, [7], 3).initialise()
    truth.advance(200)
    closure = truth.transform.to_physical(Target("diffusion", 5).compute(truth))
    expected = closure[0, ::4, ::4].flatten()
    assert torch.allclose(seen["sensors"].values[0], expected, rtol=0, atol=1e-12)


def test_each_member_reads_the_sensors_of_its_own_start():
    seen = {}

    class Spy(Exact):
        def sample_hat(self, request):
            seen["values"] = request.sensors.values.clone()
            return super().sample_hat(replace(request, sensors=None))

    rows = [(7, 0), (7, 1), (8, 0)]
    layout = SensorLayout(layout="regular", number=8)
    run = coupled(Spy(PROBLEM, "diffusion"), rows, [7, 8], sensors=layout)
    start = start_state()
    run.start(np.concatenate([start, 2 * start]), 200)
    run.advance(1)
    one, same, other = seen["values"]
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(
    "noise", [AMPLITUDE, {**REGIMES, "hold": 5e-3}], ids=["amplitude", "regimes"]
)
def test_with_sensors_the_oracle_of_such_noise_draws_from_its_law(noise):
    rows, problem = [(7, member) for member in range(24)], PROBLEM.replace(noise=noise)
    layout = SensorLayout(layout="regular", number=4, noise=0.05)
    closure = Exact(problem, "diffusion")
    run = coupled(closure, rows, problem=problem, sensors=layout)
    run.start(start_state(), 200)
    run.advance(8)
    fields = run.fields()
    spread = {name: float(fields[name].var(0).mean().sqrt()) for name in ("model", "oracle")}
    assert spread["model"] / spread["oracle"] == pytest.approx(1.0, abs=0.25)
    free = coupled(closure, rows, problem=problem)
    free.start(start_state(), 200)
    free.advance(8)
    assert spread["oracle"] < 0.8 * float(free.fields()["oracle"].var(0).mean().sqrt())


@pytest.mark.parametrize(
    "layout", [{"number": 8}, {"layout": "scattered", "number": 40, "noise": 0.05}]
)
def test_with_sensors_the_oracle_is_the_exact_law_given_what_they_read(layout):
    """Two ensembles of that law spread alike, whatever the sensors take from the law's spread."""
    rows = [(7, member) for member in range(24)]

    def run(sensors):
        out = coupled(Exact(PROBLEM, "diffusion"), rows, sensors=sensors)
        out.start(start_state(), 200)
        out.advance(20)
        fields = out.fields()
        return {name: fields[name].var(0).mean().sqrt() for name in ("model", "oracle")}

    seen, unseen = run(SensorLayout(**layout)), run(None)
    assert float(seen["model"] / seen["oracle"]) == pytest.approx(1.0, abs=0.2)
    assert float(seen["oracle"]) < 0.8 * float(unseen["oracle"])


def test_with_sensors_and_no_closed_form_there_is_no_oracle():
    coloured = {
        "kind": "ornstein_uhlenbeck",
        "wavenumber": 3,
        "width": 1.0,
        "rms": 0.1,
        "correlation_time": 0.5,
    }
    problem = PROBLEM.replace(noise=coloured)
    for sensors, names in (
        (SensorLayout(number=8), {"model", "none", "truth"}),
        (None, {"model", "none", "truth", "oracle"}),
    ):
        run = coupled(Exact(problem, "diffusion"), [(7, 0)], problem=problem, sensors=sensors)
        assert set(run.simulations) == names


@pytest.mark.parametrize("layout", [None, {"number": 8, "noise": 0.05}])
def test_between_solver_and_closure_no_field_is_formed(monkeypatch, layout):
    """A coupled interval transforms for the sensors only, and inside the solver's own steps."""
    calls = {"to_physical": 0, "to_spectral": 0}
    for name in calls:
        plain = getattr(Transform, name)

        def counted(self, *arguments, name=name, plain=plain):
            calls[name] += 1
            return plain(self, *arguments)

        monkeypatch.setattr(Transform, name, counted)
    sensors = layout and SensorLayout(**layout)
    run = coupled(Exact(PROBLEM, "diffusion"), [(7, 0), (7, 1)], sensors=sensors)
    run.start(start_state(), 200)
    calls.update(to_physical=0, to_spectral=0)
    run.advance(4)
    assert calls == {"to_physical": 4 if layout else 0, "to_spectral": 0}


def test_a_restart_goes_on_bit_for_bit():
    def make():
        rows = [(7, 0), (7, 1)]
        return coupled(Exact(PROBLEM, "diffusion"), rows)

    whole, first, second = make(), make(), make()
    whole.start(start_state(), 200)
    first.start(start_state(), 200)
    whole.advance(8)
    first.advance(4)
    second.load_state(first.save_state())
    second.advance(4)
    for name, fields in whole.fields().items():
        assert np.array_equal(fields.numpy(), second.fields()[name].numpy()), name


class Breaks(Exact):
    """The exact law, whose draw for one member is NaN from the third call on."""

    def __init__(self, member):
        super().__init__(PROBLEM, "diffusion")
        self.member = member

    def sample_hat(self, request):
        assert request.state.isfinite().all()
        drawn = super().sample_hat(request)
        broken = torch.tensor([member == self.member for member in request.members])
        return torch.where((broken & (request.call >= 2))[:, None, None], torch.nan, drawn)


def test_a_lost_member_is_named_and_the_others_go_on(caplog):
    rows = [(7, member) for member in range(4)]
    runs = [coupled(Exact(PROBLEM, "diffusion"), rows)]
    runs += [coupled(Breaks(keyed_noise.pair(7, 2)), rows) for _ in range(2)]
    for run in runs[:2]:
        run.start(start_state(), 200)
        run.advance(4)
    assert "lost at t = 0.21 (the first now: start 7, member 2: its closure" in caplog.text
    caplog.clear()
    runs[2].load_state(runs[1].save_state())
    with caplog.at_level("WARNING", logger="hpc_closure"):
        runs[2].advance(2)
    assert not caplog.records  # it was told when it was lost
    for run in runs[:2]:
        run.advance(2)
    whole, *broken = (run.fields()["model"] for run in runs)
    for fields in broken:
        assert fields[2].isnan().all()
        assert torch.equal(fields[[0, 1, 3]], whole[[0, 1, 3]])
    assert runs[1].losses["model"].lost.tolist() == [False, False, True, False]


def test_members_of_different_starts_draw_different_noise():
    states = np.concatenate([start_state(), start_state()])
    rows = [(7, 0), (8, 0), (7, 1)]
    run = coupled(Exact(PROBLEM, "diffusion"), rows, [7, 8])
    run.start(states, 200)
    run.advance(2)
    model = run.fields()["model"]
    assert not torch.equal(model[0], model[1]) and not torch.equal(model[0], model[2])


class Reader:
    """A closure that does nothing but keep what it was shown."""

    config = {"preset": "default"}

    def __init__(self):
        self.seen = []

    def interval_ratio(self, interval):
        return 1.0

    def averaging_steps(self, interval):
        return interval

    def sample_hat(self, request):
        self.seen.append((request.state.clone(), request.history.clone()))
        return torch.zeros_like(request.state)


def test_history_is_the_runs_own_past_and_survives_a_restart():
    def run():
        rows = [(0, 0), (0, 1)]
        return coupled(Reader(), rows, [0], seed=1, memory=Memory(2, 3), baselines=())

    earlier = [np.full((1, 32, 32), float(number)) for number in range(6)]
    whole = run()
    whole.start(start_state(), 200, earlier)
    whole.advance(9)
    seen = whole.closure.seen
    assert seen[0][1].shape == (2, 2, 21, 11)
    # before the start: 3 and 6 calls back of the states 0 .. 5
    means = [frames[:, :, 0, 0].real for _, frames in seen]
    assert torch.allclose(means[0][:, 0], torch.full((2,), 3.0).double())
    assert torch.allclose(means[2][:, 1], torch.full((2,), 2.0).double())
    for call in range(6, 9):  # and then its own states
        assert torch.allclose(seen[call][1][:, 0], seen[call - 3][0], atol=1e-13)
        assert torch.allclose(seen[call][1][:, 1], seen[call - 6][0], atol=1e-13)
    first, second = run(), run()
    first.start(start_state(), 200, earlier)
    first.advance(4)
    second.load_state(first.save_state())
    second.advance(5)
    for (_, kept), (_, again) in zip(seen[4:], second.closure.seen):
        assert torch.equal(kept, again)


class Carrying(Reader):
    """Draws half the last closure, and notes what it was shown."""

    def sample_hat(self, request):
        self.seen.append((request.call, request.state.clone(), request.previous.clone()))
        noise = 1.0 + torch.arange(len(request.members))[:, None, None] + request.call
        return 0.5 * request.previous[:, 0] + noise


def test_the_last_closures_are_the_runs_own_and_survive_a_restart():
    def run():
        rows = [(0, 0), (0, 1)]
        return coupled(Carrying(), rows, [0], seed=1, memory=Memory(previous=2), baselines=())

    stored = [np.full((1, 32, 32), float(number)) for number in (1, 2)]
    whole = run()
    whole.start(start_state(), 200, closures=stored)
    whole.advance(6)
    seen = whole.closure.seen
    assert torch.allclose(seen[0][2][:, :, 0, 0].real, torch.tensor([1.0, 2.0]).double())
    drawn = [0.5 * previous[:, 0] for _, _, previous in seen]
    for call in range(1, 6):  # each call is shown what the two before it gave
        noise = 1.0 + torch.arange(2)[:, None, None] + (call - 1)
        assert torch.allclose(seen[call][2][:, 0], drawn[call - 1] + noise)
        assert torch.equal(seen[call][2][:, 1], seen[call - 1][2][:, 0])
    first, second = run(), run()
    first.start(start_state(), 200, closures=stored)
    first.advance(2)
    second.load_state(first.save_state())
    second.advance(4)
    for (*_, kept), (*_, again) in zip(seen[2:], second.closure.seen, strict=True):
        assert torch.equal(kept, again)


def test_last_closures_that_are_moved_are_the_same_at_other_places():
    """At another one for each member, both of them by the same distance."""
    settings = {"memory": Memory(previous=2), "baselines": (), "last_closures": "moved"}
    run = coupled(Carrying(), [(0, 0), (0, 1)], [0], seed=1, **settings)
    closures = [start_state(steps) for steps in (100, 150)]
    run.start(start_state(), 200, closures=closures)
    run.advance(1)
    moved = run.closure.seen[0][2]
    transform = run.simulations["model"].transform
    given = torch.stack([transform.to_spectral(torch.as_tensor(one))[0] for one in closures])
    assert torch.allclose(moved.abs(), given.abs().expand(2, -1, -1, -1), atol=1e-14)
    fields = transform.to_physical(moved)
    plain = transform.to_physical(given)
    assert not torch.allclose(fields[0], fields[1], atol=0.1 * float(plain.std()))
    assert not torch.allclose(fields[0], plain, atol=0.1 * float(plain.std()))
    # one factor for both
    assert torch.allclose(moved[:, 0] * given[1], moved[:, 1] * given[0], atol=1e-12)


class TwoLaws(Exact):
    """A closure whose mean_gp is nothing, and that keeps the history it was shown."""

    def __init__(self):
        super().__init__(PROBLEM, "diffusion")
        self.seen = {}

    def sample_hat(self, request):
        if request.history is not None:
            self.seen.setdefault(request.method, []).append(request.history.clone())
        if request.method == "mean_gp":
            return torch.zeros_like(request.state)
        return super().sample_hat(request)


def test_mean_gp_is_a_run_of_its_own_with_draws_of_that_name():
    references = ("none", "mean_gp")
    run = coupled(TwoLaws(), [(7, 0), (7, 1)], baselines=references)
    run.start(start_state(), 200)
    run.advance(3)
    fields = run.fields()
    assert set(fields) == {"model", "mean_gp", "none", "truth"}
    for row in fields["mean_gp"]:
        assert torch.equal(row, fields["none"][0])
    alone = coupled(TwoLaws(), [(7, 0), (7, 1)], baselines=("none",))
    alone.start(start_state(), 200)
    alone.advance(3)
    assert torch.equal(alone.fields()["model"], fields["model"])
    published = TwoLaws()
    published.config = {"preset": "published"}
    assert "mean_gp" not in coupled(published, [(7, 0)], baselines=references).simulations


class Damping(Reader):
    """A closure without noise, of the last closure: all members of a start are one."""

    config = {"preset": "leith"}

    def sample_hat(self, request):
        self.seen.append(len(request.state))
        return -0.1 * request.state + 0.5 * request.previous[:, 0]


@pytest.mark.parametrize("last", ["own", "moved"])
def test_what_draws_nothing_is_run_once_for_all_members(monkeypatch, last):
    """The same fields, losses and restarts as of all rows; moved closures make members differ."""
    problem = PROBLEM.replace(noise={"kind": "none"})
    rows = [(9, 0), (7, 0), (7, 1), (9, 1), (9, 2)]
    settings = {
        "problem": problem,
        "memory": Memory(previous=1),
        "baselines": ("none",),
        "rungs": ({"grid": 64},),
        "last_closures": last,
    }
    states = np.concatenate([start_state(), start_state(50)])
    closures = [0.1 * states[:, ::-1].copy()]

    def run():
        made = coupled(Damping(), rows, [7, 9], **settings)
        made.start(states, 200, closures=closures)
        made.advance(2)
        return made

    once = run()
    simulated = {name: len(one.members) for name, one in once.simulations.items()}
    number = 2 if last == "own" else 5
    assert simulated == {"model": number, "none": 2, "rung_64_empty": 2, "truth": 2}
    monkeypatch.setattr(coupling, "has_noise", lambda config: True)
    plain = coupling.Rows.of
    monkeypatch.setattr(coupling.Rows, "of", lambda rows, cases, drawn: plain(rows, cases, True))
    every = run()
    assert len(every.simulations["rung_64_empty"].members) == 5
    for name, field in every.fields().items():
        assert torch.equal(once.fields()[name], field)
    differ = not torch.equal(field_of(once)[1], field_of(once)[2])
    assert differ == (last == "moved")
    monkeypatch.undo()
    again = coupled(Damping(), rows, [7, 9], **settings)
    again.load_state(once.save_state())
    for one in (once, again):
        one.advance(1)
    assert torch.equal(field_of(once), field_of(again))


def test_members_that_begin_apart_are_run_each():
    """Each from its own state and last closure, also where nothing is drawn; none, too."""
    rollout = Rollout(baselines=("none",), after_release=1.0, last_closures="moved")
    problem, rows = PROBLEM.replace(noise={"kind": "none"}), [(9, 0), (7, 0), (7, 1)]
    settings = Coupling(problem, "subgrid", 32, 3, rollout, Memory(previous=1))
    states = np.concatenate([start_state(steps) for steps in (200, 50, 100)])
    closures = [0.1 * states[:, ::-1].copy()]
    run = CoupledRun(settings, Damping(), rows, [7, 9])
    run.start(states, 200, closures=closures)
    transform = run.simulations["model"].transform
    for name in ("model", "none"):
        assert torch.equal(
            run.simulations[name].state, transform.to_spectral(torch.as_tensor(states))
        )
    kept = run.processes["model"].closures[0]
    assert torch.equal(kept, transform.to_spectral(torch.as_tensor(closures[0])))
    run.advance(2)
    alone = CoupledRun(settings, Damping(), rows[2:], [7])
    alone.start(states[2:], 200, closures=[closures[0][2:]])
    alone.advance(2)
    for name in ("model", "none"):
        assert torch.equal(run.fields()[name][2:], alone.fields()[name])
    assert set(alone.fields()) == {"model", "none"}


def field_of(run):
    return run.fields()["model"]


def test_a_lost_member_that_stands_for_all_is_named(caplog):
    settings = {"problem": PROBLEM.replace(noise={"kind": "none"}), "memory": Memory(previous=1)}
    run = coupled(Damping(), [(7, 0), (9, 0), (9, 1)], [7, 9], baselines=(), **settings)
    run.start(np.concatenate(2 * [start_state()]), 200, closures=[np.zeros((2, 32, 32))])
    run.simulations["model"].pairs[1] = np.nan
    run.advance(1)
    assert "1 of 2 trajectories lost" in caplog.text and "start 9, member 0" in caplog.text
    assert run.fields()["model"].isfinite().flatten(1).all(1).tolist() == [True, False, False]
    assert run.rows_of["model"].stand_for == 1.5


def test_mean_gp_reads_its_own_past_also_after_a_restart():
    def run():
        rows = [(0, 0), (0, 1)]
        return coupled(TwoLaws(), rows, [0], memory=Memory(1, 2), baselines=("mean_gp",))

    earlier = [np.full((1, 32, 32), float(number)) for number in range(2)]
    whole, first, second = run(), run(), run()
    whole.start(start_state(), 200, earlier)
    whole.advance(6)
    seen = whole.closure.seen
    assert torch.equal(seen["mean_gp"][1], seen[None][1])  # before the start
    assert not torch.equal(seen["mean_gp"][4], seen[None][4])
    first.start(start_state(), 200, earlier)
    first.advance(3)
    second.load_state(first.save_state())
    second.advance(3)
    for name, frames in second.closure.seen.items():
        assert all(torch.equal(*pair) for pair in zip(frames, seen[name][3:], strict=True))
    for name, field in second.fields().items():
        assert torch.equal(field, whole.fields()[name])


def test_states_before_the_start_are_read_between_the_stored_ones():
    seen = {}
    run = SimpleNamespace(memory=Memory(2, 4, previous=1), cases=[0])
    run.start = lambda state, step, earlier, closures, known: seen.update(
        state=state, step=step, earlier=list(earlier), closures=closures
    )
    data = SimpleNamespace(
        time_index=lambda time: 10, read=lambda case, index, *_: np.full((2, 2), float(index))
    )
    start(run, data, Experiment(rollout={"t_start": 30.0}))
    values = [float(state[0, 0, 0]) for state in seen["earlier"]]
    assert values == pytest.approx([8, 8.25, 8.5, 8.75, 9, 9.25, 9.5, 9.75])
    assert seen["state"][0, 0, 0] == 10 and seen["closures"][0][0, 0, 0] == 9
    assert seen["step"] == 30_000


def test_history_that_the_run_cannot_give_is_refused():
    closure = SimpleNamespace(
        config={"conditions": {"previous_states": 2}}, target={"every": 0.1, "dt": 1e-3}
    )
    settings = {"generate": {"record": {"start": 20.0, "every": 0.1}}}
    assert memory_of(Experiment(**settings), closure) == Memory(2, 20)
    closure.config["conditions"]["previous_states"] = 0
    assert memory_of(Experiment(**settings), closure) == Memory()
    closure.config["conditions"]["previous_states"] = 2
    with pytest.raises(ValueError, match="not a whole number of closure intervals"):
        memory_of(Experiment(**settings, rollout={"interval": 8}), closure)
    with pytest.raises(ValueError, match="rollout.t_start be at least 20.2"):
        memory_of(Experiment(**settings, rollout={"t_start": 20.1, "t_end": 40.1}), closure)


class Defect:
    """The true closure of a subgrid problem: the defect of the reduced map, call by call."""

    config = {"preset": "leith"}

    def __init__(self, defects, forecast=False):
        self.defects, self.states = list(defects), []
        self.config = {**self.config, "conditions": {"forecast": forecast}}

    def interval_ratio(self, interval):
        return None

    def averaging_steps(self, interval):
        return interval

    def sample_hat(self, request):
        self.states.append(request.state.clone())
        return self.defects.pop(0)


@pytest.mark.parametrize("stride, forecast", [(1, False), (4, False), (4, True)])
def test_the_true_subgrid_closure_gives_the_truth_at_the_reduced_solvers_own_step(
    stride, forecast
):
    """Call after call: the coupled run applies the very map whose defect the closure is."""
    fine = PROBLEM.replace(noise={"kind": "none"}, viscosity=1e-4, grid=48, scheme="cn_ab2")
    reduced = reduced_problem(fine, 16, "subgrid", stride)
    truth = Simulation(fine, [0], 1).initialise().advance(48)
    beginning = resize(truth.state, 5).clone()
    target = Target("subgrid", 8, reduced)
    defects = [target.compute(truth).clone() for _ in range(3)]
    settings = Coupling(fine, "subgrid", 16, 3, Rollout(interval=8), stride=stride)
    closure = Defect(defects, forecast)
    run = CoupledRun(settings, closure, [(0, 0)], [0])
    model = run.simulations["model"]
    run.start(model.transform.to_physical(beginning).numpy(), 48)
    assert model.problem.dt == pytest.approx(stride * fine.dt)
    assert model.step_index * stride == 48
    run.advance(3)
    assert run.step_index == 72 and model.step_index * stride == 72
    expected = resize(truth.state, model.grid.modes)
    assert torch.allclose(model.state, expected, rtol=0, atol=1e-13)
    start = resize(beginning, model.grid.modes)
    if forecast:  # the state to which the closure is added
        solver = Simulation(reduced, [0], 3).load_state(0, start).advance(8 // stride)
        start = solver.state
    assert torch.allclose(closure.states[0], start, rtol=0, atol=1e-14)
