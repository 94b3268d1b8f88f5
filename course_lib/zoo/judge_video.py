"""What a video model is worth: does what is asked move as asked, does it stay what it is, and do clips look like the world's?"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from course_lib import zoo
from course_lib.video import measures
from course_lib.video.inflation import mixed
from course_lib.video.tracking import shares, track
from course_lib.worlds.scenes.captions import Reading
from course_lib.worlds.scenes.clip_captions import directions, motion_captions, parse_motion
from course_lib.worlds.scenes.clips import MOTIONS, Clips, draw_clips
from course_lib.zoo.motion_reader import MotionReader
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.video import PretrainedVideo, clips_of
from course_lib.zoo.video_data import FRAMES, pictures, texts

W, STEPS = 2.0, 20
"""Guidance and steps of DDIM of all clips that are judged; from 1.5 to 3 motions are obeyed alike on validation clips."""
SPLITS = {"validation": (56, 9_701), "test": (200, 9_702)}
"""Split -> number and seed of its clips, of one object each; no training clip has these seeds."""
REAL = (200, 9_703)


class Set(NamedTuple):
    """The clips of a split, what was said of them, and what is to be read in them."""

    of: Clips
    captions: list[str]
    wanted: list[Reading]
    words: list[str]
    ways: list[str]


@functools.cache
def clips(split: str) -> Set:
    """The clips of a split."""
    n, seed = SPLITS[split]
    of = draw_clips(n, seed, objects=1, frames=FRAMES)
    captions = motion_captions(of, seed)
    readings = [parse_motion(caption).scene for caption in captions]
    return Set(of, captions, readings, [MOTIONS[motion] for motion in of.motion.tolist()], directions(of))


@functools.cache
def judges() -> tuple[Any, Any]:
    """The reader of maps and the reader of attributes."""
    return zoo.load("scenes-maps", device="cpu"), zoo.load("scenes-reader", device="cpu")


@functools.cache
def motions() -> MotionReader:
    """The reader of motions."""
    return zoo.load("scenes-motion", device="cpu")


@functools.cache
def true_clips(split: str) -> Tensor:
    """The rendered clips of a split, (N, F, 3, 64, 64)."""
    return pictures(clips(split).of)


@functools.cache
def real() -> Tensor:
    """Other rendered clips of the world."""
    return pictures(draw_clips(*REAL, objects=1, frames=FRAMES))


def reconstructed(model: Pretrained, x: Tensor) -> Tensor:
    """Clips (N, F, 3, H, W) through the VAE, frame by frame."""
    with torch.no_grad():
        frames = [model.decode(model.encode(some.to(model.device))).float().cpu() for some in x.flatten(0, 1).split(64)]
    return torch.cat(frames).view_as(x)


def judged(x: Tensor, split: str, words: list[str] | None = None, ways: list[str] | None = None) -> dict[str, Any]:
    """Of clips x (N, F, 3, 64, 64) of the first N prompts of a split:

    word       share whose motion `scenes-motion` reads as that which was asked; `words` and `ways` are asked where given
    direction  share whose motion and direction are
    tracked    share whose motion is that which `tracking.track` finds by the exact geometry of each motion
    shape      share of frames in which the shape that was asked is read; so `colour`; `identity`: both
    flicker    mean, see `measures.flicker`
    frechet    Frechet video distance to other true clips of the world
    """
    maps, reader = judges()
    of, n = clips(split), len(x)
    asked = (words or of.words)[:n], (ways or of.ways)[:n]
    moved, tracked = shares(motions().read(x), *asked), shares(track(x, maps, reader), *asked)
    kept = measures.identity(x, reader, of.wanted[:n])
    found = {**moved, "tracked": tracked["word"], "shape": kept["shape"], "colour": kept["colour"], "identity": kept["both"]}
    rounded = {name: round(float(torch.as_tensor(value).float().mean()), 4) for name, value in found.items()}
    flicker = float(measures.flicker(x).mean())
    return rounded | {
        "flicker": round(flicker, 5),
        "frechet": round(measures.frechet_video_distance(real(), x, reader), 4),
    }


def per_frame(model: PretrainedVideo, split: str, seed: int = 0, n: int | None = None, w: float = W) -> Tensor:
    """Clips of the scenes of a split, of its first n, by the image model alone, each frame from noise of its own."""
    with mixed(model.denoiser.net, 0.0):
        return clips_of(model, scenes_of(split)[:n], w, seed, STEPS, shared=0.0)


def judge(model: PretrainedVideo, seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Of `model`, true clips, these through the VAE, and clips of the image model frame by frame, on the test prompts."""
    true = true_clips("test")
    found: dict[str, Any] = {"guidance": W, "steps": STEPS, "clips": len(true)}
    found["true clips"] = judged(true, "test")
    found["true clips, reconstructed"] = judged(reconstructed(model.image, true), "test")
    found["frame by frame"] = judged(per_frame(model, "test"), "test")
    for seed in seeds:
        x = clips_of(model, clips("test").captions, W, seed, STEPS)
        found[f"seed {seed}"] = judged(x, "test")
    return found


def scenes_of(split: str) -> list[str]:
    """What the prompts of a split say of their scenes alone."""
    return [texts(caption)[0] for caption in clips(split).captions]
