"""Gaussian problems and their algebra, for solvers whose steps are affine in x and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.gaussians import Mixture

F64 = torch.float64


def shrink(prior: Mixture, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """K (d, d), k (d,) of D(x, sigma) = K x + k for a single Gaussian: K = C (C + sigma^2 I)^-1, k = m - K m."""
    C, m = prior.covs[0], prior.means[0]
    K = torch.linalg.solve(C + sigma**2 * torch.eye(len(m), dtype=F64), C).T
    return K, m - K @ m


def w2(mean: Tensor, cov: Tensor, other: Mixture) -> float:
    """Wasserstein-2 distance between N(mean, cov) and a single Gaussian: |m - m'|^2 + tr(C + C' - 2 (C'^1/2 C C'^1/2)^1/2)."""

    def root(a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh((a + a.T) / 2)
        return vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)

    half = root(other.covs[0])
    squared = ((mean - other.means[0]) ** 2).sum() + torch.trace(cov + other.covs[0] - 2 * root(half @ cov @ half))
    return float(squared.clamp_min(0).sqrt())


class Problem:
    """A Gaussian prior and a linear measurement from a seed, as matrices: P = A^+ A, and the SVD with s padded by zeros."""

    def __init__(self, seed: int, d: int = 4, e: int = 2, sigma_y: float = 0.3):
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(d, d, dtype=F64, generator=generator)
        mean, self.I = torch.randn(d, dtype=F64, generator=generator), torch.eye(d, dtype=F64)
        self.prior = Mixture.gaussian(mean, root @ root.T / d + 0.1 * self.I)
        self.A = torch.randn(e, d, dtype=F64, generator=generator)
        self.sigma_y, self.d = sigma_y, d
        x0 = self.prior.sample(1, generator)
        self.y = x0 @ self.A.T + sigma_y * torch.randn(1, e, dtype=F64, generator=generator)
        self.pinv = torch.linalg.pinv(self.A)
        self.P = self.pinv @ self.A
        U, s, Vt = torch.linalg.svd(self.A)
        self.V, self.s = Vt.T, torch.cat([s, torch.zeros(d - e, dtype=F64)])
        self.y_bar = torch.cat([(self.y[0] @ U) / s, torch.zeros(d - e, dtype=F64)])

    @property
    def posterior(self) -> Mixture:
        return self.prior.posterior(self.A, self.y, self.sigma_y)

    def start(self, sigma: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of pure noise at sigma."""
        return torch.zeros(self.d, dtype=F64), sigma**2 * self.I
