"""What `rollout --dry-run` and `status` say about a cluster, on a machine without a Slurm."""

import json
import os
import shutil
import stat

import pytest
from status_case import best_survey, publish_copies

from hpc_closure.batch import squeue, submit
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.rollout import verb as rollout
from hpc_closure.tools import status
from hpc_closure.work.units import Ledger


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """PATH with nothing but fake programs: ``programs("squeue", text)``; calls are counted."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name, text=""):
        path = folder / name
        path.write_text(f"#!{BASH}\necho {name} >> {tmp_path}/asked\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    make.asked = lambda: (tmp_path / "asked").read_text().split()
    return make


BASH = shutil.which("bash")
SLURM = ("squeue", "sacct", "scontrol", "sinfo", "sbatch", "srun", "scancel")


def test_dry_run_on_a_laptop(tiny, tmp_path, programs, hpc_closure_command):
    """Units, GPU-hours, bytes and the exact batch text; nothing is written, nobody is asked."""
    for name in SLURM:
        programs(name)
    (tmp_path / "site.yaml").write_text(
        "account: abc\nmax_array: 2\nmodules: [gcc]\n" "stages: {rollout: {gpus_per_node: 2}}\n"
    )
    changes = [
        f"cluster.profile={tmp_path}/site.yaml",
        "rollout.members=10",
        "cluster.walltime=90m",
        "cluster.units_per_task=4",
        "cluster.executor=slurm",
    ]
    before = sorted(tmp_path.rglob("*"))
    done = hpc_closure_command("rollout", tiny, *changes, "--dry-run", PATH=os.environ["PATH"])
    assert done.returncode == 0, done.stderr
    experiment = reading.load(tiny, changes)
    run = Run.of(experiment)
    names = [unit.name for unit in Ledger.of(experiment, "rollout").plan(20, 2)]
    request = submit.Request.of(experiment, run, names, rollout.run_units)
    texts = submit.batch_text(request)
    assert len(texts) == 2 and "#SBATCH --gpus-per-node=2" in texts[0]
    for text in texts:
        assert text in done.stdout
    assert "units: 10 units, 0 done, 0 running, 0 queued, 0 failed, 10 missing" in done.stdout
    assert "cost: 3 tasks x 1.5 h x 2 GPUs <= 9 GPU-hours" in done.stdout
    # model and oracle, 20 trajectories, 3 stored times, 16 x 16 numbers of 4 bytes
    assert f"{2 * 20 * 3 * 16 * 16 * 4 / 1e9:.3g} GB" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_status_asks_squeue_once(tiny, programs, capsys):
    experiment = reading.load(tiny)
    run = Run.of(experiment)
    blocks = {
        "generate": Ledger.of(experiment, "generate").plan(8, 2),
        "rollout": Ledger.of(experiment, "rollout").plan(8, 2),
    }
    squeue.record(run, "generate", "7", [[unit.name for unit in blocks["generate"]]], "x.log")
    squeue.record(run, "train", "8", [["000000-000000"]], "x.log")
    squeue.record(run, "rollout", "9", [[unit.name] for unit in blocks["rollout"]], "x.log")
    for name in SLURM:
        programs(name)
    programs("squeue", "echo 7 RUNNING; echo 8 PENDING Dependency; echo '9_[1-2] PENDING'")
    assert status.run(experiment, json=True) == 0
    assert programs.asked() == ["squeue"]
    counts = json.loads(capsys.readouterr().out)["stages"]
    queued = {stage: count["queued"] for stage, count in counts.items()}
    assert queued == {"generate": 4, "train": 1, "rollout": 2, "evaluate": 0}
    assert counts["rollout"]["missing"] == 2 and counts["evaluate"]["missing"] == 1


def test_status_of_a_hundred_thousand_members(tiny, programs, monkeypatch):
    """5,000 units in five arrays: half of them done, the others in the queue, within 2 s."""
    experiment = reading.load(tiny, ["rollout.members=50000", "cluster.members_per_block=20"])
    books = Ledger.of(experiment, "rollout")
    run, plan = books.run, books.plan(100_000, 20)
    assert len(plan) == 5000
    arrays = submit.plan_arrays([unit.name for unit in plan], 1, 1000)
    for number, tasks in enumerate(arrays):
        squeue.record(run, "rollout", str(number), tasks, "x.log")
    publish_copies(books, plan[:2500])
    programs(
        "squeue",
        "echo '2_[500-999] PENDING'; echo '3_[0-999%10] PENDING'\n"
        + "".join(f"echo 4_{task} RUNNING\n" for task in range(999)),
    )
    found, seconds = best_survey(experiment)
    counts = found["rollout"].counts
    assert (counts["units"], counts["done"], counts["queued"], counts["missing"]) == (
        5000,
        2500,
        2499,
        1,
    )
    assert programs.asked() == ["squeue"] * 3
    assert seconds < 2.0  # processor time, so that a loaded machine does not matter
