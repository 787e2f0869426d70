"""The world fails: full disks, read-only folders, foreign and cut files. Nothing is lost."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY

from hpc_closure.closure.artifact import Closure
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.tools import status
from hpc_closure.train import verb as train
from hpc_closure.work import atomic, claims, hdf5
from hpc_closure.work.loop import SINGLE
from hpc_closure.work.options import Options

QUIET = Options(verbosity=-1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with data and model."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(root=folder / "runs"))
    experiment = reading.load(path)
    assert generate.run(experiment, QUIET) == 0
    assert train.run(experiment, QUIET) == 0
    return Run(experiment.folder)


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of it, with its experiment file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=tmp_path / "runs"))
    shutil.copytree(trained.root, tmp_path / "runs/tiny")
    return path, Run(tmp_path / "runs/tiny")


def contents(folder):
    return {path.name: hdf5.sha256_datasets(path) for path in folder.glob("block_*.h5")}


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


@contextlib.contextmanager
def mounted(folder, size):
    """A small file system of its own."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# the disk


def limited(words, size, environment):
    """Run a command whose files may not grow beyond ``size`` bytes."""
    code = (
        f"import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
        f"sys.argv = ['hpc-closure', *{[str(word) for word in words]!r}]; "
        "from hpc_closure.__main__ import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize(
    "verb, size", [("generate", 30_000), ("train", 1_000_000), ("rollout", 8_000)]
)
def test_files_may_not_grow(copy, environment, hpc_closure_command, verb, size):
    path, run = copy
    expected = contents(run.data)
    shutil.rmtree(run.folder(verb), ignore_errors=True)
    shutil.rmtree(run.units(verb), ignore_errors=True)
    done = limited([verb, path], size, environment)
    assert done.returncode == 1, done.stderr
    assert "file-size limit" in last_line(done) and "Traceback" not in done.stderr, done.stderr
    assert not list(run.folder(verb).glob("block_*.h5")) and not run.claim(verb, SINGLE).exists()
    done = hpc_closure_command(verb, path)
    assert done.returncode == 0, done.stderr
    assert contents(run.data) == expected


@pytest.mark.parametrize("size", ["64k", "150k"])
def test_full_disk(tmp_path, hpc_closure_command, size):
    path = tmp_path / "tiny.yaml"
    with mounted(tmp_path / "small", size) as disk:
        path.write_text(TINY.format(root=disk))
        done = hpc_closure_command("generate", path)
        assert done.returncode == 1, done.stderr
        assert "no space left on the device; free some" in last_line(done), done.stderr
        assert "Traceback" not in done.stderr
        whole = contents(disk / "tiny/data")
        done = hpc_closure_command("status", path)
        assert done.returncode == 0 and "failed" in done.stdout
        subprocess.run(["mount", "-o", "remount,size=4M", disk], check=True)
        done = hpc_closure_command("generate", path)
        assert done.returncode == 0, done.stderr
        found = contents(disk / "tiny/data")
        assert len(found) == 4 and whole.items() <= found.items()


def test_read_only_file_system(tmp_path, hpc_closure_command, copy):
    path, run = copy
    with mounted(tmp_path / "readonly", "8M") as disk:
        shutil.copytree(run.root, disk / "tiny")
        path.write_text(TINY.format(root=disk))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for verb in ("generate", "rollout"):
            done = hpc_closure_command(verb, path, "generate.members=10")
            assert done.returncode == 1, done.stderr
            assert "read-only; change `root`" in last_line(done), done.stderr
            assert done.stderr.count("\n") == 1
        for words in (
            ["status", path],
            ["inspect", disk / "tiny"],
            ["generate", path, "--dry-run"],
        ):
            done = hpc_closure_command(*words)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_folder_not_writable(tmp_path, environment, mode):
    path, locked = tmp_path / "tiny.yaml", tmp_path / "locked"
    path.write_text(TINY.format(root=locked))
    locked.mkdir()
    locked.chmod(mode)
    program = [sys.executable, "-m", "hpc_closure", "generate", path]
    if os.geteuid() == 0:  # root may write everywhere, unless it gives the right away
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere")
        program[:0] = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    locked.chmod(0o755)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"{locked}" in done.stderr and "permission denied; change `root`" in done.stderr


