"""Grids, retained modes and changes of resolution."""

import numpy as np
import pytest
import torch

from hpc_closure.spectral.modes.grid import (
    Grid,
    hermitian,
    resize,
    shell_sum,
    to_fields,
    to_spectra,
)
from hpc_closure.spectral.modes.resolution import retained_modes
from hpc_closure.spectral.modes.transform import Transform


@pytest.mark.parametrize("size, modes", [(64, 21), (128, 42), (256, 85), (48, 15), (16, 5)])
def test_two_thirds_rule(size, modes):
    assert retained_modes(size) == modes
    assert Grid(size).shape == (2 * modes + 1, modes + 1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"size": 7}, "even and at least 4, got 7"),
        ({"size": 2}, "even and at least 4, got 2"),
        ({"size": (8, 6, 5)}, r"even and at least 4, got \(8, 6, 5\)"),
        ({"size": 8, "length": 0}, "length must be positive, got 0"),
        ({"size": 8, "length": (1.0, -1.0)}, "length must be positive"),
        ({"size": 8, "dimensions": 4}, "dimensions must be 1, 2 or 3, got 4"),
        (
            {"size": (8, 8), "length": (1.0, 1.0, 1.0)},
            r"length .* has 3 entries, expected 2",
        ),
        ({"size": (8, 8), "dimensions": 3}, r"size \(8, 8\) has 2 entries, expected 3"),
    ],
)
def test_bad_grids_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Grid(**arguments)


#: a line, a square, a plane of unequal sides, a cube, a box of unequal sides
GRIDS = [
    Grid(24, 3.0, dimensions=1),
    Grid(16, 2.0),
    Grid((48, 32), (1.5, 1.0)),
    Grid(12, dimensions=3),
    Grid((8, 16, 12), (1.0, 2.0, 0.7)),
]


def real_field(grid, *lead, seed=0):
    """Random retained spectra of real fields."""
    generator = torch.Generator().manual_seed(seed)
    w_hat = torch.randn(*lead, *grid.shape, dtype=torch.complex128, generator=generator)
    return hermitian(w_hat, grid.dimensions)


def direct_sum(grid, w_hat):
    """Evaluate a spectrum at every point of the grid, one mode at a time."""
    phase = sum(k[..., *[None] * grid.dimensions] * x for k, x in zip(grid.k, grid.coordinates()))
    weights = (grid.weights * w_hat)[..., *[None] * grid.dimensions]
    return (weights * torch.exp(1j * phase)).sum(tuple(range(grid.dimensions))).real


def test_a_number_is_the_same_for_all_sides():
    assert Grid(16) == Grid((16, 16), (1.0, 1.0)) == Grid(16, dimensions=2)
    assert Grid(16, dimensions=3) == Grid((16,) * 3) == Grid(16, (1.0, 1.0, 1.0))
    assert Grid((16,)) == Grid(16, dimensions=1) and len({Grid(16), Grid((16, 16))}) == 1


@pytest.mark.parametrize("grid", GRIDS)
def test_a_spectrum_is_a_sum_of_waves(grid):
    w_hat = real_field(grid)
    fields = to_fields(w_hat, grid.sizes)
    assert fields.shape == grid.points and w_hat.shape == grid.shape
    torch.testing.assert_close(fields, direct_sum(grid, w_hat), rtol=0, atol=1e-11)
    back = to_spectra(fields, grid.mode_counts)
    torch.testing.assert_close(back, w_hat, rtol=0, atol=1e-13)
    power = (grid.weights * w_hat.abs() ** 2).sum()
    assert float(power) == pytest.approx(float(fields.square().mean()), rel=1e-12)
    assert float(grid.shell_sum(w_hat.abs() ** 2).sum()) == pytest.approx(float(power), rel=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_hermitian_writes_what_a_real_field_has(grid):
    """Spectra of fields pass unchanged, others are those of the field that they mean."""
    w_hat = torch.randn(2, *grid.shape, dtype=torch.complex128)
    real = hermitian(w_hat, grid.dimensions)
    again = to_spectra(to_fields(real, grid.sizes), grid.mode_counts)
    torch.testing.assert_close(again, real, rtol=0, atol=1e-13)
    assert torch.equal(hermitian(real, grid.dimensions), real)
    assert torch.equal(real[..., 1:], w_hat[..., 1:])
    k = torch.stack([one.expand(grid.shape) for one in grid.integer_k], -1)
    for number in torch.nonzero(k[..., -1] == 0):
        vector = k[tuple(number)]
        stored = real[(..., *number)]
        # the modes are in the order of the transform, so -k is the place counted from the end
        assert torch.equal(stored, real[(..., *(-vector).tolist())].conj())
        signs = [value for value in vector.tolist() if value]
        if signs and signs[-1] > 0:
            assert torch.equal(stored, w_hat[(..., *number)])


def test_hermitian_has_gradients():
    w_hat = torch.randn(1, *Grid(8, dimensions=3).shape, dtype=torch.complex128)
    w_hat.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: torch.view_as_real(hermitian(w, 3)), w_hat)


