"""Score-based reconstruction of MRI and CT: before each step x is drawn towards the noised measurement."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from course_lib.operators.base import LinearOperator
from course_lib.posterior.checks import check_problem, check_share, drawn, for_batch
from course_lib.types import Denoiser, Noise, Step


def mixed_projection(step: Step, A: LinearOperator, y: Tensor, noise: Noise, lam: float = 1.0) -> Step:
    """Mix x with the noised measurement in the transform's domain before each step (Song, Shen, Xing and Ermon 2022).

    x <- T^-1 (lam L P^-1 y_t + (1 - lam) L T x + (1 - L) T x) = x + lam A^+ (y_t - A x),  y_t = y + sigma A z;  then `step`

    The paper writes A = P L T: a transform T (Fourier for MRI, Radon for CT), a mask L and the choice P of its entries; then
    A^+ = T^-1 L P^-1, and for any other A the pseudo-inverse stands in its place. lam = 0 leaves x alone, lam = 1 takes all
    of y; between them it allows for the measurement's noise. The result of the last step is not projected. memory is None:
    x was edited. y (B or 1, *out). Raises ValueError for lam outside [0, 1] and what `replacement` refuses.
    """
    check_share("lam", lam)
    y = check_problem(A, y, 0.0, "mixed_projection")

    def mixed(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        y_t = for_batch(y, x) + A(drawn(noise, x, sigma))
        x, _ = step(D, x + lam * A.pinv(y_t - A(x)), sigma, sigma_next)
        return x, None

    return mixed
