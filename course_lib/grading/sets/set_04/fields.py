"""Items 04.7 and 04.9: guidance in an interval of noise levels, and with its spread brought back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import NULL, Labelled, classes, close, factors, level, noised
from course_lib.grading.sets.set_04.free import FREE, MERGED
from course_lib.grading.sets.tools import T, right
from course_lib.guidance.free import cfg, cfg_rescaled, interval


def _inside(low: float, sigma: Tensor, high: float) -> bool:
    return bool(low < sigma <= high)


def _scaled(D_cond, D_ref, x: Tensor, sigma: Tensor, w: float) -> Tensor:
    """04.3; at w = 1 without the reference."""
    cond = D_cond(x, sigma)
    if w == 1:
        return cond
    ref = D_ref(x, sigma)
    return ref + w * (cond - ref)


@item(
    "04.7", title="Guidance in an interval", function="interval_guided", points=1, minutes=10, difficulty=1,
    answers=(*MERGED, "course_lib.guidance.free.interval"),
    hints=(
        "sigma is one number here, so a plain `if` will do: low < sigma <= high.",
        "Outside, the scale is 1. Put w = 1 into 04.3: which of the two denoisers is left?",
        "Outside, return D_cond(x, sigma) before D_ref is ever called; inside, 04.3.",
    ),
)  # fmt: skip
class IntervalGuided:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...]) -> Case:
            low, high = float(rng.uniform(0.3, 0.6)), float(rng.uniform(1.2, 2.0))
            sigmas = np.array([3 * high, high, (low * high) ** 0.5, low, low / 3])  # above, the ends, within, below
            x = np.stack([noised(rng, shape, sigma) for sigma in sigmas])
            return {
                "x": x,
                "sigma": sigmas,
                "low": low,
                "high": high,
                "label": classes(rng, shape[0]),
                "w": float(rng.uniform(2, 5)),
            }

        return [case((3, 2)), case((2, 1, 2, 2))]

    def drive(fn, case: Case) -> Outputs:
        found, cond_calls, ref_calls = [], [], []
        for x, sigma in zip(T(case["x"]), case["sigma"], strict=True):
            D = Labelled()
            D_cond, D_ref = D.given(T(case["label"])), D.given(NULL)
            found.append(arrays(x0_hat=call(fn, D_cond, D_ref, x, level(float(sigma)), case["w"], case["low"], case["high"])))
            cond_calls.append(float(D_cond.count))
            ref_calls.append(float(D_ref.count))
        shapes = {one["x0_hat"].shape for one in found}
        x0_hat = np.stack([one["x0_hat"] for one in found]) if len(shapes) == 1 else found[0]["x0_hat"]
        return {"x0_hat": x0_hat, "calls_cond": np.array(cond_calls), "calls_ref": np.array(ref_calls)}

    def reference(D_cond, D_ref, x: Tensor, sigma: Tensor, w: float, low: float, high: float) -> Tensor:
        return cfg(D_cond, D_ref, interval(w, low, high))(x, sigma)

    @mistake("outside the interval the scale is 0, and the condition is dropped altogether; it is 1 there: D_cond alone")
    def unconditional_outside(D_cond, D_ref, x, sigma, w, low, high):
        return _scaled(D_cond, D_ref, x, sigma, w) if _inside(low, sigma, high) else D_ref(x, sigma)

    @mistake("guidance works at every level; it is to work where low < sigma <= high only")
    def everywhere(D_cond, D_ref, x, sigma, w, low, high):
        return _scaled(D_cond, D_ref, x, sigma, w)

    @mistake("guidance works *outside* the interval, and rests within")
    def inside_out(D_cond, D_ref, x, sigma, w, low, high):
        return D_cond(x, sigma) if _inside(low, sigma, high) else _scaled(D_cond, D_ref, x, sigma, w)

    @mistake(
        "the numbers are right, but D_ref is called outside the interval too, and its answer multiplied by 0: that half of the cost is what the interval saves"
    )
    def called_for_nothing(D_cond, D_ref, x, sigma, w, low, high):
        cond, ref = D_cond(x, sigma), D_ref(x, sigma)
        return ref + (w if _inside(low, sigma, high) else 1.0) * (cond - ref)

    @mistake("the lower end counts as inside; the interval is low < sigma <= high, so that guidance ends *at* low")
    def low_included(D_cond, D_ref, x, sigma, w, low, high):
        return _scaled(D_cond, D_ref, x, sigma, w if low <= sigma <= high else 1)

    @mistake("the upper end counts as outside; the interval is low < sigma <= high")
    def high_excluded(D_cond, D_ref, x, sigma, w, low, high):
        return _scaled(D_cond, D_ref, x, sigma, w if low < sigma < high else 1)

    @mistake("the ends are turned round: low <= sigma < high counts as inside; it is low < sigma <= high")
    def ends_turned(D_cond, D_ref, x, sigma, w, low, high):
        return _scaled(D_cond, D_ref, x, sigma, w if low <= sigma < high else 1)

    @mistake("there is no lower end: guidance goes on to sigma = 0; below low it is to rest")
    def no_lower_end(D_cond, D_ref, x, sigma, w, low, high):
        return _scaled(D_cond, D_ref, x, sigma, w if sigma <= high else 1)

    @mistake(
        "there is no upper end: guidance works in the strongest noise, where it does the most harm to diversity; above high it is to rest"
    )
    def no_upper_end(D_cond, D_ref, x, sigma, w, low, high):
        return _scaled(D_cond, D_ref, x, sigma, w if sigma > low else 1)

    @mistake("inside, the scale is that of the paper, less by 1: w = 1 is to give D_cond, as in 04.3")
    def scale_of_the_paper(D_cond, D_ref, x, sigma, w, low, high):
        return _scaled(D_cond, D_ref, x, sigma, 1 + w if _inside(low, sigma, high) else 1)

    @mistake("D_cond and D_ref have changed places inside the interval: w = 1 is to give D_cond")
    def swapped_inside(D_cond, D_ref, x, sigma, w, low, high):
        return _scaled(D_ref, D_cond, x, sigma, w) if _inside(low, sigma, high) else D_cond(x, sigma)

    @mistake(
        "sigma is brought to the nearest end of the interval and guidance goes on there: x has the noise of sigma, and is to be asked about at it"
    )
    def level_clamped(D_cond, D_ref, x, sigma, w, low, high):
        return _scaled(D_cond, D_ref, x, sigma.clamp(low, high), w)

    @law("outside low < sigma <= high the result must be D_cond(x, sigma)")
    def rests_outside(case: Case, out: Outputs) -> bool:
        return all(close(out["x0_hat"][k], _ask(case, k, case["label"])) for k in (0, 3, 4))

    @law("inside low < sigma <= high the result must be that of 04.3, with the scale w")
    def guides_inside(case: Case, out: Outputs) -> bool:
        found = [factors(out["x0_hat"][k], _ask(case, k, case["label"]), _ask(case, k, NULL)) for k in (1, 2)]
        return all(one is not None and close(one, [case["w"], 1 - case["w"]]) for one in found)

    @law("the numbers are right, but D_cond and D_ref are called too often: inside each once, outside D_cond alone, once")
    def calls(case: Case, out: Outputs) -> bool:
        return bool((out["calls_cond"] == 1).all()) and out["calls_ref"].tolist() == [0, 1, 1, 0, 0]


def _ask(case: Case, k: int, label: np.ndarray | int) -> np.ndarray:
    return Labelled()(T(case["x"][k]), float(case["sigma"][k]), T(label)).numpy()


# --- 04.9 ----------------------------------------------------------------------------------------------


def _deviation(values: Tensor) -> Tensor:
    """The standard deviation of each sample's numbers, (B,)."""
    return values.flatten(1).std(1)


