"""A U-Net over clips that halves time as well as space, so that its coarsest level sees all of a long clip at once.

Bar-Tal et al. 2024 ("Lumiere"), Sec. 3.1. A clip is [b, t, c, h, w]. After each block of an image U-Net comes a convolution over
time; after each halving of the picture a halving of time, after each doubling a doubling; only the coarsest level attends over
time, where there are few frames. Most of the computation is then done on a clip that is small in space and in time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from course_lib.nets.temporal import Context, ConvBlock, TemporalAttention, TimeConv, from_time, to_time
from course_lib.nets.unet import Level, UNet


class TimeDown(nn.Module):
    """y_k = sum_j W_j x_(2k+j) + b, j = -1, 0, 1, frames outside the clip 0; at first y_k = x_(2k), the nearest frame.

    (b, t, c, h, w) -> (b, ceil(t / 2), c, h, w).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return from_time(self.conv(to_time(x).mT).mT, x.shape)


class TimeUp(nn.Module):
    """Every frame twice, then a convolution over time; at first y_k = x_floor(k / 2). (b, t, c, h, w) -> (b, 2t, c, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = TimeConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, 1))


class SpaceTimeUNet(nn.Module):
    """net(x (b, t, c, h, w), time (b,) or 0-d, label, context) -> (b, t, out, h, w), made of an image U-Net, which it holds.

    image   a `UNet`, whose layers see each frame alone; its weights are this network's and learn with the others
    halved  how many of its halvings of the picture, from the finest, halve time too; all by default. 0 is a U-Net of clips at
            their full rate. t must be a multiple of 2^halved
    frames  that the coarsest level's attention has positions for, counted at the full rate; longer clips run, with a UserWarning
    told    channels of the condition `context` (b, t, told, h, w), further channels of the first convolution, whose weights are
            0 at first; see `video.masks.context`

    At first frame t is seen by level l as frame 2^l floor(t / 2^l). So every frame that is a multiple of 2^halved, and every
    frame of a clip that stands still, comes out as the image U-Net gives it; a frame between is given partly what came before it.
    Raises ValueError for `halved` beyond the levels of `image`, and for clips of another number of frames.
    """

    def __init__(self, image: UNet, halved: int | None = None, frames: int = 32, told: int = 0):
        super().__init__()
        strides = [layer for layer in image.down if not isinstance(layer, Level)]
        halved = len(strides) if halved is None else halved
        if not 0 <= halved <= len(strides):
            raise ValueError(f"halved = {halved}; expected from 0 to {len(strides)}, the halvings of the image U-Net")
        self.image, self.factor, self.told = image, 2**halved, told
        self.conditions = ["label"] + ["context"] * bool(told)
        self.context = Context(image.first.out_channels, told) if told else None

        def temporal(layer: nn.Module, level: int, end: type[nn.Module]) -> nn.Module:
            """What follows a layer at this level: it sees along time, or changes the number of frames."""
            if not isinstance(layer, Level):
                return end(layer.out_channels) if level <= halved else nn.Identity()
            c = layer.block.conv2.out_channels
            attend = [TemporalAttention(c, positions="sinusoidal", frames=-(-frames // self.factor))] * (level == len(strides))
            return nn.Sequential(ConvBlock(c), *attend)

        level = 0
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer in image.down:
            level += not isinstance(layer, Level)
            self.down.append(temporal(layer, level, TimeDown))
        for layer in image.middle:
            self.middle.append(temporal(layer, level, TimeDown))
        for layer in image.up:
            self.up.append(temporal(layer, level, TimeUp))
            level -= not isinstance(layer, Level)

    def check_condition(self, label: Tensor | None = None, context: Tensor | None = None) -> None:
        """Raise ValueError for a label that the image U-Net does not know, and a context of other channels."""
        self.image.check_condition(label)
        if context is not None and (context.ndim != 5 or context.shape[2] != self.told):
            raise ValueError(f"context has shape {tuple(context.shape)}; expected (B, T, {self.told}, H, W)")

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        if x.ndim != 5 or x.shape[1] == 0 or x.shape[1] % self.factor:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected clips (B, T, C, H, W), T a multiple of {self.factor}")
        image, side = self.image, self.image.factor
        if x.shape[-1] % side or x.shape[-2] % side:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected height and width divisible by {side}")
        emb = image.embed(time, label, len(x))
        h = each_frame(image.first, x)
        if self.context is not None:
            h = self.context(h, context)
        kept = [h]
        for layer, temporal in zip(image.down, self.down, strict=True):
            h = temporal(each_frame(layer, h, emb) if isinstance(layer, Level) else each_frame(layer, h))
            kept.append(h)
        for layer, temporal in zip(image.middle, self.middle, strict=True):
            h = temporal(each_frame(layer, h, emb))
        for layer, temporal in zip(image.up, self.up, strict=True):
            if isinstance(layer, Level):
                h = temporal(each_frame(layer, torch.cat([h, kept.pop()], 2), emb))
            else:
                h = temporal(each_frame(layer, h.repeat_interleave(2, -1).repeat_interleave(2, -2)))
        return each_frame(lambda z: image.last(nn.functional.silu(image.last_norm(z))), h)


def each_frame(layer: Any, x: Tensor, *emb: Tensor) -> Tensor:
    """A layer of pictures on every frame of clips (b, t, c, h, w), with its clip's embedding (b, e) where that is given."""
    t = x.shape[1]
    return layer(x.flatten(0, 1), *(e.repeat_interleave(t, 0) for e in emb)).unflatten(0, x.shape[:2])
