"""AnimateDiff (Guo et al. 2023): a motion module, learnt once on a base model, moves every model that was made from it.

    motion = motion_of(D.net)                          trained on the base model; mini-sd's has names and layout of diffusers'
    D_video = inflated(D_personalised, motion)         the Denoiser of clips of another image model of the same layers
    panning = motion_lora(motion, rank=4)              MotionLoRA: the same module and a change of low rank that learns

`to_diffusers` makes a MotionAdapter of it, for AnimateDiffPipeline, and `from_diffusers` takes one; `lora.save(panning, path)`
writes what `pipeline.load_lora_weights` reads. A domain adapter, the first of the three stages, is `lora.with_lora(D.net, rank)`
that is trained on frames and switched off again by `lora.without_lora`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from course_lib.nets.lora import with_lora
from course_lib.nets.temporal import MotionModule
from course_lib.video.inflation import Temporal
from course_lib.video.pairs import Pair, pairs, unet_of


def motion_of(net: nn.Module, heads: int = 2, blocks: int = 1, frames: int = 16, seed: int = 0) -> Temporal:
    """A motion module after each pair of residual block and attention of `net`, untrained (Guo et al. 2023, Sec. 4.2).

    heads    of its attention
    blocks   transformer blocks at each place
    frames   that have a position, and so the longest clip

    Raises ValueError for a network without a U-Net, and for heads that do not divide its channels.
    """
    unet = unet_of(net)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made = {pair: MotionModule(pair.channels, heads, blocks, _groups(unet), frames) for pair in pairs(unet) if pair.seat}
    return _seated(made, unet)


def motion_lora(motion: Temporal, rank: int, alpha: float | None = None, seed: int = 0) -> Temporal:
    """The same motion module with a LoRA on its attention, which alone learns, a kind of motion (Guo et al. 2023, Sec. 4.3).

    `motion` stays as it is and shares its weights. `lora.save`, `load` and `scaled` take it. Errors as `lora.with_lora`.
    """
    return with_lora(motion, rank, alpha=alpha, seed=seed)


def _groups(unet: nn.Module) -> int:
    """Groups of the normalisation: as in diffusers, those of the image network."""
    return next(m for m in unet.modules() if isinstance(m, nn.GroupNorm)).num_groups


def _seated(made: dict[Pair, MotionModule], unet: nn.Module) -> Temporal:
    """Motion modules in their seats, of the type and on the device of `unet`."""
    first = next(unet.parameters())
    layers = {pair.seat: module for pair, module in made.items()}
    return Temporal(layers, {pair.last: pair.seat for pair in made}).to(first.device, first.dtype)


# --- to diffusers and back -----------------------------------------------------------------------------------------------


def to_diffusers(motion: Temporal) -> Any:
    """The same motion module as diffusers' MotionAdapter, for its pipelines and to be saved.

    Raises ValueError for layers that are no motion module of diffusers' U-Net, and for one with a LoRA.
    """
    from diffusers import MotionAdapter

    blocks: dict[str, list[MotionModule]] = {}
    for name in motion.after.values():
        module, (block, *rest) = motion.get_submodule(name), name.split(".motion_modules.")
        if not (isinstance(module, MotionModule) and rest):
            raise ValueError(f"motion has {name}, for which MotionAdapter has no place; expected motion_of(D.net) of its U-Net")
        blocks.setdefault(block, []).append(module)
    down, middle = [block for name, block in blocks.items() if name.startswith("down")], blocks.get("mid_block", [])
    first = down[0][0]
    made = MotionAdapter(
        block_out_channels=tuple(block[0].channels for block in down),
        motion_layers_per_block=tuple(len(block) for block in down),
        motion_transformer_layers_per_block=tuple(len(block[0].transformer_blocks) for block in down),
        motion_mid_block_layers_per_block=len(middle) or 1,
        motion_transformer_layers_per_mid_block=tuple(len(module.transformer_blocks) for module in middle) or 1,
        motion_num_attention_heads=tuple(block[0].heads for block in down),
        motion_norm_num_groups=first.norm.num_groups,
        motion_max_seq_length=first.frames,
        use_motion_mid_block=bool(middle),
    )
    state = motion.state_dict()
    if state.keys() != made.state_dict().keys():
        raise ValueError("motion has a LoRA or layers of several sizes; expected the motion module alone")
    made.load_state_dict(state)
    return made.to(first.norm.weight.dtype)


def from_diffusers(adapter: Any, net: nn.Module) -> Temporal:
    """diffusers' MotionAdapter as the motion module of `net`, diffusers' U-Net in its adapter; its weights are copied.

    As in diffusers the groups of its normalisation are those of `net`, whatever the adapter says. Raises ValueError for one that
    was made for a network of other widths, and for one that brings a first convolution of its own (PIA).
    """
    from diffusers import MotionAdapter

    if not isinstance(adapter, MotionAdapter):
        raise ValueError(f"adapter is a {type(adapter).__name__}; expected diffusers' MotionAdapter")
    if adapter.conv_in is not None:
        raise ValueError(f"adapter has conv_in_channels = {adapter.config.conv_in_channels}; expected None: motion modules alone")
    unet = unet_of(net)
    theirs = {name: m for name, m in adapter.named_modules() if hasattr(m, "transformer_blocks")}
    seats = {pair.seat: pair for pair in pairs(unet) if pair.seat and (adapter.mid_block or not pair.seat.startswith("mid"))}
    has = dict(sorted((name, m.in_channels) for name, m in theirs.items()))
    widths = dict(sorted((name, pair.channels) for name, pair in seats.items()))
    if has != widths:
        raise ValueError(
            f"adapter has motion modules of {tuple(has.values())} channels; this network has {tuple(widths.values())}: "
            "expected an adapter that was made for a network of the same widths"
        )
    made = {}
    for seat, pair in seats.items():
        one = theirs[seat]
        blocks, frames = len(one.transformer_blocks), one.transformer_blocks[0].num_positional_embeddings
        made[pair] = MotionModule(pair.channels, one.num_attention_heads, blocks, _groups(unet), frames)
        made[pair].load_state_dict(one.state_dict())
    return _seated(made, unet)
