"""A classifier of noisy pictures that is told the noise level: the downward half of a U-Net (Dhariwal and Nichol 2021)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets.embedding import TimeEmbedding
from course_lib.nets.unet import Level, groups


class NoisyReader(nn.Module):
    """net(x (B, C, 16, 16), time (B,) or 0-d) -> logits (B, classes).

    `widths` are the channels at 16, 8, 4, ... pixels a side, one residual block each; the coarsest level attends.
    """

    def __init__(self, channels: int = 1, classes: int = 10, widths: tuple[int, ...] = (24, 48, 64), dropout: float = 0.2):
        super().__init__()
        emb, coarse = 2 * widths[-1], 16 // 2 ** (len(widths) - 1)
        self.time = TimeEmbedding(emb)
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, c = nn.ModuleList(), widths[0]
        for level, width in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
            self.down.append(Level(c, width, emb, dropout, width // 32 if level == len(widths) - 1 else 0))
            c = width
        self.norm = groups(c)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(c * coarse**2, classes))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        emb = self.time(time.expand(len(x)))
        h = self.first(x)
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Level) else layer(h)
        return self.head(F.silu(self.norm(h)))
