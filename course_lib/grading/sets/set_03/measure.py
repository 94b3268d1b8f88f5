"""Items 03.5 and 03.8: the measured order of a rule, and the choice of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import level
from course_lib.grading.sets.tools import T
from course_lib.schedules import EDM, Linear, exponential, karras, uniform


@item(
    "03.5", title="The measured order", function="order", points=1, minutes=5, difficulty=1,
    hints=(
        "error(n) = c / n^p. What is error(n) / error(2n)?",
        "The ratio is 2^p. Which logarithm undoes that?",
        "log2(error_n / error_2n), one number for each rule.",
    ),
)  # fmt: skip
class Order:
    def cases(rng: np.random.Generator) -> list[Case]:
        result = []
        for _ in range(3):
            coarse = 10 ** rng.uniform(-3, -0.5, 4)
            result.append({"coarse": coarse, "fine": coarse * 2.0 ** -rng.uniform(0.7, 3.3, 4)})
        return result

    def drive(fn, case: Case) -> Outputs:
        return arrays(order=call(fn, T(case["coarse"]), T(case["fine"])))

    def reference(error_n: Tensor, error_2n: Tensor) -> Tensor:
        return (error_n / error_2n).log2()

    @mistake("the logarithm is the natural one; the steps were doubled, so it is to the base 2: log2, or log divided by log 2")
    def natural_logarithm(error_n, error_2n):
        return (error_n / error_2n).log()

    @mistake("the logarithm is to the base 10; the steps were doubled, not multiplied by ten: base 2")
    def base_ten(error_n, error_2n):
        return (error_n / error_2n).log10()

    @mistake("the ratio is turned round and the order negative; the error falls by 2^p: log2(error_n / error_2n)")
    def ratio_turned(error_n, error_2n):
        return (error_2n / error_n).log2()

    @mistake("this is the factor by which the error falls, 2^p; the order is p, its logarithm")
    def factor(error_n, error_2n):
        return error_n / error_2n

    @mistake(
        "this is the ratio of two logarithms; the order is the logarithm of the ratio, a difference: log2(error_n) - log2(error_2n)"
    )
    def ratio_of_logarithms(error_n, error_2n):
        return error_n.log2() / error_2n.log2()

    @mistake("this is the logarithm of the difference of the errors; the order is the difference of their logarithms")
    def logarithm_of_difference(error_n, error_2n):
        return (error_n - error_2n).log2()

    @mistake("1 is added: that is the order of the error of a *single* step; the errors here are those at the end, after n steps")
    def one_more(error_n, error_2n):
        return (error_n / error_2n).log2() + 1

    @mistake(
        "1 is taken off, as if the errors were those of a single step, O(h^(p+1)); they are those at the end, after n steps: O(h^p)"
    )
    def one_less(error_n, error_2n):
        return (error_n / error_2n).log2() - 1

    @mistake(
        "the result is rounded; a measured order is a measurement, and its distance from a whole number says how far the asymptotic range is"
    )
    def rounded(error_n, error_2n):
        return (error_n / error_2n).log2().round()

    @law("2 to the power of the order, times error_2n, must be error_n")
    def gives_back(case: Case, out: Outputs) -> bool:
        return bool(np.allclose(2 ** out["order"] * case["fine"], case["coarse"]))


def _levels(n: int, first: float, last: float, power: float) -> Tensor:  # mistakes may not call the library's grids
    """n levels from first to last, even in the power of sigma (in its logarithm where power = 0)."""
    share = torch.linspace(0, 1, n, dtype=torch.float64)
    if power == 0:
        return first * (last / first) ** share
    return (first**power + share * (last**power - first**power)) ** (1 / power)


def _to_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, torch.zeros(1, dtype=levels.dtype)])


def _grids(n: int, first: float, last: float, rho: float) -> tuple[Tensor, Tensor]:
    """Karras' grid and the geometric one, each with 0 at the end."""
    return _to_zero(_levels(n, first, last, 1 / rho)), _to_zero(_levels(n, first, last, 0))


def _best(error: Callable[[Tensor], float], *grids: Tensor) -> int:
    return int(np.argmin([error(grid) for grid in grids]))


