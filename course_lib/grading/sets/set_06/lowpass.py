"""Item 06.6: ILVR, which takes the low frequencies of a reference at the noise level of x."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import level, noised
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, fit
from course_lib.operators import BlockAverage
from course_lib.posterior import ilvr


def _means(x: Tensor, factor: int) -> Tensor:
    """The mean of each block, in all its pixels."""
    return F.avg_pool2d(x, factor).repeat_interleave(factor, -2).repeat_interleave(factor, -1)


@item(
    "06.6", title="ILVR's filter", function="refined", points=2, minutes=20, difficulty=2,
    answers=("course_lib.posterior.replacement.ilvr", "course_lib.operators.means.Means.pinv",
             "course_lib.operators.means.Means.adjoint"),
    hints=(
        "phi(x): torch.nn.functional.avg_pool2d(x, factor), and then repeat_interleave along both axes. Twice the same filter changes nothing more.",
        "The reference is clean and x lies at sigma': y_t = reference + sigma' z. Then filter it, noise and all.",
        "x + phi(y_t) - phi(x); phi is linear, so one filter does, x + phi(y_t - x). Return x as it is where sigma' < until.",
    ),
)  # fmt: skip
class Refined:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], factor: int, until: float) -> Case:
            sigma_next = float(rng.uniform(0.4, 0.8))
            return {"x": noised(rng, shape, sigma_next), "reference": rng.normal(size=shape), "sigma_next": sigma_next,
                    "factor": factor, "until": until, "z": rng.normal(size=shape)}  # fmt: skip

        return [case((2, 2, 4, 6), 2, 0.2), case((2, 1, 6, 6), 3, 0.0), case((2, 1, 4, 4), 2, 0.9)]

    def drive(fn, case: Case) -> Outputs:
        x, reference, z = (T(case[name]) for name in ("x", "reference", "z"))
        return arrays(x=call(fn, x, reference, level(case["sigma_next"]), case["factor"], case["until"], z))

    def reference(x: Tensor, reference: Tensor, sigma_next: Tensor, factor: int, until: float, z: Tensor) -> Tensor:
        still = lambda D, x, sigma, sigma_next, memory=None: (x, None)  # the step has been made
        rule = ilvr(still, BlockAverage(tuple(x.shape[1:]), factor), reference, lambda x: z, until)
        return rule(None, x, sigma_next, sigma_next)[0]

    @mistake("the parts are exchanged: this takes the *high* frequencies of the reference and keeps the low ones of x")
    def parts_exchanged(x, reference, sigma_next, factor, until, z):
        y_t = reference + sigma_next * z
        return y_t + _means(x - y_t, factor) if sigma_next >= until else x

    @mistake(
        "the reference is put in clean: x lies at sigma', and its low frequencies have noise too; filter reference + sigma' z"
    )
    def clean(x, reference, sigma_next, factor, until, z):
        return x + _means(reference - x, factor) if sigma_next >= until else x

    @mistake("the noise is added *after* the filter: then it has all frequencies, and x's own fine noise gets it on top")
    def noise_not_filtered(x, reference, sigma_next, factor, until, z):
        return x + _means(reference - x, factor) + sigma_next * z if sigma_next >= until else x

    @mistake("the noise has the variance sigma'² as its deviation; y_t = reference + sigma' z")
    def variance_for_deviation(x, reference, sigma_next, factor, until, z):
        return x + _means(reference + sigma_next**2 * z - x, factor) if sigma_next >= until else x

    @mistake(
        "y_t is in DDPM's coordinate, (reference + sigma' z) / sqrt(1 + sigma'²); here x = x0 + sigma eps, and the reference keeps its size"
    )
    def other_coordinate(x, reference, sigma_next, factor, until, z):
        y_t = (reference + sigma_next * z) / (1 + sigma_next**2).sqrt()
        return x + _means(y_t - x, factor) if sigma_next >= until else x

    @mistake("phi(x) is not taken off: the low frequencies are added to those that are there")
    def added_on_top(x, reference, sigma_next, factor, until, z):
        return x + _means(reference + sigma_next * z, factor) if sigma_next >= until else x

    @mistake("the sign is turned, x + phi(x) - phi(y_t): this leads away from the reference")
    def sign_turned(x, reference, sigma_next, factor, until, z):
        return x - _means(reference + sigma_next * z - x, factor) if sigma_next >= until else x

    @mistake("only phi(y_t) comes back: the high frequencies, which are the network's part, are lost")
    def low_frequencies_alone(x, reference, sigma_next, factor, until, z):
        return _means(reference + sigma_next * z, factor) if sigma_next >= until else x

    @mistake(
        "phi is A^T A, a mean divided once more by factor²; it is A^+ A, which repeats the mean as it is: phi(phi(x)) = phi(x)"
    )
    def adjoint_for_inverse(x, reference, sigma_next, factor, until, z):
        return x + _means(reference + sigma_next * z - x, factor) / factor**2 if sigma_next >= until else x

    @mistake("phi repeats the *sum* of a block; it is the mean that leaves a flat picture as it is")
    def sum_for_mean(x, reference, sigma_next, factor, until, z):
        return x + _means(reference + sigma_next * z - x, factor) * factor**2 if sigma_next >= until else x

    @mistake(
        "the means are enlarged bilinearly: then phi(phi(x)) is not phi(x), and phi of the result is not phi(y_t); repeat them"
    )
    def bilinear(x, reference, sigma_next, factor, until, z):
        small = F.avg_pool2d(reference + sigma_next * z - x, factor)
        return x + F.interpolate(small, scale_factor=factor, mode="bilinear") if sigma_next >= until else x

    @mistake("phi repeats the first pixel of a block; it is the block's mean")
    def picked_for_mean(x, reference, sigma_next, factor, until, z):
        picked = (reference + sigma_next * z - x)[..., ::factor, ::factor]
        return x + F.interpolate(picked, scale_factor=factor, mode="nearest") if sigma_next >= until else x

    @mistake("`until` is not used: below it the network is to be left alone")
    def to_the_end(x, reference, sigma_next, factor, until, z):
        return x + _means(reference + sigma_next * z - x, factor)

    @mistake("`until` is used the wrong way round: x is refined from high noise down *to* it, and left alone below")
    def until_turned(x, reference, sigma_next, factor, until, z):
        return x + _means(reference + sigma_next * z - x, factor) if sigma_next < until else x

    @law("where sigma' < until, x must come back as it is")
    def left_alone(case: Case, out: Outputs) -> bool:
        return case["sigma_next"] >= case["until"] or close(out["x"], case["x"])

    @law("the high frequencies, x less its block means, must stay as they are")
    def high_frequencies(case: Case, out: Outputs) -> bool:
        def high(x: np.ndarray) -> np.ndarray:
            return x - _means(torch.as_tensor(x), case["factor"]).numpy()

        return close(high(out["x"]), high(case["x"]))

    @law("the block means must be those of reference + sigma' z")
    def low_frequencies(case: Case, out: Outputs) -> bool:
        if case["sigma_next"] < case["until"]:
            return True
        means, wanted, draws = (_means(T(one), case["factor"]).numpy() for one in (out["x"], case["reference"], case["z"]))
        factors, rest = fit(means, wanted, draws)
        return rest < 1e-8 and close(factors, [1, case["sigma_next"]])
