"""Scores of extremes and patches: closed forms, laws that they must tell apart, and their rows."""

import itertools
import math

import pytest
import torch
from scipy import integrate, stats
from test_evaluate_pointwise import normal

from hpc_closure.closure.fields.losses import energy_score
from hpc_closure.evaluate.rows import find, select
from hpc_closure.evaluate.scores.forecast import Forecast, Truth
from hpc_closure.evaluate.scores.generated.budget import Origin
from hpc_closure.evaluate.scores.joint import patches
from hpc_closure.evaluate.scores.rank_histogram import rank_counts, rank_p, ranks
from hpc_closure.evaluate.scores.table import Labels, Statistics, form_scores
from hpc_closure.evaluate.stages.coupled import score_coupled
from hpc_closure.evaluate.stages.generated import score_generated

NAMES = {score.name for score in patches.SCORES}
POINTS = patches.SIDE**2


def brute_crps(members, y):
    """The fair CRPS of a list of numbers, from its definition."""
    num = len(members)
    pairs = sum(abs(a - b) for a in members for b in members) / (2 * num * (num - 1))
    return sum(abs(x - y) for x in members) / num - pairs


def brute_patches(field, side):
    """Values of each patch of a field of any number of sides, as lists."""
    starts = itertools.product(*(range(0, size, side) for size in field.shape))
    return [
        field[tuple(slice(one, one + side) for one in corner)].flatten().tolist()
        for corner in starts
    ]


# ---- against the definitions ------------------------------------------------------------------


@pytest.mark.parametrize(
    "points, side", [((8, 8), 4), ((8, 8), 2), ((8,), 4), ((4, 8), 4), ((4, 2, 6), 2)]
)
def test_scores_are_their_definitions(points, side):
    ensemble, truth = normal(3, 2, *points), normal(2, *points, seed=1)
    kinds = {
        "max": (patches.patch_max_crps(ensemble, truth, side), max),
        "min": (patches.patch_min_crps(ensemble, truth, side), min),
    }
    for sample in range(2):
        members = [brute_patches(member, side) for member in ensemble[:, sample]]
        there = brute_patches(truth[sample], side)
        places = range(len(there))
        for found, extreme in kinds.values():
            each = [
                brute_crps([extreme(one[place]) for one in members], extreme(there[place]))
                for place in places
            ]
            assert float(found[sample]) == pytest.approx(sum(each) / len(each), rel=1e-12)
        energies = []
        for place in places:
            x = torch.tensor([one[place] for one in members])
            y = torch.tensor(there[place])
            norm = 1 / math.sqrt(len(y))
            pairs = norm * torch.cdist(x[None], x[None])[0].sum() / (2 * 3 * 2)
            energies.append(norm * (x - y).norm(dim=1).mean() - pairs)
        found = patches.patch_energy_score(ensemble, truth, side)[sample]
        assert float(found) == pytest.approx(float(torch.stack(energies).mean()), rel=1e-6)
        whole = brute_crps(
            [float(member.max()) for member in ensemble[:, sample]], float(truth[sample].max())
        )
        assert float(patches.field_max_crps(ensemble, truth)[sample]) == pytest.approx(whole)


def test_the_brier_score_is_that_of_shares_of_members():
    ensemble, truth = normal(5, 3, 8, 8), normal(3, 8, 8, seed=1)
    brier, probability, frequency = patches.exceedance(ensemble, truth, 1.8)
    for sample in range(3):
        scores, shares, events = [], [], []
        for place, there in enumerate(brute_patches(truth[sample], 4)):
            members = [max(brute_patches(one, 4)[place]) > 1.8 for one in ensemble[:, sample]]
            p, o = sum(members) / 5, float(max(there) > 1.8)
            scores.append((p - o) ** 2 - p * (1 - p) / 4)
            shares.append(p)
            events.append(o)
        for found, parts in ((brier, scores), (probability, shares), (frequency, events)):
            assert float(found[sample]) == pytest.approx(sum(parts) / len(parts), abs=1e-12)
    assert 0 < float(frequency.mean()) < 1 and 0 < float(probability.mean()) < 1


