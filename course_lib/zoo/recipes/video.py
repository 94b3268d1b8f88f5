"""`mini-video`: text to clips of 8 frames, by temporal layers on a frozen `mini-sd` (Video LDM; Blattmann et al. 2023, Sec. 3.1).

The spatial layers are told the scene, as they were trained to be; the temporal ones are told the motion. Only these learn.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import zoo
from course_lib.nets import mini_sd
from course_lib.training import Fit, denoising_loss, fit
from course_lib.video.inflation import Temporal, inflated, video_ldm_of
from course_lib.video.masks import context, random_masks
from course_lib.video.noise import correlated
from course_lib.zoo import judge_video
from course_lib.zoo.control_data import WORDINGS, tokens
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.recipes.control import attention_of
from course_lib.zoo.recipes.settings import settings
from course_lib.zoo.video import ABOVE, TOP, PretrainedVideo, encoded
from course_lib.zoo.video import wrap as wrap_video
from course_lib.zoo.video_data import FRAMES, LATENT, SHARED, Filmed, filmed

DATA = "8,000 training clips of seed 71: one object, seven motions of the object or the camera, 8 frames, with captions"
CLIPS, SEED = 8_000, 71
STAGES: tuple[dict[str, Any], ...] = (
    {"steps": 10_000, "stop_at": 5_500, "lr": 6e-3, "seed": 71, "shared": 2.0, "none": 0.5},
    {"steps": 7_500, "lr": 4e-3, "seed": 76, "shared": 10.0, "none": 0.7},
    {"steps": 7_500, "lr": 4e-3, "seed": 81, "shared": 40.0, "none": 0.6, "above": 200},
)
"""Runs from the weights of the one before, of which the first ends before its rate has fallen: `shared` is a of the noise that
frames have in common, `none` the share of clips of which no frame is known. At a = 2 frames choose each its own ground.

Frames differ by noise of sigma / sqrt(1 + a^2) only: at a = 40 and the image model's highest level they show what moves, which
no sampler knows at its start. So `above` levels, even in log sigma, lead on from there to TOP, where they do not. Trained so, it
makes no difference that 56 prompts show whether sampling starts there too, see `zoo.videos`."""
BATCH = 6
LAYERS: dict[str, Any] = {"kernel": (3, 3, 3), "per": 8}
"""Convolutions that see neighbouring places too: what moves is to be found there in the next frame."""
DROPPED = 0.1
"""The share of clips whose scene and motion are both left unsaid, for classifier-free guidance."""


def network(name: str = "mini-video") -> Temporal:
    """The untrained temporal layers."""
    net = zoo.load("mini-sd", device="cpu").denoiser.net
    return video_ldm_of(net, 2 * FRAMES, **LAYERS, told=mini_sd.WIDTH, seen=LATENT + 1, seed=STAGES[0]["seed"])


def batches(
    of: Filmed, sigmas: Tensor, batch: int = BATCH, dropped: float = DROPPED, shared: float = SHARED, none: float = 1.0
) -> Any:
    """What `fit` draws from: (x0, sigma, eps, known, scene, motion), noise levels even in t, one in each of `batch` strata."""
    empty = tokens([""])

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(of), (batch,), generator=source)
        wording = torch.randint(WORDINGS, (batch,), generator=source)
        blank = torch.rand(batch, 1, generator=source) < dropped
        posterior, eps = torch.randn(2, batch, *of.mean.shape[1:], generator=source)
        t = (torch.arange(batch) + torch.rand(batch, generator=source)) / batch * len(sigmas)
        sigma = sigmas[t.long().clamp(max=len(sigmas) - 1)]
        said = (torch.where(blank, empty, ids[rows, wording]) for ids in (of.scene, of.motion))
        known = random_masks(batch, of.of.frames, source, none)
        return of.latents(rows, posterior), sigma, correlated(eps, shared), known, *said

    return draw


def levels(model: Pretrained, above: int = 0) -> Tensor:
    """The noise levels that the image model was trained at, and `above` more, even in log sigma, from the highest to TOP."""
    sigmas = model.schedule.sigma(torch.arange(1000))
    return torch.cat([sigmas, torch.logspace(math.log10(sigmas[-1]), math.log10(TOP), above + 1)[1:].to(sigmas)])


def loss_of(model: Pretrained) -> Any:
    """What `fit` minimises: the denoising loss of v of `model` on the frames of clips that are not known, with the temporal
    layers that are trained."""

    def loss(temporal: Temporal, x0: Tensor, sigma: Tensor, eps: Tensor, known: Tensor, scene: Tensor, motion: Tensor) -> Tensor:
        with attention_of(x0.device):
            with torch.no_grad():
                text = model.pipeline.text_encoder(scene)[0]
            told = {"motion": encoded(model, motion), "context": context(x0, known)}
            D = inflated(model.denoiser, temporal).given(encoder_hidden_states=text, **told)
            unknown = (~known).to(x0)[..., None, None, None]  # (B, T, 1, 1, 1)
            return denoising_loss(D, x0, sigma, eps, "v", unknown / unknown.mean(1, keepdim=True))

    return loss


def train(
    name: str = "mini-video",
    net: nn.Module | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    checkpoint: Path | None = None,
    stop_at: int | None = None,
    **options: Any,
) -> Fit:
    """Minimise `loss_of` over `batches`, in STAGES; `steps`, `lr`, `seed` and `stop_at` are those of the last.

    A run that starts from a network, or that has a length of its own, has the last stage alone.
    """
    model, of = zoo.load("mini-sd", device), filmed(CLIPS, SEED)
    options |= {"nhwc": False, "device": device}
    whole = net is None and steps is None
    net, losses, seconds = network(name) if net is None else net, [], {}
    for number, stage in enumerate(STAGES if whole else STAGES[-1:], 1 if whole else len(STAGES)):
        own, file = dict(stage), checkpoint
        draw = batches(of, levels(model, own.pop("above", 0)), shared=own.pop("shared"), none=own.pop("none"))
        if number < len(STAGES):
            file = checkpoint.with_suffix(f".{number}.ckpt") if checkpoint else None
        else:
            own |= settings(stage, steps=steps, lr=lr, seed=seed) | {"stop_at": stop_at}
        run = fit(net.train().requires_grad_(True), draw, loss_of(model), checkpoint=file, **own, **options)
        net, losses, seconds[f"stage {number}"] = run.net, losses + run.losses, run.seconds
    return Fit(net, losses, sum(seconds.values()), seconds)


def wrap(net: nn.Module) -> PretrainedVideo:
    """What `zoo.load` returns: `mini-sd` with the temporal layers."""
    return wrap_video(zoo.load("mini-sd", device=str(next(net.parameters()).device)), net, "mini-video", above=ABOVE)


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """Motion, identity, flicker and Frechet video distance beside true clips and the image model alone, see `judge_video`."""
    return judge_video.judge(wrap(net))
