"""Inpainting: some pixels are observed, the others are not."""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.operators.base import SVD, Shape
from course_lib.operators.bases import Order
from course_lib.operators.decomposed import Decomposed

SIDES = ("left", "right", "top", "bottom")


class Mask(Decomposed):
    """y = m * x: a picture (C, H, W) with 0 where nothing was observed; A = A^T = A^+ and every s is 1.

    mask   bool, True where a pixel is observed: of the picture's shape, or (1, H, W) for all channels of `shape`

    Raises ValueError for a mask that is not bool, of another shape, or with nothing observed.
    """

    def __init__(self, mask: Tensor, shape: Shape | None = None):
        shape = tuple(shape or mask.shape)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask has dtype {mask.dtype}; expected torch.bool, True where a pixel is observed")
        if mask.ndim != len(shape) or any(m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {shape}, or 1 for its number of channels")
        if not bool(mask.any()):
            raise ValueError("mask is False everywhere; expected at least one observed pixel")
        self.shape = self.out = shape
        self.observed = mask.expand(shape).contiguous()
        self._order = Order(self.observed)

    @classmethod
    def box(cls, shape: Shape, size: int | tuple[int, int], corner: tuple[int, int] | None = None) -> Mask:
        """Hide a box of `size` pixels (height, width), its top left pixel at `corner` (row, column), else in the middle."""
        height, width = (size, size) if isinstance(size, int) else size
        row, column = corner or ((shape[-2] - height) // 2, (shape[-1] - width) // 2)
        if not (0 <= row < row + height <= shape[-2] and 0 <= column < column + width <= shape[-1]):
            raise ValueError(
                f"size = {size} with its corner at ({row}, {column}); expected a box inside the {shape[-2]} x {shape[-1]} pixels"
            )
        mask = torch.ones(shape, dtype=torch.bool)
        mask[..., row : row + height, column : column + width] = False
        return cls(mask)

    @classmethod
    def half(cls, shape: Shape, side: str) -> Mask:
        """Hide the half of the picture on this side: left, right, top or bottom."""
        if side not in SIDES:
            raise ValueError(f"side = {side!r}; expected one of {', '.join(SIDES)}")
        mask = torch.ones(shape, dtype=torch.bool)
        axis = -1 if side in ("left", "right") else -2
        half = shape[axis] // 2
        mask.narrow(axis, 0 if side in ("left", "top") else shape[axis] - half, half).fill_(False)
        return cls(mask)

    @classmethod
    def random(cls, shape: Shape, share: float, generator: torch.Generator | None = None) -> Mask:
        """Observe this share of the pixels, drawn without replacement and the same in all channels; 0 < share <= 1."""
        n = shape[-2] * shape[-1]
        if not (0 < share <= 1 and round(share * n) > 0):
            raise ValueError(f"share = {share:g}; expected a share of the {n} pixels to observe, at least one, at most 1")
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.randperm(n, generator=generator)[: round(share * n)]] = True
        return cls(mask.reshape(1, *shape[-2:]), shape)

    def apply(self, x: Tensor) -> Tensor:
        return x * self.observed.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._checked(y, "y", self.out) * self.observed.to(y)

    def pinv(self, y: Tensor) -> Tensor:
        return self.adjoint(y)

    def svd(self) -> SVD:
        """A permutation: the observed values first."""
        order, shape = self._order, self.shape
        return SVD(
            torch.ones(order.r, dtype=torch.float64),
            Vt=lambda x: order.forward(x.flatten(1)),
            V=lambda c: order.inverse(c).reshape(len(c), *shape),
            Ut=lambda y: order.select(y.flatten(1)),
            U=lambda c: order.embed(c).reshape(len(c), *shape),
        )
