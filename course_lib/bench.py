"""Benchmarks: ratios of time measured side by side in one process, and what a setting reaches.

Each benchmark returns rows, of two kinds, limit None where a row only informs; `run` adds hardware and versions.
a ratio  {name, ours_s, other_s, other, ratio, limit}
a value  {name, value, unit, beside, limit}, `beside` a remark on what the value is to be held against
`figure` is what the limit bounds, from above, and `over` the rows that exceed theirs.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import math
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


def _value(name: str, value: float, unit: str, limit: float | None, beside: str = "") -> Row:
    """One row that is no ratio of times."""
    return {"name": name, "value": value, "unit": unit, "beside": beside, "limit": limit}


def figure(row: Row) -> float:
    """What the row's limit bounds: its ratio or its value."""
    return row["ratio"] if "ratio" in row else row["value"]


def over(rows: list[Row]) -> list[Row]:
    """The rows above their limits; a figure that is not a number is above any."""
    return [row for row in rows if row["limit"] is not None and not figure(row) <= row["limit"]]


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


def bench_rules(steps: int = 5, walks: int = 100, rounds: int = 5) -> list[Row]:
    """What each rule costs: in `sample` on `digits` beside bare network calls, and alone beside diffusers' scheduler.step.

    The first in `steps` steps of 32 digits. The second, per 1,000 network calls, in `walks` steps on a stored output of
    16 x 3 x 32 x 32 numbers: x0 for both, where their scheduler can be told so, so that neither converts a prediction.
    """
    from course_lib import zoo
    from course_lib.bench_rules import HIGH, PEERS, beside, in_samplers
    from course_lib.devices import SampleNoise

    device = devices.pick_device()
    D = zoo.load("digits", device=str(device))
    x = SampleNoise(0).start((32, 1, 16, 16), HIGH, device=device)
    time_, label = torch.zeros((), device=device), torch.arange(32, device=device) % 10
    rows = []
    for name, run, calls in in_samplers(D.given(label=label), x, steps):

        def bare(calls: int = calls) -> None:
            with torch.no_grad():
                for _ in range(calls):
                    D.net(x, time_, label)

        ours, other = _interleaved(run, bare, rounds=rounds)
        rows.append(_row(f"sample(digits), {name}", ours, other, f"{calls} bare network calls", 1.05, noise=True))

    x = SampleNoise(1).start((16, 3, 32, 32), HIGH, device=device)
    for name, peer in PEERS.items():
        ours, calls, theirs, their_calls = beside(peer, x, walks)
        times, their_times = _interleaved(ours, theirs, rounds=3 * rounds)  # they are short
        per_1000 = [1000 * t / calls for t in times], [1000 * t / their_calls for t in their_times]
        rows.append(_row(f"rule alone: {name}, 1,000 calls", *per_1000, f"diffusers {peer.scheduler}", peer.limit, noise=True))
    return rows


def bench_guidance(rounds: int = 9) -> list[Row]:
    """Classifier-free guidance in one call beside two in turn, at batch 1 to 4, on the networks of `digits` and `mini-sd`."""
    from course_lib.bench_guidance import runs

    rows = []
    for name, together, apart in runs():
        ours, other = _interleaved(together, apart, rounds=rounds)
        rows.append(_row(f"CFG in one call, {name}", ours, other, "two calls in turn", 0.9))
    return rows


def bench_redraw(moves: int = 21) -> list[Row]:
    """Each explorer of the stage: from a move of its main slider to its new picture, over the slider's whole range.

    The other controls are as it opens. A page adds the way to the browser, which the browser tests print.
    """
    from course_lib.stage.demos import DEMOS

    rows, limit = [], 0.2 if torch.cuda.is_available() else 1.0
    with devices.one_thread():  # as on the stage
        for number, demo in DEMOS.items():
            for name, build in demo.explorers.items():
                start = time.perf_counter()
                panel = build()
                built, main, times = time.perf_counter() - start, panel.main, []
                steps = (main.max - main.min) / main.step
                for k in range(moves):
                    start, before = time.perf_counter(), panel.redraws
                    main.value = type(main.value)(main.min + main.step * round(steps * k / (moves - 1)))
                    if panel.redraws > before:
                        times.append(time.perf_counter() - start)
                slow = statistics.quantiles(times, n=20)[-1]
                beside = f"95th percentile {slow:.2f} s of {len(times)} moves of {panel.main_name}; built in {built:.1f} s"
                rows.append(_value(f"redraw: {number}, {name}", statistics.median(times), "s", limit, beside))
    return rows


