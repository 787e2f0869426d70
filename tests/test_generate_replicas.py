"""Replicas: the resolved past of their start, and unresolved scales of their own."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.experiment import reading
from hpc_closure.generate import verb as generate
from hpc_closure.generate.replicas import ReplicaBlock
from hpc_closure.tools import status
from hpc_closure.work import hdf5

SMALL = """
base: subgrid_backscatter_quick
name: small
root: {root}
physics: {{noise: {{wavenumber: 12}}, initial: {{energy: 0.01}}}}
generate: {{grid: 40, members: 8, t_end: 2.4, interval: 25,
           record: {{start: 0.5, every: 0.1, grid: 20}}}}
reduced: {{step: 1}}
train: {{split: [0.5, 0.25, 0.25], steps: 4, batch: 4}}
replicas: {{members: 4, spinup: 1.0}}
rollout: {{members: 3, initial_conditions: 2, t_start: 2.0, t_end: 2.4, every: 0.1,
          interval: 25, rungs: []}}
evaluate: {{lead_times: [0.1, 0.4], samples: 8, members: 4, formats: []}}
cluster: {{members_per_block: 8, device: cpu, threads: 1}}
"""


def contents(folder):
    return {path.name: hdf5.sha256_datasets(path) for path in sorted(folder.glob("block_*.h5"))}


def make(path, *changes):
    """Run `generate` in this process; the run folder."""
    experiment = reading.load(path, changes)
    assert generate.run(experiment) == 0
    return experiment.folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(experiment file, its run folder) with data and replicas."""
    folder = tmp_path_factory.mktemp("replicas")
    path = folder / "small.yaml"
    path.write_text(SMALL.format(root=folder / "runs"))
    return path, make(path)


def test_the_stored_grid_need_not_divide_that_of_the_dns(made):
    """A recording on 30^2 of a DNS on 40^2 has the resolved modes of one on 20^2, and more."""
    run = make(made[0], "name=thirty", "generate.record.grid=30", "reduced.step=1")
    spectra = []
    for folder, size in ((made[1], 20), (run, 30)):
        data = DataSet(folder / "data")
        fields = np.stack([data.read(case, 3) for case in range(8)])
        spectra.append(np.fft.rfft2(fields, norm="forward"))
        assert fields.shape[1:] == (size, size)
    few, many = (np.concatenate([one[:, :7, :7], one[:, -6:, :7]], 1) for one in spectra)
    assert np.abs(few - many).max() < 1e-6 * np.abs(few).max()
    assert np.abs(spectra[1][:, 7:11]).max() > 1e-6 * np.abs(few).max()


@pytest.fixture
def ensemble(made):
    """The replicas with the data that they were made beside."""
    paths = sorted((made[1] / "replicas").glob("block_*.h5"))
    return CoupledEnsemble(paths), DataSet(made[1] / "data")


def test_the_resolved_past_is_that_of_the_start_to_the_bit(ensemble):
    replicas, data = ensemble
    assert replicas.cases == [3, 7] and replicas.members == [0, 1, 2, 3]
    assert replicas.times[0] == pytest.approx(1.0) and replicas.times[-1] == pytest.approx(2.4)
    for case in replicas.cases:
        for index, when in enumerate(replicas.times):
            fields = replicas.read_case("model", case, index)
            truth = data.read(case, data.time_index(when))
            same = [np.array_equal(field, truth) for field in fields]
            assert same == [when < 2.0 + 1e-9] * 4, when


def spreads(replicas):
    """Root mean square over starts, replicas and points of the closures at each time."""
    closures = [
        np.stack([replicas.read_case("closure", case, index) for case in replicas.cases])
        for index in range(len(replicas.times))
    ]
    assert all((one.std(1).mean() > 0.1 * one.std()) for one in closures)
    return np.array([one.std() for one in closures])


def test_unresolved_scales_and_forcing_are_their_own_and_forget_how_they_began(made, ensemble):
    run = make(made[0], "name=empty", "replicas.start=empty")
    replicas, data = ensemble
    empty = CoupledEnsemble(sorted((run / "replicas").glob("block_*.h5")))
    ratio = spreads(empty) / spreads(replicas)
    assert ratio[0] < 0.5 and ratio[9] > 0.75  # pinned for 0 and .9
    # moved, the unresolved scales are as large as those of the trajectory itself
    now = data.time_index(replicas.times[0])
    truth = np.stack([data.read(case, now, "closure") for case in replicas.cases])
    assert spreads(replicas)[0] == pytest.approx(truth.std(), rel=0.25)


def test_each_replica_of_each_start_has_a_forcing_of_its_own(made):
    """Released with the resolved modes of their start, its replicas differ at first by what has
    forced them there: those of one start by something else than those of another."""
    strong = ["physics.noise.wavenumber=4", "physics.noise.energy_rate=0.01"]
    run = make(made[0], "name=forced", "replicas.spinup=0", *strong)
    replicas = CoupledEnsemble(sorted((run / "replicas").glob("block_*.h5")))
    fields = [replicas.read_case("model", case, 1) for case in replicas.cases]
    one, other = ((field[1:] - field[0]).reshape(3, -1) for field in fields)
    assert np.abs(np.corrcoef(one, other)[:3, 3:]).max() < 0.5


