"""ControlNet (Zhang, Rao and Agrawala 2023): a locked network, told a picture by a trainable copy of its encoder.

    y_c = F(x; Theta) + Z(F(x + Z(c; Theta_z1); Theta_c); Theta_z2)                                        (Eq. 2)

F is the network, Theta its frozen weights, Theta_c the copy's, and Z a 1 x 1 convolution that starts at zero, so that y_c is
at first F(x; Theta) to the last bit. `control_of(net)` makes the second term, `controlled(D, edge=...)` adds it: it wraps the
*network*, before the adapter, and what comes out is a Denoiser that every sampler, solver and distillation takes.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser
from course_lib.nets.unet import UNet, zero

WIDTHS = (16, 24, 32, 48)
"""Channels of the hint encoder for latents of an eighth of a picture's side."""


class Hint(nn.Module):
    """Z(E(c)): a condition map (B, C, H, W) -> features (B, width, H / f, W / f), 0 at first; f = 2^(len(widths) - 1).

    A convolution, then for each further width one that keeps the side and one that halves it (Sec. 3.3); the last layer is
    the zero convolution Theta_z1 and is 3 x 3, as in the authors' code and diffusers, whose names of layers these are.
    """

    def __init__(self, channels: int, width: int, widths: tuple[int, ...] = WIDTHS):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for before, after in pairwise(widths):
            self.blocks.append(nn.Conv2d(before, before, 3, padding=1))
            self.blocks.append(nn.Conv2d(before, after, 3, padding=1, stride=2))
        self.conv_out = zero(nn.Conv2d(widths[-1], width, 3, padding=1))

    def forward(self, c: Tensor) -> Tensor:
        h = F.silu(self.conv_in(c))
        for block in self.blocks:
            h = F.silu(block(h))
        return self.conv_out(h)


class Encoder(nn.Module):
    """The encoder and the middle of diffusers' UNet2DConditionModel, copied: all that a ControlNet takes from one."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        for name in ("conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block"):
            setattr(self, name, copy.deepcopy(getattr(unet, name)))
        self.widths = feature_widths(unet)

    def encode(self, x: Tensor, time: Tensor, encoder_hidden_states: Tensor, hint: Tensor | float = 0.0) -> list[Tensor]:
        """The features that the decoder will be given, the middle's last: those of conv_in(x) + hint."""
        told = {"temb": self.time_embedding(self.time_proj(time.expand(len(x))).to(x.dtype))}
        h = self.conv_in(x) + hint
        kept = [h]
        for block in self.down_blocks:
            h, more = block(h, **told, **read_by(block, encoder_hidden_states))
            kept += more
        return [*kept, self.mid_block(h, **told, **read_by(self.mid_block, encoder_hidden_states))]


