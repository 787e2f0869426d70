"""What `generate` writes besides: adaptive steps, further and filtered fields, series, a line."""

import re
import sys

import h5py
import numpy as np
import pytest
from conftest import members_of

from hpc_closure.data.reader import DataSet
from hpc_closure.data.writer import BlockWriter
from hpc_closure.experiment import reading
from hpc_closure.experiment.schema import Filter
from hpc_closure.generate import verb as generate
from hpc_closure.tools import inspect, status
from hpc_closure.work.options import Options

PLAIN = """
base: diffusion_64
name: plain
root: {root}
generate: {{grid: 32, members: 4, t_end: 0.12, dt: 0.01, certificate: reported, closure: none,
           record: {{start: 0.04, every: 0.02, precision: float64}}}}
cluster: {{members_per_block: 2, device: cpu, threads: 1}}
"""
# speeds that cross a step of the ladder during the run, at another time in every member
ADAPTIVE = [
    "generate.cfl=0.1",
    "generate.max_refinements=3",
    "generate.record.series_every=0.01",
    "physics.initial.kind=band",
    "physics.initial.energy=0.02",
]
OUTPUTS = [
    "generate.record.fields=[velocity, streamfunction]",
    "generate.record.filters=[{kind: sharp, width: 0.1}, {kind: gaussian, width: 0.3}]",
    "generate.record.series_every=0.01",
    "generate.record.spectra=[energy, enstrophy_transfer]",
]
# what else must fit where a closure is to be made of few steps on 16 points
CLOSURE = [
    "train.grid=16",
    "train.window=[0.04,0.12]",
    "rollout.t_start=0.04",
    "rollout.t_end=0.12",
    "rollout.every=0.02",
    "rollout.interval=2",
    "rollout.sensors=null",
    "evaluate.sensors=[]",
    "evaluate.lead_times=[0.04]",
    "evaluate.grids=[16]",
]
LINE = """
base: kuramoto_sivashinsky
name: line
root: {root}
physics: {{length: 25.0, initial: {{wavenumber: 4}}}}
generate: {{grid: 64, members: 4, t_end: 4, record: {{start: 1, every: 0.5, series_every: 0.5}}}}
cluster: {{members_per_block: 2, device: cpu, threads: 1}}
"""


@pytest.fixture
def make(tmp_path):
    """Run `generate` in this process: ``make("name", *changes)``; its data folder."""

    def run(name, *changes, text=PLAIN, expected=0, **options):
        path = tmp_path / "plain.yaml"
        path.write_text(text.format(root=tmp_path / "runs"))
        experiment = reading.load(path, [f"name={name}", *changes])
        assert generate.run(experiment, Options(**{"verbosity": -1, **options})) == expected
        return experiment.folder / "data"

    return run


def stored(folder, name):
    """A data set of all blocks, members first."""
    parts = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            parts.append(file[name][...])
    return np.concatenate(parts)


