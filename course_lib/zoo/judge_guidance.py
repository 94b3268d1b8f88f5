"""What guidance does to `digits` and `mini-sd`: adherence, diversity and saturation over w, and each variant beside CFG.

`python -m course_lib.zoo.judge_guidance digits` (or mini-sd, negative) measures what `guidance.json` has not yet, row by row,
so that a run that was interrupted goes on; `rows(...)` and `negative()` read it.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from course_lib import metrics, zoo
from course_lib.devices import SampleNoise, autocast
from course_lib.guidance import (
    apg,
    cfg,
    cfg_pp,
    cfg_rescaled,
    classifier_guidance,
    interval,
    noise_blind,
    pag,
    reader_guidance,
    sag,
)
from course_lib.sample import sample
from course_lib.steps import ddim
from course_lib.types import Denoiser, Step
from course_lib.worlds import digits
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.labels import OF_SCENE
from course_lib.zoo import judge_digits, stored
from course_lib.zoo.recipes import digits as recipe
from course_lib.zoo.stored import Row

STORED = Path(__file__).with_name("guidance.json")
BEYOND = 0.1
"""A pixel is clipped where it lies farther than this beyond [-1, 1]: backgrounds of -1 are missed by a little in every sample."""


@dataclass(frozen=True)
class Task:
    """What is to be drawn in one batch: the two Denoisers of guidance, the network behind them, and what else a method needs."""

    cond: Denoiser
    ref: Denoiser
    net: Any
    label: Tensor | None = None


Method = Callable[[Task, float], tuple[Denoiser, Step]]


def methods(low: float, high: float) -> dict[str, Method]:
    """The rules that need two Denoisers alone, by name; the interval is (low, high]."""
    return {
        "cfg": lambda task, w: (cfg(task.cond, task.ref, w), ddim),
        "interval": lambda task, w: (cfg(task.cond, task.ref, interval(w, low, high)), ddim),
        "rescale": lambda task, w: (cfg_rescaled(task.cond, task.ref, w), ddim),
        "apg": lambda task, w: (apg(task.cond, task.ref, w), ddim),
        "cfg++": lambda task, w: (task.cond, cfg_pp(task.ref, w)),
        "pag": lambda task, w: (pag(task.cond, task.net, w), ddim),
        "sag": lambda task, w: (sag(task.cond, task.net, w), ddim),
    }


def spread(features: Tensor, groups: Tensor) -> float:
    """Mean distance between two samples of one group, averaged over the groups; features (N, d), groups (N,)."""
    found = []
    for group in groups.unique():
        mine = features[groups == group].double()
        found.append(torch.cdist(mine, mine).sum() / (len(mine) * (len(mine) - 1)))
    return float(torch.stack(found).mean())


def clipped(pictures: Tensor) -> float:
    """Share of pixels more than BEYOND outside [-1, 1]."""
    return float((pictures.abs() > 1 + BEYOND).double().mean())


class Digits:
    """15 of each class and seed, in 20 DDIM steps between the card's levels; judged by the second reader, guided by the first."""

    seeds, each, steps = 4, 15, 20
    scales: ClassVar = {
        "cfg": (1, 1.5, 2, 3, 5, 8),
        "classifier": (0, 0.5, 1, 2, 4, 8),
        "reader": (1, 2, 4),
        "blind": (1, 4),
        "interval": (2, 4, 8),
        "rescale": (2, 4, 8),
        "apg": (2, 4, 8),
        "cfg++": (0.1, 0.2, 0.4),
        "pag": (0.5, 1, 2),
        "sag": (0.5, 1, 2),
        "auto": (1.5, 2, 3),
    }

    def __init__(self) -> None:
        self.D, self.guide, self.judge_ = (self.load(name) for name in ("digits", "digits-reader", "digits-reader-2"))
        images, self.labels = digits.load("all")
        self.real, self.pixels = self.judge_.features(images), judge_digits.grey(images)
        self.pca = metrics.pca_features(self.pixels, 16)
        self.methods = {
            **methods(0.2, 2.0),
            "auto": lambda task, w: (cfg(task.cond, self.load("digits-weak").given(label=task.label), w), ddim),
            "classifier": lambda task, w: (classifier_guidance(task.ref, self.load("digits-classifier"), task.label, w), ddim),
            "reader": lambda task, w: (reader_guidance(task.ref, self.guide, task.label, w), ddim),
            "blind": lambda task, w: (classifier_guidance(task.ref, noise_blind(self.guide), task.label, w), ddim),
        }

    @staticmethod
    @functools.cache
    def load(name: str) -> Any:
        """The embedded model of this name."""
        return zoo.load(name, device="cpu")

    def draw(self, method: str, w: float, seed: int) -> tuple[Tensor, Tensor]:
        """Raw samples (N, 1, 16, 16) and the classes that were asked for."""
        label = torch.arange(digits.CLASSES).repeat_interleave(self.each)
        null = torch.full_like(label, digits.CLASSES)
        task = Task(self.D.given(label=label), self.D.given(label=null), self.D.net, label)
        D, step = self.methods[method](task, w)
        sigmas = recipe.grid(self.steps)
        x = SampleNoise(seed).start((len(label), *digits.SHAPE), sigmas[0])
        with autocast(x.device):
            return sample(D, x, sigmas, step), label

    def measure(self, method: str, w: float) -> Row:
        """One row: each number as [mean, standard error] over the seeds; Frechet distance and recall of all samples together."""
        kept, found = [], {"adherence": [], "diversity": [], "diversity_pixels": [], "clipped": []}
        for seed in range(self.seeds):
            raw, label = self.draw(method, w, seed)
            pictures = raw.clamp(-1, 1)
            kept.append(judge_digits.grey(pictures))
            found["adherence"].append(float((self.judge_(pictures).argmax(1) == label).double().mean()))
            found["diversity"].append(spread(self.judge_.features(pictures), label) / spread(self.real, self.labels))
            found["diversity_pixels"].append(spread(kept[-1], label) / spread(self.pixels, self.labels))
            found["clipped"].append(clipped(raw))
        rows = torch.cat(kept)
        precision, recall = metrics.precision_recall(self.pixels, rows)
        return _row(w, found, self.pca(self.pixels), self.pca(rows), precision, recall)


