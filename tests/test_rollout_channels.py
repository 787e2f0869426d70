"""The coupled run of several fields whose closure reads earlier states and previous closures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import members_of

from hpc_closure.closure.artifact import load
from hpc_closure.data.reader import CoupledEnsemble, DataSet
from hpc_closure.data.writer import BlockWriter
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.evaluate.rows import read
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.rollout.block import coupled_run, start
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options

LAYERS = """
name: layers
root: {root}
seed: 7
physics: {{equation: two_layer_qg, deformation_radius: 0.5, mean_flow: [0.3, 0], viscosity: 2.0e-3,
          hyperviscosity: 1.0e-8, length: 6.283185307179586, forcing: {{kind: none}},
          noise: {{kind: ring, wavenumber: 2.5, width: 0.5, energy_rate: 0.1}},
          initial: {{kind: band, wavenumber: 4, energy: 0.3}}}}
generate: {{grid: 32, members: 8, t_end: 1.6, dt: 0.025, scheme: ab3, closure: subgrid,
           interval: 4, certificate: reported,
           record: {{start: 0.5, every: 0.1, grid: 16, precision: float64}}}}
model: {{preset: gaussian, regression_terms: linear,
        conditions: {{sensors: none, previous_states: 1, previous_closures: 2}}}}
train: {{grid: 16, window: [0.5, 1.6], split: [0.5, 0.25, 0.25], steps: 4, batch: 4,
        validate_every: 2, checkpoint_every: 2}}
reduced: {{step: 1}}
rollout: {{members: 2, initial_conditions: 2, t_start: 1.0, t_end: 1.4, every: 0.1, interval: 4}}
evaluate: {{lead_times: [0.2, 0.4], grids: [16], samples: 4, members: 2, formats: []}}
cluster: {{members_per_block: 4, device: cpu, threads: 1, checkpoint_every: 0.001}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The experiment, after `train`."""
    path = tmp_path_factory.mktemp("layers") / "layers.yaml"
    path.write_text(LAYERS.format(root=path.parent / "runs"))
    experiment = reading.load(path)
    for verb in (generate, train):
        assert verb.run(experiment, Options(verbosity=-1)) == 0
    return experiment


def rerun(trained, name, *changes):
    """The experiment under another name, with the data and the model of the first one."""
    path = Path(trained.root).parent / "layers.yaml"
    uses = [f"name={name}", "use.data=layers", "use.model=layers"]
    return reading.load(path, [*uses, *changes])


def test_a_killed_rollout_goes_on_to_the_same_bits(trained, monkeypatch):
    """Past states and previous closures of both layers are in the restart file."""
    whole = rerun(trained, "whole")
    assert rollout.run(whole, Options(verbosity=-1)) == 0
    expected = members_of(Run.of(whole).rollout)
    write = BlockWriter.write

    def fails(self, index, *rest):
        if index == 3:
            raise RuntimeError("pulled the plug")
        write(self, index, *rest)

    crashed = rerun(trained, "crashed")
    with monkeypatch.context() as patch:
        patch.setattr(BlockWriter, "write", fails)
        assert rollout.run(crashed, Options(verbosity=-1)) == 3
    assert rollout.run(crashed, Options(verbosity=-1, retry_failed=True)) == 0
    assert members_of(Run.of(crashed).rollout) == expected and expected


def test_a_member_reads_the_stored_closures_and_then_its_own(trained):
    """The first call reads the closures before the start, the second one its own draw."""
    closure = load(Run.of(trained).model)
    active = closure.model.library.active
    assert any(name.startswith("U_") for name in active), active
    data = DataSet(trained.folder / "data")
    run = coupled_run(trained, closure, data, range(4), "cpu")
    calls, sample = [], closure.sample_hat

    def record(request):
        drawn = sample(request)
        if request.method != "mean_gp":
            calls.append((request, drawn))
        return drawn

    for process in run.processes.values():
        process.closure = Recorded(closure, record)
    start(run, data, trained)
    run.advance(2)
    (first, drawn), (second, _) = calls
    assert first.previous.shape[:3] == (4, 2, 2)
    index, transform = data.time_index(1.0), run.simulations["model"].transform
    for row, (case, _) in enumerate(run.rows):
        for back in (1, 2):
            stored = data.read(case, index - back, "closure", 16).astype(np.float64)
            expected = transform.to_spectral(torch.from_numpy(stored)[None])[0]
            assert torch.allclose(first.previous[row, back - 1], expected, atol=1e-12)
    assert torch.equal(second.previous[:, 0], drawn)
    assert torch.equal(second.previous[:, 1], first.previous[:, 0])


class Recorded:
    """A closure whose calls are recorded."""

    def __init__(self, closure, sample_hat):
        self._closure, self.sample_hat = closure, sample_hat

    def __getattr__(self, name):
        return getattr(self._closure, name)


def test_the_report_scores_a_closure_with_memory_of_both_layers(trained):
    scored = rerun(trained, "scored")
    for verb in (rollout, evaluate):
        assert verb.run(scored, Options(verbosity=-1)) == 0
    stored = CoupledEnsemble(sorted(Run.of(scored).rollout.glob("*.h5")))
    assert np.isfinite(stored.read("model", stored.index(0.4))).all()
    rows = read(Run.of(scored).scores_csv)
    assert set(rows[rows.score == "crps"].channel) >= {"q_upper", "q_lower"}
    assert {"rescaled_share", "rescaled_share_expected"} <= set(rows.score)
