"""States of several fields: the scores of each channel are those of its field alone."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import four_verbs
from pandas import isna
from test_evaluate_pointwise import normal, stationary

from hpc_closure.closure.fields.losses import energy_score
from hpc_closure.data.reader import CoupledEnsemble
from hpc_closure.evaluate import compare, methods
from hpc_closure.evaluate import verb as evaluate
from hpc_closure.evaluate.context import Inputs
from hpc_closure.evaluate.methods import Methods
from hpc_closure.evaluate.report.page import Report
from hpc_closure.evaluate.report.summary import groups, heading, headline
from hpc_closure.evaluate.rows import find, frame, read, select
from hpc_closure.evaluate.scores.generated.budget import Origin
from hpc_closure.evaluate.scores.joint import channels
from hpc_closure.evaluate.scores.pointwise import relative_error
from hpc_closure.evaluate.scores.table import Labels, Scored
from hpc_closure.evaluate.stages import coupled, generated
from hpc_closure.experiment import reading
from hpc_closure.experiment.folder import Run
from hpc_closure.work.options import Options

NAMES = ("upper", "lower")
PLAIN = Labels(
    {"closure": "subgrid", "sensors": "none", "interval": 1}, {"model": {"evaluations": 10}}
)
LABELS = Labels(PLAIN.shared, PLAIN.single, channels=NAMES)
TIMED = ("cost_ms", "cost_us", "cost_ratio")
MEMBERS, SAMPLES, SIZE, UNIT = 8, 40, 16, 50.0  # the second channel has another unit


def pairs(*shape, seed, correlation=0.0):
    """Fields (..., 2, n, n) of correlated channels, the second UNIT times the first."""
    first, second = (
        stationary(math.prod(shape), SIZE, seed=seed + part).unflatten(0, shape) for part in (0, 1)
    )
    second = correlation * first + math.sqrt(1 - correlation**2) * second
    return torch.stack([first, UNIT * second], -3)


@pytest.fixture(scope="module")
def case():
    """Truth of correlated channels, and two ensembles: with their correlation, and without."""
    truth = pairs(SAMPLES, seed=1, correlation=0.9)
    ensembles = {
        "model": pairs(MEMBERS, SAMPLES, seed=3),
        "oracle": pairs(MEMBERS, SAMPLES, seed=5, correlation=0.9),
        "none": torch.zeros_like(truth)[None],
    }
    return truth, ensembles, pairs(60, seed=7, correlation=0.9)


def of_channel(rows, channel):
    """The rows of a channel, or of a single field, without their costs and name."""
    here = select(rows, channel=channel)
    here = here[~here["score"].isin(TIMED)].drop(columns="channel")
    return here.reset_index(drop=True)


def sampler(ensemble):
    return lambda indices, members: ensemble[:, indices]


def test_generated_scores_of_a_channel_are_those_of_its_field(case):
    truth, ensembles, reference = case
    samplers = {name: sampler(part) for name, part in ensembles.items()}
    origin = Origin(torch.arange(SAMPLES) // 5, reference=reference)
    found = generated.score_channels(
        truth, samplers, LABELS, members=MEMBERS, origin=origin, seed=4
    )
    assert list(found) == [*NAMES, ""]
    for place, name in enumerate(NAMES):
        alone = generated.score_generated(
            truth[:, place],
            {method: sampler(part[:, :, place]) for method, part in ensembles.items()},
            PLAIN,
            members=MEMBERS,
            origin=Origin(origin.trajectories, reference=reference[:, place]),
            seed=4,
        )
        assert of_channel(found[name].rows, name).equals(of_channel(alone.rows, None))
        assert set(found[name].rows["channel"]) == {name} and len(alone.rows) > 80
        assert set(found[name].examples) == {"truth", *ensembles}
    together = found[""].rows
    assert together["channel"].isna().all()
    assert set(together["score"]) == {*(s.name for s in channels.SCORES), "cost_ms"}


def test_coupled_scores_of_a_channel_are_those_of_its_field(case):
    truth, ensembles, _ = case
    truth = truth.unflatten(0, (10, 4))  # cases and lead times
    ensembles = {name: part.unflatten(1, (10, 4)) for name, part in ensembles.items()}
    costs = {"model": 3.0, "none": 1.0}
    sources = {**ensembles, "model": lambda index: ensembles["model"][:, :, index]}
    leads = [1, 2, 3, 4]
    found = coupled.score_channels(truth, sources, leads, LABELS, costs=costs, seed=4)
    assert list(found) == [*NAMES, ""]
    for place, name in enumerate(NAMES):
        alone = coupled.score_coupled(
            truth[:, :, place],
            {method: part[:, :, :, place] for method, part in ensembles.items()},
            leads,
            PLAIN,
            costs=costs,
            seed=4,
        )
        rows = found[name].rows
        returns = rows["score"].str.startswith("return_time")  # of several fields only
        rows = rows[~returns].reset_index(drop=True)
        assert of_channel(rows, name).equals(of_channel(alone.rows, None)) and returns.any()
        assert len(alone.rows) > 300
    together = found[""].rows
    joint = select(together, score="energy_score_channels")
    assert set(joint["lead_time"]) == {1.0, 2.0, 3.0, 4.0} and set(joint["method"]) == set(sources)
    assert find(together, method="model", score="cost_ratio").value == 3
    with pytest.raises(ValueError, match=r"expected \(members, 10, 2, 16, 16\) at each lead"):
        coupled.score_channels(truth, {"model": ensembles["model"][..., :8]}, leads, LABELS)


def test_one_case_of_several_channels_is_scored(case):
    truth, ensembles, _ = case
    one = {"model": ensembles["model"][:, :3]}
    found = coupled.score_channels(truth[:3], one, [1, 2, 3], LABELS)
    row = find(found["lower"].rows, score="crps", lead_time=2.0)
    assert row.samples == 1 and isna(row.low)


# ---- all channels together ----------------------------------------------------------------------


def test_the_joint_score_is_the_energy_score_of_fields_in_units_of_their_deviation(case):
    truth, ensembles, reference = case
    scale = channels.scales(reference)
    assert float(scale[1] / scale[0]) == pytest.approx(UNIT, rel=0.05)
    samplers = {name: sampler(part) for name, part in ensembles.items()}
    found = generated.score_channels(
        truth, samplers, LABELS, members=MEMBERS, origin=Origin(reference=reference)
    )
    unit = scale[:, None, None]
    for method, ensemble in ensembles.items():
        expected = energy_score(ensemble / unit, truth / unit).mean()
        row = find(found[""].rows, method=method, score="energy_score_channels")
        assert row.value == pytest.approx(float(expected), rel=1e-10)
        assert row.members == len(ensemble) and row.samples == SAMPLES
    # another unit of the second channel changes nothing
    other = torch.tensor([1.0, 1e-3]).double()[:, None, None]
    changed = generated.score_channels(
        other * truth,
        {name: sampler(other * part) for name, part in ensembles.items()},
        LABELS,
        members=MEMBERS,
        origin=Origin(reference=other * reference),
    )
    for row in select(found[""].rows, score="energy_score_channels").itertuples():
        again = find(changed[""].rows, method=row.method, score=row.score)
        assert again.value == pytest.approx(row.value, rel=1e-9)


def test_only_the_joint_score_sees_that_channels_are_independent():
    """Two channels of few modes that vary together, against the same channels drawn apart."""
    samples, members = 400, 16
    waves = torch.linspace(0, 2 * math.pi, 9).double()[:-1].cos().expand(8, 8)
    amplitude = normal(members + 1, samples, 1)
    fields = amplitude[..., None, None] * waves
    right = torch.cat([fields, fields], -3)
    apart = torch.stack(
        [right[1:, :, 0], normal(members, samples, seed=5)[..., None, None] * waves], -3
    )
    samplers = {"model": sampler(apart), "oracle": sampler(right[1:])}
    found = generated.score_channels(right[0], samplers, LABELS, members=members)
    for name in NAMES:
        row = find(found[name].rows, method="model", score="crps_ratio", shell=None)
        assert row.value == pytest.approx(1, abs=0.06)
    row = find(found[""].rows, method="model", score="energy_score_channels_ratio")
    assert row.low > 1.02


def test_a_lost_member_of_one_channel_is_an_infinite_joint_score(case):
    truth, ensembles, _ = case
    lost = ensembles["model"].clone()
    lost[2, 7, 1, 0, 0] = math.nan
    samplers = {"model": sampler(lost), "oracle": sampler(ensembles["oracle"])}
    found = generated.score_channels(truth, samplers, LABELS, members=MEMBERS)
    for score in channels.SCORES:
        assert find(found[""].rows, method="model", score=score.name).value == math.inf
    assert find(found["upper"].rows, method="model", score="crps").value < math.inf
    assert find(found["lower"].rows, method="model", score="crps").value == math.inf


def test_a_channel_without_variance_has_the_scale_one():
    fields = pairs(5, seed=1)
    fields[:, 1] = 0
    assert channels.scales(fields)[1] == 1


# ---- a run of two layers ------------------------------------------------------------------------

TWO_LAYERS = """
name: layers
root: {root}
seed: 7
physics: {{equation: two_layer_qg, deformation_radius: 0.5, mean_flow: [0.3, 0], viscosity: 2.0e-3,
          hyperviscosity: 1.0e-8, length: 6.283185307179586, forcing: {{kind: none}},
          noise: {{kind: ring, wavenumber: 2.5, width: 0.5, energy_rate: 0.1}},
          initial: {{kind: band, wavenumber: 4, energy: 0.3}}}}
