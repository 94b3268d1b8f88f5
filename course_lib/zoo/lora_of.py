"""LoRAs that are shipped by themselves: the weights that they change are shipped with the model that they are of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from course_lib import zoo
from course_lib.nets.lora import with_lora


def lora_of_mini_sd(rank: int, targets: Sequence[str], seed: int) -> nn.Module:
    """The U-Net of `mini-sd` with a LoRA that is still to learn, which alone is its state."""
    return alone(with_lora(zoo.load("mini-sd", device="cpu").net, rank, targets, seed=seed))


def alone(net: nn.Module) -> nn.Module:
    """The same network with what learns as its only parameters and state; the others become buffers that no file holds."""
    for module in net.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if not value.requires_grad:
                delattr(module, name)
                module.register_buffer(name, value.detach(), persistent=False)
        for name in module._buffers:
            module._non_persistent_buffers_set.add(name)
    return net
