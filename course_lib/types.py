"""The two types on which the course stands, and how a noise level meets a batch.

A `Denoiser` is what we believe: `D(x, sigma) = E[x0 | x]` with `x = x0 + sigma * eps`.
A `Step` is how we move: `step(D, x, sigma, sigma_next, memory) -> (x_next, memory)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Noise = Callable[[Tensor], Tensor]
"""`noise(x)` returns standard normal noise of the shape, type and device of `x`."""


class Denoiser(Protocol):
    """The posterior mean: `D(x, sigma) = E[x0 | x]`, where `x = x0 + sigma * eps`.

    `x` is (B, ...), `sigma` is 0-d, (B,) or (B, T); the result has the shape of `x`.
    """

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor: ...


class Step(Protocol):
    """One move from noise level `sigma` to `sigma_next`.

    `memory` is None at the first step; afterwards it is what the last step returned. A step that
    edits `x` by other means than its own rule returns `memory=None`: history is then stale.
    """

    def __call__(self, D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]: ...


def right(values: Tensor, x: Tensor) -> Tensor:
    """View per-sample `values` so that they multiply `x`: (B,) or (B, T) gains axes on the right.

    A 0-d tensor stays as it is. Raises ValueError where the leading axes differ from those of `x`.
    """
    if values.ndim == 0:
        return values.to(x.device, x.dtype)
    if values.shape != x.shape[: values.ndim]:
        raise ValueError(
            f"sigma has shape {tuple(values.shape)}; expected a single number or the leading axes "
            f"of x, which has shape {tuple(x.shape)}"
        )
    return values.to(x.device, x.dtype).reshape(*values.shape, *[1] * (x.ndim - values.ndim))


def float64(value: Tensor | float) -> Tensor:
    """Return noise levels or times as CPU float64; a Python number keeps all its digits."""
    if isinstance(value, Tensor):
        return value.cpu().double()  # moved first: some devices have no float64
    return torch.as_tensor(value, dtype=torch.float64)


def check_sigma(sigma: Tensor | float, name: str = "sigma") -> Tensor:
    """Return `sigma` as CPU float64; raise ValueError where a value is negative or not finite."""
    sigma = float64(sigma).detach()
    bad = ~torch.isfinite(sigma) | (sigma < 0)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        place = "[" + ", ".join(map(str, where)) + "]" if where else ""
        raise ValueError(f"{name}{place} = {sigma[tuple(where)]:.6g}; expected finite noise levels >= 0")
    return sigma


def check_grid(sigmas: Tensor) -> Tensor:
    """Return a grid of noise levels as CPU float64; raise ValueError where it is no grid.

    A grid is 1-d with at least two strictly monotone levels. A falling grid (sampling) may end at
    0; a rising one (inversion) starts above 0, since at 0 the direction of the noise is unknown.
    """
    sigmas = check_sigma(sigmas, "sigmas")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}; expected a 1-d grid of at least two noise levels")
    difference = sigmas.diff()
    if not (bool((difference < 0).all()) or bool((difference > 0).all())):
        where = int(((difference >= 0) if difference[0] < 0 else (difference <= 0)).nonzero()[0])
        raise ValueError(
            f"sigmas[{where}] = {sigmas[where]:.6g} and sigmas[{where + 1}] = {sigmas[where + 1]:.6g}; "
            "expected a strictly falling grid (sampling) or a strictly rising one (inversion)"
        )
    if difference[0] > 0 and sigmas[0] == 0:
        raise ValueError("sigmas[0] = 0 in a rising grid; expected inversion to start above 0, for example at 0.002")
    return sigmas