@pytest.mark.parametrize("grid", GRIDS)
def test_other_numbers_of_modes_mean_the_same_field(grid):
    w_hat = real_field(grid, 2)
    finer = Grid(tuple(size + 6 * (side + 1) for side, size in enumerate(grid.sizes)))
    more = resize(w_hat, finer.mode_counts)
    assert more.shape == (2, *finer.shape) and torch.equal(resize(more, grid.mode_counts), w_hat)
    power = (finer.weights * more.abs() ** 2).sum()
    assert float(power) == pytest.approx(float((grid.weights * w_hat.abs() ** 2).sum()))
    twice = tuple(2 * size for size in grid.sizes)
    every_second = (..., *[slice(None, None, 2)] * grid.dimensions)
    torch.testing.assert_close(
        to_fields(more, twice)[every_second],
        to_fields(w_hat, grid.sizes),
        rtol=0,
        atol=1e-12,
    )
    # coarse points cannot carry all modes
    few = tuple(2 * (K // 2) + 2 for K in grid.mode_counts)
    cut = resize(w_hat, tuple(K // 2 for K in grid.mode_counts))
    assert torch.equal(to_fields(w_hat, few), to_fields(cut, few))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_number_for_equal_sides_is_one_per_side(dimensions):
    grid = Grid(12, dimensions=dimensions)
    w_hat = real_field(grid, 3)
    for modes in (0, 2, 5):
        assert torch.equal(resize(w_hat, modes, dimensions), resize(w_hat, (modes,) * dimensions))
    fields = to_fields(w_hat, 14, dimensions)
    assert torch.equal(fields, to_fields(w_hat, (14,) * dimensions))
    assert torch.equal(to_spectra(fields, 3, dimensions), to_spectra(fields, (3,) * dimensions))
    assert torch.equal(
        to_spectra(fields, 0, dimensions).flatten(1),
        to_spectra(fields, 0, dimensions).flatten(1)[:, :1],
    )


def test_a_number_for_unequal_sides_is_refused():
    grid = Grid((48, 32), (1.5, 1.0))
    for name, words in [("size", "points"), ("length", "lengths"), ("modes", "modes")]:
        with pytest.raises(ValueError, match=f"sides of equal {words}, the grid has"):
            getattr(grid, name)
    with pytest.raises(ValueError, match="equal lengths"):
        grid.integer_k2
    with pytest.raises(ValueError, match=r"\(2K \+ 1, K \+ 1\) modes, got \(31, 11\)"):
        resize(real_field(grid), 4)
    with pytest.raises(ValueError, match=r"got \(30, 11\)"):
        resize(torch.zeros(30, 11), (4, 4))
    with pytest.raises(ValueError, match="kz needs three sides, the grid has 2"):
        grid.kz


@pytest.mark.parametrize("grid", GRIDS)
def test_wavenumbers_groups_and_shells(grid):
    unit = 2 * np.pi / max(grid.lengths)
    k2 = sum(k**2 for k in np.broadcast_arrays(*[k.numpy() for k in grid.k]))
    np.testing.assert_allclose(grid.k2, k2, rtol=1e-13)
    inverse = np.divide(1, k2, out=np.zeros_like(k2), where=k2 > 0)
    np.testing.assert_allclose(grid.inverse_k2, inverse, rtol=1e-13)
    np.testing.assert_array_equal(grid.shell(), np.floor(np.sqrt(k2) / unit + 0.5 + 1e-6))
    # a group holds one |k|^2, and no other group has it
    of_group = grid.group_k2[grid.groups]
    np.testing.assert_allclose(of_group * unit**2, k2, rtol=1e-12)
    assert bool((grid.group_k2[1:] > grid.group_k2[:-1] * (1 + 1e-6)).all())
    assert grid.groups.unique().tolist() == list(range(len(grid.group_k2)))
    if len(set(grid.lengths)) == 1:
        expected = torch.unique(grid.integer_k2, return_inverse=True)
        assert torch.equal(grid.groups, expected[1])
        assert torch.equal(grid.group_k2, expected[0].double())


def test_lengths_in_a_ratio_share_groups():
    """On a box of lengths 1.5 and 1, (3, 0) and (0, 2) have the same length."""
    grid = Grid((48, 32), (1.5, 1.0))
    assert grid.groups[3, 0] == grid.groups[0, 2] != grid.groups[2, 0]
    assert int(grid.shell()[0, 1]) == 2 and int(grid.shell()[1, 0]) == 1
    # roundings of |k|^2 differ between these two modes
    third = Grid((32, 32), (0.3, 0.1))
    assert third.groups[9, 0] == third.groups[0, 3]
    assert len(third.group_k2) == len(torch.unique((third._scaled_k2).round()))


def test_parseval():
    grid = Grid(32, length=2.5)
    w_hat = hermitian(torch.randn(3, *grid.shape, dtype=torch.complex128))
    field = Transform(grid).to_physical(w_hat)
    energy = (grid.weights * w_hat.abs() ** 2).sum((-2, -1))
    torch.testing.assert_close(energy, field.square().mean((-2, -1)), rtol=1e-13, atol=0)


def test_resize_keeps_the_field():
    small, large = Grid(32), Grid(48)
    w_hat = hermitian(torch.randn(2, *small.shape, dtype=torch.complex128))
    padded = resize(w_hat, large.modes)
    assert padded.shape[1:] == large.shape
    assert torch.equal(resize(padded, small.modes), w_hat)
    fine = Transform(large).to_physical(padded)
    torch.testing.assert_close(fine[:, ::3, ::3], Transform(small).to_physical(w_hat)[:, ::2, ::2])


def test_shells_count_every_mode():
    grid = Grid(24)
    assert int(grid.shell().max()) + 1 == grid.num_shells
    assert grid.shell()[0, 0] == 0 and grid.shell()[1, 1] == 1 and grid.shell()[-3, 4] == 5


@pytest.mark.parametrize("dimensions", [1, 2])
def test_shell_sums_of_a_spectrum_add_up_to_the_mean_square(dimensions):
    grid = Grid(24, length=3.0, dimensions=dimensions)
    w_hat = hermitian(torch.randn(5, *grid.shape, dtype=torch.complex128), dimensions)
    sums = grid.shell_sum(w_hat.abs() ** 2)
    assert sums.shape == (5, grid.num_shells) and sums.dtype == torch.float64
    field = Transform(grid).to_physical(w_hat)
    mean_square = field.square().flatten(1).mean(1)
    torch.testing.assert_close(sums.sum(1), mean_square, rtol=1e-13, atol=0)
    one = torch.zeros(grid.shape)
    one[..., 3] = 1.0  # |ky| = 3 has a second mode each, -k, that is not stored
    expected = [2.0 * int((grid.shell()[..., 3] == s).sum()) for s in range(grid.num_shells)]
    assert grid.shell_sum(one).tolist() == expected


def test_shell_sums_add_in_the_order_of_the_modes():
    grid = Grid(24)
    values = torch.randn(2, 3, *grid.shape, dtype=torch.float64)
    sums = shell_sum(values, grid.shell())
    by_hand = [
        np.bincount(grid.shell().numpy().ravel(), row.ravel())
        for row in values.numpy().reshape(6, -1)
    ]
    assert torch.equal(sums, torch.from_numpy(np.stack(by_hand)).reshape(2, 3, -1))
