"""How a network is told the time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time at geometric frequencies, then two linear layers: (B,) -> (B, width).

    Frequencies 10000^(-k/(K - shift)), k = 0 .. K - 1, as in Vaswani et al. 2017, Sec. 3.5 (shift 0), or so that the last
    is 1/10000 itself (shift 1, as in tensor2tensor and parts of diffusers). They suit times that run over about 1000.
    """

    def __init__(self, width: int, features: int = 64, shift: int = 0):
        super().__init__()
        K = features // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * torch.arange(K) / (K - shift)), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        angle = time.float()[:, None] * self.frequencies  # (B, K)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))
