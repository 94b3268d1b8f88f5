"""`mini-sd`: text to 64 x 64 pictures of the scene world, a `StableDiffusionPipeline` of four million weights.

First the VAE; then the text encoder alone, which learns to say what a caption names; then the U-Net on the VAE's latents, with
the text encoder as it is (Rombach et al. 2022, Sec. 3). Only the "train" split is seen: sixteen combinations of shape and
colour are never shown. A text encoder that is trained together with the U-Net makes one of "seen from the left" and "seen from
the right" for thousands of steps: what the U-Net does not use yet is noise to it, and the encoder learns to leave it out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import CLIPTextModel

from course_lib.denoisers import discrete_of, from_v
from course_lib.devices import autocast, pick_device
from course_lib.nets import mini_sd as nets
from course_lib.training import Fit, denoising_loss, fit, write_atomically
from course_lib.worlds.scenes.attributes import VIEWS, Scenes
from course_lib.worlds.scenes.camera import camera, centres
from course_lib.worlds.scenes.captions import vocabulary
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.labels import OF_OBJECT, OF_SCENE, labels
from course_lib.worlds.scenes.sampling import middles
from course_lib.zoo import judge_scenes
from course_lib.zoo.pretrained import Pretrained, wrap
from course_lib.zoo.recipes.settings import settings

DATA = "the scene world at 64 px: 60,000 training scenes of seed 1, one or two objects, with captions"
SCENES = 60_000
WORDINGS = 8
"""Captions of each scene; a prompt is left empty DROPPED of the time, for classifier-free guidance."""
DROPPED = 0.1
VAE: dict[str, Any] = {"batch": 8, "kl": 1e-3, "boost": 1.5, "seed": 1}
VAE_STAGES: dict[str, dict[str, Any]] = {
    "crops": {"steps": 9_000, "lr": 2e-3, "seed": 1},
    "whole": {"steps": 14_000, "lr": 2e-3, "seed": 1},
    "fine": {"steps": 5_000, "lr": 1e-3, "seed": 2},
}
"""Each starts from the weights of the one before: squares cut from the pictures, whole pictures, the same at a lower rate."""
TEXT: dict[str, Any] = {"steps": 2_500, "batch": 128, "lr": 1e-3, "seed": 4}
UNET: dict[str, Any] = {"steps": 10_000, "batch": 64, "lr": 1.5e-3, "seed": 2, "channels": (64, 96)}
CONTINUED = 8e-4
"""Learning rate of a run that goes on from the embedded weights."""
DETAILS: dict[str, float] = {"boost": 2.0, "below": 1.0}
"""Such a run weighs the cells of a latent on the objects more (`emphasis`), at noise levels below this, where they are seen."""


Kept = Callable[[str], Path | None]
"""The checkpoint of a stage by its name, or None for none."""


def scenes() -> SceneDataset:
    """The scenes to train on, their pictures cached."""
    return SceneDataset(SCENES, 1, objects=(1, 2)).cached()


def discs(scenes: Scenes, size: int) -> Tensor:
    """1 where a pixel lies within the disc that the ball around an object covers, else 0: (N, K, size, size)."""
    view = camera(scenes)
    at, depth = view.project(middles(scenes), size)
    radius = scenes.scale * view.focal(size) / depth
    away = (centres(size, at.device).view(1, 1, size, size, 2) - at[:, :, None, None]).norm(dim=-1)
    return ((away < radius[..., None, None]) & scenes.present[..., None, None]).float()


def emphasis(scenes: Scenes, size: int, boost: float) -> Tensor:
    """Weights of pixels, (N, 1, size, size): 1 everywhere, and more on the objects.

    All objects of a picture together weigh `boost` times as much as the whole picture, and each as much as the other.
    """
    of = discs(scenes, size)
    share = of.mean((2, 3), keepdim=True).clamp(min=1 / size**2)
    return 1 + boost * (of / share).sum(1, keepdim=True) / scenes.present.sum(1)[:, None, None, None]


def reconstruction_loss(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The mean over pixels of weight (|y - x| + 4 |y - x|^2), of pictures (B, 3, H, W), by weights (B, 1, H, W): (B,).

    The square makes large errors count, such as a small object in the wrong colour; the weight, that objects are small.
    """
    e = (y.float() - x).abs()
    return (weight * (e + 4 * e.square())).flatten(1).mean(1)


