"""Guidance: wrappers of a Denoiser that return another Denoiser."""

from __future__ import annotations

from torch import Tensor

from course_lib.denoisers import batched
from course_lib.types import Denoiser


def cfg(D_cond: Denoiser, D_ref: Denoiser, w: float) -> Denoiser:
    """Classifier-free guidance: D = D_ref + w (D_cond - D_ref). w = 0 gives D_ref, w = 1 gives D_cond.

    The paper's own scale is w - 1 (Ho and Salimans 2022, Eq. 6); this is the scale of Stable Diffusion.
    Denoisers that share a network are merged into one call; at w = 0 and 1 only one of them is called.
    """
    if w == 0:
        return D_ref
    if w == 1:
        return D_cond
    both = batched(D_cond, D_ref)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        cond, ref = both(x, sigma)
        return ref + w * (cond - ref)

    return guided
