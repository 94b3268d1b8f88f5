"""Item 08.2: a loss that has a given gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_08.common import one_number, pull, render
from course_lib.grading.sets.tools import T


def _half_square(difference: Tensor) -> Tensor:
    return 0.5 * (difference**2).sum()


def _unexplained(loss: Tensor, x0: Tensor, gradient: Tensor) -> float:
    """How far the value is from all that such losses are known to have: |g|^2 / 2, x0 . g and 0."""
    customary = _half_square(gradient), (x0 * gradient).sum(), torch.zeros_like(loss)
    return min(float((loss - one).abs().detach()) for one in customary)


@item(
    "08.2", title="A loss that has a given gradient", function="surrogate", points=2, minutes=15, difficulty=2,
    answers=("course_lib.distill.loop.distill",),
    hints=(
        "gradient.detach() is a number to the differentiation. What is the derivative of x0 * number, summed, by x0?",
        "As a square: a *target* one step away, (x0 - gradient).detach(), and half the squared distance from it. Its derivative by x0 is x0 - target.",
        "(x0 * gradient.detach()).sum(), or 0.5 * ((x0 - (x0 - gradient).detach()) ** 2).sum(). Sums, no means: a mean divides the gradient.",
    ),
)  # fmt: skip
class Surrogate:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [{"theta": rng.normal(size=shape)} for shape in ((3, 4), (2, 1, 3, 3))]

    def drive(fn, case: Case) -> Outputs:
        with torch.enable_grad():
            theta = T(case["theta"]).requires_grad_()
            x0 = render(theta)
            gradient = pull(x0)  # with its graph, as a network leaves it
            loss = one_number(call(fn, x0, gradient))
            if not loss.requires_grad:
                raise Unacceptable(
                    "the loss has no graph: everything in it is detached, or a number. The gradient is to be a number, x0 is not"
                )
            found = torch.autograd.grad(loss, (x0, theta), allow_unused=True)
        if found[0] is None:
            raise Unacceptable("the loss does not depend on x0: what has to stay attached to it was detached")
        # how it is written shows in its value, which is judged where all else is right
        off = _unexplained(loss, x0, gradient) if torch.allclose(found[0], gradient.detach(), rtol=1e-6) else 0.0
        return arrays(by_x0=found[0], by_theta=found[1], value=1.0 + off)

    def reference(x0: Tensor, gradient: Tensor) -> Tensor:
        return (x0 * gradient.detach()).sum()

    @mistake(
        "the gradient is not detached: it depends on x0 itself, and autograd adds its derivative (the network's Jacobian) to it"
    )
    def product_not_detached(x0, gradient):
        return (x0 * gradient).sum()

    @mistake(
        "nothing is detached in x0 - (x0 - gradient): x0 cancels, and |gradient|² / 2 is left, whose derivative is the Jacobian times the gradient; detach the target"
    )
    def square_not_detached(x0, gradient):
        return _half_square(x0 - (x0 - gradient))

    @mistake(
        "in the target x0 is detached and the gradient is not: it brings its own graph, the network's; detach the whole bracket"
    )
    def target_half_detached(x0, gradient):
        return _half_square(x0 - (x0.detach() - gradient))

    @mistake(
        "the gradient is detached and the target's x0 is not: x0 cancels, nothing pulls, the gradient is 0; detach the whole bracket"
    )
    def target_moves_along(x0, gradient):
        return _half_square(x0 - (x0 - gradient.detach()))

    @mistake("the 1/2 is missing before the square: the gradient is twice too long")
    def half_forgotten(x0, gradient):
        return 2 * _half_square(x0 - (x0 - gradient).detach())

    @mistake(
        "the loss is a mean over all numbers, and so is its gradient: the larger the picture, the less it moves; sum instead"
    )
    def mean(x0, gradient):
        return (x0 * gradient.detach()).mean()

    @mistake(
        "this is F.mse_loss as it comes: a mean, and without 1/2, so the gradient is multiplied by 2 / N; 0.5 * F.mse_loss(..., reduction='sum')"
    )
    def mse(x0, gradient):
        return 2 * _half_square(x0 - (x0 - gradient).detach()) / x0.numel()

    @mistake(
        "the loss is divided by the batch: a sample then moves less the more of them there are. Published code does that; here the gradient is to be the given one"
    )
    def over_the_batch(x0, gradient):
        return _half_square(x0 - (x0 - gradient).detach()) / len(x0)

    @mistake("the sign is turned: an optimiser goes *down*, so the target is x0 - gradient, and the product has a plus")
    def sign_turned(x0, gradient):
        return _half_square(x0 - (x0 + gradient).detach())

    @mistake("the distance is not squared: the gradient has length 1, whatever was given")
    def norm_not_squared(x0, gradient):
        return (x0 - (x0 - gradient).detach()).norm()

    @mistake(
        "the target is the gradient itself: half the squared distance of x0 from it pulls x0 *onto* the gradient; the target is x0 - gradient"
    )
    def gradient_as_target(x0, gradient):
        return _half_square(x0 - gradient.detach())

    @mistake("absolute values keep the signs of the gradient and lose its size; take the square, or the product")
    def absolute(x0, gradient):
        return (x0 - (x0 - gradient).detach()).abs().sum()

    @law(
        "the gradient is right, but the value is neither |gradient|² / 2, nor the sum of x0 * gradient, nor 0: what has been added?"
    )
    def known_value(case: Case, out: Outputs) -> bool:
        return close(out["value"], 1.0)

    @law("the gradient by x0 must be the given one; that by theta then follows from it by the chain rule")
    def is_the_given(case: Case, out: Outputs) -> bool:
        return close(out["by_x0"], pull(render(T(case["theta"]))).numpy())
