"""Trainings as users run them: whole, killed, stopped, on other process counts."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_case import StandIn, needs_deepspeed, run_fit, training_data

from hpc_closure.experiment import renames
from hpc_closure.train import checkpoint, deepspeed, engine, metrics, processes
from hpc_closure.train.processes import Processes
from hpc_closure.train.validate import mean_loss
from hpc_closure.work import log
from hpc_closure.work.stop import Stopped

CASE = Path(__file__).with_name("train_case.py")
ENGINE = "deepspeed" if deepspeed.installed() else "torch"


def rows(run: Path) -> list[dict]:
    return metrics.read(run / "train" / "metrics.csv")


def losses(run: Path) -> list[tuple]:
    """What must be bit-equal: everything but the time."""
    keys = ("step", "phase", "loss", "lr", "train_loss", "valid_loss", "valid_crps")
    return [tuple(row.get(key) for key in keys) for row in rows(run)]


def events(run: Path) -> list[int]:
    """Steps of the loss in the TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "train" / "tensorboard"), {"scalars": 0})
    found.Reload()
    return [event.step for event in found.Scalars("loss")]


@pytest.fixture
def on_ranks(mpirun):
    """Trainings on MPI ranks, one after another: (run, settings) each; a CompletedProcess."""

    def start(ranks, *jobs):
        words = []
        for run, settings in jobs:
            words += ["+", run, *(f"{key}={value}" for key, value in settings.items())]
        return mpirun(ranks, [sys.executable, CASE, "fit", *words[1:]], timeout=300)

    return start


SETTINGS = {"steps": 36, "phases": 1, "engine": "torch"}


def train(run: Path, **settings) -> None:
    """A training in this process."""
    log.setup()
    run_fit(run, **settings)


