r"""Fourier layers: spectral convolution with weights stored as real numbers, in two equal forms.

For a field :math:`f` on an n x n periodic grid, with coefficients in the forward norm,

.. math:: (Kf)(x) = \mathrm{Re} \sum_{k_y=0}^{M-1} c_{k_y} \sum_{k_x=-M}^{M-1}
          R(k)\,\hat f(k)\, e^{2\pi i\,k\cdot x}, \qquad c_0 = 1,\ c_{k_y>0} = 2 .

The form ``fft`` uses FFTs. It projects the :math:`k_y = 0` column on Hermitian symmetry before the
complex-to-real transform, because learned weights break that symmetry and cuFFT then returns
values that depend on the batch size (pytorch#154496). The form ``matrix`` computes only the
retained modes, by products with real cosine and sine matrices. Its real part equals the
projection, so both forms agree. The matrix form can be compiled, runs under autocast, and is
faster if M is small compared with n.

On a line the sum over :math:`k_x` is absent; on a cube there is one more, over :math:`k_y` from -M
to M - 1, and the half axis is :math:`k_z`. There the form is ``fft``, and the plane
:math:`k_z = 0` is projected.

Source of the layer: Li et al., "Fourier neural operator for parametric PDEs", ICLR 2021.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["CheckpointedModule", "Conv1x1", "SpectralConv", "dft_matrices"]


@lru_cache(maxsize=None)  # never evicted, because CUDA graphs hold their addresses
def dft_matrices(size: int, modes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Compute the real matrices of the truncated transform and its inverse (right factors).

    Returns:
        ``forward_y`` (n, 2M), ``forward_x`` (2n, 4M), ``inverse_x`` (4M, 2n), ``inverse_y``
        (2M, n). The axis 2n runs over (x, re/im), the axis 4M over (re/im, kx). Computed in
        float64, stored as ``dtype``.
    """
    points = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
    ky = torch.arange(modes, dtype=torch.float64)
    kx = torch.cat([ky, ky - modes])
    angle_y, angle_x = torch.outer(points, ky), torch.outer(points, kx)
    weight = torch.full_like(ky, 2.0)
    weight[0] = 1.0
    forward_y = torch.cat([angle_y.cos(), -angle_y.sin()], dim=1) / size
    cos, sin = angle_x.cos(), angle_x.sin()
    forward_x = torch.stack([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], dim=1) / size
    inverse_x = torch.cat([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], dim=-1)
    inverse_y = torch.cat([(weight * angle_y.cos()).T, -(weight * angle_y.sin()).T], dim=0)
    return tuple(
        matrix.to(dtype=dtype, device=device).contiguous()
        for matrix in (forward_y, forward_x.flatten(0, 1), inverse_x.flatten(0, 1).T, inverse_y)
    )


class CheckpointedModule(nn.Module):
    """Network whose layers can be checkpointed.

    With checkpoints, training stores only the inputs of each layer and recomputes the layer in the
    backward pass. Gradients are the same; it takes less memory and more time.

    Attributes:
        recompute: whether to checkpoint.
        passes: names of the methods of tensors alone, which a CUDA graph may replay and
            torch.compile may compile.
    """

    recompute = False
    passes: tuple[str, ...] = ()

    def through(self, layer: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """Call ``layer(*inputs)``, checkpointed if ``recompute`` is set."""
        if self.recompute and torch.is_grad_enabled():
            # the RNG state need not be saved, because no layer draws random numbers
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)


