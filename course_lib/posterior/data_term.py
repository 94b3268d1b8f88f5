"""The data term |y - A(x)|^2 / 2 of solvers that follow its gradient, for linear operators and differentiable ones."""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.operators.base import LinearOperator, Operator
from course_lib.posterior.checks import for_batch


def check_slope(A: Operator, y: Tensor, sigma_y: float, solver: str) -> Tensor:
    """Return y; raise ValueError for an operator without a gradient, a y that is not its measurement, or sigma_y < 0."""
    if not A.differentiable:
        raise ValueError(
            f"A = {type(A).__name__} has no gradient and {solver} follows that of |y - A(x)|^2; expected a differentiable "
            "operator, or use ddrm_jpeg for one that has `decode` (JPEG)"
        )
    if not 0 <= sigma_y < float("inf"):
        raise ValueError(f"sigma_y = {sigma_y}; expected the measurement's standard deviation, a finite number >= 0")
    return A.check_measurement(y)


def check_noisy(sigma_y: float, solver: str, instead: str) -> None:
    """Raise ValueError for sigma_y = 0, by which the solver divides."""
    if sigma_y == 0:
        raise ValueError(f"sigma_y = 0; {solver} divides by it: expected sigma_y > 0, or use {instead} for an exact y")


def towards(A: Operator, y: Tensor, x: Tensor) -> Tensor:
    """The descent direction of |y - A(x)|^2 / 2 in x: A^T (y - A x), or A'(x)^T (y - A(x)) by reverse differentiation.

    x (B, *shape), y (B or 1, *out); the shape of x. D is not differentiated.
    """
    y = for_batch(y, x)
    if isinstance(A, LinearOperator):
        return A.adjoint(y - A(x))
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((y - A(x)).square().sum() / 2, x)
    return -slope


def steepest(A: Operator) -> float:
    """|A|, the largest singular value; for a nonlinear operator 1, as of clipping or the magnitudes of a unitary transform."""
    return A.norm() if isinstance(A, LinearOperator) else 1.0