def crops(of: SceneDataset, rows: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A square of each picture, three in four around an object, (B, 3, side, side): objects are a sixth of the pixels."""
    scenes, n = of.scenes[rows], len(rows)
    at, _ = camera(scenes).project(middles(scenes), of.size)
    which = torch.randint(2, (n,), generator=generator) * scenes.present[:, 1]
    centre = at[torch.arange(n), which] + torch.randint(-8, 9, (n, 2), generator=generator)
    anywhere = torch.rand(n, 1, generator=generator) < 0.25
    centre = torch.where(anywhere, of.size * torch.rand(n, 2, generator=generator), centre)
    corner = (centre - side / 2).round().long().clamp(0, of.size - side)
    return torch.stack([x[:, v : v + side, u : u + side] for x, (u, v) in zip(of.pictures(rows), corner.tolist(), strict=True)])


def train_vae(of: SceneDataset, net: nets.Compressor, kept: Kept, **options: Any) -> Fit:
    """The first stage: `reconstruction_loss` plus a small weight times the KL divergence, on crops and then on whole pictures.

    The VAE is convolutional, and a crop of a quarter of the pixels costs a quarter of the time. See VAE_STAGES.
    """

    def draw_crops(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(of), (VAE["batch"],), generator=generator)
        x = crops(of, rows, 32, generator)
        return x, torch.ones_like(x[:, :1]), torch.randn(len(rows), 4, 4, 4, generator=generator)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(of), (VAE["batch"],), generator=generator)
        weight = emphasis(of.scenes[rows], of.size, VAE["boost"])
        return of.pictures(rows), weight, torch.randn(len(rows), 4, 8, 8, generator=generator)

    def loss(net: nets.Compressor, x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
        y, kl = net(x, eps)
        return reconstruction_loss(y, x, weight) + VAE["kl"] * kl

    losses, stages = [], {}
    for stage, chosen in VAE_STAGES.items():
        source, file = (draw_crops if stage == "crops" else draw), kept(f"vae.{stage}")
        done = fit(net.requires_grad_(True), source, loss, checkpoint=file, nhwc=False, **chosen, **options)
        net, losses, stages[f"vae, {stage}"] = done.net, losses + done.losses, done.seconds
    return Fit(net, losses, sum(stages.values()), stages)


@dataclass
class Latents:
    """What the U-Net is trained on: mean and std of the VAE's latents (N, 4, 8, 8), and token ids (N, WORDINGS, LENGTH).

    `empty` holds the ids of the empty prompt.
    """

    mean: Tensor
    std: Tensor
    ids: Tensor
    empty: Tensor


@torch.no_grad()
def compress(of: SceneDataset, vae: AutoencoderKL, device: str | None = None, kept: Path | None = None) -> Latents:
    """The latents of all scenes and the tokens of WORDINGS captions of each; `kept` is a file that saves doing it twice."""
    where = pick_device(device)
    if kept is not None and kept.exists():
        mean, std = torch.load(kept, weights_only=True)
    else:
        vae = vae.to(where).eval()
        pieces = []
        for rows in tqdm(torch.arange(len(of)).split(128), desc="encoding scenes", unit="batch"):
            with autocast(where):
                found = vae.encode(of.pictures(rows).to(where)).latent_dist
            pieces.append((found.mean.half().cpu(), found.std.half().cpu()))
        mean, std = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        if kept is not None:
            write_atomically(kept, lambda path: torch.save((mean, std), path))
    tokens = nets.tokenizer(vocabulary())
    ids = torch.stack([nets.token_ids(tokens, of.captions(seed)).short() for seed in range(WORDINGS)], 1)
    return Latents(mean.float(), std.float(), ids, nets.token_ids(tokens, [""]).short())


def standardise(latents: Latents, vae: AutoencoderKL) -> Latents:
    """The latents of the same scenes with mean 0 and variance 1 in every channel; `vae` then gives and takes these."""
    mean = latents.mean.mean((0, 2, 3))
    std = (latents.mean.var((0, 2, 3)) + latents.std.square().mean((0, 2, 3))).sqrt()
    nets.standardise(vae, mean, std)
    m, s = mean[:, None, None], std[:, None, None]
    return replace(latents, mean=(latents.mean - m) / s, std=latents.std / s)


def named(scenes: Scenes) -> tuple[Tensor, list[int]]:
    """What a caption may name, as class numbers (N, 12), -1 where there is nothing, and the number of classes of each column.

    count, relation, ground, light; shape, colour, size and the side that is seen, of both objects in the order of `labels`.
    """
    of = labels(scenes)
    side = torch.where(of.oriented, (of.azimuth / 90).round().long() % len(VIEWS), -1)
    columns = {name: (getattr(of, name)[:, None], len(values)) for name, values in OF_SCENE.items()}
    columns |= {name: (getattr(of, name), len(values)) for name, values in OF_OBJECT.items()}
    columns |= {"side": (side, len(VIEWS))}
    sizes = [n for values, n in columns.values() for _ in range(values.shape[1])]
    return torch.cat([values for values, _ in columns.values()], 1), sizes


def train_text(latents: Latents, of: SceneDataset, text_encoder: CLIPTextModel, **options: Any) -> Fit:
    """The second stage: the cross-entropy of everything that is `named`, summed; what a caption leaves out stays a guess."""
    target, sizes = named(of.scenes)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(target), (TEXT["batch"],), generator=generator)
        wording = torch.randint(latents.ids.shape[1], (TEXT["batch"],), generator=generator)
        return latents.ids[rows, wording].long(), target[rows]

    def loss(net: nets.TextReader, ids: Tensor, target: Tensor) -> Tensor:
        pairs = zip(net(ids).float().split(sizes, 1), target.unbind(1), strict=True)
        return torch.stack([cross_entropy(logits, true, ignore_index=-1, reduction="none") for logits, true in pairs]).sum(0)

    with torch.random.fork_rng([]):
        torch.manual_seed(TEXT["seed"])
        net = nets.TextReader(text_encoder, sum(sizes)).requires_grad_(True)
    return fit(net, draw, loss, **{key: TEXT[key] for key in ("steps", "lr", "seed")}, **options)


def train_unet(latents: Latents, net: nets.TextToLatent, details: Tensor | None = None, **options: Any) -> Fit:
    """The third stage: the denoising loss of v on latents, prompts among WORDINGS, noise levels even in t.

    details (N, 1, 8, 8) weighs the cells of each latent where the noise is below DETAILS['below']. Where the objects are is
    then plain from the noisy latent, so that the weights do not move the minimum; at more noise they would.
    """
    schedule = discrete_of(nets.scheduler())
    sigmas = schedule.sigma(torch.arange(1000))
    batch = UNET["batch"]

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(latents.mean), (batch,), generator=generator)
        wording = torch.randint(latents.ids.shape[1], (batch,), generator=generator)
        ids = latents.ids[rows, wording]
        dropped = torch.rand(batch, 1, generator=generator) < DROPPED
        posterior, eps = torch.randn(2, batch, *latents.mean.shape[1:], generator=generator)
        x0 = latents.mean[rows] + latents.std[rows] * posterior
        # One level in each of `batch` strata: the same distribution, a loss that varies less (Kingma et al. 2021, App. I.1).
        t = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * len(sigmas)
        level = t.long().clamp(max=len(sigmas) - 1)  # fp32 may round the last stratum up to its end
        weight = torch.ones_like(x0[:, :1])
        if details is not None:
            weight = torch.where(sigmas[level].view(-1, 1, 1, 1) < DETAILS["below"], details[rows], weight)
        return x0, sigmas[level], eps, torch.where(dropped, latents.empty, ids).long(), weight

    def loss(net: torch.nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        # On a CPU the fused attention's backward pass takes a third of a step of sequences as short as these.
        with sdpa_kernel(SDPBackend.MATH) if x0.device.type == "cpu" else nullcontext():
            return denoising_loss(from_v(net, schedule.t_of_sigma, ids=ids), x0, sigma, eps, "v", weight)

    net.requires_grad_(True).text_encoder.requires_grad_(False)
    return fit(net, draw, loss, ema_decay=0.9995, **options)


def network(name: str = "mini-sd", channels: tuple[int, ...] | None = None) -> nets.MiniSD:
    """The untrained pipeline, with the U-Net of UNET or of other channels; the same in every call."""
    words = vocabulary()
    with torch.random.fork_rng([]):
        torch.manual_seed(VAE["seed"])
        vae = nets.vae()
        torch.manual_seed(UNET["seed"])
        generator = nets.TextToLatent(nets.unet(channels or UNET["channels"]), nets.text_encoder(len(nets.tokenizer(words))))
    return nets.MiniSD(vae, generator, words)


def first_stages(net: nets.MiniSD, kept: Kept, device: str | None = None, **options: Any) -> tuple[Latents, Fit]:
    """Train VAE and text encoder of `net`, in place; returns the latents of all scenes, standardised, and both runs as one."""
    of = scenes()
    vae = train_vae(of, nets.Compressor(net.vae), kept, device=device, **options)
    net.vae = vae.net.vae
    latents = standardise(compress(of, net.vae, device, kept("latents")), net.vae)
    text = train_text(latents, of, net.generator.text_encoder, checkpoint=kept("text"), device=device, **options)
    net.generator.text_encoder = text.net.text_encoder
    stages = vae.stages | {"text": text.seconds}
    return latents, Fit(net, vae.losses + text.losses, sum(stages.values()), stages)


def read(model: Pretrained) -> nets.MiniSD:
    """The networks of a loaded pipeline."""
    parts = model.components
    return nets.MiniSD(parts["vae"], nets.TextToLatent(parts["unet"], parts["text_encoder"]), sorted(model.words))


def train(
    name: str,
    net: nets.MiniSD | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> Fit:
    """All stages, the third for `steps`; with `net` given the third alone goes on from its weights, with weight on DETAILS."""
    options["device"] = device

    def kept(stage: str) -> Path | None:
        return checkpoint and checkpoint.with_name(f"{name}.{stage}.ckpt")

    losses, stages, details = [], {}, None
    if net is None:
        net = network(name)
        latents, first = first_stages(net, kept, **options)
        losses, stages = first.losses, first.stages
    else:
        of = scenes()
        latents, details = compress(of, net.vae, device, kept("latents.zoo")), emphasis(of.scenes, 8, DETAILS["boost"])
    chosen = settings(UNET, steps=steps, lr=lr, seed=seed)
    last = train_unet(latents, net.generator, details, checkpoint=kept("unet"), **chosen, **options)
    net.generator = last.net
    stages = stages | {"unet": last.seconds}
    return Fit(net.eval().requires_grad_(False), losses + last.losses, sum(stages.values()), stages)


def judge(name: str, net: nets.MiniSD) -> dict[str, Any]:
    """VAE, prompts and distribution, see `judge_scenes`."""
    return judge_scenes.judge(wrap(net.pipeline(), name, frozenset(net.words)))
