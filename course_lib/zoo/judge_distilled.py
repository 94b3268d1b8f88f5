"""The judge of distilled pictures: the prompts, what obeys them, and how near, how alike and how coloured pictures are."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from course_lib import metrics, zoo
from course_lib.devices import autocast
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.labels import OF_OBJECT, labels, obeyed
from course_lib.worlds.scenes.render import render
from course_lib.worlds.scenes.sampling import draw
from course_lib.zoo.judge_scenes import WORDING
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.readers import SceneReader
from course_lib.zoo.stored import Row

PROMPTS = {"validation": (16, 9_301), "test": (8, 9_302)}
"""Split -> number and seed of its prompts, of one object each; no training scene has these seeds."""
AXES = 8
"""Principal axes of the reader's features in which sets are compared."""


@functools.cache
def model() -> Pretrained:
    """`mini-sd`, on the CPU as everything that is compared here."""
    return zoo.load("mini-sd", device="cpu")


@functools.cache
def reader() -> SceneReader:
    """What judges the pictures."""
    return zoo.load("scenes-reader", device="cpu")


def prompts(split: str) -> list[str]:
    """The prompts of a split."""
    return SceneDataset(*PROMPTS[split]).captions(WORDING)


@functools.cache
def renders(split: str, each: int = 16) -> Tensor:
    """Renders (N, 3, 64, 64) that obey the prompts of a split, `each` of every prompt, one prompt after the other."""
    scenes, kept = draw(240_000, 9_303, 1), []
    found = labels(scenes)
    for prompt in map(parse, prompts(split)):
        (thing,) = prompt.objects
        like = [
            getattr(found, name)[:, 0] == OF_OBJECT[name].index(thing[name])
            for name in ("shape", "colour", "size")
            if name in thing
        ]
        near = torch.stack(like).all(0).nonzero()[:, 0]  # asking all of them what they show takes a minute
        right = obeyed(labels(scenes[near]), [prompt] * len(near))["all"] == 1
        kept.append(near[right][:each])
    return torch.cat([render(scenes[some], 64).rgb for some in kept])


@functools.cache
def real(split: str) -> Tensor:
    """Features (N, d) of `renders`."""
    return reader().features(renders(split))


def judged(z: Tensor, asked_for: Sequence[str], split: str) -> Row:
    """What the pictures of these latents are worth, see `judged_pictures`; and the share of values beyond [-1, 1]."""
    with torch.no_grad(), autocast("cpu"):
        pictures = model().decode(z, clamp=False).float()
    beyond = (pictures.abs() > 1).double().mean()
    return {**judged_pictures(pictures.clamp(-1, 1), asked_for, split), "clipped": round(float(beyond), 4)}


def judged_pictures(pictures: Tensor, asked_for: Sequence[str], split: str) -> Row:
    """Pictures (N, 3, H, W), one for each prompt, a prompt's pictures in a stride of the number of prompts.

    obeyed      the share that shows everything that its prompt names
    saturation  mean of HSV's saturation
    frechet     distance to renders that obey the prompts, in the leading axes of their features
    diversity   mean distance in all features of pictures of one prompt, 1 for those renders; 0 for one picture a prompt
    """
    features, reference = reader().features(pictures), real(split)
    in_stride = reference.reshape(PROMPTS[split][0], -1, reference.shape[1]).transpose(0, 1).flatten(0, 1)
    axes = metrics.pca_features(reference, AXES)
    kinds = len(set(asked_for))
    rgb = (pictures + 1) / 2
    high, low = rgb.amax(1), rgb.amin(1)
    return {
        "obeyed": round(float(reader().obeys(pictures, [parse(one) for one in asked_for])["all"].mean()), 4),
        "saturation": round(float(((high - low) / high.clamp_min(1e-6)).mean()), 4),
        "frechet": round(metrics.frechet_distance(axes(features), axes(reference)), 4),
        "diversity": round(spread(features, kinds) / spread(in_stride, kinds), 4),
    }


def spread(features: Tensor, kinds: int) -> float:
    """Mean distance between the rows of one kind, row i of the kind i modulo `kinds`; 0 for one row of each."""
    of_kind = features.double().reshape(-1, kinds, features.shape[1]).transpose(0, 1)
    n = of_kind.shape[1]
    return float(torch.cdist(of_kind, of_kind).sum((1, 2)).mean() / (n * (n - 1))) if n > 1 else 0.0
