"""Exact posterior sampling by particles: many samples move together, are weighed against y, and the heavy ones are copied.

A batch of R N rows is R independent runs of N particles each; weights travel in `memory`, and the step to sigma' = 0 ends with
a selection, so that `sample` returns equally weighted rows. The kernel of both samplers is that of DDIM with a share eta of
fresh noise, in the coordinate x = x0 + sigma eps:

p(x' | x) = N(x0 + rho sqrt(1 - share^2) (x - x0), s^2 I),  share = eta sqrt(1 - rho^2), s = share sigma', rho = sigma' / sigma
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from course_lib.integrals import ratio
from course_lib.operators.base import LinearOperator, Operator
from course_lib.posterior.checks import check_share, for_batch
from course_lib.posterior.data_term import check_noisy, check_slope
from course_lib.posterior.gradient import Traced, Variance
from course_lib.posterior.spectral import Spectrum
from course_lib.steps import check_falling
from course_lib.types import Denoiser, Noise, Step, right

Resampler = Callable[[Tensor, Noise], Tensor]
"""(weights (R, N) that sum to 1 in each row, noise) -> whom each of the N copies, (R, N) indices; unbiased: E[copies] = N w."""


class Weights(NamedTuple):
    """The memory of a particle step, for R runs of N particles.

    log       log weights, (R, N), normalised up to the factor of `tds` that waits for the next call of D
    evidence  log of the estimate of p(y), (R,), as a density of U^T y over s where the operator has an SVD; the estimate itself,
              not its log, is unbiased for the chain with any number of particles
    """

    log: Tensor
    evidence: Tensor


def systematic(weights: Tensor, noise: Noise) -> Tensor:
    """Systematic resampling: one uniform u for a run, at the comb (j + u) / N of the weights' distribution (Kitagawa 1996).

    Each particle is copied floor(N w) or ceil(N w) times. weights (R, N) -> indices (R, N).
    """
    comb = torch.arange(weights.shape[1], device=weights.device)
    return _ancestors(weights, (comb + _uniform(noise, weights[:, :1])) / weights.shape[1])


def multinomial(weights: Tensor, noise: Noise) -> Tensor:
    """Multinomial resampling: N independent draws by weight, of variance N w (1 - w). weights (R, N) -> indices (R, N)."""
    return _ancestors(weights, _uniform(noise, weights))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of each run, from 1, where one particle has all the weight, to N; log weights (R, N) -> (R,)."""
    return 1 / torch.softmax(log_weights, 1).square().sum(1)


def mcgdiff(
    A: LinearOperator,
    y: Tensor,
    sigma_y: float,
    noise: Noise,
    eta: float = 1.0,
    particles: int | None = None,
    threshold: float = 1.0,
    resample: Resampler = systematic,
) -> Step:
    """MCGdiff: particles that pass through the measurement at the noise level that it has (Cardoso et al. 2023).

    In coordinates V^T x, r_i = sigma_y / s_i and y_i = (U^T y)_i / s_i: y_i has the law of x_i at level r_i, so that the
    posterior is the law of x0 given x_i = y_i at level r_i for each i. Above r_i the potential g = N(y_i; x_i, sigma^2 - r_i^2)
    steers. A step goes to t_i = max(sigma', r_i) where sigma > r_i, else to sigma' (below, the product is over sigma > r_i):

    w <- w prod_i N(y_i; m_i, s_i^2 + t_i^2 - r_i^2) / N(y_i; x_i, sigma^2 - r_i^2),  (m_i, s_i) of the kernel to t_i;  select;
    x_i at t_i ~ N(m_i + K_i (y_i - m_i), K_i (t_i^2 - r_i^2)),  K_i = s_i^2 / (s_i^2 + t_i^2 - r_i^2);  then the kernel to sigma'

    The first step divides by nothing. Where r_i lies between two levels, x_i is y_i at r_i itself, and goes on from there with
    the same D: no level of the grid need be r_i, and the constraint needs no width (the authors' kappa). Without noise the
    step to 0 ends at x_i = y_i, with N(y_i; D_i, (eta sigma)^2) for its weight. As N grows the samples approach the posterior
    of the chain, as the grid is refined that of the prior; no weight by the likelihood of x0 follows, or y would count twice. A
    coordinate with r_i >= sigmas[0] is not conditioned.

    eta in (0, 1]; particles: N, or None for the whole batch as one run; a run is resampled where its effective sample size is
    under threshold N. y (B or 1, *out). One call of D. Raises ValueError for other options, a batch that is no multiple of N,
    a level per sample, and what `ddrm` refuses of its problem; FloatingPointError where no particle has any weight.
    """
    _check_eta(eta)
    swarm = _Swarm(particles, threshold, resample, noise)
    spectrum = Spectrum(A, y, sigma_y, "mcgdiff")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        _check_levels(sigma, sigma_next)
        x0 = spectrum.to(D(x, sigma))
        x, y_bar, _, r, sigma_c, end = spectrum.at(x, sigma, sigma_next)
        held = r < sigma_c  # x_i has not yet come down to its measurement
        level = torch.where(held, torch.maximum(r, end), end)
        mean, s = _kernel(x, x0, sigma_c, level, eta)
        s2 = torch.where(held & (level == 0), eta * sigma_c, s) ** 2
        v = torch.where(held, level**2 - r**2, torch.inf)
        gain = torch.where(held, _log_normal(y_bar - mean, s2 + torch.where(held, v, 1.0)), 0.0)
        if memory is not None:
            gain = gain - torch.where(held, _log_normal(y_bar - x, torch.where(held, sigma_c**2 - r**2, 1.0)), 0.0)
        chosen, memory = swarm.select(gain.sum(1), memory, sigma, last=not bool(sigma_next > 0))
        mean, x0 = mean[chosen], x0[chosen]
        spread = (1 / (1 / s2 + 1 / v)).sqrt()  # sqrt(K v): s where nothing steers, 0 at the measurement
        x = torch.where(held, torch.lerp(mean, y_bar, s2 / (s2 + v)), mean) + spread * noise(x)
        x, s = _kernel(x, x0, level, end, eta)
        return spectrum.back(x + s * noise(x) if bool((s > 0).any()) else x), memory

    return step


