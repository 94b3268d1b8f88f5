"""A diffusion transformer with adaLN-zero (Peebles and Xie 2023): patches are tokens, time and class set every normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets.embedding import TimeEmbedding
from course_lib.nets.unet import zero


def patchify(x: Tensor, size: int) -> Tensor:
    """Pictures (B, C, H, W) as tokens (B, H W / size^2, C size^2), row by row; `unpatchify` brings them back.

    Raises ValueError where `size` does not divide H and W.
    """
    B, C, H, W = x.shape
    if H % size or W % size:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected height and width divisible by the patch size, {size}")
    x = x.reshape(B, C, H // size, size, W // size, size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * size**2)  # (B, rows, columns, C, size, size), flat


def unpatchify(tokens: Tensor, size: int, shape: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C size^2) as pictures (B, C, H, W), with `shape` = (H, W): the inverse of `patchify`.

    Raises ValueError where there are not H W / size^2 tokens, or their width is no multiple of size^2.
    """
    (H, W), (B, N, width) = shape, tokens.shape
    if N * size**2 != H * W or width % size**2:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; expected {H * W // size**2} of a multiple of {size**2} numbers"
        )
    tokens = tokens.reshape(B, H // size, W // size, width // size**2, size, size)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(B, -1, H, W)


def positions(shape: tuple[int, int], width: int, base: int) -> Tensor:
    """Sines and cosines of column and row, (rows * columns, width); a grid of another size spans the same `base` units.

    Half of the numbers for the column, half for the row: sin(p w_k), cos(p w_k), w_k = 10000^(-4k / width)
    (Vaswani et al. 2017, Sec. 3.5, in two dimensions). Raises ValueError for a width that is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width = {width}; expected a multiple of 4: sines and cosines of two coordinates")
    rows, columns = (base * torch.arange(n, dtype=torch.float64) / n for n in shape)
    frequencies = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = torch.stack([x, y], -1).reshape(-1, 2, 1) * frequencies  # (N, 2, width / 4)
    return torch.stack([angles.sin(), angles.cos()], 2).reshape(-1, width).float()


class SelfAttention(nn.Module):
    """Every token looks at every other: softmax(q k^T / sqrt(d)) v, projected; (B, N, C) kept."""

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        if width % heads:
            raise ValueError(f"width = {width}; expected a multiple of the number of heads, {heads}")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class MLP(nn.Sequential):
    """Two linear layers with a GELU between, four times as wide there."""

    def __init__(self, width: int, ratio: int = 4):
        super().__init__(nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one scale and shift (B, C) for all tokens (B, N, C)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """x <- x + gate1 attention(modulate(norm(x))); x <- x + gate2 mlp(modulate(norm(x))).

    The six vectors are a linear function of silu(time and class), which starts at zero: at the start each block is the
    identity (adaLN-zero; Peebles and Xie 2023, Sec. 3.2).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention, self.mlp = SelfAttention(width, heads), MLP(width)
        self.adaln = zero(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(F.silu(emb)).chunk(6, 1)  # (B, C) each
        x = x + gate1[:, None] * self.attention(modulate(self.norm(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm(x), shift2, scale2))


class DiT(nn.Module):
    """net(x (B, C, H, W), time (B,) or 0-d, label (B,) or None) -> (B, out, H, W); 0 at the start.

    `side` is the number of patches along a side that positions are counted for; pictures of another size stretch the grid.
    `classes` > 0 adds a class embedding whose last index, `classes`, is the null class, as in `UNet`.
    Raises ValueError for pictures that `patch` does not divide.
    """

    def __init__(
        self,
        channels: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 4,
        patch: int = 2,
        side: int = 4,
        classes: int = 0,
        out: int | None = None,
        shift: int = 0,
    ):
        super().__init__()
        self.patch, self.side, self.classes, self.width = patch, side, classes, width
        self.embed = nn.Linear(channels * patch**2, width)
        self.time = TimeEmbedding(width, 256, shift)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.last_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.last_adaln = zero(nn.Linear(width, 2 * width))
        self.last = zero(nn.Linear(width, patch**2 * (channels if out is None else out)))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        grid = (x.shape[-2] // self.patch, x.shape[-1] // self.patch)
        h = self.embed(patchify(x, self.patch)) + positions(grid, self.width, self.side).to(x)
        emb = self.time(time.expand(len(x)))
        if self.label is not None:
            null = torch.full((len(x),), self.classes, device=x.device)
            emb = emb + self.label(null if label is None else label)
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.last_adaln(F.silu(emb)).chunk(2, 1)
        return unpatchify(self.last(modulate(self.last_norm(h), shift, scale)), self.patch, x.shape[-2:])


def from_diffusers_dit(model: Any) -> DiT:
    """The same network with the weights of a diffusers `DiTTransformer2DModel`; equal outputs, in this module's words.

    diffusers keeps a copy of the embedding of time and class in every block; published weights have one. Raises ValueError
    where the copies differ, and for biases or norms that `DiT` has not.
    """
    config, theirs = model.config, model.state_dict()
    if not config.attention_bias or config.norm_elementwise_affine:
        raise ValueError("attention_bias or norm_elementwise_affine is not DiT's; expected True and False, as published")
    emb = "transformer_blocks.{}.norm1.emb."
    for name in (key.removeprefix(emb.format(0)) for key in theirs if key.startswith(emb.format(0))):
        for i in range(1, config.num_layers):
            if not torch.equal(theirs[emb.format(0) + name], theirs[emb.format(i) + name]):
                raise ValueError(f"block {i} has another embedding of time or class than block 0; expected one, as published")
    width, patch = config.num_attention_heads * config.attention_head_dim, config.patch_size
    net = DiT(
        config.in_channels, width, config.num_layers, config.num_attention_heads, patch, config.sample_size // patch,
        config.num_embeds_ada_norm, config.out_channels, shift=1,
    )  # fmt: skip

    def linear(name: str) -> dict[str, Tensor]:
        return {"weight": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}

    first = linear("pos_embed.proj")
    net.embed.load_state_dict({"weight": first["weight"].flatten(1), "bias": first["bias"]})
    for layer, name in ((net.time.mlp[0], "linear_1"), (net.time.mlp[2], "linear_2")):
        layer.load_state_dict(linear(f"{emb.format(0)}timestep_embedder.{name}"))
    net.label.load_state_dict({"weight": theirs[f"{emb.format(0)}class_embedder.embedding_table.weight"]})
    for i, block in enumerate(net.blocks):
        at = f"transformer_blocks.{i}."
        qkv = [linear(f"{at}attn1.to_{part}") for part in "qkv"]
        block.attention.qkv.load_state_dict({key: torch.cat([part[key] for part in qkv]) for key in ("weight", "bias")})
        for layer, name in (
            (block.adaln, "norm1.linear"), (block.attention.proj, "attn1.to_out.0"),
            (block.mlp[0], "ff.net.0.proj"), (block.mlp[2], "ff.net.2"),
        ):  # fmt: skip
            layer.load_state_dict(linear(at + name))
    net.last_adaln.load_state_dict(linear("proj_out_1"))
    out = linear("proj_out_2")  # their numbers of a patch run (row, column, channel), ours (channel, row, column)
    order = torch.arange(patch**2 * net.last.out_features // patch**2).reshape(patch, patch, -1).permute(2, 0, 1).flatten()
    net.last.load_state_dict({key: value[order] for key, value in out.items()})
    return net.train(model.training)
