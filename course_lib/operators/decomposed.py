"""What follows from a singular value decomposition: norm, regularised solution and pseudo-inverse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from course_lib.operators.base import LinearOperator


class Decomposed(LinearOperator):
    """A linear A = U diag(s) V^T whose SVD is known: a subclass writes `apply` and `svd`, and an adjoint where it has one."""

    def norm(self, steps: int = 100, generator: torch.Generator | None = None) -> float:
        """The largest singular value; `steps` and `generator` are those of the power iteration that is not needed here."""
        return float(self.svd().s.max())

    def solve(self, b: Tensor, ridge: Tensor | float, steps: int = 200, tolerance: float = 1e-6) -> Tensor:
        """(A^T A + ridge I)^-1 b = V (s^2 + ridge)^-1 V^T b for b (B, *shape) and ridge >= 0, a number or (B,); no iteration.

        With ridge = 0 it is the solution of least norm: coordinates whose s is zero to rounding get 0.
        """
        svd = self.svd()
        b = self._checked(b, "b", self.shape)
        c = svd.Vt(b)
        s = c.new_zeros(c.shape[1])
        s[: len(svd.s)] = svd.s.to(c)
        ridge = torch.as_tensor(ridge, dtype=c.dtype, device=c.device).reshape(-1, 1)
        gain = torch.where((s > _zero(s)) | (ridge > 0), 1 / (s**2 + ridge), 0.0)
        return svd.V(gain * c)

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y = V s^-1 U^T y, (B, *out) -> (B, *shape); a singular value that is zero to rounding has no inverse.

        Zero to rounding is s <= r eps max(s) with r values of s and the precision eps of y.
        """
        svd = self.svd()
        c = svd.Ut(self._checked(y, "y", self.out))
        s = svd.s.to(c)
        gain = torch.where(s > _zero(s), 1 / s, 0.0)
        return svd.V(torch.nn.functional.pad(gain * c, (0, math.prod(self.shape) - len(s))))


def _zero(s: Tensor) -> float:
    return len(s) * torch.finfo(s.dtype).eps * float(s.max())
