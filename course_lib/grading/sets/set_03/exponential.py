"""Items 03.3 and 03.4: DDIM as an exponential integrator, and DPM-Solver++(2M)."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import (
    DENOISERS,
    NOT_FINITE,
    PICTURE,
    PLANE,
    ask,
    checked,
    geometric,
    level,
    noised,
    with_gaps,
)
from course_lib.grading.sets.tools import T, fit, named
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.steps import ddim


def _lambda_case(rng: np.random.Generator, D: str, shape: tuple[int, ...], h: float) -> Case:
    """A batch at the level exp(-lam), and a step of length h in lambda."""
    lam = float(rng.uniform(-0.8, 0.4))
    return {"D": D, "x": noised(rng, shape, float(np.exp(-lam))), "lam": lam, "lam_next": lam + h}


@item(
    "03.3", title="DDIM is an exponential integrator", function="exponential_step", points=2, minutes=15, difficulty=2,
    answers=("course_lib.steps.ddim", "course_lib.steps.ddim_eta", "course_lib.steps.euler", "course_lib.multistep.dpm_solver_pp_2m"),
    hints=(
        "sigma = exp(-lambda), so dsigma = -sigma dlambda, and dx/dsigma = (x - D) / sigma becomes dx/dlambda = D - x.",
        "Without D the solution is x e^-(lambda' - lambda). With a D that stays as it is, look at x - D: it obeys the same equation.",
        "x' - D = e^-h (x - D) with h = lambda' - lambda. Sort by x and D.",
        "x' = e^-h x + (1 - e^-h) D(x, e^-lambda). Since e^-h = sigma' / sigma, this is D + sigma' eps with eps = (x - D) / sigma: DDIM.",
    ),
)  # fmt: skip
class ExponentialStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            _lambda_case(rng, "peaks", PLANE, float(rng.uniform(0.4, 0.9))),
            _lambda_case(rng, "turned", PICTURE, float(rng.uniform(1.2, 2.5))),
            _lambda_case(rng, "gaussian", PLANE, -float(rng.uniform(0.4, 0.9))),
            _lambda_case(rng, "peaks", PLANE, 0.0),
        ]

    def drive(fn, case: Case) -> Outputs:
        return arrays(x_next=call(fn, DENOISERS[case["D"]], T(case["x"]), level(case["lam"]), level(case["lam_next"])))

    def reference(D, x: Tensor, lam: Tensor, lam_next: Tensor) -> Tensor:
        return ddim(D, x, (-lam).exp(), (-lam_next).exp())[0]

    @mistake("this is Euler's step in lambda, x + h (D - x); the linear part -x is to be solved exactly, by e^-h")
    def euler_in_lambda(D, x, lam, lam_next):
        return x + (lam_next - lam) * (D(x, (-lam).exp()) - x)

    @mistake("h has the wrong sign: lambda' - lambda is positive on the way down, and x shrinks by e^-h")
    def sign_of_h(D, x, lam, lam_next):
        keep = (lam_next - lam).exp()
        return keep * x + (1 - keep) * D(x, (-lam).exp())

    @mistake(
        "D is multiplied by h: what comes in during the step decays too; the integral of e^-(lambda' - l) over the step is 1 - e^-h"
    )
    def undamped(D, x, lam, lam_next):
        return (lam - lam_next).exp() * x + (lam_next - lam) * D(x, (-lam).exp())

    @mistake(
        "this is DPM-Solver's step for a network that predicts the *noise*, x - sigma' (e^h - 1) eps, with D in place of eps; D predicts x0, and comes in with 1 - e^-h"
    )
    def step_of_the_noise(D, x, lam, lam_next):
        return x - (-lam_next).exp() * (lam_next - lam).expm1() * D(x, (-lam).exp())

    @mistake("D comes in whole; its factor is 1 - e^-h, so that nothing happens in a step of length 0")
    def whole_D(D, x, lam, lam_next):
        return (lam - lam_next).exp() * x + D(x, (-lam).exp())

    @mistake(
        "the factor of D is e^h - 1, the integral of e^l alone; it is multiplied by e^-h, as x is (the integrating factor at the end)"
    )
    def factor_at_the_start(D, x, lam, lam_next):
        h = lam_next - lam
        return (-h).exp() * x + h.expm1() * D(x, (-lam).exp())

    @mistake("the factor of D has the wrong sign: e^-h - 1 is negative; in the papers it stands behind a minus")
    def sign_of_D(D, x, lam, lam_next):
        keep = (lam - lam_next).exp()
        return keep * x + (keep - 1) * D(x, (-lam).exp())

    @mistake("x does not shrink: the factor e^-h stands before x as well, or the step runs past D")
    def x_kept(D, x, lam, lam_next):
        return x + (1 - (lam - lam_next).exp()) * D(x, (-lam).exp())

    @mistake("D is asked at lambda; it wants the noise level, sigma = e^-lambda")
    def asked_at_lambda(D, x, lam, lam_next):
        keep = (lam - lam_next).exp()
        return keep * x + (1 - keep) * D(x, lam)

    @mistake("D is asked at e^lambda; lambda = -log sigma, so sigma = e^-lambda")
    def level_inverted(D, x, lam, lam_next):
        keep = (lam - lam_next).exp()
        return keep * x + (1 - keep) * D(x, lam.exp())

    @mistake("D is asked at the level of lambda'; x has the noise of lambda")
    def asked_at_the_end(D, x, lam, lam_next):
        keep = (lam - lam_next).exp()
        return keep * x + (1 - keep) * D(x, (-lam_next).exp())

    @mistake("lambda is taken for the log SNR, -2 log sigma; here it is half of that, -log sigma")
    def log_snr(D, x, lam, lam_next):
        keep = ((lam - lam_next) / 2).exp()
        return keep * x + (1 - keep) * D(x, (-lam / 2).exp())

    @mistake("x - D is multiplied by sigma' and not divided by sigma: eps = (x - D) / sigma")
    def noise_not_divided(D, x, lam, lam_next):
        x0 = D(x, (-lam).exp())
        return x0 + (-lam_next).exp() * (x - x0)

    @mistake("x and D have changed places: x shrinks by e^-h, and D comes in with 1 - e^-h")
    def factors_swapped(D, x, lam, lam_next):
        keep = (lam - lam_next).exp()
        return (1 - keep) * x + keep * D(x, (-lam).exp())

    @law("a step of length 0, lambda' = lambda, must leave x as it is")
    def at_rest(case: Case, out: Outputs) -> bool:
        return case["lam"] != case["lam_next"] or bool(np.allclose(out["x_next"], case["x"]))

    @law("x_next is no weighted sum of x and D(x, sigma) with sigma = e^-lambda")
    def weighted_sum(case: Case, out: Outputs) -> bool:
        return _factors(case, out)[1] < 1e-9

    @law("the factor of x must be e^-h, which is sigma' / sigma: without D the equation is dx/dlambda = -x")
    def factor_of_x(case: Case, out: Outputs) -> bool:
        return bool(np.isclose(_factors(case, out)[0][0], np.exp(case["lam"] - case["lam_next"])))

    @law("the factors of x and D must add up to 1: where x = D nothing moves")
    def add_up(case: Case, out: Outputs) -> bool:
        return bool(np.isclose(_factors(case, out)[0].sum(), 1))


def _factors(case: Case, out: Outputs) -> tuple[np.ndarray, float]:
    """The factors of x and D in a step, and the share that they leave unexplained."""
    return fit(out["x_next"], case["x"], ask(case, case["x"], float(np.exp(-case["lam"]))))


def _share(sigma: Tensor, sigma_next: Tensor, before: Tensor) -> Tensor:
    """1 / (2r) = h / (2 h_before)."""
    return (sigma / sigma_next).log() / (2 * (before / sigma).log())


def _two_m(D, x: Tensor, sigma: Tensor, sigma_next: Tensor, before, D_before, share=_share, end=False) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) with the given share of D_0 - D_before; `end`: with history in the step to 0, too."""
    D_0 = D_bar = D(x, sigma)
    if D_before is not None and (sigma_next > 0 or end):
        D_bar = D_0 + share(sigma, sigma_next, before) * (D_0 - D_before)
    return D_bar + sigma_next / sigma * (x - D_bar), D_0


