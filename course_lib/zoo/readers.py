"""The readers of the scene world: classifiers that say what a picture shows, and so judge what a model draws."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from course_lib.devices import autocast
from course_lib.worlds.scenes.attributes import ORIENTED, SHAPES
from course_lib.worlds.scenes.captions import Reading
from course_lib.worlds.scenes.labels import OF_OBJECT, OF_SCENE, Labels, obeyed

BATCH = 256


class SceneReader:
    """Reads pictures (N, 3, H, W) in [-1, 1] of the scene world; other sizes than 64 px are resized.

    `read(pictures)` gives Labels, `features(pictures)` what the Frechet distance compares, `obeys(pictures, prompts)`
    whether each shows what its parsed prompt names.
    """

    def __init__(self, net: nn.Module):
        self.net = net.eval()

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def _batches(self, pictures: Tensor) -> Iterator[Tensor]:
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures has shape {tuple(pictures.shape)}; expected (N, 3, H, W)")
        return (batch.to(self.device) for batch in pictures.split(BATCH))

    @torch.no_grad()
    def logits(self, pictures: Tensor) -> dict[str, Tensor]:
        """The logits of every head, fp32 on the CPU: (N, n) of the scene, (N, 2, n) of its objects."""
        pieces: list[dict[str, Tensor]] = []
        for batch in self._batches(pictures):
            with autocast(self.device):
                pieces.append(self.net(batch))
        return {name: torch.cat([piece[name] for piece in pieces]).float().cpu() for name in pieces[0]}

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Features of the pictures, (N, d) fp32 on the CPU."""
        return torch.cat([self.net.features(batch).float().cpu() for batch in self._batches(pictures)])

    def read(self, pictures: Tensor) -> Labels:
        """What the pictures show; an object 1 only where two are seen."""
        found = self.logits(pictures)
        value = {name: found[name].argmax(-1) for name in (*OF_SCENE, *OF_OBJECT)}
        two = value["count"] == 1
        there = torch.stack([torch.ones_like(two), two], 1)
        for name in OF_OBJECT:
            value[name] = torch.where(there, value[name], -1)
        value["relation"] = torch.where(two, value["relation"], -1)
        oriented = value["shape"] >= SHAPES.index(ORIENTED[0])
        cos, sin = found["azimuth"].unbind(-1)
        azimuth = torch.where(oriented, torch.rad2deg(torch.atan2(sin, cos)) % 360, 0.0)
        return Labels(**value, azimuth=azimuth, front=oriented & (found["front"][..., 0] > 0))

    def obeys(self, pictures: Tensor, prompts: list[Reading]) -> dict[str, Tensor]:
        """Whether each picture shows what its prompt names, see `labels.obeyed`."""
        return obeyed(self.read(pictures), prompts)


def correct(read: Labels, true: Labels) -> dict[str, Tensor]:
    """Per attribute whether it was read rightly: name -> bool (N,) of the scene, or (M,) of the objects that are there.

    `relation` is of the pictures with two objects, `joint` of all: every attribute of every object and of the scene.
    """
    two, there = true.count == 1, true.shape >= 0
    right = {name: getattr(read, name) == getattr(true, name) for name in (*OF_SCENE, *OF_OBJECT)}
    joint = torch.stack([right[name] for name in OF_SCENE]).all(0) & torch.stack([right[name] for name in OF_OBJECT]).all(0).all(
        1
    )
    found = {name: right[name] for name in ("count", "ground", "light")} | {"relation": right["relation"][two]}
    return found | {name: right[name][there] for name in OF_OBJECT} | {"joint": joint}


def azimuth_errors(read: Labels, true: Labels) -> Tensor:
    """Error of the azimuth in degrees, 0 to 180, of every object that has a front and is read as one that has: (M,)."""
    rows = true.oriented & read.oriented
    return ((read.azimuth - true.azimuth + 180) % 360 - 180).abs()[rows]
