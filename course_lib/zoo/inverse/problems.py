"""What is measured of which pictures, and how it is restored without a diffusion model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib import metrics, zoo
from course_lib.devices import generator
from course_lib.operators import BlockAverage, Blur, GaussianNoise, Grey, LinearOperator, Mask, gaussian_kernel, measure
from course_lib.types import Denoiser
from course_lib.worlds import digits
from course_lib.zoo.judge_digits import grey
from course_lib.zoo.recipes import scenes_prior

SIGMA_Y = 0.05
N = {"digits": {"validation": 16, "held out": 32}, "scenes": {"validation": 16, "held out": 64}}
"""World and split -> pictures that are measured."""
DENOISE = (0.0, 0.02, 0.05, 0.1)
"""Weights of the total variation that a classical result is denoised with: its four settings."""


@dataclass(frozen=True)
class World:
    """Pictures, their prior, and the features in which sets of them are compared.

    top  the noise level at which sampling starts
    """

    shape: tuple[int, int, int]
    top: float
    prior: Callable[[], Denoiser]
    pictures: Callable[[str], Tensor]
    features: Callable[[Tensor], Tensor]


@functools.cache
def _digits(split: str) -> Tensor:
    """Held-out digits are the test split, validation the last of the training split."""
    return digits.load("test")[0] if split == "held out" else digits.load("train")[0][-N["digits"]["validation"] :]


@functools.cache
def _axes() -> Callable[[Tensor], Tensor]:
    return metrics.pca_features(grey(digits.load("all")[0]), 16)


@functools.cache
def _scene_axes() -> Callable[[Tensor], Tensor]:
    return metrics.pca_features(scenes_prior.features(scenes_prior.pictures("other")), 16)


WORLDS = {
    "digits": World(
        digits.SHAPE,
        15.0,
        lambda: zoo.load("digits", device="cpu").given(label=torch.tensor([digits.CLASSES])),
        _digits,
        lambda x: _axes()(grey(x)),
    ),
    "scenes": World(
        scenes_prior.SHAPE,
        40.0,
        lambda: zoo.load("scenes-prior", device="cpu"),
        scenes_prior.pictures,
        lambda x: _scene_axes()(scenes_prior.features(x)),
    ),
}

PROBLEMS: dict[tuple[str, str], Callable[[], LinearOperator]] = {
    ("digits", "half"): lambda: Mask.half(digits.SHAPE, "bottom"),
    ("digits", "super-resolution"): lambda: BlockAverage(digits.SHAPE, 4),
    ("digits", "deblurring"): lambda: Blur(gaussian_kernel(1.5), digits.SHAPE),
    ("scenes", "box"): lambda: Mask.box(scenes_prior.SHAPE, 12),
    ("scenes", "random"): lambda: Mask.random(scenes_prior.SHAPE, 0.25, generator(1)),
    ("scenes", "super-resolution"): lambda: BlockAverage(scenes_prior.SHAPE, 4),
    ("scenes", "deblurring"): lambda: Blur(gaussian_kernel(1.5), scenes_prior.SHAPE),
    ("scenes", "colour"): lambda: Grey(scenes_prior.SHAPE),
}
"""World and problem -> its operator; the noise has the deviation SIGMA_Y."""


@functools.cache
def posed(world: str, problem: str, split: str) -> tuple[LinearOperator, Tensor, Tensor]:
    """The operator, the true pictures of a split (n, C, H, W), and their measurements, of one fixed noise."""
    A, x0 = PROBLEMS[world, problem](), WORLDS[world].pictures(split)[: N[world][split]]
    return A, x0, measure(A, x0, GaussianNoise(SIGMA_Y), generator(11, len(x0)))


def classical(A: LinearOperator, y: Tensor, weight: float) -> Tensor:
    """What is done without a model, then denoised by total variation of this weight (Chambolle 2004).

    A mask is filled biharmonically, a block average enlarged bicubically, a blur inverted by Wiener's filter with the noise of y
    over the variance of pictures; grey stays grey.
    """
    from skimage.restoration import denoise_tv_chambolle, inpaint_biharmonic, wiener

    if isinstance(A, Mask):
        hidden = ~A.observed[0].numpy()
        done = [np.moveaxis(inpaint_biharmonic(np.moveaxis(one.numpy(), 0, -1), hidden, channel_axis=-1), -1, 0) for one in y]
    elif isinstance(A, BlockAverage):
        done = F.interpolate(y, A.shape[-2:], mode="bicubic").numpy()
    elif isinstance(A, Blur):
        delta = torch.zeros(1, *A.shape)
        delta[..., A.shape[-2] // 2, A.shape[-1] // 2] = 1
        psf = A(delta)[0, 0].numpy()
        done = [np.stack([wiener(channel.numpy(), psf, SIGMA_Y**2 / 0.25, clip=False) for channel in one]) for one in y]
    else:
        done = y.expand(-1, *A.shape).numpy()
    if weight:
        done = [denoise_tv_chambolle(np.asarray(one), weight, channel_axis=0) for one in done]
    return torch.as_tensor(np.stack(done), dtype=torch.float32).clamp(-1, 1)
