"""A latent edge predictor: which lines a noisy latent is about to have, read from the U-Net that denoises it.

Voynov, Aberman and Cohen-Or 2022, "Sketch-Guided Text-to-Image Diffusion Models", who call it the latent guidance predictor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block_ends(net: nn.Module) -> list[nn.Module]:
    """The last layer of each block of diffusers' UNet2DConditionModel before its side changes: down, middle, up.

    `net` is the U-Net, bare or in its adapter. Raises ValueError for another network.
    """
    net = getattr(net, "unet", net)
    if not (hasattr(net, "down_blocks") and hasattr(net, "mid_block")):
        raise ValueError(f"net is a {type(net).__name__}; expected diffusers' UNet2DConditionModel")
    paths = [(getattr(block, "attentions", None) or block.resnets)[-1] for block in (*net.down_blocks, *net.up_blocks)]
    middle = len(net.down_blocks)
    return [*paths[:middle], net.mid_block.resnets[-1], *paths[middle:]]


@contextlib.contextmanager
def tapped(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within, what these layers return is appended to the list, call after call; their outputs stay as they are."""
    kept: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output))
        for layer in layers
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class EdgePredictor(nn.Module):
    """P(F, t): an encoded edge map (B, channels, h, w) from a U-Net's features, every place by itself.

    The features (B, C_i, h_i, w_i) of several layers are brought to the side of the finest and stacked; with them goes t, as
    the sines and cosines of 2 pi t / 2^k, k = 1 ... waves. Then a perceptron, the same one at each place, with ReLU and batch
    normalisation (Voynov et al. 2022, Sec. 3): it sees what a place is, not where it lies, and so a few thousand pictures do.

    features  the sum of the C_i
    channels  of the encoded map
    widths    of the hidden layers
    Raises ValueError for features of another number of channels.
    """

    def __init__(self, features: int, channels: int, widths: tuple[int, ...] = (64, 64), waves: int = 10):
        super().__init__()
        self.features, self.waves, c = features, waves, features + 2 * waves
        self.norm = nn.BatchNorm2d(features)
        self.layers = nn.Sequential()
        for width in widths:
            self.layers.extend([nn.Conv2d(c, width, 1), nn.ReLU(), nn.BatchNorm2d(width)])
            c = width
        self.layers.append(nn.Conv2d(c, channels, 1))

    def forward(self, features: Sequence[Tensor], time: Tensor) -> Tensor:
        """time is (B,) or one for all."""
        found = sum(f.shape[1] for f in features)
        if found != self.features:
            raise ValueError(f"features have {found} channels in all; expected {self.features}, from the layers it was made for")
        side = max((f.shape[-2:] for f in features), key=math.prod)
        stacked = torch.cat([F.interpolate(f, side, mode="bilinear") for f in features], 1)
        k = torch.arange(1, self.waves + 1, device=time.device)
        angle = 2 * math.pi * time.expand(len(stacked))[:, None].float() / 2**k  # (B, waves)
        told = torch.cat([angle.sin(), angle.cos()], 1).to(stacked.dtype)[:, :, None, None].expand(-1, -1, *side)
        return self.layers(torch.cat([self.norm(stacked), told], 1))
