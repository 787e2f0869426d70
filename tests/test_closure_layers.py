"""Both forms of the spectral convolution against a float64 sum over modes."""

import math

import pytest
import torch

from hpc_closure.closure.networks.blocks import (
    Convolution,
    Counts,
    FieldNetwork,
    LocalNetwork,
    LocalScoreNetwork,
)
from hpc_closure.closure.networks.layers import Conv1x1, SpectralConv, dft_matrices


def direct(layer, x):
    """The layer's definition, summed mode by mode in complex128."""
    batch, _, size, _ = x.shape
    modes = layer.modes
    points = torch.arange(size, dtype=torch.float64) / size
    ky = torch.arange(modes, dtype=torch.float64)
    kx = torch.cat([ky, ky - modes])
    phase_x = torch.exp(-2j * math.pi * torch.outer(kx, points))
    phase_y = torch.exp(-2j * math.pi * torch.outer(ky, points))
    x_hat = torch.einsum("kx,ly,bcxy->bckl", phase_x, phase_y, x + 0j) / size**2
    weight = torch.view_as_complex(layer.weight.double())
    out = torch.einsum("klio,bikl->bokl", weight, x_hat)
    c = torch.full((modes,), 2.0, dtype=torch.float64)
    c[0] = 1
    return torch.einsum("kx,ly,bokl->boxy", phase_x.conj(), phase_y.conj() * c[:, None], out).real


@pytest.mark.parametrize("form", ["fft", "matrix"])
@pytest.mark.parametrize("size,modes", [(16, 4), (16, 8), (24, 8), (30, 7), (32, 8), (48, 16)])
@pytest.mark.parametrize("batch", [1, 5])
def test_forms_equal_the_sum_over_modes(form, size, modes, batch):
    torch.manual_seed(0)
    layer = SpectralConv(3, 4, modes, form=form).double()
    x = torch.randn(batch, 3, size, size, dtype=torch.float64)
    assert torch.allclose(layer(x), direct(layer, x), atol=1e-12)
    single = layer.float()(x.float())
    assert (single - direct(layer, x)).norm() < 2e-6 * direct(layer, x).norm()


def test_gradients_of_the_two_forms_agree():
    torch.manual_seed(1)
    layer = SpectralConv(2, 3, 5).double()
    x = torch.randn(4, 2, 18, 18, dtype=torch.float64, requires_grad=True)
    grads = []
    for form in ("fft", "matrix"):
        layer.form = form
        out = layer(x)
        grads.append(torch.autograd.grad((out**3).sum(), [x, layer.weight]))
    for one, other in zip(*grads):
        assert torch.allclose(one, other, atol=1e-12)


def test_same_function_on_every_grid():
    """A band-limited input gives the same band-limited output on any grid."""
    torch.manual_seed(2)
    layer = SpectralConv(1, 1, 4).double()
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    x_hat = torch.fft.rfft2(x, norm="forward")
    x_hat[..., 5:] = 0
    x_hat[..., 4:-3, :] = 0
    x = torch.fft.irfft2(x_hat, norm="forward")
    fine_hat = torch.zeros(1, 1, 32, 17, dtype=torch.complex128)
    fine_hat[..., :4, :5], fine_hat[..., -3:, :5] = x_hat[..., :4, :5], x_hat[..., -3:, :5]
    fine = torch.fft.irfft2(fine_hat, norm="forward")
    for form in ("fft", "matrix"):
        layer.form = form
        assert torch.allclose(layer(fine)[..., ::2, ::2], layer(x), atol=1e-12)


def test_parameters_are_real_and_errors_name_the_sizes():
    layer = SpectralConv(2, 2, 8)
    assert not any(p.is_complex() for p in layer.parameters())
    with pytest.raises(ValueError, match="at least 16"):
        layer(torch.zeros(1, 2, 12, 12))
    with pytest.raises(ValueError, match="expected auto"):
        SpectralConv(2, 2, 8, form="fast")


def test_evaluation_follows_the_weights():
    layer = SpectralConv(2, 2, 4).eval()
    x = torch.randn(1, 2, 16, 16)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
        layer.weight.mul_(2)
        assert torch.allclose(layer(x), 2 * before, atol=1e-6)
        layer.load_state_dict({"weight": layer.weight / 2})
        assert torch.allclose(layer(x), before, atol=1e-6)
        assert torch.allclose(layer.double()(x.double()).float(), before, atol=1e-5)


def test_matrices_are_inverse_on_kept_modes():
    forward_y, _, _, inverse_y = dft_matrices(16, 5, torch.float64, "cpu")
    signal = torch.cos(2 * math.pi * 3 * torch.arange(16, dtype=torch.float64) / 16 + 0.3)
    assert torch.allclose(signal @ forward_y @ inverse_y, signal, atol=1e-13)


def test_pointwise_is_a_linear_map_per_point():
    layer = Conv1x1(3, 2)
    x = torch.randn(4, 3, 6, 6)
    expected = torch.einsum("oi,bixy->boxy", layer.weight, x) + layer.bias[:, None, None]
    assert torch.allclose(layer(x), expected, atol=1e-6)


