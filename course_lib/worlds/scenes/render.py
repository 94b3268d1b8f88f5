"""Pictures of scenes, with depth, normals and segmentation that are exact to the rounding of float32.

Rays are cast, not marched: each primitive has a closed-form intersection. Rays are flat lists with the number of their
scene beside them, so that a shape's primitives meet only the rays that pass its bounding ball, and only pixels at
which two surfaces or colours meet are sampled more than once. Every operation is elementwise: a picture depends
neither on its batch nor, beyond rounding, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.worlds.scenes.attributes import COLOURS, GROUNDS, LIGHTS, SHAPES, Scenes
from course_lib.worlds.scenes.camera import Camera, camera, centres
from course_lib.worlds.scenes.geometry import INF, Vectors, dot
from course_lib.worlds.scenes.solids import ACCENTS, FOOT, SOLIDS, distance

FAR = 30.0  # depth of the background, in world units
RAYS = 1 << 18  # rays at a time: their tensors stay small beside the cache of a processor
PLAIN = list(GROUNDS).index("plain")
TILE = 0.8  # side of a tile of the checkered ground, in world units
LIGHT_ELEVATION = 55.0  # degrees
AMBIENT, SUN = 0.42, 0.75
PENUMBRA = 0.10  # tangent of the angle by which the edge of a shadow widens
SKY = ((0.93, 0.95, 0.97), (0.60, 0.76, 0.93))  # at the horizon and above
GAMMA = 2.2  # light adds up in linear intensities; colours are given and returned as a screen takes them


@dataclass
class Rendered:
    """What a camera sees: N pictures of H x W.

    rgb (N, 3, H, W) in [-1, 1]. depth (N, 1, H, W) along the viewing axis, FAR for the background. normal (N, 3, H, W)
    of the surface in the world, unit, 0 for the background. segmentation (N, 1, H, W) long: -1 background, 0 ground,
    k + 1 the object k. All but rgb are those of the ray through the centre of the pixel.
    """

    rgb: Tensor
    depth: Tensor
    normal: Tensor
    segmentation: Tensor


@dataclass
class _Stage:
    """The scenes of one batch in the form that rays need; tensors are (N, K) or (N,) unless said otherwise."""

    shape: Tensor
    scale: Tensor
    centre: Tensor  # (N, K, 3)
    cos: Tensor
    sin: Tensor
    palette: Tensor  # (N, 2 + A + K, 3), linear: the ground, the accents, the objects
    plain: Tensor
    light: Tensor  # (N, 3), unit, towards the light
    view: Camera


@dataclass
class _Hits:
    """Where rays end: t (M,), object (M,) with -1 none and 0 ground, part (M,), material (M,), normal (M, 3)."""

    t: Tensor
    thing: Tensor
    part: Tensor
    material: Tensor
    normal: Tensor


def _linear(colours: object, like: Tensor) -> Tensor:
    return torch.tensor(list(colours), device=like.device, dtype=torch.float32) ** GAMMA


def _stage(scenes: Scenes) -> _Stage:
    yaw = torch.deg2rad(scenes.yaw)
    feet = torch.tensor([FOOT[shape] for shape in SHAPES], device=yaw.device)
    lift = feet[scenes.shape.clamp(min=0)] * scenes.scale
    toward = torch.tensor(list(LIGHTS.values()), device=yaw.device)[scenes.light]
    azimuth, e = torch.deg2rad(scenes.azimuth + toward), math.radians(LIGHT_ELEVATION)
    light = (math.cos(e) * azimuth.cos(), math.cos(e) * azimuth.sin(), torch.full_like(azimuth, math.sin(e)))
    ground, accents = _linear(GROUNDS.values(), yaw)[scenes.ground], _linear(ACCENTS.values(), yaw)
    main = _linear(COLOURS.values(), yaw)[scenes.colour.clamp(min=0)]
    return _Stage(
        shape=scenes.shape,
        scale=scenes.scale,
        centre=scenes.position + F.pad(lift[..., None], (2, 0)),
        cos=yaw.cos(),
        sin=yaw.sin(),
        palette=torch.cat((ground, accents.expand(len(scenes), -1, -1), main), 1),
        plain=scenes.ground == PLAIN,
        light=torch.stack(light, -1),
        view=camera(scenes),
    )


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Vectors:
    """World directions (M, 3) in the frame of an object that is turned by yaw."""
    return cos * x[:, 0] + sin * x[:, 1], cos * x[:, 1] - sin * x[:, 0], x[:, 2]


def _near(
    stage: _Stage, n: Tensor, o: Tensor, d: Tensor, widen: float
) -> Iterator[tuple[int, str, Tensor, Tensor, Vectors, Vectors]]:
    """The rays that come near each object, grouped by its shape, in the frame and at the scale of that shape.

    Yields (k, shape, rows of the rays, shift, o, d): the ray now starts, at the point closest to the centre of the
    object, `shift` (in units of the object) further along. Near means within the unit ball, widened with the distance.
    """
    for k in range(stage.shape.shape[1]):
        scale = stage.scale[n, k]
        away = o - stage.centre[:, k].index_select(0, n)
        along = -_dot(away, d)
        closest = away + along[:, None] * d
        reach = scale + widen * along.clamp(min=0)
        rows = ((stage.shape[n, k] >= 0) & (along > -scale) & (_dot(closest, closest) < reach * reach)).nonzero()[:, 0]
        shapes = stage.shape[n[rows], k]
        for s in shapes.unique().tolist():
            part = rows[shapes == s]
            at, size = n[part], scale[part]
            cos, sin = stage.cos[at, k], stage.sin[at, k]
            start = _turn(closest[part] / size[:, None], cos, sin)
            yield k, SHAPES[s], part, along[part] / size, start, _turn(d[part], cos, sin)


def _cast(stage: _Stage, n: Tensor, d: Tensor) -> _Hits:
    """Follow rays of the cameras `n` (M,) in directions `d` (M, 3) to the first surface."""
    o = stage.view.eye.index_select(0, n)
    t = -o[:, 2] / torch.where(d[:, 2] < -1e-6, d[:, 2], INF)
    depth = -_dot(d, stage.view.axes[n, 2]) * t
    grounded = (d[:, 2] < -1e-6) & ~stage.plain[n] & (depth < FAR)
    t = torch.where(grounded, t, INF)
    thing = torch.where(grounded, 0, -1)
    part, material = torch.zeros_like(thing), torch.zeros_like(thing)
    normal = F.pad(grounded.float()[:, None], (2, 0))
    for k, shape, rows, shift, start, along in _near(stage, n, o, d, 0.0):
        scale = stage.scale[n[rows], k]
        best = t[rows] / scale - shift
        which = torch.full_like(rows, -1)
        for i, solid in enumerate(SOLIDS[shape]):
            hit = solid.hit(start, along, -shift)
            closer = hit < best
            best, which = torch.where(closer, hit, best), torch.where(closer, i, which)
        for i, solid in enumerate(SOLIDS[shape]):
            mine = (which == i).nonzero()[:, 0]
            if not len(mine):
                continue
            p = tuple(s[mine] + best[mine] * a[mine] for s, a in zip(start, along, strict=True))
            to = rows[mine]
            x, y, z = solid.normal(p)
            cos, sin = stage.cos[n[to], k], stage.sin[n[to], k]
            normal[to] = torch.stack((cos * x - sin * y, sin * x + cos * y, z), -1)
            material[to], part[to], thing[to] = solid.look(p), i, k + 1
            t[to] = (best[mine] + shift[mine]) * scale[mine]
    return _Hits(t, thing, part, material, normal)


def _visible(stage: _Stage, n: Tensor, p: Tensor, thing: Tensor, steps: int = 10) -> Tensor:
    """How much of the light reaches points p (M, 3) of `thing` (M,), in [0, 1]; they face the light.

    The estimate of soft shadows from a signed distance: the least of 1/2 + sdf / (2 w t) along the way to the light,
    where t is the way gone and w the width of the light (Inigo Quilez 2010, in the symmetric form of 2018).
    """
    light = stage.light[n]
    seen = torch.ones_like(p[:, 0])
    for k, shape, rows, shift, start, along in _near(stage, n, p, light, PENUMBRA):
        if len(SOLIDS[shape]) == 1:  # convex: where it faces the light it does not stand in its own way
            other = (thing[rows] != k + 1).nonzero()[:, 0]
            rows, shift = rows[other], shift[other]
            start, along = tuple(s[other] for s in start), tuple(a[other] for a in along)
        reach = 1 + PENUMBRA * shift.clamp(min=0)
        half = (reach * reach - dot(start, start)).clamp(min=0).sqrt()
        end, way = shift + half, (shift - half).clamp(min=0.02)
        clear = torch.ones_like(way)
        alive = torch.arange(len(way), device=way.device)
        for step in range(steps):
            if step % 3 == 0 and step:  # rays that are past the object or in full shadow are done
                alive = alive[(clear[alive] > -1) & (way[alive] < end[alive])]
            t, gone = way[alive], (way - shift)[alive]
            d = distance(shape, tuple(s[alive] + gone * a[alive] for s, a in zip(start, along, strict=True)))
            clear[alive] = torch.minimum(clear[alive], d / (PENUMBRA * t))
            way[alive] = t + torch.maximum(d, (end[alive] - t) / (steps - step))
        clear = (0.5 + 0.5 * clear).clamp(0, 1)
        seen[rows] = torch.minimum(seen[rows], clear * clear * (3 - 2 * clear))
    return seen


def _shade(stage: _Stage, n: Tensor, d: Tensor, hits: _Hits, seen: Tensor) -> Tensor:
    """Linear colours (M, 3) of rays: Lambert's law with a soft shadow, and an ambient light that comes from above.

    `seen` (M,) is how much of the light reaches each point; it is filled in place where it is NaN.
    """
    horizon, zenith = _linear(SKY, d)
    lift = (d[:, 2:] * 2.5).clamp(0, 1)
    colour = torch.where(stage.plain[n, None], stage.palette[n, 0], horizon + (zenith - horizon) * lift)
    lit = (hits.thing >= 0).nonzero()[:, 0]
    n, normal, thing, t = n[lit], hits.normal[lit], hits.thing[lit], hits.t[lit]
    p = stage.view.eye.index_select(0, n) + t[:, None] * d.index_select(0, lit)
    material = hits.material[lit]
    entry = torch.where(material > 0, material + 1, thing + len(ACCENTS) + 1)
    entry = torch.where(thing > 0, entry, _tile(p))
    albedo = stage.palette.flatten(0, 1).index_select(0, n * stage.palette.shape[1] + entry)
    towards = _dot(normal, stage.light[n]).clamp(min=0)
    shadowed = ((towards > 0) & ~stage.plain[n] & seen[lit].isnan()).nonzero()[:, 0]
    seen[lit[shadowed]] = _visible(stage, n[shadowed], p[shadowed] + 1e-3 * normal[shadowed], thing[shadowed])
    towards = towards * seen[lit].nan_to_num(1.0)
    shaded = albedo * (AMBIENT * (0.65 + 0.35 * normal[:, 2:]) + SUN * towards[:, None])
    haze = (((p[:, 0] ** 2 + p[:, 1] ** 2).sqrt() - 4) / 14).clamp(0, 1)[:, None] * (thing == 0)[:, None]
    haze = haze * haze * (3 - 2 * haze)
    colour[lit] = shaded + (colour[lit] - shaded) * haze
    return colour


def _tile(p: Tensor) -> Tensor:
    """Which of the two colours of the ground lies at world points p (M, 3): 0 or 1."""
    return ((p[:, 0] / TILE).floor() + (p[:, 1] / TILE).floor()).long() % 2


def _meeting(label: Tensor, normal: Tensor) -> Tensor:
    """Whether one of a pixel's four neighbours has another label or a normal turned by over 30 degrees: (N, 1, H, W)."""
    meet = torch.zeros_like(label, dtype=torch.bool)
    for axis in (2, 3):
        (l0, l1), (n0, n1) = _neighbours(label, axis), _neighbours(normal, axis)
        differ = (l0 != l1) | ((l0 > 0) & (_turned(n0, n1)))
        for side in _neighbours(meet, axis):
            side |= differ
    return meet


