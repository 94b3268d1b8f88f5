"""Condition maps that no renderer made: drawings stroke by stroke, as a hand draws them, and photographs with their lines.

`sketches` are outlines in a child's perspective, of wavering strokes whose corners overshoot or stay open; nothing of the
scene world's renderer is in them. `photos` are pictures that scikit-image ships.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image
from torch import Tensor

from course_lib.worlds.scenes.attributes import FIELD_OF_VIEW, SHAPES, SIZES
from course_lib.worlds.scenes.sampling import DISTANCES

Point = tuple[float, float]
Line = tuple[Point, ...]

SIDE = 64
"""Pixels of the sheet that is drawn on; strokes are counted in them, the upper left corner is (0, 0)."""
COUNT, SEED = 50, 13
RADIUS = {
    count: {size: SIDE * scale / ((near + far) * math.tan(math.radians(FIELD_OF_VIEW / 2))) for size, scale in SIZES.items()}
    for count, (near, far) in DISTANCES.items()
}
"""Half the size of what is drawn, by how many things are on the sheet: that of the ball around an object of the world, from
its mean distance."""
BRUSHES = (2.0, 3.0)
STEP = 1.0
"""Pixels between the points of a stroke."""
PHOTOS = (
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "rocket.jpg", "motorcycle_left.png", "moon.png",
    "horse.png", "clock_motion.png", "cell.png", "retina.jpg", "hubble_deep_field.jpg", "ihc.png", "page.png", "text.png",
)  # fmt: skip
"""Pictures in scikit-image's own package, which need no network."""


@dataclass(frozen=True)
class Sketch:
    """A drawing: what it shows, from left to right, and the strokes of a pen `brush` pixels thick that it is made of.

    things   (size, shape) of each thing, words of SIZES and SHAPES
    strokes  polylines of points (x, y), in pixels of a sheet SIDE wide
    """

    things: tuple[tuple[str, str], ...]
    strokes: tuple[Line, ...]
    brush: float


class Pen:
    """A hand that draws around a centre (x, y), in units of `radius`, with y downwards and the paper turned a little.

    Each straight line and each arc is a stroke of its own, which wavers, misses its ends, and is sometimes drawn twice.
    """

    def __init__(self, rng: np.random.Generator, centre: Point, radius: float):
        self.rng, self.strokes = rng, []
        angle, mirrored = rng.normal(0, 0.04), rng.choice([-1.0, 1.0])
        stretch = 1 + rng.normal(0, 0.05, 2)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        self.centre, self.frame = np.array(centre), radius * turn * stretch * np.array([mirrored, 1.0])

    def _lay(self, points: np.ndarray) -> None:
        """One stroke through `points` (n, 2), in units of the radius, with the hand's tremor; one in six goes over it again."""
        at = self.centre + points @ self.frame.T
        length = np.hypot(*np.diff(at, axis=0).T).sum()
        n = max(2, math.ceil(length / STEP) + 1)
        along = np.r_[0, np.cumsum(np.hypot(*np.diff(at, axis=0).T))]
        at = np.stack([np.interp(np.linspace(0, along[-1], n), along, part) for part in at.T], 1)
        for again in range(1 + (self.rng.random() < 1 / 6)):
            drift = sum(
                amplitude
                * self.rng.normal(size=2)
                * np.sin(self.rng.uniform(0, 2 * np.pi) + k * np.linspace(0, np.pi, n)[:, None])
                for k, amplitude in ((1, 0.5), (3, 0.35), (7, 0.2))
            )
            shaken = at + drift + again * self.rng.normal(0, 0.8, 2)
            self.strokes.append(tuple((float(x), float(y)) for x, y in shaken.round(2)))

    def _drift(self, n: int) -> np.ndarray:
        """How far the hand is off along a stroke of n points, (n, 2) in pixels: slow waves and a faint tremor."""
        along, off = np.linspace(0, np.pi, n)[:, None], np.zeros((n, 2))
        for k, amplitude in ((1, 0.5), (3, 0.35), (7, 0.2)):
            off += amplitude * self.rng.normal(size=2) * np.sin(self.rng.uniform(0, 2 * np.pi) + k * along)
        return off

    def line(self, *corners: Point) -> None:
        """Straight lines from corner to corner, lifted at each; each runs past its end, or stops short of it."""
        for a, b in zip(np.array(corners)[:-1], np.array(corners)[1:], strict=True):
            beyond = self.rng.normal(0.04, 0.05, 2)  # in units of the radius
            towards = (b - a) / max(float(np.hypot(*(b - a))), 1e-9)
            self._lay(np.stack([a - beyond[0] * towards, b + beyond[1] * towards]))

    def path(self, *corners: Point) -> None:
        """The same without lifting the pen, from the first corner to the last."""
        self._lay(np.array(corners) + self.rng.normal(0, 0.025, (len(corners), 2)))

    def arc(self, centre: Point, across: float, down: float, first: float = 0.0, last: float = 360.0) -> None:
        """Part of an ellipse, angles in degrees clockwise from the right; a whole one seldom meets its own beginning."""
        if last - first >= 360:
            first = self.rng.uniform(0, 360)
            last = first + 360 + self.rng.uniform(-30, 30)
        angle = np.radians(np.linspace(first, last, 40))
        grows = np.linspace(1, 1 + self.rng.normal(0, 0.05), 40)  # a spiral rather than a circle
        self._lay(np.stack([centre[0] + across * grows * np.cos(angle), centre[1] + down * grows * np.sin(angle)], 1))


