"""What moves in a clip, read from its frames alone: the motion word, its direction and its amount.

Each of the seven motions predicts, up to its amount, where every point of a frame is in a later one. The word whose
prediction leaves the least difference fits best; the explained share says how much of the change between frames it
accounts for. So the camera's motions are told by how the whole picture moves, those of the object by how its mask moves.

Three readings help where a prediction cannot. A reader's azimuth of shapes with a front tells how far they turn, and so
a spin from an orbit. The straightness of a clip tells whether its frames follow one another. Pan and slide look alike on an
even ground; over several frames the object shows another side only in a slide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.worlds.scenes.attributes import FIELD_OF_VIEW, ORIENTED, SHAPES
from course_lib.worlds.scenes.camera import centres
from course_lib.worlds.scenes.clip_captions import direction
from course_lib.worlds.scenes.clips import BOUNCE, HOPS, MOTIONS, ORBIT, PAN, ROLL, ROUND, SLIDE, SPIN, ZOOM
from course_lib.worlds.scenes.maps import NEAR
from course_lib.worlds.scenes.sampling import DISTANCES, ELEVATIONS

SPANS = {SLIDE: (0.3, 1.8), BOUNCE: (0.2, 1.0), SPIN: (110, 250), ORBIT: (25, 80), ZOOM: (0.2, 0.5), ROLL: (18, 48), PAN: (5, 17)}
"""Amounts that are tried, of both signs but for a bounce: those of the world and some 10 % more."""
TRIED = 6
"""Amounts of each sign on the first lattice; two finer ones follow."""
STANDS = sum(DISTANCES[1]) / 2
"""Distance of the camera from what it looks at, in world units, in a clip of one object."""
SKY = 100.0
BLUR = 1.0
"""Deviation in pixels of the Gaussian that smooths frames: below it, differences tell of sampling and not of motion."""
EVERY = 2
"""Frames are compared at every second pixel of each row and column: smoothed ones hold no more."""
RELIEF = 0.6
"""Slope of the true relief of an object on the one that is read: what is read errs, so it counts for less."""
LEAST_PIXELS = 12
"""Fewer pixels of an object than these have no shape."""
EXPLAINED = 0.4
"""Share of the change between frames that a bounce must explain, and any motion of which the azimuth says otherwise."""
STRAIGHT = 0.65
"""Above this `straightness` frames are in no order: true clips have 0.33 to 0.61, shuffled ones 0.67 to 1.45."""
RETURNS = 0.55
"""Straightness above which a cube spins: it looks the same after each quarter of a turn, which no orbit reaches."""
TURNING = 97.0
"""Degrees between an orbit, 75 at most, and a spin, 120 at least."""
TURNED = 20.0
"""Degrees from which a shape with a front counts as turned; a slide and a pan show up to 16 more of a side."""
REGULAR = 0.9
"""Least resultant of azimuths about a steady turn: true turns have 0.97 to 1, shuffled spins 0.4 to 0.8."""
HANDICAP = 0.027
"""A pan of a degrees must be 1 + HANDICAP |a| times better than a slide: a relief misread costs a slide the more it moves."""


class Maps(Protocol):
    """Reads `classes` (N, H, W) and `nearness` (N, 1, H, W) of pictures, as `zoo.load("scenes-maps")` does."""

    def read(self, pictures: Tensor) -> Any: ...


class Reader(Protocol):
    """Returns logits `shape` (N, 2, 8) and `azimuth` (N, 2, 2) of pictures, as `zoo.load("scenes-reader")` does."""

    def logits(self, pictures: Tensor) -> dict[str, Tensor]: ...


@dataclass
class Motions:
    """What moves in N clips: word, one of MOTIONS or "" where none fits; direction as captions name it; amount, explained (N,).

    amount is in the units of `worlds.scenes.clips`, 0 where no motion fits. explained is 1 - C / C_0, the share of the mean
    difference C_0 between neighbouring frames that is gone once the motion is undone, -inf where nothing changes.
    """

    word: list[str]
    direction: list[str]
    amount: Tensor
    explained: Tensor


@dataclass
class _Clip:
    """One clip as a scene: frames (F, 3, S, S), points (F, S, S, 3) in the frame of each camera, masks (F, S, S).

    thing marks the object, beside what lies within 3 pixels of it, far what is infinitely far. axis (3,) is the middle of
    the object; ups are the directions in which the world's up may lie; share is the object's share of the picture.
    """

    frames: Tensor
    points: Tensor
    thing: Tensor
    beside: Tensor
    far: Tensor
    axis: Tensor
    ups: list[Tensor]
    share: float


@dataclass
class _Fit:
    """The least cost of a motion, at which amount, and the part of the cost that the object has."""

    cost: float
    amount: float
    of_thing: float


def check(clips: Tensor, least: int = 2) -> Tensor:
    """The clips, where they are (N, F, 3, H, W) with at least `least` frames; else ValueError."""
    if clips.ndim != 5 or clips.shape[2] != 3 or clips.shape[1] < least:
        raise ValueError(f"clips has shape {tuple(clips.shape)}; expected (N, F, 3, H, W) with F >= {least}")
    return clips


def smoothed(x: Tensor, sigma: float = BLUR) -> Tensor:
    """Pictures (..., H, W) after a Gaussian of deviation sigma pixels, cut at 3 sigma; edges are repeated."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = x.reshape(-1, 1, *x.shape[-2:])
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="replicate"), kernel[None, None, None])
    return F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="replicate"), kernel[None, None, :, None]).view_as(x)


