"""Clips of twice the size: the spatial stage of a cascade, in latent space (Video LDM; Blattmann et al. 2023, Sec. 3.4).

    z_high = enlarged(z_low) + r,    r drawn by D(x, sigma; enlarged(z_low) + s eps, s)

The network draws what is missing of each frame's latents, and is told of the small frame behind noise of level s (conditioning
augmentation; Imagen Video; Ho et al. 2022): s = 0 for true clips, more for those that a model drew. Its temporal layers let the
frames agree on what they make up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser, from_edm
from course_lib.devices import SampleNoise, autocast
from course_lib.nets.unet import UNet
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.video.conditioning import augmented, enlarged
from course_lib.video.inflation import Temporal, inflated, mixed
from course_lib.video.masks import every
from course_lib.zoo.video import PretrainedVideo, latents_of
from course_lib.zoo.video_data import LATENT

FACTOR = 2
SIGMA_DATA = 0.7
"""The root mean square of r on true clips."""
LEVELS = karras(8, 0.02, 10.0)
BATCH = 8


class Beside(nn.Module):
    """net(x (N, 4, H, W), time, low (N, 5, H, W)) -> (N, 4, H, W): a U-Net of frames that sees `low` beside x, as more channels.

    low  the frame of half the size, enlarged, behind noise of level s, and s itself in the last channel; see `told`
    """

    conditions = ("low",)

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.net = UNet(2 * LATENT + 1, widths, blocks=1, attention=(), out=LATENT)

    def check_condition(self, low: Tensor | None = None) -> None:
        """Raise ValueError where the small frames are not told, or have other channels."""
        if low is None or low.shape[1] != LATENT + 1:
            shape = None if low is None else tuple(low.shape)
            raise ValueError(f"low has shape {shape}; expected (N, {LATENT + 1}, H, W): see upsampler.told")

    def forward(self, x: Tensor, time: Tensor, low: Tensor) -> Tensor:
        return self.net(torch.cat([x, low], 1), time)


def told(low: Tensor, s: Tensor, eps: Tensor) -> Tensor:
    """The condition `low` (B, T, 5, 2 H, 2 W) of clips of latents (B, T, 4, H, W): enlarged, behind noise s (B,), and s."""
    big = augmented(enlarged(low, FACTOR), s, eps)
    return torch.cat([big, s.view(-1, 1, 1, 1, 1).expand_as(big[:, :, :1])], 2)


@dataclass(frozen=True)
class Upsampler:
    """Clips of latents (N, T, 4, H, W) -> (N, T, 4, 2 H, 2 W), by 8 steps of DDIM."""

    denoiser: NetworkDenoiser

    @property
    def temporal(self) -> Temporal:
        """The temporal layers."""
        return self.denoiser.net.temporal

    @torch.no_grad()
    def __call__(self, low: Tensor, s: float = 0.0, seed: int = 0, m: float = 1.0) -> Tensor:
        """Draw them: `low` behind noise of level s, with each temporal layer's share multiplied by m; 0 is frame by frame.

        Clip i depends on low[i] and (seed, i), not on its batch. Raises ValueError for s < 0 and for what is no clip of latents.
        """
        if low.ndim != 5 or low.shape[2] != LATENT:
            raise ValueError(f"low has shape {tuple(low.shape)}; expected clips of latents (N, T, {LATENT}, H, W)")
        found = []
        for first in range(0, len(low), BATCH):
            some = low[first : first + BATCH].float()
            big = enlarged(some, FACTOR)
            eps = SampleNoise(seed + 1, first)(torch.empty_like(big))
            D = self.denoiser.given(low=told(some, torch.full((len(some),), float(s)), eps))
            x = SampleNoise(seed, first)(torch.empty_like(big)) * LEVELS[0].float()
            with autocast(low.device), mixed(self.denoiser.net, m):
                found.append(big + sample(D, x, LEVELS).float())
        return torch.cat(found)


def wrap(net: nn.ModuleDict) -> Upsampler:
    """The upsampler of a network of frames and its temporal layers."""
    return Upsampler(inflated(from_edm(net["frames"].eval(), SIGMA_DATA), net["temporal"].eval()))


def cascade(
    model: PretrainedVideo, upsampler: Upsampler, prompts: Sequence[str], s: float = 0.0, seed: int = 0, steps: int = 20
) -> Tensor:
    """Clips (N, 2 T - 1, 3, 128, 128) of these prompts in three stages, as Imagen Video's: T key frames by the model; a frame
    between any two, by the same model, told every second frame of a window; each frame at twice its size.

    `s` of conditioning augmentation is for the last stage. What the model draws are frames of a motion at its own rate: that
    between two of them lies half a frame's motion is for its interpolation to find.
    """
    keys, T = latents_of(model, prompts, seed=seed, steps=steps), model.frames
    z = torch.zeros(len(prompts), 2 * T - 1, *keys.shape[2:])
    z[:, ::2], there = keys, every(2 * T - 1, 2)
    for start in (0, T - 2, T - 1):
        window = slice(start, start + T)
        new = ~there[window]
        new[-1] = False  # the last frame of a window lies between no two
        drawn = latents_of(model, prompts, seed=seed + start + 1, steps=steps, known=there[window], z=z[:, window])
        z[:, window] = torch.where(new[:, None, None, None], drawn, z[:, window])
        there[window] |= new
    return frames_of_latents(model, upsampler(z, s, seed))


def frames_of_latents(model: PretrainedVideo, z: Tensor) -> Tensor:
    """Clips (N, T, 3, 8 H, 8 W) in [-1, 1] of latents (N, T, 4, H, W) of any size."""
    return torch.cat([model.decode(some).float() for some in z.split(1)])