def read_by(block: nn.Module, text: Tensor) -> dict[str, Tensor]:
    """The text as a block of diffusers takes it, nothing for one that does not attend to it."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


def feature_widths(net: nn.Module) -> tuple[int, ...]:
    """Channels of the features that the encoder of `net` hands to its decoder, in order, the middle's last.

    Raises ValueError for a network that is neither a `UNet` nor diffusers' UNet2DConditionModel, bare or in its adapter.
    """
    net = getattr(net, "unet", net)
    if isinstance(net, UNet):
        return net.widths
    if not (hasattr(net, "down_blocks") and hasattr(net, "mid_block")):
        raise ValueError(f"net is a {type(net).__name__}; expected a UNet of this course or diffusers' UNet2DConditionModel")
    resized = [layer for block in net.down_blocks for layer in (*block.resnets, *(block.downsamplers or ()))]
    return (net.config.block_out_channels[0], *(layer.out_channels for layer in resized), resized[-1].out_channels)


class ControlNet(nn.Module):
    """Z_i(F_i(x + Z(E(c)); Theta_c)), one for each feature i that the decoder is given; all are 0 at first.

    copy   the trainable copy: `copy.encode(x, time, hint=..., **condition)` returns the features
    hint   Z(E(c))
    zeros  the 1 x 1 convolutions Theta_z2, one a feature, the middle's last
    """

    def __init__(self, copy: nn.Module, hint: Hint, zeros: nn.ModuleList):
        super().__init__()
        self.copy, self.hint, self.zeros = copy, hint, zeros

    @property
    def channels(self) -> int:
        """Channels of the condition maps that it takes."""
        return self.hint.conv_in.in_channels

    @property
    def factor(self) -> int:
        """Pixels of a map to one of x, along each side."""
        return 2 ** (len(self.hint.blocks) // 2)

    def forward(self, x: Tensor, time: Tensor, c: Tensor, **condition: Any) -> list[Tensor]:
        check_sides("c", c, x, self.factor)
        features = self.copy.encode(x, time, hint=self.hint(c.to(x.dtype)), **condition)
        return [Z(f) for Z, f in zip(self.zeros, features, strict=True)]


def control_of(net: nn.Module, channels: int = 3, widths: tuple[int, ...] | None = None, seed: int = 0) -> ControlNet:
    """A ControlNet for `net`, untrained: its copy starts at the weights of `net`, and all that it adds is 0.

    net       a `UNet`, or diffusers' UNet2DConditionModel, bare or in its adapter
    channels  of the condition maps
    widths    of the hint encoder, one more than there are halvings between a map and x; WIDTHS for latents, one for pixels
    seed      of the hint encoder's start

    `net` is left as it is. Raises ValueError for another kind of network, and for conditions that no copy here is given.
    """
    net, features = getattr(net, "unet", net), feature_widths(net)
    if isinstance(net, UNet):
        encoder, widths = net.encoder(), widths or WIDTHS[:1]
    else:
        check_plain("net", net)
        encoder, widths = Encoder(net), widths or WIDTHS
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        hint = Hint(channels, features[0], widths)
        zeros = nn.ModuleList(zero(nn.Conv2d(width, width, 1)) for width in features)
    made = ControlNet(encoder.requires_grad_(True), hint, zeros)
    return made.to(next(net.parameters()).device)


PLAIN = {
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "global_pool_conditions": False,
    "controlnet_conditioning_channel_order": "rgb",
}
"""What a config of diffusers says where text is all that a U-Net, or a control of it, is told beside x, time and map."""


def check_plain(name: str, model: Any) -> None:
    """Raise ValueError where a model of diffusers is told more than PLAIN has, as Stable Diffusion XL is."""
    for key, plain in PLAIN.items():
        if model.config.get(key, plain) != plain:
            raise ValueError(f"{name} has {key} = {model.config[key]!r}; expected {plain!r}: of conditions only text is taken")


OURS, THEIRS = ("copy.", "hint.", "zeros."), ("", "controlnet_cond_embedding.", "controlnet_down_blocks.")
"""How the names of our weights begin, and those of diffusers' ControlNetModel; its middle's zero convolution stands apart."""
MIDDLE = "controlnet_mid_block."


def to_diffusers(control: ControlNet, unet: nn.Module) -> Any:
    """The same control as diffusers' ControlNetModel, for its pipelines and to be saved; `unet` is what it was made for.

    Raises ValueError for a control of a `UNet`, of which diffusers has no like.
    """
    from diffusers import ControlNetModel

    if not isinstance(control.copy, Encoder):
        raise ValueError(f"control copies a {type(control.copy).__name__}; expected one of diffusers' UNet2DConditionModel")
    widths = [layer.out_channels for layer in (control.hint.conv_in, *control.hint.blocks[1::2])]
    made = ControlNetModel.from_unet(
        unet,
        conditioning_embedding_out_channels=tuple(widths),
        load_weights_from_unet=False,
        conditioning_channels=control.channels,
    )
    last = f"zeros.{len(control.zeros) - 1}."
    state = {}
    for key, value in control.state_dict().items():
        ours, theirs = (
            (last, MIDDLE)
            if key.startswith(last)
            else next(pair for pair in zip(OURS, THEIRS, strict=True) if key.startswith(pair[0]))
        )
        state[theirs + key.removeprefix(ours)] = value
    made.load_state_dict(state)
    return made


def from_diffusers(model: Any) -> ControlNet:
    """diffusers' ControlNetModel as ours. Raises ValueError for one that is told more than text, and for pooled or BGR maps."""
    check_plain("model", model)
    made = ControlNet(Encoder(model), model.controlnet_cond_embedding, nn.ModuleList())
    made.zeros = nn.ModuleList([*model.controlnet_down_blocks, model.controlnet_mid_block])
    return made