def test_each_replica_of_each_start_is_moved_by_a_distance_of_its_own(made, monkeypatch):
    """No two of all begin with the same factors of their master's unresolved modes."""
    begin, factors = ReplicaBlock._begin, []

    def watched(block):
        begin(block)
        master = block.master.state[block.case_of_row]
        unresolved = (master[0] != 0) & ~block.resolved
        factors.append((block.replicas.state / master)[:, unresolved].numpy())

    monkeypatch.setattr(ReplicaBlock, "_begin", watched)
    make(made[0], "name=watched", "replicas.spinup=0")
    every = np.concatenate(factors)
    assert np.allclose(np.abs(every), 1.0)
    assert len(np.unique(every.round(6), axis=0)) == len(every) == 8


def test_without_pinning_they_begin_at_the_release(made):
    run = make(made[0], "name=free", "replicas.spinup=0")
    replicas = CoupledEnsemble(sorted((run / "replicas").glob("block_*.h5")))
    data = DataSet(run / "data")
    assert replicas.times[0] == pytest.approx(2.0) == replicas.start
    for case in replicas.cases:
        fields = replicas.read_case("model", case, 0)
        assert all(np.array_equal(one, data.read(case, data.time_index(2.0))) for one in fields)
        assert np.std(replicas.read_case("model", case, 1), axis=0).min() > 0


@pytest.mark.mpi
@pytest.mark.parametrize("ranks, changes", [(2, []), (2, ["cluster.domain_ranks=2"])])
def test_they_do_not_depend_on_ranks(made, mpirun, tmp_path, ranks, changes):
    path, run = made
    program = [sys.executable, "-m", "hpc_closure", "generate", path, f"root={tmp_path}"]
    done = mpirun(ranks, [*program, *changes])
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "small/replicas") == contents(run / "replicas")


def test_killed_they_go_on_to_the_same_bits(made, environment, hpc_closure_command, tmp_path):
    path, run = made
    words = ["generate", str(path), f"root={tmp_path}", "cluster.checkpoint_every=0.02"]
    program = [sys.executable, "-m", "hpc_closure", *words]
    log = tmp_path / "log"
    for _ in range(2):
        with log.open("a") as stream:
            process = subprocess.Popen(program, env=environment, stderr=stream)
            restarts = tmp_path / "small/.units/replicas"
            while process.poll() is None and not list(restarts.glob("*.restart/step_*.h5")):
                time.sleep(0.01)
            time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = hpc_closure_command(*words)
    assert done.returncode == 0, done.stderr
    assert re.search("replicas 00000.-00000.: continue from step", log.read_text() + done.stderr)
    assert contents(tmp_path / "small/replicas") == contents(run / "replicas")


def test_more_starts_and_a_later_end_compute_only_what_is_missing(made, tmp_path):
    path, run = made
    few = ["rollout.initial_conditions=1", "rollout.t_end=2.2", "evaluate.lead_times=[0.1]"]
    make(path, f"root={tmp_path}", *few)
    grown = make(path, f"root={tmp_path}")
    log = (grown / "logs/generate/main.log").read_text()
    assert "replicas 000000-000003: continue from step" in log
    assert contents(grown / "replicas") == contents(run / "replicas")


def test_status_counts_them_and_generate_is_the_verb_that_makes_them(made, capsys):
    path, run = made
    stages = status.survey(reading.load(path))
    assert stages["replicas"].counts == {
        "units": 2, "done": 2, "running": 0, "queued": 0, "failed": 0, "missing": 0
    }  # fmt: skip
    experiment = reading.load(path, ["name=nothing"])
    assert status.next_command(status.survey(experiment), "{verb} x") == "hpc-closure generate x"


def test_other_settings_are_refused(made):
    path, run = made
    before = contents(run / "replicas")
    with pytest.raises(ValueError, match="replicas.spinup: 1.0 -> 0.5") as refused:
        make(path, "replicas.spinup=0.5")
    assert f"or remove {run}/replicas" in str(refused.value)
    assert contents(run / "replicas") == before


@pytest.mark.parametrize(
    "change, told",
    [
        ("generate.closure=convection", "replicas are for closure subgrid"),
        ("replicas.spinup=3", "begins before t = 0: at most rollout.t_start=2"),
        ("replicas.spinup=0.05", "replicas.spinup=0.05 is not a multiple of 0.1"),
    ],
)
def test_what_cannot_be_is_one_line(made, change, told):
    more = [
        "model.conditions.previous_closures=0",
        "generate.record.grid=40",
        "rollout.baselines=[none]",
    ]
    changes = [change, *(more if "convection" in change else [])]
    with pytest.raises(ValueError, match=re.escape(told)):
        reading.load(Path(made[0]), changes)
