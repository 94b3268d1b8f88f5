"""The 1,797 real handwritten digits that scikit-learn ships (UCI, Alpaydin and Kaynak 1998), at 16 x 16.

The originals are 8 x 8 with grey values 0 to 16. They are enlarged bilinearly to 16 x 16 and mapped to
[-1, 1]. The split is by file order and fixed, since neighbours in the file are by the same writer: the
first 1,437 train, the last 360 are held out.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10
SHAPE = (1, 16, 16)
TRAIN = 1437


@functools.cache
def _all() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32)[:, None]  # (N, 1, 8, 8), 0 to 16
    large = F.interpolate(images, SHAPE[1:], mode="bilinear", align_corners=False)
    return large / 8 - 1, torch.as_tensor(raw.target, dtype=torch.long)


def load(split: str = "train") -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 16, 16) in [-1, 1] and labels (N,) of 'train', 'test' or 'all'."""
    rows = {"train": slice(None, TRAIN), "test": slice(TRAIN, None), "all": slice(None)}
    if split not in rows:
        raise ValueError(f"split = {split!r}; expected 'train', 'test' or 'all'")
    images, labels = _all()
    return images[rows[split]].clone(), labels[rows[split]].clone()


def pixels(images: Tensor) -> Tensor:
    """Bring images (N, 1, 16, 16) back to 8 x 8 grey values in [0, 1], flat: (N, 64), where distances are judged."""
    return ((F.avg_pool2d(images, 2) + 1) / 2).flatten(1)
