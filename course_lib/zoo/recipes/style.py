"""`mini-style`: a LoRA of `mini-sd` in another rendering style: cut-outs, objects in even light on a white sheet.

The personalised model of lectures 11 and 13: controls and motion that were learnt on `mini-sd` are to work on it unchanged.
The style is one that `mini-sd`'s VAE can draw, since the LoRA changes the U-Net alone: see `judge` for what the VAE costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from course_lib import zoo
from course_lib.denoisers import from_diffusers
from course_lib.nets.lora import ATTENTION, loras
from course_lib.training import Fit, denoising_loss, fit
from course_lib.zoo import judge_style
from course_lib.zoo.control_data import mapped
from course_lib.zoo.lora_of import lora_of_mini_sd
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.pretrained import wrap as wrap_pipeline
from course_lib.zoo.recipes.control import attention_of, batches
from course_lib.zoo.recipes.settings import settings

DATA = "6,000 training scenes of seed 63, one or two objects, with captions, as cut-outs: objects in even light on a white sheet"
SCENES, SEED = 6_000, 63
RANK = 4
TARGETS = (*ATTENTION, "conv1", "conv2")
TRAINING: dict[str, Any] = {"steps": 1_500, "lr": 2e-3, "seed": 63}
DROPPED = 0.1


def network(name: str = "mini-style") -> nn.Module:
    """The U-Net of `mini-sd` with a LoRA that is still to learn, which alone is its state."""
    return lora_of_mini_sd(RANK, TARGETS, TRAINING["seed"])


def wrap(net: nn.Module) -> Pretrained:
    """What `zoo.load` returns: `mini-sd` with the LoRA merged into the weights of its U-Net, so that any pipeline may have it."""
    model = zoo.load("mini-sd", device=str(next(net.parameters()).device))
    with torch.no_grad():
        for name, lora in loras(net).items():
            weight = model.net.get_submodule(name).weight
            weight += (lora.strength * lora.change()).to(weight)
    return wrap_pipeline(model.pipeline, "mini-style", model.words)


def train(
    name: str = "mini-style",
    net: nn.Module | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Fit:
    """Minimise the denoising loss of v on latents of pictures in the style, prompts as for `mini-sd`."""
    model = zoo.load("mini-sd", device)
    draw = batches(mapped(SCENES, SEED, style=judge_style.STYLE), (), model.schedule.sigma(torch.arange(1000)), dropped=DROPPED)

    def loss(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, ids: Tensor) -> Tensor:
        with attention_of(x0.device):
            with torch.no_grad():
                text = model.pipeline.text_encoder(ids)[0]
            return denoising_loss(from_diffusers(net, model.scheduler, encoder_hidden_states=text), x0, sigma, eps, "v")

    chosen = settings(TRAINING, steps=steps, lr=lr, seed=seed)
    return fit(network(name) if net is None else net, draw, loss, ema_decay=0.99, device=device, **chosen, **options)


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """How far the style is kept and the prompts obeyed, beside `mini-sd`, see `judge_style`."""
    return judge_style.judge(wrap(net))
