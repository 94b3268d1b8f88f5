"""How a picture listens to a text: cross-attention, and the maps of it in a diffusers network (Rombach et al. 2022, Sec. 3.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.nets.unet import zero


class CrossAttention(nn.Module):
    """x + out(sum_j a_ij v_j),  a_ij = softmax_j(q_i k_j / sqrt(d)): each place i of x asks each word j of the text.

    x (B, N, C), text (B, L, T) -> (B, N, C); `mask` (B, L) is False for words that are not there. Queries are made of x, keys
    and values of the text. `out` starts at zero, and with it the layer as the identity. Raises ValueError where no word is left.
    """

    def __init__(self, width: int, text: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width = {width}; expected a multiple of the number of heads, {heads}")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(size, width, bias=False) for size in (width, text, text))
        self.out = zero(nn.Linear(width, width))

    def maps(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """a, (B, heads, N, L): what share of its answer each place takes from each word; rows sum to 1."""
        q, k = self._heads(self.q(self.norm(x))), self._heads(self.k(text))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            if not bool(mask.any(1).all()):
                raise ValueError("mask leaves a text without a word; expected at least one, for example the mark of its start")
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return scores.softmax(-1)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.maps(x, text, mask) @ self._heads(self.v(text))  # (B, heads, N, C / heads)
        return x + self.out(h.transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _Recorder:
    """diffusers' attention, with its maps written out and kept, means over the heads."""

    def __init__(self, name: str, kept: dict[str, list[Tensor]]):
        self.name, self.kept = name, kept

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (
            attn.head_to_batch_dim(part)
            for part in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        )
        maps = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)  # (B heads, N, L)
        self.kept[self.name].append(maps.detach().float().unflatten(0, (-1, attn.heads)).mean(1).cpu())
        h = attn.batch_to_head_dim(maps @ v)
        for part in attn.to_out:
            h = part(h)
        return h / attn.rescale_output_factor


@contextlib.contextmanager
def recorded(unet: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Within, each cross-attention of a diffusers UNet keeps its maps: layer name -> a list of (B, N, L), one a call.

    Outputs stay the same; afterwards, also upon an error, the network is as before. Raises ValueError where there is none.
    """
    before, kept = dict(unet.attn_processors), {}
    own = {}
    for name, processor in before.items():
        if name.endswith("attn2.processor"):
            kept[name.removesuffix(".processor")] = []
            processor = _Recorder(name.removesuffix(".processor"), kept)
        own[name] = processor
    if not kept:
        raise ValueError("the network has no cross-attention (attn2); expected a UNet2DConditionModel that is told a text")
    unet.set_attn_processor(own)
    try:
        yield kept
    finally:
        unet.set_attn_processor(before)


def word_maps(kept: dict[str, list[Tensor]], side: int) -> Tensor:
    """The mean map of each word over layers and calls, (B, L, side, side), brought to one size; from `recorded`."""
    found = []
    for calls in kept.values():
        for maps in calls:
            n = round(maps.shape[1] ** 0.5)
            if n * n != maps.shape[1]:
                raise ValueError(f"a map has {maps.shape[1]} places; expected a square picture")
            square = maps.transpose(1, 2).unflatten(-1, (n, n))
            found.append(nn.functional.interpolate(square, (side, side), mode="bilinear", align_corners=False))
    return torch.stack(found).mean(0)
