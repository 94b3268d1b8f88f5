"""Small tools that the items of several sets share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

T = torch.as_tensor


def right(values: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), so that it multiplies x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def pictures(rng: np.random.Generator, n: int = 4) -> np.ndarray:
    """Random pictures in [-1, 1], (n, 1, 4, 4)."""
    return rng.uniform(-1, 1, (n, 1, 4, 4))
