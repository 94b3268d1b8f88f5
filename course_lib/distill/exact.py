"""What score distillation does to points in the plane, exactly: expectations by quadrature, basins, shares and spreads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.devices import SampleNoise
from course_lib.distill.levels import Weight, one
from course_lib.distill.rules import Rule
from course_lib.gaussians import Mixture
from course_lib.types import Denoiser, float64

F64 = torch.float64


def three_weights(weights: tuple[float, float, float] = (0.6, 0.3, 0.1)) -> Mixture:
    """Three round blobs of deviation 0.3 in the plane, of unequal weight, two and a half to four units apart."""
    return Mixture.isotropic(torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.5]]), 0.3, torch.tensor(weights))


class Points(nn.Module):
    """points() is theta itself, (n, d): the particles, each its own picture."""

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta = nn.Parameter(theta.detach().clone())

    def forward(self) -> Tensor:
        return self.theta


def of_moments(points: Tensor) -> Denoiser:
    """The Denoiser of the Gaussian that has the mean and covariance of the points (n, d), as they are when it is called."""

    def D(x: Tensor, sigma: Tensor) -> Tensor:
        found = float64(points.detach())
        cov = torch.cov(found.T).reshape(found.shape[1], -1)  # of one coordinate it is a number
        return Mixture.gaussian(found.mean(0), cov).denoiser(x, sigma)

    return D


def log_grid(low: float, high: float, n: int = 8) -> Tensor:
    """The n midpoints of `levels.log_uniform(low, high)`: their plain mean is its expectation, up to O(1 / n^2); (n,) float64."""
    return low * (high / low) ** ((torch.arange(n, dtype=F64) + 0.5) / n)


def expected(rule: Rule, x0: Tensor, sigmas: Tensor, nodes: int = 8) -> Tensor:
    """The mean of rule(x0, sigma, noise) over the noise and over the levels `sigmas` (S,), all alike; (B, d).

    Gauss-Hermite quadrature of `nodes` points in each coordinate: exact for polynomials in eps up to degree 2 nodes - 1. For
    rules that treat rows apart and draw noise once, or as often as they like if they average it.
    """
    eps, share = _hermite(nodes, x0.shape[1])  # (K, d), (K,)
    S, K, B = len(sigmas), len(share), len(x0)
    noise = eps.to(x0)[:, None].expand(S, K, B, -1).reshape(S * K * B, -1)
    sigma = float64(sigmas)[:, None].expand(S, K * B).reshape(-1)
    gradient = rule(x0.repeat(S * K, 1), sigma, lambda x: noise).reshape(S, K, B, -1)
    return torch.einsum("skbd,k->bd", gradient, share.to(gradient)) / S


def objective(mixture: Mixture, x0: Tensor, sigmas: Tensor, weight: Weight = one, nodes: int = 8) -> Tensor:
    """What SDS minimises at each point: mean over sigmas of w sigma KL(N(x0, sigma^2 I) | p_sigma), in nats; (B,).

    KL = -E log p_sigma(x0 + sigma eps) - d/2 log(2 pi e sigma^2), the mean by Gauss-Hermite quadrature. Its gradient is
    `expected(sds(mixture.denoiser, weight), x0, sigmas)`.
    """
    (eps, share), d = _hermite(nodes, x0.shape[1]), x0.shape[1]
    total = torch.zeros(len(x0), dtype=F64)
    for sigma in float64(sigmas):
        x = (x0[None] + sigma * eps[:, None]).reshape(-1, d)
        entropy = d / 2 * torch.log(2 * torch.pi * torch.e * sigma**2)
        kl = -(share @ mixture.log_prob(x, sigma).reshape(len(eps), -1)) - entropy
        total = total + weight(sigma) * sigma * kl
    return total / len(sigmas)


def follow(rule: Rule, x0: Tensor, sigmas: Tensor, lr: float, steps: int, nodes: int = 4) -> Tensor:
    """Where points x0 (B, d) end that follow the rule's expected gradient: its basins of attraction, without the noise."""
    for _ in range(steps):
        x0 = x0 - lr * expected(rule, x0, sigmas, nodes)
    return x0


def agreement(rule: Rule, other: Rule, x0: Tensor, sigma: Tensor, seed: int = 0) -> float:
    """The cosine between the gradients of two rules at shared noise, over all rows x0 (B, d) and their levels (B,) at once."""
    with torch.no_grad():
        pair = [gradient(x0, sigma, SampleNoise(seed)).double().flatten() for gradient in (rule, other)]
    return float(nn.functional.cosine_similarity(*pair, dim=0))


def mode_of(points: Tensor, mixture: Mixture) -> Tensor:
    """The component to which each point most likely belongs; (n, d) -> (n,) integers."""
    return mixture.responsibilities(points.detach()).argmax(1)


def shares(points: Tensor, mixture: Mixture) -> Tensor:
    """The share of the points on each component; (K,) float64, to hold against mixture.weights."""
    return torch.bincount(mode_of(points, mixture), minlength=len(mixture.weights)).double() / len(points)


def spreads(points: Tensor, mixture: Mixture) -> Tensor:
    """Of each component, the deviation of its points over its own, sqrt(tr C / tr C_k); (K,), 1 where they are as wide.

    nan for a component with fewer than two points. n exact points give 1 within about 1 / sqrt(2 d n).
    """
    which, found = mode_of(points, mixture), points.detach().double()
    parts = [found[which == k] for k in range(len(mixture.weights))]
    variance = torch.stack([part.var(0).sum() if len(part) > 1 else torch.tensor(torch.nan, dtype=F64) for part in parts])
    return (variance / mixture.variances.sum(1)).sqrt()


def robbins_monro(optimizer: torch.optim.Optimizer, hold: float) -> Callable[[int, Tensor], None]:
    """An `on_step` of `distill`: after step k the learning rate is what it was, times hold / (hold + k) (Robbins and Monro 1951).

    A sum of these rates has no bound and that of their squares has one, so that points arrive, and the noise of SDS dies out,
    as 1 / k in variance. A function of the step: a resumed run falls on.
    """
    first = [group["lr"] for group in optimizer.param_groups]

    def on_step(step: int, x0: Tensor) -> None:
        for group, lr in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = lr * hold / (hold + step)

    return on_step


def _hermite(nodes: int, d: int) -> tuple[Tensor, Tensor]:
    """Nodes and shares of the standard normal in d dimensions: (nodes^d, d), (nodes^d,)."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    eps = torch.tensor(list(product(x, repeat=d)), dtype=F64)
    return eps, torch.tensor(list(product(w / w.sum(), repeat=d)), dtype=F64).prod(1)
