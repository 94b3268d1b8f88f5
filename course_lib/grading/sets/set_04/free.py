"""Items 04.3, 04.5 and 04.6: classifier-free guidance, negative prompts, both predictions in one call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import (
    NULL,
    PICTURE,
    PLANE,
    Labelled,
    ask,
    close,
    factors,
    guided_case,
    level,
    noised,
    one_call,
)
from course_lib.grading.sets.tools import T, right
from course_lib.guidance.free import cfg

FREE = tuple(f"course_lib.guidance.free.{name}" for name in ("cfg", "cfg_rescaled", "apg", "cfg_pp"))
MERGED = (*FREE, "course_lib.denoisers.batched")


@item(
    "04.3", title="Classifier-free guidance", function="guided", points=1, minutes=10, difficulty=1,
    answers=MERGED,
    hints=(
        "Two points, the reference's estimate and the conditional one, and a straight line through them. w says how far to go.",
        "w = 0 is the reference, w = 1 the conditional estimate, w = 2 as far again behind it.",
        "Start at the reference and go w times the difference, conditional less reference.",
    ),
)  # fmt: skip
class Guided:
    def cases(rng: np.random.Generator) -> list[Case]:
        cases = [guided_case(rng, PLANE), guided_case(rng, PICTURE)]
        return [*cases, *(guided_case(rng, PLANE, w) for w in (0.0, 1.0, 0.4, -0.6))]

    def drive(fn, case: Case) -> Outputs:
        D = Labelled()
        given = D.given(T(case["label"])), D.given(NULL), T(case["x"]), level(case["sigma"]), case["w"]
        return arrays(x0_hat=call(fn, *given))

    def reference(D_cond, D_ref, x: Tensor, sigma: Tensor, w: float) -> Tensor:
        return cfg(D_cond, D_ref, w)(x, sigma)

    @mistake(
        "this is the scale of the paper (Ho and Salimans 2022, Eq. 6), which is less by 1: here w = 0 is to give D_ref and w = 1 D_cond"
    )
    def scale_of_the_paper(D_cond, D_ref, x, sigma, w):
        return (1 + w) * D_cond(x, sigma) - w * D_ref(x, sigma)

    @mistake("the difference has the wrong sign: it leads away from the condition; it is D_cond - D_ref")
    def sign_turned(D_cond, D_ref, x, sigma, w):
        cond, ref = D_cond(x, sigma), D_ref(x, sigma)
        return ref + w * (ref - cond)

    @mistake("D_cond and D_ref have changed places: w = 0 is to give D_ref, w = 1 D_cond")
    def ends_swapped(D_cond, D_ref, x, sigma, w):
        cond, ref = D_cond(x, sigma), D_ref(x, sigma)
        return cond + w * (ref - cond)

    @mistake(
        "w times D_cond is added to D_ref whole: the factors add up to 1 + w, and the estimate grows with w; add w times the *difference*"
    )
    def condition_added(D_cond, D_ref, x, sigma, w):
        return D_ref(x, sigma) + w * D_cond(x, sigma)

    @mistake("this is w (D_cond - D_ref) alone; it is added to D_ref")
    def difference_alone(D_cond, D_ref, x, sigma, w):
        return w * (D_cond(x, sigma) - D_ref(x, sigma))

    @mistake("the reference is subtracted once from w D_cond, whatever w is; its factor is 1 - w, so that both add up to 1")
    def reference_taken_off(D_cond, D_ref, x, sigma, w):
        return w * D_cond(x, sigma) - D_ref(x, sigma)

    @mistake("w is cut to [0, 1]: that only blends the two; guidance goes *beyond* the conditional estimate, w > 1")
    def only_blended(D_cond, D_ref, x, sigma, w):
        cond, ref = D_cond(x, sigma), D_ref(x, sigma)
        return ref + min(max(w, 0.0), 1.0) * (cond - ref)

    @mistake("the sum is divided by 1 + w, as a mean would be; the factors w and 1 - w add up to 1 as they are")
    def averaged(D_cond, D_ref, x, sigma, w):
        return (D_ref(x, sigma) + w * D_cond(x, sigma)) / (1 + w)

    @mistake("x is added: D_ref and D_cond are estimates of the clean sample already, not directions from x")
    def from_x(D_cond, D_ref, x, sigma, w):
        return x + w * (D_cond(x, sigma) - D_ref(x, sigma))

    @mistake(
        "the difference is multiplied by sigma^2, as a *score* is in Tweedie's formula; these are two estimates of x0, and sigma^2 is inside them"
    )
    def as_scores(D_cond, D_ref, x, sigma, w):
        ref = D_ref(x, sigma)
        return ref + w * sigma**2 * (D_cond(x, sigma) - ref)

    @mistake("D_ref is asked about D_cond's answer; both are asked about the same x")
    def asked_in_turn(D_cond, D_ref, x, sigma, w):
        cond = D_cond(x, sigma)
        ref = D_ref(cond, sigma)
        return ref + w * (cond - ref)

    @law("w = 0 must give D_ref, and w = 1 D_cond")
    def endpoints(case: Case, out: Outputs) -> bool:
        wanted = {0.0: NULL, 1.0: case["label"]}
        return case["w"] not in wanted or close(out["x0_hat"], ask(case, wanted[case["w"]]))

    @law("the result is no weighted sum of D_cond and D_ref, both asked about x and sigma")
    def weighted_sum(case: Case, out: Outputs) -> bool:
        return _shares(case, out) is not None

    @law("the factors of D_cond and D_ref must add up to 1: where both agree, guidance changes nothing")
    def add_up(case: Case, out: Outputs) -> bool:
        return close(_shares(case, out).sum(), 1)

    @law("the factor of D_cond must be w")
    def share_of_the_condition(case: Case, out: Outputs) -> bool:
        return close(_shares(case, out)[0], case["w"])


def _shares(case: Case, out: Outputs) -> np.ndarray | None:
    """The factors of the conditional and the unconditional estimate."""
    return factors(out["x0_hat"], ask(case, case["label"]), ask(case, NULL))


# --- 04.5 ----------------------------------------------------------------------------------------------


@item(
    "04.5", title="Negative prompts", function="negative_guided", points=1, minutes=10, difficulty=2,
    answers=MERGED,
    hints=(
        "Nothing new has to be invented: look at 04.3, and ask what the reference may be.",
        "The reference is where guidance leads *away* from. So far that was the null class.",
        "It is 04.3 with D_ref = D(x, sigma, negative) in place of D(x, sigma, null). The null class is then asked no more, unless it is itself in `negative`.",
    ),
)  # fmt: skip
class NegativeGuided:
    def cases(rng: np.random.Generator) -> list[Case]:
        result = []
        for shape, w in ((PLANE, None), (PICTURE, None), (PLANE, 1.0)):
            case = guided_case(rng, shape, w)
            negative = (case["label"] + rng.integers(1, NULL, shape[0])) % NULL
            negative[-1] = NULL  # one sample has no negative prompt
            result.append(case | {"negative": negative})
        return result

    def drive(fn, case: Case) -> Outputs:
        given = T(case["x"]), level(case["sigma"]), T(case["label"]), T(case["negative"]), NULL, case["w"]
        return arrays(x0_hat=call(fn, Labelled(), *given))

    def reference(D, x: Tensor, sigma: Tensor, label: Tensor, negative: Tensor, null: int, w: float) -> Tensor:
        return cfg(lambda x, sigma: D(x, sigma, label), lambda x, sigma: D(x, sigma, negative), w)(x, sigma)

    @mistake(
        "the negative prompt has no effect: this is 04.3 with the null class as the reference; the negative prompt takes its place"
    )
    def ignored(D, x, sigma, label, negative, null, w):
        ref = D(x, sigma, torch.full_like(label, null))
        return ref + w * (D(x, sigma, label) - ref)

    @mistake(
        "guidance from the null class, and then the negative prompt's direction taken off once; in two terms `negative` stands in the place of null"
    )
    def taken_off_once(D, x, sigma, label, negative, null, w):
        ref = D(x, sigma, torch.full_like(label, null))
        return ref + w * (D(x, sigma, label) - ref) - (D(x, sigma, negative) - ref)

    @mistake(
        "the difference is right, but it starts at the null class (three terms, to the label and away from the negative prompt, come to the same: that is composable diffusion, Liu et al. 2022); it starts at the reference, which is now the negative prompt, so that w = 1 gives the label's estimate"
    )
    def starts_at_null(D, x, sigma, label, negative, null, w):
        ref = D(x, sigma, torch.full_like(label, null))
        return ref + w * (D(x, sigma, label) - D(x, sigma, negative))

    @mistake("label and negative have changed places: this leads to what is not wanted")
    def swapped(D, x, sigma, label, negative, null, w):
        ref = D(x, sigma, label)
        return ref + w * (D(x, sigma, negative) - ref)

    @mistake("the scale is that of the paper, less by 1: w = 1 is to give the label's estimate, as in 04.3")
    def scale_of_the_paper(D, x, sigma, label, negative, null, w):
        cond = D(x, sigma, label)
        return cond + w * (cond - D(x, sigma, negative))

    @mistake(
        "the reference is the mean of the null class and the negative prompt, so that half of the effect is lost; it is the negative prompt alone"
    )
    def halfway(D, x, sigma, label, negative, null, w):
        ref = (D(x, sigma, torch.full_like(label, null)) + D(x, sigma, negative)) / 2
        return ref + w * (D(x, sigma, label) - ref)

    @mistake("the estimates of label and negative are subtracted from one another whole; the reference keeps its factor 1 - w")
    def subtracted_whole(D, x, sigma, label, negative, null, w):
        return w * (D(x, sigma, label) - D(x, sigma, negative))

    @mistake("the sign is turned: w (D_negative - D_label) leads to the negative prompt")
    def sign_turned(D, x, sigma, label, negative, null, w):
        ref = D(x, sigma, negative)
        return ref - w * (D(x, sigma, label) - ref)

    @mistake("every sample is led away from the first one's negative prompt; each has its own")
    def negative_of_the_first(D, x, sigma, label, negative, null, w):
        ref = D(x, sigma, negative[:1].expand(len(x)))
        return ref + w * (D(x, sigma, label) - ref)

    @mistake("the label is forgotten: this leads from the negative prompt to the null class, and so only away")
    def only_away(D, x, sigma, label, negative, null, w):
        ref = D(x, sigma, negative)
        return ref + w * (D(x, sigma, torch.full_like(label, null)) - ref)

    @law("at w = 1 the result must be the label's estimate, whatever the negative prompt is")
    def at_one(case: Case, out: Outputs) -> bool:
        return case["w"] != 1 or close(out["x0_hat"], ask(case, case["label"]))

    @law("a sample whose negative prompt is the null class must get what 04.3 gives it")
    def none_wanted(case: Case, out: Outputs) -> bool:
        cond, ref = ask(case, case["label"])[-1], ask(case, NULL)[-1]
        return close(out["x0_hat"][-1], ref + case["w"] * (cond - ref))

    @law("the result is no weighted sum of the estimates for label and for negative")
    def two_terms(case: Case, out: Outputs) -> bool:
        return factors(out["x0_hat"], ask(case, case["label"]), ask(case, case["negative"])) is not None


# --- 04.6 ----------------------------------------------------------------------------------------------


def _twice(D, x: Tensor, sigma: Tensor, label: Tensor, null: int) -> Tensor:
    """The answers for all labels, then for all nulls, in one call."""
    both = torch.cat([label, torch.full_like(label, null)])
    return D(torch.cat([x, x]), sigma if sigma.ndim == 0 else torch.cat([sigma, sigma]), both)


def _lead(cond: Tensor, ref: Tensor, w: Tensor) -> Tensor:
    """04.3, with a scale for each sample."""
    return ref + right(w.expand(len(ref)), ref) * (cond - ref)


@item(
    "04.6", title="Both predictions in one call", function="batched_guided", points=2, minutes=20, difficulty=2,
    answers=MERGED,
    hints=(
        "A batch of 2B: x twice, one after the other, torch.cat([x, x]); the labels, and then B times null.",
        "A level for each sample is doubled as x is; a single one serves all 2B rows as it stands. `sigma.ndim` tells which it is.",
        "The answer has 2B rows, in the order in which you asked: out.chunk(2) gives (cond, ref), if the labels came first.",
        "w of shape (B,) has to multiply (B, ...): w.reshape(-1, *[1] * (x.ndim - 1)); that serves a single number as well.",
    ),
)  # fmt: skip
class BatchedGuided:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], per_sample: bool) -> Case:
            case = guided_case(rng, shape)
            if not per_sample:
                return case
            sigma = rng.permuted(np.linspace(0.4, 2.0, shape[0])) * rng.uniform(0.9, 1.1)
            return case | {"sigma": sigma, "x": noised(rng, shape, sigma), "w": rng.uniform(1.5, 5.0, shape[0])}

        # B numbers along the last axis, so that a w of shape (B,) multiplies the wrong axis in silence
        return [case(PLANE, False), case((4, 4), True), case((4, 1, 2, 4), True)]

    def drive(fn, case: Case) -> Outputs:
        D = Labelled()
        sigma, w = (T(case[name], dtype=torch.float64) for name in ("sigma", "w"))
        result = arrays(x0_hat=call(fn, D, T(case["x"]), sigma, T(case["label"]), NULL, w))
        return result | {"calls": np.array(float(len(D.calls))), "rows": np.array(float(len(one_call(D)["net_x"])))}

    def reference(D, x: Tensor, sigma: Tensor, label: Tensor, null: int, w: Tensor) -> Tensor:
        return _lead(*_twice(D, x, sigma, label, null).chunk(2), w)

    @mistake("the numbers are right, but the network is called twice; put both halves into one batch of 2B, and call it once")
    def two_calls(D, x, sigma, label, null, w):
        return _lead(D(x, sigma, label), D(x, sigma, torch.full_like(label, null)), w)

    @mistake("the network is called once for each row; put all 2B rows into one batch")
    def row_by_row(D, x, sigma, label, null, w):
        s = sigma.expand(len(x))
        rows = [(x[b : b + 1], s[b : b + 1], label[b : b + 1]) for b in range(len(x))]
        cond = torch.cat([D(*row) for row in rows])
        return _lead(cond, torch.cat([D(x, s, torch.full_like(one, null)) for x, s, one in rows]), w)

    @mistake(
        "the halves of the answer are swapped: they come in the order in which you asked, and this leads away from the label"
    )
    def halves_swapped(D, x, sigma, label, null, w):
        ref, cond = _twice(D, x, sigma, label, null).chunk(2)
        return _lead(cond, ref, w)

    @mistake(
        "the batch was asked half by half and read in turn, rows 0, 2, 4 against 1, 3, 5: samples are mixed with one another; read it as you wrote it, chunk(2)"
    )
    def read_in_turn(D, x, sigma, label, null, w):
        out = _twice(D, x, sigma, label, null)
        return _lead(out[::2], out[1::2], w)

    @mistake(
        "x is doubled by repeat_interleave, each sample beside its twin, while the labels come half by half: samples get one another's labels; double all in the same way"
    )
    def doubled_in_two_ways(D, x, sigma, label, null, w):
        both = torch.cat([label, torch.full_like(label, null)])
        levels = sigma if sigma.ndim == 0 else sigma.repeat_interleave(2)
        return _lead(*D(x.repeat_interleave(2, 0), levels, both).chunk(2), w)

    @mistake(
        "the levels are doubled by repeat_interleave and x by cat: samples are asked about at one another's levels; double both in the same way"
    )
    def levels_in_another_order(D, x, sigma, label, null, w):
        both = torch.cat([label, torch.full_like(label, null)])
        levels = sigma.expand(len(x)).repeat_interleave(2)
        return _lead(*D(torch.cat([x, x]), levels, both).chunk(2), w)

    @mistake("all rows are asked at the level of the first sample; where sigma is (B,), each has its own")
    def level_of_the_first(D, x, sigma, label, null, w):
        return _lead(*_twice(D, x, sigma.reshape(-1)[0], label, null).chunk(2), w)

    @mistake("all rows are asked at the mean of the levels; each sample has its own")
    def mean_level(D, x, sigma, label, null, w):
        return _lead(*_twice(D, x, sigma.mean(), label, null).chunk(2), w)

    @mistake("all samples are guided with the first one's scale; where w is (B,), each has its own")
    def scale_of_the_first(D, x, sigma, label, null, w):
        return _lead(*_twice(D, x, sigma, label, null).chunk(2), w.reshape(-1)[0])

    @mistake("all samples are guided with the mean of the scales; each has its own")
    def mean_scale(D, x, sigma, label, null, w):
        return _lead(*_twice(D, x, sigma, label, null).chunk(2), w.mean())

    @mistake(
        "w of shape (B,) multiplies the *last* axis of x, which here happens to be as long; samples are the first: give w the shape (B, 1, ...)"
    )
    def scale_on_the_last_axis(D, x, sigma, label, null, w):
        cond, ref = _twice(D, x, sigma, label, null).chunk(2)
        return ref + w * (cond - ref)

    @mistake("the scale is that of the paper, less by 1: w = 0 is to give the null class's estimate, w = 1 the label's")
    def scale_of_the_paper(D, x, sigma, label, null, w):
        return _lead(*_twice(D, x, sigma, label, null).chunk(2), 1 + w)

    @mistake("the second half asks for class 0, which is a class of its own; without a condition means the index `null`")
    def class_zero(D, x, sigma, label, null, w):
        return _lead(*_twice(D, x, sigma, label, 0).chunk(2), w)

    @mistake("the second half asks for the labels again: both halves agree, and guidance has no effect; its labels are `null`")
    def labels_twice(D, x, sigma, label, null, w):
        out = D(torch.cat([x, x]), sigma if sigma.ndim == 0 else torch.cat([sigma, sigma]), torch.cat([label, label]))
        return _lead(*out.chunk(2), w)

    @law("the network must be called once, with 2B rows")
    def called_once(case: Case, out: Outputs) -> bool:
        return out["calls"] == 1 and out["rows"] == 2 * len(case["x"])

    @law(
        "a sample is no weighted sum of its *own* two estimates: rows of the batch are mixed with one another, or asked at another level"
    )
    def own_estimates(case: Case, out: Outputs) -> bool:
        return all(one is not None for one in _row_shares(case, out))

    @law("the factors of a sample's two estimates must be w and 1 - w, with its own w")
    def own_scale(case: Case, out: Outputs) -> bool:
        w = np.broadcast_to(case["w"], len(case["x"]))
        return all(close(found, [one, 1 - one]) for found, one in zip(_row_shares(case, out), w, strict=True))


def _row_shares(case: Case, out: Outputs) -> list[np.ndarray | None]:
    """For each sample the factors of its two estimates."""
    cond, ref = ask(case, case["label"]), ask(case, NULL)
    return [factors(one, c, r) for one, c, r in zip(out["x0_hat"], cond, ref, strict=True)]
