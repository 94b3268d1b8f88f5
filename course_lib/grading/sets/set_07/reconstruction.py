"""Items 07.3 and 07.4: the gradient that DPS takes through the denoiser, and how far it goes along it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import DENOISERS, level, noised, step_case
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_07.common import Measure, as_in_the_loop, differentiated, flat_squares, measure
from course_lib.grading.sets.tools import T, fit


def _distance(D, A: Measure, y: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """|y - A(D(x, sigma))| of each sample, (B,)."""
    return flat_squares(y - A(D(x, sigma))).sqrt()


@item(
    "07.3", title="The gradient of DPS", function="residual_slope", points=2, minutes=20, difficulty=2,
    answers=("course_lib.posterior.gradient.dps", "course_lib.posterior.gradient.dps_score", "course_lib.posterior.gradient.pigdm"),
    hints=(
        "The loop runs under torch.no_grad(). Inside `with torch.enable_grad():` make x = x.detach().requires_grad_(), and only then ask x0 = D(x, sigma).",
        "A norm for each sample: (y - A(x0)).flatten(1).norm(dim=1), (B,). It is the norm, not its square.",
        "torch.autograd.grad(norms.sum(), x)[0]: the sum has for each sample the gradient of its own norm, since samples do not meet in D.",
    ),
)  # fmt: skip
class ResidualSlope:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(A: str, D: str, shape: tuple[int, ...], m: int) -> Case:
            sigma = float(rng.uniform(0.6, 1.4))
            case = {"A": A, "D": D, "matrix": rng.normal(size=(m, shape[-1])), "sigma": sigma, "x": noised(rng, shape, sigma),
                    "probe": rng.normal(size=shape)}  # fmt: skip
            seen = measure(case)(T(rng.normal(size=shape))).numpy()
            return case | {"y": seen + rng.normal(size=seen.shape)}

        return [
            case("matrix", "turned", (3, 6), 3),
            case("means", "turned", (2, 1, 4, 4), 1),
            case("squares", "peaks", (3, 4), 3),
        ]

    def drive(fn, case: Case) -> Outputs:
        with as_in_the_loop():
            result = call(fn, DENOISERS[case["D"]], measure(case), T(case["y"]), T(case["x"]), level(case["sigma"]))
        return arrays(gradient=result, carries_a_graph=float(getattr(result, "requires_grad", False)))

    def reference(D, A: Measure, y: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return differentiated(lambda x: _distance(D, A, y, x, sigma), x)

    @mistake("D was detached: this is the gradient by x0, without the network's Jacobian; differentiate by x, *through* D")
    def jacobian_left_out(D, A, y, x, sigma):
        return differentiated(lambda x0: flat_squares(y - A(x0)).sqrt(), D(x, sigma))

    @mistake("this is the gradient of the *squared* norm, 2 |r| times too long: it grows with the residual; take the norm")
    def squared_norm(D, A, y, x, sigma):
        return differentiated(lambda x: flat_squares(y - A(D(x, sigma))), x)

    @mistake("this is the gradient of half the squared norm, |r| times too long; take the norm")
    def half_the_square(D, A, y, x, sigma):
        return differentiated(lambda x: flat_squares(y - A(D(x, sigma))) / 2, x)

    @mistake("the norm is taken over the whole batch: a sample's gradient then depends on its neighbours; take one norm a sample")
    def norm_of_the_batch(D, A, y, x, sigma):
        return differentiated(lambda x: flat_squares(y - A(D(x, sigma))).sum().sqrt(), x)

    @mistake("the norms are averaged over the batch: each gradient is divided by the number of samples; sum them")
    def averaged_over_samples(D, A, y, x, sigma):
        return differentiated(lambda x: _distance(D, A, y, x, sigma).mean(), x)

    @mistake("the norm is taken along the last axis only, row by row of the picture; flatten each sample first")
    def rows_of_the_picture(D, A, y, x, sigma):
        return differentiated(lambda x: (y - A(D(x, sigma))).norm(dim=-1), x)

    @mistake("this is the mean of the squares: the gradient is that of the squared norm, over the number of measurements")
    def mean_square(D, A, y, x, sigma):
        return differentiated(lambda x: (y - A(D(x, sigma))).square().flatten(1).mean(1), x)

    @mistake("this is the root of the *mean* square: it is shorter by the root of the number of measurements; the norm sums")
    def root_mean_square(D, A, y, x, sigma):
        return differentiated(lambda x: (y - A(D(x, sigma))).square().flatten(1).mean(1).sqrt(), x)

    @mistake(
        "this is the gradient of the sum of |r_i|, in which every residual counts alike; the norm is the root of the sum of squares"
    )
    def absolute_values(D, A, y, x, sigma):
        return differentiated(lambda x: (y - A(D(x, sigma))).abs(), x)

    @mistake("the sign is turned: that is the way down; return the gradient itself, the step of 07.4 subtracts it")
    def sign_turned(D, A, y, x, sigma):
        return -differentiated(lambda x: _distance(D, A, y, x, sigma), x)

    @mistake("this is the gradient of log N(y; A(x0), I), -|r|² / 2: a score with noise of size 1. DPS takes the gradient of |r|")
    def log_density(D, A, y, x, sigma):
        return differentiated(lambda x: -flat_squares(y - A(D(x, sigma))) / 2, x)

    @mistake(
        "the squared norm's gradient is divided by |r|: as in the paper's algorithm that is *twice* the gradient of |r|, 2 |r| / |r|"
    )
    def twice(D, A, y, x, sigma):
        return 2 * differentiated(lambda x: _distance(D, A, y, x, sigma), x)

    @mistake("the residual is that of the noisy x, y - A(x): measure the estimate D(x, sigma)")
    def residual_of_x(D, A, y, x, sigma):
        return differentiated(lambda x: flat_squares(y - A(x)).sqrt(), x)

    @mistake(
        "the gradient is scaled to length 1 in each sample: its length says how much the network's answer depends on x; keep it"
    )
    def unit_length(D, A, y, x, sigma):
        slope = differentiated(lambda x: _distance(D, A, y, x, sigma), x)
        return slope / flat_squares(slope).sqrt().reshape(-1, *[1] * (x.ndim - 1))

    @mistake(
        "the gradient is multiplied by sigma²: that belongs to a score that is turned into an estimate; here it is the gradient alone"
    )
    def times_the_variance(D, A, y, x, sigma):
        return sigma**2 * differentiated(lambda x: _distance(D, A, y, x, sigma), x)

    @mistake("every sample gets the measurement of the first one; each has its own")
    def first_measurement(D, A, y, x, sigma):
        return differentiated(lambda x: _distance(D, A, y[:1], x, sigma), x)

    @mistake(
        "the gradient still carries a graph (create_graph, or a product made under enable_grad): over the steps all networks would be kept in memory; return it detached"
    )
    def graph_kept_alive(D, A, y, x, sigma):
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(_distance(D, A, y, x, sigma).sum(), x, create_graph=True)[0]

    @law("a small move v of a sample must change its own |y - A(D(x, sigma))| by the product of v and the gradient")
    def slope(case: Case, out: Outputs) -> bool:
        A, y, sigma, h = measure(case), T(case["y"]), level(case["sigma"]), 1e-4
        above, below = (_distance(DENOISERS[case["D"]], A, y, T(case["x"] + s * h * case["probe"]), sigma) for s in (1, -1))
        expected = ((above - below) / (2 * h)).numpy()
        products = (out["gradient"] * case["probe"]).reshape(len(expected), -1).sum(1)
        return bool(np.allclose(products, expected, rtol=1e-4, atol=1e-5))


# --- 07.4 ----------------------------------------------------------------------------------------------

Way = Callable[[Tensor, Tensor], Tensor]


def _moved(D) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Deterministic DDIM with D."""
    return lambda x, sigma, sigma_next: D(x, sigma) + sigma_next / sigma * (x - D(x, sigma))


