"""The verb: on whom each part is fitted and judged, and in which units losses are."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from hpc_closure.closure.composed.learned_score import PosteriorScore
from hpc_closure.closure.composed.model import CompositeClosure
from hpc_closure.closure.model import RolloutTraining
from hpc_closure.data.reader import DataSet
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.train import metrics, trainer
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options

# what train.split makes of them: of every four the second is for validation and the fourth for
# tests; of the others, the training members, every other one is held back
MEMBERS = 16
FIT, HOLD, VALID = {0, 4, 8, 12}, {2, 6, 10, 14}, {1, 5, 9, 13}

SENSORS = """
base: diffusion_64
name: sensors
root: {root}
generate: {{grid: 16, members: 16, t_end: 0.4, dt: 0.005, certificate: reported,
           record: {{start: 0.2, every: 0.02}}}}
model: {{sensors: learned, width: 8, modes: 4, layers: 1, mean_layers: 1}}
train: {{grid: 16, window: [0.2, 0.4], split: [0.5, 0.25, 0.25], steps: 80, batch: 16,
        lr: 5.0e-3, augment: false, engine: torch, validate_every: 20, patience: 9}}
rollout: {{t_start: 0.2, t_end: 0.4, every: 0.1, interval: 2}}
evaluate: {{lead_times: [0.1, 0.2], grids: [16], samples: 4, members: 4, formats: []}}
cluster: {{members_per_block: 16, device: cpu, threads: 1}}
"""

# with a learning rate that changes nothing: every loss is of the closure as it was before
SOLVER = """
base: subgrid_backscatter_quick
name: solver
root: {root}
physics: {{hyperviscosity: 1e-13, noise: {{wavenumber: 9}}, initial: {{energy: 0.01}}}}
generate: {{grid: 32, members: 16, t_end: 1.6, interval: 20,
           record: {{start: 0.4, every: 0.08, grid: 16}}}}
model: {{preset: gaussian, conditions: {{previous_closures: 1}}}}
train: {{split: [0.5, 0.25, 0.25], steps: 4, batch: 4, augment: false, engine: torch,
        rollout_training: {{steps: 24, batch: 8, horizon: [1, 4], lr: 1.0e-9, energy_weight: 0}}}}
reduced: {{step: 1}}
replicas: {{members: 0}}
rollout: {{members: 2, initial_conditions: 1, t_start: 0.8, t_end: 1.6, every: 0.08,
          interval: 20, rungs: []}}
