"""What every solver of inverse problems keeps: samples apart from their batch, the type of x, and a level for each sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from course_lib.devices import SampleNoise
from course_lib.sample import sample
from course_lib.types import Denoiser, Noise, Step
from tests.draws import level, noise_of, normal

F64 = torch.float64
Make = Callable[[Noise, Tensor], tuple[Denoiser, Step]]
"""(noise, y (B or 1, m)) -> the Denoiser and the Step of a solver of points in three dimensions."""


def samples_do_not_depend_on_their_batch(make: Make, y: Tensor, grid: Tensor) -> None:
    """Sample 3 alone, and among 5 with measurements of their own: matrix products of other sizes round apart by 1e-15."""

    def run(first: int, n: int) -> Tensor:
        noise = SampleNoise(7, first=first)
        D, step = make(noise, (y + torch.arange(5)[:, None])[first : first + n])
        return sample(D, noise.start((n, 3), grid[0], F64), grid, step)

    assert_close(run(0, 5)[3:4], run(3, 1), rtol=0, atol=1e-12)


def x_keeps_its_type_and_a_level_each_is_the_level_of_all(make: Make, y: Tensor) -> None:
    """float32 stays float32; five equal levels are one level, to rounding."""
    D, step = make(noise_of(1), y)
    found, _ = step(D, normal(4, 3, dtype=torch.float32), level(1.0), level(0.5))
    assert found.dtype == torch.float32
    D, step = make(noise_of(1), y)
    each, _ = step(D, normal(4, 3), level(1.0).expand(4), level(0.5).expand(4))
    D, step = make(noise_of(1), y)
    every, _ = step(D, normal(4, 3), level(1.0), level(0.5))
    assert_close(each, every, rtol=0, atol=1e-12)
