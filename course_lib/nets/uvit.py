"""U-ViT (Bao et al. 2023): a transformer for which everything is a token, with the long skips of a U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from course_lib.nets.dit import MLP, SelfAttention, patchify, unpatchify
from course_lib.nets.embedding import TimeEmbedding
from course_lib.nets.unet import zero


class UViTBlock(nn.Module):
    """x <- x + attention(norm(x)); x <- x + mlp(norm(x)), after joining a kept input: x <- linear([x, kept])."""

    def __init__(self, width: int, heads: int, skip: bool):
        super().__init__()
        self.join = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        if self.join is not None:
            x = self.join(torch.cat([x, kept], -1))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LongSkips(nn.Module):
    """Blocks before a middle one, which keep what they give, and as many after it, which join it, last to first.

    Bao et al. 2023, Sec. 3.1. A network on tokens (B, N, C) calls `add_blocks` in its constructor and `through` in its pass.
    """

    def add_blocks(self, width: int, depth: int, heads: int, skips: bool = True) -> None:
        """Raises ValueError for an even `depth`; without `skips` it is a plain transformer."""
        if depth % 2 == 0:
            raise ValueError(f"depth = {depth}; expected an odd number: as many blocks before the middle one as after it")
        self.before = nn.ModuleList(UViTBlock(width, heads, False) for _ in range(depth // 2))
        self.middle = UViTBlock(width, heads, False)
        self.after = nn.ModuleList(UViTBlock(width, heads, skips) for _ in range(depth // 2))

    def through(self, h: Tensor) -> Tensor:
        """Tokens through all blocks."""
        kept = []
        for block in self.before:
            h = block(h)
            kept.append(h)
        h = self.middle(h)
        for block in self.after:
            h = block(h, kept.pop())
        return h


class UViT(LongSkips):
    """net(x (B, C, H, W), time (B,) or 0-d, label (B,) or None) -> (B, out, H, W); 0 at the start.

    Tokens: one for the time, one for the class, one for each patch, with learned positions, so that pictures have one size,
    `side` patches on a side. The first half of the blocks keep what they give, the second half join it, last to first
    (Bao et al. 2023, Sec. 3.1); without `skips` it is a plain vision transformer (ViT). `classes` > 0 adds a class token whose
    last index is the null class, as in `UNet`.
    Raises ValueError for an even `depth`, and for pictures of another size.
    """

    def __init__(
        self,
        channels: int = 4,
        width: int = 192,
        depth: int = 7,
        heads: int = 4,
        patch: int = 2,
        side: int = 4,
        classes: int = 0,
        out: int | None = None,
        skips: bool = True,
    ):
        super().__init__()
        out = channels if out is None else out
        self.patch, self.side, self.classes = patch, side, classes
        self.embed = nn.Linear(channels * patch**2, width)
        self.time = TimeEmbedding(width, 256)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.extra = 2 if classes else 1
        self.positions = nn.Parameter(0.02 * torch.randn(self.extra + side**2, width))
        self.add_blocks(width, depth, heads, skips)
        self.last_norm, self.last = nn.LayerNorm(width), zero(nn.Linear(width, patch**2 * out))
        self.smooth = nn.Conv2d(out, out, 3, padding=1)  # over the seams of the patches
        nn.init.zeros_(self.smooth.bias)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        if x.shape[-2:] != (self.patch * self.side,) * 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {self.patch * self.side} pixels on each side")
        tokens = [self.time(time.expand(len(x)))[:, None]]
        if self.label is not None:
            null = torch.full((len(x),), self.classes, device=x.device)
            tokens.append(self.label(null if label is None else label)[:, None])
        h = torch.cat([*tokens, self.embed(patchify(x, self.patch))], 1) + self.positions  # (B, extra + side^2, width)
        h = self.last(self.last_norm(self.through(h)[:, self.extra :]))
        return self.smooth(unpatchify(h, self.patch, x.shape[-2:]))
