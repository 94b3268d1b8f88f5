"""Point clouds of the surfaces of scenes, uniform by area, and the signed distance of a whole scene."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from course_lib.worlds.scenes.attributes import COLOURS, SHAPES, Scenes
from course_lib.worlds.scenes.geometry import Box, Convex, Frustum, Point, Primitive, Sphere, Vectors
from course_lib.worlds.scenes.sampling import uniforms
from course_lib.worlds.scenes.solids import ACCENTS, SOLIDS, distance
from course_lib.worlds.scenes.tracing import Stage, pick, stage_of, turn

FIRST_STREAM = 1_000_000
"""Points draw from all streams from here on."""
NUMBERS = 3  # uniform numbers for each candidate
PROBE = 2e-4  # how far outside of the surface a candidate looks for other parts, at scale 1


@dataclass(frozen=True)
class _Triangle:
    """The points a + u (b - a) + v (c - a) with u + v <= 1; its normal points to where a, b, c run counter-clockwise."""

    a: Point
    b: Point
    c: Point

    @functools.cached_property
    def _cross(self) -> np.ndarray:
        return np.cross(np.subtract(self.b, self.a), np.subtract(self.c, self.a))

    @property
    def area(self) -> float:
        return float(np.linalg.norm(self._cross)) / 2

    def sample(self, u: Tensor, v: Tensor) -> tuple[Vectors, Vectors]:
        over = u + v > 1  # the other half of the parallelogram, turned onto this one
        u, v = torch.where(over, 1 - u, u), torch.where(over, 1 - v, v)
        p = tuple(a + u * (b - a) + v * (c - a) for a, b, c in zip(self.a, self.b, self.c, strict=True))
        return p, tuple(torch.full_like(u, ni) for ni in (self._cross / (2 * self.area)).tolist())


@dataclass(frozen=True)
class _Band:
    """What the segment from (radius, height) = (r0, h0) to (r1, h1) sweeps about an axis: a disc, a side of a cone.

    Looking along the axis, the normal is that on the right of a segment that rises: away from the axis.
    """

    origin: Point
    axis: Point
    r0: float
    r1: float
    h0: float
    h1: float

    @property
    def area(self) -> float:
        return math.pi * (self.r0 + self.r1) * math.hypot(self.r1 - self.r0, self.h1 - self.h0)

    def sample(self, u: Tensor, v: Tensor) -> tuple[Vectors, Vectors]:
        dr, dh = self.r1 - self.r0, self.h1 - self.h0
        # The area up to a share s of the segment is in proportion to r(s)^2 - r0^2, or to s on a cylinder.
        s = ((self.r0**2 + u * (self.r1**2 - self.r0**2)).sqrt() - self.r0) / dr if dr else u
        r, h, cos, sin = self.r0 + s * dr, self.h0 + s * dh, torch.cos(2 * math.pi * v), torch.sin(2 * math.pi * v)
        length, e, f = math.hypot(dr, dh), *_across(self.axis)
        away = [cos * ei + sin * fi for ei, fi in zip(e, f, strict=True)]
        p = tuple(o + h * w + r * a for o, w, a in zip(self.origin, self.axis, away, strict=True))
        return p, tuple((dh * a - dr * w) / length for w, a in zip(self.axis, away, strict=True))


@dataclass(frozen=True)
class _Ball:
    """The surface of a sphere."""

    centre: Point
    radius: float

    @property
    def area(self) -> float:
        return 4 * math.pi * self.radius**2

    def sample(self, u: Tensor, v: Tensor) -> tuple[Vectors, Vectors]:
        z = 2 * u - 1  # Archimedes: slices of equal height have equal area
        r = (1 - z * z).sqrt()
        n = r * torch.cos(2 * math.pi * v), r * torch.sin(2 * math.pi * v), z
        return tuple(c + self.radius * ni for c, ni in zip(self.centre, n, strict=True)), n


_Patch = _Triangle | _Band | _Ball


def _across(w: Point) -> tuple[Point, Point]:
    """Two unit vectors at right angles to a unit vector w and to each other."""
    least = np.eye(3)[np.abs(w).argmin()]
    e = np.cross(w, least) / np.linalg.norm(np.cross(w, least))
    return tuple(e.tolist()), tuple(np.cross(w, e).tolist())


def _faces(planes: list[tuple[float, ...]]) -> list[_Triangle]:
    """The faces n . p <= b of a convex solid, each as a fan of triangles about its first corner."""
    normals, b = np.array([plane[:3] for plane in planes]), np.array([plane[3] for plane in planes])
    corners = []
    for rows in itertools.combinations(range(len(planes)), 3):
        if abs(np.linalg.det(normals[list(rows)])) > 1e-6:
            p = np.linalg.solve(normals[list(rows)], b[list(rows)])
            if (normals @ p <= b + 1e-7).all() and all(np.abs(p - q).max() > 1e-7 for q in corners):
                corners.append(p)
    fans = []
    for n, bound in zip(normals, b, strict=True):
        ring = [p for p in corners if abs(n @ p - bound) < 1e-7]
        e, f = _across(tuple(n))
        middle = np.mean(ring, 0)
        ring.sort(key=lambda p, e=e, f=f, middle=middle: math.atan2((p - middle) @ f, (p - middle) @ e))
        fans += [_Triangle(*(tuple(p.tolist()) for p in (ring[0], *pair))) for pair in itertools.pairwise(ring[1:])]
    return fans


@functools.cache
def _patches(solid: Primitive) -> list[_Patch]:
    """The whole surface of a primitive, with normals that point outward."""
    if isinstance(solid, Sphere):
        return [_Ball(solid.centre, solid.radius)]
    if isinstance(solid, Frustum):
        axis, height, _ = solid._axis
        (r0, r1), start = solid.radii, solid.start
        bands = (r0, r1, 0.0, height), (0.0, r0, 0.0, 0.0), (r1, 0.0, height, height)
        return [_Band(start, axis, *band) for band in bands if band[0] or band[1]]
    if isinstance(solid, Box):
        signs = [(i, side) for i in range(3) for side in (-1.0, 1.0)]
        solid = Convex(tuple((*(side * (i == j) for j in range(3)), side * solid.centre[i] + solid.half[i]) for i, side in signs))
    return _faces(list(solid.planes))


@functools.cache
def _surfaces(shape: str) -> list[tuple[_Patch, int, float]]:
    """The surfaces of all parts of a shape and of what is cut out of them: patch, part, and which way is outward."""
    found = []
    for i, part in enumerate(SOLIDS[shape]):
        found += [(patch, i, 1.0) for patch in _patches(part.solid)]
        if part.hollow is not None:
            found += [(patch, i, -1.0) for patch in _patches(part.hollow)]
    return found


@dataclass
class Cloud:
    """Points of N scenes, n each: points and unit normals in the world and colours in [0, 1], (N, n, 3); objects (N, n) long."""

    points: Tensor
    normals: Tensor
    colours: Tensor
    objects: Tensor


def point_cloud(scenes: Scenes, n: int, seed: int, first: int = 0) -> Cloud:
    """Draw n points of each scene, uniform by area over the outer surfaces of its objects, seen or hidden.

    Points are drawn on the surfaces of all parts, and those that lie inside another part or on no surface of the whole are
    rejected: what is left is uniform on the surface of the union. Point j of scene i depends on (seed, first + i, j) and
    the scene, not on n. Raises ValueError for n < 1 and for a scene without an object.
    """
    if n < 1:
        raise ValueError(f"n = {n}; expected at least one point")
    if not bool(scenes.present.any(1).all()):
        row = int((~scenes.present.any(1)).nonzero()[0])
        raise ValueError(f"shape[{row}] = {scenes.shape[row].tolist()}; expected every scene to have an object")
    stage, rows = stage_of(scenes), torch.arange(first, first + len(scenes))
    found, least, done = [], 0, 0
    while least < n and len(scenes):
        count = max(n - least, n // 4 + 1) * 3 // 2  # most candidates lie on the outer surface
        u = uniforms(seed, rows, NUMBERS * count, FIRST_STREAM + NUMBERS * done).view(-1, count, NUMBERS)
        found.append(_candidates(stage, u.to(stage.scale.device)))
        done += count
        least = int(sum(outer.sum(1) for outer, *_ in found).amin())
    if not found:
        found = [tuple(torch.zeros(0, n, *end, device=stage.scale.device) for end in ((), (3,), (3,), (3,), ()))]
    outer, points, normals, colours, objects = (torch.cat(pieces, 1) for pieces in zip(*found, strict=True))
    order = outer.int().argsort(dim=1, descending=True, stable=True)[:, :n]  # the first n of each scene that count
    points, normals, colours = (x.gather(1, order[..., None].expand(-1, -1, 3)).float() for x in (points, normals, colours))
    return Cloud(points, normals, colours, objects.gather(1, order).long())


def _candidates(stage: Stage, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Points on the surfaces of all parts, from u (N, m, 3): whether each is outside, the point, normal, colour, object."""
    n, m, _ = u.shape
    most = max(len(_surfaces(shape)) for shape in SHAPES)
    areas = u.new_tensor([[p.area for p, _, _ in _surfaces(s)] + [0.0] * (most - len(_surfaces(s))) for s in SHAPES])
    weights = areas[stage.shape.clamp(min=0)] * stage.scale.double()[:, None] ** 2  # 0 where there is no object
    upto = weights.view(n, -1).cumsum(1)
    chosen = torch.searchsorted(upto, u[..., 0] * upto[:, -1:], right=True).flatten()
    k, surface = chosen // most, chosen % most
    slot = torch.arange(n, device=u.device).repeat_interleave(m) * stage.objects + k
    kind, order = (stage.shape[slot] * most + surface).sort()
    kinds, counts = kind.unique_consecutive(return_counts=True)

    p, normal, material = u.new_empty(3, n * m), u.new_empty(3, n * m), torch.zeros_like(slot)
    for kind, rows in zip(kinds.tolist(), order.split(counts.tolist()), strict=True):
        shape = SHAPES[kind // most]
        patch, part, side = _surfaces(shape)[kind % most]
        at, out = patch.sample(*u.view(-1, NUMBERS)[rows, 1:].unbind(-1))
        p[:, rows], normal[:, rows] = torch.stack(at), side * torch.stack(out)
        material[rows] = SOLIDS[shape][part].look(at)
    outer = torch.zeros(n * m, dtype=torch.bool, device=u.device)
    for s, shape in enumerate(SHAPES):
        rows = (stage.shape[slot] == s).nonzero()[:, 0]
        at = p[:, rows]
        beside = distance(shape, tuple(at + PROBE * normal[:, rows]))
        outer[rows] = (distance(shape, tuple(at)).abs() < PROBE / 2) & (beside > 0)

    cos, sin, scale = stage.cos[slot], -stage.sin[slot], stage.scale[slot]
    turned = (scale * x for x in turn(tuple(p), cos, sin))
    world = [x + c for x, c in zip(turned, pick(stage.centre, slot), strict=True)]
    colours = u.new_tensor([*ACCENTS.values(), *COLOURS.values()])
    main = len(ACCENTS) + stage.colour[slot]
    colour = colours[torch.where(material > 0, material - 1, main)]
    normal = torch.stack(turn(tuple(normal), cos, sin), -1)
    shaped = (torch.stack(world, -1), normal, colour)
    return outer.view(n, m), *(x.view(n, m, 3) for x in shaped), k.view(n, m)


def scene_sdf(scenes: Scenes, points: Tensor, ground: bool = False) -> Tensor:
    """Signed distance (N, P) of world `points` (N, P, 3) to the objects of each scene, and to the ground if asked.

    min over objects of s sdf(R^T (p - centre) / s), and z; inf where a scene has neither. Never more than the true
    distance in absolute value. Raises ValueError where the numbers of scenes disagree.
    """
    if points.ndim != 3 or len(points) != len(scenes) or points.shape[-1] != 3:
        raise ValueError(f"points has shape {tuple(points.shape)}; expected ({len(scenes)}, P, 3) beside these scenes")
    stage = stage_of(scenes)
    least = points[..., 2].clone() if ground else torch.full_like(points[..., 0], math.inf)
    for s, shape in enumerate(SHAPES):
        for slot in (stage.shape == s).nonzero()[:, 0].tolist():
            i, scale = slot // stage.objects, stage.scale[slot]
            away = tuple(x - c[slot] for x, c in zip(points[i].unbind(-1), stage.centre, strict=True))
            local = turn(tuple(x / scale for x in away), stage.cos[slot], stage.sin[slot])
            least[i] = torch.minimum(least[i], scale * distance(shape, local))
    return least
