"""Langevin dynamics at one noise level, and the predictor-corrector sampler that puts it after each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_lib.types import Denoiser, Noise, Step, float64, right


def langevin(
    D: Denoiser, x: Tensor, sigma: Tensor, noise: Noise, snr: float, alpha: Tensor | float = 1.0, shared: bool = False
) -> Tensor:
    """One step of Langevin dynamics on p_sigma, sized by a signal-to-noise ratio (Song et al. 2021, Algorithms 4 and 5).

    score = (D(x, sigma) - x) / sigma^2;  e = 2 alpha (snr |z| / |score|)^2;  x <- x + e score + sqrt(2 e) z
    |.| is the norm of each sample, so that a sample does not change with its batch; with `shared` it is the mean norm of the
    batch, as in the authors' code. In many dimensions both agree. In a few, the step of a sample then depends on its own
    score, is long near a peak, and does not keep p_sigma: share it. alpha = 1 is the VE form; the VP form,
    in x_t = sqrt(alpha_bar) x, has alpha = 1 - beta_i, and is the same step here: sqrt(alpha_bar) cancels.

    x (B, ...); sigma 0-d or (B,), and alpha a number or of the shape of sigma; samples with sigma = 0 stay as they are.
    snr is a pure number, 0.16 in the paper for VE on 32 x 32 pictures. Raises ValueError for snr <= 0, or a level per frame.
    """
    if not snr > 0:
        raise ValueError(f"snr = {snr}; expected a signal-to-noise ratio > 0, for example 0.16")
    if sigma.ndim > 1:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; expected one level a sample, whose norm sets the step")
    score = (D(x, sigma) - x) / right(torch.where(sigma > 0, sigma, 1.0) ** 2, x)
    z = noise(x)
    above, below = (v.flatten(1).norm(dim=1) for v in (z, score))  # (B,)
    ratio = above.mean() / below.mean() if shared else above / below
    e = torch.where(right(sigma, x) > 0, right(2 * snr**2 * float64(alpha), x) * right(ratio**2, x), 0.0)
    return torch.addcmul(torch.addcmul(x, e, score), (2 * e).sqrt(), z)


def predictor_corrector(
    predictor: Step,
    noise: Noise,
    snr: float,
    corrections: int = 1,
    alpha: Callable[[Tensor], Tensor] | float = 1.0,
    shared: bool = False,
) -> Step:
    """Predict x at the next level, then correct it there by Langevin steps (Song et al. 2021, Algorithms 1 to 3).

    x' = predictor(x, sigma, sigma');  `corrections` times x' <- langevin(x', sigma')
    `alpha` is the VP form's 1 - beta, as a number or as a function of sigma'; `shared` as in `langevin`. The step to
    sigma' = 0 is not corrected: there is no score. The result was edited, so the predictor's history is cleared: memory is
    None, and a multistep predictor takes its first-order step each time.
    """
    if corrections < 0:
        raise ValueError(f"corrections = {corrections}; expected a number of Langevin steps >= 0")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        x, memory = predictor(D, x, sigma, sigma_next, memory)
        if corrections == 0 or not bool((sigma_next > 0).any()):
            return x, memory
        for _ in range(corrections):
            x = langevin(D, x, sigma_next, noise, snr, alpha(sigma_next) if callable(alpha) else alpha, shared)
        return x, None

    return step
