"""The rows: rates, methods beside each other, little data, and how a control begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.devices import one_thread
from course_lib.nets.adapters import told
from course_lib.worlds.scenes.captions import parse
from course_lib.zoo.controls import rows
from course_lib.zoo.controls.train import FEW, LAYER, Trained, first, made, mean_loss, model, trained, whole
from course_lib.zoo.judge_controls import judged, judges, pictures_of, prompts, scenes
from course_lib.zoo.judge_scenes import reconstruct
from course_lib.zoo.map_judge import errors, truth
from course_lib.zoo.recipes import control
from course_lib.zoo.stored import Row

SEEDS = (0, 1, 2)
ALL = control.SCENES
RATES = (1e-3, 3e-4, 3e-3)
LITTLE = ALL // 100
SOME = ALL // 10


def tune(method: str, scenes: int) -> Row:
    """Each rate in the whole run of the first seed; chosen is the smallest loss on the validation scenes."""
    tried = []
    for lr in RATES:
        of = trained(method, lr, SEEDS[0], scenes)
        tried.append({"lr": lr, "loss": held_out(of.net), "curve": curve(of)})
    return {"method": method, "scenes": scenes, "tried": tried, "chosen": min(tried, key=lambda one: one["loss"])["lr"]}


def chosen(method: str, scenes: int) -> float:
    """The rate of the run with the smallest loss; between 1 % and all of the data that of all."""
    wanted = {"method": method, "scenes": LITTLE if scenes == LITTLE else ALL}
    both = rows("rates") + (rows("rates for little data") if scenes == LITTLE else [])
    return next(row["chosen"] for row in both if wanted.items() <= row.items())


def held_out(net: nn.Module) -> float:
    """The loss on the validation scenes."""
    return mean_loss(net, scenes("validation"))


def told_pictures(net: nn.Module, split: str, seed: int, blank: bool = False) -> Tensor:
    """A picture of each scene of a split by `mini-sd` that is told the maps by `net`, or no map at all.

    Both halves of the guidance are given the map, which every method can take; a model with further input channels was never
    trained without it.
    """
    told_one = replace(model(), denoiser=told(model().denoiser, net))
    return pictures_of(told_one, split, maps=None if blank else {"map": LAYER}, seed=seed)


def curve(of: Trained) -> dict[str, Any]:
    """Control errors and adherence of the few pictures at each step that was watched."""
    reader, attributes = judges()
    asked, wanted = truth(scenes("validation"), torch.arange(FEW)), [parse(one) for one in prompts("validation")[:FEW]]
    found: dict[str, Any] = {"steps": list(of.pictures), "edge": [], "depth": [], "seg": [], "obeyed": []}
    for pictures in of.pictures.values():
        seen = pictures.float() / 127.5 - 1
        each = errors(reader.read(seen), asked)
        each["obeyed"] = round(float(attributes.obeys(seen, wanted)["all"].mean()), 4)
        for name, value in each.items():
            found[name].append(value)
    return found


def measure(method: str, scenes: int, seed: int) -> Row:
    """One training at its chosen rate: what it is worth on the test scenes, and its way there."""
    of = trained(method, lr := chosen(method, scenes), seed, scenes)
    with one_thread():
        worth = judged(told_pictures(of.net, "test", seed), "test")
        curved = curve(of)
    return {
        "method": method,
        "scenes": scenes,
        "seed": seed,
        "lr": lr,
        **worth,
        "loss": held_out(of.net),
        "loss_on_its_own": mean_loss(of.net, first(whole(), scenes)),
        "weights": of.weights,
        "seconds_a_step": round(of.seconds, 4),
        "curve": curved,
    }


def begin(method: str, step: int, seed: int) -> Row:
    """A control after so few steps of its run, on the validation scenes."""
    net = made(method, seed) if step == 0 else trained(method, chosen(method, ALL), seed, stop_at=step).net
    with one_thread():
        worth = judged(told_pictures(net, "validation", seed), "validation")
    return {"method": method, "step": step, "seed": seed, **worth, "loss": held_out(net)}


def end(of: str, seed: int) -> Row:
    """What the numbers lie between: `mini-sd` without a map, and renders of the test scenes after its VAE."""
    with one_thread():
        if of == "renders":
            test = scenes("test")
            return {"of": of, "seed": seed, **judged(reconstruct(model(), test.of.pictures(torch.arange(len(test)))), "test")}
        return {"of": of, "seed": seed, **judged(pictures_of(model(), "test", seed=seed), "test")}


def blank(method: str, scenes: int, seed: int) -> Row:
    """The trained model without a map: what is left of `mini-sd`. A ControlNet that is given none is `mini-sd`."""
    net = trained(method, chosen(method, scenes), seed, scenes).net
    with one_thread():
        return {"method": method, "scenes": scenes, "seed": seed, **judged(told_pictures(net, "test", seed, True), "test")}
