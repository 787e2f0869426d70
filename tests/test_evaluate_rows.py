"""Rows of scores: files, printing, and the two drivers on laws whose scores are known."""

import json
import math
from dataclasses import asdict
from functools import partial

import pandas
import pytest
import torch
from test_evaluate_pointwise import normal, stationary

from hpc_closure.evaluate import rows
from hpc_closure.evaluate.methods import Moments
from hpc_closure.evaluate.rows import Absent, find, select
from hpc_closure.evaluate.scores.coupled.growth import growth
from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.generated.budget import Origin
from hpc_closure.evaluate.scores.rank_histogram import fourier_coordinates
from hpc_closure.evaluate.scores.registry import BUILT_IN
from hpc_closure.evaluate.scores.spectra import shell_numbers
from hpc_closure.evaluate.scores.table import Labels, Statistics, form_scores
from hpc_closure.evaluate.scores.variance_quartiles import Quarters
from hpc_closure.evaluate.stages import generated
from hpc_closure.evaluate.stages.coupled import score_coupled
from hpc_closure.evaluate.stages.generated import score_generated

LABELS = Labels({"closure": "diffusion", "sensors": "none", "interval": 1})


# ---- rows and files -----------------------------------------------------------------------------


def example_records():
    records = [
        {
            **LABELS.of(method),
            "stage": "generated",
            "grid": 64,
            "score": "relative_error",
            "value": torch.tensor(value, dtype=torch.float64),
            "low": 0.9 * value,
            "high": math.nan,
            "members": 32,
        }
        for method, value in (("none", 1.0), ("model", 0.4781), ("oracle", 5.45e-5))
    ]
    none, model = LABELS.of("none"), LABELS.of("model")
    records.append({**none, "stage": "coupled", "lead_time": 5, "score": "mse", "value": math.inf})
    records.append(
        {**model, "stage": "generated", "shell": 3, "score": "spread_ratio", "value": 1}
    )
    return records


ABSENT = Absent("generated", "diffusion", "fourier", "there are no sensors to interpolate")


def test_columns_are_the_contract():
    assert tuple(rows.COLUMNS) == tuple(
        "stage,closure,method,grid,lead_time,shell,score,value,low,high,sensors,evaluations,"
        "interval,members,samples,split,seeds,channel".split(",")
    )


