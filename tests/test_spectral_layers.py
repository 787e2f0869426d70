"""The compiled nonlinear term of two layers."""

import pytest
import torch

from hpc_closure.spectral.cpu import layers
from hpc_closure.spectral.equations.two_layer import TwoLayerQG
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import PRECISIONS, Transform

EDDIES = TwoLayerQG(
    length=6.0, deformation_radius=0.5, depth_ratio=0.25, beta=2.0, mean_flow=(0.3, 0.1), drag=0.7
)


def terms_of(size, precision="float64"):
    return EDDIES.terms(Transform(Grid(size, EDDIES.length), precision), "flux")


def random_state(terms, members=1):
    generator = torch.Generator().manual_seed(1)
    shape = members, 2, *terms.transform.shape, 2
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    return w.to(terms.transform.real)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [16, 50, 64])  # columns of less and of more than a full block
def test_the_term_is_that_of_each_layer_by_transforms(size, precision):
    terms = terms_of(size, precision)
    w = random_state(terms, 3)
    for state in (w, 2 * w):  # what a call leaves behind is nothing to the next
        found = terms.nonlinear(state, torch.empty_like(w))
        expected = terms.by_transforms(state, torch.empty_like(w))
        for layer in (0, 1):
            difference = (found - expected)[:, layer].abs().max()
            largest = expected[:, layer].abs().max()
            assert difference < 100 * torch.finfo(w.dtype).eps * largest


def test_bits_do_not_depend_on_the_members_beside():
    terms = terms_of(32)
    w = random_state(terms, 5)
    every = terms.nonlinear(w, torch.empty_like(w)).clone()
    w[1] = torch.nan  # a member that is lost
    for rows in (slice(0, 1), slice(2, 4), slice(0, 5)):
        found = terms.nonlinear(w[rows], torch.empty_like(w[rows]))
        same = [i for i in range(5)[rows] if i != 1]
        assert torch.equal(found[[i - rows.start for i in same]], every[same])


def test_sizes_without_radices_go_by_whole_transforms():
    terms = terms_of(14)
    assert terms.compiled is None
    assert terms.nonlinear(random_state(terms), torch.empty_like(random_state(terms))).any()


def test_wrong_functions_are_refused(monkeypatch):
    terms = terms_of(24)
    monkeypatch.setattr(layers, "_COMPARED", set())
    right = terms.compiled.rate
    monkeypatch.setattr(terms.compiled, "rate", lambda w, out: right(w, out).mul_(1 + 1e-9))
    with pytest.raises(RuntimeError, match="remove Numba.s cache"):
        terms.nonlinear(random_state(terms), torch.empty_like(random_state(terms)))
