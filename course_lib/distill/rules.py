"""What pulls at a picture x0 = g(theta): the gradients of score distillation, each a rule over the same Denoisers.

A `Rule` is `rule(x0, sigma, noise) -> gradient with respect to x0`. It noises, x = x0 + sigma eps, asks its Denoisers, and never
differentiates through them unless it says so. In our coordinates eps_hat = (x - D(x, sigma)) / sigma, whatever the network
predicts, so that

    eps_hat - eps = (x0 - D(x, sigma)) / sigma.

Guidance is a Denoiser like any other, with the convention of `guidance.cfg`: w = 0 gives D_ref, w = 1 gives D_cond.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from course_lib.denoisers import batched
from course_lib.distill.levels import Weight, one
from course_lib.types import Denoiser, Noise, float64, right

Rule = Callable[[Tensor, Tensor, Noise], Tensor]
"""`rule(x0, sigma, noise)`: x0 (B, ...), sigma 0-d or (B,) and above 0; the result has the shape of x0."""


def point(x0: Tensor) -> Denoiser:
    """The Denoiser of a point mass: D(x, sigma) = x0, wherever x is. With it as the second score VSD is SDS."""
    return lambda x, sigma: x0


def distill_grad(D_real: Denoiser, D_fake: Denoiser, x0: Tensor, sigma: Tensor, noise: Noise, weight: Weight = one) -> Tensor:
    """w(sigma) (D_fake(x, sigma) - D_real(x, sigma)) / sigma at x = x0 + sigma eps: the one line that all rules share.

    It is w (eps_real - eps_fake), so for the densities p_real and p_fake at level sigma it is w sigma times the difference of
    their scores, grad log p_fake - grad log p_real: on average the gradient of w sigma KL(p_fake | p_real) with respect to x0.
    Where both Denoisers share a network they are one call.
    """
    x = x0 + right(sigma, x0) * noise(x0)
    real, fake = batched(D_real, D_fake)(x, sigma)
    return _scaled(weight, sigma, fake - real)


def sds(D: Denoiser, weight: Weight = one, baseline: bool = True, jacobian: bool = False) -> Rule:
    """Score distillation sampling: w(sigma) (eps_hat - eps) (Poole et al. 2023, Eq. 3).

    baseline  False drops - eps, which is 0 on average and so only changes the variance
    jacobian  True is the gradient of the denoising loss w/2 |eps_hat - eps|^2 itself, through the network (their Eq. 2), which
              SDS drops: w (d eps_hat / dx)^T (eps_hat - eps), where d eps_hat / dx = (I - dD/dx) / sigma

    Raises ValueError for both at once: the loss has its baseline.
    """
    if jacobian and not baseline:
        raise ValueError("baseline = False with jacobian = True; expected the baseline, which is part of the denoising loss")

    def rule(x0: Tensor, sigma: Tensor, noise: Noise) -> Tensor:
        if jacobian:
            return _through(D, x0, sigma, noise, weight)
        eps = noise(x0)
        x = x0 + right(sigma, x0) * eps
        return _scaled(weight, sigma, (x0 if baseline else x) - D(x, sigma))

    return rule


def _through(D: Denoiser, x0: Tensor, sigma: Tensor, noise: Noise, weight: Weight) -> Tensor:
    eps = noise(x0)
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_()
        residual = (leaf - D(leaf + right(sigma, x0) * eps, sigma)) / right(sigma, x0)
        loss = 0.5 * right(weight(float64(sigma)), x0) * residual**2
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return gradient


def sjc(D: Denoiser, n: int = 1, weight: Weight = one, perturb: bool = True) -> Rule:
    """Score Jacobian chaining: minus w sigma times the perturb-and-average score of x0 (Wang, Du et al. 2023, Sec. 4).

        PAAS(x0, sigma) = mean over n draws of (D(x0 + sigma eps, sigma) - x0) / sigma^2

    It is the score at level sigma of x0 *without* noise on it, in expectation; each draw is SDS with its baseline, so the factor
    sigma makes the two equal for n = 1. `perturb=False` asks D at x0 itself: for a network that is out of distribution, since
    what it was trained on at level sigma has noise of that level. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n = {n}; expected at least 1 draw of noise")

    def rule(x0: Tensor, sigma: Tensor, noise: Noise) -> Tensor:
        if not perturb:
            return _scaled(weight, sigma, x0 - D(x0, sigma))
        average = sum(D(x0 + right(sigma, x0) * noise(x0), sigma) for _ in range(n)) / n
        return _scaled(weight, sigma, x0 - average)

    return rule


