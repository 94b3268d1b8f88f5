"""Item 03.11: a step of the reverse SDE, in the coordinates of the VP SDE."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import DENOISERS, PICTURE, PLANE, ask, level
from course_lib.grading.sets.tools import T, fit
from course_lib.sdes import VP


def _levels(t: Tensor, beta_min: float, beta_max: float) -> tuple[Tensor, Tensor, Tensor]:
    """beta, alpha and std^2 at t."""
    alpha_bar = (-(beta_min * t) - (beta_max - beta_min) * t**2 / 2).exp()
    return beta_min + t * (beta_max - beta_min), alpha_bar.sqrt(), 1 - alpha_bar


def _score(D, x_t: Tensor, alpha: Tensor, variance: Tensor) -> Tensor:
    return (alpha * D(x_t / alpha, variance.sqrt() / alpha) - x_t) / variance


def _move(x_t: Tensor, length: Tensor, drift: Tensor, spread: Tensor, z: Tensor) -> Tensor:
    """x_t + (t' - t) drift + spread z."""
    return x_t + length * drift + spread * z


@item(
    "03.11", title="The reverse SDE, with the right noise", function="reverse_sde_step", points=2, minutes=25, difficulty=3,
    answers=("course_lib.sdes.SDE.move", "course_lib.sdes.SDE.reverse_drift", "course_lib.sdes.SDE.flow_drift", "course_lib.sdes.SDE.score", "course_lib.sdes.euler_maruyama"),
    hints=(
        "alpha = sqrt(alpha_bar) and std^2 = 1 - alpha_bar at t. D wants x_t / alpha and sigma = std / alpha.",
        "Tweedie in these coordinates: score = (alpha D - x_t) / std^2.",
        "The reverse drift is f - g^2 score = -beta x_t / 2 - beta score. The half belongs to f alone; with beta / 2 before the score it is the ODE's, which has no noise.",
        "Euler: x_t + (t_next - t) drift + sqrt(beta (t - t_next)) z. Time falls, so t_next - t is negative, while a variance is not.",
    ),
)  # fmt: skip
class ReverseSdeStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        result = []
        for D, shape in (("peaks", PLANE), ("turned", PICTURE), ("gaussian", PICTURE)):
            t = float(rng.uniform(0.3, 0.8))
            result.append(
                {
                    "D": D,
                    "x_t": rng.normal(size=shape),
                    "z": rng.normal(size=shape),
                    "t": t,
                    "t_next": t - float(rng.uniform(0.05, 0.2)),
                    "beta_min": float(rng.uniform(0.1, 0.5)),
                    "beta_max": float(rng.uniform(4, 8)),
                }
            )
        return result

    def drive(fn, case: Case) -> Outputs:
        given = (T(case["x_t"]), level(case["t"]), level(case["t_next"]), T(case["z"]), case["beta_min"], case["beta_max"])
        return arrays(x_next=call(fn, DENOISERS[case["D"]], *given))

    def reference(D, x_t: Tensor, t: Tensor, t_next: Tensor, z: Tensor, beta_min: float, beta_max: float) -> Tensor:
        return VP(beta_min, beta_max).move(x_t, t, t_next, lambda _: z, D)

    @mistake(
        "the score has the factor beta / 2 of the *ODE*, and noise is added all the same: the samples spread too far; the SDE has beta"
    )
    def drift_of_the_ode(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * (x_t + _score(D, x_t, alpha, variance))
        return _move(x_t, t_next - t, drift, (beta * (t - t_next)).sqrt(), z)

    @mistake("this is the probability-flow ODE, half the score and no noise: the same marginals, but no SDE")
    def the_ode(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * (x_t + _score(D, x_t, alpha, variance))
        return _move(x_t, t_next - t, drift, 0 * t, z)

    @mistake("the drift is the SDE's and the noise is missing: the samples shrink onto the peaks")
    def no_noise(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, 0 * t, z)

    @mistake("z is multiplied by the variance, beta (t - t_next); a draw is mean + deviation * z: take the root")
    def variance_for_deviation(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, beta * (t - t_next), z)

    @mistake("g is not rooted before z: g = sqrt(beta), so the noise is sqrt(beta) sqrt(t - t_next) z")
    def g_not_rooted(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, beta * (t - t_next).sqrt(), z)

    @mistake("the noise grows with the length of the step; Brownian motion grows with its root: sqrt(beta) sqrt(t - t_next)")
    def length_not_rooted(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, beta.sqrt() * (t - t_next), z)

    @mistake(
        "the noise has the variance of a step, but not its length: sqrt(beta) z in every step, however small; multiply by sqrt(t - t_next)"
    )
    def length_left_out(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, beta.sqrt(), z)

    @mistake(
        "the noise has twice the variance, sqrt(2 beta dt): that is Langevin's factor, whose score has another weight; g^2 = beta"
    )
    def langevin(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, (2 * beta * (t - t_next)).sqrt(), z)

    @mistake(
        "the noise is subtracted: as good for the samples, since z and -z have one distribution, but the check adds z; write + z"
    )
    def noise_subtracted(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, (beta * (t - t_next)).sqrt(), -z)

    @mistake("the forward drift has the wrong sign: f = -beta x_t / 2 shrinks the signal as t rises")
    def sign_of_f(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, (beta * (t - t_next)).sqrt(), z)

    @mistake("the forward drift has lost its half: f = -beta x_t / 2")
    def no_half(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, (beta * (t - t_next)).sqrt(), z)

    @mistake(
        "the score comes in with a plus: the reverse drift is f - g^2 score; times t_next - t, which is negative, the step then goes *up* the score"
    )
    def sign_of_the_score(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t + beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, (beta * (t - t_next)).sqrt(), z)

    @mistake("the drift is right, its step goes up in time: t_next - t is negative on the way back")
    def forwards(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t - t_next, drift, (beta * (t - t_next)).sqrt(), z)

    @mistake("g is not squared before the score: g = sqrt(beta), and the drift has g^2 = beta")
    def g_not_squared(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta.sqrt() * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, (beta * (t - t_next)).sqrt(), z)

    @mistake("D is asked about x_t; it wants x = x0 + sigma eps, and that is x_t / alpha")
    def not_scaled(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        score = (alpha * D(x_t, variance.sqrt() / alpha) - x_t) / variance
        return _move(x_t, t_next - t, -beta / 2 * x_t - beta * score, (beta * (t - t_next)).sqrt(), z)

    @mistake("D is asked at std; in x_t / alpha the noise has the level sigma = std / alpha")
    def asked_at_std(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        score = (alpha * D(x_t / alpha, variance.sqrt()) - x_t) / variance
        return _move(x_t, t_next - t, -beta / 2 * x_t - beta * score, (beta * (t - t_next)).sqrt(), z)

    @mistake("the score is divided by std: that is -eps; the score is -eps / std, so divide alpha D - x_t by std^2")
    def eps_for_score(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        score = _score(D, x_t, alpha, variance) * variance.sqrt()
        return _move(x_t, t_next - t, -beta / 2 * x_t - beta * score, (beta * (t - t_next)).sqrt(), z)

    @mistake(
        "the score is that in the coordinate of D, (D - x) / sigma^2 at x = x_t / alpha; the gradient with respect to x_t has another 1 / alpha"
    )
    def score_in_sigma(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        score = alpha * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, -beta / 2 * x_t - beta * score, (beta * (t - t_next)).sqrt(), z)

    @mistake("the variance 1 - alpha_bar is taken for the deviation; std is its root")
    def variance_for_std(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        score = _score(D, x_t, alpha, variance**2)
        return _move(x_t, t_next - t, -beta / 2 * x_t - beta * score, (beta * (t - t_next)).sqrt(), z)

    @mistake("the score has D where alpha D belongs: the mean of x_t given x0 is alpha x0")
    def alpha_left_out(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        score = (D(x_t / alpha, variance.sqrt() / alpha) - x_t) / variance
        return _move(x_t, t_next - t, -beta / 2 * x_t - beta * score, (beta * (t - t_next)).sqrt(), z)

    @mistake(
        "alpha_bar is taken for alpha: the signal's factor is its root, exp(-half of the integral of beta), the variance 1 - alpha_bar"
    )
    def alpha_bar_for_alpha(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, variance = _levels(t, beta_min, beta_max)
        score = _score(D, x_t, alpha**2, variance)
        return _move(x_t, t_next - t, -beta / 2 * x_t - beta * score, (beta * (t - t_next)).sqrt(), z)

    @mistake("1 - alpha is taken for the variance of the noise; it is 1 - alpha_bar = 1 - alpha^2")
    def variance_of_alpha(D, x_t, t, t_next, z, beta_min, beta_max):
        beta, alpha, _ = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, 1 - alpha)
        return _move(x_t, t_next - t, drift, (beta * (t - t_next)).sqrt(), z)

    @mistake(
        "alpha_bar is exp(-t beta(t)) here, as if beta had been what it is now all the time; the integral of beta up to t has t^2 / 2"
    )
    def beta_times_t(D, x_t, t, t_next, z, beta_min, beta_max):
        beta = _levels(t, beta_min, beta_max)[0]
        alpha_bar = (-beta * t).exp()
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha_bar.sqrt(), 1 - alpha_bar)
        return _move(x_t, t_next - t, drift, (beta * (t - t_next)).sqrt(), z)

    @mistake("alpha and std are those of t_next; x_t has the signal and the noise of t, where the step starts")
    def score_of_the_end(D, x_t, t, t_next, z, beta_min, beta_max):
        beta = _levels(t, beta_min, beta_max)[0]
        _, alpha, variance = _levels(t_next, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, (beta * (t - t_next)).sqrt(), z)

    @mistake("beta is that of t_next; Euler takes drift and noise where the step starts, at t")
    def beta_of_the_end(D, x_t, t, t_next, z, beta_min, beta_max):
        beta = _levels(t_next, beta_min, beta_max)[0]
        _, alpha, variance = _levels(t, beta_min, beta_max)
        drift = -beta / 2 * x_t - beta * _score(D, x_t, alpha, variance)
        return _move(x_t, t_next - t, drift, (beta * (t - t_next)).sqrt(), z)

    @law("x_next is no weighted sum of x_t, D(x_t / alpha, std / alpha) and z")
    def weighted_sum(case: Case, out: Outputs) -> bool:
        return _parts(case, out)[1] < 1e-9

    @law("the factor of z must be sqrt(beta (t - t_next)), the deviation that the forward SDE adds in this time")
    def factor_of_z(case: Case, out: Outputs) -> bool:
        beta = _levels(level(case["t"]), case["beta_min"], case["beta_max"])[0]
        return bool(np.isclose(_parts(case, out)[0][2] ** 2, float(beta) * (case["t"] - case["t_next"])))

    @law("the noise is right; the factor of D must be beta alpha / std^2 times the length of the step, t - t_next")
    def factor_of_D(case: Case, out: Outputs) -> bool:
        beta, alpha, variance = _levels(level(case["t"]), case["beta_min"], case["beta_max"])
        return bool(np.isclose(_parts(case, out)[0][1], float(beta * alpha / variance) * (case["t"] - case["t_next"])))

    @law(
        "noise and D are right; the factor of x_t is not: it gets -beta x_t / 2 from f and +beta x_t / std^2 from the score, times t_next - t"
    )
    def factor_of_x(case: Case, out: Outputs) -> bool:
        beta, _, variance = _levels(level(case["t"]), case["beta_min"], case["beta_max"])
        wanted = 1 + (case["t_next"] - case["t"]) * float(beta / variance - beta / 2)
        return bool(np.isclose(_parts(case, out)[0][0], wanted))


def _parts(case: Case, out: Outputs) -> tuple[np.ndarray, float]:
    """The factors of x_t, D and z in the step, and what they leave unexplained."""
    _, alpha, variance = _levels(level(case["t"]), case["beta_min"], case["beta_max"])
    x0 = ask(case, case["x_t"] / float(alpha), float(variance.sqrt() / alpha))
    return fit(out["x_next"], case["x_t"], x0, case["z"])
