"""Kills at random moments of every verb; the same command again gives the undisturbed products.

The verbs run in children of a fork server that has torch and the package loaded, so a kill costs
the work of the verb and not the start of Python. The seeds are fixed; the moments are not, and
need not be: the claim is that no moment matters.
"""

import contextlib
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

from hpc_closure.experiment.folder import Run
from hpc_closure.work import hdf5

KILL = signal.SIGKILL
POLITE = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP]
SIGNALS = [KILL, KILL, KILL, *POLITE]
KILLS = {"generate": 11, "train": 9, "rollout": 9, "evaluate": 2}  # at least 30 in all
LONGER = int(os.environ.get("HPC_CLOSURE_KILLS", 300))  # of the long test, over the verbs
PRELOAD = [
    "hpc_closure.cli",
    "hpc_closure.generate.verb",
    "hpc_closure.train.verb",
    "hpc_closure.rollout.verb",
    "hpc_closure.evaluate.verb",
    "hpc_closure.generate.dns",
    "hpc_closure.rollout.block",
    "hpc_closure.closure.artifact",
    "hpc_closure.train.trainer",
    "hpc_closure.evaluate.report.page",
    "hpc_closure.evaluate.report.figures",
    "safetensors.torch",
    "pydantic",
]
CHANGES = [
    "generate.dt=0.0025",
    "train.steps=12",
    "train.validate_every=6",
    "rollout.interval=4",
    "train.checkpoint_every=2",
    "cluster.checkpoint_every=0.02",
    "evaluate.samples=4",
    "evaluate.sensors=[]",
    "evaluate.formats=[png]",
]
PATIENCE = 300  # seconds until a process counts as hung, on a machine busy with other work


def verb_in_child(words, log_path, begun):
    """Body of a child: the command as a user gives it, its words going to a file."""
    handle = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["hpc-closure", *map(str, words)]
    from hpc_closure.__main__ import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    begun.set()
    main()


class Bench:
    """A run folder on which verbs are started and killed."""

    def __init__(self, folder, context):
        self.folder, self.context = folder, context
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "tiny.yaml"
        self.path.write_text(TINY.format(root=folder / "runs"))
        self.run = Run(folder / "runs/tiny")
        self.log = folder / "words.log"

    def start(self, verb, *more):
        words, begun = [verb, self.path, *CHANGES, *more], self.context.Event()
        process = self.context.Process(target=verb_in_child, args=(words, self.log, begun))
        process.start()
        assert begun.wait(PATIENCE)  # what comes before is not ours
        return process

    def finish(self, verb):
        """Run the verb undisturbed; returns the seconds it took."""
        began = time.monotonic()
        process = self.start(verb)
        process.join(PATIENCE)
        assert process.exitcode == 0, self.log.read_text()[-3000:]
        return time.monotonic() - began

    def wipe(self, verb):
        shutil.rmtree(self.run.folder(verb), ignore_errors=True)
        shutil.rmtree(self.run.units(verb), ignore_errors=True)


def losses(path):
    with open(path, newline="") as stream:
        return [
            {key: row[key] for key in row if key != "seconds"} for row in csv.DictReader(stream)
        ]


def scores(path):
    with open(path, newline="") as stream:
        return [row for row in csv.DictReader(stream) if not row["score"].startswith("cost")]


def weights(path):
    from safetensors.numpy import load_file

    return {name: (value.shape, value.tobytes()) for name, value in load_file(path).items()}


def products(run, verb):
    """What must be equal."""
    if verb == "train":
        return weights(run.model), losses(run.metrics)
    if verb == "evaluate":
        return scores(run.scores_csv)
    return {path.name: hdf5.sha256_datasets(path) for path in sorted(run.folder(verb).iterdir())}


def damage_newest(run, verb, rng):
    """What a dying disk or node leaves: the newest restart point cut short."""
    found = (
        [*run.units(verb).glob("*.restart/step_*.h5")]
        if verb != "train"
        else [*run.checkpoints.glob("step_*/weights.safetensors")]
    )
    if found:
        newest = max(found, key=lambda path: path.stat().st_mtime)
        newest.write_bytes(newest.read_bytes()[: rng.randrange(newest.stat().st_size)])


