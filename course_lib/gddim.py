"""gDDIM: DDIM where the noise is a matrix and not a number, here for critically damped Langevin diffusion (CLD).

A state u (B, 2, d) has the position x and the velocity v as its two rows. Matrices are 2 x 2, act on these rows and are
computed in float64. Times lie in [0, 1], in the process's own unit; sampling lets them fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from course_lib.gaussians import Mixture
from course_lib.types import float64

F64 = torch.float64
ONE = torch.eye(2, dtype=F64)
Score = Callable[[Tensor, float], Tensor]
"""score(u, t) = grad_u log p_t(u), of the shape of u."""
Root = Callable[[float], Tensor]
"""K(t), 2 x 2, with K_t K_t^T = Sigma_t."""


class CLD:
    """Critically damped Langevin diffusion: noise enters the velocity alone, and by it the position (Dockhorn et al. 2022).

    du = F u dt + G dw,  F = beta [[0, 1/M], [-1, -Gamma/M]],  G = diag(0, sqrt(2 Gamma beta)),  Gamma = 2 sqrt(M)
    From v ~ N(0, gamma M) at t = 0 towards x ~ N(0, 1) and v ~ N(0, M). Given a datum x0, u is
    N(Psi(t, 0) (x0, 0), Sigma_t), in each of the d dimensions alike. `width` is the deviation of x around x0 at t = 0, so
    that Sigma_0 has an inverse. Raises ValueError unless all four numbers are above 0.
    """

    def __init__(self, beta: float = 4.0, mass: float = 0.25, gamma: float = 0.04, width: float = 1e-3):
        for name, value in (("beta", beta), ("mass", mass), ("gamma", gamma), ("width", width)):
            if not value > 0:
                raise ValueError(f"{name} = {value}; expected a number > 0")
        self.rate, damping = beta / math.sqrt(mass), 2 * math.sqrt(mass)
        self.F = beta * torch.tensor([[0.0, 1 / mass], [-1.0, -damping / mass]], dtype=F64)
        self.GG = torch.diag(torch.tensor([0.0, 2 * damping * beta], dtype=F64))
        self.first = torch.diag(torch.tensor([width**2, gamma * mass], dtype=F64))
        self.last = torch.diag(torch.tensor([1.0, mass], dtype=F64))

    def psi(self, t_next: float, t: float) -> Tensor:
        """Psi(t', t) = exp((t' - t) F), where u goes without noise; critical damping means that (F + rate)^2 = 0."""
        span = t_next - t
        return math.exp(-self.rate * span) * (ONE + span * (self.F + self.rate * ONE))

    def cov(self, t: float) -> Tensor:
        """Sigma_t of one datum: Sigma_last + Psi (Sigma_0 - Sigma_last) Psi^T, Psi = Psi(t, 0)."""
        Psi = self.psi(t, 0.0)
        return self.last + Psi @ (self.first - self.last) @ Psi.T

    def L(self, t: float) -> Tensor:
        """The root of Sigma_t below the diagonal (Cholesky), CLD's own."""
        return torch.linalg.cholesky(self.cov(t))

    def R(self, t: float) -> Tensor:
        """The root of Sigma_t that the flow carries along: dR/dt = F R + G G^T R^-T / 2, R_0 = sqrt(Sigma_0)."""
        return torch.as_tensor(self._R(t)).reshape(2, 2)

    @cached_property
    def _R(self) -> Callable[[float], np.ndarray]:
        slope = lambda t, R: self.F @ R + self.GG @ torch.linalg.inv(R).T / 2
        return _solve(slope, self.first.sqrt(), 0.0, 1.0, 1e-13, dense_output=True).sol

    def noised(self, data: Mixture, t: float) -> Mixture:
        """The exact law of u at time t for data of a mixture in d dimensions: a mixture in 2 d, whose score is at sigma = 0."""
        K, d, carried = len(data.means), data.dim, self.psi(t, 0.0)[:, 0]
        means = torch.einsum("i,kd->kid", carried, data.means).reshape(K, 2 * d)
        spread = torch.einsum("i,j,kde->kidje", carried, carried, data.covs).reshape(K, 2 * d, 2 * d)
        return Mixture(data.weights, means, spread + torch.kron(self.cov(t), torch.eye(d, dtype=F64)))

    def score(self, data: Mixture) -> Score:
        """The exact score(u, t) for data of a mixture."""
        return lambda u, t: self.noised(data, t).score(u, 0.0)

    def flow(self, score: Score, u: Tensor, t: float, t_next: float, tolerance: float = 1e-10) -> Tensor:
        """Where the probability flow du/dt = F u - G G^T score / 2 carries u (B, 2, d), solved to `tolerance`."""
        slope = lambda s, u: _act(self.F, u) - _act(self.GG, score(u, s)) / 2
        return torch.as_tensor(_solve(slope, u.to(F64), t, t_next, tolerance).y[:, -1]).reshape(u.shape).to(u)


