"""From coarse to fine with one network for all resolutions: pyramidal diffusion (Ryu and Ye 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from course_lib.operators import BlockAverage
from course_lib.posterior import null_space
from course_lib.sample import sample
from course_lib.steps import ddim
from course_lib.types import Denoiser, Noise, Step


def refine(
    D: Denoiser, small: Tensor, grids: Sequence[Tensor], noise: Noise, step: Step = ddim, y: Tensor | None = None
) -> Tensor:
    """Double the size of pictures once for each grid: enlarge, add noise that hides what is missing, and sample again.

    x <- up(x) + sigma_0 z, then `sample` from sigma_0 = grid[0] down; up is bicubic; small (B, C, h, w) -> (B, C, 2^k h, 2^k w)
    for k grids. D takes every size on the way. A low sigma_0 keeps what the small picture says, and how blurred it is; a high
    one forgets both: it is the start of CCDF (`come_closer`), with the small picture in the place of the estimate.

    With y (B, C, h_y, w_y), the means of blocks of the picture, measured without noise, the range part of each estimate comes
    from y (`null_space`), at every size on the way: super-resolution with y itself as `small`. Raises ValueError where a size
    on the way is no multiple of that of y.
    """
    x = small
    for sigmas in grids:
        x = F.interpolate(x, scale_factor=2.0, mode="bicubic")
        given = D if y is None else null_space(D, _means(x, y), y)
        x = sample(given, x + sigmas[0].to(x) * noise(x), sigmas, step)
    return x


def _means(x: Tensor, y: Tensor) -> BlockAverage:
    """The block average from the size of x to that of y."""
    factor = x.shape[-1] // max(1, y.shape[-1])
    if y.ndim != 4 or tuple(factor * n for n in y.shape[2:]) != tuple(x.shape[2:]):
        raise ValueError(f"y has shape {tuple(y.shape)}; expected (B, C, h, w) with h and w that divide {tuple(x.shape[2:])}")
    return BlockAverage(tuple(x.shape[1:]), factor)


def draw(D: Denoiser, start: Tensor, grids: Sequence[Tensor], noise: Noise, step: Step = ddim) -> Tensor:
    """Pictures of 2^(k - 1) times the size of `start`, from k grids: the first draws small ones, each other doubles them.

    start (B, C, h, w) is noise at level grids[0][0]. The cost is that of the many small calls, each a fourth of one at twice the
    size, and of few large ones.
    """
    return refine(D, sample(D, start, grids[0], step), grids[1:], noise, step)
