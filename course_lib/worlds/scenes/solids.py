"""The eight shapes: parts made of primitives, their materials, and their signed distances.

A shape stands in its own frame, front along +x and z up, and fits the unit ball.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.worlds.scenes.geometry import INF, Box, Convex, Frustum, Point, Primitive, Sphere, Vectors, prism, tapered

MAIN = 0  # the colour of the object; the others are fixed accents
ACCENTS: dict[str, Point] = {
    "dark": (0.10, 0.10, 0.12),
    "white": (0.97, 0.97, 0.95),
    "glass": (0.72, 0.90, 0.98),
    "lamp": (1.00, 0.96, 0.70),
    "brake": (0.70, 0.05, 0.05),
    "carrot": (1.00, 0.42, 0.05),
    "wood": (0.36, 0.22, 0.14),
    "tiles": (0.42, 0.20, 0.16),
    "steel": (0.70, 0.72, 0.75),
}
DARK, WHITE, GLASS, LAMP, BRAKE, CARROT, WOOD, TILES, STEEL = range(1, len(ACCENTS) + 1)


@dataclass(frozen=True)
class Part:
    """A primitive of one material, with a hollow cut out of it, and with regions in which it is painted otherwise.

    The first region of `paint` that holds a point of the surface decides its material.
    """

    solid: Primitive
    material: int = MAIN
    hollow: Primitive | None = None
    paint: tuple[tuple[Primitive, int], ...] = ()

    def hit(self, o: Vectors, d: Vectors, behind: Tensor) -> Tensor:
        """The first t >= behind at which the ray enters the part, infinity where it does not."""
        near, far = self.solid.interval(o, d)
        if self.hollow is not None:
            enter, leave = self.hollow.interval(o, d)
            near = torch.where((enter <= near) & (near < leave), torch.where(leave < far, leave, INF), near)
        return torch.where(near >= behind, near, INF)

    def distance(self, p: Vectors) -> Tensor:
        d = self.solid.distance(p)
        return d if self.hollow is None else torch.maximum(d, -self.hollow.distance(p))

    def normal(self, p: Vectors) -> Vectors:
        outer = self.solid.normal(p)
        if self.hollow is None:
            return outer
        inner = self.hollow.normal(p)
        wall = -self.hollow.distance(p) > self.solid.distance(p)
        return tuple(torch.where(wall, -i, o) for i, o in zip(inner, outer, strict=True))

    def look(self, p: Vectors) -> Tensor:
        """The material at points of the surface: MAIN or 1 + the index of an accent."""
        material = torch.full_like(p[0], self.material, dtype=torch.long)
        for region, paint in reversed(self.paint):
            material = torch.where(region.distance(p) < 0, paint, material)
        return material


def _disc(x: float, y: float, z: float, radius: float) -> Frustum:
    """A region about an axis along x: the painted disc that a front shows."""
    return Frustum((x, y, z), (x + 1.0, y, z), (radius, radius))


def _car() -> tuple[Part, ...]:
    body = prism(
        [(-0.80, -0.25), (0.84, -0.25), (0.88, -0.02), (0.82, 0.06), (0.30, 0.13), (-0.83, 0.13), (-0.87, -0.02)], "y", 0.40
    )
    lights = tuple((_disc(0.5, side * 0.27, -0.02, 0.105), LAMP) for side in (-1, 1))
    brakes = tuple((Box((-0.9, side * 0.30, 0.01), (0.1, 0.08, 0.06)), BRAKE) for side in (-1, 1))
    grille = ((Box((0.9, 0.0, -0.10), (0.1, 0.13, 0.055)), DARK), (Box((0.0, 0.0, -0.25), (1.0, 0.5, 0.05)), DARK))
    cabin = tapered((-0.66, 0.36, 0.37, 0.10), (-0.46, 0.06, 0.29, 0.43))
    screen = (prism([(0.09, 0.15), (0.60, 0.15), (0.60, 0.385), (0.0, 0.385)], "y", 0.285), GLASS)
    windows = tuple((Box((x, 0.0, 0.26), (half, 0.5, 0.095)), DARK) for x, half in ((-0.36, 0.14), (-0.05, 0.11)))
    rear = (Box((-0.6, 0.0, 0.29), (0.14, 0.2, 0.065)), DARK)
    wheels = tuple(
        Part(
            Frustum((x, side * 0.24, -0.25), (x, side * 0.43, -0.25), (0.20, 0.20)),
            DARK,
            paint=((Sphere((x, side * 0.43, -0.25), 0.10), STEEL),),
        )
        for x in (-0.50, 0.52)
        for side in (-1.0, 1.0)
    )
    return Part(body, paint=lights + brakes + grille), Part(cabin, paint=(screen, rear, *windows)), *wheels


def _mug() -> tuple[Part, ...]:
    cup = Frustum((0.0, 0.0, -0.68), (0.0, 0.0, 0.68), (0.56, 0.56))
    heart = (
        (_disc(0.0, -0.092, 0.06, 0.13), DARK),
        (_disc(0.0, 0.092, 0.06, 0.13), DARK),
        (prism([(0.0, -0.27), (0.212, 0.005), (0.0, 0.15), (-0.212, 0.005)], "x", (0.0, 1.0)), DARK),
        (_disc(0.0, 0.0, -0.02, 0.38), WHITE),
    )
    bend = [(0.0, 0.50 + 0.34 * math.cos(math.radians(a)), 0.02 + 0.36 * math.sin(math.radians(a))) for a in range(-90, 91, 30)]
    pipe = tuple(Part(Frustum(a, b, (0.085, 0.085))) for a, b in itertools.pairwise(bend))
    joints = tuple(Part(Sphere(a, 0.085)) for a in bend[1:-1])
    coffee = Part(Frustum((0.0, 0.0, -0.6), (0.0, 0.0, 0.42), (0.475, 0.475)), WOOD)
    return Part(cup, hollow=Frustum((0.0, 0.0, -0.6), (0.0, 0.0, 1.0), (0.47, 0.47)), paint=heart), coffee, *pipe, *joints


def _snowman() -> tuple[Part, ...]:
    buttons = tuple((Sphere((x, 0.0, z), 0.09), DARK) for x, z in ((0.29, -0.17), (0.33, 0.06)))
    eyes = tuple((Sphere((0.22, side * 0.14, 0.52), 0.085), DARK) for side in (-1, 1))
    belly = ((Sphere((0.45, 0.0, -0.46), 0.34), WHITE),)
    arms = tuple(Part(Frustum((0.02, s * 0.27, 0.04), (0.06, s * 0.66, 0.28), (0.035, 0.03)), WOOD) for s in (-1.0, 1.0))
    ribbon = ((Box((0.0, 0.0, 0.70), (1.0, 1.0, 0.035)), BRAKE),)
    return (
        Part(Sphere((0.0, 0.0, -0.50), 0.45), paint=belly),
        Part(Sphere((0.0, 0.0, -0.02), 0.34), paint=buttons),
        Part(Sphere((0.0, 0.0, 0.42), 0.29), paint=eyes),
        Part(Frustum((0.20, 0.0, 0.40), (0.70, 0.0, 0.36), (0.10, 0.0)), CARROT),
        Part(Frustum((0.0, 0.0, 0.17), (0.0, 0.0, 0.24), (0.265, 0.25)), WHITE),
        Part(Frustum((0.0, 0.0, 0.62), (0.0, 0.0, 0.665), (0.32, 0.32)), DARK),
        Part(Frustum((0.0, 0.0, 0.665), (0.0, 0.0, 0.95), (0.20, 0.19)), DARK, paint=ribbon),
        *arms,
    )


def _house() -> tuple[Part, ...]:
    gable = [(-0.50, -0.60), (0.50, -0.60), (0.50, 0.14), (0.0, 0.56), (-0.50, 0.14)]
    door = (Box((0.5, 0.0, -0.34), (0.2, 0.14, 0.26)), WOOD)
    attic = (_disc(0.3, 0.0, 0.23, 0.12), GLASS)
    fronts = tuple((Box((0.5, side * 0.325, -0.18), (0.2, 0.10, 0.13)), GLASS) for side in (-1, 1))
    sides = tuple((Box((x, 0.0, -0.22), (0.12, 1.0, 0.13)), GLASS) for x in (-0.26, 0.26))
    slope = math.hypot(0.42, 0.50)
    roof = []
    for side in (-1.0, 1.0):
        n = (0.0, side * 0.42 / slope, 0.50 / slope)  # the slope of the gable, from eave to ridge
        b = 0.56 * n[2]
        planes = ((*n, b + 0.075), (0.0, -n[1], -n[2], -b + 0.005), (0.0, -side, 0.0, 0.0), (0.0, side, 0.0, 0.60))
        roof.append(Part(Convex((*planes, (1.0, 0.0, 0.0, 0.62), (-1.0, 0.0, 0.0, 0.62))), TILES))
    chimney = Part(Box((-0.28, 0.26, 0.50), (0.09, 0.09, 0.24)), TILES, paint=((Box((0.0, 0.0, 0.72), (1.0, 1.0, 0.06)), WHITE),))
    return Part(prism(gable, "x", 0.55), paint=(door, attic, *fronts, *sides)), *roof, chimney


SOLIDS: dict[str, tuple[Part, ...]] = {
    "sphere": (Part(Sphere((0.0, 0.0, 0.0), 0.85)),),
    "cube": (Part(Box((0.0, 0.0, 0.0), (3**-0.5,) * 3)),),
    "cylinder": (Part(Frustum((0.0, 0.0, -0.7), (0.0, 0.0, 0.7), (0.58, 0.58))),),
    "cone": (Part(Frustum((0.0, 0.0, -0.6), (0.0, 0.0, 0.97), (0.76, 0.0))),),
    "car": _car(),
    "mug": _mug(),
    "snowman": _snowman(),
    "house": _house(),
}
"""The parts of each shape in its own frame: the front points along +x, and the whole fits the unit ball."""

FOOT: dict[str, float] = {
    "sphere": 0.85, "cube": 3**-0.5, "cylinder": 0.7, "cone": 0.6, "car": 0.45, "mug": 0.68, "snowman": 0.95, "house": 0.60,
}  # fmt: skip
"""Height of the centre of a shape above its foot: it stands on z = -FOOT in its own frame."""


def distance(shape: str, p: Vectors) -> Tensor:
    """The smallest signed distance to a part of `shape`, for a triple of coordinates in its own frame."""
    parts = SOLIDS[shape]
    return functools.reduce(torch.minimum, (part.distance(p) for part in parts))


def sdf(shape: str, points: Tensor) -> Tensor:
    """Signed distance (...) of `points` (..., 3), in the frame of `shape` at scale 1, to its surface: negative inside.

    Zero on the surface and never more than the true distance in absolute value; at scale s it is s sdf(p / s). Raises
    ValueError for an unknown shape.
    """
    if shape not in SOLIDS:
        raise ValueError(f"shape = {shape!r}; expected one of {', '.join(SOLIDS)}")
    return distance(shape, points.unbind(-1))
