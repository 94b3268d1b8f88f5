"""The picture at the head of the README: ten digits that come out of noise, made by the embedded model."""

from __future__ import annotations

from pathlib import Path

import torch

from course_lib import zoo
from course_lib.devices import SampleNoise
from course_lib.sample import Trajectory, sample
from course_lib.study.pictures import png, strip
from course_lib.training import write_atomically
from course_lib.zoo.recipes.digits import grid

SHOWN = (0, 26, 32, 35, 39, 50)  # of 50 steps; the shape is decided between the second and the fourth


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
