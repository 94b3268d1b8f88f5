"""GLIGEN (Li et al. 2023): a locked network, told by boxes what is to be where.

    h^e = MLP(f_text(e), Fourier(l))                      a token for each phrase e and its box l
    v <- v + beta tanh(gamma) TS(SelfAttn([v, h^e]))      between self- and cross-attention           (Eq. 8)

v are the places of the picture, TS keeps them and drops the tokens, gamma is learnt and 0 at first, so that the network starts
as it was to the last bit. `layout_of(D.net)` makes what learns, `grounded(D, layout)` the Denoiser that takes
`.given(boxes=boxes, phrases=embeddings, masks=there, **text)`. Names of layers are those of diffusers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser
from course_lib.types import Denoiser

FREQUENCIES = 8


def fourier(boxes: Tensor) -> Tensor:
    """sin and cos of 100^(k/8) l, k = 0 .. 7, for the four numbers l of each box: (..., 4) -> (..., 64)."""
    scale = 100 ** (torch.arange(FREQUENCIES, device=boxes.device, dtype=boxes.dtype) / FREQUENCIES)
    angle = scale[:, None] * boxes[..., None, :]  # (..., 8, 4)
    return torch.stack([angle.sin(), angle.cos()], -2).flatten(-3)


class GroundingTokens(nn.Module):
    """h^e = MLP([phrase, Fourier(box)]) for each object, (B, K, out); a learnt phrase and box where there is none.

    boxes (B, K, 4) in [0, 1], masks (B, K), 1 for an object and 0 for none, positive_embeddings (B, K, phrase), diffusers' name
    for what a text encoder makes of the phrases.
    """

    def __init__(self, phrase: int, out: int, hidden: int = 512):
        super().__init__()
        place = 2 * 4 * FREQUENCIES
        self.linears = nn.Sequential(
            nn.Linear(phrase + place, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
        )
        self.null_positive_feature = nn.Parameter(torch.zeros(phrase))
        self.null_position_feature = nn.Parameter(torch.zeros(place))

    def forward(self, boxes: Tensor, masks: Tensor, positive_embeddings: Tensor) -> Tensor:
        there = masks[..., None].to(boxes.dtype)
        phrase = there * positive_embeddings + (1 - there) * self.null_positive_feature
        place = there * fourier(boxes) + (1 - there) * self.null_position_feature
        return self.linears(torch.cat([phrase, place], -1))


class SelfAttention(nn.Module):
    """out(softmax(q k^T / sqrt(d)) v), tokens (B, N, width), shape kept."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class GatedSelfAttention(nn.Module):
    """v + tanh(gamma) TS(SelfAttn([v, h^e])), then, as in the authors' code, a gated feed-forward: (B, N, width), shape kept.

    gamma (here alpha_attn, and alpha_dense for the second) is 0 at first. Li et al. 2023, Eq. 8.
    """

    def __init__(self, width: int, tokens: int, heads: int):
        super().__init__()
        self.linear = nn.Linear(tokens, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ff = FeedForward(width, activation_fn="geglu")
        self.alpha_attn, self.alpha_dense = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        both = self.norm1(torch.cat([v, self.linear(h)], 1))  # (B, N + K, width)
        v = v + self.alpha_attn.tanh() * self.attn(both)[:, : v.shape[1]]
        return v + self.alpha_dense.tanh() * self.ff(self.norm2(v))


class Layout(nn.Module):
    """All that GLIGEN learns: `tokens` of phrases and boxes, and one of `layers` for each transformer block."""

    def __init__(self, tokens: GroundingTokens, layers: nn.ModuleList):
        super().__init__()
        self.tokens, self.layers = tokens, layers


def blocks_of(unet: nn.Module) -> list[BasicTransformerBlock]:
    """The transformer blocks of a network of diffusers, in the order of its layers. Raises ValueError where there are none."""
    found = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    if not found:
        raise ValueError(f"net is a {type(unet).__name__} without transformer blocks; expected diffusers' UNet2DConditionModel")
    return found


def layout_of(net: nn.Module, hidden: int = 512, seed: int = 0) -> Layout:
    """What is to be trained for `net`, diffusers' UNet2DConditionModel, bare or in its adapter; all gates are 0.

    hidden  width of the MLP that makes the tokens; phrases are as wide as the network's text
    seed    of the start

    Raises ValueError for a network without transformer blocks. For `mini-sd` it has 1,296,142 weights with hidden = 512.
    """
    unet = getattr(net, "unet", net)
    blocks, text = blocks_of(unet), unet.config.cross_attention_dim
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        tokens = GroundingTokens(text, text, hidden)
        layers = nn.ModuleList(GatedSelfAttention(block.dim, text, block.attn1.heads) for block in blocks)
    return Layout(tokens, layers).to(next(unet.parameters()).device)


@contextlib.contextmanager
def seated(unet: nn.Module, layout: Layout) -> Iterator[None]:
    """Within, the gated layers sit where diffusers' transformer blocks look for theirs; afterwards `unet` is as before.

    They are put beside its modules, not among them: its parameters and its state stay its own.
    """
    seats = [(unet, "position_net", layout.tokens)]
    seats += [(block, "fuser", layer) for block, layer in zip(blocks_of(unet), layout.layers, strict=True)]
    for where, name, layer in seats:
        vars(where)[name] = layer
    try:
        yield
    finally:
        for where, name, _ in seats:
            del vars(where)[name]


class Grounded(nn.Module):
    """F(x) with a layout: `net(x, time, boxes=boxes, phrases=embeddings, masks=there, **condition)`; without boxes it is F.

    boxes (B, K, 4), phrases (B, K, text), masks (B, K). Masks of 0 are an empty layout, which is learnt, as an empty prompt is.
    """

    def __init__(self, net: nn.Module, layout: Layout):
        super().__init__()
        self.net, self.layout = net, layout
        self.conditions = [*getattr(net, "conditions", ()), "boxes", "phrases", "masks"]

    def check_condition(self, **condition: Any) -> None:
        """Raise ValueError for boxes that are none, and for phrases and masks of other objects."""
        boxes, phrases, masks = (condition.get(name) for name in ("boxes", "phrases", "masks"))
        if boxes is None:
            return
        if boxes.ndim != 3 or boxes.shape[-1] != 4:
            raise ValueError(f"boxes = {tuple(boxes.shape)}; expected (B, K, 4): x0, y0, x1, y1 of K objects")
        ordered = bool((boxes[..., :2] <= boxes[..., 2:]).all())
        if not (ordered and float(boxes.min()) >= 0 and float(boxes.max()) <= 1):
            raise ValueError(
                "boxes has a box that is none; expected 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1, in shares of a side"
            )
        text = len(self.layout.tokens.null_positive_feature)
        for name, value, shape in (("phrases", phrases, (*boxes.shape[:2], text)), ("masks", masks, boxes.shape[:2])):
            if value is None or tuple(value.shape) != tuple(shape):
                found = None if value is None else tuple(value.shape)
                raise ValueError(f"{name} = {found}; expected {tuple(shape)} beside boxes {tuple(boxes.shape)}")

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        boxes: Tensor | None = None,
        phrases: Tensor | None = None,
        masks: Tensor | None = None,
        **condition: Any,
    ) -> Tensor:
        if boxes is None:
            return self.net(x, time, **condition)
        layout = {"boxes": boxes, "masks": masks, "positive_embeddings": phrases}
        with seated(self.net.unet, self.layout):
            return self.net(x, time, cross_attention_kwargs={"gligen": layout}, **condition)


