"""Small locked networks, conditions of theirs, and controls, for the tests of nets/control.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from course_lib.denoisers import NetworkDenoiser, from_diffusers, from_edm
from course_lib.nets import mini_sd
from course_lib.nets.control import ControlNet, control_of
from course_lib.nets.unet import UNet
from tests.draws import normal

F64 = torch.float64
B = 2


@dataclass(frozen=True)
class Base:
    """A locked network as a Denoiser, an input of it, and two conditions, of which the second is the reference."""

    D: NetworkDenoiser
    x: torch.Tensor
    sigma: torch.Tensor
    given: tuple[dict[str, Any], dict[str, Any]]
    factor: int

    def of(self, which: int = 0, D: NetworkDenoiser | None = None) -> NetworkDenoiser:
        return (D or self.D).given(**self.given[which])

    def map(self, seed: int = 0, rows: int = B) -> torch.Tensor:
        sides = [self.factor * side for side in self.x.shape[-2:]]
        return torch.rand(rows, 3, *sides, generator=torch.Generator().manual_seed(seed)).to(self.x)

    def control(self, seed: int = 0, learnt: bool = False) -> ControlNet:
        made = control_of(self.D.net, seed=seed).to(self.x.dtype)
        return randomised(made, seed) if learnt else made


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """All weights moved, so that no layer is at the zero at which it starts."""
    for k, p in enumerate(net.parameters()):
        p.data += 0.1 * normal(*p.shape, seed=1000 * seed + k).to(p)
    return net


def pixels(classes: int, dtype: torch.dtype) -> Base:
    torch.manual_seed(1)
    net = randomised(UNet(channels=2, widths=(16, 32), blocks=1, attention=(1,), classes=classes)).to(dtype)
    labels = ({"label": torch.tensor([0, 2])}, {"label": torch.tensor([3, 3])}) if classes else ({}, {})
    D, x = from_edm(net.eval().requires_grad_(False)), normal(B, 2, 8, 8, seed=2).to(dtype)
    return Base(D, x, torch.tensor([0.4, 2.0], dtype=F64), labels, 1)


def random_mini_sd() -> NetworkDenoiser:
    """`mini-sd`'s U-Net with random weights, frozen."""
    torch.manual_seed(3)
    return from_diffusers(mini_sd.unet().eval().requires_grad_(False), mini_sd.scheduler())


def latents(dtype: torch.dtype) -> Base:
    torch.manual_seed(3)
    unet = mini_sd.unet((32, 64)).to(dtype).eval().requires_grad_(False)
    text = tuple({"encoder_hidden_states": normal(B, 5, mini_sd.WIDTH, seed=seed).to(dtype)} for seed in (4, 5))
    x = normal(B, 4, 8, 8, seed=6).to(dtype)
    return Base(from_diffusers(unet, mini_sd.scheduler()), x, torch.tensor([0.4, 2.0], dtype=F64), text, 8)


KINDS = ("no classes", "classes", "text")


@functools.cache
def base(kind: str, dtype: torch.dtype = torch.float32) -> Base:
    """One of KINDS: the readable U-Net on pixels, without classes and with three, and mini-sd's on latents."""
    return latents(dtype) if kind == "text" else pixels({"no classes": 0, "classes": 3}[kind], dtype)