def test_many_patches_are_scored_in_parts(monkeypatch):
    ensemble, truth = normal(3, 5, 8, 8), normal(5, 8, 8, seed=1)
    together = patches.patch_energy_score(ensemble, truth)
    monkeypatch.setitem(patches.PAIR_VALUES, "cpu", 2 * 4 * 3**2)  # two of the five snapshots
    assert torch.allclose(patches.patch_energy_score(ensemble, truth), together, rtol=1e-14)


def test_a_patch_of_the_entire_field_has_its_energy_score():
    ensemble, truth = normal(6, 5, 4, 4), normal(5, 4, 4, seed=1)
    whole = energy_score(ensemble, truth)
    assert torch.allclose(patches.patch_energy_score(ensemble, truth), whole, rtol=1e-12)


def test_a_point_forecast_scores_its_error():
    forecast, truth = normal(1, 3, 8, 8), normal(3, 8, 8, seed=1)
    error = (patches.extremes(forecast[0])[1] - patches.extremes(truth)[1]).abs().mean(-1)
    assert torch.allclose(patches.patch_max_crps(forecast, truth), error)
    brier = patches.exceedance(forecast, truth, 1.8)[0]
    assert bool(((brier * 4).round() == brier * 4).all())  # 0 or 1 in each of four patches


# ---- a law that is known: independent normal values ---------------------------------------------

SAMPLES, MEMBERS, SIZE = 3000, 8, 16


@pytest.fixture(scope="module")
def law():
    """Truth, the right ensemble, another right one, and one with 0.9 of the spread."""
    truth, first, second = (
        normal(*shape, seed=seed)
        for seed, shape in enumerate(
            [(SAMPLES, SIZE, SIZE), *[(MEMBERS, SAMPLES, SIZE, SIZE)] * 2]
        )
    )
    above = patches.threshold(normal(4000, SIZE, SIZE, seed=9))
    return truth, {"right": first, "second": second, "narrow": 0.9 * second}, above


def of_maximum(points):
    """Expected CRPS of the largest of independent normal values: the integral of F (1 - F)."""

    def product(x):
        below = stats.norm.cdf(x) ** points
        return below * (1 - below)

    return integrate.quad(product, -8, 12, limit=200)[0]


def energy_of_patch():
    """Half the mean distance of two patches: sqrt(2) E chi_16 / (2 sqrt(16))."""
    return float(stats.chi(POINTS).mean()) * math.sqrt(2) / (2 * math.sqrt(POINTS))


def near(values, expected, errors=4.5):
    error = float(values.std() / math.sqrt(len(values)))
    return abs(float(values.mean()) - expected) < errors * error


def test_expected_scores_of_the_right_law_are_their_closed_forms(law):
    truth, ensembles, above = law
    right = ensembles["right"]
    assert near(patches.patch_max_crps(right, truth), of_maximum(POINTS))
    assert near(patches.patch_min_crps(right, truth), of_maximum(POINTS))
    assert near(patches.field_max_crps(right, truth), of_maximum(SIZE**2))
    assert near(patches.patch_energy_score(right, truth), energy_of_patch())
    exact = stats.norm.ppf(patches.QUANTILE ** (1 / POINTS))
    assert above == pytest.approx(exact, abs=0.02)
    rare = 1 - stats.norm.cdf(above) ** POINTS
    brier, probability, frequency = patches.exceedance(right, truth, above)
    assert near(brier, rare * (1 - rare)) and near(probability, rare) and near(frequency, rare)


@pytest.mark.parametrize(
    "score",
    [
        patches.patch_max_crps,
        patches.patch_min_crps,
        patches.field_max_crps,
        patches.patch_energy_score,
    ],
)
def test_a_spread_of_nine_tenths_scores_worse_and_a_right_one_does_not(law, score):
    truth, ensembles, _ = law
    right, second, narrow = (score(ensembles[name], truth) for name in ensembles)
    assert near(second - right, 0.0)
    assert not near(narrow - right, 0.0) and float((narrow - right).mean()) > 0


