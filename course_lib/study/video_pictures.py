"""Figures of video diffusion: what a layer sees of a clip, measures over a setting, and frames drawn between known ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

from course_lib.study import style
from course_lib.study.pictures import canvas

Row = Mapping[str, Any]
Points = tuple[Sequence[float], Sequence[float]]
ROLES = ("model", "data", "warn", "guide", "noise", "other")
"""Colours of curves, in their order."""
MARKS = "os^Dv*"
BLANK = 0.55
"""The grey of a frame that is not known."""
WIDTH, HEIGHT, UNIT = 900, 300, 60  # of the diagram and of its unit of length, in screen pixels
FRAMES, CELLS, SIDE, PITCH = 4, 3, 0.96, 1.16  # of a clip in the diagram


def hidden(clip: Tensor, known: Tensor) -> Tensor:
    """A clip (T, C, H, W) whose frames are grey where known (T,) is False."""
    return torch.where(known.view(-1, 1, 1, 1), clip, BLANK)


def over_time(clip: Tensor, row: int, high: int = 12) -> Tensor:
    """One row of pixels of a clip (T, C, H, W) over time, downwards, each frame `high` pixels high: (C, T high, W)."""
    return clip[:, :, row].movedim(0, 1).repeat_interleave(high, 1)


# --- curves and points -------------------------------------------------------------------------------------------------------


def lines(
    curves: Mapping[str, Points],
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float] | None = None,
    width: int = 640,
    **axes: Any,
) -> Figure:
    """Curves name -> (x, y), told apart by colour and by mark, and dashed levels name -> y; `axes` are for matplotlib's `set`."""
    figure = canvas(width, 290)
    with style.context():
        ax = figure.subplots()
        _draw(ax, curves, xlabel, ylabel, levels or {}, **axes)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def settings(
    rows: Sequence[Row], key: str, xlabel: str, panels: Mapping[str, str], levels: Mapping[str, Row], log: bool = False
) -> Figure:
    """Measures over a setting, a panel for each of `panels`, name in a row -> label, and dashed what `levels` say of them.

    rows  such as `zoo.videos.rows("mixing")`, with the setting under `key`; `log` spaces settings evenly, as ranks
    """
    ordered = sorted(rows, key=lambda row: row[key])
    values = [row[key] for row in ordered]
    at = list(range(len(values))) if log else values
    figure = canvas(WIDTH, 270)
    with style.context():
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (name, label) in zip(axes, panels.items(), strict=True):
            marks = {who: row[name] for who, row in levels.items() if name in row}
            _draw(ax, {"": (at, [row[name] for row in ordered])}, xlabel, label, marks)
            ax.set_ylim(bottom=0)
            if log:
                ax.set_xticks(at, [f"{value:g}" for value in values])
    return figure


def against(points: Mapping[str, tuple[float, float]], xlabel: str, ylabel: str, best: tuple[float, float]) -> Figure:
    """Kinds of clips as points with their names beside them; a star stands where true clips are."""
    figure = canvas(640, 320)
    with style.context():
        ax = figure.subplots()
        for (name, (x, y)), colour in zip(points.items(), ROLES[1:] + ROLES[:1], strict=False):
            ax.plot(x, y, "o", ms=10, color=style.COLOURS[colour])
            ax.annotate(name, (x, y), xytext=(9, 6), textcoords="offset points", fontsize=12)
        ax.plot(*best, "*", ms=20, color=style.COLOURS["exact"])
        ax.annotate("true", best, xytext=(9, 8), textcoords="offset points", fontsize=12)
        ax.margins(0.16)
        ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(-0.06, 1.1))
    return figure


def bands(exact: tuple[Tensor, Tensor], drawn: Mapping[str, tuple[Tensor, Tensor]], known: Tensor, clip: Tensor) -> Figure:
    """Mean and deviation (T,) of each frame as they are exactly, a band, and as methods draw them, bars; known frames as squares.

    known (T,) bool; clip (T,), read where known.
    """
    figure = canvas(700, 320)
    with style.context():
        ax = figure.subplots()
        free = (~known).nonzero().flatten()
        mean, spread = (part[free] for part in exact)
        ax.fill_between(free, mean - spread, mean + spread, color=style.COLOURS["exact"], alpha=0.18, label="exact")
        ax.plot(free, mean, color=style.COLOURS["exact"])
        for k, ((name, (mean, spread)), colour) in enumerate(zip(drawn.items(), ("warn", "model", "guide"), strict=False)):
            x = free + 0.14 * (k - (len(drawn) - 1) / 2)
            ax.errorbar(x, mean[free], spread[free], fmt=MARKS[k], capsize=4, color=style.COLOURS[colour], label=name)
        at = known.nonzero().flatten()
        ax.plot(at, clip[at], "s", ms=9, color=style.COLOURS["data"], label="known")
        ax.set(xlabel="frame", ylabel="value of the pixel", xticks=range(len(known)))
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _draw(ax: Axes, curves: Mapping[str, Points], xlabel: str, ylabel: str, levels: Mapping[str, float], **axes: Any) -> None:
    for (name, (x, y)), colour, mark in zip(curves.items(), ROLES, MARKS, strict=False):
        ax.plot(x, y, mark + "-", ms=6, lw=2, color=style.COLOURS[colour], label=name)
    for (name, level), dashes, colour in zip(levels.items(), ("--", ":"), ("exact", "muted"), strict=False):
        ax.axhline(level, color=style.COLOURS[colour], ls=dashes, lw=1.5, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, **axes)


