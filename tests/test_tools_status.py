import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from status_case import best_survey, publish_copies

from hpc_closure.closure.header import Header
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.tools import status
from hpc_closure.work import atomic, claims, hdf5
from hpc_closure.work.loop import SINGLE
from hpc_closure.work.units import Ledger


@pytest.fixture
def experiment(tiny):
    return reading.load(tiny)


def publish(ledger, unit):
    with ledger.publish(unit) as part, hdf5.open_hdf5(part, "w") as file:
        file.attrs.update({**ledger.attributes(unit), "complete": 1})


def made_by(experiment, stage):
    """A model or scores of these settings, as far as status looks at them."""
    run, provenance = Run(experiment.folder), {"hashes": {stage: experiment.stage_hash(stage)}}
    if stage == "train":
        run.model.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {"a": np.ones(3, np.float32)},
            run.model,
            metadata=Header({}, 32, 1.0, {}, provenance).metadata,
        )
    else:
        atomic.write_text(run.report, "x")
        atomic.write_json(run.scores_json, {"provenance": provenance})


def told(capsys, experiment, changes=(), **options):
    assert status.run(experiment, ["tiny.yaml", *changes], **options) == 0
    return capsys.readouterr().out


def seen(capsys, experiment, changes=(), **options):
    return json.loads(told(capsys, experiment, changes, json=True, **options))


def test_of_nothing(capsys, experiment):
    found = seen(capsys, experiment, ["seed=3", "name=a b"])
    assert list(found["stages"]) == ["generate", "train", "rollout", "evaluate"]
    assert found["stages"]["generate"] == {
        "units": 4,
        "done": 0,
        "running": 0,
        "queued": 0,
        "failed": 0,
        "missing": 4,
    }
    assert found["next"] == "hpc-closure generate tiny.yaml seed=3 'name=a b'"
    assert not experiment.folder.exists()


def test_states_and_the_next_command(capsys, experiment):
    run = Run(experiment.folder)
    ledger = Ledger.of(experiment, "generate")
    units = ledger.plan(8, 2)
    publish(ledger, units[0])
    run.units("generate").mkdir(parents=True)
    claims.take(run.claim("generate", units[1]))
    ledger.fail(units[2], FloatingPointError("member 4: NaN at step 7, CFL 3.1"))
    found = seen(capsys, experiment)
    assert found["stages"]["generate"] == {
        "units": 4,
        "done": 1,
        "running": 1,
        "queued": 0,
        "failed": 1,
        "missing": 1,
    }
    assert found["next"] == "hpc-closure generate tiny.yaml"
    publish(ledger, units[3])
    assert seen(capsys, experiment)["next"] == "wait: generate is running"
    publish(ledger, units[1])
    assert seen(capsys, experiment)["next"] == "hpc-closure generate tiny.yaml --retry-failed"
    publish(ledger, units[2])
    assert seen(capsys, experiment)["next"] == "hpc-closure train tiny.yaml"


def test_failures_with_last_line_and_log(capsys, experiment):
    run = Run(experiment.folder)
    log_path = run.log("generate")
    atomic.write_text(log_path, "first\nlast words of the unit\n\n")
    ledger = Ledger.of(experiment, "generate")
    for unit in ledger.plan(8, 2):
        ledger.fail(unit, ValueError("CFL 3.1"))
        record = atomic.read_json(run.error("generate", unit))
        atomic.write_json(run.error("generate", unit), {**record, "log": str(log_path)})
    short = told(capsys, experiment)
    assert "CFL 3.1" in short and str(log_path) in short and "1 more failed" in short
    long = told(capsys, experiment, failed=True)
    assert long.count("CFL 3.1") == 4 and "last line: last words of the unit" in long
    assert "attempt 1" in long


def test_train_and_evaluate(capsys, experiment):
    run = Run(experiment.folder)
    run.units("train").mkdir(parents=True)
    claim = claims.take(run.claim("train", SINGLE))
    atomic.write_text(run.metrics, "step,loss,valid_loss\n1,0.5,\n2,0.4,0.45\n3,0.3,\n")
    assert seen(capsys, experiment)["stages"]["train"]["running"] == 1
    assert "step 3, loss 0.3, valid 0.45" in told(capsys, experiment)
    claim.release()
    atomic.write_json(run.error("train", SINGLE), {"message": "RuntimeError: diverged"})
    assert seen(capsys, experiment)["stages"]["train"]["failed"] == 1
    made_by(experiment, "train")
    assert seen(capsys, experiment)["stages"]["train"]["done"] == 1
    made_by(experiment, "evaluate")
    assert seen(capsys, experiment)["stages"]["evaluate"]["done"] == 1


