"""Guidance without a classifier: two Denoisers, and what is done with their difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_lib.denoisers import NetworkDenoiser, batched
from course_lib.integrals import ratio
from course_lib.types import Denoiser, Step, float64, right

Weight = float | Callable[[Tensor], Tensor | float]
"""A scale, or a function of sigma."""


def cfg(D_cond: Denoiser, D_ref: Denoiser, w: Weight) -> Denoiser:
    """Classifier-free guidance: D = D_ref + w (D_cond - D_ref). w = 0 gives D_ref, w = 1 gives D_cond.

    The paper's own scale is w - 1 (Ho and Salimans 2022, Eq. 6); this is the scale of Stable Diffusion. `w` is a number, or a
    function of sigma, such as `interval(w, low, high)`. What the reference is makes the method: the same network without a
    condition; with the condition that is *not* wanted, which is Stable Diffusion's negative prompt; a weaker model, which is
    autoguidance (Karras et al. 2024, Sec. 4). Denoisers that share a network are merged into one call; where w is 0 or 1, for
    all of the batch, only one of them is called.
    """
    if not callable(w):
        if w == 0:
            return D_ref
        if w == 1:
            return D_cond
    both = batched(D_cond, D_ref)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        scale = float64(w(sigma) if callable(w) else w)
        if scale.ndim == 0 and scale in (0, 1):
            return (D_cond if scale == 1 else D_ref)(x, sigma)
        cond, ref = both(x, sigma)
        return ref + right(scale, x) * (cond - ref)

    return guided


def interval(w: float, low: float, high: float) -> Callable[[Tensor], Tensor]:
    """The scale of limited-interval guidance: w where low < sigma <= high, else 1, the conditional model alone.

    Pass it to `cfg`; outside the interval a step costs one evaluation (Kynkaanniemi et al. 2024). sigma is 0-d or (B,).
    Raises ValueError unless 0 <= low < high.
    """
    if not 0 <= low < high:
        raise ValueError(f"low = {low:g} and high = {high:g}; expected noise levels with 0 <= low < high")

    def scale(sigma: Tensor) -> Tensor:
        sigma = float64(sigma)
        return torch.where((low < sigma) & (sigma <= high), float64(w), float64(1.0))

    return scale


def _of_sample(values: Tensor, x: Tensor) -> Tensor:
    """(B,) with axes to the right, to multiply x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def cfg_rescaled(
    D_cond: Denoiser,
    D_ref: Denoiser,
    w: float,
    phi: float = 0.7,
    c_skip: Callable[[Tensor], Tensor] | None = None,
) -> Denoiser:
    """CFG with the spread of the network's output brought back to the conditional's (Lin et al. 2024, Eq. 14 to 16).

    The paper scales what the *network* says: F' = k F_cfg, k = phi std(F_cond) / std(F_cfg) + 1 - phi, the deviation over the
    numbers of a sample. With D = c_skip x + c_out F this is
        D' = c_skip x + k (D_cfg - c_skip x),  k = phi std(D_cond - c_skip x) / std(D_cfg - c_skip x) + 1 - phi:
    c_out cancels, c_skip does not, so the method is another one for each prediction. c_skip(sigma) is 1 for eps, where the
    estimated noise is scaled; 1 / (1 + sigma^2) for v, the paper's; 0 for x0, where the picture itself is scaled. By default it
    is that of D_cond's own adapter. phi = 0 gives `cfg`, w = 1 gives D_cond. Raises ValueError without a c_skip and for phi
    outside [0, 1].
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi = {phi}; expected a share from 0 (plain guidance) to 1")
    if c_skip is None:
        if not isinstance(D_cond, NetworkDenoiser):
            raise ValueError(
                "c_skip is None and D_cond is no network's Denoiser; expected c_skip(sigma), for example torch.ones_like"
            )
        c_skip = lambda sigma: D_cond.coefficients(sigma)[0]
    if w == 1:
        return D_cond
    both = batched(D_cond, D_ref)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        cond, ref = both(x, sigma)
        kept = right(c_skip(float64(sigma)), x) * x
        said, wanted = ref + w * (cond - ref) - kept, cond - kept
        spread = said.flatten(1).std(1)
        k = torch.where(spread > 0, wanted.flatten(1).std(1) / spread, 1.0)
        return kept + _of_sample(phi * k + 1 - phi, x) * said

    return guided


def apg(D_cond: Denoiser, D_ref: Denoiser, w: float, eta: float = 0.0, radius: float = float("inf")) -> Denoiser:
    """Adaptive projected guidance without its momentum: D = D_cond + (w - 1) (orthogonal + eta parallel).

    Delta = D_cond - D_ref, cut to length `radius`, is split along D_cond: parallel = <Delta, D_cond> D_cond / |D_cond|^2, which
    makes the picture's contrast larger, and the rest, which changes what it shows (Sadat et al. 2025, Sec. 4). w = 1 gives
    D_cond; eta = 1 and radius = inf give `cfg`. Lengths and products are over a sample's numbers. The paper's momentum keeps
    a state from step to step, which a Denoiser that a step may call twice has not.
    """
    if w == 1:
        return D_cond
    both = batched(D_cond, D_ref)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        cond, ref = both(x, sigma)
        delta, along = (cond - ref).flatten(1), cond.flatten(1)
        delta = delta * (radius / delta.norm(dim=1, keepdim=True)).clamp_max(1)
        size = (along**2).sum(1, keepdim=True)
        parallel = torch.where(size > 0, (delta * along).sum(1, keepdim=True) / size, 0.0) * along
        return cond + (w - 1) * (delta - (1 - eta) * parallel).reshape(x.shape)

    return guided


def cfg_pp(D_ref: Denoiser, w: float) -> Step:
    """CFG++: DDIM that goes to the guided x0 and keeps the *reference's* noise (Chung et al. 2025, Algorithm 2).

    x' = x0 + sigma' eps,  x0 = D_ref + w (D - D_ref),  eps = (x - D_ref) / sigma
    The D of `sample(D, ...)` is the conditional one. w from 0, which is DDIM of D_ref, to 1. It is DDIM of `cfg` with the scale
    w / (1 - sigma' / sigma), which grows as the steps get shorter. Raises ValueError for another w.
    """
    if not 0 <= w <= 1:
        raise ValueError(f"w = {w}; expected a number from 0 to 1, CFG++'s scale, which is not that of cfg")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        cond, ref = batched(D, D_ref)(x, sigma)
        return ref + w * (cond - ref) + right(ratio(sigma, sigma_next), x) * (x - ref), None

    return step
