"""Orthonormal bases in closed form, and two tools: coordinates put in order, and copies of a tensor in other types."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reflect(z: Tensor) -> Tensor:
    """H z along the last axis with H = I - 2 v v^T / v^T v, v = (1, ..., 1) / sqrt(k) - e_1: symmetric, and H H = I.

    H exchanges e_1 and the unit vector of equal entries, so (H z)_1 is sqrt(k) times the mean of z (Householder 1958).
    """
    k = z.shape[-1]
    if k == 1:
        return z
    v = torch.full((k,), 1 / math.sqrt(k), dtype=z.dtype, device=z.device)
    v[0] -= 1
    return z - (z @ v)[..., None] * (2 / (v @ v)) * v


class RealFourier:
    """Orthonormal real coordinates of pictures (..., H, W): sqrt(2) Re and sqrt(2) Im of one frequency of each pair f, -f.

    A frequency that is its own mirror image has a real coefficient and gives one coordinate. H * W coordinates in all;
    `frequency` (H * W,) is the place of each in the half spectrum (H, W // 2 + 1) of `torch.fft.rfft2`.
    """

    def __init__(self, height: int, width: int):
        self.size = (height, width)
        half = width // 2 + 1
        place = torch.arange(height * half).reshape(height, half)
        rows, columns = place // half, place % half
        single_column = (columns == 0) | (2 * columns == width)  # both f and -f lie in this column
        mirror = torch.where(single_column, (-rows % height) * half + columns, place)
        own = single_column & (mirror == place)
        first = ~single_column | (place < mirror)
        # Each kept frequency has a real coordinate, and, unless it is its own mirror image, an imaginary one.
        real, imaginary = place[own | first], place[first & ~own]
        self.frequency = torch.cat([real, imaginary])
        self._take = torch.cat([2 * real, 2 * imaginary + 1])  # in the half spectrum seen as (..., 2)
        gain = 2 ** (~own.flatten()[self.frequency] / torch.tensor(2, dtype=torch.float64))  # 1 or sqrt(2)
        # And back: which coordinate fills each real and imaginary part, and with which factor.
        source, factor = torch.zeros(2 * place.numel(), dtype=torch.long), gain.new_zeros(2 * place.numel())
        coordinate = torch.arange(len(self._take))
        source[self._take], factor[self._take] = coordinate, 1 / gain
        partner = 2 * mirror.flatten()[self.frequency] + self._take % 2
        other = partner != self._take
        source[partner[other]] = coordinate[other]
        factor[partner[other]] = ((1 - 2 * (self._take % 2)) / gain)[other]  # the mirror image is the conjugate
        self._gain, self._source, self._factor = gain, source, factor

    def coordinates(self, spectrum: Tensor) -> Tensor:
        """From an orthonormal half spectrum (..., H, W // 2 + 1) to coordinates (..., H * W)."""
        parts = torch.view_as_real(spectrum).flatten(-3)
        return parts[..., self._take.to(parts.device)] * self._gain.to(parts)

    def spectrum(self, c: Tensor) -> Tensor:
        """The inverse of `coordinates`, as a spectrum with its full symmetry."""
        parts = c[..., self._source.to(c.device)] * self._factor.to(c)
        return torch.view_as_complex(parts.reshape(*c.shape[:-1], self.size[0], self.size[1] // 2 + 1, 2).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The coordinates (..., H * W) of pictures (..., H, W)."""
        return self.coordinates(torch.fft.rfft2(x, norm="ortho"))

    def inverse(self, c: Tensor) -> Tensor:
        """The pictures (..., H, W) of coordinates (..., H * W): inverse and transpose of `forward`."""
        return torch.fft.irfft2(self.spectrum(c), s=self.size, norm="ortho")


class Order:
    """Coordinates (B, n) in an order in which those marked True in `first` come before the others; r are marked."""

    def __init__(self, first: Tensor):
        first = first.flatten().cpu()
        self._order = torch.cat([first.nonzero()[:, 0], (~first).nonzero()[:, 0]])
        self._place, self.r = self._order.argsort(), int(first.sum())

    def forward(self, c: Tensor) -> Tensor:
        """(B, n) -> (B, n), marked ones first."""
        return c[:, self._order.to(c.device)]

    def inverse(self, c: Tensor) -> Tensor:
        """(B, n) -> (B, n), inverse and transpose of `forward`."""
        return c[:, self._place.to(c.device)]

    def select(self, c: Tensor) -> Tensor:
        """(B, n) -> (B, r), marked ones only."""
        return c[:, self._order[: self.r].to(c.device)]

    def embed(self, c: Tensor) -> Tensor:
        """(B, r) -> (B, n), zeros for the others: the transpose of `select`."""
        return self.inverse(torch.nn.functional.pad(c, (0, len(self._order) - self.r)))


class Copies:
    """One tensor in the types and on the devices that are asked for, each copy made once."""

    def __init__(self, tensor: Tensor):
        self.tensor, self._made = tensor, {}

    def like(self, x: Tensor) -> Tensor:
        key = (x.dtype, x.device)
        if key not in self._made:
            self._made[key] = self.tensor.to(device=x.device, dtype=x.dtype)
        return self._made[key]


def walsh_hadamard(n: int) -> Tensor:
    """The symmetric orthonormal Walsh-Hadamard matrix (n, n) in Sylvester's order; n a power of two."""
    H = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while len(H) < n:
        H = torch.kron(pair, H)
    return H


def cosine(n: int) -> Tensor:
    """The orthonormal matrix (n, n) of the cosine transform, C_kj = c_k cos(pi (2 j + 1) k / 2 n) (Ahmed et al. 1974)."""
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    C = math.sqrt(2 / n) * torch.cos(math.pi * (2 * j + 1) * k / (2 * n))
    C[0] /= math.sqrt(2)
    return C