def test_exceedance_sees_a_spread_of_nine_tenths(law):
    """The probability over the frequency: 0.28 instead of 1."""
    truth, ensembles, above = law
    shares = {}
    for name, ensemble in ensembles.items():
        _, probability, frequency = patches.exceedance(ensemble, truth, above)
        shares[name] = float(patches.reliability(probability.mean(), frequency.mean()))
    expected = 1 - stats.norm.cdf(above / 0.9) ** POINTS
    expected /= 1 - stats.norm.cdf(above) ** POINTS
    assert shares["right"] == pytest.approx(1, abs=0.1)
    assert shares["narrow"] == pytest.approx(expected, abs=0.05) and expected < 0.3


def test_the_brier_score_of_a_common_event_sees_a_spread_of_nine_tenths(law):
    """With an event of 1 % the excess, (p - p')^2 = 5e-5, is below the score's noise."""
    truth, ensembles, _ = law
    median = float(stats.norm.ppf(0.5 ** (1 / POINTS)))
    right, second, narrow = (
        patches.exceedance(ensembles[name], truth, median)[0] for name in ensembles
    )
    assert near(second - right, 0.0)
    assert not near(narrow - right, 0.0) and float((narrow - right).mean()) > 0


def test_ranks_of_patch_maxima_are_even_only_for_the_right_spread(law):
    truth, ensembles, _ = law
    y, generator = patches.extremes(truth)[1], torch.Generator().manual_seed(0)

    def p(ensemble):
        return rank_p(rank_counts(ranks(patches.extremes(ensemble)[1], y, generator), MEMBERS))

    assert p(ensembles["right"]) > 0.01 > 1e-6 > p(ensembles["narrow"])


def test_rare_events_are_seen_in_patches_not_in_entire_fields():
    """Events at rare points, against a Gaussian field with the same sd(x) at each point."""
    samples, size, members = 300, 32, 8
    profile = 1 + 0.8 * torch.linspace(0, 2 * math.pi, size + 1).double()[:-1].cos()[:, None]
    share = 0.004 * profile.expand(size, size)

    def events(*shape, seed):
        generator = torch.Generator().manual_seed(seed)
        there = torch.rand(*shape, size, size, generator=generator, dtype=torch.float64) < share
        # about zero mean, as a closure less its mean is
        return there * (2 + normal(*shape, size, size, seed=seed + 50)) - 2 * share

    truth, right = events(samples, seed=1), events(members, samples, seed=2)
    std = events(4000, seed=3).std(0)
    gaussian = std * normal(members, samples, size, size, seed=4)
    whole = [energy_score(ensemble, truth).mean() for ensemble in (right, gaussian)]
    assert float(whole[1] / whole[0]) == pytest.approx(1, abs=0.02)
    for score, worse in ((patches.patch_max_crps, 1.5), (patches.patch_energy_score, 1.1)):
        of_law, of_gaussian = (score(ensemble, truth).mean() for ensemble in (right, gaussian))
        assert float(of_gaussian / of_law) > worse, score
    above = patches.threshold(events(500, seed=5))
    _, probability, frequency = patches.exceedance(gaussian, truth, above)
    assert float(patches.reliability(probability.mean(), frequency.mean())) < 0.1


# ---- sides, values that are not finite ----------------------------------------------------------


def test_a_side_that_does_not_divide_is_refused_or_replaced():
    with pytest.raises(ValueError, match="^patches of side 4 do not tile fields of 6 x 6 points"):
        patches.extremes(normal(2, 6, 6))
    sides = {size: patches.side_of(size) for size in (64, 42, 10, 25, 4, 2, 1)}
    assert sides == {64: 4, 42: 3, 10: 2, 25: None, 4: 4, 2: 2, 1: None}
    assert patches.left_out(25) == "patches are not scored on 25^2: no side from 2 to 4 divides 25"
    assert patches.left_out(42) == ""
    assert patches.left_out(25, 3).startswith("patches are not scored on 25^3: no side")
    assert patches.side_of(48, 42) == 3 and patches.side_of(48, 25) is None
    assert patches.threshold_of(None) is None and patches.threshold_of(normal(3, 25, 25)) is None
    found = patches.statistics(normal(3, 2, 25, 25), normal(2, 25, 25), 1.0)
    assert set(found) == {"field_max_crps"}


