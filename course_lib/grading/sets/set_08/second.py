"""Items 08.6 and 08.7: variational score distillation with a given second score, and the loss by which that learns."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_08.common import (
    BELIEFS,
    PICTURES,
    RULES,
    SQUARE,
    asked,
    at_level,
    distilled_case,
    gap,
    learner,
    one_number,
    render,
    slopes,
)
from course_lib.grading.sets.tools import T, fit, right


def _guided(cond: Tensor, ref: Tensor, w: float) -> Tensor:
    """ref + w (cond - ref)."""
    return ref + w * (cond - ref)


def _three(D_cond, D_ref, D_fake, x0: Tensor, sigma: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the three say of the same x, and sigma beside it."""
    x = at_level(x0, sigma, eps)
    return D_cond(x, sigma), D_ref(x, sigma), D_fake(x, sigma), right(sigma, x0)


@item(
    "08.6", title="Variational score distillation", function="vsd_gradient", points=2, minutes=15, difficulty=2,
    answers=(*RULES, "course_lib.guidance.free.cfg"),
    hints=(
        "One x = x0 + sigma eps for all three. D_real = D_ref + w (D_cond - D_ref): guidance is the teacher's, the second score has none.",
        "The noise of a denoiser is (x - D) / sigma. In eps_real - eps_fake the x cancels: which of the two D keeps the plus?",
        "(D_fake(x, sigma) - D_real(x, sigma)) / sigma: subtracted by the optimiser, it leads from what the particles are to what the teacher wants.",
    ),
)  # fmt: skip
class VSDGradient:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], *names: str) -> Case:
            named = dict(zip(("cond", "ref", "fake"), names, strict=True))
            return distilled_case(rng, shape, **named) | {"w": float(rng.uniform(2.5, 5.0))}

        return [case(SQUARE, "turned", "gaussian", "peaks"), case(PICTURES, "peaks", "network", "turned")]

    def drive(fn, case: Case) -> Outputs:
        beliefs = (BELIEFS[case[name]] for name in ("cond", "ref", "fake"))
        return arrays(gradient=call(fn, *beliefs, *(T(case[name]) for name in ("x0", "sigma", "eps")), case["w"]))

    def reference(D_cond, D_ref, D_fake, x0: Tensor, sigma: Tensor, eps: Tensor, w: float) -> Tensor:
        cond, ref, fake, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return (fake - _guided(cond, ref, w)) / s

    @mistake(
        "the sign is turned, D_real - D_fake: the optimiser *subtracts* the gradient, and the particles flee what the teacher wants"
    )
    def sign_turned(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, ref, fake, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return (_guided(cond, ref, w) - fake) / s

    @mistake("guidance is reversed, D_cond + w (D_ref - D_cond): it leads away from the condition")
    def guidance_reversed(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, ref, fake, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return (fake - _guided(ref, cond, w)) / s

    @mistake("this is D_cond + w (D_cond - D_ref), the convention in which w = 0 gives D_cond; here w = 1 does")
    def other_convention(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, ref, fake, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return (fake - _guided(cond, ref, w + 1)) / s

    @mistake("there is no guidance: D_real is D_cond alone, as with w = 1")
    def no_guidance(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, _, fake, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return (fake - cond) / s

    @mistake(
        "this is w (D_fake - D_cond): the second score was guided like the teacher, or taken for its reference in place of D_ref. D_fake has no guidance, and D_real = D_ref + w (D_cond - D_ref)"
    )
    def everything_scaled(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, _, fake, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return w * (fake - cond) / s

    @mistake("x0 stands where the second score belongs: (x0 - D_real) / sigma is eps_real - eps, plain SDS")
    def plain_sds(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, ref, _, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return (x0 - _guided(cond, ref, w)) / s

    @mistake("eps is taken off as well: in VSD the second score has the place of eps, eps_real - eps_fake")
    def eps_as_well(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, ref, fake, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return (fake - _guided(cond, ref, w)) / s - eps

    @mistake("it is not divided by sigma: D_fake - D_real is sigma (eps_real - eps_fake)")
    def not_divided(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, ref, fake, _ = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return fake - _guided(cond, ref, w)

    @mistake("it is divided by sigma²: that is a difference of scores, and eps_real - eps_fake is sigma times that")
    def divided_twice(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, ref, fake, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return (fake - _guided(cond, ref, w)) / s**2

    @mistake(
        "the two scores do not see the same x: the second one is asked about x0. With shared noise what they agree in cancels; without, it stays as noise"
    )
    def noise_not_shared(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, ref, _, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return (D_fake(x0, sigma) - _guided(cond, ref, w)) / s

    @mistake("the two scores do not see the same noise: the second one has - eps. Draw once, and ask all about the same x")
    def other_noise(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, ref, _, s = _three(D_cond, D_ref, D_fake, x0, sigma, eps)
        return (D_fake(at_level(x0, sigma, -eps), sigma) - _guided(cond, ref, w)) / s

    @mistake("all are asked about x0 itself, which has no noise; they have to see x = x0 + sigma eps")
    def asked_without_noise(D_cond, D_ref, D_fake, x0, sigma, eps, w):
        cond, ref, fake, s = _three(D_cond, D_ref, D_fake, x0, sigma, 0 * eps)
        return (fake - _guided(cond, ref, w)) / s

    @law("sigma times the gradient must be made of what the three say of the same x = x0 + sigma eps, and of nothing else")
    def made_of_three(case: Case, out: Outputs) -> bool:
        return _parts(case, out)[1] < 1e-8

    @law("the factors do not fit: + 1 before D_fake, and before D_cond and D_ref what sums to - 1, with the scale w")
    def factors_fit(case: Case, out: Outputs) -> bool:
        return close(_parts(case, out)[0], [-case["w"], case["w"] - 1, 1])


def _parts(case: Case, out: Outputs) -> tuple[np.ndarray, float]:
    """The factors of D_cond, D_ref and D_fake in sigma times the gradient."""
    sigma = right(T(case["sigma"]), T(case["x0"])).numpy()
    return fit(sigma * out["gradient"], *(asked(case, name) for name in ("cond", "ref", "fake")))


# --- 08.7 ----------------------------------------------------------------------------------------------------------------


def _error(D_fake, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """(eps_hat - eps)^2 of each number."""
    return (gap(D_fake, x0, sigma, eps) / right(sigma, x0)) ** 2


@item(
    "08.7", title="How the second score learns", function="second_score_loss", points=2, minutes=15, difficulty=2,
    answers=(*RULES, "course_lib.training.denoising_loss"),
    hints=(
        "It is the plain denoising loss of 01, on the particles as they are now: eps_hat - eps = (x0 - D_fake(x, sigma)) / sigma, squared, and the mean over all numbers.",
        "Two optimisers, two losses: this one moves the network only. Which tensor has to be cut from its graph, and is it used in one place or in two?",
        "x0 = x0.detach() in the first line: then neither x, which D_fake sees, nor the target leads back to theta.",
    ),
)  # fmt: skip
class SecondScoreLoss:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...]) -> Case:
            drawn = distilled_case(rng, shape, phi=rng.uniform(0.3, 1.2, shape[1:]))
            return {"theta": drawn.pop("x0")} | drawn

        return [case(SQUARE), case(PICTURES)]

    def drive(fn, case: Case) -> Outputs:
        with torch.enable_grad():
            theta, phi = (T(case[name]).requires_grad_() for name in ("theta", "phi"))
            loss = one_number(call(fn, learner(phi), render(theta), T(case["sigma"]), T(case["eps"])))
            by_theta, by_phi = slopes(loss, theta, phi)
        if not loss.requires_grad:
            raise Unacceptable(
                "the loss has no graph, so that the second score cannot learn: do not detach it, nor ask D_fake under no_grad"
            )
        return arrays(loss=loss, by_theta=by_theta, by_phi=by_phi)

    def reference(D_fake, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        return _error(D_fake, x0.detach(), sigma, eps).mean()

    @mistake(
        "the particles are not detached: this loss would move theta too, towards pictures that are easy for the second score; x0.detach() first"
    )
    def particles_not_detached(D_fake, x0, sigma, eps):
        return _error(D_fake, x0, sigma, eps).mean()

    @mistake("only the target is detached: x, which D_fake sees, still leads back to the particles; detach x0 before x is made")
    def target_detached(D_fake, x0, sigma, eps):
        difference = x0.detach() - D_fake(at_level(x0, sigma, eps), sigma)
        return ((difference / right(sigma, x0)) ** 2).mean()

    @mistake(
        "only x is detached: the x0 that D_fake is compared with still leads back to the particles; detach it in both places"
    )
    def input_detached(D_fake, x0, sigma, eps):
        difference = x0 - D_fake(at_level(x0, sigma, eps).detach(), sigma)
        return ((difference / right(sigma, x0)) ** 2).mean()

    @mistake("the loss is |D_fake - x0|²: for the noise divide the error by sigma, or high levels outweigh all others")
    def of_the_picture(D_fake, x0, sigma, eps):
        return (gap(D_fake, x0.detach(), sigma, eps) ** 2).mean()

    @mistake("the squared error is divided by sigma once: divide before you square, by sigma² in all")
    def divided_after_the_square(D_fake, x0, sigma, eps):
        return (gap(D_fake, x0.detach(), sigma, eps) ** 2 / right(sigma, x0)).mean()

    @mistake("the error is divided by sigma²: that is the loss of the score; eps_hat - eps has sigma")
    def of_the_score(D_fake, x0, sigma, eps):
        return ((gap(D_fake, x0.detach(), sigma, eps) / right(sigma, x0) ** 2) ** 2).mean()

    @mistake("the squares are summed; take the mean over all numbers of all samples")
    def summed(D_fake, x0, sigma, eps):
        return _error(D_fake, x0.detach(), sigma, eps).sum()

    @mistake(
        "the squares are summed over the numbers of a sample, and averaged over the samples alone; take the mean over all numbers"
    )
    def summed_in_a_sample(D_fake, x0, sigma, eps):
        return _error(D_fake, x0.detach(), sigma, eps).flatten(1).sum(1).mean()

    @mistake("there is a factor 1/2, as in 08.2; here the loss is the mean square itself")
    def halved(D_fake, x0, sigma, eps):
        return _error(D_fake, x0.detach(), sigma, eps).mean() / 2

    @mistake("the root of the mean square is taken: its gradient does not shrink as the error does; leave the square")
    def rooted(D_fake, x0, sigma, eps):
        return _error(D_fake, x0.detach(), sigma, eps).mean().sqrt()

    @mistake("D_fake is taken for the noise: it gives the clean picture, and eps_hat = (x - D_fake(x, sigma)) / sigma")
    def picture_for_noise(D_fake, x0, sigma, eps):
        return ((D_fake(at_level(x0.detach(), sigma, eps), sigma) - eps) ** 2).mean()

    @mistake("the noise is not taken off: |eps_hat|² alone is smallest for a network that never sees any noise")
    def target_forgotten(D_fake, x0, sigma, eps):
        return ((gap(D_fake, x0.detach(), sigma, eps) / right(sigma, x0) + eps) ** 2).mean()

    @mistake("D_fake is asked about x0 itself, without noise; it has to learn from x = x0 + sigma eps")
    def asked_without_noise(D_fake, x0, sigma, eps):
        return _error(D_fake, x0.detach(), sigma, 0 * eps).mean()

    @mistake("all samples have the level of the first one; each has its own")
    def first_level(D_fake, x0, sigma, eps):
        return _error(D_fake, x0.detach(), sigma[:1].expand(len(x0)), eps).mean()

    @mistake("errors and sigma² are averaged before they are divided: each error belongs to its own level")
    def ratio_of_means(D_fake, x0, sigma, eps):
        return (gap(D_fake, x0.detach(), sigma, eps) ** 2).mean() / (sigma**2).mean()

    @law("this loss must leave the particles where they are: its gradient by theta must be 0")
    def theta_rests(case: Case, out: Outputs) -> bool:
        return close(out["by_theta"], 0.0)

    @law("the value is right, but its gradient by the second score is another: something inside D_fake's way to the loss is cut")
    def learns(case: Case, out: Outputs) -> bool:
        with torch.enable_grad():
            phi = T(case["phi"]).requires_grad_()
            loss = _error(learner(phi), render(T(case["theta"])), T(case["sigma"]), T(case["eps"])).mean()
            (expected,) = slopes(loss, phi)
        return close(out["by_phi"], expected.numpy()) or not close(out["loss"], float(loss))