def bench_swissroll(seeds: int = 3, steps: int = 5000, points: int = 2048) -> list[Row]:
    """The usual classroom setting, seed by seed: Chamfer distance of samples to as many fresh points of a roll."""
    from course_lib import bench_swissroll as of

    return [_value(*value) for value in of.measured(seeds, steps, points)]


def bench_families(steps: int = 60) -> list[Row]:
    """Whether the race of the four families is fair in time: a seed's training of each, measured here on a few steps.

    Seconds of the processor for the steps that the zoo's models took; the limit is a quarter over the mean of the four.
    """
    from course_lib.families import FAMILIES
    from course_lib.zoo import tune
    from course_lib.zoo.recipes.compared import LONGER

    rows = []
    with devices.one_thread():
        for world in tune.WORLDS:
            taken, lengths = {}, {}
            for family in FAMILIES:
                settings, chosen = tune.chosen(world, family)
                lengths[family] = LONGER * chosen
                taken[family] = lengths[family] * tune.seconds_per_step(world, family, settings, steps)
            limit = 1.25 * statistics.mean(taken.values())
            rows += [
                _value(f"{world}, {family}: training a seed", seconds, "s of the processor", limit, f"{lengths[family]} steps")
                for family, seconds in taken.items()
            ]
    return rows


def bench_gmm(dims: tuple[int, ...] = (8,)) -> list[Row]:
    """Solvers of linear inverse problems on mixtures of 25 Gaussians: sliced Wasserstein to the exact posterior.

    The cells of `dims` are measured anew, and may exceed the stored ones by the floor, which is what chance gives; the others
    are as stored, with the hardware of that run.
    """
    from course_lib import bench_gmm as gmm
    from course_lib.zoo import stored

    rows, hardware = [], stored.read(gmm.STORED, gmm.COMMAND)["hardware"]
    for cell in gmm.rows():
        key = {name: cell[name] for name in ("d_x", "d_y", "levels")}
        floor = next((row["w1"] for row in gmm.rows(**key) if row["solver"] == "exact"), math.nan)
        anew = cell["d_x"] in dims and cell["levels"] == min(gmm.ETA)
        row = gmm.measure(cell["solver"], **key) if anew else cell
        beside = f"± {row['reach']:.2f}, floor {floor:.2f}, modes {row['found']:.0%}, weights off by {row['tv']:.2f}, "
        beside += f"{row['calls']} calls, {row['seconds']:.2f} s" + ("" if anew else f"; stored, {hardware}")
        name = f"gmm {cell['d_x']} x {cell['d_y']}, {cell['levels']} levels: {cell['solver']}"
        rows.append(_value(name, row["w1"], "sliced W1", cell["w1"] + floor if anew else None, beside))
    return rows


def bench_inverse(world: str = "digits") -> list[Row]:
    """Solvers of inverse problems on pictures at equal calls: PSNR and Frechet distance, mean and deviation over the seeds.

    The first seed of `world` is measured anew and may fall short of what is stored by half a decibel; the rest is as stored.
    """
    from course_lib.zoo import inverse
    from course_lib.zoo.inverse import measure

    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in inverse.rows("solvers"):
        cells.setdefault((row["world"], row["problem"], row["solver"]), []).append(row)
    rows = []
    for cell, stored_rows in cells.items():
        name = "inverse " + ", ".join(cell)
        found = [row for row in stored_rows if "psnr" in row]
        if not found:
            rows.append(_value(name, math.nan, "dB", None, "diverges at each of its settings"))
            continue
        psnr, mean, frechet = (statistics.mean(row[key] for row in found) for key in ("psnr", "psnr_of_mean", "frechet"))
        beside = f"mean of samples {mean:.2f} dB, Frechet distance {frechet:.3f}, {found[0]['calls']:g} calls, "
        beside += f"{found[0]['seconds']:.2f} s a picture; deviation over {len(found)} seeds "
        beside += f"{statistics.stdev(row['psnr'] for row in found) if len(found) > 1 else 0:.2f} dB"
        rows.append(_value(name, psnr, "dB", None, beside))
        if cell[0] == world:
            anew = measure.measure(*cell, seed=found[0]["seed"])
            rows.append(_value(f"{name}: short of the stored", found[0]["psnr"] - anew["psnr"], "dB", 0.5, "measured anew"))
    return rows