def grounded(D: NetworkDenoiser, layout: Layout) -> NetworkDenoiser:
    """The Denoiser that takes a layout: `grounded(D, layout).given(boxes=boxes, phrases=embeddings, masks=there, **text)`.

    Raises ValueError for a layout of a network of other widths.
    """
    has = tuple(len(layer.norm1.weight) for layer in layout.layers)
    widths = tuple(block.dim for block in blocks_of(D.net.unet))
    if has != widths:
        raise ValueError(f"layout was made for transformer blocks of {has} channels; this network has {widths}")
    return replace(D, net=Grounded(D.net, layout))


def scheduled(D_grounded: Denoiser, D: Denoiser, sigmas: Tensor, tau: float) -> Denoiser:
    """beta = 1 in the first share tau of the steps of a grid, 0 after: `D_grounded`, then `D` (Li et al. 2023, Eq. 10).

    tau = 0 gives D, tau = 1 gives D_grounded. What is where is settled early; the rest is left to the network as it was.
    Raises ValueError for another tau.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau = {tau}; expected a share of the steps from 0 to 1")
    last = float(sigmas[round(tau * (len(sigmas) - 1))]) if tau < 1 else -math.inf
    return lambda x, sigma: (D_grounded if float(torch.as_tensor(sigma).max()) > last else D)(x, sigma)
