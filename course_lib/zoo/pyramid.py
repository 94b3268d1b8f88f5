"""What drawing from coarse to fine saves, what it enlarges pictures to, and what the positions are for (Ryu and Ye 2022).

`python -m course_lib.zoo.pyramid` measures what `pyramid.json` has not yet; `rows(part)` reads it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib import devices, metrics, pyramid, zoo
from course_lib.devices import SampleNoise, autocast, one_thread
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.operators import BlockAverage
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddpm
from course_lib.types import Denoiser
from course_lib.zoo import stored
from course_lib.zoo.recipes import scenes_pyramid as recipe
from course_lib.zoo.recipes.scenes_prior import features
from course_lib.zoo.recipes.scenes_pyramid import SIZES, pictures
from course_lib.zoo.stored import Row

STORED = Path(__file__).with_name("pyramid.json")
COMMAND = "python -m course_lib.zoo.pyramid"
SEEDS, TUNING_SEED = (0, 1, 2), 100
FULL = 30
"""Steps of sampling at full size."""
STEPS = {8: 30, 16: 12, 32: 8}
"""Steps at each size of sampling from coarse to fine."""
STARTS = (0.6, 1.2, 2.4, 4.8)
"""Noise levels at which an enlarged picture may be taken up again, to choose among."""
ENLARGED = (0.1, 0.3, 1.0, 3.0)
"""The same where the small picture was measured."""
ENLARGING, DRAWS, PICTURES = 8, 4, 64
"""Steps at each size on the way, samples of each picture, and pictures, where small ones are enlarged."""
TRAINED, JUDGED = 1_000, (0.3, 1.0, 3.0)
"""Steps of training of the networks that are compared, and the noise levels at which they denoise."""


def grids(start: float, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    """A grid of levels for each size: Karras's from 40 for the first, from `start` for the others."""
    return [karras(STEPS[size], 0.01, 40.0 if size == sizes[0] else start) for size in sizes]


def operations() -> dict[int, int]:
    """Floating-point operations of one call for one picture of each size."""
    net = recipe.network()
    return {size: metrics.flops(net, torch.zeros(1, 3, size, size), torch.zeros(1)) for size in SIZES}


def cost(steps: dict[int, int]) -> int:
    """Floating-point operations of a picture that takes so many calls at each size."""
    each = operations()
    return sum(n * each[size] for size, n in steps.items())


