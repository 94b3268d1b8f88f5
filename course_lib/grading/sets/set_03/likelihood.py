"""Items 03.6 and 03.7: the exact likelihood of the probability-flow ODE, and inversion there and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import DENOISERS, PICTURE, PLANE, geometric, noised
from course_lib.grading.sets.tools import T, named


def _slope_and_trace(D, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """dx/dsigma and the trace of its Jacobian, (B,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        slope = (x - D(x, sigma)) / sigma
        flat = slope.flatten(1)
        rows = [torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0].flatten(1)[:, i] for i in range(flat.shape[1])]
    return slope.detach(), torch.stack(rows).sum(0)


def _walk(D, x: Tensor, sigmas: Tensor, measured: Callable, first: float = 0.5) -> tuple[Tensor, Tensor]:
    """x at the last level by Heun's rule, and the integral of measured(x, sigma) by the same; `first`: the weight of the start."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        length = sigma_next - sigma
        slope = (x - D(x, sigma)) / sigma
        x_hat = x + length * slope
        total = total + length * (first * measured(x, sigma) + (1 - first) * measured(x_hat, sigma_next))
        x = x + length * (slope + (x_hat - D(x_hat, sigma_next)) / sigma_next) / 2
    return x, total


def _integral(D, x: Tensor, sigmas: Tensor, first: float = 0.5) -> tuple[Tensor, Tensor]:
    """x at the last level, and the integral of the trace of the drift."""
    return _walk(D, x, sigmas, lambda y, sigma: _slope_and_trace(D, y, sigma)[1], first)


def _prior(x: Tensor, std: Tensor | float) -> Tensor:
    """log N(x; 0, std^2), (B,)."""
    log_p = -((x / std) ** 2) / 2 - math.log(float(std)) - math.log(2 * math.pi) / 2
    return log_p.flatten(1).sum(1)


def _bits(log_p: Tensor, x: Tensor) -> Tensor:
    return -log_p / (x[0].numel() * math.log(2))


@item(
    "03.6", title="The exact likelihood", function="flow_bits_per_dim", points=3, minutes=30, difficulty=3,
    answers=("course_lib.likelihood.exact_log_likelihood", "course_lib.likelihood._velocity"),
    hints=(
        "At each point two things: the slope d = (x - D(x, sigma)) / sigma, and its trace, the sum over i of d(d_i)/d(x_i).",
        "x = x.detach().requires_grad_(); flat = d.flatten(1); torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0].flatten(1)[:, i] is the i-th term, for each sample: no sample's d depends on another's x.",
        "One pass over the grid: Heun's rule for x, and the same mean of both ends, times sigma_next - sigma, for the trace. Add these up.",
        "log p(x0) = log N(x_T; 0, sigma_T^2 I) + the sum of the traces: x spreads out on its way up, so it was denser before.",
        "Bits per dimension: -log p(x0) / (d log 2), with d the numbers in one sample.",
    ),
)  # fmt: skip
class FlowBitsPerDim:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {"D": D, "x0": noised(rng, shape, 0.0), "sigmas": geometric(rng, 2, 0.4, 3.0)[::-1].copy()}
            for D, shape in (("turned", PLANE), ("gaussian", PICTURE), ("turned", PICTURE))
        ]

    def drive(fn, case: Case) -> Outputs:
        return arrays(bits=call(fn, DENOISERS[case["D"]], T(case["x0"]), T(case["sigmas"])))

    def reference(D, x0: Tensor, sigmas: Tensor) -> Tensor:
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) + total, x)

    @mistake("this is in nats: divide by log 2")
    def nats(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) + total, x) * math.log(2)

    @mistake("the nats are multiplied by log 2; one bit is log 2 = 0.69 nats, so divide")
    def multiplied(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) + total, x) * math.log(2) ** 2

    @mistake("these are the bits of the whole sample; divide by d, the numbers in one sample")
    def whole_sample(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) + total, x) * x[0].numel()

    @mistake("this is divided by all numbers of the batch; d counts those of one sample")
    def whole_batch(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) + total, x) / len(x)

    @mistake("the sign is turned: this is log2 p / d; a likely sample needs few bits, -log2 p / d")
    def sign_turned(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return -_bits(_prior(x, sigmas[-1]) + total, x)

    @mistake("the prior is missing: the trace gives only how the density changed on the way; add log N(x_T; 0, sigma_T^2)")
    def no_prior(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(total, x)

    @mistake("the prior is taken at x0; it is the density at the *end* of the flow, x_T")
    def prior_at_the_start(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x0, sigmas[-1]) + total, x)

    @mistake(
        "the prior is N(0, 1) of x_T / sigma_T, without its -log sigma_T for each number: a wider Gaussian is lower everywhere"
    )
    def prior_not_normalised(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x / sigmas[-1], 1.0) + total, x)

    @mistake("the prior is N(0, 1) at x_T; in the course's coordinate x_T has the deviation sigma_T")
    def prior_of_the_vp(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, 1.0) + total, x)

    @mistake("the prior is N(0, 1 + sigma_T^2), with the variance of the bound in 02.10; here x_T has the deviation sigma_T")
    def prior_of_the_bound(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, (1 + sigmas[-1] ** 2).sqrt()) + total, x)

    @mistake("the variance sigma_T^2 is given for the deviation: torch's Normal(0, s) takes s = sigma_T")
    def variance_for_deviation(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1] ** 2) + total, x)

    @mistake("the prior lacks log(2 pi) / 2 for each number: without it, it is no density")
    def prior_without_pi(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) + total, x) - math.log(2 * math.pi) / (2 * math.log(2))

    @mistake("log sigma_T is subtracted once; the prior has one factor 1 / sigma_T for each of the d numbers")
    def prior_normalised_once(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) + (x[0].numel() - 1) * sigmas[-1].log() + total, x)

    @mistake(
        "the log prior is averaged over the numbers of a sample; log p is their sum, as the trace is, and d divides both at the end"
    )
    def prior_averaged(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) / x[0].numel() + total, x)

    @mistake(
        "the trace is missing: this is the density of the end point; the flow also stretches space, and log p changes by the trace"
    )
    def no_trace(D, x0, sigmas):
        x, _ = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]), x)

    @mistake("the trace has the wrong sign: on the way up points move apart, so that x0 was denser than x_T; add the integral")
    def trace_subtracted(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) - total, x)

    @mistake("the trace is averaged over the numbers of a sample; it is the sum of the diagonal, and d divides at the end, once")
    def trace_averaged(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) + total / x[0].numel(), x)

    @mistake("the two traces of a step are added, and not averaged: the integral over the step is its length times their mean")
    def traces_added(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas)
        return _bits(_prior(x, sigmas[-1]) + 2 * total, x)

    @mistake("this is the trace of the score; the divergence is that of the drift, dx/dsigma = -sigma score")
    def trace_of_the_score(D, x0, sigmas):
        x, total = _walk(D, x0, sigmas, lambda y, sigma: -_slope_and_trace(D, y, sigma)[1] / sigma)
        return _bits(_prior(x, sigmas[-1]) + total, x)

    @mistake("this is the trace of D's Jacobian; the drift is (x - D) / sigma, whose trace is (d - tr dD/dx) / sigma")
    def trace_of_D(D, x0, sigmas):
        d = x0[0].numel()
        x, total = _walk(D, x0, sigmas, lambda y, sigma: d - sigma * _slope_and_trace(D, y, sigma)[1])
        return _bits(_prior(x, sigmas[-1]) + total, x)

    @mistake(
        "the gradient of the *sum* of the drift adds up all entries of the Jacobian; the trace has only the diagonal: one gradient for each i"
    )
    def all_entries(D, x0, sigmas):
        def entries(y, sigma):
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                return torch.autograd.grad(((y - D(y, sigma)) / sigma).sum(), y)[0].flatten(1).sum(1)

        x, total = _walk(D, x0, sigmas, entries)
        return _bits(_prior(x, sigmas[-1]) + total, x)

    @mistake(
        "x moves by Heun's rule, the trace by Euler's: only the one at the start of each step is used; take the mean of both ends"
    )
    def trace_at_the_start(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas, first=1.0)
        return _bits(_prior(x, sigmas[-1]) + total, x)

    @mistake(
        "the second trace is taken where Heun's step ends; that is of order 2 too, but the rule asked for takes slope and trace at the same two points, so at x_hat"
    )
    def trace_at_the_end(D, x0, sigmas):
        x, total = x0, 0
        for sigma, sigma_next in itertools.pairwise(sigmas):
            before = _slope_and_trace(D, x, sigma)[1]
            x, _ = _walk(D, x, torch.stack([sigma, sigma_next]), lambda y, _: 0 * y.flatten(1).sum(1))
            total = total + (sigma_next - sigma) * (before + _slope_and_trace(D, x, sigma_next)[1]) / 2
        return _bits(_prior(x, sigmas[-1]) + total, x)

    @mistake("the grid is walked down, as for sampling; x0 stands at its lowest level, sigmas[0], and the flow to noise rises")
    def walked_down(D, x0, sigmas):
        x, total = _integral(D, x0, sigmas.flip(0))
        return _bits(_prior(x, sigmas[-1]) + total, x)

    @mistake(
        "the trace is by Heun's rule, x moves by Euler's: it goes on from x_hat; go on from x + (sigma' - sigma) (d + d') / 2"
    )
    def x_by_euler(D, x0, sigmas):
        x, total = x0, 0
        for sigma, sigma_next in itertools.pairwise(sigmas):
            length, (slope, trace) = sigma_next - sigma, _slope_and_trace(D, x, sigma)
            x = x + length * slope
            total = total + length * (trace + _slope_and_trace(D, x, sigma_next)[1]) / 2
        return _bits(_prior(x, sigmas[-1]) + total, x)

    @mistake("these are Euler's steps; Heun's rule takes slope and trace at both ends of a step")
    def euler(D, x0, sigmas):
        x, total = x0, 0
        for sigma, sigma_next in itertools.pairwise(sigmas):
            slope, trace = _slope_and_trace(D, x, sigma)
            x, total = x + (sigma_next - sigma) * slope, total + (sigma_next - sigma) * trace
        return _bits(_prior(x, sigmas[-1]) + total, x)

    @law(
        "where D is linear (Gaussian data) the answer is known in closed form, and yours differs there: look at x_T, log N(x_T; 0, sigma_T^2 I) and the sum of the traces one by one; steps are taken in sigma"
    )
    def of_a_gaussian(case: Case, out: Outputs) -> bool:
        return case["D"] != "gaussian" or bool(np.allclose(out["bits"], _closed(case)))


def _closed(case: Case) -> np.ndarray:
    """Bits per dimension where D = m + c (x - m): Heun's rule multiplies x - m by a number, and the trace is known."""
    y, logs = case["x0"] - 0.4, 0.0
    for s, u in zip(case["sigmas"][:-1], case["sigmas"][1:], strict=True):
        a, b = s / (0.5 + s**2), u / (0.5 + u**2)  # the slopes, over x - m
        y, logs = y * (1 + (u - s) * (a + b * (1 + (u - s) * a)) / 2), logs + (u - s) * (a + b) / 2
    top = case["sigmas"][-1]
    log_p = -(((y + 0.4) / top) ** 2) / 2 - math.log(top) - math.log(2 * math.pi) / 2 + logs
    return -log_p.reshape(len(log_p), -1).mean(1) / math.log(2)


