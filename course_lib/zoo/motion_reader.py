"""Reading a clip's motion by a network, for judges and explorers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from course_lib.devices import autocast
from course_lib.video.tracking import check
from course_lib.worlds.scenes.clip_captions import PHRASES

CLASSES = [*PHRASES, ("", "")]
"""Word and direction of each motion that captions name, and that of a clip without one."""
NOTHING = len(CLASSES) - 1
BATCH = 32


class Read(NamedTuple):
    """Of N clips: the word of the motion, "" for none, its direction, "" where none is named, and the probability (N,)."""

    word: list[str]
    direction: list[str]
    probability: Tensor


class MotionReader:
    """Reads clips (N, F, 3, H, W) in [-1, 1] of the scene world, of 8 frames of 64 x 64 pixels as it was trained on."""

    def __init__(self, net: nn.Module):
        self.net = net.eval()

    @torch.no_grad()
    def read(self, clips: Tensor) -> Read:
        """What moves in each clip, and which way. Raises ValueError for another shape and fewer than 4 frames."""
        check(clips, 4)
        device = next(self.net.parameters()).device
        parts = []
        for some in clips.split(BATCH):
            with autocast(device):
                parts.append(self.net(some.to(device)).float().softmax(-1).cpu())
        probability, at = torch.cat(parts).max(-1)
        words, ways = zip(*(CLASSES[i] for i in at.tolist()), strict=True) if len(at) else ((), ())
        return Read(list(words), list(ways), probability)
