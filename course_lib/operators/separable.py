"""Linear maps that act on rows and columns apart: bicubic downsampling, and a blur with reflecting edges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from course_lib.operators.base import SVD, Shape
from course_lib.operators.bases import Copies, Order
from course_lib.operators.decomposed import Decomposed
from course_lib.operators.means import divided


class Separable(Decomposed):
    """y_c = L x_c R^T in each channel, (C, H, W) -> (C, H', W'), with L (H', H) and R (W', W).

    The SVD is that of the two small matrices: s = s_L s_R^T, V = V_L x V_R (Kronecker product).
    """

    def __init__(self, left: Tensor, right: Tensor, channels: int):
        self.left, self.right = Copies(left), Copies(right)
        self.shape = (channels, left.shape[1], right.shape[1])
        self.out = (channels, left.shape[0], right.shape[0])
        (self._Ul, self._sl, self._Vl), (self._Ur, self._sr, self._Vr) = _decompose(left), _decompose(right)

    def apply(self, x: Tensor) -> Tensor:
        return self.left.like(x) @ x @ self.right.like(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        y = self._checked(y, "y", self.out)
        return self.left.like(y).T @ y @ self.right.like(y)

    def svd(self) -> SVD:
        """Coordinates of pairs that both have a singular value come first."""
        channels, p, q = self.shape[0], len(self._sl), len(self._sr)
        first = torch.zeros(self.shape, dtype=torch.bool)
        first[:, :p, :q] = True
        order = Order(first)
        Ul, Ur, Vl, Vr = self._Ul, self._Ur, self._Vl, self._Vr
        return SVD(
            torch.outer(self._sl, self._sr).flatten().repeat(channels),
            Vt=lambda x: order.forward((Vl.like(x).T @ x @ Vr.like(x)).flatten(1)),
            V=lambda c: Vl.like(c) @ order.inverse(c).reshape(len(c), *self.shape) @ Vr.like(c).T,
            Ut=lambda y: (Ul.like(y).T @ y @ Ur.like(y)).flatten(1),
            U=lambda c: Ul.like(c) @ c.reshape(len(c), channels, p, q) @ Ur.like(c).T,
        )


class Bicubic(Separable):
    """Antialiased bicubic downsampling of each channel by `factor`, (C, H, W) -> (C, H / factor, W / factor).

    y_i = sum_j w((j - c_i) / factor) x_j / sum_j w, c_i = (i + 1/2) factor - 1/2, over the pixels j that exist, with the
    cubic w of Keys (1981, a = -1/2): what `torch.nn.functional.interpolate(antialias=True)` and Pillow compute.

    Raises ValueError where `factor` does not divide H and W.
    """

    def __init__(self, shape: Shape, factor: int):
        height, width = divided(shape, factor)
        self.factor = factor
        super().__init__(_downsampling(height, factor), _downsampling(width, factor), shape[0])


class ReflectedBlur(Separable):
    """A Gaussian blur of `std` pixels whose edges reflect (d c b a | a b c d | d c b a), (C, H, W) -> (C, H, W).

    Weights exp(-u^2 / 2 std^2), normalised, for |u| <= ceil(4 std). Raises ValueError where that reaches over the picture.
    """

    def __init__(self, shape: Shape, std: float):
        if not 0 < std < math.inf:
            raise ValueError(f"std = {std:g}; expected a width > 0 in pixels")
        self.std = std
        super().__init__(_reflected(shape[-2], std), _reflected(shape[-1], std), shape[0])


def _decompose(matrix: Tensor) -> tuple[Copies, Tensor, Copies]:
    """U (m, r), s (r,), V (n, n) complete."""
    U, s, Vt = torch.linalg.svd(matrix)
    return Copies(U[:, : len(s)]), s, Copies(Vt.T.contiguous())


def _downsampling(n: int, factor: int) -> Tensor:
    """The rows of bicubic downsampling, (n, n * factor)."""
    j = torch.arange(n * factor, dtype=torch.float64)
    centre = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) * factor - 0.5
    t = ((j - centre) / factor).abs()
    near, far = 1 - 2.5 * t**2 + 1.5 * t**3, 2 - 4 * t + 2.5 * t**2 - 0.5 * t**3
    w = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    return w / w.sum(1, keepdim=True)


def _reflected(n: int, std: float) -> Tensor:
    """The matrix (n, n) of the blur along one axis."""
    reach = math.ceil(4 * std)
    if reach > n:
        raise ValueError(f"std = {std:g} reaches over {reach} pixels; expected at most the picture's {n}")
    u = torch.arange(-reach, reach + 1)
    w = torch.exp(-(u.double() ** 2) / (2 * std**2))
    i = torch.arange(n)[:, None]
    j = (i + u) % (2 * n)
    j = torch.minimum(j, 2 * n - 1 - j)  # the picture and its mirror image, repeated
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, j, (w / w.sum()).expand(n, -1))