def test_a_model_and_scores_of_other_settings_do_not_count(capsys, tiny, experiment):
    made_by(experiment, "train")
    made_by(experiment, "evaluate")
    other = reading.load(tiny, ["train.lr=0.5", "evaluate.seed=3"])
    found = seen(capsys, other)
    assert found["stages"]["train"]["missing"] == found["stages"]["evaluate"]["missing"] == 1
    text = told(capsys, other)
    assert "model.safetensors: made with other settings; change `name`, or run `train --" in text
    assert "report.html: made with other settings; `evaluate` makes it again" in text
    run = Run(experiment.folder)
    whole = run.model.read_bytes()
    for damage in (b"", b"x", whole[:-1], whole[:40], b"\xff" * 50):
        run.model.write_bytes(damage)
        assert seen(capsys, experiment)["stages"]["train"]["missing"] == 1
        assert "not a whole model file" in told(capsys, experiment)
    run.scores_json.write_text("[1, 2")
    assert "not used: " in told(capsys, experiment)
    run.scores_json.write_text("[1, 2]")
    assert seen(capsys, experiment)["stages"]["evaluate"]["missing"] == 1


def test_a_stage_older_than_its_input_is_named(capsys, experiment):
    run = Run(experiment.folder)
    made_by(experiment, "evaluate")
    os.utime(run.report, (1e9, 1e9))
    made_by(experiment, "train")
    assert "train is newer than the last product of evaluate" in told(capsys, experiment)


def test_damaged_and_foreign_products_are_named(capsys, experiment):
    ledger = Ledger.of(experiment, "generate")
    units = ledger.plan(8, 2)
    publish(ledger, units[0])
    path = ledger.run.product("generate", units[0])
    path.write_bytes(path.read_bytes()[:100])
    assert f"not used: {path}: truncated" in told(capsys, experiment)
    path.unlink()
    ledger.recipe = "other"
    publish(ledger, units[0])
    text = told(capsys, experiment)
    assert "made by another experiment" in text and "change `name`" in text


def test_rate_and_time_left(capsys, experiment):
    ledger = Ledger.of(experiment, "generate")
    units = ledger.plan(8, 2)
    now = time.time()
    for index in range(3):
        publish(ledger, units[index])
        stamp = now - 60 * (3 - index)
        os.utime(ledger.run.product("generate", units[index]), (stamp, stamp))
    ledger.run.units("generate").mkdir(parents=True, exist_ok=True)
    claims.take(ledger.run.claim("generate", units[3]))
    found = seen(capsys, experiment)["details"]["generate"]
    assert found["units_per_hour"] == pytest.approx(60, rel=0.05)
    assert found["seconds_left"] == pytest.approx(60, rel=0.05)
    assert "left" in told(capsys, experiment)


def test_all_done(capsys, experiment):
    for stage in ("generate", "rollout"):
        books = Ledger.of(experiment, stage)
        for unit in books.plan(8, 2):
            publish(books, unit)
    made_by(experiment, "train")
    made_by(experiment, "evaluate")
    found = seen(capsys, experiment, watch=5)  # ends by itself
    assert found["next"] == "" and "all done" in told(capsys, experiment)


def test_watch_repeats_until_all_is_done_or_ctrl_c(capsys, experiment, monkeypatch):
    looks = []

    def pause(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        publish(ledger, units[len(looks) - 1])

    ledger = Ledger.of(experiment, "generate")
    units = ledger.plan(8, 2)
    monkeypatch.setattr(status.time, "sleep", pause)
    text = told(capsys, experiment, watch=2.0)
    assert looks == [2.0] * 3 and text.count("generate      4") == 3
    assert "generate      4     0" in text and "generate      4     2" in text
    assert "\033" not in text  # not a terminal


def test_watch_asks_the_scheduler_seldom(experiment):
    with pytest.raises(ValueError, match="--watch 0.1: expected at least 1 seconds"):
        status.run(experiment, watch=0.1)
    atomic.append_jsonl(Run(experiment.folder).submissions("rollout"), {"job": "1"})
    with pytest.raises(ValueError, match="at least 30 seconds, each look asks the scheduler"):
        status.run(experiment, watch=5)


def test_writes_nothing_but_its_cache(capsys, experiment):
    ledger = Ledger.of(experiment, "generate")
    publish(ledger, ledger.plan(8, 2)[0])
    before = {path for path in experiment.folder.rglob("*")}
    told(capsys, experiment)
    new = {path for path in experiment.folder.rglob("*")} - before
    assert new <= {
        ledger.run.units_dir,
        ledger.run.units("generate"),
        ledger.run.manifest("generate"),
    }


@pytest.mark.parametrize("num_units, limit", [(1000, 0.5), (5000, 2.0)])
def test_is_quick(tiny, num_units, limit):
    """Processor seconds: other processes may share the machine."""
    experiment = reading.load(
        tiny, [f"generate.members={20 * num_units}", "cluster.members_per_block=20"]
    )
    ledger = Ledger.of(experiment, "generate")
    publish_copies(ledger, ledger.plan(20 * num_units, 20))
    found, seconds = best_survey(experiment)
    assert found["generate"].counts["done"] == num_units
    assert seconds < limit
