"""slurm/pipeline and jobs submitted by hand, on the one-machine Slurm."""

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_data_outside_ranks as outside
from slurm_payload import Ensemble, with_tests

from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.tools import status
from hpc_closure.work import hdf5
from hpc_closure.work.units import Ledger

pytest_plugins = ["slurm_testbed"]
pytestmark = pytest.mark.slurm
SLURM = Path(__file__).resolve().parents[1] / "slurm"
PYTHON = sys.executable

STEPS = """
import pathlib, sys, time
from hpc_closure.work.stop import Stop
saved = pathlib.Path(sys.argv[1])
start = int(saved.read_text()) if saved.exists() else 0
print("from", start, flush=True)
Stop.process_ends = True
with Stop() as stop:
    for step in range(start, start + 20 if start else int(sys.argv[3])):
        time.sleep(0.05)
        if stop.requested:
            saved.write_text(str(step))
            print("stopped by", stop.reason, flush=True)
            sys.exit(75)
sys.exit(int(sys.argv[2]))
"""


def submit_loop(folder, *options, code=0, steps=1200, **environment):
    (folder / "steps.py").write_text(STEPS)
    number = len(list(folder.glob("*.sh")))
    script, log = folder / f"{number}.sh", folder / f"{number}.log"
    script.write_text(f"""#!/bin/bash
#SBATCH --requeue --open-mode=append -n1
exec {PYTHON} -m hpc_closure.batch.requeue \\
  srun {PYTHON} {folder}/steps.py {folder}/saved.{number} {code} {steps}
""")
    options = options or ("--signal=B:USR2@60", "-t", "10")
    done = subprocess.run(
        ["sbatch", "--parsable", "-o", log, *options, script],
        check=True,
        text=True,
        capture_output=True,
        env={**os.environ, **environment},
    )
    return done.stdout.strip(), log


@pytest.fixture
def loop(testbed, tmp_path):
    """Submits a loop that saves and stops when told: ``loop(code) -> (job, log)``.

    It takes 60 s or ``steps`` of 50 ms, and 1 s more after it was stopped.
    """
    return lambda *options, **settings: submit_loop(tmp_path, *options, **settings)


def started(log):
    return log.exists() and "from" in log.read_text()


def test_how_batch_jobs_end(testbed, loop):
    """Five jobs at once: warned, cancelled, capped, failed, finished."""
    jobs = {
        "warned": loop(),
        "cancelled": loop(),
        "capped": loop(HPC_CLOSURE_MAX_REQUEUES="0"),
        "failed": loop(code=3, steps=20),
        "finished": loop(steps=20),
    }
    for name in ("warned", "cancelled", "capped"):
        testbed.wait(lambda: started(jobs[name][1]), what=name)  # noqa: B023
        time.sleep(1.0)  # some steps
        job = jobs[name][0]
        testbed.call("scancel", *(["-b", "--signal=USR2"] if name != "cancelled" else []), job)
    testbed.drain()
    shown = {name: testbed.show(job) for name, (job, _) in jobs.items()}
    text = {name: log.read_text() for name, (_, log) in jobs.items()}
    states = {
        name: (one["JobState"], one["ExitCode"], one["Restarts"]) for name, one in shown.items()
    }
    assert states == {
        "warned": ("COMPLETED", "0:0", "1"),
        "cancelled": ("CANCELLED", "75:0", "0"),
        "capped": ("FAILED", "75:0", "0"),
        "failed": ("FAILED", "3:0", "0"),
        "finished": ("COMPLETED", "0:0", "0"),
    }, text
    assert "requeue 1 of at most 20" in text["warned"]
    step = re.search(r"stopped by SIGUSR2[\s\S]*from (\d+)", text["warned"])
    assert step and int(step[1]) > 0
    assert "not requeued: cancelled" in text["cancelled"]
    assert "not requeued: started 1 times already" in text["capped"]


