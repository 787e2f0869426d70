"""The verb: what its members draw where a draw is held longer than in the training."""

import pytest

from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.train import verb as train
from hpc_closure.work.options import Options

# closures of one step are learned, and each draw of the coupled run, which is one call long, is
# held for four; the oracle is the exact law given the same sensors
HELD = """
base: diffusion_64
name: held
root: {root}
generate: {{grid: 16, members: 64, t_end: 0.4, dt: 0.005, interval: 1, certificate: reported,
           record: {{start: 0.2, every: 0.02}}}}
model: {{preset: gaussian, width: null, modes: null, layers: null}}
train: {{grid: 16, window: [0.2, 0.4], split: [0.5, 0.25, 0.25], steps: 4, batch: 4}}
rollout: {{members: 24, initial_conditions: 16, t_start: 0.2, t_end: 0.22, every: 0.02,
          interval: 4,
          sensors: {{number: 8, noise: 0.3}}}}
evaluate: {{lead_times: [0.02], grids: [16], samples: 4, members: 4, formats: []}}
cluster: {{members_per_block: 64, device: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def after_one_call(tmp_path_factory):
    """(members, starts, n, n) of each ensemble, and the truth, at the end."""
    path = tmp_path_factory.mktemp("held") / "held.yaml"
    path.write_text(HELD.format(root=path.parent / "runs"))
    experiment = reading.load(path)
    for verb in (generate, train, rollout):
        assert verb.run(experiment, Options(verbosity=-1)) == 0
    stored = CoupledEnsemble(sorted(Run.of(experiment).rollout.glob("*.h5")))
    return {name: stored.read(name, stored.index(0.02)) for name in ("model", "oracle", "truth")}


def spread(ensemble):
    return ensemble.var(0, ddof=1).mean() ** 0.5


def test_errors_of_sensors_are_in_units_of_a_draw_that_is_held(after_one_call):
    """Over four steps the closure has half of the noise; the sensors' error, which is a share of
    what they read, is twice as large beside the law of one step."""
    model, oracle = after_one_call["model"], after_one_call["oracle"]
    assert spread(model) == pytest.approx(spread(oracle), rel=0.06)


def test_the_ensemble_of_a_noisy_sensor_spreads_as_it_errs(after_one_call):
    (truth,) = after_one_call["truth"]
    for name in ("model", "oracle"):
        ensemble = after_one_call[name]
        error = ((ensemble.mean(0) - truth) ** 2).mean() ** 0.5
        expected = (1 + 1 / len(ensemble)) ** 0.5 * spread(ensemble)
        assert error == pytest.approx(expected, rel=0.15), name
