"""A measurement of the picture, a Denoiser of its latent: DPS through the decoder, and a term that glues the two together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_lib.operators.base import LinearOperator
from course_lib.posterior.checks import check_problem, for_batch
from course_lib.posterior.gradient import Traced, check_size, vp_roots
from course_lib.types import Denoiser, Step, right


def psld(
    step: Step,
    A: LinearOperator,
    y: Tensor,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    zeta: float = 1.0,
    gamma: float = 0.1,
) -> Step:
    """Posterior sampling with latent diffusion: after each step a move down two gradients (PSLD; Rout et al. 2023, Alg. 2).

    z' <- z' - sqrt(1 + sigma^2) sqrt(1 + sigma'^2) grad_z (zeta |y - A(x)| + gamma |z0 - encode(x + A^+ (y - A x))|)
    z0 = D(z, sigma),  x = decode(z0)

    The first term is `dps` through the decoder; alone it leaves open which of the latents that decode to about the same picture
    is taken. The second, gluing, asks that the picture with the measurement put in encodes to z0 itself. Where the decoder leaves
    nothing open, as a linear one of full rank, gluing gives no more than a well chosen zeta. The paper writes
    A^T y + (I - A^T A) x, the same where A^T = A^+, as for a mask, and both gradients of squares; these are of norms, as its
    authors' code has them (zeta 1, gamma 0.1). gamma = 0 is `dps` with the operator A(decode(z)).

    encode  pictures (B, *A.shape) -> latents in D's own scale, deterministic: the mean of a VAE's posterior; decode  its inverse
    z       (B, ...), y (B or 1, *A.out). Both functions are differentiated, as is D. x was edited: memory is None.

    Raises ValueError for an operator that is not linear, a y that it cannot have measured, zeta or gamma < 0, and latents of the
    encoder in another shape than z; torch.OutOfMemoryError where the graph does not fit.
    """
    y = check_problem(A, y, 0.0, "psld")
    check_size("zeta", zeta)
    check_size("gamma", gamma)

    def guided(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        def distance(z0: Tensor) -> Tensor:
            picture = decode(z0)
            known = for_batch(y, picture)
            apart = zeta * _norm(known - A(picture))
            if gamma == 0:
                return apart
            glued = encode(A.project(picture, known))
            if glued.shape != z0.shape:
                raise ValueError(f"encode returned shape {tuple(glued.shape)}; expected that of the latents, {tuple(z0.shape)}")
            return apart + gamma * _norm(z0 - glued)

        traced = Traced(D)
        x_next, _ = step(traced, x, sigma, sigma_next, memory)
        return x_next - right(vp_roots(sigma, sigma_next), x) * traced.slope(distance), None

    return guided


def _norm(r: Tensor) -> Tensor:
    return torch.linalg.vector_norm(r.flatten(1), dim=1)
