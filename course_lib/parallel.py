"""Many steps of a sampler at once: a loop of its own, in which one call of the network serves a window of noise levels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from course_lib.integrals import ratio
from course_lib.types import Denoiser, Noise, check_grid, right


class Parallel(NamedTuple):
    """What `sample_parallel` returns.

    x            (B, ...), at the last level
    calls        calls of D, one after the other: what a machine waits for that runs a window as fast as one level
    evaluations  rows that D was given, per sample: the work; sequential sampling has as many as steps
    accepted     (n, B), the call after which each step of each sample was final, counted from 1
    """

    x: Tensor
    calls: int
    evaluations: int
    accepted: Tensor


@torch.no_grad()
def sample_parallel(
    D: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    window: int,
    tolerance: float = 0.1,
    noise: Noise | None = None,
    progress: bool = False,
) -> Parallel:
    """ParaDiGMS: Picard iteration over a sliding window of steps (Shih et al. 2023, Algorithm 1), for DDIM or DDPM.

    Sequential sampling is x_{i+1} = x_i + f(x_i), f(x_i) = (sigma_{i+1} / sigma_i - 1) (x_i - D(x_i, sigma_i)). Picard guesses
    all x_i of a window that begins at the final x_t, calls D once for all of them, and adds up:
    x_{j+1} <- x_t + f(x_t) + ... + f(x_j),  j = t ... t + window - 1
    The window then begins at the first x_j that moved by more than the tolerance, |x_j new - x_j|^2 / d > (tolerance s_j)^2,
    where s_j is the deviation of the noise that DDPM adds in the step to sigma_j. That x_j came from values which had settled.
    x_{t+1} is exact after each call, so that n steps take at most n calls, and a window of 1 is sequential sampling.

    x          (B, ...), at level sigmas[0]; sigmas (n + 1,), falling
    window     steps in one call; D sees (window * B) rows, the samples of one level side by side, and a level for each row.
               A condition for each sample is repeated: lambda x, s: D.given(label=labels.repeat(len(x) // B))(x, s)
    tolerance  in units of s_j, which is 0 for the step to sigma = 0; towards 0 the result is that of the sequential run
    noise      None is DDIM. Else DDPM, with f of sigma_{i+1}^2 / sigma_i^2 and the noise of all steps drawn beforehand, in the
               order of `sample(..., step=ddpm(noise))`

    Each sample has a window of its own, so that it does not change with its batch; the loop ends with the last.
    Raises ValueError for a grid that does not fall, window < 1 or tolerance <= 0, and FloatingPointError, naming sigma,
    where x stops being finite.
    """
    sigmas = check_grid(sigmas)
    if sigmas[0] < sigmas[-1]:
        raise ValueError(f"sigmas rises from {sigmas[0]:.6g} to {sigmas[-1]:.6g}; expected a falling grid: invert with sample")
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window = {window!r}; expected a whole number of steps >= 1")
    if not tolerance > 0:
        raise ValueError(f"tolerance = {tolerance}; expected a number > 0, for example 0.1")
    n, rho = len(sigmas) - 1, ratio(sigmas[:-1], sigmas[1:])
    s = sigmas[1:] * (1 - rho**2).sqrt()
    shrink = (rho if noise is None else rho**2) - 1
    fresh = None if noise is None else torch.stack([s_j.to(x) * noise(x) for s_j in s])
    rows, numbers = torch.arange(len(x)), torch.arange(n)[:, None]
    path = x.expand(n + 1, *x.shape).clone()  # the guess: nothing moves
    begin, accepted = torch.zeros(len(x), dtype=torch.long), torch.zeros(n, len(x), dtype=torch.long)
    calls = evaluations = 0
    with tqdm(total=n, desc="parallel sampling", unit="step", disable=not progress) as bar:
        while bool((begin < n).any()):
            j = begin + torch.arange(min(window, n - int(begin.min())))[:, None]  # (window, B): numbers of the steps
            inside, j = j < n, j.clamp_max(n - 1)  # a window that reaches beyond the end repeats its last step
            now = path[j, rows]
            x0 = D(now.flatten(0, 1), sigmas[j].flatten()).view_as(now)
            calls, evaluations = calls + 1, evaluations + len(j)
            f = right(shrink[j], now) * (now - x0)
            if fresh is not None:
                f = f + fresh[j, rows]
            new = path[begin, rows] + torch.where(right(inside, now).bool(), f, 0.0).cumsum(0)
            change = (new - path[j + 1, rows]).double().square().flatten(2).mean(2).cpu()  # (window, B)
            if not bool(torch.isfinite(change).all()):
                level = float(sigmas[j[~torch.isfinite(change)]].max())
                raise FloatingPointError(
                    f"x is not finite after the step at sigma = {level:.6g}; expected finite numbers: check the network's "
                    "output at this noise level, and its precision"
                )
            settled = (change <= (tolerance * s[j]) ** 2).long().cumprod(0).sum(0)
            end = torch.minimum(begin + settled + 1, begin + inside.sum(0))
            accepted[(numbers >= begin) & (numbers < end)] = calls
            path[j + 1, rows] = new
            beyond = torch.arange(n + 1)[:, None] > j[-1] + 1
            path = torch.where(right(beyond, path).bool(), new[-1], path)  # what enters the window starts from its last value
            begin = end
            bar.update(int(begin.min()) - bar.n)
    return Parallel(path[-1], calls, evaluations, accepted)
