"""`digits-weak`: `digits` with a thirteenth of the weights and a quarter of the steps, the weaker model of autoguidance.

Same data, same classes, same loss (Karras et al. 2024, Sec. 4: less capacity and less training, so that it errs in the same
directions, only farther).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from course_lib.nets.unet import UNet
from course_lib.training import Fit
from course_lib.worlds import digits
from course_lib.zoo.recipes import digits as strong
from course_lib.zoo.recipes.digits import DATA, wrap

__all__ = ["DATA", "judge", "network", "train", "wrap"]
STEPS = 750


def network(name: str = "digits-weak") -> UNet:
    """The untrained U-Net."""
    return UNet(channels=1, widths=(16, 16), blocks=1, attention=(1,), classes=digits.CLASSES)


def train(
    name: str = "digits-weak", net: nn.Module | None = None, steps: int = STEPS, seed: int = strong.SEED, **options: Any
) -> Fit:
    """The training of `digits`, shorter."""
    torch.manual_seed(seed)
    return strong.train(name, network() if net is None else net, steps=steps, seed=seed, **options)


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """Loss on held-out digits at each level beside that of `digits`: weaker everywhere."""
    from course_lib import zoo
    from course_lib.zoo.judge_digits import LOSS_SIGMAS, loss_by_sigma

    weak, full = (loss_by_sigma(D, "test", 1) for D in (wrap(net), zoo.load("digits", device="cpu")))
    return {
        "loss_sigmas": list(LOSS_SIGMAS),
        "loss_held_out": [round(v, 5) for v in weak],
        "loss_held_out_of_digits": [round(v, 5) for v in full],
    }