# cut and foreign files


@pytest.mark.parametrize("content", [b"", b"junk" * 99, "half"])
def test_a_damaged_product_is_set_aside_and_made_again(copy, hpc_closure_command, content):
    path, run = copy
    expected = contents(run.data)
    product = run.product("generate", "000002-000003")
    cut = product.read_bytes()[:5000] if content == "half" else content
    product.write_bytes(cut)
    done = hpc_closure_command("generate", path)
    assert done.returncode == 0, done.stderr
    assert f"not used: {product}" in done.stderr and "kept as" in done.stderr
    assert contents(run.data) == expected
    assert product.with_name(product.name + ".damaged").read_bytes() == cut


@pytest.mark.parametrize("content", [b"", b"junk" * 99, "half"])
def test_a_damaged_model_is_set_aside_and_made_again(copy, hpc_closure_command, content):
    path, run = copy
    whole = run.model.read_bytes()
    run.model.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    done = hpc_closure_command("rollout", path)
    assert done.returncode == 1 and str(run.model) in last_line(done)
    done = hpc_closure_command("train", path)
    assert done.returncode == 0, done.stderr
    assert run.model.name in done.stderr and "kept as" in done.stderr
    assert hpc_closure_command("rollout", path).returncode == 0


def test_files_of_others_in_the_folders_do_no_harm(copy, hpc_closure_command):
    path, run = copy
    for folder in (run.data, run.train, run.checkpoints, run.units("generate"), run.root):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (
            ".nfs0001",
            "notes.txt",
            "other.h5",
            "block_1.h5",
            "step_x",
            "x.part",
            "block_000000-000001.h5.other-7.part",
            "Thumbs.db",
        ):
            (folder / name).write_text("not ours")
    run.model.unlink()
    for verb in ("generate", "train", "rollout", "status"):
        done = hpc_closure_command(verb, path)
        assert done.returncode == 0, done.stderr
    assert (run.data / "notes.txt").exists()


def test_lost_books_are_written_again(copy, hpc_closure_command):
    path, run = copy
    expected = contents(run.data)
    shutil.rmtree(run.units_dir, ignore_errors=True)
    shutil.rmtree(run.logs)
    run.config.unlink()
    done = hpc_closure_command("generate", path, "generate.members=10")
    assert done.returncode == 0, done.stderr
    assert "1 unit(s) done now, 4 before" in done.stderr
    assert expected.items() <= contents(run.data).items()


# kills at the worst moments, and growth

KILLER = """
import importlib, os, signal, sys
from hpc_closure.__main__ import main
module, owner, function, count = sys.argv[1:5]
place = importlib.import_module(module)
place = getattr(place, owner) if owner else place
original, calls = getattr(place, function), []

def patched(*words, **options):
    if str(words).count({needle!r}) or not {needle!r}:
        calls.append(1)
        if len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
    return original(*words, **options)

setattr(place, function, patched)
sys.argv = ["hpc-closure", *sys.argv[5:]]
main()
"""


