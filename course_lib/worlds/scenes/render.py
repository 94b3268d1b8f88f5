"""Pictures of scenes, with depth, normals and segmentation that are exact to the rounding of float32.

Rays are cast, not marched: each primitive has a closed-form intersection. Only pixels at which two surfaces or colours
meet are sampled more than once. Every operation is elementwise: a picture depends neither on its batch nor, beyond
rounding, on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.worlds.scenes.attributes import SHAPES, Scenes
from course_lib.worlds.scenes.camera import Camera, camera, centres
from course_lib.worlds.scenes.geometry import Vectors, dot
from course_lib.worlds.scenes.solids import ACCENTS, distance
from course_lib.worlds.scenes.tracing import FAR, GAMMA, Hits, Stage, cast, linear, pick, split, stage_of, turn, visible

RAYS = 1 << 18  # rays at a time: enough to drown the cost of an operation, few enough for the cache of a processor
TILE = 1.2  # side of a tile of the checkered ground, in world units
LAMPS = (0.42, 0.75)
"""How strong the ambient light is, and the sun."""
SKY = ((0.93, 0.95, 0.97), (0.60, 0.76, 0.93))  # at the horizon and above


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


def _points(stage: Stage, n: Tensor, d: Vectors, t: Tensor) -> Vectors:
    """Where rays end; a ray that meets nothing ends somewhere far off, since infinity times zero is no number."""
    t = t.clamp(max=1e4)
    x, y, z = (o + t * di for o, di in zip(pick(stage.eye, n), d, strict=True))
    return x, y, z


def _lit(stage: Stage, n: Tensor, p: Vectors, hits: Hits, like: Tensor) -> Tensor:
    """max(n . l, 0) times how much of the light reaches points p, (M,); no shadows on a plain background.

    A ray whose `like` is not -1 takes its shadow from that ray, if that one faces the light.
    """
    towards = dot(hits.normal, pick(stage.light, n)).clamp(min=0)
    own = (like < 0) | (towards[like] == 0)
    rows = ((towards > 0) & own & ~stage.plain.index_select(0, n)).nonzero()[:, 0]
    seen = torch.ones_like(towards)
    above = tuple(pi + 1e-3 * ni for pi, ni in zip(pick(p, rows), pick(hits.normal, rows), strict=True))
    seen[rows] = visible(stage, n[rows], above, hits.thing[rows])
    return towards * torch.where(own, seen, seen[like])


def _shade(stage: Stage, n: Tensor, d: Vectors, p: Vectors, hits: Hits, lit: Tensor, lamps: tuple[float, float]) -> list[Tensor]:
    """Linear colours, three of (M,): Lambert's law, an ambient light that comes from above, and a haze over far ground."""
    entry = torch.where(hits.material > 0, hits.material + 1, hits.thing + len(ACCENTS) + 1)
    entry = torch.where(hits.thing > 0, entry, _tile(p)) + n * stage.palette.shape[2]
    light = lamps[0] * (0.65 + 0.35 * hits.normal[2]) + lamps[1] * lit
    haze = (((p[0].square() + p[1].square()).sqrt() - 4) / 14).clamp(0, 1)
    haze = torch.where(hits.thing == 0, haze * haze * (3 - 2 * haze), (hits.thing < 0).to(haze.dtype))
    lift = (d[2] * 2.5).clamp(0, 1)
    colours = []
    for palette, horizon, zenith in zip(stage.palette.flatten(1), *linear(SKY, lift).tolist(), strict=True):
        plain = palette[:: stage.palette.shape[2]]  # the one colour of a plain background is that of its ground
        sky = torch.where(stage.plain, plain, horizon)[n] + torch.where(stage.plain, 0, zenith - horizon)[n] * lift
        colours.append(torch.lerp(palette.index_select(0, entry) * light, sky, haze))
    return colours


def _tile(p: Vectors) -> Tensor:
    """Which of the two colours of the ground lies at world points p: 0 or 1."""
    return ((p[0] / TILE).floor() + (p[1] / TILE).floor()).long() % 2


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
    return dot(a.unbind(1), b.unbind(1))[:, None] < math.cos(math.radians(30))


def _check(scenes: Scenes, size: int, samples: int, view: Camera | None) -> None:
    for name, value, low, high in (("size", size, 4, 1024), ("samples", samples, 1, 8)):
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} = {value!r}; expected a whole number from {low} to {high}")
    if view is not None and len(view.eye) != len(scenes):
        raise ValueError(f"view has {len(view.eye)} cameras; expected {len(scenes)}, one for each scene")
    stage = stage_of(scenes, view)
    n = torch.arange(len(scenes), device=stage.scale.device).repeat_interleave(stage.objects)
    away = (e - c for e, c in zip(pick(stage.eye, n), stage.centre, strict=True))
    local = turn(tuple(x / stage.scale for x in away), stage.cos, stage.sin)
    for s, shape in enumerate(SHAPES):
        rows = (stage.shape == s).nonzero()[:, 0]
        inside = rows[distance(shape, pick(local, rows)) < 0].tolist()
        if inside:
            i, k = divmod(inside[0], stage.objects)
            raise ValueError(f"the camera of scene {i} stands inside its object {k}; expected it outside")