def straightness(frames: Tensor, thing: Tensor) -> float:
    """Mean distance of neighbouring frames over that of all pairs of frames, where the object ever is.

    d_kl = mean |x_k - x_l| over pixels that `thing` (F, H, W) marks in any frame; mean_k d_k,k+1 / mean_{k<l} d_kl. A
    straight path of F steady steps gives 3 / (F + 1), frames in random order 1 on average, frames without any change nan.
    """
    x = frames[:, :, thing.any(0)]
    d = (x[:, None] - x[None]).abs().mean((2, 3))
    pairs = torch.triu_indices(len(d), len(d), 1)
    return float(d.diagonal(1).mean() / d[pairs[0], pairs[1]].mean())


def steady_turn(angle: Tensor) -> tuple[Tensor, Tensor]:
    """The turn omega (N,) in degrees over a clip that fits angles (N, F) in degrees best, and its resultant (N,) in [0, 1].

    omega = argmax R(omega), R = |1/F sum_k exp(i (angle_k - omega s_k))| with s_k = k / (F - 1), over whole degrees from -260
    to 260; R is 1 where the turn is exactly steady (Fisher 1993, Ch. 2, on the resultant).
    """
    frames = angle.shape[1]
    turns = torch.arange(-260.0, 261.0)
    left = torch.deg2rad(angle[:, None] - turns[:, None] * torch.linspace(0, 1, frames))  # (N, turns, F)
    resultant = torch.stack([left.cos().mean(-1), left.sin().mean(-1)]).norm(dim=0)
    best, at = resultant.max(1)
    return turns[at], best


@torch.no_grad()
def track(clips: Tensor, maps: Maps, reader: Reader) -> Motions:
    """Read word, direction and amount of the motion of each of the clips (N, F, 3, S, S) in [-1, 1], of one object each.

    A motion m of amount a takes the point that pixel p of frame k shows to pixel p' of frame l, by its definition in
    `worlds.scenes.clips`; its cost is C_m = min_a mean |x_l(p') - x_k(p)|, over neighbouring frames and over pixels that stay in
    the picture and are not hidden. Depth and masks come from `maps`, shape and azimuth from `reader`. The word is that of the
    least cost, corrected as the module says, and "" where frames are in no order or no motion explains their change. S is a
    multiple of 16. Raises ValueError for another shape and for fewer than 4 frames.
    """
    check(clips, 4)
    n, frames, _, height, width = clips.shape
    if height != width or height % 16:
        raise ValueError(f"clips has shape {tuple(clips.shape)}; expected square frames with a side that 16 divides")
    pictures = clips.detach().float().cpu().flatten(0, 1)
    seen, logits = maps.read(pictures), reader.logits(pictures)
    classes, nearness = (part.unflatten(0, (n, frames)) for part in (seen.classes, seen.nearness[:, 0]))
    shape = logits["shape"][:, 0].softmax(-1).unflatten(0, (n, frames)).mean(1).argmax(-1)
    cos, sin = logits["azimuth"][:, 0].unflatten(0, (n, frames)).unbind(-1)
    turn, regular = steady_turn(torch.rad2deg(torch.atan2(sin, cos)))
    found: list[tuple[str, float, float]] = []
    for i, x in enumerate(pictures.unflatten(0, (n, frames))):
        fronted = int(shape[i]) >= SHAPES.index(ORIENTED[0]) and float(regular[i]) >= REGULAR
        clip = _clip(x, classes[i], nearness[i])
        found.append(_read(clip, float(turn[i]) if fronted else None, int(shape[i]) in ROUND))
    words, amounts, explained = zip(*found, strict=True) if found else ((), (), ())
    ways = [direction(word, amount) if word else "" for word, amount in zip(words, amounts, strict=True)]
    return Motions(list(words), ways, torch.tensor(amounts), torch.tensor(explained))


