"""What is where in a picture: lines, nearness and classes, read by a small U-Net. The judge of spatial control."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets.scene_reader import ResidualBlock
from course_lib.worlds.scenes.maps import CLASSES


class MapReader(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> lines (B, 1, H, W) as logits, nearness (B, 1, H, W), classes (B, 10, H, W) as logits.

    A U-Net at H, H / 2, ..., H / 16 (Ronneberger et al. 2015): skips are added, not concatenated.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32, 40, 48)):
        super().__init__()
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in pairwise(widths))
        self.seen = nn.ModuleList(ResidualBlock(width) for width in widths)
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.joined = nn.ModuleList(ResidualBlock(width) for width in widths[:-1])
        self.norm = nn.BatchNorm2d(widths[0])
        self.last = nn.Conv2d(widths[0], 2 + len(CLASSES), 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, kept = self.seen[0](self.first(x)), []
        for down, block in zip(self.down, self.seen[1:], strict=True):
            kept.append(h)
            h = block(down(h))
        for up, block, skip in reversed(list(zip(self.up, self.joined, kept, strict=True))):
            h = block(skip + F.interpolate(up(h), scale_factor=2.0, mode="bilinear"))
        lines, near, classes = self.last(F.relu(self.norm(h))).split([1, 1, len(CLASSES)], 1)
        return lines, near, classes
