"""Computed tomography: the parallel-beam Radon transform as a sparse matrix, and filtered back-projection."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from course_lib.operators.base import LinearOperator, Shape
from course_lib.operators.bases import Copies


class CT(LinearOperator):
    """y(angle, t) = the line integrals of each channel, (C, N, N) -> (C, angles, N), in units of value times pixel.

    The picture is turned by the angle about pixel (N // 2, N // 2), sampled bilinearly with zeros around, and its columns are
    summed: the geometry of scikit-image's `radon(circle=True)`. Pixels outside the inscribed circle leave the detector at
    some angles. The matrix is exact and sparse, 4 values per pixel and angle, so the adjoint is exact too.

    angles   degrees, or a number of angles, equally spaced from 0 to 180

    Raises ValueError for pictures that are not square and for no angles.
    """

    def __init__(self, shape: Shape, angles: int | Sequence[float] | Tensor):
        if len(shape) != 3 or shape[-1] != shape[-2]:
            raise ValueError(f"shape = {tuple(shape)}; expected square pictures (C, N, N)")
        if isinstance(angles, int):
            angles = torch.arange(angles, dtype=torch.float64) * (180 / max(angles, 1))
        self.angles = torch.as_tensor(angles, dtype=torch.float64)
        if self.angles.ndim != 1 or len(self.angles) == 0 or not bool(torch.isfinite(self.angles).all()):
            raise ValueError(f"angles = {angles}; expected at least one finite angle in degrees, or their number")
        self.shape, self.out = tuple(shape), (shape[0], len(self.angles), shape[-1])
        rows, columns, values = _radon(shape[-1], self.angles)
        m, n = math.prod(self.out[1:]), shape[-1] ** 2
        self._matrix, self._transposed = _sparse(rows, columns, values, (m, n)), _sparse(columns, rows, values, (n, m))

    def _multiply(self, forth: Copies, back: Copies, x: Tensor, shape: Shape) -> Tensor:
        columns = x.reshape(-1, math.prod(x.shape[2:])).T.contiguous()  # (pixels, B * C)
        return _Product.apply(columns, forth, back).T.reshape(len(x), *shape)

    def apply(self, x: Tensor) -> Tensor:
        return self._multiply(self._matrix, self._transposed, x, self.out)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._multiply(self._transposed, self._matrix, self._checked(y, "y", self.out), self.shape)

    def fbp(self, y: Tensor) -> Tensor:
        """Filtered back-projection, (B, C, angles, N) -> (B, C, N, N): x(p) = pi / (2 angles) sum_a (h * y)(a, t_a(p)).

        h is the ramp filter |f| sampled in space: h(0) = 1/2, h(odd n) = -2 / (pi n)^2, 0 else (Kak and Slaney 1988, ch. 3);
        t_a(p) is where pixel p falls on the detector, between two of its values. It is 0 outside the circle and inverts A as
        the number of equally spaced angles grows: scikit-image's `iradon`.
        """
        y, n = self._checked(y, "y", self.out), self.shape[-1]
        size = 2 ** math.ceil(math.log2(2 * n))  # padded, so that the circular convolution wraps around nothing
        place = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
        h = torch.where(place % 2 == 1, -2 / (math.pi * place) ** 2, 0.0)
        h[0] = 0.5
        filtered = torch.fft.irfft(torch.fft.rfft(y, size) * torch.fft.rfft(h).real.to(y), size)[..., : n + 1]
        columns = filtered.flatten(0, 1).flatten(1).T
        picture = self._back_projection.like(y) @ columns * (math.pi / (2 * len(self.angles)))
        return picture.T.reshape(len(y), *self.shape)

    @functools.cached_property
    def _back_projection(self) -> Copies:
        """The matrix (N * N, angles * (N + 1)) that reads each pixel's place on the detector, 2 values per pixel and angle.

        For even N the circle reaches one place over the detector's end, where filtered values go on.
        """
        n, centre = self.shape[-1], self.shape[-1] // 2
        row, column, cos, sin = _geometry(n, self.angles)
        t = (cos * column - sin * row + centre).clamp(0, n)  # within the circle only rounding leaves this range
        inside = row**2 + column**2 <= centre**2
        pixel = torch.arange(n * n).reshape(n, n).expand(len(self.angles), n, n)
        first = (n + 1) * torch.arange(len(self.angles))[:, None, None]
        place = [t.floor().long(), t.floor().long() + 1]
        weight = [1 - (t - p).abs() for p in place]
        kept = [inside & (w > 0) for w in weight]
        rows = torch.cat([pixel[k] for k in kept])
        columns = torch.cat([(first + p)[k] for p, k in zip(place, kept, strict=True)])
        values = torch.cat([w[k] for w, k in zip(weight, kept, strict=True)])
        return _sparse(rows, columns, values, (n * n, len(self.angles) * (n + 1)))


class _Product(torch.autograd.Function):
    """A sparse matrix times columns, whose gradient is the product with the stored transpose."""

    @staticmethod
    def forward(ctx, columns: Tensor, forth: Copies, back: Copies) -> Tensor:
        ctx.matrices = (back, forth)
        return forth.like(columns) @ columns

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(gradient.contiguous(), *ctx.matrices), None, None


def _geometry(n: int, angles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and columns (n, n) from the centre, and the cosine and sine (angles, 1, 1) of each angle."""
    row, column = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) - n // 2] * 2, indexing="ij")
    angle = torch.deg2rad(angles)[:, None, None]
    return row, column, angle.cos(), angle.sin()


def _radon(n: int, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (places on the detectors, angle by angle), columns (pixels) and values of the matrix, in float64."""
    row, column, cos, sin = _geometry(n, angles)
    source_row, source_column = cos * row - sin * column + n // 2, sin * row + cos * column + n // 2
    detector = (torch.arange(n) + n * torch.arange(len(angles))[:, None, None]).expand(-1, n, -1)  # a column is summed
    rows, columns, values = [], [], []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        r, c = source_row.floor() + down, source_column.floor() + right
        weight = (1 - (source_row - r).abs()) * (1 - (source_column - c).abs())
        inside = (r >= 0) & (r < n) & (c >= 0) & (c < n) & (weight > 0)
        rows.append(detector[inside])
        columns.append((r * n + c)[inside].long())
        values.append(weight[inside])
    return torch.cat(rows), torch.cat(columns), torch.cat(values)


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Copies:
    """The matrix with these values, equal places summed, in compressed rows: the form whose products are fast."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls compressed rows a beta, once a process
        summed = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=False).coalesce()
        return Copies(summed.to_sparse_csr())
