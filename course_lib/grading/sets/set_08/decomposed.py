"""Item 08.9: noise-free score distillation, its two parts and its two regimes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_08.common import BELIEFS, PICTURES, RULES, SQUARE, asked, at_level, distilled_case, estimated
from course_lib.grading.sets.tools import T, fit, right


def _noises(D_cond, D_ref, D_bad, x0: Tensor, sigma: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """eps_cond, eps_ref and eps_bad at the same x."""
    x = at_level(x0, sigma, eps)
    return estimated(D_cond, x, sigma), estimated(D_ref, x, sigma), estimated(D_bad, x, sigma)


def _by_level(sigma: Tensor, split: float, below: Tensor, above: Tensor) -> Tensor:
    """`below` for samples whose sigma is below the split, `above` for the others."""
    return torch.where(right(sigma, below) < split, below, above)


@item(
    "08.9", title="Noise-free score distillation", function="nfsd_gradient", points=2, minutes=20, difficulty=2, answers=RULES,
    hints=(
        "One x = x0 + sigma eps, and three noises, (x - D(x, sigma)) / sigma. The parts: what the condition adds, eps_cond - eps_ref, times w; and what leads to pictures.",
        "Each sample has a regime of its own: torch.where(right, a, b), with the condition sigma < split as (B, 1, ...).",
        "delta_D = torch.where(s < split, eps_ref, eps_ref - eps_bad); return delta_D + w * (eps_cond - eps_ref). There is no - eps.",
    ),
)  # fmt: skip
class NoiseFree:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], *names: str) -> Case:
            named = dict(zip(("cond", "ref", "bad"), names, strict=True))
            drawn = distilled_case(rng, shape, **named) | {"w": float(rng.uniform(4.0, 8.0))}
            order = [1, 3, 0, 2]  # both regimes, out of order
            drawn["sigma"] = np.sort(drawn["sigma"])[order]
            return drawn | {"split": float(np.sort(drawn["sigma"])[1:3].mean())}

        return [case(SQUARE, "turned", "gaussian", "peaks"), case(PICTURES, "peaks", "network", "turned")]

    def drive(fn, case: Case) -> Outputs:
        beliefs = (BELIEFS[case[name]] for name in ("cond", "ref", "bad"))
        values = (T(case[name]) for name in ("x0", "sigma", "eps"))
        return arrays(gradient=call(fn, *beliefs, *values, case["w"], case["split"]))

    def reference(D_cond, D_ref, D_bad, x0: Tensor, sigma: Tensor, eps: Tensor, w: float, split: float) -> Tensor:
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return _by_level(sigma, split, ref, ref - bad) + w * (cond - ref)

    @mistake(
        "eps is taken off as in SDS: that is what NFSD does away with. eps is not the noise that eps_ref contains, and the difference stays in the gradient"
    )
    def eps_taken_off(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return _by_level(sigma, split, ref, ref - bad) + w * (cond - ref) - eps

    @mistake("below the split eps is taken off: there delta_D is eps_ref as it is")
    def eps_taken_off_below(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return _by_level(sigma, split, ref - eps, ref - bad) + w * (cond - ref)

    @mistake("this is SDS with guidance, eps_ref + w (eps_cond - eps_ref) - eps, at all levels")
    def guided_sds(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, _ = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return ref + w * (cond - ref) - eps

    @mistake("the regimes are exchanged: it is *above* the split, in strong noise, that eps_bad takes the noise off")
    def regimes_exchanged(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return _by_level(sigma, split, ref - bad, ref) + w * (cond - ref)

    @mistake("eps_bad is taken off at all levels; below the split delta_D is eps_ref alone")
    def always_above(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return ref - bad + w * (cond - ref)

    @mistake("eps_bad is never taken off: above the split delta_D is eps_ref - eps_bad")
    def always_below(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, _ = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return ref + w * (cond - ref)

    @mistake("the regime is chosen once for the whole batch, by its average level; each sample has its own sigma")
    def one_regime_for_all(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return _by_level(sigma.mean().expand(len(x0)), split, ref, ref - bad) + w * (cond - ref)

    @mistake(
        "the regime lies along the last axis: each *column* has one, and not each sample; (sigma < split).reshape(-1, 1, ...) puts it right"
    )
    def along_the_columns(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return torch.where(sigma < split, ref, ref - bad) + w * (cond - ref)

    @mistake("guidance is reversed: what the condition adds is eps_cond - eps_ref")
    def guidance_reversed(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return _by_level(sigma, split, ref, ref - bad) + w * (ref - cond)

    @mistake("delta_D is made of eps_cond: what leads to pictures has no condition, that is eps_ref")
    def domain_of_the_condition(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return _by_level(sigma, split, cond, cond - bad) + w * (cond - ref)

    @mistake("the sign of delta_D above the split is turned: this leads *to* bad pictures; eps_ref - eps_bad")
    def towards_the_bad(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return _by_level(sigma, split, ref, bad - ref) + w * (cond - ref)

    @mistake("w multiplies both parts; it scales delta_C, what the condition adds, and delta_D counts once")
    def both_scaled(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return w * (_by_level(sigma, split, ref, ref - bad) + cond - ref)

    @mistake("eps_bad is the reference of the guidance too, w (eps_cond - eps_bad); delta_C is eps_cond - eps_ref at all levels")
    def negative_prompt(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return _by_level(sigma, split, ref, ref - bad) + w * (cond - bad)

    @mistake("delta_D is missing: the condition alone leads on, and nothing to what pictures look like")
    def condition_alone(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, _ = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return w * (cond - ref)

    @mistake("pictures stand where noises belong, D in place of (x - D) / sigma: another sign, and another unit")
    def pictures_for_noises(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        x = at_level(x0, sigma, eps)
        cond, ref, bad = D_cond(x, sigma), D_ref(x, sigma), D_bad(x, sigma)
        return _by_level(sigma, split, ref, ref - bad) + w * (cond - ref)

    @mistake("the noises are not divided by sigma: x - D is sigma times the noise")
    def not_divided(D_cond, D_ref, D_bad, x0, sigma, eps, w, split):
        cond, ref, bad = _noises(D_cond, D_ref, D_bad, x0, sigma, eps)
        return right(sigma, x0) * (_by_level(sigma, split, ref, ref - bad) + w * (cond - ref))

    @law("a sample's gradient must be made of eps_cond, eps_ref and eps_bad at x = x0 + sigma eps, and of nothing else")
    def made_of_three(case: Case, out: Outputs) -> bool:
        return all(rest < 1e-8 for _, rest in _shares(case, out))

    @law("the factors of eps_cond and eps_ref do not fit: w (eps_cond - eps_ref), and eps_ref once more in both regimes")
    def guidance_fits(case: Case, out: Outputs) -> bool:
        return all(close(found[:2], [case["w"], 1 - case["w"]]) for found, _ in _shares(case, out))


def _shares(case: Case, out: Outputs) -> list[tuple[np.ndarray, float]]:
    """The factors of the three noises in the gradient of each regime."""
    sigma = right(T(case["sigma"]), T(case["x0"])).numpy()
    x = case["x0"] + sigma * case["eps"]
    noises = [(x - asked(case, name)) / sigma for name in ("cond", "ref", "bad")]
    low = case["sigma"] < case["split"]
    return [fit(out["gradient"][rows], *(one[rows] for one in noises)) for rows in (low, ~low)]
