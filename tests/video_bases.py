"""Inflated networks and clips, for the tests of video/inflation.py."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from course_lib.video.animatediff import motion_of
from course_lib.video.inflation import (
    factorised_of,
    inflated,
    pseudo_3d_of,
    video_ldm_of,
)
from tests.control_bases import B, base, randomised
from tests.draws import normal

T = 4
WAYS = {"factorised": factorised_of, "pseudo-3D": pseudo_3d_of, "Video LDM": video_ldm_of, "AnimateDiff": motion_of}
ways = pytest.mark.parametrize("way", WAYS)
kinds = pytest.mark.parametrize("kind", ["classes", "text"])
"""The readable U-Net, told a class, and mini-sd's, told a text."""
SIGMAS = {"one": torch.tensor(0.7), "a clip": torch.tensor([0.4, 2.0]), "a frame": torch.linspace(0.1, 3, B * T).view(B, T)}


def clips(of, T=T, seed=7):
    return normal(B, T, *of.x.shape[1:], seed=seed).to(of.x)


def video(kind, way, learnt=False, dtype=torch.float32, seed=0):
    """An inflated Denoiser, told once a clip, and the image Denoiser that it was made of, told the same."""
    of = base(kind, dtype)
    temporal = WAYS[way](of.D.net, seed=seed)
    return of.of(D=inflated(of.D, randomised(temporal, seed=1) if learnt else temporal)), of.of(), clips(of)


@torch.no_grad()
def frame_by_frame(D, x, sigma):
    """The image model at each frame alone, each with the text of its clip."""
    return torch.stack([D(x[:, t], sigma[:, t] if sigma.ndim == 2 else sigma) for t in range(x.shape[1])], 1)


def gap(a, b):
    """The greatest difference, relative to the greatest number."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def multiply_adds(call):
    """Counted, attention as the two products that it is."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() / 2
