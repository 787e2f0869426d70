"""Keyed draws: ids of two indices, items of any width, members and streams apart."""

from itertools import product

import numpy as np
import pytest

from hpc_closure.closure import draws
from hpc_closure.experiment.schema import Generate


def members_allowed() -> int:
    """The largest number of trajectories, so of cases, that the schema takes."""
    return next(m.le for m in Generate.model_fields["members"].metadata if hasattr(m, "le"))


def test_no_two_pairs_have_one_id():
    """The old id, first x 1,000,003 + second, met its neighbour's at 1,000,003 members."""
    most = members_allowed()
    assert most == 10_000_000
    edges = {0, 1, 2, 1_000_002, 1_000_003, 1_000_004, 2_000_006, most - 1, most}
    edges |= {2**k + d for k in range(3, 31) for d in (-1, 0, 1)} | {draws.LARGEST_INDEX}
    pairs = list(product(sorted(edges), repeat=2))
    ids = [draws.pair(*one) for one in pairs]
    assert len(set(ids)) == len(pairs)
    # exact: both indices can be read off, so no two pairs of all 10^7 x 10^7 can meet
    assert [((one >> 32) - 1, one & 0xFFFFFFFF) for one in ids] == pairs
    # none is the id of a trajectory alone, and all fit the words that keep ids
    assert min(ids) > most and max(ids) < 2**63


@pytest.mark.parametrize("indices", [(-1, 0), (0, -1), (2**31, 0), (0, 2**31 - 1)])
def test_an_index_that_is_none_is_refused(indices):
    with pytest.raises(ValueError, match="of a draw: expected 0 to 2147483646"):
        draws.pair(*indices)


def test_members_of_neighbouring_cases_draw_apart():
    one = draws.normals(0, "sample", [draws.pair(3, 1_000_003), draws.pair(4, 0)], 0, 64)
    assert not np.isclose(one[0], one[1]).any()