def _read(clip: _Clip, turn: float | None, even: bool) -> tuple[str, float, float]:
    """Word, amount and explained share of one clip.

    `turn` is that of a shape with a front, in degrees, None for others; `even` says that no turn about z can be seen.
    """
    fits = _fits(clip)
    still = _fit(clip, SLIDE, torch.zeros(1), 0.0).cost
    straight = straightness(clip.frames, clip.thing if clip.thing.any() else torch.ones_like(clip.thing))
    if still == 0 or math.isnan(straight):
        return "", 0.0, -math.inf
    explained = {m: 1 - fit.cost / still for m, fit in fits.items()}
    moved = max((m for m in fits if m not in (SPIN, ORBIT)), key=lambda m: explained[m])
    turned = max(explained[SPIN], explained[ORBIT])
    if turn is None:
        turns = turned >= explained[moved]
    else:
        turns = abs(turn) >= TURNED and (turned >= explained[moved] or explained[moved] < EXPLAINED)
        if moved == ROLL and abs(turn) < TURNING:  # an azimuth is misread in a picture that is tilted
            turns = turns and explained[ORBIT] >= explained[ROLL]
    if turns:
        spins = abs(turn) >= TURNING if turn is not None else straight > RETURNS and not even
        motion = SPIN if spins else ORBIT
        sign = -1 if spins else 1  # the azimuth is that of the camera less the yaw of the object
        amount = sign * turn if turn is not None else fits[motion].amount
    else:
        motion = _pan_or_slide(clip, fits) if moved in (PAN, SLIDE) else moved
        amount = fits[motion].amount
    if motion == BOUNCE:
        ordered = explained[BOUNCE] >= EXPLAINED
    elif motion == SPIN:
        ordered = turn is not None or turned >= EXPLAINED / 2
    else:
        ordered = straight <= STRAIGHT
    return (MOTIONS[motion], amount, explained[motion]) if ordered else ("", 0.0, explained[motion])


def _clip(x: Tensor, classes: Tensor, nearness: Tensor) -> _Clip:
    """A clip x (F, 3, S, S) with the classes and the nearness (F, S, S) of its pixels."""
    size = x.shape[-1]
    focal = size / (2 * math.tan(math.radians(FIELD_OF_VIEW) / 2))
    across, down = ((centres(size) - size / 2) / focal).view(size, size, 2).unbind(-1)
    ray = torch.stack([across, -down, -torch.ones_like(across)], -1)
    thing, far = classes > 1, classes == 0
    ups = _ups(-down.expand_as(nearness), nearness, classes == 1)
    depth = torch.where(far, SKY, NEAR / nearness.clamp(min=NEAR / SKY))
    middles = []
    for k, mask in enumerate(thing):
        if mask.sum() < LEAST_PIXELS:
            continue
        edges = torch.tensor([0.02, 0.98])
        (left, right), (top, bottom) = across[mask].quantile(edges), down[mask].quantile(edges)
        radius = max(float(right - left), float(bottom - top)) / 2
        # an object's distance is read worse than its relief, and the world says it: the camera stands STANDS from it
        relief = (depth[k][mask] / depth[k][mask].mean() - 1).clamp(-radius, radius)
        depth[k][mask] = STANDS * (1 + RELIEF * relief)
        middles.append(STANDS * torch.stack([(left + right) / 2, -(top + bottom) / 2, torch.tensor(-1.0)]))
    axis = torch.stack(middles).mean(0) if middles else torch.tensor([0.0, 0.0, -STANDS])
    beside = F.max_pool2d(thing[:, None].float(), 7, 1, 3)[:, 0] > 0
    return _Clip(smoothed(x), ray * depth[..., None], thing, beside, far, axis, ups, float(thing.float().mean()))


