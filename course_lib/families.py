"""The four families of generative models, each as its loss and its way to sample, trained by one loop.

A family is a network with `loss(x0) -> (B,)`, which draws its own noise, and `sample(n, seed) -> (n, d)`. `fit_family` trains any
of them with the course's training loop; `sized` builds the four with equal numbers of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser, from_edm
from course_lib.devices import SampleNoise
from course_lib.likelihood import variational_bound
from course_lib.nets.mlp import MLP
from course_lib.nets.realnvp import RealNVP
from course_lib.sample import sample
from course_lib.schedules import equal_information, karras
from course_lib.training import Fit, denoising_loss, edm_weight, fit


class Family(nn.Module):
    """What the four share. A subclass defines `loss(x0)` and `draw(z, noise)`, and says how many numbers z a sample starts from.

    `updates` counts the training steps; it travels with the weights, so that an untrained model can refuse to sample.
    """

    name = "family"

    def __init__(self, dim: int, latent: int):
        super().__init__()
        self.dim, self.latent = dim, latent
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def loss(self, x0: Tensor) -> Tensor:
        """The loss of each sample of a batch x0 (B, d), (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(x0)")

    def forward(self, x0: Tensor) -> Tensor:
        """The loss, so that the training loop may wrap a family like any network."""
        return self.loss(x0)

    def draw(self, z: Tensor, noise: SampleNoise) -> Tensor:
        """Turn latents z (n, latent) into samples (n, d)."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(z, noise)")

    def nats(self, x0: Tensor, seed: int = 0) -> Tensor:
        """-log p(x0) in nats, (B,): exact for the flow, an upper bound on average over its noise for VAE and diffusion."""
        raise ValueError(f"family = {self.name!r} has no likelihood; expected a VAE, a flow or a diffusion model")

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw n samples, (n, d); row i depends on the seed and on i alone. Raises ValueError before any training."""
        if not int(self.updates):
            raise ValueError(f"the {self.name} has 0 updates, so its samples would be noise; train it with `fit_family` first")
        noise = SampleNoise(seed)
        device = self.updates.device
        return self.draw(noise(torch.empty(n, self.latent, device=device)), noise)


class GAN(Family):
    """A generator against a critic (Goodfellow et al. 2014, non-saturating form, Sec. 3), with Mescheder's R1 penalty.

    critic     softplus(-C(x0)) + softplus(C(G(z))) + gamma/2 |grad C(x0)|^2   (Mescheder et al. 2018, Eq. 9)
    generator  softplus(-C(G(z)))
    Both are minimised in the same step. The critic's weights are frozen in the generator's loss and G(z) in the critic's, so that
    one backward pass gives each network the gradient of its own loss.
    """

    name = "GAN"

    def __init__(self, dim: int, width: int, depth: int = 3, latent: int | None = None, gamma: float = 0.1):
        super().__init__(dim, dim if latent is None else latent)
        self.gamma = gamma
        self.generator = MLP(self.latent, width, depth, out=dim, timed=False)
        self.critic = MLP(dim, width, depth, out=1, timed=False)

    def loss(self, x0: Tensor) -> Tensor:
        fake = self.generator(torch.randn_like(x0[:, :1].expand(-1, self.latent)))
        real = x0.detach().requires_grad_(True)
        on_real = self.critic(real)[:, 0]
        (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
        critic = F.softplus(-on_real) + F.softplus(self.critic(fake.detach())[:, 0])
        critic = critic + self.gamma / 2 * slope.square().sum(-1)
        frozen = {name: weight.detach() for name, weight in self.critic.named_parameters()}
        generator = F.softplus(-torch.func.functional_call(self.critic, frozen, (fake,))[:, 0])
        return critic + generator

    def draw(self, z: Tensor, noise: SampleNoise) -> Tensor:
        return self.generator(z)


class VAE(Family):
    """An encoder and a decoder, trained on the evidence lower bound (Kingma and Welling 2014, Eq. 3), per dimension.

    -ELBO = |x0 - m(z)|^2 / (2 s^2) + d log s + d/2 log 2 pi + KL(N(mu(x0), diag v(x0)) || N(0, I)),  z = mu + sqrt(v) eps
    The decoder's deviation s is learned, one number (Rybkin et al. 2021, Sec. 3). A sample is m(z) + s n.
    """

    name = "VAE"

    def __init__(self, dim: int, width: int, depth: int = 3, latent: int | None = None, s: float = 0.3):
        super().__init__(dim, dim if latent is None else latent)
        self.encoder = MLP(dim, width, depth, out=2 * self.latent, timed=False)
        self.decoder = MLP(self.latent, width, depth, out=dim, timed=False)
        self.log_s = nn.Parameter(torch.tensor(math.log(s)))

    def loss(self, x0: Tensor) -> Tensor:
        return self.bound(x0, torch.randn_like(x0[:, :1].expand(-1, self.latent)))

    def bound(self, x0: Tensor, eps: Tensor) -> Tensor:
        """-ELBO / d at z = mu + sqrt(v) eps, (B,)."""
        mu, log_v = self.encoder(x0).chunk(2, -1)
        z = mu + (log_v / 2).exp() * eps
        error = (x0 - self.decoder(z)).square().sum(-1)
        reconstruction = error / (2 * (2 * self.log_s).exp()) + self.dim * (self.log_s + math.log(2 * math.pi) / 2)
        divergence = (mu.square() + log_v.exp() - 1 - log_v).sum(-1) / 2
        return (reconstruction + divergence) / self.dim

    @torch.no_grad()
    def nats(self, x0: Tensor, seed: int = 0) -> Tensor:
        return self.dim * self.bound(x0, SampleNoise(seed)(x0.new_empty(len(x0), self.latent)))

    def draw(self, z: Tensor, noise: SampleNoise) -> Tensor:
        mean = self.decoder(z)
        return mean + self.log_s.exp() * noise(mean)


class Flow(Family):
    """A normalising flow, trained on its exact likelihood: -log p(x0) / d (Dinh et al. 2017, Eq. 2)."""

    name = "flow"

    def __init__(self, dim: int, width: int, depth: int = 1, layers: int = 8):
        super().__init__(dim, dim)
        self.net = RealNVP(dim, layers, width, depth)

    def loss(self, x0: Tensor) -> Tensor:
        return -self.net.log_prob(x0) / self.dim

    @torch.no_grad()
    def nats(self, x0: Tensor, seed: int = 0) -> Tensor:
        return -self.net.log_prob(x0)

    def draw(self, z: Tensor, noise: SampleNoise) -> Tensor:
        return self.net.inverse(z)


class Diffusion(Family):
    """A denoiser in EDM's form, trained on EDM's loss (Karras et al. 2022, Eq. 8) and sampled by `steps` steps of DDIM.

    sigma_data  deviation of the data; ln sigma ~ N(mean, std^2) in training
    """

    name = "diffusion"

    def __init__(
        self,
        dim: int,
        width: int,
        depth: int = 3,
        sigma_data: float = 1.0,
        noise_levels: tuple[float, float] = (-1.2, 1.4),
        steps: int = 100,
        sigma_min: float = 0.01,
    ):
        super().__init__(dim, dim)
        self.sigma_data, self.noise_levels = sigma_data, noise_levels
        self.sigmas = karras(steps, sigma_min, 15.0)
        self.net = MLP(dim, width, depth)

    @property
    def D(self) -> NetworkDenoiser:
        """The Denoiser."""
        return from_edm(self.net, self.sigma_data)

    def loss(self, x0: Tensor) -> Tensor:
        mean, std = self.noise_levels
        sigma = (mean + std * torch.randn(len(x0), device=x0.device)).exp()
        return denoising_loss(self.D, x0, sigma, torch.randn_like(x0), edm_weight(self.sigma_data))

    def nats(self, x0: Tensor, seed: int = 0) -> Tensor:
        bound = variational_bound(self.D, x0, equal_information(1000, 0.02, 80.0), SampleNoise(seed))
        return bound.total * self.dim * math.log(2)

    def draw(self, z: Tensor, noise: SampleNoise) -> Tensor:
        return sample(self.D, float(self.sigmas[0]) * z, self.sigmas)


FAMILIES: dict[str, type[Family]] = {"GAN": GAN, "VAE": VAE, "flow": Flow, "diffusion": Diffusion}
"""By name, in the order in which the field met them."""


def sized(name: str, dim: int, parameters: int, **options: Any) -> Family:
    """A family whose width is chosen so that its number of parameters is nearest to `parameters`."""
    if name not in FAMILIES:
        raise ValueError(f"name = {name!r}; expected one of {', '.join(FAMILIES)}")
    make = FAMILIES[name]

    def count(width: int) -> int:
        return sum(p.numel() for p in make(dim, width, **options).parameters())

    widths = range(4, 2048)
    low, high = 0, len(widths) - 1
    while low < high:  # the count rises with the width
        middle = (low + high) // 2
        low, high = (middle + 1, high) if count(widths[middle]) < parameters else (low, middle)
    best = min(widths[max(0, low - 1) : low + 1], key=lambda width: abs(count(width) - parameters))
    return make(dim, best, **options)


def fit_family(family: Family, draw: Callable[[torch.Generator], Tensor], steps: int, **options: Any) -> Fit:
    """Train a family with the course's loop: `draw(generator)` returns a batch (B, d). Returns the averaged model.

    In fp32: networks this small gain nothing from less. `options` go to `course_lib.training.fit`.
    """
    options = {"half": False, "ema_decay": 0.995, **options}
    done = fit(family, lambda generator: (draw(generator),), lambda net, x0: net(x0), steps=steps, **options)
    done.net.updates += len(done.losses)
    return done
