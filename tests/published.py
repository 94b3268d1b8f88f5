"""Rules as the authors' code and diffusers have them, where that differs from the mathematics or from the papers."""

from typing import Any

from torch import Tensor

from course_lib.integrals import data_weights, noise_weights
from course_lib.multistep import unip
from course_lib.singlestep import dpm_solver_2, dpm_solver_pp_2s
from course_lib.types import Denoiser, Step


def halved_3m(predict: str = "x0") -> Step:
    """DPM-Solver(++) multistep of order 3 without the 2 in d^2f/dl^2 = 2 f[l, l_1, l_2]; its second step is the midpoint rule.

    The quadratic is f_0 + slope u + second u^2 in u = l - lambda; sum_k w_k u_k^j are the integrals of u^j.
    """
    weights = data_weights if predict == "x0" else noise_weights
    start = unip(2, "bh2", predict)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        x0 = D(x, sigma)
        f = x0 if predict == "x0" else (x - x0) / sigma
        x_next, _ = start(lambda *_: x0, x, sigma, sigma_next, memory)
        past = (memory or ())[:2]
        if len(past) == 2:
            (f_1, s_1), (f_2, s_2) = past
            h_0, h_1 = (s_1 / sigma).log(), (s_2 / s_1).log()
            second = ((f - f_1) / h_0 - (f_1 - f_2) / h_1) / (h_0 + h_1)
            slope = (f - f_1) / h_0 + h_0 * second
            first_order, _ = unip(1, "bh2", predict)(lambda *_: x0, x, sigma, sigma_next)
            w_1, w_2 = weights(sigma, sigma_next, [s_1, s_2])
            u, u_squared = -(w_1 * h_0 + w_2 * (h_0 + h_1)), w_1 * h_0**2 + w_2 * (h_0 + h_1) ** 2
            x_next = first_order + u * slope + u_squared * second / 2
        return x_next, ((f, sigma), *past)[:2]

    return step


def composed_third_order(r1: float, r2: float, predict: str) -> Step:
    """DPM-Solver(++) singlestep of order 3 whose second inner point is a whole step of the rule of order 2 (midpoint type)."""
    inner, weights = (dpm_solver_pp_2s, data_weights) if predict == "x0" else (dpm_solver_2, noise_weights)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        value = (lambda x, x0, s: x0) if predict == "x0" else (lambda x, x0, s: (x - x0) / s)
        s_2, x0 = sigma ** (1 - r2) * sigma_next**r2, D(x, sigma)
        f_0 = value(x, x0, sigma)
        u_2, _ = inner(r1 / r2)(lambda y, s: x0 if s == sigma else D(y, s), x, sigma, s_2)
        f_2 = value(u_2, D(u_2, s_2), s_2)
        first_order = x0 + sigma_next / sigma * (x - x0)
        return first_order + weights(sigma, sigma_next, [s_2])[0] * (f_2 - f_0), None

    return step
