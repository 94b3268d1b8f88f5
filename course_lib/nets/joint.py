"""The transformer of UniDiffuser (Bao et al. 2023b): a picture and its attributes, with a time for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from course_lib.nets.dit import patchify, unpatchify
from course_lib.nets.embedding import TimeEmbedding
from course_lib.nets.unet import zero
from course_lib.nets.uvit import LongSkips

LAST = 1_000.0
"""The network is told times from 0, nothing noised, to this, nothing left."""


class JointViT(LongSkips):
    """net(x (B, C, H, W), a (B, sum(sizes)), time_x, time_a) -> the predictions of v for both, of their shapes; 0 at the start.

    A U-ViT whose tokens are both times, one token for each attribute (`sizes` are their numbers of values), and the patches
    of a picture of `side` patches. Times are (B,) or 0-d. Raises ValueError for an even `depth`, and for other shapes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        channels: int = 4,
        width: int = 112,
        depth: int = 7,
        heads: int = 4,
        patch: int = 2,
        side: int = 4,
    ):
        super().__init__()
        self.sizes, self.patch, self.side, self.channels = list(sizes), patch, side, channels
        self.time_x, self.time_a = TimeEmbedding(width, 256), TimeEmbedding(width, 256)
        self.embed_x = nn.Linear(channels * patch**2, width)
        self.embed_a = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.extra = 2 + len(self.sizes)
        self.positions = nn.Parameter(0.02 * torch.randn(self.extra + side**2, width))
        self.add_blocks(width, depth, heads)
        self.last_norm = nn.LayerNorm(width)
        self.last_x = zero(nn.Linear(width, patch**2 * channels))
        self.last_a = nn.ModuleList(zero(nn.Linear(width, size)) for size in sizes)

    def forward(self, x: Tensor, a: Tensor, time_x: Tensor, time_a: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.patch * self.side
        if x.shape[1:] != (self.channels, pixels, pixels) or a.shape != (len(x), sum(self.sizes)):
            raise ValueError(
                f"x has shape {tuple(x.shape)} and a {tuple(a.shape)}; expected (B, {self.channels}, {pixels}, {pixels}) "
                f"and (B, {sum(self.sizes)})"
            )
        times = [embed(time.expand(len(x)))[:, None] for embed, time in ((self.time_x, time_x), (self.time_a, time_a))]
        named = [embed(part)[:, None] for embed, part in zip(self.embed_a, a.split(self.sizes, 1), strict=True)]
        h = torch.cat([*times, *named, self.embed_x(patchify(x, self.patch))], 1) + self.positions
        h = self.last_norm(self.through(h))
        a = torch.cat([last(h[:, 2 + k]) for k, last in enumerate(self.last_a)], 1)
        return unpatchify(self.last_x(h[:, self.extra :]), self.patch, x.shape[-2:]), a


def vectors(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """1 for the value and -1 for the others of each attribute: (B, len(sizes)) long -> (B, sum(sizes))."""
    pairs = zip(values.unbind(1), sizes, strict=True)
    return torch.cat([2.0 * nn.functional.one_hot(value, size) - 1 for value, size in pairs], 1)
