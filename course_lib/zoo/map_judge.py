"""Whether a picture obeys its control: its condition maps, read back, against those that were asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.devices import autocast
from course_lib.worlds.scenes.maps import CLASSES

if TYPE_CHECKING:  # only named in a signature, and to import it takes diffusers
    from course_lib.zoo.control_data import Mapped

BATCH = 64
REACH = 1
"""Pixels by which a line may miss and still count as found, along each axis."""


@dataclass
class Maps:
    """lines of objects (N, 1, H, W) bool, nearness (N, 1, H, W) in [0, 1], classes (N, H, W) long, of N pictures."""

    lines: Tensor
    nearness: Tensor
    classes: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Maps:
        return Maps(self.lines[rows], self.nearness[rows], self.classes[rows])


class MapJudge:
    """Reads lines, nearness and classes from pictures (N, 3, H, W) in [-1, 1]; sides are multiples of 8."""

    def __init__(self, net: nn.Module):
        self.net = net.eval()

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Maps:
        """The maps of these pictures, on the CPU."""
        where, found = next(self.net.parameters()).device, []
        for x in pictures.split(BATCH):
            with autocast(where):
                lines, near, classes = (part.float().cpu() for part in self.net(x.to(where)))
            found.append((lines > 0, near.clamp(0, 1), classes.argmax(1)))
        return Maps(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def of_objects(lines: Tensor, classes: Tensor) -> Tensor:
    """The lines (N, H, W) bool that lie on an object or beside one, by the classes (N, H, W).

    The horizon is left out: the world's ground fades into its sky, and nobody can see where it ends.
    """
    return lines & (F.max_pool2d((classes > 1).float()[:, None], 3, 1, 1)[:, 0] > 0)


def truth(of: Mapped, rows: Tensor) -> Maps:
    """The exact maps of these scenes."""
    layers = {name: layer[rows] for name, layer in of.maps.items()}
    lines = of_objects(layers["lines"] > 127, layers["classes"])
    return Maps(lines[:, None], layers["near"][:, None].float() / 255, layers["classes"].long())


def edge_f1(found: Tensor, asked: Tensor, reach: int = REACH) -> Tensor:
    """The harmonic mean of precision and recall of line drawings (N, 1, H, W) bool, within `reach` pixels: (N,).

    A pixel of a line counts as right where the other drawing has a line at most `reach` away along each axis. 1 where both
    are empty, 0 where one is.
    """

    def near(lines: Tensor) -> Tensor:
        return F.max_pool2d(lines.float(), 2 * reach + 1, 1, reach) > 0

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return (part & whole).flatten(1).sum(1) / whole.flatten(1).sum(1).clamp_min(1)

    precision, recall = share(near(asked), found), share(near(found), asked)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-9)
    return torch.where(found.flatten(1).any(1) | asked.flatten(1).any(1), f1, torch.ones_like(f1))


def nearness_rmse(found: Tensor, asked: Tensor) -> Tensor:
    """The root mean square error of the nearness of each picture, (N,)."""
    return (found - asked).square().flatten(1).mean(1).sqrt()


def mean_iou(found: Tensor, asked: Tensor) -> Tensor:
    """Intersection over union of classes (N, H, W), the mean over those that are in either map of a picture: (N,)."""
    a, b = (F.one_hot(x.flatten(1), len(CLASSES)).bool() for x in (found, asked))  # (N, H W, classes)
    both, either = (a & b).sum(1), (a | b).sum(1)
    return (both / either.clamp_min(1)).sum(1) / (either > 0).sum(1)


def errors(found: Maps, asked: Maps) -> dict[str, float]:
    """The mean over pictures of the control errors, 0 at best: 1 - F1 of the edges, RMSE of the nearness, 1 - mean IoU."""
    each = {
        "edge": 1 - edge_f1(found.lines, asked.lines),
        "depth": nearness_rmse(found.nearness, asked.nearness),
        "seg": 1 - mean_iou(found.classes, asked.classes),
    }
    return {name: round(float(values.mean()), 4) for name, values in each.items()}