class Controlled(nn.Module):
    """F(x; Theta) with what its controls add: sum_k s_k r_ki onto the feature i that the encoder hands to the decoder.

        net(x, time, edge=map, depth=map, edge_scale=s, **condition)

    A control that is not given, or is None, is not evaluated. Its scale is 1, a number (B,), or one for each feature (B, L),
    so that a scale may differ between the halves of classifier-free guidance and between layers; see `guess`. One map, or one
    scale, serves all samples. A map of zeros is no missing map: it is an empty canvas, of which the control says what it has
    learnt of empty canvases; scale 0 is what takes a control away, exactly.
    """

    def __init__(self, net: nn.Module, controls: Mapping[str, nn.Module]):
        super().__init__()
        self.net, self.controls = net, nn.ModuleDict(controls)
        self.conditions = [*getattr(net, "conditions", ()), *controls, *(f"{name}_scale" for name in controls)]

    def check_condition(self, **condition: Any) -> None:
        """Raise ValueError for a condition map of another shape or range, and for scales that are none."""
        for name, control in self.controls.items():
            check_given(name, condition, control.channels, len(control.zeros))
        rest = {key: value for key, value in condition.items() if key.removesuffix("_scale") not in self.controls}
        if rest and (check := getattr(self.net, "check_condition", None)):
            check(**rest)

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        given = {name: (condition.pop(name, None), condition.pop(f"{name}_scale", None)) for name in self.controls}
        total: list[Tensor] | None = None
        for name, (c, scale) in given.items():
            if c is None:
                continue
            check_rows(name, c, x)
            check_rows(f"{name}_scale", scale, x)
            residuals = scaled(self.controls[name](x, time, c, **condition), scale)
            total = residuals if total is None else [a + b for a, b in zip(total, residuals, strict=True)]
        return self.net(x, time, residuals=total, **condition)


def scaled(residuals: list[Tensor], scale: Tensor | None) -> list[Tensor]:
    """s_i r_i for residuals r_i (B, C_i, H_i, W_i); scale (B,) or (B, L), or (1,) and (1, L) for all samples alike."""
    if scale is None:
        return residuals
    each = scale[:, None].expand(-1, len(residuals)) if scale.ndim == 1 else scale
    return [s.to(r)[:, None, None, None] * r for s, r in zip(each.unbind(1), residuals, strict=True)]


def controlled(D: NetworkDenoiser, **controls: nn.Module) -> NetworkDenoiser:
    """The Denoiser whose network takes these controls: `controlled(D, edge=control).given(edge=map, edge_scale=s)`.

    Without a map it is D; controls may be added to those that D has. Raises ValueError for no controls, for a D that is no
    network's, for a name that the network's own conditions have, and for a control whose features have other widths.
    """
    if not controls:
        raise ValueError("no control was given; expected at least one, such as controlled(D, edge=zoo.load('mini-control-edge'))")
    if not isinstance(D, NetworkDenoiser):
        raise ValueError(f"D is a {type(D).__name__}; expected a NetworkDenoiser: control first, then guide")
    net, before = (D.net.net, dict(D.net.controls)) if isinstance(D.net, Controlled) else (D.net, {})
    widths, taken = feature_widths(net), set(getattr(D.net, "conditions", ()))
    for name, control in controls.items():
        for word in (name, f"{name}_scale"):
            if word in taken:
                raise ValueError(f"control {name!r} takes {word!r}, a condition that there is already; expected another name")
            taken.add(word)
        has = tuple(Z.out_channels for Z in control.zeros)
        if has != widths:
            raise ValueError(
                f"control {name!r} was made for features of {has} channels; this network has {widths}: "
                "expected a control that was trained on a network of the same widths"
            )
    return replace(D, net=Controlled(net, {**before, **controls}))


def guess(layers: int, scale: float = 1.0, lowest: float = 0.1) -> Tensor:
    """Scales (1, L) of guess mode, which finds the picture in the map alone: from `lowest` for the finest feature up to 1.

    Even in logarithm, as in the authors' code (Zhang et al. 2023, Sec. 3.4, "guess mode"). Without a prompt both halves of
    classifier-free guidance are the same text; the control is then given to one of them alone.
    """
    return scale * torch.logspace(torch.log10(torch.tensor(lowest)).item(), 0, layers)[None]


