import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from hpc_closure.work import atomic, claims


def path_of(folder, name="000000-000009"):
    return folder / f"{name}.claim"


def age(path, seconds):
    stamp = time.time() - seconds
    os.utime(path, (stamp, stamp))


def foreign(path, **changes):
    """A claim of a living process of another host."""
    record = {**claims.owner(), "host": "elsewhere", "machine": "elsewhere", "mark": "theirs"}
    path.write_text(json.dumps({**record, **changes}))


def test_exclusive_until_released(tmp_path):
    first = claims.take(path_of(tmp_path))
    assert first is not None and claims.take(path_of(tmp_path)) is None
    first.release()
    assert not list(tmp_path.iterdir())
    assert claims.take(path_of(tmp_path)) is not None


def test_a_claim_says_who(tmp_path):
    claims.take(path_of(tmp_path))
    record = json.loads(path_of(tmp_path).read_text())
    assert record["pid"] == os.getpid() and {"host", "machine", "born", "since"} <= set(record)


def test_a_silent_claim_of_another_host_is_taken_over_in_time(tmp_path):
    path = path_of(tmp_path)
    foreign(path)
    age(path, 500)
    assert claims.take(path, stale_after=600) is None
    age(path, 700)
    assert claims.take(path, stale_after=600) is not None
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name]


def test_the_clock_is_that_of_the_file_server(tmp_path, monkeypatch):
    path = path_of(tmp_path)
    foreign(path)
    for wrong in (-1e5, 1e5):  # our node's clock is a day off
        monkeypatch.setattr(claims.time, "time", lambda: 1.7e9 + wrong)
        assert claims.take(path, stale_after=600) is None
        assert claims.living(tmp_path, [path.name])


def test_a_claim_from_the_far_future_is_stale(tmp_path):
    path = path_of(tmp_path)
    foreign(path)
    age(path, -3600)  # the server's clock was set back since
    assert claims.take(path, stale_after=600) is not None


