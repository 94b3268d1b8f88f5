"""What every explorer shares: controls above a view that is redrawn in place, never for a stale value."""

from __future__ import annotations

import asyncio
import base64
import html
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets

from course_lib.study import style

PAUSE = 0.02  # s from a change to its redraw, in which the kernel reads the changes that queue behind it


class Panel(widgets.VBox):
    """Controls above a view that follows them; a subclass defines `_show(values)`, which redraws, and `poster()`.

    controls  name -> ipywidget with a `value`
    view      the widget that `_show` redraws in place

    The view is drawn once here, so set up what `_show` needs first; what it raises then is raised. Later
    errors appear in one line below the view, which stays. `redraws` counts the redraws after the first.
    """

    def __init__(self, controls: Mapping[str, widgets.Widget], view: widgets.Widget):
        self.controls = dict(controls)
        self.redraws = 0
        self._pending: dict[str, Any] | None = None
        self._waiting: asyncio.AbstractEventLoop | None = None
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
        """What the controls say now."""
        return {name: control.value for name, control in self.controls.items()}

    def _changed(self, change: Any) -> None:
        """Note the newest values; have them drawn once, soon where a loop runs (a kernel), else now (a script)."""
        self._pending = self.values
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._redraw()
            return
        if self._waiting is not loop:  # one redraw is enough: it will find the newest values
            self._waiting = loop
            loop.call_later(PAUSE, self._redraw)

    def _redraw(self) -> None:
        values, self._pending, self._waiting = self._pending, None, None
        if values is None:  # a display has drawn them meanwhile
            return
        self.redraws += 1
        self.message.value = ""
        try:
            with style.context():  # an axis makes its ticks when drawn, in the style of that moment
                self._show(values)
        except Exception as error:  # on a kernel's loop it would vanish into the log
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
