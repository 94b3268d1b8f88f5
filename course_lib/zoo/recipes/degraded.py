"""`mini-sd-degraded`: a LoRA of `mini-sd` under the empty prompt, of pictures as they should not be.

Noise-free score distillation takes the noise off a score by a model of bad pictures; Stable Diffusion has one in the negative
prompt "unrealistic, blurry, ..." (Katzir et al. 2024, Sec. 4). `mini-sd` knows the words of its scenes only, so this is learnt.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib import metrics, zoo
from course_lib.denoisers import NetworkDenoiser, from_diffusers
from course_lib.devices import SampleNoise, autocast, generator
from course_lib.nets.lora import ATTENTION
from course_lib.operators import gaussian_kernel
from course_lib.sample import sample
from course_lib.training import Fit, denoising_loss, fit
from course_lib.types import Denoiser
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.zoo.latent_scenes import encode
from course_lib.zoo.lora_of import lora_of_mini_sd

DATA = "3,000 training scenes of seed 51, one or two objects, blurred, oversaturated, noisy, posterised or blocky"
SCENES = {"train": (3_000, 51), "held out": (512, 52)}
TARGETS = (*ATTENTION, "conv1", "conv2")
RANK, BATCH, STEPS, LR, SEED = 4, 32, 800, 3e-3, 13
JUDGED = (0.1, 0.3, 1.0, 3.0)
CALLS = 30
"""Steps of DDIM of the pictures that the card judges."""


# --- pictures as they should not be --------------------------------------------------------------------------------------


def blurred(x: Tensor, source: torch.Generator) -> Tensor:
    """Under a Gaussian of 2.5 pixels."""
    kernel = gaussian_kernel(2.5).to(x.dtype)
    reach = [side // 2 for side in (kernel.shape[1], kernel.shape[1], kernel.shape[0], kernel.shape[0])]
    return F.conv2d(F.pad(x, reach, "reflect"), kernel.expand(3, 1, *kernel.shape), groups=3)


def oversaturated(x: Tensor, source: torch.Generator) -> Tensor:
    """Colours three times as far from grey, at 1.5 times the contrast."""
    grey = x.mean(1, keepdim=True)
    return (1.5 * (grey + 3 * (x - grey))).clamp(-1, 1)


def noisy(x: Tensor, source: torch.Generator) -> Tensor:
    """Under noise of deviation 0.4."""
    return (x + 0.4 * torch.randn(x.shape, generator=source)).clamp(-1, 1)


def posterised(x: Tensor, source: torch.Generator) -> Tensor:
    """In three values a channel."""
    return x.round()


def blocky(x: Tensor, source: torch.Generator) -> Tensor:
    """In squares of 8 pixels."""
    return F.interpolate(F.avg_pool2d(x, 8), scale_factor=8)


KINDS = (blurred, oversaturated, noisy, posterised, blocky)


def degraded(x: Tensor, source: torch.Generator) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1], each spoilt in one of five ways."""
    which = torch.randint(len(KINDS), (len(x),), generator=source)
    made = torch.stack([spoil(x, source) for spoil in KINDS])
    return made[which, torch.arange(len(x))]


def latents(split: str, spoilt: bool = True) -> Tensor:
    """Scaled latents (N, 4, 8, 8) of the pictures of a split, spoilt or as they are."""
    of, source = SceneDataset(*SCENES[split], objects=(1, 2)), generator(SEED, len(split))
    return encode(of, (lambda x: degraded(x, source)) if spoilt else (lambda x: x))


# --- the model -----------------------------------------------------------------------------------------------------------


def network(name: str = "mini-sd-degraded") -> nn.Module:
    """The U-Net of `mini-sd` with a LoRA that is still to learn, which alone is its state."""
    return lora_of_mini_sd(RANK, TARGETS, SEED)


def wrap(net: nn.Module) -> NetworkDenoiser:
    """What `zoo.load` returns: the Denoiser of latents (B, 4, 8, 8) of bad pictures; it takes no condition."""
    model = zoo.load("mini-sd", device=str(next(net.parameters()).device))
    told, empty = from_diffusers(net.eval(), model.scheduler), model.embed([""])["encoder_hidden_states"]

    def promptless(x: Tensor, time: Tensor) -> Tensor:
        return told.net(x, time, encoder_hidden_states=empty.expand(len(x), -1, -1))

    return replace(told, net=promptless)


def train(
    name: str = "mini-sd-degraded",
    net: nn.Module | None = None,
    steps: int = STEPS,
    lr: float = LR,
    seed: int = SEED,
    **options: Any,
) -> Fit:
    """Minimise the denoising loss of v on latents of bad pictures, noise levels even in t, under the empty prompt."""
    model, data = zoo.load("mini-sd", device="cpu"), latents("train")
    sigmas, empty = model.schedule.sigma(torch.arange(1000)), model.embed([""])["encoder_hidden_states"]

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        x0 = data[torch.randint(len(data), (BATCH,), generator=source)]
        t = (torch.arange(BATCH) + torch.rand(BATCH, generator=source)) / BATCH * len(sigmas)  # stratified, as for `mini-sd`
        eps = torch.randn(x0.shape, generator=source)
        return x0, sigmas[t.long().clamp(max=len(sigmas) - 1)], eps, empty.expand(BATCH, -1, -1)

    def loss(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, empty: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH) if x0.device.type == "cpu" else nullcontext():
            return denoising_loss(from_diffusers(net, model.scheduler, encoder_hidden_states=empty), x0, sigma, eps, "v")

    net = network(name) if net is None else net
    return fit(net, draw, loss, steps=steps, lr=lr, seed=seed, ema_decay=0.99, **options)


@torch.no_grad()
def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """Denoising loss on held-out latents, bad and good, beside `mini-sd`'s; and how far from real pictures the samples are."""
    model, reader = zoo.load("mini-sd", device="cpu"), zoo.load("scenes-reader", device="cpu")
    pair: dict[str, Denoiser] = {"of_degraded": wrap(net), "of_mini_sd": model.denoiser.given(**model.embed([""] * 64))}
    losses: dict[str, Any] = {}
    for split in ("bad", "good"):
        x0 = latents("held out", split == "bad")
        for whose, D in pair.items():
            losses[f"loss_on_{split}_{whose}"] = [round(_loss(D, x0, level), 4) for level in JUDGED]
    of = SceneDataset(*SCENES["held out"], objects=(1, 2))
    real = reader.features(of.pictures(torch.arange(len(of))))
    axes = metrics.pca_features(real)
    frechet = {
        f"frechet_{whose}": metrics.frechet_distance(axes(reader.features(_draw(model, D))), axes(real))
        for whose, D in pair.items()
    }
    return {"loss_sigmas": list(JUDGED), **losses, **{key: round(value, 4) for key, value in frechet.items()}}


def _loss(D: Denoiser, x0: Tensor, level: float) -> float:
    eps = SampleNoise(SEED)(x0)
    with autocast("cpu"):
        pieces = [
            denoising_loss(D, x, torch.full((len(x),), level), e, "x0") for x, e in zip(x0.split(64), eps.split(64), strict=True)
        ]
    return float(torch.cat(pieces).mean())


def _draw(model: Any, D: Denoiser) -> Tensor:
    """256 pictures of a Denoiser of latents."""
    sigmas, found = model.sigmas(CALLS), []
    for first in range(0, 256, 64):
        x = model.start(SampleNoise(SEED, first)(torch.empty(64, *model.shape)), sigmas[0])
        with autocast("cpu"):
            found.append(model.decode(model.finish(sample(D, x, sigmas), sigmas[-1])).float())
    return torch.cat(found)
