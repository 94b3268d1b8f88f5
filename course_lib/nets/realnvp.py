"""A normalising flow: an invertible network whose likelihood is exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from course_lib.nets.mlp import MLP


class Coupling(nn.Module):
    """One affine coupling layer: half of x stays, and says how the other half is scaled and shifted.

    forward   z_b = x_b exp(s(x_a)) + t(x_a), z_a = x_a;  log |det dz/dx| = sum s  (Dinh et al. 2017, Eq. 4 to 6)
    inverse   x_b = (z_b - t(z_a)) exp(-s(z_a))            (Eq. 8)
    The log-scale is s = bound tanh(...), with a learned bound (ibid., Sec. 4.1).
    """

    def __init__(self, mask: Tensor, width: int, depth: int):
        super().__init__()
        self.register_buffer("mask", mask)  # 1 where x stays
        self.net = MLP(len(mask), width, depth, out=2 * len(mask), timed=False)
        self.bound = nn.Parameter(torch.ones(len(mask)))
        nn.init.zeros_(self.net.last.weight)  # starts as the identity
        nn.init.zeros_(self.net.last.bias)

    def _scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.net(kept).chunk(2, -1)
        moved = 1 - self.mask
        return moved * self.bound * s.tanh(), moved * t

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and log |det dz/dx|: (B, d) -> (B, d), (B,)."""
        s, t = self._scale_and_shift(self.mask * x)
        return x * s.exp() + t, s.sum(-1)

    def inverse(self, z: Tensor) -> Tensor:
        """x from z, exactly: (B, d) -> (B, d)."""
        s, t = self._scale_and_shift(self.mask * z)
        return (z - t) * (-s).exp()


class RealNVP(nn.Module):
    """Coupling layers in a row, from data to a standard normal: log p(x) = log N(z; 0, I) + log |det dz/dx|.

    Dinh, Sohl-Dickstein and Bengio 2017, Eq. 2 and 3. Neighbouring layers keep complementary halves: alternate coordinates in
    the plane; in more dimensions, halves that are drawn at random with a fixed seed.
    """

    def __init__(self, dim: int = 2, layers: int = 8, width: int = 64, depth: int = 1):
        super().__init__()
        self.dim = dim
        source = torch.Generator().manual_seed(0)
        self.couplings = nn.ModuleList()
        for k in range(layers):
            if k % 2 == 0:
                order = torch.arange(dim) if dim == 2 else torch.randperm(dim, generator=source)
                mask = torch.zeros(dim)
                mask[order[: dim // 2]] = 1
            self.couplings.append(Coupling(mask if k % 2 == 0 else 1 - mask, width, depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and log |det dz/dx|: (B, d) -> (B, d), (B,)."""
        log_det = x.new_zeros(len(x))
        for coupling in self.couplings:
            x, one = coupling(x)
            log_det = log_det + one
        return x, log_det

    def inverse(self, z: Tensor) -> Tensor:
        """x from z: (B, d) -> (B, d)."""
        for coupling in reversed(self.couplings):
            z = coupling.inverse(z)
        return z

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, exact; (B, d) -> (B,)."""
        z, log_det = self(x)
        return log_det - (z.square().sum(-1) + self.dim * math.log(2 * math.pi)) / 2
