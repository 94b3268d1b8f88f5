"""Primitives with exact ray intersections and signed distances, of which the shapes in `solids.py` are made.

A primitive is convex, so a ray meets it in one interval of t: points o + t d with a unit direction d. Coordinates
travel as a triple of tensors (x, y, z), which is twice as fast as a last axis of three. All numbers of a primitive are
Python floats, so that it runs on any device. A signed distance is negative inside; it is exact for `Sphere`, `Box` and
`Frustum`, and never more than the true distance, in absolute value, for `Convex`.
"""

from __future__ import annotations

import functools
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


def along(x: Vectors, n: Point) -> Tensor:
    """n . x for a fixed direction n; most are parallel to an axis or two, which costs less."""
    terms = [ni * xi for ni, xi in zip(n, x, strict=True) if ni]
    return sum(terms[1:], terms[0])


def minus(x: Vectors, p: Point) -> Vectors:
    """x - p for a fixed point p; most have a coordinate that is zero."""
    x0, x1, x2 = (xi - pi if pi else xi for xi, pi in zip(x, p, strict=True))
    return x0, x1, x2


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
        out = (x.clamp(min=0).square() + y.clamp(min=0).square() + z.clamp(min=0).square()).clamp(min=1e-18).sqrt()
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
        h, rise = along(x, w), along(d, w)
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
        h = along(x, w)
        away = tuple(xi - h * wi if wi else xi for xi, wi in zip(x, w, strict=True))
        return away, dot(away, away).clamp(min=1e-18).sqrt(), h

    def distance(self, p: Vectors) -> Tensor:
        _, height, slope = self._axis
        _, r, h = self._profile(p)
        ra, rb = self.radii
        if ra == rb:  # a cylinder: a rectangle in the half-plane (r, h)
            out, up = r - ra, (h - height / 2).abs() - height / 2
            corner = (out.clamp(min=0).square() + up.clamp(min=0).square()).clamp(min=1e-18).sqrt()
            return torch.where((out > 0) & (up > 0), corner, torch.maximum(out, up))
        # The distances to the two caps and to the slanted side, each a segment in the half-plane (r, h).
        bottom = (r - ra).clamp(min=0).square() + h * h
        top = (r - rb).clamp(min=0).square() + (h - height).square()
        s = (((r - ra) * (rb - ra) + h * height) / (height**2 + (rb - ra) ** 2)).clamp(0, 1)
        side = (r - ra - s * (rb - ra)).square() + (h - s * height).square()
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
            towards = _nonzero(along(d, n))
            t = (b - along(o, n)) / towards
            enter, leave = torch.where(towards < 0, t, -INF), torch.where(towards > 0, t, INF)
            near = enter if near is None else torch.maximum(near, enter)
            far = leave if far is None else torch.minimum(far, leave)
        return _or_empty(near < far, near, far)

    def _beyond(self, p: Vectors) -> Tensor:
        return torch.stack([along(p, n) - b for *n, b in self.planes])

    def distance(self, p: Vectors) -> Tensor:
        return functools.reduce(torch.maximum, (along(p, n) - b for *n, b in self.planes))

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
