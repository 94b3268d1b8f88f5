"""A picture at any resolution from one grid of features: the local implicit image function (Chen et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def places(shape: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Centres of the pixels of a picture of this shape, (H W, 2) as (y, x), each from -1 to 1 across the picture."""
    y, x = (2 * (torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n - 1 for n in shape)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)


class LIIF(nn.Module):
    """net(features (B, C, h, w), at (N, 2), cell (2,)) -> (B, out, N): the colour at each place of the plane.

    f(z, p - p_z, cell): an MLP is told the feature z nearest to the place p, with its 3 x 3 neighbourhood, how far p is from
    it, and how large a pixel is to be (Chen et al. 2021, Eq. 2 and Sec. 3). Four such answers, of the four features around p,
    are mixed by the area opposite to each (Eq. 4, the local ensemble), so that the picture has no seams. Places as in `places`;
    `cell` is the height and width of a pixel there, 2 / H and 2 / W.
    """

    def __init__(self, channels: int, out: int = 3, hidden: int = 128, layers: int = 3):
        super().__init__()
        widths = [9 * channels + 4, *[hidden] * layers]
        inner = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.mlp = nn.Sequential(*inner, nn.Linear(hidden, out))

    def forward(self, features: Tensor, at: Tensor, cell: Tensor) -> Tensor:
        near = F.unfold(F.pad(features, (1, 1, 1, 1), mode="replicate"), 3)  # (B, 9 C, h w)
        near = near.reshape(len(features), -1, *features.shape[-2:])
        return ensemble(self.answer, near, at, cell)

    def answer(self, z: Tensor, away: Tensor, cell: Tensor) -> Tensor:
        """One answer: features (B, N, 9 C), offsets (N, 2) and cell (2,), both in units of a feature, -> (B, N, out)."""
        told = torch.cat([away, cell.expand_as(away)], -1).to(z)
        return self.mlp(torch.cat([z, told.expand(len(z), -1, -1)], -1))

    def picture(self, features: Tensor, shape: tuple[int, int], chunk: int = 2**14) -> Tensor:
        """The whole picture at this height and width, (B, out, H, W), `chunk` places at a time."""
        cell = torch.tensor([2 / n for n in shape], device=features.device)
        parts = [self(features, at, cell) for at in places(shape, features.device).split(chunk)]
        return torch.cat(parts, -1).reshape(len(features), -1, *shape)


def ensemble(answer: Callable[[Tensor, Tensor, Tensor], Tensor], features: Tensor, at: Tensor, cell: Tensor) -> Tensor:
    """The local ensemble of answer(z (B, N, C), away (N, 2), cell (2,)) over the four features around each place, (B, out, N).

    Each answer weighs as the rectangle between the place and the *opposite* feature. With answer = z it is the bilinear
    interpolation of the features. At the border the outer ones are the nearest there are.
    """
    h, w = features.shape[-2:]
    sides = torch.tensor([h, w], device=at.device)
    index = (at + 1) / 2 * sides - 0.5  # (N, 2), in units of a feature
    corner = index.floor()
    total: Tensor | None = None
    for dy in (0, 1):
        for dx in (0, 1):
            one = corner + torch.tensor([dy, dx], device=at.device)
            weight = (1 - (index - one).abs()).prod(-1)  # (N,)
            row, column = (one[:, i].long().clamp(0, n - 1) for i, n in enumerate((h, w)))
            z = features[:, :, row, column].transpose(1, 2)  # (B, N, C)
            said = weight[:, None] * answer(z, index - one, cell * sides / 2)
            total = said if total is None else total + said
    return total.transpose(1, 2)
