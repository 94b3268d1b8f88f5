"""What every explorer shares: controls above a view that is redrawn in place, never for a stale value."""

from __future__ import annotations

import asyncio
import base64
import html
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as widgets
from traitlets import Bool, Int

from course_lib.study import style

PAUSE = 0.02  # s from a change to its redraw, in which the kernel reads the changes that queue behind it
REST = 0.15  # s that end a burst: ten moves in a second are one, and cost its first redraw and its last
LONGEST = 1.0  # s from redraw to redraw of a burst that goes on


class Panel(widgets.VBox):
    """Controls above a view that follows them; a subclass defines `_show(values)`, which redraws, and `poster()`.

    controls  name -> ipywidget with a `value`
    view      the widget that `_show` redraws in place

    The view is drawn once here, so set up what `_show` needs first; what it raises then is raised. Later
    errors appear in one line below the view, which stays. A change is drawn at once; those that follow in a burst are
    drawn when it ends, or each second while it goes on. `paint(values)` is what a redraw calls, `_show` unless replaced.
    `redraws` counts the values drawn after the first, `latest` are the newest of them, `seconds` is the time that they
    took, and `busy` tells that a change waits or is drawn.
    """

    redraws = Int(0)
    busy = Bool(False)

    def __init__(self, controls: Mapping[str, widgets.Widget], view: widgets.Widget):
        self.controls, self.view = dict(controls), view
        self.paint: Callable[[dict[str, Any]], None] = self._show
        self._pending: dict[str, Any] | None = None
        self._waiting: asyncio.AbstractEventLoop | None = None
        self.latest: dict[str, Any] | None = None
        self.seconds = 0.0
        self._moved = self._drawn_at = -math.inf  # s; when a control was moved last, and when a redraw ended last
        self._due, self._answered = -math.inf, False  # s before which nothing is drawn; whether this burst had a redraw
        self.message = widgets.HTML()
        wrap = widgets.Layout(flex_flow="row wrap")
        super().__init__([widgets.HBox(list(self.controls.values()), layout=wrap), view, self.message])
        with style.context():
            self._show(self.values)
        for control in self.controls.values():
            control.observe(self._changed, names="value")

    def _show(self, values: dict[str, Any]) -> None:
        """Bring the view to these values of the controls."""
        raise NotImplementedError(f"{type(self).__name__} must define _show(values)")

    def poster(self) -> bytes:
        """What the view shows now, as PNG."""
        raise NotImplementedError(f"{type(self).__name__} must define poster()")

    @property
    def values(self) -> dict[str, Any]:
        """What the controls say now, in nine digits: a browser's slider may answer 0.30000000000000004 for 0.3."""
        said = {name: control.value for name, control in self.controls.items()}
        return {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in said.items()}

    @property
    def main_name(self) -> str | None:
        """The name of the control that the arrow keys of a stage move: the first slider."""
        sliders = widgets.IntSlider | widgets.FloatSlider
        return next((name for name, control in self.controls.items() if isinstance(control, sliders)), None)

    @property
    def main(self) -> widgets.Widget | None:
        """The control of that name."""
        return None if self.main_name is None else self.controls[self.main_name]

    @property
    def resting(self) -> bool:
        """Whether no control has been moved for a while."""
        return time.monotonic() - max(self._moved, self._drawn_at) >= REST

    def _changed(self, change: Any) -> None:
        """Note the newest values; have them drawn once, soon where a loop runs (a kernel), else now (a script).

        Without a change it is a redraw that asks for another, which goes on with its work.
        """
        self._pending, self.busy = self.values, True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._redraw()
            return
        if change is not None:
            now = time.monotonic()
            self._answered = self._answered and not self.resting
            self._due = min(now + REST, self._drawn_at + LONGEST) if self._answered else now
            self._moved = now
        if self._waiting is not loop:  # one redraw is enough: it will find the newest values
            self._waiting = loop
            loop.call_later(PAUSE, self._when_due)

    def _when_due(self) -> None:
        """Redraw, or wait on where a burst goes on."""
        wait = self._due - time.monotonic()
        if wait > 0 and self._pending is not None:
            asyncio.get_running_loop().call_later(wait, self._when_due)
        else:
            self._redraw()

    def _redraw(self) -> None:
        values, self._pending, self._waiting = self._pending, None, None
        if values is None:  # a display has drawn them meanwhile
            return
        if fresh := values != self.latest:
            self.latest = values
            self.redraws += 1
        self.message.value = ""
        begun = time.monotonic()
        try:
            with style.context():  # an axis makes its ticks when drawn, in the style of that moment
                self.paint(values)
        except Exception as error:  # on a kernel's loop it would vanish into the log
            self.complain(error)
        self._answered = True
        if fresh:
            self._drawn_at = time.monotonic()
            self.seconds = self._drawn_at - begun
        self.busy = self._pending is not None

    def complain(self, error: Exception) -> None:
        """Tell the error in one line below the view."""
        words = " ".join(f"{type(error).__name__}: {error}".split())
        self.message.value = f'<span style="color:{style.COLOURS["warn"]}">{html.escape(words)}</span>'

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.values.items())})"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The live view, and a PNG poster of what it shows for viewers without a kernel."""
        self._redraw()
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "image/png": base64.b64encode(self.poster()).decode("ascii")}


class Explorer(Panel):
    """Controls above a picture; a subclass defines `draw(**values) -> bytes`, a PNG of the controls' values.

    controls  name -> ipywidget with a `value`; the names are the arguments of `draw`

    As with every `Panel`, set up what `draw` needs before this constructor, which draws the first picture.
    """

    def __init__(self, controls: Mapping[str, widgets.Widget]):
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", align_self="flex-start"))
        super().__init__(controls, self.picture)

    def draw(self, **values: Any) -> bytes:
        """The picture of these values, as PNG."""
        raise NotImplementedError(f"{type(self).__name__} must define draw({', '.join(self.controls)})")

    def _show(self, values: dict[str, Any]) -> None:
        self.picture.value = self.draw(**values)

    def poster(self) -> bytes:
        return self.picture.value


def keep_share(level: widgets.IntSlider, steps: widgets.IntSlider) -> None:
    """Let `level` run from 0 to `steps.value`, and keep it at its share of the way when the number of steps changes."""

    def rescale(change: Any) -> None:
        share = level.value / change["old"]
        level.max = change["new"]
        level.value = round(share * change["new"])

    steps.observe(rescale, names="value")
