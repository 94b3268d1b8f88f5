"""The exact oracle: mixtures of Gaussians, for which every quantity of the course has a closed form.

If x0 ~ sum_k w_k N(m_k, C_k), then x = x0 + sigma eps ~ sum_k w_k N(m_k, C_k + sigma^2 I). Everything
below is computed in float64 on the CPU, in the eigenbasis of each C_k, and returned in the type of x.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from course_lib.types import float64, right

F64 = torch.float64


class Mixture:
    """A mixture of full-covariance Gaussians in d dimensions, and its exact diffusion.

    weights (K,), positive, normalised here; means (K, d); covs (K, d, d), symmetric and positive
    semi-definite. Methods take x of shape (B, d), or any (B, ...) with d entries a row, and `sigma`
    0-d or (B,).
    """

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor):
        self.weights = torch.as_tensor(weights, dtype=F64)
        self.means = torch.as_tensor(means, dtype=F64)
        self.covs = torch.as_tensor(covs, dtype=F64)
        K = len(self.weights)
        if self.means.ndim != 2 or len(self.means) != K:
            raise ValueError(f"means has shape {tuple(self.means.shape)}; expected ({K}, d), a row for each weight")
        d = self.means.shape[1]
        if self.covs.shape != (K, d, d):
            raise ValueError(f"covs has shape {tuple(self.covs.shape)}; expected ({K}, {d}, {d})")
        for name in ("means", "covs"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(f"{name} has a value that is not finite; expected finite numbers")
        if not bool((self.weights > 0).all()):
            raise ValueError(f"weights = {self.weights.tolist()}; expected positive numbers")
        if not torch.allclose(self.covs, self.covs.mT, atol=1e-10):
            raise ValueError("covs is not symmetric; expected covariance matrices")
        self.weights = self.weights / self.weights.sum()
        self.variances, self.axes = torch.linalg.eigh(self.covs)  # (K, d), (K, d, d): columns are eigenvectors
        if bool((self.variances < -1e-9 * self.variances.abs().max().clamp_min(1)).any()):
            raise ValueError(f"covs has the eigenvalue {float(self.variances.min()):.3g}; expected none below 0")
        self.variances = self.variances.clamp_min(0)

    @classmethod
    def gaussian(cls, mean: Tensor, cov: Tensor) -> Mixture:
        """A single Gaussian N(mean, cov); mean (d,), cov (d, d)."""
        mean, cov = torch.as_tensor(mean, dtype=F64), torch.as_tensor(cov, dtype=F64)
        return cls(torch.ones(1), mean[None], cov[None])

    @classmethod
    def isotropic(cls, means: Tensor, std: float, weights: Tensor | None = None) -> Mixture:
        """Equal round components N(m_k, std^2 I); means (K, d)."""
        means = torch.as_tensor(means, dtype=F64)
        K, d = means.shape
        covs = std**2 * torch.eye(d, dtype=F64).expand(K, d, d)
        return cls(torch.ones(K) if weights is None else weights, means, covs)

    @property
    def dim(self) -> int:
        """Dimension d of a sample."""
        return self.means.shape[1]

    @cached_property
    def mean(self) -> Tensor:
        """E[x0], (d,)."""
        return self.weights @ self.means

    @cached_property
    def cov(self) -> Tensor:
        """Cov[x0] = sum_k w_k (C_k + m_k m_k^T) - mean mean^T, (d, d)."""
        second = self.covs + self.means[:, :, None] * self.means[:, None, :]
        return torch.einsum("k,kij->ij", self.weights, second) - torch.outer(self.mean, self.mean)

    def _project(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Flatten x; return sigma as (B, 1, 1) or 0-d, and x - m_k in each component's eigenbasis, (B, K, d)."""
        if x[0].numel() != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {self.dim} entries a row, the mixture's dimension")
        flat = x.reshape(len(x), -1).to("cpu", F64)
        sigma = float64(sigma)
        if sigma.ndim:
            if sigma.shape != (len(x),):
                raise ValueError(
                    f"sigma has shape {tuple(sigma.shape)}; expected a single number or ({len(x)},), one for each row of x"
                )
            sigma = sigma.reshape(len(x), 1, 1)
        centred = torch.einsum("bkd,kde->bke", flat[:, None] - self.means, self.axes)
        return flat, sigma, centred

    def _log_components(self, sigma: Tensor, centred: Tensor) -> Tensor:
        """log w_k + log N(x; m_k, C_k + sigma^2 I), (B, K)."""
        total = self.variances + sigma**2
        quadratic = (centred**2 / total).sum(-1)
        return self.weights.log() - (quadratic + total.log().sum(-1) + self.dim * math.log(2 * math.pi)) / 2

    def log_prob(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log p_sigma(x) of the noised mixture, in nats; (B,)."""
        _, sigma, centred = self._project(x, sigma)
        return torch.logsumexp(self._log_components(sigma, centred), -1).to(x.device, x.dtype)

    def responsibilities(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """p(k | x) proportional to w_k N(x; m_k, C_k + sigma^2 I); (B, K)."""
        _, sigma, centred = self._project(x, sigma)
        return torch.softmax(self._log_components(sigma, centred), -1).to(x.device, x.dtype)

    def denoiser(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x] = sum_k p(k | x) (m_k + C_k (C_k + sigma^2 I)^{-1} (x - m_k)); the shape of x.

        This is a `Denoiser`: pass `mixture.denoiser` wherever one is expected.
        """
        _, sigma, centred = self._project(x, sigma)
        share = torch.softmax(self._log_components(sigma, centred), -1)  # (B, K)
        shrink = torch.where(self.variances > 0, self.variances / (self.variances + sigma**2), 0.0)
        within = self.means + torch.einsum("bke,kde->bkd", shrink * centred, self.axes)
        return torch.einsum("bk,bkd->bd", share, within).reshape(x.shape).to(x.device, x.dtype)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """grad_x log p_sigma(x) = sum_k p(k | x) (C_k + sigma^2 I)^{-1} (m_k - x); the shape of x."""
        _, sigma, centred = self._project(x, sigma)
        share = torch.softmax(self._log_components(sigma, centred), -1)
        pull = torch.einsum("bke,kde->bkd", -centred / (self.variances + sigma**2), self.axes)
        return torch.einsum("bk,bkd->bd", share, pull).reshape(x.shape).to(x.device, x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None, sigma: float = 0.0) -> Tensor:
        """Draw n points of the mixture noised to `sigma`; (n, d) float64."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.dim, dtype=F64, generator=generator)
        scaled = (self.variances[which] + sigma**2).sqrt() * z
        return self.means[which] + torch.einsum("be,bde->bd", scaled, self.axes[which])

    def flow(self, x: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        """Where the probability-flow ODE carries x from sigma to sigma_next, exactly; one component only.

        x' = m + ((C + sigma'^2 I)(C + sigma^2 I)^{-1})^{1/2} (x - m).
        Raises ValueError for several components, whose flow has no closed form (use `reference_flow`).
        """
        if len(self.weights) > 1:
            raise ValueError(f"the mixture has {len(self.weights)} components; the flow is closed for one only")
        _, sigma, centred = self._project(x, sigma)
        _, sigma_next, _ = self._project(x, sigma_next)
        stretched = centred * ((self.variances + sigma_next**2) / (self.variances + sigma**2)).sqrt()
        end = self.means + torch.einsum("bke,kde->bkd", stretched, self.axes)
        return end[:, 0].reshape(x.shape).to(x.device, x.dtype)

    def reference_flow(self, x: Tensor, sigma: float, sigma_next: float, tolerance: float = 1e-10) -> Tensor:
        """The probability-flow ODE dx/dsigma = -sigma score, solved by scipy's DOP853 in log sigma to `tolerance`."""
        from scipy.integrate import solve_ivp

        for name, value in (("sigma", sigma), ("sigma_next", sigma_next)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} = {value:g}; expected a finite sigma > 0, since the flow is solved in log sigma")

        def slope(log_sigma: float, flat):
            level = math.exp(log_sigma)
            points = torch.as_tensor(flat, dtype=F64).reshape(len(x), -1)
            return (-(level**2) * self.score(points, level)).reshape(-1).numpy()

        start = x.reshape(-1).to("cpu", F64).numpy()
        span = (math.log(sigma), math.log(sigma_next))
        solved = solve_ivp(slope, span, start, method="DOP853", rtol=tolerance, atol=tolerance)
        return torch.as_tensor(solved.y[:, -1]).reshape(x.shape).to(x.device, x.dtype)

    def conditional(self, observed: list[int], values: Tensor) -> Mixture:
        """p(x0 at the other coordinates | x0[observed] = values), a mixture in d - len(observed) dimensions."""
        observed = [range(self.dim)[i] for i in observed]  # -1 is the last
        kept = [i for i in range(self.dim) if i not in observed]
        A = torch.eye(self.dim, dtype=F64)[list(observed)]
        posterior = self.posterior(A, values, 0.0)
        return Mixture(posterior.weights, posterior.means[:, kept], posterior.covs[:, kept][:, :, kept])

    def posterior(self, A: Tensor, y: Tensor, noise_std: float) -> Mixture:
        """p(x0 | y) under y = A x0 + noise_std n, n ~ N(0, I); A (e, d), y (e,). A mixture again.

        With S_k = A C_k A^T + noise_std^2 I and G_k = C_k A^T S_k^{-1}: w_k' ~ w_k N(y; A m_k, S_k),
        m_k' = m_k + G_k (y - A m_k), C_k' = C_k - G_k A C_k. Components of weight under 1e-300 are dropped.
        """
        A, y = torch.as_tensor(A, dtype=F64), torch.as_tensor(y, dtype=F64).reshape(-1)
        if A.ndim != 2 or A.shape[1] != self.dim or len(A) != len(y):
            raise ValueError(f"A has shape {tuple(A.shape)} and y {tuple(y.shape)}; expected (e, {self.dim}) and (e,)")
        CAt = self.covs @ A.T  # (K, d, e)
        S = A @ CAt + noise_std**2 * torch.eye(len(y), dtype=F64)
        residual = y - self.means @ A.T  # (K, e)
        factor, failed = torch.linalg.cholesky_ex(S)
        if bool(failed.any()):
            raise ValueError(
                f"A C A^T + noise_std^2 I has no inverse with noise_std = {noise_std}; "
                "expected noise_std > 0, or independent rows of A"
            )
        whitened = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_weights = self.weights.log() - (whitened**2).sum(-1) / 2 - log_det
        weights = torch.softmax(log_weights, 0)
        means = self.means + (CAt @ torch.cholesky_solve(residual[..., None], factor))[..., 0]
        covs = self.covs - CAt @ torch.cholesky_solve(CAt.mT, factor)
        kept = weights > 1e-300
        return Mixture(weights[kept], means[kept], (covs + covs.mT)[kept] / 2)


class Empirical:
    """The memorising denoiser: the exact E[x0 | x] when the data are nothing but the given points.

    D(x, sigma) = sum_i p(i | x) x_i, with p(i | x) ~ exp(-|x - x_i|^2 / (2 sigma^2)). It minimises the
    denoising loss on those points, and its samples are copies of them. points (N, ...).
    """

    def __init__(self, points: Tensor):
        self.points = points

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        points = self.points.reshape(len(self.points), -1).to(x.device, x.dtype)
        flat = x.reshape(len(x), -1)
        level = right(float64(sigma), flat)
        share = torch.softmax(-(torch.cdist(flat, points, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * level**2), -1)
        return torch.where(level > 0, share @ points, flat).reshape(x.shape)  # without noise x0 is x
