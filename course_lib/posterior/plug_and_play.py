"""Plug and play: D as the prior's half of a splitting, and a data step in the space of x0 between two levels of noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from course_lib.integrals import noise_in, over
from course_lib.operators.base import LinearOperator, Operator
from course_lib.posterior.checks import check_problem, check_share, drawn, for_batch
from course_lib.posterior.data_term import check_noisy, check_slope, steepest, towards
from course_lib.steps import check_falling, ddim
from course_lib.types import Denoiser, Noise, Step, right


def diffpir(A: LinearOperator, y: Tensor, sigma_y: float, noise: Noise, lam: float = 7.0, zeta: float = 0.3) -> Step:
    """Denoise, take the proximal step of the data term, and put the noise back, part old, part new (DiffPIR; Zhu et al. 2023).

    x0_hat = argmin_z |y - A z|^2 + rho |z - x0|^2 = x0 + (A^T A + rho I)^-1 A^T (y - A x0),  rho = lam sigma_y^2 / sigma^2
    x' = x0_hat + sigma' (sqrt(1 - zeta) eps_hat + sqrt(zeta) z),  x0 = D(x, sigma), eps_hat = (x - x0_hat) / sigma  (Alg. 1)

    In the paper's variance-preserving coordinates the same numbers: its sigma_bar is this sigma. lam = 1 says that x0 is as far
    from D(x, sigma) as x is, lam -> infinity leaves y out, and sigma_y = 0 is the projection. One call of D, and one solution
    with A^T A, closed where A has an SVD. y (B or 1, *out). Raises ValueError for lam < 0, zeta outside [0, 1], a rising grid,
    and what `replacement` refuses: nonlinear operators have no such solution (`daps` takes them).
    """
    check_share("zeta", zeta)
    if not lam >= 0:
        raise ValueError(f"lam = {lam}; expected a weight >= 0 of the prior, such as 7")
    y = check_problem(A, y, sigma_y, "diffpir")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        check_falling(sigma, sigma_next)
        x0 = D(x, sigma)
        rho = over(lam * sigma_y**2 * torch.ones_like(sigma), sigma**2).to(x0.device, x0.dtype)
        x0 = x0 + A.solve(A.adjoint(for_batch(y, x0) - A(x0)), rho)
        kept = right(sigma_next, x) * math.sqrt(1 - zeta) * noise_in(x, x0, sigma)
        return x0 + kept + math.sqrt(zeta) * drawn(noise, x, sigma_next), None

    return step


def daps(
    A: Operator,
    y: Tensor,
    sigma_y: float,
    noise: Noise,
    ode_steps: int = 5,
    steps: int = 100,
    c: float = 0.2,
    radius: Callable[[Tensor], Tensor] = lambda sigma: sigma,
) -> Step:
    """Decoupled annealing: estimate x0, draw from its neighbourhood given y, noise that anew (DAPS; Zhang et al. 2024, Alg. 1).

    x0 = the end of the probability flow from x, by `ode_steps` Euler steps at sigma (1 - k / ode_steps)^7
    z <- z + a ((x0 - z) / r^2 + A^T (y - A z) / sigma_y^2) + sqrt(2 a) n from z = x0, `steps` times;  x' = z + sigma' n'

    p(x0 | x) is taken for N(x0, r^2 I), r = radius(sigma), the paper's r = sigma. a = c / (1 / r^2 + |A|^2 / sigma_y^2), stable
    for c < 2 (the paper's falls with the level from a number tuned for each task); |A| is taken for 1 where A is not linear.
    With ode_steps = 1 the estimate is D(x, sigma), and with r^2 = s^2 sigma^2 / (s^2 + sigma^2) x' is exact for x0 ~ N(m, s^2 I)
    as c -> 0 and c steps -> infinity. `ode_steps` calls of D, none in Langevin. A linear or differentiable, y (B or 1, *out).
    Raises ValueError for ode_steps < 1, steps < 0, c <= 0, a rising grid, sigma_y = 0, and what `csgm` refuses.
    """
    y = check_slope(A, y, sigma_y, "daps")
    check_noisy(sigma_y, "daps", "diffpir or null_space")
    for name, value, least in (("ode_steps", ode_steps, 1), ("steps", steps, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} = {value!r}; expected a whole number >= {least}")
    if not c > 0:
        raise ValueError(f"c = {c}; expected a number > 0, such as 0.2")
    precision = steepest(A) ** 2 / sigma_y**2

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        check_falling(sigma, sigma_next)
        for high, low in pairwise([sigma * (1 - k / ode_steps) ** 7 for k in range(ode_steps + 1)]):
            x, _ = ddim(D, x, high, low)
        r2 = radius(sigma) ** 2
        a = c * r2 / (1 + r2 * precision)
        back, data, spread = (right(v, x) for v in (over(a, r2), a / sigma_y**2, (2 * a).sqrt()))
        z = x
        for _ in range(steps):
            z = z + back * (x - z) + data * towards(A, y, z) + spread * noise(z)
        return z + drawn(noise, z, sigma_next), None

    return step


def pnp_flow(A: Operator, y: Tensor, noise: Noise, lr: float = 1.0, alpha: float = 0.5, draws: int = 1) -> Step:
    """Descend on the data term, noise the result to the level, denoise it (PnP-Flow; Martin et al. 2025, Alg. 3).

    z = x + lr t^alpha A^T (y - A x),  x' = mean of D(z + sigma eps, sigma) over `draws` eps,  t = sigma / (1 + sigma)

    The paper's interpolation (1 - t) z + t eps on the straight path, t = 0 at the data, is (1 - t)(z + sigma eps): a Denoiser of
    a flow (`from_flow`) or of any other schedule will do; the paper counts t from the noise. x is an estimate of x0 at every
    level and never a noised one: start from an estimate, such as A^T y. A point estimate, no sample of the posterior: eps
    shrinks with sigma, and so does what it leaves in x'. lr is stable below 2 / |A|^2; 0 leaves y out. sigma_y does not enter:
    the last levels, where t^alpha -> 0, decide how much of y's noise D takes out. `draws` calls of D; A linear or
    differentiable, y (B or 1, *out). Raises ValueError for lr or alpha < 0, draws < 1, and what `csgm` refuses.
    """
    y = check_slope(A, y, 0.0, "pnp_flow")
    for name, value in (("lr", lr), ("alpha", alpha)):
        if not value >= 0:
            raise ValueError(f"{name} = {value}; expected a number >= 0")
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws = {draws!r}; expected a whole number >= 1")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        z = x + right(lr * (sigma / (1 + sigma)) ** alpha, x) * towards(A, y, x)
        return sum(D(z + drawn(noise, z, sigma), sigma) for _ in range(draws)) / draws, None

    return step
