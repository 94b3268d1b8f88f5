"""ScoreHMR against plain optimisation from the same start: one view, three views, a clip (Stathopoulos et al. 2024).

`python -m course_lib.zoo.figures_fit` tunes every method on validation figures and then measures it on held-out ones;
`figures.json` keeps both, `rows()` and `tuned()` read it. The networks are `zoo.load("figures")`.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_lib import devices, zoo
from course_lib.devices import SampleNoise, generator
from course_lib.posterior import body
from course_lib.schedules import karras
from course_lib.worlds import figures
from course_lib.worlds.figures import BODY, Keypoints
from course_lib.zoo import stored
from course_lib.zoo.stored import Row

STORED = Path(__file__).with_name("figures.json")
COMMAND = "python -m course_lib.zoo.figures_fit"
SEEDS, VALIDATION = (0, 1, 2), 100
PROBLEMS = {"one view": 1, "three views": 3, "clip": 6}
"""Problem -> how many pictures there are of each figure."""
FIGURES, TRIED = 64, 32
"""How many held-out figures are measured, and on how many others the settings are chosen."""
BETWEEN = {"three views": 0.05, "clip": 0.05}
"""Deviation of a number between views and between frames, in radians: it sets the weight of the terms that tie them."""
LEVELS, LOWEST, HIGHEST, ROUNDS, SPREAD = 6, 0.02, 20.0, 24, 0.1
CALLS = ROUNDS * (2 * LEVELS - 1)
"""Calls of the network in ScoreHMR, and steps of plain optimisation, which so has almost twice the gradients."""


@dataclass
class Problem:
    """Figures to be found: `truth` (V, N, 25) over the views or frames V of N figures, their `keypoints` and an objective."""

    name: str
    truth: Tensor
    keypoints: Keypoints

    @property
    def read(self) -> Tensor:
        """The keypoints of all rows as the networks take them, (V N, 54)."""
        return self.keypoints.flat().flatten(0, 1)

    def objective(self, x0: Tensor) -> Tensor:
        """-log p(y | x0) of the keypoints, and of the tie between views or frames where there are several: (V N, 25) -> (V N)
        or a number.

        L = sum_v L_keypoints(x_v) + sum |body differences|^2 / (2 s^2), s = BETWEEN: `body.consistency` for views,
        `body.smoothness` for frames, which ties the whole pose.
        """
        x0 = x0.view(self.truth.shape)
        fit = figures.reprojection(x0, self.keypoints)
        if self.name == "one view":
            return fit
        tie = body.consistency(x0[..., BODY]) if self.name == "three views" else body.smoothness(x0)
        return fit.sum() + tie.sum() / (2 * BETWEEN[self.name] ** 2)

    def error(self, pose: Tensor) -> float:
        """MPJPE of all rows (V N, 25), in millimetres."""
        return round(float(figures.joint_error(pose.view(self.truth.shape), self.truth).mean()), 2)


def problem(name: str, seed: int, n: int = FIGURES) -> Problem:
    """n held-out figures: seen once, from several sides whose directions are not told, or in consecutive frames."""
    if name not in PROBLEMS:
        raise ValueError(f"name = {name!r}; expected one of {', '.join(PROBLEMS)}")
    views, source = PROBLEMS[name], generator(8, seed, list(PROBLEMS).index(name))
    if name == "clip":
        truth = figures.draw_clips(n, views, source).pose.transpose(0, 1).contiguous()
    else:
        around = 2 * math.pi * torch.rand(views, n, generator=source)
        truth = figures.turned(figures.draw_poses(n, source).expand(views, -1, -1), around)
    return Problem(name, truth, figures.observe(truth, source))


# --- the methods ---------------------------------------------------------------------------------------


@functools.cache
def moments() -> tuple[Tensor, Tensor]:
    """Mean and inverse covariance of poses, of 20,000 draws: the hand-made prior of the classical fit."""
    poses = figures.draw_poses(20_000, generator(8, 50))
    return poses.mean(0), torch.linalg.inv(poses.T.cov())


def plain(task: Problem, x: Tensor, lr: float, steps: int = CALLS) -> Tensor:
    """Adam on the objective alone."""
    return body.optimise(x, task.objective, steps, lr)


def with_gaussian(task: Problem, x: Tensor, lr: float, share: float, steps: int = CALLS) -> Tensor:
    """Adam on the objective and `share` of a Gaussian's -log density: SMPLify's prior with one component (Bogo et al. 2016)."""
    mean, inverse = moments()
    prior = lambda x0: share / 2 * ((x0 - mean) @ inverse * (x0 - mean)).sum()
    return body.optimise(x, lambda x0: task.objective(x0).sum() + prior(x0), steps, lr)


def refined(
    task: Problem, x: Tensor, middle: float, reach: float, start: str = "inversion", condition: bool = True, guide: bool = True
) -> Tensor:
    """ScoreHMR; `start` is the inversion, 'noise' added to the guess in its place, or 'nothing': noise from the highest level.

    `condition` and `guide` switch off the prior's condition and the guidance. From 'nothing' there is one pass with as many
    guided steps as all rounds have.
    """
    D, noise = zoo.load("figures", device="cpu").prior, SampleNoise(0)
    D = D.given(observed=task.read) if condition else D
    weight = body.widened(figures.NOISE, SPREAD) if guide else 0.0
    if start == "nothing":
        levels = karras(ROUNDS * LEVELS, LOWEST, HIGHEST)[:-1]
        return body.score_hmr(D, torch.zeros_like(x), levels, task.objective, weight, 1, noise, reach=reach)
    levels = karras(LEVELS, LOWEST, middle)[:-1]
    return body.score_hmr(D, x, levels, task.objective, weight, ROUNDS, noise if start == "noise" else None, reach=reach)


GRIDS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[float, ...]]]] = {
    "optimisation": (plain, {"lr": (0.0001, 0.0003, 0.001, 0.01, 0.03, 0.1)}),
    "ScoreHMR": (refined, {"middle": (0.07, 0.1, 0.14), "reach": (1.0, 2.0)}),
    "optimisation, Gaussian prior": (with_gaussian, {"lr": (0.01, 0.03), "share": (0.3, 1.0)}),
}
"""Method -> the function, and the settings among which validation figures choose."""


def start(task: Problem) -> Tensor:
    """The regressor's pose of each view or frame, (V N, 25)."""
    with torch.no_grad():
        return zoo.load("figures", device="cpu").regressor(task.read)


