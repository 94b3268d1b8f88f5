"""The plainest generator: theta is the picture itself, or a latent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from course_lib.devices import SampleNoise


def particles(n: int, seed: int) -> Callable[..., Tensor]:
    """normal(*shape) -> (n, *shape) standard normal: row i is a function of (seed, i) and of the calls before, not of n.

    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n = {n}; expected at least one particle")
    noise = SampleNoise(seed)
    return lambda *shape: noise(torch.empty(n, *shape))


def checked_size(size: int) -> int:
    """`size`, pixels on each side; raises ValueError below 2."""
    if size < 2:
        raise ValueError(f"size = {size}; expected at least 2 pixels on each side")
    return size


class Pixels(nn.Module):
    """pixels() -> (n, C, H, W): g(theta) = theta, or tanh(theta), which stays in (-1, 1).

    shape   (C, H, W), of a picture or of a latent
    start   what pixels() is at first, (C, H, W) or (n, C, H, W); without it noise of deviation `spread`, particle i its own

    Raises ValueError for n < 1, for a shape that is no (C, H, W), and for a start of another shape or, under tanh, outside
    (-1, 1).
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 64, 64),
        n: int = 1,
        seed: int = 0,
        spread: float = 0.1,
        start: Tensor | None = None,
        tanh: bool = False,
    ):
        super().__init__()
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape = {tuple(shape)}; expected (C, H, W), each at least 1")
        if start is not None and start.shape not in (torch.Size(shape), torch.Size((n, *shape))):
            raise ValueError(f"start has shape {tuple(start.shape)}; expected {tuple(shape)} or {(n, *shape)}")
        if start is not None and tanh and float(start.abs().max()) >= 1:
            raise ValueError(f"start reaches {float(start.abs().max()):.4g}; expected values inside (-1, 1), where tanh ends")
        self.tanh = tanh
        normal = particles(n, seed)
        x0 = spread * normal(*shape) if start is None else start.detach().expand(n, *shape).clone()
        self.theta = nn.Parameter(x0.atanh() if tanh and start is not None else x0)

    def forward(self) -> Tensor:
        return self.theta.tanh() if self.tanh else self.theta.clone()  # an optimiser moves theta in place, not its pictures