def killed_at(environment, where, count, words, needle=""):
    """Run a verb that kills itself (-9) at a call of ``module:owner.function``."""
    module, _, name = where.partition(":")
    owner, _, function = name.rpartition(".")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLER.format(needle=needle),
            module,
            owner,
            function,
            str(count),
            *map(str, words),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize(
    "where, needle",
    [
        ("hpc_closure.work.atomic:_replace", "block_"),  # validated, not yet renamed
        ("hpc_closure.data.writer:BlockWriter.check", ""),  # complete, not yet validated
        ("hpc_closure.work.units:Ledger.finish", ""),
    ],
)  # published, not yet booked
def test_a_kill_while_publishing_loses_at_most_one_interval(
    copy, environment, where, needle, hpc_closure_command
):
    path, run = copy
    expected = contents(run.data)
    shutil.rmtree(run.data)
    words = ["generate", path, "cluster.checkpoint_every=1e-9"]
    killed_at(environment, where, 2, words, needle)
    done = hpc_closure_command(*words)
    assert done.returncode == 0, done.stderr
    number = 3 if "finish" not in where else 2
    assert f"{number} unit(s) done now, {4 - number} before" in done.stderr
    if number == 3:
        assert "000002-000003: continue from step 80" in done.stderr  # of 80
    assert contents(run.data) == expected and not list(run.data.glob("*.part"))
    assert not list(run.units("generate").glob("*.restart"))


@pytest.fixture(scope="module")
def rolled(trained, tmp_path_factory, hpc_closure_command):
    """The run folder with the whole rollout, and what it holds."""
    folder = tmp_path_factory.mktemp("rolled")
    (folder / "tiny.yaml").write_text(TINY.format(root=folder / "runs"))
    shutil.copytree(trained.root, folder / "runs/tiny")
    done = hpc_closure_command("rollout", folder / "tiny.yaml")
    assert done.returncode == 0, done.stderr
    run = Run(folder / "runs/tiny")
    return run, contents(run.rollout)


SHORT = ["rollout.t_end=0.3", "evaluate.lead_times=[0.1]"]


@pytest.mark.parametrize(
    "before, told",
    [
        (SHORT, "continue from step 60"),  # a longer horizon
        (["rollout.members=2"], "2 unit(s) done now, 2 before"),
    ],
)
def test_growth_of_the_coupled_ensemble(copy, rolled, hpc_closure_command, before, told):
    path, run = copy
    assert hpc_closure_command("rollout", path, *before).returncode == 0
    done = hpc_closure_command("rollout", path)
    assert done.returncode == 0 and told in done.stderr, done.stderr
    assert contents(run.rollout) == rolled[1]
    less = hpc_closure_command("rollout", path, *before)
    assert "0 unit(s) done now" in less.stderr and contents(run.rollout) == rolled[1]


@pytest.mark.parametrize(
    "before, after",
    [("[none]", "[none, oracle]"), ("[oracle]", "[none]"), ("[none, oracle]", "[oracle]")],
)
def test_an_unfinished_unit_with_other_outputs_begins_anew(
    copy, environment, before, after, hpc_closure_command
):
    path, run = copy
    words = ["rollout", path, "cluster.checkpoint_every=1e-9"]
    killed_at(
        environment,
        "hpc_closure.data.writer:BlockWriter.write",
        2,
        [*words, f"rollout.baselines={before}"],
    )
    assert list(run.restart("rollout", "000000-000001").glob("step_*.h5"))
    done = hpc_closure_command(*words, f"rollout.baselines={after}")
    assert done.returncode == 0 and "go on" not in done.stderr, done.stderr
    found = contents(run.rollout)
    shutil.rmtree(run.rollout)
    assert hpc_closure_command(*words, f"rollout.baselines={after}").returncode == 0
    assert contents(run.rollout) == found


@pytest.mark.parametrize(
    "change, key",
    [
        ("rollout.every=0.05", "rollout.every: 0.1 -> 0.05"),
        ("rollout.sensors.number=8", "rollout.sensors: None"),
        ("rollout.baselines=[none]", "rollout.baselines: ['none', 'oracle'] -> ['none']"),
    ],
)
def test_another_coupled_run_in_the_same_folder_is_refused(
    rolled, tmp_path, change, key, hpc_closure_command
):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=rolled[0].root.parent))
    done = hpc_closure_command("rollout", path, change)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"was made with other settings ({key}" in done.stderr
    assert "change `name`, or run `rollout --overwrite`" in done.stderr
    assert contents(rolled[0].rollout) == rolled[1]