def _choose(error: Callable[[Tensor], float], even: Tensor, grids: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
    return *grids, _best(error, *grids, even)


def _error(v: float, sigma_max: float) -> Callable[[Tensor], float]:
    """The error of DDIM along a grid for the data N(0, v), from x = 1 at sigma_max to 0; both ends are known in closed form."""

    def error(sigmas: Tensor) -> float:
        if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
            raise Unacceptable("error(sigmas) is asked with something that is no grid; expected a tensor of shape (n + 1,)")
        now, after = sigmas[:-1].double(), sigmas[1:].double()
        return abs(float(((v + now * after) / (v + now**2)).prod()) - math.sqrt(v / (v + sigma_max**2)))

    return error


@item(
    "03.8", title="Choose the grid", function="choose_grid", points=2, minutes=20, difficulty=2,
    answers=("course_lib.schedules.karras", "course_lib.schedules.EDM", "course_lib.schedules.exponential", "course_lib.schedules.log_snr", "course_lib.schedules.uniform"),
    hints=(
        "Both grids are n even steps of something, torch.linspace(0, 1, n), from sigma_max down to sigma_min, and a 0 at the end: n + 1 levels.",
        "Karras: even in sigma^(1/rho). Between sigma_max^(1/rho) and sigma_min^(1/rho) go in even steps, then take the power rho.",
        "Geometric: the ratio of neighbours is the same everywhere: sigma_max (sigma_min / sigma_max)^u with u from 0 to 1.",
        "Measure: [error(karras), error(geometric), error(even)], and the index of the smallest.",
    ),
)  # fmt: skip
class ChooseGrid:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [_case(rng, wanted) for wanted in (0, 1, 2)]

    def drive(fn, case: Case) -> Outputs:
        error = _error(case["v"], case["sigma_max"])
        result = call(fn, error, case["n"], case["sigma_min"], case["sigma_max"], case["rho"], T(case["even"]))
        if not (isinstance(result, (tuple, list)) and len(result) == 3):
            raise Unacceptable(
                f"the function returns {type(result).__name__}; expected three values (karras, geometric, index of the best)"
            )
        return arrays(karras=result[0], geometric=result[1], best=result[2])

    def reference(error, n: int, sigma_min: float, sigma_max: float, rho: float, even: Tensor) -> tuple[Tensor, Tensor, int]:
        return _choose(error, even, (karras(n, sigma_min, sigma_max, rho), exponential(n, sigma_min, sigma_max)))

    @mistake("rho stands on the wrong side: even steps are taken in sigma^(1/rho), and the result is raised to the power rho")
    def rho_inverted(error, n, sigma_min, sigma_max, rho, even):
        return _choose(error, even, _grids(n, sigma_max, sigma_min, 1 / rho))

    @mistake("rho is not used: this grid is even in sigma itself, with nearly all its steps in strong noise")
    def rho_forgotten(error, n, sigma_min, sigma_max, rho, even):
        return _choose(
            error, even, (_to_zero(_levels(n, sigma_max, sigma_min, 1)), _to_zero(_levels(n, sigma_max, sigma_min, 0)))
        )

    @mistake("sigma_min and sigma_max have changed places: a sampler's grid falls")
    def ends_swapped(error, n, sigma_min, sigma_max, rho, even):
        return _choose(error, even, _grids(n, sigma_min, sigma_max, rho))

    @mistake("the 0 at the end is missing: n levels are n - 1 steps, and the last noise stays in the sample")
    def no_zero(error, n, sigma_min, sigma_max, rho, even):
        return _choose(error, even, tuple(grid[:-1] for grid in _grids(n, sigma_max, sigma_min, rho)))

    @mistake(
        "the grids end at sigma_min after n steps; the budget is n levels down to sigma_min, the last step goes from there to 0"
    )
    def ends_at_sigma_min(error, n, sigma_min, sigma_max, rho, even):
        return _choose(error, even, tuple(grid[:-1] for grid in _grids(n + 1, sigma_max, sigma_min, rho)))

    @mistake("these are n + 1 levels and a 0: n + 1 steps, one more than the budget")
    def one_step_too_many(error, n, sigma_min, sigma_max, rho, even):
        return _choose(error, even, _grids(n + 1, sigma_max, sigma_min, rho))

    @mistake("the step is i / n and the grids never reach sigma_min: n levels have n - 1 gaps, so the share is i / (n - 1)")
    def one_gap_too_many(error, n, sigma_min, sigma_max, rho, even):
        karras, geometric = (_to_zero(grid[:n]) for grid in _grids(n + 1, sigma_max, sigma_min, rho))
        return _choose(error, even, (karras, geometric))

    @mistake("the geometric grid is even in sigma; it is to be even in log sigma: neighbours have the same ratio")
    def geometric_even_in_sigma(error, n, sigma_min, sigma_max, rho, even):
        karras = _grids(n, sigma_max, sigma_min, rho)[0]
        return _choose(error, even, (karras, _to_zero(_levels(n, sigma_max, sigma_min, 1))))

    @mistake("the first two are returned in the wrong order: Karras' grid first, then the geometric one")
    def pair_turned(error, n, sigma_min, sigma_max, rho, even):
        karras, geometric = _grids(n, sigma_max, sigma_min, rho)
        return geometric, karras, _best(error, karras, geometric, even)

    @mistake("the grids are right, but the *worst* is chosen: take the index of the least error")
    def worst_chosen(error, n, sigma_min, sigma_max, rho, even):
        grids = _grids(n, sigma_max, sigma_min, rho)
        return *grids, int(np.argmax([error(grid) for grid in (*grids, even)]))

    @mistake(
        "the grids are right, but Karras' is chosen without being measured; which grid is best depends on the rule, the data and the budget"
    )
    def always_karras(error, n, sigma_min, sigma_max, rho, even):
        return *_grids(n, sigma_max, sigma_min, rho), 0

    @mistake("the grids are right, but the third one, which was given, is left out of the comparison")
    def given_one_left_out(error, n, sigma_min, sigma_max, rho, even):
        grids = _grids(n, sigma_max, sigma_min, rho)
        return *grids, _best(error, *grids)

    @mistake("the grids are right, but the choice counts from 1; the index counts from 0: Karras, geometric, even")
    def counted_from_one(error, n, sigma_min, sigma_max, rho, even):
        grids = _grids(n, sigma_max, sigma_min, rho)
        return *grids, _best(error, *grids, even) + 1

    @law("both grids must start at sigma_max and end with sigma_min and 0")
    def ends(case: Case, out: Outputs) -> bool:
        wanted = [case["sigma_max"], case["sigma_min"], 0.0]
        return all(np.allclose(out[name][[0, -2, -1]], wanted) for name in ("karras", "geometric"))

    @law("the ends are right, but sigma^(1/rho) does not fall in even steps along Karras' grid")
    def karras_is_even(case: Case, out: Outputs) -> bool:
        return bool(np.allclose(np.diff(np.abs(out["karras"][:-1]) ** (1 / case["rho"]), 2), 0))

    @law("the ends are right, but the ratio of neighbours changes along the geometric grid")
    def geometric_is_even(case: Case, out: Outputs) -> bool:
        return bool(np.allclose(np.diff(np.log(np.abs(out["geometric"][:-1]) + 1e-300), 2), 0))

    @law("the grids are right, but the choice is not the index, 0, 1 or 2, of the grid with the least error(sigmas)")
    def least_error(case: Case, out: Outputs) -> bool:
        error = _error(case["v"], case["sigma_max"])
        return bool(out["best"] == _best(error, T(out["karras"]), T(out["geometric"]), T(case["even"])))


# What makes a grid the best: the variance of the data and the last level, drawn log-uniformly between these, and the time of `even`.
FAVOUR = {0: ((0.1, 1.0), (5e-4, 2e-3), "sigma"), 1: ((0.01, 0.04), (0.02, 0.05), "VP"), 2: ((0.6, 6.0), (5e-4, 3e-3), "VP")}


def _case(rng: np.random.Generator, wanted: int) -> Case:
    """Data, levels and a budget for which the grid number `wanted` is the best by a tenth or more."""
    variances, lows, time = FAVOUR[wanted]
    while True:
        n, rho, high = int(rng.integers(6, 10)), float(rng.uniform(3, 8)), float(rng.uniform(10, 25))
        v, low = (float(np.exp(rng.uniform(*np.log(ends)))) for ends in (variances, lows))
        if time == "VP":
            even = uniform(Linear(), n, *(float(Linear().t_of_sigma(level(one))) for one in (low, high)))
        else:
            even = uniform(EDM(low, high, 1.0), n)
        errors = [_error(v, high)(grid) for grid in (karras(n, low, high, rho), exponential(n, low, high), even)]
        if int(np.argmin(errors)) == wanted and sorted(errors)[1] > 1.1 * min(errors):
            return {"n": n, "rho": rho, "v": v, "sigma_min": low, "sigma_max": high, "even": even.numpy()}