def _neighbours(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Views of all pixels but the last and of all but the first along an axis."""
    return x.narrow(axis, 0, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1)


def _turned(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True) < math.cos(math.radians(30))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return dot(a.unbind(-1), b.unbind(-1))


def _check(scenes: Scenes, size: int, samples: int) -> None:
    for name, value, low, high in (("size", size, 4, 1024), ("samples", samples, 1, 8)):
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} = {value!r}; expected a whole number from {low} to {high}")
    stage = _stage(scenes)
    n = torch.arange(len(scenes), device=stage.scale.device)
    for k in range(scenes.shape.shape[1]):
        away = (stage.view.eye - stage.centre[:, k]) / stage.scale[:, k, None]
        local = torch.stack(_turn(away, stage.cos[:, k], stage.sin[:, k]), -1)
        for s in scenes.shape[:, k].unique().tolist():
            rows = n[(scenes.shape[:, k] == s) & (s >= 0)]
            inside = rows[distance(SHAPES[s], local[rows].unbind(-1)) < 0].tolist()
            if inside:
                raise ValueError(f"the camera of scene {inside[0]} stands inside its object {k}; expected it outside")


def render(scenes: Scenes, size: int = 64, samples: int = 2) -> Rendered:
    """Draw `scenes` at size x size pixels, on their device; where colours meet, samples x samples rays a pixel.

    Colour = albedo (ambient + sun * visible * max(n . l, 0)) in linear light, averaged over the rays of a pixel; a far
    ground fades into the sky. Raises ValueError for a size outside 4 to 1024, samples outside 1 to 8, and a camera
    that stands inside an object.
    """
    _check(scenes, size, samples)
    chunk = max(1, RAYS // size**2)
    with torch.no_grad():
        pieces = [_render(scenes[i : i + chunk], size, samples) for i in range(0, max(len(scenes), 1), chunk)]
    return Rendered(
        *(torch.cat([getattr(piece, name) for piece in pieces]) for name in ("rgb", "depth", "normal", "segmentation"))
    )


def _render(scenes: Scenes, size: int, samples: int) -> Rendered:
    stage, count = _stage(scenes), len(scenes)
    pixels = centres(size, stage.scale.device)
    n = torch.arange(count, device=pixels.device).repeat_interleave(len(pixels))
    where = pixels.repeat(count, 1)
    d = stage.view.directions(n, where, size)
    hits = _cast(stage, n, d)
    seen = torch.full_like(hits.t, math.nan)
    rgb = _shade(stage, n, d, hits, seen)

    def picture(x: Tensor) -> Tensor:
        return x.view(count, size, size, -1).movedim(-1, 1)

    if samples > 1:
        tile = torch.where(hits.thing == 0, _tile(stage.view.eye[n] + hits.t.clamp(max=1e4)[:, None] * d), 0)
        key = ((hits.thing + 1) * 64 + hits.part) * 16 + hits.material
        rows = _meeting(picture(key * 2 + tile), picture(hits.normal)).flatten().nonzero()[:, 0]
        steps = (torch.arange(samples, device=d.device) + 0.5) / samples - 0.5
        shifts = torch.stack((steps.repeat(samples), steps.repeat_interleave(samples)), -1)
        at, through = n[rows].repeat_interleave(samples**2), (where[rows, None] + shifts).flatten(0, 1)
        ray = stage.view.directions(at, through, size)
        near = _cast(stage, at, ray)
        # Shadows are softer than a pixel, so a ray that meets the same face as the central one shares its shadow.
        centre = rows.repeat_interleave(samples**2)
        same = (near.thing == hits.thing[centre]) & (near.part == hits.part[centre])
        same &= _dot(near.normal, hits.normal[centre]) > 0.9
        rgb[rows] = _shade(stage, at, ray, near, torch.where(same, seen[centre], math.nan)).view(-1, samples**2, 3).mean(1)
    depth = -_dot(d, stage.view.axes[n, 2]) * hits.t
    depth = torch.where(hits.thing >= 0, depth, FAR)
    return Rendered(
        rgb=picture(rgb.clamp(0, 1) ** (1 / GAMMA) * 2 - 1),
        depth=picture(depth),
        normal=picture(hits.normal),
        segmentation=picture(hits.thing),
    )


def edges(depth: Tensor, normal: Tensor, segmentation: Tensor) -> Tensor:
    """Line drawing (N, 1, H, W), 1 on lines and 0 elsewhere: where a neighbour to the right or below is another thing.

    Another thing: another label, a normal turned by more than 30 degrees, or, within an object, a depth that jumps by more
    than 0.2 world units. Takes the maps of `Rendered`; raises ValueError where their sizes disagree.
    """
    n, _, h, w = depth.shape
    for name, value, channels in (("normal", normal, 3), ("segmentation", segmentation, 1)):
        if value.shape != (n, channels, h, w):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {(n, channels, h, w)} beside this depth")
    line = torch.zeros_like(segmentation, dtype=torch.bool)
    for axis in (2, 3):
        (s0, s1), (z0, z1), (n0, n1) = (_neighbours(x, axis) for x in (segmentation, depth, normal))
        here, _ = _neighbours(line, axis)
        here |= (s0 != s1) | ((s0 > 0) & (_turned(n0, n1) | ((z0 - z1).abs() > 0.2)))
    return line.float()