@pytest.mark.parametrize("lost", [1, 4])
def test_a_member_that_diverges_is_counted_and_the_others_go_on(copy, monkeypatch, capsys, lost):
    """Of every start, from the second call on: in the file, in `status`, in scores and report."""
    path, run = copy
    experiment = reading.load(path, ["cluster.members_per_block=4"])
    sample = Closure.sample_hat

    def broken(self, request, **options):
        drawn = sample(self, request, **options)
        rows = [i for i, key in enumerate(request.members) if key % 2**16 < lost]
        return (
            drawn
            if request.call == 0
            else drawn.index_fill(0, torch.tensor(rows, dtype=torch.long), math.nan)
        )

    monkeypatch.setattr(Closure, "sample_hat", broken)
    told = rollout.run(experiment, QUIET)
    ensemble = CoupledEnsemble(sorted(run.rollout.glob("block_*.h5")))
    gone = [np.isnan(ensemble.read("model", index)).all((2, 3)) for index in range(3)]
    assert [one.sum() for one in gone] == [0, 2 * lost, 2 * lost]
    assert f"vorticity of {2 * lost} member(s)" in status.survey(experiment)["rollout"].note
    assert told == 0
    assert evaluate.run(experiment, QUIET) == 0
    scores = pd.read_csv(run.scores_csv)
    row = scores[(scores.score == "diverged") & (scores.method == "model")].iloc[-1]
    assert row.value == lost / 4
    crps = scores[(scores.stage == "coupled") & (scores.method == "model")]
    assert np.isinf(crps[crps.score == "crps"].value.iloc[-1])
    assert f"{lost / 4:.3g} of the members diverged by lead time 0.2" in run.report.read_text()


def test_scores_are_made_again_when_something_changed(rolled, tmp_path, hpc_closure_command):
    shutil.copytree(rolled[0].root, tmp_path / "runs/tiny")
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=tmp_path / "runs"))

    def evaluate(*changes):
        done = hpc_closure_command("evaluate", path, *changes)
        assert done.returncode == 0, done.stderr
        return "exists already; --overwrite writes it again" not in done.stderr

    other = ["evaluate.lead_times=[0.2]", "evaluate.sensors=[{number: 8}]"]
    assert [evaluate(), evaluate(), evaluate(*other), evaluate(*other)] == [1, 0, 1, 0]
    text = Run(tmp_path / "runs/tiny").scores_csv.read_text()
    assert "8x8" in text
    grown = [*other, "rollout.members=5"]
    assert hpc_closure_command("rollout", path, *grown).returncode == 0
    assert evaluate(*grown)


def test_a_training_of_other_data_is_never_gone_on_with(copy, hpc_closure_command):
    """Not even when another verb has noted the new settings in between."""
    path, run = copy
    other = ["physics.viscosity=2e-3"]
    run.model.unlink()
    assert hpc_closure_command("generate", path, *other, "--overwrite", "--yes").returncode == 0
    done = hpc_closure_command("train", path, *other)
    assert done.returncode == 1 and not run.model.exists()
    assert "was made with other settings (recipe: " in last_line(done), done.stderr
    assert "change `name`, or run `train --overwrite`" in last_line(done)
    assert hpc_closure_command("train", path, *other, "--overwrite", "--yes").returncode == 0


