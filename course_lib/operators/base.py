"""What an operator is, and what is derived of a linear one: adjoint, norm, solution, pseudo-inverse. Closed forms override."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.types import right

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SVD:
    """A = U diag(s) V^T as functions: `s` (r,) >= 0 holds the singular values, of n coordinates the others have none.

    Vt   x (B, *shape) -> (B, n), coordinates in an orthonormal basis; the first r belong to `s`
    V    its inverse and transpose, (B, n) -> (B, *shape)
    Ut   y (B, *out) -> (B, r)
    U    its transpose, (B, r) -> (B, *out)
    """

    s: Tensor
    Vt: Callable[[Tensor], Tensor]
    V: Callable[[Tensor], Tensor]
    Ut: Callable[[Tensor], Tensor]
    U: Callable[[Tensor], Tensor]


class Operator:
    """y = A(x), from x (B, *shape) to (B, *out), differentiable unless `differentiable` says otherwise.

    A subclass sets `shape` and `out` and writes `apply`. Calling it raises ValueError for pictures of another size.
    `observed`, bool and of the shape `out`, says where a measurement that is shaped like a picture holds a value; elsewhere
    it is 0. None where every value is measured.
    """

    shape: Shape
    out: Shape
    differentiable = True
    observed: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """A(x) of an x whose shape has been checked."""
        raise NotImplementedError(f"{type(self).__name__} must define apply(x)")

    def __call__(self, x: Tensor) -> Tensor:
        return self.apply(self._checked(x, "x", self.shape))

    def check_measurement(self, y: Tensor) -> Tensor:
        """Return y; raise ValueError where it cannot be a measurement of this operator."""
        y = self._checked(y, "y", self.out)
        if not bool(torch.isfinite(torch.view_as_real(y) if y.is_complex() else y).all()):
            raise ValueError("y has a value that is not finite; expected a measurement of finite numbers")
        if self.observed is not None and bool((y * ~self.observed.to(y.device)).any()):
            raise ValueError(
                f"y has a value where {type(self).__name__} observes nothing; expected 0 there, as `measure` gives it"
            )
        return y

    def _checked(self, value: Tensor, name: str, shape: Shape) -> Tensor:
        if tuple(value.shape[1:]) != tuple(shape):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected (B, {', '.join(map(str, shape))}) for {type(self).__name__}"
            )
        return value


class LinearOperator(Operator):
    """A linear A, with an adjoint, a norm, a regularised solution and a pseudo-inverse that are derived from `apply` alone.

    A subclass with closed forms overrides them, and returns an `SVD` where it has one.
    """

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, (B, *out) -> (B, *shape), by reverse differentiation of `apply`: <A x, y> = <x, A^T y>."""
        y = self._checked(y, "y", self.out)
        with torch.enable_grad():
            x = torch.zeros((len(y), *self.shape), dtype=y.dtype, device=y.device, requires_grad=True)
            (back,) = torch.autograd.grad(self.apply(x), x, y, create_graph=y.requires_grad)
        return back

    def norm(self, steps: int = 100, generator: torch.Generator | None = None) -> float:
        """The largest singular value, by power iteration on A^T A."""
        v = torch.randn((1, *self.shape), generator=generator or torch.Generator().manual_seed(0), dtype=torch.float64)
        for _ in range(steps):
            v = self.adjoint(self.apply(v))
            size = v.norm()
            if size == 0:
                return 0.0
            v = v / size
        return float(self.apply(v).norm())

    def solve(self, b: Tensor, ridge: Tensor | float, steps: int = 200, tolerance: float = 1e-6) -> Tensor:
        """(A^T A + ridge I)^-1 b for b (B, *shape), by conjugate gradients; stops when |residual| <= tolerance |b| in each row.

        ridge > 0, a number or (B,). With ridge = 0 and b in the range of A^T it is the solution of least norm (Hestenes and
        Stiefel 1952).
        """
        ridge = torch.as_tensor(ridge, dtype=b.dtype, device=b.device)

        def dot(a: Tensor, c: Tensor) -> Tensor:
            return (a * c).flatten(1).sum(1)

        x, r = torch.zeros_like(b), b
        p, rr = r, dot(r, r)
        goal = tolerance**2 * rr
        for _ in range(steps):
            if bool((rr <= goal).all()):
                break
            q = self.adjoint(self.apply(p)) + right(ridge, p) * p
            going = rr > goal  # a row that has converged stays as it is
            step = torch.where(going, rr / dot(p, q).clamp_min(torch.finfo(b.dtype).tiny), 0.0)
            x, r = x + right(step, x) * p, r - right(step, x) * q
            rr_next = torch.where(going, dot(r, r), rr)
            p = torch.where(right(going, p) > 0, r + right(rr_next / rr.clamp_min(torch.finfo(b.dtype).tiny), p) * p, p)
            rr = rr_next
        return x

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y, (B, *out) -> (B, *shape): of all x that come closest to y, the one of least norm."""
        return self.solve(self.adjoint(y), 0.0)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """x + A^+ (y - A x): the nearest picture with this measurement, where there is one."""
        return x + self.pinv(y - self(x))

    def svd(self) -> SVD:
        """The singular value decomposition; ValueError for an operator that has none in closed form."""
        raise ValueError(
            f"{type(self).__name__} has no singular value decomposition here; expected an operator that has, such as Mask"
        )


class Matrix(LinearOperator):
    """y = A x of flat vectors, A (m, n): what all the others are, and small enough to be exact."""

    def __init__(self, A: Tensor):
        if A.ndim != 2:
            raise ValueError(f"A has shape {tuple(A.shape)}; expected a matrix (m, n)")
        self.A, self.shape, self.out = A, (A.shape[1],), (A.shape[0],)

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.A.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return self._checked(y, "y", self.out) @ self.A.to(y)

    def svd(self) -> SVD:
        U, s, Vt = torch.linalg.svd(self.A)
        r = min(self.A.shape)
        return SVD(
            s, lambda x: x @ Vt.to(x).T, lambda c: c @ Vt.to(c), lambda y: y @ U[:, :r].to(y), lambda c: c @ U[:, :r].to(c).T
        )

    def pinv(self, y: Tensor) -> Tensor:
        return self._checked(y, "y", self.out) @ torch.linalg.pinv(self.A).to(y).T
