"""The compiled nonlinear term: its FFT, the terms, bits, and what is kept of it on disk."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch

from hpc_closure.spectral.cpu import line_kernels
from hpc_closure.spectral.cpu.line_kernels import LANES, apart
from hpc_closure.spectral.equations import advection
from hpc_closure.spectral.equations.advection import FORMS
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import PRECISIONS, Transform


def random_state(grid, members=1, precision="float64"):
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(members, *grid.shape, 2, generator=generator, dtype=torch.float64)
    return w.to(PRECISIONS[precision])


@pytest.mark.parametrize("size", [4, 6, 10, 16, 30, 32, 64])  # each radix, first and last
def test_the_fft_is_that_of_numpy(size):
    names = line_kernels.programs(size, "basdevant").whole.py_func.__globals__
    forward = names["TO_ROWS"].py_func.__globals__["FORWARD"]
    lines = np.random.default_rng(0).standard_normal((2, size, LANES))
    source, x, y, out = np.zeros((4, 2, apart(size)))
    source[:, : size * LANES] = lines.reshape(2, -1)
    tables = line_kernels.twiddles(size), line_kernels.CONSTANTS, LANES, np.arange(1)
    forward(source.ravel(), x.ravel(), y.ravel(), out.ravel(), tables)
    found = out[:, : size * LANES].reshape(2, size, LANES)
    expected = np.fft.fft(lines[0] + 1j * lines[1], axis=0)
    np.testing.assert_allclose(found[0] + 1j * found[1], expected, atol=1e-14 * size)


@pytest.mark.parametrize(
    "size, radices",
    [(4, (4,)), (16, (4, 4)), (64, (8, 8)), (256, (4, 8, 8)), (96, (3, 4, 8)), (50, (2, 5, 5))],
)
def test_radices(size, radices):
    assert line_kernels.radices(size) == radices


@pytest.mark.parametrize("size", [14, 2 * 3**7])
def test_other_sizes_go_by_whole_transforms(size):
    assert line_kernels.radices(size) == ()
    if size < 100:
        grid = Grid(size)
        assert FORMS["flux"](Transform(grid)).compiled is None


@pytest.mark.parametrize(
    "form, precision, size",
    [("basdevant", "float64", 50), ("flux", "float64", 30), ("flux", "float32", 24)],
)
def test_terms_are_those_of_whole_transforms(form, precision, size):
    grid = Grid(size)
    form = FORMS[form](Transform(grid, precision))
    w = random_state(grid, 3, precision)
    for state in (w, 2 * w):  # what a call leaves behind is nothing to the next
        found = form.tendency(state, torch.empty_like(w))
        expected = form.by_transforms(state, torch.empty_like(w))
        tolerance = 100 * torch.finfo(w.dtype).eps * expected.abs().max()
        assert (found - expected).abs().max() < tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size, precision", [(24, "float64"), (32, "float32")])
def test_bits_do_not_depend_on_the_members_beside(form, size, precision):
    grid = Grid(size)
    form = FORMS[form](Transform(grid, precision))
    w = random_state(grid, 5, precision)
    every = form.tendency(w, torch.empty_like(w)).clone()
    w[1] = torch.nan  # a member that is lost
    for rows in (slice(0, 1), slice(2, 4), slice(0, 5)):
        found = form.tendency(w[rows], torch.empty_like(w[rows]))
        same = [i for i in range(5)[rows] if i != 1]
        assert torch.equal(found[[i - rows.start for i in same]], every[same])


PROGRAM = """
import sys, torch
from hpc_closure.spectral.equations.advection import FORMS
from hpc_closure.spectral.modes.grid import Grid
from hpc_closure.spectral.modes.transform import Transform
for size in map(int, sys.argv[1:]):
    grid = Grid(size)
    w = torch.ones(1, *grid.shape, 2, dtype=torch.float64)
    FORMS["basdevant"](Transform(grid)).tendency(w, torch.empty_like(w))
"""


def first_calls(kept_in, *sizes):
    """In a process of its own, which reads what the ones before have kept."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, sizes)],
        env={**os.environ, "NUMBA_CACHE_DIR": str(kept_in)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_functions_that_were_kept_do_not_meet_others(tmp_path):
    """What one process kept is loaded beside what the next compiles: names must not be shared."""
    for sizes in ([16], [8, 16], [16, 32, 8]):
        first_calls(tmp_path, *sizes)
    assert len([*tmp_path.rglob("*_whole_basdevant*.nbi")]) == 3


@pytest.mark.parametrize("ending, left", [(".nbc", 3000), (".nbi", 100), (".nbi", 0)])
def test_what_was_kept_and_is_damaged_is_made_again(tmp_path, ending, left):
    first_calls(tmp_path, 4)
    (kept,) = tmp_path.rglob(f"*_whole_basdevant*{ending}")
    os.truncate(kept, left)
    first_calls(tmp_path, 4)


def test_wrong_functions_are_refused(monkeypatch):
    grid = Grid(24)
    form = FORMS["basdevant"](Transform(grid))
    monkeypatch.setattr(advection, "_COMPARED", set())
    right = form.compiled.tendency
    monkeypatch.setattr(form.compiled, "tendency", lambda w, out: right(w, out).mul_(1 + 1e-9))
    with pytest.raises(RuntimeError, match="remove Numba.s cache"):
        form.tendency(random_state(grid), torch.empty(1, *grid.shape, 2, dtype=torch.float64))


def test_without_a_place_to_keep_them_functions_are_compiled(monkeypatch):
    plain, asked = numba.njit, []

    def njit(**options):
        asked.append(options.get("cache", False))
        if asked[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return plain(**options)

    monkeypatch.setattr(numba, "njit", njit)
    made = line_kernels.programs.__wrapped__(4, "flux")
    assert any(asked) and callable(made.whole)
