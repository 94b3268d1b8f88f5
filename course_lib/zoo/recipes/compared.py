"""`ring-gan`, ..., `digits-gan`, ...: the four families on a ring of Gaussians and on the scanned digits, 8 x 8.

Equal numbers of parameters and equal seconds of training; three seeds each, so that a difference can be told from
chance. The settings were chosen by `course tune WORLD` on a validation split, in runs of a third of the length.
`digits` is the course's model of digits; these exist to be compared.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import families, metrics
from course_lib.devices import generator
from course_lib.families import GAN, Family
from course_lib.training import Fit
from course_lib.worlds import digits
from course_lib.zoo import tune

DATA = "as course_lib.zoo.tune.WORLDS draws them: eight Gaussians on a ring; scikit-learn's first 1,437 digits, 8 x 8"
SEEDS = (0, 1, 2)
SAMPLES = {"ring": 20_000, "digits": 1797}
"""How many samples are judged: as many as there are real digits, and enough that chance is small on the ring."""
LONGER = 3
"""How much longer the models of the zoo train than those that chose the settings."""
COMPARED = {f"{world}-{family.lower()}": (world, family) for world in tune.WORLDS for family in families.FAMILIES}
"""Name -> world and family."""


def network(name: str) -> nn.ModuleList:
    """Three untrained models of one family."""
    return nn.ModuleList(tune.build(*COMPARED[name], tune.chosen(*COMPARED[name])[0]) for _ in SEEDS)


def wrap(net: nn.ModuleList) -> list[Family]:
    """What `zoo.load` returns: the three models, one for each seed, each with `sample(n, seed)`."""
    return list(net.eval())


def train(
    name: str,
    net: nn.ModuleList | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    stop_at: int | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> Fit:
    """Train the three seeds, one after the other, with the settings that were chosen; `steps` counts those of all three."""
    settings, tried = tune.chosen(*COMPARED[name])
    settings = settings if lr is None else {**settings, "lr": lr}
    each = LONGER * tried if steps is None else max(1, steps // len(SEEDS))
    fits: list[Fit] = []
    for k in SEEDS:
        end = each if stop_at is None else min(each, stop_at - k * each)
        if end <= 0:
            break
        one = {"net": None if net is None else net[k], "stop_at": end, **options}
        one["checkpoint"] = None if checkpoint is None else checkpoint.with_suffix(f".{k}{checkpoint.suffix}")
        fits.append(tune.train(*COMPARED[name], settings, each, seed + k, **one))
    losses = [loss for one in fits for loss in one.losses]
    return Fit(nn.ModuleList(one.net for one in fits), losses, sum(one.seconds for one in fits))


def pictures(x0: Tensor) -> Tensor:
    """Samples (N, 64) in [-1, 1) as pictures of 16 x 16, as the readers and the judge of `digits` see them."""
    return digits.enlarge(digits.quantise(x0).reshape(-1, 1, 8, 8) / 8 - 1)


def bits(model: Family, split: str, draws: int = 1) -> float | None:
    """Bits per pixel of the 17 grey values on a split, -log2 p(x0) / d + log2(17 / 2); None for the GAN, which has no p.

    Exact for the flow's density of the dequantised pixels, an upper bound for VAE and diffusion.
    """
    if isinstance(model, GAN):
        return None
    grey, values = tune.grey_rows(split), []
    for k in range(draws):
        x0 = digits.dequantise(grey, torch.rand(grey.shape, generator=generator(77, k)))
        values.append(float(model.nats(x0, seed=k).mean()) / (x0.shape[1] * math.log(2)) + math.log2(digits.LEVELS / 2))
    return round(sum(values) / draws, 3)


def measure(world: str, model: Family, seed: int) -> dict[str, Any]:
    """The numbers of one model: distance to the truth, precision and recall, the modes or classes that it reaches."""
    return (_measure_ring if world == "ring" else _measure_digits)(model, seed)


def _measure_ring(model: Family, seed: int) -> dict[str, Any]:
    points, real = model.sample(SAMPLES["ring"], seed=seed), tune.RING.sample(SAMPLES["ring"], generator(30))
    precision, recall = metrics.precision_recall(real[:4000], points[:4000])  # every pair is a distance
    covered, on_mode, imbalance = metrics.mode_coverage(points, tune.RING)
    return {
        "sliced_wasserstein": round(metrics.sliced_wasserstein(points, real), 4),
        "precision": round(precision, 3),
        "recall": round(recall, 3),
        "covered": covered,
        "imbalance": round(imbalance, 4),
        "on_mode": round(on_mode, 4),
    }


def _measure_digits(model: Family, seed: int) -> dict[str, Any]:
    from course_lib import zoo
    from course_lib.zoo import judge_digits

    samples = pictures(model.sample(SAMPLES["digits"], seed=seed))
    real, labels = digits.load("all")
    a, b = judge_digits.grey(samples), judge_digits.grey(real)
    read = zoo.load("digits-reader", device="cpu")(samples).argmax(1).bincount(minlength=digits.CLASSES) / len(samples)
    due = labels.bincount(minlength=digits.CLASSES) / len(labels)
    return {
        "sliced_wasserstein": round(metrics.sliced_wasserstein(a, b), 5),
        **judge_digits.quality(a, b),
        "covered": int((read >= due / 4).sum()),
        "imbalance": round(float((read - due).abs().sum() / 2), 3),
        **{f"bits_per_pixel_{split}": bits(model, split) for split in ("test", "train")},
    }


def judge(name: str, net: nn.ModuleList) -> dict[str, Any]:
    """The numbers of the card: each seed's, and the sliced Wasserstein distance that two exact sets have by chance."""
    world, family = COMPARED[name]
    return {
        "settings": tune.chosen(world, family)[0],
        "parameters_per_seed": sum(p.numel() for p in net[0].parameters()),
        "seeds": [measure(world, model, seed) for seed, model in zip(SEEDS, net, strict=True)],
        "sliced_wasserstein_floor": floor(world),
    }


def floor(world: str) -> float:
    """The sliced Wasserstein distance of two exact sets as large as the samples; of digits, two bootstraps of the real ones."""
    from course_lib.zoo import judge_digits

    draw = tune.RING.sample
    if world == "digits":
        rows = judge_digits.grey(digits.load("all")[0])
        draw = lambda n, source: rows[torch.randint(len(rows), (n,), generator=source)]
    return round(metrics.sliced_wasserstein_floor(draw, SAMPLES[world])[0], 5)