@pytest.fixture
def crash(monkeypatch):
    """Let the writing of the fifth snapshot fail, with a restart file at every look."""

    def run(call):
        write = BlockWriter.write

        def fails(self, index, *rest):
            if index == 4:
                raise RuntimeError("pulled the plug")
            write(self, index, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(BlockWriter, "write", fails)
            return call()

    return run


# adaptive step


def test_adaptive_steps_belong_to_the_member(make):
    first = make("blocks_of_two", *ADAPTIVE)
    dt, cfl = stored(first, "scalars/dt"), stored(first, "scalars/cfl")
    levels = np.log2(0.01 / dt)
    assert (levels == np.round(levels)).all() and 2 <= len(np.unique(levels))
    assert (cfl <= 0.1).all() and (cfl > 0.05)[levels > 0].all()
    assert levels[0, 0] != levels[1, 0]  # of one block
    expected = members_of(first)
    assert members_of(make("one_block", *ADAPTIVE, "cluster.members_per_block=4")) == expected
    alone = [*ADAPTIVE, "cluster.members_per_block=1", "cluster.threads=2"]
    assert members_of(make("alone", *alone)) == expected
    np.testing.assert_allclose(DataSet(first).times, np.arange(0.04, 0.121, 0.02), rtol=1e-12)


def test_adaptive_steps_are_the_steps_of_a_fixed_run_where_nothing_is_refined(make):
    fixed = make("fixed", "generate.record.series_every=0.01")
    loose = make("loose", "generate.cfl=1.0", "generate.record.series_every=0.01")
    np.testing.assert_array_equal(
        stored(loose, "t0_fields/vorticity"), stored(fixed, "t0_fields/vorticity")
    )
    assert (stored(loose, "series/dt") == 0.01).all()


def test_adaptive_steps_survive_a_crash_and_a_longer_run(make, crash):
    expected = members_of(make("whole", *ADAPTIVE))
    every = [*ADAPTIVE, "cluster.checkpoint_every=1e-9"]
    crash(lambda: make("crashed", *every, expected=3))
    assert members_of(make("crashed", *every, retry_failed=True)) == expected
    make("grown", *ADAPTIVE, "generate.t_end=0.08")
    assert members_of(make("grown", *ADAPTIVE)) == expected


@pytest.mark.mpi
def test_ranks_share_adaptive_fields_and_all_outputs(make, mpirun, tmp_path):
    changes = [
        *ADAPTIVE,
        *OUTPUTS,
        *CLOSURE,
        "generate.closure=subgrid",
        "generate.record.grid=16",
        "generate.interval=2",
    ]
    expected = members_of(make("one", *changes))
    program = [sys.executable, "-m", "hpc_closure", "generate", tmp_path / "plain.yaml"]
    done = mpirun(2, [*program, *changes, "name=two", "cluster.domain_ranks=2"], timeout=600)
    assert done.returncode == 0, done.stderr
    assert members_of(tmp_path / "runs/two/data") == expected


def test_a_block_of_which_all_are_lost_fails_and_the_rest_is_not_tried(make, capfd):
    changes = ["generate.cfl=1e-4", "generate.max_refinements=2", "generate.members=8"]
    folder = make("short", *changes, "cluster.max_first_failures=2", expected=3)
    told = capfd.readouterr().err
    assert "all members of the block are lost at step " in told
    assert "lower generate.dt or raise generate.max_refinements" in told
    assert "the first 2 unit(s) all failed for one cause, so the rest is not tried" in told
    assert not list(folder.glob("*.h5"))
    assert len(list((folder.parent / ".units/generate").glob("*.error"))) == 2


def cfl_that_half_keep(make):
    """The number at which the ladder is too short for half of the members at the start."""
    from hpc_closure.spectral.simulation import Simulation

    folder = make("all")
    experiment = reading.load(folder.parent / "config.yaml")
    speed = Simulation(experiment.problem, range(4), experiment.seed).initialise().speed()
    return float(np.median(speed)) * 0.01 * 32 / 2**2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_lost_member_is_one_lost_member(make, capfd):
    """NaN from its time on, in the file, in `status` and for training; the others as ever."""
    cfl = cfl_that_half_keep(make)
    changes = [f"generate.cfl={cfl}", "generate.max_refinements=2", "cluster.members_per_block=4"]
    series = ["generate.record.series_every=0.02", "generate.record.fields=[velocity]"]
    folder = make("some", *changes, *series)
    told = capfd.readouterr().err
    assert re.search(r"member \d is lost at step \d+ \(t = .*the others go on without it", told)
    data = DataSet(folder)
    assert 0 < len(data.lost) < 4 and f"{len(data.lost)} of 4 trajectories diverged" in data.loss
    whole = [member for member in range(4) if member not in data.lost]
    parts = data.split([0.5, 0.25, 0.25])
    assert sorted(sum(parts.values(), [])) == whole
    for member in data.lost:
        gone = np.isnan(data.read(member, slice(None)))
        assert gone[-1].all() and (gone.all((1, 2)) | ~gone.any((1, 2))).all()
    longer = make("longer", *changes, *series, "generate.max_refinements=3")
    assert not DataSet(longer).lost
    for member in whole:  # as if nobody were lost
        assert np.array_equal(data.read(member, -1), DataSet(longer).read(member, -1))
    experiment = reading.load(folder.parent / "config.yaml")
    stage = status.survey(experiment)["generate"]
    assert stage.done and f"vorticity of {len(data.lost)}" in stage.note
    again = make("some", *changes, *series)  # its file is whole: nothing is to do
    assert DataSet(again).lost == data.lost


def test_defaults_are_in_no_hash():
    plain = reading.load("diffusion_64")
    settings = plain.stage_settings("generate")["generate"]
    assert set(settings["record"]) == {"start", "every", "grid", "precision"}
    assert not {"cfl", "max_refinements"} & set(settings)
    more = reading.load("diffusion_64", OUTPUTS)
    assert all(more.stage_hash(s) == plain.stage_hash(s) for s in ("generate", "train", "rollout"))
    adaptive = reading.load("diffusion_64", ["generate.closure=none", "generate.cfl=0.5"])
    assert adaptive.stage_settings("generate")["generate"]["max_refinements"] == 6


# outputs


def spectra(field):
    return np.fft.rfft2(field) / field.shape[-1] ** 2


def test_further_fields_filters_and_series_are_right(make):
    folder = make("outputs", *OUTPUTS)
    w, psi = stored(folder, "t0_fields/vorticity"), stored(folder, "t0_fields/streamfunction")
    velocity = stored(folder, "t1_fields/velocity")
    assert velocity.shape == (*w.shape, 2)
    k = 2 * np.pi * np.fft.fftfreq(32, 1 / 32)
    kx, ky = k[:, None], k[None, :17].copy()
    ky[..., -1] = 0.0
    u, v = velocity[..., 0], velocity[..., 1]
    np.testing.assert_allclose(spectra(u), 1j * ky * spectra(psi), atol=1e-12)
    np.testing.assert_allclose(
        1j * kx * spectra(v) - 1j * ky * spectra(u),
        spectra(w - w.mean((2, 3), keepdims=True)),
        atol=1e-10,
    )
    # sharp, width 0.1: |kx|, |ky| <= 5; on 16 points; gaussian: everything that the DNS retains
    sharp, gaussian = stored(folder, "filtered/sharp_0.1"), stored(folder, "filtered/gaussian_0.3")
    assert sharp.shape == (4, 5, 16, 16) and gaussian.shape[2:] == (20, 20)
    keep = (abs(kx) <= 10.1 * np.pi) & (abs(k[None, :17]) <= 10.1 * np.pi)
    whole = np.fft.irfft2(np.fft.rfft2(w) * keep)
    np.testing.assert_allclose(sharp, whole[..., ::2, ::2], atol=1e-12)
    energy = (np.abs(spectra(w)) ** 2 * np.exp(-(kx**2 + k[:17] ** 2) * 0.09 / 12))[..., 1:8]
    np.testing.assert_allclose(
        (np.abs(spectra(gaussian)) ** 2)[..., 1:8].sum((2, 3)), energy.sum((2, 3)), rtol=1e-4
    )
    # series from t = 0, the same figures as beside the snapshots
    with h5py.File(sorted(folder.glob("*.h5"))[0]) as file:
        times = file["dimensions/series_time"][:]
    np.testing.assert_allclose(times, np.arange(13) * 0.01, atol=1e-12)
    for name in ("energy", "enstrophy_injection", "cfl"):
        series, beside = stored(folder, f"series/{name}"), stored(folder, f"scalars/{name}")
        np.testing.assert_array_equal(series[:, 4::2], beside)
        assert len(np.unique(series)) > 12
    np.testing.assert_allclose(
        stored(folder, "series/energy_spectrum").sum(-1), stored(folder, "series/energy")
    )
    transfer = stored(folder, "series/enstrophy_transfer_spectrum")
    assert (abs(transfer.sum(-1)) < 1e-12 * abs(transfer).sum(-1)).all()


def test_another_output_list_in_the_same_folder_is_refused(make):
    folder = make("run", *OUTPUTS[:1])
    before = members_of(folder)
    for change, key in [
        ("generate.record.fields=[velocity]", "generate.record.fields: "),
        ("generate.record.series_every=0.01", "generate.record.series_every: None -> 0.01"),
        (OUTPUTS[1], "generate.record.filters: "),
    ]:
        with pytest.raises(ValueError, match=f"made with other settings .*{key}.*change `name`"):
            make("run", *OUTPUTS[:1], change)
    (folder.parent / "config.yaml").unlink()  # the blocks know it themselves
    with pytest.raises(ValueError, match="holds other outputs .*change `name`"):
        make("run", *OUTPUTS)
    assert members_of(folder) == before


def test_a_longer_run_with_all_outputs_goes_on_from_what_is_there(make, capfd):
    folder = make("run", *OUTPUTS)
    capfd.readouterr()
    longer = [*OUTPUTS, "generate.t_end=0.16", "generate.members=6"]
    make("run", *longer, verbosity=0)
    assert "continue from step 12" in capfd.readouterr().err
    assert members_of(folder) == members_of(make("at_once", *longer))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")}
    make("run", *OUTPUTS)  # a shorter one: nothing to do
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")} == before


def test_the_series_does_not_lose_the_steps_of_the_targets(make):
    changes = ["generate.record.series_every=0.01", "generate.interval=2"]
    plain = make("plain", *changes)
    target = make("target", *changes, *CLOSURE, "generate.closure=diffusion")
    np.testing.assert_array_equal(stored(plain, "series/energy"), stored(target, "series/energy"))


def test_restart_files_of_another_working_file_are_not_used(make, crash, monkeypatch):
    """A crash, another horizon, a crash before its first restart file, and once more."""
    every = ["cluster.members_per_block=4", "cluster.checkpoint_every=1e-9"]
    crash(lambda: make("run", *every, expected=3))
    longer = ["cluster.members_per_block=4", "generate.t_end=0.16"]
    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "write", lambda *_: 1 / 0)
        make("run", *longer, retry_failed=True, expected=3)
    folder = make("run", *longer, retry_failed=True)
    assert members_of(folder) == members_of(make("whole", *longer))


