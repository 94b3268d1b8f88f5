"""What trained controls of `mini-sd` do in use: alone, together, against each other, on another base, and on what hands drew.

`python -m course_lib.zoo.controls_used` (or `... scale guess`) measures what `controls_used.json` has not yet, row by row;
`rows(part)` reads it. Scenes, prompts and judges are those of `judge_controls`: settings are compared on its validation
scenes, and what is claimed is measured on its test scenes with several seeds of noise.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_lib import zoo
from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import one_thread
from course_lib.guidance.controls import sigma_interval, within
from course_lib.nets.control import ControlNet, controlled, guess, resolution_weights
from course_lib.types import Denoiser
from course_lib.worlds import hand
from course_lib.worlds.scenes.attributes import COLOURS, SHAPES
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.labels import labels
from course_lib.worlds.scenes.maps import STYLES, as_map, canny
from course_lib.zoo import stored
from course_lib.zoo.control_data import LAYERS
from course_lib.zoo.judge_controls import MAPS, STEPS, W, judged, judges, pictures_of, prompts, scenes
from course_lib.zoo.judge_scenes import generate, reconstruct
from course_lib.zoo.judge_style import ASIDE, STYLE, styled
from course_lib.zoo.map_judge import edge_f1, errors, nearness_rmse, truth
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.readers import correct
from course_lib.zoo.stored import Row

STORED = Path(__file__).with_name("controls_used.json")
COMMAND = "python -m course_lib.zoo.controls_used"
SEEDS = (0, 1, 2)
TUNING = 100
"""The seed of noise of what is measured on the validation scenes."""
KIND = {layer: kind for kind, given in MAPS.items() for layer in given}
"""The control that takes each layer."""
EXACT = {"edge": "lines", "depth": "near", "seg": "classes"}
"""The layer that a control is given where nothing else is said."""
BALANCES = ((1.0, 1.0), (0.75, 0.75), (0.5, 0.5), (1.0, 0.5), (0.5, 1.0))
"""Scales of edge and depth together."""
NONE: dict[str, Tensor] = {}
"""What a half of the guidance is given that has no control."""
GUIDANCES = (1.0, 3.0, 6.0)


def rows(part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)


@functools.cache
def model(name: str = "mini-sd") -> Pretrained:
    """A text-to-image model: `mini-sd`, or `mini-style`."""
    return zoo.load(name, device="cpu")


@functools.cache
def control(kind: str) -> ControlNet:
    """`mini-control-edge`, `-depth` or `-seg`."""
    return zoo.load(f"mini-control-{kind}", device="cpu")


def given(layers: Sequence[str], split: str, base: str = "mini-sd", **options: Any) -> Tensor:
    """Pictures of the scenes of a split under the controls of these layers, see `judge_controls.pictures_of`.

    Unless `reference` says otherwise the maps are given to the half of the guidance with text alone, which obeys them better.
    """
    options = {"reference": NONE} | options
    maps = {KIND[layer]: layer for layer in layers}
    with one_thread():
        return pictures_of(model(base), split, {kind: control(kind) for kind in maps}, maps, **options)


# --- alone, together, against each other, on another base ----------------------------------------------------------------


def alone(layer: str, seed: int) -> Row:
    """One control, or none: 'nothing' is the prompt alone, and 'renders' what the VAE makes of the scenes themselves."""
    if layer == "renders":
        of = scenes("test").of
        pictures = reconstruct(model(), of.pictures(torch.arange(len(of))))
    else:
        pictures = given([] if layer == "nothing" else [layer], "test", seed=seed)
    return {"layer": layer, "seed": seed, **judged(pictures, "test")}


def _scales(**scales: float) -> dict[str, Tensor]:
    return {f"{kind}_scale": torch.tensor([scale]) for kind, scale in scales.items()}


def balance(edge: float, depth: float) -> Row:
    """Edges and depth together, on the validation scenes, each at a scale."""
    pictures = given(["lines", "near"], "validation", seed=TUNING, scales=_scales(edge=edge, depth=depth))
    return {"edge scale": edge, "depth scale": depth, **judged(pictures, "validation")}


def balanced(**key: float) -> Row:
    """`balance` of the scales that a row is known by."""
    return balance(key["edge scale"], key["depth scale"])


def together(controls: str, seed: int) -> Row:
    """Several controls at once, each at scale 1: their residuals are added."""
    pictures = given([EXACT[kind] for kind in controls.split("+")], "test", seed=seed)
    return {"controls": controls, "seed": seed, **judged(pictures, "test")}


def against(text: str, edge: float, seed: int) -> Row:
    """The edges of one scene with the depth of the next, and the prompt of neither, of one, or of the other.

    edge_of_edge, edge_of_depth    the edge error against the scene whose edges, whose depth was given
    depth_of_edge, depth_of_depth  the depth error against the same two
    edges_win                      the share of pictures whose edges are nearer to the first scene's
    depth_wins                     the share whose depth is nearer to the second's
    """
    of, split = scenes("test"), "test"
    here = torch.arange(len(of))
    there = here.roll(1)
    said = {"none": [""] * len(of), "edge's": prompts(split), "depth's": [prompts(split)[i] for i in there]}[text]
    condition = {"edge": of.condition("lines", here), "depth": of.condition("near", there)}
    condition |= {"edge_scale": torch.full((len(of),), edge)}
    D = controlled(model().denoiser, edge=control("edge"), depth=control("depth"))
    with one_thread():
        found = judges()[0].read(
            generate(replace(model(), denoiser=D), said, W, seed, STEPS, condition=condition, reference=NONE)
        )
    asked = [truth(of, which) for which in (here, there)]
    edge_error = torch.stack([1 - edge_f1(found.lines, one.lines) for one in asked])
    depth_error = torch.stack([nearness_rmse(found.nearness, one.nearness) for one in asked])
    numbers = {
        "edge_of_edge": edge_error[0],
        "edge_of_depth": edge_error[1],
        "depth_of_edge": depth_error[0],
        "depth_of_depth": depth_error[1],
        "edges_win": edge_error[0] < edge_error[1],
        "depth_wins": depth_error[1] < depth_error[0],
    }
    return {"text": text, "edge": edge, "seed": seed, **_means(numbers)}


def _means(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: round(float(values.double().mean()), 4) for name, values in numbers.items()}


def transfer(layer: str, seed: int) -> Row:
    """A control that was trained on `mini-sd`, on `mini-style`; 'renders' are of the scenes in the style, through the VAE.

    styled  the share of pictures in the style
    obeyed  the share that shows all that its prompt names but the ground and the light, which the style sets
    """
    of = scenes("test")
    if layer == "renders":
        pictures = reconstruct(model(), STYLES[STYLE](of.of.scenes, of.of.size))
    else:
        pictures = given([] if layer == "nothing" else [layer], "test", base="mini-style", seed=seed)
    reader, attributes = judges()
    read = attributes.obeys(pictures, [parse(prompt) for prompt in prompts("test")])
    named = torch.stack([value for name, value in read.items() if name not in ASIDE])
    shown = {"obeyed": torch.where(named.isnan(), 1.0, named).amin(0), "styled": styled(pictures)}
    found = errors(reader.read(pictures), truth(of, torch.arange(len(of))))
    return {"layer": layer, "seed": seed, **found, **_means(shown)}


# --- without a prompt, and in the halves of the guidance -----------------------------------------------------------------


def finds(pictures: Tensor, split: str) -> dict[str, float]:
    """How often each attribute of the scenes is in pictures that were told none of it, by the reader."""
    right = correct(judges()[1].read(pictures), labels(scenes(split).of.scenes))
    return _means({name: values for name, values in right.items() if len(values)})


def unprompted(mode: str, layer: str, w: float, seed: int) -> Row:
    """The control alone, without a prompt.

    mode  'nothing' is no control; 'both halves' of the guidance have it, and w is then without effect; 'one half' has it, at
          scale 1; 'guess' is one half at the scales of `nets.control.guess`
    """
    kind, n = KIND[layer], len(scenes("test"))
    scales = {f"{kind}_scale": guess(len(control(kind).zeros))} if mode == "guess" else None
    reference = NONE if mode in ("one half", "guess") else None
    layers = [] if mode == "nothing" else [layer]
    pictures = given(layers, "test", texts=[""] * n, w=w, seed=seed, scales=scales, reference=reference)
    return {"mode": mode, "layer": layer, "w": w, "seed": seed, **judged(pictures, "test"), "finds": finds(pictures, "test")}


def sides(of: ControlNet) -> list[int]:
    """The side of each feature that a control adds to, for latents of `mini-sd`."""
    side, text = model().shape[-1], model().embed([""])
    with torch.no_grad():
        added = of(torch.zeros(1, *model().shape), torch.zeros(1), torch.zeros(1, of.channels, 8 * side, 8 * side), **text)
    return [residual.shape[-1] for residual in added]


def halves(halves: str, weights: str, w: float) -> Row:
    """The control of edges in both halves of the guidance or in the one with the prompt; even weights, or by resolution."""
    scales = {"edge_scale": resolution_weights(sides(control("edge")))} if weights == "resolution" else None
    pictures = given(
        ["lines"], "validation", w=w, seed=TUNING, scales=scales, reference=None if halves == "both" else NONE
    )  # fmt: skip
    return {"halves": halves, "weights": weights, "w": w, **judged(pictures, "validation")}


# --- how much of it, and when --------------------------------------------------------------------------------------------


def scaled(kind: str, scale: float) -> Row:
    """A control at one scale."""
    pictures = given([EXACT[kind]], "validation", seed=TUNING, scales=_scales(**{kind: scale}))
    return {"kind": kind, "scale": scale, **judged(pictures, "validation")}


@dataclass(frozen=True)
class Between:
    """What `generate` takes for a denoiser: D with its control of edges where low < sigma <= high, elsewhere without."""

    D: NetworkDenoiser
    low: float
    high: float

    def given(self, edge: Tensor | None = None, **condition: Any) -> Denoiser:
        if edge is None:
            return self.D.given(**condition)
        return within(self.D.given(edge=edge, **condition), self.D.given(**condition), self.low, self.high)


def part_of(part: str, share: float) -> Row:
    """The control of edges in the first or the last part of the steps alone."""
    of, start = scenes("validation"), 0.0 if part == "first" else 1 - share
    D = Between(controlled(model().denoiser, edge=control("edge")), *sigma_interval(model().sigmas(STEPS), start, start + share))
    told = {"edge": of.condition("lines", torch.arange(len(of)))}
    with one_thread():
        pictures = generate(replace(model(), denoiser=D), prompts("validation"), W, TUNING, STEPS, condition=told, reference=NONE)
    return {"part": part, "share": share, **judged(pictures, "validation")}


# --- what the world did not render ---------------------------------------------------------------------------------------


def words_of(sketch: hand.Sketch, i: int) -> str:
    """A prompt for drawing i: its things in colours that they were seen in, none of the combinations that are held out."""
    said = []
    for k, (size, shape) in enumerate(sketch.things):
        colours = [colour for c, colour in enumerate(COLOURS) if (SHAPES.index(shape) + c) % len(COLOURS)]
        said.append(f"a {size} {colours[(3 * i + 2 * k) % len(colours)]} {shape}")
    return " left of ".join(said)


MODES = {"nothing": (False, False), "both halves": (True, True), "one half": (True, False), "guess": (True, False)}
"""Whether the halves of the guidance with and without text are given the control."""


def edged(maps: Tensor, texts: list[str], mode: str, seed: int) -> Tensor:
    """Pictures of prompts and of line drawings (N, 1, H, W), which the halves of the guidance are given as `mode` says."""
    told: dict[str, Tensor] = {"edge": as_map(maps)}
    if mode == "guess":
        told["edge_scale"] = guess(len(control("edge").zeros)).expand(len(maps), -1)
    made = replace(model(), denoiser=controlled(model().denoiser, edge=control("edge")))
    condition, reference = (told if there else NONE for there in MODES[mode])
    w = W if any(texts) or condition is not reference else 1.0  # of equal halves guidance makes nothing
    with one_thread():
        return generate(made, texts, w, seed, STEPS, condition=condition, reference=reference)


def by_hand(mode: str, text: str, seed: int) -> Row:
    """The drawings of `worlds.hand` with their words, or with none.

    edge    1 - F1 of the edges that `scenes-maps` reads against the ink, within one pixel
    shape   the share of drawings whose things the reader sees, in any colour; `obeyed` is all that the prompt names
    """
    drawn = hand.sketches()
    ink, words = torch.stack([hand.ink(one) for one in drawn]), [words_of(one, i) for i, one in enumerate(drawn)]
    pictures = edged(ink, words if text == "named" else [""] * len(words), mode, seed)
    obeyed = judges()[1].obeys(pictures, [parse(one) for one in words])
    numbers = {"edge": 1 - edge_f1(judges()[0].read(pictures).lines, ink > 0.5), "count": obeyed["count"]}
    return {"mode": mode, "text": text, "seed": seed, **_means(numbers | {"shape": obeyed["shape"], "obeyed": obeyed["all"]})}


def of_photos(mode: str, text: str, seed: int) -> Row:
    """Canny's lines of the photographs of `worlds.hand`, without a prompt or with those of scenes that they do not show.

    edge   1 - F1 of the edges that `scenes-maps` reads against the lines, within one pixel
    canny  the same of the lines that Canny's detector finds in the pictures
    """
    lines = canny(hand.photos())
    pictures = edged(lines, prompts("test")[: len(lines)] if text == "scenes" else [""] * len(lines), mode, seed)
    found = {"edge": judges()[0].read(pictures).lines, "canny": canny(pictures) > 0}
    return {
        "mode": mode,
        "text": text,
        "seed": seed,
        **_means({name: 1 - edge_f1(one, lines > 0) for name, one in found.items()}),
    }


PARTS: stored.Parts = {
    "alone": (
        alone,
        [{"layer": "renders", "seed": 0}] + [{"layer": layer, "seed": seed} for seed in SEEDS for layer in ("nothing", *LAYERS)],
    ),
    "balance": (balanced, [{"edge scale": edge, "depth scale": depth} for edge, depth in BALANCES]),
    "together": (together, [{"controls": names, "seed": seed} for seed in SEEDS for names in ("edge+depth", "edge+seg")]),
    "against": (
        against,
        [{"text": text, "edge": 1.0, "seed": 0} for text in ("none", "edge's", "depth's")]
        + [{"text": "none", "edge": edge, "seed": 0} for edge in (0.5, 0.75)],
    ),
    "transfer": (
        transfer,
        [{"layer": "renders", "seed": 0}]
        + [{"layer": layer, "seed": seed} for seed in SEEDS for layer in ("nothing", *EXACT.values())],
    ),
    "unprompted": (
        unprompted,
        [{"mode": mode, "layer": "lines", "w": 1.0, "seed": seed} for seed in SEEDS for mode in ("nothing", "both halves")]
        + [{"mode": mode, "layer": "lines", "w": W, "seed": seed} for seed in SEEDS for mode in ("one half", "guess")]
        + [{"mode": mode, "layer": "lines", "w": w, "seed": 0} for w in (1.5, 6.0) for mode in ("one half", "guess")],
    ),
    "halves": (
        halves,
        [
            {"halves": which, "weights": weights, "w": w}
            for w in GUIDANCES
            for which, weights in (("both", "even"), ("one", "even"), ("one", "resolution"))
        ],
    ),
    "scale": (scaled, [{"kind": "edge", "scale": scale / 4} for scale in range(7)]),
    "interval": (part_of, [{"part": part, "share": share} for share in (0.25, 0.5, 0.75) for part in ("first", "last")]),
    "scribbles": (
        by_hand,
        [
            {"mode": mode, "text": text, "seed": seed}
            for seed in SEEDS
            for text in ("named", "none")
            for mode in ("nothing", "both halves", "one half")
        ],
    ),
    "photos": (
        of_photos,
        [{"mode": mode, "text": text, "seed": seed} for seed in SEEDS for text in ("none", "scenes") for mode in MODES],
    ),
}


def main(parts: Sequence[str]) -> None:
    """Measure what is missing of the named parts, or of all; ValueError for a part that there is not."""
    stored.run(STORED, COMMAND, PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
