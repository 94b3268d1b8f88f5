"""What else tells a network a picture, each beside ControlNet (nets/control.py) and used alike.

    module = NAME_of(D.net)                                  what is to be trained
    D_told = told(D, module)                                 the Denoiser, for its loss and to sample
    D_told.given(map=map, **text)                            maps (B, 3, H, W) in [0, 1]; without a map it is D

    t2i_of       T2I-Adapter: features of the map alone are added within the encoder (Mou et al. 2023)
    light_of     ControlNet-lite: residuals of the map alone, one convolution for each block of the copy
    gaussian_of  a ControlNet without zero convolutions
    concat_of    the map as further channels of the input, the whole U-Net fine-tuned (Stable Diffusion 2's depth model)

`told` takes a ControlNet too. For `mini-sd`, whose U-Net has 2,839,268 weights, they have 383,776, 312,624, 1,386,032 and
2,949,860; a ControlNet has as many as the one without zeros. Light and concatenated networks start as D to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser
from course_lib.nets.control import (
    ControlNet,
    check_given,
    check_map,
    check_rows,
    check_sides,
    control_of,
    controlled,
    scaled,
)
from course_lib.nets.unet import UNet


def told(D: NetworkDenoiser, module: nn.Module) -> NetworkDenoiser:
    """The Denoiser with what one of `NAME_of(D.net)` or `control_of(D.net)` made; its condition is `map`.

    Raises ValueError for a module that is none of these, or was made for a network of other widths.
    """
    if isinstance(module, ControlNet):
        return controlled(D, map=module)
    if isinstance(module, T2IAdapter):
        return adapted(D, map=module)
    if isinstance(module, Concatenated):
        return replace(D, net=module)
    raise ValueError(f"module is a {type(module).__name__}; expected what control_of, light_of, t2i_of or concat_of returns")


# --- T2I-Adapter -----------------------------------------------------------------------------------------------------


class AdapterBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(x))), shape kept."""

    def __init__(self, width: int):
        super().__init__()
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class Scale(nn.Module):
    """One scale of the adapter: half the side, but for the first, its width, and residual blocks."""

    def __init__(self, before: int, width: int, blocks: int, down: bool):
        super().__init__()
        self.down = down
        self.in_conv = nn.Conv2d(before, width, 1) if before != width else nn.Identity()
        self.resnets = nn.Sequential(*(AdapterBlock(width) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets(self.in_conv(F.avg_pool2d(x, 2, ceil_mode=True) if self.down else x))


class T2IAdapter(nn.Module):
    """F_c^1, ..., F_c^n: a map (B, C, f H, f W) -> features (B, C_i, H / 2^(i-1), W / 2^(i-1)) for each scale of an encoder.

    Pixel-unshuffle by f, so that no line is lost, a convolution, and residual blocks at each scale (Mou et al. 2023,
    Sec. 3.3). Names of layers are those of diffusers' T2IAdapter. Nothing starts at zero.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], blocks: int = 2, factor: int = 8):
        super().__init__()
        self.channels, self.widths, self.factor = channels, widths, factor
        self.conv_in = nn.Conv2d(channels * factor**2, widths[0], 3, padding=1)
        self.body = nn.ModuleList([Scale(widths[0], widths[0], blocks, down=False)])
        self.body.extend(Scale(before, width, blocks, down=True) for before, width in pairwise(widths))

    def forward(self, c: Tensor) -> list[Tensor]:
        h, features = self.conv_in(F.pixel_unshuffle(c, self.factor)), []
        for scale in self.body:
            h = scale(h)
            features.append(h)
        return features


def t2i_of(net: nn.Module, channels: int = 3, blocks: int = 2, seed: int = 0) -> T2IAdapter:
    """A T2I-Adapter for `net`, diffusers' UNet2DConditionModel of latents, bare or in its adapter; untrained.

    Raises ValueError for another kind of network, and for one with a block without attention that is not the last:
    diffusers would add the features of such a block after it has halved the side.
    """
    net = getattr(net, "unet", net)
    if not hasattr(net, "down_blocks") or not hasattr(net, "mid_block"):
        raise ValueError(f"net is a {type(net).__name__}; expected diffusers' UNet2DConditionModel")
    for i, block in enumerate(net.down_blocks):
        if not hasattr(block, "attentions") and block.downsamplers:
            raise ValueError(f"block {i} of net has no attention and halves the side; expected only the last block to have none")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made = T2IAdapter(channels, _widths(net), blocks)
    return made.to(next(net.parameters()).device)


def _widths(net: nn.Module) -> tuple[int, ...]:
    """The channels of each scale of the encoder of diffusers' U-Net."""
    return tuple(block.resnets[-1].out_channels for block in net.down_blocks)


class Adapted(nn.Module):
    """F(x) with F_enc^i + sum_k s_k F_ck^i in its encoder: features of maps, added at scale i (Mou et al. 2023, Sec. 3.3).

        net(x, time, sketch=map, sketch_scale=s, **condition)

    The features depend on the maps alone, not on x or the time. `net(x, time, **net.once(sketch=map))` is the same, and the
    adapter is evaluated once for a picture, not once a step. A ControlNet's residuals depend on both.
    """

    def __init__(self, net: nn.Module, adapters: Mapping[str, T2IAdapter]):
        super().__init__()
        self.net, self.adapters = net, nn.ModuleDict(adapters)
        kept = [f"{name}_{i}" for name, adapter in adapters.items() for i in range(len(adapter.widths))]
        self.conditions = [*getattr(net, "conditions", ()), *adapters, *(f"{name}_scale" for name in adapters), *kept]

    def once(self, **maps: Tensor) -> dict[str, Tensor]:
        """The features of these maps, to be given in their stead: NAME_0, NAME_1, ..."""
        return {f"{name}_{i}": f for name, c in maps.items() for i, f in enumerate(self.adapters[name](c))}

    def check_condition(self, **condition: Any) -> None:
        """Raise ValueError for a condition map of another shape or range, and for scales that are none."""
        for name, adapter in self.adapters.items():
            check_given(name, condition, adapter.channels, len(adapter.widths))

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        total: list[Tensor] | None = None
        for name, adapter in self.adapters.items():
            c, scale = condition.pop(name, None), condition.pop(f"{name}_scale", None)
            features = [condition.pop(f"{name}_{i}", None) for i in range(len(adapter.widths))]
            if features[0] is None:
                if c is None:
                    continue
                check_rows(name, c, x)
                check_sides(name, c, x, adapter.factor)
                features = adapter(c)
            features = scaled(features, scale)
            total = features if total is None else [a + b for a, b in zip(total, features, strict=True)]
        if total is not None:  # a list of its own, which diffusers empties
            condition["down_intrablock_additional_residuals"] = list(total)
        return self.net(x, time, **condition)


def adapted(D: NetworkDenoiser, **adapters: T2IAdapter) -> NetworkDenoiser:
    """The Denoiser whose network takes these T2I-Adapters: `adapted(D, sketch=adapter).given(sketch=map, sketch_scale=s)`.

    Raises ValueError for no adapters and for one whose features have other widths than those of the network.
    """
    if not adapters:
        raise ValueError("no adapter was given; expected at least one, such as adapted(D, sketch=t2i_of(D.net))")
    widths = _widths(D.net.unet)
    for name, adapter in adapters.items():
        if adapter.widths != widths:
            raise ValueError(f"adapter {name!r} has features of {adapter.widths} channels; this network has {widths}")
    return replace(D, net=Adapted(D.net, adapters))


# --- ControlNet, ablated ---------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """h_i = conv_i(silu(h_(i-1))), h_0 the hint: in the place of a ControlNet's copy, one convolution for each of its blocks."""

    def __init__(self, blocks: nn.ModuleList):
        super().__init__()
        self.blocks = blocks

    def encode(self, x: Tensor, time: Tensor, hint: Tensor, **condition: Any) -> list[Tensor]:
        """The features of the map alone: x, the time and the text are not looked at."""
        features = [hint]
        for block in self.blocks:
            features.append(block(F.silu(features[-1])))
        return features


def light_of(net: nn.Module, channels: int = 3, widths: tuple[int, ...] | None = None, seed: int = 0) -> ControlNet:
    """ControlNet-lite, Z_i(h_i) with h_0 = E(c): what a ControlNet adds, from the map alone and without the copy of `net`.

    Each block of the copy is one convolution (Zhang et al. 2023, Fig. 8). Arguments and errors are those of `control_of`.
    """
    control = control_of(net, channels, widths, seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        control.hint.conv_out.reset_parameters()  # Z is zero at first; were h_0 zero as well, nothing would learn of the map
        blocks = nn.ModuleList(
            nn.Conv2d(before.out_channels, after.out_channels, 3, stride=stride, padding=1)
            for (before, after), stride in zip(pairwise(control.zeros), _strides(control.copy), strict=True)
        )
    control.copy = Convolutions(blocks).to(next(net.parameters()).device)
    return control


def _strides(encoder: nn.Module) -> list[int]:
    """By how much each feature of an encoder but the first is smaller than the one before it; the last is the middle's."""
    if isinstance(encoder, UNet):
        halves = [isinstance(layer, nn.Conv2d) for layer in encoder.down]
    else:
        halves = [half for block in encoder.down_blocks
                  for half in [False] * len(block.resnets) + [True] * len(block.downsamplers or ())]  # fmt: skip
    return [*(1 + half for half in halves), 1]


def gaussian_of(net: nn.Module, channels: int = 3, widths: tuple[int, ...] | None = None, seed: int = 0) -> ControlNet:
    """A ControlNet for `net` without zero convolutions; arguments and errors are those of `control_of`."""
    return without_zeros(control_of(net, channels, widths, seed), seed)


@torch.no_grad()
def without_zeros(control: ControlNet, seed: int = 0) -> ControlNet:
    """The same control, changed in place: its zero convolutions, the hint's last too, start at N(0, 1 / fan-in), biases at 0.

    The ablation of Zhang et al. 2023, Fig. 8, whose variance is not given; this one keeps the size of the features.
    """
    source = torch.Generator().manual_seed(seed)
    for Z in (control.hint.conv_out, *control.zeros):
        drawn = torch.randn(Z.weight.shape, generator=source)
        Z.weight.copy_(drawn / Z.weight[0].numel() ** 0.5)
    return control


# --- concatenation ---------------------------------------------------------------------------------------------------


class Widened(nn.Module):
    """W [x, m] = W_x x + W_m m, a convolution with further input channels m, whose weights W_m start at zero.

    Two convolutions rather than one with both weights side by side: that sums in another order, and would not start as
    the first to the last bit.
    """

    def __init__(self, own: nn.Conv2d, more: int):
        super().__init__()
        self.own = own
        self.new = nn.Conv2d(more, own.out_channels, own.kernel_size, own.stride, own.padding, bias=False)
        nn.init.zeros_(self.new.weight)

    def forward(self, x: Tensor) -> Tensor:
        x, m = x.split([self.own.in_channels, self.new.in_channels], 1)
        return self.own(x) + self.new(m)


class Concatenated(nn.Module):
    """F([x, m]; Theta'), m the map at the size of x: a network whose first convolution has further channels for it.

        net(x, time, map=map, **condition)

    Stable Diffusion 2's depth model resizes its map to the latents'. A line of one pixel would not survive that, so the map
    is pixel-unshuffled here: `factor` x `factor` pixels become channels, and nothing is lost. No map is a map of zeros.
    """

    def __init__(self, net: nn.Module, channels: int, factor: int):
        super().__init__()
        self.net, self.channels, self.factor = net, channels, factor
        self.conditions = [*getattr(net, "conditions", ()), "map"]

    def check_condition(self, **condition: Any) -> None:
        """Raise ValueError for a condition map of another shape or range."""
        if condition.get("map") is not None:
            check_map("map", condition["map"], self.channels)

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        c = condition.pop("map", None)
        if c is None:
            c = x.new_zeros(len(x), self.channels, *(self.factor * side for side in x.shape[-2:]))
        check_rows("map", c, x)
        check_sides("map", c, x, self.factor)
        m = F.pixel_unshuffle(c.to(x.dtype), self.factor)
        return self.net(torch.cat([x, m.expand(len(x), -1, -1, -1)], 1), time, **condition)


def concat_of(net: nn.Module, channels: int = 3, factor: int | None = None) -> Concatenated:
    """A copy of `net` that is told a map by further input channels and learns as a whole; it starts as `net`.

    net     a `UNet`, or a network of diffusers in its adapter, as `D.net` is
    factor  pixels of the map to one of x, along each side; 8 for a network of diffusers, which is one of latents, else 1

    Raises ValueError for another kind of network.
    """
    made = copy.deepcopy(net).requires_grad_(True)
    inner, first = (made, "first") if isinstance(made, UNet) else (getattr(made, "unet", None), "conv_in")
    if not hasattr(inner, first):
        raise ValueError(f"net is a {type(net).__name__}; expected a UNet of this course or the D.net of a diffusers U-Net")
    factor = factor or (1 if isinstance(made, UNet) else 8)
    own = getattr(inner, first)
    setattr(inner, first, Widened(own, channels * factor**2).to(own.weight.device))
    return Concatenated(made, channels, factor)
