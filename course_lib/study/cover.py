"""The pictures of the README, made by the embedded models: digits that come out of noise, and a gallery of the scene world."""

from __future__ import annotations

from pathlib import Path

import torch

from course_lib import zoo
from course_lib.devices import SampleNoise
from course_lib.sample import Trajectory, sample
from course_lib.study.pictures import png, strip
from course_lib.training import write_atomically
from course_lib.worlds import scenes
from course_lib.zoo import judge_scenes
from course_lib.zoo.recipes.digits import grid

SHOWN = (0, 26, 32, 35, 39, 50)  # of 50 steps; the shape is decided between the second and the fourth

ASKED = (
    "a large red mug on grass, seen from the front",
    "a small cyan snowman on a checkered floor",
    "a large yellow house on sand, lit from the left",
    "a large blue car on grey ground, seen from the left",
    "a small green cube on white ground",
    "a large orange cylinder on a checkered floor, lit from the right",
    "a small pink cone in front of a large purple sphere on grass",
    "a small yellow sphere on top of a large blue cube on sand",
)
GUIDANCE = 3.0


def draw(path: Path, seed: int = 4) -> Path:
    """Sample the digits 0 to 9 and show each at six noise levels, scaled to unit variance; writes a PNG."""
    D, sigmas = zoo.load("digits", device="cpu").given(label=torch.arange(10)), grid()
    x = SampleNoise(seed).start((10, 1, 16, 16), sigmas[0])
    record = Trajectory(x, sigmas[0])
    sample(D, x, sigmas, on_step=record)
    rows = [list(record.x[k] / (1 + record.sigmas[k] ** 2) ** 0.5) for k in SHOWN]
    figure = strip(rows, row_titles=[rf"$\sigma$ = {record.sigmas[k]:.2g}" for k in SHOWN], scale=5)
    data = png(figure)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return path


def gallery(path: Path, seed: int = 3) -> Path:
    """Pictures that mini-sd makes of the sentences ASKED, above scenes of the world with their exact maps; writes a PNG."""
    made = judge_scenes.generate(zoo.load("mini-sd", device="cpu"), ASKED, GUIDANCE, seed)
    world = scenes.render(scenes.draw(len(ASKED), seed=5, objects=(1, 2)), size=128)
    depth = 1 - 2 * (world.depth.clamp(2, 9) - 2) / 7
    lines = scenes.edges(world.depth, world.normal, world.segmentation)
    rows = {
        "from a sentence": made.repeat_interleave(2, 2).repeat_interleave(2, 3),
        "the world": world.rgb,
        "depth": depth.expand(-1, 3, -1, -1),
        "normals": world.normal,
        "edges": (1 - 2 * lines.float()).expand(-1, 3, -1, -1),
    }
    data = png(strip([list(row) for row in rows.values()], row_titles=list(rows), scale=1))
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return path
