"""Clips: scenes in which one thing moves, an object or the camera, as frames with exact optical flow.

The whole motion of a clip over the time s in [0, 1] is one signed number, its `amount`; F frames show s = 0, 1 / (F - 1),
..., 1. Only objects move in the `Scenes` of a frame; a moving camera is a `Camera` beside them, so the light, which hangs
on the azimuth of the scene, stays where it is in the world.

slide: object 0 moves `amount` world units to the right of the viewer, along the ground. bounce: it hops HOPS times,
`amount` high. spin: it turns by `amount` degrees about z, counter-clockwise from above. orbit: the camera's azimuth grows
by `amount` degrees, so it moves to its own right. zoom: its distance shrinks by the factor exp(amount). roll: it turns
clockwise about its viewing axis by `amount` degrees. pan: it turns to its right about z, from -amount / 2 to amount / 2.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.worlds.scenes.attributes import FIELD_OF_VIEW, SHAPES, Scenes
from course_lib.worlds.scenes.camera import Camera, camera, centres
from course_lib.worlds.scenes.render import RAYS, render
from course_lib.worlds.scenes.sampling import LEFT, ON_TOP, RIGHT, margins, relations, seen, uniforms
from course_lib.worlds.scenes.sampling import draw as draw_scenes
from course_lib.worlds.scenes.tracing import cast, split, stage_of, turn

MOTIONS = ("slide", "bounce", "spin", "orbit", "zoom", "roll", "pan")
SLIDE, BOUNCE, SPIN, ORBIT, ZOOM, ROLL, PAN = range(len(MOTIONS))
HOPS = 2
FIRST_STREAM = 3000
"""Motions draw from streams that neither scenes, captions nor sketches draw from, so that one seed may serve all."""
AMOUNTS = {
    "spin": (120.0, 240.0),
    "orbit": (30.0, 75.0),
    "zoom": (math.log(1.25), math.log(1.6)),
    "roll": (20.0, 45.0),
    "pan": (6.0, 16.0),
}
"""Amounts, up to their sign; slides and bounces take 60 to 100 % of the room that there is."""
LEAST = {"slide": 0.3, "bounce": 0.2}  # of room, in world units
ON_SUPPORT = 0.3  # how far from the middle of its support an object may slide, in world units
ROUND = tuple(SHAPES.index(shape) for shape in ("sphere", "cylinder", "cone"))
ATTEMPTS = 200
SAME = 1e-3
"""Within which two points are the same, in world units. A point is known to some 2e-6 (float32 at coordinates up to 10), the
ray through its pixel too; on a surface seen at an angle a from grazing that becomes 2e-6 / tan(a), 1e-3 at a tenth of a
degree, while the thinnest part of any shape is 0.03 wide."""


@dataclass
class Clips:
    """A batch of N clips: the scenes with which they start, motion (N,) long, index into MOTIONS, amount (N,), and frames F.

    `start` also holds the camera before it moves, and so the light.
    """

    start: Scenes
    motion: Tensor
    amount: Tensor
    frames: int

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: int | slice | Tensor) -> Clips:
        """The clips of a slice, an index tensor or a mask; a single number gives a batch of one."""
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 or None)
        return Clips(self.start[rows], self.motion[rows], self.amount[rows], self.frames)

    def to(self, device: torch.device | str) -> Clips:
        """The same clips on another device."""
        return Clips(self.start.to(device), self.motion.to(device), self.amount.to(device), self.frames)

    def states(self) -> tuple[Scenes, Camera]:
        """The scenes and the cameras of all frames, N F of each, clip after clip."""
        rows = torch.arange(len(self), device=self.amount.device).repeat_interleave(self.frames)
        s = torch.linspace(0, 1, self.frames, device=self.amount.device).repeat(len(self))
        return _state(self[rows], s)


@dataclass
class RenderedClips:
    """What the cameras of N clips of F frames see.

    rgb (N, F, 3, H, W) in [-1, 1]; depth, segmentation (N, F, 1, H, W) as in `Rendered`. flow (N, F - 1, 2, H, W): by how
    many pixels, to the right and down, what is seen at the centre of a pixel has moved in the next frame. visible
    (N, F - 1, 1, H, W) bool: whether it is still seen there.
    """

    rgb: Tensor
    depth: Tensor
    segmentation: Tensor
    flow: Tensor
    visible: Tensor


def _state(clips: Clips, s: Tensor) -> tuple[Scenes, Camera]:
    """Each clip at a time s (N,) of its own."""
    start, amount = clips.start, clips.amount

    def of(motion: int) -> Tensor:
        return torch.where(clips.motion == motion, amount, 0.0)

    a = torch.deg2rad(start.azimuth)
    hop = (HOPS * s) % 1
    path = torch.stack((-a.sin() * of(SLIDE) * s, a.cos() * of(SLIDE) * s, of(BOUNCE) * 4 * hop * (1 - hop)), -1)
    position, yaw = start.position.clone(), start.yaw.clone()
    position[:, 0] += path
    yaw[:, 0] += of(SPIN) * s
    azimuth, distance = start.azimuth + of(ORBIT) * s, start.distance * (-of(ZOOM) * s).exp()
    view = camera(dataclasses.replace(start, azimuth=azimuth, distance=distance))
    right, up, back = view.axes.unbind(1)
    roll, pan = torch.deg2rad(of(ROLL) * s)[:, None], torch.deg2rad(of(PAN) * (s - 0.5))[:, None]
    axes = torch.stack((roll.cos() * right - roll.sin() * up, roll.cos() * up + roll.sin() * right, back), 1)
    axes = torch.stack(turn(axes.unbind(-1), pan.cos(), pan.sin()), -1)
    return dataclasses.replace(start, position=position, yaw=yaw), Camera(view.eye, axes, view.fov)


def draw_clips(
    n: int,
    seed: int,
    motion: str | None = None,
    objects: int | tuple[int, ...] = 1,
    split: str = "train",
    frames: int = 8,
    first: int = 0,
) -> Clips:
    """Draw the clips first, ..., first + n - 1 of a seed: scenes as `draw` draws them, each with a motion, or all with `motion`.

    All objects stay inside the picture and apart, and a relation that a slide would change is kept. Only shapes whose turns
    can be seen spin. A scene without room for its motion is drawn again. Clip i depends on (seed, i), `motion`, `objects`
    and `split`, neither on n nor on frames. Raises ValueError for an unknown motion, for frames < 1 and as `draw` does.
    """
    if motion is not None and motion not in MOTIONS:
        raise ValueError(f"motion = {motion!r}; expected None or one of {', '.join(MOTIONS)}")
    if frames < 1:
        raise ValueError(f"frames = {frames}; expected at least one")
    index = torch.arange(first, first + n)
    if motion is None:
        kind = (uniforms(seed, index, 1, FIRST_STREAM)[:, 0] * len(MOTIONS)).long()
    else:
        kind = torch.full((n,), MOTIONS.index(motion))
    clips = Clips(draw_scenes(n, seed, objects, split, first), kind, torch.zeros(n), frames)
    left = torch.arange(n)
    for attempt in range(ATTEMPTS):
        again = seed + (attempt << 40)  # the first attempt starts from the scenes that `draw` gives for this seed
        tried = Clips(draw_scenes(n, again, objects, split, first)[left], kind[left], torch.zeros(len(left)), frames)
        fits = _plan(tried, uniforms(again, index[left], 3, FIRST_STREAM + 1))
        _put(clips, left[fits], tried[fits])
        left = left[~fits]
        if not len(left):
            return clips
    raise ValueError(f"motion = {MOTIONS[kind[left[0]]]!r} found no room in {ATTEMPTS} scenes of objects = {objects!r}")


def _put(clips: Clips, rows: Tensor, other: Clips) -> None:
    for field in dataclasses.fields(Scenes):
        getattr(clips.start, field.name)[rows] = getattr(other.start, field.name)
    clips.amount[rows] = other.amount


def _plan(clips: Clips, u: Tensor) -> Tensor:
    """Give clips their amounts from u (N, 3), and move what has to start elsewhere; returns where that fits, (N,) bool."""
    start, motion = clips.start, clips.motion
    share, place = (u[:, i].float() for i in (0, 2))
    sign = torch.where(u[:, 1] < 0.5, -1.0, 1.0)
    low, high = torch.tensor([AMOUNTS.get(name, (0.0, 0.0)) for name in MOTIONS])[motion].unbind(-1)
    amount = sign * (low + (high - low) * share)

    x, lowest, highest = _way(start)
    length = (highest - lowest) * (0.6 + 0.4 * share)
    begin = lowest + (highest - lowest - length) * place + torch.where(sign < 0, length, 0.0)
    a = torch.deg2rad(start.azimuth)
    aside = torch.where(motion == SLIDE, begin - x, 0.0)
    start.position[:, 0, :2] += aside[:, None] * torch.stack((-a.sin(), a.cos()), -1)
    amount = torch.where(motion == SLIDE, sign * length, amount)

    height = _height(start) * (0.6 + 0.4 * share)
    amount = torch.where(motion == BOUNCE, height, amount)
    start.distance *= torch.where(motion == ZOOM, amount.clamp(min=0), 0.0).exp()  # a zoom in ends at the usual distance

    clips.amount = amount
    fits = (motion != SLIDE) | (length > LEAST["slide"])
    fits &= (motion != BOUNCE) | (height > LEAST["bounce"])
    fits &= (motion != SPIN) | ~torch.isin(start.shape[:, 0], torch.tensor(ROUND))
    for s in torch.linspace(0, 1, 9):
        fits &= (margins(*_state(clips, s.expand(len(clips)))) > -1e-5).all(1)  # a slide may end at the very edge
    return fits


def _way(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor]:
    """Where object 0 is sideways for the camera, and between which places it may slide; (N,) world units each."""
    f, x = math.radians(FIELD_OF_VIEW / 2), seen(scenes, camera(scenes))
    edge = (-x[:, 0, 2] * math.sin(f) - scenes.scale[:, 0]) / math.cos(f)
    low, high = -edge, edge
    if scenes.shape.shape[1] > 1:
        relation, other, apart = relations(scenes), x[:, 1, 0], 1.05 * scenes.scale.sum(1)
        between = scenes.position[:, 0, :2] - scenes.position[:, 1, :2]
        a = torch.deg2rad(scenes.azimuth)
        depth = (between[:, 0] * a.cos() + between[:, 1] * a.sin()).abs()
        nearby = torch.where(relation == ON_TOP, ON_SUPPORT, 0.95 * depth)  # further aside it were left or right of the other
        bounded = (relation >= 0) & (relation != LEFT) & (relation != RIGHT)
        low = torch.where(bounded, torch.maximum(low, other - nearby), low)
        high = torch.where(bounded, torch.minimum(high, other + nearby), high)
        low = torch.where(relation == RIGHT, torch.maximum(low, other + apart), low)
        high = torch.where(relation == LEFT, torch.minimum(high, other - apart), high)
    return x[:, 0, 0], low, high


def _height(scenes: Scenes) -> Tensor:
    """How high object 0 may rise until its ball touches the edge of the picture: (N,) world units, at most 1."""
    view, f = camera(scenes), math.radians(FIELD_OF_VIEW / 2)
    x, y, z = seen(scenes, view)[:, 0].unbind(-1)
    slack = -z * math.sin(f) - scenes.scale[:, 0]
    _, up, nearer = view.axes[:, :, 2].unbind(-1)  # where a step upward leads in the frame of the camera
    above = (slack - y * math.cos(f)) / (nearer * math.sin(f) + up * math.cos(f))
    aside = (slack - x.abs() * math.cos(f)) / (nearer * math.sin(f)).clamp(min=1e-6)
    return torch.minimum(above, aside).clamp(max=1.0)


def render_clips(clips: Clips, size: int = 64, samples: int = 2) -> RenderedClips:
    """Draw clips at size x size pixels, with the flow from each frame to the next.

    Raises ValueError for a size and samples that `render` does not take.
    """
    chunk = max(1, RAYS // (clips.frames * size**2))
    with torch.no_grad():
        pieces = [_render(clips[i : i + chunk], size, samples) for i in range(0, max(len(clips), 1), chunk)]
    names = [field.name for field in dataclasses.fields(RenderedClips)]
    return RenderedClips(**{name: torch.cat([getattr(piece, name) for piece in pieces]) for name in names})


def _render(clips: Clips, size: int, samples: int) -> RenderedClips:
    scenes, view = clips.states()
    seen = render(scenes, size, samples, view)
    count, frames = len(clips), clips.frames
    here = torch.arange(count * frames, device=clips.amount.device).view(count, frames)[:, :-1].flatten()
    flow, visible = _flow(scenes, view, seen.depth, seen.segmentation, here, size)

    def clip(x: Tensor, length: int) -> Tensor:
        return x.unflatten(0, (count, length))

    rgb, depth, segmentation = (clip(x, frames) for x in (seen.rgb, seen.depth, seen.segmentation))
    return RenderedClips(rgb, depth, segmentation, clip(flow, frames - 1), clip(visible, frames - 1))


def _flow(scenes: Scenes, view: Camera, depth: Tensor, thing: Tensor, here: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Flow (M, 2, H, W) from the frames `here` (M,) to those that follow, and visibility (M, 1, H, W).

    Each pixel's point p is carried by its object, p' = R(yaw' - yaw) (p - position) + position', and projected by the
    next camera; the background is infinitely far, so only its direction counts. The point is seen if the ray of the next
    camera to it ends there.
    """
    after, things = here + 1, thing[here].flatten(1)
    old, new = (Camera(view.eye[rows], view.axes[rows], view.fov) for rows in (here, after))
    p = old.unproject(depth[here])
    moved = torch.where((things == -1)[..., None], p - old.eye[:, None] + new.eye[:, None], p)
    for k in range(scenes.shape.shape[1]):
        spin = torch.deg2rad(scenes.yaw[after, k] - scenes.yaw[here, k])[:, None]
        offset = p - scenes.position[here, None, k]
        turned = torch.stack(turn(offset.unbind(-1), spin.cos(), -spin.sin()), -1)
        moved = torch.where((things == k + 1)[..., None], turned + scenes.position[after, None, k], moved)
    pixels, ahead = new.project(moved, size)
    flow = pixels - centres(size, p.device)

    stage, inside = stage_of(scenes[after], new), ((pixels >= 0) & (pixels <= size)).all(-1) & (ahead > 0)
    m, at = inside.nonzero().unbind(-1)
    hits = cast(stage, m, split(new.directions(m, pixels[m, at], size)))
    aim = things[m, at]
    near = (hits.t - (moved - new.eye[:, None])[m, at].norm(dim=-1)).abs() < SAME
    visible = torch.zeros_like(inside)
    visible[m, at] = (hits.thing == aim) & (near | (aim < 0))

    def picture(x: Tensor) -> Tensor:
        return x.unflatten(1, (size, size)).movedim(-1, 1)

    return picture(flow), picture(visible[..., None])