def _sphere(pen: Pen) -> None:
    pen.arc((0, 0), 1, 1)


def _cube(pen: Pen) -> None:
    draw = pen.line if pen.rng.random() < 0.6 else pen.path
    draw((-0.75, -0.35), (0.4, -0.35), (0.4, 0.8), (-0.75, 0.8), (-0.75, -0.35))
    pen.line((-0.75, -0.35), (-0.3, -0.75), (0.8, -0.75), (0.4, -0.35))
    pen.line((0.8, -0.75), (0.8, 0.35), (0.4, 0.8))


def _cylinder(pen: Pen) -> None:
    pen.arc((0, -0.65), 0.7, 0.2)
    pen.line((-0.7, -0.65), (-0.7, 0.7))
    pen.line((0.7, -0.65), (0.7, 0.7))
    pen.arc((0, 0.7), 0.7, 0.2, 180, 0)


def _cone(pen: Pen) -> None:
    pen.line((-0.8, 0.7), (0, -1.0), (0.8, 0.7))
    pen.arc((0, 0.7), 0.8, 0.22, 180, 0)


def _mug(pen: Pen) -> None:
    pen.arc((-0.15, -0.65), 0.62, 0.18)
    pen.line((-0.77, -0.65), (-0.75, 0.7))
    pen.line((0.47, -0.65), (0.45, 0.7))
    pen.arc((-0.15, 0.7), 0.6, 0.17, 180, 0)
    pen.arc((0.45, 0.0), 0.48, 0.48, -90, 90)
    pen.arc((0.45, 0.0), 0.26, 0.27, -90, 90)


def _house(pen: Pen) -> None:
    draw = pen.line if pen.rng.random() < 0.6 else pen.path
    draw((-0.8, -0.1), (0.1, -0.1), (0.1, 0.8), (-0.8, 0.8), (-0.8, -0.1))
    pen.line((-0.85, -0.1), (-0.35, -0.85), (0.15, -0.1))
    pen.line((-0.35, -0.85), (0.5, -0.85), (0.9, -0.15), (0.1, -0.1))
    pen.line((0.85, -0.15), (0.85, 0.65), (0.1, 0.8))
    pen.path((-0.45, 0.8), (-0.45, 0.35), (-0.2, 0.35), (-0.2, 0.8))


def _car(pen: Pen) -> None:
    pen.line((-1.0, 0.45), (-1.0, 0.0), (-0.6, -0.05), (-0.35, -0.5), (0.35, -0.5), (0.6, -0.05), (1.0, 0.05), (1.0, 0.45))
    pen.line((-1.0, 0.45), (-0.8, 0.45))
    pen.line((-0.3, 0.45), (0.3, 0.45))
    pen.line((0.8, 0.45), (1.0, 0.45))
    pen.arc((-0.55, 0.45), 0.23, 0.23)
    pen.arc((0.55, 0.45), 0.23, 0.23)
    pen.path((-0.5, -0.05), (-0.28, -0.4), (0.28, -0.4), (0.5, -0.05), (-0.5, -0.05))


