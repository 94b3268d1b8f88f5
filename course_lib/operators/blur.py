"""Blurs: circular convolution, diagonal in the Fourier basis, and the kernels of lenses and of motion."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from course_lib.operators.base import SVD, Shape
from course_lib.operators.bases import RealFourier
from course_lib.operators.decomposed import Decomposed


class Blur(Decomposed):
    """y = k * x, each channel convolved with one kernel around the edges: Y(f) = K(f) X(f), (C, H, W) -> (C, H, W).

    kernel   (kh, kw), its centre at (kh // 2, kw // 2), such as `gaussian_kernel` and `motion_kernel` make

    Raises ValueError for a kernel that is no finite matrix or larger than the picture.
    """

    def __init__(self, kernel: Tensor, shape: Shape):
        self.shape = self.out = tuple(shape)
        self.kernel = check_kernel(kernel, self.shape)
        self.transfer = transfer(self.kernel.double(), self.shape)
        self._fourier = RealFourier(*self.shape[-2:])

    def _filter(self, x: Tensor, gain: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        return torch.fft.irfft2(spectrum * gain.to(spectrum), s=x.shape[-2:])

    def apply(self, x: Tensor) -> Tensor:
        return self._filter(x, self.transfer)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._filter(self._checked(y, "y", self.out), self.transfer.conj())

    def svd(self) -> SVD:
        """s = |K(f)| in real Fourier coordinates; U is V turned by the phase of K(f)."""
        c, n, fourier = self.shape[0], self.shape[-2] * self.shape[-1], self._fourier
        size = self.transfer.abs()
        phase = torch.where(size > 0, self.transfer / size, 1.0)

        def Ut(y: Tensor) -> Tensor:
            spectrum = torch.fft.rfft2(y, norm="ortho")
            return fourier.coordinates(spectrum * phase.conj().to(spectrum)).flatten(1)

        def U(z: Tensor) -> Tensor:
            spectrum = fourier.spectrum(z.reshape(len(z), c, n))
            return torch.fft.irfft2(spectrum * phase.to(spectrum), s=self.shape[-2:], norm="ortho")

        s = size.flatten()[fourier.frequency].repeat(c)
        return SVD(s, lambda x: fourier.forward(x).flatten(1), lambda z: fourier.inverse(z.reshape(len(z), c, n)), Ut, U)


def check_kernel(kernel: Tensor, shape: Shape) -> Tensor:
    """Return the kernel; raise ValueError where it is no finite matrix (kh, kw) that fits into a picture of `shape`."""
    if kernel.ndim != 2 or not bool(torch.isfinite(kernel).all()):
        raise ValueError(f"kernel has shape {tuple(kernel.shape)}; expected a matrix (kh, kw) of finite numbers")
    if kernel.shape[0] > shape[-2] or kernel.shape[1] > shape[-1]:
        raise ValueError(
            f"kernel has {kernel.shape[0]} x {kernel.shape[1]} pixels; expected at most the picture's {shape[-2]} x {shape[-1]}"
        )
    return kernel


def transfer(kernel: Tensor, shape: Shape) -> Tensor:
    """K(f) = the half spectrum (..., H, W // 2 + 1) of kernels (..., kh, kw) whose centres are moved to pixel (0, 0)."""
    (kh, kw), (height, width) = kernel.shape[-2:], shape[-2:]
    padded = torch.nn.functional.pad(kernel, (0, width - kw, 0, height - kh))
    return torch.fft.rfft2(padded.roll((-(kh // 2), -(kw // 2)), (-2, -1)))


def gaussian_kernel(std: float, size: int | None = None) -> Tensor:
    """k(u, v) ~ exp(-(u^2 + v^2) / 2 std^2) with sum 1, (size, size); std in pixels, size 2 ceil(3 std) + 1 unless given."""
    if not 0 < std < math.inf:
        raise ValueError(f"std = {std:g}; expected a width > 0 in pixels")
    size = size or 2 * math.ceil(3 * std) + 1
    u = torch.arange(size, dtype=torch.float64) - size // 2
    row = torch.exp(-(u**2) / (2 * std**2))
    return torch.outer(row, row) / row.sum() ** 2


def motion_kernel(length: float, angle: float) -> Tensor:
    """The blur of a straight motion over `length` pixels, `angle` degrees anticlockwise from the horizontal; (size, size), sum 1.

    The path is sampled eight times a pixel and each sample is shared among its four pixels (bilinear weights).
    """
    if not 0 <= length < math.inf:
        raise ValueError(f"length = {length:g}; expected a number of pixels >= 0")
    reach = math.ceil(length / 2)
    t = torch.linspace(-length / 2, length / 2, 8 * max(reach, 1) * 2 + 1, dtype=torch.float64)
    direction = math.radians(angle)
    u = torch.arange(-reach, reach + 1, dtype=torch.float64)
    row = (1 - (u + t[:, None] * math.sin(direction)).abs()).clamp_min(0)  # rows run downwards, so the sine changes sign
    column = (1 - (u - t[:, None] * math.cos(direction)).abs()).clamp_min(0)
    return row.T @ column / len(t)