# ---- lines and cubes


def direct_of(layer, x):
    """The layer's definition for any number of sides, summed mode by mode in complex128."""
    sides, size = layer.dimensions, x.shape[-1]
    points = torch.arange(size, dtype=torch.float64) / size
    half = torch.arange(layer.modes, dtype=torch.float64)
    both = torch.cat([half, half - layer.modes])
    phases = [
        torch.exp(-2j * math.pi * torch.outer(k, points)) for k in [*[both] * (sides - 1), half]
    ]
    x_hat = x + 0j
    for phase in phases:  # the first side goes, its modes come last
        x_hat = torch.einsum("kx,bcx...->bc...k", phase, x_hat) / size
    weight = torch.view_as_complex(layer.weight.double()).permute(-2, -1, *range(sides))
    out = torch.einsum("io...,bi...->bo...", weight, x_hat)
    twice = torch.where(half > 0, 2.0, 1.0)
    for place, phase in enumerate(phases):
        back = phase.conj() * (twice[:, None] if place == sides - 1 else 1.0)
        out = torch.einsum("kx,bck...->bc...x", back, out)
    return out.real


@pytest.mark.parametrize("sides,size,modes", [(1, 16, 5), (2, 12, 3), (3, 8, 3), (3, 6, 3)])
def test_a_convolution_of_any_number_of_sides_is_the_sum_over_modes(sides, size, modes):
    torch.manual_seed(0)
    layer = SpectralConv(2, 3, modes, form="fft", dimensions=sides).double()
    assert layer.weight.shape == (*[2 * modes] * (sides - 1), modes, 2, 3, 2)
    x = torch.randn(4, 2, *[size] * sides, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert torch.allclose(out, direct_of(layer, x), atol=1e-12)
    grads = torch.autograd.grad((out**3).sum(), [x, layer.weight])
    expected = torch.autograd.grad((direct_of(layer, x) ** 3).sum(), [x, layer.weight])
    for one, other in zip(grads, expected):
        assert torch.allclose(one, other, atol=1e-11)


def test_what_lines_and_cubes_do_not_have_is_one_line():
    with pytest.raises(ValueError, match="matrix is for two dimensions, this flow has 3: use"):
        SpectralConv(1, 1, 2, form="matrix", dimensions=3)
    with pytest.raises(ValueError, match="field is 8x8x6; modes=2 needs a cubic grid of at least"):
        SpectralConv(1, 1, 2, dimensions=3)(torch.zeros(1, 1, 8, 8, 6))
    with pytest.raises(ValueError, match="field is 3; modes=2 needs a line of at least 4"):
        SpectralConv(1, 1, 2, dimensions=1)(torch.zeros(1, 1, 3))


@pytest.mark.parametrize("sides", [1, 2, 3])
def test_networks_move_with_their_input(sides):
    """Networks that read no coordinates map a moved field to the moved output."""
    torch.manual_seed(1)
    channels, size = 3, 8
    local = LocalNetwork(channels + 2 * sides, 5, 2, sides, 2).double()
    score = LocalScoreNetwork(channels, range(0), 5, 2, 2, sides).double()
    fourier = FieldNetwork(channels, 6, 2, 2, fields=2, dimensions=sides).double()
    for network in (local, score, fourier):
        for weight in network.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
    points = [size] * sides
    x = torch.randn(2, channels, *points, dtype=torch.float64)
    noisy = torch.randn(2, 4, *points, dtype=torch.float64)
    counts = Counts.of(sides)
    numbers = torch.randn(2, 2 * counts.summary, dtype=torch.float64)
    angle, largest = torch.full((1,), 0.7).double(), torch.zeros(2, 2 * counts.largest).double()

    def outputs(move):
        places = torch.zeros(2, 2 * sides, *points, dtype=torch.float64)
        encoded = score.encode(move(x), numbers)
        return (
            local(torch.cat([move(x), places], 1), numbers),
            score(move(noisy), largest, angle, encoded)[0],
            fourier(move(x), numbers),
        )

    for axis in range(-sides, 0):
        plain, moved = outputs(lambda f: f), outputs(lambda f: torch.roll(f, 3, axis))
        for one, other in zip(plain, moved):
            assert one.shape == (2, 2, *points) and float(one.detach().std()) > 1e-3
            assert torch.allclose(torch.roll(one, 3, axis), other, atol=1e-10)


def test_a_convolution_reads_its_neighbours_on_every_side():
    for sides in (1, 2, 3):
        layer = Convolution(1, 1, sides)
        layer.weight.data.fill_(1.0)
        x = torch.zeros(1, 1, *[6] * sides)
        x.view(-1)[0] = 1.0
        assert float(layer(x).sum()) == 3 ** sides and float(layer(x).max()) == 1


def test_a_line_keeps_the_weights_of_a_row():
    layer = Convolution(2, 3, 1)
    assert layer.weight.shape == (3, 2, 1, 3)
    x = torch.randn(4, 2, 10)
    assert torch.equal(layer(x), layer(x.unsqueeze(-2)).squeeze(-2))