@pytest.fixture(scope="module")
def context():
    found = get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory, context):
    """An undisturbed run and the seconds that each verb took."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed"), context)
    verbs = list(KILLS)[:3]
    seconds = {verb: bench.finish(verb) for verb in verbs}
    return bench, seconds, {verb: products(bench.run, verb) for verb in verbs}


@pytest.fixture(scope="module")
def scored(reference):
    """The same with the evaluation, whose figures take longer than all else."""
    bench, seconds, expected = reference
    seconds["evaluate"] = bench.finish("evaluate")
    expected["evaluate"] = products(bench.run, "evaluate")
    return reference


@pytest.mark.parametrize("verb", KILLS)
def test_kills_do_not_matter(reference, request, context, tmp_path, verb):
    if verb == "evaluate":
        reference = request.getfixturevalue("scored")
    kill_again_and_again(reference, context, tmp_path, verb, KILLS[verb], f"chaos {verb}")


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("verb", KILLS)
def test_many_kills_do_not_matter(scored, context, tmp_path, verb):
    kills = -(-LONGER * KILLS[verb] // sum(KILLS.values()))
    kill_again_and_again(scored, context, tmp_path, verb, kills, f"long chaos {verb}")


def kill_again_and_again(reference, context, tmp_path, verb, kills, seed):
    undisturbed, seconds, expected = reference
    rng, span = random.Random(seed), seconds[verb]
    bench = Bench(tmp_path, context)
    shutil.copytree(undisturbed.run.root, bench.run.root)
    bench.wipe(verb)
    hits = rounds = 0
    fresh = True
    while hits < kills:
        rounds += 1
        assert rounds < 20 * kills
        began = time.monotonic()
        process = bench.start(verb)
        process.join(rng.uniform(0.02, 1.0) * span)
        number = rng.choice(SIGNALS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join(PATIENCE)
        code = process.exitcode
        assert code is not None, f"{verb} hangs after {number.name}"
        told = bench.log.read_text()[-3000:]
        # -signal: it came before the verb had begun
        assert code in (0, 75, -number, 130 if number == signal.SIGINT else 75), told
        assert "Traceback" not in told, told
        if code == 0:
            assert products(bench.run, verb) == expected[verb]
            bench.wipe(verb)
            if fresh:  # the machine may be quieter than when the reference was made
                span = time.monotonic() - began
            fresh = True
        else:
            fresh = False
            hits += 1
            if number == KILL and rng.random() < 0.3:
                damage_newest(bench.run, verb, rng)
    bench.finish(verb)
    assert products(bench.run, verb) == expected[verb]
    left = [path for path in bench.run.units(verb).glob("[!.]*") if path.suffix != ".jsonl"]
    assert not left and not list(bench.run.folder(verb).glob("*.part"))


def test_two_people_at_once(reference, context, tmp_path):
    _, _, expected = reference
    bench = Bench(tmp_path, context)
    both = [bench.start("generate") for _ in range(2)]
    for process in both:
        process.join(PATIENCE)
    assert [process.exitcode for process in both] == [0, 0], bench.log.read_text()[-3000:]
    assert products(bench.run, "generate") == expected["generate"]
    both = [bench.start("train") for _ in range(2)]
    for process in both:
        process.join(PATIENCE)
    codes = sorted(process.exitcode for process in both)
    assert codes in ([0, 1], [0, 0]), bench.log.read_text()[-3000:]
    if codes == [0, 1]:
        assert "train is being run by process" in bench.log.read_text()
    assert products(bench.run, "train") == expected["train"]


@pytest.mark.parametrize("verb", ["generate", "train", "rollout"])
def test_time_limit(reference, context, tmp_path, verb):
    undisturbed, _, expected = reference
    bench = Bench(tmp_path, context)
    shutil.copytree(undisturbed.run.root, bench.run.root)
    bench.wipe(verb)
    limit, stops = 0.05, 0
    while process := bench.start(verb, "--max-elapsed", f"{limit:.3f}s"):
        process.join(PATIENCE)
        if process.exitcode == 0:
            break
        assert process.exitcode == 75, bench.log.read_text()[-3000:]
        stops += 1
        limit *= 1.3  # on a busy machine the first ones end before the first step
    assert stops >= 2
    assert "time limit of" in bench.log.read_text()
    assert products(bench.run, verb) == expected[verb]


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(
    "verb, ranks, changes",
    [
        ("generate", 2, []),
        ("generate", 2, ["cluster.domain_ranks=2"]),
        ("train", 2, ["train.engine=torch"]),
        ("train", 2, ["train.engine=deepspeed"]),
    ],
)
def test_kills_of_ranks(reference, context, environment, tmp_path, verb, ranks, changes):
    """The same with several ranks: a rank or the launcher is killed."""
    undisturbed, _, expected = reference
    rng = random.Random(f"ranks {verb} {changes}")
    bench = Bench(tmp_path / "killed", context)
    whole = Bench(tmp_path / "whole", context)
    for each in (bench, whole):
        shutil.copytree(undisturbed.run.root, each.run.root)
        each.wipe(verb)
    program = [
        shutil.which("mpirun", path=environment["PATH"]),
        "-n",
        str(ranks),
        sys.executable,
        "-m",
        "hpc_closure",
        verb,
    ]

    def start(each):
        words = [*program, each.path, *CHANGES, *changes]
        # A session of its own, because a killed mpirun signals its whole process group.
        with open(each.log, "a") as told:
            return subprocess.Popen(
                [str(word) for word in words],
                env=environment,
                stdout=told,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    began = time.monotonic()
    assert start(whole).wait(PATIENCE) == 0, whole.log.read_text()[-3000:]
    seconds = time.monotonic() - began
    for _ in range(3):
        process = start(bench)
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        family = ranks_of(process.pid, verb)
        victim = rng.choice([process.pid, *family])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, rng.choice([KILL, KILL, signal.SIGTERM]))
        process.wait(PATIENCE)
        for pid in family:  # orphans of a killed launcher end by themselves
            wait_for_end(pid, PATIENCE)
    assert start(bench).wait(PATIENCE) == 0, bench.log.read_text()[-3000:]
    if verb == "generate":
        assert products(bench.run, verb) == expected[verb]
    else:
        assert products(bench.run, verb) == products(whole.run, verb)


def ranks_of(launcher, verb):
    """Process ids of the ranks below a launcher."""
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            parents[int(entry.name)] = int(fields[1])
    found = []
    for pid in parents:
        line = pid
        while line in parents and line != launcher:
            line = parents[line]
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if (
                line == launcher
                and pid != launcher
                and b"hpc_closure" in words
                and b"mpi" not in words[0]
                and b"hydra" not in words[0]
            ):
                found.append(pid)
    return found


def wait_for_end(pid, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return
        if state in "ZX":
            return
        time.sleep(0.05)
    raise AssertionError(f"rank {pid} lives on after its launcher was killed")


def test_numbers_of_this_test():
    assert sum(KILLS.values()) >= 30 and np.unique(SIGNALS).size == 6
