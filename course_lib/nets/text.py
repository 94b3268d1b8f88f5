"""The text encoder of Stable Diffusion, CLIP's, written to be read (Radford et al. 2021, Sec. 2.4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation of GELU in CLIP's first models (Hendrycks and Gimpel 2016, Sec. 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class TextBlock(nn.Module):
    """x <- x + attention(norm(x)), each word looking at those before it and itself; x <- x + mlp(norm(x)). (B, L, C) kept."""

    def __init__(self, width: int, heads: int, ratio: int, activation: str):
        super().__init__()
        if width % heads:
            raise ValueError(f"width = {width}; expected a multiple of the number of heads, {heads}")
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide = ratio * width
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, wide), ACTIVATIONS[activation](), nn.Linear(wide, width))

    def forward(self, x: Tensor) -> Tensor:
        B, L, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, L, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, C / heads)
        x = x + self.out(h.transpose(1, 2).reshape(B, L, C))
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """net(ids (B, L) long) -> (B, L, width): what each word means after the words before it.

    `words` is the size of the vocabulary, `length` the most words of a text, `ratio` how much wider the MLPs are. Attention is
    causal, as in CLIP: the mark of the end, which comes last, has read everything. Raises ValueError for longer texts, and for
    an activation that is not one of ACTIVATIONS.
    """

    def __init__(
        self,
        words: int,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        length: int = 32,
        ratio: int = 2,
        activation: str = "gelu",
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation = {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TextBlock(width, heads, ratio, activation) for _ in range(layers)))
        self.last_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        length = self.place.num_embeddings
        if ids.shape[1] > length:
            raise ValueError(f"ids has shape {tuple(ids.shape)}; expected at most {length} words a text")
        return self.last_norm(self.blocks(self.word(ids) + self.place.weight[: ids.shape[1]]))


def from_transformers_text(model: Any) -> TextEncoder:
    """The same network with the weights of a transformers `CLIPTextModel`; equal last hidden states, in this module's words.

    Raises ValueError for an activation that is not one of ACTIVATIONS.
    """
    config = model.config
    theirs = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    net = TextEncoder(
        config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
        config.max_position_embeddings, config.intermediate_size // config.hidden_size, config.hidden_act,
    )  # fmt: skip
    net.word.weight.data.copy_(theirs["embeddings.token_embedding.weight"])
    net.place.weight.data.copy_(theirs["embeddings.position_embedding.weight"])

    def layer(name: str) -> dict[str, Tensor]:
        return {"weight": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}

    for i, block in enumerate(net.blocks):
        at = f"encoder.layers.{i}."
        qkv = [layer(f"{at}self_attn.{part}_proj") for part in "qkv"]
        block.qkv.load_state_dict({key: torch.cat([part[key] for part in qkv]) for key in ("weight", "bias")})
        for ours, name in (
            (block.out, "self_attn.out_proj"), (block.norm1, "layer_norm1"), (block.norm2, "layer_norm2"),
            (block.mlp[0], "mlp.fc1"), (block.mlp[2], "mlp.fc2"),
        ):  # fmt: skip
            ours.load_state_dict(layer(at + name))
    net.last_norm.load_state_dict(layer("final_layer_norm"))
    return net.train(model.training)
