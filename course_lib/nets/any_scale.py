"""A decoder for pictures of any size: a VAE's own decoder up to its last features, then a local implicit image function.

After Kim and Kim 2024 ("Arbitrary-Scale Image Generation and Upsampling using Latent Diffusion Model and Implicit Neural
Decoder"), whose decoder keeps the size of the latent and is trained with the VAE. Here the VAE is trained already: its decoder
stays as it is, and the function adds to the enlarged picture what the enlargement lacks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets.liif import LIIF, places
from course_lib.nets.unet import zero


class AnyScale(nn.Module):
    """residual(features, picture, at, cell) over `enlarged`: what a bicubic enlargement lacks, at places of the plane.

    channels  of the decoder's last features, to which the decoded picture's own three are added

    Zero at the start: the decoder then gives the bicubic enlargement itself.
    """

    def __init__(self, channels: int = 16, hidden: int = 96, layers: int = 3):
        super().__init__()
        self.liif = LIIF(channels + 3, 3, hidden, layers)
        zero(self.liif.mlp[-1])

    def forward(self, features: Tensor, at: Tensor, cell: Tensor) -> Tensor:
        """Features (B, channels + 3, h, w), places (N, 2) and cell (2,) as of `LIIF` -> (B, 3, N)."""
        return self.liif(features, at, cell)


def enlarged(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Pictures at another height and width by bicubic interpolation, smoothed first where they become smaller."""
    return F.interpolate(x, shape, mode="bicubic", antialias=True)


class AnyScaleDecoder:
    """Pictures of any size from the latents of a `Pretrained` model that has a VAE; its own size times 0.5 to 4 was trained.

    decode(z, size)   pictures (B, 3, size, size) in [-1, 1] of scaled latents (B, C, h, w)
    """

    SMALLEST, LARGEST = 0.5, 4.0

    def __init__(self, net: AnyScale, model: Any):
        self.net, self.model = net.eval(), model

    @torch.no_grad()
    def features(self, z: Tensor) -> Tensor:
        """The last features of the VAE's decoder beside the picture that it makes of them, (B, channels + 3, H, W)."""
        kept: list[Tensor] = []
        handle = self.model.vae.decoder.conv_act.register_forward_hook(lambda layer, inputs, output: kept.append(output))
        try:
            picture = self.model.decode(z, clamp=False)
        finally:
            handle.remove()
        return torch.cat([kept[0].float(), picture.float()], 1)

    @torch.no_grad()
    def decode(self, z: Tensor, size: int) -> Tensor:
        """Raises ValueError for a size beyond 0.5 to 4 times the model's own."""
        own = self.model.pixels
        if not self.SMALLEST * own <= size <= self.LARGEST * own:
            low, high = (round(scale * own) for scale in (self.SMALLEST, self.LARGEST))
            raise ValueError(f"size = {size}; expected {low} to {high} pixels, 0.5 to 4 times those of {self.model.name!r}")
        features = self.features(z)
        residual = self.net.liif.picture(features, (size, size))
        return (enlarged(features[:, -3:], (size, size)) + residual).clamp(-1, 1)


def queries(features: Tensor, target: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """n random pixels of a size to learn from: places (n, 2), cell (2,), and what the enlargement lacks there, (B, 3, n)."""
    shape = target.shape[-2:]
    rows = torch.randperm(shape[0] * shape[1], generator=generator)[:n].to(target.device)
    lack = (target - enlarged(features[:, -3:], shape)).flatten(2)[..., rows]
    return places(shape, target.device)[rows], torch.tensor([2 / side for side in shape], device=target.device), lack
