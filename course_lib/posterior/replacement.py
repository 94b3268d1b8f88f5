"""Solvers that overwrite what is known after each step of an unconditional sampler: ScoreSDE's replacement, RePaint, ILVR."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from course_lib.operators.base import LinearOperator
from course_lib.posterior.checks import check_problem, drawn, for_batch
from course_lib.types import Denoiser, Noise, Step, right


def replacement(step: Step, A: LinearOperator, y: Tensor, noise: Noise, sigma_y: float = 0.0) -> Step:
    """Overwrite the measured part after each step by the measurement at the same noise level (Song et al. 2021, App. I).

    x' <- x' + A^+ (y_t - A x'),  y_t = y + sqrt(sigma'^2 - sigma_y^2) A z,  z = noise(x')

    For a mask this is ScoreSDE's inpainting, for the grey average its colourisation. y (B or 1, *out). The paper takes
    sigma_y = 0; else y already is a sample at level sigma_y, in every measured coordinate where A A^T = I, and below that
    level x' is left as it is. x was edited, so the solver's history is cleared: memory is None. Its samples are not the
    posterior's: the rest of x is moved by D without a look at y, which it sees only at the next step.
    Raises ValueError for a nonlinear operator, a y that it cannot have measured, and sigma_y < 0.
    """
    y = check_problem(A, y, sigma_y, "replacement")

    def replaced(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        x, memory = step(D, x, sigma, sigma_next, memory)
        known = sigma_next >= sigma_y
        if not bool(known.any()):
            return x, memory
        z = drawn(noise, x, (sigma_next**2 - sigma_y**2).clamp_min(0).sqrt())
        return x + right(known, x) * A.pinv(for_batch(y, x) + A(z) - A(x)), None

    return replaced


def repaint(
    step: Step, A: LinearOperator, y: Tensor, noise: Noise, jump: int = 10, resamplings: int = 10, sigma_y: float = 0.0
) -> Step:
    """Replacement that goes back `jump` steps and down again, so that both parts agree (RePaint; Lugmayr et al. 2022, Alg. 1).

    after each `jump` steps from sigma to sigma', resamplings - 1 times:
    x <- x' + sqrt(sigma^2 - sigma'^2) z, then the same `jump` steps of `replacement` down to sigma'

    The grid stays monotone: one call of this step does the whole way back and down, through the grid's own levels, which
    `memory` collects. A stretch that ends at sigma' = 0, or below sigma_y, where x would only drift to the prior, is not
    repeated. Calls of D: `resamplings` times those of the grid, but for these stretches. resamplings = 1 is `replacement`.
    Best with a step that adds noise, as `ddpm`, which the paper takes.
    Raises ValueError for jump or resamplings < 1, and what `replacement` raises.
    """
    for name, value in (("jump", jump), ("resamplings", resamplings)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r}; expected a whole number >= 1")
    down = replacement(step, A, y, noise, sigma_y)

    def resampled(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        levels = [*(memory or []), sigma]
        x, _ = down(D, x, sigma, sigma_next)
        if len(levels) < jump or not bool(((sigma_next > 0) & (sigma_next >= sigma_y)).any()):
            return x, levels
        for _ in range(resamplings - 1):
            x = x + drawn(noise, x, (levels[0] ** 2 - sigma_next**2).sqrt())
            for high, low in pairwise([*levels, sigma_next]):
                x, _ = down(D, x, high, low)
        return x, None

    return resampled


def ilvr(step: Step, low_pass: LinearOperator, reference: Tensor, noise: Noise, until: float = 0.0) -> Step:
    """Take the low frequencies of a reference after each step, and keep the rest (ILVR; Choi et al. 2021).

    x' <- x' + phi(y_t) - phi(x'),  y_t = reference + sigma' z,  phi = A^+ A,  while sigma' >= until

    `low_pass` is A, for example a block average: phi is then a projection, phi phi = phi, so that phi(x') is phi(y_t) exactly
    (the paper's phi, a resize down and up, is one only nearly). reference (B or 1, *shape). A larger factor or a larger
    `until` leaves more free. Where x is edited, memory is None. Raises ValueError for a nonlinear operator, a reference of
    another shape, and until < 0.
    """
    if tuple(reference.shape[1:]) != tuple(low_pass.shape):
        raise ValueError(f"reference has shape {tuple(reference.shape)}; expected (B, {', '.join(map(str, low_pass.shape))})")
    check_problem(low_pass, low_pass(reference), 0.0, "ilvr")
    if not until >= 0:
        raise ValueError(f"until = {until}; expected a noise level >= 0, below which nothing is conditioned")

    def refined(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        x, memory = step(D, x, sigma, sigma_next, memory)
        held = sigma_next >= until
        if not bool(held.any()):
            return x, memory
        y_t = for_batch(reference, x, "reference") + drawn(noise, x, sigma_next)
        return x + right(held, x) * low_pass.pinv(low_pass(y_t - x)), None

    return refined
