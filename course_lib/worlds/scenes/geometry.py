"""Primitives with exact ray intersections and signed distances: what the eight shapes are made of.

A primitive is convex, so a ray meets it in one interval of t: points o + t d with a unit direction d. Coordinates
travel as a triple of tensors (x, y, z), which is twice as fast as a last axis of three. All numbers of a primitive are
Python floats, so that it runs on any device. A signed distance is negative inside; it is exact for `Sphere`, `Box` and
`Frustum`, and never more than the true distance, in absolute value, for `Convex`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Point = tuple[float, float, float]
Vectors = tuple[Tensor, Tensor, Tensor]
INF = math.inf


def dot(a: Iterable, b: Iterable) -> Tensor:
    """a . b of two triples of tensors or numbers."""
    (a0, a1, a2), (b0, b1, b2) = a, b
    return a0 * b0 + a1 * b1 + a2 * b2


def minus(a: Iterable, b: Iterable) -> Vectors:
    """a - b of two triples."""
    (a0, a1, a2), (b0, b1, b2) = a, b
    return a0 - b0, a1 - b1, a2 - b2


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1e-9, 1e-9, x)


def _or_empty(hit: Tensor, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(hit, near, INF), torch.where(hit, far, -INF)


@dataclass(frozen=True)
class Sphere:
    """|p - centre| <= radius."""

    centre: Point
    radius: float

    def interval(self, o: Vectors, d: Vectors) -> tuple[Tensor, Tensor]:
        x = minus(o, self.centre)
        b = dot(x, d)
        square = b * b - dot(x, x) + self.radius**2
        root = square.clamp(min=0).sqrt()
        return _or_empty(square > 0, -b - root, root - b)

    def distance(self, p: Vectors) -> Tensor:
        x = minus(p, self.centre)
        return dot(x, x).sqrt() - self.radius

    def normal(self, p: Vectors) -> Vectors:
        x = minus(p, self.centre)
        length = dot(x, x).sqrt().clamp(min=1e-9)
        return x[0] / length, x[1] / length, x[2] / length


@dataclass(frozen=True)
class Box:
    """|p_i - centre_i| <= half_i for i = x, y, z."""

    centre: Point
    half: Point

    def interval(self, o: Vectors, d: Vectors) -> tuple[Tensor, Tensor]:
        near = far = None
        for oi, di, ci, hi in zip(o, d, self.centre, self.half, strict=True):
            inverse = 1 / _nonzero(di)
            middle, reach = (ci - oi) * inverse, hi * inverse.abs()
            near = middle - reach if near is None else torch.maximum(near, middle - reach)
            far = middle + reach if far is None else torch.minimum(far, middle + reach)
        return _or_empty(near < far, near, far)

    def _beyond(self, p: Vectors) -> Vectors:
        x, y, z = ((pi - ci).abs() - hi for pi, ci, hi in zip(p, self.centre, self.half, strict=True))
        return x, y, z

    def distance(self, p: Vectors) -> Tensor:
        x, y, z = self._beyond(p)
        out = (x.clamp(min=0) ** 2 + y.clamp(min=0) ** 2 + z.clamp(min=0) ** 2).clamp(min=1e-18).sqrt()
        inner = torch.maximum(torch.maximum(x, y), z)
        return torch.where(inner > 0, out, inner)

    def normal(self, p: Vectors) -> Vectors:
        axis = torch.stack(self._beyond(p)).argmax(0)
        return tuple(torch.where(axis == i, torch.where(p[i] < self.centre[i], -1.0, 1.0), 0.0) for i in range(3))


@dataclass(frozen=True)
class Frustum:
    """A capped cone about the segment from `start` to `end`, of these radii there; equal radii give a cylinder."""

    start: Point
    end: Point
    radii: tuple[float, float]

    @functools.cached_property
    def _axis(self) -> tuple[Point, float, float]:
        along = [b - a for a, b in zip(self.start, self.end, strict=True)]
        height = math.hypot(*along)
        return tuple(a / height for a in along), height, (self.radii[1] - self.radii[0]) / height

    def interval(self, o: Vectors, d: Vectors) -> tuple[Tensor, Tensor]:
        w, height, slope = self._axis
        x = minus(o, self.start)
        h, rise = dot(x, w), dot(d, w)
        radius = self.radii[0] + slope * h
        # |x + t d|^2 - (h + t rise)^2 = (radius + t slope rise)^2, written a t^2 + 2 b t + c = 0
        a = _nonzero(1 - (1 + slope**2) * rise * rise)
        b = dot(x, d) - (h + slope * radius) * rise
        c = dot(x, x) - h * h - radius * radius
        square = b * b - a * c
        q = _nonzero(-b - torch.where(b < 0, -1.0, 1.0) * square.clamp(min=0).sqrt())  # no cancellation in either root
        roots = q / a, c / q
        low, high = torch.minimum(*roots), torch.maximum(*roots)
        rise = _nonzero(rise)
        ends = -h / rise, (height - h) / rise
        enter, leave = torch.minimum(*ends), torch.maximum(*ends)
        near, far = torch.maximum(low, enter), torch.minimum(high, leave)
        hit = (square > 0) & (near < far)
        if slope:  # a ray steeper than the cone lies inside it before `low` or after `high`; the caps keep one of the two
            steep, first = a < 0, low > enter
            near = torch.where(steep, torch.where(first, enter, torch.maximum(high, enter)), near)
            far = torch.where(steep, torch.where(first, torch.minimum(low, leave), leave), far)
            hit = torch.where(steep, near < far, hit)
        return _or_empty(hit, near, far)

    def _profile(self, p: Vectors) -> tuple[Vectors, Tensor, Tensor]:
        w, _, _ = self._axis
        x = minus(p, self.start)
        h = dot(x, w)
        away = x[0] - h * w[0], x[1] - h * w[1], x[2] - h * w[2]
        return away, dot(away, away).clamp(min=1e-18).sqrt(), h

    def distance(self, p: Vectors) -> Tensor:
        _, height, slope = self._axis
        _, r, h = self._profile(p)
        ra, rb = self.radii
        if ra == rb:  # a cylinder: a rectangle in the half-plane (r, h)
            out, up = r - ra, (h - height / 2).abs() - height / 2
            corner = (out.clamp(min=0) ** 2 + up.clamp(min=0) ** 2).clamp(min=1e-18).sqrt()
            return torch.where((out > 0) & (up > 0), corner, torch.maximum(out, up))
        # The distances to the two caps and to the slanted side, each a segment in the half-plane (r, h).
        bottom = (r - ra).clamp(min=0) ** 2 + h * h
        top = (r - rb).clamp(min=0) ** 2 + (h - height) ** 2
        s = (((r - ra) * (rb - ra) + h * height) / (height**2 + (rb - ra) ** 2)).clamp(0, 1)
        side = (r - ra - s * (rb - ra)) ** 2 + (h - s * height) ** 2
        inside = (h > 0) & (h < height) & (r < ra + slope * h)
        d = torch.minimum(torch.minimum(bottom, top), side).clamp(min=1e-18).sqrt()
        return torch.where(inside, -d, d)

    def normal(self, p: Vectors) -> Vectors:
        w, height, slope = self._axis
        away, r, h = self._profile(p)
        cosine = 1 / math.hypot(1, slope)
        face = torch.stack(((r - self.radii[0] - slope * h) * cosine, -h, h - height)).argmax(0)
        cap = torch.where(face == 2, 1.0, -1.0)
        return tuple(torch.where(face == 0, (a / r - slope * wi) * cosine, cap * wi) for a, wi in zip(away, w, strict=True))


@dataclass(frozen=True)
class Convex:
    """n . p <= b for each plane (n_x, n_y, n_z, b) with a unit normal n."""

    planes: tuple[tuple[float, float, float, float], ...]

    def interval(self, o: Vectors, d: Vectors) -> tuple[Tensor, Tensor]:
        near = far = None
        for *n, b in self.planes:
            towards = _nonzero(self._along(n, d))
            t = (b - self._along(n, o)) / towards
            enter, leave = torch.where(towards < 0, t, -INF), torch.where(towards > 0, t, INF)
            near = enter if near is None else torch.maximum(near, enter)
            far = leave if far is None else torch.minimum(far, leave)
        return _or_empty(near < far, near, far)

    @staticmethod
    def _along(n: Iterable[float], x: Vectors) -> Tensor:
        terms = [ni * xi for ni, xi in zip(n, x, strict=True) if ni]  # most planes are parallel to an axis
        return sum(terms[1:], terms[0])

    def _beyond(self, p: Vectors) -> Tensor:
        return torch.stack([self._along(n, p) - b for *n, b in self.planes])

    def distance(self, p: Vectors) -> Tensor:
        return functools.reduce(torch.maximum, (self._along(n, p) - b for *n, b in self.planes))

    def normal(self, p: Vectors) -> Vectors:
        face = self._beyond(p).argmax(0)
        table = torch.tensor([plane[:3] for plane in self.planes], device=face.device)
        return table[face].unbind(-1)


Primitive = Sphere | Box | Frustum | Convex


def plane(n: Point, through: Point) -> tuple[float, float, float, float]:
    """The plane with normal along n through a point, as `Convex` takes it."""
    length = math.hypot(*n)
    n = tuple(ni / length for ni in n)
    return *n, sum(ni * pi for ni, pi in zip(n, through, strict=True))


def prism(profile: list[tuple[float, float]], axis: str, half: float | tuple[float, float]) -> Convex:
    """A convex polygon, counter-clockwise, swept along `axis` over [-half, half] or over an interval.

    `axis` = "x" takes the polygon in (y, z), "y" in (x, z). Raises ValueError for another axis.
    """
    if axis not in ("x", "y"):
        raise ValueError(f"axis = {axis!r}; expected 'x' or 'y'")
    low, high = (-half, half) if isinstance(half, float) else half
    lift = (lambda u, v: (0.0, u, v)) if axis == "x" else (lambda u, v: (u, 0.0, v))
    along = (1.0, 0.0, 0.0) if axis == "x" else (0.0, 1.0, 0.0)
    sides = [
        plane(lift(v1 - v0, u0 - u1), lift(u0, v0)) for (u0, v0), (u1, v1) in zip(profile, profile[1:] + profile[:1], strict=True)
    ]
    back = tuple(-a for a in along)
    return Convex((*sides, (*along, high), (*back, -low)))


def tapered(bottom: tuple[float, ...], top: tuple[float, ...]) -> Convex:
    """A block between two rectangles (x0, x1, half width in y, z), the upper one smaller: the cabin of a car."""
    (x0, x1, y, z0), (u0, u1, v, z1) = bottom, top
    rise = z1 - z0
    return Convex(
        (
            plane((rise, 0.0, x1 - u1), (x1, 0.0, z0)),
            plane((-rise, 0.0, u0 - x0), (x0, 0.0, z0)),
            plane((0.0, rise, y - v), (0.0, y, z0)),
            plane((0.0, -rise, y - v), (0.0, -y, z0)),
            (0.0, 0.0, 1.0, z1),
            (0.0, 0.0, -1.0, -z0),
        )
    )


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
    buttons = tuple((Sphere((x, 0.0, z), 0.065), DARK) for x, z in ((0.30, -0.16), (0.33, 0.04)))
    eyes = tuple((Sphere((0.23, side * 0.13, 0.51), 0.065), DARK) for side in (-1, 1))
    arms = tuple(Part(Frustum((0.02, s * 0.27, 0.04), (0.06, s * 0.66, 0.28), (0.035, 0.03)), WOOD) for s in (-1.0, 1.0))
    ribbon = ((Box((0.0, 0.0, 0.70), (1.0, 1.0, 0.035)), BRAKE),)
    return (
        Part(Sphere((0.0, 0.0, -0.50), 0.45)),
        Part(Sphere((0.0, 0.0, -0.02), 0.34), paint=buttons),
        Part(Sphere((0.0, 0.0, 0.42), 0.29), paint=eyes),
        Part(Frustum((0.22, 0.0, 0.40), (0.60, 0.0, 0.36), (0.075, 0.0)), CARROT),
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
