"""Where temporal layers may stand in a 2-D U-Net, by the names of its layers: the readable `UNet`, and diffusers'."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from course_lib.nets.unet import Level, UNet


@dataclass(frozen=True)
class Pair:
    """A residual block and the spatial attention that follows it, if any.

    block, attention   their names within the U-Net
    channels           of what both give
    seat               the name under which AnimateDiff keeps the motion module that follows them; None where there is none
    """

    block: str
    attention: str | None
    channels: int
    seat: str | None

    @property
    def last(self) -> str:
        """The name of the later of the two."""
        return self.attention or self.block


def unet_of(net: nn.Module) -> nn.Module:
    """The 2-D U-Net within a network, which may be in an adapter and have controls. Raises ValueError where there is none."""
    for module in net.modules():
        whole = ("down", "middle", "up") if isinstance(module, UNet) else ("down_blocks", "mid_block", "up_blocks")
        if all(hasattr(module, name) for name in whole):
            return module
    raise ValueError(
        f"net is a {type(net).__name__} without a U-Net; expected a UNet of this course or the D.net of a diffusers U-Net"
    )


def pairs(unet: nn.Module) -> list[Pair]:
    """The pairs of a U-Net in the order in which they are called."""
    return _of_ours(unet) if isinstance(unet, UNet) else _of_theirs(unet)


def _of_ours(unet: UNet) -> list[Pair]:
    found = []
    for part in ("down", "middle", "up"):
        for i, level in enumerate(getattr(unet, part)):
            if isinstance(level, Level):
                name, attends = f"{part}.{i}", not isinstance(level.attention, nn.Identity)
                seat = None if part == "middle" and not attends else name
                width = level.block.conv2.out_channels
                found.append(Pair(f"{name}.block", f"{name}.attention" if attends else None, width, seat))
    return found


def _of_theirs(unet: nn.Module) -> list[Pair]:
    blocks = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    blocks |= {"mid_block": unet.mid_block} if unet.mid_block is not None else {}
    blocks |= {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}
    found = []
    for name, block in blocks.items():
        attentions = getattr(block, "attentions", None) or []
        # the middle begins with a residual block of its own: its pairs are (resnets[j], attentions[j]), and the last is alone
        for j, resnet in enumerate(block.resnets):
            attends = j < len(attentions) and attentions[j] is not None
            seat = None if name == "mid_block" and not attends else f"{name}.motion_modules.{j}"
            found.append(Pair(f"{name}.resnets.{j}", f"{name}.attentions.{j}" if attends else None, resnet.out_channels, seat))
    return found


def convolutions(unet: nn.Module) -> dict[str, int]:
    """The names of the convolutions that see more than one pixel, and their output channels."""
    convs = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: conv.out_channels for name, conv in convs.items() if max(conv.kernel_size) > 1}
