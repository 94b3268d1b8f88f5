"""Item 07.6: RED-diff's loss, and the gradient that its stop-gradient leaves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import DENOISERS, level
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_07.common import Measure, as_in_the_loop, differentiated, flat_squares, measure
from course_lib.grading.sets.tools import T, named


def _both(loss, mu: Tensor) -> tuple[Tensor, Tensor]:
    """A loss of each sample and its gradient."""
    return loss(mu).detach(), differentiated(loss, mu)


def _data(A: Measure, y: Tensor, mu: Tensor, variance: float) -> Tensor:
    """|y - A(mu)|^2 / (2 variance) of each sample."""
    return flat_squares(y - A(mu)) / (2 * variance)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _gap(D, mu: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """mu - D(mu + sigma eps, sigma), which is sigma (eps_theta - eps)."""
    return mu - D(mu + sigma * eps, sigma)


@item(
    "07.6", title="RED-diff's loss and its gradient", function="red_diff", points=2, minutes=25, difficulty=2,
    answers=("course_lib.posterior.reddiff.red_diff",),
    hints=(
        "x = mu + sigma eps and eps_theta = (x - D(x, sigma)) / sigma. So sigma (eps_theta - eps) = mu - D(x, sigma): the mean, less what the network makes of it.",
        "Loss of a sample: |y - A(mu)|² / (2 sigma_y²) + weight * ((mu - D(x, sigma)).detach() * mu).sum(). The bracket counts as a number; mu behind it does not.",
        "Its gradient is that of the first term plus weight * (mu - D(x, sigma)). No graph goes through D: ask D without gradients, and differentiate the rest under torch.enable_grad().",
    ),
)  # fmt: skip
class REDDiff:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(A: str, D: str, shape: tuple[int, ...], m: int) -> Case:
            case = {"A": A, "D": D, "matrix": rng.normal(size=(m, shape[-1])), "mu": rng.normal(size=shape),
                    "sigma": float(rng.uniform(0.5, 1.2)), "eps": rng.normal(size=shape),
                    "sigma_y": float(rng.uniform(0.4, 0.8)), "weight": float(rng.uniform(0.5, 0.9))}  # fmt: skip
            seen = measure(case)(T(rng.normal(size=shape))).numpy()
            return case | {"y": seen + case["sigma_y"] * rng.normal(size=seen.shape)}

        return [
            case("matrix", "turned", (3, 5), 3),
            case("squares", "peaks", (2, 4), 3),
            case("means", "turned", (2, 1, 4, 4), 1),
        ]

    def drive(fn, case: Case) -> Outputs:
        mu, eps = T(case["mu"]), T(case["eps"])
        with as_in_the_loop():
            result = call(fn, DENOISERS[case["D"]], measure(case), T(case["y"]), mu, level(case["sigma"]), eps,
                          case["sigma_y"], case["weight"])  # fmt: skip
        return arrays(**named(result, "loss", "gradient"))

    def reference(
        D, A: Measure, y: Tensor, mu: Tensor, sigma: Tensor, eps: Tensor, sigma_y: float, weight: float
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            gap = _gap(D, mu, sigma, eps)
        return _both(lambda mu: _data(A, y, mu, sigma_y**2) + weight * _dot(gap, mu), mu)

    @mistake(
        "the gradient goes through the bracket: sg[...] holds mu - D(x, sigma) fixed; detach it, or the network is differentiated and the fixed point is another"
    )
    def no_stop(D, A, y, mu, sigma, eps, sigma_y, weight):
        return _both(lambda mu: _data(A, y, mu, sigma_y**2) + weight * _dot(_gap(D, mu, sigma, eps), mu), mu)

    @mistake(
        "everything in the second term is detached: its loss is right, but no gradient is left of the prior; mu *behind* the bracket is differentiated"
    )
    def all_stopped(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        return _both(lambda one: _data(A, y, one, sigma_y**2) + weight * _dot(gap, mu), mu)

    @mistake("only D is detached, and mu inside the bracket is differentiated too: that gives 2 mu - D in place of mu - D")
    def denoiser_alone_stopped(D, A, y, mu, sigma, eps, sigma_y, weight):
        x0 = D(mu + sigma * eps, sigma)
        return _both(lambda mu: _data(A, y, mu, sigma_y**2) + weight * _dot(mu - x0, mu), mu)

    @mistake("the bracket's sign is turned, D - mu: the step then goes away from what the network says; it is eps_theta - eps")
    def sign_turned(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        return _both(lambda mu: _data(A, y, mu, sigma_y**2) - weight * _dot(gap, mu), mu)

    @mistake(
        "eps is not subtracted: eps_theta alone has the noise that was put in, which says nothing of mu; take eps_theta - eps"
    )
    def noise_not_subtracted(D, A, y, mu, sigma, eps, sigma_y, weight):
        rest = _gap(D, mu, sigma, eps) + sigma * eps
        return _both(lambda mu: _data(A, y, mu, sigma_y**2) + weight * _dot(rest, mu), mu)

    @mistake(
        "the weight of the second term lacks sigma: weight (eps_theta - eps) is (mu - D) / sigma, far too much at low levels; it is weight sigma"
    )
    def sigma_forgotten(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        return _both(lambda mu: _data(A, y, mu, sigma_y**2) + weight / sigma * _dot(gap, mu), mu)

    @mistake("the second term has sigma once too often: weight sigma (eps_theta - eps) *is* weight (mu - D)")
    def sigma_twice(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        return _both(lambda mu: _data(A, y, mu, sigma_y**2) + weight * sigma * _dot(gap, mu), mu)

    @mistake("the first term is divided by 2 sigma_y, not by 2 sigma_y²")
    def noise_not_squared(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        return _both(lambda mu: _data(A, y, mu, sigma_y) + weight * _dot(gap, mu), mu)

    @mistake("sigma_y is not used: |y - A(mu)|² / 2 trusts a noisy measurement as much as a clean one")
    def noise_forgotten(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        return _both(lambda mu: _data(A, y, mu, 1.0) + weight * _dot(gap, mu), mu)

    @mistake("the half of the first term is missing: - log N(y; A(mu), sigma_y² I) is |y - A(mu)|² / (2 sigma_y²)")
    def half_forgotten(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        return _both(lambda mu: 2 * _data(A, y, mu, sigma_y**2) + weight * _dot(gap, mu), mu)

    @mistake("the network is asked about mu, not about mu + sigma eps: at the level sigma it expects noise of that size")
    def no_noise(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = mu - D(mu, sigma)
        return _both(lambda mu: _data(A, y, mu, sigma_y**2) + weight * _dot(gap, mu), mu)

    @mistake(
        "the measurement is compared with D(x, sigma), as in DPS; RED-diff compares it with mu itself, and needs no pass back through D"
    )
    def estimate_measured(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        return _both(
            lambda mu: _data(A, y, D(mu + sigma * eps, sigma), sigma_y**2) + weight * _dot(gap, mu), mu
        )  # fmt: skip

    @mistake(
        "the first term's gradient has the wrong sign: it is - A^T (y - A mu) / sigma_y² where A is linear; the loss is right"
    )
    def data_gradient_turned(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        loss = _data(A, y, mu, sigma_y**2) + weight * _dot(gap, mu)
        return loss, weight * gap - differentiated(lambda mu: _data(A, y, mu, sigma_y**2), mu)

    @mistake(
        "the second term is |mu - D|² / 2 with D held fixed: it has the same gradient, but the loss of the paper is linear, sg[...] · mu"
    )
    def half_square(D, A, y, mu, sigma, eps, sigma_y, weight):
        x0 = D(mu + sigma * eps, sigma)
        return _both(lambda mu: _data(A, y, mu, sigma_y**2) + weight * flat_squares(mu - x0) / 2, mu)

    @mistake(
        "the second term is the network's training loss at mu, differentiated through D: its gradient has the Jacobian I - J, which vanishes where D only copies"
    )
    def training_loss(D, A, y, mu, sigma, eps, sigma_y, weight):
        return _both(
            lambda mu: _data(A, y, mu, sigma_y**2) + weight * flat_squares(_gap(D, mu, sigma, eps)) / 2, mu
        )  # fmt: skip

    @mistake("the second term is averaged over the numbers of a sample; it is a sum, as the first one is")
    def averaged_over_numbers(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap, n = _gap(D, mu, sigma, eps), mu[0].numel()
        return _both(lambda mu: _data(A, y, mu, sigma_y**2) + weight / n * _dot(gap, mu), mu)

    @mistake(
        "the gradient is divided by the number of samples: the losses were averaged before they were differentiated; sum them"
    )
    def averaged_over_samples(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        loss, slope = _both(lambda mu: _data(A, y, mu, sigma_y**2) + weight * _dot(gap, mu), mu)
        return loss, slope / len(mu)

    @mistake("the first term is missing: nothing is left of the measurement")
    def prior_alone(D, A, y, mu, sigma, eps, sigma_y, weight):
        gap = _gap(D, mu, sigma, eps)
        return _both(lambda mu: weight * _dot(gap, mu), mu)

    @law("the loss must be |y - A(mu)|² / (2 sigma_y²) plus weight sigma (eps_theta - eps) · mu, a number for each sample")
    def loss(case: Case, out: Outputs) -> bool:
        gap = _case_gap(case)
        exact = _data(measure(case), T(case["y"]), T(case["mu"]), case["sigma_y"] ** 2) + case["weight"] * _dot(
            gap, T(case["mu"])
        )
        return close(out["loss"], exact.numpy())

    @law(
        "the loss is right; what its second term gives to the gradient must be weight (mu - D(x, sigma)): nothing is differentiated through D"
    )
    def pull_of_the_prior(case: Case, out: Outputs) -> bool:
        A, y, variance = measure(case), T(case["y"]), case["sigma_y"] ** 2
        rest = T(out["gradient"]) - differentiated(lambda mu: _data(A, y, mu, variance), T(case["mu"]))
        return close(rest.numpy(), (case["weight"] * _case_gap(case)).numpy())


def _case_gap(case: Case) -> Tensor:
    return _gap(DENOISERS[case["D"]], T(case["mu"]), level(case["sigma"]), T(case["eps"]))
