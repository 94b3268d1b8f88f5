"""Compressed sensing: m random measurements of n values, of a fast orthonormal transform or of a Gaussian matrix."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from course_lib.operators.base import SVD, Shape
from course_lib.operators.bases import Copies, Order, walsh_hadamard
from course_lib.operators.decomposed import Decomposed


class Hadamard(Decomposed):
    """y = S H D x, (C, H, W) -> (m,): random signs D, the Walsh-Hadamard transform H of each channel, m random rows S.

    Rows are orthonormal, so A^+ = A^T and every s is 1. Signs spread every picture over all coordinates, so that each
    measurement tells as much as the next (Do et al. 2012, structurally random matrices).

    Raises ValueError unless H * W is a power of two and 1 <= m <= C H W.
    """

    def __init__(self, shape: Shape, m: int, generator: torch.Generator | None = None):
        n = _count(shape, m)
        pixels = shape[-2] * shape[-1]
        if pixels & (pixels - 1):
            raise ValueError(f"shape = {tuple(shape)} has {pixels} pixels; expected a power of two, such as 32 x 32")
        self.shape, self.out = tuple(shape), (m,)
        signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
        self._signs = Copies(signs.double().reshape(self.shape))
        rows = torch.zeros(n, dtype=torch.bool)
        rows[torch.randperm(n, generator=generator)[:m]] = True
        self._rows = Order(rows)
        a = 2 ** ((pixels.bit_length() - 1) // 2)
        self._left, self._right = Copies(walsh_hadamard(a)), Copies(walsh_hadamard(pixels // a))

    def _transform(self, x: Tensor) -> Tensor:
        """H of each channel, its own inverse: H_ab = H_a x H_b (Kronecker product), so two small products do."""
        left, right = self._left.like(x), self._right.like(x)
        return (left @ x.reshape(*x.shape[:2], len(left), len(right)) @ right).flatten(1)

    def apply(self, x: Tensor) -> Tensor:
        return self._rows.select(self._transform(x * self._signs.like(x)))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._back(self._rows.embed(self._checked(y, "y", self.out)))

    def _back(self, z: Tensor) -> Tensor:
        return self._transform(z.reshape(len(z), *self.shape)).reshape(len(z), *self.shape) * self._signs.like(z)

    def pinv(self, y: Tensor) -> Tensor:
        return self.adjoint(y)

    def svd(self) -> SVD:
        """V = D H with the measured coordinates first; U = I."""
        return SVD(
            torch.ones(self._rows.r, dtype=torch.float64),
            Vt=lambda x: self._rows.forward(self._transform(x * self._signs.like(x))),
            V=lambda c: self._back(self._rows.inverse(c)),
            Ut=lambda y: y,
            U=lambda c: c,
        )


class GaussianCS(Decomposed):
    """y = A x of the flattened picture, (C, H, W) -> (m,), with independent entries N(0, 1 / m): E |A x|^2 = |x|^2.

    The SVD is computed once, when it is first needed, in O(n m^2). Raises ValueError unless 1 <= m <= C H W.
    """

    def __init__(self, shape: Shape, m: int, generator: torch.Generator | None = None):
        n = _count(shape, m)
        self.shape, self.out = tuple(shape), (m,)
        self.A = Copies(torch.randn(m, n, generator=generator, dtype=torch.float64) / math.sqrt(m))

    def apply(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.A.like(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        y = self._checked(y, "y", self.out)
        return (y @ self.A.like(y)).reshape(len(y), *self.shape)

    @functools.cached_property
    def _factors(self) -> tuple[Copies, Copies, Copies, Tensor, Copies]:
        """A^T = Q R by reflections, R = W diag(s) Z^T: then U = Z and V = Q (W and the identity); Q (n, n) is never formed."""
        reflections, scales = torch.geqrf(self.A.tensor.T)
        W, s, Zt = torch.linalg.svd(reflections[: self.out[0]].triu())
        return Copies(reflections), Copies(scales), Copies(W), s, Copies(Zt)

    def svd(self) -> SVD:
        m = self.out[0]
        reflections, scales, W, s, Zt = self._factors

        def Q(c: Tensor, transpose: bool) -> Tensor:
            return torch.ormqr(reflections.like(c), scales.like(c), c.T.contiguous(), transpose=transpose).T

        def Vt(x: Tensor) -> Tensor:
            c = Q(x.flatten(1), transpose=True)
            return torch.cat([c[:, :m] @ W.like(c), c[:, m:]], 1)

        def V(c: Tensor) -> Tensor:
            return Q(torch.cat([c[:, :m] @ W.like(c).T, c[:, m:]], 1), transpose=False).reshape(len(c), *self.shape)

        return SVD(s, Vt, V, lambda y: y @ Zt.like(y).T, lambda c: c @ Zt.like(c))


def _count(shape: Shape, m: int) -> int:
    n = math.prod(shape)
    if not 1 <= m <= n:
        raise ValueError(f"m = {m}; expected 1 to {n} measurements of {n} values")
    return n
