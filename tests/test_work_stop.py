import os
import signal
import subprocess
import sys
import time
import weakref

import pytest

from hpc_closure import __main__
from hpc_closure.batch import submit
from hpc_closure.experiment.duration import seconds
from hpc_closure.work.stop import Stop, Stopped


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"])
def test_signals_set_the_flag(name):
    number = getattr(signal, name)
    outside = signal.getsignal(number)
    if outside == signal.SIG_IGN:  # the suite itself runs under nohup
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.agree()
        assert stop.reason == ("Ctrl-C" if name == "SIGINT" else name)
    assert signal.getsignal(number) == before
    signal.signal(number, outside)


def test_a_closed_terminal_does_nothing_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_interrupt_aborts():
    with Stop():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_time_limit():
    stop = Stop(max_elapsed=0.05)
    assert not stop.requested and 0 < stop.remaining <= 0.05
    time.sleep(0.06)
    assert stop.requested and "time limit of 0.05 s" in stop.reason


def test_check_raises_where_it_is_asked():
    with Stop() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check()
    with pytest.raises(Stopped, match="time limit of 0 s"):
        Stop(max_elapsed=0).check()


class Loud:
    """An object that asks this process to stop while it is being destroyed."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", ["weak reference", "destructor"])
def test_a_signal_is_not_lost_inside_a_callback(place):
    """Python swallows what is raised there, so nothing may be raised there."""
    with Stop() as stop:
        if place == "destructor":
            Loud()
        else:
            gone = {1}.union()
            watch = weakref.ref(gone, lambda _: os.kill(os.getpid(), signal.SIGINT))
            del gone
            assert watch() is None
        with pytest.raises(Stopped, match="Ctrl-C"):
            stop.check()


def test_exit_code():
    code = "from hpc_closure.work.stop import Stopped; raise Stopped('SIGTERM')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 75 and done.stderr == ""
    assert "the same command continues" in str(Stopped("SIGTERM"))


def test_a_second_signal_does_not_change_the_exit_code():
    """Slurm repeats SIGTERM, and the second may arrive while Python shuts down."""
    code = """
import atexit, sys, time
from hpc_closure.work.stop import Stop, Stopped
def late():
    print("leaving", flush=True)
    sys.stdin.readline()
atexit.register(late)
Stop.process_ends = True
with Stop() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    raise Stopped(stop.reason)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    for number in (signal.SIGTERM, signal.SIGUSR2):
        with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.stdout.readline() == "leaving\n"
            for second in (number, signal.SIGTERM):
                process.send_signal(second)
            process.communicate("\n", timeout=60)
        assert process.returncode == 75


def test_the_command_line_and_tasks_of_slurm_end_once_they_were_stopped(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hpc-closure", "--version"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert Stop.process_ends
    monkeypatch.setattr(Stop, "process_ends", False)
    usr2 = signal.getsignal(signal.SIGUSR2)
    submit.Payload(lambda *_: 0, "x", ("000000-000000",))()
    signal.signal(signal.SIGUSR2, usr2)
    assert Stop.process_ends


def test_handlers_come_back_in_a_process_that_goes_on(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        stop.request("tests")
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(Stop, "process_ends", True)
    with Stop():  # nothing stopped it: a program goes on, too
        pass
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "text, value",
    [
        ("90", 90),
        ("90s", 90),
        ("45m", 2700),
        ("3h50m", 13800),
        ("1d", 86400),
        ("1.5h", 5400),
        ("03:50:00", 13800),
        ("10:00", 600),
        (7, 7),
    ],
)
def test_durations(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "soon", "-5", "0", "3h50", "nan", "inf", "1:2:3:4", "5 m 3"])
def test_bad_durations(text):
    with pytest.raises(ValueError, match="expected seconds or for example"):
        seconds(text)


@pytest.mark.mpi
def test_ranks_agree(mpirun):
    code = """
from hpc_closure.work import mpi
from hpc_closure.work.stop import Stop
world = mpi.world()
stop = Stop()
assert not stop.agree(world)
if world.rank == 1:
    stop.request("SIGUSR1")
assert stop.agree(world)
reasons = world.allgather(stop.reason)
if world.root:  # the lines of two ranks may arrive as one
    print(*reasons, sep="\\n")
"""
    done = mpirun(2, [sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["another rank was asked to stop", "SIGUSR1"]
