"""Benchmarks: ratios measured side by side in one process, never bare seconds.

Each benchmark returns rows {name, ours_s, other_s, other, ratio, limit}, limit None where the row only
informs; `run` adds hardware and versions.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from course_lib import devices

Row = dict[str, Any]


def _interleaved(*runs: Callable[[], Any], rounds: int = 9) -> list[list[float]]:
    """Seconds of each run in each round, taken in turn, so that a busy machine slows all alike; one warm-up round."""
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):
        for seconds, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds.append(time.perf_counter() - start)
    return times


def _row(name: str, ours: list[float], other: list[float], what: str, limit: float | None, noise: bool = False) -> Row:
    """One row; the ratio is the median over the rounds. `noise` widens the limit by three standard errors of that median."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    if limit is not None and noise:
        limit += 3 * 1.2533 * statistics.stdev(ratios) / len(ratios) ** 0.5  # a median's error is sqrt(pi / 2) of a mean's
    seconds = {"ours_s": statistics.median(ours), "other_s": statistics.median(other)}
    return {"name": name, **seconds, "other": what, "ratio": statistics.median(ratios), "limit": limit}


def bench_import() -> list[Row]:
    """A fresh interpreter that imports the library's core, beside one that imports torch alone."""

    def importing(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    core = "import course_lib.sample, course_lib.zoo, course_lib.guidance, course_lib.gaussians"
    ours, other = _interleaved(importing(core), importing("import torch"), rounds=5)
    return [_row("import course_lib", ours, other, "import torch", 1.5)]


def bench_sampler() -> list[Row]:
    """50 DDIM steps beside 50 bare network calls: ours on `digits`, then ours and diffusers' pipeline on one UNet2DModel."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    from course_lib import zoo
    from course_lib.denoisers import discrete_of, from_diffusers
    from course_lib.devices import SampleNoise
    from course_lib.sample import sample
    from course_lib.schedules import karras

    device, steps = devices.pick_device(), 50
    D = zoo.load("digits", device=str(device))
    x = SampleNoise(0).start((32, 1, 16, 16), 40.0, device=device)
    time_ = torch.zeros((), device=device)
    label = torch.arange(32, device=device) % 10
    given = D.given(label=label)

    def bare() -> None:
        with torch.no_grad():
            for _ in range(steps):
                D.net(x, time_, label)

    ours, other = _interleaved(lambda: sample(given, x, karras(steps, sigma_max=40.0)), bare)
    rows = [_row("sample(digits, 50 steps)", ours, other, "50 bare network calls", 1.05)]

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(16, 1, 1, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, **blocks)
    unet = unet.to(device).eval()
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    pipeline = DDIMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    alone = discrete_of(scheduler)
    levels = torch.cat([alone.sigma(scheduler.timesteps.double()), torch.zeros(1, dtype=torch.float64)])
    adapter = from_diffusers(unet, scheduler)

    def network() -> None:
        with torch.no_grad():
            for _ in range(steps):
                unet(x, time_, return_dict=False)

    def pipe() -> None:
        pipeline(batch_size=32, num_inference_steps=steps, output_type="np")

    ours, theirs, calls = _interleaved(lambda: sample(adapter, x, levels), pipe, network)
    rows.append(_row("diffusers DDIMPipeline, 50 steps", theirs, calls, "50 bare network calls", None))
    rows.append(_row("sample(UNet2DModel, 50 steps)", ours, calls, "50 bare network calls", 1.05))
    # the two differ by microseconds in steps of milliseconds, so that equal means equal within the noise of the run
    rows.append(_row("sample(UNet2DModel) beside diffusers", ours, theirs, "diffusers DDIMPipeline", 1.0, noise=True))
    return rows


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {"import": bench_import, "sampler": bench_sampler}


def run(names: list[str] | None = None) -> list[Row]:
    """Run the named benchmarks, or all; ValueError for an unknown name, with the nearest."""
    for name in names or []:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            raise ValueError(
                f"benchmark = {name!r}; expected one of {', '.join(BENCHMARKS)}"
                + (f" (did you mean {near[0]!r}?)" if near else "")
            )
    facts = {
        "hardware": devices.describe(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "diffusers", "numpy")},
    }
    return [{**row, **facts} for name in names or BENCHMARKS for row in BENCHMARKS[name]()]
