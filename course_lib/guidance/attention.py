"""Guidance by a network that attends worse: the reference of `cfg` is the same network, perturbed in its self-attention."""

from __future__ import annotations

from torch import Tensor, nn

from course_lib.guidance.free import cfg
from course_lib.nets.attention import named, replaced, values
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
