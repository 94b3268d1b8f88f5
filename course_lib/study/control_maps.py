"""What a `ControlExplorer` is told: the condition map of a start, such as a scene or a photograph, with what was drawn on it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from scipy import ndimage
from torch import Tensor

from course_lib.study import style
from course_lib.study.canvas import Drawing
from course_lib.study.scenes import START, scene
from course_lib.worlds import hand
from course_lib.worlds.scenes.attributes import SHAPES
from course_lib.worlds.scenes.maps import (
    CLASSES,
    as_map,
    canny,
    classes,
    edge_map,
    nearness,
    segmentation_map,
)  # fmt: skip
from course_lib.worlds.scenes.render import render
from course_lib.worlds.scenes.scribbles import scribbles
from course_lib.zoo.map_judge import REACH, Maps, edge_f1, mean_iou, nearness_rmse

SIDE = hand.SIDE


class Kind(NamedTuple):
    """A kind of control: its name, what its map tells, its control error, and what the colours of `Asked.compared` say."""

    name: str
    layer: str
    error: str
    legend: dict[str, str]


KINDS = {
    "edge": Kind("edges", "lines", "1 − F1", {"model": "read", "warn": "missed", "muted": "extra"}),
    "depth": Kind("depth", "nearness", "RMSE", {"exact": "black: off by ≥ 1/4"}),
    "seg": Kind("segmentation", "classes", "1 − mIoU", {"warn": "other class read"}),
}
"""Named as the models `mini-control-*` are; for the errors see `map_judge.errors`."""

NOTHING = "nothing"
SCENES: dict[str, dict[str, Any]] = {
    "mug": {"shape": "mug"},
    "car": {"shape": "car"},
    "house": {"shape": "house", "azimuth": 60.0},
    "snowman": {"shape": "snowman", "azimuth": 30.0},
    "cone and cube": {"shape": "cone", "second": "left of", "azimuth": 0.0},
    "ball on a cube": {"shape": "sphere", "size": "small", "second": "on top of", "azimuth": 0.0},
}
"""Scenes of which every kind has the exact map, as changes of `scenes.START`."""
SHAKY = {f"{name}, shaky": name for name in SCENES}
SKETCHED = {f"sketch of a {one.things[0][1]}": one for one in hand.sketches(7) if len(one.things) == 1}
PHOTOS = {
    f"photo: {name}": hand.PHOTOS.index(file)
    for name, file in (
        ("cup", "coffee.png"), ("cat", "chelsea.png"), ("horse", "horse.png"), ("rocket", "rocket.jpg"), ("coins", "coins.png")
    )
}  # fmt: skip
"""Drawings of `hand.sketches`, and photographs in Canny's lines: for the control of edges alone."""


def starts(kind: str) -> list[str]:
    """What a drawing may start from."""
    return [NOTHING, *SCENES, *(() if kind != "edge" else (*SHAKY, *SKETCHED, *PHOTOS))]


class Asked(NamedTuple):
    """What a picture is to show: lines (1, 1, H, W) in [0, 1], nearness (1, 1, H, W) or classes (1, H, W) long, by its kind."""

    kind: str
    layer: Tensor

    @property
    def map(self) -> Tensor:
        """The condition map, (1, 3, H, W) in [0, 1]."""
        return segmentation_map(self.layer) if self.kind == "seg" else as_map(self.layer)

    @property
    def paper(self) -> Tensor:
        """What is drawn on, (1, 3, H, W) in [-1, 1]: lines in black on white, all else as it is."""
        return 1 - 2 * self.map if self.kind == "edge" else 2 * self.map - 1

    def error(self, found: Maps) -> float:
        """The control error of a picture in which these maps were read."""
        if self.kind == "edge":
            return 1 - float(edge_f1(found.lines, self.layer >= 0.5))
        if self.kind == "depth":
            return float(nearness_rmse(found.nearness, self.layer))
        return 1 - float(mean_iou(found.classes, self.layer))

    def shown(self, found: Maps) -> Tensor:
        """The same map as it was read in a picture, (1, 3, H, W) in [-1, 1], like `paper`."""
        layer = {"edge": found.lines, "depth": found.nearness, "seg": found.classes}[self.kind]
        return Asked(self.kind, layer).paper

    def compared(self, found: Maps) -> Tensor:
        """Where the two agree, (1, 3, H, W) in [-1, 1], in the colours of the kind's legend; a line may miss by REACH pixels."""
        if self.kind == "depth":
            return 1 - 8 * (found.nearness - self.layer).abs().clamp(max=0.25).expand(-1, 3, -1, -1)
        if self.kind == "seg":
            return _coloured({"warn": found.classes[0] != self.layer[0]})
        asked, read = (lines[0, 0] >= 0.5 for lines in (self.layer, found.lines.float()))
        return _coloured({"muted": read & ~_near(asked), "warn": asked & ~_near(read), "model": asked & _near(read)})


