"""The KL autoencoder of latent diffusion, written to be read (Rombach et al. 2022, Sec. 3.1; Kingma and Welling 2014)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Posterior:
    """q(z | x) = N(mean, diag(std^2)) over latents, mean and log_var (B, c, h, w)."""

    mean: Tensor
    log_var: Tensor

    @property
    def std(self) -> Tensor:
        """exp(log_var / 2)."""
        return (self.log_var / 2).exp()

    def sample(self, eps: Tensor) -> Tensor:
        """z = mean + std eps: a draw that has gradients, for eps ~ N(0, I) (Kingma and Welling 2014, Sec. 2.4)."""
        return self.mean + self.std * eps

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) = sum (mean^2 + std^2 - 1 - log_var) / 2, (B,) in nats (Kingma and Welling 2014, App. B)."""
        return (self.mean**2 + self.log_var.exp() - 1 - self.log_var).flatten(1).sum(1) / 2


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Attention(nn.Module):
    """x + out(softmax(q k^T / sqrt(C)) v) with one head over all places; shape kept."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        h = self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return x + h.transpose(1, 2).reshape(x.shape)


class Halve(nn.Conv2d):
    """A convolution of stride 2, with a row and a column of zeros at the far ends only; H and W are halved."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Conv2d):
    """Every pixel four times, then a convolution; H and W are doubled."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, then a change of resolution, or none."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, resize: type[Halve] | type[Double] | None):
        super().__init__()
        self.blocks = nn.Sequential(*(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks)))
        self.resize = nn.Identity() if resize is None else resize(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.blocks(x))


class Coder(nn.Module):
    """first, levels, middle, last; the decoder has its middle before its levels."""

    def __init__(self, c_in: int, widths: tuple[int, ...], c_out: int, blocks: int, groups: int, down: bool):
        super().__init__()
        self.down = down
        self.first = nn.Conv2d(c_in, widths[0], 3, padding=1)
        resize, end = (Halve if down else Double), len(widths) - 1
        self.levels = nn.Sequential(*(
            Level(widths[max(0, i - 1)], width, blocks, groups, resize if i < end else None) for i, width in enumerate(widths)
        ))  # fmt: skip
        c = widths[-1] if down else widths[0]
        self.middle = nn.Sequential(ResBlock(c, c, groups), Attention(c, groups), ResBlock(c, c, groups))
        self.last_norm = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.last = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.middle(self.levels(h)) if self.down else self.levels(self.middle(h))
        return self.last(F.silu(self.last_norm(h)))


class VAE(nn.Module):
    """encode(x (B, C, H, W)) -> Posterior over (B, latent, H/f, W/f); decode(z) -> (B, C, H, W); f = 2^(len(widths) - 1).

    `widths` are the encoder's channels from fine to coarse, `blocks` its residual blocks a level, of which the decoder has one
    more. Raises ValueError for pictures that f does not divide, and for latents with another number of channels.
    """

    def __init__(
        self, channels: int = 3, widths: tuple[int, ...] = (16, 32, 64, 96), latent: int = 4, blocks: int = 1, groups: int = 8
    ):
        super().__init__()
        self.factor, self.latent = 2 ** (len(widths) - 1), latent
        self.encoder = Coder(channels, widths, 2 * latent, blocks, groups, down=True)
        self.decoder = Coder(latent, widths[::-1], channels, blocks + 1, groups, down=False)
        self.into, self.out_of = nn.Conv2d(2 * latent, 2 * latent, 1), nn.Conv2d(latent, latent, 1)

    def encode(self, x: Tensor) -> Posterior:
        """q(z | x), its log variance kept within [-30, 20]."""
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected height and width divisible by {self.factor}")
        mean, log_var = self.into(self.encoder(x)).chunk(2, 1)
        return Posterior(mean, log_var.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        """The picture of a latent."""
        if z.shape[1] != self.latent:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected {self.latent} channels")
        return self.decoder(self.out_of(z))


WORDS = (
    (r"^quant_conv", "into"), (r"^post_quant_conv", "out_of"), (r"\bconv_in\b", "first"), (r"\bconv_out\b", "last"),
    (r"\bconv_norm_out\b", "last_norm"), (r"\b(down|up)_blocks\b", "levels"), (r"\bresnets\b", "blocks"),
    (r"\b(down|up)samplers\.0\.conv\b", "resize"), (r"\bconv_shortcut\b", "skip"), (r"\bmid_block\.blocks\.0", "middle.0"),
    (r"\bmid_block\.attentions\.0", "middle.1"), (r"\bmid_block\.blocks\.1", "middle.2"), (r"\bgroup_norm\b", "norm"),
    (r"\bto_out\.0\b", "out"), (r"\bto_([qkv])\b", r"\1"),
)  # fmt: skip
"""diffusers' names -> ours."""


def from_diffusers_vae(model: Any) -> VAE:
    """The same network with the weights of a diffusers `AutoencoderKL`; equal outputs, in this module's words.

    Raises ValueError, with their names, for parts that `VAE` has not.
    """
    config = model.config
    net = VAE(
        config.in_channels, tuple(config.block_out_channels), config.latent_channels, config.layers_per_block,
        config.norm_num_groups,
    )  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        for theirs, ours in WORDS:
            name = re.sub(theirs, ours, name)
        state[name] = value
    other = sorted(state.keys() ^ net.state_dict().keys())
    if other:
        raise ValueError(f"the AutoencoderKL differs from VAE in {', '.join(other[:4])}; expected plain blocks with attention")
    net.load_state_dict(state)
    return net.to(next(model.parameters()).dtype).train(model.training)
