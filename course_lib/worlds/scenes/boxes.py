"""Boxes of objects: exact ones of a scene, and whether a picture has its objects in the boxes that were asked for.

A box is (x0, y0, x1, y1) in [0, 1], x to the right and y down, as GLIGEN and diffusers have them.
"""

from __future__ import annotations

import torch
from skimage.measure import label
from torch import Tensor

from course_lib.worlds.scenes.attributes import SHAPES
from course_lib.worlds.scenes.maps import CLASSES
from course_lib.worlds.scenes.render import Rendered

FIRST_SHAPE = CLASSES.index(SHAPES[0])
SMALLEST = 4
"""Pixels that a part of a map must have to count as an object."""


def boxes(seen: Rendered, K: int) -> tuple[Tensor, Tensor]:
    """The boxes (N, K, 4) of what is seen of the objects 0, ..., K - 1, and which of them are seen, (N, K) bool."""
    if not isinstance(K, int) or K < 1:
        raise ValueError(f"K = {K!r}; expected a whole number of objects from 1 on")
    objects = torch.arange(1, K + 1, device=seen.segmentation.device)[:, None, None]
    return extent(seen.segmentation == objects)


def extent(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The least boxes (..., 4) about the pixels of masks (..., H, W) bool, zeros where a mask is empty, and which are not."""
    low, high = zip(*(_ends(mask.any(axis)) for axis in (-2, -1)), strict=True)  # of columns, then of rows
    there = mask.flatten(-2).any(-1)
    return torch.stack([*low, *high], -1) * there[..., None], there


def _ends(line: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first pixel of a line (..., n) bool begins and where the last ends, in shares of n."""
    n = line.shape[-1]
    return line.int().argmax(-1) / n, 1 - line.flip(-1).int().argmax(-1) / n


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4): (...), 0 where both are empty."""
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0)
    both = sides.prod(-1)
    either = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both
    return both / either.clamp_min(1e-12)


def in_place(labels: Tensor, shape: Tensor, asked: Tensor) -> Tensor:
    """How well the classes (N, H, W) of pictures agree with shapes (N, K) that are asked for in boxes (N, K, 4): IoU (N, K).

    Of the connected parts of an object's class, of SMALLEST pixels or more, the one that agrees best counts; 0 where there is
    none, nan where no object is asked for (shape -1). Two objects of a shape that touch are one part, and so is counted.
    """
    found = torch.full(shape.shape, float("nan"))
    for n, k in (shape >= 0).nonzero().tolist():
        parts, count = label((labels[n] == FIRST_SHAPE + shape[n, k]).numpy(), return_num=True, connectivity=2)
        masks = torch.from_numpy(parts) == torch.arange(1, count + 1)[:, None, None]
        masks = masks[masks.flatten(1).sum(1) >= SMALLEST]
        found[n, k] = iou(extent(masks)[0], asked[n, k]).max() if len(masks) else 0.0
    return found