def tune(problem_name: str, method: str) -> Row:
    """MPJPE of every setting of a method on validation figures, and the best setting."""
    task = problem(problem_name, VALIDATION, TRIED)
    solve, grid = GRIDS[method]
    x, tried = start(task), []
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        tried.append({**setting, "mpjpe": task.error(solve(task, x, **setting))})
    best = min(tried, key=lambda row: row["mpjpe"])
    return {"problem": problem_name, "method": method, "chosen": {key: best[key] for key in grid}, "tried": tried}


def tuned(problem_name: str, method: str) -> dict[str, float]:
    """The setting that validation chose."""
    for row in stored.rows(STORED, COMMAND, "tuned"):
        if (row["problem"], row["method"]) == (problem_name, method):
            return row["chosen"]
    raise ValueError(f"{method!r} is not tuned for {problem_name!r}; run `{COMMAND} tuned`")


def measure(problem_name: str, seed: int) -> Row:
    """MPJPE in millimetres and CPU seconds of every method, and of ScoreHMR without guidance, on held-out figures."""
    task = problem(problem_name, seed)
    x = start(task)
    row, seconds = {"regressor": task.error(x)}, {}
    for method, (solve, _) in GRIDS.items():
        began = time.process_time()
        row[method] = task.error(solve(task, x, **tuned(problem_name, method)))
        seconds[method] = round(time.process_time() - began, 2)
    row["ScoreHMR, no guidance"] = task.error(refined(task, x, **tuned(problem_name, "ScoreHMR"), guide=False))
    return {"problem": problem_name, "seed": seed, "mpjpe": row, "seconds": seconds}


SWITCHES: dict[str, dict[str, Any]] = {
    "noise added in place of the inversion": {"start": "noise"},
    "from noise alone": {"start": "nothing"},
    "unconditional prior": {"condition": False},
}
"""One part of ScoreHMR switched off, at the same settings."""


def ablate(problem_name: str, switch: str) -> Row:
    """MPJPE of ScoreHMR with one part off, on the figures of seed 0."""
    task = problem(problem_name, 0)
    error = task.error(refined(task, start(task), **tuned(problem_name, "ScoreHMR"), **SWITCHES[switch]))
    return {"problem": problem_name, "switch": switch, "mpjpe": error}


def rows() -> list[Row]:
    """The measured rows, one for each problem and seed; ValueError, with the command, where none is."""
    return stored.rows(STORED, COMMAND, "measured")


PARTS = {
    "tuned": (
        lambda problem, method: tune(problem, method),
        [{"problem": problem, "method": method} for problem in PROBLEMS for method in GRIDS],
    ),
    "measured": (
        lambda problem, seed: measure(problem, seed),
        [{"problem": problem, "seed": seed} for problem in PROBLEMS for seed in SEEDS],
    ),
    "ablated": (
        lambda problem, switch: ablate(problem, switch),
        [{"problem": problem, "switch": switch} for problem in PROBLEMS for switch in SWITCHES],
    ),
}


def main() -> None:
    """Tune and measure what is missing, on one thread."""
    with devices.one_thread():
        stored.run(STORED, COMMAND, PARTS, ())


if __name__ == "__main__":
    main()