def test_overwrite_asks_and_without_an_answer_deletes_nothing(copy, environment):
    path, run = copy
    expected = contents(run.data)
    program = [sys.executable, "-m", "hpc_closure", "generate", path, "--overwrite"]
    done = subprocess.run(
        program, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"{run.data}: not deleted; --yes deletes it without a question" in done.stderr
    done = subprocess.run(program, env=environment, capture_output=True, text=True, input="n\n")
    assert done.returncode == 1 and contents(run.data) == expected


def test_overwrite_does_not_delete_what_is_being_computed(copy, hpc_closure_command):
    path, run = copy
    expected = contents(run.data)
    claim = run.claim("generate", "000002-000003")
    atomic.write_json(claim, {**claims.owner(), "host": "node7", "machine": "x", "mark": "y"})
    done = hpc_closure_command("generate", path, "--overwrite", "--yes")
    assert done.returncode == 1 and "end it before --overwrite" in last_line(done), done.stderr
    assert "000002-000003 is being computed" in done.stderr and "node7" in done.stderr
    assert contents(run.data) == expected


def test_a_run_that_was_moved(copy, hpc_closure_command):
    path, run = copy  # it was made elsewhere
    for verb, words in (
        ("generate", "0 unit(s) done now, 4 before"),
        ("train", "model.safetensors is there already; nothing to do"),
    ):
        done = hpc_closure_command(verb, path)
        assert done.returncode == 0 and words in done.stderr, done.stderr
    assert "done" in hpc_closure_command("status", path).stdout


def test_a_killed_task_on_this_machine(copy, rolled, hpc_closure_command):
    """submitit's local executor: its task is killed, the same command submits what is missing."""
    path, run = copy
    words = [
        "rollout",
        path,
        "--executor",
        "local",
        "cluster.checkpoint_every=0.01",
        "cluster.max_running_tasks=1",
    ]

    def claimed():
        found = [claims.read(entry) for entry in run.units("rollout").glob("*.claim")]
        return [record["pid"] for record in found if record and "pid" in record]

    def finished():
        return len(list(run.rollout.glob("block_*.h5"))) == 4

    for _ in range(10):  # the whole task takes half a second: it may be over before it is seen
        shutil.rmtree(run.rollout, ignore_errors=True)
        assert hpc_closure_command(*words).returncode == 0
        wait_until(lambda: claimed() or finished())
        for pid in claimed():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not finished():
            break
    status = hpc_closure_command("status", path, "--json")
    assert json.loads(status.stdout)["stages"]["rollout"]["done"] < 4
    done = hpc_closure_command(*words)
    assert done.returncode == 0 and "job" in done.stdout, done.stderr
    wait_until(lambda: finished() and not claimed())
    assert contents(run.rollout) == rolled[1]


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# others at work


def test_another_host_at_work_is_waited_for_and_taken_over_when_silent(copy, hpc_closure_command):
    path, run = copy
    expected = contents(run.data)
    run.product("generate", "000002-000003").unlink()
    claim = run.claim("generate", "000002-000003")
    atomic.write_json(claim, {**claims.owner(), "host": "x", "machine": "x", "mark": "y"})
    os.utime(claim, 2 * (time.time() + 4,))  # so it is silent from 9 s from now on
    done = hpc_closure_command("generate", path, "cluster.claim_timeout=5")
    assert done.returncode == 0 and "waiting for 1 unit(s)" in done.stderr, done.stderr
    assert contents(run.data) == expected and not claim.exists()


def test_train_is_held_by_one(copy, hpc_closure_command):
    path, run = copy
    run.model.unlink()
    claim = run.claim("train", SINGLE)
    atomic.write_json(
        claim, {**claims.owner(), "host": "node7", "machine": "x", "mark": "y", "since": "today"}
    )
    done = hpc_closure_command("train", path)
    assert done.returncode == 1
    assert "train is being run by process" in last_line(done) and "node7" in last_line(done)
    status = hpc_closure_command("status", path)
    assert "wait: train is running" in status.stdout
    os.utime(claim, (1e9, 1e9))
    assert hpc_closure_command("train", path).returncode == 0


# the manual


def test_every_row_of_the_manual_has_its_test():
    manual = (Path(__file__).parent.parent / "docs/restart.md").read_text()
    rows = [line.split("|")[1:-1] for line in manual.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    for row in rows:
        for name in row[-1].replace("`", "").split(","):
            module, _, function = name.strip().partition("::")
            source = (Path(__file__).parent / f"{module}.py").read_text()
            assert f"def {function}(" in source, name
