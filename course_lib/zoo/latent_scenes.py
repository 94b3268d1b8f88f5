"""Scenes as `mini-sd` sees them: latents, and the attributes of their one object and its surroundings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from course_lib import zoo
from course_lib.devices import autocast, generator
from course_lib.worlds.scenes.dataset import CHUNK, SceneDataset
from course_lib.worlds.scenes.labels import OF_OBJECT, OF_SCENE, Labels, labels

SHAPE = (4, 8, 8)
ATTRIBUTES = {name: values for name, values in {**OF_OBJECT, **OF_SCENE}.items() if name not in ("count", "relation")}
"""The attributes that a scene of one object has, and the names of their values."""
SIZES = [len(values) for values in ATTRIBUTES.values()]


@torch.no_grad()
def encode(of: SceneDataset, seen: Callable[[Tensor], Tensor] = lambda pictures: pictures) -> Tensor:
    """Scaled latents (N, 4, 8, 8) of `mini-sd`, one draw of each posterior, of the pictures or of `seen(pictures)`."""
    model, pieces = zoo.load("mini-sd", device="cpu"), []
    for k, rows in enumerate(torch.arange(len(of)).split(CHUNK)):
        noise = torch.randn(len(rows), *SHAPE, generator=generator(of.seed, k))
        with autocast("cpu"):
            pieces.append(model.encode(seen(of.pictures(rows)), noise).float())
    return torch.cat(pieces)


def values(of: Labels) -> Tensor:
    """The value of each of ATTRIBUTES, of object 0, (N, len(ATTRIBUTES)) long."""
    return torch.stack([getattr(of, name)[:, 0] if name in OF_OBJECT else getattr(of, name) for name in ATTRIBUTES], 1)


def attributes(of: SceneDataset) -> Tensor:
    """`values` of the scenes themselves."""
    return values(labels(of.scenes))
