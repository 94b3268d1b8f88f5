"""What the benchmark `control` times: `mini-sd` with a control and without, and a step of learning a control or all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from course_lib import metrics
from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import SampleNoise, autocast, channels_last, generator, pick_device
from course_lib.guidance import cfg
from course_lib.nets.control import ControlNet, control_of, controlled
from course_lib.sample import sample
from course_lib.training import denoising_loss
from course_lib.zoo.recipes.control import BATCH, TRAINING, attention_of

PICTURES, STEPS, GUIDANCE = 8, 20, 3.0
PROMPT = "a small red cube on grass"
PUBLISHED = {
    "sampling": "1.41 to 1.44 for Stable Diffusion 1.5",
    "training": "1.34, and 1.23 of the memory, for Stable Diffusion on one A100 of 40 GB (Zhang et al. 2023, Sec. 3.3)",
}


def _model() -> Any:
    from course_lib import zoo

    return zoo.load("mini-sd", device=str(pick_device()))


def _map(model: Any, n: int) -> Tensor:
    side = model.pixels
    return torch.rand(n, 3, side, side, generator=generator(1)).to(model.device)


def sampling(pictures: int = PICTURES, steps: int = STEPS) -> tuple[Callable[[], Tensor], Callable[[], Tensor], NetworkDenoiser]:
    """Two runs of DDIM under guidance, with a control in both halves and without, and the Denoiser whose network both call."""
    model = _model()
    halves = [model.embed([prompt] * pictures) for prompt in (PROMPT, "")]
    D = controlled(model.denoiser, edge=channels_last(control_of(model.net), model.device).requires_grad_(False))
    sigmas, c = model.sigmas(steps), _map(model, pictures)
    x = model.start(SampleNoise(0)(torch.empty(pictures, *model.shape, device=model.device)), sigmas[0])

    def run(**given: Tensor) -> Callable[[], Tensor]:
        guided = cfg(*(D.given(**half, **given) for half in halves), GUIDANCE)

        def drawn() -> Tensor:
            with autocast(model.device):
                return sample(guided, x, sigmas)

        return drawn

    return run(edge=c), run(), D


class Learning(NamedTuple):
    """`step()` is one step of training; `control` learns, or the whole U-Net of D where there is none."""

    step: Callable[[], None]
    D: NetworkDenoiser
    control: ControlNet | None


def learning(of_control: bool, batch: int = BATCH) -> Learning:
    """Everything that training holds, anew: the model, its U-Net locked or learning, and the optimiser that the recipe takes."""
    model = _model()
    D = model.denoiser
    told: dict[str, Tensor] = {"encoder_hidden_states": model.embed([PROMPT] * batch)["encoder_hidden_states"].detach()}
    control, learner = None, D.net.requires_grad_(True)
    if of_control:
        D.net.requires_grad_(False)
        control = learner = channels_last(control_of(D.net), model.device)
        D, told = controlled(D, map=control), told | {"map": _map(model, batch)}
    given = D.given(**told)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=TRAINING["lr"], fused=model.device.type in ("cpu", "cuda"))
    x0, eps = torch.randn(2, batch, *model.shape, generator=generator(2)).to(model.device)
    sigma = model.schedule.sigma(torch.linspace(0, 999, batch))

    def step() -> None:
        with attention_of(model.device), autocast(model.device):
            loss = denoising_loss(given, x0, sigma, eps, "v").mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return Learning(step, D, control)


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    """So many steps as one run."""

    def run() -> None:
        for _ in range(times):
            step()

    return run


def whole(of_control: bool, batch: int = BATCH) -> Callable[[], None]:
    """Two steps from nothing: its peak holds weights, gradients, the optimiser's averages and what the way back needs."""
    return lambda: repeated(learning(of_control, batch=batch).step, 2)()


class Part(NamedTuple):
    """A part of a controlled network: its weights, and the operations of one call for one picture."""

    name: str
    weights: int
    flops: int


def parts() -> Iterator[Part]:
    """The U-Net's encoder with its middle, which the copy has once more, its decoder, and what a control has beside the copy."""
    model = _model()
    net, control = model.net, control_of(model.net)
    x, time, c = torch.zeros(1, *model.shape, device=model.device), torch.zeros((), device=model.device), _map(model, 1)
    text = model.embed([PROMPT])["encoder_hidden_states"]
    features = control.copy.encode(x, time, text)

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    encoder = metrics.flops(lambda: control.copy.encode(x, time, text))
    yield Part("encoder and middle", count(control.copy), encoder)
    yield Part("decoder", count(net) - count(control.copy), metrics.flops(lambda: net(x, time, text)) - encoder)
    yield Part("hint encoder", count(control.hint), metrics.flops(control.hint, c))
    zeros = sum(metrics.flops(Z, f) for Z, f in zip(control.zeros, features, strict=True))
    yield Part("zero convolutions", count(control.zeros), zeros)


def expected() -> dict[str, float]:
    """The ratios that operations alone give: a way back to a layer's input costs as much as the layer, one to its weights too.

    sampling  (2 E + D + H) / (E + D): encoder E, decoder D, hint encoder and zero convolutions H
    training  (4 E + 2 D + 3 H) / (3 E + 3 D): the locked encoder has no way back, and the locked decoder none to its weights
    """
    E, D, *added = (part.flops for part in parts())
    H = sum(added)
    return {"sampling": (2 * E + D + H) / (E + D), "training": (4 * E + 2 * D + 3 * H) / (3 * E + 3 * D)}
