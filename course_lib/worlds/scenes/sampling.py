"""Drawing scenes: what is in them, which combinations are held out, and where the objects stand.

The i-th scene of a seed is a function of (seed, i) alone. One generator per scene would take several times as long as
all the rest, so the numbers come from a counter-based hash of (seed, i, stream), computed for all scenes at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from course_lib.worlds.scenes.attributes import (
    COLOURS,
    FIELD_OF_VIEW,
    GROUNDS,
    LIGHTS,
    ORIENTED,
    RELATIONS,
    SHAPES,
    SIZES,
    SUPPORTS,
    Scenes,
)
from course_lib.worlds.scenes.camera import Camera, camera
from course_lib.worlds.scenes.solids import FOOT

SPLITS = ("train", "held out")
DISTANCES = {1: (3.5, 3.7), 2: (5.2, 5.4)}
"""From how far the camera looks, by the number of objects: near enough that one fills a third of the picture or more."""
ELEVATIONS = (10.0, 40.0)
SMALL, LARGE = (list(SIZES).index(name) for name in ("small", "large"))
LEFT, RIGHT, FRONT, BEHIND, ON_TOP = range(len(RELATIONS))

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, odd: steps of this size visit every 64-bit number."""


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return (x + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # torch shifts the sign in; the mask takes it out again


def mix(x: Tensor) -> Tensor:
    """Scatter the 64 bits of each number: the finaliser of SplitMix64, a bijection (Steele, Lea and Flood 2014, Fig. 17).

    x <- (x ^ x >> 30) c1;  x <- (x ^ x >> 27) c2;  x ^ x >> 31, modulo 2^64. int64 of any shape -> the same.
    """
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def uniforms(seed: int, index: Tensor, streams: int, first: int = 0) -> Tensor:
    """Numbers in [0, 1) that depend on (seed, index, stream) alone: index (N,) long -> (N, streams) float64.

    u = mix(mix(mix(seed g) + index g) + stream g) / 2^64, cut to 53 bits, with g = GOLDEN and stream = first, ...
    A purpose of its own takes streams of its own. Raises ValueError where `seed` is not a whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed = {seed!r}; expected a whole number")
    g = _signed(GOLDEN)
    key = mix(torch.tensor(_signed(seed * GOLDEN)))
    row = mix(key + index.long() * g)
    bits = mix(row[:, None] + torch.arange(first, first + streams, device=index.device) * g)
    return _shifted(bits, 11).double() * 2.0**-53


def held_out(shape: Tensor, colour: Tensor, size: Tensor) -> Tensor:
    """Whether a combination is kept from training: shape + colour = 0 modulo 8, at either size. Long -> bool, alike.

    So one shape of each colour, and one colour of each shape, is never seen in training, 16 of 128 combinations; each
    shape, colour and size on its own is seen seven times as often as it is held out. `size` has no say: a model
    that has seen the small one has seen the combination.
    """
    return ((shape + colour) % len(SHAPES) == 0) & (size >= 0)


def combinations(split: str = "train") -> Tensor:
    """All (shape, colour, size) of a split, as rows of indices: (112, 3) for "train", (16, 3) for "held out", long.

    Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}; expected 'train' or 'held out'")
    rows = torch.cartesian_prod(*(torch.arange(len(values)) for values in (SHAPES, COLOURS, SIZES)))
    return rows[held_out(*rows.unbind(-1)) == (split == "held out")]


def _pick(u: Tensor, rows: Tensor) -> Tensor:
    return rows[(u * len(rows)).long()]


