"""Rules that remember: one evaluation of D a step, and a polynomial through the earlier ones.

Written in x = x0 + sigma eps, lambda = -log sigma, h = log(sigma / sigma'), where the scale alpha of the papers cancels.
`memory` holds evaluations with their levels, newest first: ((f_1, s_1), (f_2, s_2), ...). None is a start, from which
the order rises by one each step. A rule reads no more than its order needs, so the memory of a rule of order 3 also
serves the same rule of order 2: that is how a run ends at a lower order. All take rising grids that start above 0.
Polynomials in lambda end at sigma' = 0 with the first-order step x' = D, as published; those in sigma keep their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from course_lib.integrals import (
    add_corrections,
    check_order,
    data_weights,
    level_weights,
    log_step,
    noise_in,
    noise_weights,
    over,
    ratio,
)
from course_lib.schedules import Schedule
from course_lib.types import Denoiser, Step, right

Past = tuple[tuple[Tensor, Tensor], ...]
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _split(past: Past) -> tuple[list[Tensor], list[Tensor]]:
    return [f for f, _ in past], [s for _, s in past]


def dpm_solver_pp_2m(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
    """DPM-Solver++(2M): D extrapolated from this level and the last (Lu et al. 2022, DPM-Solver++, Algorithm 2).

    D_bar = (1 + 1/(2r)) D_0 - D_1 / (2r),  x' = (sigma'/sigma) x - (e^-h - 1) D_bar,  r = h_before / h.
    Order 2, one evaluation; first order at the start and at sigma' = 0.
    """
    D_0 = D_bar = D(x, sigma)
    if memory:
        D_1, s_1 = memory[0]
        share = over(log_step(sigma, sigma_next), 2 * log_step(s_1, sigma))  # 1 / (2r)
        D_bar = D_0 + right(share, x) * (D_0 - D_1)
    keep = ratio(sigma, sigma_next)
    return right(keep, x) * x + right(1 - keep, x) * D_bar, ((D_0, sigma),)


def dpm_solver_pp_3m(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
    """DPM-Solver++(3M): D a quadratic in lambda through this level and the last two (Lu et al. 2022, DPM-Solver++, Prop. 4.1).

    x' = (sigma'/sigma) x + sigma' int_lambda^lambda' e^l (D_0 + (l - lambda) dD/dl + (l - lambda)^2 / 2 d^2D/dl^2) dl
    Order 3, one evaluation; first order at sigma' = 0. The authors' code and diffusers' take half of d^2D/dl^2,
    a second difference without its factor 2, and are of order 2.
    """
    D_0, past = D(x, sigma), (memory or ())[:2]
    keep, (values, levels) = ratio(sigma, sigma_next), _split(past)
    first_order = right(keep, x) * x + right(1 - keep, x) * D_0
    x_next = add_corrections(first_order, data_weights(sigma, sigma_next, levels), D_0, values)
    return x_next, ((D_0, sigma), *past)[:2]


def _noise_rule(order: int, weights: Callable[[Tensor, Tensor, Sequence[Tensor]], list[Tensor]]) -> Step:
    """x' = x + (sigma' - sigma) eps_0 + sum_k w_k (eps_k - eps_0), of order `order` from as many values."""
    check_order(order, 4)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        eps, past = noise_in(x, D(x, sigma), sigma), (memory or ())[: order - 1]
        values, levels = _split(past)
        first_order = x + right(sigma_next - sigma, x) * eps
        x_next = add_corrections(first_order, weights(sigma, sigma_next, levels), eps, values)
        return x_next, ((eps, sigma), *past)[: order - 1]

    return step


def deis(order: int = 3) -> Step:
    """DEIS: eps a polynomial in log sigma, integrated in rho = sigma (Zhang and Chen 2023, tAB-DEIS, with log rho for its t).

    x' = x + sum_k (int_sigma^sigma' prod_{j != k} (log s - log s_j) / (log s_k - log s_j) ds) eps_k
    Order `order` from as many values, one evaluation a step; the paper counts from 0, tAB0 = DDIM, and ends above
    sigma = 0, where this step is of first order. Raises ValueError for an order outside 1 to 4.
    """
    return _noise_rule(order, noise_weights)


def lms(order: int = 4) -> Step:
    """Linear multistep in sigma: Adams-Bashforth on any grid (Lagrange polynomials, as in Zhang and Chen 2023, rhoAB).

    x' = x + sum_k (int_sigma^sigma' prod_{j != k} (s - s_j) / (s_k - s_j) ds) eps_k
    Order `order`, one evaluation, also in the step to sigma' = 0. Raises ValueError for an order outside 1 to 4.
    """
    return _noise_rule(order, level_weights)


def _mixed(values: list[Tensor]) -> Tensor:
    """The Adams-Bashforth mean of equally spaced values, newest first."""
    b, *others = ADAMS_BASHFORTH[len(values) - 1]
    mean = b * values[0]
    for b, f in zip(others, values[1:], strict=True):
        mean = mean.add(f, alpha=b)
    return mean


def ipndm(order: int = 4) -> Step:
    """iPNDM: `plms` whose first steps are of lower order (Zhang and Chen 2023).

    x' = x + (sigma' - sigma) sum_k b_k eps_k, with the b_k of Adams and Bashforth for as many values as there are.
    One evaluation. The b_k suppose equal steps: order `order` on a grid uniform in sigma, on one uniform in another
    time order 2. Raises ValueError for an order outside 1 to 4.
    """
    check_order(order, 4)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        past = ((noise_in(x, D(x, sigma), sigma), sigma), *(memory or ()))[:order]
        return x + right(sigma_next - sigma, x) * _mixed(_split(past)[0]), past[: order - 1]

    return step


def plms(schedule: Schedule | None = None) -> Step:
    """PNDM: Adams and Bashforth's weights in DDIM's transfer (Liu et al. 2022, Eq. 11 to 13, Algorithm 2).

    x' = x + (sigma' - sigma) (55 eps_0 - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24
    One evaluation, order 2 on a grid uniform in a time t other than sigma (Liu et al. 2022, Sec. 3).
    With a `schedule` the first three steps are pseudo Runge-Kutta steps of four evaluations, (eps_a + 2 eps_b + 2 eps_c
    + eps_d) / 6, whose halves are halves in its t. Without, the first is a pseudo Heun step of two, and the
    order then rises (diffusers' `skip_prk_steps`, from Stable Diffusion's sampler).
    """

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        def eps_after(eps: Tensor, level: Tensor) -> Tensor:
            moved = x + right(level - sigma, x) * eps
            return noise_in(moved, D(moved, level), level)

        eps = noise_in(x, D(x, sigma), sigma)
        past = ((eps, sigma), *(memory or ()))[:4]
        mean, starting = _mixed(_split(past)[0]), len(past) < (2 if schedule is None else 4)
        if starting and bool((sigma_next > 0).any()):
            if schedule is None:
                start = (eps + eps_after(eps, sigma_next)) / 2
            else:
                middle = schedule.sigma((schedule.t_of_sigma(sigma) + schedule.t_of_sigma(sigma_next)) / 2)
                b = eps_after(eps, middle)
                c = eps_after(b, middle)
                start = (eps + 2 * b + 2 * c + eps_after(c, sigma_next)) / 6
            mean = torch.where(right(sigma_next, x) > 0, start, mean)  # at sigma' = 0 there is no eps
        return x + right(sigma_next - sigma, x) * mean, past[:3]

    return step


# --- UniPC ------------------------------------------------------------------------------------------------------------


class Corrected(NamedTuple):
    """Memory of `unipc`: the corrected x from which the last prediction started, and the evaluations that it used."""

    x: Tensor
    past: Past


def _unified(x: Tensor, past: Past, sigma_next: Tensor, others: Past, variant: str, predict: str) -> Tensor:
    """From x at the level of past[0] to sigma', f the polynomial in lambda through past[0] and `others`.

    With a single other value the weight B(h) / (2 r), r = u / h, is enough: a_1 = 1/2 (Zhao et al. 2023).
    """
    (f_0, sigma), (values, levels) = past[0], _split(others)
    h, keep = log_step(sigma, sigma_next), ratio(sigma, sigma_next)
    if predict == "x0":
        x_next, B = right(keep, x) * x + right(1 - keep, x) * f_0, h if variant == "bh1" else 1 - keep
        weights = data_weights
    else:
        length = sigma_next - sigma
        x_next, B = x + right(length, x) * f_0, -sigma_next * h if variant == "bh1" else length
        weights = noise_weights
    if len(levels) == 1:
        return add_corrections(x_next, [over(B * h, 2 * log_step(sigma, levels[0]))], f_0, values)
    return add_corrections(x_next, weights(sigma, sigma_next, levels), f_0, values)


def _check_unified(order: int, variant: str, predict: str) -> None:
    check_order(order, 4)
    for name, value, known in (("variant", variant, ("bh1", "bh2")), ("predict", predict, ("x0", "eps"))):
        if value not in known:
            raise ValueError(f"{name} = {value!r}; expected {known[0]!r} or {known[1]!r}")


def unip(order: int = 2, variant: str = "bh2", predict: str = "x0") -> Step:
    """UniP-p, the predictor of UniPC alone (Zhao et al. 2023, Algorithm 2 and Corollary 3.2).

    x' = (sigma'/sigma) x + (1 - sigma'/sigma) D_0 + B(h) sum_k a_k (D_k - D_0) / r_k,  R a B(h) = phi;
    with predict='eps' the same of the noise. B(h) = h is 'bh1', e^h - 1 is 'bh2' (1 - e^-h for D). B cancels
    from order 3 on; at order 2 a_1 = 1/2, which with bh2 is DPM-Solver++(2M).
    Order `order`, one evaluation, first order at sigma' = 0. Raises ValueError for an order outside 1 to 4.
    """
    _check_unified(order, variant, predict)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        x0 = D(x, sigma)
        f = x0 if predict == "x0" else noise_in(x, x0, sigma)
        past = ((f, sigma), *(memory or ()))[:order]
        return _unified(x, past, sigma_next, past[1:], variant, predict), past[: order - 1]

    return step


def unipc(order: int = 2, variant: str = "bh2", predict: str = "x0") -> Step:
    """UniPC-p: the evaluation at the predicted point also corrects the step that led there (Zhao et al. 2023, Algorithm 1).

    UniC-p: x^c = UniP's formula with the new D(x, sigma) among the D_k; then UniP from x^c to sigma', D not evaluated again.
    Order `order` + 1 (Theorem 3.1), one evaluation; the last point is predicted, not corrected, and first order at sigma' = 0.
    Options and errors as in `unip`; B(h) still acts in the corrector of order 1, whose weight is 1/2.
    """
    _check_unified(order, variant, predict)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        x0 = D(x, sigma)
        now, before = (x0 if predict == "x0" else noise_in(x, x0, sigma), sigma), ()
        if memory:
            start, before = memory
            x = _unified(start, before, sigma, (now, *before[1:]), variant, predict)
        past = (now, *before)[:order]
        return _unified(x, past, sigma_next, past[1:], variant, predict), Corrected(x, past)

    return step
