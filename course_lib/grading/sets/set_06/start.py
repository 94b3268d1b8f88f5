"""Item 06.7: CCDF's start from a noised estimate, with what is left of the grid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import geometric
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, fit, named
from course_lib.posterior import come_closer


def _left(sigmas: Tensor, t0: float) -> Tensor:
    """The last round(t0 n) of the n steps."""
    n = len(sigmas) - 1
    return sigmas[n - round(t0 * n) :]


@item(
    "06.7", title="CCDF's start", function="closer", points=1, minutes=10, difficulty=1,
    answers=("course_lib.posterior.ccdf.come_closer",),
    hints=(
        "A grid of n + 1 levels has n steps: n = len(sigmas) - 1. Of these m = round(t0 n) remain, the last ones.",
        "m steps have m + 1 levels, sigmas[n - m:]. x starts at the first of them: estimate + sigmas[n - m] z.",
    ),
)  # fmt: skip
class ComeCloser:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(n: int, m: int, off: float) -> Case:
            sigmas = np.append(geometric(rng, n - 1, 0.05, float(rng.uniform(5, 9))), 0.0)
            shape = (2, 1, 3, 3)
            draws = rng.normal(size=(2, *shape))
            return {"estimate": draws[0], "sigmas": sigmas, "t0": (m + off) / n, "z": draws[1]}

        below, above = rng.uniform(0.1, 0.3, 2)
        return [case(10, 3, -below), case(12, 10, -below), case(12, 8, above), case(7, 7, 0.0)]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, T(case["estimate"]), T(case["sigmas"]), case["t0"], T(case["z"]))
        return arrays(**named(result, "x", "grid"))

    def reference(estimate: Tensor, sigmas: Tensor, t0: float, z: Tensor) -> tuple[Tensor, Tensor]:
        return come_closer(estimate, sigmas, t0, lambda x: z)

    @mistake("the noise is that of sigmas[0], the top of the *whole* grid; the run starts at the first level that is left")
    def noise_of_the_top(estimate, sigmas, t0, z):
        return estimate + sigmas[0] * z, _left(sigmas, t0)

    @mistake("the grid is one step short: m steps have m + 1 levels, and sigmas[-m:] has m")
    def one_step_short(estimate, sigmas, t0, z):
        grid = _left(sigmas, t0)[1:]
        return estimate + grid[0] * z, grid

    @mistake("these are the *first* steps of the grid: the run would start from pure noise and stop in the middle")
    def first_steps(estimate, sigmas, t0, z):
        grid = sigmas[: len(_left(sigmas, t0))]
        return estimate + grid[0] * z, grid

    @mistake("t0 is taken as a share of the noise level, sigma <= t0 sigmas[0]; it is a share of the *steps*")
    def share_of_the_level(estimate, sigmas, t0, z):
        grid = sigmas[sigmas <= t0 * sigmas[0]]
        return estimate + grid[0] * z, grid

    @mistake("t0 is taken as the share of steps that is *skipped*; it is the share that remains")
    def share_skipped(estimate, sigmas, t0, z):
        grid = sigmas[min(round(t0 * (len(sigmas) - 1)), len(sigmas) - 2) :]
        return estimate + grid[0] * z, grid

    @mistake("the estimate gets no noise: at this level the network expects it, and would take the estimate's faults for data")
    def no_noise(estimate, sigmas, t0, z):
        return estimate.clone(), _left(sigmas, t0)

    @mistake("z is multiplied by the variance sigma²; it is sigma z")
    def variance_for_deviation(estimate, sigmas, t0, z):
        grid = _left(sigmas, t0)
        return estimate + grid[0] ** 2 * z, grid

    @mistake("x is in DDPM's coordinate, sqrt(alpha_bar) estimate + sqrt(1 - alpha_bar) z; here x = x0 + sigma z")
    def other_coordinate(estimate, sigmas, t0, z):
        grid = _left(sigmas, t0)
        return (estimate + grid[0] * z) / (1 + grid[0] ** 2).sqrt(), grid

    @mistake(
        "estimate and noise are mixed as (1 - t0) estimate + t0 z; the level is that of the grid, and the estimate keeps its size"
    )
    def mixed_by_t0(estimate, sigmas, t0, z):
        return (1 - t0) * estimate + t0 * z, _left(sigmas, t0)

    @mistake(
        "x starts at the right level, but the grid is the whole one: its first step would be made with the wrong noise level"
    )
    def whole_grid(estimate, sigmas, t0, z):
        return estimate + _left(sigmas, t0)[0] * z, sigmas.clone()

    @mistake("x has the noise of the level *after* the grid's first one; they must be the same")
    def one_level_late(estimate, sigmas, t0, z):
        grid = _left(sigmas, t0)
        return estimate + grid[1] * z, grid

    @mistake("the whole way is gone in fewer, longer steps; CCDF keeps the steps as they are, and leaves out the first ones")
    def longer_steps(estimate, sigmas, t0, z):
        n, m = len(sigmas) - 1, len(_left(sigmas, t0)) - 1
        grid = sigmas[torch.linspace(0, n, m + 1).round().long()]
        return estimate + grid[0] * z, grid

    @mistake("t0 n is cut, int(t0 n), and not rounded: int(0.29 * 100) is 28")
    def cut_not_rounded(estimate, sigmas, t0, z):
        n = len(sigmas) - 1
        grid = sigmas[n - int(t0 * n) :]
        return estimate + grid[0] * z, grid

    @mistake("the share is one of the n + 1 *levels*; it is one of the n steps: n = len(sigmas) - 1")
    def share_of_the_levels(estimate, sigmas, t0, z):
        grid = sigmas[len(sigmas) - round(t0 * len(sigmas)) :]
        return estimate + grid[0] * z, grid

    @law("m = round(t0 n) of the n steps must remain, and m steps have m + 1 levels")
    def steps(case: Case, out: Outputs) -> bool:
        return len(out["grid"]) == round(case["t0"] * (len(case["sigmas"]) - 1)) + 1

    @law("the grid must end as `sigmas` does, with the same levels")
    def same_end(case: Case, out: Outputs) -> bool:
        return close(out["grid"], case["sigmas"][-len(out["grid"]) :])

    @law("x must be the estimate plus noise of the grid's first level")
    def start(case: Case, out: Outputs) -> bool:
        factors, rest = fit(out["x"], case["estimate"], case["z"])
        return rest < 1e-8 and close(factors, [1, out["grid"][0]])
