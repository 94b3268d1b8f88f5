"""Come closer, diffuse faster: start from a noised estimate instead of pure noise."""

from __future__ import annotations

from torch import Tensor

from course_lib.types import Noise, check_grid, right


def come_closer(estimate: Tensor, sigmas: Tensor, t0: float, noise: Noise) -> tuple[Tensor, Tensor]:
    """The start and the grid of a shortened run from an estimate of x0 (CCDF; Chung, Sim and Ye 2022).

    x = estimate + sigma z with sigma = sigmas[n - m], and the grid's last m = round(t0 n) of n steps: the same spacing

    t0 in (0, 1] is the share of the steps that remains, and of the calls of D. The chain contracts, so the estimate's error
    shrinks on the way down by the same factor as any start's; too small a t0 leaves the error where it was. estimate
    (B, ...), such as A^+ y or a network's. Raises ValueError for a t0 outside (0, 1], or that leaves no step.
    """
    sigmas = check_grid(sigmas)
    n = len(sigmas) - 1
    m = round(t0 * n)
    if not (0 < t0 <= 1 and m >= 1):
        raise ValueError(f"t0 = {t0}; expected a share of the grid's {n} steps in (0, 1] that leaves at least one")
    grid = sigmas[n - m :]
    return estimate + right(grid[0], estimate) * noise(estimate), grid
