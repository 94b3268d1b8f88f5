"""A small network for points in the plane (and other short vectors)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from course_lib.nets.embedding import TimeEmbedding


class MLP(nn.Module):
    """A residual multilayer perceptron that knows the time: net(x (B, d), time (B,) or 0-d, label) -> (B, out).

    `classes` > 0 adds a class embedding; index `classes` is the null class, used where `label` is None.
    `timed=False` leaves the time out, for networks that have none: net(x).
    """

    def __init__(
        self, dim: int = 2, width: int = 128, depth: int = 3, classes: int = 0, out: int | None = None, timed: bool = True
    ):
        super().__init__()
        self.classes = classes
        self.time = TimeEmbedding(width) if timed else None
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.first = nn.Linear(dim, width)
        self.hidden = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU()) for _ in range(depth))
        self.last = nn.Linear(width, dim if out is None else out)

    def forward(self, x: Tensor, time: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        emb = x.new_zeros(()) if self.time is None else self.time(time.expand(len(x)))
        if self.label is not None:
            emb = emb + self.label(torch.full((len(x),), self.classes, device=x.device) if label is None else label)
        h = self.first(x)
        for layer in self.hidden:
            h = h + layer(h + emb)
        return self.last(h)
