"""The benches: what they compare is the same problem, and what they report is what they say."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from recorded import Graph, play_graphs

from hpc_closure.bench import claims, measure, switches
from hpc_closure.bench.measure import Timing
from hpc_closure.bench.model import network_size, sampling, scaling, training
from hpc_closure.bench.model.known import Known, fit
from hpc_closure.bench.published import published_network, to_published_form
from hpc_closure.bench.solver import dns, gradient, peers, pyqg
from hpc_closure.closure.baselines.published_model import PublishedNetwork
from hpc_closure.evaluate.scores.spectra import shell_power
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.train.cuda import cuda_graph_training

TINY = dns.Case(grid=32, members=2, timing=Timing(steps=2, repeats=2))


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setattr(
        measure.copy_bandwidth,
        "__kwdefaults__",
        {**measure.copy_bandwidth.__kwdefaults__, "size": 1 << 20},
    )


# The published solver


@pytest.mark.parametrize("size", [32, 64])
def test_published_solver_and_ours_take_the_same_path_without_noise(size):
    problem = dns.problem_of(replace(TINY, grid=size, noise=False))
    ours = Simulation(problem, range(2), 0).initialise()
    other = dns.published_solver(problem, 10).start(dns.initial_fields(problem, range(2)))
    ours.advance(50)
    other.advance(50)
    field = ours.fields(["vorticity"])["vorticity"]
    assert (other.field() - field).abs().max() < 1e-10 * field.abs().max()


@pytest.mark.parametrize("draws", [1, 10])
def test_published_noise_has_the_variance_of_ours_in_every_shell(draws):
    problem = dns.problem_of(TINY)
    members, steps = 20, 20
    other = dns.published_solver(problem, draws).start(torch.zeros(members, 32, 32))
    theirs = torch.stack([other.noise * other.increment() / other.dt for _ in range(steps)])
    std = problem.make_noise(0).std_hat
    expected = torch.zeros(6, dtype=torch.float64)
    grid = problem.make_grid()
    weighted = (std**2 * grid.weights).flatten()
    shells = grid.shell().flatten()
    near = shells < 6
    expected.index_add_(0, shells[near], weighted[near])
    found = shell_power(theirs).mean((0, 1))[:6]
    # a shell of few modes has a relative error of sqrt(2 / (modes x draws))
    count = torch.bincount(shells[near]) * members * steps
    assert torch.all((found / expected - 1).abs() < 5 * (2 / count).sqrt())
    assert math.sqrt(float(theirs.square().mean())) == pytest.approx(0.01995, rel=0.05)


def test_published_network_in_its_own_form_is_the_same_function():
    torch.manual_seed(0)
    ours = PublishedNetwork(4, 4, 2, "interp")
    x, w, s = torch.randn(3, 32, 32), torch.randn(3, 32, 32), torch.randn(3, 16, 16)
    t = torch.rand(3)
    with torch.no_grad():
        before = ours(t, x, w, s)
        to_published_form(ours)
        after = ours(t, x, w, s)
    assert torch.allclose(before, after, atol=1e-5 * float(before.abs().max()))
    assert any(parameter.is_complex() for parameter in published_network(4, 4, 1).parameters())


# How it is timed


def test_contenders_take_turns_and_the_warm_up_is_not_counted(monkeypatch):
    """A clock that the contenders themselves move shows what is timed."""
    now, order = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def contender(name, seconds):
        def advance(steps):
            first = name not in order
            order.append(name)
            slow = 1 + len(order) / 100  # the machine becomes slower all the time
            now[0] += (100.0 if first else seconds * slow) * steps

        return advance

    taken = measure.interleave(
        {"ours": contender("ours", 1.0), "other": contender("other", 4.0)},
        Timing(steps=3, repeats=5),
    )
    assert order[-10:] == ["ours", "other"] * 5
    assert all(len(times) == 5 for times in taken.values())
    assert max(taken["ours"]) < 2
    assert measure.ratio(taken["ours"], taken["other"]) == pytest.approx(4, rel=0.02)


def test_ratio_is_the_median_of_quotients_within_a_pass():
    """One slow moment hits one pass; quotients of medians would mix passes."""
    assert measure.ratio([1.0, 2.0, 10.0], [3.0, 6.0, 20.0]) == 3.0


def test_blocks_fill_the_time_asked_for(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def advance(steps):
        asked.append(steps)
        now[0] += 0.01 * steps

    measure.interleave({"ours": advance}, Timing(repeats=1, seconds=0.5))
    assert asked[-1] == 50


# Records


def test_dns_records(capsys):
    records, remarks = dns.run(replace(TINY, against=("published", "published-1")))
    assert [record["method"] for record in records] == ["hpc_closure", "published", "published-1"]
    assert not remarks
    for record in records:
        assert set(dns.COLUMNS) <= set(record)
        nanoseconds = 1e9 / (record["member_steps_per_s"] * 32**2)
        assert record["ns_per_point_rhs"] == pytest.approx(nanoseconds)
    ours = records[0]
    assert ours["ratio"] is None and all(record["ratio"] > 0 for record in records[1:])
    moved = dns.WORDS * 8 * ours["member_steps_per_s"] * 32**2
    assert ours["fraction_of_copy"] == pytest.approx(moved / ours["copy_bytes_per_s"])


def test_peers_are_compared_without_noise():
    cases = dns.split(replace(TINY, against=("published", "exponax")))
    assert [(case.against, case.noise) for case in cases] == [
        (("published",), True),
        (("exponax",), False),
    ]
    assert dns.split(TINY) == [TINY]


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_solves_the_same_problem_or_says_that_it_is_not_installed(name):
    case = replace(TINY, grid=64, against=(name,), noise=False)
    records, remarks = dns.run(case)
    if len(records) == 1:
        assert len(remarks) == 1 and remarks[0].startswith(f"{name}: ")
        pytest.skip(remarks[0])
    assert records[1]["difference"] < 0.05  # schemes differ in the O(dt) error


def test_the_difference_of_a_peer_is_in_its_record_and_below_the_table(monkeypatch):
    """The published solver stands in for a peer; it solves the same problem to round-off."""

    def make(name, initial, forcing, **settings):
        if name == "fluidsim":
            raise peers.NotInstalled("fluidsim: not installed")
        case = replace(TINY, noise=False)
        return dns.published_solver(dns.problem_of(case), 1).start(torch.from_numpy(initial))

    monkeypatch.setattr(peers, "make", make)
    records, remarks = dns.run(replace(TINY, against=("fluidsim", "exponax"), noise=False))
    assert [record["method"] for record in records] == ["hpc_closure", "exponax"]
    assert "difference" not in records[0] and 0 < records[1]["difference"] < 1e-8
    assert remarks[0] == "fluidsim: not installed"
    assert remarks[1].startswith("  exponax: differs from ours by ")


# Two layers: stands in for pyqg, and writes a line of its own before it answers
LAYERS = """
import sys
import numpy as np
import torch
from hpc_closure.bench.solver import pyqg
start = torch.from_numpy(np.load(sys.argv[1])).mT
problem = pyqg.problem_of(start.shape[-1])
simulation = pyqg.started(problem, start)
print("warming up")
print("ready", flush=True)
for line in sys.stdin:
    word, value = line.strip().split(" ", 1)
    if word == "advance":
        simulation.advance(int(value))
    else:
        fields = simulation.fields(["q_upper", "q_lower"])
        layers = torch.stack([fields["q_upper"], fields["q_lower"]], 1)
        np.save(value, layers.mT.numpy())
    print("done", flush=True)
