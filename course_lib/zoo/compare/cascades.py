"""A cascade of two stages with and without conditioning augmentation, and a model that is told the size of its data, or not."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib.devices import generator, one_thread
from course_lib.nets.dit import DiT
from course_lib.training import denoising_loss, fit
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.zoo import latent_scenes
from course_lib.zoo.compare.latents import (
    BATCH,
    CLASSES,
    SCENES,
    decode,
    draw,
    facts,
    frechet,
    latents,
    levels,
    rate,
    wrap,
)
from course_lib.zoo.latent_scenes import SHAPE
from course_lib.zoo.stored import Row

STEPS, FIRST = 1_500, (400, 1_500)
"""Steps of training of a refiner, and of two first stages: one that is often wrong, and one trained as long as the refiner."""
COARSE = (4, 4, 4)
STRONGEST, TOLD = 1.0, (0.2, 0.4, 0.7)
"""The largest deviation of the noise on the coarse latent in training, and those at which it may then be refined."""
SMALL = 16
"""Side of the small pictures, in pixels; enlarged to 64 they are as blurred as pictures from the web can be."""


class Refiner(nn.Module):
    """net(x, time, label, coarse (B, 4, 4, 4), noise (B,)): a DiT that sees the coarse latent, and its noise level, beside x."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = DiT(9, 96, 4, 4, patch=2, side=4, classes=CLASSES, out=4)

    def forward(self, x: Tensor, time: Tensor, label: Tensor, coarse: Tensor, noise: Tensor) -> Tensor:
        level = noise.to(x).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.dit(torch.cat([x, F.interpolate(coarse.to(x), x.shape[2:]), level], 1), time, label)


def _loss(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, **condition: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused attention's backward pass is slow for so few tokens
        return denoising_loss(wrap(net).given(**condition), x0, sigma, eps, "v")


def _fit(net: nn.Module, draw_: Any, loss: Any, seed: int, steps: int = STEPS) -> nn.Module:
    with one_thread():
        return fit(net, draw_, loss, steps=steps, lr=rate("DiT, patch 2"), seed=seed, device="cpu").net.eval()


@functools.cache
def base(seed: int, steps: int) -> nn.Module:
    """The first stage, after so many steps: a DiT on the means of 2 x 2 latents, told the shape."""
    x0, label = latents("train")
    coarse = F.avg_pool2d(x0, 2)

    def batch(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(coarse), (BATCH,), generator=source)
        return coarse[rows], levels(BATCH, source=source), torch.randn(BATCH, *COARSE, generator=source), label[rows]

    torch.manual_seed(seed)
    net = DiT(4, 96, 4, 4, patch=1, side=4, classes=CLASSES)
    return _fit(net, batch, lambda net, x0, sigma, eps, label: _loss(net, x0, sigma, eps, label=label), seed, steps)


@functools.cache
def refiner(augmented: bool, seed: int) -> nn.Module:
    """The second stage, from coarse latents with noise of a random level, of which it is told, or from clean ones."""
    x0, label = latents("train")

    def batch(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(x0), (BATCH,), generator=source)
        noise = STRONGEST * torch.rand(BATCH, generator=source) * augmented
        coarse = F.avg_pool2d(x0[rows], 2)
        coarse = coarse + noise.view(-1, 1, 1, 1) * torch.randn(coarse.shape, generator=source)
        sigma, eps = levels(BATCH, source=source), torch.randn(BATCH, *SHAPE, generator=source)
        return x0[rows], sigma, eps, label[rows], coarse, noise

    def loss(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, label: Tensor, coarse: Tensor, noise: Tensor) -> Tensor:
        return _loss(net, x0, sigma, eps, label=label, coarse=coarse, noise=noise)

    torch.manual_seed(seed)
    return _fit(Refiner(), batch, loss, seed)


@torch.no_grad()
def refined(net: nn.Module, coarse: Tensor, label: Tensor, told: float, seed: int) -> Row:
    """`facts` of what the second stage makes of coarse latents (N, 4, 4, 4) with noise of the deviation that it is told."""
    noisy = coarse + told * torch.randn(coarse.shape, generator=generator(8, seed))
    D = wrap(net).given(label=label, coarse=noisy, noise=torch.full((len(coarse),), told))
    return facts(decode(draw(D, (len(coarse), *SHAPE), seed=seed)), label)


def measure_cascade(augmented: bool, seed: int, first: int, n: int = 1_000) -> Row:
    """Samples of both stages, judged; and of the second from true coarse latents, which shows what the first stage costs.

    Conditioning augmentation (Ho et al. 2022, Sec. 4): the second stage learns from coarse latents that are as wrong as samples
    are, and is then given samples with noise on them, of the deviation in TOLD at which other samples were most often right.
    """
    net, label = refiner(augmented, seed), torch.arange(n) % CLASSES
    stage = wrap(base(seed, first)).given(label=label)
    tried, told = {}, 0.0
    if augmented:
        other = draw(stage, (n, *COARSE), seed=101)
        tried = {f"{told:g}": refined(net, other, label, told, seed=102)["adherence"] for told in TOLD}
        told = max(TOLD, key=lambda told: tried[f"{told:g}"])
    true, shapes = latents("held out")
    row: Row = {"augmented": augmented, "seed": seed, "steps": STEPS, "first": first, "tried": tried, "told": told}
    row["sampled"] = refined(net, draw(stage, (n, *COARSE), seed=1), label, told, seed=2)
    row["true"] = refined(net, F.avg_pool2d(true[:n], 2), shapes[:n], told, seed=2)
    return row


@functools.cache
def blurred() -> Tensor:
    """The latents of the training scenes as pictures of SMALL pixels, enlarged."""
    of = SceneDataset(*SCENES["train"]).cached()

    return latent_scenes.encode(of, enlarged)


def enlarged(pictures: Tensor) -> Tensor:
    """Pictures that were reduced to SMALL pixels, at their own size."""
    small = F.interpolate(pictures, (SMALL, SMALL), mode="bicubic", antialias=True)
    return F.interpolate(small, pictures.shape[2:], mode="bicubic").clamp(-1, 1)


def sharpness(pictures: Tensor) -> float:
    """The mean square of what a picture loses when it is reduced to SMALL pixels."""
    return float((pictures - enlarged(pictures)).square().mean())


def measure_sizes(told: bool, seed: int, n: int = 1_000) -> Row:
    """Half of the data are small pictures, enlarged; a model that is told which, asked for large ones, beside one that is not.

    SDXL tells its network the size that a picture had before it was enlarged (Podell et al. 2023, Sec. 2.2).
    """
    x0, small = latents("train")[0], blurred()

    def batch(source: torch.Generator) -> tuple[Tensor, ...]:
        rows, large = (torch.randint(high, (BATCH,), generator=source) for high in (len(x0), 2))
        z = torch.where(large.view(-1, 1, 1, 1) == 1, x0[rows], small[rows])
        return z, levels(BATCH, source=source), torch.randn(BATCH, *SHAPE, generator=source), large * told

    torch.manual_seed(seed)
    loss = lambda net, x0, sigma, eps, size: _loss(net, x0, sigma, eps, label=size)
    net = _fit(DiT(4, 96, 4, 4, patch=2, side=4, classes=2), batch, loss, seed)
    asked = torch.full((n,), int(told))
    pictures = decode(draw(wrap(net).given(label=asked), (n, *SHAPE)))
    share = sharpness(pictures) / sharpness(decode(latents("held out")[0]))
    return {"told": told, "seed": seed, "steps": STEPS, "frechet": frechet(pictures), "sharpness": round(share, 4)}
