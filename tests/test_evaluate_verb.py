"""The verb as a whole: it stops between its pieces of work, and leaves nothing half-written."""

import os
import signal
import time

import pytest
from conftest import TINY

from hpc_closure.evaluate import verb as evaluate
from hpc_closure.evaluate.report import figures
from hpc_closure.evaluate.scores import table
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options
from hpc_closure.work.stop import Stopped

QUIET = Options(verbosity=-1)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A run that waits for its evaluation."""
    path = tmp_path_factory.mktemp("rolled") / "tiny.yaml"
    path.write_text(TINY.format(root=path.parent / "runs"))
    experiment = reading.load(path)
    for verb in (generate, train, rollout):
        assert verb.run(experiment, QUIET) == 0
    return experiment


class Loud:
    """An object that sends a signal while it is being destroyed, where exceptions are lost."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)


def products(experiment):
    run = Run.of(experiment)
    return [path for path in (run.scores_csv, run.scores_json, run.report) if path.exists()]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module, name", [(table, "energy_of"), (figures, "spectra")])
def test_a_signal_in_a_destructor_stops_the_verb(experiment, monkeypatch, module, name, number):
    real, calls = getattr(module, name), []

    def loud(*words, **options):
        calls.append(name)
        Loud(number)
        return real(*words, **options)

    monkeypatch.setattr(module, name, loud)
    drawn = experiment.evaluate.model_copy(update={"formats": ("png",)})
    with pytest.raises(Stopped) as stopped:
        evaluate.run(experiment.model_copy(update={"evaluate": drawn}), QUIET)
    assert stopped.value.code == 75 and len(calls) == 1
    assert products(experiment) == []


def test_the_time_limit_stops_the_verb(experiment, monkeypatch):
    real = table.energy_of
    monkeypatch.setattr(table, "energy_of", lambda *words: (time.sleep(0.3), real(*words))[1])
    began = time.monotonic()
    with pytest.raises(Stopped, match="time limit of 0.5 s"):
        evaluate.run(experiment, Options(verbosity=-1, max_elapsed="0.5s"))
    assert time.monotonic() - began < 3
    assert products(experiment) == []
