"""RED-diff: the mode of a posterior by stochastic descent, with a denoiser at falling levels as the regulariser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from course_lib.integrals import noise_in
from course_lib.operators.base import Operator
from course_lib.posterior.data_term import check_noisy, check_slope, towards
from course_lib.types import Denoiser, Noise, check_grid, right

OPTIMISERS: dict[str, Callable[[Tensor, float], torch.optim.Optimizer]] = {
    "adam": lambda mu, lr: torch.optim.Adam([mu], lr, betas=(0.9, 0.99)),
    "gradient": lambda mu, lr: torch.optim.SGD([mu], lr),
}
"""'adam' is the paper's, with its own betas; 'gradient' is mu <- mu - lr grad."""


@torch.no_grad()
def red_diff(
    D: Denoiser,
    mu: Tensor,
    A: Operator,
    y: Tensor,
    sigma_y: float,
    sigmas: Tensor,
    noise: Noise,
    weight: Callable[[Tensor], Tensor] | None = None,
    lr: float = 0.1,
    optimiser: str = "adam",
) -> Tensor:
    """The mean mu of q = N(mu, 0 I) that comes nearest to the posterior, by descent (RED-diff; Mardani et al. 2023, Alg. 1).

    one update at each level:  |y - A(mu)|^2 / (2 sigma_y^2) + lambda(sigma) <sg[eps_hat - eps], mu>
    with x = mu + sigma eps and eps_hat = (x - D(x, sigma)) / sigma; sg: not differentiated, so D has no backward pass

    mu (B, *shape) is the start; sigmas falls, a last 0 is left out; one call of D a level. E[(eps_hat - eps) / sigma] is
    -E[score(mu + sigma eps)], so lambda = 1 / sigma is descent on -log of the noised prior, whose limit for sigma -> 0 is the
    posterior's mode, with noise of variance 1 / sigma^2 in the gradient. `weight` is lambda; left out it is the paper's,
    0.25 sigma / sigma_y^2: 0.25 / SNR for a data term without 1 / sigma_y^2. Its gradient is then 0.25 (mu - D) / sigma_y^2.
    q has no width: runs that start apart end near modes, and are no samples of the posterior.
    Raises ValueError for an unknown optimiser, lr <= 0, a grid that does not fall, sigma_y = 0, by which it divides, and what
    `csgm` refuses; FloatingPointError, naming sigma, where mu is not finite.
    """
    y = check_slope(A, y, sigma_y, "red_diff")
    check_noisy(sigma_y, "red_diff", "diffpir or null_space")
    if optimiser not in OPTIMISERS:
        raise ValueError(f"optimiser = {optimiser!r}; expected one of {', '.join(OPTIMISERS)}")
    if not lr > 0:
        raise ValueError(f"lr = {lr}; expected a step size > 0, such as 0.1")
    sigmas = check_grid(sigmas)
    if sigmas[0] < sigmas[-1]:
        raise ValueError(f"sigmas rises from {sigmas[0]:.6g} to {sigmas[-1]:.6g}; expected a falling grid")
    mu = mu.clone()
    descent = OPTIMISERS[optimiser](mu, lr)
    for sigma in sigmas[sigmas > 0]:
        lam = 0.25 * sigma / sigma_y**2 if weight is None else weight(sigma)
        eps = noise(mu)
        x = mu + right(sigma, mu) * eps
        mu.grad = right(lam, mu) * (noise_in(x, D(x, sigma), sigma) - eps) - towards(A, y, mu) / sigma_y**2
        descent.step()
        if not bool(torch.isfinite(mu).all()):
            raise FloatingPointError(f"mu is not finite after the update at sigma = {float(sigma):.6g}; take a smaller lr")
    return mu
