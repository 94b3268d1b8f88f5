"""A posterior as a network: a normalising flow fitted to likelihood times diffusion prior, whose samples then cost no call of D.

The fit needs log p(x) of the prior and its gradient. `likelihood.exact_log_likelihood` gives it by the probability-flow ODE (Feng
et al. 2023): hundreds of calls of D with a backward pass each, all kept for the gradient. Here it is the lower bound by denoising
errors instead (Feng and Bouman 2023), one call of D and one backward pass a step. With the exact denoiser both agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm

from course_lib.nets.realnvp import RealNVP
from course_lib.operators.base import Operator
from course_lib.posterior.data_term import check_noisy, check_slope
from course_lib.training import learning_rate
from course_lib.types import Denoiser, Noise, right

CLIP = 10.0
"""The largest norm of a gradient in the fit."""


def log_prior_bound(
    D: Denoiser, x: Tensor, noise: Noise, low: float = 0.02, high: float = 80.0, draws: int = 4, data_var: float = 1.0
) -> Tensor:
    """One draw of a lower bound on log p(x) of the diffusion, differentiable in x (Feng and Bouman 2023; Song et al. 2021).

    b(x) = - KL(N(x, high^2) || N(0, high^2 + data_var)) - int_{log low}^{log high} E |x - D(x + s eps, s)|^2 / s^2 d log s
           + E log N(x; D(x + low eps, low), low^2)

    `likelihood.variational_bound` in the limit of many levels: its terms weigh the denoising error by 1 / s^2 in log s, and here
    `draws` levels are drawn, evenly spread with a random shift for each row, and eps for each. Every draw is unbiased for b.
    x (B, ...), low and high are noise levels; (B,) in nats, in the type of x. One call of D, with B (draws + 1) rows. With the
    exact denoiser b(x) is log p(x) but for what p differs from a Gaussian at `high` and within `low`.
    Raises ValueError unless 0 < low < high and draws >= 1, and where x has a gradient that D lets go.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"low = {low}, high = {high}; expected 0 < low < high, both finite")
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws = {draws!r}; expected a whole number >= 1")
    d, span = x[0].numel(), math.log(high / low)
    shift = torch.special.ndtr(noise(x).double().flatten(1)[:, :1].cpu())  # uniform in (0, 1), a number each
    u = (torch.arange(draws) + shift) / draws  # (B, draws)
    levels = torch.cat([torch.full_like(shift, low), low * (span * u).exp()], 1).T.reshape(-1)  # (draws + 1) B, low first
    rows = x.repeat(draws + 1, *[1] * (x.ndim - 1))
    x0 = D(rows + right(levels, rows) * noise(rows), levels)
    if x.requires_grad and not x0.requires_grad:
        raise ValueError("D(x, sigma) carries no gradient in x; expected a differentiable D: remove no_grad or detach from it")
    error = (rows - x0) / right(levels, rows)
    error = error.square().flatten(1).sum(1).reshape(draws + 1, -1)
    variance = high**2 + data_var
    prior = (x.square().flatten(1).sum(1) / variance + d * (high**2 / variance - 1 + math.log(variance / high**2))) / 2
    reconstruction = error[0] / 2 + d / 2 * math.log(2 * math.pi * low**2)
    return -(prior + span * error[1:].mean(0) + reconstruction)


def fit_posterior(
    q: RealNVP,
    D: Denoiser,
    A: Operator,
    y: Tensor,
    sigma_y: float,
    noise: Noise,
    steps: int = 1500,
    batch: int = 128,
    lr: float = 3e-3,
    entropy: float = 1.0,
    low: float = 0.02,
    high: float = 80.0,
    draws: int = 4,
    progress: bool = False,
) -> list[float]:
    """Fit q to p(x0 | y) in place, by the divergence KL(q || p(. | y)) (Feng et al. 2023, Eq. 4); returns the loss of each step.

    loss = E_q [ entropy log q(x) + |y - A(x)|^2 / (2 sigma_y^2) - b(x) ],  x = q.inverse(z), b = `log_prior_bound`
    by Adam with a cosine schedule, on `batch` draws of z = noise(.) a step. It is above -log p(y), up to the constant of the
    likelihood, by KL(q || p(. | y)) and by b's gap to log p.

    q has as many numbers as x; y (1, *out) is one measurement, and another needs another fit. `entropy` = 1 is the divergence;
    at 0 nothing keeps q wide and it falls onto the likeliest x. KL(q || p) forgives a mode that q leaves out. `steps` calls of D
    with batch (draws + 1) rows, with a backward pass each, so D must be differentiable; samples are q.inverse(z), without D.
    Raises ValueError for a q of another dimension, several measurements, a D without a gradient, sigma_y = 0, and what `csgm`
    refuses of A and y; FloatingPointError, naming the step, where the loss is not finite.
    """
    y = check_slope(A, y, sigma_y, "fit_posterior")
    check_noisy(sigma_y, "fit_posterior", "diffpir or null_space")
    d = math.prod(A.shape)
    if q.dim != d:
        raise ValueError(f"q has {q.dim} dimensions; expected {d}, as x of shape {tuple(A.shape)} has")
    if len(y) != 1:
        raise ValueError(f"y has {len(y)} rows; expected one measurement, for which q is the posterior")
    if not entropy >= 0 or steps < 1:
        raise ValueError(f"entropy = {entropy}, steps = {steps}; expected a weight >= 0, and a number of steps >= 1")
    optimiser = torch.optim.Adam(q.parameters(), lr)
    like, losses = next(q.parameters()).new_empty(batch, d), []
    y = y.to(like)
    with torch.enable_grad():
        for k in tqdm(range(steps), desc="posterior", unit="step", disable=not progress):
            flat = q.inverse(noise(like))
            x = flat.reshape(batch, *A.shape)
            bound = log_prior_bound(D, x, noise, low, high, draws)
            data = (y - A(x)).square().flatten(1).sum(1) / (2 * sigma_y**2)
            loss = (entropy * q.log_prob(flat) + data - bound).mean()
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"the loss is not finite in step {k}; expected finite numbers: take a smaller lr")
            optimiser.param_groups[0]["lr"] = learning_rate(k, steps, lr, warmup=min(100, steps // 10))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(q.parameters(), CLIP)
            optimiser.step()
            losses.append(float(loss.detach()))
    return losses