def _between(u: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return low + (high - low) * u


def draw(n: int, seed: int, objects: int | tuple[int, ...] = 1, split: str = "train", first: int = 0) -> Scenes:
    """Draw the scenes first, ..., first + n - 1 of a seed: all attributes uniform, objects apart and inside the picture.

    objects is 1, 2 or both, (1, 2), each equally likely. With two, object 0 stands in one of RELATIONS to object 1; they
    differ in shape, colour or size, and neither hides the other's centre. What stands on top is small, and below it is a
    large cube or cylinder. The combinations (shape, colour, size) come from `split`, see `held_out`. Scene i depends on
    (seed, i), `objects` and `split`, not on n. Raises ValueError for negative n or first, for other numbers of objects
    and for another split.
    """
    counts = (objects,) if isinstance(objects, int) else tuple(objects)
    if not counts or not set(counts) <= {1, 2}:
        raise ValueError(f"objects = {objects!r}; expected 1, 2 or (1, 2)")
    if n < 0 or first < 0:
        raise ValueError(f"n = {n} and first = {first}; expected numbers >= 0")
    rows = combinations(split)
    u = uniforms(seed, torch.arange(first, first + n), 16).unbind(-1)
    two = _pick(u[0], torch.tensor(counts)) == 2
    relation = _pick(u[1], torch.arange(len(RELATIONS)))
    stacked = two & (relation == ON_TOP)

    a = (u[2] * len(rows)).long()
    b = (a + 1 + (u[3] * (len(rows) - 1)).long()) % len(rows)  # any combination but a
    flat = (rows[:, :1] == torch.tensor([SHAPES.index(name) for name in SUPPORTS])).any(-1)
    upper = _pick(u[2], rows[rows[:, 2] == SMALL])
    lower = _pick(u[3], rows[flat & (rows[:, 2] == LARGE)])
    kinds = torch.where(stacked[:, None, None], torch.stack([upper, lower], 1), rows[torch.stack([a, b], 1)])
    kinds[~two, 1] = -1

    azimuth = 360 * u[4]
    near, far = torch.tensor([DISTANCES[1], DISTANCES[2]], dtype=torch.float64)[two.long()].unbind(-1)
    scenes = Scenes(
        *(kinds[..., i].contiguous() for i in range(3)),
        position=torch.zeros(n, 2, 3),
        yaw=(360 * torch.stack([u[5], u[6]], 1) * (kinds[..., 0] >= 0)).float(),
        ground=(u[7] * len(GROUNDS)).long(),
        light=(u[8] * len(LIGHTS)).long(),
        azimuth=azimuth.float(),
        elevation=_between(u[9], *ELEVATIONS).float(),
        distance=_between(u[10], near, far).float(),
    )
    offset = _offset(scenes, relation, u[11], u[12])
    middle = _between(torch.stack([u[13], u[14]], -1), -0.1, 0.1)
    right, away = _axes(azimuth)
    for k, sign in ((0, 0.5), (1, -0.5)):
        x = middle + sign * offset * (two & ~stacked)[:, None]
        scenes.position[:, k, :2] = (x[:, :1] * right + x[:, 1:] * away).float()
    heights = torch.tensor([SUPPORTS.get(name, 0.0) for name in SHAPES])
    scenes.position[:, 0, 2] = torch.where(stacked, heights[scenes.shape[:, 1]] * scenes.scale[:, 1], 0.0)
    scenes.position[~two, 1] = 0.0
    return scenes


def _axes(azimuth: Tensor) -> tuple[Tensor, Tensor]:
    """To the right of the viewer and away from them, along the ground: (N,) degrees -> two of (N, 2)."""
    a = torch.deg2rad(azimuth)
    return torch.stack([-a.sin(), a.cos()], -1), -torch.stack([a.cos(), a.sin()], -1)


def _offset(scenes: Scenes, relation: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """From object 1 to object 0, (N, 2): to the right of the viewer and away from them, world units.

    Beside one another: 1.1 to 1.2 of the sum of the radii apart, at nearly the same depth. One behind the other: the
    one in front is moved aside by 1.3 to 1.4 of its radius, so that the ball around it does not hide the other's centre.
    """
    radii = scenes.scale.double()
    total = radii.sum(1)
    aside = _between(u, 1.1, 1.2) * total
    beside = torch.stack([torch.where(relation == LEFT, -aside, aside), _between(v, -0.2, 0.2) * total], -1)
    in_front = torch.where(relation == FRONT, radii[:, 0], radii[:, 1])
    shift = _between(u, 1.3, 1.4) * in_front
    depth = torch.maximum(1.15 * total, 1.5 * shift)
    side = torch.where(v < 0.5, -shift, shift)
    along = torch.stack([side, torch.where(relation == FRONT, -depth, depth)], -1)
    return torch.where((relation < FRONT)[:, None], beside, along)


def relations(scenes: Scenes) -> Tensor:
    """What object 0 is to object 1 for the viewer: index into RELATIONS, -1 where there is one object. (N,) long.

    On top where it stands higher; else the larger of the two offsets, sideways or in depth, decides. Raises ValueError
    where object 1 stands on object 0, or where there is room for more than two objects.
    """
    if scenes.shape.shape[1] == 1:
        return torch.full_like(scenes.ground, -1)
    if scenes.shape.shape[1] > 2:
        raise ValueError(f"scenes have room for {scenes.shape.shape[1]} objects; expected one or two")
    two = scenes.present.all(1)
    offset = scenes.position[:, 0] - scenes.position[:, 1]
    if bool((two & (offset[:, 2] < 0)).any()):
        row = int((two & (offset[:, 2] < 0)).nonzero()[0])
        raise ValueError(f"position[{row}] puts object 1 above object 0; expected the upper object first")
    right, away = ((offset[:, :2] * axis).sum(-1) for axis in _axes(scenes.azimuth))
    sideways = torch.where(right < 0, LEFT, RIGHT)
    depth = torch.where(away < 0, FRONT, BEHIND)
    found = torch.where(offset[:, 2] > 0, ON_TOP, torch.where(right.abs() > away.abs(), sideways, depth))
    return torch.where(two, found, -1)


def views(scenes: Scenes) -> Tensor:
    """The side of each object that the camera sees: index into VIEWS, -1 for shapes without a front. (N, K) long.

    round((azimuth - yaw) / 90) modulo 4. Left and right are the object's own; each side covers a quarter of the turn.
    """
    side = ((scenes.azimuth[:, None] - scenes.yaw) / 90).round().long() % 4
    return torch.where(scenes.shape >= SHAPES.index(ORIENTED[0]), side, -1)


def middles(scenes: Scenes) -> Tensor:
    """Centres of the objects, that is of the balls of radius `scale` around them, in the world: (N, K, 3)."""
    foot = torch.tensor([FOOT[name] for name in SHAPES], device=scenes.shape.device)[scenes.shape]
    return scenes.position + torch.stack([torch.zeros_like(foot)] * 2 + [foot * scenes.scale], -1)


def seen(scenes: Scenes, view: Camera) -> Tensor:
    """The middles of the objects in the frame of the cameras, x right, y up, z towards the viewer: (N, K, 3)."""
    return ((middles(scenes) - view.eye[:, None])[:, :, None] * view.axes[:, None]).sum(-1)


def margins(scenes: Scenes, view: Camera | None = None) -> Tensor:
    """How far the ball around each object is from the edge of a square picture, in world units: (N, K), inf for no object.

    The least distance of the centre (x, y, z), in the frame of the camera, from the four planes through camera and edges,
    less the radius: -z sin(f) - max(|x|, |y|) cos(f) - scale, with f half the field of view. Negative where it is cut.
    `view` are other cameras than those of the scenes.
    """
    x, f = seen(scenes, camera(scenes) if view is None else view), math.radians(FIELD_OF_VIEW / 2)
    least = -x[..., 2] * math.sin(f) - x[..., :2].abs().amax(-1) * math.cos(f) - scenes.scale
    return torch.where(scenes.present, least, math.inf)


def gaps(scenes: Scenes) -> Tensor:
    """The space between two objects that stand on the ground: distance of the feet less both radii, (N,) world units.

    inf where there is one object, or where one stands on the other.
    """
    aside = (scenes.position[:, 0, :2] - scenes.position[:, -1, :2]).norm(dim=-1)
    apart = (relations(scenes) >= 0) & (relations(scenes) != ON_TOP)
    return torch.where(apart, aside - scenes.scale.sum(1), math.inf)