def _snowman(pen: Pen) -> None:
    pen.arc((0, 0.5), 0.5, 0.45)
    pen.arc((0, -0.08), 0.36, 0.3)
    pen.arc((0, -0.5), 0.24, 0.22)
    pen.line((-0.36, -0.68), (0.36, -0.68))
    pen.path((-0.22, -0.68), (-0.22, -1.0), (0.22, -1.0), (0.22, -0.68))


OUTLINES: dict[str, Callable[[Pen], None]] = {
    "sphere": _sphere, "cube": _cube, "cylinder": _cylinder, "cone": _cone,
    "car": _car, "mug": _mug, "snowman": _snowman, "house": _house,
}  # fmt: skip
"""How each of SHAPES is drawn."""


def sketches(n: int = COUNT, seed: int = SEED) -> list[Sketch]:
    """Drawings 0, ..., n - 1 of a seed: one thing on three sheets of five, two side by side on the others.

    Behind them is a horizon with chance 1/2, under them a line to stand on with chance 1/8. Drawing i depends on (seed, i)
    alone.
    """
    return [_sketch(i, np.random.default_rng([seed, i])) for i in range(n)]


def _sketch(i: int, rng: np.random.Generator) -> Sketch:
    count = 2 if i % 5 in (2, 4) else 1
    shapes = [SHAPES[i % len(SHAPES)], *rng.choice(SHAPES, 1)][:count]
    sizes, foot = rng.choice(["small", "large"], count), rng.uniform(42, 50)
    middles = [32 + rng.normal(0, 2)] if count == 1 else [19 + rng.normal(0, 1.5), 46 + rng.normal(0, 1.5)]
    strokes: list[Line] = []
    ground = rng.random()
    if ground < 5 / 8:
        pen = Pen(rng, (32, rng.uniform(12, 24) if ground < 0.5 else foot + 1), 32)
        pen.line((-1.1, 0), (1.1, 0))
        strokes += pen.strokes
    for shape, size, x in zip(shapes, sizes, middles, strict=True):
        radius = RADIUS[count][size] * rng.uniform(0.92, 1.08)
        pen = Pen(rng, (x, foot - 0.8 * radius), radius)
        OUTLINES[shape](pen)
        strokes += pen.strokes
    things = tuple((str(size), str(shape)) for size, shape in zip(sizes, shapes, strict=True))
    return Sketch(things, tuple(strokes), round(float(rng.uniform(*BRUSHES)), 1))


def ink(sketch: Sketch, side: int = SIDE) -> Tensor:
    """The drawing in white on black, (1, side, side) in [0, 1], as the course's canvas lays ink: clamp(r + 1/2 - d, 0, 1).

    d is the distance from the centre of a pixel to the nearest stroke, r half the brush. Raises ValueError for no pixels.
    """
    if side < 1:
        raise ValueError(f"side = {side}; expected a positive number of pixels")
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) * SIDE / side
    p = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).view(-1, 1, 2)
    away = torch.full((side * side,), math.inf, dtype=torch.float64)
    for line in sketch.strokes:  # one at a time, for memory
        a, b = torch.tensor([line[0], *line[:-1]], dtype=torch.float64), torch.tensor(line, dtype=torch.float64)
        along = ((p - a) * (b - a)).sum(-1) / (b - a).square().sum(-1).clamp_min(1e-12)  # (pixels, segments)
        away = away.minimum((p - a - along.clamp(0, 1)[..., None] * (b - a)).norm(dim=-1).amin(1))
    half = max(sketch.brush * side / SIDE, math.sqrt(2)) / 2
    return (half + 0.5 - away * side / SIDE).clamp(0, 1).view(1, side, side).float()


def photos(side: int = SIDE) -> Tensor:
    """The pictures of PHOTOS, their middle squares, (N, 3, side, side) in [-1, 1]; a grey one in three equal channels.

    Raises ValueError where scikit-image came without one of them.
    """
    folder, found = Path(skimage.__file__).parent / "data", []
    for name in PHOTOS:
        if not (folder / name).exists():
            raise ValueError(f"scikit-image {skimage.__version__} came without {name}; expected it in its folder `data`")
        with Image.open(folder / name) as file:
            picture = file.convert("RGB")
        short = min(picture.size)
        left, top = ((length - short) // 2 for length in picture.size)
        square = picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)
        found.append(torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1))
    return torch.stack(found) / 127.5 - 1
