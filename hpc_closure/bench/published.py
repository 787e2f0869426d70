r"""The published solver and network, rewritten in eager PyTorch, for comparison.

Dong, Chen, Wu (J. Comput. Phys. 2025) advance

.. math:: \partial_t w + u\cdot\nabla w = \nu\Delta w + f + \beta\xi

The state is the real-to-complex transform of the full grid. The advective form takes four inverse
transforms (u, v, w_x, w_y) and one forward transform, with the product truncated by the 2/3 rule.
Time stepping is Crank-Nicolson for the viscosity and explicit Euler for all other terms. The
Q-Wiener increment is the real part of a complex inverse transform of
:math:`\sqrt{q_k}\,(a_k + i b_k)`, a and b each the sum of kappa draws on the full grid (Lord,
Powell, Shardlow 2014, ch. 10), and is transformed forward again:

.. math:: \hat w^+ = \frac{\hat w - dt\,\hat N + dt\,\hat f + \beta\,\widehat{\Delta W}
          - \tfrac{dt}{2}\nu k^2 \hat w}{1 + \tfrac{dt}{2}\nu k^2},
          \qquad q_k = dt\,e^{-a k^2} .

The network is our ``published`` preset with its spectral layers in the published form (Li et al.,
ICLR 2021): complex parameters, and a full array of zeros of which two corners are filled by a
complex ``einsum`` each. The preset is the same function with real-stored weights and faster
products.

Nothing is optimised here: one operation per term, as in a first implementation.
"""

import math

import torch
from torch import Tensor, nn

from hpc_closure.closure.baselines.published_model import SENSORS_PER_SIDE, PublishedNetwork
from hpc_closure.closure.fields.sensors import subgrid
from hpc_closure.closure.networks.layers import SpectralConv
from hpc_closure.closure.sampling import PublishedVE

EVALUATIONS = 10  # of the network per draw


class PublishedSolver:
    """Members advanced together on an n x n grid of the unit square.

    Args:
        forcing: f, (n, n), which sets precision and device of all arrays.
        viscosity: nu.
        dt: time step.
        noise: beta, 0 = none.
        draws: kappa, normal draws summed per mode and step.
        correlation: a, squared correlation length.
        seed: seed of the draws.
    """

    def __init__(
        self,
        forcing: Tensor,
        *,
        viscosity: float = 1e-3,
        dt: float = 1e-3,
        noise: float = 5e-5,
        draws: int = 10,
        correlation: float = 0.005,
        seed: int = 0,
    ):
        self.size, self.dt, self.noise, self.draws = len(forcing), dt, noise, draws
        self.device, self.precision = device, precision = forcing.device, forcing.dtype
        size = self.size
        wavenumbers = torch.fft.fftfreq(size, 1 / size, dtype=precision, device=device)
        half = torch.fft.rfftfreq(size, 1 / size, dtype=precision, device=device)
        self.kx, self.ky = 2 * math.pi * wavenumbers[:, None], 2 * math.pi * half[None, :]
        self.k2 = self.kx**2 + self.ky**2
        self.safe_k2 = self.k2.clone()
        self.safe_k2[0, 0] = 1.0
        limit = size // 2 * 2 / 3
        self.retained = (wavenumbers.abs()[:, None] <= limit) & (half[None, :] <= limit)
        self.half_viscous = 0.5 * dt * viscosity * self.k2
        self.f_hat = torch.fft.rfft2(forcing)
        k2 = (2 * math.pi) ** 2 * (wavenumbers[:, None] ** 2 + wavenumbers[None, :] ** 2)
        self.root = torch.sqrt(dt * torch.exp(-correlation * k2))
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.w_hat = torch.empty(0)

    def start(self, fields: Tensor) -> "PublishedSolver":
        """Start from vorticity fields (members, n, n)."""
        self.w_hat = torch.fft.rfft2(fields.to(self.device, self.precision))
        return self

    def field(self) -> Tensor:
        """Return vorticity (members, n, n)."""
        return torch.fft.irfft2(self.w_hat, s=(self.size, self.size))

    def increment(self) -> Tensor:
        """Draw Wiener increments (members, n, n) over a step, without beta."""
        shape = (len(self.w_hat), self.size, self.size, 2, self.draws)
        normals = torch.randn(
            shape, generator=self.generator, device=self.device, dtype=self.precision
        )
        summed = normals.sum(-1)
        z = torch.complex(summed[..., 0], summed[..., 1])
        # the inverse transform divides by the number of points
        return torch.fft.ifft2(self.root * z).real * self.size**2

    def nonlinear_hat(self) -> Tensor:
        """Compute the transform of u . grad w, truncated by the 2/3 rule."""
        shape = (self.size, self.size)
        psi_hat = self.w_hat / self.safe_k2
        u = torch.fft.irfft2(1j * self.ky * psi_hat, s=shape)
        v = torch.fft.irfft2(-1j * self.kx * psi_hat, s=shape)
        w_x = torch.fft.irfft2(1j * self.kx * self.w_hat, s=shape)
        w_y = torch.fft.irfft2(1j * self.ky * self.w_hat, s=shape)
        return torch.fft.rfft2(u * w_x + v * w_y) * self.retained

    def advance(self, num_steps: int) -> None:
        """Advance by a number of steps."""
        for _ in range(num_steps):
            right = self.w_hat - self.dt * self.nonlinear_hat() + self.dt * self.f_hat
            if self.noise:
                right = right + self.noise * torch.fft.rfft2(self.increment())
            right = right - self.half_viscous * self.w_hat
            self.w_hat = right / (1 + self.half_viscous)


