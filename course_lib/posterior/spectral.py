"""A linear measurement in the coordinates of the operator's SVD, where it falls apart into single numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.integrals import over
from course_lib.operators.base import LinearOperator
from course_lib.posterior.checks import check_problem, for_batch
from course_lib.types import right


class Spectrum:
    """y = A x0 + sigma_y n as y_i / s_i = x0_i + (sigma_y / s_i) n_i for s_i > 0; the other coordinates are not measured.

    to, back  x (B, *shape) <-> coordinates (B, n), orthonormal
    s (n,)       singular values, 0 where there is none; those under n times the precision of the largest count as 0
    y_bar (B or 1, n)  y_i / s_i, 0 where s_i = 0
    spread (n,)  sigma_y / s_i, the measurement's own noise in each coordinate; infinite where s_i = 0

    Raises ValueError for an operator without an SVD, and for what `check_problem` refuses.
    """

    def __init__(self, A: LinearOperator, y: Tensor, sigma_y: float, solver: str):
        y = check_problem(A, y, sigma_y, solver)
        svd = A.svd()
        self.to, self.back = svd.Vt, svd.V
        coefficients = svd.Ut(y)
        n = int(torch.Size(A.shape).numel())
        s = svd.s.to(coefficients)
        s = torch.where(s > n * torch.finfo(s.dtype).eps * s.max(), s, 0.0)
        self.s = torch.cat([s, s.new_zeros(n - len(s))])
        padded = torch.cat([coefficients, coefficients.new_zeros(len(y), n - len(s))], 1)
        self.y_bar = over(padded, self.s)
        self.spread = torch.where(self.s > 0, sigma_y / self.s, torch.inf)

    def at(self, x: Tensor, *levels: Tensor) -> tuple[Tensor, ...]:
        """The coordinates of x, then y_bar, s and spread in its type, then each level so that it multiplies them."""
        c = self.to(x)
        return c, for_batch(self.y_bar, c), self.s.to(c), self.spread.to(c), *(right(level, c) for level in levels)