def test_a_dead_process_of_this_host_is_stale_at_once(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from hpc_closure.work import atomic, claims
assert claims.take(Path({str(path_of(tmp_path))!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None and not path_of(tmp_path).exists():
        time.sleep(0.01)
    time.sleep(0.3)  # a zombie now: dead although nobody has waited for it
    assert claims.take(path_of(tmp_path)) is not None
    assert process.wait() == -signal.SIGKILL


def test_a_reused_process_number_is_not_the_owner(tmp_path):
    claim = claims.take(path_of(tmp_path))
    record = json.loads(claim.path.read_text())
    claim.path.write_text(json.dumps({**record, "born": "1"}))
    assert claims.take(path_of(tmp_path)) is not None


def test_an_earlier_start_of_the_same_job_is_stale_at_once(tmp_path, monkeypatch):
    path = path_of(tmp_path)
    foreign(path, job="7", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert claims.take(path) is None  # another task of the same start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert claims.take(path) is not None


def test_the_first_worker_waits_for_living_processes_of_its_job_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    foreign(path_of(tmp_path), job="7", restarts=0)  # killed before the job was requeued
    began = time.monotonic()
    claims.wait_for_job(tmp_path, 20.0)
    assert time.monotonic() - began < 5
    foreign(path_of(tmp_path), job="7", restarts=1)
    claims.wait_for_job(tmp_path, 0.6)
    assert time.monotonic() - began > 0.6


def test_a_claim_that_was_made_just_now_is_not_looked_at(tmp_path):
    path = path_of(tmp_path)
    foreign(path)
    age(path, 700)
    assert claims.take(path, was_free=True) is None
    assert claims.take(path) is not None


def test_a_torn_claim_ages_like_any_other(tmp_path):
    path = path_of(tmp_path)
    path.write_text('{"pid": 1')
    assert claims.take(path) is None
    age(path, 700)
    assert claims.take(path) is not None


def test_the_old_owner_notices(tmp_path):
    claim = claims.take(path_of(tmp_path), stale_after=0.0)
    foreign(claim.path)
    with pytest.raises(claims.Lost, match="taken over by another process"):
        claim.refresh()
    claim.release()
    assert claim.path.exists()  # it is theirs now


def test_refresh_touches(tmp_path):
    claim = claims.take(path_of(tmp_path), stale_after=0.2)
    age(claim.path, 100)
    time.sleep(0.02)
    claim.refresh()
    assert time.time() - claim.path.stat().st_mtime < 10


def test_a_takeover_that_was_killed_does_not_block(tmp_path):
    path = path_of(tmp_path)
    foreign(path)
    age(path, 700)
    foreign(path.with_suffix(".takeover"))
    age(path.with_suffix(".takeover"), 100)
    assert claims.take(path) is None  # clears the way
    assert claims.take(path) is not None


def _race(folder, start, results):
    start.wait()
    while True:
        claim = claims.take(path_of(folder))
        if claim is not None:
            results.put(claim.mark)
            time.sleep(3.0)  # alive for as long as the others may look
            return
        if path_of(folder).stat().st_mtime > time.time() - 100:
            results.put(None)
            return


def test_one_of_many_takes_over(tmp_path):
    foreign(path_of(tmp_path))
    age(path_of(tmp_path), 700)
    context = get_context("spawn")
    start, results = context.Event(), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, start, results)) for _ in range(6)]
    for racer in racers:
        racer.start()
    time.sleep(1.5)
    start.set()
    marks = [results.get(timeout=30) for _ in racers]
    for racer in racers:
        racer.join()
    assert sum(mark is not None for mark in marks) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_who_may_not_write_still_reads():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        foreign(path_of(folder))
        code = (
            f"import os; from hpc_closure.work import claims; from pathlib import Path\n"
            f"os.setuid(65534); p = Path({name!r})\n"
            "print(len(claims.living(p, os.listdir(p))))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "1", done.stderr


def test_private_files_of_killed_processes_are_swept_in_time(tmp_path):
    names = [
        ".000000-000001.claim.node-7.ab12",
        ".clock.node-7",
        "000000-000001.takeover",
        ".000000-000001.takeover.node-7.ab12",
    ]
    others = ["000000-000001.claim", "000000-000001.error", "manifest.jsonl", ".nfs0001"]
    for name in [*names, *others]:
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (1e9, 1e9))
    fresh = ".000002-000003.claim.node-8.cd34"
    (tmp_path / fresh).write_text("{}")
    claims.sweep(tmp_path, [path.name for path in tmp_path.iterdir()])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, fresh])
    claims.sweep(tmp_path / "absent", [])


def test_a_lost_claim_is_left_to_its_new_owner(tmp_path):
    claim = claims.take(path_of(tmp_path))
    foreign(claim.path)
    with pytest.raises(claims.Lost):
        claim.check()
    claim.release()
    assert json.loads(claim.path.read_text())["mark"] == "theirs"


def test_a_claim_is_read_again_after_a_silence(tmp_path, monkeypatch):
    """Nobody takes over what was touched just now; a process that was suspended looks."""
    claim = claims.take(path_of(tmp_path), stale_after=100.0)
    foreign(claim.path)
    claim.confirm()
    claim._touched -= 6.0
    with pytest.raises(claims.Lost):
        claim.confirm()


def test_a_claim_that_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(claims.json, "dumps", full)
    with pytest.raises(atomic.DiskError, match="no space left"):
        claims.take(path_of(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_claim_that_its_owner_never_wrote_is_stale_after_a_minute(tmp_path):
    """The owner was killed between creating the file and writing it."""
    path = tmp_path / "000000-000001.claim"
    path.touch()
    now = path.stat().st_mtime
    os.utime(path, (now - 30, now - 30))
    assert claims.take(path) is None
    os.utime(path, (now - 90, now - 90))
    assert claims.take(path) is not None
