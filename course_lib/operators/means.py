"""Means of groups of values: block averages (super-resolution) and the grey of the colours (colourisation)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from course_lib.operators.base import SVD, Shape
from course_lib.operators.bases import reflect
from course_lib.operators.decomposed import Decomposed


class Means(Decomposed):
    """y_g = mean of the k values of group g: s = 1 / sqrt(k) for all, A^+ repeats, and A^+ A is an idempotent low-pass.

    A subclass says which values form a group: `_group` (B, *shape) -> (B, groups, k), and back.
    """

    k: int

    def _group(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _group(x)")

    def _ungroup(self, z: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _ungroup(z)")

    def apply(self, x: Tensor) -> Tensor:
        return self._group(x).mean(-1).reshape(len(x), *self.out)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.pinv(y) / self.k

    def pinv(self, y: Tensor) -> Tensor:
        y = self._checked(y, "y", self.out)
        return self._ungroup(y.flatten(1)[..., None].expand(-1, -1, self.k))

    def svd(self) -> SVD:
        """In each group a reflection whose first vector has equal entries; these come first."""
        groups = math.prod(self.out)

        def Vt(x: Tensor) -> Tensor:
            z = reflect(self._group(x))
            return torch.cat([z[..., 0], z[..., 1:].flatten(1)], 1)

        def V(c: Tensor) -> Tensor:
            rest = c[:, groups:].reshape(len(c), groups, self.k - 1)
            return self._ungroup(reflect(torch.cat([c[:, :groups, None], rest], 2)))

        s = torch.full((groups,), self.k**-0.5, dtype=torch.float64)
        return SVD(s, Vt, V, lambda y: y.flatten(1), lambda c: c.reshape(len(c), *self.out))


class BlockAverage(Means):
    """y = the means of the factor x factor blocks of each channel, (C, H, W) -> (C, H / factor, W / factor).

    Raises ValueError where `factor` does not divide H and W.
    """

    def __init__(self, shape: Shape, factor: int):
        self.shape, self.factor, self.k = tuple(shape), factor, factor**2
        self.out = (*self.shape[:-2], *divided(self.shape, factor))

    def _group(self, x: Tensor) -> Tensor:
        f, (c, h, w) = self.factor, self.out
        return x.reshape(len(x), c, h, f, w, f).transpose(3, 4).reshape(len(x), c * h * w, f * f)

    def _ungroup(self, z: Tensor) -> Tensor:
        f, (c, h, w) = self.factor, self.out
        return z.reshape(len(z), c, h, w, f, f).transpose(3, 4).reshape(len(z), *self.shape)


class Grey(Means):
    """y = the mean of the channels, (C, H, W) -> (1, H, W); to invert it is colourisation."""

    def __init__(self, shape: Shape):
        self.shape, self.k = tuple(shape), shape[0]
        if self.k < 2:
            raise ValueError(f"shape = {self.shape} has {self.k} channel; expected a picture in colours, such as (3, H, W)")
        self.out = (1, *self.shape[1:])

    def _group(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def _ungroup(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2).reshape(len(z), *self.shape)


def divided(shape: Shape, factor: int) -> tuple[int, int]:
    """(H / factor, W / factor); raise ValueError where `factor` is no whole number > 0 or does not divide both."""
    height, width = shape[-2:]
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor = {factor}; expected a whole number >= 1")
    if height % factor or width % factor:
        raise ValueError(f"factor = {factor} does not divide {height} x {width} pixels; expected a divisor of both")
    return height // factor, width // factor
