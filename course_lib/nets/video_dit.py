"""A diffusion transformer over clips: patches of space and time are tokens, and every token looks at every other.

The blocks are those of `DiT` (Peebles and Xie 2023); only the tokens and their positions are new. A clip is [b, t, c, h, w].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets import dit
from course_lib.nets.dit import DiTBlock, modulate
from course_lib.nets.embedding import TimeEmbedding
from course_lib.nets.temporal import sinusoids
from course_lib.nets.unet import zero

Patch = tuple[int, int]
"""Frames of a patch, and pixels along its side."""


def patchify(x: Tensor, patch: Patch) -> Tensor:
    """Clips (B, T, C, H, W) as tokens (B, T H W / (t s^2), t C s^2) for patch = (t, s), in order of time, row and column.

    `unpatchify` brings them back. Raises ValueError where t does not divide T, or s does not divide H and W.
    """
    t, s = patch
    if x.ndim != 5 or x.shape[1] == 0 or x.shape[1] % t:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected clips (B, T, C, H, W), T a multiple of the patch's {t} frames")
    tokens = dit.patchify(x.flatten(0, 1), s).unflatten(0, (len(x), -1, t))  # (B, T / t, t, places, C s^2)
    return tokens.transpose(2, 3).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: Patch, shape: tuple[int, int, int]) -> Tensor:
    """Tokens (B, N, t C s^2) as clips (B, T, C, H, W), with `shape` = (T, H, W): the inverse of `patchify`.

    Raises ValueError where there are not T H W / (t s^2) tokens, or their width is no multiple of t s^2.
    """
    (t, s), (T, H, W) = patch, shape
    B, N, width = tokens.shape
    if N * t * s**2 != T * H * W or width % (t * s**2):
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; expected {T * H * W // (t * s**2)} of a multiple of {t * s**2} numbers"
        )
    frames = tokens.reshape(B, T // t, -1, t, width // t).transpose(2, 3).flatten(0, 2)  # (B T, places, C s^2)
    return dit.unpatchify(frames, s, (H, W)).unflatten(0, (B, T))


def positions(grid: tuple[int, int, int], width: int, base: int) -> Tensor:
    """Sinusoids of time, column and row of the patches of a grid (times, rows, columns): (N, width).

    Half of the numbers for the time, as `sinusoids`, which goes on for clips of any length; half for the place, as
    `dit.positions` with its `base`. Raises ValueError for a width that is no multiple of 8.
    """
    if width % 8:
        raise ValueError(f"width = {width}; expected a multiple of 8: sines and cosines of the time, and of two coordinates")
    times, *places = grid
    of_time = sinusoids(times, width // 2)[:, None].expand(-1, places[0] * places[1], -1)
    of_place = dit.positions((places[0], places[1]), width // 2, base)[None].expand(times, -1, -1)
    return torch.cat([of_time, of_place], -1).flatten(0, 1)


class VideoDiT(nn.Module):
    """net(x (B, T, C, H, W), time (B,) or 0-d) -> (B, T, C, H, W), a clip of any length and size; 0 at first.

    patch  (t, s): frames of a patch, and pixels along its side
    side   number of patches along a side that positions are counted for; frames of another size stretch the grid

    The blocks start as the identity (adaLN-zero; Peebles and Xie 2023, Sec. 3.2). Attention is over all tokens of the clip, and
    its cost grows with the square of their number. Raises ValueError for clips that the patch does not divide.
    """

    def __init__(self, channels: int = 3, width: int = 64, depth: int = 2, heads: int = 4, patch: Patch = (2, 4), side: int = 2):
        super().__init__()
        self.patch, self.side, self.width = patch, side, width
        numbers = channels * patch[0] * patch[1] ** 2
        self.embed, self.time = nn.Linear(numbers, width), TimeEmbedding(width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.last_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.last_adaln = zero(nn.Linear(width, 2 * width))
        self.last = zero(nn.Linear(width, numbers))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        (t, s), (T, H, W) = self.patch, (x.shape[1], *x.shape[-2:])
        h = self.embed(patchify(x, self.patch)) + positions((T // t, H // s, W // s), self.width, self.side).to(x)
        emb = self.time(time.expand(len(x)))
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.last_adaln(F.silu(emb)).chunk(2, 1)
        return unpatchify(self.last(modulate(self.last_norm(h), shift, scale)), self.patch, (T, H, W))
