"""A picture as a function of place: a network of sines (SIREN, Sitzmann et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from course_lib.nets.liif import places
from course_lib.nets.pixels import checked_size, particles


class Siren(nn.Module):
    """siren() -> (n, 3, size, size) in (-1, 1): tanh of a network of sines at the centres of the pixels; n networks at once.

    h <- sin(omega0 (W h + b)), `depth` times from h = (y, x) in [-1, 1]^2; then tanh(W h + b), near grey at the start.
    Start (Sitzmann et al. 2020, Sec. 3.2): W uniform in +-1/2 in the first layer, so that its waves have up to omega0 / 4 pi
    periods a unit of length in each direction, then in +-sqrt(6 / width) / omega0. Phases omega0 b are uniform over a period
    in the first layer and 0 after it. What enters the sines is then normal from the second on, of variance s^2 = 1 there and
    s^2 <- 1 - exp(-2 s^2) from layer to layer, which stays at 0.797: E sin^2 z = (1 - exp(-2 s^2)) / 2 for z ~ N(0, s^2).
    siren(size) draws the same function with other pixels. Raises ValueError for n, width or depth < 1 and for size < 2.
    """

    def __init__(self, n: int = 1, size: int = 64, width: int = 64, depth: int = 3, omega0: float = 30.0, seed: int = 0):
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"width = {width}, depth = {depth}; expected at least 1 of each")
        self.size, self.omega0 = checked_size(size), omega0
        normal = particles(n, seed)
        uniform = lambda *shape: torch.erf(normal(*shape) / math.sqrt(2))  # the distribution function of z, from -1 to 1
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layer in range(depth + 1):
            fan_in, fan_out = 2 if layer == 0 else width, 3 if layer == depth else width
            bound = 1 / fan_in if layer == 0 else math.sqrt(6 / fan_in) / omega0
            self.weights.append(bound * uniform(fan_in, fan_out))
            self.biases.append(uniform(1, fan_out) * (math.pi / omega0 if layer == 0 else 0))

    def forward(self, size: int | None = None) -> Tensor:
        size = self.size if size is None else checked_size(size)
        W, b = self.weights, self.biases
        h = places((size, size), W[0].device).to(W[0]).expand(len(W[0]), -1, -1)  # (n, size^2, 2)
        for layer in range(len(W) - 1):
            h = torch.sin(torch.baddbmm(b[layer], h, W[layer], beta=self.omega0, alpha=self.omega0))
        colours = torch.tanh(torch.baddbmm(b[-1], h, W[-1]))  # (n, size^2, 3)
        return colours.transpose(1, 2).reshape(len(colours), 3, size, size)
