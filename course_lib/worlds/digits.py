"""The 1,797 real handwritten digits that scikit-learn ships (UCI, Alpaydin and Kaynak 1998), at 16 x 16.

The originals are 8 x 8 with grey values 0 to 16. `load` enlarges them bilinearly to 16 x 16 and maps them to
[-1, 1]; `originals` returns the grey values themselves, for likelihoods, which an enlarged picture does not have.
The split is by file order and fixed, since neighbours in the file are by the same writer: the first 1,437 train,
the last 360 are held out.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10
SHAPE = (1, 16, 16)
TRAIN = 1437
LEVELS = 17
ROWS = {"train": slice(None, TRAIN), "test": slice(TRAIN, None), "all": slice(None)}


@functools.cache
def _all() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.as_tensor(raw.images, dtype=torch.long)[:, None], torch.as_tensor(raw.target, dtype=torch.long)


def _rows(split: str) -> slice:
    if split not in ROWS:
        raise ValueError(f"split = {split!r}; expected 'train', 'test' or 'all'")
    return ROWS[split]


@functools.cache
def _large() -> Tensor:
    return enlarge(_all()[0] / 8 - 1)


def enlarge(small: Tensor) -> Tensor:
    """Bring pictures of 8 x 8 in [-1, 1] to the 16 x 16 of `load`: (N, 1, 8, 8) -> (N, 1, 16, 16)."""
    return F.interpolate(small, SHAPE[1:], mode="bilinear", align_corners=False)


def load(split: str = "train") -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 16, 16) in [-1, 1] and labels (N,) of 'train', 'test' or 'all'."""
    rows = _rows(split)
    return _large()[rows].clone(), _all()[1][rows].clone()


def originals(split: str = "train") -> tuple[Tensor, Tensor]:
    """Return the scanned grey values, whole numbers from 0 to 16, (N, 1, 8, 8), and labels (N,)."""
    rows = _rows(split)
    grey, labels = _all()
    return grey[rows].clone(), labels[rows].clone()


def dequantise(grey: Tensor, u: Tensor) -> Tensor:
    """x0 = 2 (g + u) / 17 - 1 in [-1, 1): grey values g become continuous by u ~ U[0, 1) (Theis et al. 2016, Sec. 3.1).

    A density p of x0 is then one of pictures: -log2 P(g) <= E_u[-log2 p(x0)] + d log2(17 / 2). Shapes of grey and u alike.
    """
    return 2 * (grey + u) / LEVELS - 1


def quantise(x0: Tensor) -> Tensor:
    """The grey values, 0 to 16, whose cell holds x0; what lies outside [-1, 1) is clipped. The inverse of `dequantise`."""
    return ((x0 + 1) * LEVELS / 2).floor().clamp(0, LEVELS - 1).long()


def pixels(images: Tensor) -> Tensor:
    """Bring images (N, 1, 16, 16) back to 8 x 8 grey values in [0, 1], flat: (N, 64), where distances are judged."""
    return ((F.avg_pool2d(images, 2) + 1) / 2).flatten(1)