def test_the_plan_knows_the_size_of_the_fields(make, tmp_path):
    folder = make("size", *OUTPUTS)
    experiment = reading.load(folder.parent / "config.yaml")
    stored_bytes = 0
    for path in folder.glob("*.h5"):
        with h5py.File(path) as file:
            for group in ("t0_fields", "t1_fields", "filtered"):
                stored_bytes += sum(values.nbytes for values in file[group].values())
    assert 4 * experiment.generate.bytes_per_member(experiment.physics) == stored_bytes


def test_filters_say_what_they_need():
    assert Filter(kind="sharp", width=0.1).modes(1.0) == 5
    assert Filter(kind="sharp", width=5.0).modes(100.0) == 10
    gaussian = Filter(kind="gaussian", width=0.1).modes(1.0)
    assert np.exp(-((2 * np.pi * gaussian * 0.1) ** 2) / 24) >= 1e-3
    assert np.exp(-((2 * np.pi * (gaussian + 1) * 0.1) ** 2) / 24) < 1e-3


# another equation


def test_kuramoto_sivashinsky_from_a_yaml_file(make, crash, capsys):
    folder = make("line", text=LINE)
    u = stored(folder, "t0_fields/state")
    assert u.shape == (4, 7, 64) and 0.3 < u[:, -1].std() < 3
    data = DataSet(folder)
    assert data.dimensions == 1 and data.grid == 64
    np.testing.assert_array_equal(data.read(1, slice(None), "state"), u[1])
    report = inspect.inspect(sorted(folder.glob("*.h5"))[0], deep=True)
    assert report["certificate"]["passed"] and report["statistics"]["state"]["rms"] > 0.3
    assert "viscosity" not in report["recipe"]["physics"]
    every = ["cluster.checkpoint_every=1e-9"]
    crash(lambda: make("crashed", *every, text=LINE, expected=3))
    again = make("crashed", *every, text=LINE, retry_failed=True)
    assert members_of(again) == members_of(folder)
    make("grown", "generate.t_end=2", text=LINE)
    assert members_of(make("grown", text=LINE)) == members_of(folder)
    experiment = reading.load(folder.parent / "config.yaml")
    capsys.readouterr()
    assert status.run(experiment, ["x.yaml"]) == 0
    assert capsys.readouterr().out.endswith("all done\n")
