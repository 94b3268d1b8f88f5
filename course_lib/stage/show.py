"""A lecture's explorers on one page: a menu of them, a reset, a new seed, and a line that says how long a frame took."""

from __future__ import annotations

import html
import random
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets as widgets
import torch

from course_lib.grading.paths import CourseError
from course_lib.stage.demos import DEMOS
from course_lib.stage.frames import Frames
from course_lib.study.explorer import Panel
from course_lib.study.style import COLOURS

SEEDS = 10_000  # a surprise is a seed below this: short enough to be read out


class Stage(widgets.VBox):
    """Explorers by name, each built when it is first chosen, with the buttons that a live demonstration wants.

    explorers  name -> a function that builds the explorer; the first is shown first

    The page finds its parts by their CSS classes: "stage-main" is the slider that the arrow keys move, "stage-view" what
    is made as large as the window allows, "stage-status" the line that counts the redraws. An explorer that
    cannot be built leaves its error in the place of the view.
    """

    def __init__(self, explorers: dict[str, Callable[[], Panel]]):
        if not explorers:
            raise CourseError("explorers is empty; expected at least one function by name")
        self._build, self.built = dict(explorers), {}
        self._frames: dict[Panel, Frames] = {}
        self.opened: dict[str, dict[str, Any]] = {}
        names = list(explorers)
        self.choice = widgets.ToggleButtons(options=names, value=names[0], tooltips=names)
        self.choice.layout.display = None if len(names) > 1 else "none"
        self.reset = widgets.Button(description="Reset", tooltip="back to the values at the beginning (key r)")
        self.surprise = widgets.Button(description="Surprise me", tooltip="another seed (key s)")
        self.status, self.trouble, self._place = widgets.HTML(), widgets.HTML(), widgets.VBox()
        for widget, name in (
            (self.choice, "choice"), (self.reset, "reset"), (self.surprise, "surprise"),
            (self.status, "status"), (self._place, "place"), (self.trouble, "trouble"),
        ):  # fmt: skip
            widget.add_class(f"stage-{name}")
        bar = widgets.HBox([self.choice, self.reset, self.surprise, self.status])
        bar.add_class("stage-bar")
        colours = "; ".join(f"--course-{name}: {colour}" for name, colour in COLOURS.items())
        super().__init__([widgets.HTML(f"<style>:root {{ {colours} }}</style>"), bar, self._place, self.trouble])
        self.add_class("stage")
        self.turn_to(names[0])
        self.choice.observe(lambda change: self.turn_to(change["new"]), names="value")
        self.reset.on_click(lambda _: self.put_back())
        self.surprise.on_click(lambda _: self.another_seed())

    def turn_to(self, name: str) -> None:
        """Show this explorer, which is built at its first time; what that raises is told in its place."""
        self.trouble.value, self._place.children, self.surprise.layout.display = "", (), "none"
        try:
            if name not in self.built:
                self.status.value = "one moment"
                panel = self._build[name]()
                self._dress(panel)
                self.built[name], self.opened[name] = panel, panel.values
        except Exception as error:  # in a callback it would vanish into the log
            self.trouble.value = html.escape(f"{name}: {type(error).__name__}: {error}")
            self.status.value = ""
            return
        panel = self.built[name]
        self._place.children = (panel,)
        self.surprise.layout.display = None if "seed" in panel.controls else "none"
        self._count(panel)

    def _dress(self, panel: Panel) -> None:
        """Name the parts for the page, watch the time of a frame, and send what was drawn before a page could listen."""
        frames = self._frames[panel] = Frames(panel)
        panel.children = [child for one in panel.children for child in ((one, frames.still) if one is panel.view else (one,))]
        panel.children = (*panel.children, frames.note)
        panel.add_class("stage-explorer")
        panel.children[0].add_class("stage-controls")
        panel.message.add_class("stage-message")
        frames.note.add_class("stage-note")
        for view in (panel.view, frames.still):
            view.add_class("stage-view")
        if panel.main is not None:
            panel.main.add_class("stage-main")
        panel.observe(lambda change: self._count(panel), names="busy")
        frames.told = lambda: self._count(panel)
        for figure in _within(panel.view):
            if hasattr(figure, "_widget_data"):  # plotly's; its state is what it showed first, and this what it shows now
                figure.send_state(["_widget_data", "_widget_layout"])

    def _count(self, panel: Panel) -> None:
        """Say that the panel computes, or how often it was redrawn, how fast and, for a program that looks, where."""
        if panel.busy:
            self.status.value = "computing"
            return
        said = f"redraw {panel.redraws}: {1000 * panel.seconds:.0f} ms" if panel.latest else "ready"
        values = panel.latest or panel.values
        shown = panel.main_name and self._frames[panel].exact(values)
        at = f"{values[panel.main_name]:.9g}" if shown else ""  # a browser counts in floats
        self.status.value = f'<span data-at="{at}">{said}</span>'

    def put_back(self) -> None:
        """All controls as they were when the explorer opened; twice, since one may set another's limits."""
        for _ in range(2):
            for name, value in self.opened.get(self.choice.value, {}).items():
                self.built[self.choice.value].controls[name].value = value

    def another_seed(self) -> None:
        """Another seed than now, where the explorer has one."""
        panel = self.built.get(self.choice.value)
        if panel is not None and "seed" in panel.controls:
            seed = panel.controls["seed"]
            shift = random.randrange(1, SEEDS)  # never 0: it would be no surprise
            seed.value = (seed.value + shift) % SEEDS


def _within(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    """A widget and all that it holds."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from _within(child)


def show(number: str) -> Stage:
    """The stage of one lecture, a key of `DEMOS`."""
    torch.set_num_threads(1)  # as the lectures do: the tensors are tiny
    return Stage(DEMOS[number].explorers)