def start(run: Path, environment, **settings) -> subprocess.Popen:
    """A training in a process of its own, to be disturbed."""
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, str(CASE), "fit", str(run), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def ranks_of(word: str) -> list[int]:
    """Our Python processes that have ``word`` in their arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "python" in Path(arguments[0]).name and word in arguments:
            found.append(int(folder.name))
    return found


def wait_for(process: subprocess.Popen, run: Path, num_rows: int) -> None:
    path = run / "train" / "metrics.csv"
    while process.poll() is None and len(metrics.read(path)) < num_rows:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed")
    train(run, **SETTINGS)
    return run


def test_products(undisturbed):
    assert [row["step"] for row in rows(undisturbed)] == list(range(1, 37))
    assert events(undisturbed) == list(range(1, 37))
    assert {row["phase"] for row in rows(undisturbed)} == {"first", "second"}
    judged = [row for row in rows(undisturbed) if "valid_loss" in row]
    assert [row["step"] for row in judged] == [10, 12, 22, 32, 36]
    assert all("train_loss" in row for row in judged)
    assert all({"train_error", "valid_crps"} <= set(row) for row in judged if row["step"] > 12)
    assert judged[-1]["valid_loss"] < judged[2]["valid_loss"]
    names = sorted(path.name for path in (undisturbed / "train" / "checkpoints").iterdir())
    assert names == ["step_0000030", "step_0000036"]
    weights = load_file(str(undisturbed / "train" / "model.safetensors"))
    assert all(value.isfinite().all() for value in weights.values())


def test_rerun_does_nothing(undisturbed):
    before = losses(undisturbed)
    train(undisturbed, **SETTINGS)
    assert losses(undisturbed) == before


@pytest.mark.parametrize("num_rows", [3, 33])
def test_killed_and_run_again(num_rows, undisturbed, environment, tmp_path):
    """kill -9 at some step, then the same command: bit-equal losses and weights."""
    process = start(tmp_path, environment, **SETTINGS)
    wait_for(process, tmp_path, num_rows)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    train(tmp_path, **SETTINGS)
    assert losses(tmp_path) == losses(undisturbed)
    assert events(tmp_path) == list(range(1, 37))
    ours, theirs = (
        load_file(str(run / "train" / "model.safetensors")) for run in (tmp_path, undisturbed)
    )
    assert all((ours[key] == theirs[key]).all() for key in theirs)


def test_stopped_and_run_again(undisturbed, tmp_path):
    """Asked to stop every 5 steps: nothing lost, no validation twice."""
    for _ in range(7):
        with pytest.raises(Stopped, match="5 steps done; everything is saved"):
            train(tmp_path, max_steps=5, **SETTINGS)
    train(tmp_path, max_steps=5, **SETTINGS)
    assert losses(tmp_path) == losses(undisturbed)


def test_signal(environment, tmp_path):
    process = start(tmp_path, environment, steps=100000, engine="torch")
    wait_for(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    saved = checkpoint.newest(tmp_path / "train" / "checkpoints")
    assert checkpoint.load(saved).position.step == rows(tmp_path)[-1]["step"]


@needs_deepspeed
@pytest.mark.mpi
def test_deepspeed_resumes_bit_equal(on_ranks, tmp_path):
    """Stopped and continued by new processes, stages 1 and 3: bit-equal losses."""
    settings = {"steps": 24, "engine": "deepspeed"}

    def jobs(name, **more):
        return [
            (tmp_path / f"{name}{stage}", {**settings, "zero_stage": stage, **more})
            for stage in (1, 3)
        ]

    first = on_ranks(2, *jobs("whole"), *jobs("parts", max_steps=13))
    assert "Traceback" not in first.stderr, first.stderr
    second = on_ranks(2, *jobs("parts"))
    assert second.returncode == 0, second.stderr
    assert "continuing from restart point step_0000013" in second.stderr
    for stage in (1, 3):
        assert losses(tmp_path / f"parts{stage}") == losses(tmp_path / f"whole{stage}")


LEFT = """
import gc, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import train_case
from hpc_closure.train import processes
found = processes.join("cpu")
train_case.run_fit(Path(sys.argv[2]), found, steps=2, engine="deepspeed")
processes.leave()
import deepspeed
print(sum(isinstance(one, deepspeed.DeepSpeedEngine) for one in gc.get_objects()))
"""


@needs_deepspeed
def test_no_engine_outlives_the_training(environment, tmp_path):
    """Its process groups would abort the process at the end of Python, now and then."""
    words = [sys.executable, "-c", LEFT, CASE.parent, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]


@needs_deepspeed
@pytest.mark.mpi
def test_any_engine_continues_from_any(on_ranks, tmp_path):
    """Process count, ZeRO stage and engine change at each stop; the losses stay, to round-off."""
    settings = {"steps": 36}
    run = tmp_path / "parts"
    train(tmp_path / "whole", engine="torch", **settings)
    with pytest.raises(Stopped):
        train(run, engine="torch", max_steps=8, **settings)
    on_ranks(2, (run, {**settings, "engine": "deepspeed", "zero_stage": 3, "max_steps": 8}))
    with pytest.raises(Stopped):
        train(run, engine="deepspeed", zero_stage=1, max_steps=8, **settings)
    processes.leave()
    done = on_ranks(
        2,
        (run, {**settings, "engine": "torch", "max_steps": 6}),
        (run, {**settings, "engine": "deepspeed", "zero_stage": 2}),
    )
    assert done.returncode == 0, done.stderr
    one, other = losses(tmp_path / "whole"), losses(run)
    assert [row[0] for row in one] == [row[0] for row in other]
    assert [row[2] for row in other] == pytest.approx([row[2] for row in one], rel=1e-6)


@pytest.mark.mpi
def test_a_killed_rank_ends_the_others(environment, tmp_path, mpirun):
    """A killed rank ends the others, and the same command goes on."""
    settings = {"steps": 30, "engine": "torch"}
    train(tmp_path / "whole", **settings)
    program = shutil.which("mpirun", path=environment["PATH"])
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, str(CASE), "fit", str(tmp_path / "parts"), *words]
    command = [program, "-n", "2", *command]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    wait_for(process, tmp_path / "parts", 13)
    os.kill(ranks_of(str(tmp_path / "parts"))[-1], signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    train(tmp_path / "parts", **settings)
    one, other = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [row[2] for row in other] == pytest.approx([row[2] for row in one], rel=1e-6)


def test_streamed_like_any_other(tmp_path, capfd):
    """A data set larger than the budget: other order, same bits when resumed."""

    def streamed(run, **more):
        train(run, data=training_data(budget=100_000), **SETTINGS, **more)

    streamed(tmp_path / "whole")
    assert "streamed" in capfd.readouterr().err
    with pytest.raises(Stopped):
        streamed(tmp_path / "parts", max_steps=17)
    streamed(tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_early_stop_keeps_the_best(tmp_path, capfd):
    settings = {"schedule": "constant", "clip": 0, "ema": 0.5}
    train(tmp_path, steps=400, lr=0.2, patience=2, engine="torch", **settings)
    assert "early stop at step" in capfd.readouterr().err
    judged = [row["valid_loss"] for row in rows(tmp_path) if "valid_loss" in row]
    assert len(rows(tmp_path)) < 400 and min(judged) < judged[-1]
    weights = load_file(str(tmp_path / "train" / "model.safetensors"))
    model, data = StandIn(), training_data()
    model.begin("all", data.train.passes)
    model.load_state_dict(weights)
    loss = engine.Loss(model, data.valid.device, "float32")
    found = mean_loss(loss, data.valid, data.valid.some(0), 8, 1, Processes())
    assert found == pytest.approx(min(judged), rel=1e-6)


def test_a_weight_s_own_decay_adds_to_the_experiment_s(tmp_path, monkeypatch):
    """Of the last layer here: after one step it alone differs from a training without."""

    def weights(own, experiment):
        decay = {"project.weight": own, "project.bias": own}
        monkeypatch.setattr(StandIn, "weight_decay", lambda self, name: decay.get(name, 0.0))
        model = StandIn()
        target = tmp_path / f"{own}_{experiment}"
        run_fit(target, model=model, steps=1, engine="torch", weight_decay=experiment, ema=0.0)
        return model.state_dict()

    none, own, all_of_it = weights(0.0, 0.0), weights(1.0, 0.0), weights(0.0, 1.0)
    for name, weight in own.items():
        decayed = "project" in name
        assert torch.equal(weight, (all_of_it if decayed else none)[name])
        assert not (decayed and torch.equal(weight, none[name]))


def test_bfloat16_is_near(undisturbed, tmp_path):
    train(tmp_path, precision="bfloat16", **SETTINGS)
    one, other = losses(undisturbed), losses(tmp_path)
    assert [row[2] for row in other] == pytest.approx([row[2] for row in one], rel=2e-2)
    assert one != other


def test_diverged(tmp_path):
    with pytest.raises(RuntimeError, match="loss is .* at step .*: lower train.lr"):
        train(tmp_path, steps=400, lr=1e30, schedule="constant", clip=0, engine="torch")


def test_damaged_restart_points_are_skipped(tmp_path, capfd):
    settings = {"steps": 40, "engine": "torch"}
    with pytest.raises(Stopped):
        train(tmp_path, max_steps=25, **settings)
    folder = tmp_path / "train" / "checkpoints"
    victim = folder / "step_0000025" / "weights.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    train(tmp_path, **settings)
    told = capfd.readouterr().err
    assert "step_0000025 is skipped: weights.safetensors is damaged" in told
    assert "continuing from restart point step_0000020" in told
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 41))


def test_other_settings_are_refused(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, steps=40, engine="torch", max_steps=5)
    with pytest.raises(ValueError, match=r"made with other settings \(lr: 0.001 -> 0.5\)"):
        train(tmp_path, steps=40, engine="torch", lr=0.5)
    with pytest.raises(ValueError, match="holds another model"):
        train(tmp_path, steps=40, engine="torch", model=StandIn(width=4))


def test_settings_by_the_old_names_of_keys_are_compared(tmp_path):
    settings = {"steps": 40, "engine": "torch", "stability_test": {"horizon": 50}}
    with pytest.raises(Stopped):
        train(tmp_path, max_steps=5, **settings)
    [folder] = (tmp_path / "train" / "checkpoints").iterdir()
    progress = json.loads((folder / "progress.json").read_text())
    old = renames.as_stored({"train": progress["settings"]})["train"]
    del old["steady"]["balance"]  # a key that an older version does not have
    assert old["steady"]["calls"] == 50
    (folder / "progress.json").write_text(json.dumps({**progress, "settings": old}))
    sums = json.loads((folder / "complete.json").read_text())
    sums["progress.json"] = hashlib.sha256((folder / "progress.json").read_bytes()).hexdigest()
    (folder / "complete.json").write_text(json.dumps(sums))
    with pytest.raises(
        ValueError, match=r"\(stability_test: {'horizon': 50, 'members': 2} -> {'ho"
    ):
        train(tmp_path, **{**settings, "stability_test": {"horizon": 60}})
    train(tmp_path, **settings)


def test_folder_not_writable(tmp_path):
    (tmp_path / "train" / "metrics.csv").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="cannot write"):
        train(tmp_path, steps=4, engine="torch")


def test_csv_is_plain(undisturbed):
    with open(undisturbed / "train" / "metrics.csv", encoding="utf-8") as stream:
        table = list(csv.reader(stream))
    assert len({len(row) for row in table}) == 1