"""


def test_two_layers_are_timed_in_a_case_of_their_own():
    cases = dns.split(replace(TINY, against=("published", "exponax", "pyqg")))
    assert [(case.against, case.noise) for case in cases] == [
        (("published",), True),
        (("exponax",), False),
        (("pyqg",), False),
    ]
    assert cases[2].name == "dns-layers"
    assert dns.split(replace(TINY, against=("pyqg",))) == [cases[2]]


@pytest.mark.parametrize("turned", [False, True])
def test_layers_in_another_process_are_compared(monkeypatch, turned):
    """Our own solver stands in for pyqg; turned, its x is the first axis, which is wrong."""
    monkeypatch.delenv("PYQG_PYTHON", raising=False)
    program = LAYERS.replace(".mT", "") if turned else LAYERS
    monkeypatch.setattr(pyqg, "PROGRAM", program)
    records, remarks = dns.run(replace(TINY, against=("pyqg",), noise=False))
    assert [record["method"] for record in records] == ["hpc_closure", "pyqg"], remarks
    assert records[1]["ratio"] > 0 and records[0]["fraction_of_copy"] is None
    nanoseconds = 1e9 / (records[0]["member_steps_per_s"] * 2 * 32**2)
    assert records[0]["ns_per_point_rhs"] == pytest.approx(nanoseconds)
    assert remarks[0].startswith("  pyqg: differs from ours by ") and "100 steps" in remarks[0]
    assert (records[1]["difference"] < 1e-8) != turned


def test_pyqg_takes_the_same_path_or_says_that_it_is_not_installed():
    case = replace(TINY, grid=128, against=("pyqg",), noise=False, members=1)
    records, remarks = dns.run(case)
    if len(records) == 1:
        assert len(remarks) == 1 and remarks[0].startswith("pyqg: ")
        pytest.skip(remarks[0])
    assert records[1]["difference"] < 1e-4


@pytest.mark.parametrize("python", ["/no/such/python", sys.executable])
def test_an_interpreter_that_has_no_pyqg_is_one_line(monkeypatch, python):
    monkeypatch.setenv("PYQG_PYTHON", python)
    monkeypatch.setattr(pyqg, "PROGRAM", "import no_such_module")
    with pytest.raises(peers.NotInstalled, match=rf"^pyqg: .*{python}.*[^\n]$"):
        pyqg.Pyqg(torch.zeros(1, 2, 8, 8).numpy(), 1.0)
    with pytest.raises(ValueError, match="pyqg computes in float64 only"):
        dns.run(replace(TINY, against=("pyqg",), noise=False, precision="float32"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"against": ("fortran",)}, "expected one of published"),
        ({"against": ("one-rank",)}, "several ranks"),
        ({"members": 1, "ranks": 2}, "1 members for 2 groups"),
        ({"ranks": 3, "domain_ranks": 2}, "do not divide"),
    ],
)
def test_cases_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.mpi
@pytest.mark.parametrize("domain_ranks", [1, 2])
def test_ranks_are_compared_with_one(mpirun, tmp_path, domain_ranks):
    path = tmp_path / "records.json"
    options = f"--grid 32 --members 2 --steps 2 --repeats 2 --domain-ranks {domain_ranks}"
    command = [sys.executable, "-m", "hpc_closure", "bench", "dns", *options.split()]
    done = mpirun(2, [*command, "--against", "one-rank", "--json", path])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cores") == 1, "each rank speaks"
    found = json.loads(path.read_text())
    assert [record["ranks"] for record in found["records"]] == [2, 1]
    assert found["records"][1]["ratio"] > 0 and found["machine"]["threads"] == 1


def test_training_records():
    records = training.run(
        grid=32, batch=2, samples=(1,), timing=Timing(1, 1), config={"width": 8, "layers": 1}
    )
    methods = ["default", "default, full band", "published", "published fft", "published matrix"]
    again = [f"{name}, recomputed" for name in training.RECOMPUTED]
    assert [r["method"] for r in records] == [*methods, *again, *methods]
    assert [r["case"] for r in records] == 7 * ["training_step"] + 5 * ["sample"]
    assert all(r["milliseconds"] > 0 for r in records)
    assert [r["evaluations"] for r in records] == 7 * [1] + [4, 4, 10, 10, 10]
    kept = {r["method"]: r["kept_mb"] for r in records[:7]}
    for name in training.RECOMPUTED:
        assert 0 < kept[f"{name}, recomputed"] < 0.7 * kept[name]
    narrow, full, *published = (r["network_grid"] for r in records[:5])
    assert narrow < full and published == [32, 32, 32]  # the residual has few modes, or all
    assert all((r["ratio"] is None) == (r["method"] == "published") for r in records)


FEW = {"width": 4, "layers": 1, "modes": 4}
TINY_SWITCHES = {"grid": 16, "members": [2], "samples": [1], "batch": 2, "config": FEW}


def test_each_switch_is_measured_beside_none_and_torch_compile():
    """On a CPU, where it changes nothing."""
    records, remarks = switches.run(Timing(1, 1), **TINY_SWITCHES)
    solver = ["graphs", "fused", "graphs,fused"]
    assert [row["switch"] for row in records] == [*solver, *solver, "replays", "fused", "captured"]
    for row in records:
        assert row["without_ms"] > 0 and row["with_ms"] > 0
        assert (row["compiled_ms"] is None) == (row["case"] == "with noise")
        assert row["difference"] == (None if row["case"] == "training step" else 0)
        assert row["verdict"] == "not measured"
    names = ["graphs", "fused", "graphs,fused", "replays", "captured"]
    assert remarks == [f"{name}: not measured, for there is no GPU" for name in names]


def test_a_switch_is_on_while_it_is_measured_and_what_fails_is_a_remark(monkeypatch):
    def refuse(*inputs):
        raise RuntimeError("no compiler\nand more")

    play_graphs(monkeypatch)
    monkeypatch.setattr(cuda_graph_training, "possible", lambda *of: True)
    monkeypatch.setattr(switches, "_solvers", lambda *of: {"without": lambda steps: None})
    monkeypatch.setattr(switches, "_draws", lambda *of: {"without": lambda steps: None})
    monkeypatch.setattr(switches, "_compile", lambda function, device: refuse)
    records, remarks = switches.run(Timing(2, 1), **TINY_SWITCHES)
    assert [row["switch"] for row in records] == ["captured"]
    assert records[0]["compiled_ms"] is None and records[0]["with_ms"] > 0
    assert Graph.made and {graph.replays > switches.FIRST for graph in Graph.made} == {True}
    assert remarks[0] == "training step, 2: torch.compile fails (no compiler)"


@pytest.mark.parametrize(
    "seconds, difference, expected",
    [
        ((2.0, 1.0, 1.5), 1e-6, "keep"),
        ((2.0, 1.0, None), None, "keep"),
        ((2.0, 1.0, 1.05), 1e-6, "remove: torch.compile does"),
        ((1.05, 1.0, 1.5), 1e-6, "remove: no faster"),
        ((2.0, 1.0, 1.5), 1e-2, "remove: wrong"),
        ((2.0, 1.0, 1.5), math.nan, "remove: wrong"),
        ((2.0, None, 1.5), None, "remove: fails"),
    ],
)
def test_a_switch_must_beat_both_others_and_be_right(seconds, difference, expected):
    names = ("without", "graphs", "torch.compile")
    taken = {name: [time] for name, time in zip(names, seconds) if time}
    assert switches.verdict(taken, "graphs", difference, "cuda") == expected
    assert switches.verdict(taken, "graphs", difference, "cpu") == "not measured"


def test_a_switch_that_is_wrong_somewhere_is_removed():
    def lines(*verdicts):
        return switches.conclude([{"switch": "fused", "verdict": word} for word in verdicts])

    assert lines("keep", "remove: no faster") == ["fused: keep (pays in 1 of 2 cases)"]
    assert lines("keep", "remove: wrong") == ["fused: remove (keep, remove: wrong)"]
    assert lines("remove: no faster") == ["fused: remove (remove: no faster)"]


def test_sizes_are_judged_and_the_front_is_marked():
    known, told = Known("regimes", 16), []
    few = [network_size.Size(4, 1, 4), network_size.Size(8, 2, 4)]
    plan = sampling.Plan(states=4, members=4, repeats=1)
    rows = network_size.run(known, few, plan, samples=12, steps=3, report=told.append)
    assert rows == told and [row["width"] for row in rows] == [4, 8]
    assert rows[0]["weights"] < rows[1]["weights"]
    assert all(set(network_size.COLUMNS) == set(row) for row in rows)
    made = [
        {"train_s": cost, "crps_ratio": score}
        for cost, score in ((1, 1.2), (2, 1.1), (2, 1.2), (3, 1.1), (4, 1.0))
    ]
    network_size.mark_front(made)
    assert [row["front"] for row in made] == ["yes", "yes", "no", "no", "yes"]


TINY_SCALING = scaling.Plan([2], 16, 4, config={"width": 4, "modes": 2, "layers": 1})


@pytest.mark.mpi
def test_scaling_records():
    """Two processes halve the batch, or double it; the speed-up is in samples per second."""
    records = scaling.run(TINY_SCALING, Timing(1, 3), cores=1)
    rows = [(row["scaling"], row["ranks"], row["batch"], row["cores"]) for row in records]
    assert rows == [("strong", 1, 4, 1), ("strong", 2, 4, 1), ("weak", 1, 4, 1), ("weak", 2, 8, 1)]
    one, two, same, more = records
    assert one["milliseconds"] == same["milliseconds"] > 0 and one["speedup"] == 1
    assert more["speedup"] == pytest.approx(2 * more["efficiency"]) and two["efficiency"] > 0
    told = scaling.remarks(TINY_SCALING, cores=1)
    assert told == ["2 processes share 1 core(s): their speedup is limited by the cores"]
    assert not scaling.remarks(TINY_SCALING, cores=2)


def test_speedups_are_of_samples_per_second():
    taken = {"torch, 4 on 1": [1.0, 2.0], "torch, 4 on 2": [0.5, 1.0], "torch, 8 on 2": [1.0, 2.0]}
    for kind in ("strong", "weak"):
        row = scaling.record(TINY_SCALING, taken, "torch", kind, 2)
        assert (row["speedup"], row["efficiency"]) == (2, 1)


def test_a_process_that_ends_is_named():
    with pytest.raises(RuntimeError, match=r"a process of 1 ended: .*ValidationError: "):
        scaling.run(replace(TINY_SCALING, ranks=[1], engines=["none"]), Timing(1, 1), 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ranks": [2, 3]}, "--batch 4 does not divide among 3 processes: take 3"),
        ({"device": "cuda", "ranks": [99]}, "--ranks 99: each process takes its own GPU"),
    ],
)
def test_scaling_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_SCALING, **change)


@pytest.mark.parametrize("case", ["diffusion", "amplitude", "regimes"])
def test_sampling_records(case):
    known = Known(case, 16)
    model, crps_generator = (
        fit(
            known,
            samples=200,
            steps=2,
            batch=8,
            config={"preset": preset, "width": 8, "modes": 4, "layers": 1, "mean_layers": 1},
        )
        for preset in ("default", "one_pass")
    )
    records = sampling.run(
        known,
        model,
        sampling.Plan(("euler", "heun"), (1, 2), states=12, members=16, repeats=1),
        crps_generator=crps_generator,
    )
    methods = [r["method"] for r in records[:5]]
    assert methods == ["oracle", "oracle_x0.95", "mean_gp", "one_pass", "euler"]
    oracle, shrunk, plain = records[:3]
    assert shrunk["spread_ratio"] == pytest.approx(0.95 * oracle["spread_ratio"], rel=1e-6)
    if case == "amplitude":  # a spread that does not follow the flow is wrong where it matters
        assert plain["low_variance"] > 1.1 and plain["high_variance"] < 0.95
        assert abs(oracle["low_variance"] - 1) < 0.1 and abs(oracle["high_variance"] - 1) < 0.1
    assert oracle["crps_ratio"] == pytest.approx(1, abs=0.1)
    assert oracle["spread_ratio"] == pytest.approx(1, abs=0.15)
    drawn = [record["relative_error"] for record in records if record["method"] != "oracle_x0.95"]
    assert len(set(drawn)) == len(drawn), "two rows share their draws"
    for record in records:
        assert record["crps_low"] < record["crps_ratio"] < record["crps_high"]
        assert record["spread_low"] < record["spread_ratio"] < record["spread_high"]
        assert len(record["shells"]) == len(record["spread_ratio_shells"])
        assert record["min_shell"] <= record["max_shell"]
    model.adopt(
        replace(model.statistics, score_gain=None)
    )  # so the generator is used, and found unneeded again
    sampling.run(
        known,
        model,
        sampling.Plan(("euler",), (1,), states=4, members=4, repeats=1),
        unseen=known.batches("valid", 50),
    )
    assert model.config["function_evaluations"] == 1 and not model.score_active
    checked = []
    begin = crps_generator.begin
    crps_generator.begin = lambda phase, reader: (checked.append(phase), begin(phase, reader))
    plan = sampling.Plan(("euler",), (1,), states=4, members=4, repeats=1)
    unseen = known.batches("valid", 50)
    sampling.run(known, model, plan, crps_generator=crps_generator, unseen=unseen)
    assert checked == ["check"], "the CRPS generator is not calibrated as the others are"
    if case == "diffusion":  # the closed-form law is nearly the exact one
        assert plain["crps_ratio"] == pytest.approx(1, abs=0.1)


def test_gradient_records():
    timing = Timing(steps=1, repeats=2)
    records = gradient.run([16, 80], 2, timing, ["float32"])
    names = ["solver", "traced, matrices", "gradient, matrices", "traced, ffts", "gradient, ffts"]
    assert [row["method"] for row in records if row["grid"] == 16] == names
    without = [name for name in names if "matrices" not in name]  # not on a grid of this size
    assert [row["method"] for row in records if row["grid"] == 80] == without
    for row in records:
        assert row["microseconds"] > 0
        assert (row["ratio"] == 1) == (row["method"] == "solver")


def test_two_kinds_of_states_share_none():
    known = Known("diffusion", 16)
    assert not torch.allclose(known.states("train", 2), known.states("test", 2))
    assert torch.equal(known.states("train", 3)[1:], known.states("train", 2, first=1))


def test_the_share_of_time_in_units():
    (row,) = claims.run([2], 8, 0.2)
    assert row["units"] == 6 + 2 + 4  # the last two blocks in two and in four
    assert row["units_per_s"] < 15 and 0.1 < row["share"] < 1
    between = 6e-3 * row["between_ms"]  # of six units per worker
    took = row["start_s"] + 4 * 0.2 + between + row["end_s"]
    assert took == pytest.approx(12 / row["units_per_s"], rel=0.3)


def test_claims_that_make_no_sense_are_one_line(hpc_closure_command):
    done = hpc_closure_command("bench", "claims", "--units", "0")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "hpc-closure: --units 0 --seconds 0: expected at least 1, and 0 or more"
    )


def test_the_command_prints_the_machine_first_and_writes_records(hpc_closure_command, tmp_path):
    path = tmp_path / "records.json"
    done = hpc_closure_command(
        "bench",
        "dns",
        "--grid",
        "16,32",
        "--members",
        "1",
        "--steps",
        "1",
        "--repeats",
        "1",
        "--against",
        "published",
        "--threads",
        "1",
        "--json",
        path,
    )
    assert done.returncode == 0, done.stderr
    assert "cores" in done.stdout.splitlines()[0] and "torch" in done.stdout.splitlines()[0]
    found = json.loads(path.read_text())
    assert len(found["records"]) == 4 and set(dns.COLUMNS) <= set(found["records"][0])
    assert found["machine"]["cpu"]


def test_a_wrong_number_is_one_line(hpc_closure_command):
    done = hpc_closure_command("bench", "dns", "--grid", "large")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "hpc-closure: --grid large: expected numbers, for example 64,256"
    ]