def test_preempted_once_started_twice(testbed, loop):
    job, log = loop()
    testbed.wait(lambda: started(log))
    testbed.sbatch("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    testbed.drain()
    shown = testbed.show(job)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert "Slurm does it itself" in log.read_text()


EXPERIMENT = """
base: diffusion_64
name: NAME
root: ROOT
generate: {grid: 32, members: 8, t_end: 0.1, record: {start: 0.05, every: 0.01}}
train: {grid: 32, window: null, split: [0.5, 0.25, 0.25], steps: 150, batch: 4,
        validate_every: 20, checkpoint_every: 20}
rollout: {members: 4, t_start: 0.05, t_end: 0.1, every: 0.01, interval: 5, sensors: null}
evaluate: {lead_times: [0.05], grids: [32], samples: 4, members: 4, sensors: [{number: 16}],
           formats: []}
cluster: {members_per_block: 2, profile: testbed, walltime: 10m, signal_before_end: 1m, threads: 1}
"""


def hpc_closure(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "hpc_closure", *map(str, arguments)],
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def slurm(*command):
    """Run a command that finds our Python as python3; what it printed."""
    path = f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*map(str, command)], text=True, capture_output=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """An experiment whose four stages slurm/pipeline ran on two nodes, and its inline twin.

    A third one has its data made by slurm/example.sbatch.

    The training is warned while it runs, goes back to the queue, and goes on with one process
    instead of two. Meanwhile a task of submitit's runs into its time limit.
    """
    folder = tmp_path_factory.mktemp("pipeline")
    paths = {name: folder / f"{name}.yaml" for name in ("queue", "inline", "hand")}
    for name, path in paths.items():
        path.write_text(EXPERIMENT.replace("NAME", name).replace("ROOT", str(folder)))
    cluster.up()
    cluster.clear()
    said = slurm(SLURM / "pipeline", paths["queue"])
    example = ("sbatch", "-N2", "--ntasks-per-node=1", "-o", folder / "hand.log")
    slurm(*example, SLURM / "example.sbatch", "generate", paths["hand"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", with_tests())
        # Slurm looks every 30 s and warns up to 30 s early: 25 to 55 s after the start
        limited = Ensemble(folder / "limited", members=1, seconds=50.0, steps=500)
        [sent] = limited.submit(walltime=60.0, signal_before_end=5.0)
    unwarned = submit_loop(folder, "-t", "1", steps=6000)  # its warning is lost: it has none
    early = status.survey(reading.load(paths["queue"]))
    jobs = re.findall(r"job (\d+): \d task\(s\), logs (\S+)", said)
    assert len(jobs) == 4 and len(cluster.jobs()) >= 4
    (train, train_log), run = jobs[1], Run(folder / "queue")
    cluster.wait(
        lambda: run.metrics.exists() and len(run.metrics.read_text().splitlines()) > 1,
        600,
        "a training step",
    )
    cluster.call("scancel", "--signal=USR2", train)
    cluster.wait(lambda: cluster.jobs().get(train) == "PENDING", what="the training in the queue")
    cluster.call("scontrol", "update", f"JobId={train}", "NumNodes=1", "NumTasks=1")
    for verb in ("generate", "train"):  # meanwhile, and without the queue
        hpc_closure(verb, paths["inline"])
    cluster.drain()
    logs = "\n".join(Path(log.replace("%a", "0")).read_text()[-1500:] for _, log in jobs)
    assert run.report.exists(), logs
    text = Path(train_log).read_text()
    requeued = text.partition("requeue 1 of at most 20")[2]
    resumed = re.search(r"continuing from restart point step_(\d+)", requeued)
    assert resumed and int(resumed[1]) < 60, text
    runs = {name: Run(folder / name) for name in paths}
    return paths, runs, early, (limited, sent, unwarned)


def test_status_knows_the_jobs_of_the_pipeline(finished):
    paths, _, early, _ = finished
    for stage, number in (("generate", 4), ("train", 1), ("rollout", 2), ("evaluate", 1)):
        counts = early[stage].counts
        assert (counts["units"], counts["missing"]) == (number, 0), (stage, counts)
    assert early["rollout"].counts["queued"] == 2
    late = status.survey(reading.load(paths["queue"]))
    assert all(stage.done for stage in late.values())


def test_a_real_time_limit(finished, cluster):
    """A task that needs longer than its walltime of one minute, beside the pipeline."""
    work, sent, (job, log) = finished[-1]
    text = work.log(sent)
    assert work.done() and "requeue 1 of at most 20" in text
    steps = [int(step) for step in re.findall(r"from step (\d+)", text)]
    assert len(steps) >= 2 and steps[0] == 0 and steps == sorted(set(steps))
    text = log.read_text()
    assert "stopped by SIGTERM" in text and "requeue 1 of at most 20" in text, text
    shown = cluster.show(job)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), text


def test_four_ranks_on_two_nodes_make_the_data_of_one(finished):
    paths, runs, *_ = finished
    assert "0/4" in runs["queue"].log("generate").read_text()
    for unit in Ledger.of(reading.load(paths["inline"]), "generate").plan(8, 2):
        hashes = {hdf5.sha256_datasets(run.product("generate", unit)) for run in runs.values()}
        assert len(hashes) == 1, f"block {unit} differs"


def test_two_nodes_and_then_one_train_like_one_process(finished):
    _, runs, *_ = finished
    losses = {}
    for name in ("queue", "inline"):
        with open(runs[name].metrics) as rows:
            losses[name] = {
                row["step"]: float(row["loss"])
                for row in csv.DictReader(rows)
                if row["loss"] and int(row["step"]) <= 60
            }
    assert len(losses["inline"]) >= 2
    assert losses["queue"] == pytest.approx(losses["inline"], rel=1e-6)


def test_rollouts_by_submitit_and_by_hand_are_those_of_the_pipeline(finished, testbed):
    """rollout --executor slurm: dry run, submission, the same command again, products."""
    paths, runs, *_ = finished
    path, run = paths["queue"], runs["queue"]
    books = Ledger.of(reading.load(path), "rollout")
    done = books.survey(4, 2).states["done"]
    assert [unit.name for unit in done] == ["000000-000001", "000002-000003"]
    hashes = {unit.name: hdf5.sha256_datasets(run.product("rollout", unit)) for unit in done}
    run.rollout.rename(run.root / "rollout.pipeline")

    words = ("rollout", path, "--executor", "slurm")
    plan = hpc_closure(*words, "--dry-run")
    assert "#SBATCH --array=0-1%2" in plan and "cost: 2 tasks x" in plan
    said = hpc_closure(*words)
    assert re.search(r"job \d+: 2 task\(s\), logs \S+", said) and "hpc-closure status" in said
    assert "job" not in hpc_closure(*words)  # nothing is missing: it is queued or runs
    shutil.copytree(run.folder("train"), runs["hand"].folder("train"))
    example = ("sbatch", "--ntasks-per-node=1", "--array=1-2", "-o", run.root / "hand.%a.log")
    inline = ("--executor", "inline")
    slurm(*example, SLURM / "example.sbatch", "rollout", paths["hand"], *inline)
    testbed.drain()
    logs = "\n".join(one.read_text()[-1500:] for one in run.root.rglob("*_log.out"))
    assert books.survey(4, 2).counts()["done"] == 2, logs
    for name, digest in hashes.items():
        assert hdf5.sha256_datasets(run.product("rollout", name)) == digest
        assert hdf5.sha256_datasets(runs["hand"].product("rollout", name)) == digest
        task = int(name == "000002-000003") + 1
        log = (run.root / f"hand.{task}.log").read_text()
        assert f"rollout {name}: start" in log


def test_files_of_others_go_through_the_pipeline(testbed, tmp_path):
    """Closures computed by two ranks, training, a rollout by an array, and the report."""
    inline = outside.experiment(tmp_path, "inline")
    queue = outside.experiment(tmp_path, "queue")
    jobs = (
        "cluster={device: cpu, threads: 1, members_per_block: 2, profile: testbed, walltime: 10m}"
    )
    hpc_closure("submit", tmp_path / "queue.yaml", jobs)
    hpc_closure("generate", tmp_path / "inline.yaml")
    testbed.drain()
    by_queue, by_hand = Run.of(queue), Run.of(inline)
    logs = "\n".join(one.read_text()[-1500:] for one in by_queue.root.rglob("*_log.out"))
    assert by_queue.report.exists(), logs
    assert outside.products(queue) == outside.products(inline)
    shutil.copytree(by_queue.folder("train"), by_hand.folder("train"))
    hpc_closure("rollout", tmp_path / "inline.yaml")
    for path in by_hand.rollout.iterdir():
        assert hdf5.sha256_datasets(by_queue.rollout / path.name) == hdf5.sha256_datasets(path)