# ---- the network --------------------------------------------------------------------------------


class ComplexSpectral(nn.Module):
    """Spectral convolution as published, with the weights of one of our layers.

    The ky = 0 column is not made Hermitian, because the complex-to-real transform on the CPU
    ignores its other part.
    """

    def __init__(self, layer: SpectralConv):
        super().__init__()
        self.modes, self.out_channels = layer.modes, layer.out_channels
        weight = torch.view_as_complex(layer.weight.detach().contiguous()).permute(2, 3, 0, 1)
        self.upper = nn.Parameter(weight[:, :, : self.modes].clone())
        self.lower = nn.Parameter(weight[:, :, self.modes :].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Convolve fields (B, in, n, n); returns (B, out, n, n)."""
        size, m = x.shape[-1], self.modes
        x_hat = torch.fft.rfft2(x)
        out = torch.zeros(
            len(x), self.out_channels, size, size // 2 + 1, dtype=x_hat.dtype, device=x.device
        )
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", x_hat[:, :, :m, :m], self.upper)
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", x_hat[:, :, -m:, :m], self.lower)
        return torch.fft.irfft2(out, s=(size, size))


def published_network(
    width: int = 20, modes: int = 8, layers: int = 4, upscaling: str = "interp"
) -> PublishedNetwork:
    """Create the published network with complex spectral layers."""
    network = PublishedNetwork(width, modes, layers, upscaling)
    to_published_form(network)
    return network


def to_published_form(module: nn.Module) -> None:
    """Replace every spectral layer in ``module`` by the published form."""
    for name, child in module.named_children():
        if isinstance(child, SpectralConv):
            setattr(module, name, ComplexSpectral(child))
        else:
            to_published_form(child)


def published_loss(network: PublishedNetwork, state: Tensor, target: Tensor) -> Tensor:
    """Compute the denoising score matching loss, summed over points, averaged over the batch."""
    schedule = PublishedVE()
    t = 2 * (torch.rand(len(target), device=target.device) * (1 - 1e-5) + 1e-5)
    z = torch.randn_like(target)
    sigma = schedule.sigmas(t)[:, None, None]
    score = network(t, target + sigma * z, state, subgrid(target, SENSORS_PER_SIDE))
    return (score + z).square().sum((-2, -1)).mean()


@torch.no_grad()
def published_sample(network: PublishedNetwork, state: Tensor, sensors: Tensor) -> Tensor:
    """Draw by ten Euler-Maruyama steps of the reverse SDE; each evaluates the full network."""
    schedule = PublishedVE()
    times = schedule.times(EVALUATIONS)
    x = torch.randn_like(state) * schedule.norm(times[0])
    mean = x
    for t, s in zip(times, times[1:]):
        g, dt = schedule.diffusion(t), t - s
        at = torch.full((len(state),), t, device=state.device)
        score = network(at, x, state, sensors) / schedule.sigma(t)
        mean = x + g * g * dt * score
        x = mean + g * dt**0.5 * torch.randn_like(x)
    return mean
