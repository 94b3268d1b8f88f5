"""Item 05.7: a noise schedule for another resolution."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, named
from course_lib.schedules import Flow
from course_lib.shifts import Shifted


def _time(t: Tensor, s: float) -> Tensor:
    return s * t / (1 + (s - 1) * t)


@item(
    "05.7", title="A schedule for another resolution", function="shifted", points=1, minutes=15, difficulty=2,
    answers=("course_lib.shifts.Shifted",),
    hints=(
        "log SNR = -2 log sigma. Put the shift in and solve for sigma': the 2 cancels.",
        "sigma' = sigma d / d0: more pixels, more noise. For the flow sigma = t / (1 - t), so t' has to solve t' / (1 - t') = s t / (1 - t), with the same s = d / d0.",
        "t' = s t / (1 + (s - 1) t). Look at its ends: t = 0 stays 0, t = 1 stays 1.",
    ),
)  # fmt: skip
class ShiftedSchedule:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(d0: int, d: int) -> Case:
            inside = np.sort(rng.uniform(0.1, 0.9, 5))
            return {"sigma": np.exp(rng.uniform(-2, 2, 6)), "t": np.concatenate([[0.0], inside, [1.0]]), "d0": d0, "d": d}

        return [case(64, 256), case(128, 48), case(32, 32), case(int(rng.integers(10, 20)), int(rng.integers(30, 90)))]

    def drive(fn, case: Case) -> Outputs:
        return arrays(**named(call(fn, T(case["sigma"]), T(case["t"]), case["d0"], case["d"]), "sigma", "t"))

    def reference(sigma: Tensor, t: Tensor, d0: int, d: int) -> tuple[Tensor, Tensor]:
        flow = Shifted(Flow(), d / d0)
        return sigma * flow.factor, flow.std(t)  # the straight line's time is its noise

    @mistake("the ratio is turned round: a *larger* picture hides noise better and needs more of it, s = d / d0")
    def ratio_turned(sigma, t, d0, d):
        return sigma * d0 / d, _time(t, d0 / d)

    @mistake(
        "log SNR is shifted by log(d0 / d), without the 2: sigma grows by the root of d / d0 only, and t with it; SNR is a ratio of squares"
    )
    def half_the_shift(sigma, t, d0, d):
        s = (d / d0) ** 0.5
        return sigma * s, _time(t, s)

    @mistake(
        "sigma is multiplied by (d / d0)^2, and t shifted by it: that is the factor of SNR, the square of sigma's; it is also the ratio of pixel *numbers*"
    )
    def square_of_the_ratio(sigma, t, d0, d):
        s = (d / d0) ** 2
        return sigma * s, _time(t, s)

    @mistake("the logarithm is that to base 10; log SNR is counted in nats")
    def base_ten(sigma, t, d0, d):
        s = math.exp(math.log10(d / d0))
        return sigma * s, _time(t, s)

    @mistake("log SNR is shifted the wrong way in sigma', as if log SNR were +2 log sigma; t' is right")
    def sign_of_log_snr(sigma, t, d0, d):
        return sigma * d0 / d, _time(t, d / d0)

    @mistake("sigma' is right; t' is shifted the other way: its s is d / d0 as well")
    def time_turned(sigma, t, d0, d):
        return sigma * d / d0, _time(t, d0 / d)

    @mistake(
        "sigma' is right; in t', s is the root of d / d0: the paper's sqrt is of the ratio of pixel *numbers*, and d and d0 are sides"
    )
    def root_in_time(sigma, t, d0, d):
        return sigma * d / d0, _time(t, (d / d0) ** 0.5)

    @mistake("sigma' is right; in t', s is squared: (d / d0)^2 shifts sigma twice over")
    def square_in_time(sigma, t, d0, d):
        return sigma * d / d0, _time(t, (d / d0) ** 2)

    @mistake(
        "sigma' is right; t' is s t cut to 1: that is no longer a ratio of noise to signal, and levels near the end all become one"
    )
    def time_cut(sigma, t, d0, d):
        return sigma * d / d0, (d / d0 * t).clamp(max=1)

    @mistake("sigma' is right; the denominator of t' is 1 + s t: t = 1 must stay 1, 1 + (s - 1) t")
    def minus_one_forgotten(sigma, t, d0, d):
        s = d / d0
        return sigma * d / d0, s * t / (1 + s * t)

    @mistake(
        "sigma' is right; t' is the ratio s t / (1 - t) itself, which is sigma: turn it back into a time, sigma / (1 + sigma)"
    )
    def sigma_for_time(sigma, t, d0, d):
        return sigma * d / d0, d / d0 * t / (1 - t).clamp_min(1e-3)

    @mistake("sigma' is right; t is not shifted at all")
    def time_kept(sigma, t, d0, d):
        return sigma * d / d0, t.clone()

    @mistake("the shift of log SNR is *added* to sigma; in sigma it is a factor")
    def added(sigma, t, d0, d):
        return sigma - 2 * math.log(d0 / d), _time(t, d / d0)

    @mistake("sigma' is 1 / SNR', the square: SNR = 1 / sigma^2; t' is right")
    def root_forgotten(sigma, t, d0, d):
        return (sigma * d / d0) ** 2, _time(t, d / d0)

    @law("with d = d0 nothing may change")
    def same_resolution(case: Case, out: Outputs) -> bool:
        return case["d"] != case["d0"] or (close(out["sigma"], case["sigma"]) and close(out["t"], case["t"]))

    @law("log SNR, -2 log sigma, must be shifted by 2 log(d0 / d)")
    def log_snr(case: Case, out: Outputs) -> bool:
        return bool((out["sigma"] > 0).all()) and close(
            -2 * np.log(out["sigma"] / case["sigma"]), 2 * np.log(case["d0"] / case["d"])
        )

    @law("sigma' is right; t = 0 must stay 0, where there is no noise, and t = 1 must stay 1, where there is nothing else")
    def ends(case: Case, out: Outputs) -> bool:
        return close(out["t"][[0, -1]], [0, 1])

    @law("sigma' is right; the noise-to-signal ratio t / (1 - t) must grow by the same factor as sigma")
    def same_shift_in_time(case: Case, out: Outputs) -> bool:
        ratio = lambda t: t[1:-1] / (1 - t[1:-1])
        return close(ratio(out["t"]), case["d"] / case["d0"] * ratio(case["t"]))
