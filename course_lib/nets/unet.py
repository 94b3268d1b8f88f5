"""A U-Net for small pictures, written to be read (Ronneberger et al. 2015; Ho et al. 2020, App. B).

Down: residual blocks and halvings, each result kept. Middle: a block, attention, a block. Up: the same in
mirror image, each block also fed the kept result of its level. Time and class enter every residual block.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets.embedding import TimeEmbedding

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def groups(channels: int) -> nn.GroupNorm:
    """Group normalisation with eight groups."""
    return nn.GroupNorm(8, channels)


def zero(layer: Layer) -> Layer:
    """Set a layer to zero, so that what it ends starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """x + conv(silu((1 + scale) * norm(conv(silu(norm(x)))) + shift)), scale and shift from the embedding.

    Shapes: x (B, C_in, H, W), emb (B, E) -> (B, C_out, H, W).
    """

    def __init__(self, c_in: int, c_out: int, emb: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = groups(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulate = nn.Linear(emb, 2 * c_out)
        self.norm2, self.conv2 = groups(c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(F.silu(emb))[:, :, None, None].chunk(2, 1)  # (B, C, 1, 1) each
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Every pixel looks at every other: x + proj(softmax(q k^T / sqrt(d)) v). Shape kept: (B, C, H, W)."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = groups(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, heads, H*W, C/heads) each
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(B, C, H, W))


class Level(nn.Module):
    """A residual block, and attention where the level has it."""

    def __init__(self, c_in: int, c_out: int, emb: int, dropout: float, heads: int):
        super().__init__()
        self.block = ResBlock(c_in, c_out, emb, dropout)
        self.attention = Attention(c_out, heads) if heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.block(x, emb))


class UNet(nn.Module):
    """net(x (B, C, H, W), time (B,) or 0-d, label (B,) or None) -> (B, out, H, W).

    `widths` are the channels of each level, H and W halved from one to the next; `attention` lists the
    levels (0 is the finest) that attend; `blocks` counts residual blocks a level. `classes` > 0 adds a class
    embedding whose last index, `classes`, is the null class: what None stands for.
    """

    def __init__(
        self,
        channels: int = 1,
        widths: tuple[int, ...] = (32, 64, 96),
        blocks: int = 2,
        attention: tuple[int, ...] = (1, 2),
        classes: int = 0,
        dropout: float = 0.0,
        out: int | None = None,
    ):
        super().__init__()
        self.conditions = ["label"]  # what a Denoiser of this network may be given
        if any(width % 8 or width % max(1, width // 32) for width in widths):
            raise ValueError(f"widths = {widths}; expected multiples of 8, and of 32 from 64 on")
        emb = 4 * widths[0]
        self.classes, self.factor = classes, 2 ** (len(widths) - 1)
        self.time = TimeEmbedding(emb)
        self.label = nn.Embedding(classes + 1, emb) if classes else None
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)

        def heads(level: int) -> int:
            return max(1, widths[level] // 32) if level in attention else 0

        self.down, kept, c = nn.ModuleList(), [widths[0]], widths[0]
        for level, width in enumerate(widths):
            if level:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                kept.append(c)
            for _ in range(blocks):
                self.down.append(Level(c, width, emb, dropout, heads(level)))
                c = width
                kept.append(c)

        self.widths = (*kept, c)  # of the features that `encode` returns
        self.middle = nn.ModuleList([
            Level(c, c, emb, dropout, max(1, c // 32)),
            Level(c, c, emb, dropout, 0),
        ])  # fmt: skip

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(Level(c + kept.pop(), width, emb, dropout, heads(level)))
                c = width
            if level:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))

        self.last_norm = groups(c)
        self.last = zero(nn.Conv2d(c, channels if out is None else out, 3, padding=1))

    def embed(self, time: Tensor, label: Tensor | None, n: int) -> Tensor:
        """Time and class as one vector per sample, (B, E)."""
        emb = self.time(time.expand(n))
        if self.label is not None:
            null = torch.full((n,), self.classes, device=emb.device)
            emb = emb + self.label(null if label is None else label)
        return emb

    def check_condition(self, label: Tensor | None = None) -> None:
        """Raise ValueError for a label that is no class of this network, or any label where it has no classes."""
        if label is None:
            return
        if self.label is None:
            raise ValueError("label was given to a network without classes; expected none, or a model that was trained with them")
        wrong = label[(label < 0) | (label > self.classes)].flatten()
        if len(wrong):
            raise ValueError(f"label = {int(wrong[0])}; expected from 0 to {self.classes - 1}, or {self.classes} for no class")

    def encoder(self) -> UNet:
        """A copy of the encoder and the middle alone, for `encode`."""
        alone = copy.deepcopy(self)
        del alone.up, alone.last_norm, alone.last
        return alone

    def encode(self, x: Tensor, time: Tensor, label: Tensor | None = None, hint: Tensor | float = 0.0) -> list[Tensor]:
        """The features that the decoder is given, the middle's last: those of first(x) + hint."""
        return self._features(x, self.embed(time, label, len(x)), hint)

    def _features(self, x: Tensor, emb: Tensor, hint: Tensor | float = 0.0) -> list[Tensor]:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected height and width divisible by {self.factor}")
        h = self.first(x) + hint
        kept = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Level) else layer(h)
            kept.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        return [*kept, h]

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, residuals: Sequence[Tensor] | None = None) -> Tensor:
        emb = self.embed(time, label, len(x))
        *kept, h = self._features(x, emb)
        if residuals is not None:  # what a control adds to each, see nets/control.py
            *kept, h = (feature + r for feature, r in zip((*kept, h), residuals, strict=True))
        for layer in self.up:
            if isinstance(layer, Level):
                h = layer(torch.cat([h, kept.pop()], 1), emb)
            else:
                h = layer(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.last(F.silu(self.last_norm(h)))


class Folded(nn.Module):
    """A U-Net that sees 2 x 2 pixels as four times the channels: a quarter of the places, and of the time (Shi et al. 2016).

    (B, C, H, W) -> (B, C, H, W); `widths` and the rest are those of the U-Net inside, at half the resolution. Its layers for
    whole pixels, which cost the most, are what is left out (Hoogeboom et al. 2023).
    """

    def __init__(self, channels: int, widths: tuple[int, ...], **options: Any):
        super().__init__()
        self.unet = UNet(4 * channels, widths, **options)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return F.pixel_shuffle(self.unet(F.pixel_unshuffle(x, 2), time), 2)
