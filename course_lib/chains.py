"""Where an ancestral chain ends, without samples: its density on a line, carried from level to level."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from course_lib.gaussians import Mixture
from course_lib.steps import ddpm
from course_lib.types import check_grid, float64

LOST = 1e-6  # probability that may leave the lattice


@torch.no_grad()
def chain_density(mixture: Mixture, sigmas: Tensor, variance: str = "small", lattice: Tensor | None = None) -> Tensor:
    """Density at sigmas[-1] of DDPM's ancestral chain that starts exactly at sigmas[0] and knows the exact denoiser.

    p(x') = integral of N(x'; mean(x), s^2) p(x) dx at each step, with mean and s of `steps.ddpm`; mixture on a line.

    sigmas    falling grid, (n + 1,), whose last level is above 0: the step to 0 adds no noise and has no density
    variance  'small' (beta-tilde) or 'large' (beta)
    lattice   (N,) evenly spaced points x of the last level; `line(mixture, sigmas[-1])` where left out
    returns   (N,) float64; the exact density beside it is `mixture.log_prob(lattice[:, None], sigmas[-1]).exp()`

    At every level the lattice is scaled by sqrt(1 + sigma^2), as the variance-preserving chain is. The rectangle rule
    errs on a Gaussian by 2 exp(-2 (pi s / h)^2), so by at most 5e-9 as long as no step is narrower than the spacing h.
    Raises ValueError where one is, where the lattice loses more than 1e-6 of the probability (nothing is normalised),
    and for a mixture in several dimensions.
    """
    sigmas = check_grid(sigmas)
    if sigmas[0] < sigmas[-1] or sigmas[-1] == 0:
        raise ValueError(f"sigmas ends at {sigmas[-1]:.6g}; expected a falling grid whose last level is above 0")
    _check_line(mixture)
    lattice = line(mixture, float(sigmas[-1])) if lattice is None else _even(lattice)
    unit = lattice / (1 + sigmas[-1] ** 2).sqrt()
    spacing = float(unit[1] - unit[0])
    p = _density(mixture, unit, sigmas[0])
    _check_total(p, spacing, lattice, sigmas[0])
    for sigma, sigma_next in pairwise(sigmas):
        x = (unit * (1 + sigma**2).sqrt())[:, None]
        scale = float((1 + sigma_next**2).sqrt())
        # the step with its noise replaced by 0 and, at one point, by 1 gives the kernel's mean and deviation
        centre, shifted = (
            ddpm(lambda x, z=z: torch.full_like(x, z), variance)(mixture.denoiser, start, sigma, sigma_next)[0].flatten() / scale
            for z, start in ((0.0, x), (1.0, x[:1]))
        )
        s = float(shifted[0] - centre[0])
        if s < spacing:
            raise ValueError(
                f"lattice has the spacing {float(lattice[1] - lattice[0]):.4g}, wider than the step to sigma = {sigma_next:.4g}; "
                f"expected at least {math.ceil(len(lattice) * spacing / s)} points on the same length, or fewer steps"
            )
        p = _spread(p, (centre - unit[0]) / spacing, s / spacing)
        _check_total(p, spacing, lattice, sigma_next)
    return p / float((1 + sigmas[-1] ** 2).sqrt())


def _check_line(mixture: Mixture) -> None:
    if mixture.dim != 1:
        raise ValueError(f"mixture has dimension {mixture.dim}; expected 1, where a density is carried on a lattice")


def _even(lattice: Tensor) -> Tensor:
    """The same points in float64; ValueError where they are not evenly spaced and rising, to a thousandth of the spacing."""
    lattice = float64(lattice)
    if lattice.ndim == 1 and len(lattice) > 1 and lattice[-1] > lattice[0]:
        even = torch.linspace(float(lattice[0]), float(lattice[-1]), len(lattice), dtype=torch.float64)
        if float((lattice - even).abs().max()) < 1e-3 * float(even[1] - even[0]):
            return even
    raise ValueError(f"lattice has shape {tuple(lattice.shape)}; expected at least two evenly spaced, rising points")


def _density(mixture: Mixture, unit: Tensor, sigma: Tensor) -> Tensor:
    """Density of x / sqrt(1 + sigma^2) at `unit`."""
    scale = (1 + sigma**2).sqrt()
    return mixture.log_prob((unit * scale)[:, None], sigma).exp() * scale


def _spread(p: Tensor, centre: Tensor, s: float) -> Tensor:
    """sum_i p_i N(j; centre_i, s^2) for each lattice point j; all in units of the spacing.

    A wide kernel is a narrow one, of 2 spacings, widened in Fourier space, where it is cheap; the narrow one's
    spectrum beyond the lattice's is exp(-2 pi^2) = 3e-9.
    """
    N, narrow = len(p), min(s, 2.0)
    reach = math.ceil(7 * narrow) + 1  # beyond 7 s is 1e-12 of a Gaussian
    targets = centre.round().long()[:, None] + torch.arange(-reach, reach + 1)  # (N, 2 reach + 1)
    kernel = (-((targets - centre[:, None]) ** 2) / (2 * narrow**2)).exp() * (p[:, None] / (narrow * math.sqrt(2 * math.pi)))
    # the ends take what leaves the lattice by the narrow kernel, the zeros behind it what leaves by the wide one
    out = p.new_zeros(N + 2).index_add_(0, (targets + 1).clamp(0, N + 1).flatten(), kernel.flatten())[1:-1]
    if s > narrow:
        k = torch.fft.rfftfreq(2 * N, dtype=p.dtype)
        out = torch.fft.irfft(torch.fft.rfft(out, 2 * N) * (-2 * math.pi**2 * k**2 * (s**2 - narrow**2)).exp(), 2 * N)[:N]
    return out


def _check_total(p: Tensor, spacing: float, lattice: Tensor, sigma: Tensor) -> None:
    total = float(p.sum()) * spacing
    if abs(total - 1) > LOST:
        raise ValueError(
            f"lattice has {len(lattice)} points from {lattice[0]:.4g} to {lattice[-1]:.4g} and holds the probability "
            f"{total:.7g} at sigma = {sigma:.4g}; expected 1 within {LOST:g}: make it longer"
        )


def line(mixture: Mixture, sigma: float = 0.0, n: int = 3001) -> Tensor:
    """n evenly spaced points x of the level `sigma` that hold a mixture on a line at every level of its chain; (n,).

    x / sqrt(1 + sigma^2) has its means between 0 and the components', and deviations of at most the widest one's or 1,
    that of pure noise; the line reaches 6.5 such deviations beyond (1e-10). Raises ValueError in several dimensions.
    """
    _check_line(mixture)
    reach = 6.5 * max(1.0, float(mixture.variances.max().sqrt()))
    low, high = min(0.0, float(mixture.means.min())) - reach, max(0.0, float(mixture.means.max())) + reach
    return torch.linspace(low, high, n, dtype=torch.float64) * math.sqrt(1 + sigma**2)


def wasserstein(p: Tensor, q: Tensor, lattice: Tensor) -> float:
    """Wasserstein-1 distance of two densities on one evenly spaced lattice: integral of |P(x) - Q(x)| dx, P and Q their cdfs.

    p, q, lattice (N,); in units of x. Vallender 1974. Raises ValueError for other shapes or points that are not even.
    """
    lattice = _even(lattice)
    if not p.shape == q.shape == lattice.shape:
        raise ValueError(f"p has shape {tuple(p.shape)} and q {tuple(q.shape)}; expected {tuple(lattice.shape)}, as lattice has")
    spacing = float(lattice[1] - lattice[0])
    return float(((p - q).cumsum(0) * spacing).abs().sum() * spacing)