def test_the_threshold_is_the_quantile_of_patch_maxima():
    reference = normal(30, 8, 8)
    values = patches.extremes(reference)[1].flatten()
    assert patches.threshold(reference) == pytest.approx(float(values.quantile(0.99)), rel=1e-12)
    reference[3] = math.nan
    values = torch.cat([values[:12], values[16:]])
    assert patches.threshold(reference) == pytest.approx(float(values.quantile(0.99)), rel=1e-12)
    with pytest.raises(ValueError, match=r"no patch of the reference \(2, 8, 8\) has finite"):
        patches.threshold(torch.full((2, 8, 8), math.inf))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_lost_member_is_infinitely_wrong(value):
    ensemble, truth = normal(4, 3, 8, 8), normal(3, 8, 8, seed=1)
    ensemble[1, 2, 0, 0] = value
    statistics = Statistics(threshold=1.0)
    statistics.add(Forecast(ensemble, Truth(truth)))
    rows = {row["score"]: row["value"] for row in form_scores(statistics, torch.arange(3))}
    for name in NAMES & set(rows) - {"field_max_crps"}:
        assert rows[name] == math.inf, name
    assert rows["mse"] == math.inf and "exceedance_brier" in rows


def test_no_number_is_made_of_events_that_never_happened():
    statistics = Statistics(threshold=50.0)
    statistics.add(Forecast(normal(4, 6, 8, 8), Truth(normal(6, 8, 8, seed=1))))
    rows = {row["score"]: row["value"] for row in form_scores(statistics, torch.arange(6))}
    assert rows["exceedance_brier"] == 0 and "exceedance_reliability" not in rows


# ---- rows ---------------------------------------------------------------------------------------

LABELS = Labels({"closure": "diffusion", "sensors": "none", "interval": 1})


def test_the_generated_closure_has_these_rows_for_every_method():
    truth, reference = normal(60, 16, 16), normal(100, 16, 16, seed=8)

    def law(scale, seed):
        drawn = scale * normal(8, 60, 16, 16, seed=seed)
        return lambda indices, members: drawn[:, indices]

    samplers = {"model": law(0.7, 1), "oracle": law(1.0, 2)}
    samplers["none"] = lambda indices, members: torch.zeros_like(truth[None, indices])
    origin = Origin(reference=reference)
    rows = score_generated(truth, samplers, LABELS, members=8, origin=origin).rows
    assert set(rows[rows["score"].isin(NAMES)]["method"]) == set(samplers)
    for method in samplers:
        assert set(select(rows, method=method)["score"]) >= NAMES, method
    ratio = find(rows, method="model", score="patch_max_crps_ratio")
    assert 1 < ratio.low < ratio.value < ratio.high and ratio.stage == "generated"
    assert find(rows, method="none", score="exceedance_reliability").value == 0
    assert find(rows, method="model", score="exceedance_reliability").value < 0.3
    without = score_generated(truth, samplers, LABELS, members=8).rows
    gone = NAMES - set(without["score"])
    assert gone == {"exceedance_brier", "exceedance_reliability"}
    others = rows[~rows["score"].isin([*gone, "cost_ms"])].reset_index(drop=True)
    assert others.equals(without[without["score"] != "cost_ms"].reset_index(drop=True))


def test_the_coupled_run_has_these_rows_at_every_lead_time():
    truth = normal(20, 3, 16, 16)
    ensembles = {"model": normal(8, 20, 3, 16, 16, seed=1), "oracle": normal(8, 20, 3, 16, 16)}
    rows = score_coupled(truth, ensembles, [1, 2, 3], LABELS).rows
    for lead in (1.0, 2.0, 3.0):
        there = select(rows, method="model", lead_time=lead)
        assert set(there["score"]) >= NAMES
    # over all lead times together the event has the frequency 0.01
    assert select(rows, score="exceedance_brier")["value"].between(0, 0.03).all()