class _Contiguous(torch.autograd.Function):
    """Identity with a contiguous gradient; without it, batched products copy row by row."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()


class SpectralConv(nn.Module):
    """Spectral convolution: mixes channels per mode with ``-M <= k < M``, on the last side from 0.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        modes: M; the grid must have at least 2M points per side.
        form: ``"matrix"``, ``"fft"`` or ``"auto"`` (matrix while M <= n/3 or n <= 32). A line and
            a cube have ``"fft"`` only.
        gain: standard deviation of the initial weights times sqrt(2 in_channels).
        dimensions: number of sides of the fields, 1 to 3.

    The only parameter is real, of shape (2M, M, in, out, 2) with real and imaginary parts, so that
    optimizers and ZeRO partitions without support of complex numbers work. On a line it is
    (M, in, out, 2), on a cube (2M, 2M, M, in, out, 2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: int,
        form: str = "auto",
        gain: float = 1.0,
        dimensions: int = 2,
    ):
        super().__init__()
        if form not in ("auto", "fft", "matrix"):
            raise ValueError(f"spectral_convolution={form!r}, expected auto, fft or matrix")
        if form == "matrix" and dimensions != 2:
            raise ValueError(
                f"spectral_convolution=matrix is for two dimensions, this flow has {dimensions}: "
                "use auto or fft"
            )
        self.in_channels, self.out_channels, self.modes = in_channels, out_channels, modes
        self.form, self.dimensions = form, dimensions
        self._kept: tuple | None = None
        scale = gain / math.sqrt(2 * in_channels)
        sides = *[2 * modes] * (dimensions - 1), modes
        self.weight = nn.Parameter(scale * torch.randn(*sides, in_channels, out_channels, 2))

    def mix(self, x_hat: Tensor) -> Tensor:
        """Multiply modes (2M * M, B, 2 in) by the weights; returns (2M * M, B, 2 out).

        In another number of dimensions there are as many modes as the weights have.

        This is a batched real product; the last axis runs over (channel, re/im).
        """
        mixed = torch.bmm(x_hat, self.blocks(x_hat.dtype))
        return _Contiguous.apply(mixed) if mixed.requires_grad else mixed

    def blocks(self, dtype: torch.dtype) -> Tensor:
        """Return the weights as real matrices (2M * M, 2 in, 2 out); cached in eval mode."""
        weight = self.weight
        if torch.compiler.is_compiling():  # an exported weight has no address
            return self._as_blocks(dtype)
        key = (weight._version, weight.data_ptr(), dtype)
        keep = not self.training and not torch.is_grad_enabled()
        if keep and self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        block = self._as_blocks(dtype)
        self._kept = (key, block) if keep else None
        return block

    def _as_blocks(self, dtype: torch.dtype) -> Tensor:
        re, im = self.weight.to(dtype).unbind(-1)
        block = torch.stack([torch.stack([re, im], -1), torch.stack([-im, re], -1)], dim=-3)
        return block.flatten(0, self.dimensions - 1).flatten(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve real fields, (B, in, n, n) -> (B, out, n, n); n once or thrice likewise."""
        points, size = tuple(x.shape[2:]), x.shape[-1]
        if size < 2 * self.modes or points != (size,) * self.dimensions:
            shape = {1: "line", 2: "square grid", 3: "cubic grid"}[self.dimensions]
            raise ValueError(
                f"field is {'x'.join(map(str, points))}; modes={self.modes} needs a {shape} of at "
                f"least {2 * self.modes}"
            )
        return self._matrix(x) if self.by_matrices(size) else self._fft(x)

    def by_matrices(self, size: int) -> bool:
        """Return whether fields of ``size`` points per side use the matrix form."""
        few = self.dimensions == 2 and (3 * self.modes <= size or size <= 32)
        return self.form == "matrix" or (self.form == "auto" and few)

    def _matrix(self, x: Tensor) -> Tensor:
        batch, _, size, _ = x.shape
        modes, rows = self.modes, 2 * self.modes
        forward_y, forward_x, inverse_x, inverse_y = dft_matrices(
            size, modes, x.dtype, str(x.device)
        )
        lines = (x.reshape(-1, size) @ forward_y).view(-1, 2 * size, modes).transpose(1, 2)
        x_hat = lines.reshape(-1, 2 * size) @ forward_x
        x_hat = x_hat.view(batch, self.in_channels, modes, 2, rows).permute(4, 2, 0, 1, 3)
        mixed = self.mix(x_hat.reshape(rows * modes, batch, -1))
        mixed = mixed.view(rows, modes, batch, self.out_channels, 2).permute(2, 3, 1, 4, 0)
        columns = (mixed.reshape(-1, 2 * rows) @ inverse_x).view(-1, modes, 2 * size)
        columns = columns.transpose(1, 2).reshape(-1, 2 * modes)
        return (columns @ inverse_y).view(batch, self.out_channels, size, size)

    def _fft(self, x: Tensor) -> Tensor:
        size, modes, dtype = x.shape[-1], self.modes, x.dtype
        if dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        sides, batch = self.dimensions, x.shape[0]
        axes = tuple(range(2, 2 + sides))
        kept = torch.fft.rfftn(x, dim=axes, norm="forward")[..., :modes]
        for axis in axes[:-1]:
            both = kept.narrow(axis, 0, modes), kept.narrow(axis, size - modes, modes)
            kept = torch.cat(both, dim=axis)
        flat = torch.view_as_real(kept).permute(*axes, 0, 1, sides + 2)
        mixed = self.mix(flat.reshape(-1, batch, 2 * self.in_channels))
        mixed = mixed.view(*self.weight.shape[:sides], batch, self.out_channels, 2)
        mixed = mixed.permute(sides, sides + 1, *range(sides), sides + 2)
        out = torch.view_as_complex(mixed.contiguous())
        first = hermitian_part(out[..., 0], size, sides - 1)
        rest = _spread(out[..., 1:], size, axes[:-1])
        full = torch.cat([first[..., None], rest], dim=-1)
        full = nn.functional.pad(full, (0, size // 2 + 1 - modes))
        return torch.fft.irfftn(full, s=(size,) * sides, dim=axes, norm="forward").to(dtype)


def _spread(values: Tensor, size: int, axes: tuple[int, ...]) -> Tensor:
    """Spread the 2M modes along each of ``axes`` to n rows; the modes in between are zero."""
    for axis in axes:
        modes = values.shape[axis] // 2
        rows = list(values.shape)
        rows[axis] = size
        out = values.new_zeros(rows)
        out.narrow(axis, 0, modes).copy_(values.narrow(axis, 0, modes))
        last = out.narrow(axis, size - modes, modes)
        last.add_(values.narrow(axis, modes, modes))
        values = out
    return values


def hermitian_part(values: Tensor, size: int, sides: int) -> Tensor:
    """Spread modes whose last wavenumber is 0, (..., 2M) of one side, (..., 2M, 2M) of two, to n.

    They are projected on Hermitian symmetry; without a side, on real numbers.
    """
    axes = tuple(range(-sides, 0))
    full = _spread(values, size, axes)
    mirror = full
    if sides:
        mirror = torch.roll(torch.flip(full, dims=axes), [1] * sides, dims=axes)
    return 0.5 * (full + mirror.conj())


class Conv1x1(nn.Module):
    """Linear map of channels, equal at every point: (B, in, ...) -> (B, out, ...)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(out_channels, in_channels) * (gain / math.sqrt(in_channels))
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        # a product per sample avoids the copies by which matmul folds the batch into columns
        weight = self.weight.to(x.dtype).expand(len(x), -1, -1)
        out = torch.bmm(weight, x.flatten(2)).unflatten(2, x.shape[2:])
        if self.bias is None:
            return out
        return out + self.bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
