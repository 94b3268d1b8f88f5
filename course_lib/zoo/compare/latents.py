"""Networks of equal size, experts by noise level, and scale factors, trained on the latents of one object and its shape."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib import metrics, zoo
from course_lib.denoisers import NetworkDenoiser, from_v
from course_lib.devices import SampleNoise, autocast, generator, one_thread
from course_lib.nets.dit import DiT
from course_lib.nets.unet import UNet
from course_lib.nets.uvit import UViT
from course_lib.sample import sample
from course_lib.schedules import Cosine, uniform
from course_lib.steps import ddim
from course_lib.training import denoising_loss, fit
from course_lib.worlds.scenes.attributes import SHAPES
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.labels import labels
from course_lib.zoo import latent_scenes
from course_lib.zoo.compare import rows
from course_lib.zoo.latent_scenes import SHAPE
from course_lib.zoo.stored import Row

SCENES = {"train": (12_000, 21), "validation": (1_000, 22), "held out": (1_000, 23)}
"""Split -> scenes of one object, and their seed."""
CLASSES = len(SHAPES)
SCHEDULE = Cosine()
START = 0.99
"""The time at which sampling starts, at sigma = 63; at 1 nothing is left of the picture, and sigma is infinite."""
BATCH = 32
SEEDS = (0, 1, 2)

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "U-Net": lambda: UNet(4, (40, 56), blocks=1, attention=(1,), classes=CLASSES),
    "U-ViT, patch 2": lambda: UViT(4, 104, 5, 4, patch=2, side=4, classes=CLASSES),
    "ViT, patch 2": lambda: UViT(4, 108, 5, 4, patch=2, side=4, classes=CLASSES, skips=False),
    "DiT, patch 2": lambda: DiT(4, 96, 4, 4, patch=2, side=4, classes=CLASSES),
    "DiT, patch 1": lambda: DiT(4, 96, 4, 4, patch=1, side=8, classes=CLASSES),
}
"""Name -> the untrained network, of 0.74 million weights, the largest 4.1 % larger than the smallest."""
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
STEPS = {"tuning": 400, "networks": 2_000, "experts": 1_500, "scales": 1_500, "starts": 500}


@functools.cache
def latents(split: str) -> tuple[Tensor, Tensor]:
    """Scaled latents (N, 4, 8, 8), one draw of each posterior, and the shape of the object (N,)."""
    of = SceneDataset(*SCENES[split]).cached()
    return latent_scenes.encode(of), labels(of.scenes).shape[:, 0]


def wrap(net: nn.Module) -> NetworkDenoiser:
    """The Denoiser of a network that predicts v and is told the time from 0 to 1,000."""
    return from_v(net, lambda sigma: 1000 * SCHEDULE.t_of_sigma(sigma))


def loss_of(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, label: Tensor) -> Tensor:
    """The denoising loss of v, (B,)."""
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused attention's backward pass is slow for so few tokens
        return denoising_loss(wrap(net).given(label=label), x0, sigma, eps, "v")


def levels(n: int, first: float = 0.0, last: float = 1.0, source: torch.Generator | None = None) -> Tensor:
    """n noise levels, one in each of n even strata of the time from `first` to `last`; their middles without a generator."""
    place = torch.full((n,), 0.5) if source is None else torch.rand(n, generator=source)
    share = (torch.arange(n) + place) / n
    low, high = SCHEDULE.t_min, SCHEDULE.t_max
    return SCHEDULE.sigma(low + (high - low) * (first + (last - first) * share.double())).float()


def batches(scale: float = 1.0, first: float = 0.0, last: float = 1.0) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """`draw` of `training.fit`: latents times `scale`, levels of the times from `first` to `last`, noise, shapes."""
    x0, label = latents("train")

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(x0), (BATCH,), generator=source)
        return scale * x0[rows], levels(BATCH, first, last, source), torch.randn(BATCH, *SHAPE, generator=source), label[rows]

    return draw


@torch.no_grad()
def losses(nets: Sequence[nn.Module], split: str) -> list[float]:
    """The loss on a split in each of as many even parts of the time as there are networks, each part by its own network."""
    x0, label = latents(split)
    found = []
    for k, net in enumerate(nets):
        sigma = levels(len(x0), k / len(nets), (k + 1) / len(nets))[torch.randperm(len(x0), generator=generator(7))]
        eps = SampleNoise(k)(x0)
        with autocast("cpu"):
            parts = zip(*(each.split(250) for each in (x0, sigma, eps, label)), strict=True)
            found.append(float(torch.cat([loss_of(net.eval(), *part) for part in parts]).mean()))
    return found


def flops(net: nn.Module) -> int:
    """Floating-point operations of one call for one picture, a multiplication and an addition counted as two."""
    return metrics.flops(net, torch.zeros(1, *SHAPE), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def train(name: str, steps: int, seed: int, lr: float, net: nn.Module | None = None, scale: float = 1.0, **options: Any) -> Any:
    """`training.fit` of one network on one thread; batches depend on the seed and not on the network."""
    if net is None:
        torch.manual_seed(seed)
        net = NETWORKS[name]()
    part = {key: options.pop(key) for key in ("first", "last") if key in options}
    with one_thread():
        return fit(net, batches(scale, **part), loss_of, steps=steps, lr=lr, seed=seed, device="cpu", **options)


def tune(network: str, lr: float, seed: int = 100) -> Row:
    """The loss on the validation split after a short run at this learning rate."""
    steps = STEPS["tuning"]
    found = losses([train(network, steps, seed, lr).net], "validation")[0]
    return {"network": network, "lr": lr, "steps": steps, "loss": round(found, 5)}


def rate(network: str) -> float:
    """The learning rate whose short run had the smallest loss."""
    return min((row for row in rows("tuning") if row["network"] == network), key=lambda row: row["loss"])["lr"]


def measure_network(network: str, seed: int) -> Row:
    """The loss on held-out latents along one training, beside operations and seconds of the processor."""
    for split in ("train", "held out"):
        latents(split)  # before the clock runs
    curve, spent, begun = [], 0.0, time.process_time()

    def look(step: int, average: nn.Module) -> None:
        nonlocal spent, begun
        if step % 250 == 0:
            spent += time.process_time() - begun
            curve.append([step, round(spent, 1), round(losses([average], "held out")[0], 5)])
            begun = time.process_time()

    net = train(network, STEPS["networks"], seed, rate(network), on_step=look).net
    facts = {"network": network, "seed": seed, "lr": rate(network), "parameters": zoo.parameters(net), "batch": BATCH}
    return facts | {"flops": flops(net), "curve": curve, "loss": curve[-1][2], **judge(net)}


@torch.no_grad()
def draw(D: NetworkDenoiser, shape: tuple[int, ...], seed: int = 5, steps: int = 20) -> Tensor:
    """DDIM from noise alone at START, as a schedule that ends in pure noise promises that it may; `shape` is (N, C, h, w)."""
    sigmas = uniform(SCHEDULE, steps, t_max=START)
    with autocast("cpu"):
        return sample(D, SampleNoise(seed).start(shape, sigmas[0]), sigmas, ddim).float()


@torch.no_grad()
def decode(z: Tensor) -> Tensor:
    """Pictures of latents, by `mini-sd`."""
    model = zoo.load("mini-sd", device="cpu")
    with autocast("cpu"):
        return torch.cat([model.decode(part).float() for part in z.split(250)])


def frechet(pictures: Tensor) -> list[float]:
    """The Frechet distance to held-out renders in the reader's features, and its standard error."""
    reader = zoo.load("scenes-reader", device="cpu")
    real = SceneDataset(*SCENES["held out"]).cached().pictures(torch.arange(SCENES["held out"][0]))
    features = [reader.features(images) for images in (real, pictures)]
    low, high = metrics.bootstrap(metrics.frechet_distance, *features, rounds=40, level=0.6827)
    return [round((low + high) / 2, 5), round((high - low) / 2, 5)]


