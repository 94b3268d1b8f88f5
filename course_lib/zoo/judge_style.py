"""Whether a model of the scene world draws cut-outs, and still what it is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib import metrics, zoo
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.maps import STYLES
from course_lib.zoo.judge_scenes import WORDING, generate, reconstruct
from course_lib.zoo.pretrained import Pretrained

SCENES = (200, 9_620)
"""Number and seed of the scenes whose captions are drawn."""
W, STEPS = 3.0, 20
STYLE = "cut-outs"
"""The style of `mini-style`, a name of `maps.STYLES`."""
SHEET = 0.85
"""Luminance above which the ground is a white sheet without shadows, see `sheet`."""
DARKEST = 0.05
AXES = 8
ASIDE = ("ground", "light", "all")
"""What the style takes from the reader: there is one ground, and no side from which light comes."""


def sheet(pictures: Tensor, ground: Tensor) -> Tensor:
    """The luminance in [0, 1] that all but the darkest DARKEST of the ground exceeds, (N,); 1 where there is none.

    ground (N, H, W) bool says where it is. Shadows are darker, and so are grass, sand and tiles.
    """
    grey = (pictures.mean(1) + 1) / 2
    each = [one[here].quantile(DARKEST) if bool(here.any()) else one.new_ones(()) for one, here in zip(grey, ground, strict=True)]
    return torch.stack(each)


def styled(pictures: Tensor) -> Tensor:
    """Whether each picture is in the style, (N,) bool: ground is what `scenes-maps` takes for no object."""
    return sheet(pictures, zoo.load("scenes-maps", device="cpu").read(pictures).classes <= 1) > SHEET


def judge(model: Pretrained) -> dict[str, Any]:
    """Of `model`, `mini-sd`, renders in the style, and the VAE's reconstructions of these.

    styled   the share that is in the style
    obeyed   the share that shows what its prompt names, attribute by attribute and all of these together
    frechet  distance to renders in the style, in the leading axes of the reader's features
    """
    reader = zoo.load("scenes-reader", device="cpu")
    of = SceneDataset(*SCENES, objects=(1, 2))
    prompts, true = of.captions(WORDING), STYLES[STYLE](of.scenes, of.size)
    real = reader.features(STYLES[STYLE](SceneDataset(1_000, 9_621, objects=(1, 2)).scenes, of.size))
    axes, wanted = metrics.pca_features(real, AXES), [parse(prompt) for prompt in prompts]
    base, found = zoo.load("mini-sd"), {}
    for name, pictures in {
        "mini-style": generate(model, prompts, W, 0, STEPS),
        "mini-sd": generate(base, prompts, W, 0, STEPS),
        "renders in the style": true,
        "reconstructed renders": reconstruct(base, true),
    }.items():
        obeyed = {key: value for key, value in reader.obeys(pictures, wanted).items() if key not in ASIDE}
        named = torch.stack(list(obeyed.values()))
        every = torch.where(named.isnan(), 1.0, named).amin(0)
        rates = {key: round(float(value.nanmean()), 4) for key, value in obeyed.items() if not bool(value.isnan().all())}
        found[name] = {
            "styled": round(float(styled(pictures).double().mean()), 4),
            "obeyed": {**rates, "all": round(float(every.mean()), 4)},
            "frechet": round(metrics.frechet_distance(axes(reader.features(pictures)), axes(real)), 4),
        }
    return {"guidance": W, "steps": STEPS, **found}
