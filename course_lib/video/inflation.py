"""From a 2-D U-Net to one of clips: its layers see each frame alone, and temporal layers between them see along time.

    temporal = video_ldm_of(D.net)              what is to be trained: temporal layers, each the identity at first
    D_video = inflated(D, temporal)             the Denoiser of clips: x (B, T, C, H, W), sigma 0-d, (B,) or (B, T)
    with mixed(D_video.net, 0.0): ...           the image model again, frame by frame and to the last bit

    factorised_of   temporal attention after each spatial attention (Video Diffusion Models; Ho et al. 2022)
    pseudo_3d_of    a convolution over time after each over space, and temporal attention (Make-A-Video; Singer et al. 2022)
    video_ldm_of    3-D convolutions after blocks and temporal attention, mixed by a learned alpha (Blattmann et al. 2023)

AnimateDiff's motion module is a fourth, see video/animatediff.py. The image model keeps its weights, which both share; it is
never changed. Multiply-adds of `mini-sd` at 8 frames grow by 7.6 %, 22.5 % and 13.2 %, by 39.3 % with the motion module; only
those of attention maps, which are quadratic, are not linear in the number of frames.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser
from course_lib.nets.lora import sharing
from course_lib.nets.temporal import Context, ConvBlock, Mixed, TemporalAttention, TimeConv
from course_lib.nets.unet import UNet
from course_lib.video.pairs import convolutions, pairs, unet_of

AXES = {
    "time": 1,
    "label": 1,
    "class_labels": 1,
    "encoder_hidden_states": 3,
    "text_embeds": 2,
    "time_ids": 2,
    "timestep_cond": 2,
    "attention_mask": 2,
    "encoder_attention_mask": 2,
}
"""Axes of a condition that is given once a clip; one that is given for each frame has one more, T, after the first."""
AXES_OF_OTHERS = 4
"""Of conditions without a name above: condition maps (B, C, H, W)."""
TOLD = {
    "motion": (1, "(B, {})", "a text for each clip"),
    "context": (2, "(B, T, {}, H, W)", "the known frames and which they are"),
}
"""What temporal layers may be told: which axis of it has their width, its shape, and what it is."""


# --- what learns ---------------------------------------------------------------------------------------------------------


class Temporal(nn.Module):
    """Temporal layers for a U-Net: all that a video model learns, and all that its file holds.

    `after` maps the name of a layer of the U-Net to the name of the temporal layer, in here, that its output goes through.
    """

    def __init__(self, layers: Mapping[str, nn.Module], after: Mapping[str, str] | None = None):
        super().__init__()
        self.after = dict(after or {name: name for name in layers})
        for name, layer in layers.items():
            *above, last = name.split(".")
            place: nn.Module = self
            for part in above:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(last, layer)

    def layers(self) -> dict[str, nn.Module]:
        """The temporal layers by the names of the layers of the U-Net that they follow."""
        return {name: self.get_submodule(own) for name, own in self.after.items()}


Make = Callable[[int], nn.Module]
"""channels -> a temporal layer."""


def temporal_of(
    net: nn.Module,
    conv: Make | None = None,
    block: Make | None = None,
    attention: Make | None = None,
    first: Make | None = None,
    seed: int = 0,
) -> Temporal:
    """Temporal layers after each convolution over space, residual block and spatial attention of `net`, and after its first
    convolution, as far as given.

    Raises ValueError for a network without a U-Net, or where there is none of what the layers are to follow.
    """
    unet = unet_of(net)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        found = convolutions(unet)
        layers = {name: conv(channels) for name, channels in found.items()} if conv else {}
        if first:
            name, channels = next(iter(found.items()))
            layers[name] = first(channels)
        for pair in pairs(unet):
            if block:
                layers[pair.block] = block(pair.channels)
            if attention and pair.attention:
                layers[pair.attention] = attention(pair.channels)
    if not layers:
        raise ValueError(
            f"net is a {type(net).__name__} without spatial attention; expected layers that the temporal ones follow"
        )
    first = next(unet.parameters())
    return Temporal(layers).to(first.device, first.dtype)


def factorised_of(net: nn.Module, frames: int = 16, seed: int = 0) -> Temporal:
    """Factorised space-time attention: space, then time, with learned relative positions (Ho et al. 2022, Sec. 3).

    The convolutions, 1 x 3 x 3, are those of `net` with frames folded into the batch.
    """
    return temporal_of(net, attention=lambda c: TemporalAttention(c, positions="relative", frames=frames), seed=seed)


def pseudo_3d_of(net: nn.Module, kernel: int = 3, seed: int = 0) -> Temporal:
    """Pseudo-3D convolutions and attention, without positions: the convolutions know the order (Singer et al. 2022, Sec. 3.2)."""
    return temporal_of(net, conv=lambda c: TimeConv(c, kernel), attention=TemporalAttention, seed=seed)


def video_ldm_of(
    net: nn.Module,
    frames: int = 16,
    kernel: tuple[int, int, int] = (3, 1, 1),
    per: int | None = None,
    told: int = 0,
    seen: int = 0,
    seed: int = 0,
) -> Temporal:
    """Video LDM's temporal layers, each mixed with its spatial layer by an alpha of its own (Blattmann et al. 2023, Sec. 3.1).

    kernel, per  of the convolutions, see `ConvBlock`
    told         width of a text about the motion, the condition `motion` (B, told) of the network of clips, which all hear
    seen         channels of the condition `context` (B, T, seen, H, W), which says what frames are known, see `Context`
    """
    return temporal_of(
        net,
        block=lambda c: Mixed(ConvBlock(c, kernel, per, told)),
        attention=lambda c: Mixed(TemporalAttention(c, positions="sinusoidal", frames=frames, told=told)),
        first=(lambda c: Context(c, seen)) if seen else None,
        seed=seed,
    )


# --- the network of clips ------------------------------------------------------------------------------------------------


class Inflated(nn.Module):
    """net(x (B, T, C, H, W), time, **condition) -> (B, T, C, H, W): frames are folded into the batch, [b t, c, h, w], for
    the layers of the image network, and each temporal layer unfolds what it follows.

    Time and conditions are given once a clip, (B, ...), or for each frame, (B, T, ...); one row serves all clips. `net` holds
    the weights of the image network, shared and frozen; only `temporal` has a gradient. `mixing` m turns each temporal layer's
    z' into z + m (z' - z): 1 is the video model, 0 the image model, whose temporal layers are then not evaluated. Where temporal
    layers can be told something, it is for them alone: `motion` (B, width), a text, and `context` (B, T, channels, H, W), what is
    known of the frames.
    """

    def __init__(self, net: nn.Module, temporal: Temporal):
        super().__init__()
        check_fits(net, temporal)
        self.net, self.temporal, self.mixing = sharing(net), temporal, 1.0
        layers = temporal.layers().values()
        self.told: dict[str, int] = {_hears(layer): layer.told for layer in layers if getattr(layer, "told", 0)}
        if (names := getattr(net, "conditions", None)) is not None:
            self.conditions = [*names, *self.told]

    def check_condition(self, **condition: Any) -> None:
        """What the image network checks, of conditions once a clip or for each frame."""
        for name, value in self._split(condition).items():
            axis, shape, what = TOLD[name]
            if value.ndim != shape.count(",") + 1 or value.shape[axis] != self.told[name]:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape.format(self.told[name])}, {what}")
        if check := getattr(self.net, "check_condition", None):
            check(**{name: value.flatten(0, 1) if _of_frames(name, value) else value for name, value in condition.items()})

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        check_clip(x, _channels_of(self.net))
        B, T = x.shape[:2]
        told = {name: value.expand(B, *value.shape[1:]) for name, value in self._split(condition).items()}
        of_image = {name: each_frame(name, value, B, T) for name, value in condition.items()}
        with following(unet_of(self.net), self.temporal, T, self.mixing, told):
            return self.net(x.flatten(0, 1), each_frame("time", time, B, T), **of_image).unflatten(0, (B, T))

    def _split(self, condition: dict[str, Any]) -> dict[str, Tensor]:
        """Take out of the conditions what the temporal layers are told."""
        found = {name: condition.pop(name, None) for name in self.told}
        return {name: value for name, value in found.items() if value is not None}


@contextlib.contextmanager
def following(net: nn.Module, temporal: Temporal, T: int, m: float, told: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the outputs of layers of `net`, an image network that sees T frames of each clip as a batch, go through the
    temporal layers after them, with mixing m and what these are told; the hooks are left to no one else."""
    handles = []
    try:
        for name, layer in temporal.layers().items() if m != 0 else ():
            handles.append(net.get_submodule(name).register_forward_hook(_through(layer, T, m, told)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hears(layer: nn.Module) -> str:
    """The condition that a layer that can be told something is told."""
    return getattr(layer, "hears", "motion")


def _through(layer: nn.Module, T: int, m: float, told: Mapping[str, Tensor]) -> Callable[..., Any]:
    """A hook that replaces the output z of a layer by z + m (layer(z) - z); a layer that can be told something is."""
    tell = (told.get(_hears(layer)),) if getattr(layer, "told", 0) else ()

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output  # diffusers' transformers return tuples
        z = first.unflatten(0, (-1, T))  # (B, T, C, H, W)
        z_time = layer(z, *tell)
        h = (z_time if m == 1 else z + m * (z_time - z)).flatten(0, 1).to(first.dtype)  # under autocast a layer may widen it
        if first.is_contiguous(memory_format=torch.channels_last):  # the next layer rounds by the layout of what it is given
            h = h.contiguous(memory_format=torch.channels_last)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    return hook


def inflated(D: NetworkDenoiser, temporal: Temporal) -> NetworkDenoiser:
    """The Denoiser of clips that D and these temporal layers make; those of one D may be given to another of the same widths.

    Raises ValueError for a D that is no network's or is inflated, and for layers that were made for a network of other widths.
    """
    if not isinstance(D, NetworkDenoiser):
        raise ValueError(f"D is a {type(D).__name__}; expected a NetworkDenoiser: inflate first, then guide")
    if isinstance(D.net, Inflated):
        raise ValueError("D is inflated already; expected the Denoiser of an image model")
    return replace(D, net=Inflated(D.net, temporal))


@contextlib.contextmanager
def mixed(net: nn.Module, value: float) -> Iterator[None]:
    """Within, the mixing of an inflated network is `value`: 0 gives the image model, exactly, 1 the video model.

    `net` is D.net. Raises ValueError for a network that is not inflated.
    """
    if not isinstance(net, Inflated):
        raise ValueError(f"net is a {type(net).__name__}; expected an inflated one, the net of inflated(D, temporal)")
    before = net.mixing
    try:
        net.mixing = value
        yield
    finally:
        net.mixing = before


# --- clips and what is told of them --------------------------------------------------------------------------------------


def clip_of(frames: Sequence[Tensor]) -> Tensor:
    """Frames (C, H, W) as one clip (T, C, H, W). Raises ValueError for frames of several sizes, and for none."""
    if not len(frames):
        raise ValueError("frames is empty; expected at least one frame (C, H, W)")
    for k, frame in enumerate(frames):
        if frame.ndim != 3 or frame.shape != frames[0].shape:
            expected = "(C, H, W)" if k == 0 else f"{tuple(frames[0].shape)}, that of frames[0]"
            raise ValueError(f"frames[{k}] has shape {tuple(frame.shape)}; expected {expected}")
    return torch.stack(tuple(frames))


def check_clip(x: Tensor, channels: int | None = None) -> None:
    """Raise ValueError for what is no batch of clips (B, T, C, H, W), with these channels where they are known."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}; expected a tensor of clips (B, T, C, H, W): see clip_of")
    if x.ndim != 5 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected clips (B, T, C, H, W) of at least one frame")
    if channels is not None and x.shape[2] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, T, {channels}, H, W): frames before channels")


def _channels_of(net: nn.Module) -> int | None:
    """Channels of the frames that a network takes; None where it is wrapped, since a wrapper may change them."""
    if isinstance(net, UNet):
        return net.first.in_channels
    config = getattr(getattr(net, "unet", None), "config", None)
    return config.in_channels if config else None


def _of_frames(name: str, value: Any) -> bool:
    """Whether a condition is given for each frame: it has an axis more than one that is given once a clip."""
    return isinstance(value, Tensor) and value.ndim == AXES.get(name, AXES_OF_OTHERS) + 1


def each_frame(name: str, value: Any, B: int, T: int) -> Any:
    """A condition as the image network takes it, (B T, ...); what is no tensor, or one number for all, as it is.

    Raises ValueError for another number of clips than B, or of frames than T.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if _of_frames(name, value):
        if value.shape[0] not in (1, B) or value.shape[1] != T:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({B}, {T}, ...) for {B} clips of {T} frames")
        return value.expand(B, *value.shape[1:]).flatten(0, 1)
    if value.shape[0] not in (1, B):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {B} rows, one a clip, or one for all")
    return value.expand(B, *value.shape[1:]).repeat_interleave(T, 0)


def check_fits(net: nn.Module, temporal: Temporal) -> None:
    """Raise ValueError for temporal layers that were made for a network of other layers or widths."""
    unet = unet_of(net)
    widths = convolutions(unet)
    for pair in pairs(unet):
        widths |= {name: pair.channels for name in (pair.block, pair.attention) if name}
    for name, layer in temporal.layers().items():
        if widths.get(name) != layer.channels:
            has = f"{widths[name]} channels there" if name in widths else "no such layer"
            raise ValueError(
                f"temporal has a layer of {layer.channels} channels after {name}; this network has {has}: "
                "expected temporal layers that were made for a network of the same widths"
            )