def facts(pictures: Tensor, label: Tensor) -> Row:
    """The share of pictures in which the shape is read that was asked for, and their Frechet distance."""
    read = zoo.load("scenes-reader", device="cpu").read(pictures).shape[:, 0]
    return {"adherence": round(float((read == label).double().mean()), 4), "frechet": frechet(pictures)}


def judge(net: nn.Module, scale: float = 1.0, n: int = 1_000) -> Row:
    """`facts` of n samples, each shape as often; the latents were trained times `scale`."""
    label = torch.arange(n) % CLASSES
    return facts(decode(draw(wrap(net.eval()).given(label=label), (n, *SHAPE)) / scale), label)


def measure_experts(seed: int, name: str = "DiT, patch 2") -> Row:
    """Two experts, each for half of the time, beside one network of the same cost a step; losses in either half.

    All go on from the same network, trained on every level (Balaji et al. 2022, Sec. 4): the experts for as many steps as the
    one network, or for half as many, which is the same training in all. In the control each expert has the other's half.
    """
    lr, steps = rate(name), STEPS["experts"]
    base = train(name, steps, seed, lr).net

    def go_on(steps: int, **part: float) -> nn.Module:
        return train(name, steps, seed + 10, lr / 2, _copy(base, name), **part).net

    one = go_on(2 * steps)
    experts, short = ([go_on(n, first=k / 2, last=(k + 1) / 2) for k in (0, 1)] for n in (2 * steps, steps))
    pairs = {"before": [base] * 2, "one network": [one] * 2, "experts": experts, "half as long": short, "swapped": experts[::-1]}
    found = {of: [round(loss, 5) for loss in losses(nets, "held out")] for of, nets in pairs.items()}
    return {"network": name, "seed": seed, "steps": steps, **found}


def _copy(net: nn.Module, name: str) -> nn.Module:
    """A network of this name with the same weights, to go on from."""
    fresh = NETWORKS[name]()
    fresh.load_state_dict(net.state_dict())
    return fresh


def at_random(net: nn.Module) -> nn.Module:
    """The same network with random weights in the layers that adaLN-zero starts at zero, in place."""
    for layer in net.modules():
        if isinstance(layer, nn.Linear) and not bool(layer.weight.any()):
            layer.reset_parameters()
    return net


def measure_start(zero: bool, seed: int, name: str = "DiT, patch 2") -> Row:
    """The held-out loss after a short training of a DiT whose blocks start as the identity, or do not."""
    torch.manual_seed(seed)
    net, steps = NETWORKS[name](), STEPS["starts"]
    net = train(name, steps, seed, rate(name), net if zero else at_random(net)).net
    return {"zero": zero, "seed": seed, "steps": steps, "loss": round(losses([net], "held out")[0], 5)}


def measure_scale(scale: float, seed: int) -> Row:
    """The same training on latents of another standard deviation: what the scale factor of Stable Diffusion is there for."""
    name = "DiT, patch 2"
    net = train(name, STEPS["scales"], seed, rate(name), scale=scale).net
    return {"scale": scale, "seed": seed, "steps": STEPS["scales"], **judge(net, scale)}