def equal_steps() -> int:
    """Steps at full size that cost no less than sampling from coarse to fine."""
    return -(-cost(STEPS) // cost({32: 1}))


@torch.no_grad()
def drawn(way: str, start: float, n: int, seed: int, batch: int = 250) -> Tensor:
    """n pictures of 32 pixels: 'full', 'full, equal cost', or 'coarse to fine' with this start of each finer size."""
    D, found = zoo.load("scenes-pyramid", device="cpu"), []
    for first in range(0, n, batch):
        noise, rows = SampleNoise(seed, first), min(batch, n - first)
        with autocast("cpu"):
            if way == "coarse to fine":
                x = pyramid.draw(D, noise.start((rows, 3, 8, 8), 40.0), grids(start), noise, dpm_solver_pp_2m)
            else:
                sigmas = karras(FULL if way == "full" else equal_steps(), 0.01, 40.0)
                x = sample(D, noise.start((rows, 3, 32, 32), 40.0), sigmas, dpm_solver_pp_2m)
        found.append(x.float().clamp(-1, 1))
    return torch.cat(found)


def tune(start: float) -> Row:
    """Frechet distance of 500 pictures, drawn from coarse to fine, to real ones that nothing else is judged by."""
    distance = metrics.frechet_distance(features(drawn("coarse to fine", start, 500, TUNING_SEED)), features(pictures("other")))
    return {"start": start, "frechet": round(distance, 4)}


def measure(way: str, seed: int) -> Row:
    """Frechet distance of 1,000 pictures to the held-out ones, with the deviation of a bootstrap, and what a picture costs."""
    start = min(rows("tuning"), key=lambda row: row["frechet"])["start"]
    a, b = features(drawn(way, start, 1000, seed)), features(pictures("held out"))
    low, high = metrics.bootstrap(metrics.frechet_distance, a, b, rounds=30)
    steps = STEPS if way == "coarse to fine" else {32: FULL if way == "full" else equal_steps()}
    found = {"frechet": round(metrics.frechet_distance(a, b), 4), "error": round((high - low) / 3.92, 4)}
    return {"way": way, "seed": seed, "start": start, "steps": steps, "flops": cost(steps), **found}


def small(split: str, factor: int) -> tuple[Tensor, Tensor]:
    """Pictures of 32 pixels of a split, and the means of their blocks."""
    return pictures(split)[:PICTURES], pictures(split, 32 // factor)[:PICTURES]


@torch.no_grad()
def enlarged(D: Denoiser, y: Tensor, start: float, seed: int, draws: int = DRAWS) -> Tensor:
    """Samples of pictures of 32 pixels with the means y, (draws, N, 3, 32, 32), each size on the way from this start."""
    doublings = (32 // y.shape[-1]).bit_length() - 1
    ways, found = [karras(ENLARGING, 0.01, start)] * doublings, []
    for k in range(draws):
        noise = SampleNoise(draws * seed + k)
        with autocast("cpu"):
            found.append(pyramid.refine(D, y, ways, noise, ddpm(noise), y=y).float().clamp(-1, 1))
    return torch.stack(found)


def bicubic(y: Tensor) -> tuple[Tensor, Tensor]:
    """Bicubic enlargement to 32 pixels, and the same brought to the means that were measured."""
    x, A = F.interpolate(y, (32, 32), mode="bicubic"), BlockAverage((3, 32, 32), 32 // y.shape[-1])
    return x.clamp(-1, 1), A.project(x, y).clamp(-1, 1)


def tune_enlarging(factor: int, start: float) -> Row:
    """PSNR in dB of the mean of the samples, on the validation split."""
    x, y = small("validation", factor)
    found = enlarged(zoo.load("scenes-pyramid", device="cpu"), y, start, TUNING_SEED)
    return {"factor": factor, "start": start, "psnr": round(metrics.mean_psnr(found.mean(0), x), 3)}


def measure_enlarging(factor: int, seed: int) -> Row:
    """PSNR in dB on held-out pictures: of one sample, of the mean of all, and of bicubic enlargement."""
    start = max((row for row in rows("enlarging tuned") if row["factor"] == factor), key=lambda row: row["psnr"])["start"]
    x, y = small("held out", factor)
    found = enlarged(zoo.load("scenes-pyramid", device="cpu"), y, start, seed)
    plain, brought = bicubic(y)
    ways = {"sample": found[0], "mean": found.mean(0), "bicubic": plain, "bicubic, its means as measured": brought}
    psnr = {name: round(metrics.mean_psnr(one, x), 3) for name, one in ways.items()}
    calls = ENLARGING * (factor.bit_length() - 1)
    return {"factor": factor, "seed": seed, "start": start, "samples": DRAWS, "calls": calls, "psnr": psnr}


@torch.no_grad()
def measure_positions(positioned: bool, seed: int) -> Row:
    """PSNR in dB of denoised validation pictures of each size, after a short training with or without positions."""
    torch.manual_seed(seed)
    with one_thread(), torch.enable_grad():
        net = recipe.train(net=recipe.network(positioned=positioned), steps=TRAINED, seed=seed, device="cpu").net
    D, found = recipe.wrap(net), {}
    for size in SIZES:
        x0 = pictures("validation", size)
        with autocast("cpu"):
            each = [metrics.mean_psnr(D(x0 + s * SampleNoise(1)(x0), torch.tensor(s)).float(), x0) for s in JUDGED]
        found[str(size)] = round(sum(each) / len(each), 3)
    return {"positioned": positioned, "seed": seed, "steps": TRAINED, "psnr": found}


WAYS = ("full", "full, equal cost", "coarse to fine")
PARTS: stored.Parts = {
    "tuning": (tune, [{"start": start} for start in STARTS]),
    "sampling": (measure, [{"way": way, "seed": seed} for seed in SEEDS for way in WAYS]),
    "enlarging tuned": (tune_enlarging, [{"factor": factor, "start": start} for factor in (2, 4) for start in ENLARGED]),
    "enlarging": (measure_enlarging, [{"factor": factor, "seed": seed} for factor in (2, 4) for seed in SEEDS]),
    "positions": (measure_positions, [{"positioned": on, "seed": seed} for seed in SEEDS for on in (True, False)]),
}


def rows(part: str) -> list[Row]:
    """The stored rows of a part; ValueError, with the command, where there is none."""
    return stored.rows(STORED, COMMAND, part)


def main(parts: list[str]) -> None:
    """Measure what is missing of the named parts, or of all, on one thread."""
    with devices.one_thread():
        stored.run(STORED, COMMAND, PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
