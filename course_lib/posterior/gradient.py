"""Guidance by reconstruction: the gradient of the measurement's likelihood at D(x, sigma), back through the network of D."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from course_lib.devices import short_of_memory
from course_lib.integrals import over
from course_lib.operators.base import LinearOperator, Operator
from course_lib.operators.noise import PoissonNoise
from course_lib.posterior.checks import check_problem, for_batch
from course_lib.posterior.replacement import replacement
from course_lib.posterior.spectral import Spectrum
from course_lib.types import Denoiser, Noise, Step, right

Likelihood = str | PoissonNoise
"""'gaussian'; 'poisson', where y is counts; or a `PoissonNoise`, with its rate and black."""
Variance = Callable[[Tensor], Tensor]
"""sigma -> r^2, what is taken for the variance of every entry of x0 given x."""


def gaussian_variance(std: float = 1.0) -> Variance:
    """r^2 = sigma^2 s^2 / (sigma^2 + s^2): the variance of x0 given x, were the prior N(m, s^2 I); s = `std` > 0.

    s = 1 is the choice of PiGDM's authors, r^2 = sigma^2 / (1 + sigma^2) (Song et al. 2023).
    """
    if not 0 < std < math.inf:
        raise ValueError(f"std = {std}; expected the prior's standard deviation, a finite number > 0")
    return lambda sigma: sigma**2 * std**2 / (sigma**2 + std**2)


PAPER = gaussian_variance(1.0)


def dps(step: Step, A: Operator, y: Tensor, zeta: float = 1.0, likelihood: Likelihood = "gaussian") -> Step:
    """Diffusion posterior sampling: each step, then a move down the residual's gradient (DPS; Chung et al. 2023, Alg. 1 and 2).

    x'_vp <- x'_vp - zeta grad_{x_vp} |y - A(D(x, sigma))|  in x_vp = x / sqrt(1 + sigma^2), the paper's coordinate; here
    x' <- x' - zeta sqrt(1 + sigma^2) sqrt(1 + sigma'^2) grad_x |y - A(D(x, sigma))|

    One root is grad_{x_vp} = sqrt(1 + sigma^2) grad_x, the other x' = sqrt(1 + sigma'^2) x'_vp. The paper writes the gradient of
    the squared norm, 2 |r| grad |r|, times zeta_i = zeta / |r|: its zeta is half of this one, which is that of its authors'
    code. |r| is the norm of each sample's residual; for Poisson counts N = rate (y - black) it is |r|_L with r in counts and
    L = diag(1 / (2 N)), N at least 1.

    One pass back through the network, at the first point where `step` calls D, and no further call. y (B or 1, *out). x was
    edited: memory is None; where sigma = 0 nothing moves. The move does not depend on sigma_y: it draws no posterior, and a zeta
    tuned for n steps is too large for more of them.
    Raises ValueError for an operator that is not differentiable, a y that it cannot have measured, zeta < 0, an unknown
    likelihood and negative intensities; torch.OutOfMemoryError where the graph does not fit.
    """
    y = _check_guided(A, y, zeta, "dps")
    counted = _poisson_variance(A, y, likelihood)

    def guided(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        def distance(x0: Tensor) -> Tensor:
            r = for_batch(y, x0) - A(x0)
            weighted = r if counted is None else r * (2 * for_batch(counted, x0)).rsqrt()
            return torch.linalg.vector_norm(weighted.flatten(1), dim=1)

        traced = Traced(D)
        x_next, _ = step(traced, x, sigma, sigma_next, memory)
        return x_next - right(zeta * vp_roots(sigma, sigma_next), x) * traced.slope(distance), None

    return guided


def vp_roots(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """sqrt(1 + sigma^2) sqrt(1 + sigma'^2), which a step size in x_vp gains here; 0 where sigma = 0, so that nothing moves."""
    return ((1 + sigma**2) * (1 + sigma_next**2)).sqrt() * (sigma > 0)


def dps_score(
    D: Denoiser,
    A: Operator,
    y: Tensor,
    sigma_y: float,
    zeta: float = 1.0,
    likelihood: Likelihood = "gaussian",
    variance: Variance | None = None,
) -> Denoiser:
    """DPS as a score: log p(y | x) is taken for log p(y | x0) at x0 = D(x, sigma) (Chung et al. 2023, Theorem 1).

    D'(x, sigma) = D + zeta sigma^2 grad_x log N(y; A(D), (sigma_y^2 + r^2) I),  D = D(x, sigma),  r^2 = variance(sigma), else 0

    With Poisson counts (see `dps`) their variance N / rate^2 is added to sigma_y^2, which may then be 0. r^2 = 0 takes D for x0
    itself, and pulls too hard wherever x leaves x0 open: for a small sigma_y also too hard for the grid's steps.

    Reconstruction guidance of Video Diffusion (Ho et al. 2022, Eq. 7) is this with A the mask of the frames that are given,
    sigma_y = 0, r^2 = sigma^2 and zeta = w_r: D' = D - (w_r / 2) grad_x |y - A D|^2. In its z = alpha x the factor is
    w_r alpha / 2. The paper moves only the other frames, and draws the given ones at their level as `replacement` does.

    One call of D, and a pass back through it. Raises as `dps`, and ValueError for sigma_y < 0 and for a variance of 0.
    """
    y = _check_guided(A, y, zeta, "dps_score")
    counted = _poisson_variance(A, y, likelihood)
    _check_noise(sigma_y)
    if sigma_y == 0 and counted is None and variance is None:
        raise ValueError("sigma_y = 0 gives no density; expected sigma_y > 0 or a variance, or use dps, or pigdm for a linear A")

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        traced = Traced(D)
        x0 = traced(x, sigma)
        total = x0.new_tensor(sigma_y**2) if counted is None else sigma_y**2 + for_batch(counted, x0)
        if variance is not None:
            total = total + right(_positive(variance, sigma), for_batch(y, x0).expand(len(x), *A.out))

        precision = over(torch.ones_like(total), total)  # 0 where sigma = 0 leaves no variance: nothing moves

        def log_likelihood(x0: Tensor) -> Tensor:
            return -((for_batch(y, x0) - A(x0)) ** 2 * precision).flatten(1).sum(1) / 2

        return x0 + right(zeta * sigma**2, x) * traced.slope(log_likelihood)

    return guided


def pigdm(D: Denoiser, A: Operator, y: Tensor, sigma_y: float = 0.0, variance: Variance = PAPER) -> Denoiser:
    """Pseudoinverse-guided diffusion: x0 given x is taken for N(D(x, sigma), r^2 I) (PiGDM; Song et al. 2023).

    D'(x, sigma) = D + sigma^2 J^T A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A D),  J = dD/dx,  r^2 = variance(sigma)

    Exact for N(m, s^2 I) with `gaussian_variance(s)`; the paper's r^2, that of s = 1, is the default. For N(0, 1/4), A = 1,
    sigma_y = 0.1 and y = 0.5 the posterior is N(0.481, 0.098^2); with the paper's r^2 N(0.465, 0.102^2) is drawn.
    In a direction where x0 given x has a variance above r^2 the pull goes too far; above 2 r^2 the chain may diverge.
    An operator with an SVD is inverted there, another by `solve`. One that is not linear and has `decode`, such as JPEG, needs no
    gradient: D' = D + sigma^2 / (r^2 + sigma_y^2) J^T (decode(y) - decode(A(D))), with sigma_y the deviation of decode(y).

    One call of D, and a pass back through it. y (B or 1, *out). Raises ValueError for an operator that is neither linear nor has
    `decode`, a y that it cannot have measured, sigma_y < 0 and a variance that is not > 0; torch.OutOfMemoryError as `dps`.
    """
    pull = _decoded(A, y, sigma_y) if hasattr(A, "decode") else _inverted(A, y, sigma_y)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        traced = Traced(D)
        x0 = traced(x, sigma)
        return x0 + traced.slope(lambda x0: x0, pull(x0, sigma**2, _positive(variance, sigma)))

    return guided


def mcg(step: Step, A: LinearOperator, y: Tensor, noise: Noise, zeta: float = 1.0, sigma_y: float = 0.0) -> Step:
    """Manifold constrained gradient: after each step DPS's move, then `replacement` (MCG; Chung, Sim, Ryu and Ye 2022, Alg. 1).

    x' <- x' - zeta sqrt(1 + sigma^2) sqrt(1 + sigma'^2) grad_x |y - A D(x, sigma)|
    x' <- x' + A^+ (y_t - A x'),  y_t = y + sqrt(sigma'^2 - sigma_y^2) A z

    The paper knows no noise in y: sigma_y = 0, its default, puts all of it into the result. One call of D and a pass back through
    it. Raises what `dps` and `replacement` raise.
    """
    check_problem(A, y, sigma_y, "mcg")
    return replacement(dps(step, A, y, zeta), A, y, noise, sigma_y)


def checkpointed(D: Denoiser, rows: int) -> Denoiser:
    """The same Denoiser, called on `rows` samples at a time, of which a pass back holds one graph at a time (Chen et al. 2016).

    The pass back computes each part again: one more pass forward, for a memory that does not grow with the batch. Without
    gradients it is D. Raises ValueError for rows < 1.
    """
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows = {rows!r}; expected a whole number >= 1 of samples whose graph fits into memory")

    def parts(x: Tensor, sigma: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return D(x, sigma)
        levels = sigma.split(rows) if sigma.ndim else repeat(sigma)
        return torch.cat([checkpoint(D, part, at, use_reentrant=False) for part, at in zip(x.split(rows), levels, strict=False)])

    return parts


class Traced:
    """A Denoiser that keeps the graph of its first call, whose result is x0: `slope(f)` is grad_x f(x0).

    If the caller differentiates through x himself, the slope has a graph of its own.
    """

    def __init__(self, D: Denoiser):
        self.D, self.x0 = D, None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.x0 is not None:
            return self.D(x, sigma)
        self.through = x.requires_grad and torch.is_grad_enabled()
        with _graph(x):
            self.x = x if self.through else x.detach().requires_grad_()
            self.x0 = self.D(self.x, sigma)
        if not self.x0.requires_grad:
            raise ValueError("D(x, sigma) has no gradient in x; expected a Denoiser that does not switch gradients off")
        return self.x0 if self.through else self.x0.detach()

    def slope(self, f: Callable[[Tensor], Tensor], cotangent: Tensor | None = None) -> Tensor:
        """grad_x of the sum of f(x0), (B, ...); with a cotangent, of the sum of f(x0) * cotangent."""
        with _graph(self.x):
            out = f(self.x0)
            ones = torch.ones_like(out) if cotangent is None else cotangent
            (slope,) = torch.autograd.grad(out, self.x, ones, create_graph=self.through)
        return slope


@contextmanager
def _graph(x: Tensor) -> Iterator[None]:
    """Gradients on, and a way out named where there is no memory for them."""
    advice = (
        f"the graph through D does not fit into memory for x of shape {tuple(x.shape)}; take a smaller batch, or gradient "
        "checkpointing: checkpointed(D, rows), and inside the network where it offers it"
    )
    with short_of_memory(advice), torch.enable_grad():
        yield


def check_size(name: str, value: float) -> None:
    """Raise ValueError where `value` is no step size."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} = {value}; expected a step size, a finite number >= 0")


def _check_guided(A: Operator, y: Tensor, zeta: float, solver: str) -> Tensor:
    if not A.differentiable:
        raise ValueError(
            f"A = {type(A).__name__} is not differentiable and {solver} takes its gradient; expected a differentiable operator, "
            "or use pigdm or ddrm_jpeg, which take one that has `decode` (JPEG)"
        )
    check_size("zeta", zeta)
    return A.check_measurement(y)


def _check_noise(sigma_y: float) -> None:
    if not 0 <= sigma_y < math.inf:
        raise ValueError(f"sigma_y = {sigma_y}; expected the measurement's standard deviation, a finite number >= 0")


def _positive(variance: Variance, sigma: Tensor) -> Tensor:
    r2 = variance(sigma)
    if not bool(((r2 > 0) | (sigma == 0)).all()):
        raise ValueError(f"variance(sigma) = {r2.tolist()} at sigma = {sigma.tolist()}; expected numbers > 0 where sigma > 0")
    return r2


def _poisson_variance(A: Operator, y: Tensor, likelihood: Likelihood) -> Tensor | None:
    """N / rate^2 for y = N / rate + black, with N at least 1; None for a Gaussian."""
    if likelihood == "gaussian":
        return None
    noise = PoissonNoise(1.0) if likelihood == "poisson" else likelihood
    if not isinstance(noise, PoissonNoise):
        raise ValueError(f"likelihood = {likelihood!r}; expected 'gaussian', 'poisson' or a PoissonNoise(rate, black)")
    counts = noise.rate * (y - noise.black)
    if A.observed is not None:
        counts = torch.where(A.observed.to(y.device), counts, 0.0)
    if bool((counts < -1e-3).any()):  # float32 leaves 1e-4 of 1,000 counts
        raise ValueError(
            f"y has a value of {float(y.min()):.4g}, a negative intensity; expected values >= black = {noise.black:g} "
            "(PoissonNoise(rate, black=-1) for pictures in [-1, 1])"
        )
    return counts.clamp_min(1) / noise.rate**2


def _inverted(A: LinearOperator, y: Tensor, sigma_y: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x0, sigma^2, r^2) -> sigma^2 A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A x0)."""
    y = check_problem(A, y, sigma_y, "pigdm")
    if type(A).svd is not LinearOperator.svd:
        spectrum = Spectrum(A, y, sigma_y, "pigdm")

        def in_coordinates(x0: Tensor, sigma2: Tensor, r2: Tensor) -> Tensor:
            c, y_bar, _, spread, sigma2, r2 = spectrum.at(x0, sigma2, r2)
            return spectrum.back(over(sigma2, r2 + spread**2) * (y_bar - c))

        return in_coordinates

    def solved(x0: Tensor, sigma2: Tensor, r2: Tensor) -> Tensor:
        b = A.adjoint(for_batch(y, x0) - A(x0))
        return right(over(sigma2, r2), x0) * A.solve(b, over(torch.full_like(r2, sigma_y**2), r2))

    return solved


def _decoded(A: Operator, y: Tensor, sigma_y: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x0, sigma^2, r^2) -> sigma^2 / (r^2 + sigma_y^2) (decode(y) - decode(A(x0)))."""
    _check_noise(sigma_y)
    known = A.decode(A.check_measurement(y))

    def apart(x0: Tensor, sigma2: Tensor, r2: Tensor) -> Tensor:
        return right(over(sigma2, r2 + sigma_y**2), x0) * (for_batch(known, x0) - A.decode(A(x0)))

    return apart
