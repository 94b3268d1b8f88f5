"""Frames computed beforehand along an explorer's main slider, for where one frame takes over a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np

from course_lib.study import style
from course_lib.study.explorer import Panel

LIMIT = 1.0  # s that a frame may take, before pictures that were computed beforehand stand in
COUNT = 9  # of them, evenly spaced along the slider
PAUSE = 0.05  # s between two of them, in which the kernel reads what the user does

HIDDEN = "stage-hidden"  # the CSS class of what is not shown

Key = tuple[tuple[str, Any], ...]


class Frames:
    """Takes the place of `panel.paint`: the panel's own while that is fast, the nearest frame at hand while it is slow.

    panel  an explorer; its `main` slider is what the frames are spaced along, all other controls as they are
    still  the widget that shows a frame in the place of `panel.view`
    note   the widget that says so

    While no control moves, the frame of the newest values is computed first, then the others; so the picture ends at
    the newest value as it does without frames. A frame that takes less than half the limit ends all this.
    `exact(values)` says whether the picture is that of these values; `told` is called when another frame is shown.
    """

    def __init__(self, panel: Panel):
        self.panel, self._own = panel, panel.paint
        self.slow = False
        self._name = panel.main_name
        self.still, self.note = widgets.Image(format="png"), widgets.HTML()
        for widget in (self.still, self.note):
            widget.add_class(HIDDEN)
        self._frames: dict[Key, bytes] = {}
        self._working = False
        self._shown: Key | None = None
        self.told: Callable[[], None] = lambda: None
        panel.paint = self

    def __call__(self, values: dict[str, Any]) -> None:
        """Bring the panel to these values, or, while it is slow, to the nearest frame at hand."""
        if not self.slow:
            begun = time.monotonic()
            self._own(values)
            took = time.monotonic() - begun
            if took > LIMIT and self._wanted() and _loop() is not None:
                self._frames[_key(values)] = self.panel.poster()
                self._swap(True)
                self._tell(took)
                self._nearest(values)
                self._go_on()
            return
        self._frames = {key: png for key, png in self._frames.items() if self._others(key) == self._others(_key(values))}
        if not self._frames:
            self._frames[_key(values)] = self._frame(values)
        self._nearest(values)
        self._go_on()

    def _others(self, key: Key) -> Key:
        """The values of all controls but the main slider."""
        return tuple(pair for pair in key if pair[0] != self._name)

    def _wanted(self) -> list[dict[str, Any]]:
        """The values of the frames that ought to be at hand, the most urgent first; none without a main slider."""
        main, values = self.panel.main, self.panel.values
        if main is None:
            return []
        name = self._name
        steps = (main.max - main.min) / main.step
        spaced = [round(main.min + main.step * round(share * steps), 9) for share in np.linspace(0, 1, COUNT)]
        spaced.sort(key=lambda value: abs(value - values[name]))
        return [values] + [{**values, name: type(main.value)(value)} for value in dict.fromkeys(spaced)]

    def _frame(self, values: dict[str, Any]) -> bytes:
        """Draw these values, in the style in which a panel draws them."""
        with style.context():
            self._own(values)
            return self.panel.poster()

    def _nearest(self, values: dict[str, Any]) -> None:
        """Show the frame whose value of the main slider is the nearest."""
        now = values[self._name]
        self._shown = min(self._frames, key=lambda key: abs(dict(key)[self._name] - now))
        self.still.value = self._frames[self._shown]
        self.told()

    def exact(self, values: dict[str, Any]) -> bool:
        """Whether the picture is that of these values, and not of others nearby."""
        return not self.slow or self._shown == _key(values)

    def _go_on(self) -> None:
        if not self._working and (loop := _loop()) is not None:
            self._working = True
            loop.call_later(PAUSE, self._work)

    def _work(self) -> None:
        """Compute one frame that is wanted, unless a control moves."""
        self._working = False
        wanted = [values for values in self._wanted() if _key(values) not in self._frames]
        if not self.slow or not wanted:
            return
        if self.panel.resting:
            begun = time.monotonic()
            try:
                self._frames[_key(wanted[0])] = self._frame(wanted[0])
                took = time.monotonic() - begun
                if took < LIMIT / 2:
                    self._swap(False)
                    self._frame(self.panel.values)
                    self.told()
                    return
            except Exception as error:  # on the loop it would vanish into the log
                self.panel.complain(error)
                return
            self._tell(took)
            self._nearest(self.panel.values)
        self._go_on()

    def _swap(self, slow: bool) -> None:
        """Show frames in the place of the view, or the view again."""
        self.slow = slow
        for widget in (self.panel.view, self.still, self.note):  # a plotly figure's `layout` is another thing than a widget's
            (widget.add_class if (widget is self.panel.view) == slow else widget.remove_class)(HIDDEN)
        if not slow:
            self._frames.clear()

    def _tell(self, took: float) -> None:
        here = sum(_key(values) in self._frames for values in self._wanted()[1:])
        self.note.value = (
            f"A frame takes {took:.1f} s here, so the slider shows the nearest of {here} that were computed beforehand"
            f"{', more are on their way' if here < len(self._wanted()) - 1 else ''}; the exact one follows."
        )


def _loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs, as in a kernel; a script has none, and no time between changes in which to compute ahead."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _key(values: dict[str, Any]) -> Key:
    return tuple(values.items())
