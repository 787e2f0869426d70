"""DNS blocks of three-dimensional flow: equal bits for any members, blocks, restarts and ranks."""

import sys

import h5py
import numpy as np
import pytest
from conftest import members_of

from hpc_closure.data.reader import DataSet
from hpc_closure.data.writer import BlockWriter
from hpc_closure.experiment import reading
from hpc_closure.experiment.choices import Choices
from hpc_closure.generate import verb as generate
from hpc_closure.generate.certificate import certify
from hpc_closure.spectral.diagnostics import FLOW_SERIES, diagnostics_of
from hpc_closure.spectral.problem import Problem
from hpc_closure.spectral.simulation import Simulation
from hpc_closure.work.options import Options

BOX = """
base: diffusion_64
name: box
root: {root}
seed: 7
physics: {{equation: navier_stokes_3d, length: 6.283185307179586, viscosity: 0.1,
          forcing: {{kind: power, power: 1.0}},
          noise: {{kind: ornstein_uhlenbeck, wavenumber: 1.5, width: 0.5, rms: 0.3,
                  correlation_time: 0.3}},
          initial: {{kind: band, wavenumber: 2, width: 1, energy: 1.0}}}}
generate: {{grid: 16, members: 4, t_end: 0.5, dt: 0.05, scheme: rk4, certificate: reported,
           closure: none,
           record: {{start: 0.1, every: 0.2, grid: 12, series_every: 0.1, precision: float64,
                    spectra: [energy, energy_transfer]}}}}
cluster: {{members_per_block: 2, device: cpu, threads: 1, checkpoint_every: 0.001}}
"""


@pytest.fixture
def make(tmp_path):
    """Run `generate` in this process: ``make("name", *changes)``; its data folder."""

    def run(name, *changes, expected=0, **options):
        path = tmp_path / "box.yaml"
        path.write_text(BOX.format(root=tmp_path / "runs"))
        experiment = reading.load(path, [f"name={name}", *changes])
        assert generate.run(experiment, Options(verbosity=-1, **options)) == expected
        return experiment.folder / "data"

    return run


def test_the_velocities_are_stored(make, tmp_path):
    folder = make("box")
    problem = reading.load(tmp_path / "box.yaml").problem
    sim = Simulation(problem, range(4), 7).initialise().advance(6)
    data = DataSet(folder)
    assert data.channels == ("u", "v", "w") and data.dimensions == 3
    stored = np.stack([data.read(member, 1) for member in range(4)])
    assert stored.shape == (4, 3, 12, 12, 12)
    spectra = np.fft.rfftn(stored, axes=(2, 3, 4), norm="forward")[..., :4]
    kept = [0, 1, 2, 3, -3, -2, -1]
    expected = sim.state.numpy()[:, :, kept][..., kept, :4]
    assert abs(spectra[:, :, kept][..., kept, :] - expected).max() < 1e-14
    data.close()
    with h5py.File(folder / "block_000000-000001.h5") as file:
        assert list(file.attrs["channels"]) == ["u", "v", "w"]
        assert set(file["scalars"]) == set(FLOW_SERIES)
        energy = 0.5 * (sim.fields(["velocity"])["velocity"][:2] ** 2).sum(1).mean((1, 2, 3))
        np.testing.assert_allclose(file["scalars/energy"][:, 1], energy)
        spectrum = file["series/energy_spectrum"][:, 3].sum(-1)
        np.testing.assert_allclose(spectrum, file["series/energy"][:, 3])
        transfer = file["series/energy_transfer_spectrum"][:]
        assert abs(transfer.sum(-1)).max() < 1e-14 * abs(transfer).max() * 20


def test_the_certificate_of_a_box():
    problem = Problem(
        equation="navier_stokes_3d", grid=16, length=3.0, viscosity=0.02, dt=0.02, scheme="rk4"
    )
    sim = Simulation(problem, [0, 1], 3).initialise().advance(5)
    certificate = certify(sim, steps=2)
    assert certificate.limits["cfl"] == 2.0 and certificate.figures["budget"] is None
    dissipation = diagnostics_of(sim).measure()["energy_dissipation"].max()
    smallest = (0.02**3 / dissipation) ** 0.25  # Kolmogorov's length
    assert certificate.figures["kmax_eta"] == pytest.approx(5 * 2 * np.pi / 3.0 * smallest)
    assert certify(sim, steps=2, limits={"cfl": 1e-3}).limits["cfl"] == 1e-3


