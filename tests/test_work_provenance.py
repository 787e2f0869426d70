import json
import subprocess

from hpc_closure.experiment.folder import Run
from hpc_closure.work import atomic, provenance


def test_record_has_what_one_asks_for(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "11")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    record = provenance.collect(ranks=4, device="cuda", verb="train", hashes={"train": "ab"})
    for key in (
        "version",
        "git",
        "versions",
        "host",
        "pid",
        "job",
        "restarts",
        "ranks",
        "device",
        "threads",
        "command",
        "time",
        "verb",
        "hashes",
    ):
        assert key in record
    assert record["job"] == "11_3" and record["restarts"] == 2 and record["ranks"] == 4
    assert {"python", "numpy", "torch", "h5py"} <= set(record["versions"])
    json.dumps(record)


def test_job_is_empty_outside_of_one(monkeypatch):
    for key in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID"):
        monkeypatch.delenv(key, raising=False)
    assert provenance.job() == {}


def test_git_of_a_checkout(tmp_path):
    assert provenance.git(str(tmp_path)) is None

    def git(*arguments):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *arguments],
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("commit", "-m", "first")
    provenance.git.cache_clear()
    clean = provenance.git(str(tmp_path))
    assert len(clean["revision"]) == 40 and clean["dirty"] is False
    (tmp_path / "x").write_text("2")
    provenance.git.cache_clear()
    assert provenance.git(str(tmp_path))["dirty"] is True
    assert provenance.git(str(tmp_path), quick=True) == {"revision": clean["revision"]}


def test_append(tmp_path):
    run = Run(tmp_path / "run")
    for verb in ("generate", "train"):
        provenance.append(run, provenance.collect(verb=verb))
    assert [record["verb"] for record in atomic.read_jsonl(run.provenance)] == [
        "generate",
        "train",
    ]
