"""Whether a decoder of clips flickers less than the image decoder that it is made of, at no loss of PSNR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib import zoo
from course_lib.video import measures
from course_lib.video.decoder import VideoDecoder
from course_lib.worlds.scenes.clips import render_clips
from course_lib.zoo.judge_video import clips, reconstructed
from course_lib.zoo.video_data import SIDE


@torch.no_grad()
def decoded(decoder: VideoDecoder, z: Tensor) -> Tensor:
    """Clips (N, T, 3, H, W) in [-1, 1] of latents (N, T, C, h, w)."""
    return torch.cat([decoder(some) for some in z.split(8)]).float().clamp(-1, 1)


def judge(decoder: VideoDecoder, split: str = "test", n: int = 100) -> dict[str, Any]:
    """Of true clips through the VAE, with the image decoder and with this one:

    psnr    decibels, the mean over frames
    flicker        mean, see `measures.flicker`, beside that of the true clips
    still_flicker  mean change of what stands still, see `measures.still_flicker`
    warp_error     mean, see `measures.warp_error`
    """
    model, of = zoo.load("mini-sd", device="cpu"), clips(split).of[:n]
    true = render_clips(of, SIDE)
    with torch.no_grad():
        z = torch.cat([model.encode(some) for some in true.rgb.flatten(0, 1).split(64)]).unflatten(0, true.rgb.shape[:2])
    found = {"true": true.rgb, "image decoder": reconstructed(model, true.rgb), "video decoder": decoded(decoder, z)}
    rows: dict[str, Any] = {"clips": len(of)}
    for name, x in found.items():
        rows[name] = {
            "flicker": round(float(measures.flicker(x).mean()), 5),
            "still_flicker": round(float(measures.still_flicker(x, true.flow, true.visible).nanmean()), 5),
            "warp_error": round(float(measures.warp_error(x, true.flow, true.visible).nanmean()), 5),
        }
        if name != "true":
            error = (x - true.rgb).square().mean((2, 3, 4))  # (N, T)
            rows[name]["psnr"] = round(float((10 * torch.log10(4 / error)).mean()), 2)
    return rows
