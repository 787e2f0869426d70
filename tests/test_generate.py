"""The data do not depend on ranks, domain ranks, blocks or interruptions, and they can grow."""

import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import TINY, members_of

from hpc_closure.data import reader
from hpc_closure.data.reader import DataSet, split_members
from hpc_closure.experiment import reading


@pytest.fixture(scope="module")
def reference(tmp_path_factory, hpc_closure_command):
    """Data of the tiny experiment on one rank."""
    root = tmp_path_factory.mktemp("reference")
    path = root / "tiny.yaml"
    path.write_text(TINY.format(root=root / "runs"))
    done = hpc_closure_command("generate", path)
    assert done.returncode == 0, done.stderr
    return path, members_of(root / "runs/tiny/data")


@pytest.mark.mpi
@pytest.mark.parametrize(
    "ranks, changes",
    [
        (2, []),
        (4, ["cluster.members_per_block=1"]),
        (2, ["cluster.domain_ranks=2"]),
        (4, ["cluster.domain_ranks=2", "cluster.members_per_block=4"]),
        (1, ["cluster.members_per_block=3"]),
        (1, ["cluster.threads=2"]),
    ],
)
def test_data_do_not_depend_on_ranks_and_blocks(reference, mpirun, tmp_path, ranks, changes):
    path, expected = reference
    program = [sys.executable, "-m", "hpc_closure", "generate", path, f"root={tmp_path}"]
    done = mpirun(ranks, [*program, *changes])
    assert done.returncode == 0, done.stderr
    assert members_of(tmp_path / "tiny/data") == expected


def test_a_killed_run_goes_on_and_gives_the_same_data(
    reference, hpc_closure_command, environment, tmp_path
):
    path, expected = reference
    words = ["generate", str(path), f"root={tmp_path}", "cluster.checkpoint_every=0.05"]
    slow = ["generate.dt=0.005"]
    program = [sys.executable, "-m", "hpc_closure", *words, *slow]
    for pause in (1.2, 1.6, 2.0):
        process = subprocess.Popen(program, env=environment, stderr=subprocess.DEVNULL)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = hpc_closure_command(*words, *slow)
    assert done.returncode == 0, done.stderr
    assert members_of(tmp_path / "tiny/data") == expected


def test_growth_computes_only_what_is_missing(reference, hpc_closure_command, tmp_path):
    path, _ = reference
    whole = [f"root={tmp_path}", "name=whole", "generate.t_end=0.5", "generate.members=10"]
    grown = [f"root={tmp_path}", "name=grown", "train.split=[0.5,0.25,0.25]"]
    assert hpc_closure_command("generate", path, *whole).returncode == 0
    assert hpc_closure_command("generate", path, *grown).returncode == 0
    first = sorted((tmp_path / "grown/data").glob("*.h5"))[0]
    before = first.stat().st_mtime_ns
    longer = hpc_closure_command("generate", path, *grown, "generate.members=10")
    assert "1 unit(s) done now, 4 before" in longer.stderr
    assert first.stat().st_mtime_ns == before
    longer = hpc_closure_command(
        "generate", path, *grown, "generate.members=10", "generate.t_end=0.5"
    )
    assert longer.returncode == 0, longer.stderr
    assert "continue from step 80" in longer.stderr
    assert members_of(tmp_path / "grown/data") == members_of(tmp_path / "whole/data")


def test_files_follow_the_layout_of_the_well(reference):
    path, _ = reference
    experiment = reading.load(path)
    block = sorted((experiment.folder / "data").glob("*.h5"))[0]
    with h5py.File(block) as file:
        assert file.attrs["grid_type"] == "cartesian"
        assert file.attrs["n_trajectories"] == 2 and file.attrs["n_spatial_dims"] == 2
        assert list(file["dimensions"].attrs["spatial_dims"]) == ["x", "y"]
        assert list(file["t0_fields"].attrs["field_names"]) == ["vorticity", "closure"]
        for name in ("t0_fields/vorticity", "t0_fields/closure"):
            assert file[name].shape == (2, 11, 16, 16) and file[name].dtype == np.float32
            assert file[name].attrs["time_varying"] and file[name].attrs["sample_varying"]
        for group in ("t1_fields", "t2_fields", "scalars", "boundary_conditions"):
            assert group in file
        assert file["boundary_conditions/x_periodic"].attrs["bc_type"] == "periodic"
        for name in file.attrs["simulation_parameters"]:
            assert np.isscalar(file.attrs[name])


def test_a_data_set_of_more_files_than_are_open_at_once(reference, monkeypatch):
    folder = reading.load(reference[0]).folder / "data"
    whole = DataSet(folder)
    monkeypatch.setattr(reader, "OPEN_FILES", 1)
    few = DataSet(folder)
    assert (few.grid, few.members) == (whole.grid, whole.members) == (16, list(range(8)))
    for member in few.members:
        assert np.array_equal(few.read(member, 3), whole.read(member, 3))


def test_the_stored_closure_is_that_of_the_scheme(reference):
    """G - nu Lap w has the pointwise variance of 2 beta xi, and U = G / 2."""
    path, _ = reference
    experiment = reading.load(path)
    data = DataSet(experiment.folder / "data")
    k = np.fft.fftfreq(16, 1 / 16) * 2 * np.pi
    laplacian = -(k[:, None] ** 2 + k[None, :] ** 2)
    residual = []
    for member in data.members:
        w, u = data.read(member, slice(None)), data.read(member, slice(None), "closure")
        known = np.fft.ifft2(np.fft.fft2(w) * laplacian).real * 1e-3
        residual.append(2 * u - known)
    noise, physics = experiment.physics.noise, experiment.generate
    k2 = k[:, None] ** 2 + k[None, :] ** 2
    kept = (np.abs(k[:, None]) <= 5 * 2 * np.pi) & (np.abs(k[None, :]) <= 5 * 2 * np.pi)
    law = noise.amplitude**2 * noise.draws * np.exp(-noise.correlation * k2) / physics.dt
    expected = 2 * np.sqrt((law * kept).sum())
    assert np.std(residual) == pytest.approx(expected, rel=0.1)


def test_split_is_stable_under_growth():
    shares = (0.7, 0.15, 0.15)
    small, large = (split_members(range(n), shares) for n in (40, 400))
    for part in small:
        assert set(small[part]) <= set(large[part])
    assert len(large["test"]) == 60 and len(large["valid"]) == 60
