"""`course tune WORLD`: choose the settings of the four families, the same budget for each, and store what was tried and chosen.

Every family gets the same number of parameters, six settings, and the same seconds for each. The score of a setting is the
sliced Wasserstein distance to a validation split; `tuned.json` keeps all scores beside the choice.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_lib import devices, families, metrics
from course_lib.devices import generator
from course_lib.families import Family
from course_lib.training import Fit, write_atomically
from course_lib.worlds import digits, toys

TUNED = Path(__file__).with_name("tuned.json")
Settings = dict[str, Any]
TRAINING = ("lr", "betas")
"""Settings that go to the training loop; the others go to the family."""


def _grid(**choices: Iterable[Any]) -> list[Settings]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@dataclass(frozen=True)
class World:
    """Data on which the families are compared.

    parameters  of each family; seconds that each may train, on the machine that tunes
    draw        generator -> a batch (B, d) of training data; validate the same without the validation split
    score       samples (n, d) -> distance to the validation split
    """

    dim: int
    parameters: int
    seconds: float
    samples: int
    fixed: Settings
    grids: dict[str, list[Settings]]
    draw: Callable[[torch.Generator], Tensor]
    draw_without_validation: Callable[[torch.Generator], Tensor]
    score: Callable[[Tensor], float]


RING = toys.ring(8)
VALIDATION = 237
"""The last rows of the digits' training split, held back while tuning."""


def _ring_score(points: Tensor) -> float:
    return metrics.sliced_wasserstein(points, RING.sample(len(points), generator(1234)))


def _digits_batch(rows: Tensor, source: torch.Generator, batch: int = 128) -> Tensor:
    chosen = rows[torch.randint(len(rows), (batch,), generator=source)]
    return digits.dequantise(chosen, torch.rand(chosen.shape, generator=source))


def grey_rows(split: str = "train") -> Tensor:
    """The scanned digits as rows of grey values 0 to 16, (N, 64) fp32."""
    return digits.originals(split)[0].flatten(1).float()


def _digits_score(x0: Tensor) -> float:
    return metrics.sliced_wasserstein(digits.quantise(x0) / 16, grey_rows()[-VALIDATION:] / 16)


WORLDS: dict[str, World] = {
    "ring": World(
        dim=2,
        parameters=20_000,
        seconds=6.0,
        samples=4000,
        fixed={"VAE": {}, "GAN": {"betas": (0.0, 0.9)}, "flow": {}, "diffusion": {"sigma_data": 1.07}},
        grids={
            "GAN": _grid(lr=(5e-4, 1e-3, 2e-3), gamma=(0.1, 1.0)),
            "VAE": _grid(lr=(2e-3, 5e-3, 1e-2), latent=(2, 4)),
            "flow": _grid(lr=(2e-3, 5e-3, 1e-2), layers=(4, 8)),
            "diffusion": _grid(lr=(2e-3, 5e-3, 1e-2), noise_levels=((-1.2, 1.2), (-0.8, 1.6))),
        },
        draw=lambda source: RING.sample(256, source).float(),
        draw_without_validation=lambda source: RING.sample(256, source).float(),
        score=_ring_score,
    ),
    "digits": World(
        dim=64,
        parameters=100_000,
        seconds=30.0,
        samples=1797,
        fixed={"VAE": {}, "GAN": {"betas": (0.0, 0.9)}, "flow": {}, "diffusion": {"sigma_data": 0.71}},
        grids={
            "GAN": _grid(lr=(2e-4, 5e-4, 1e-3), gamma=(0.1, 1.0)),
            "VAE": _grid(lr=(1e-3, 2e-3, 5e-3), latent=(8, 16)),
            "flow": _grid(lr=(2e-4, 5e-4, 1e-3), layers=(4, 8)),
            "diffusion": _grid(lr=(1e-3, 2e-3, 5e-3), noise_levels=((-1.2, 1.4), (-0.8, 1.2))),
        },
        draw=lambda source: _digits_batch(grey_rows(), source),
        draw_without_validation=lambda source: _digits_batch(grey_rows()[:-VALIDATION], source),
        score=_digits_score,
    ),
}


def world(name: str) -> World:
    """The world of this name; ValueError for another."""
    if name not in WORLDS:
        raise ValueError(f"world = {name!r}; expected one of {', '.join(WORLDS)}")
    return WORLDS[name]


def build(name: str, family: str, settings: Settings) -> Family:
    """An untrained model of one family, as large as the world asks."""
    at = world(name)
    own = {key: value for key, value in (at.fixed[family] | settings).items() if key not in TRAINING}
    return families.sized(family, at.dim, at.parameters, **own)


def train(
    name: str,
    family: str,
    settings: Settings,
    steps: int,
    seed: int,
    *,
    net: Family | None = None,
    validate: bool = False,
    **options: Any,
) -> Fit:
    """Train one family on a world with these settings; `net` goes on with a model, `validate` leaves the validation split out."""
    at = world(name)
    loop = {key: value for key, value in (at.fixed[family] | settings).items() if key in TRAINING}
    torch.manual_seed(seed)
    draw = at.draw_without_validation if validate else at.draw
    model = build(name, family, settings) if net is None else net
    return families.fit_family(model, draw, steps, seed=seed, **loop, **options)


def seconds_per_step(name: str, family: str, settings: Settings, steps: int = 40) -> float:
    """Processor time of a training step, the least of three short runs: other work on the machine does not count."""
    spent = []
    for seed in range(3):
        start = time.process_time()
        train(name, family, settings, steps, seed, validate=True, progress=False)
        spent.append((time.process_time() - start) / steps)
    return min(spent)


def tune(name: str, say: Callable[[str], None] = print) -> Path:
    """Try every setting of every family on one world and store scores and choices; returns the path of the file."""
    at, found = world(name), {}
    for family, grid in at.grids.items():
        tried = []
        for settings in grid:
            steps = max(100, 10 * round(at.seconds / seconds_per_step(name, family, settings) / 10))
            try:
                fit = train(name, family, settings, steps, 100, validate=True, progress=False)
                score, seconds = round(at.score(fit.net.sample(at.samples, seed=100)), 4), round(fit.seconds, 1)
            except FloatingPointError:  # it diverged, or its samples are not finite
                score, seconds = None, None
            tried.append({"settings": settings, "steps": steps, "seconds": seconds, "score": score})
            say(f"{name} {family}: {tried[-1]}")
        best = min((one for one in tried if one["score"] is not None), key=lambda one: one["score"])
        found[family] = {"settings": best["settings"], "steps": best["steps"], "tried": tried}
    everything = read() if TUNED.exists() else {}
    everything[name] = {
        "command": f"course tune {name}",
        "hardware": devices.describe(),
        "parameters": at.parameters,
        "seconds": at.seconds,
        "families": found,
    }
    write_atomically(TUNED, lambda path: path.write_text(json.dumps(everything, indent=2) + "\n"))
    return TUNED


def read() -> dict[str, Any]:
    """All that was tried and chosen, by world."""
    return json.loads(TUNED.read_text())


def chosen(name: str, family: str) -> tuple[Settings, int]:
    """The settings and the number of steps that were chosen for a family on a world; ValueError before `course tune`."""
    tuned = read()
    if name not in tuned:
        raise ValueError(f"world = {name!r} is not in {TUNED.name}; run `course tune {name}`")
    entry = tuned[name]["families"][family]
    return entry["settings"], entry["steps"]
