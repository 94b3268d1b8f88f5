"""What a control of `mini-sd` is worth: do pictures obey their maps and their prompts, and do they look like the world's?"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import metrics, zoo
from course_lib.nets.control import controlled
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.zoo.control_data import Mapped, mapped
from course_lib.zoo.judge_scenes import WORDING, generate, reconstruct
from course_lib.zoo.map_judge import MapJudge, errors, truth
from course_lib.zoo.pretrained import Pretrained

W, STEPS = 3.0, 20
"""Guidance and steps of DDIM of all pictures that are judged."""
SPLITS = {"validation": (100, 9_610), "test": (200, 9_611)}
"""Split -> number and seed of its scenes, one or two objects each; no training scene has these seeds."""
REAL = (1_000, 9_612)
AXES = 8
"""Principal axes of the reader's features in which sets are compared."""
MAPS = {"edge": ("lines", "scribbles", "canny"), "depth": ("near",), "seg": ("classes",)}
"""The maps that each control is trained and judged on, equally often, names of `control_data.LAYERS`."""


@functools.cache
def scenes(split: str) -> Mapped:
    """The scenes of a split, with their maps."""
    return mapped(*SPLITS[split])


@functools.cache
def judges() -> tuple[MapJudge, Any]:
    """The reader of maps and the reader of attributes."""
    return zoo.load("scenes-maps", device="cpu"), zoo.load("scenes-reader", device="cpu")


@functools.cache
def real() -> Tensor:
    """Features (N, d) of other renders of the world."""
    of = SceneDataset(*REAL, objects=(1, 2))
    return judges()[1].features(of.pictures(torch.arange(len(of))))


def prompts(split: str) -> list[str]:
    """A caption of each scene of a split."""
    return scenes(split).of.captions(WORDING)


def pictures_of(
    model: Pretrained,
    split: str,
    controls: Mapping[str, nn.Module] | None = None,
    maps: Mapping[str, str] | None = None,
    texts: list[str] | None = None,
    w: float = W,
    seed: int = 0,
    scales: Mapping[str, Tensor] | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One picture of each scene of a split, (N, 3, 64, 64): of its prompt, and of its maps where controls are given.

    controls   name -> control of `model`
    maps       the same names -> the layer of LAYERS that each is given
    texts      other prompts, one for each scene
    scales     'edge_scale' and the like, (1,) or (1, L), for all pictures
    reference  what the half of the guidance without text is given; the same as the other where it is None
    """
    of, rows = scenes(split), torch.arange(len(scenes(split)))
    condition = {name: of.condition(layer, rows) for name, layer in (maps or {}).items()}
    condition |= {name: scale.expand(len(of), *scale.shape[1:]) for name, scale in (scales or {}).items()}
    if controls:
        model = replace(model, denoiser=controlled(model.denoiser, **controls))
    return generate(model, prompts(split) if texts is None else texts, w, seed, STEPS, condition=condition, reference=reference)


def judged(pictures: Tensor, split: str) -> dict[str, float]:
    """What pictures of the scenes of a split are worth.

    edge, depth, seg  control errors, see `map_judge.errors`, against the scenes' exact maps
    obeyed            the share that shows everything that its prompt names
    frechet           distance to renders in the leading axes of their features
    """
    reader, attributes = judges()
    wanted = [parse(prompt) for prompt in prompts(split)]
    axes = metrics.pca_features(real(), AXES)
    return errors(reader.read(pictures), truth(scenes(split), torch.arange(len(pictures)))) | {
        "obeyed": round(float(attributes.obeys(pictures, wanted)["all"].mean()), 4),
        "frechet": round(metrics.frechet_distance(axes(attributes.features(pictures)), axes(real())), 4),
    }


def judge(kind: str, control: nn.Module) -> dict[str, Any]:
    """A control's numbers on the test scenes, beside `mini-sd` without it and reconstructed renders, which are the floor.

    With the scenes' prompts, where a map is given to both halves of the guidance or to the half with text alone; and without
    any prompt, where there is no guidance and the map alone says what there is.
    """
    model, split = zoo.load("mini-sd"), "test"
    of = scenes(split)
    blank = {"texts": [""] * len(of), "w": 1.0}
    rows: dict[str, Any] = {
        "reconstructed renders": judged(reconstruct(model, of.of.pictures(torch.arange(len(of)))), split),
        "without control": judged(pictures_of(model, split), split),
        "without control or prompt": judged(pictures_of(model, split, **blank), split),
    }
    for layer in MAPS[kind]:
        given = {"controls": {kind: control}, "maps": {kind: layer}}
        rows[f"given {layer}"] = judged(pictures_of(model, split, **given), split)
        rows[f"given {layer} beside the prompt alone"] = judged(pictures_of(model, split, **given, reference={}), split)
        rows[f"given {layer} without a prompt"] = judged(pictures_of(model, split, **given, **blank), split)
    return {"guidance": W, "steps": STEPS, "scenes": SPLITS[split][0], **rows}
