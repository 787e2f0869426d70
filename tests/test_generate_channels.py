"""Data of equations whose state has several fields."""

import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import members_of

from hpc_closure.data.reader import DataSet
from hpc_closure.data.writer import BlockWriter
from hpc_closure.experiment import reading
from hpc_closure.generate import verb as generate
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work.options import Options

CLOUDS = """
base: diffusion_64
name: clouds
root: {root}
seed: 7
physics: {{equation: clouds, length: 6.283185307179586, drag: 0.1, forcing: {{kind: none}},
          noise: {{kind: ring, wavenumber: 2.5, width: 0.5, energy_rate: 0.1}},
          initial: {{kind: band, wavenumber: 4, energy: 0.3}}}}
generate: {{grid: 32, members: 4, t_end: 0.2, dt: 0.0125, scheme: cn_ab2, certificate: reported,
           closure: none,
           record: {{start: 0.05, every: 0.05, grid: 16, series_every: 0.025,
                    precision: float64}}}}
cluster: {{members_per_block: 2, device: cpu, threads: 1, checkpoint_every: 0.001}}
"""
LAYERS = [
    "physics.equation=two_layer_qg",
    "physics.deformation_radius=0.5",
    "physics.mean_flow=[0.3,0]",
    "physics.hyperviscosity=1e-8",
    "generate.scheme=ab3",
]
MEDIUM = ["physics.equation=excitable", "generate.scheme=etdrk4"]


@pytest.fixture
def make(tmp_path):
    """Run `generate` in this process: ``make("name", *changes)``; its data folder."""

    def run(name, *changes, expected=0, **options):
        path = tmp_path / "clouds.yaml"
        path.write_text(CLOUDS.format(root=tmp_path / "runs"))
        experiment = reading.load(path, [f"name={name}", *changes])
        assert generate.run(experiment, Options(verbosity=-1, **options)) == expected
        return experiment.folder / "data"

    return run


def test_every_field_of_the_state_is_stored(make, tmp_path):
    folder = make("clouds")
    experiment = reading.load(tmp_path / "clouds.yaml")
    sim = Simulation(experiment.problem, range(4), 7).initialise().advance(8)
    data = DataSet(folder)
    for name in ("vorticity", "moisture", "rain"):
        stored = np.stack([data.read(member, 1, name) for member in range(4)])
        fine = sim.fields([name])[name]
        expected = torch.fft.rfft2(fine, norm="forward")[:, :5, :5]
        assert stored.shape == (4, 16, 16)
        assert (
            np.abs(np.fft.rfft2(stored, norm="forward")[:, :5, :5] - expected.numpy()).max()
            < 1e-12
        )
    data.close()
    with h5py.File(folder / "block_000000-000001.h5") as file:
        assert list(file.attrs["channels"]) == ["vorticity", "moisture", "rain"]
        means = file["scalars/moisture_mean"][:, 1]
        assert means == pytest.approx(
            sim.fields(["moisture"])["moisture"][:2].mean((1, 2)).numpy()
        )
        variances = file["scalars/rain_variance"][:, 1]
        rain = sim.fields(["rain"])["rain"][:2]
        assert variances == pytest.approx(rain.var((1, 2), correction=0).numpy())
        assert file["series/moisture_mean"].shape == (2, 9)


@pytest.mark.parametrize("changes", [[], LAYERS, MEDIUM], ids=["clouds", "layers", "medium"])
def test_data_survive_a_crash_and_do_not_depend_on_blocks(make, monkeypatch, changes):
    expected = members_of(make("whole", *changes))
    assert len(expected) == 4
    assert members_of(make("single", "cluster.members_per_block=1", *changes)) == expected
    write = BlockWriter.write

    def fails(self, index, *rest):
        if index == 2:
            raise RuntimeError("pulled the plug")
        write(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "write", fails)
        make("crashed", *changes, expected=3)
    assert members_of(make("crashed", *changes, retry_failed=True)) == expected


@pytest.mark.mpi
def test_ranks_share_the_fields(make, mpirun, tmp_path):
    expected = members_of(make("clouds"))
    words = ["generate", tmp_path / "clouds.yaml", f"root={tmp_path}/ranks"]
    program = [sys.executable, "-m", "hpc_closure", *words, "cluster.domain_ranks=2"]
    done = mpirun(2, program)
    assert done.returncode == 0, done.stderr
    assert members_of(tmp_path / "ranks/clouds/data") == expected


def test_a_block_without_one_of_its_fields_is_refused(make):
    folder = make("clouds")
    with h5py.File(next(folder.glob("*.h5")), "a") as file:
        del file["t0_fields/rain"]
    with pytest.raises(ValueError, match="it has no t0_fields/rain"):
        DataSet(folder)


@pytest.mark.parametrize(
    "change, line",
    [
        (
            "generate.record.fields=[velocity]",
            "generate.record.fields is for equations of one fie",
        ),
        ("physics.births=often", "physics.births='often': Input should be 'random' or 'mean'"),
        ("physics.rain_time=0", "physics.rain_time=0: Input should be greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(make, change, line):
    with pytest.raises(ValueError, match=line):
        make("wrong", change)
