"""When a control acts: one Denoiser in an interval of noise levels, another outside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from course_lib.denoisers import batched
from course_lib.types import Denoiser, check_grid, float64, right


def within(D_in: Denoiser, D_out: Denoiser, low: float, high: float) -> Denoiser:
    """D_in where low < sigma <= high, D_out elsewhere: the interval of `interval`, for any two Denoisers.

    With a controlled Denoiser and its base it is what diffusers calls control_guidance_start and _end; see `sigma_interval`.
    sigma is 0-d or (B,); each is called only where a sample needs it, and where both are needed and share a network they are
    one call. Raises ValueError unless 0 <= low < high; high may be math.inf.
    """
    if not 0 <= low < high:
        raise ValueError(f"low = {low:g} and high = {high:g}; expected noise levels with 0 <= low < high")
    both = batched(D_in, D_out)

    def chosen(x: Tensor, sigma: Tensor) -> Tensor:
        level = float64(sigma)
        inside = (low < level) & (level <= high)
        if bool(inside.all()):
            return D_in(x, sigma)
        if not bool(inside.any()):
            return D_out(x, sigma)
        of_in, of_out = both(x, sigma)
        return torch.where(right(inside, x).bool(), of_in, of_out)

    return chosen


def sigma_interval(sigmas: Tensor, start: float = 0.0, end: float = 1.0) -> tuple[float, float]:
    """(low, high) for `within`, so that of the n steps of a falling grid those lie inside that diffusers' pipelines control.

    Step i is controlled where i / n >= start and (i + 1) / n <= end. `sigmas` is (n + 1,); high = sigmas[first], or math.inf for
    the first step, and low = sigmas[last + 1]. Raises ValueError for a grid that does not fall, for fractions outside
    0 <= start < end <= 1, and where no step lies between them.
    """
    sigmas = check_grid(sigmas)
    n = len(sigmas) - 1
    if sigmas[0] < sigmas[-1]:
        raise ValueError(f"sigmas rises from {sigmas[0]:.6g} to {sigmas[-1]:.6g}; expected a falling grid")
    if not 0 <= start < end <= 1:
        raise ValueError(f"start = {start:g} and end = {end:g}; expected fractions of the steps with 0 <= start < end <= 1")
    controlled = [i for i in range(n) if i / n >= start and (i + 1) / n <= end]  # in diffusers' own roundings
    if not controlled:
        raise ValueError(f"start = {start:g} and end = {end:g} have no whole step of {n} between them; expected at least one")
    first, last = controlled[0], controlled[-1]
    return float(sigmas[last + 1]), float(sigmas[first]) if first else math.inf
