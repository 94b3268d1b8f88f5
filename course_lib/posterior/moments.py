"""What a solver draws, exactly and without a sample: if the prior is one Gaussian, its steps are affine in x and noise."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from course_lib.types import Denoiser, Step

F64 = torch.float64


class Injected:
    """A noise source whose k-th call returns what it was told: `rows[i] = (k, j)` puts a 1 at entry j of row i in call k."""

    def __init__(self, rows: dict[int, tuple[int, int]] | None = None):
        self.rows, self.shapes = rows or {}, []

    def __call__(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for row, (call, entry) in self.rows.items():
            if call == len(self.shapes):
                z.view(len(x), -1)[row, entry] = 1.0
        self.shapes.append(x.shape[1:])
        return z


class Relay:
    """What the solver holds as its noise; `source` is exchanged before each call of the step."""

    def __init__(self):
        self.source = Injected()

    def __call__(self, x: Tensor) -> Tensor:
        return self.source(x)


def affine(
    step: Step, D: Denoiser, noise: Relay, d: int, sigma: Tensor, sigma_next: Tensor, memory: Any = None
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """M (d, d), b (d,), N (d, k) of x' = M x + b + N z with z standard normal, and the memory, for x (B, d).

    `noise` is the source that the step was made with. Raises ValueError where the step is not affine in x, as with a prior
    that is no single Gaussian.
    """
    noise.source = Injected()
    step(D, torch.zeros(1, d, dtype=F64), sigma, sigma_next, memory)
    calls = [(k, j) for k, shape in enumerate(noise.source.shapes) for j in range(shape.numel())]
    rows = {1 + d + i: call for i, call in enumerate(calls)}
    x = torch.zeros(2 + d + len(calls), d, dtype=F64)
    x[1 : 1 + d] = torch.eye(d, dtype=F64)
    x[-1] = 3.0 * torch.arange(1, d + 1)  # a point off the axes, where an affine map is already known
    noise.source = Injected(rows)
    out, memory = step(D, x, sigma, sigma_next, memory)
    b, M = out[0], (out[1 : 1 + d] - out[0]).T
    if not torch.allclose(out[-1], M @ x[-1] + b, rtol=1e-9, atol=1e-9):
        raise ValueError(f"the step at sigma = {float(sigma):.6g} is not affine in x; expected the denoiser of one Gaussian")
    return M, b, (out[1 + d : -1] - b).T, memory


def moments(step: Step, D: Denoiser, noise: Relay, sigmas: Tensor, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of x at the end of the grid, from those at its start, exactly.

    mean <- M mean + b, cov <- M cov M^T + N N^T at each step. `noise` is the source that the step was made with. Raises
    ValueError for a step that is not affine.
    """
    memory = None
    for sigma, sigma_next in pairwise(sigmas):
        M, b, N, memory = affine(step, D, noise, len(mean), sigma, sigma_next, memory)
        mean, cov = M @ mean + b, M @ cov @ M.T + N @ N.T
    return mean, cov
