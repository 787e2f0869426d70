"""Flows in three dimensions from the true ensemble to the report: files, replicas, scores."""

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import four_verbs

from hpc_closure.data.forecasts import Forecaster
from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.data.samples import Past, TrainingSet
from hpc_closure.evaluate.report import figures
from hpc_closure.evaluate.scores.table import Scored
from hpc_closure.experiment.folder import Run
from hpc_closure.spectral.modes.grid import Grid, to_spectra
from hpc_closure.spectral.simulation import Simulation

SMALL = """
name: sides
root: {root}
seed: 12
physics: {{equation: navier_stokes_3d, length: 6.283185307179586, viscosity: 0.02,
          forcing: {{kind: power, power: 0.2, reach: 1.5}}, noise: {{kind: none}},
          initial: {{kind: band, wavenumber: 2, width: 1.0, energy: 0.3}}}}
generate: {{grid: 16, dt: 2.0e-2, scheme: etdrk4, members: 8, t_end: 2.0, interval: 5,
           closure: subgrid, certificate: reported,
           record: {{start: 0.5, every: 0.1, grid: 8, fields: [velocity]}}}}
model: {{preset: gaussian, conditions: {{sensors: none, previous_closures: 1}}}}
train: {{split: [0.5, 0.25, 0.25], steps: 1, batch: 4}}
reduced: {{step: 1}}
replicas: {{members: 4, spinup: 0.2}}
rollout: {{members: 3, initial_conditions: 2, t_start: 1.0, t_end: 1.6, every: 0.2, interval: 5,
          last_closures: moved, baselines: [none], rungs: [{{grid: 12, start: moved, step: 1}}]}}
evaluate: {{lead_times: [0.2, 0.6], samples: 6, members: 3, formats: [png]}}
cluster: {{members_per_block: 8, device: cpu, threads: 1}}
"""
GRID = Grid(8, 6.283185307179586, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    experiment = four_verbs(tmp_path_factory.mktemp("sides"), SMALL)
    return experiment, Run.of(experiment)


def divergence(fields):
    """Largest divergence of velocities (..., 3, n, n, n), over their largest gradient."""
    spectra = to_spectra(torch.as_tensor(fields).double(), GRID.mode_counts)
    parts = [k * u for k, u in zip(GRID.k, spectra.unbind(-4))]
    return float(sum(parts).abs().max() / torch.stack(parts).abs().max())


def test_files_have_the_layout_of_the_well(run):
    with h5py.File(sorted(run[1].data.glob("*.h5"))[0]) as file:
        assert file.attrs["n_spatial_dims"] == 3 and file.attrs["n_trajectories"] == 8
        assert list(file["dimensions"].attrs["spatial_dims"]) == ["x", "y", "z"]
        names = list(file["t0_fields"].attrs["field_names"])
        assert names == ["u", "v", "w", "closure_u", "closure_v", "closure_w"]
        for name in names:
            values = file[f"t0_fields/{name}"]
            assert values.shape == (8, 16, 8, 8, 8) and values.dtype == np.float32
            assert list(values.attrs["dim_varying"]) == [True, True, True]
        for side in "xyz":
            assert len(file[f"dimensions/{side}"]) == 8
            boundary = file[f"boundary_conditions/{side}_periodic"]
            assert list(boundary.attrs["associated_dims"]) == [side]
            assert boundary["mask"].shape == (8,)


def test_velocity_is_one_vector_that_takes_no_room(run):
    path = sorted(run[1].data.glob("*.h5"))[0]
    with h5py.File(path) as file:
        assert list(file["t1_fields"].attrs["field_names"]) == ["velocity"]
        velocity = file["t1_fields/velocity"]
        assert velocity.is_virtual and list(velocity.attrs["dim_varying"]) == [True, True, True]
        parts = [file[f"t0_fields/{name}"][:] for name in "uvw"]
        assert np.array_equal(velocity[:], np.stack(parts, -1))


def test_xarray_opens_the_file(run):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("netCDF4")
    path = sorted(run[1].data.glob("*.h5"))[0]
    with h5py.File(path) as file:
        expected = file["t0_fields/w"][:]
    with xarray.open_dataset(path, group="t0_fields", engine="netcdf4") as opened:
        assert np.array_equal(opened["w"].values, expected)
    with xarray.open_dataset(path, group="t1_fields", engine="netcdf4") as opened:
        assert np.array_equal(opened["velocity"].values[..., 2], expected)


def test_samples_and_forecasts_have_the_shape_of_the_state(run):
    experiment, folder = run
    data = DataSet(folder.data)
    assert data.grid == 8 and data.dimensions == 3
    assert data.read(2, slice(1, 4)).shape == (3, 3, 8, 8, 8)
    strided = data.read(2, 1, grid=4)
    assert np.array_equal(strided, data.read(2, 1)[:, ::2, ::2, ::2])
    samples = TrainingSet(data, [0, 1], range(2, 6), past=Past(0, 1))
    batch = samples.gather(np.array([0, 5]))
    assert batch["state"].shape == (2, 3, 8, 8, 8) and batch["previous"].shape[:3] == (2, 1, 3)
    problem = experiment.problem.replace(grid=8)
    after = Forecaster(problem, 0.1).after(data.read(2, slice(1, 3)))
    own = Simulation(problem, range(2), 0)
    start = own.transform.to_spectral(torch.from_numpy(data.read(2, slice(1, 3))).double())
    own.load_state(0, start).advance(5)
    assert np.array_equal(after, own.transform.to_physical(own.state).numpy())


def test_replicas_share_the_resolved_past_and_differ_afterwards(run):
    folder = run[1]
    replicas = CoupledEnsemble(sorted(folder.folder("replicas").glob("block_*.h5")))
    data = DataSet(folder.data)
    for case in replicas.cases:
        for lead in (-0.2, 0.0):
            begin = replicas.read_case("model", case, replicas.index(lead))
            truth = data.read(case, data.time_index(1.0 + lead))
            assert begin.shape == (4, 3, 8, 8, 8)
            assert all(np.allclose(one, truth, atol=1e-6) for one in begin)
        closures = replicas.read_case("closure", case, replicas.index(0.0))
        assert closures.std(0).mean() > 1e-3 and divergence(closures) < 1e-5
        later = replicas.read_case("model", case, replicas.index(0.6))
        assert later.std(0).mean() > 1e-3 and divergence(later) < 1e-5
        whole = replicas.read_whole(case, 1.0)
        assert whole.shape == (3, 16, 16, 16)
        coarse = to_spectra(torch.from_numpy(whole).double(), GRID.mode_counts)
        stored = to_spectra(torch.from_numpy(truth).double(), GRID.mode_counts)
        assert torch.allclose(coarse, stored, atol=1e-7)


def test_coupled_runs_begin_as_they_should(run):
    ensemble = CoupledEnsemble(sorted(run[1].rollout.glob("block_*.h5")))
    truth = ensemble.read("truth", 0)[0]
    for name in ("model", "none", "rung_12_moved"):
        assert np.allclose(ensemble.read(name, 0), truth, atol=1e-5), name
        last = ensemble.read(name, len(ensemble.times) - 1)
        assert np.isfinite(last).all() and divergence(last) < 1e-5
    last = ensemble.read("rung_12_moved", len(ensemble.times) - 1)
    assert last.shape == (3, 2, 3, 8, 8, 8) and last.std(0).mean() > 1e-4


def test_every_score_of_an_ensemble_has_a_row(run):
    rows = pd.read_csv(run[1].scores_csv)
    names = {"crps", "energy_score", "patch_max_crps", "field_max_crps", "patch_energy_score"}
    names |= {"relative_error", "spread_ratio", "spread_skill"}
    for stage in ("generated", "coupled"):
        chosen = rows[(rows.stage == stage) & (rows.method == "model")]
        for channel in ("u", "v", "w"):
            of_channel = chosen[chosen.channel == channel]
            assert names <= set(of_channel.score), stage
            shells = set(of_channel[of_channel.score == "spread_ratio"]["shell"].dropna())
            assert {1, 2, 3} <= shells <= {0, 1, 2, 3}
        assert "energy_score_channels_ratio" in set(chosen.score)
    coupled = rows[(rows.stage == "coupled") & (rows.method == "model")]
    assert {"u-v", "u-w", "v-w"} <= set(coupled.channel[coupled.score == "coherence_distance"])
    assert {path.stem for path in run[1].evaluate.glob("figures/state_subgrid_*.png")} == {
        "state_subgrid_u",
        "state_subgrid_v",
        "state_subgrid_w",
    }


def test_the_figure_of_three_sides_shows_a_plane():
    scored, cube = Scored(), torch.randn(4, 6, 6, 6, dtype=torch.float64)
    scored.examples["truth"] = cube[0]
    scored.keep_example("model", cube)
    figure = figures.fields(scored.examples)
    shown = [axis.images[0].get_array() for axis in figure.axes[:2]]
    assert np.allclose(shown[0], cube[0, :, :, 0].T) and np.allclose(shown[1], shown[0])
