"""What the fast samplers integrate: a polynomial through the evaluations at hand, in closed form.

Along the probability-flow ODE dx/dsigma = eps, with eps = (x - D) / sigma and lambda = -log sigma, exactly

    x' = x + int_sigma^sigma' eps ds  =  (sigma'/sigma) x + sigma' int_lambda^lambda' e^l D dl.

A rule replaces eps or D by the polynomial through its values f_0, f_1, ... at the levels sigma, s_1, ...; then
x' = (the step that holds f_0 fixed) + sum_k w_k (f_k - f_0), and a set of weights w_k is all that tells rules apart.

All maps take and return noise levels of any one shape, elementwise. Where a step starts or ends at sigma = 0,
lambda is infinite: there h is set to 0 and with it every weight, which leaves the first-order step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from course_lib.types import right


def ratio(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """sigma' / sigma = e^-h; 1 where sigma = 0, so that frames without noise pass unchanged."""
    return (sigma_next / sigma).nan_to_num(1.0, 1.0)


def over(a: Tensor, b: Tensor) -> Tensor:
    """a / b; 0 where b = 0."""
    return (a / b).nan_to_num(0.0, 0.0, 0.0)


def log_step(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """h = lambda' - lambda = log(sigma / sigma'); 0 where either level is 0."""
    return (sigma / sigma_next).log().nan_to_num(0.0, 0.0, 0.0)


def noise_in(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """eps = (x - x0) / sigma, the slope dx/dsigma; 0 where sigma = 0. x, x0 (B, ...)."""
    return right(sigma.reciprocal().nan_to_num(0.0, 0.0, 0.0), x) * (x - x0)


def add_corrections(x: Tensor, weights: Sequence[Tensor], f0: Tensor, others: Sequence[Tensor]) -> Tensor:
    """x + sum_k w_k (f_k - f_0)."""
    for w, f in zip(weights, others, strict=True):
        x = torch.addcmul(x, right(w, x), f - f0)
    return x


def exponential_moments(h: Tensor, n: int) -> list[Tensor]:
    """E_j = int_0^h u^j e^u du for j = 1 ... n, by parts: E_j = h^j e^h - j E_{j-1}, E_0 = e^h - 1."""
    e = h.exp()
    powers = enumerate([h**j * e for j in range(1, n + 1)], start=1)
    return list(accumulate(powers, lambda before, jp: jp[1] - jp[0] * before, initial=h.expm1()))[1:]


def lagrange_weights(u: Sequence[Tensor], moments: Sequence[Tensor]) -> list[Tensor]:
    """Weights w_k such that sum_k w_k (f_k - f_0) integrates the polynomial through f_0 at 0 and f_k at u_k, but for f_0.

    They solve sum_k w_k u_k^j = moments_j, j = 1 ... n, a Vandermonde system, by divided differences
    (Bjorck and Pereyra 1970). All are 0 where two nodes coincide, as for a frame that waited at its level.
    """
    w, n = list(moments), len(u)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            w[i] = w[i] - u[k] * w[i - 1]
    for k in range(n - 1, 0, -1):
        for i in range(k, n):
            w[i] = w[i] / (u[i] - u[i - k])
        for i in range(k - 1, n - 1):
            w[i] = w[i] - w[i + 1]
    w = [w_k / u_k for w_k, u_k in zip(w, u, strict=True)]
    distinct = sum(w).isfinite() if w else None
    return [torch.where(distinct, w_k, 0.0) for w_k in w]


def data_weights(sigma: Tensor, sigma_next: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """Weights of D_k - D_0 in sigma' int e^l D dl, D a polynomial in lambda through the values at sigma and `levels`."""
    h = log_step(sigma, sigma_next)
    moments = exponential_moments(h, len(levels))
    return lagrange_weights([log_step(sigma, s) for s in levels], [(-h).exp() * E for E in moments])


def noise_weights(sigma: Tensor, sigma_next: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """Weights of eps_k - eps_0 in int eps ds, eps a polynomial in log s through the values at sigma and `levels`."""
    moments = exponential_moments(log_step(sigma_next, sigma), len(levels))
    return lagrange_weights([log_step(s, sigma) for s in levels], [sigma * E for E in moments])


def level_weights(sigma: Tensor, sigma_next: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
    """Weights of eps_k - eps_0 in int eps ds, eps a polynomial in s through the values at sigma and `levels`."""
    length = sigma_next - sigma
    moments = [length ** (j + 1) / (j + 1) for j in range(1, len(levels) + 1)]
    return lagrange_weights([s - sigma for s in levels], moments)


def check_order(order: int, highest: int) -> None:
    """Raise ValueError where `order` is not a whole number from 1 to `highest`."""
    if not isinstance(order, int) or not 1 <= order <= highest:
        raise ValueError(f"order = {order!r}; expected a whole number from 1 to {highest}")