def _rescaled(x: Tensor, cond: Tensor, ref: Tensor, w: float, phi: float, c_skip: float, factor) -> Tensor:
    """c_skip x + k (guided - c_skip x), with k = factor(said, wanted), (B,) or a number."""
    kept = c_skip * x
    said, wanted = ref + w * (cond - ref) - kept, cond - kept
    k = torch.as_tensor(factor(said, wanted), dtype=x.dtype).expand(len(x))
    return kept + right(k, x) * said


@item(
    "04.9", title="Guidance with its spread brought back", function="rescaled", points=2, minutes=20, difficulty=3,
    answers=FREE,
    hints=(
        "What the network said, up to c_out: take c_skip x off, from the guided estimate and from cond.",
        "k = phi * std(cond - c_skip x) / std(guided - c_skip x) + (1 - phi), with one standard deviation for each *sample*, over all of its numbers.",
        "Scale what is left of the guided estimate by k, and put c_skip x back: c_skip x + k (guided - c_skip x). k is (B,): reshape it to (B, 1, ...).",
    ),
)  # fmt: skip
class Rescaled:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], phi: float, c_skip: float) -> Case:
            spread = rng.uniform(0.4, 1.6, (shape[0], *[1] * (len(shape) - 1)))  # samples and their means differ
            cond, ref = (0.5 * rng.normal() + spread * rng.normal(size=shape) for _ in range(2))
            values = {"x": rng.normal(size=shape) * 1.5, "cond": cond, "ref": ref}
            return values | {"w": float(rng.uniform(2.5, 6)), "phi": phi, "c_skip": c_skip}

        drawn = [float(rng.uniform(0.3, 0.8)) for _ in range(4)]
        return [
            case((3, 2, 3, 3), drawn[0], drawn[1]),
            case((4, 6), 1.0, 1.0),
            case((3, 1, 4, 4), drawn[2], 0.0),
            case((4, 6), 0.0, drawn[3]),
        ]

    def drive(fn, case: Case) -> Outputs:
        given = [T(case[name]) for name in ("x", "cond", "ref")]
        return arrays(x0_hat=call(fn, *given, case["w"], case["phi"], case["c_skip"]))

    def reference(x: Tensor, cond: Tensor, ref: Tensor, w: float, phi: float, c_skip: float) -> Tensor:
        skip = lambda sigma: torch.full_like(sigma, c_skip)
        return cfg_rescaled(lambda x, sigma: cond, lambda x, sigma: ref, w, phi, skip)(x, torch.ones((), dtype=x.dtype))

    @mistake("this is 04.3 without any rescaling")
    def not_rescaled(x, cond, ref, w, phi, c_skip):
        return ref + w * (cond - ref)

    @mistake(
        "the estimate x0 itself is scaled; the paper scales what the *network* says, and c_skip x is not said by it: take it off first"
    )
    def estimate_scaled(x, cond, ref, w, phi, c_skip):
        return _rescaled(x, cond, ref, w, phi, 0.0, lambda a, b: phi * _deviation(b) / _deviation(a) + 1 - phi)

    @mistake("the estimated *noise* is scaled, as for a network that predicts eps, c_skip = 1; this network keeps c_skip x")
    def noise_scaled(x, cond, ref, w, phi, c_skip):
        return _rescaled(x, cond, ref, w, phi, 1.0, lambda a, b: phi * _deviation(b) / _deviation(a) + 1 - phi)

    @mistake("c_skip x is taken off and never put back")
    def not_put_back(x, cond, ref, w, phi, c_skip):
        out = _rescaled(x, cond, ref, w, phi, c_skip, lambda a, b: phi * _deviation(b) / _deviation(a) + 1 - phi)
        return out - c_skip * x

    @mistake(
        "one standard deviation is taken over the whole batch: a sample's contrast then depends on its neighbours; take one for each sample"
    )
    def over_the_batch(x, cond, ref, w, phi, c_skip):
        return _rescaled(x, cond, ref, w, phi, c_skip, lambda a, b: phi * b.std() / a.std() + 1 - phi)

    @mistake(
        "the deviation is taken across the samples, for each number by itself (dim 0); take it within a sample, over all its numbers"
    )
    def across_the_samples(x, cond, ref, w, phi, c_skip):
        kept = c_skip * x
        said, wanted = ref + w * (cond - ref) - kept, cond - kept
        return kept + (phi * wanted.std(0) / said.std(0) + 1 - phi) * said

    @mistake("the deviation is taken along the last axis only, row by row; take it over all numbers of a sample: flatten(1)")
    def over_the_last_axis(x, cond, ref, w, phi, c_skip):
        kept = c_skip * x
        said, wanted = ref + w * (cond - ref) - kept, cond - kept
        return kept + (phi * wanted.std(-1, keepdim=True) / said.std(-1, keepdim=True) + 1 - phi) * said

    @mistake("the ratio is turned round: the spread grows instead of coming back; it is that of cond over that of the guided one")
    def ratio_turned(x, cond, ref, w, phi, c_skip):
        return _rescaled(x, cond, ref, w, phi, c_skip, lambda a, b: phi * _deviation(a) / _deviation(b) + 1 - phi)

    @mistake("phi is turned round: phi = 0 is to give plain guidance, phi = 1 the whole correction")
    def phi_turned(x, cond, ref, w, phi, c_skip):
        return _rescaled(x, cond, ref, w, phi, c_skip, lambda a, b: (1 - phi) * _deviation(b) / _deviation(a) + phi)

    @mistake("the part 1 - phi of the unscaled estimate is missing: at phi = 0 nothing is left of it")
    def unscaled_part_missing(x, cond, ref, w, phi, c_skip):
        return _rescaled(x, cond, ref, w, phi, c_skip, lambda a, b: phi * _deviation(b) / _deviation(a))

    @mistake("phi is not used: the whole correction is made, as if it were 1")
    def phi_forgotten(x, cond, ref, w, phi, c_skip):
        return _rescaled(x, cond, ref, w, phi, c_skip, lambda a, b: _deviation(b) / _deviation(a))

    @mistake(
        "phi is an exponent, ratio^phi: it agrees at phi = 0 and 1, but the paper mixes in straight lines, phi ratio + (1 - phi)"
    )
    def phi_as_power(x, cond, ref, w, phi, c_skip):
        return _rescaled(x, cond, ref, w, phi, c_skip, lambda a, b: (_deviation(b) / _deviation(a)) ** phi)

    @mistake("the ratio is that of the *variances*; scale by the ratio of the standard deviations")
    def variances(x, cond, ref, w, phi, c_skip):
        return _rescaled(x, cond, ref, w, phi, c_skip, lambda a, b: phi * (_deviation(b) / _deviation(a)) ** 2 + 1 - phi)

    @mistake("lengths are compared, with the mean left in; the standard deviation takes a sample's mean off first")
    def lengths(x, cond, ref, w, phi, c_skip):
        norm = lambda values: values.flatten(1).norm(dim=1)
        return _rescaled(x, cond, ref, w, phi, c_skip, lambda a, b: phi * norm(b) / norm(a) + 1 - phi)

    @mistake(
        "the spread is brought back to that of the *reference*; the conditional estimate, which is not over-saturated, is the measure"
    )
    def spread_of_the_reference(x, cond, ref, w, phi, c_skip):
        k = lambda a, b: phi * _deviation(ref - c_skip * x) / _deviation(a) + 1 - phi
        return _rescaled(x, cond, ref, w, phi, c_skip, k)

    @mistake("the mean of a sample is kept out of the scaling; the paper scales all that the network says, its mean too")
    def mean_kept(x, cond, ref, w, phi, c_skip):
        kept = c_skip * x
        said, wanted = ref + w * (cond - ref) - kept, cond - kept
        mean = said.mean(tuple(range(1, said.ndim)), keepdim=True)
        return kept + mean + right(phi * _deviation(wanted) / _deviation(said) + 1 - phi, x) * (said - mean)

    @law("phi = 0 must give plain guidance, 04.3")
    def plain_at_zero(case: Case, out: Outputs) -> bool:
        return case["phi"] != 0 or close(out["x0_hat"], _plain(case))

    @law("with c_skip x taken off, a sample of the result must be a multiple of the guided one, by one factor for each sample")
    def one_factor(case: Case, out: Outputs) -> bool:
        said, kept = _plain(case) - case["c_skip"] * case["x"], case["c_skip"] * case["x"]
        return all(factors(a - k, b) is not None for a, b, k in zip(out["x0_hat"], said, kept, strict=True))

    @law("at phi = 1, and with c_skip x taken off, a sample must have the standard deviation of its conditional estimate")
    def spread_is_back(case: Case, out: Outputs) -> bool:
        kept = case["c_skip"] * case["x"]
        return case["phi"] != 1 or close(*((one - kept).std(axis=1) for one in (out["x0_hat"], case["cond"])))

    @law("the correction is right at phi = 0 and at phi = 1; between them it must lie on a straight line")
    def straight_in_phi(case: Case, out: Outputs) -> bool:
        kept = case["c_skip"] * case["x"]
        axes = tuple(range(1, kept.ndim))
        ratio = (case["cond"] - kept).std(axes) / (_plain(case) - kept).std(axes)
        found = [factors(a, b)[0] for a, b in zip(out["x0_hat"] - kept, _plain(case) - kept, strict=True)]
        return close(found, case["phi"] * ratio + 1 - case["phi"])


def _plain(case: Case) -> np.ndarray:
    """The guided estimate before its spread is brought back."""
    return case["ref"] + case["w"] * (case["cond"] - case["ref"])