def test_files_round_trip_and_leave_nothing_behind(tmp_path):
    scores = rows.frame(example_records())
    rows.write(tmp_path, scores, [ABSENT], {"host": "here"})
    csv_path, json_path = tmp_path / "scores.csv", tmp_path / "scores.json"
    assert pandas.read_csv(csv_path, dtype=rows.COLUMNS).equals(scores)
    lines = csv_path.read_text().splitlines()
    assert lines[0] == ",".join(rows.COLUMNS)
    assert lines[2] == (
        "generated,diffusion,model,64,,,relative_error,0.4781,0.43029,,none,,1,32,,test,,"
    )
    assert lines[4] == "coupled,diffusion,none,,5.0,,mse,inf,,,none,,1,,,test,,"
    back = json.loads(json_path.read_text())
    assert rows.frame(back["rows"]).equals(scores) and back["rows"][3]["value"] == "inf"
    assert back["absent"] == [asdict(ABSENT)] and back["provenance"] == {"host": "here"}
    assert "Infinity" not in json_path.read_text() and "NaN" not in json_path.read_text()
    rows.write(tmp_path, scores[:2], [], {})
    assert len(pandas.read_csv(csv_path)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv", "scores.json"]


def test_scores_of_the_previous_release_are_read_by_their_present_names(tmp_path):
    assert set(rows.RENAMED.values()) <= set(BUILT_IN) and not set(rows.RENAMED) & set(BUILT_IN)
    scores = rows.frame(example_records())
    old = scores.assign(score=["rank_sees", "spread_ratio_calm", *scores["score"][2:]])
    rows.write(tmp_path, old, [], {})
    now = rows.read(tmp_path / "scores.csv")
    assert now["score"][:2].tolist() == ["rank_power", "spread_ratio_low_variance"]
    assert now.drop(columns="score").equals(old.drop(columns="score"))
    rows.write(tmp_path, scores, [], {})
    assert rows.read(tmp_path / "scores.csv").equals(scores)


def test_files_without_channels_are_read_and_one_field_has_an_empty_cell(tmp_path):
    scores = rows.frame(example_records())
    rows.write(tmp_path, scores, [], {})
    path = tmp_path / "scores.csv"
    lines = path.read_text().splitlines()
    assert all(line.endswith(",") for line in lines[1:])
    path.write_text("".join(line.rpartition(",")[0] + "\n" for line in lines))
    assert "channel" not in path.read_text()
    assert rows.read(path).equals(scores)


def test_select_find_and_pivot():
    scores = rows.frame(example_records())
    assert len(select(scores, stage="generated", shell=None)) == 3
    assert find(scores, stage="generated", method="model", shell=None).low == 0.9 * 0.4781
    assert find(scores, score="no such score") is None
    with pytest.raises(ValueError, match="rows have"):
        find(scores, method="model")
    with pytest.raises(ValueError, match="no column"):
        select(scores, scores="mse")
    with pytest.raises(ValueError, match="no column"):
        rows.frame([{"scores": "mse"}])
    table = rows.pivot(select(scores, stage="generated", shell=None), also=["fourier"])
    assert list(table.index) == ["model", "oracle", "fourier", "none"]
    cells = [row and rows.format_value(row.score, row.value) for row in table["relative_error"]]
    assert cells == ["0.478", "5.45e-05", None, "1.00"]
    with pytest.raises(ValueError, match="duplicate entries"):
        rows.pivot(select(scores, stage="generated"), across="closure")


@pytest.mark.parametrize(
    "score, value, text",
    [
        ("mse", 0.047812, "0.0478"),
        ("mse", 583.2, "583"),
        ("mse", 5.45e-5, "5.45e-05"),
        ("mse", math.inf, "diverged"),
        ("mse", None, "n/a"),
        ("rank_p", 1e-9, "< 1e-6"),
        ("rank_p", 0.31, "0.31"),
        ("spread_ratio", 0.9996, "1.00"),
        ("mse", 0.0, "0"),
        ("mse", 1234567.0, "1.23e+06"),
        ("bias2", -0.0123, "-0.0123"),
        ("mse", 99.96, "100"),
    ],
)
def test_format_value(score, value, text):
    assert rows.format_value(score, value) == text


# ---- generated: a Gaussian law with known mean, spread and floors ------------------------------

SIGMA = 0.4


def stationary_case(samples=240, size=16):
    """U = mean + SIGMA xi with a mean of unit variance: floor SIGMA / sqrt(1 + SIGMA^2)."""
    mean = stationary(samples, size, seed=11, length=0.3)
    truth = mean + SIGMA * stationary(samples, size, seed=12)

    def law(scale, bias, indices, members):
        noise = stationary(members * len(indices), size, seed=50 + int(indices[0]))
        noise = noise.unflatten(0, (members, len(indices)))
        return (1 + bias) * mean[indices] + scale * SIGMA * noise

    samplers = {
        "model": partial(law, 0.8, 0.0),
        "biased": partial(law, 1.0, 0.2),
        "oracle": partial(law, 1.0, 0.0),
        "physics": lambda indices, members: mean[None, indices],
        "none": lambda indices, members: torch.zeros_like(truth[None, indices]),
    }
    exact = Moments(lambda i: mean[i], SIGMA**2, whiten=partial(fourier_coordinates, max_shell=4))
    return truth, samplers, exact


@pytest.fixture(scope="module")
def scored():
    truth, samplers, law = stationary_case()
    return score_generated(
        truth,
        samplers,
        Labels(LABELS.shared, {"model": {"evaluations": 2}}),
        members=24,
        law=law,
        origin=Origin(torch.arange(240) // 24),
    )


def value(scored, method, score, **columns):
    return find(scored.rows, method=method, score=score, **{"shell": None, **columns}).value


def test_generated_scores_of_known_laws(scored):
    floor = SIGMA / math.sqrt(1 + SIGMA**2)
    assert value(scored, "oracle", "floor") == pytest.approx(floor, rel=0.03)
    assert value(scored, "oracle", "floor_realised") == pytest.approx(floor, rel=0.05)
    assert value(scored, "oracle", "relative_error_mean") == pytest.approx(floor, rel=0.1)
    assert value(scored, "oracle", "spread_ratio") == 1 == value(scored, "oracle", "crps_ratio")
    assert value(scored, "oracle", "spread_skill") == pytest.approx(1, abs=0.05)
    assert value(scored, "oracle", "coverage_90") == pytest.approx(0.9, abs=0.02)
    assert value(scored, "oracle", "bias2_ratio") == pytest.approx(0, abs=0.02)
    assert value(scored, "model", "spread_ratio") == pytest.approx(0.8, rel=1e-6)
    assert value(scored, "model", "spread_ratio", shell=2) == pytest.approx(0.8, rel=1e-6)
    assert value(scored, "model", "spread") == pytest.approx(0.8 * SIGMA, rel=0.05)
    assert value(scored, "model", "crps_ratio") > 1.005
    # the bias is 0.2 of a mean of unit variance; its floor SIGMA^2
    assert value(scored, "biased", "bias2_ratio") == pytest.approx(0.04 / SIGMA**2, rel=0.2)
    assert value(scored, "none", "relative_error") == 1
    assert value(scored, "none", "crps") == value(scored, "none", "crps")
    assert value(scored, "oracle_x0.95", "spread_ratio") == pytest.approx(0.95, rel=1e-6)


def test_generated_calibration_passes_the_oracle_and_fails_the_control(scored):
    assert value(scored, "oracle", "rank_p") > 0.01
    assert value(scored, "oracle_x0.95", "rank_p") < 0.001
    assert value(scored, "model", "rank_p") < 1e-6
    assert scored.ranks["oracle"].sum() == scored.ranks["model"].sum() > 10_000


def test_generated_point_forecasts_have_no_ensemble_scores(scored):
    names = set(select(scored.rows, method="physics")["score"])
    assert {"relative_error", "crps", "crps_ratio", "mse", "cost_ms"} <= names
    assert not names & {"spread", "spread_skill", "spread_ratio", "rank_p", "coverage_90"}


def test_generated_rows_carry_labels_and_intervals(scored):
    row = find(scored.rows, method="model", score="crps", shell=None)
    assert (row.stage, row.closure, row.grid, row.interval) == ("generated", "diffusion", 16, 1)
    assert (row.evaluations, row.members, row.samples, row.split) == (2, 24, 240, "test")
    assert row.low < row.value < row.high
    oracle = find(scored.rows, method="oracle", score="crps", shell=None)
    assert oracle.evaluations is pandas.NA
    assert scored.examples["model"].shape == (3, 16, 16) and "truth" in scored.examples
    assert scored.spectra["truth"].sum() == pytest.approx(1 + SIGMA**2, rel=0.1)
    assert set(scored.spread_spectra) == {"model", "biased", "oracle", "oracle_x0.95"}


def same_scores(first, second, **tolerance):
    """Equal labels in equal order, and near values; costs are measured and differ."""
    pairs = zip(first.rows.itertuples(), second.rows.itertuples(), strict=True)
    for one, two in pairs:
        assert (one.method, one.score, str(one.shell)) == (two.method, two.score, str(two.shell))
        if one.score != "cost_ms":
            assert one.value == pytest.approx(two.value, **tolerance), one


def test_generated_scores_do_not_depend_on_the_block_size(monkeypatch):
    truth, samplers, law = stationary_case(samples=12)
    fixed = {name: sample(torch.arange(12), 6) for name, sample in samplers.items()}
    samplers = {name: lambda indices, members, x=x: x[:, indices] for name, x in fixed.items()}
    results = []
    for size in (2**27, 8 * 6 * 16 * 16 * 5):
        monkeypatch.setattr(generated, "BLOCK_BYTES", size)
        results.append(score_generated(truth.numpy(), samplers, LABELS, members=6, law=law))
    same_scores(*results, rel=1e-9)


def test_generated_without_a_law_ranks_one_pixel_per_field():
    truth, samplers, _ = stationary_case(samples=60)
    scored = score_generated(truth, {"model": samplers["biased"]}, LABELS, members=8)
    assert scored.ranks["model"].sum() == 60
    names = set(scored.rows["score"])
    assert not names & {"bias2", "crps_ratio", "spread_ratio", "floor"}


LEVELS = (0.25, 1.0, 1.0, 4.0)  # pointwise variance over the four quarters of a field


def state_dependent_case(samples=120, size=16):
    """U = a xi, a^2 a pattern of LEVELS that moves with the snapshot; the model's is its mean."""
    columns = torch.tensor(LEVELS, dtype=torch.float64).repeat_interleave(size // 4)
    variance = torch.stack([columns.roll(i) for i in range(samples)])[:, None, :]
    variance = variance.expand(samples, size, size)
    white = partial(normal, samples, size, size)
    truth = variance.sqrt() * white(seed=1)

    def noise(seed, indices, members):
        return normal(members, samples, size, size, seed=seed)[:, indices]

    level = math.sqrt(sum(LEVELS) / 4)
    samplers = {
        "model": lambda i, m: level * noise(2, i, m),
        "oracle": lambda i, m: variance[i].sqrt() * noise(3, i, m),
        "none": lambda i, m: torch.zeros_like(truth[None, i]),
    }
    law = Moments(lambda i: torch.zeros_like(truth[i]), level**2, lambda i: variance[i])
    return truth, samplers, law


def test_low_and_high_variance_quarters_show_a_law_that_ignores_the_state(monkeypatch):
    truth, samplers, law = state_dependent_case()
    args = (truth, samplers, LABELS)
    groups = {"members": 16, "law": law, "origin": Origin(torch.arange(120) // 15)}
    scored = score_generated(*args, **groups)
    flat = sum(LEVELS) / 4
    for name, level in (("low_variance", LEVELS[0]), ("high_variance", LEVELS[-1])):
        expected = {"model": math.sqrt(flat / level), "oracle": 1, "oracle_x0.95": 0.95}
        for method, ratio in expected.items():
            row = find(scored.rows, method=method, score=f"spread_ratio_{name}", shell=None)
            assert row.value == pytest.approx(ratio, rel=0.01)
            assert row.low < row.value < row.high < 1.1 * row.low
            assert value(scored, method, f"spread_{name}") == pytest.approx(
                ratio * math.sqrt(level), rel=0.01
            )
        assert find(scored.rows, method="none", score=f"spread_ratio_{name}") is None
    assert value(scored, "model", "spread_ratio") == pytest.approx(1, abs=0.02)
    monkeypatch.setattr(generated, "BLOCK_BYTES", 8 * 16 * 16 * 16 * 7)
    same_scores(scored, score_generated(*args, **groups), rel=1e-9, abs=1e-9)


def test_quarters_are_of_the_points_of_all_snapshots_together():
    """A snapshot of low and one of high variance: half of each, not a quarter of every one."""
    levels = torch.tensor([1.0, 2.0, 3.0, 9.0], dtype=torch.float64)
    fields = levels[:, None, None].expand(4, 8, 8)
    found = Quarters.of(lambda indices: fields[indices], 4, 3)
    masks = {name: mask for name, (mask, _) in found.at(torch.arange(4)).items()}
    assert masks["low_variance"].double().mean((1, 2)).tolist() == [1, 0, 0, 0]
    assert masks["high_variance"].double().mean((1, 2)).tolist() == [0, 0, 0, 1]
    assert Quarters.of(lambda indices: torch.ones(len(indices), 8, 8), 4, 3) is None
    assert Quarters.of(None, 4, 3) is None


def test_the_extreme_shells_are_those_that_carry_the_law(scored):
    truth, samplers, law = stationary_case(samples=40)

    def damped(indices, members):
        field = torch.fft.rfft2(samplers["oracle"](indices, members))
        shells = shell_numbers((16, 16))
        factor = torch.where(shells == 2, 0.5, 1.0) * torch.where(shells == 9, 30.0, 1.0)
        return torch.fft.irfft2(field * factor, s=(16, 16))

    # without the mean only the spread counts; shell 9 holds less than 1e-3 of the variance
    named = {"model": damped, "oracle": samplers["oracle"]}
    found = score_generated(truth, named, LABELS, members=8, law=law)
    variance = found.spread_spectra["oracle"]
    assert variance[9] < 1e-3 * variance.sum() < variance[2]
    assert value(found, "model", "spread_ratio_min_shell") == pytest.approx(0.5, rel=1e-6)
    assert value(found, "model", "spread_ratio_max_shell") == pytest.approx(1.0, rel=1e-6)
    shells = select(found.rows, method="model", score="spread_ratio")
    assert shells["value"].max() == pytest.approx(30, rel=1e-6)
    assert value(scored, "model", "spread_ratio_max_shell") == pytest.approx(0.8, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_generated_scores_are_the_same_on_a_gpu():
    truth, samplers, law = stationary_case(samples=24)
    fixed = {name: sample(torch.arange(24), 6) for name, sample in samplers.items()}
    results = []
    for device in ("cpu", "cuda"):
        moved = {
            name: lambda indices, members, x=x.to(device): x[:, indices.to(x.device)]
            for name, x in fixed.items()
        }
        exact = Moments(lambda i, d=device: law.mean(i).to(d), law.variance, None, law.whiten)
        results.append(score_generated(truth, moved, LABELS, members=6, law=exact))
    same_scores(*results, rel=1e-9, abs=1e-12)


def test_generated_refuses_wrong_shapes():
    truth = normal(3, 8, 8)
    with pytest.raises(ValueError, match=r"model returned \(4, 2, 8, 8\) for 3 states"):
        score_generated(truth, {"model": lambda i, m: normal(m, 2, 8, 8)}, LABELS, members=4)
    with pytest.raises(ValueError, match="no held-out snapshots"):
        score_generated(truth[:0], {}, LABELS, members=4)


# ---- coupled: independent random walks, whose errors grow as sqrt(t) ----------------------------


def walks(members, cases, times, seed, size=12):
    steps = stationary(members * cases * times, size, seed=seed)
    return steps.unflatten(0, (members, cases, times)).cumsum(2)


@pytest.fixture(scope="module")
def coupled():
    cases, times = 12, 4
    start = 2 * stationary(cases, 12, seed=1, length=0.3)[:, None]
    truth = start + 0.3 * walks(1, cases, times, seed=2)[0]
    model = start + 0.15 * walks(16, cases, times, seed=3)
    lost = model.clone()
    lost[3, :, 2:] = math.inf
    ensembles = {
        "model": lambda index: model[:, :, index],
        "oracle": start + 0.3 * walks(16, cases, times, seed=4),
        "lost": lost,
        "none": start.expand(1, cases, times, 12, 12),
    }
    return score_coupled(
        truth,
        ensembles,
        [1, 2, 3, 4],
        LABELS,
        costs={"model": 3.0, "none": 0.5},
    )


def test_coupled_scores_of_random_walks(coupled):
    for lead in (1, 4):
        assert value(coupled, "oracle", "spread", lead_time=lead) == pytest.approx(
            0.3 * math.sqrt(lead), rel=0.08
        )
        assert value(coupled, "oracle", "spread_ratio", lead_time=lead) == 1
        assert value(coupled, "model", "spread_ratio", lead_time=lead) == pytest.approx(
            0.5, rel=0.1
        )
    assert value(coupled, "oracle", "spread_skill", lead_time=4) == pytest.approx(1, abs=0.2)
    assert value(coupled, "model", "spread_skill", lead_time=4) < 0.7
    assert value(coupled, "none", "relative_error", lead_time=4) > value(
        coupled, "none", "relative_error", lead_time=1
    )
    row = find(coupled.rows, method="model", score="mse", lead_time=2.0, shell=None)
    assert (row.stage, row.samples, row.members, row.grid) == ("coupled", 12, 16, 12)
    assert value(coupled, "model", "cost_ratio", lead_time=None) == 6
    assert 0 < value(coupled, "oracle", "wasserstein1", lead_time=None) < 0.5
    assert value(coupled, "oracle", "valid_time", lead_time=None) <= 4


def test_coupled_divergence_is_said(coupled):
    assert value(coupled, "lost", "diverged", lead_time=2) == 0
    assert value(coupled, "lost", "diverged", lead_time=3) == pytest.approx(1 / 16)
    assert value(coupled, "lost", "mse", lead_time=3) == math.inf
    assert value(coupled, "lost", "valid_time", lead_time=None) <= 3
    assert find(coupled.rows, method="lost", score="wasserstein1") is None


def test_coupled_takes_one_case_and_the_start_itself():
    truth = normal(3, 8, 8)
    ensemble = truth + 0.1 * normal(5, 3, 8, 8, seed=1)
    ensemble[:, 0] = truth[0]
    scored = score_coupled(truth, {"model": ensemble}, [0, 1, 2], LABELS)
    assert value(scored, "model", "relative_error", lead_time=0) == 0
    assert find(scored.rows, method="model", score="spread_skill", lead_time=0.0) is None
    row = find(scored.rows, method="model", score="crps", lead_time=2.0)
    assert math.isnan(row.low) and row.samples == 1
    assert find(scored.rows, method="model", score="rank_p", lead_time=2.0) is None


def test_coupled_refuses_wrong_shapes():
    with pytest.raises(ValueError, match="2 lead times for a truth of 3 times"):
        score_coupled(normal(3, 8, 8), {}, [1, 2], LABELS)
    with pytest.raises(ValueError, match="expected \\(members, 1, 8, 8\\)"):
        score_coupled(normal(3, 8, 8), {"model": normal(5, 3, 4, 4)}, [1, 2, 3], LABELS)


# ---- spectra of samples and residuals -----------------------------------------------------------


def l2_scores(shrink=1.0, white=False, members=24, samples=300):
    """The four columns for a law of known mean and spectrum, its samples perhaps wrong."""
    generator = torch.Generator().manual_seed(4)
    size = 16
    draw = stationary(samples * (members + 2), size, seed=5).unflatten(0, (members + 2, samples))
    mean, truth, own = draw[0], draw[0] + 0.5 * draw[1], 0.5 * shrink * draw[2:]
    if white:
        own = own.std() * torch.randn(own.shape, generator=generator, dtype=own.dtype)
    statistics = Statistics()
    statistics.add(Forecast(mean + own, Truth(truth)))
    rows = {row["score"]: row["value"] for row in form_scores(statistics, torch.arange(samples))}
    return [rows[name] for name in ("l2_mean", "l2_total", "l2_residual", "variance_ratio")]


def test_l2_scores_of_the_right_law():
    mean, total, residual, spread = l2_scores()
    assert mean == pytest.approx((0.25 / 1.25) ** 0.5, rel=0.03)
    assert total < 0.05 and residual < 0.08 and spread == pytest.approx(1.0, abs=0.05)


def test_l2_scores_see_a_lack_of_spread_and_a_wrong_spectrum():
    _, _, residual, spread = l2_scores(shrink=0.5)
    assert spread == pytest.approx(0.25, abs=0.02) and residual == pytest.approx(0.75, abs=0.05)
    _, total, residual, spread = l2_scores(white=True)
    assert spread == pytest.approx(1.0, abs=0.05) and residual > 0.4 and total > 0.1


# ---- growth of the variance ---------------------------------------------------------------------


def test_growth_is_the_time_to_a_share_of_the_true_ensembles_last_variance():
    """Of variances that grow linearly, each shell at its own rate, to 1."""
    times = torch.arange(0.5, 10.5, 0.5, dtype=torch.float64)
    rates = torch.tensor([0.0, 0.1, 0.05], dtype=torch.float64)

    def grown(factor):
        return [(rates * factor * time).expand(6, 3) for time in times]

    variances = {"oracle": grown(1.0), "model": grown(2.0), "point": [torch.zeros(6, 3)] * 20}
    found = {
        (method, row["score"], row["shell"]): row["value"]
        for method, row in growth(variances, times, torch.arange(6))
    }
    for share, name in ((0.01, "growth_1"), (0.1, "growth_10"), (0.5, "growth_50")):
        for shell in (None, 1, 2):
            assert found["oracle", name, shell] == pytest.approx(10 * share)
            assert found["model", name, shell] == pytest.approx(5 * share)
            assert found["point", name, shell] == 10.0
    assert len(found) == 3 * 3 * 3
