"""The weight of the KL term in a small autoencoder of digits: what it costs in reconstruction and what it buys in latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from course_lib import metrics
from course_lib.devices import autocast, generator, one_thread
from course_lib.nets.vae import VAE
from course_lib.training import fit
from course_lib.worlds import digits
from course_lib.zoo.judge_digits import grey
from course_lib.zoo.judge_digits import quality as judged
from course_lib.zoo.stored import Row

WEIGHTS = (1e-5, 1e-3, 1e-1)
"""Factors of the KL divergence per number of the latent, beside the mean squared error per pixel."""
STEPS, BATCH, LR = 1_500, 32, 2e-3
LATENT = (2, 4, 4)
NOISE = 0.1
"""The deviation of the noise on the latents, in units of their own."""


def loss_of(net: VAE, x: Tensor, eps: Tensor, weight: float) -> Tensor:
    """|x - dec(mean + std eps)|^2 / pixels + weight KL / numbers of the latent, (B,) (Kingma and Welling 2014, Eq. 10)."""
    q = net.encode(x)
    error = (net.decode(q.sample(eps)) - x).float().square().flatten(1).mean(1)
    return error + weight * q.kl().float() / eps[0].numel()


def autoencoder(weight: float, seed: int, steps: int = STEPS) -> VAE:
    """Trained on the digits' training split, with one thread."""
    x0 = digits.load("train")[0]

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(x0), (BATCH,), generator=source)
        return x0[rows], torch.randn(BATCH, *LATENT, generator=source)

    def loss(net: nn.Module, x: Tensor, eps: Tensor) -> Tensor:
        return loss_of(net, x, eps, weight)

    torch.manual_seed(seed)
    with one_thread():
        return fit(VAE(1, (16, 32, 48), LATENT[0]), draw, loss, steps=steps, lr=LR, seed=seed, device="cpu", nhwc=False).net


def measure_kl(weight: float, seed: int) -> Row:
    """On held-out digits: PSNR of what comes back, with and without noise on the latents; the KL in nats; and the Frechet
    distance of what the decoder makes of standard normal noise, which is good only if the latents are as good as normal."""
    net, x = autoencoder(weight, seed), digits.load("test")[0]
    with torch.no_grad(), autocast("cpu"):
        q = net.encode(x)
        z = q.sample(torch.randn(q.mean.shape, generator=generator(1)))
        noisy = z + NOISE * q.mean.std() * torch.randn(z.shape, generator=generator(2))
        back, again = (net.decode(each).float() for each in (z, noisy))
        drawn = net.decode(torch.randn(1_000, *LATENT, generator=generator(3))).float()
    quality = {name: metrics.psnr(each, x) for name, each in (("psnr", back), ("psnr_noisy", again))}
    real = grey(digits.load("all")[0])
    facts = {"kl": float(q.kl().float().mean()), "spread": float(q.mean.float().std()), **quality}
    row = {"weight": weight, "seed": seed, "steps": STEPS, **{name: round(value, 4) for name, value in facts.items()}}
    return row | {"frechet": judged(grey(drawn.clamp(-1, 1)), real)["frechet"]}