generate: {{grid: 32, members: 8, t_end: 1.6, dt: 0.025, scheme: ab3, closure: subgrid,
           interval: 4, certificate: reported, record: {{start: 0.5, every: 0.1, grid: 16}}}}
model: {{preset: gaussian, regression_terms: linear, conditions: {{sensors: none}}}}
train: {{grid: 16, window: [0.5, 1.6], split: [0.5, 0.25, 0.25], steps: 4, batch: 4,
        validate_every: 2, checkpoint_every: 2}}
reduced: {{step: 1}}
replicas: {{members: 4, spinup: 0.2}}
rollout: {{members: 4, initial_conditions: 2, t_start: 1.0, t_end: 1.4, every: 0.2, interval: 4}}
evaluate: {{lead_times: [0.2, 0.4], grids: [16], samples: 4, members: 4, formats: [png]}}
cluster: {{members_per_block: 4, device: cpu}}
"""
LAYERS = ("q_upper", "q_lower")


def session_of(experiment):
    stop = SimpleNamespace(check=lambda: None)
    return SimpleNamespace(run=Run.of(experiment), stop=stop, device="cpu")


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    return four_verbs(tmp_path_factory.mktemp("layers"), TWO_LAYERS)


def test_a_run_of_two_layers_has_rows_of_each(layers):
    rows = read(Run.of(layers).scores_csv)
    methods = {
        "generated": {"model", "mean_gp", "none", "climatology", "oracle"},
        "coupled": {"model", "none", "climatology", "oracle"},
    }
    for stage, names in methods.items():
        for layer in LAYERS:
            here = select(rows, stage=stage, channel=layer)
            assert set(here["method"]) == names and set(here["sensors"]) == {"none"}
            for score in ("crps", "spread_skill", "patch_max_crps", "crps_ratio"):
                assert "model" in set(select(here, score=score, shell=None)["method"]), score
        joint = select(rows, stage=stage, channel=None)
        assert set(select(joint, score="energy_score_channels_ratio")["method"]) == names
    runs = CoupledEnsemble(sorted(Run.of(layers).rollout.glob("*.h5")))
    ensemble = torch.from_numpy(runs.read("model", runs.index(0.4))).double()
    truth = Inputs(layers, session_of(layers)).replicas
    true = torch.from_numpy(truth.read("model", truth.index(0.4)))[0].double()
    for place, layer in enumerate(LAYERS):
        expected = relative_error(ensemble[:, :, place], true[:, place]).mean()
        found = find(
            select(rows, stage="coupled", score="relative_error", shell=None),
            method="model",
            channel=layer,
            lead_time=0.4,
        )
        assert found.value == pytest.approx(float(expected), rel=1e-6)


def test_samples_of_a_batch_have_their_channels(layers, monkeypatch):
    inputs = Inputs(layers, session_of(layers))
    snapshots = inputs.snapshots(16)
    found = Methods(inputs, snapshots, None, inputs.climatology(16))
    assert found.law is None
    for name, sample in found.samplers.items():
        drawn = sample(torch.tensor([1, 0]), 3)
        assert drawn.shape[1:] == (2, 2, 16, 16), name
    together = found.samplers["model"](torch.tensor([1, 0]), 3)
    monkeypatch.setitem(methods.BATCH_VALUES, "cpu", 1)
    alone = found.samplers["model"](torch.tensor([1, 0]), 3)
    assert torch.allclose(together, alone, atol=1e-5 * float(alone.abs().max()))
    # each channel has its own scale: the upper is fifty times the lower
    ratio = together.std((0, 1, 3, 4)) / snapshots.closures.std((0, 2, 3))
    assert bool((ratio > 0.2).all()) and bool((ratio < 5).all())


def test_a_closure_that_reads_the_forecast_is_scored_on_forecasts(layers, monkeypatch):
    inputs = Inputs(layers, session_of(layers))
    snapshots, closure, read = inputs.snapshots(16), inputs.closure, []
    found = Methods(inputs, snapshots, None, inputs.climatology(16))
    sample = closure.sample
    monkeypatch.setattr(
        closure, "sample", lambda state, **more: read.append(state) or sample(state, **more)
    )
    for forecast in (False, True):
        monkeypatch.setitem(closure.config["conditions"], "forecast", forecast)
        found.samplers["model"](torch.tensor([1, 0]), 2)
    expected = inputs.forecast(snapshots.states[[1, 0]])
    assert torch.equal(read[0], snapshots.states[[1, 0]])
    assert torch.allclose(read[1].double(), expected, atol=1e-6 * float(expected.abs().max()))
    assert not torch.allclose(read[1], read[0], atol=1e-3 * float(read[0].abs().max()))


def test_last_closures_are_moved_with_all_their_channels(layers):
    inputs = Inputs(layers, session_of(layers))
    snapshots = inputs.snapshots(16)
    found = Methods(inputs, snapshots, None, snapshots.closures)
    fields = snapshots.closures[:2, None].repeat(1, 3, 1, 1, 1)  # three last closures
    moved = found._moved(fields, [[5], [6]])
    assert moved.shape == fields.shape
    for place in range(2):
        alone = found._moved(fields[:, :, place], [[5], [6]])
        assert torch.allclose(moved[:, :, place], alone, atol=1e-6 * float(fields.abs().max()))
    assert not torch.allclose(moved, fields, rtol=0.1)


def test_figures_of_channels_are_separate_files(layers):
    names = {path.name for path in Run.of(layers).figures.glob("*.png")}
    for layer in LAYERS:
        for stem in ("fields_subgrid_16_none", "ranks_subgrid_16_none", "spectra_subgrid_16_none"):
            assert f"{stem}_{layer}.png" in names
        for stem in ("error", "state", "state_spectra"):
            assert f"{stem}_subgrid_{layer}.png" in names
    assert "closure.png" in names  # of both layers
    page = Run.of(layers).report.read_text()
    assert "Closure of each field at the held-out state of median power" in page
    assert "q_lower, subgrid, sensors: none" in page
    assert "Subgrid, no sensors, 16² grid, q_upper" in page
    # and the slider of the first channel has a frame per stored time
    times = len(CoupledEnsemble(sorted(Run.of(layers).rollout.glob("*.h5"))).times)
    assert page.count("data:image/webp;base64,") == times + 1 > 2


def test_what_is_not_scored_is_in_the_log(layers, capsys):
    again = reading.load(Run.of(layers).config, ["evaluate.seed=1", "evaluate.formats=[]"])
    capsys.readouterr()
    assert evaluate.run(again, Options()) == 0
    log = capsys.readouterr().err
    for words in (
        "several fields: the closure's budget is not scored",
        "several fields: long-time statistics are not scored",
    ):
        assert words in log, words


def test_an_event_is_that_of_the_field_it_names(layers):
    settings = "channel: q_lower, observable: peak, threshold: {}, lead_time: 0.4"
    runs = CoupledEnsemble(sorted(Run.of(layers).rollout.glob("*.h5")))
    replicas = Inputs(layers, session_of(layers)).replicas
    largest = {
        "model": runs.read("model", runs.index(0.4)),
        "oracle": replicas.read("model", replicas.index(0.4))[1:],  # the first is the truth
    }
    largest = {name: abs(part[:, :, 1]).max((-2, -1)).flatten() for name, part in largest.items()}
    middle = float(sorted(largest["oracle"])[2]) * (1 + 1e-6)
    event = settings.format(repr(middle))
    again = reading.load(
        Run.of(layers).config, [f"evaluate.event={{{event}}}", "evaluate.formats=[]"]
    )
    assert evaluate.run(again, Options()) == 0
    rows = select(read(Run.of(layers).scores_csv), score="probability")
    assert set(rows["channel"]) == {"q_lower"} and set(rows["lead_time"]) == {0.4}
    assert set(rows["method"]) == {"model", "oracle", "none", "truth"}
    for method, values in largest.items():
        row = find(rows, method=method)
        assert row.value == pytest.approx((values > middle).mean()) and row.members == len(values)
    page = Run.of(layers).report.read_text()
    assert "Event of evaluate.event (subgrid, no sensors, 16² grid, q_lower, lead time 0.4" in page


# ---- tables and figures -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(case):
    truth, ensembles, reference = case
    samplers = {name: sampler(part) for name, part in ensembles.items()}
    origin = Origin(torch.arange(SAMPLES) // 5, reference=reference)
    return generated.score_channels(truth, samplers, LABELS, members=MEMBERS, origin=origin)


def test_the_report_has_a_table_of_each_channel(scored, tmp_path):
    rows = frame(record for part in scored.values() for record in part.records)
    found = {columns["channel"]: part for columns, part in groups(rows, "generated")}
    assert list(found) == [*NAMES, "all channels"]
    columns = next(columns for columns, _ in groups(rows, "generated"))
    assert heading(columns) == "subgrid, no sensors, 16² grid, upper"
    Report("t", rows).write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for words in (
        "Subgrid, no sensors, 16² grid, upper",
        "Subgrid, no sensors, 16² grid, lower",
        "Subgrid, no sensors, 16² grid, all channels",
        "All channels together",
        "energy score, channels",
    ):
        assert words in page, words
    lines = headline([], rows)
    assert all(any(line.startswith(f"{name}: ") for line in lines) for name in NAMES)


def test_trainings_of_several_seeds_are_averaged_channel_by_channel():
    records = [
        {"method": f"mine#{number}", "score": "crps", "channel": name, "value": value}
        for name, values in (("upper", (1.0, 3.0)), ("lower", (5.0, 7.0)))
        for number, value in enumerate(values, 1)
    ]
    scored = Scored([{"low": math.nan, "high": math.nan, **record} for record in records])
    compare.join(scored, {"mine": ["a", "b"]})
    means = {row["channel"]: row["value"] for row in scored.records if row["method"] == "mine"}
    assert means == {"upper": 2.0, "lower": 6.0}
