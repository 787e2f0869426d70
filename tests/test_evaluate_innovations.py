"""What the law of innovations is told from: synthetic ones, whose numbers are known."""

import math

import pytest
import torch

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.closure.part_report import PartReport
from hpc_closure.evaluate.rows import find, frame
from hpc_closure.evaluate.scores.generated.gains import gains
from hpc_closure.evaluate.scores.generated.innovations import Innovations, local_features, verdict

B, SIZE, COUNT = band(5), 16, 2400
SLOW = 3  # shells up to which modes have a scale of their own


def white(stream=0):
    """Gaussian modes (S, ...) of unit variance."""
    return keyed_noise.white_spectra(B, 3, "innovations", range(COUNT), stream)


def features_of(stream=9):
    """Those of smooth random states."""
    k2 = B.grid.integer_k2.double()
    w_hat = white(stream) * torch.where(k2 > 0, 1 / (1 + k2), 0.0)
    return local_features(w_hat, B, SIZE)


def laplace(which):
    """Modes in the chosen shells times a scale s of their own for each, with E s^2 = 1 and
    E s^4 = 2: each number has the excess kurtosis 3 (2 - 1) = 3."""
    scale = keyed_noise.uniforms(3, "scale", range(COUNT), 0, 2 * B.shape[0] * B.shape[1])
    scale = scale[:, : B.shape[0] * B.shape[1]].unflatten(1, B.shape)
    square = torch.where(scale < 0.2, 3.0, 0.5)  # mean 1, mean square 2: excess 3
    q_hat = white()
    scaled = q_hat * square.sqrt()
    # a real field: the column ky = 0 is what it was
    scaled[..., 0] = q_hat[..., 0]
    return torch.where(which(B.grid.shell()), scaled, q_hat)


def rows_of(q_hat, features=None, members=24):
    features = features_of() if features is None else features
    members = torch.arange(COUNT) % members
    records = []
    for method, one in (("model", q_hat), ("mean_gp", white(1))):
        records += [
            {**row, "method": method} for row in Innovations(B, one, features, members).scores()
        ]
    return frame(records)


def value(rows, score, shell=None, method="model"):
    return find(rows, method=method, score=score, shell=shell).value


@pytest.fixture(scope="module")
def gaussian():
    return rows_of(white())


def test_a_gaussian_law_is_seen_as_one(gaussian):
    for method in ("model", "mean_gp"):
        for score in ("kurtosis", "kurtosis_field", "skewness", "variance_follows_state"):
            assert abs(value(gaussian, score, method=method)) < 0.02
        assert value(gaussian, "variance_high_over_low", method=method) == pytest.approx(
            1, abs=0.03
        )
        for score in ("kurtosis_patterns", "kurtosis_patches"):
            assert abs(value(gaussian, score, method=method)) < 0.1
    words, told = verdict(gaussian)
    assert (
        words.startswith("Gaussian in every shell (excess kurtosis within ±0.0")
        and "almost nothing" in words
    )
    assert told.startswith("draws of its own Gaussian law: excess kurtosis of the field ")
    kurtosis = gaussian[(gaussian.score == "kurtosis") & (gaussian.method == "model")]
    inside = (kurtosis.low < 0.01) & (kurtosis.high > -0.01)
    assert inside.mean() > 0.7


def test_modes_with_heavy_tails_are_seen_in_their_shells():
    shell = B.grid.shell().expand(B.shape)
    rows = rows_of(laplace(lambda shell: shell <= SLOW) / (1 + shell))
    for number in range(1, SLOW + 1):
        # the one mode or so with ky = 0 is not scaled
        scaled = int((shell[:, 1:] == number).sum())
        share = scaled / (scaled + int((shell[: B.modes + 1, 0] == number).sum()))
        assert value(rows, "kurtosis", number) == pytest.approx(3 * share, rel=0.15)
    for number in range(SLOW + 1, 6):
        assert abs(value(rows, "kurtosis", number)) < 0.08
    assert value(rows, "kurtosis_patterns") > 0.5
    words, _ = verdict(rows)
    assert words.startswith("not Gaussian in shells 1, 2, 3 (excess kurtosis up to 2")
    assert "nothing to add" not in words