def tds(
    A: Operator,
    y: Tensor,
    sigma_y: float,
    noise: Noise,
    eta: float = 1.0,
    particles: int | None = None,
    variance: Variance = torch.square,
    guide: float = 1.0,
    threshold: float = 0.5,
    resample: Resampler = systematic,
) -> Step:
    """The twisted diffusion sampler: DPS's guidance as a proposal, which importance weights make exact (TDS; Wu et al. 2023).

    twist     psi(x) = N(y; A D(x, sigma), sigma_y^2 I + r^2 A A^T),  r^2 = variance(sigma)
    weight    w <- w psi(x) / psi(x_last) p(x | x_last) / p~(x | x_last), the first step's psi(x);  then select
    proposal  p~(x' | x) is the kernel with D + guide sigma^2 grad_x log psi(x) for x0

    In the step to 0, which adds no noise, p~ = p, and psi is the likelihood N(y; A x', sigma_y^2 I). So any psi gives the same
    limit as N grows, the chain's posterior, and a good one gives it with few: r^2 = 0 is DPS's own, which is too sure
    of D at high levels; the authors take sigma^2, which suits data that are wide; else `gaussian_variance(std)`. guide = 0 leaves
    the chain alone and only weighs. An operator without an SVD takes r^2 I for r^2 A A^T; it may be nonlinear.

    One call of D and a pass back through it. Options, y and errors are those of `mcgdiff`; ValueError also for sigma_y = 0, which
    gives no density, and for an operator that is not differentiable; torch.OutOfMemoryError as `dps`.
    """
    _check_eta(eta)
    swarm = _Swarm(particles, threshold, resample, noise)
    check_noisy(sigma_y, "tds", "mcgdiff")
    log_psi = _twist(A, check_slope(A, y, sigma_y, "tds"), sigma_y)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        _check_levels(sigma, sigma_next)
        traced, r2 = Traced(D), variance(sigma)
        x0 = traced(x, sigma)
        psi, pull = log_psi(x0, r2), traced.slope(lambda x0: log_psi(x0, r2))
        chosen, weights = swarm.select(psi, memory, sigma)
        x, x0, psi, pull = x[chosen], x0[chosen], psi[chosen], pull[chosen]
        mean, s = _kernel(x, x0, sigma, sigma_next, eta)
        if not bool(sigma_next > 0):
            chosen, weights = swarm.select(log_psi(mean, torch.zeros_like(r2)) - psi, weights, sigma, last=True)
            return mean[chosen], weights
        moved = _kernel(x, x0 + right(guide * sigma**2, x) * pull, sigma, sigma_next, eta)[0] - mean
        x = mean + moved + right(s, x) * (z := noise(x))
        shift = moved / right(s, x)
        waiting = -psi - (shift * (z + shift / 2)).flatten(1).sum(1)  # log p / (p~ psi)
        return x, Weights(weights.log + waiting.view_as(weights.log), weights.evidence)

    return step