def _ddim(D, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The step that the drive hands out."""
    x0 = D(x, sigma)
    return x0 + sigma_next / sigma * (x - x0)


def _along(D, x: Tensor, sigmas: Tensor, step) -> Tensor:
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = step(D, x, sigma, sigma_next)
    return x


def _rms(difference: Tensor) -> Tensor:
    return difference.flatten(1).square().mean(1).sqrt()


@item(
    "03.7", title="There and back", function="round_trip", points=1, minutes=10, difficulty=1,
    answers=("course_lib.sample.sample",),
    hints=(
        "sigmas falls, as for sampling. The way to noise walks it backwards: sigmas.flip(0).",
        "Walk a grid with a loop over its pairs: for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]): x = step(D, x, sigma, sigma_next).",
        "Up from x0 along sigmas.flip(0) gives the latent; down from the latent along sigmas gives x0 back, nearly.",
        "The root of the mean square of the difference, over all axes but the first.",
    ),
)  # fmt: skip
class RoundTrip:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {"D": D, "x0": noised(rng, shape, 0.4), "sigmas": geometric(rng, 4, 0.3, 2.5)}
            for D, shape in (("peaks", PLANE), ("turned", PICTURE))
        ]

    def drive(fn, case: Case) -> Outputs:
        x0 = T(case["x0"])
        return arrays(**named(call(fn, DENOISERS[case["D"]], x0, T(case["sigmas"]), _ddim), "latent", "rms"))

    def reference(D, x0: Tensor, sigmas: Tensor, step) -> tuple[Tensor, Tensor]:
        latent = _along(D, x0, sigmas.flip(0), step)
        return latent, _rms(_along(D, latent, sigmas, step) - x0)

    @mistake(
        "the way to noise walks the falling grid: it treats x0 as noise and samples from it; inversion walks the rising one first"
    )
    def falling_first(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas, step)
        return latent, _rms(_along(D, latent, sigmas.flip(0), step) - x0)

    @mistake("both ways walk the rising grid; the way back falls")
    def rising_twice(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas.flip(0), step)
        return latent, _rms(_along(D, latent, sigmas.flip(0), step) - x0)

    @mistake("the distance is that from x0 to the latent; it is the one between x0 and what comes *back*")
    def one_way(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas.flip(0), step)
        return latent, _rms(latent - x0)

    @mistake("the way back starts at x0; it starts at the latent")
    def back_from_x0(D, x0, sigmas, step):
        return _along(D, x0, sigmas.flip(0), step), _rms(_along(D, x0, sigmas, step) - x0)

    @mistake(
        "the levels of a step on the way up are in the wrong order: it goes from sigma to sigma_next, and sigma is the *lower* one there"
    )
    def levels_swapped(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas.flip(0), lambda D, x, s, n: step(D, x, n, s))
        return latent, _rms(_along(D, latent, sigmas, step) - x0)

    @mistake(
        "the last step up is missing: the latent is at the level below sigmas[0], while the way back takes it to be at sigmas[0]"
    )
    def stops_early(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas.flip(0)[:-1], step)
        return latent, _rms(_along(D, latent, sigmas, step) - x0)

    @mistake("the first level is left out on the way up: x0 is at sigmas[-1], and the first step starts there")
    def starts_late(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas.flip(0)[1:], step)
        return latent, _rms(_along(D, latent, sigmas, step) - x0)

    @mistake("what came back is returned in place of the latent; the latent is x at the top, where the way back starts")
    def back_for_latent(D, x0, sigmas, step):
        back = _along(D, _along(D, x0, sigmas.flip(0), step), sigmas, step)
        return back, _rms(back - x0)

    @mistake("the latent is divided by sigmas[0] and is standard noise; asked for is x at that level, where the way back starts")
    def latent_scaled(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas.flip(0), step)
        return latent / sigmas[0], _rms(_along(D, latent, sigmas, step) - x0)

    @mistake("the root is missing: this is the mean square")
    def no_root(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas.flip(0), step)
        return latent, _rms(_along(D, latent, sigmas, step) - x0) ** 2

    @mistake(
        "this is the root of the *sum* of squares, the length of the difference; the mean is asked for, so that size plays no part"
    )
    def length(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas.flip(0), step)
        return latent, (_along(D, latent, sigmas, step) - x0).flatten(1).norm(dim=1)

    @mistake("this is the mean of absolute differences; square them, take the mean, then the root")
    def absolute(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas.flip(0), step)
        return latent, (_along(D, latent, sigmas, step) - x0).abs().flatten(1).mean(1)

    @mistake("the mean goes over the whole batch and is the same for all; one number for each sample")
    def over_the_batch(D, x0, sigmas, step):
        latent = _along(D, x0, sigmas.flip(0), step)
        return latent, (_along(D, latent, sigmas, step) - x0).square().mean().sqrt().expand(len(x0))

    @law("the latent is not where the steps lead from x0 along the rising grid, sigmas.flip(0)")
    def latent_is_reached(case: Case, out: Outputs) -> bool:
        latent = _along(DENOISERS[case["D"]], T(case["x0"]), T(case["sigmas"]).flip(0), _ddim)
        return bool(np.allclose(out["latent"], latent.numpy()))

    @law(
        "the latent is right; the distance is not the root of the mean square, over each sample, of what comes back along the falling grid less x0"
    )
    def distance(case: Case, out: Outputs) -> bool:
        back = _along(DENOISERS[case["D"]], T(out["latent"]), T(case["sigmas"]), _ddim)
        return bool(np.allclose(out["rms"], _rms(back - T(case["x0"])).numpy()))
