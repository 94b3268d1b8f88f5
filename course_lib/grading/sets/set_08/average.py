"""Item 08.5: the score of a picture without noise, by noise that is put on it and averaged away."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import level
from course_lib.grading.sets.set_08.common import BELIEFS, RULES
from course_lib.grading.sets.tools import T, fit


def _answers(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """D(x0 + sigma eps_k, sigma) of each draw, (n, B, ...)."""
    return torch.stack([D(x0 + sigma * one, sigma) for one in eps])


def _score(x0: Tensor, picture: Tensor, sigma: Tensor) -> Tensor:
    """(picture - x0) / sigma^2."""
    return (picture - x0) / sigma**2


@item(
    "08.5", title="Perturb and average", function="perturb_and_average", points=2, minutes=15, difficulty=2, answers=RULES,
    hints=(
        "For each of the n draws: noise on x0, the *same* x0 each time, and one answer D(x0 + sigma eps[k], sigma). It is these answers that are averaged.",
        "Each draw has the score (D - x0) / sigma², with x0 and not x: what is asked for is where *x0* should go.",
        "One call: x = (x0 + sigma * eps).flatten(0, 1), (n B, ...), with the draws outside; then D(x, sigma).unflatten(0, eps.shape[:2]).mean(0).",
    ),
)  # fmt: skip
class PerturbAndAverage:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(D: str, n: int, shape: tuple[int, ...]) -> Case:
            return {
                "D": D,
                "x0": rng.normal(size=shape),
                "sigma": float(rng.uniform(1.3, 2.0)),
                "eps": rng.normal(size=(n, *shape)),
            }

        return [case("turned", 4, (3, 2)), case("peaks", 3, (2, 1, 2, 2))]

    def drive(fn, case: Case) -> Outputs:
        return arrays(score=call(fn, BELIEFS[case["D"]], T(case["x0"]), level(case["sigma"]), T(case["eps"])))

    def reference(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        return _score(x0, _answers(D, x0, sigma, eps).mean(0), sigma)

    @mistake(
        "the noisy pictures are averaged, and D is asked once: their noise cancels before it was needed. Ask about each, then average the *answers*"
    )
    def pictures_averaged(D, x0, sigma, eps):
        return _score(x0, D(x0 + sigma * eps.mean(0), sigma), sigma)

    @mistake(
        "each draw has the score of its own noisy point, (D - x) / sigma²: - eps / sigma comes with it, which is 0 on average and noise until then; take x0 off"
    )
    def scores_of_noisy_points(D, x0, sigma, eps):
        return torch.stack([(D(x0 + sigma * one, sigma) - x0 - sigma * one) / sigma**2 for one in eps]).mean(0)

    @mistake(
        "D is asked about x0 as it is: at this level it was trained on pictures with noise, and has never seen one without; put the noise on"
    )
    def not_perturbed(D, x0, sigma, eps):
        return _score(x0, D(x0, sigma), sigma)

    @mistake("the draws are summed: the more of them there are, the longer the score; average")
    def summed(D, x0, sigma, eps):
        return _score(x0, _answers(D, x0, sigma, eps).mean(0), sigma) * len(eps)

    @mistake("D - x0 is divided by sigma: that is minus a noise; a score has sigma²")
    def divided_once(D, x0, sigma, eps):
        return _score(x0, _answers(D, x0, sigma, eps).mean(0), sigma) * sigma

    @mistake("it is not divided by sigma²: D - x0 is a move of the picture, sigma² times the score")
    def not_divided(D, x0, sigma, eps):
        return _score(x0, _answers(D, x0, sigma, eps).mean(0), sigma) * sigma**2

    @mistake("the sign is turned: a score points to what is likelier, from x0 to D, so D - x0")
    def sign_turned(D, x0, sigma, eps):
        return -_score(x0, _answers(D, x0, sigma, eps).mean(0), sigma)

    @mistake("only the first draw counts; average over all of them")
    def first_draw(D, x0, sigma, eps):
        return _score(x0, D(x0 + sigma * eps[0], sigma), sigma)

    @mistake("only the last draw counts: in the loop each answer overwrites the one before; add them up")
    def last_draw(D, x0, sigma, eps):
        return _score(x0, D(x0 + sigma * eps[-1], sigma), sigma)

    @mistake("the noise is not multiplied by sigma: D is then asked at a level that x does not have")
    def noise_of_size_one(D, x0, sigma, eps):
        return _score(x0, torch.stack([D(x0 + one, sigma) for one in eps]).mean(0), sigma)

    @mistake("this is the average of D, a picture; its score is what leads there from x0, (D - x0) / sigma²")
    def average_itself(D, x0, sigma, eps):
        return _answers(D, x0, sigma, eps).mean(0)

    @mistake("the average goes over the samples too: each has a score of its own; mean(0) over the draws alone")
    def averaged_over_samples(D, x0, sigma, eps):
        return _score(x0, _answers(D, x0, sigma, eps).mean((0, 1)), sigma)

    @mistake(
        "in one large batch, draws and samples are mixed up: x0.repeat_interleave(n, 0) lies sample by sample, eps.flatten(0, 1) draw by draw; x0 + sigma * eps puts them right by itself"
    )
    def interleaved(D, x0, sigma, eps):
        x = x0.repeat_interleave(len(eps), 0) + sigma * eps.flatten(0, 1)
        return _score(x0, D(x, sigma).reshape(len(x0), len(eps), *x0.shape[1:]).mean(1), sigma)

    @mistake(
        "the answers of the large batch are cut up as (B, n) where they lie as (n, B): other samples' answers are averaged; .unflatten(0, (n, B)).mean(0)"
    )
    def cut_up_wrongly(D, x0, sigma, eps):
        x = (x0 + sigma * eps).flatten(0, 1)
        return _score(x0, D(x, sigma).reshape(len(x0), len(eps), *x0.shape[1:]).mean(1), sigma)

    @mistake(
        "the running average is (average + new) / 2: the last draw counts for one half, the first for next to nothing; each counts 1 / n"
    )
    def halved_each_time(D, x0, sigma, eps):
        answers = _answers(D, x0, sigma, eps)
        average = answers[0]
        for one in answers[1:]:
            average = (average + one) / 2
        return _score(x0, average, sigma)

    @mistake(
        "each draw starts from the answer to the one before: that walks towards a likely picture. All draws are put on the same x0"
    )
    def walked(D, x0, sigma, eps):
        x, total = x0, 0
        for one in eps:
            x = D(x + sigma * one, sigma)
            total = total + x
        return _score(x0, total / len(eps), sigma)

    @law("the score must be made of x0 and of the average of D(x0 + sigma eps[k], sigma), and of nothing else")
    def made_of_two(case: Case, out: Outputs) -> bool:
        average = _answers(BELIEFS[case["D"]], T(case["x0"]), level(case["sigma"]), T(case["eps"])).mean(0).numpy()
        return fit(out["score"], case["x0"], average)[1] < 1e-8
