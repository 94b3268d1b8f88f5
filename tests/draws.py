"""Random numbers that tests share, each a function of its seed."""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.types import Noise


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_of(seed: int) -> Noise:
    """A noise source that goes on from call to call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def level(value: float) -> Tensor:
    """A noise level as the loop hands it on: 0-d float64."""
    return torch.tensor(value, dtype=torch.float64)
