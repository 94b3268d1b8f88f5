"""Items 08.1 and 08.3: the noise residual, and the Jacobian that score distillation drops."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import level
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_07.common import as_in_the_loop, differentiated
from course_lib.grading.sets.set_08.common import (
    BELIEFS,
    PICTURES,
    RULES,
    SQUARE,
    asked,
    at_level,
    distilled_case,
    estimated,
    gap,
)
from course_lib.grading.sets.tools import T, fit, named, right


@item(
    "08.1", title="The noise residual", function="noise_residual", points=1, minutes=10, difficulty=1, answers=RULES,
    hints=(
        "x = x0 + sigma eps, where sigma (B,) needs axes on the right: sigma.reshape(-1, *[1] * (x0.ndim - 1)). The estimated noise is what D takes off x, in units of sigma: eps_hat = (x - D(x, sigma)) / sigma.",
        "Put x in: eps_hat = (x0 + sigma eps - D) / sigma. What becomes of eps in eps_hat - eps?",
        "(x0 - D(x, sigma)) / sigma: the picture as it is, less the picture as the network would have it.",
    ),
)  # fmt: skip
class NoiseResidual:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [distilled_case(rng, SQUARE, D="turned"), distilled_case(rng, PICTURES, D="peaks")]

    def drive(fn, case: Case) -> Outputs:
        return arrays(residual=call(fn, BELIEFS[case["D"]], *(T(case[name]) for name in ("x0", "sigma", "eps"))))

    def reference(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        return gap(D, x0, sigma, eps) / right(sigma, x0)

    @mistake("the sign is turned: this is eps - eps_hat, and going down along it leads *away* from what D believes")
    def sign_turned(D, x0, sigma, eps):
        return -gap(D, x0, sigma, eps) / right(sigma, x0)

    @mistake("this is eps_hat alone: the noise that was put in, eps, has to be taken off")
    def baseline_forgotten(D, x0, sigma, eps):
        return estimated(D, at_level(x0, sigma, eps), sigma)

    @mistake("this is x0 - D(x, sigma), in units of the picture; the residual of the *noise* is that divided by sigma")
    def not_divided(D, x0, sigma, eps):
        return gap(D, x0, sigma, eps)

    @mistake("it is divided by sigma²: that makes a score of it; noise has sigma to the first power")
    def divided_twice(D, x0, sigma, eps):
        return gap(D, x0, sigma, eps) / right(sigma, x0) ** 2

    @mistake("it is multiplied by sigma; x - D is sigma eps_hat, so divide")
    def multiplied(D, x0, sigma, eps):
        return gap(D, x0, sigma, eps) * right(sigma, x0)

    @mistake("D is taken for the noise: D(x, sigma) is the clean picture, and eps_hat = (x - D(x, sigma)) / sigma")
    def picture_for_noise(D, x0, sigma, eps):
        return D(at_level(x0, sigma, eps), sigma) - eps

    @mistake("D is asked about x0 itself, which has no noise; it has to see x = x0 + sigma eps")
    def asked_without_noise(D, x0, sigma, eps):
        return (x0 - D(x0, sigma)) / right(sigma, x0)

    @mistake(
        "x is DDPM's, sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps; D takes x = x0 + sigma eps, which is longer by sqrt(1 + sigma²)"
    )
    def variance_preserving(D, x0, sigma, eps):
        x = at_level(x0, sigma, eps) / (1 + right(sigma, x0) ** 2).sqrt()
        return estimated(D, x, sigma) - eps

    @mistake("x is right, but eps_hat is made of x0: (x0 - D) / sigma has lost its eps already, and then loses it again")
    def taken_off_twice(D, x0, sigma, eps):
        return gap(D, x0, sigma, eps) / right(sigma, x0) - eps

    @mistake("eps_hat is x - D(x, sigma), without 1 / sigma: that is sigma times the noise")
    def noise_not_in_units(D, x0, sigma, eps):
        x = at_level(x0, sigma, eps)
        return x - D(x, sigma) - eps

    @mistake("the noise has the variance sigma where it should have sigma²: x = x0 + sigma eps, and no root of sigma")
    def root_of_sigma(D, x0, sigma, eps):
        return gap(D, x0, sigma.sqrt(), eps) / right(sigma, x0)

    @mistake("the noise is multiplied by sigma²: x = x0 + sigma eps")
    def sigma_squared(D, x0, sigma, eps):
        return (x0 - D(at_level(x0, sigma**2, eps), sigma)) / right(sigma, x0)

    @mistake(
        "sigma lies along the last axis: each *column* gets a level, and not each sample; sigma.reshape(-1, 1, ...) puts it right"
    )
    def along_the_columns(D, x0, sigma, eps):
        return (x0 - D(x0 + sigma * eps, sigma)) / sigma

    @mistake("all samples have the level of the first one; each has its own")
    def first_level(D, x0, sigma, eps):
        return gap(D, x0, sigma[:1].expand(len(x0)), eps) / sigma[0]

    @law("sigma times the residual must be x0 less what D says of x0 + sigma eps, in some proportion: something else is in it")
    def made_of_two(case: Case, out: Outputs) -> bool:
        sigma = right(T(case["sigma"]), T(case["x0"])).numpy()
        return fit(sigma * out["residual"], case["x0"], asked(case))[1] < 1e-8


# --- 08.3 ----------------------------------------------------------------------------------------------------------------


def _loss(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """|eps_hat - eps|^2 / 2 of each number."""
    return ((x0 - D(x0 + sigma * eps, sigma)) / sigma) ** 2 / 2


def _through(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """(I - J)^T (eps_hat - eps) / sigma."""
    return differentiated(lambda x: _loss(D, x, sigma, eps), x0)


def _dropped(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """eps_hat - eps."""
    return (x0 - D(x0 + sigma * eps, sigma)) / sigma


@item(
    "08.3", title="Dropping the Jacobian", function="with_and_without", points=2, minutes=20, difficulty=2, answers=RULES,
    hints=(
        "The loop runs under torch.no_grad(). Inside `with torch.enable_grad():` make x0 = x0.detach().requires_grad_(), and only then x and D(x, sigma).",
        "loss = 0.5 * (((x0 - D(x, sigma)) / sigma) ** 2).sum(), the sum over everything; torch.autograd.grad(loss, x0)[0] is the first answer.",
        "The second needs no autograd: drop the whole factor d eps_hat / dx0 = (I - J) / sigma from the first, and eps_hat - eps is left, the residual of 08.1.",
    ),
)  # fmt: skip
class WithAndWithout:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(D: str, shape: tuple[int, ...]) -> Case:
            return distilled_case(rng, shape, D=D, probe=rng.normal(size=shape)) | {"sigma": float(rng.uniform(0.5, 1.5))}

        return [case("network", (3, 5)), case("turned", (2, 1, 2, 3))]

    def drive(fn, case: Case) -> Outputs:
        with as_in_the_loop():
            result = call(fn, BELIEFS[case["D"]], T(case["x0"]), level(case["sigma"]), T(case["eps"]))
        pair = named(result, "through", "dropped")
        alive = any(getattr(one, "requires_grad", False) for one in pair.values())
        return arrays(**pair, carries_a_graph=float(alive))

    def reference(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        return _through(D, x0, sigma, eps), _dropped(D, x0, sigma, eps)

    @mistake(
        "D was asked without a graph, or its answer detached: x0 counts, the network does not. The first answer goes *through* D"
    )
    def network_detached(D, x0, sigma, eps):
        return _dropped(D, x0, sigma, eps) / sigma, _dropped(D, x0, sigma, eps)

    @mistake(
        "only D's answer was differentiated: x0 itself stands in the residual too, and d eps_hat / dx0 = (I - J) / sigma, not - J / sigma"
    )
    def identity_forgotten(D, x0, sigma, eps):
        slope = differentiated(lambda x: ((x0 - D(x + sigma * eps, sigma)) / sigma) ** 2 / 2, x0)
        return slope, _dropped(D, x0, sigma, eps)

    @mistake(
        "the second answer is (eps_hat - eps) / sigma: only the network's Jacobian was dropped, of (I - J) / sigma. SDS drops all of this factor"
    )
    def half_dropped(D, x0, sigma, eps):
        return _through(D, x0, sigma, eps), _dropped(D, x0, sigma, eps) / sigma

    @mistake("the first answer is twice too long: the loss has the factor 1/2")
    def half_forgotten(D, x0, sigma, eps):
        return 2 * _through(D, x0, sigma, eps), _dropped(D, x0, sigma, eps)

    @mistake("the loss is a mean over all numbers: its gradient is smaller the larger the picture is; sum it")
    def mean_of_all(D, x0, sigma, eps):
        return _through(D, x0, sigma, eps) / x0.numel(), _dropped(D, x0, sigma, eps)

    @mistake("the loss is a mean over the numbers and without its 1/2, as F.mse_loss has it; half the *sum* of the squares")
    def mse(D, x0, sigma, eps):
        return 2 * _through(D, x0, sigma, eps) / x0.numel(), _dropped(D, x0, sigma, eps)

    @mistake("the loss is a mean over the samples: each gradient is divided by their number; sum over them")
    def mean_over_samples(D, x0, sigma, eps):
        return _through(D, x0, sigma, eps) / len(x0), _dropped(D, x0, sigma, eps)

    @mistake("the two answers are in the other order: first with the Jacobian, then without")
    def swapped(D, x0, sigma, eps):
        return _dropped(D, x0, sigma, eps), _through(D, x0, sigma, eps)

    @mistake("the residual is x0 - D(x, sigma) in both: the loss is about the noise, so it is divided by sigma")
    def of_the_picture(D, x0, sigma, eps):
        return _through(D, x0, sigma, eps) * sigma**2, _dropped(D, x0, sigma, eps) * sigma

    @mistake(
        "the Jacobian is not transposed: this is the change of eps_hat *along* the residual (a jvp); a gradient has J^T (a vjp)"
    )
    def not_transposed(D, x0, sigma, eps):
        r = _dropped(D, x0, sigma, eps)
        along = torch.autograd.functional.jvp(lambda x: _dropped(D, x, sigma, eps), x0, r)[1]
        return along, r

    @mistake("this is the gradient of |eps_hat - eps| of each sample, of length about 1 whatever the error is; square it")
    def norm_not_squared(D, x0, sigma, eps):
        slope = differentiated(lambda x: (2 * _loss(D, x, sigma, eps)).flatten(1).sum(1).sqrt(), x0)
        return slope, _dropped(D, x0, sigma, eps)

    @mistake("the noise is not taken off: this is the loss |eps_hat|² / 2, which asks for a picture in which no noise is *seen*")
    def baseline_forgotten(D, x0, sigma, eps):
        def eps_hat(x):
            return estimated(D, x + sigma * eps, sigma)

        return differentiated(lambda x: eps_hat(x) ** 2 / 2, x0), eps_hat(x0)

    @mistake("the signs are turned: these lead up the loss; the optimiser subtracts what it is given")
    def signs_turned(D, x0, sigma, eps):
        return -_through(D, x0, sigma, eps), -_dropped(D, x0, sigma, eps)

    @mistake("D is asked about x0 itself, which has no noise; it has to see x = x0 + sigma eps")
    def asked_without_noise(D, x0, sigma, eps):
        return _through(D, x0, sigma, 0 * eps), _dropped(D, x0, sigma, 0 * eps)

    @mistake(
        "an answer still carries a graph: kept over the steps, all networks would stay in memory; return both detached (no create_graph)"
    )
    def graph_kept_alive(D, x0, sigma, eps):
        with torch.enable_grad():
            x = x0.clone().requires_grad_()
            return torch.autograd.grad(_loss(D, x, sigma, eps).sum(), x, create_graph=True)[0], _dropped(D, x, sigma, eps)

    @law("a small move v of a sample must change its own loss by the product of v and the first answer")
    def slope(case: Case, out: Outputs) -> bool:
        sigma, eps, h = level(case["sigma"]), T(case["eps"]), 1e-4
        above, below = (
            _loss(BELIEFS[case["D"]], T(case["x0"] + s * h * case["probe"]), sigma, eps).flatten(1).sum(1) for s in (1, -1)
        )
        products = (out["through"] * case["probe"]).reshape(len(case["x0"]), -1).sum(1)
        return bool(np.allclose(products, ((above - below) / (2 * h)).numpy(), rtol=1e-4, atol=1e-5))

    @law("the second answer must be eps_hat - eps itself, as in 08.1")
    def residual(case: Case, out: Outputs) -> bool:
        return close(out["dropped"] * case["sigma"], case["x0"] - asked(case))