# --- the diagram ---------------------------------------------------------------------------------------------------------------


def space_then_time() -> Figure:
    """What a spatial and what a temporal layer sees of a clip, and how Video LDM joins them."""
    figure = canvas(WIDTH, HEIGHT)
    with style.context():
        figure.set_layout_engine("none")
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, WIDTH / UNIT), ylim=(0, HEIGHT / UNIT))
        ax.set_axis_off()
        left, right, low = 0.35, 5.75, 1.9
        tints = ("#DCEBF7", "#FBE9CF", "#DDF3EC", "#F7E6EF")
        for k in range(FRAMES):
            _frame(ax, left + k * PITCH, low, tints[k])
            _frame(ax, right + k * PITCH, low, "white")
        for row, column, colour in ((2, 0, "data"), (1, 1, "noise"), (0, 2, "model")):
            cell = SIDE / CELLS
            places = [(right + k * PITCH + (column + 0.5) * cell, low + (row + 0.5) * cell) for k in range(FRAMES)]
            for x, y in places:
                ax.add_patch(Rectangle((x - cell / 2, y - cell / 2), cell, cell, color=style.COLOURS[colour], zorder=3))
            ax.plot(*zip(*places, strict=True), "-", color=style.COLOURS[colour], lw=2.2, zorder=2)
        for x, title, shape in (
            (left, "a spatial layer: each frame alone", "$[b\\,t,\\ c,\\ h,\\ w]$"),
            (right, "a temporal layer: each place alone", "$[b\\,h\\,w,\\ t,\\ c]$"),
        ):
            middle = x + (FRAMES * PITCH - (PITCH - SIDE)) / 2
            _words(ax, middle, low + SIDE + 0.5, title, 12.5)
            _words(ax, middle, low - 0.45, shape, 15)
        _mixing(ax)
    return figure


def _mixing(ax: Axes) -> None:
    """The spatial layer's output z and the temporal layer's z', joined by alpha."""
    x, top, bottom = 12.2, 3.7, 1.55
    _box(ax, x + 0.75, top, "spatial", "muted", "#EBEBEB")
    _box(ax, x + 0.1, bottom + 0.55, "temporal", "model", "#DDF3EC")
    _arrow(ax, (x + 0.75, 4.75), (x + 0.75, top + 0.32))
    _arrow(ax, (x + 0.1, top - 0.85), (x + 0.1, bottom + 0.87))
    ax.plot([x + 0.75, x + 0.75, x + 0.1], [top - 0.32, top - 0.85, top - 0.85], color=style.COLOURS["muted"], lw=1.8)
    ax.plot([x + 0.75, x + 1.4], [top - 0.85, top - 0.85], color=style.COLOURS["muted"], lw=1.8)
    _arrow(ax, (x + 1.4, top - 0.85), (x + 1.4, bottom - 0.35))
    _arrow(ax, (x + 0.1, bottom + 0.23), (x + 0.1, bottom - 0.35), "model")
    _words(ax, x + 1.75, top - 1.5, "$z$", 16)
    _words(ax, x - 0.25, bottom - 0.05, "$z'$", 16, "model")
    _words(ax, x + 0.8, bottom - 0.7, "$\\alpha z+(1-\\alpha)z'$", 16)


def _frame(ax: Axes, x: float, y: float, face: str) -> None:
    """A frame of CELLS x CELLS places, its lower left corner at (x, y)."""
    ax.add_patch(Rectangle((x, y), SIDE, SIDE, fc=face, ec=style.COLOURS["muted"], lw=1.6))
    for k in range(1, CELLS):
        at = k * SIDE / CELLS
        ax.plot([x + at, x + at], [y, y + SIDE], color=style.COLOURS["muted"], lw=0.7)
        ax.plot([x, x + SIDE], [y + at, y + at], color=style.COLOURS["muted"], lw=0.7)


def _box(ax: Axes, x: float, y: float, words: str, colour: str, face: str) -> None:
    ax.add_patch(Rectangle((x - 0.72, y - 0.32), 1.44, 0.64, fc=face, ec=style.COLOURS[colour], lw=1.8, zorder=3))
    ax.text(x, y, words, ha="center", va="center", fontsize=12.5, zorder=4)


def _words(ax: Axes, x: float, y: float, words: str, size: float, colour: str = "exact") -> None:
    ax.text(x, y, words, ha="center", va="center", fontsize=size, color=style.COLOURS[colour])


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "muted") -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0, "lw": 1.8}
    ax.add_patch(FancyArrowPatch(start, end, color=style.COLOURS[colour], zorder=2, **look))
