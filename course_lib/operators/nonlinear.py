"""Measurements that are not linear: magnitudes of a spectrum, clipped light, and a blur whose kernel is unknown."""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.operators.base import LinearOperator, Operator, Shape
from course_lib.operators.blur import Blur, check_kernel, transfer


class PhaseRetrieval(Operator):
    """y = |F P x|, (C, H, W) -> (C, s H, s W): P surrounds the picture with zeros, s = `oversampling`, F is orthonormal.

    x, -x, and any shift or half turn of x within the zeros have the same y; s >= 2 leaves hardly anything else open (Hayes
    1982). Where a coefficient is 0 the gradient is taken as 0.
    """

    def __init__(self, shape: Shape, oversampling: float = 2.0):
        if oversampling < 1:
            raise ValueError(f"oversampling = {oversampling:g}; expected a factor >= 1")
        self.shape = tuple(shape)
        self.out = (shape[0], round(oversampling * shape[1]), round(oversampling * shape[2]))

    def apply(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x, s=self.out[1:], norm="ortho").abs()


class HDR(Operator):
    """y = clip(factor * x, -1, 1): an exposure `factor` times too long, whose highlights and shadows are cut off."""

    def __init__(self, shape: Shape, factor: float = 2.0):
        if factor <= 0:
            raise ValueError(f"factor = {factor:g}; expected an exposure > 0")
        self.shape = self.out = tuple(shape)
        self.factor = factor

    def apply(self, x: Tensor) -> Tensor:
        return (self.factor * x).clamp(-1, 1)


class BlindBlur(Operator):
    """y = k * x with an unknown kernel: A(x, k) from pictures (B, C, H, W) and kernels (B, size, size), or one for all.

    The convolution runs around the edges, as in `Blur`. It is linear in each argument alone: `at(k)` is the linear operator
    of the picture, `of(x)` that of the kernel.
    """

    def __init__(self, shape: Shape, size: int):
        self.shape = self.out = tuple(shape)
        self.kernel_shape = (size, size)
        check_kernel(torch.zeros(self.kernel_shape), self.shape)

    def __call__(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self.apply(self._checked(x, "x", self.shape), kernel)

    def apply(self, x: Tensor, kernel: Tensor) -> Tensor:
        """k * x, differentiable in both."""
        if tuple(kernel.shape[-2:]) != self.kernel_shape or kernel.ndim > 3 or (kernel.ndim == 3 and len(kernel) != len(x)):
            raise ValueError(
                f"kernel has shape {tuple(kernel.shape)}; expected {self.kernel_shape}, or ({len(x)}, *{self.kernel_shape}), "
                "one for each picture"
            )
        gain = transfer(kernel, self.shape)
        return torch.fft.irfft2(torch.fft.rfft2(x) * (gain if gain.ndim == 2 else gain[:, None]), s=self.shape[1:])

    def at(self, kernel: Tensor) -> Blur:
        """The linear operator x -> k * x of one known kernel (size, size)."""
        return Blur(kernel, self.shape)

    def of(self, x: Tensor) -> LinearOperator:
        """The linear operator k -> k * x of known pictures (B, C, H, W), one kernel each."""
        return _OfKernel(self, self._checked(x, "x", self.shape))


class _OfKernel(LinearOperator):
    """k -> k * x: from kernels (B, size, size) to (B, C, H, W), row by row."""

    def __init__(self, blur: BlindBlur, x: Tensor):
        self.blur, self.x, self.shape, self.out = blur, x, blur.kernel_shape, blur.out

    def apply(self, x: Tensor) -> Tensor:
        return self.blur.apply(self.x.to(x.dtype), x if len(x) == len(self.x) else x[0])
