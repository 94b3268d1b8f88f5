"""What several items of set 11 share: fixed matrices, the exact Denoiser of small clips, and an attention to train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.gaussians import Mixture
from course_lib.grading.items import Unacceptable

RHO, SPREAD = 0.7, 0.6
"""Correlation of neighbouring frames of the exact clips, and the deviation of each of their two components."""


def waves(n: int, k: int = 0) -> Tensor:
    """A fixed matrix (n, n), the k-th, without any symmetry."""
    i, j = torch.meshgrid(torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64), indexing="ij")
    return torch.sin(1.0 + 1.3 * k + 1.7 * i + 0.6 * i * j + 0.9 * j) / n**0.5


def clip_like(who: str, name: str, value: object, shape: tuple[int, ...]) -> Tensor:
    """`value` where it is a tensor of this shape; Unacceptable elsewhere, with the name of what was called."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise Unacceptable(f"{who} is asked with {name} = {got}; expected {shape}")
    return value


class Clips:
    """The exact D(x, sigma) of clips (B, T, C, H, W) whose pixels go through time each by itself; counts its calls.

    A pixel's course is N(+-m, S) with m a slow wave, S_ij = SPREAD^2 RHO^|i-j|: neighbouring frames tell of each other. Refuses what
    a real network would refuse.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.calls = tuple(shape), 0
        i = torch.arange(shape[1], dtype=torch.float64)
        S = SPREAD**2 * RHO ** (i[:, None] - i).abs()
        m = 0.8 * torch.cos(0.7 * i)
        self.mixture = Mixture(torch.tensor([0.6, 0.4]), torch.stack([m, -m]), torch.stack([S, S]))

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        clip_like("D", "x", x, self.shape)
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        if sigma.numel() != 1:
            raise Unacceptable(f"D is asked with sigma of shape {tuple(sigma.shape)}; expected a single number")
        self.calls += 1
        courses = x.movedim(1, -1)  # (B, C, H, W, T)
        said = self.mixture.denoiser(courses.flatten(0, -2), sigma.reshape(()))
        return said.reshape(courses.shape).movedim(-1, 1)


def some_known(rng: np.random.Generator, B: int, T: int) -> np.ndarray:
    """(B, T) bool: in each clip some frames are known and some are not, and no two clips agree."""
    while True:
        known = rng.uniform(size=(B, T)) < 0.5
        mixed = known.any(1) & ~known.all(1)
        if mixed.all() and len(np.unique(known, axis=0)) == B and len(set(known.sum(1).tolist())) > 1:
            return known


class Attention(nn.Module):
    """to_out(softmax(q k^T / sqrt(d)) v) of one head, with order: frame i adds its number to what it asks. (N, L, C), shape kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels, bias=False).double() for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        if not isinstance(h, Tensor) or h.ndim != 3:
            raise Unacceptable(f"the attention is called on {_kind(h)}; expected tokens (N, T, C)")
        places = torch.linspace(-1, 1, h.shape[1], dtype=torch.float64)[:, None]
        q, k, v = self.to_q(h + places), self.to_k(h - places), self.to_v(h)
        return self.to_out(torch.softmax(q @ k.mT / h.shape[-1] ** 0.5, -1) @ v)


def _kind(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def put(module: nn.Module, rng: np.random.Generator | int, size: float = 1.0) -> nn.Module:
    """Draw all weights of a module anew, normal with deviation `size`, from a generator or a seed."""
    rng = np.random.default_rng(rng)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.as_tensor(size * rng.normal(size=tuple(weight.shape))))
    return module


@contextmanager
def said_without_graph(words: str) -> Iterator[None]:
    """Say in words where a gradient is asked of something that has no graph."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise Unacceptable(words) from None
