"""`mini-video-upsampler`: latents of 128-pixel clips from those of 64-pixel ones, frame by frame at first, then along time.

As of Video LDM (Blattmann et al. 2023, Sec. 3.4), the network of frames is trained first; with it frozen, its temporal layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from course_lib import zoo
from course_lib.denoisers import from_edm
from course_lib.training import Fit, denoising_loss, edm_weight, fit, lognormal_sigmas
from course_lib.video.conditioning import enlarged
from course_lib.video.inflation import Temporal, inflated, pseudo_3d_of
from course_lib.zoo import judge_upsampler
from course_lib.zoo.recipes import video
from course_lib.zoo.upsampler import FACTOR, SIGMA_DATA, Beside, Upsampler, told
from course_lib.zoo.upsampler import wrap as wrap_upsampler
from course_lib.zoo.video_data import FRAMES, SIDE, Filmed, filmed

CLIPS = 800
DATA = f"the first {CLIPS} of the training clips of mini-video, rendered at 64 and at 128 pixels"
STAGES: dict[str, dict[str, Any]] = {
    "frames": {"steps": 3_000, "lr": 2e-3, "seed": 91},
    "temporal": {"steps": 1_500, "lr": 2e-3, "seed": 92},
}
BATCH = 4
IN_BYTES = ("mini-video-upsampler",)
WIDTHS = (24, 40)
LARGEST_S = 0.6
"""Of the noise on small frames in training, which is drawn evenly from 0 for each clip."""


def network(name: str = "mini-video-upsampler") -> nn.ModuleDict:
    """The untrained network of frames, and its temporal layers."""
    torch.manual_seed(STAGES["frames"]["seed"])
    frames = Beside(WIDTHS)
    return nn.ModuleDict({"frames": frames, "temporal": pseudo_3d_of(frames, seed=STAGES["temporal"]["seed"])})


def batches(small: Filmed, large: Filmed) -> Any:
    """What `fit` draws from: clips (r, sigma, eps, low), r what is missing of the enlarged latents."""

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(large), (BATCH,), generator=source)
        low = small.latents(rows, torch.randn(BATCH, *small.mean.shape[1:], generator=source))
        eps, behind = torch.randn(2, BATCH, *large.mean.shape[1:], generator=source)
        s = LARGEST_S * torch.rand(BATCH, generator=source)
        return large.mean[rows] - enlarged(low, FACTOR), lognormal_sigmas(BATCH, -0.6, 1.4, source), eps, told(low, s, behind)

    return draw


def train(
    name: str = "mini-video-upsampler",
    net: nn.ModuleDict | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    checkpoint: Any = None,
    **options: Any,
) -> Fit:
    """Both stages of STAGES; `steps`, `lr` and `seed` are those of both where they are given."""
    net = network(name) if net is None else net
    draw, weight = batches(filmed(video.CLIPS, video.SEED), filmed(CLIPS, video.SEED, side=FACTOR * SIDE)), edm_weight(SIGMA_DATA)
    changed = {key: value for key, value in {"steps": steps, "lr": lr, "seed": seed}.items() if value is not None}
    options |= {"nhwc": False, "device": device}

    def of_frames(frames: Beside, r: Tensor, sigma: Tensor, eps: Tensor, low: Tensor) -> Tensor:
        r, eps, low = (value.flatten(0, 1) for value in (r, eps, low))
        return denoising_loss(from_edm(frames, SIGMA_DATA, low=low), r, sigma.repeat_interleave(FRAMES), eps, weight)

    def of_time(temporal: Temporal, r: Tensor, sigma: Tensor, eps: Tensor, low: Tensor) -> Tensor:
        return denoising_loss(inflated(from_edm(first.net, SIGMA_DATA, low=low), temporal), r, sigma, eps, weight)

    def file(stage: str) -> Any:
        return checkpoint.with_suffix(f".{stage}.ckpt") if checkpoint else None

    first = fit(net["frames"], draw, of_frames, checkpoint=file("frames"), **STAGES["frames"] | changed, **options)

    second = fit(net["temporal"], draw, of_time, checkpoint=file("temporal"), **STAGES["temporal"] | changed, **options)
    both = nn.ModuleDict({"frames": first.net, "temporal": second.net})
    seconds = {"frames": first.seconds, "temporal": second.seconds}
    return Fit(both, first.losses + second.losses, sum(seconds.values()), seconds)


def wrap(net: nn.ModuleDict) -> Upsampler:
    """What `zoo.load` returns."""
    return wrap_upsampler(net)


def judge(name: str, net: nn.ModuleDict) -> dict[str, Any]:
    """Beside bilinear enlargement, and frame by frame, see `judge_upsampler`."""
    return judge_upsampler.judge(zoo.load("mini-sd", device="cpu"), wrap(net))
