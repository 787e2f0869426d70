import io
import os
import pty
import re
import subprocess
import sys

import pytest

from hpc_closure.work import log


@pytest.fixture
def lines():
    stream = io.StringIO()

    def start(**options):
        log.setup(stream=stream, **options)
        return lambda: stream.getvalue().splitlines()

    yield start
    log.setup()


def test_time_stamp_and_rank(lines):
    read = lines(rank=0, size=4)
    log.get().info("hello")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d 0/4  hello", read()[0])


def test_other_ranks_only_warn(lines):
    read = lines(rank=2, size=4)
    log.get().info("hello")
    log.get().warning("oops")
    assert len(read()) == 1 and read()[0].endswith("2/4 WARNING  oops")


def test_verbosity(lines):
    read = lines(verbosity=-1)
    log.get().info("hidden")
    assert not read()
    read = lines(verbosity=1)
    log.get().debug("shown")
    assert len(read()) == 1


def test_warnings_once(lines):
    read = lines()
    for _ in range(3):
        log.warn_once("careful")
    assert len(read()) == 1


@pytest.mark.parametrize("rank, shown", [(0, 1), (1, 0)])
def test_warnings_of_libraries_come_once_and_not_per_rank(rank, shown):
    code = (
        f"import warnings; from hpc_closure.work import log; log.setup({rank}, 2)\n"
        "for _ in range(3): warnings.warn('of a library')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.count("UserWarning: of a library") == shown


def test_file(lines, tmp_path):
    path = tmp_path / "logs" / "generate" / "main.log"
    lines(file=path)
    log.get().info("kept")
    lines(file=path)
    log.get().info("appended")
    assert [line.split("  ")[1] for line in path.read_text().splitlines()] == ["kept", "appended"]


def test_an_unwritable_file_is_told_once_and_the_work_goes_on(lines, tmp_path, capsys):
    (tmp_path / "main.log").mkdir()  # root may write every file, but not a folder
    read = lines(file=tmp_path / "main.log")
    for _ in range(3):
        log.get().info("hello")
    assert len(read()) == 3
    told = capsys.readouterr().err
    assert told == f"cannot write the log {tmp_path}/main.log: Is a directory\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_log_is_told_once(lines, capsys):
    read = lines(file="/dev/full")
    for _ in range(3):
        log.get().info("hello")
    log.setup()
    assert len(read()) == 3
    told = capsys.readouterr().err
    assert told == "cannot write the log /dev/full: No space left on device\n"


def test_a_closed_stream_does_not_stop_the_work(tmp_path):
    stream = io.StringIO()
    log.setup(stream=stream, file=tmp_path / "train.log")
    stream.close()
    log.get().warning("still here")
    log.setup()
    assert "still here" in (tmp_path / "train.log").read_text()


def test_banner(lines):
    read = lines()
    log.banner(
        "generate mine",
        {
            "version": "1.0",
            "git": {"revision": "a" * 40, "dirty": True},
            "host": "node1",
            "job": "7_3",
            "restarts": 2,
            "ranks": 4,
            "device": "cpu",
            "threads": 1,
            "hashes": {"generate": "b" * 64},
            "run": "/runs/mine",
        },
    )
    text = "\n".join(read())
    for word in (
        "hpc-closure 1.0",
        "aaaaaaaaaaaa+dirty",
        "node1",
        "job 7_3 (restart 2)",
        "4 rank(s)",
        "generate bbbbbbbbbbbb",
        "/runs/mine",
    ):
        assert word in text


@pytest.mark.mpi
def test_the_log_of_two_ranks_begins_with_what_runs_and_says_it_once(mpirun, tiny):
    changes = ["generate.members=4", "generate.certificate=reported"]
    done = mpirun(
        2, [sys.executable, "-m", "hpc_closure", "generate", tiny, *changes], env={"JOB_ID": "77"}
    )
    assert done.returncode == 0, done.stderr
    told = [line.split("  ", 1) for line in done.stderr.splitlines()]
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d 0/2", where) for where, *text in told if text
    )
    text = [line[1] for line in told if len(line) > 1]
    version = r"generate tiny: hpc-closure [\d.]+( git [0-9a-f]{12}(\+dirty)?)?"
    assert re.fullmatch(version, text[0])
    assert re.fullmatch(r"host \S+, job 77, 2 rank\(s\), device cpu, 1 thread\(s\)", text[1])
    assert re.fullmatch(r"hashes generate [0-9a-f]{12}", text[2])
    assert text[3] == f"run folder {tiny.parent}/runs/tiny" and len(set(text)) == len(text)
    kept = (tiny.parent / "runs/tiny/logs/generate/main.log").read_text()
    assert kept.splitlines()[:4] == done.stderr.splitlines()[:4]


def test_progress_off_a_terminal_is_a_few_lines(lines, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    read = lines()
    with log.Progress(1000, "members 0-19") as bar:
        for _ in range(1000):
            clock[0] += 0.2
            bar.update(1, note="loss 0.5")
    assert 11 <= len(read()) <= 13
    assert "5/s" not in read()[0] and "5 steps/s" in read()[0] and "left" in read()[0]
    assert "loss 0.5" in read()[0] and "1000 steps in" in read()[-1]


def test_progress_of_a_slow_loop_speaks_every_thirty_seconds(lines, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    read = lines()
    with log.Progress(100000, "x") as bar:
        for _ in range(100):
            clock[0] += 1.0
            bar.update(1)
    assert len(read()) == 4  # at 30, 60, 90 s and the end


def test_progress_of_a_fast_loop_is_one_line(lines):
    read = lines()
    with log.Progress(10000, "x") as bar:
        for _ in range(10000):
            bar.update()
    assert len(read()) == 1


def test_progress_is_a_bar_on_a_terminal():
    code = (
        "from hpc_closure.work import log\nlog.setup()\n"
        "with log.Progress(10, 'members') as bar:\n    [bar.update(1) for _ in range(10)]\n"
        "    log.get().info('a line between')\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:
        pass
    assert process.wait() == 0
    assert b"\x1b[" in shown and b"members" in shown and b"100 %" in shown
    screen = [line.strip().rpartition(b"\x1b[K")[2] for line in shown.strip().split(b"\n")]
    assert re.fullmatch(rb"[\d: -]+  a line between", screen[0]), "the bar is left behind"
    assert screen[1].partition(b"  ")[2].startswith(b"members: 10 steps in")


@pytest.mark.parametrize(
    "value, text",
    [
        (4.2, "4.2 s"),
        (42, "42 s"),
        (210, "3.5 min"),
        (7560, "2.1 h"),
        (4 * 86400, "4.0 d"),
        (float("nan"), "?"),
    ],
)
def test_duration(value, text):
    assert log.duration(value) == text