def push(cld: CLD, root: Root, t: float, t_next: float) -> Tensor:
    """What a step makes of a constant eps: int_t^t' Psi(t', s) G G^T K_s^-T ds / 2, 2 x 2.

    It is Y(t') of dY/ds = F Y + G G^T K_s^-T / 2, Y(t) = 0. With K = R that is R_t' - Psi(t', t) R_t, without an integral.
    """
    if root == cld.R:
        return cld.R(t_next) - cld.psi(t_next, t) @ cld.R(t)
    slope = lambda s, Y: cld.F @ Y + cld.GG @ torch.linalg.inv(root(s)).T / 2
    return torch.as_tensor(_solve(slope, torch.zeros(2, 2, dtype=F64), t, t_next, 1e-10).y[:, -1]).reshape(2, 2)


def gddim(cld: CLD, score: Score, u: Tensor, times: Tensor, root: Root | None = None) -> Tensor:
    """Deterministic gDDIM: the score as a noise eps that a step holds constant (Zhang, Tao and Chen 2023, K_t = R_t).

    eps = -K_t^T score(u, t);  u' = Psi(t', t) u + (int_t^t' Psi(t', s) G G^T K_s^-T ds / 2) eps
    With K = R, the default, eps is constant along the flow of one datum, and a step of any length is exact: u' - Psi(t', t) u =
    (R_t' - Psi(t', t) R_t) eps, DDIM with matrices for its numbers. `cld.L`, the network's convention in CLD, holds an eps
    constant that turns. First order, one evaluation a step.

    u (B, 2, d) at times[0]; times (n + 1,) in [0, 1], falling to sample. Raises ValueError for other times or shapes.
    """
    times = float64(times)
    if times.ndim != 1 or len(times) < 2 or not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(f"times = {times.tolist()}; expected at least two times in [0, 1]")
    if u.ndim != 3 or u.shape[1] != 2:
        raise ValueError(f"u has shape {tuple(u.shape)}; expected (B, 2, d), positions and velocities")
    root = cld.R if root is None else root
    for t, t_next in pairwise(times.tolist()):
        eps = -_act(root(t).T, score(u, t))
        u = _act(cld.psi(t_next, t), u) + _act(push(cld, root, t, t_next), eps)
    return u


def _act(matrix: Tensor, u: Tensor) -> Tensor:
    """A 2 x 2 matrix on the rows of u (B, 2, d)."""
    return torch.einsum("ij,bjd->bid", matrix.to(u), u)


def _solve(
    slope: Callable[[float, Tensor], Tensor], start: Tensor, t: float, t_next: float, tolerance: float, **options: Any
) -> Any:
    """scipy's solution of dY/dt = slope(t, Y), Y(t) = start."""

    def flat(s: float, y: np.ndarray) -> np.ndarray:
        return slope(s, torch.as_tensor(y).reshape(start.shape)).reshape(-1).numpy()

    return solve_ivp(flat, (t, t_next), start.reshape(-1).numpy(), method="DOP853", rtol=tolerance, atol=tolerance, **options)
