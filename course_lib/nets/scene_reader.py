"""Two readers of scene pictures, of different architecture: what is in the picture, object by object."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OF_SCENE = {"count": 2, "relation": 3, "ground": 6, "light": 3}
OF_OBJECT = {"shape": 8, "colour": 8, "size": 2, "azimuth": 2, "front": 1}
"""Numbers that each head returns; azimuth gives a cosine and a sine."""


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))) with 3 x 3 convolutions (He et al. 2016, Fig. 4e). Shape kept."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class QueryReader(nn.Module):
    """Features (B, width, 8, 8) of `body`, read by three learned queries: one for the scene and one for each object.

    Each layer lets the queries look at the picture and at each other: q <- q + attention(q, [q, features]), then an MLP.
    Returns a dict of logits: (B, n) for OF_SCENE, (B, 2, n) for OF_OBJECT. Pictures are (B, 3, H, W) in [-1, 1].
    """

    def __init__(self, body: nn.Module, width: int, layers: int = 2, heads: int = 4):
        super().__init__()
        self.body = body
        self.place = nn.Parameter(0.02 * torch.randn(64, width))
        self.query = nn.Parameter(0.5 * torch.randn(3, width))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "before": nn.LayerNorm(width),
                    "look": nn.MultiheadAttention(width, heads, batch_first=True),
                    "mlp": nn.Sequential(
                        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
                    ),
                }
            )
            for _ in range(layers)
        )
        self.scene = nn.ModuleDict({name: nn.Linear(width, n) for name, n in OF_SCENE.items()})
        self.thing = nn.ModuleDict({name: nn.Linear(width, n) for name, n in OF_OBJECT.items()})

    def seen(self, x: Tensor) -> Tensor:
        """What `body` sees, (B, width, 8, 8); pictures of another size are resized to 64 x 64."""
        if x.shape[-2:] != (64, 64):
            x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        return self.body(x)

    def queries(self, x: Tensor) -> Tensor:
        """What the three queries found, (B, 3, width)."""
        seen = self.seen(x).flatten(2).transpose(1, 2)
        seen = self.norm(seen + self.place)
        q = self.query.expand(len(x), -1, -1)
        for layer in self.layers:
            ask = layer["before"](q)
            memory = torch.cat([ask, seen], 1)
            q = q + layer["look"](ask, memory, memory, need_weights=False)[0]
            q = q + layer["mlp"](q)
        return q

    def features(self, x: Tensor) -> Tensor:
        """Features for the Frechet distance: the mean over the picture of what `body` sees, (B, width)."""
        return self.seen(x).mean((2, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q = self.queries(x)
        found = {name: head(q[:, 0]) for name, head in self.scene.items()}
        return found | {name: head(q[:, 1:]) for name, head in self.thing.items()}


def residual_reader(width: int = 72) -> QueryReader:
    """A residual network: 3 x 3 convolutions at 32, 16 and 8 pixels; its queries look twice."""
    body = nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=2, padding=1), ResidualBlock(32),
        nn.Conv2d(32, 56, 3, stride=2, padding=1), ResidualBlock(56), ResidualBlock(56),
        nn.Conv2d(56, width, 3, stride=2, padding=1), ResidualBlock(width), ResidualBlock(width),
        nn.BatchNorm2d(width), nn.ReLU(),
    )  # fmt: skip
    return QueryReader(body, width)


class Patches(nn.Module):
    """Strided convolutions without norm, then a transformer over the 64 patches (Dosovitskiy et al. 2021; Xiao et al. 2021).

    (B, 3, 64, 64) -> (B, width, 8, 8).
    """

    def __init__(self, width: int, layers: int, heads: int = 4):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(64, width, 4, stride=2, padding=1),
        )  # fmt: skip
        self.place = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.05, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.place
        return self.layers(tokens).transpose(1, 2).unflatten(2, (8, 8))


def patch_reader(width: int = 88) -> QueryReader:
    """A second opinion: a transformer over patches; its queries look once."""
    return QueryReader(Patches(width, layers=3), width, layers=1)
