"""`scenes-reader` and `scenes-reader-2`: two readers of every attribute of the scene world.

Their architectures and seeds differ, so that one confirms the other. They see all combinations of attributes, also those
held out from the models that they judge; blur, noise, shifts and changes of contrast make them read what a model draws.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets.scene_reader import patch_reader, residual_reader
from course_lib.training import Fit, fit
from course_lib.worlds.scenes.attributes import Scenes
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.labels import OF_OBJECT, OF_SCENE, labels
from course_lib.zoo.readers import SceneReader, azimuth_errors, correct
from course_lib.zoo.recipes.settings import settings

DATA = "the scene world at 64 px, one or two objects: 60,000 scenes of seed 1 and 6,000 held-out combinations of seed 2"
TRAINING = {"train": (60_000, 1), "held out": (6_000, 2)}
TESTING = {"train": (2_000, 9_001), "held out": (1_000, 9_002)}
"""Number of scenes and seed of each split."""

VARIANTS: dict[str, dict[str, Any]] = {
    "scenes-reader": {"build": residual_reader, "steps": 10_000, "lr": 2e-3, "seed": 1},
    "scenes-reader-2": {"build": patch_reader, "steps": 10_000, "lr": 1.5e-3, "seed": 2},
}
BATCH = 64


def network(name: str) -> nn.Module:
    """The untrained network of this name."""
    return VARIANTS[name]["build"]()


def wrap(net: nn.Module) -> SceneReader:
    """What `zoo.load` returns."""
    return SceneReader(net)


def data(which: dict[str, tuple[int, int]]) -> list[SceneDataset]:
    """The data sets of these splits, their pictures cached."""
    return [SceneDataset(n, seed, objects=(1, 2), split=split).cached() for split, (n, seed) in which.items()]


def degrade(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 2 pixels, blur half of the batches, change brightness and contrast by 5 %, and add noise; shape kept."""

    def number(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    dy, dx = (int(v) for v in torch.randint(0, 5, (2,), generator=generator))
    n, _, h, w = x.shape
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")[:, :, dy : dy + h, dx : dx + w]
    if float(number(0, 1)) < 0.5:
        low = int(torch.randint(26, 60, (), generator=generator))
        x = F.interpolate(F.interpolate(x, (low, low), mode="bilinear", antialias=True), (h, w), mode="bicubic").clamp(-1, 1)
    x = x * number(0.95, 1.05, n, 1, 1, 1) + number(-0.05, 0.05, n, 1, 1, 1)
    return x + number(0, 0.08, n, 1, 1, 1) * torch.randn(x.shape, generator=generator)


def _table(scenes: Scenes) -> Tensor:
    """The labels as one row of numbers a scene: names of OF_SCENE, then two of each of OF_OBJECT, azimuth and front."""
    of = labels(scenes)
    columns = [getattr(of, name)[:, None] for name in OF_SCENE] + [getattr(of, name) for name in (*OF_OBJECT, "azimuth", "front")]
    return torch.cat([column.float() for column in columns], 1)


def loss(net: nn.Module, x: Tensor, table: Tensor) -> Tensor:
    """Cross-entropy of every attribute, squared error of (cos, sin) azimuth, of what is there to be read: (B,)."""
    found = net(x)
    total = torch.zeros(len(x), device=x.device)
    for i, name in enumerate(OF_SCENE):
        total = total + F.cross_entropy(found[name].float(), table[:, i].long(), ignore_index=-1, reduction="none")
    pairs = table[:, len(OF_SCENE) :].unflatten(1, (-1, 2))
    for i, name in enumerate(OF_OBJECT):
        each = F.cross_entropy(found[name].float().movedim(-1, 1), pairs[:, i].long(), ignore_index=-1, reduction="none")
        total = total + each.sum(1)
    shape, azimuth, front = pairs[:, 0], torch.deg2rad(pairs[:, -2]), pairs[:, -1]
    oriented = (shape >= 4).float()
    miss = (found["azimuth"].float() - torch.stack([azimuth.cos(), azimuth.sin()], -1)).square().sum(-1)
    seen = F.binary_cross_entropy_with_logits(found["front"][..., 0].float(), front, reduction="none")
    return total + (oriented * (miss + 0.5 * seen)).sum(1)


def train(
    name: str,
    net: nn.Module | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    **options: Any,
) -> Fit:
    """Minimise `loss` on degraded pictures of both splits."""
    sets = data(TRAINING)
    tables = [_table(each.scenes) for each in sets]

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        some = torch.randint(sum(map(len, sets)), (BATCH,), generator=generator)
        first = some < len(sets[0])
        rows = [some[first], some[~first] - len(sets[0])]
        x = torch.cat([each.pictures(r) for each, r in zip(sets, rows, strict=True)])
        table = torch.cat([each[r] for each, r in zip(tables, rows, strict=True)])
        return degrade(x, generator), table

    chosen = settings(VARIANTS[name], steps=steps, lr=lr, seed=seed)
    torch.manual_seed(chosen["seed"])
    net = network(name) if net is None else net
    return fit(net, draw, loss, weight_decay=0.02, ema_decay=0.998, **chosen, **options)


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """Accuracy of each attribute on held-out renders: of seen combinations, of held-out ones, and of two-object scenes."""
    reader, metrics = SceneReader(net), {}
    for split, each in zip(("seen combinations", "held-out combinations"), data(TESTING), strict=True):
        pictures, true = each.pictures(torch.arange(len(each))), labels(each.scenes)
        read = reader.read(pictures)
        errors = azimuth_errors(read, true)
        metrics[split] = {key: round(float(right.double().mean()), 4) for key, right in correct(read, true).items()}
        metrics[split] |= {
            "fronts": round(float((read.fronts == true.fronts).double().mean()), 4),
            "azimuth_mean_error_degrees": round(float(errors.mean()), 2),
            "azimuth_median_error_degrees": round(float(errors.median()), 2),
        }
    return metrics
