"""`scenes-joint`: UniDiffuser on scenes of one object, `mini-sd`'s latents beside what a reader reads in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib import metrics, zoo
from course_lib.devices import SampleNoise, autocast, generator
from course_lib.nets.joint import LAST, JointViT, vectors
from course_lib.sample import sample
from course_lib.schedules import Cosine, uniform
from course_lib.steps import ddim
from course_lib.training import Fit, fit
from course_lib.types import Denoiser, right
from course_lib.unidiffuser import UniDiffuser
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.zoo import latent_scenes
from course_lib.zoo.latent_scenes import ATTRIBUTES, SHAPE, SIZES

DATA = "the scene world at 64 px: 12,000 training scenes of seed 21, one object, as latents of mini-sd"
SCENES, HELD = (12_000, 21), (1_000, 23)
STEPS, BATCH, RATE, SEED = 8_000, 64, 1.5e-3, 6
SCHEDULE, SAMPLING, START = Cosine(), 25, 0.99
"""The judge samples in 25 DDIM steps from the time 0.99, sigma = 63; at 1 sigma is infinite."""


def network(name: str = "scenes-joint") -> JointViT:
    """The untrained network."""
    return JointViT(SIZES)


def wrap(net: JointViT) -> UniDiffuser:
    """What `zoo.load` returns."""
    return UniDiffuser(net.eval(), SCHEDULE)


def loss(net: JointViT, x0: Tensor, a0: Tensor, times: Tensor, eps_x: Tensor, eps_a: Tensor) -> Tensor:
    """|v_x - net_x|^2 / d_x + |v_a - net_a|^2 / d_a at two times drawn on their own (Bao et al. 2023b, Eq. 6), (B,).

    v = alpha eps - std x0, where the paper predicts eps; times (B, 2) in [0, 1].
    """
    noisy, aims = [], []
    for clean, eps, t in zip((x0, a0), (eps_x, eps_a), times.unbind(1), strict=True):
        alpha, std = (right(f(t).to(clean), clean) for f in (SCHEDULE.alpha, SCHEDULE.std))
        noisy.append(alpha * clean + std * eps)
        aims.append(alpha * eps - std * clean)
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused attention's backward pass is slow for so few tokens
        said = net(*noisy, *(LAST * times).to(x0).unbind(1))
    return sum((y.float() - aim).square().flatten(1).mean(1) for y, aim in zip(said, aims, strict=True))


def train(
    name: str = "scenes-joint",
    net: nn.Module | None = None,
    steps: int = STEPS,
    lr: float = RATE,
    seed: int = SEED,
    **options: Any,
) -> Fit:
    """Both times are uniform and independent, the first in strata."""
    of = SceneDataset(*SCENES).cached()
    x0, a0 = latent_scenes.encode(of), vectors(latent_scenes.attributes(of), SIZES)
    low, high = SCHEDULE.t_min, SCHEDULE.t_max

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(x0), (BATCH,), generator=source)
        share = torch.rand(BATCH, 2, generator=source)
        share[:, 0] = (torch.arange(BATCH) + share[:, 0]) / BATCH
        eps_x = torch.randn(BATCH, *SHAPE, generator=source)
        eps_a = torch.randn(BATCH, a0.shape[1], generator=source)
        return x0[rows], a0[rows], low + (high - low) * share, eps_x, eps_a

    if net is None:
        torch.manual_seed(seed)
        net = network(name)
    return fit(net, draw, loss, steps=steps, lr=lr, seed=seed, ema_decay=0.9995, **options)


@torch.no_grad()
def draw(D: Denoiser, shape: tuple[int, ...], seed: int) -> Tensor:
    """SAMPLING steps of DDIM from pure noise of this shape."""
    sigmas = uniform(SCHEDULE, SAMPLING, t_max=START)
    with autocast("cpu"):
        return sample(D, SampleNoise(seed).start(shape, sigmas[0]), sigmas, ddim).float()


def decode(x: Tensor) -> Tensor:
    """Pictures of latents, by `mini-sd`."""
    model = zoo.load("mini-sd", device="cpu")
    with torch.no_grad(), autocast("cpu"):
        return torch.cat([model.decode(part).float() for part in x.split(250)])


def read(pictures: Tensor) -> Tensor:
    """What the reader reads of each of ATTRIBUTES, (N, 5)."""
    return latent_scenes.values(zoo.load("scenes-reader", device="cpu").read(pictures))


def agreement(found: Tensor, asked: Tensor) -> dict[str, float]:
    """The share of rows (N, 5) that agree, of each attribute and of all at once."""
    right_ = (found == asked).double()
    each = {name: round(float(share), 4) for name, share in zip(ATTRIBUTES, right_.mean(0), strict=True)}
    return {**each, "all": round(float(right_.prod(1).mean()), 4)}


def judge(name: str, net: nn.Module, n: int = HELD[0]) -> dict[str, Any]:
    """Both conditionals, the joint and both marginals, read back; and the conditional whose time says that nothing is known."""
    model, of = wrap(net), SceneDataset(n, HELD[1]).cached()
    true, real = latent_scenes.attributes(of), of.pictures(torch.arange(n))
    a, noise = model.vectors(true), torch.randn(n, sum(SIZES), generator=generator(31))
    joint_x, joint_a = model.split(draw(model.joint(), (n, 256 + sum(SIZES)), 1))
    told, untold = (decode(draw(D, (n, *SHAPE), 2)) for D in (model.pictures(a), model.pictures(None, noise)))
    both, features = decode(joint_x), zoo.load("scenes-reader", device="cpu").features
    x = latent_scenes.encode(of)
    guessed = model.values(draw(model.attributes(x), a.shape, 3))
    free = model.values(draw(model.attributes(None, torch.randn(x.shape, generator=generator(32))), a.shape, 4))
    return {
        "pictures_of_attributes": agreement(read(told), true),
        "attributes_of_pictures": agreement(guessed, true),
        "joint": agreement(read(both), model.values(joint_a)),
        "pictures_alone_beside_attributes": agreement(read(untold), true),
        "attributes_alone_total_variation": {
            name: round(float((share(free[:, k], size) - share(true[:, k], size)).abs().sum() / 2), 4)
            for k, (name, size) in enumerate(zip(ATTRIBUTES, SIZES, strict=True))
        },
        "frechet": {
            name: round(metrics.frechet_distance(features(real), features(x)), 5)
            for name, x in {"given attributes": told, "alone": untold, "joint": both, "reconstructed": decode(x)}.items()
        },
    }


def share(values: Tensor, size: int) -> Tensor:
    """How often each of `size` values occurs."""
    return torch.bincount(values, minlength=size).double() / len(values)
