"""Figures of spatial control: how a ControlNet is wired, and how its errors run over a setting and over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from course_lib.study import style
from course_lib.study.pictures import canvas

Row = Mapping[str, Any]
Points = tuple[Sequence[float], Sequence[float]]
LEVELS = 21
"""Values of a channel that a small PNG keeps: enough for the eye."""
WIDTH, HEIGHT, UNIT = 900, 390, 66  # of the diagram and of its unit of length, in screen pixels
PARTS = {"1": 3.6, "2": 4.9, "3": 6.2, "m": 7.5, "3'": 9.5, "2'": 10.8, "1'": 12.1}
"""Centre of each level of the U-Net in the diagram; a dash marks the decoder's."""
ROLES = ("model", "warn", "data", "guide", "noise")
"""Colours of curves, in their order."""
LOCKED, COPIED, HALF = 3.75, 1.85, 0.42  # heights of the two rows, and half the side of a level


def shown(c: Tensor) -> Tensor:
    """Condition maps (N, C, H, W) in [0, 1] as pictures in [-1, 1]."""
    return 2 * c - 1


def few(pictures: Tensor, levels: int = LEVELS) -> Tensor:
    """Pictures, clipped to [-1, 1], in `levels` values a channel, which makes a notebook small."""
    half = (levels - 1) / 2
    return (pictures.clamp(-1, 1) * half).round() / half


def architecture() -> Figure:
    """A U-Net, locked, above the copy of its encoder, whose features join the decoder's through zero convolutions."""
    figure = canvas(WIDTH, HEIGHT)
    with style.context():
        figure.set_layout_engine("none")
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, WIDTH / UNIT), ylim=(0, HEIGHT / UNIT))
        ax.set_axis_off()
        for name, at in PARTS.items():
            _level(ax, at, LOCKED, "muted", "#EBEBEB", name.replace("m", "middle"))
            if name in "123m":
                _level(ax, at, COPIED, "model", "#DDF3EC", name.replace("m", "middle"))
        enters, joins = 2.5, (PARTS["m"] + PARTS["3'"]) / 2

        _words(ax, enters, LOCKED, "$x_t$", 18)
        _arrow(ax, (enters + 0.25, LOCKED), (PARTS["1"] - HALF, LOCKED))
        _arrow(ax, (enters, LOCKED - 0.25), (enters, COPIED + 0.16))
        for before, after in zip("123", "23m", strict=True):
            for row, colour in ((LOCKED, "muted"), (COPIED, "model")):
                _arrow(ax, (PARTS[before] + HALF, row), (PARTS[after] - HALF, row), colour)
        _arrow(ax, (PARTS["m"] + HALF, LOCKED), (joins - 0.14, LOCKED))
        _arrow(ax, (joins + 0.14, LOCKED), (PARTS["3'"] - HALF, LOCKED))
        for before, after in (("3'", "2'"), ("2'", "1'")):
            _arrow(ax, (PARTS[before] + HALF, LOCKED), (PARTS[after] - HALF, LOCKED))
        _arrow(ax, (PARTS["1'"] + HALF, LOCKED), (13.05, LOCKED))
        _words(ax, 13.25, LOCKED, "$y_c$", 18)

        for k, name in enumerate("321"):  # skips above; below them what is added to each
            here, there = PARTS[name], PARTS[name + "'"]
            up, down = LOCKED + 0.75 + 0.3 * k, COPIED - 0.75 - 0.3 * k
            _path(ax, [(here, LOCKED + HALF), (here, up), (there, up), (there, LOCKED + HALF)])
            _path(ax, [(here, COPIED - HALF), (here, down), (there, down), (there, LOCKED - HALF)], "model")
            _zero(ax, there, 2.7)
        _path(ax, [(PARTS["m"] + HALF, COPIED), (joins, COPIED), (joins, LOCKED - 0.14)], "model")
        _zero(ax, joins, 2.7)

        _words(ax, 0.35, COPIED, "$c$", 18, "guide")
        _level(ax, 1.1, COPIED, "guide", "#F7E6EF", "E")
        _arrow(ax, (0.5, COPIED), (1.1 - HALF, COPIED), "guide")
        _arrow(ax, (1.1 + HALF, COPIED), (enters - 0.14, COPIED), "guide")
        _zero(ax, 1.93, COPIED)
        _arrow(ax, (enters + 0.14, COPIED), (PARTS["1"] - HALF, COPIED), "model")
        for x, y in ((joins, LOCKED), (enters, COPIED)):
            ax.plot(x, y, "o", ms=15, mfc="white", mec=style.COLOURS["exact"], mew=1.5)
            _words(ax, x, y, "+", 14)
        _words(ax, 5.55, 5.6, "encoder and middle, locked", 13, "muted")
        _words(ax, 10.8, 5.6, "decoder, locked", 13, "muted")
        _words(ax, 5.55, COPIED + 0.75, "their copy, trained", 13, "model")
    return figure