class MiniSD:
    """20 captions of new scenes, 8 pictures each, in 12 DDIM steps; three seeds. Diversity is within a caption."""

    seeds, prompts, each, steps, batch = 3, 20, 8, 12, 80
    scales: ClassVar = {
        "cfg": (1, 1.5, 2, 3, 5, 8),
        "interval": (3, 7),
        "rescale": (3, 7),
        "apg": (3, 7),
        "cfg++": (0.4, 0.8),
        "pag": (0.5, 1),
        "sag": (0.5, 1),
    }

    def __init__(self) -> None:
        self.model, self.reader = zoo.load("mini-sd", device="cpu"), zoo.load("scenes-reader", device="cpu")
        self.methods = methods(0.3, 5.0)

    def captions(self, seed: int) -> list[str]:
        """The captions of a seed, each `each` times."""
        told = SceneDataset(self.prompts, 9_200 + seed, objects=(1, 2)).captions(77)
        return [caption for caption in told for _ in range(self.each)]

    def draw(self, method: str, w: float, prompts: Sequence[str], seed: int, negative: Sequence[str] | None = None) -> Tensor:
        """Raw pictures (N, 3, 64, 64); `negative` takes the place of the empty prompt."""
        model, sigmas, pieces = self.model, self.model.sigmas(self.steps), []
        for first in range(0, len(prompts), self.batch):
            some = list(prompts[first : first + self.batch])
            other = [""] * len(some) if negative is None else list(negative[first : first + self.batch])
            task = Task(model.denoiser.given(**model.embed(some)), model.denoiser.given(**model.embed(other)), model.net)
            D, step = self.methods[method](task, w)
            x = model.start(SampleNoise(seed, first)(torch.empty(len(some), *model.shape)), sigmas[0])
            with autocast("cpu"), torch.no_grad():
                latents = model.finish(sample(D, x, sigmas, step), sigmas[-1])
                pieces.append(model.decode(latents, clamp=False).float())
        return torch.cat(pieces)

    def measure(self, method: str, w: float) -> Row:
        """One row, as of the digits; the real pictures are renders of 2,000 other scenes."""
        if not hasattr(self, "real"):
            of = SceneDataset(2_000, 9_104, objects=(1, 2))
            self.real = self.reader.features(of.pictures(torch.arange(len(of))))
        kept, found = [], {"adherence": [], "diversity": [], "clipped": []}
        for seed in range(self.seeds):
            prompts = self.captions(seed)
            raw = self.draw(method, w, prompts, seed)
            pictures = raw.clamp(-1, 1)
            kept.append(self.reader.features(pictures))
            found["adherence"].append(float(self.reader.obeys(pictures, [parse(p) for p in prompts])["all"].mean()))
            found["diversity"].append(spread(kept[-1], torch.arange(self.prompts).repeat_interleave(self.each)))
            found["clipped"].append(clipped(raw))
        rows = torch.cat(kept)
        precision, recall = metrics.precision_recall(self.real, rows)
        return _row(w, found, self.real, rows, precision, recall)


def _row(w: float, found: dict[str, list[float]], real: Tensor, fake: Tensor, precision: float, recall: float) -> Row:
    low, high = metrics.bootstrap(metrics.frechet_distance, real, fake, rounds=40, level=0.6827)
    row: Row = {"w": w}
    for name, values in found.items():
        each = torch.tensor(values, dtype=torch.float64)
        row[name] = [round(float(each.mean()), 5), round(float(each.std() / len(each) ** 0.5), 5)]
    return {
        **row,
        "frechet": [round((low + high) / 2, 5), round((high - low) / 2, 5)],
        "precision": round(precision, 4),
        "recall": round(recall, 4),
    }