def _near(lines: Tensor) -> Tensor:
    """What is at most REACH pixels from a line, (H, W) bool."""
    return F.max_pool2d(lines[None].float(), 2 * REACH + 1, 1, REACH)[0] > 0


def _coloured(where: dict[str, Tensor]) -> Tensor:
    """White, with masks (H, W) in colours of the course, the last on top: (1, 3, H, W) in [-1, 1]."""
    image = torch.ones(3, *next(iter(where.values())).shape)
    for name, mask in where.items():
        image[:, mask] = 2 * torch.tensor(to_rgb(style.COLOURS[name]))[:, None] - 1
    return image[None]


def asked(kind: str, start: str, drawing: Drawing, thing: str = SHAPES[0]) -> Asked:
    """The map of a start with a drawing on it.

    A line is a line. For depth and classes closed lines are filled. A thing that is drawn in depth stands upright like a card
    where its lowest pixel meets the ground, and hides what is farther; in classes it is a `thing`. Raises ValueError for a
    kind, a start or a thing that is not offered.
    """
    for name, value, among in (("control", kind, list(KINDS)), ("start", start, starts(kind)), ("drawn", thing, list(SHAPES))):
        if value not in among:
            raise ValueError(f"{name} = {value!r}; expected one of {', '.join(among)}")
    layer, ground = _start(kind, start)
    ink = torch.from_numpy(drawing.ink(SIDE, SIDE))
    if kind == "edge":
        return Asked(kind, torch.maximum(layer, ink))
    filled = ndimage.binary_fill_holes(ink.numpy() >= 0.5)
    if kind == "depth":
        return Asked(kind, torch.maximum(layer, cards(torch.from_numpy(filled), ground)))
    return Asked(kind, torch.where(torch.from_numpy(filled), CLASSES.index(thing), layer))


def cards(drawn: Tensor, ground: Tensor) -> Tensor:
    """The nearness of upright cards (H, W) bool, each part as near as `ground` (H, W) at its lowest pixel: (H, W), 0 elsewhere.

    A part that ends above the horizon stands at it.
    """
    parts, count = ndimage.label(drawn.numpy(), structure=torch.ones(3, 3).numpy())
    near, horizon = torch.zeros_like(ground), ground[ground > 0].min()
    for k in range(1, count + 1):
        part = torch.from_numpy(parts == k)
        lowest = int(part.any(1).nonzero().max())
        near[part] = ground[lowest, part[lowest]].max().clamp(min=horizon)
    return near


@functools.cache
def _start(kind: str, start: str) -> tuple[Tensor, Tensor]:
    """The layer of a start, as in `Asked`, and the nearness of the bare ground of its scene, (H, W)."""
    of = scene(**{**START, **SCENES.get(SHAKY.get(start, start), {})})
    bare = replace(of, shape=torch.full_like(of.shape, -1))
    of = bare if start == NOTHING else of
    seen, ground = render(of, SIDE), nearness(render(bare, SIDE).depth)[0, 0]
    if kind == "depth":
        return nearness(seen.depth), ground
    if kind == "seg":
        return classes(seen, of), ground
    if start == NOTHING:
        return torch.zeros(1, 1, SIDE, SIDE), ground
    if start in SKETCHED:
        return hand.ink(SKETCHED[start])[None], ground
    if start in PHOTOS:
        return canny(hand.photos()[PHOTOS[start]][None]), ground
    lines = edge_map(seen)[:, :1]
    return (scribbles(lines, seed=0, first=list(SHAKY).index(start)) if start in SHAKY else lines), ground
