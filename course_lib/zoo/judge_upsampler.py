"""Clips of twice the size, beside other ways to enlarge the small ones and beside true clips rendered at that size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib import zoo
from course_lib.devices import SampleNoise, autocast
from course_lib.schedules import karras
from course_lib.video import measures
from course_lib.video.conditioning import enlarged
from course_lib.worlds.scenes.clips import RenderedClips, render_clips
from course_lib.zoo.judge_video import clips
from course_lib.zoo.upsampler import FACTOR, Upsampler
from course_lib.zoo.video_data import SIDE, pictures

SEEDS = (0, 1, 2)
CLIPS, FEWER = 24, 8
MORE = karras(4, 0.02, 4.0)
"""The levels of four steps, whose detail is drawn rather than its mean."""
WRONG, S = 0.3, 0.3
"""The levels of noise in small latents that a stage before got wrong, and of that which conditioning augmentation adds."""


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
def judge(upsampler: Upsampler, n: int = CLIPS) -> dict[str, Any]:
    """Of the first n test clips, and of FEWER where that is said, `measured`:

    bilinear, any scale    small clips, enlarged after decoding and decoded at twice the size
    reconstructed          the true large clips through the VAE, which is the floor
    frame by frame, with temporal layers, four steps, ...
                           upsampled latents of the small clips, for each of SEEDS; by MORE steps of FEWER
    wrong latents, ...     FEWER, from small latents wrong by noise of level WRONG: enlarged bilinearly; upsampled with s = 0,
                           with more noise of level S, and told of what is there
    """
    model, of = upsampler.model, clips("test").of[:n]
    true, small = render_clips(of, FACTOR * SIDE), pictures(of)

    def decoded(latents: Tensor) -> Tensor:
        with autocast(model.device):
            return torch.stack([model.decode(clip).float() for clip in latents])

    def encoded(x: Tensor) -> Tensor:
        return torch.stack([model.encode(frames) for frames in x])

    z = encoded(small)
    found = {"bilinear": enlarged(decoded(z), FACTOR), "reconstructed": decoded(encoded(true.rgb))}
    decoder = zoo.load("mini-sd-any-scale", device="cpu")
    with autocast("cpu"):
        found["any scale"] = torch.stack([decoder.decode(clip, FACTOR * SIDE).float() for clip in z])
    wrong = z[:FEWER] + WRONG * SampleNoise(len(z))(z[:FEWER])
    for seed in SEEDS:
        found[f"frame by frame, seed {seed}"] = decoded(upsampler(z, seed=seed, m=0.0))
        found[f"with temporal layers, seed {seed}"] = decoded(upsampler(z, seed=seed))
        for name, m in (("frame by frame", 0.0), ("with temporal layers", 1.0)):
            found[f"four steps, {name}, seed {seed}"] = decoded(upsampler(z[:FEWER], seed=seed, m=m, levels=MORE))
        found[f"wrong latents, s = 0, seed {seed}"] = decoded(upsampler(wrong, seed=seed))
        found[f"wrong latents, s = {S}, seed {seed}"] = decoded(upsampler(wrong, S, seed))
        found[f"wrong latents, told of it, seed {seed}"] = decoded(upsampler(wrong, WRONG, seed, behind=True))
    found["wrong latents, bilinear"] = enlarged(decoded(wrong), FACTOR)
    fewer = RenderedClips(**{name: value[:FEWER] for name, value in vars(true).items()})
    return {"clips": n, "fewer": FEWER, "wrong": WRONG} | {
        name: measured(x, fewer if name.startswith(("four", "wrong")) else true) for name, x in found.items()
    }
