"""Clips of twice the size: the spatial stage of a cascade, in latent space (Video LDM; Blattmann et al. 2023, Sec. 3.4).

    z_high = e + r,    r drawn by D(x, sigma; low, s),    e = encode(bilinear(decode(z_low + s eps)))

The network draws what each enlarged frame lacks. It is told of the small frame behind noise of level s, and s (conditioning
augmentation; Cascaded Diffusion; Ho et al. 2021): s = 0 for true clips, more for those that may be wrong. Its temporal layers let
the frames agree on what they make up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser, from_edm
from course_lib.devices import SampleNoise, autocast
from course_lib.nets.unet import UNet
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.video.conditioning import augmented, enlarged
from course_lib.video.inflation import Temporal, inflated, mixed
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.video_data import LATENT

FACTOR = 2
PLACE = 4
"""Pixels of a small frame to a latent of the large one, along each side."""
TOLD = 2 * LATENT + 3 * PLACE**2 + 1
SIGMA_DATA = 0.35
"""About the root mean square of r on true clips."""
LEVELS = karras(2, 0.02, 4.0)
"""Almost the mean of r, which the decoder makes sharp: more steps draw detail of which less is true, see `judge_upsampler`."""
BATCH = 8


class Beside(nn.Module):
    """net(x (N, 4, H, W), time, low (N, TOLD, H, W)) -> (N, 4, H, W): a U-Net of frames that sees `low`, see `told`, beside x."""

    conditions = ("low",)

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.net = UNet(LATENT + TOLD, widths, blocks=1, attention=(), out=LATENT)

    def check_condition(self, low: Tensor | None = None) -> None:
        """Raise ValueError where the small frames are not told, or have other channels."""
        if low is None or low.shape[1] != TOLD:
            shape = None if low is None else tuple(low.shape)
            raise ValueError(f"low has shape {shape}; expected (N, {TOLD}, H, W): see upsampler.told")

    def forward(self, x: Tensor, time: Tensor, low: Tensor) -> Tensor:
        return self.net(torch.cat([x, low.to(x)], 1), time)


@torch.no_grad()
def told(model: Pretrained, low: Tensor, s: Tensor, eps: Tensor) -> Tensor:
    """The condition (B, T, TOLD, 2 H, 2 W) of clips of latents low (B, T, 4, H, W), with s (B,) and eps as low.

    Of z = low + s eps and the frame x = decode(z): first e, the latents of x enlarged by bilinear interpolation; the pixels of x,
    PLACE x PLACE to a place; z, each number at 2 x 2 places; and s.
    """
    z = augmented(low, s, eps)
    with autocast(model.device):
        x = model.decode(z.flatten(0, 1)).float()
        e = model.encode(F.interpolate(x, scale_factor=FACTOR, mode="bilinear")).float()
    parts = [part.unflatten(0, z.shape[:2]) for part in (e, F.pixel_unshuffle(x, PLACE))]
    level = s.to(z).view(-1, 1, 1, 1, 1).expand_as(parts[0][:, :, :1])
    return torch.cat([*parts, enlarged(z, FACTOR, "nearest"), level], 2)


@dataclass(frozen=True)
class Upsampler:
    """Clips of latents (N, T, 4, H, W) -> (N, T, 4, 2 H, 2 W), by DDIM over LEVELS.

    model     the image model whose latents they are
    denoiser  D(x, sigma; low), see `told`, of what e lacks
    """

    model: Pretrained
    denoiser: NetworkDenoiser

    @property
    def temporal(self) -> Temporal:
        """The temporal layers."""
        return self.denoiser.net.temporal

    @torch.no_grad()
    def __call__(
        self, low: Tensor, s: float = 0.0, seed: int = 0, m: float = 1.0, levels: Tensor = LEVELS, behind: bool = False
    ) -> Tensor:
        """Draw them: `low` behind noise of level s, with each temporal layer's share multiplied by m; 0 is frame by frame.

        Where `low` is `behind` noise of that level already, it is told of, and none is added.
        Clip i depends on low[i] and (seed, i), not on its batch. Raises ValueError for s < 0 and for what is no clip of latents.
        """
        if low.ndim != 5 or low.shape[2] != LATENT:
            raise ValueError(f"low has shape {tuple(low.shape)}; expected clips of latents (N, T, {LATENT}, H, W)")
        found = []
        for first in range(0, len(low), BATCH):
            some = low[first : first + BATCH].float()
            eps = torch.zeros_like(some) if behind else SampleNoise(seed + 1, first)(some)
            condition = told(self.model, some, torch.full((len(some),), float(s)), eps)
            e = condition[:, :, :LATENT]
            x = SampleNoise(seed, first)(e) * levels[0].float()
            with autocast(low.device), mixed(self.denoiser.net, m):
                found.append(e + sample(self.denoiser.given(low=condition), x, levels).float())
        return torch.cat(found)


def wrap(model: Pretrained, net: nn.ModuleDict) -> Upsampler:
    """The upsampler of a network of frames and its temporal layers."""
    return Upsampler(model, inflated(from_edm(net["frames"].eval(), SIGMA_DATA), net["temporal"].eval()))
