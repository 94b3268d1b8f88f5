"""A U-Net that is told where in the picture each pixel lies, and so at which resolution it looks (Ryu and Ye 2022)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.nets.unet import Folded

OCTAVES = 3


@functools.lru_cache(maxsize=16)
def positions(height: int, width: int, octaves: int = OCTAVES) -> Tensor:
    """Sines and cosines of where pixels lie, (4 octaves, H, W): sin(2^k pi u), cos(2^k pi u), k < octaves, for rows and columns.

    u = (2 i + 1) / n - 1 is the centre of pixel i of n, from -1 to 1 over the picture at every resolution: neighbours lie 2 / n
    apart, so that a network which sees two of them knows n.
    """

    def encoded(n: int) -> Tensor:
        u = (2 * torch.arange(n) + 1) / n - 1
        angles = math.pi * 2.0 ** torch.arange(octaves)[:, None] * u  # (octaves, n)
        return torch.cat([angles.sin(), angles.cos()])

    rows = encoded(height)[:, :, None].expand(-1, -1, width)
    columns = encoded(width)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns])


class Positioned(nn.Module):
    """net(x (B, C, H, W), time (B,) or 0-d) -> (B, C, H, W) at any resolution: a folded U-Net on x beside its positions.

    H and W divisible by twice the U-Net's factor. `positioned` = False sets the positions to 0: the network without its
    defining input, of the same size.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], positioned: bool = True, **options: Any):
        super().__init__()
        self.positioned = positioned
        self.folded = Folded(channels + 4 * OCTAVES, widths, out=4 * channels, **options)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        where = positions(*x.shape[2:]).to(x) * self.positioned
        return self.folded(torch.cat([x, where.expand(len(x), -1, -1, -1)], 1), time)