@dataclass(frozen=True)
class _Swarm:
    """How particles are grouped and selected."""

    particles: int | None
    threshold: float
    resample: Resampler
    noise: Noise

    def __post_init__(self) -> None:
        if self.particles is not None and (not isinstance(self.particles, int) or self.particles < 1):
            raise ValueError(f"particles = {self.particles!r}; expected a whole number >= 1, or None for the whole batch")
        check_share("threshold", self.threshold)

    def select(self, gain: Tensor, memory: Weights | None, sigma: Tensor, last: bool = False) -> tuple[Tensor, Weights]:
        """Multiply the weights by exp(gain), (B,); return whom each row copies, (B,), and the weights after that.

        The last time every run is resampled. A `gain` that is not a number counts as a weight of zero.
        """
        N = self.particles or len(gain)
        if len(gain) % N:
            raise ValueError(f"x has {len(gain)} rows; expected a multiple of particles = {N}")
        gain = gain.view(-1, N)
        before = memory or Weights(torch.full_like(gain, -math.log(N)), gain.new_zeros(len(gain)))
        log = (before.log + gain).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        total = torch.logsumexp(log, 1, keepdim=True)
        if not bool(total.isfinite().all()):
            raise FloatingPointError(
                f"all {N} particles have weight zero at sigma = {float(sigma):.6g}; none came near y: take more particles, "
                "a larger sigma_y or more levels"
            )
        log = log - total
        poor = effective_sample_size(log) < self.threshold * N * (1 - 1e-4)  # equal weights are equal up to rounding
        own = torch.arange(N, device=log.device).expand_as(log)
        if last or bool(poor.any()):
            poor = (poor | last)[:, None]
            own = torch.where(poor, self.resample(log.exp(), self.noise), own)
            log = torch.where(poor, -math.log(N), log)
        first = N * torch.arange(len(log), device=log.device)[:, None]
        return (first + own).flatten(), Weights(log, before.evidence + total[:, 0])


def _uniform(noise: Noise, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1], from the normal ones of the sampler's source."""
    return torch.special.ndtr(noise(like))


def _ancestors(weights: Tensor, places: Tensor) -> Tensor:
    """At whose weight the cumulative sum of each row passes each place in [0, 1]; (R, N) and (R, N) -> (R, N)."""
    levels = weights.cumsum(1)
    return torch.searchsorted(levels / levels[:, -1:], places.contiguous(), right=True).clamp_max(weights.shape[1] - 1)


def _kernel(x: Tensor, x0: Tensor, sigma: Tensor, level: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean and s of DDIM's kernel from sigma to a level, each 0-d or one for each coordinate."""
    rho = ratio(sigma, level)
    share = eta * (1 - rho**2).clamp_min(0).sqrt()
    return torch.lerp(x0, x, (rho * (1 - share**2).sqrt()).to(x).expand_as(x)), share * level


def _twist(A: Operator, y: Tensor, sigma_y: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(x0, r^2) -> log N(y; A x0, sigma_y^2 I + r^2 A A^T), (B,), of the coordinates that A measures; r^2 I without an SVD."""
    if isinstance(A, LinearOperator) and type(A).svd is not LinearOperator.svd:
        spectrum = Spectrum(A, y, sigma_y, "tds")

        def in_coordinates(x0: Tensor, r2: Tensor) -> Tensor:
            c, y_bar, _, spread, r2 = spectrum.at(x0, r2)
            seen = spread < torch.inf
            return torch.where(seen, _log_normal(y_bar - c, torch.where(seen, spread**2 + r2, 1.0)), 0.0).sum(1)

        return in_coordinates
    return lambda x0, r2: _log_normal(for_batch(y, x0) - A(x0), right(r2, x0) + sigma_y**2).flatten(1).sum(1)


def _log_normal(gap: Tensor, variance: Tensor) -> Tensor:
    """log N(gap; 0, variance), entry by entry."""
    return -(gap**2 / variance + (2 * math.pi * variance).log()) / 2


def _check_eta(eta: float) -> None:
    if not 0 < eta <= 1:
        raise ValueError(f"eta = {eta}; expected a number in (0, 1]: without fresh noise copies stay copies")


def _check_levels(sigma: Tensor, sigma_next: Tensor) -> None:
    if sigma.ndim:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; expected one level for all particles")
    check_falling(sigma, sigma_next)
