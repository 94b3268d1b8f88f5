"""How clips are judged: coherence along the flow, flicker, identity, smoothness, and a Frechet distance of whole clips.

Clips are (N, F, 3, H, W) in [-1, 1]. Motion itself is read in `tracking`. Every measure of coherence is best for a frozen
clip, so none of them says anything without a measure of motion beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.metrics import frechet_distance, pca_features
from course_lib.video.tracking import check
from course_lib.worlds.scenes.captions import Reading

STILL = 0.05
"""Pixels by which a place may move and still counts as one that stands still."""
CELLS = 2
"""Cells along each side of a frame over which what the reader sees is averaged: a mean over all of it does not see motion."""
AXES = 4
"""Principal axes of frames that the Frechet video distance follows: 3 AXES numbers a clip, so that 75 clips hold them."""
BATCH = 256


class Reader(Protocol):
    """What reads frames, such as `zoo.load("scenes-reader")`; `net.seen(x)` are maps of features (B, width, h, w)."""

    net: nn.Module

    def features(self, pictures: Tensor) -> Tensor: ...

    def obeys(self, pictures: Tensor, prompts: list[Reading]) -> dict[str, Tensor]: ...


# --- coherence, with exact flow and without -----------------------------------------------------------------------


def _check_flow(clips: Tensor, flow: Tensor, visible: Tensor) -> None:
    n, frames, _, height, width = check(clips).shape
    for name, value, channels in (("flow", flow, 2), ("visible", visible, 1)):
        if value.shape != (n, frames - 1, channels, height, width):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected {(n, frames - 1, channels, height, width)} beside these clips"
            )


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """The mean of values (N, ...) over where they count, of each clip: (N,), nan where they never do."""
    return (values * where).flatten(1).sum(1) / where.flatten(1).sum(1)


def warp(frames: Tensor, flow: Tensor) -> Tensor:
    """Frames (M, C, H, W) looked up where the flow (M, 2, H, W) leads, in pixels to the right and down: x(p + flow(p)), bilinear.

    Beyond the picture its edge is repeated. Raises ValueError where the sizes disagree.
    """
    m, _, height, width = frames.shape
    if flow.shape != (m, 2, height, width):
        raise ValueError(f"flow has shape {tuple(flow.shape)}; expected {(m, 2, height, width)} beside these frames")
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    at = torch.stack([u, v], -1).to(flow) + flow.movedim(1, -1)
    at = at / at.new_tensor([width, height]) * 2 - 1
    return F.grid_sample(frames, at.to(frames), padding_mode="border", align_corners=False)


def warp_error(clips: Tensor, flow: Tensor, visible: Tensor) -> Tensor:
    """Mean |x_{k+1}(p + flow_k(p)) - x_k(p)| over pixels p that are still seen in the next frame, (N,), in units of the picture.

    clips (N, F, 3, H, W), flow (N, F - 1, 2, H, W), visible (N, F - 1, 1, H, W) as in `RenderedClips`. Lai et al. 2018 warp
    and mask alike and take squares; the absolute difference is less of a measure of the few pixels at edges, where a
    bilinear look-up errs. True clips have that error and the shading that turns with a spin: print theirs beside it. nan
    where nothing is visible. Raises ValueError where shapes disagree.
    """
    _check_flow(clips, flow, visible)
    found = warp(clips[:, 1:].flatten(0, 1), flow.flatten(0, 1)).view_as(clips[:, 1:])
    return _mean((found - clips[:, :-1]).abs().mean(2, keepdim=True), visible)


def still_flicker(clips: Tensor, flow: Tensor, visible: Tensor, within: float = STILL) -> Tensor:
    """Mean |x_{k+1} - x_k| over pixels that stand still, |flow_k| <= within pixels, and stay visible: (N,), 0 in a perfect clip.

    Only light changes there in a true clip, by a shadow that moves. For clips whose flow is known, true ones and decoded
    ones. Shapes and errors as in `warp_error`; nan where nothing stands still, as in a roll.
    """
    _check_flow(clips, flow, visible)
    still = visible & (flow.norm(dim=2, keepdim=True) <= within)
    return _mean(clips.diff(dim=1).abs().mean(2, keepdim=True), still)


def flicker(clips: Tensor) -> Tensor:
    """Temporal energy that is faster than motion: mean |x_{k+1} - 2 x_k + x_{k-1}| sqrt(pi / 12), (N,), for clips without flow.

    Zero where every pixel changes linearly with time, s where on top of that it flickers by independent Gaussian noise of
    deviation s, since the second difference then has variance 6 s^2 and a Gaussian of deviation d the mean size
    d sqrt(2 / pi). An edge that passes a pixel counts too, so compare with true clips of the same motions only. Raises
    ValueError for other shapes and fewer than 3 frames.
    """
    check(clips, 3)
    return clips.diff(n=2, dim=1).abs().flatten(1).mean(1) * math.sqrt(math.pi / 12)


# --- what the reader says -----------------------------------------------------------------------------------------


def identity(clips: Tensor, reader: Reader, wanted: Sequence[Reading]) -> dict[str, Tensor]:
    """In which frames the reader sees the shape, the colour and both that are wanted: name -> (N, F) bool.

    wanted has one reading for each clip, such as `parse_motion(caption).scene`; what it does not name is right. The share
    of frames is the mean. Raises ValueError for other shapes and numbers.
    """
    n, frames = check(clips, 1).shape[:2]
    if len(wanted) != n:
        raise ValueError(f"wanted has {len(wanted)} readings; expected {n}, one for each clip")
    found = reader.obeys(clips.flatten(0, 1), [one for one in wanted for _ in range(frames)])
    right = {name: found[name].nan_to_num(1.0).bool().unflatten(0, (n, frames)) for name in ("shape", "colour")}
    return right | {"both": right["shape"] & right["colour"]}


def smoothness(clips: Tensor, reader: Reader) -> Tensor:
    """Mean cosine of the features of neighbouring frames, (N,), 1 for a frozen clip.

    1 / (F - 1) sum_k <f_k, f_{k+1}> / (|f_k| |f_{k+1}|), with CLIP's image features f where clips of the real world are
    judged (Esser et al. 2023) and the reader's here. Raises ValueError for other shapes and fewer than 2 frames.
    """
    n, frames = check(clips).shape[:2]
    f = F.normalize(reader.features(clips.flatten(0, 1)), dim=-1).unflatten(0, (n, frames))
    return (f[:, 1:] * f[:, :-1]).sum(-1).mean(1)


# --- Frechet video distance ---------------------------------------------------------------------------------------


@torch.no_grad()
def frame_features(clips: Tensor, reader: Reader) -> Tensor:
    """What the reader sees in CELLS x CELLS cells of every frame, (N, F, d) on the CPU in fp32."""
    n, frames = check(clips, 3).shape[:2]
    where = next(reader.net.parameters()).device
    cells = [
        F.adaptive_avg_pool2d(reader.net.seen(x.to(where)).float(), CELLS).flatten(1).cpu()
        for x in clips.flatten(0, 1).split(BATCH)
    ]
    return torch.cat(cells).unflatten(0, (n, frames))


def clip_features(true: Tensor, reader: Reader, axes: int = AXES) -> Callable[[Tensor], Tensor]:
    """Return a function from clips (N, F, 3, H, W) to their features (N, 3 axes) float64, in axes and units of true clips.

    y_k are the frames' features on the leading principal axes of the frames of the true clips. A clip has mean_k y_k, what it
    shows, and the root mean squares over k of y_{k+1} - y_k and of y_{k+1} - 2 y_k + y_{k-1}, how fast and how unsteadily that
    changes. Each number is divided by its deviation over the true clips, or the first ones would drown the others. Raises
    ValueError for other shapes and fewer than 3 frames or 2 true clips.
    """
    seen = frame_features(true, reader)
    if len(true) < 2:
        raise ValueError(f"true has {len(true)} clips; expected at least 2, or they have no deviation")
    project = pca_features(seen.flatten(0, 1), axes)

    def summary(seen: Tensor) -> Tensor:
        y = project(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])  # (N, F, axes)
        speed, jerk = (y.diff(n=order, dim=1).square().mean(1).sqrt() for order in (1, 2))
        return torch.cat([y.mean(1), speed, jerk], 1)

    unit = summary(seen).std(0)
    return lambda clips: summary(frame_features(clips, reader)) / unit


def frechet_video_distance(true: Tensor, clips: Tensor, reader: Reader, axes: int = AXES) -> float:
    """`metrics.frechet_distance` between the `clip_features` of true clips and of others, (N, F, 3, H, W) and (M, F, 3, H, W).

    The distance of Unterthiner et al. 2018 with the scenes' reader in place of I3D. Chance alone puts two sets of N clips of
    one distribution at most about d (d + 5) / (2 N) apart, d = 3 axes: 2 d / N by their means and d (d + 1) / (2 N) by their
    covariances, to first order and for Gaussian features; so compare sets of one size. Raises ValueError for other shapes,
    fewer than 3 frames and fewer than d + 2 clips.
    """
    features = clip_features(true, reader, axes)
    return frechet_distance(features(true), features(clips))
