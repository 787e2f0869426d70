"""metrics.csv and TensorBoard events: no step twice, whatever was killed when."""

import pytest

from hpc_closure.train.metrics import Metrics, read


def steps_of_events(folder, tag="loss"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), {"scalars": 0})
    found.Reload()
    return [event.step for event in found.Scalars(tag)]


def test_rows_past_the_restored_step_are_dropped(tmp_path):
    path, board = tmp_path / "metrics.csv", tmp_path / "tensorboard"
    metrics = Metrics(path, board)
    for step in range(1, 8):
        metrics.write({"step": step, "phase": "all", "loss": 1 / step, "lr": 0.1})
    metrics.close()
    metrics = Metrics(path, board, restored=4)
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4]
    metrics.write({"step": 5, "phase": "all", "loss": 0.5, "lr": 0.1, "valid_error": 2.0})
    metrics.close()
    rows = read(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[2]["loss"] == 1 / 3 and rows[4]["valid_error"] == 2.0
    assert "valid_error" not in rows[3]
    assert steps_of_events(board) == [1, 2, 3, 4, 5]
    assert steps_of_events(board, "valid_error") == [5]


def test_fresh_start_forgets(tmp_path):
    path = tmp_path / "metrics.csv"
    Metrics(path).write({"step": 3, "loss": 1.0})
    Metrics(path)
    assert read(path) == []


def test_a_step_cannot_come_twice(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.write({"step": 3, "loss": 1.0})
    with pytest.raises(ValueError, match="step 3 after step 3"):
        metrics.write({"step": 3, "loss": 1.0})


@pytest.mark.parametrize("line", ["4,all,0.2,0.1x,", "4,all", "x,all,0.2,0.1", "4,all,0.2,,,,,,9"])
def test_lines_that_are_no_rows_are_skipped(line, tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path)
    metrics.write({"step": 3, "phase": "all", "loss": 0.5, "lr": 0.1})
    with open(path, "a") as stream:
        stream.write(line + "\n")
    metrics.write({"step": 5, "phase": "all", "loss": 0.25, "lr": 0.1})
    assert [(row["step"], row["loss"]) for row in read(path)] == [(3, 0.5), (5, 0.25)]


def test_torn_last_line_is_ignored(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path)
    metrics.write({"step": 1, "loss": 1.0})
    metrics.write({"step": 2, "loss": 0.5})
    text = path.read_text()
    for cut in range(len(text)):
        path.write_text(text[:cut])
        assert [row["step"] for row in read(path)] in ([], [1], [1, 2])
    assert read(tmp_path / "absent.csv") == []