def test_blocks_and_restarts_do_not_change_bits(make, monkeypatch):
    expected = members_of(make("box"))
    assert members_of(make("whole", "cluster.members_per_block=4")) == expected
    write, written = BlockWriter.write, []

    def fails(self, *arguments, **named):
        written.append(1)
        if len(written) == 3:
            raise OSError("the disk is full")
        return write(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "write", fails)
        make("crashed", expected=3)
    assert members_of(make("crashed", retry_failed=True)) == expected


SUBGRID = """
name: subgrid
root: {root}
seed: 7
physics: {{equation: navier_stokes_3d, length: 6.283185307179586, viscosity: 0.05,
          forcing: {{kind: power}}, initial: {{kind: band, wavenumber: 2, width: 1, energy: 1.5}}}}
generate: {{grid: 16, members: 8, t_end: 6.2, dt: 0.025, scheme: rk4, certificate: reported,
           closure: subgrid, interval: 16, record: {{start: 1.0, every: 0.4, grid: 12}}}}
model: {{preset: gaussian, sensors: kriging, conditions: {{sensors: none}}}}
reduced: {{step: auto}}
train: {{split: [0.5, 0.25, 0.25]}}
replicas: {{members: 3}}
pilot: {{initial_conditions: 2, members: 3, spinup: 1.6}}
rollout: {{initial_conditions: 2, members: 4, interval: 16, t_start: 2.6, t_end: 4.2, every: 0.4}}
evaluate: {{lead_times: [0.4, 0.8]}}
cluster: {{members_per_block: 4, device: cpu, threads: 1}}
"""


@pytest.mark.slow
def test_the_pilot_finds_the_long_step_of_a_coarse_grid(tmp_path):
    path = tmp_path / "subgrid.yaml"
    path.write_text(SUBGRID.format(root=tmp_path / "runs"))
    experiment = reading.load(path)
    assert generate.run(experiment, Options(verbosity=-1)) == 0
    choices = Choices(experiment)
    assert choices.stride == 8  # a step of 0.2 on 12^3
    assert choices.known["reduced"]["cfl"] > 2
    data = DataSet(experiment.folder / "data")
    closure = data.read(0, 0, "closure")
    assert closure.shape == (3, 12, 12, 12) and abs(closure).max() > 0
    spectra = np.fft.rfftn(closure, axes=(1, 2, 3), norm="forward")
    k = np.meshgrid(*[np.fft.fftfreq(12, 1 / 12)] * 3, indexing="ij", sparse=True)
    divergence = sum(wave[..., :7] * part for wave, part in zip(k, spectra))
    assert abs(divergence).max() < 1e-6 * abs(spectra).max()  # single precision
    data.close()


@pytest.mark.mpi
@pytest.mark.parametrize("ranks, domain_ranks", [(2, 1), (2, 2), (4, 2)])
def test_ranks_do_not_change_bits(make, mpirun, tmp_path, ranks, domain_ranks):
    expected = members_of(make("box"))
    words = ["generate", tmp_path / "box.yaml", f"root={tmp_path}/ranks"]
    program = [sys.executable, "-m", "hpc_closure", *words]
    done = mpirun(ranks, [*program, f"cluster.domain_ranks={domain_ranks}"])
    assert done.returncode == 0, done.stderr
    assert members_of(tmp_path / "ranks/box/data") == expected


def test_a_dry_run_states_points_and_memory(make, capsys):
    unequal = ["generate.grid=[16,12,8]", "generate.record.grid=null", "physics.noise.kind=none"]
    folder = make("plan", *unequal, dry_run=True)
    plan = capsys.readouterr().out
    assert "members to compute: 4, 10 steps each at 16 x 12 x 8" in plan
    assert "MiB per member" in plan and not folder.exists()


@pytest.mark.parametrize(
    "change, line",
    [
        ("generate.record.fields=[streamfunction]", "generate.record.fields is for equations of"),
        ("generate.closure=diffusion", "generate.closure=diffusion is for equations of one field"),
        ("cluster.domain_ranks=13", "cluster.domain_ranks: 13 domain ranks are not a product of"),
        ("physics.forcing.reach=0.5", "physics.forcing.reach=0.5: Input should be greater than"),
        ("physics.forcing.kind=published", "physics.forcing.kind=published is for flows in two"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(make, change, line):
    with pytest.raises(ValueError, match=line):
        make("wrong", change)
