"""`scenes-maps`: reads the condition maps back from a picture, and so judges whether a controlled picture obeys its control.

It sees renders and what `mini-sd`'s decoder makes of them, in the world's own style and in the others of `maps.STYLES`, so that
it errs no more on generated pictures than on others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import zoo
from course_lib.devices import autocast
from course_lib.nets.map_reader import MapReader
from course_lib.training import Fit, fit
from course_lib.worlds.scenes.dataset import CHUNK
from course_lib.worlds.scenes.maps import STYLES
from course_lib.worlds.scenes.render import render
from course_lib.zoo import map_judge
from course_lib.zoo.control_data import Mapped, mapped
from course_lib.zoo.recipes.settings import settings

DATA = "16,000 training scenes of seed 61, one or two objects: renders in three styles, and mini-sd's reconstructions of them"
LOOKS = (None, *STYLES)
"""The world's own style, and the others."""
SCENES, SEED = 16_000, 61
HELD_OUT = {"seen combinations": (500, 9_601, "train"), "held-out combinations": (500, 9_602, "held out")}
TRAINING: dict[str, Any] = {"steps": 12_000, "lr": 2e-3, "seed": 61}
BATCH, SIDE = 32, 64
LINES = 2.0
"""How much more a pixel of a line weighs than another: lines are few of the pixels."""


def network(name: str = "scenes-maps") -> MapReader:
    """The untrained network."""
    with torch.random.fork_rng([]):
        torch.manual_seed(TRAINING["seed"])
        return MapReader()


def wrap(net: nn.Module) -> map_judge.MapJudge:
    """What `zoo.load` returns."""
    return map_judge.MapJudge(net)


@torch.no_grad()
def pictures(of: Mapped, style: str | None, reconstructed: bool) -> Tensor:
    """The pictures (N, 3, 64, 64) of these scenes as bytes: renders in a style, or what the decoder makes of them."""
    model, found = zoo.load("mini-sd"), []
    for rows in torch.arange(len(of)).split(CHUNK):
        if reconstructed:
            with autocast(model.device):
                x = model.decode(of.mean[rows].to(model.device)).float().cpu()
        else:
            scenes = of.of.scenes[rows]
            x = STYLES[style](scenes, SIDE) if style else render(scenes, SIDE).rgb
        found.append((x * 127.5 + 127.5).round().byte())
    return torch.cat(found)


def train(name: str = "scenes-maps", net: nn.Module | None = None, steps: int | None = None, lr: float | None = None,
          seed: int | None = None, **options: Any) -> Fit:  # fmt: skip
    """Minimise the cross-entropies of objects' lines and of classes plus ten times the mean error of the nearness."""
    sets = {style: mapped(SCENES, SEED, style) for style in LOOKS}
    versions = torch.stack([pictures(of, style, again) for style, of in sets.items() for again in (False, True)])
    maps = sets[None].maps
    lines = map_judge.of_objects(maps["lines"] > 127, maps["classes"])

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(SCENES, (BATCH,), generator=source)
        x = versions[torch.randint(len(versions), (BATCH,), generator=source), rows].float() / 127.5 - 1
        return x, lines[rows].float(), maps["near"][rows].float() / 255, maps["classes"][rows].long()

    def loss(net: nn.Module, x: Tensor, lines: Tensor, near: Tensor, classes: Tensor) -> Tensor:
        found = [part.float() for part in net(x)]
        line = F.binary_cross_entropy_with_logits(found[0][:, 0], lines, pos_weight=x.new_tensor(LINES), reduction="none")
        line = line.flatten(1).mean(1)
        error = (found[1][:, 0] - near).abs().flatten(1).mean(1)
        return line + 10 * error + F.cross_entropy(found[2], classes, reduction="none").flatten(1).mean(1)

    chosen = settings(TRAINING, steps=steps, lr=lr, seed=seed)
    return fit(network(name) if net is None else net, draw, loss, **chosen, **options)


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """Its errors on held-out scenes, on renders and on reconstructions, in every style: the floor below which none is read."""
    reader, metrics = wrap(net), {}
    for title, (n, seed, split) in HELD_OUT.items():
        for style in LOOKS:
            of = mapped(n, seed, style, split)
            for again in (False, True):
                x = pictures(of, style, again).float() / 127.5 - 1
                case = f"{title}, {style or 'as rendered'}, {'reconstructed' if again else 'rendered'}"
                metrics[case] = map_judge.errors(reader.read(x), map_judge.truth(of, torch.arange(n)))
    return metrics