def render(
    scenes: Scenes, size: int = 64, samples: int = 2, view: Camera | None = None, lamps: tuple[float, float] = LAMPS
) -> Rendered:
    """Draw `scenes` at size x size pixels, on their device; where colours meet, samples x samples rays a pixel.

    Colour = albedo (ambient + sun * visible * max(n . l, 0)) in linear light, averaged over the rays of a pixel; a far
    ground fades into the sky. With `view`, those cameras look instead of the scenes' own, under the same light. `lamps` are the
    strengths of the ambient light and of the sun, without which nothing casts a shadow. Raises
    ValueError for a size outside 4 to 1024, samples outside 1 to 8, and a camera that stands inside an object.
    """
    _check(scenes, size, samples, view)
    view, chunk = view or camera(scenes), max(1, RAYS // size**2)
    chunks = [slice(i, i + chunk) for i in range(0, max(len(scenes), 1), chunk)]
    with torch.no_grad():
        pieces = [
            _render(scenes[rows], Camera(view.eye[rows], view.axes[rows], view.fov), size, samples, lamps) for rows in chunks
        ]
    return Rendered(
        *(torch.cat([getattr(piece, name) for piece in pieces]) for name in ("rgb", "depth", "normal", "segmentation"))
    )


def _render(scenes: Scenes, view: Camera, size: int, samples: int, lamps: tuple[float, float]) -> Rendered:
    stage, count = stage_of(scenes, view), len(scenes)
    pixels = centres(size, stage.scale.device)
    n = torch.arange(count, device=pixels.device).repeat_interleave(len(pixels))
    where = pixels.repeat(count, 1)
    d = split(view.directions(n, where, size))
    hits = cast(stage, n, d)
    p = _points(stage, n, d, hits.t)
    depth = torch.where(hits.thing >= 0, -dot(d, pick(stage.back, n)) * hits.t, FAR)

    def picture(*x: Tensor) -> Tensor:
        return torch.stack([component.view(count, size, size) for component in x], 1)

    normal, segmentation = picture(*hits.normal), picture(hits.thing)
    like, rows = torch.full_like(hits.thing, -1), n[:0]
    if samples > 1:
        key = ((hits.thing + 1) * 64 + hits.part) * 16 + hits.material
        key = key * 2 + torch.where(hits.thing == 0, _tile(p), 0)
        rows = _meeting(picture(key), normal).flatten().nonzero()[:, 0]
        steps = (torch.arange(samples, device=n.device) + 0.5) / samples - 0.5
        shifts = torch.stack((steps.repeat(samples), steps.repeat_interleave(samples)), -1)
        middle = rows.repeat_interleave(samples**2)
        ray = split(view.directions(n[middle], (where[rows, None] + shifts).flatten(0, 1), size))
        near = cast(stage, n[middle], ray)
        # Shadows are softer than a pixel, so a ray that meets the same face as the central one shares its shadow.
        same = (near.thing == hits.thing[middle]) & (near.part == hits.part[middle])
        same &= dot(near.normal, pick(hits.normal, middle)) > 0.9
        like = torch.cat((like, torch.where(same, middle, -1)))
        p = _joined(p, _points(stage, n[middle], ray, near.t))
        n, d, hits = torch.cat((n, n[middle])), _joined(d, ray), _all(hits, near)
    colours = _shade(stage, n, d, p, hits, _lit(stage, n, p, hits, like), lamps)
    rgb = []
    for colour in colours:
        pixel = colour[: len(where)]
        if len(rows):
            pixel[rows] = colour[len(where) :].view(-1, samples**2).mean(1)
        rgb.append(pixel)
    return Rendered(
        rgb=picture(*rgb).clamp(0, 1) ** (1 / GAMMA) * 2 - 1,
        depth=picture(depth),
        normal=normal,
        segmentation=segmentation,
    )


def _joined(a: Vectors, b: Vectors) -> Vectors:
    x, y, z = (torch.cat(pair) for pair in zip(a, b, strict=True))
    return x, y, z


def _all(a: Hits, b: Hits) -> Hits:
    one, two = vars(a), vars(b)
    return Hits(**{k: _joined(one[k], two[k]) if k == "normal" else torch.cat((one[k], two[k])) for k in one})


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