def _ups(height: Tensor, nearness: Tensor, ground: Tensor) -> list[Tensor]:
    """Where up may be, for cameras of elevation e: (0, cos e, sin e), each (3,); height is y / -z of each pixel.

    On the ground the inverse depth is (sin e - y cos e) / h, so that its slope and intercept tell e. Without a ground, e
    is one of three that divide ELEVATIONS evenly.
    """
    low, high = ELEVATIONS
    tilts = [low + (high - low) * part for part in (1 / 6, 1 / 2, 5 / 6)]
    if ground.sum() > ground[0].numel() / 4:
        y, inverse = height[ground], nearness[ground]
        slope = ((y - y.mean()) * (inverse - inverse.mean())).mean() / (y - y.mean()).square().mean()
        intercept = inverse.mean() - slope * y.mean()
        tilts = [math.degrees(math.atan2(float(intercept), -float(slope)))]
    return [torch.tensor([0.0, math.cos(e), math.sin(e)]) for e in map(math.radians, tilts)]


def _rotated(X: Tensor, axis: Tensor, angle: Tensor) -> Tensor:
    """X (..., 3) turned about a unit axis (3,) by angles in degrees that broadcast with its points (Rodrigues 1840)."""
    a = torch.deg2rad(angle)[..., None]
    X = X.expand(*torch.broadcast_shapes(X.shape[:-1], a.shape[:-1]), 3)
    return X * a.cos() + torch.linalg.cross(axis.expand_as(X), X) * a.sin() + axis * (X @ axis)[..., None] * (1 - a.cos())


def _moved(clip: _Clip, motion: int, rows: Tensor, amount: Tensor, up: Tensor, thing: Tensor) -> Tensor:
    """Where the points of frames `rows` (K,) go, (A, K, S, S, 3), by amounts (A, K, 1, 1) that fall to each pair of frames."""
    X, far, thing = (part[rows][:, ::EVERY, ::EVERY] for part in (clip.points, clip.far, thing))
    far, thing = far[..., None], thing[..., None]
    right, back = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    if motion == SLIDE:
        return torch.where(thing, X + amount[..., None] * right, X)
    if motion == BOUNCE:
        return torch.where(thing, X + amount[..., None] * up, X)
    if motion == SPIN:
        return torch.where(thing, clip.axis + _rotated(X - clip.axis, up, amount), X)
    if motion == ORBIT:
        target = torch.where(far, 0.0, -STANDS * back)  # what is infinitely far only turns
        return target + _rotated(X - target, up, -amount)
    if motion == ZOOM:
        return torch.where(far, X, X + STANDS * (1 - (-amount[..., None]).exp()) * back)
    return _rotated(X, back if motion == ROLL else up, amount)


