"""Item 02.2: the loss at random times."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_02.common import NETS
from course_lib.grading.sets.tools import T, pictures, right
from course_lib.schedules import cosine_betas, linear_betas

TABLES = {"linear": linear_betas(25, last=0.2), "cosine": cosine_betas(20)}


def _error(net, x0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The network's error at times t."""
    a = right(alpha_bar[t], x0)
    return net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t) - eps


@item(
    "02.2", title="The loss at random times", function="random_time_loss", points=2, minutes=15, difficulty=2,
    answers=(
        "course_lib.training.denoising_loss", "course_lib.schedules.Schedule.add_noise", "course_lib.denoisers.NetworkDenoiser",
    ),
    hints=(
        "T is the length of alpha_bar. u * T lies in [0, T); cut it down to a whole number: (u * T).long().",
        "The rest is 01.9: x_t from x0 and eps at those times, net(x_t, t), and its distance from eps. Give alpha_bar[t] as many axes as x0 has.",
        "Return the mean of the squared error over everything: all samples and all pixels.",
    ),
)  # fmt: skip
class RandomTimeLoss:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(net: str, betas: str, x0: np.ndarray) -> Case:
            return {"net": net, "betas": betas, "x0": x0, "u": rng.uniform(0, 1, len(x0)), "eps": rng.normal(size=x0.shape)}

        of_pictures = [case(net, betas, pictures(rng, 5)) for net in ("wave", "blend") for betas in TABLES]
        return [*of_pictures, case("wave", "cosine", rng.normal(size=(6, 2)))]

    def drive(fn, case: Case) -> Outputs:
        alpha_bar = torch.cumprod(1 - TABLES[case["betas"]], 0)
        gain = torch.ones((), dtype=torch.float64, requires_grad=True)  # the network's one parameter
        net = NETS[case["net"]]
        given = T(case["x0"]), T(case["u"]), T(case["eps"]), alpha_bar
        loss, again = (call(fn, lambda x, t: gain * net(x, t), *given) for _ in range(2))
        if not np.array_equal(*(one["loss"] for one in (arrays(loss=loss), arrays(loss=again))), equal_nan=True):
            raise Unacceptable(
                "two runs on the same u and eps differ; take the times from u and the noise from eps, and draw none"
            )
        learns = isinstance(loss, Tensor) and loss.requires_grad
        return arrays(loss=loss, gradient=torch.autograd.grad(loss.sum(), gain)[0] if learns else 0.0)

    def reference(net, x0: Tensor, u: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
        return _error(net, x0, (u * len(alpha_bar)).long(), eps, alpha_bar).square().mean()

    @mistake("t is the whole part of u (T - 1): the last time, T - 1, is then never drawn; multiply by T")
    def last_never_drawn(net, x0, u, eps, alpha_bar):
        return _error(net, x0, (u * (len(alpha_bar) - 1)).long(), eps, alpha_bar).square().mean()

    @mistake("u T is rounded to the *nearest* whole number, so that t = 0 comes half as often and T itself may come; cut it down")
    def rounded(net, x0, u, eps, alpha_bar):
        t = (u * len(alpha_bar)).round().long().clamp_max(len(alpha_bar) - 1)
        return _error(net, x0, t, eps, alpha_bar).square().mean()

    @mistake("the whole batch gets the time of its first sample; with a time for each sample a batch covers the schedule")
    def one_time(net, x0, u, eps, alpha_bar):
        t = (u[:1] * len(alpha_bar)).long().expand(len(x0))
        return _error(net, x0, t, eps, alpha_bar).square().mean()

    @mistake("the network is told t + 1 while x_t was noised to t; count from 0 in both")
    def counted_from_one(net, x0, u, eps, alpha_bar):
        t = (u * len(alpha_bar)).long()
        return _error(lambda x, t: net(x, t + 1), x0, t, eps, alpha_bar).square().mean()

    @mistake("time runs backwards: u near 0 is to give t near 0, the clean end, and not T - 1")
    def backwards(net, x0, u, eps, alpha_bar):
        t = len(alpha_bar) - 1 - (u * len(alpha_bar)).long()
        return _error(net, x0, t, eps, alpha_bar).square().mean()

    @mistake(
        "the squared error is summed over the pixels; take the mean over all, or the step size depends on the picture's size"
    )
    def summed(net, x0, u, eps, alpha_bar):
        return _error(net, x0, (u * len(alpha_bar)).long(), eps, alpha_bar).square().flatten(1).sum(1).mean()

    @mistake("the squared error is summed over the batch; take the mean over all, or the step size depends on the batch's size")
    def summed_over_batch(net, x0, u, eps, alpha_bar):
        return _error(net, x0, (u * len(alpha_bar)).long(), eps, alpha_bar).square().flatten(1).mean(1).sum()

    @mistake("this is the root of the mean squared error: its gradient is another one; leave the root out")
    def root(net, x0, u, eps, alpha_bar):
        return _error(net, x0, (u * len(alpha_bar)).long(), eps, alpha_bar).square().mean().sqrt()

    @mistake("the network's answer is compared with x0; it is to predict the noise eps (Algorithm 1)")
    def compares_x0(net, x0, u, eps, alpha_bar):
        error = _error(net, x0, (u * len(alpha_bar)).long(), eps, alpha_bar) + eps - x0
        return error.square().mean()

    @mistake("x_t is made without the square roots of alpha_bar and 1 - alpha_bar")
    def no_roots(net, x0, u, eps, alpha_bar):
        t = (u * len(alpha_bar)).long()
        a = right(alpha_bar[t], x0)
        return (net(a * x0 + (1 - a) * eps, t) - eps).square().mean()

    @mistake("the two roots have changed places: sqrt(alpha_bar) belongs to x0, sqrt(1 - alpha_bar) to eps")
    def roots_swapped(net, x0, u, eps, alpha_bar):
        t = (u * len(alpha_bar)).long()
        a = right(alpha_bar[t], x0)
        return (net((1 - a).sqrt() * x0 + a.sqrt() * eps, t) - eps).square().mean()

    @mistake("this is the mean *absolute* error; the loss is the mean of squares")
    def absolute(net, x0, u, eps, alpha_bar):
        return _error(net, x0, (u * len(alpha_bar)).long(), eps, alpha_bar).abs().mean()

    @mistake(
        "right for pictures, not for points of the plane: factors of shape (B, 1, 1, 1) mix the samples of an x0 of shape (B, 2); give them as many axes as x0 has"
    )
    def for_pictures_only(net, x0, u, eps, alpha_bar):
        t = (u * len(alpha_bar)).long()
        a = alpha_bar[t].reshape(-1, 1, 1, 1)
        return (net(a.sqrt() * x0 + (1 - a).sqrt() * eps, t) - eps).square().mean()

    @mistake("the loss is right, but it carries no gradient (detach, no_grad or item): with it no network can learn")
    def detached(net, x0, u, eps, alpha_bar):
        return _error(net, x0, (u * len(alpha_bar)).long(), eps, alpha_bar).square().mean().detach()

    @law("the loss is a mean of squares and never negative")
    def positive(case: Case, out: Outputs) -> bool:
        return bool((out["loss"] >= 0).all())

    @law("this is the right loss times a number: take the mean, over all samples and all numbers in them, and no other factor")
    def no_factor(case: Case, out: Outputs) -> bool:
        loss, gradient = _right_numbers(case)
        factor = out["loss"] / loss
        return bool(np.isclose(factor, 1) or not np.isclose(out["gradient"], factor * gradient))

    @law("the loss is that of a network that sees other inputs than x_t and t: look at both, and at floor(u T)")
    def some_gradient(case: Case, out: Outputs) -> bool:
        """For a right x_t and t the gradient is 2 mean(net (net - eps)), and the loss mean((net - eps)^2)."""
        return bool(np.allclose([out["loss"], out["gradient"]], _right_numbers(case)))


def _right_numbers(case: Case) -> tuple[float, float]:
    """The loss and its derivative by a factor of the network's answer."""
    x0, eps, alpha_bar = T(case["x0"]), T(case["eps"]), torch.cumprod(1 - TABLES[case["betas"]], 0)
    error = _error(NETS[case["net"]], x0, (T(case["u"]) * len(alpha_bar)).long(), eps, alpha_bar)
    return float(error.square().mean()), float(2 * ((error + eps) * error).mean())
