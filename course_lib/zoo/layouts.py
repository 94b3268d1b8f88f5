"""Layouts: `mini-sd` told by boxes what is where (GLIGEN; Li et al. 2023), trained, and whether its pictures obey.

`python -m course_lib.zoo.layouts` (or `... layouts floor`) measures what `layouts.json` has not yet, row by row, so that it goes
on where it was interrupted; `rows(part)` reads it.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import zoo
from course_lib.devices import SampleNoise, autocast
from course_lib.guidance import cfg
from course_lib.nets.gligen import Layout, grounded, layout_of, scheduled
from course_lib.sample import sample
from course_lib.training import Fit, denoising_loss, fit, write_atomically
from course_lib.worlds.scenes.attributes import COLOURS, SHAPES, SIZES
from course_lib.worlds.scenes.boxes import boxes, in_place
from course_lib.worlds.scenes.dataset import CHUNK, VERSION, SceneDataset, cache_folder
from course_lib.worlds.scenes.render import render
from course_lib.zoo import stored
from course_lib.zoo.control_data import Mapped, mapped, tokens
from course_lib.zoo.judge_controls import STEPS, W, judged, judges, prompts, scenes
from course_lib.zoo.judge_scenes import reconstruct
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.recipes.control import SCENES, SEED, attention_of, batches
from course_lib.zoo.stored import Row

STORED = Path(__file__).with_name("layouts.json")
COMMAND = "python -m course_lib.zoo.layouts"
OBJECTS = 2
PROMPTS_DROPPED, LAYOUTS_DROPPED = 0.5, 0.1
"""Shares of training prompts that are empty, so that the layout alone must say what is where, and of layouts, for guidance."""
TRAINING: dict[str, Any] = {"steps": 3_000, "lr": 1e-3}
BATCH, HIDDEN = 32, 256
SEEDS = (0, 1, 2)


def rows(part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)


# --- what is where ---------------------------------------------------------------------------------------------------


def layouts(of: SceneDataset) -> Tensor:
    """(N, OBJECTS, 6): box, 1 where the object is seen, and its kind, see `phrases`; kept in the cache."""
    words = f"{of.n} {of.seed} {of.objects} {of.split} {VERSION}"
    kept = cache_folder() / "controls" / f"boxes-{hashlib.sha256(words.encode()).hexdigest()[:16]}.pt"
    if not kept.exists():
        parts = [_laid(of, rows) for rows in torch.arange(len(of)).split(CHUNK)]
        write_atomically(kept, lambda path: torch.save(torch.cat(parts), path))
    return torch.load(kept, weights_only=True)


def _laid(of: SceneDataset, rows: Tensor) -> Tensor:
    some = of.scenes[rows]
    found, there = boxes(render(some, of.size, samples=1), OBJECTS)
    kind = (some.size * len(COLOURS) + some.colour) * len(SHAPES) + some.shape
    return torch.cat([found, there[..., None].float(), torch.where(there, kind, 0)[..., None].float()], -1)


@functools.cache
def phrases() -> Tensor:
    """f_text(e) of "a small red sphere" and all other kinds of object, (kinds, text): the text encoder's, at the end mark."""
    model = zoo.load("mini-sd", device="cpu")
    ids = tokens([f"a {size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES])
    encoder = model.components["text_encoder"]
    end = (ids == encoder.config.eos_token_id).int().argmax(1)
    with torch.no_grad():
        return encoder(ids)[0][torch.arange(len(ids)), end]


def condition(laid: Tensor) -> dict[str, Tensor]:
    """What `nets.gligen.grounded` takes, of layouts (B, OBJECTS, 6)."""
    return {
        "boxes": laid[..., :4],
        "masks": laid[..., 4],
        "phrases": phrases().to(laid.device)[laid[..., 5].long()],
    }


# --- training --------------------------------------------------------------------------------------------------------


class Laid(Mapped):
    """Scenes whose condition is their layout, in the place of a map."""

    def condition(self, kind: str, rows: Tensor) -> Tensor:
        """The layouts (B, OBJECTS, 6) of these scenes."""
        return self.maps[kind][rows]


@functools.cache
def training_scenes() -> Laid:
    """The scenes that controls are trained on, with their layouts."""
    of = mapped(SCENES, SEED)
    return Laid(of.of, of.mean, of.std, of.ids, {"layout": layouts(of.of)})


def loss_of(model: Pretrained) -> Any:
    """What `fit` minimises: the denoising loss of v of `model`, told a layout, LAYOUTS_DROPPED of them empty."""

    def loss(layout: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, ids: Tensor, laid: Tensor) -> Tensor:
        with attention_of(x0.device):
            with torch.no_grad():
                text = model.pipeline.text_encoder(ids)[0]
            told = condition(laid)
            told["masks"] = told["masks"] * (torch.rand(len(x0), 1, device=x0.device) >= LAYOUTS_DROPPED)
            D = grounded(model.denoiser, layout).given(encoder_hidden_states=text, **told)
            return denoising_loss(D, x0, sigma, eps, "v")

    return loss


def train(seed: int = 0, device: str | None = "cpu", **options: Any) -> Fit:
    """The layers of a layout for `mini-sd`, trained on SCENES scenes."""
    model = zoo.load("mini-sd", device)
    draw = batches(training_scenes(), ("layout",), model.schedule.sigma(torch.arange(1000)), BATCH, PROMPTS_DROPPED)
    net = layout_of(model.denoiser.net, HIDDEN, seed)
    return fit(net, draw, loss_of(model), device=device, seed=seed, **(TRAINING | options))


@functools.cache
def trained(seed: int = 0) -> tuple[Layout, float]:
    """The trained layers, and the seconds that they took; a run that is interrupted goes on from its checkpoint."""
    settings = (TRAINING, BATCH, HIDDEN, PROMPTS_DROPPED, LAYOUTS_DROPPED, SCENES, SEED, VERSION)
    words = f"{settings} {zoo.card('mini-sd')['sha256']}"
    folder = cache_folder() / "controls" / "trained"
    done = train(seed, checkpoint=folder / f"layout-{seed}-{hashlib.sha256(words.encode()).hexdigest()[:12]}.pt")
    return done.net.eval().requires_grad_(False), done.seconds


# --- judging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pictures_of(layout: Layout | None, split: str, tau: float = 1.0, text: bool = True, seed: int = 0, w: float = W) -> Tensor:
    """One picture of each scene of a split, (N, 3, 64, 64), told its layout in the first share tau of the steps.

    text  whether its prompt is told too; else the layout says alone what is where

    The half of the guidance without text is told an empty layout. Without `layout` pictures are of the prompts alone.
    """
    model, laid = zoo.load("mini-sd", device="cpu"), layouts(scenes(split).of)
    sigmas, found = model.sigmas(STEPS), []
    texts = prompts(split) if text else [""] * len(laid)
    for rows in torch.arange(len(texts)).split(50):
        pair = [model.denoiser.given(**model.embed(some)) for some in ([texts[i] for i in rows], [""] * len(rows))]
        D = cfg(*pair, w)
        if layout is not None:
            told = condition(laid[rows])
            blank = told | {"masks": torch.zeros_like(told["masks"])}
            laid_out = [grounded(half, layout).given(**what) for half, what in zip(pair, (told, blank), strict=True)]
            D = scheduled(cfg(*laid_out, w), D, sigmas, tau)
        x = model.start(SampleNoise(seed, int(rows[0]))(torch.empty(len(rows), *model.shape)), sigmas[0])
        with autocast(model.device):
            found.append(model.decode(model.finish(sample(D, x, sigmas), sigmas[-1])).float())
    return torch.cat(found)


def worth(pictures: Tensor, split: str) -> Row:
    """Mean IoU of the objects' boxes with those asked for, the share with an IoU of a half or more, and `judged`'s numbers."""
    laid = layouts(scenes(split).of)
    shape = torch.where(laid[..., 4] > 0, laid[..., 5].long() % len(SHAPES), -1)
    found = in_place(judges()[0].read(pictures).classes, shape, laid[..., :4])
    found = found[~found.isnan()]
    rates = judged(pictures, split)
    return {
        "iou": round(float(found.mean()), 4),
        "in_place": round(float((found >= 0.5).float().mean()), 4),
        "obeyed": rates["obeyed"],
        "frechet": rates["frechet"],
    }


def floor(of: str, split: str) -> Row:
    """What the judge finds in reconstructed renders of the scenes themselves, the best there could be."""
    model = zoo.load("mini-sd", device="cpu")
    data = scenes(split).of
    return {"of": of, "split": split, **worth(reconstruct(model, data.pictures(torch.arange(len(data)))), split)}


def without(seed: int, text: bool, split: str) -> Row:
    """`mini-sd` with the prompts alone, or with nothing."""
    return {"seed": seed, "text": text, "split": split, **worth(pictures_of(None, split, text=text, seed=seed), split)}


def measure(seed: int, tau: float, text: bool, split: str) -> Row:
    """The trained layout, told in the first share tau of the steps; `seed` is that of the noise from which pictures start."""
    layout, seconds = trained()
    found = worth(pictures_of(layout, split, tau, text, seed), split)
    return {"seed": seed, "tau": tau, "text": text, "split": split, "seconds": round(seconds), **found}


PARTS: stored.Parts = {
    "floor": (floor, [{"of": "reconstructed renders", "split": "test"}]),
    "without": (without, [{"seed": seed, "text": text, "split": "test"} for seed in SEEDS for text in (True, False)]),
    "layouts": (
        measure,
        [
            {"seed": seed, "tau": tau, "text": text, "split": "test"}
            for seed in SEEDS
            for tau, text in ((1.0, True), (0.5, True), (0.2, True), (1.0, False))
        ],
    ),
}


def main(parts: Sequence[str]) -> None:
    """Measure what is missing of the named parts, or of all; ValueError for a part that there is not."""
    stored.run(STORED, COMMAND, PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
