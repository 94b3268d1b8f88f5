"""`blobs-reflow`: flow matching on three blobs in the plane, then reflow, and the same without its pairs; three seeds.

first     flow matching: independent pairs of a point of the blobs and noise
reflowed  goes on from `first` with the pairs of the flow of `first`
shuffled  goes on from `first` as long, with the same points and noises, each point given the noise of another: the control
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import metrics
from course_lib.denoisers import NetworkDenoiser, from_flow
from course_lib.devices import generator
from course_lib.flows import flow_matching_loss, flow_paths, reflow_pairs, straightness
from course_lib.nets.mlp import MLP
from course_lib.steps import ddim
from course_lib.training import Fit, Rows, fit
from course_lib.worlds import toys

DATA = "three Gaussians in the plane, drawn without end; for reflow 32,768 pairs of the first flow, 50 steps each"
BLOBS = toys.three_blobs()
SEEDS = (0, 1, 2)
PARTS = ("first", "reflowed", "shuffled")
WIDTH, DEPTH = 64, 3
BATCH, STEPS, LR = 256, 9 * 2000, 3e-3
BLOCK, BLOCKS, PAIR_STEPS = 1024, 32, 50
"""Pairs are made by the block, when a batch first asks for it."""
COUNTS, SAMPLES = (1, 2, 4, 8, 32), 20_000
"""Euler steps at which the card measures the distance to the blobs, and how many samples it takes."""


class VelocityMLP(MLP):
    """v(x_t, t) for points in the plane; the embedding of the time wants it in thousandths."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return super().forward(x_t, 1000 * t)


def network(name: str = "blobs-reflow") -> nn.ModuleList:
    """For each seed the three untrained velocities."""
    return nn.ModuleList(nn.ModuleDict({part: VelocityMLP(2, WIDTH, DEPTH) for part in PARTS}) for _ in SEEDS)


def wrap(net: nn.ModuleList) -> list[dict[str, NetworkDenoiser]]:
    """What `zoo.load` returns: for each seed the three flows by name, as `from_flow` makes them."""
    return [{part: from_flow(v) for part, v in seed.items()} for seed in net.eval()]


def independent(source: torch.Generator) -> Rows:
    """A batch (x0, eps, t) in which nothing depends on anything."""
    x0 = BLOBS.sample(BATCH, source).float()
    return x0, torch.randn(BATCH, 2, generator=source), torch.rand(BATCH, generator=source)


def coupled(first: nn.Module, seed: int, shuffled: bool) -> Callable[[torch.Generator], Rows]:
    """Batches (x0, eps, t) of the flow's own pairs; `shuffled` moves each x0 to the next eps."""
    device = next(first.parameters()).device

    @functools.cache
    def block(k: int) -> tuple[Tensor, Tensor]:
        eps = torch.randn(BLOCK, 2, generator=generator(seed, k))
        return reflow_pairs(from_flow(first), eps.to(device), PAIR_STEPS)

    def draw(source: torch.Generator) -> Rows:
        x0, eps = block(int(torch.randint(BLOCKS, (1,), generator=source)))
        rows = torch.randperm(BLOCK, generator=source)[:BATCH].to(device)
        x0 = x0[rows.roll(1) if shuffled else rows]
        return x0, eps[rows], torch.rand(BATCH, generator=source)

    return draw


def train(
    name: str = "blobs-reflow",
    net: nn.ModuleList | None = None,
    steps: int = STEPS,
    lr: float | None = None,
    seed: int = 0,
    stop_at: int | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> Fit:
    """Train the nine, one after the other; `steps` counts those of all of them, shared out evenly."""
    nets, fits = network() if net is None else net, []
    stages = list(itertools.product(range(len(SEEDS)), PARTS))
    for i, (k, part) in enumerate(stages):
        begin, end = steps * i // len(stages), steps * (i + 1) // len(stages)
        if stop_at is not None and begin >= stop_at:
            break
        torch.manual_seed(seed + SEEDS[k])
        first = nets[k]["first"]
        if net is None:
            nets[k][part] = VelocityMLP(2, WIDTH, DEPTH) if part == "first" else copy.deepcopy(first).requires_grad_(True)
        if begin == end:
            continue
        draw = independent if part == "first" else coupled(first, seed + SEEDS[k], part == "shuffled")
        fits.append(
            fit(
                nets[k][part],
                draw,
                flow_matching_loss,
                steps=end - begin,
                lr=LR if lr is None else lr,
                seed=seed + SEEDS[k],
                stop_at=None if stop_at is None else min(stop_at, end) - begin,
                checkpoint=None if checkpoint is None else checkpoint.with_suffix(f".{k}-{part}{checkpoint.suffix}"),
                **{"half": False, "ema_decay": 0.995, **options},
            )
        )
        nets[k][part] = fits[-1].net
    return Fit(nets, [loss for one in fits for loss in one.losses], sum(one.seconds for one in fits))


def measure(D: NetworkDenoiser, n: int = SAMPLES, seed: int = 30) -> dict[str, Any]:
    """Straightness of 4,000 paths, and the distance of n samples to the blobs: after each number of Euler steps in t, and at
    the end of the flow, which 100 steps of a better rule find.
    """
    eps, real = torch.randn(n, 2, generator=generator(seed, 1)), BLOBS.sample(n, generator(seed))
    ends = {str(count): reflow_pairs(D, eps, count, ddim)[0] for count in COUNTS} | {"end": reflow_pairs(D, eps)[0]}
    return {
        "straightness": round(float(straightness(*flow_paths(D, eps[:4000])).mean()), 5),
        "sliced_wasserstein": {count: round(metrics.sliced_wasserstein(x0, real), 4) for count, x0 in ends.items()},
    }


def judge(name: str, net: nn.ModuleList) -> dict[str, Any]:
    """The numbers of the card: those of each part and seed, of the exact flow, and what two exact sets have by chance."""
    floor, deviation = metrics.sliced_wasserstein_floor(lambda n, source: BLOBS.sample(n, source), SAMPLES)
    return {
        "seeds": [{part: measure(D) for part, D in flows.items()} for flows in wrap(net)],
        "exact": measure(BLOBS.denoiser),
        "sliced_wasserstein_floor": round(floor, 5),
        "sliced_wasserstein_floor_deviation": round(deviation, 5),
    }
