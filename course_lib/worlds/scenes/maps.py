"""Condition maps: what a picture may be told beside its text, as spatial control takes it (Zhang, Rao and Agrawala 2023).

Every map is a picture (N, 3, H, W) in [0, 1], the range of diffusers' ControlNet pipelines. Those of a scene are exact;
`canny` is of any picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from skimage.feature import canny as canny_lines
from torch import Tensor

from course_lib.worlds.scenes.attributes import GROUNDS, SHAPES, Scenes
from course_lib.worlds.scenes.render import Rendered, edges, render
from course_lib.worlds.scenes.tracing import FAR

NEAR = 2.0
"""Depth in world units at which the map of depth is white; no camera of the world is as near to what it sees."""
EVEN = 1.1
"""The ambient light of `cut_outs`, at which an object from above is as bright as its colour."""
CLASSES = ("background", "ground", *SHAPES)
"""The classes of a segmentation map, in the order of its labels."""
PALETTE = (
    (0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0),
    (1.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 0.5, 0.0), (1.0, 1.0, 1.0),
)  # fmt: skip
"""The colour of each of CLASSES in a segmentation map: corners of the cube of colours where there are enough."""


def edge_map(seen: Rendered) -> Tensor:
    """White lines on black where `edges` has them."""
    return as_map(edges(seen.depth, seen.normal, seen.segmentation))


def nearness(depth: Tensor) -> Tensor:
    """NEAR / depth, 0 for the background, of the same shape: near is bright, as in the maps that MiDaS gives ControlNet."""
    return torch.where(depth >= FAR, 0.0, NEAR / depth).clamp(0, 1)


def depth_map(seen: Rendered) -> Tensor:
    """`nearness` in three equal channels."""
    return as_map(nearness(seen.depth))


def classes(seen: Rendered, scenes: Scenes) -> Tensor:
    """The class of each pixel, (N, H, W) long: an index of CLASSES. An object's class is its shape."""
    of = torch.cat([torch.tensor([[0, 1]], device=scenes.shape.device).expand(len(scenes), 2), scenes.shape + 2], 1)
    return of.gather(1, (seen.segmentation + 1).flatten(1)).view_as(seen.segmentation)[:, 0]


def segmentation_map(labels: Tensor) -> Tensor:
    """The classes (N, H, W) in the colours of PALETTE. Raises ValueError for a label that is no class."""
    if labels.ndim != 3 or int(labels.min()) < 0 or int(labels.max()) >= len(CLASSES):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} run from {int(labels.min())} to {int(labels.max())}; "
            f"expected (N, H, W) from 0 to {len(CLASSES) - 1}"
        )
    return torch.tensor(PALETTE, device=labels.device)[labels].permute(0, 3, 1, 2).contiguous()


def canny(pictures: Tensor, sigma: float = 1.0, low: float = 0.1, high: float = 0.2) -> Tensor:
    """The lines (N, 1, H, W) in {0, 1} that Canny's detector finds in pictures (N, 1 or 3, H, W) in [-1, 1], in their luminance.

    `sigma` is of its Gaussian, in pixels; a line starts where the slope of the luminance in [0, 1] is above `high` and goes
    on where it is above `low` (Canny 1986). Raises ValueError for another shape.
    """
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise ValueError(f"pictures has shape {tuple(pictures.shape)}; expected (N, 1 or 3, H, W) in [-1, 1]")
    share = torch.tensor([0.299, 0.587, 0.114]) if pictures.shape[1] == 3 else torch.ones(1)
    grey = ((pictures.detach().cpu().float() + 1) / 2 * share[:, None, None]).sum(1).numpy()
    found = np.stack([canny_lines(one, sigma, low, high) for one in grey])
    return torch.from_numpy(found)[:, None].to(pictures)


def as_map(one: Tensor) -> Tensor:
    """A drawing (N, 1, H, W) in [0, 1] in three equal channels."""
    return one.float().expand(-1, 3, -1, -1)


def cut_outs(scenes: Scenes, size: int = 64) -> Tensor:
    """Pictures (N, 3, size, size) in [-1, 1] in another style: objects in even light, without shadows, on a white sheet."""
    white = torch.full_like(scenes.ground, list(GROUNDS).index("white"))
    return render(dataclasses.replace(scenes, ground=white), size, lamps=(EVEN, 0.0)).rgb


def selective_colour(scenes: Scenes, size: int = 64) -> Tensor:
    """Pictures (N, 3, size, size) in [-1, 1] in another style: objects keep their colours, all else is black and white."""
    seen = render(scenes, size)
    share = torch.tensor([0.299, 0.587, 0.114], device=seen.rgb.device)[:, None, None]
    grey = (seen.rgb * share).sum(1, keepdim=True).expand_as(seen.rgb)
    return torch.where(seen.segmentation > 0, seen.rgb, grey)


STYLES: dict[str, Callable[[Scenes, int], Tensor]] = {"cut-outs": cut_outs, "selective colour": selective_colour}
"""Rendering styles beside the world's own: scenes and size -> pictures (N, 3, size, size) in [-1, 1]."""