evaluate: {{lead_times: [0.08], samples: 4, members: 4, formats: []}}
cluster: {{members_per_block: 16, device: cpu, threads: 1}}
"""


class Seen:
    """What the models of a training see, phase by phase.

    Args:
        data: members are known by their stored states, so that no label is believed.

    Attributes:
        begun: members that closed forms read.
        trained: members of the losses that have a gradient.
        judged: members of the losses without one, and of the samples.
        levels: (uniform, loss, sensors) of each sample that a learned score was trained on: the
            draw that chose its noise level, its loss less that of the spread, and 1 if it had
            sensors.
    """

    def __init__(self, data: DataSet):
        self.names = {
            np.ascontiguousarray(state).tobytes(): member
            for member in range(MEMBERS)
            for state in data.read(member, slice(None))
        }
        self.begun, self.trained, self.judged = (defaultdict(set) for _ in range(3))
        self.levels: list[tuple[float, float, int]] = []

    def note(self, into, phase, states) -> None:
        into[phase] |= {self.names[state.numpy().tobytes()] for state in states}

    def watch(self, patch) -> None:
        """Look on until the patch is undone."""
        begin, loss, sample = (
            getattr(CompositeClosure, name) for name in ("begin", "loss", "sample_batch")
        )
        score, spread, spreads = PosteriorScore.loss, PosteriorScore._spread_loss, []

        def watched_begin(model, phase, reader):
            batches = reader._batches

            def each():
                for batch in batches():
                    self.note(self.begun, phase, batch["state"])
                    yield batch

            reader._batches = each
            return begin(model, phase, reader)

        def watched_loss(model, batch, seed, step):
            into = self.trained if torch.is_grad_enabled() else self.judged
            self.note(into, model.phase.name, batch["state"])
            return loss(model, batch, seed, step)

        def watched_sample(model, request):
            self.note(self.judged, model.phase.name, request.state)
            return sample(model, request)

        def watched_spread(*arguments):
            spreads.append(spread(*arguments))
            return spreads[-1]

        def watched_score(part, frame, known, x0, z, uniform):
            found = score(part, frame, known, x0, z, uniform)
            if torch.is_grad_enabled():
                seeing = torch.zeros(len(x0))
                for one in known.readings:
                    seeing[one.rows] = 1
                each = torch.stack([uniform, found - spreads[-1], seeing], dim=1)
                self.levels += each.tolist()
            return found

        patch.setattr(CompositeClosure, "begin", watched_begin)
        patch.setattr(CompositeClosure, "loss", watched_loss)
        patch.setattr(CompositeClosure, "sample_batch", watched_sample)
        patch.setattr(PosteriorScore, "_spread_loss", watched_spread)
        patch.setattr(PosteriorScore, "loss", watched_score)


def training(folder, text):
    """What a training by the verbs saw, and the rows of its metrics."""
    path = folder / "experiment.yaml"
    path.write_text(text.format(root=folder / "runs"))
    experiment, quiet = reading.load(path), Options(verbosity=-1)
    assert generate.run(experiment, quiet) == 0
    run = Run.of(experiment)
    seen = Seen(DataSet(run.data))
    with pytest.MonkeyPatch.context() as patch:
        seen.watch(patch)
        patch.setattr(trainer, "ROW_EVERY", 1)
        assert train.run(experiment, quiet) == 0
    return seen, metrics.read(run.metrics)


@pytest.fixture(scope="module")
def sensors(tmp_path_factory):
    """A mean, a score that reads sensors, its spread, and the check that judges both."""
    return training(tmp_path_factory.mktemp("sensors"), SENSORS)


@pytest.fixture(scope="module")
def solver(tmp_path_factory):
    """A closure that is trained through the solver, and the size of its noise."""
    return training(tmp_path_factory.mktemp("solver"), SOLVER)


def test_gates_and_spread_are_judged_on_validation_members(sensors):
    seen, _ = sensors
    assert seen.begun == {"mean": FIT, "generator": HOLD, "check": VALID}
    assert seen.trained == {"mean": FIT, "generator": HOLD, "spread": VALID}
    # beside each other in the metrics; the second decides when it is enough, and what is kept
    assert seen.judged == {"mean": FIT | VALID, "generator": HOLD | VALID, "spread": VALID}


def test_noise_is_sized_on_members_that_the_training_has_not_seen(solver):
    seen, _ = solver
    both = FIT | HOLD
    assert seen.begun == {"mean": FIT, "law": HOLD, "trajectory": both, "noise": VALID}
    assert seen.trained == {"trajectory": both}
    assert seen.judged == {"trajectory": both | VALID}


def test_each_call_is_scored_in_units_of_its_own(solver):
    """However few calls a run has so far: of a model that does not change the loss is 1. The score
    of the first call is a fifth of that of the last, so with another's units it would not be."""
    _, rows = solver
    losses = np.array([row["loss"] for row in rows if row["phase"] == "trajectory"])
    through = RolloutTraining(24, 8, 0.0, (1, 4))
    calls = np.array([through.calls_at(step) for step in range(24)])
    assert set(calls) == {1, 2, 3, 4} and len(losses) == 24
    for number in (1, 2, 3, 4):
        assert losses[calls == number].mean() == pytest.approx(1.0, abs=0.3), number


@pytest.mark.parametrize("seeing", [0, 1], ids=["alone", "sensors"])
def test_each_noise_level_of_a_learned_score_counts_alike(sensors, seeing):
    """Once the score has learned how widely the closure spreads, nearly as a Gaussian law, its
    loss is 1 at every noise level, whether that is widely (alone) or not (with sensors)."""
    seen, _ = sensors
    late = np.array(seen.levels)[len(seen.levels) // 2 :]
    uniform, loss, _ = late[late[:, 2] == seeing].T
    # the first interval is of nothing but noise, the others are of more and more noise
    place = np.digitize(uniform, [0.25, 0.4, 0.55, 0.7, 0.85])
    losses = [loss[place == one].mean() for one in range(6)]
    assert losses == pytest.approx([1.0] * 6, abs=0.4)
