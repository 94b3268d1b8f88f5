"""`mini-motion`: AnimateDiff's motion module of `mini-sd`, and two MotionLoRAs of it (Guo et al. 2023, Sec. 4).

Stage 1  a domain adapter, a LoRA of the spatial layers, learns what frames of clips have that pictures do not: tilted views
Stage 2  with the adapter in place and frozen, the motion module learns how frames follow each other
Stage 3  `mini-motion-zoom`, `mini-motion-pan`: a LoRA of the motion module learns one motion from few clips

The adapter is then taken away: the module moves any model that was made from `mini-sd`. Layers and names are diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import zoo
from course_lib.denoisers import from_diffusers
from course_lib.nets.lora import ATTENTION, LoRA
from course_lib.training import Fit, denoising_loss, fit
from course_lib.video.animatediff import motion_lora, motion_of
from course_lib.video.inflation import Temporal, inflated
from course_lib.worlds.scenes.clip_captions import directions
from course_lib.zoo import judge_motion
from course_lib.zoo.lora_of import alone, lora_of_mini_sd
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.recipes import video
from course_lib.zoo.recipes.control import attention_of
from course_lib.zoo.recipes.settings import settings
from course_lib.zoo.video import PretrainedVideo
from course_lib.zoo.video import wrap as wrap_video
from course_lib.zoo.video_data import FRAMES, filmed

DATA = video.DATA
TRAINING: dict[str, Any] = {"steps": 7_000, "lr": 5e-3, "seed": 72}
IN_BYTES = ("mini-motion",)
"""What is kept in 8 bits a weight, see `zoo.eighths`."""
LORAS = {"mini-motion-zoom": ("zoom", "in"), "mini-motion-pan": ("pan", "right")}
"""What each MotionLoRA is of."""
OF_LORA: dict[str, Any] = {"steps": 600, "lr": 4e-3, "seed": 73}
LORA_CLIPS, LORA_SEED, LORA_RANK = 600, 73, 8
"""How many clips of the motion, of both directions, are drawn; those of the one are kept."""
SHARED = 2.0
SHARED_OF_LORA = 10.0
"""a of the noise that frames have in common, see `video.noise`: in training and in sampling, and in sampling with a MotionLoRA.
Where no word says what moves, it is the difference between frames' noise that does, and at a = 10 little moves."""
ADAPTER: dict[str, Any] = {"steps": 500, "lr": 2e-3, "seed": 74}
ADAPTER_RANK, ADAPTER_BATCH = 4, 48


def network(name: str = "mini-motion") -> Temporal:
    """The untrained motion module; or that of the zoo with a LoRA that is still to learn, which alone is its state."""
    if name in LORAS:
        return alone(motion_lora(zoo.read("mini-motion").requires_grad_(False), LORA_RANK, seed=OF_LORA["seed"]))
    return motion_of(zoo.load("mini-sd", device="cpu").denoiser.net, frames=2 * FRAMES, seed=TRAINING["seed"])


def loss_of(model: Pretrained) -> Callable[..., Tensor]:
    """The denoising loss of v of `model` on clips with the motion module that is trained; no word says what moves."""

    def loss(motion: Temporal, x0: Tensor, sigma: Tensor, eps: Tensor, scene: Tensor) -> Tensor:
        with attention_of(x0.device):
            with torch.no_grad():
                text = model.pipeline.text_encoder(scene)[0]
            return denoising_loss(inflated(model.denoiser, motion).given(encoder_hidden_states=text), x0, sigma, eps, "v")

    return loss


def adapted(model: Pretrained, steps: int, checkpoint: Path | None, **options: Any) -> tuple[Pretrained, Fit]:
    """`mini-sd` with the domain adapter of stage 1, learnt from single frames of the clips, and its run."""
    of, levels = filmed(video.CLIPS, video.SEED), model.schedule.sigma(torch.arange(1000))

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        x0, sigma, eps, _, scene, _ = video.batches(of, levels, ADAPTER_BATCH)(source)
        frame = torch.randint(of.of.frames, (ADAPTER_BATCH,), generator=source)
        rows = torch.arange(ADAPTER_BATCH)
        return x0[rows, frame], sigma, eps[rows, frame], scene

    def loss(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, ids: Tensor) -> Tensor:
        with attention_of(x0.device):
            with torch.no_grad():
                text = model.pipeline.text_encoder(ids)[0]
            return denoising_loss(from_diffusers(net, model.scheduler, encoder_hidden_states=text), x0, sigma, eps, "v")

    net = lora_of_mini_sd(ADAPTER_RANK, ATTENTION, ADAPTER["seed"])
    done = fit(net, draw, loss, checkpoint=checkpoint, **ADAPTER | {"steps": steps}, **options)
    return replace(model, denoiser=from_diffusers(done.net.requires_grad_(False), model.scheduler)), done


def train(
    name: str = "mini-motion",
    net: nn.Module | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> Fit:
    """Stages 1 and 2 of the motion module, or stage 3 of one of its LoRAs; `steps` counts those of the last stage."""
    model, stages = zoo.load("mini-sd", device), {}
    net = network(name) if net is None else net
    chosen = settings(OF_LORA if name in LORAS else TRAINING, steps=steps, lr=lr, seed=seed)
    if name in LORAS:
        of = filmed(LORA_CLIPS, LORA_SEED, motion=LORAS[name][0])
        of = of[torch.tensor([way == LORAS[name][1] for way in directions(of.of)])]
    else:
        of = filmed(video.CLIPS, video.SEED)
        first = ADAPTER["steps"] if steps is None else max(1, steps // 12)
        before = checkpoint.with_suffix(".adapter.ckpt") if checkpoint else None
        model, done = adapted(model, first, before, device=device, progress=options.get("progress", True))
        stages["domain adapter"] = done.seconds
    draw = video.batches(of, model.schedule.sigma(torch.arange(1000)), shared=SHARED)
    loss = loss_of(model)

    def told_scenes(motion: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, _: Tensor, scene: Tensor, __: Tensor) -> Tensor:
        return loss(motion, x0, sigma, eps, scene)

    run = fit(net, draw, told_scenes, nhwc=False, device=device, checkpoint=checkpoint, **chosen, **options)
    return replace(run, seconds=run.seconds + sum(stages.values()), stages=stages | {"motion": run.seconds} if stages else {})


def wrap(net: nn.Module) -> PretrainedVideo:
    """What `zoo.load` returns: `mini-sd` moved by the motion module, with its LoRA if it has one."""
    image = zoo.load("mini-sd", device=str(next(net.parameters()).device))
    changed = any(isinstance(part, LoRA) for part in net.modules())
    return wrap_video(image, net, "mini-motion", shared=SHARED_OF_LORA if changed else SHARED)


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """What it animates, and how, on `mini-sd` and on `mini-style`, see `judge_motion`."""
    return judge_motion.judge_lora(wrap(net), *LORAS[name]) if name in LORAS else judge_motion.judge(wrap(net))
