"""What every explorer shares: controls above a picture that is redrawn in place, never for a stale value."""

from __future__ import annotations

import asyncio
import base64
import html
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets

from course_lib.study import style

PAUSE = 0.02  # s from a change to its redraw, in which the kernel reads the changes that queue behind it


class Explorer(widgets.VBox):
    """Controls above a picture; a subclass defines `draw(**values) -> bytes`, a PNG of the controls' values.

    controls  name -> ipywidget with a `value`; the names are the arguments of `draw`

    The first picture is drawn here, so set up what `draw` needs first; what it raises then is raised. Later
    errors appear in one line below the picture, which stays. `redraws` counts the pictures after the first.
    """

    def __init__(self, controls: Mapping[str, widgets.Widget]):
        self.controls = dict(controls)
        self.redraws = 0
        self._pending: dict[str, Any] | None = None
        self._waiting: asyncio.AbstractEventLoop | None = None
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", align_self="flex-start"))
        self.message = widgets.HTML()
        wrap = widgets.Layout(flex_flow="row wrap")
        super().__init__([widgets.HBox(list(self.controls.values()), layout=wrap), self.picture, self.message])
        self._show(self.values)
        for control in self.controls.values():
            control.observe(self._changed, names="value")

    def draw(self, **values: Any) -> bytes:
        """The picture of these values, as PNG."""
        raise NotImplementedError(f"{type(self).__name__} must define draw({', '.join(self.controls)})")

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
        try:
            self._show(values)
        except Exception as error:  # on a kernel's loop it would vanish into the log
            words = " ".join(f"{type(error).__name__}: {error}".split())
            self.message.value = f'<span style="color:{style.COLOURS["warn"]}">{html.escape(words)}</span>'
        else:
            self.message.value = ""

    def _show(self, values: dict[str, Any]) -> None:
        with style.context():  # an axis makes its ticks when drawn, in the style of that moment
            self.picture.value = self.draw(**values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.values.items())})"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The live view, and a PNG poster of the current picture for viewers without a kernel."""
        self._redraw()
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "image/png": base64.b64encode(self.picture.value).decode("ascii")}
