"""Rays against the objects of scenes: the first surface that they meet, and how much light reaches a point.

A ray is one entry of flat lists: the number n of its scene, and its direction as a triple of tensors. All pairs of a ray
and an object that it comes near are found first and sorted by the shape of the object, so that the primitives of a shape
are met by all such rays at once, whichever scene they belong to: a few operations on long lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.worlds.scenes.attributes import COLOURS, GROUNDS, LIGHTS, SHAPES, Scenes
from course_lib.worlds.scenes.camera import Camera, camera
from course_lib.worlds.scenes.geometry import INF, Vectors, dot
from course_lib.worlds.scenes.solids import ACCENTS, FOOT, SOLIDS, distance

FAR = 30.0  # depth of the background, in world units
PLAIN = list(GROUNDS).index("plain")
LIGHT_ELEVATION = 55.0  # degrees
PENUMBRA = 0.10  # tangent of the angle by which the edge of a shadow widens
GAMMA = 2.2  # light adds up in linear intensities; colours are given and returned as a screen takes them
CONVEX = tuple(len(SOLIDS[shape]) == 1 for shape in SHAPES)


@dataclass
class Stage:
    """The scenes of one batch in the form that rays need, (N,) each; objects are flat, number n K + k, (N K,) each.

    palette (3, N, 2 + A + K): linear colours of the ground, the accents and the objects. light: unit, towards the light.
    eye, back: of the cameras.
    """

    objects: int  # K
    shape: Tensor
    colour: Tensor
    scale: Tensor
    centre: Vectors
    cos: Tensor
    sin: Tensor
    palette: Tensor
    plain: Tensor
    light: Vectors
    eye: Vectors
    back: Vectors


@dataclass
class Hits:
    """Where rays end, (M,) each: t, thing with -1 none and 0 ground, part, material, and the normal."""

    t: Tensor
    thing: Tensor
    part: Tensor
    material: Tensor
    normal: Vectors


@dataclass
class _Pairs:
    """Rays and objects that they come near, sorted by shape, (E,) each; `groups` are the shapes and where they lie.

    o + t d is the ray in the frame and at the scale of the object's shape; it starts where it is closest to the centre
    of the object, `shift` (in units of the object) further along than the ray itself.
    """

    ray: Tensor
    object: Tensor
    shift: Tensor
    o: Vectors
    d: Vectors
    groups: list[tuple[str, slice]]


def pick(table: Vectors, rows: Tensor) -> Vectors:
    """Rows of each of three tables."""
    x, y, z = (column.index_select(0, rows) for column in table)
    return x, y, z


def split(x: Tensor) -> Vectors:
    """A last axis of three as a triple of tensors, each contiguous."""
    a, b, c = x.flatten(0, -2).T.contiguous().unbind()
    return a, b, c


def linear(colours: object, like: Tensor) -> Tensor:
    """Colours of a screen, rows of three, as linear intensities on the device of `like`."""
    return torch.tensor(list(colours), device=like.device, dtype=torch.float32) ** GAMMA


def stage_of(scenes: Scenes, view: Camera | None = None) -> Stage:
    """Set the stage of `scenes`, seen by `view` or by their own cameras."""
    yaw = torch.deg2rad(scenes.yaw)
    feet = torch.tensor([FOOT[shape] for shape in SHAPES], device=yaw.device)
    lift = feet[scenes.shape.clamp(min=0)] * scenes.scale
    x, y, z = scenes.position.unbind(-1)
    toward = torch.tensor(list(LIGHTS.values()), device=yaw.device)[scenes.light]
    azimuth, e = torch.deg2rad(scenes.azimuth + toward), math.radians(LIGHT_ELEVATION)
    ground, accents = linear(GROUNDS.values(), yaw)[scenes.ground], linear(ACCENTS.values(), yaw)
    main = linear(COLOURS.values(), yaw)[scenes.colour.clamp(min=0)]
    palette = torch.cat((ground, accents.expand(len(scenes), -1, -1), main), 1)
    view = camera(scenes) if view is None else view
    return Stage(
        objects=scenes.shape.shape[1],
        shape=scenes.shape.flatten(),
        colour=scenes.colour.flatten(),
        scale=scenes.scale.flatten(),
        centre=(x.flatten(), y.flatten(), (z + lift).flatten()),
        cos=yaw.cos().flatten(),
        sin=yaw.sin().flatten(),
        palette=palette.movedim(-1, 0).contiguous(),
        plain=scenes.ground == PLAIN,
        light=(math.cos(e) * azimuth.cos(), math.cos(e) * azimuth.sin(), torch.full_like(azimuth, math.sin(e))),
        eye=split(view.eye),
        back=split(view.axes[:, 2]),
    )


def turn(x: Vectors, cos: Tensor, sin: Tensor) -> Vectors:
    """World directions in the frame of an object that is turned by yaw; -sin for sin turns them back."""
    return cos * x[0] + sin * x[1], cos * x[1] - sin * x[0], x[2]


def _along(o: Vectors, t: Tensor, d: Vectors) -> Vectors:
    x, y, z = (oi + t * di for oi, di in zip(o, d, strict=True))
    return x, y, z


def _near(stage: Stage, n: Tensor, o: Vectors, d: Vectors, widen: float, thing: Tensor | None = None) -> _Pairs:
    """Pair rays with the objects whose ball they enter, widened with the distance; not those that start behind it.

    With `thing`, what the rays start from: a ray that leaves a convex object does not meet it again.
    """
    found = []
    for k in range(stage.objects):
        slot = n * stage.objects + k
        away = tuple(a - b for a, b in zip(o, pick(stage.centre, slot), strict=True))
        along, scale = -dot(away, d), stage.scale.index_select(0, slot)
        reach = scale + widen * along.clamp(min=0) if widen else scale
        near = (dot(away, away) - along * along < reach * reach) & (along > -scale)
        near &= scale > 0  # of an object that is not there; rounding may put a ray through its centre within it
        found.append(near.nonzero()[:, 0])
    ray = torch.cat(found)
    slot = torch.cat([n.index_select(0, rows) * stage.objects + k for k, rows in enumerate(found)])
    shape = stage.shape.index_select(0, slot)
    if thing is not None:
        own = thing.index_select(0, ray) == slot % stage.objects + 1
        keep = (~(own & torch.tensor(CONVEX, device=n.device)[shape])).nonzero()[:, 0]
        ray, slot, shape = ray[keep], slot[keep], shape[keep]
    shape, order = shape.sort(stable=True)
    ray, slot = ray[order], slot[order]
    ends = torch.searchsorted(shape, torch.arange(len(SHAPES) + 1, device=n.device)).tolist()
    groups = [(SHAPES[s], slice(ends[s], ends[s + 1])) for s in range(len(SHAPES)) if ends[s] < ends[s + 1]]

    away = tuple(a - b for a, b in zip(pick(o, ray), pick(stage.centre, slot), strict=True))
    way, size, cos, sin = pick(d, ray), stage.scale[slot], stage.cos[slot], stage.sin[slot]
    along = -dot(away, way)
    closest = tuple(x / size for x in _along(away, along, way))
    return _Pairs(ray, slot, along / size, turn(closest, cos, sin), turn(way, cos, sin), groups)


def _part(x: Vectors, rows: slice | Tensor) -> Vectors:
    return x[0][rows], x[1][rows], x[2][rows]


def cast(stage: Stage, n: Tensor, d: Vectors) -> Hits:
    """Follow rays of the cameras `n` (M,) in directions `d` to the first surface."""
    o = pick(stage.eye, n)
    down = d[2] < -1e-6
    t = -o[2] / torch.where(down, d[2], INF)
    depth = -dot(d, pick(stage.back, n)) * t
    grounded = down & ~stage.plain.index_select(0, n) & (depth < FAR)
    t = torch.where(grounded, t, INF)
    thing = grounded.long() - 1
    part, material = torch.zeros_like(thing), torch.zeros_like(thing)
    normal = torch.zeros_like(t), torch.zeros_like(t), grounded.to(t.dtype)

    pairs = _near(stage, n, o, d, 0.0)
    size = stage.scale[pairs.object]
    local, which = torch.full_like(pairs.shift, INF), torch.full_like(pairs.ray, -1)
    for shape, rows in pairs.groups:
        start, along, behind = _part(pairs.o, rows), _part(pairs.d, rows), -pairs.shift[rows]
        for i, solid in enumerate(SOLIDS[shape]):
            hit = solid.hit(start, along, behind)
            closer = hit < local[rows]
            local[rows] = torch.where(closer, hit, local[rows])
            which[rows] = torch.where(closer, i, which[rows])
    reached = (local + pairs.shift) * size
    t = t.scatter_reduce(0, pairs.ray, reached, "amin")
    first = (which >= 0) & (reached == t[pairs.ray])

    met, kinds, faces = [], [], []
    for shape, rows in pairs.groups:
        for i, solid in enumerate(SOLIDS[shape]):
            mine = (first[rows] & (which[rows] == i)).nonzero()[:, 0] + rows.start
            p = _along(_part(pairs.o, mine), local[mine], _part(pairs.d, mine))
            met.append(mine)
            kinds.append(solid.look(p))
            faces.append(solid.normal(p))
    if met:
        rows = torch.cat(met)
        to, slot = pairs.ray[rows], pairs.object[rows]
        face = turn(tuple(map(torch.cat, zip(*faces, strict=True))), stage.cos[slot], -stage.sin[slot])
        material[to], part[to], thing[to] = torch.cat(kinds), which[rows], slot % stage.objects + 1
        for component, value in zip(normal, face, strict=True):
            component[to] = value
    return Hits(t, thing, part, material, normal)


def visible(stage: Stage, n: Tensor, p: Vectors, thing: Tensor, steps: int = 10) -> Tensor:
    """How much of the light reaches points p of `thing` (M,), in [0, 1]; they face the light.

    The estimate of soft shadows from a signed distance: the least of 1/2 + sdf / (2 w t) along the way to the light,
    where t is the way gone and w the width of the light (Inigo Quilez 2010, in the symmetric form of 2018).
    """
    pairs = _near(stage, n, p, pick(stage.light, n), PENUMBRA, thing)
    shift = pairs.shift
    reach = 1 + PENUMBRA * shift.clamp(min=0)
    half = (reach * reach - dot(pairs.o, pairs.o)).clamp(min=0).sqrt()
    start, end = (shift - half).clamp(min=0.02), shift + half
    least = torch.empty_like(shift)
    for shape, rows in pairs.groups:
        least[rows] = _march(shape, start[rows], end[rows], shift[rows], _part(pairs.o, rows), _part(pairs.d, rows), steps)
    clear = (0.5 + 0.5 * least).clamp(0, 1)
    return torch.ones_like(p[0]).scatter_reduce(0, pairs.ray, clear * clear * (3 - 2 * clear), "amin")


def _march(shape: str, t: Tensor, end: Tensor, shift: Tensor, o: Vectors, d: Vectors, steps: int) -> Tensor:
    """The least of sdf / (w t), at most 1, over the ways t, ..., end; a step goes as far as the distance allows."""
    least, clear = torch.empty_like(t), torch.ones_like(t)
    rows = torch.arange(len(t), device=t.device)
    for step in range(steps):
        if step % 3 == 0 and step:  # rays that are past the object or in full shadow are done
            least[rows] = clear
            alive = ((clear > -1) & (t < end)).nonzero()[:, 0]
            rows, t, end, shift, clear = (x.index_select(0, alive) for x in (rows, t, end, shift, clear))
            o, d = pick(o, alive), pick(d, alive)
        far = distance(shape, _along(o, t - shift, d))
        clear = torch.minimum(clear, far / (PENUMBRA * t))
        t = t + torch.maximum(far, (end - t) / (steps - step))
    least[rows] = clear
    return least