def bench_deepinv() -> list[Row]:
    """Our solvers of inverse problems beside deepinv's: PSNR as stored, time measured anew where deepinv can be imported."""
    from course_lib.bench_deepinv import table

    return table()


def bench_distill(rounds: int = 9) -> list[Row]:
    """An iteration of SDS and of VSD on `mini-sd`: seconds beside the sum of its parts, rows that its networks see, peak memory.

    The parts are bare calls of the networks and the second score's training step; the rest of an iteration is to vanish.
    """
    from course_lib import bench_distill as of

    rows = []
    for run in of.runs():
        ours, *parts = _interleaved(run.distil, *run.parts.values(), rounds=rounds)
        sums = [sum(seconds) for seconds in zip(*parts, strict=True)]
        name = f"distill: {run.name}, {run.iterations} iterations"
        rows.append(_row(name, ours, sums, " + ".join(run.parts), 1.05, noise=True))
        counted = {name: sum(seen) / run.iterations for name, seen in of.rows_of_calls(run.distil, run.networks).items()}
        beside = ", ".join(f"{name} {seen:g}" for name, seen in counted.items())
        rows.append(_value(f"distill: {run.name}, work", sum(counted.values()), "rows an iteration", None, beside))
        rows.append(_value(f"distill: {run.name}, peak memory", of.peak_mebibytes(run.distil), "MiB", None))
    rows += [_value(f"distill: SDS {name}, peak memory", of.peak_mebibytes(run), "MiB", None) for name, run in of.pictures()]
    return rows


def bench_control(rounds: int = 9) -> list[Row]:
    """A control of `mini-sd`: sampling with it over without, its training over fine-tuning all, and the operations behind both.

    The limits are what the operations give and a quarter; published beside them, for the shares of another network.
    """
    from course_lib import bench_control as of
    from course_lib.bench_distill import peak_mebibytes

    expected = of.expected()
    with_control, without, _ = of.sampling()
    ours, other = _interleaved(with_control, without, rounds=rounds)
    beside = "without control; operations give {:.2f}; published {}"
    said = {name: beside.format(expected[name], of.PUBLISHED[name]) for name in expected}
    rows = [_row("control: sampling", ours, other, said["sampling"], 1.25 * expected["sampling"], noise=True)]
    steps = [of.learning(of_control).step for of_control in (True, False)]
    ours, other = _interleaved(*steps, rounds=rounds)
    what = said["training"].replace("without control", "fine-tuning the whole U-Net")
    rows.append(_row("control: a training step", ours, other, what, 1.25 * expected["training"], noise=True))
    held = [peak_mebibytes(of.whole(of_control)) for of_control in (True, False)]
    beside = f"{held[0]:.0f} MiB over {held[1]:.0f} of fine-tuning the whole U-Net"
    rows.append(_value("control: memory of training", held[0] / held[1], "times", None, beside))
    for part in of.parts():
        beside = f"{part.weights:,} weights"
        rows.append(_value(f"control: {part.name}", part.flops / 1e6, "MFLOP a picture", None, beside))
    return rows


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "import": bench_import,
    "sampler": bench_sampler,
    "rules": bench_rules,
    "guidance": bench_guidance,
    "distill": bench_distill,
    "control": bench_control,
    "gmm": bench_gmm,
    "inverse": bench_inverse,
    "deepinv": bench_deepinv,
    "redraw": bench_redraw,
    "swissroll": bench_swissroll,
    "families": bench_families,
}


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
