"""The study of docs/uncertainty_study.md, small: the preset, the answer, a larger ensemble."""

import csv
import re

import h5py
import numpy as np
import pytest
from scipy.stats import binomtest

from hpc_closure.evaluate import verb as evaluate
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.generate import verb as generate
from hpc_closure.rollout import verb as rollout
from hpc_closure.train import verb as train
from hpc_closure.work import hdf5
from hpc_closure.work.options import Options

TWIN = """
base: uncertainty_study
name: twin
root: {root}
generate: {{grid: 16, members: 8, t_end: 0.4, dt: 0.005, interval: 2, certificate: reported,
           record: {{start: 0.2, every: 0.02}}}}
train: {{grid: 16, window: [0.2, 0.4], split: [0.5, 0.25, 0.25], steps: 4, batch: 4,
        validate_every: 2, checkpoint_every: 2}}
rollout: {{members: 20, t_start: 0.2, t_end: 0.4, every: 0.1, interval: 2}}
evaluate: {{lead_times: [0.1, 0.2], grids: [16], samples: 4, members: 4, sensors: [],
           formats: [],
           event: {{lead_time: 0.2}}}}
cluster: {{members_per_block: 10, device: cpu}}
"""


def enstrophies(run, field="vorticity"):
    """Enstrophy of every member at the last time, straight from the files."""
    found = []
    for path in sorted(run.rollout.glob("block_*.h5")):
        with h5py.File(path) as file:
            last = file[f"t0_fields/{field}"][:, -1].astype(float)
        found += list(0.5 * (last**2).mean((-2, -1)))
    return np.array(found)


def answer(run, method):
    """{score: (value, low, high)} of the event."""
    with open(run.root / "evaluate/scores.csv", newline="") as file:
        return {
            row["score"]: tuple(float(row[key] or "nan") for key in ("value", "low", "high"))
            for row in csv.DictReader(file)
            if row["method"] == method and row["score"] in ("probability", "members_needed")
        }


def test_twin(tmp_path):
    path = tmp_path / "twin.yaml"
    path.write_text(TWIN.format(root=tmp_path))
    experiment = reading.load(path)
    run = Run.of(experiment)
    for verb in (generate, train, rollout):
        assert verb.run(experiment, Options(verbosity=-1)) == 0
    values = enstrophies(run)
    assert len(values) == 20 and len(set(values)) == 20
    above = float(np.sort(values)[13:15].mean())  # 6 of 20
    threshold = f"evaluate.event.threshold={above!r}"
    assert evaluate.run(reading.load(path, [threshold]), Options(verbosity=-1)) == 0
    expected = binomtest(6, 20).proportion_ci(method="wilson")
    few = answer(run, "model")
    assert few["probability"] == pytest.approx((0.3, expected.low, expected.high))
    # the least favourable share in the interval is 1/2, the tolerance that of the preset
    assert 0.5 < expected.high and few["members_needed"][0] == 1068
    share = (enstrophies(run, "oracle") > above).mean()
    assert answer(run, "oracle")["probability"][0] == pytest.approx(share)
    text = re.sub(r"<[^>]+>", " ", run.report.read_text())
    assert "Event of evaluate.event" in text and "1068 members estimate it" in text

    # more members: those that are there stay
    kept = {path.name: hdf5.sha256_datasets(path) for path in run.rollout.glob("*.h5")}
    larger = reading.load(path, [threshold, "rollout.members=40"])
    for verb in (rollout, evaluate):
        assert verb.run(larger, Options(verbosity=-1)) == 0
    now = {path.name: hdf5.sha256_datasets(path) for path in run.rollout.glob("*.h5")}
    assert len(now) == 4 and {name: now[name] for name in kept} == kept
    share, low, high = answer(run, "model")["probability"]
    assert share == pytest.approx((enstrophies(run) > above).mean())
    assert high - low < few["probability"][2] - few["probability"][1]


def test_the_preset_is_the_study_of_the_page():
    experiment = reading.load("uncertainty_study")
    event, horizon = experiment.evaluate.event, experiment.rollout
    assert experiment.rollout.members == 1000
    assert event.lead_time == horizon.t_end - horizon.t_start