def test_a_variance_that_follows_the_state_is_seen():
    """q = s(x) g(x) with s^2 = 1 + f(x) / mean(f), f = |w|: Gaussian given the state."""
    features = features_of()
    shape = 1 + features[:, 0] / features[:, 0].mean()
    # without a cut to the band the law is known at every point
    g = white()
    fields = B.to_physical(g, SIZE)
    smooth = B.to_spectral(fields * shape.sqrt())
    rows = rows_of(smooth, features)
    made = B.to_physical(smooth, SIZE).square()
    slope = torch.stack([torch.ones_like(shape), shape], -1).flatten(0, -2)
    fit = torch.linalg.lstsq(slope, made.flatten()[:, None]).solution
    guess = (slope @ fit)[:, 0]
    told = float(guess.var() / made.var())
    assert value(rows, "variance_follows_state") == pytest.approx(told, rel=0.2)
    ordered = shape.flatten().sort()
    by_shape = made.flatten()[ordered.indices]
    quarter = len(by_shape) // 4
    ratio = float(by_shape[-quarter:].mean() / by_shape[:quarter].mean())
    assert ratio > 1.5
    assert value(rows, "variance_high_over_low") == pytest.approx(ratio, rel=0.1)
    assert value(rows, "kurtosis_field") > 0.1 and abs(value(rows, "kurtosis")) < 0.1
    assert verdict(rows)[0].endswith("their variance follows the state")


def test_a_skewed_field_and_patches_are_seen():
    """x + c (x^2 - 1): skewness and kurtosis of a point are those of the polynomial."""
    c = 0.2
    field = torch.randn(COUNT, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()
    field = field + c * (field.square() - 1)
    fine = band(SIZE // 2 - 1)  # nearly all modes of the grid
    q_hat = fine.to_spectral(field - field.mean((1, 2), keepdim=True))
    members = torch.arange(COUNT) % 24
    rows = frame(
        {**row, "method": "model"}
        for row in Innovations(fine, q_hat, features_of(), members).scores()
    )
    whole = fine.to_physical(q_hat, SIZE)
    whole = whole / whole.square().mean().sqrt()
    assert value(rows, "skewness") == pytest.approx(float(whole.pow(3).mean()), rel=1e-6)
    assert value(rows, "skewness") > 0.5 * (6 * c + 8 * c**3) / (1 + 2 * c**2) ** 1.5
    assert value(rows, "kurtosis_field") == pytest.approx(float(whole.pow(4).mean()) - 3, rel=1e-6)
    assert value(rows, "kurtosis_patches") > 0.02


def test_kurtosis_of_patches_and_patterns_is_of_their_leading_components():
    """One pattern with two values, as large as the rest: kurtosis of that mixture."""
    sign = torch.where(keyed_noise.uniforms(4, "sign", range(COUNT), 0, 1) < 0.5, -1.0, 1.0)
    wave = torch.zeros(B.shape, dtype=torch.complex128)
    wave[1, 1] = 12.0
    rows = rows_of(0.3 * white() + sign[..., None] * wave)
    assert value(rows, "kurtosis_patterns") < -2 / 8 + 0.05  # one of eight patterns has -2
    assert value(rows, "kurtosis_patches") < -0.1
    assert verdict(rows)[0].startswith("not Gaussian in shell 1 ")


def test_strain_and_slope_of_a_wave():
    x = torch.arange(SIZE).double() / SIZE
    wave = torch.cos(2 * math.pi * (2 * x[:, None] + x)).expand(1, -1, -1)
    size, slope, strain = local_features(B.to_spectral(wave), B, SIZE)[0]
    k = 2 * math.pi * math.sqrt(5)
    assert torch.allclose(size, wave[0].abs())
    assert torch.allclose(slope, k * (1 - wave[0].square()).clamp(min=0).sqrt(), atol=1e-6)
    # of one wave the strain is as large as the vorticity
    assert torch.allclose(strain, wave[0].square())


class Gated:
    def parts(self):
        return [
            PartReport("mean: regression", False, True, (), "w"),
            PartReport("mean: cnn", True, True, (0.0, 0.9, 0.0, 1.1)),
            PartReport("amplitude: fno", True, True, (0.25,)),
            PartReport("residual: score", True, False, (0.0, 0.0, 0.0, 0.0), "no gain"),
        ]


def test_what_unseen_members_granted_is_told_shell_by_shell():
    found = list(gains(Gated().parts()))
    mean = {row["shell"]: row["value"] for row in found if row["score"] == "gain_mean"}
    assert mean == {1: 0.9, 2: 0.0, 3: 1.1}
    assert [row["value"] for row in found if row["score"] == "gain_residual"] == [0.0] * 3
    (single,) = (row for row in found if row["score"] == "gain_amplitude")
    assert single["value"] == 0.25 and single["shell"] is None
