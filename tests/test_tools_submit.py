"""``hpc-closure submit`` and slurm/pipeline, with a fake sbatch or none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_closure.batch.squeue import queued
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import STAGES, Run
from hpc_closure.tools import submit
from hpc_closure.work import atomic

pytest_plugins = ["fake_programs"]
PIPELINE = Path(__file__).resolve().parents[1] / "slurm" / "pipeline"


@pytest.fixture
def submit_command(hpc_closure_command, tmp_path):
    """Runs ``hpc-closure submit`` where there is no program but Python."""
    return lambda *words: hpc_closure_command("submit", *words, cwd=tmp_path, PATH="/nowhere")


MINE = """
base: quickstart
root: ./runs
rollout: {members: 60, initial_conditions: 1}
cluster: {profile: site.yaml, walltime: 2h, members_per_block: 20}
"""
SITE = """
account: abc
modules: [gcc]
mpi: pmix
stages:
  generate: {nodes: 2, ntasks_per_node: 8, walltime: 30m}
  train: {gpus_per_node: 4, ntasks_per_node: 4}
"""


def test_a_dry_run_needs_no_slurm_and_writes_nothing(tmp_path, submit_command):
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "site.yaml").write_text(SITE)
    before = sorted(tmp_path.rglob("*"))
    done = submit_command("mine.yaml", "train.steps=7", "--dry-run")
    assert done.returncode == 0, done.stderr
    costs = [line for line in done.stdout.splitlines() if line.startswith(STAGES)]
    assert costs == [
        "generate: 2 nodes x 0.5 h x 8 cores <= 8 core-hours",
        "train: 1 node x 2 h x 4 GPUs <= 8 GPU-hours",
        "rollout: 3 tasks x 2 h x 1 core <= 6 core-hours",
        "evaluate: 1 node x 2 h x 1 core <= 2 core-hours",
    ]
    texts = dict(zip(STAGES, done.stdout.split("#!/bin/bash\n")[1:], strict=True))
    for stage, text in texts.items():
        assert f"#SBATCH --job-name=quickstart-{stage}\n" in text
        assert "#SBATCH --account=abc\n" in text and "#SBATCH --signal=USR2@300\n" in text
        assert "\nmodule load gcc\n" in text
        assert ("--mpi=pmix" in text) == (stage in ("generate", "train"))
    after = [re.findall("dependency='?(.*?)'?\n", texts[stage]) for stage in STAGES]
    assert after == [[], *([f"afterok:<job of {stage}>"] for stage in STAGES[:3])]
    assert "--array=0-2%3\n" in texts["rollout"] and "--time=120\n" in texts["rollout"]
    assert "--time=30\n" in texts["generate"] and "--ntasks-per-node=8\n" in texts["generate"]
    assert sorted(tmp_path.rglob("*")) == before


def test_stages_are_chosen_and_what_is_wrong_is_said(tmp_path, submit_command):
    done = submit_command("quickstart", "--stages", "evaluate", "--dependency", "12", "--dry-run")
    assert re.findall(r"dependency=(\S+)", done.stdout) == ["afterok:12"]
    for words, message in (
        (["quickstart", "--stages", "fly"], "expected some of generate"),
        (["quickstat"], "did you mean quickstart"),
        (["quickstart", "cluster.profile=nowhere"], "profile nowhere"),
        (["quickstart", "root=/tmp/no_such"], "node's own disk"),
    ):
        done = submit_command(*words)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    done = submit_command("quickstart", "cluster.profile=testbed", "--stages", "train")
    assert done.returncode == 1 and "no Slurm here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_stages_of_another_run_are_left_out(submit_command):
    used = ("quickstart", "use.data=there", "use.model=diffusion", "--dry-run")
    done = submit_command(*used)
    costs = [line for line in done.stdout.splitlines() if line.startswith(STAGES)]
    assert [line.partition(":")[0] for line in costs] == ["rollout", "evaluate"], done.stderr
    done = submit_command(*used, "--stages", "generate,train")
    assert done.returncode == 2 and "leave nothing to do" in done.stderr


def test_slurm_pipeline_is_the_same_command(tmp_path, submit_command, programs):
    programs("python3", f'exec {sys.executable} "$@"')
    words = ("quickstart", "train.steps=7", "--stages", "train,rollout", "--dry-run")
    done = subprocess.run(
        [PIPELINE, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/bin:/bin"},
    )
    assert done.returncode == 0 and done.stdout == submit_command(*words).stdout
    assert "rollout: " in done.stdout and "evaluate: " not in done.stdout


@pytest.fixture
def queue(programs):
    """sbatch that numbers jobs from 101 and keeps their scripts, but those with a word."""

    def make(refuse="nothing"):
        programs("srun", "exit 1")
        programs(
            "sbatch",
            f"""
            if grep -q "{refuse}" "$1"; then echo "sbatch: error: no" >&2; exit 1; fi
            number=$(( $(cat $here/last 2>/dev/null || echo 100) + 1 ))
            echo $number > $here/last
            cp "$1" $here/script.$number
            echo "Submitted batch job $number" """,
        )

    return make


def test_each_stage_waits_for_all_jobs_of_the_one_before(tiny, tmp_path, queue, programs, capsys):
    queue()
    (tmp_path / "site.yaml").write_text("node_local: []\nmax_array: 3\n")
    experiment = reading.load(tiny, [f"cluster.profile={tmp_path}/site.yaml"])
    run = Run.of(experiment)
    submit.run(experiment, dependency="12", typed=("tiny.yaml",))
    said = capsys.readouterr().out
    assert said.endswith("follow it with: hpc-closure status tiny.yaml\n")
    jobs = re.findall(r"job (\d+): (\d) task\(s\), logs (\S+)", said)
    # 4 members from 2 cases each in blocks of 2 are 4 units, in arrays of 3
    assert [(job, tasks) for job, tasks, _ in jobs] == [
        ("101", "1"),
        ("102", "1"),
        ("103", "3"),
        ("104", "1"),
        ("105", "1"),
    ]
    scripts = [(tmp_path / f"script.{job}").read_text() for job, *_ in jobs]
    after = [re.findall("dependency=(.*)\n", text) for text in scripts]
    assert after == [
        ["afterok:12"],
        ["afterok:101"],
        ["afterok:102"],
        ["afterok:102"],
        ["afterok:103:104"],
    ]
    assert run.config.read_text() == reading.dump(experiment)  # what the tasks read
    programs("squeue", "".join(f"echo {job} PENDING\n" for job, *_ in jobs))
    counts = {stage: len(units) for stage, units in queued(run, STAGES).items()}
    assert counts == {"generate": 4, "train": 1, "rollout": 4, "evaluate": 1}


def test_a_refused_stage_names_the_one_that_waits(tiny, tmp_path, queue):
    queue(refuse="tiny-train")
    (tmp_path / "site.yaml").write_text("node_local: []\n")
    experiment = reading.load(tiny, [f"cluster.profile={tmp_path}/site.yaml"])
    with pytest.raises(RuntimeError, match="sbatch refused.*`scancel 101` takes the stage before"):
        submit.run(experiment)


def test_products_of_other_settings_are_not_mixed(tiny, tmp_path, queue):
    """The stored settings are what queued tasks read, so they are not replaced blindly."""
    queue()
    (tmp_path / "site.yaml").write_text("node_local: []\n")
    site = f"cluster.profile={tmp_path}/site.yaml"
    experiment = reading.load(tiny, [site])
    run = Run.of(experiment)
    submit.run(experiment, "generate")
    atomic.write_text(run.data / "block_000000-000001.h5", "")
    before = run.config.read_text()
    with pytest.raises(ValueError, match="made with other settings"):
        submit.run(reading.load(tiny, [site, "generate.dt=0.01"]), "train")
    assert run.config.read_text() == before and not (tmp_path / "script.102").exists()
