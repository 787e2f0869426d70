"""The published network as published: complex weights, eager PyTorch.

Our ``published`` preset is the same function with real-stored weights and faster products. To
measure the gain, its spectral layers are replaced by the published form: complex parameters, and a
full array of zeros of which two corners are filled by a complex ``einsum`` each.
(Li et al., ICLR 2021; Dong, Chen, Wu, JCP 2025.)
"""

import torch
from torch import Tensor, nn

from hpc_closure.closure.baselines.published_model import SENSORS_PER_SIDE, PublishedNetwork
from hpc_closure.closure.fields.sensors import subgrid
from hpc_closure.closure.networks.layers import SpectralConv2d
from hpc_closure.closure.sampling import PublishedVE

EVALUATIONS = 10


class ComplexSpectral(nn.Module):
    """Spectral convolution as published, with the weights of one of our layers.

    The ky = 0 column is not made Hermitian, because the complex-to-real transform on the CPU
    ignores its other part.
    """

    def __init__(self, layer: SpectralConv2d):
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
        if isinstance(child, SpectralConv2d):
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