def vsd(D_real: Denoiser, D_fake: Denoiser, weight: Weight = one) -> Rule:
    """Variational score distillation: w(sigma) (eps_real - eps_fake) (Wang, Lu et al. 2023, Sec. 3).

    D_fake is the Denoiser of the particles themselves: exact, `gaussians.Empirical(particles)`, or learnt, `SecondScore`.
    """
    return lambda x0, sigma, noise: distill_grad(D_real, D_fake, x0, sigma, noise, weight)


def nfsd(D_cond: Denoiser, D_ref: Denoiser, D_bad: Denoiser, w: float, split: float, weight: Weight = one) -> Rule:
    """Noise-free score distillation: w(sigma) (delta_D + w delta_C) (Katzir et al. 2024, Sec. 4).

        delta_C = eps_cond - eps_ref                        what the prompt asks for
        delta_D = eps_ref              where sigma < split  what leads to the domain of pictures: there eps_ref has little noise
        delta_D = eps_ref - eps_bad    where sigma >= split in it; above, a model of bad pictures takes the noise off

    D_bad is the Denoiser of pictures as they should not be (there by a negative prompt). There is no - eps: what SDS subtracts
    from eps_ref is not the noise that eps_ref contains. Raises ValueError for split < 0.
    """
    if split < 0:
        raise ValueError(f"split = {split}; expected a noise level of 0 or more")

    def rule(x0: Tensor, sigma: Tensor, noise: Noise) -> Tensor:
        x = x0 + right(sigma, x0) * noise(x0)
        cond, ref, bad = batched(D_cond, D_ref, D_bad)(x, sigma)
        low = right(float64(sigma) < split, x0).bool()
        return _scaled(weight, sigma, torch.where(low, x, bad) - ref + w * (ref - cond))

    return rule


def dds(D: Denoiser, D_source: Denoiser, source: Tensor, weight: Weight = one) -> Rule:
    """Delta denoising score, for editing: SDS of x0 less SDS of the picture it came from, at the same noise (Hertz et al. 2023).

        w(sigma) ((eps_hat(x; y) - eps) - (eps_hat(x_source; y_source) - eps))

    What SDS does wrong whatever the prompt, such as blurring, is in both terms and cancels. source has the shape of x0.
    """

    def rule(x0: Tensor, sigma: Tensor, noise: Noise) -> Tensor:
        if source.shape != x0.shape:
            raise ValueError(f"source has shape {tuple(source.shape)}; expected that of x0, {tuple(x0.shape)}")
        shift = right(sigma, x0) * noise(x0)
        return _scaled(weight, sigma, (x0 - D(x0 + shift, sigma)) - (source - D_source(source + shift, sigma)))

    return rule


def ism(D: Denoiser, D_ref: Denoiser, ratio: float = 0.8, steps: int = 4, low: float = 0.02, weight: Weight = one) -> Rule:
    """Interval score matching: w(sigma) (eps_hat(x_t; y) - eps_hat(x_s; ref)), x_s and x_t by DDIM inversion (Liang et al. 2024).

    x0 is carried up the probability flow of D_ref, from level `low` to s = ratio sigma in `steps` steps and to t = sigma in one
    more. There is no fresh noise, so the same x0 gets the same gradient, and the two levels are neighbours, so their difference
    is what the prompt adds to one step back. Raises ValueError unless 0 < ratio < 1, steps >= 1 and low > 0, and for a level
    sigma with ratio sigma <= low.
    """
    if not 0 < ratio < 1 or steps < 1 or not low > 0:
        raise ValueError(f"ratio = {ratio}, steps = {steps}, low = {low}; expected a ratio in (0, 1), at least 1 step, low > 0")

    def rule(x0: Tensor, sigma: Tensor, noise: Noise) -> Tensor:
        s = ratio * float64(sigma)
        if not bool((s > low).all()):  # nothing is to be carried up from a level above it
            raise ValueError(f"sigma = {float(s.min()) / ratio:.4g}; expected levels above low / ratio = {low / ratio:.4g}")
        levels = [low * (s / low) ** (k / steps) for k in range(steps + 1)]
        x = x0
        for now, then in zip([*levels[:-1], s], [*levels[1:], float64(sigma)], strict=True):
            eps_s = (x - D_ref(x, now)) / right(now, x)
            x = x + right(then - now, x) * eps_s
        eps_t = (x - D(x, sigma)) / right(sigma, x)
        return right(weight(float64(sigma)), x0) * (eps_t - eps_s)

    return rule


def _scaled(weight: Weight, sigma: Tensor, difference: Tensor) -> Tensor:
    """w(sigma) / sigma times a difference of clean pictures."""
    level = float64(sigma)
    return right(weight(level) / level, difference) * difference