@item(
    "03.4", title="DPM-Solver++(2M) and its memory", function="step_2m", points=3, minutes=25, difficulty=3,
    answers=("course_lib.multistep.dpm_solver_pp_2m", "course_lib.multistep.unip", "course_lib.stochastic.dpm_solver_pp_sde_2m"),
    hints=(
        "Without history, and in the step to sigma_next = 0, this is 03.3: D_bar = D_0 and x' = D_bar + (sigma' / sigma) (x - D_bar).",
        "h = log(sigma / sigma_next) is this step's length in lambda, h_before = log(sigma_before / sigma) the last one's; r = h_before / h.",
        "The line through D_before and D_0, read half a step ahead: D_bar = D_0 + h / (2 h_before) (D_0 - D_before).",
        "Return D_0 as memory, neither D_bar nor what was there before: the next step needs what D said here.",
    ),
)  # fmt: skip
class Step2M:
    def cases(rng: np.random.Generator) -> list[Case]:
        result = []
        for D, shape in (("peaks", PLANE), ("turned", PICTURE), ("gaussian", PLANE)):
            sigmas = geometric(rng, 4, 0.3, 3.0)
            sigmas = sigmas[::-1].copy() if D == "gaussian" else np.concatenate([sigmas, [0.0]])
            result.append({"D": D, "x": noised(rng, shape, sigmas[0]), "sigmas": sigmas})
        return result

    def drive(fn, case: Case) -> Outputs:
        sigmas, x = T(case["sigmas"]), T(case["x"])
        before, D_before, states, memories = None, None, [], []
        for sigma, sigma_next in itertools.pairwise(sigmas):
            result = call(fn, DENOISERS[case["D"]], x, sigma, sigma_next, before, D_before)
            x, D_before = (checked(value, name, x) for name, value in named(result, "x_next", "memory").items())
            before = sigma
            states.append(x)
            memories.append(D_before)
        return {**with_gaps(torch.stack(states)), **arrays(memory=torch.stack(memories))}

    def reference(D, x: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_before, D_before) -> tuple[Tensor, Tensor]:
        past = None if D_before is None else ((D_before, sigma_before),)
        x_next, ((D_0, _),) = dpm_solver_pp_2m(D, x, sigma, sigma_next, past)
        return x_next, D_0

    @mistake("the history is forgotten: every step is DDIM's, of order 1; use D_before where it is given")
    def forgotten(D, x, sigma, sigma_next, sigma_before, D_before):
        return _two_m(D, x, sigma, sigma_next, None, None)

    @mistake("the memory is never renewed: after the first step it stays what it was; return D_0 of *this* step")
    def not_renewed(D, x, sigma, sigma_next, sigma_before, D_before):
        x_next, D_0 = _two_m(D, x, sigma, sigma_next, sigma_before, D_before)
        return x_next, D_0 if D_before is None else D_before

    @mistake(
        "the memory that is returned is the extrapolated D_bar; the line of the next step goes through what D really said, D_0"
    )
    def D_bar_kept(D, x, sigma, sigma_next, sigma_before, D_before):
        D_0 = D_bar = D(x, sigma)
        if D_before is not None and sigma_next > 0:
            D_bar = D_0 + _share(sigma, sigma_next, sigma_before) * (D_0 - D_before)
        return D_bar + sigma_next / sigma * (x - D_bar), D_bar

    @mistake(
        "r is inverted, or a bracket is missing in 1 / (2r): the weight of D_0 - D_before is h / (2 h_before), small where this step is the shorter one"
    )
    def r_inverted(D, x, sigma, sigma_next, sigma_before, D_before):
        return _two_m(D, x, sigma, sigma_next, sigma_before, D_before, lambda s, n, b: 1 / (4 * _share(s, n, b)))

    @mistake(
        "the line is read backwards: D_bar = D_0 + 1 / (2r) (D_0 - D_before), ahead of D_0; h or the difference has the wrong sign"
    )
    def read_backwards(D, x, sigma, sigma_next, sigma_before, D_before):
        return _two_m(D, x, sigma, sigma_next, sigma_before, D_before, lambda s, n, b: -_share(s, n, b))

    @mistake("the factor 1/2 is missing: the line is read a whole step ahead; half a step gives the mean over the step")
    def whole_step_ahead(D, x, sigma, sigma_next, sigma_before, D_before):
        return _two_m(D, x, sigma, sigma_next, sigma_before, D_before, lambda s, n, b: 2 * _share(s, n, b))

    @mistake("the steps are taken to be equal, r = 1, as in Adams and Bashforth's 3/2 and -1/2; on this grid r = h_before / h")
    def equal_steps(D, x, sigma, sigma_next, sigma_before, D_before):
        return _two_m(D, x, sigma, sigma_next, sigma_before, D_before, lambda s, n, b: 0.5)

    @mistake("the steps are measured in sigma; r is a ratio of steps in lambda = -log sigma")
    def measured_in_sigma(D, x, sigma, sigma_next, sigma_before, D_before):
        return _two_m(D, x, sigma, sigma_next, sigma_before, D_before, lambda s, n, b: (s - n) / (2 * (b - s)))

    @mistake("D_0 and D_before have changed places: the newer estimate has the weight 1 + 1 / (2r), the older one -1 / (2r)")
    def estimates_swapped(D, x, sigma, sigma_next, sigma_before, D_before):
        return _two_m(D, x, sigma, sigma_next, sigma_before, D_before, lambda s, n, b: -1 - _share(s, n, b))

    @mistake(
        "the factor of D_bar has the wrong sign: x' = (sigma'/sigma) x + (1 - sigma'/sigma) D_bar; the paper's e^-h - 1 stands behind a minus"
    )
    def sign_of_D(D, x, sigma, sigma_next, sigma_before, D_before):
        x_next, D_0 = _two_m(D, x, sigma, sigma_next, sigma_before, D_before)
        return 2 * sigma_next / sigma * x - x_next, D_0

    @mistake("the step to sigma = 0 uses the history too; h is infinite there, and so is the weight: end with a step of order 1")
    def history_at_zero(D, x, sigma, sigma_next, sigma_before, D_before):
        return _two_m(D, x, sigma, sigma_next, sigma_before, D_before, end=True)

    @mistake("the step to sigma = 0 returns x as it was; it ends at D_0")
    def end_left_out(D, x, sigma, sigma_next, sigma_before, D_before):
        x_next, D_0 = _two_m(D, x, sigma, sigma_next, sigma_before, D_before)
        return x_next if sigma_next > 0 else x, D_0

    @mistake("the first step takes the missing history to be 0, and D_bar = 3/2 D_0; a first step is of order 1")
    def zero_history(D, x, sigma, sigma_next, sigma_before, D_before):
        if D_before is None:
            D_0 = D(x, sigma)
            return 1.5 * D_0 + sigma_next / sigma * (x - 1.5 * D_0), D_0
        return _two_m(D, x, sigma, sigma_next, sigma_before, D_before)

    @mistake("D is asked at sigma_next; x has the noise of sigma")
    def asked_at_the_end(D, x, sigma, sigma_next, sigma_before, D_before):
        D_0 = D_bar = D(x, sigma_next)
        if D_before is not None and sigma_next > 0:
            D_bar = D_0 + _share(sigma, sigma_next, sigma_before) * (D_0 - D_before)
        return D_bar + sigma_next / sigma * (x - D_bar), D_0

    @mistake(
        "D_bar is right, but the noise x - D_0 beside it is that of D_0: use D_bar in both places, x' = (sigma'/sigma) x + (1 - sigma'/sigma) D_bar"
    )
    def half_extrapolated(D, x, sigma, sigma_next, sigma_before, D_before):
        D_0 = D_bar = D(x, sigma)
        if D_before is not None and sigma_next > 0:
            D_bar = D_0 + _share(sigma, sigma_next, sigma_before) * (D_0 - D_before)
        return D_bar + sigma_next / sigma * (x - D_0), D_0

    @law(NOT_FINITE)
    def is_finite(case: Case, out: Outputs) -> bool:
        return bool(out["finite"].all())

    @law("the memory that a step returns must be D(x, sigma), with the x and sigma at which the step started")
    def memory_is_D(case: Case, out: Outputs) -> bool:
        return all(np.allclose(out["memory"][k], D_0) for k, (_, D_0) in enumerate(_asked(case, out)))

    @law("the first step has no history, and must be DDIM's: x' = D + (sigma' / sigma) (x - D)")
    def first_step(case: Case, out: Outputs) -> bool:
        (x, D_0), keep = _asked(case, out)[0], case["sigmas"][1] / case["sigmas"][0]
        return bool(np.allclose(out["x"][0], D_0 + keep * (x - D_0)))

    @law("the step to sigma = 0 must end at D(x, sigma)")
    def last_step(case: Case, out: Outputs) -> bool:
        return case["sigmas"][-1] > 0 or bool(np.allclose(out["x"][-1], _asked(case, out)[-1][1]))

    @law(
        "the first and the last step and the memory are right; between them x' is not (sigma'/sigma) x + (1 - sigma'/sigma) D_bar"
    )
    def between(case: Case, out: Outputs) -> bool:
        lam, asked = -np.log(case["sigmas"][:3]), _asked(case, out)
        D_bar = asked[1][1] + (lam[2] - lam[1]) / (lam[1] - lam[0]) / 2 * (asked[1][1] - asked[0][1])
        return bool(np.allclose(out["x"][1], D_bar + case["sigmas"][2] / case["sigmas"][1] * (asked[1][0] - D_bar)))


def _asked(case: Case, out: Outputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each step the x at which it started, and D there."""
    starts = [case["x"], *out["x"][:-1]]
    return [(x, ask(case, x, sigma)) for x, sigma in zip(starts, case["sigmas"][:-1], strict=True)]
