"""One solver on one problem: how near, how alike as a set, and at what cost."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from course_lib import metrics
from course_lib.denoisers import Counted, low_precision
from course_lib.devices import SampleNoise, one_thread
from course_lib.operators import BlockAverage, LinearOperator
from course_lib.posterior import snips, watched
from course_lib.restoring import SETTINGS, SOLVERS, Task
from course_lib.sample import sample
from course_lib.schedules import exponential
from course_lib.zoo.inverse import rows
from course_lib.zoo.inverse.problems import DENOISE, PROBLEMS, SIGMA_Y, WORLDS, classical, posed
from course_lib.zoo.stored import Row

SEEDS = (0, 1, 2)
CALLS, LOW, DRAWS = 20, 0.01, 3
"""Calls of the network a picture, the last noise level above 0, and the samples of each picture that a row is of."""
NAMES = ("classical", *SETTINGS)


def settings(solver: str) -> list[dict[str, Any]]:
    """What the solver may choose among; the classical methods as many weights as the others have settings."""
    return [{"weight": weight} for weight in DENOISE] if solver == "classical" else SETTINGS[solver]


def published_snips(problem: str, seed: int, n: int = 8) -> Row:
    """SNIPS at the count of its authors' faces of 64 pixels: 500 levels, a geometric row from 90 to 0.01, five moves at each."""
    A, x0, y = (one[:n] if isinstance(one, Tensor) else one for one in posed("scenes", problem, "held out"))
    noise, sigmas, D = SampleNoise(seed), exponential(500, 0.01, 90.0), Counted(low_precision(WORLDS["scenes"].prior()))
    with one_thread(), torch.no_grad():
        found = sample(D, 90.0 * noise(x0), sigmas, watched(snips(A, y, SIGMA_Y, noise, c=0.033, steps=5))).clamp(-1, 1)
    return {"problem": problem, "seed": seed, "pictures": n, "calls": D.rows // n, "psnr": psnr(found, x0)}


def memory(solver: str) -> Row:
    """The most memory that lives at one time for a picture with a hole, beyond the network's and the picture's own."""
    A, _, y = posed("scenes", "box", "validation")
    world = WORLDS["scenes"]
    D, setting = low_precision(world.prior()), chosen("scenes", "box", solver) or {}

    def run() -> None:
        with one_thread(), torch.no_grad():
            SOLVERS[solver](Task(D, A, y[:4], SIGMA_Y, CALLS, LOW, world.top, SampleNoise(0)), **setting)

    run()
    return {"solver": solver, "megabytes": round(metrics.peak_bytes(run) / 4e6, 3)}


def takes(solver: str, A: LinearOperator) -> bool:
    """Whether the solver is made for this operator: ILVR keeps the low frequencies of a reference."""
    return solver != "ILVR" or isinstance(A, BlockAverage)


def keys(solvers: tuple[str, ...] = NAMES) -> list[Row]:
    """World, problem and solver of each row of the table."""
    pairs = ((world, problem, solver) for world, problem in PROBLEMS for solver in solvers)
    found = ({"world": world, "problem": problem, "solver": solver} for world, problem, solver in pairs)
    return [key for key in found if takes(key["solver"], PROBLEMS[key["world"], key["problem"]]())]


def restore(world: str, problem: str, solver: str, setting: dict[str, Any], split: str, seed: int) -> tuple[Tensor, float, float]:
    """Restored pictures, calls of the network a picture, and seconds a picture of one thread."""
    A, x0, y = posed(world, problem, split)
    D, noise = Counted(low_precision(WORLDS[world].prior())), SampleNoise(seed)
    with one_thread(), torch.no_grad():
        begun = time.process_time()
        if solver == "classical":
            found = classical(A, y, **setting)
        else:
            found = SOLVERS[solver](Task(D, A, y, SIGMA_Y, CALLS, LOW, WORLDS[world].top, noise), **setting)
        seconds = time.process_time() - begun
    return found.clamp(-1, 1), D.rows / len(x0), seconds / len(x0)


def psnr(x: Tensor, x0: Tensor) -> float:
    """The mean over pictures of the PSNR in dB."""
    return round(metrics.mean_psnr(x, x0), 3)


def judged(world: str, draws: list[Tensor], x0: Tensor) -> Row:
    """Mean PSNR in dB and SSIM of samples to the truth, the PSNR of their mean, and the Frechet distance as a set.

    The Frechet distance is over 16 principal axes of features, of all samples to the truth. Of samples of the posterior the mean
    is nearer to the truth than each, by 3 dB if they are many: what a method that aims at the mean is to be held against.
    """
    pairs = [(a, b) for x in draws for a, b in zip(x, x0, strict=True)]
    features = WORLDS[world].features
    return {
        "psnr": round(sum(psnr(x, x0) for x in draws) / len(draws), 3),
        "psnr_of_mean": psnr(torch.stack(draws).mean(0), x0),
        "ssim": round(sum(metrics.ssim(a, b) for a, b in pairs) / len(pairs), 4),
        "frechet": round(metrics.frechet_distance(features(torch.cat(draws)), features(x0)), 4),
    }


def tune(world: str, problem: str, solver: str) -> Row:
    """The PSNR of each setting on the validation split, with a seed that is not measured with; None where it diverged.

    `chosen` is None where all have: with A^+ of an operator of tiny singular values, such as a blur, noise grows without bound.
    """
    _, x0, _ = posed(world, problem, "validation")
    tried = []
    for setting in settings(solver):
        try:
            x, calls, _ = restore(world, problem, solver, setting, "validation", seed=100)
            tried.append({**setting, "psnr": psnr(x, x0), "calls": calls})
        except FloatingPointError:
            tried.append({**setting, "psnr": None})
    sound = [k for k, one in enumerate(tried) if one["psnr"] is not None]
    best = settings(solver)[max(sound, key=lambda k: tried[k]["psnr"])] if sound else None
    return {"world": world, "problem": problem, "solver": solver, "tried": tried, "chosen": best}


def chosen(world: str, problem: str, solver: str) -> dict[str, Any] | None:
    """The setting that was best on the validation split; None where all diverged."""
    key = {"world": world, "problem": problem, "solver": solver}
    return next(row["chosen"] for row in rows("tuning") if key.items() <= row.items())


def measure(world: str, problem: str, solver: str, seed: int) -> Row:
    """One solver on the held-out split at its chosen setting; no numbers where it has none, or diverges."""
    _, x0, _ = posed(world, problem, "held out")
    setting = chosen(world, problem, solver)
    key = {"world": world, "problem": problem, "solver": solver, "seed": seed}
    if setting is None:
        return {**key, "setting": None}
    n = 1 if solver == "classical" else DRAWS
    try:
        draws = [restore(world, problem, solver, setting, "held out", DRAWS * seed + k) for k in range(n)]
    except FloatingPointError as error:
        return {**key, "setting": setting, "diverged": str(error)}
    calls, seconds = (sum(of) / n for of in list(zip(*draws, strict=True))[1:])
    cost = {"calls": round(calls, 2), "seconds": round(seconds, 4)}
    return {**key, "setting": setting, **judged(world, [x for x, _, _ in draws], x0), **cost}
