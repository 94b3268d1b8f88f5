"""Clips of twice the size, beside bilinear enlargement of the small ones and beside true clips rendered at that size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.video import measures
from course_lib.video.conditioning import enlarged
from course_lib.worlds.scenes.clips import RenderedClips, render_clips
from course_lib.zoo.judge_video import clips, reconstructed
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.upsampler import FACTOR, Upsampler
from course_lib.zoo.video_data import SIDE, pictures

SEEDS = (0, 1, 2)
CLIPS = 24


def detail(x: Tensor) -> Tensor:
    """Mean size of the Laplacian of each clip (N, T, 3, H, W): (N,). A blurred picture has less than a true one."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).expand(3, 1, 3, 3)
    return F.conv2d(x.flatten(0, 1).float(), kernel, groups=3).abs().mean((1, 2, 3)).unflatten(0, x.shape[:2]).mean(1)


def measured(x: Tensor, true: RenderedClips) -> dict[str, float]:
    """Of clips x beside the true ones:

    psnr           decibels, the mean over frames
    detail         `detail` over that of the true clips
    still_flicker  mean change of what stands still, see `measures.still_flicker`
    warp_error     see `measures.warp_error`
    """
    error = (x - true.rgb).square().mean((2, 3, 4))
    return {
        "psnr": round(float((10 * torch.log10(4 / error)).mean()), 2),
        "detail": round(float((detail(x) / detail(true.rgb)).mean()), 4),
        "still_flicker": round(float(measures.still_flicker(x, true.flow, true.visible).nanmean()), 5),
        "warp_error": round(float(measures.warp_error(x, true.flow, true.visible).nanmean()), 5),
    }


@torch.no_grad()
def judge(model: Pretrained, upsampler: Upsampler, split: str = "test", n: int = CLIPS) -> dict[str, Any]:
    """Of the first n clips of a split, small clips enlarged after decoding, upsampled latents with and without temporal layers
    for each of SEEDS, and the true large clips through the VAE, which is the floor."""
    of = clips(split).of[:n]
    true, small = render_clips(of, FACTOR * SIDE), pictures(of)
    z = torch.cat([model.encode(frames) for frames in small])
    z = z.unflatten(0, small.shape[:2])

    def decoded(latents: Tensor) -> Tensor:
        return torch.cat([model.decode(clip).float()[None] for clip in latents])

    found = {"bilinear": enlarged(reconstructed(model, small), FACTOR), "reconstructed": reconstructed(model, true.rgb)}
    for seed in SEEDS:
        found[f"frame by frame, seed {seed}"] = decoded(upsampler(z, seed=seed, m=0.0))
        found[f"with temporal layers, seed {seed}"] = decoded(upsampler(z, seed=seed))
    return {"clips": n} | {name: measured(x, true) for name, x in found.items()}
