"""Keyed draws: ids of two indices, items of any width, members and streams apart."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_closure.closure.fields import keyed_noise
from hpc_closure.closure.fields.modes import band
from hpc_closure.experiment.schema import Generate


def members_allowed() -> int:
    """The largest number of trajectories, so of cases, that the schema takes."""
    return next(m.le for m in Generate.model_fields["members"].metadata if hasattr(m, "le"))


def test_no_two_pairs_have_one_id():
    """The old id, first x 1,000,003 + second, met its neighbour's at 1,000,003 members."""
    most = members_allowed()
    assert most == 10_000_000
    edges = {0, 1, 2, 1_000_002, 1_000_003, 1_000_004, 2_000_006, most - 1, most}
    edges |= {2**k + d for k in range(3, 31) for d in (-1, 0, 1)} | {keyed_noise.LARGEST_INDEX}
    pairs = list(product(sorted(edges), repeat=2))
    ids = [keyed_noise.pair(*one) for one in pairs]
    assert len(set(ids)) == len(pairs)
    # exact: both indices can be read off, so no two pairs of all 10^7 x 10^7 can meet
    assert [((one >> 32) - 1, one & 0xFFFFFFFF) for one in ids] == pairs
    # none is the id of a trajectory alone, and all fit the words that keep ids
    assert min(ids) > most and max(ids) < 2**63


@pytest.mark.parametrize("indices", [(-1, 0), (0, -1), (2**31, 0), (0, 2**31 - 1)])
def test_an_index_that_is_none_is_refused(indices):
    with pytest.raises(ValueError, match="of a draw: expected 0 to 2147483646"):
        keyed_noise.pair(*indices)


def test_members_of_neighbouring_cases_draw_apart():
    one = keyed_noise.normals(
        0, "sample", [keyed_noise.pair(3, 1_000_003), keyed_noise.pair(4, 0)], 0, 64
    )
    assert not np.isclose(one[0], one[1]).any()


ITEMS = st.tuples(st.integers(0, 2**63), st.integers(1, 300))


@given(st.lists(ITEMS, min_size=2, max_size=4, unique_by=lambda one: one[0]))
def test_items_of_different_widths_share_no_words(items):
    """Item 1 of width 256 and item 2 of width 128 once began at the same counter."""
    words = [
        set(keyed_noise._words(5, keyed_noise.Key(1, "a", [4], item), width).flat)
        for item, width in items
    ]
    assert [len(one) for one in words] == [width for _, width in items]
    assert all(one.isdisjoint(other) for one, other in combinations(words, 2))


def test_calls_with_layouts_of_two_sizes_draw_apart():
    one, other = (
        keyed_noise.normals(0, "sample", [7], call, size) for call, size in [(1, 256), (2, 128)]
    )
    assert not np.isin(one.numpy(), other.numpy()).any()


def test_a_narrow_draw_is_the_beginning_of_a_wide_one():
    wide = keyed_noise.normals(2, "a", [1, 5], 9, 41)
    assert (keyed_noise.normals(2, "a", [5], 9, 6) == wide[1:, :6]).all()
    assert (
        keyed_noise.uniforms(2, "a", [5], 9, 1) == keyed_noise.uniforms(2, "a", [1, 5], 9)[1:, :1]
    ).all()


def test_an_item_before_the_first_is_refused():
    with pytest.raises(ValueError, match="item -1 of a draw"):
        keyed_noise.normals(0, "a", [0], -1, 4)


def independent(first, second):
    """Correlations of two sets of draws, of values, squares and one with the other, in sigma."""
    values = [(one, one.square() - 1) for one in (first, second)]
    for a, b in product(*values):
        yield float((a * b).sum() / (a.square() * b.square()).sum().sqrt())


@pytest.mark.parametrize(
    "other",
    [
        dict(ids=range(1, 401)),  # a member and the next
        dict(stream=keyed_noise.STREAM_BASE),
        dict(stream=keyed_noise.STREAM_MEMORY),
        dict(stream=keyed_noise.STREAM_STEP),
        dict(item=1),
        dict(seed=1),
        dict(stage="train"),
    ],
    ids=lambda other: next(iter(other)) + str(next(iter(other.values()))),
)
def test_draws_of_members_streams_and_items_are_independent(other):
    """80,000 pairs each: every correlation within four of its own standard errors."""
    key = dict(seed=0, stage="sample", ids=range(400), item=0, width=200)
    one, two = keyed_noise.normals(**key), keyed_noise.normals(**{**key, **other})
    assert all(abs(sigma) < 4 for sigma in independent(one, two))


def test_members_are_white_among_each_other():
    """The covariance of 64 members' draws of 20,000 normals is the identity within its error."""
    z = keyed_noise.normals(3, "sample", range(64), 2, 20_000)
    error = (z @ z.T / z.shape[1]).fill_diagonal_(0.0).abs().max() * z.shape[1] ** 0.5
    assert 2.5 < float(error) < 5.2  # the largest of 2,016 standard normals


def test_white_spectra_are_white_in_every_mode():
    b = band(6)
    z = keyed_noise.white_spectra(b, 0, "sample", range(4000), 3)
    power = z.abs().square().mean(0)
    assert float((power - 1).abs().max()) < 6 * 2**0.5 / 4000**0.5
    assert float((z[:, 0, 0].imag).abs().max()) == 0.0
