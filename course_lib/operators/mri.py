"""Magnetic resonance imaging: undersampled Fourier coefficients of a real picture, seen by one coil or by several."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from course_lib.operators.base import SVD, LinearOperator, Shape
from course_lib.operators.bases import Copies, Order, RealFourier
from course_lib.operators.decomposed import Decomposed


class MRI(Decomposed):
    """y = m * F x, real (C, H, W) -> real and imaginary parts (C, 2, H, W), 0 at frequencies that were not measured.

    F      the orthonormal 2-d Fourier transform with frequency 0 at (H // 2, W // 2)
    mask   bool (H, W), True where a frequency is measured, such as `cartesian_mask` makes

    Frequencies f and -f of a real picture are conjugate: a pair of which both are measured has s = 1, one of which one is
    measured has s = 1 / sqrt(2). Raises ValueError for a mask that is not bool, of another size, or empty.
    """

    def __init__(self, shape: Shape, mask: Tensor):
        self.shape = tuple(shape)
        self.out = (shape[0], 2, *shape[1:])
        self.mask = _check_mask(mask, self.shape)
        self.observed = self.mask.expand(self.out)
        self._fourier = RealFourier(*shape[1:])
        unshifted = torch.fft.ifftshift(self.mask)
        mirror = unshifted.flip(0, 1).roll((1, 1), (0, 1))
        square = (unshifted.double() + mirror.double())[:, : shape[-1] // 2 + 1] / 2
        self._square = square.flatten()[self._fourier.frequency].repeat(shape[0])
        self._order = Order(self._square > 0)

    def apply(self, x: Tensor) -> Tensor:
        return _to_frequencies(x, self.mask)

    def adjoint(self, y: Tensor) -> Tensor:
        return _from_frequencies(self._checked(y, "y", self.out), self.mask).real

    def svd(self) -> SVD:
        """V holds real Fourier coordinates, in which A^T A is diagonal; U = A V / s."""
        order, fourier, (c, h, w) = self._order, self._fourier, self.shape
        s = order.select(self._square[None])[0].sqrt()

        def V(z: Tensor) -> Tensor:
            return fourier.inverse(order.inverse(z).reshape(len(z), c, h * w))

        def Ut(y: Tensor) -> Tensor:
            return order.select(fourier.forward(self.adjoint(y)).flatten(1)) / s.to(y)

        def U(z: Tensor) -> Tensor:
            return self.apply(fourier.inverse(order.embed(z / s.to(z)).reshape(len(z), c, h * w)))

        return SVD(s, lambda x: order.forward(fourier.forward(x).flatten(1)), V, Ut, U)


class CoilMRI(LinearOperator):
    """y_k = m * F (S_k x) for coils k, real (C, H, W) -> (C, K, 2, H, W); F and `mask` as in `MRI`.

    coils   complex sensitivities S (K, H, W), such as `coil_maps` makes; the norm is at most 1 where sum_k |S_k|^2 <= 1

    The inverse is iterative: A^T A is diagonal in no known basis (SENSE, Pruessmann et al. 1999). Raises ValueError for maps
    or a mask of another size.
    """

    def __init__(self, shape: Shape, mask: Tensor, coils: Tensor):
        if coils.ndim != 3 or tuple(coils.shape[1:]) != tuple(shape[1:]) or not coils.is_complex():
            raise ValueError(
                f"coils has shape {tuple(coils.shape)} and dtype {coils.dtype}; expected complex (K, {shape[1]}, {shape[2]})"
            )
        self.shape = tuple(shape)
        self.out = (shape[0], len(coils), 2, *shape[1:])
        self.mask, self.coils = _check_mask(mask, self.shape), coils
        self.observed = self.mask.expand(self.out)
        self._maps = Copies(torch.view_as_real(coils))

    def _sensitivities(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(self._maps.like(x))

    def apply(self, x: Tensor) -> Tensor:
        return _to_frequencies(x[:, :, None] * self._sensitivities(x), self.mask)

    def adjoint(self, y: Tensor) -> Tensor:
        pictures = _from_frequencies(self._checked(y, "y", self.out), self.mask)
        return (pictures * self._sensitivities(y).conj()).real.sum(2)


def cartesian_mask(height: int, width: int, acceleration: float, generator: torch.Generator | None = None) -> Tensor:
    """Whole columns of frequencies, bool (height, width): round(width / acceleration) of them, 1 <= acceleration <= width.

    A third of these, at least one, lie at the centre, where pictures have most of their energy; the others are drawn.
    """
    if not 1 <= acceleration <= width:
        raise ValueError(f"acceleration = {acceleration:g}; expected a number from 1 to the width, {width}")
    count = round(width / acceleration)
    centre = max(1, count // 3)
    columns = torch.zeros(width, dtype=torch.bool)
    columns[width // 2 - centre // 2 : width // 2 - centre // 2 + centre] = True
    others = (~columns).nonzero()[:, 0]
    columns[others[torch.randperm(len(others), generator=generator)[: count - centre]]] = True
    return columns.expand(height, width).clone()


def coil_maps(count: int, height: int, width: int) -> Tensor:
    """Smooth sensitivities of coils around the picture, complex (count, height, width) with sum_k |S_k|^2 = 1 in each pixel.

    Coil k stands at the angle 2 pi k / count on a circle around the picture; its sensitivity is a Gaussian of the distance,
    as wide as half the picture, and its phase turns by a quarter from side to side.
    """
    if count < 1:
        raise ValueError(f"count = {count}; expected at least one coil")
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64)[:, None, None] / count
    row = (torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2) / (height / 2)
    column = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2) / (width / 2)
    along = row * angle.sin() + column * angle.cos()
    square = (row - 1.2 * angle.sin()) ** 2 + (column - 1.2 * angle.cos()) ** 2
    maps = torch.polar(torch.exp(-square / 2), math.pi / 4 * along + angle)
    return maps / maps.abs().square().sum(0).sqrt()


def _to_frequencies(x: Tensor, mask: Tensor) -> Tensor:
    """Masked, centred spectra of real or complex pictures (..., H, W), as real numbers (..., 2, H, W)."""
    spectrum = torch.fft.fftshift(torch.fft.fft2(x, norm="ortho"), dim=(-2, -1))
    return torch.view_as_real(spectrum).movedim(-1, -3) * mask.to(x.device)


def _from_frequencies(y: Tensor, mask: Tensor) -> Tensor:
    """The complex adjoint of `_to_frequencies`, (..., 2, H, W) -> (..., H, W)."""
    spectrum = torch.view_as_complex((y * mask.to(y.device)).movedim(-3, -1).contiguous())
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)), norm="ortho")


def _check_mask(mask: Tensor, shape: Shape) -> Tensor:
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape[1:]):
        raise ValueError(f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; expected bool ({shape[1]}, {shape[2]})")
    if not bool(mask.any()):
        raise ValueError("mask is False everywhere; expected at least one measured frequency")
    return mask