# --- negative prompts -------------------------------------------------------------------------------------------------

NEGATED = (("ground", "grass", "on grass"), ("ground", "white", "on white ground"), ("light", "left", "lit from the left"))
"""Attribute, value, and the phrase that names it; the prompts leave ground and light open."""
NEGATIVE_W, NEGATIVE_N = 3.0, 1_000


def open_prompts(n: int, seed: int) -> list[str]:
    """Prompts that name an object and nothing of its scene: "a small red cube"."""
    from course_lib.worlds.scenes.attributes import COLOURS, SHAPES, SIZES

    of = SceneDataset(n, seed).scenes
    kinds = zip(*(getattr(of, name)[:, 0].tolist() for name in ("size", "colour", "shape")), strict=True)
    tables = [list(SIZES), list(COLOURS), list(SHAPES)]
    return ["a " + " ".join(table[i] for table, i in zip(tables, kind, strict=True)) for kind in kinds]


def measure_negative(world: MiniSD, w: float = NEGATIVE_W, n: int = NEGATIVE_N) -> list[Row]:
    """How often the negated value is read, with the empty prompt as the reference and with the negative one, at the same noise.

    `form` says what the negative prompt is. "phrase" is the phrase alone. "whole", for the first value only, is the prompt with
    the phrase: the object is then in both conditions and falls out of their difference, so that w no longer asks for it.
    """
    prompts = open_prompts(n, 9_300)
    wanted = [parse(prompt) for prompt in prompts]
    plain = world.draw("cfg", w, prompts, 9_300).clamp(-1, 1)
    rows = []
    for (attribute, value, phrase), form in [*((one, "phrase") for one in NEGATED), (NEGATED[0], "whole")]:
        negative = [phrase if form == "phrase" else f"{prompt} {phrase}" for prompt in prompts]
        less = world.draw("cfg", w, prompts, 9_300, negative).clamp(-1, 1)
        index = OF_SCENE[attribute].index(value)
        before, after = (int((getattr(world.reader.read(x), attribute) == index).sum()) for x in (plain, less))
        obeyed = [round(float(world.reader.obeys(x, wanted)["all"].mean()), 4) for x in (plain, less)]
        rows.append({
            "attribute": attribute, "value": value, "form": form, "phrase": phrase, "w": w, "samples": n,
            "read_without": before, "read_with": after, "ratio": round(after / max(before, 1), 4),
            "object_obeyed_without_and_with": obeyed,
        })  # fmt: skip
    return rows


# --- the file ---------------------------------------------------------------------------------------------------------

COMMAND = "python -m course_lib.zoo.judge_guidance"
WORLDS: dict[str, Callable[[], Any]] = {"digits": Digits, "mini-sd": MiniSD}


def read() -> dict[str, Any]:
    """Everything that is stored; ValueError where nothing is."""
    return stored.read(STORED, f"{COMMAND} digits")


def rows(world: str, method: str) -> list[Row]:
    """The rows of one method on "digits" or "mini-sd", by growing w; ValueError, with what there is, where there are none."""
    found = read().get(world, {})
    if not found.get(method):
        raise ValueError(f"{method!r} on {world!r} is not in {STORED.name}; expected one of {', '.join(found) or 'nothing yet'}")
    return sorted(found[method], key=lambda row: row["w"])


def negative() -> list[Row]:
    """The rows of `measure_negative`, as stored."""
    return read()["negative"]


def frechet_at(world: str, method: str, adherence: float) -> float:
    """The Frechet distance of a method where its adherence is the given one, between its rows; nan beyond them."""
    points = sorted((row["adherence"][0], row["frechet"][0]) for row in rows(world, method))
    for (a, f), (b, g) in pairwise(points):
        if a <= adherence <= b:
            return f if a == b else f + (g - f) * (adherence - a) / (b - a)
    return math.nan


def main(names: Sequence[str]) -> None:
    """Measure what is missing of the named parts: digits, mini-sd, negative; a part as NAME:METHOD is that method alone."""
    file = read() if STORED.exists() else {}
    for name in names:
        part, _, only = name.partition(":")
        if part == "negative":
            file["negative"] = measure_negative(MiniSD())
            stored.keep(STORED, file)
            continue
        if part not in WORLDS:
            raise ValueError(f"{part!r}; expected digits, mini-sd or negative")
        world = WORLDS[part]()
        for method, scales in world.scales.items():
            if only and method != only:
                continue
            done = file.setdefault(part, {}).setdefault(method, [])
            for w in scales:
                if all(row["w"] != w for row in done):
                    done.append(world.measure(method, w))
                    print(part, method, done[-1], flush=True)
                    stored.keep(STORED, file)


if __name__ == "__main__":
    main(sys.argv[1:])
