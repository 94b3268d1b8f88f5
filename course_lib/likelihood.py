"""Likelihood: the variational bound, term by term, and the exact value along the probability-flow ODE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from course_lib.gaussians import Mixture
from course_lib.types import Denoiser, Noise, check_grid, float64


@dataclass(frozen=True)
class Bound:
    """The three parts of the variational bound, each (B,), in bits per dimension.

    Their sum, `total`, bounds -log2 p(x0) / d of the model from above, on average over its noise.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """prior + diffusion + reconstruction."""
        return self.prior + self.diffusion + self.reconstruction


@torch.no_grad()
def variational_bound(D: Denoiser, x0: Tensor, sigmas: Tensor, noise: Noise) -> Bound:
    """The bound of DDPM's ancestral sampler on -log2 p(x0) per dimension (Ho et al. 2020, Eq. 5; VDM Eq. 13).

    `sigmas` falls to a last level sigma_1 > 0. With N(0, 1 + sigma_T^2) as the prior of x_T,
    prior           KL( N(x0, sigma_T^2) || N(0, 1 + sigma_T^2) )
    diffusion       sum_i 1/2 (1/sigma_{i-1}^2 - 1/sigma_i^2) |x0 - D(x_i, sigma_i)|^2, one draw of x_i for each i
    reconstruction  -log N(x0; D(x_1, sigma_1), sigma_1^2)
    """
    sigmas = check_grid(sigmas)
    if sigmas[0] < sigmas[-1] or sigmas[-1] == 0:
        raise ValueError(f"sigmas ends at {sigmas[-1]:.6g}; expected a falling grid whose last level is above 0")
    d = x0[0].numel()
    to_bits = 1 / (d * math.log(2))

    def squared(x: Tensor) -> Tensor:
        return x.double().square().flatten(1).sum(1)

    top, low = float(sigmas[0]), float(sigmas[-1])
    variance = 1 + top**2
    prior = (squared(x0) / variance + d * (top**2 / variance - 1 + math.log(variance / top**2))) / 2
    diffusion = torch.zeros_like(prior)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        error = squared(x0 - D(x0 + sigma.to(x0) * noise(x0), sigma))
        diffusion += float(sigma_next**-2 - sigma**-2) / 2 * error
    error = squared(x0 - D(x0 + low * noise(x0), sigmas[-1]))
    reconstruction = error / (2 * low**2) + d / 2 * math.log(2 * math.pi * low**2)
    return Bound(prior * to_bits, diffusion * to_bits, reconstruction * to_bits)


def bound_gap(gaussian: Mixture, sigmas: Tensor) -> float:
    """How far the bound with the exact denoiser is above E[-log2 p(x0)] / d of one Gaussian N(m, C), in bits per dimension.

    The mean of `variational_bound(...).total` minus the entropy, in closed form. Along an axis of variance v it adds
    prior           KL( N(m, v + sigma_T^2) || N(0, 1 + sigma_T^2) )
    diffusion       sum_i (r_i - log(1 + r_i)) / 2,  r_i = v sigma_i^2 / (v + sigma_i^2) (1/sigma_{i-1}^2 - 1/sigma_i^2):
                    the true reverse step has the model's mean and 1 + r_i times its variance
    reconstruction  (c - 1 - log c) / 2,  c = v / (v + sigma_1^2)

    r - log(1 + r) is r^2 / 2 for small steps, so that T times as many of them have a gap T times smaller, apart from the
    two ends. `sigmas` falls to a last level above 0. Raises ValueError for another grid or several components.
    """
    sigmas = check_grid(sigmas)
    if sigmas[0] < sigmas[-1] or sigmas[-1] == 0:
        raise ValueError(f"sigmas ends at {sigmas[-1]:.6g}; expected a falling grid whose last level is above 0")
    if len(gaussian.weights) > 1:
        raise ValueError(f"gaussian has {len(gaussian.weights)} components; expected one, whose gap is closed")
    v, m = gaussian.variances[0], gaussian.means[0] @ gaussian.axes[0]  # (d,)
    top, low = sigmas[0], sigmas[-1]
    ratio = (v + top**2) / (1 + top**2)
    nats = ((ratio - 1 - ratio.log() + m**2 / (1 + top**2)) / 2).sum()
    s = sigmas[:-1, None]  # (T, 1)
    r = v * s**2 / (v + s**2) * (sigmas[1:, None] ** -2 - s**-2)
    nats += ((r - r.log1p()) / 2).sum()
    c = v / (v + low**2)
    nats += ((c - 1 - c.log()) / 2).sum()
    return float(nats) / gaussian.dim / math.log(2)


# --- the exact likelihood of the probability-flow ODE -----------------------------------------------------------------


@dataclass(frozen=True)
class FlowLikelihood:
    """What `exact_log_likelihood` returns.

    log_prob  (B,) float64, log p(x) at sigma_min, in nats
    latent    where the flow carries x at sigma_max, of the shape of x
    """

    log_prob: Tensor
    latent: Tensor

    @property
    def bits_per_dim(self) -> Tensor:
        """-log2 p(x) / d, (B,)."""
        return -self.log_prob / (self.latent[0].numel() * math.log(2))


def rademacher(noise: Noise) -> Noise:
    """Signs, +1 or -1 with equal probability, of normal noise: the probes of least variance for a trace (Hutchinson 1989)."""
    return lambda x: torch.where(noise(x) >= 0, 1.0, -1.0).to(x)