def resolution_weights(sides: list[int], finest: int = 8) -> Tensor:
    """w_i = finest / h_i for features of h_i pixels a side, (1, L): more weight where a feature covers more of the picture.

    Zhang et al. 2023, Sec. 3.4, "CFG resolution weighting", with 64 for the side of Stable Diffusion's latents.
    """
    return torch.tensor([finest / side for side in sides])[None]


def fit_map(c: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Condition maps (B, C, H, W) in [0, 1] at another size, height and width or one number for both, with a UserWarning.

    Where a side shrinks its pixels are averaged, where it grows they are interpolated linearly; both stay in [0, 1]. Thin lines
    fade and colours of classes mix, so a map that is made at the size is better. A map of the size is returned as it is.
    Raises ValueError as `check_map`.
    """
    check_map("c", c, c.shape[1] if isinstance(c, Tensor) and c.ndim == 4 else 3)
    height, width = (size, size) if isinstance(size, int) else size
    if c.shape[-2:] == (height, width):
        return c
    warnings.warn(
        f"c has {c.shape[-2]} x {c.shape[-1]} pixels and was resized to {height} x {width}, which thin lines and colours of "
        "classes do not survive unchanged; expected a map that was made at that size",
        UserWarning,
        stacklevel=2,
    )
    return F.interpolate(c, (height, width), mode="bilinear", antialias=True).clamp(0, 1)


def check_given(name: str, condition: Mapping[str, Any], channels: int, layers: int) -> None:
    """Raise ValueError for the map of this name, and for its scale, see `check_map` and `check_scale`, where they are given."""
    if condition.get(name) is not None:
        check_map(name, condition[name], channels)
    if condition.get(f"{name}_scale") is not None:
        check_scale(f"{name}_scale", condition[f"{name}_scale"], layers)


def check_map(name: str, c: Tensor, channels: int) -> None:
    """Raise ValueError, which says how to mend it, for a map that is not (B, channels, H, W) in [0, 1]."""
    if not isinstance(c, Tensor) or c.ndim != 4 or c.shape[1] != channels:
        found = tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__
        raise ValueError(f"{name} = {found}; expected a condition map (B, {channels}, H, W) in [0, 1]")
    if not c.is_floating_point():
        raise ValueError(f"{name} has the type {c.dtype}; expected floating-point numbers in [0, 1]: of bytes {name} / 255")
    low, high = (float(end) for end in c.detach().aminmax())
    if not math.isfinite(low + high):
        raise ValueError(f"{name} has a value that is not finite; expected a condition map in [0, 1]")
    if not (low >= -1e-3 and high <= 1.001):
        remedy = (
            f"({name} + 1) / 2" if low >= -1.001 and high <= 1.001 else f"{name} / 255" if low >= 0 and high <= 255 else "clamp"
        )
        raise ValueError(
            f"{name} has values from {low:.4g} to {high:.4g}; expected a condition map in [0, 1]: map it by {remedy}"
        )


def check_rows(name: str, given: Tensor | None, x: Tensor) -> None:
    """Raise ValueError for a map or a scale of another number of samples than x."""
    if given is not None and len(given) not in (1, len(x)):
        raise ValueError(f"{name} = {tuple(given.shape)} for {len(x)} samples; expected {len(x)} rows, or one for all")


def check_sides(name: str, c: Tensor, x: Tensor, factor: int) -> None:
    """Raise ValueError for a map whose sides are not `factor` times those of x."""
    sides = tuple(factor * side for side in x.shape[-2:])
    if c.shape[-2:] != sides:
        raise ValueError(
            f"{name} has {c.shape[-2]} x {c.shape[-1]} pixels; expected {sides[0]} x {sides[1]} for x of shape "
            f"{tuple(x.shape)}: make it at that size, or take fit_map({name}, {sides})"
        )


def check_scale(name: str, scale: Tensor, layers: int) -> None:
    """Raise ValueError for a scale that is neither (B,) nor (B, layers)."""
    if not isinstance(scale, Tensor) or scale.ndim not in (1, 2) or (scale.ndim == 2 and scale.shape[1] != layers):
        found = tuple(scale.shape) if isinstance(scale, Tensor) else repr(scale)
        raise ValueError(f"{name} = {found}; expected a tensor (B,), or (B, {layers}) with one scale for each feature")