def _words(ax: Axes, x: float, y: float, words: str, size: float, colour: str = "exact") -> None:
    ax.text(x, y, words, ha="center", va="center", fontsize=size, color=style.COLOURS[colour])


def _level(ax: Axes, x: float, y: float, colour: str, face: str, words: str) -> None:
    corner, look = (x - HALF + 0.06, y - HALF + 0.06), "round,pad=0.06,rounding_size=0.1"
    side = 2 * HALF - 0.12
    ax.add_patch(FancyBboxPatch(corner, side, side, boxstyle=look, fc=face, ec=style.COLOURS[colour], lw=1.8, zorder=3))
    ax.text(x, y, words, ha="center", va="center", fontsize=13 if len(words) < 3 else 11.5, zorder=4)


def _zero(ax: Axes, x: float, y: float) -> None:
    """A zero convolution on a line."""
    ax.plot(x, y, "s", ms=17, color=style.COLOURS["noise"], zorder=5)
    ax.text(x, y, "0", ha="center", va="center_baseline", fontsize=13, fontweight="bold", zorder=6)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "muted") -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0, "lw": 1.8}
    ax.add_patch(FancyArrowPatch(start, end, color=style.COLOURS[colour], zorder=2, **look))


def _path(ax: Axes, corners: Sequence[tuple[float, float]], colour: str = "muted") -> None:
    """A line around corners, with a head at its end."""
    ax.plot(*zip(*corners[:-1], strict=True), color=style.COLOURS[colour], lw=1.8, zorder=1, solid_capstyle="butt")
    _arrow(ax, corners[-2], corners[-1], colour)


def how_much_and_when(by_scale: Sequence[Row], by_part: Sequence[Row]) -> Figure:
    """The error of the edges and the share that obeys over the scale, and the error over the share of the steps.

    by_scale  rows of `zoo.controls_used.rows("scale")`; by_part  of `"interval"`
    """
    at = [row["scale"] for row in by_scale]
    ends = [next(row["edge"] for row in by_scale if row["scale"] == scale) for scale in (0, 1)]
    figure = canvas(WIDTH, 290)
    with style.context():
        axes = figure.subplots(1, 3)
        for ax, key, name in zip(axes, ("edge", "obeyed"), ("error of the edges", "obeyed"), strict=False):
            _curves(ax, {name: (at, [row[key] for row in by_scale])}, "scale", name)
        parts = {}
        for part in ("first", "last"):
            rows = [row for row in by_part if row["part"] == part]
            parts[f"the {part}"] = [0, *(row["share"] for row in rows), 1], [ends[0], *(row["edge"] for row in rows), ends[1]]
        _curves(axes[2], parts, "share of the steps", "error of the edges")
        axes[2].legend()
    return figure


def learning(curves: Mapping[str, Points], untold: float, floor: float) -> Figure:
    """The error of the edges of each method over the steps of its training, between two levels.

    untold  that of the text alone, dashed; floor  that of renders after the VAE, dotted
    """
    figure = canvas(WIDTH, 330)
    with style.context():
        ax = figure.subplots()
        _curves(ax, curves, "step of training", "error of the edges")
        for level, dashes, colour in ((untold, "--", "muted"), (floor, ":", "exact")):
            ax.axhline(level, color=style.COLOURS[colour], ls=dashes, lw=1.5)
        ax.set_ylim(bottom=0)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def told_by_features(rows: Sequence[Row]) -> Figure:
    """What the features of the network leave open of a drawing, over the noise level: `zoo.controls_guided.rows("predictor")`."""
    names = {"the drawing's pixels": "lines_left", "its latents, as published": "latents_left"}
    figure = canvas(600, 270)
    with style.context():
        ax = figure.subplots()
        at = [row["sigma"] for row in rows]
        _curves(ax, {name: (at, [row[key] for row in rows]) for name, key in names.items()}, "noise level σ", "share left open")
        ax.set(xscale="log", ylim=(0, None))
        ax.legend()
    return figure


def _curves(ax: Axes, curves: Mapping[str, Points], xlabel: str, ylabel: str) -> None:
    """Curves, told apart by colour and by mark."""
    for (name, (at, values)), mark, colour in zip(curves.items(), "o^sDv", ROLES, strict=False):
        ax.plot(at, values, mark + "-", ms=6, lw=2, color=style.COLOURS[colour], label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
