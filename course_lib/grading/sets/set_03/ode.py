"""Items 03.1 and 03.2: the probability-flow ODE with Euler's step, and Heun's rule."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import DENOISERS, NOT_FINITE, PICTURE, PLANE, ask, level, step_case, with_gaps
from course_lib.grading.sets.tools import T, named
from course_lib.singlestep import heun


def _slope(D, x: Tensor, sigma: Tensor) -> Tensor:
    """dx/dsigma of the probability-flow ODE, which is the noise that D sees in x."""
    return (x - D(x, sigma)) / sigma


@item(
    "03.1", title="The probability-flow ODE, and Euler's step", function="euler_step", points=1, minutes=10, difficulty=1,
    answers=("course_lib.steps.ddim", "course_lib.steps.ddim_eta", "course_lib.steps.euler", "course_lib.integrals.noise_in"),
    hints=(
        "Tweedie: the score is (D(x, sigma) - x) / sigma^2. Put it into dx/dsigma = -sigma score.",
        "The slope is (x - D(x, sigma)) / sigma. It is the noise eps that D sees in x = x0 + sigma eps.",
        "Euler's step follows the slope over the length sigma_next - sigma, which is negative on the way down.",
    ),
)  # fmt: skip
class EulerStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            step_case(rng, "gaussian", PLANE),
            step_case(rng, "peaks", PICTURE),
            step_case(rng, "turned", PLANE, ratio=1.6),
        ]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, DENOISERS[case["D"]], T(case["x"]), level(case["sigma"]), level(case["sigma_next"]))
        return arrays(**named(result, "slope", "x_next"))

    def reference(D, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        slope = _slope(D, x, sigma)
        return slope, x + (sigma_next - sigma) * slope

    @mistake("the slope has the wrong sign: more noise leads away from D(x, sigma), so it is (x - D) / sigma")
    def sign_turned(D, x, sigma, sigma_next):
        slope = -_slope(D, x, sigma)
        return slope, x + (sigma_next - sigma) * slope

    @mistake("D is taken for the noise: D(x, sigma) is the estimate of the *clean* sample, and the noise in x is (x - D) / sigma")
    def clean_for_noise(D, x, sigma, sigma_next):
        slope = D(x, sigma)
        return slope, x + (sigma_next - sigma) * slope

    @mistake("this slope is the score, (D - x) / sigma^2; the flow's is -sigma times the score")
    def score(D, x, sigma, sigma_next):
        slope = -_slope(D, x, sigma) / sigma
        return slope, x + (sigma_next - sigma) * slope

    @mistake(
        "this slope is minus the score: x - D is divided by sigma^2; the factor sigma of -sigma score takes one of them away"
    )
    def over_variance(D, x, sigma, sigma_next):
        slope = _slope(D, x, sigma) / sigma
        return slope, x + (sigma_next - sigma) * slope

    @mistake("x - D is not divided by sigma: that is the slope in log sigma, dx/dlog sigma; in sigma it is (x - D) / sigma")
    def in_log_sigma(D, x, sigma, sigma_next):
        slope = x - D(x, sigma)
        return slope, x + (sigma_next - sigma) * slope

    @mistake(
        "this slope is twice the right one: it is the drift of the reverse *SDE*, whose noise takes half of it back; the ODE has none"
    )
    def drift_of_the_sde(D, x, sigma, sigma_next):
        slope = 2 * _slope(D, x, sigma)
        return slope, x + (sigma_next - sigma) * slope

    @mistake(
        "this slope is halved twice: the half of g^2 / 2 score is already in -sigma score, since g^2 = d(sigma^2)/dsigma = 2 sigma"
    )
    def halved_twice(D, x, sigma, sigma_next):
        slope = _slope(D, x, sigma) / 2
        return slope, x + (sigma_next - sigma) * slope

    @mistake("the slope is right, the step goes the other way: its length is sigma_next - sigma, negative on the way down")
    def backwards(D, x, sigma, sigma_next):
        slope = _slope(D, x, sigma)
        return slope, x + (sigma - sigma_next) * slope

    @mistake(
        "two signs cancel: x_next is right, but the slope points to the data; dx/dsigma is (x - D) / sigma, and the length sigma_next - sigma is negative"
    )
    def both_signs(D, x, sigma, sigma_next):
        slope = -_slope(D, x, sigma)
        return slope, x + (sigma - sigma_next) * slope

    @mistake("the slope is right, the step goes all the way to sigma = 0 and ends at D; its length is sigma_next - sigma")
    def all_the_way(D, x, sigma, sigma_next):
        slope = _slope(D, x, sigma)
        return slope, x - sigma * slope

    @mistake("the slope is right, the step has the length sigma_next; its length is the difference sigma_next - sigma")
    def length_of_the_level(D, x, sigma, sigma_next):
        slope = _slope(D, x, sigma)
        return slope, x + sigma_next * slope

    @mistake("D is asked at sigma_next; x has the noise of sigma (you divide by the right level)")
    def asked_at_the_end(D, x, sigma, sigma_next):
        slope = (x - D(x, sigma_next)) / sigma
        return slope, x + (sigma_next - sigma) * slope

    @mistake("x - D is divided by sigma_next; the noise in x has the level sigma (you ask D at the right one)")
    def divided_by_the_end(D, x, sigma, sigma_next):
        slope = (x - D(x, sigma)) / sigma_next
        return slope, x + (sigma_next - sigma) * slope

    @mistake("the whole slope is taken at sigma_next; Euler takes it where the step starts: x has the noise of sigma")
    def slope_of_the_end(D, x, sigma, sigma_next):
        slope = _slope(D, x, sigma_next)
        return slope, x + (sigma_next - sigma) * slope

    @mistake("the pair is turned round: return the slope first, then x_next")
    def pair_turned(D, x, sigma, sigma_next):
        slope = _slope(D, x, sigma)
        return x + (sigma_next - sigma) * slope, slope

    @law("x - sigma * slope must be D(x, sigma): the slope is the noise that D sees in x")
    def noise_in_x(case: Case, out: Outputs) -> bool:
        return bool(np.allclose(case["x"] - case["sigma"] * out["slope"], ask(case, case["x"], case["sigma"])))

    @law("the slope is right, but x_next is not x plus the slope times the length of the step")
    def follows_the_slope(case: Case, out: Outputs) -> bool:
        return bool(np.allclose(out["x_next"], case["x"] + (case["sigma_next"] - case["sigma"]) * out["slope"]))


def _heun(D, x: Tensor, sigma: Tensor, sigma_next: Tensor, second) -> Tensor:
    """x + (sigma' - sigma) (d + d') / 2 with d' = second(x^), x^ the end of Euler's step; Euler's step where sigma' = 0."""
    d, length = _slope(D, x, sigma), sigma_next - sigma
    x_hat = x + length * d
    return x + length * (d + second(x_hat)) / 2 if sigma_next > 0 else x_hat


@item(
    "03.2", title="Heun's rule", function="heun_step", points=2, minutes=15, difficulty=2,
    answers=("course_lib.singlestep.heun", "course_lib.stochastic.edm_stochastic", "course_lib.multistep.plms"),
    hints=(
        "First Euler's step of 03.1 from x, with the slope d: it ends at x_hat.",
        "Then the slope anew, at the other end: d_next = (x_hat - D(x_hat, sigma_next)) / sigma_next.",
        "The step starts at x again, with the mean of the two: x + (sigma_next - sigma) (d + d_next) / 2.",
        "At sigma_next = 0 the second slope is 0 / 0. There Algorithm 1 keeps Euler's step: `if sigma_next == 0: return x_hat`.",
    ),
)  # fmt: skip
class HeunStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            step_case(rng, "peaks", PLANE),
            step_case(rng, "turned", PICTURE),
            step_case(rng, "point", PLANE),
            step_case(rng, "gaussian", PLANE, ratio=1.5),
            step_case(rng, "peaks", PLANE, ratio=0.0),
        ]

    def drive(fn, case: Case) -> Outputs:
        return with_gaps(call(fn, DENOISERS[case["D"]], T(case["x"]), level(case["sigma"]), level(case["sigma_next"])))

    def reference(D, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return heun(D, x, sigma, sigma_next)[0]

    @mistake("this is Euler's step: the slope is not taken a second time, at the end of the step")
    def euler_alone(D, x, sigma, sigma_next):
        return x + (sigma_next - sigma) * _slope(D, x, sigma)

    @mistake("the step to sigma = 0 takes the second slope too, which is 0 / 0 there; end with Euler's step")
    def corrected_at_zero(D, x, sigma, sigma_next):
        d, length = _slope(D, x, sigma), sigma_next - sigma
        return x + length * (d + _slope(D, x + length * d, sigma_next)) / 2

    @mistake(
        "in the step to sigma = 0 the second slope, saved from 0 / 0, counts as 0 in the mean, and half of the step is lost; there is no second slope there: end with Euler's whole step"
    )
    def half_a_step_to_zero(D, x, sigma, sigma_next):
        return (
            _heun(D, x, sigma, sigma_next, lambda x_hat: _slope(D, x_hat, sigma_next))
            if sigma_next > 0
            else (x + D(x, sigma)) / 2
        )

    @mistake("the step to sigma = 0 returns x as it was; only the second slope is left out there, Euler's step stays")
    def end_left_out(D, x, sigma, sigma_next):
        return _heun(D, x, sigma, sigma_next, lambda x_hat: _slope(D, x_hat, sigma_next)) if sigma_next > 0 else x

    @mistake("the mean slope is added to x_hat, so that the step is taken twice; it replaces Euler's slope and starts at x")
    def from_x_hat(D, x, sigma, sigma_next):
        d, length = _slope(D, x, sigma), sigma_next - sigma
        x_hat = x + length * d
        return x_hat + length * (d + _slope(D, x_hat, sigma_next)) / 2 if sigma_next > 0 else x_hat

    @mistake("the second slope is taken at sigma; x_hat stands at sigma_next: ask D there, and divide by it")
    def second_at_sigma(D, x, sigma, sigma_next):
        return _heun(D, x, sigma, sigma_next, lambda x_hat: _slope(D, x_hat, sigma))

    @mistake("D is asked at sigma the second time; x_hat has the noise of sigma_next (you divide by the right level)")
    def second_asked_at_sigma(D, x, sigma, sigma_next):
        return _heun(D, x, sigma, sigma_next, lambda x_hat: (x_hat - D(x_hat, sigma)) / sigma_next)

    @mistake("D is asked about x the second time; ask it about x_hat, the point that has the noise of sigma_next")
    def second_asked_about_x(D, x, sigma, sigma_next):
        return _heun(D, x, sigma, sigma_next, lambda x_hat: (x_hat - D(x, sigma_next)) / sigma_next)

    @mistake("the second slope is divided by sigma; at x_hat the level is sigma_next (you ask D at the right one)")
    def second_divided_by_sigma(D, x, sigma, sigma_next):
        return _heun(D, x, sigma, sigma_next, lambda x_hat: (x_hat - D(x_hat, sigma_next)) / sigma)

    @mistake("the second slope is taken at x; it belongs to the end of Euler's step, x_hat")
    def second_at_x(D, x, sigma, sigma_next):
        return _heun(D, x, sigma, sigma_next, lambda x_hat: _slope(D, x, sigma_next))

    @mistake("the second slope subtracts D(x_hat) from x; the noise in x_hat is x_hat - D(x_hat, sigma_next), over sigma_next")
    def second_from_x(D, x, sigma, sigma_next):
        return _heun(D, x, sigma, sigma_next, lambda x_hat: (x - D(x_hat, sigma_next)) / sigma_next)

    @mistake(
        "this is x + (sigma_next - sigma) (d + d' / 2): the bracket in (d + d') / 2 is missing, or the ends x_hat and x_hat + (sigma_next - sigma) d' are averaged; average the slopes, and start at x"
    )
    def half_of_the_second(D, x, sigma, sigma_next):
        d, length = _slope(D, x, sigma), sigma_next - sigma
        x_hat = x + length * d
        return x + length * (d + _slope(D, x_hat, sigma_next) / 2) if sigma_next > 0 else x_hat

    @mistake("the step leads away from D: the slope, (x - D) / sigma, or the length, sigma_next - sigma, has the wrong sign")
    def backwards(D, x, sigma, sigma_next):
        d, length = _slope(D, x, sigma), sigma - sigma_next
        x_hat = x + length * d
        return x + length * (d + _slope(D, x_hat, sigma_next)) / 2 if sigma_next > 0 else x_hat

    @mistake("the slopes are added, not averaged: the factor 1/2 is missing")
    def slopes_added(D, x, sigma, sigma_next):
        d, length = _slope(D, x, sigma), sigma_next - sigma
        x_hat = x + length * d
        return x + length * (d + _slope(D, x_hat, sigma_next)) if sigma_next > 0 else x_hat

    @mistake("only the second slope is used, which is again a rule of order 1; use the mean of both")
    def second_alone(D, x, sigma, sigma_next):
        length = sigma_next - sigma
        x_hat = x + length * _slope(D, x, sigma)
        return x + length * _slope(D, x_hat, sigma_next) if sigma_next > 0 else x_hat

    @mistake(
        "the clean estimates D are averaged, and one step is taken with their mean: that is DPM-Solver++(2S), another rule of order 2; Heun averages the slopes"
    )
    def estimates_averaged(D, x, sigma, sigma_next):
        D_0, keep = D(x, sigma), sigma_next / sigma
        x_hat = D_0 + keep * (x - D_0)
        D_bar = (D_0 + D(x_hat, sigma_next)) / 2
        return D_bar + keep * (x - D_bar) if sigma_next > 0 else x_hat

    @mistake("this is the midpoint rule, the slope halfway; it is of order 2 as well, but Heun takes the mean of both ends")
    def midpoint(D, x, sigma, sigma_next):
        d, length = _slope(D, x, sigma), sigma_next - sigma
        return x + length * _slope(D, x + length / 2 * d, (sigma + sigma_next) / 2) if sigma_next > 0 else x + length * d

    @law(NOT_FINITE)
    def is_finite(case: Case, out: Outputs) -> bool:
        return bool(out["finite"].all())

    @law("the step to sigma = 0 must end at D(x, sigma)")
    def ends_at_D(case: Case, out: Outputs) -> bool:
        return case["sigma_next"] > 0 or bool(np.allclose(out["x"], ask(case, case["x"], case["sigma"])))

    @law(
        "where D is the same everywhere (all data are one point) the path is straight, and the step must be exact: D + sigma_next / sigma (x - D)"
    )
    def straight(case: Case, out: Outputs) -> bool:
        x0 = ask(case, case["x"], case["sigma"])
        return case["D"] != "point" or bool(np.allclose(out["x"], x0 + case["sigma_next"] / case["sigma"] * (case["x"] - x0)))
