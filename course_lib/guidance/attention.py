"""Guidance by the network's own self-attention: away from itself with worse attention, or with a blur where it attends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.guidance.free import cfg
from course_lib.nets.attention import named, observed, replaced, values
from course_lib.types import Denoiser


def perturbed(D: Denoiser, net: nn.Module, layers: str | None = "mid") -> Denoiser:
    """D with the self-attention maps of the named layers of `net` replaced by the identity, in each call.

    `net` is the module that D calls: `D.net` of an embedded model, `model.net` of a `Pretrained`. Raises ValueError, with the
    names that there are, where no layer's name contains `layers`.
    """
    chosen = named(net, layers)  # an error comes at once, not in the middle of a run

    def worse(x: Tensor, sigma: Tensor) -> Tensor:
        with replaced(chosen, values):
            return D(x, sigma)

    return worse


def pag(D: Denoiser, net: nn.Module, w: float, layers: str | None = "mid") -> Denoiser:
    """Perturbed-attention guidance: D + w (D - D'), with D' = `perturbed(D, net, layers)`. w = 0 gives D.

    It needs no condition (Ahn et al. 2024, Sec. 4): it is `cfg` with the reference D' and the scale 1 + w, at two calls. Beside
    a prompt, guide first by this and then by the prompt: cfg(pag(D_cond, net, s), D_ref, w).
    """
    return cfg(D, perturbed(D, net, layers), 1 + w)


REACH = 4  # pixels to each side that the blur of `sag` mixes, a 9 x 9 kernel


def blur(x: Tensor, std: float = 1.0) -> Tensor:
    """Pictures (B, C, H, W) under a Gaussian of `std` pixels, cut off at 4 pixels and mirrored at the border."""
    at = torch.arange(-REACH, REACH + 1, device=x.device, dtype=x.dtype)
    line = torch.exp(-0.5 * (at / std) ** 2)
    line = (line / line.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, (REACH,) * 4, mode="reflect")
    x = F.conv2d(x, line[:, :, None], groups=x.shape[1])
    return F.conv2d(x, line[..., None], groups=x.shape[1])


def attended(attention: Tensor, shape: tuple[int, int]) -> Tensor:
    """1 where a picture of this shape is attended to more than on average, else 0: (B, 1, H, W), of maps (B, N, N).

    A token is, where its column of the map sums to more than 1 (Hong et al. 2023, threshold 1).
    """
    factor = round((shape[0] * shape[1] / attention.shape[-1]) ** 0.5)
    grid = (attention.sum(1) > 1).unflatten(-1, (shape[0] // factor, shape[1] // factor))
    return F.interpolate(grid[:, None].to(attention.dtype), shape)


def sag(D: Denoiser, net: nn.Module, w: float, layers: str | None = "mid") -> Denoiser:
    """Self-attention guidance (Hong et al. 2023): away from what D says of x blurred where `net` attends. w = 0 gives D.

    x' = x + M (blur(D(x)) - D(x)), the picture so far with a blur on the mask M of `attended` and the noise left as it is;
    eps_w = eps(x) + w (eps(x) - eps(x')), which is D + w (D - D(x') + x' - x). Two calls. The maps are those of the first layer
    whose name contains `layers`; `net` is the module that D calls, as in `perturbed`. Raises ValueError as that.
    """
    layer = next(iter(named(net, layers).values()))
    if w == 0:
        return D

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        with observed(layer) as kept:
            plain = D(x, sigma)
        mask = attended(kept[-1].to(x.dtype), x.shape[-2:])
        worse = x + mask * (blur(plain) - plain)
        return plain + w * (plain - D(worse, sigma) + worse - x)

    return guided
