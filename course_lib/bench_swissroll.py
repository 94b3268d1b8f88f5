"""What the benchmark `swissroll` measures: the usual classroom setting, trained by the course's loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from course_lib import devices
from course_lib.denoisers import from_eps
from course_lib.metrics import chamfer
from course_lib.nets.embedding import TimeEmbedding
from course_lib.sample import sample
from course_lib.schedules import Discrete, linear_betas, uniform
from course_lib.steps import ddim, ddpm
from course_lib.training import denoising_loss, fit
from course_lib.worlds.toys import classroom_roll

Value = tuple[str, float, str, float | None, str]
"""Name, value, unit, limit, and what stands beside it."""


class Gated(nn.Module):
    """The classroom's network: hidden layers of one width, each multiplied by a function of the time, then ReLU."""

    def __init__(self, dim: int = 2, width: int = 128, depth: int = 3):
        super().__init__()
        sizes = [dim, *[width] * depth, dim]
        self.time = nn.Sequential(TimeEmbedding(width), nn.SiLU())
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.gates = nn.ModuleList(nn.Linear(width, b) for b in sizes[1:])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        emb = self.time(time.expand(len(x)))
        for k, (layer, gate) in enumerate(zip(self.layers, self.gates, strict=True)):
            x = gate(emb) * layer(x)
            x = x.relu() if k < len(self.layers) - 1 else x
        return x


def measured(seeds: int, steps: int, points: int) -> Iterator[Value]:
    """The usual classroom setting, seed by seed: Chamfer distance of 2,048 samples to as many fresh points of a roll.

    Three hidden layers of 128, 1,000 linear betas, 5,000 batches of 128, Adam at 1e-3; sampled by DDPM in 1,000 steps
    and by DDIM in 50. Where a classroom's loop keeps the rate and the last weights, `training.fit` warms up over 100
    steps, decays to 0 and samples with the average. Training is counted in seconds of the processor, on one thread.
    The floor is what two exact sets give; the limits are sums of squares of `toys.classroom_roll`, of deviation 2.
    """
    table = Discrete(linear_betas())
    levels = table.sigma(torch.arange(1000, dtype=torch.float64)).float()

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        t = torch.randint(1000, (128,), generator=generator)
        return classroom_roll(128, generator), levels[t], torch.randn(128, 2, generator=generator)

    def loss(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        return denoising_loss(from_eps(net, table.t_of_sigma), x0, sigma, eps, "eps")

    pairs = [[classroom_roll(points, devices.generator(k, side)) for side in (0, 1)] for k in range(16)]
    floor = statistics.mean(chamfer(a, b) for a, b in pairs)
    unit = "summed squared distance"
    yield "swiss roll: two exact sets", floor, unit, None, "the floor, mean of 16 pairs"
    with devices.one_thread():
        for seed in range(seeds):
            torch.manual_seed(seed)
            start = time.process_time()
            done = fit(Gated(), draw, loss, steps=steps, seed=seed, half=False, device="cpu", progress=False)
            name, beside = f"swiss roll, seed {seed}", f"{steps} steps, one thread"
            yield f"{name}: training", time.process_time() - start, "s of the processor", 30.0, beside
            source = devices.generator(seed, 2)
            noise = lambda x, source=source: torch.randn(x.shape, generator=source)
            data = classroom_roll(points, source)
            for sampler, step, n, limit in (("DDPM", ddpm(noise), 1000, 18.0), ("DDIM", ddim, 50, 60.0)):
                grid = uniform(table, n)
                x = float((1 + grid[0] ** 2).sqrt()) * noise(data)
                found = chamfer(sample(from_eps(done.net, table.t_of_sigma), x, grid, step), data)
                yield f"{name}: {sampler}, {n} steps", found, unit, limit, f"{found / floor:.1f} times the floor"
