"""A small network that reads what moves in a clip: strided 3-D convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets.unet import groups

WIDTHS = (16, 24, 40, 56)


class MotionNet(nn.Module):
    """Logits (B, classes) of clips (B, T, 3, H, W): each layer halves the side, the last also time; T >= 4, H and W >= 32.

    What is left is averaged over two halves of time and four quarters of the picture, since a roll, a zoom and a pan differ in
    where things move which way.
    """

    def __init__(self, classes: int):
        super().__init__()
        a, b, c, d = WIDTHS
        self.convs = nn.ModuleList(
            [
                nn.Conv3d(3, a, (1, 5, 5), stride=(1, 2, 2), padding=(0, 2, 2)),
                nn.Conv3d(a, b, 3, stride=(1, 2, 2), padding=1),
                nn.Conv3d(b, c, 3, stride=(1, 2, 2), padding=1),
                nn.Conv3d(c, d, 3, stride=(2, 2, 2), padding=1),
            ]
        )
        self.norms = nn.ModuleList(groups(width) for width in WIDTHS)
        self.hidden, self.out = nn.Linear(8 * d, 48), nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.silu(norm(conv(h)))
        return self.out(F.silu(self.hidden(F.adaptive_avg_pool3d(h, 2).flatten(1))))