def _costs(clip: _Clip, motion: int, amounts: Tensor, up: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Mean |x_l(p') - x_k(p)| of the picture and of the object, (A,) each, with l = k + stride."""
    frames, size = len(clip.frames), clip.frames.shape[-1]
    focal = size / (2 * math.tan(math.radians(FIELD_OF_VIEW) / 2))
    k = torch.arange(frames - stride)
    hop = (HOPS * torch.linspace(0, 1, frames)) % 1
    height = 4 * hop * (1 - hop)
    parts = height[k + stride] - height[k] if motion == BOUNCE else torch.full((len(k),), stride / (frames - 1))
    amount = (amounts[:, None] * parts)[..., None, None]
    before = clip.frames[k][..., ::EVERY, ::EVERY]
    after = torch.cat([clip.frames, clip.beside[:, None].float()], 1)[k + stride]

    def difference(to: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = (-to[..., 2:]).clamp(min=0.1)
        at = to[..., :2] / z * torch.tensor([1.0, -1.0]) * (2 * focal / size)  # the picture is [-1, 1] along each axis
        rows = at.transpose(0, 1).flatten(1, 2)  # all amounts look into the same frame: (K, A S, S, 2)
        found = F.grid_sample(after, rows, padding_mode="border", align_corners=False)
        found = found.unflatten(2, at.shape[:1] + at.shape[2:3]).movedim(2, 0)  # (A, K, 4, S, S)
        return (found[:, :, :3] - before).abs().mean(2), (at.abs() <= 1).all(-1), found[:, :, 3] > 0.05

    to = _moved(clip, motion, k, amount, up, clip.thing)
    apart, inside, covered = difference(to)
    thing, beside = (mask[k][:, ::EVERY, ::EVERY] for mask in (clip.thing, clip.beside))
    if motion == SLIDE:  # the shadow goes with the object, so that ground may do either
        apart = torch.minimum(apart, difference(_moved(clip, motion, k, amount, up, ~clip.far))[0])
    visible = thing & inside
    if motion in (SPIN, ORBIT):  # what turns to the other side of the object is hidden
        middle = clip.axis if motion == SPIN else torch.tensor([0.0, 0.0, -STANDS])
        outward = clip.points[k][:, ::EVERY, ::EVERY] - middle
        outward = outward - (outward @ up)[..., None] * up
        visible = visible & ((_rotated(outward, up, amount if motion == SPIN else -amount) * -to).sum(-1) > 0)
    ground = ~beside & inside & ~covered  # around an object lie its shadow and what it hides

    def mean(where: Tensor) -> Tensor:
        return (apart * where).flatten(1).sum(1) / where.flatten(1).sum(1).clamp(min=1)

    of_thing = mean(visible)
    return clip.share * of_thing + (1 - clip.share) * mean(ground), of_thing


def _fit(clip: _Clip, motion: int, amounts: Tensor, step: float, finer: int = 0, stride: int = 1) -> _Fit:
    """The best of these amounts, and of `finer` lattices around it, each of a third of the step, for any of the ups."""
    best = None
    for up in clip.ups if motion in (BOUNCE, SPIN, ORBIT, PAN) else clip.ups[:1]:
        tried = amounts
        cost, of_thing = _costs(clip, motion, tried, up, stride)
        at = int(cost.argmin())
        for level in range(finer):
            tried = tried[at] + step / 3 ** (level + 1) * torch.tensor([-1.0, 0.0, 1.0])
            cost, of_thing = _costs(clip, motion, tried, up, stride)
            at = int(cost.argmin())
        if best is None or float(cost[at]) < best.cost:
            best = _Fit(float(cost[at]), float(tried[at]), float(of_thing[at]))
    assert best is not None
    return best


def _fits(clip: _Clip) -> dict[int, _Fit]:
    """How well each motion explains the change between neighbouring frames."""
    fits = {}
    for motion, (low, high) in SPANS.items():
        amounts = torch.linspace(low, high, TRIED)
        both = amounts if motion == BOUNCE else torch.cat([-amounts, amounts])
        fits[motion] = _fit(clip, motion, both, (high - low) / (TRIED - 1), 2)
    return fits


def _pan_or_slide(clip: _Clip, fits: dict[int, _Fit]) -> int:
    """Which of the two, by the object's difference between frames half a clip apart."""
    stride, cost = len(clip.frames) // 2, {}
    for motion, step in ((SLIDE, 0.1), (PAN, 1.0)):
        near = fits[motion].amount + step * torch.tensor([-1.0, 0.0, 1.0])
        cost[motion] = _fit(clip, motion, near, step, 2, stride).of_thing
    factor = 1 + HANDICAP * abs(fits[PAN].amount)
    return PAN if factor * cost[PAN] < cost[SLIDE] else SLIDE


def shares(found: Motions, words: Sequence[str], ways: Sequence[str]) -> dict[str, float]:
    """Share of clips whose word is right, and whose word and direction are. Raises ValueError where the numbers differ."""
    if not len(found.word) == len(words) == len(ways):
        raise ValueError(f"found has {len(found.word)} clips, words {len(words)} and ways {len(ways)}; expected as many of each")
    word = [a == b for a, b in zip(found.word, words, strict=True)]
    both = [a and b == c for a, b, c in zip(word, found.direction, ways, strict=True)]
    return {"word": sum(word) / max(len(word), 1), "direction": sum(both) / max(len(both), 1)}
