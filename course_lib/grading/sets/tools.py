"""Small tools that the items of several sets share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Unacceptable

T = torch.as_tensor


def right(values: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), so that it multiplies x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def pictures(rng: np.random.Generator, n: int = 4) -> np.ndarray:
    """Random pictures in [-1, 1], (n, 1, 4, 4)."""
    return rng.uniform(-1, 1, (n, 1, 4, 4))


def named(result: object, *names: str) -> dict[str, object]:
    """The values of a returned pair or triple by their names; Unacceptable where it is none."""
    wanted = f"expected the {'pair' if len(names) == 2 else 'tuple'} ({', '.join(names)})"
    if not isinstance(result, (tuple, list)):
        raise Unacceptable(f"the function returns one value of type {type(result).__name__}; {wanted}")
    if len(result) != len(names):
        raise Unacceptable(f"the function returns {len(result)} values; {wanted}")
    return dict(zip(names, result, strict=True))


def fit(target: np.ndarray, *terms: np.ndarray) -> tuple[np.ndarray, float]:
    """The factors of `terms` in `target`, by least squares, and the share of it that they do not explain."""
    columns = np.stack([term.ravel() for term in terms], 1)
    factors = np.linalg.lstsq(columns, target.ravel(), rcond=None)[0]
    return factors, float(np.abs(columns @ factors - target.ravel()).max() / max(1e-12, np.abs(target).max()))