def _slope(x: Tensor, sigma: Tensor) -> Tensor:
    """Stands for a gradient: it depends on x, and on the level."""
    return torch.sin(1.3 * x) + x / (1 + sigma)


def _vp(sigma: Tensor) -> Tensor:
    """sqrt(1 + sigma^2), by which x is longer than x_vp."""
    return (1 + sigma**2).sqrt()


@item(
    "07.4", title="How far to go along it", function="dps_step", points=1, minutes=15, difficulty=2,
    answers=("course_lib.posterior.gradient.dps",),
    hints=(
        "Write both x in DDPM's coordinate: x = sqrt(1 + sigma²) x_vp before the step and x' = sqrt(1 + sigma'²) x_vp' after it. The published step is made between the two x_vp.",
        "Chain rule: a small change of x_vp is sqrt(1 + sigma²) times as large in x, so grad by x_vp = sqrt(1 + sigma²) grad by x.",
        "Multiply the published line by sqrt(1 + sigma'²): x' - zeta sqrt(1 + sigma'²) sqrt(1 + sigma²) slope(x, sigma), with x' = move(x, sigma, sigma_next).",
    ),
)  # fmt: skip
class DPSStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(D: str, zeta: float, ratio: float | None = None) -> Case:
            return step_case(rng, D, (3, 4), ratio) | {"zeta": zeta}

        zeta = float(rng.uniform(0.3, 0.8))
        return [case("turned", 0.0), case("turned", zeta), case("peaks", zeta, 0.0)]

    def drive(fn, case: Case) -> Outputs:
        levels = level(case["sigma"]), level(case["sigma_next"])
        return arrays(x=call(fn, _moved(DENOISERS[case["D"]]), _slope, T(case["x"]), *levels, case["zeta"]))

    def reference(move, slope: Way, x: Tensor, sigma: Tensor, sigma_next: Tensor, zeta: float) -> Tensor:
        size = zeta * ((1 + sigma**2) * (1 + sigma_next**2)).sqrt()
        return move(x, sigma, sigma_next) - size * slope(x, sigma)

    @mistake(
        "zeta is used as it is: the published step is made in x_vp = x / sqrt(1 + sigma²), and both changes of coordinate are missing"
    )
    def no_factor(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * slope(x, sigma)

    @mistake(
        "only the gradient is converted, sqrt(1 + sigma²); the result lies in the coordinate of sigma', and needs sqrt(1 + sigma'²) too"
    )
    def gradient_alone(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * _vp(sigma) * slope(x, sigma)

    @mistake("only the result is converted, sqrt(1 + sigma'²); the gradient by x_vp is sqrt(1 + sigma²) times that by x")
    def result_alone(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * _vp(sigma_next) * slope(x, sigma)

    @mistake("both roots divide: a gradient transforms the other way than its variable, and x' is longer than x_vp', not shorter")
    def divided(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta / (_vp(sigma) * _vp(sigma_next)) * slope(x, sigma)

    @mistake(
        "the gradient is converted the wrong way, sqrt(1 + sigma'²) / sqrt(1 + sigma²): grad by x_vp = dx/dx_vp grad by x, and dx/dx_vp = sqrt(1 + sigma²)"
    )
    def chain_rule_turned(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * _vp(sigma_next) / _vp(sigma) * slope(x, sigma)

    @mistake("the result is converted the wrong way, sqrt(1 + sigma²) / sqrt(1 + sigma'²): x' = sqrt(1 + sigma'²) x_vp'")
    def result_turned(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * _vp(sigma) / _vp(sigma_next) * slope(x, sigma)

    @mistake("the roots are missing, (1 + sigma²)(1 + sigma'²): x is longer than x_vp by the *root* of 1 + sigma²")
    def roots_forgotten(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * (1 + sigma**2) * (1 + sigma_next**2) * slope(x, sigma)

    @mistake("both roots are taken at sigma, 1 + sigma²; the result lies at sigma', and has sqrt(1 + sigma'²)")
    def both_at_sigma(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * (1 + sigma**2) * slope(x, sigma)

    @mistake("both roots are taken at sigma', 1 + sigma'²; the gradient was taken at sigma, and has sqrt(1 + sigma²)")
    def both_at_the_next(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * (1 + sigma_next**2) * slope(x, sigma)

    @mistake("the roots are added; one change of coordinate follows the other, and their factors multiply")
    def roots_added(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * (_vp(sigma) + _vp(sigma_next)) * slope(x, sigma)

    @mistake("the sign is turned: this climbs, and the residual grows; the gradient is subtracted")
    def sign_turned(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) + zeta * _vp(sigma) * _vp(sigma_next) * slope(x, sigma)

    @mistake(
        "the gradient is taken at x' and sigma', after the step; DPS takes it at x and sigma, where the network was asked already"
    )
    def gradient_after_the_step(move, slope, x, sigma, sigma_next, zeta):
        x_next = move(x, sigma, sigma_next)
        return x_next - zeta * _vp(sigma) * _vp(sigma_next) * slope(x_next, sigma_next)

    @mistake(
        "x is moved along the gradient *before* the step, which then starts elsewhere; the step is made from x, and its result is moved"
    )
    def before_the_step(move, slope, x, sigma, sigma_next, zeta):
        return move(x - zeta * _vp(sigma) * _vp(sigma_next) * slope(x, sigma), sigma, sigma_next)

    @mistake(
        "the step is missing: x itself is moved along the gradient and stays at sigma; start from move(x, sigma, sigma_next)"
    )
    def no_step(move, slope, x, sigma, sigma_next, zeta):
        return x - zeta * _vp(sigma) * _vp(sigma_next) * slope(x, sigma)

    @mistake(
        "the size is sigma², as for a score that changes the estimate; the published step knows only the two changes of coordinate"
    )
    def size_of_a_score(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * sigma**2 * slope(x, sigma)

    @mistake(
        "the size is sigma² - sigma'², that of a reverse-SDE step; the published step knows only the two changes of coordinate"
    )
    def size_of_the_step(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * (sigma**2 - sigma_next**2) * slope(x, sigma)

    @mistake(
        "the 1 under the roots is missing, sigma sigma': alpha_bar = 1 / (1 + sigma²), and at sigma' = 0 nothing would be left of the step"
    )
    def one_forgotten(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) - zeta * sigma * sigma_next * slope(x, sigma)

    @mistake("the result is left in DDPM's coordinate, x' / sqrt(1 + sigma'²); here x' = x0 + sigma' eps")
    def left_in_vp(move, slope, x, sigma, sigma_next, zeta):
        return move(x, sigma, sigma_next) / _vp(sigma_next) - zeta * _vp(sigma) * slope(x, sigma)

    @law("with zeta = 0 the result must be that of the plain step, move(x, sigma, sigma_next)")
    def plain(case: Case, out: Outputs) -> bool:
        return case["zeta"] > 0 or close(out["x"], _plain(case))

    @law("what is taken off the plain step must be a multiple of slope(x, sigma)")
    def along_the_slope(case: Case, out: Outputs) -> bool:
        return case["zeta"] == 0 or fit(_plain(case) - out["x"], _at_x(case))[1] < 1e-8

    @law(
        "the multiple of slope(x, sigma) has the wrong size: it is zeta times a root for the gradient's coordinate and one for the result's"
    )
    def size(case: Case, out: Outputs) -> bool:
        wanted = case["zeta"] * np.sqrt((1 + case["sigma"] ** 2) * (1 + case["sigma_next"] ** 2))
        return case["zeta"] == 0 or close(fit(_plain(case) - out["x"], _at_x(case))[0], wanted)


def _plain(case: Case) -> np.ndarray:
    return _moved(DENOISERS[case["D"]])(T(case["x"]), level(case["sigma"]), level(case["sigma_next"])).numpy()


def _at_x(case: Case) -> np.ndarray:
    return _slope(T(case["x"]), level(case["sigma"])).numpy()
