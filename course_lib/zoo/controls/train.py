"""One training of one way to tell `mini-sd` a map of edges, and what became of it."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import zoo
from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import autocast, generator, one_thread
from course_lib.nets.adapters import concat_of, gaussian_of, light_of, t2i_of, told
from course_lib.nets.control import control_of
from course_lib.training import denoising_loss, fit, write_atomically
from course_lib.worlds.scenes.dataset import VERSION, cache_folder
from course_lib.zoo.control_data import Mapped, mapped
from course_lib.zoo.judge_controls import STEPS as SAMPLED
from course_lib.zoo.judge_controls import W, prompts, scenes
from course_lib.zoo.judge_scenes import generate
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.recipes import control

LAYER = "lines"
"""What every method is told: the exact lines of a scene."""
STEPS, BATCH = 400, 32
WATCHED = (0, 25, 50, 75, 100, 150, 200, 250, 300, 400)
"""Steps at which pictures are made, and of how many validation scenes."""
FEW = 12
SHOWN = ("ControlNet", "no zero convolutions", "concatenation")
"""Of which methods: the others are not asked when they begin to obey."""

METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "ControlNet": lambda net, seed: control_of(net, seed=seed),
    "no zero convolutions": lambda net, seed: gaussian_of(net, seed=seed),
    "light encoder": lambda net, seed: light_of(net, seed=seed),
    "T2I-Adapter": lambda net, seed: t2i_of(net, seed=seed),
    "concatenation": lambda net, seed: concat_of(net),
}
"""What is trained, made of the network of `mini-sd` and a seed."""


@functools.cache
def model() -> Pretrained:
    """What is told the map."""
    return zoo.load("mini-sd", device="cpu")


@functools.cache
def whole() -> Mapped:
    """The scenes that `mini-control-edge` is trained on."""
    return mapped(control.SCENES, control.SEED)


def first(of: Mapped, n: int) -> Mapped:
    """The first n of these scenes, as data to train on."""
    maps = {name: layer[:n] for name, layer in of.maps.items()}
    return replace(of, mean=of.mean[:n], std=of.std[:n], ids=of.ids[:n], maps=maps)


def made(method: str, seed: int) -> nn.Module:
    """What is trained, untrained. Raises ValueError for another method."""
    if method not in METHODS:
        raise ValueError(f"method = {method!r}; expected one of {', '.join(METHODS)}")
    return METHODS[method](model().denoiser.net, seed)


def draws(of: Mapped, batch: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Batches of these scenes as the recipe draws them, under the one kind of map."""
    return control.batches(of, (LAYER,), model().schedule.sigma(torch.arange(1000)), batch)


def loss(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, ids: Tensor, maps: Tensor) -> Tensor:
    """The denoising loss of v of `mini-sd` that is told the maps by `net`, (B,)."""
    with control.attention_of(x0.device):
        with torch.no_grad():
            text = model().pipeline.text_encoder(ids)[0]
        D = told(model().denoiser, net).given(map=maps, encoder_hidden_states=text)
        return denoising_loss(D, x0, sigma, eps, "v")


@torch.no_grad()
def mean_loss(net: nn.Module, of: Mapped, batches: int = 4) -> float:
    """The mean of `loss` over 400 draws of these scenes, the same for every network."""
    draw = draws(of, 100)
    with autocast("cpu"), one_thread():
        found = torch.stack([loss(net, *draw(generator(96, k))).float().mean() for k in range(batches)])
    return round(float(found.mean()), 5)


def few(D: NetworkDenoiser) -> Tensor:
    """Pictures (FEW, 3, 64, 64) uint8 of the first validation scenes, by a Denoiser that takes `map`; the same noise always."""
    maps = scenes("validation").condition(LAYER, torch.arange(FEW))
    found = generate(replace(model(), denoiser=D), prompts("validation")[:FEW], W, 0, SAMPLED, condition={"map": maps})
    return ((found.clamp(-1, 1) + 1) * 127.5).round().byte()


@dataclass
class Trained:
    """What a training left.

    net        the averaged weights after the last step
    pictures   step -> pictures of `few`, by the averaged weights of that step
    seconds    of one thread, a step
    weights    how many were trained
    """

    net: nn.Module
    pictures: dict[int, Tensor]
    seconds: float
    weights: int


def trained(method: str, lr: float, seed: int, n: int = control.SCENES, stop_at: int | None = None) -> Trained:
    """Train a method on the first n scenes, or find it in the cache; of those SHOWN pictures are made on the way.

    stop_at  ends the run earlier, and then no pictures are made
    """
    watch = method in SHOWN and stop_at is None
    words = f"{method} {lr} {seed} {n} {STEPS} {stop_at} {watch} {BATCH} {VERSION} {zoo.card('mini-sd')['sha256']}"
    kept = cache_folder() / "controls" / "trained" / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.pt"
    net = made(method, seed)
    weights = sum(value.numel() for value in net.parameters() if value.requires_grad)
    if not kept.exists():
        state = _train(net, lr, seed, n, stop_at, watch)
        write_atomically(kept, lambda path: torch.save(state, path))
    state = torch.load(kept, weights_only=True)
    net.load_state_dict(state["net"])
    return Trained(net.eval().requires_grad_(False), state["pictures"], state["seconds"], weights)


def _train(net: nn.Module, lr: float, seed: int, n: int, stop_at: int | None, watch: bool) -> dict[str, Any]:
    pictures: dict[int, Tensor] = {}
    aside = 0.0

    def look(step: int, ema: nn.Module) -> None:
        nonlocal aside
        if watch and step in WATCHED:
            begun = time.process_time()
            pictures[step] = few(told(model().denoiser, ema))
            aside += time.process_time() - begun

    with one_thread():
        look(0, net)
        draw, aside, begun = draws(first(whole(), n), BATCH), 0.0, time.process_time()
        done = fit(net, draw, loss, steps=STEPS, lr=lr, seed=seed, stop_at=stop_at, device="cpu", on_step=look)
    seconds = (time.process_time() - begun - aside) / (stop_at or STEPS)
    return {"net": done.net.state_dict(), "pictures": pictures, "seconds": seconds}