def exact_log_likelihood(
    D: Denoiser,
    x0: Tensor,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    steps: int = 64,
    divergence: str = "exact",
    noise: Noise | None = None,
    probes: int = 1,
    data_mean: Tensor | float = 0.0,
    data_var: float = 0.0,
    progress: bool = False,
) -> FlowLikelihood:
    """log p of x0 (B, ...) at the level sigma_min, by the flow from there to pure noise (Song et al. 2021, Eq. 39).

    With u = log sigma: dx/du = x - D,  d log p/du = -div(x - D) = tr(dD/dx) - d  (Chen et al. 2018, Theorem 1), so that
    log p(x0) = log N(x_T; data_mean, sigma_max^2 + data_var) + integral of (d - tr dD/dx) du,
    by the classical Runge-Kutta method in `steps` even steps of u: 4 calls of D each, error proportional to steps^-4.

    divergence  'exact': d backward passes a call. 'hutchinson': tr J is the mean of z^T J z over `probes` draws z = noise(x0),
                the same along the whole path, one backward pass each: unbiased for E[z z^T] = I, with a variance of
                2 |S|_F^2 (normal z) or 2 sum_{i != j} S_ij^2 (`rademacher(noise)`), S = (J + J^T) / 2
    prior       exact for a Gaussian of this mean and variance. Left at 0 and 0 it is N(0, sigma_max^2), as published: for data
                of mean m and variance v that is too low by m z / sigma_max + v (z^2 - 1) / (2 sigma_max^2) nats a number,
                to first order, with z = x_T / sigma_max

    Computed in the type of x0, the integral in float64. Raises ValueError where D has no gradient, or is clipped: the largest
    or the smallest entry of D(x) does not depend on x. Where it is, the flow presses x onto a face of the box, log p grows
    as log(1 / sigma_min) for each such entry, and at sigma = 0 there is no density. FloatingPointError where a value is not
    finite.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}; expected 0 < sigma_min < sigma_max, both finite")
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"divergence = {divergence!r}; expected 'exact' or 'hutchinson'")
    for name, value in (("steps", steps), ("probes", probes)):
        if value < 1:
            raise ValueError(f"{name} = {value}; expected at least 1")
    if (noise is None) == (divergence == "hutchinson"):
        raise ValueError(f"divergence = {divergence!r} and noise = {noise!r}; expected noise for 'hutchinson', and only for it")
    z = None if noise is None else [noise(x0) for _ in range(probes)]
    x, d = x0.detach(), x0[0].numel()
    total = torch.zeros(len(x), dtype=torch.float64, device="cpu")
    low, high = math.log(sigma_min), math.log(sigma_max)
    h = (high - low) / steps
    for k in tqdm(range(steps), desc="likelihood", unit="step", disable=not progress):
        u = low + k * h
        v1, t1 = _velocity(D, x, u, z, check=True)
        v2, t2 = _velocity(D, x + h / 2 * v1, u + h / 2, z)
        v3, t3 = _velocity(D, x + h / 2 * v2, u + h / 2, z)
        v4, t4 = _velocity(D, x + h * v3, u + h, z)
        x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        total += h * d - h / 6 * (t1 + 2 * t2 + 2 * t3 + t4)
    variance = sigma_max**2 + data_var
    centred = float64(x) - float64(data_mean)
    prior = -(centred**2 / variance + math.log(2 * math.pi * variance)).flatten(1).sum(1) / 2
    return FlowLikelihood(prior + total, x)


def _velocity(D: Denoiser, x: Tensor, u: float, z: list[Tensor] | None, check: bool = False) -> tuple[Tensor, Tensor]:
    """x - D, and the trace of dD/dx or its estimate, (B,) CPU float64, at sigma = exp(u)."""
    sigma = torch.tensor(math.exp(u), dtype=torch.float64)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        D_x = D(x, sigma)
        if not D_x.requires_grad:
            raise ValueError(
                "D(x, sigma) carries no gradient in x; expected a differentiable D: remove no_grad or detach from it"
            )
        flat = D_x.flatten(1)

        def pull(weights: Tensor) -> Tensor:
            """The rows of weights^T dD/dx, (B, d)."""
            return torch.autograd.grad(flat, x, weights, retain_graph=True)[0].flatten(1)

        if check:
            _check_not_clipped(flat.detach(), pull, float(sigma))
        if z is None:
            units = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
            trace = torch.stack([pull(unit.expand_as(flat))[:, i] for i, unit in enumerate(units)]).double().sum(0)
        else:
            trace = torch.stack([(pull(probe.flatten(1)) * probe.flatten(1)).double().sum(1) for probe in z]).mean(0)
    velocity = (x - D_x).detach()
    if not bool(torch.isfinite(velocity).all() & torch.isfinite(trace).all()):
        raise FloatingPointError(
            f"x or the divergence is not finite at sigma = {float(sigma):.6g}; expected finite numbers: check the network's "
            "output and gradient at this noise level, and its precision"
        )
    return velocity, trace.detach().cpu()


def _check_not_clipped(flat: Tensor, pull: Callable[[Tensor], Tensor], sigma: float) -> None:
    """ValueError where a sample's largest or smallest entries of D have a gradient of exactly 0: clipping leaves just that."""
    for name, end in (("largest", flat.amax(1, keepdim=True)), ("smallest", flat.amin(1, keepdim=True))):
        at_end = (flat == end).to(flat)
        clipped = (pull(at_end) == 0).all(1)
        if bool(clipped.any()):
            i = int(clipped.nonzero()[0])
            raise ValueError(
                f"D is clipped at sigma = {sigma:.4g}: in sample {i} the {name} value, {float(end[i]):.4g}, "
                f"stands {int(at_end[i].sum())} times and does not depend on x; expected D without clipping or thresholding"
            )
