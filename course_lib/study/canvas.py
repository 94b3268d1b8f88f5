"""A canvas to draw on with the mouse: a mask over a picture, or a scribble on white paper."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import ipywidgets as widgets
import matplotlib
import numpy as np
import torch
from PIL import Image as pillow
from torch import Tensor
from traitlets import Instance

from course_lib.study import pictures, style

Array = np.ndarray
Point = tuple[float, float]

SIDE = 320  # screen pixels that the longer side of a picture fills, or nearly
OPACITY = 0.65  # of a mask over its picture, which stays in sight


class Stroke(NamedTuple):
    """A line of round brush through points (x, y); lengths are in pixels of the picture, whose upper left corner is (0, 0)."""

    points: tuple[Point, ...]
    brush: float


@dataclass(frozen=True)
class Drawing:
    """Strokes, one over the other: a value that can be compared, kept and set again."""

    strokes: tuple[Stroke, ...] = ()

    def ink(self, height: int, width: int) -> Array:
        """How much of each pixel is covered, (H, W) in [0, 1], float32."""
        ink = np.zeros((height, width), np.float32)
        for stroke in self.strokes:
            _lay(ink, *stroke)
        return ink

    def __repr__(self) -> str:
        return f"Drawing of {len(self.strokes)} stroke{'s' * (len(self.strokes) != 1)}"


class Canvas(widgets.VBox):
    """Draw with the mouse or a finger on a picture or on white paper; `mask` and `scribble` are what was drawn.

    picture  (1, H, W) or (3, H, W) in [-1, 1] to draw a mask on, or None for white paper; may be set anew, in the same size
    size     (H, W) of the paper where there is no picture
    brush    diameter at the beginning, in pixels of the picture; by default a tenth of the longer side
    side     screen pixels that the longer side may fill

    `value`, a `Drawing`, changes when a stroke ends and when all are cleared: `canvas.observe(callback, names="value")`.
    Without a browser `stroke(points)` draws. A pixel belongs to the mask where its centre is under the brush. A brush
    thinner than the diagonal of a pixel draws as one so thick, since it could pass between all centres. Raises ValueError
    for a picture of another shape, and for a brush, a size or a side that is not positive.
    """

    value = Instance(Drawing, args=())

    def __init__(
        self, picture: Tensor | None = None, size: tuple[int, int] = (64, 64), brush: float | None = None, side: int = SIDE
    ):
        from ipycanvas import Canvas as Surface  # opens a channel to the page when it is loaded, so not before one is needed

        if picture is not None:
            size = tuple(_checked(picture).shape[1:])
        self._size = H, W = size
        if min(H, W, side) < 1:
            raise ValueError(f"size = {size}, side = {side}; expected positive numbers of pixels")
        most = max(H, W)
        brush = max(1.0, round(most / 10)) if brush is None else _brush(brush)
        self._scale = max(1, side // most)
        self._paper: Array = np.full((H, W, 3), 255, np.uint8)
        self._masks = False
        self._ink = np.zeros((H, W), np.float32)
        self._points: list[Point] = []  # of the stroke that is drawn
        self._sent: Array | None = None  # what the page shows
        self.surface = Surface(width=W * self._scale, height=H * self._scale)
        self._aside = Surface(width=1, height=1)
        self.surface.layout = widgets.Layout(width=f"{W * self._scale}px", height=f"{H * self._scale}px", flex="none")
        self.brush = widgets.FloatSlider(brush, min=1.0, max=max(round(most / 3), brush), step=0.5, readout_format=".1f")
        self.brush.layout = widgets.Layout(flex="1 1 0", width="auto", min_width="60px")
        self.eraser = widgets.Button(description="Clear", tooltip="a clean sheet", layout=widgets.Layout(width="auto"))
        bar = widgets.HBox(
            [widgets.HTML("brush"), self.brush, self.eraser], layout=widgets.Layout(width=f"{max(240, W * self._scale)}px")
        )
        super().__init__([bar, self.surface])
        self.layout.flex, self.layout.align_items = "none", "flex-start"
        if picture is not None:
            self.picture = picture
        self._listen()

    def _listen(self) -> None:
        surface = self.surface
        surface.on_mouse_down(self._down)
        surface.on_mouse_move(self._move)
        surface.on_mouse_up(self._up)
        surface.on_mouse_out(self._up)  # a button released elsewhere is not heard of
        surface.on_touch_start(lambda touches: self._down(*touches[0]))
        surface.on_touch_move(lambda touches: self._move(*touches[0]))
        surface.on_touch_end(lambda touches: self._up())
        surface.on_touch_cancel(lambda touches: self._up())
        surface.on_client_ready(self._paint_page)
        self.eraser.on_click(lambda _: self.clear())
        self.observe(self._redrawn, names="value")

    # --- what was drawn, and how it is drawn ------------------------------------------------------

    @property
    def mask(self) -> Tensor:
        """Where the strokes are, (H, W) bool."""
        return torch.from_numpy(self._ink >= 0.5)

    @property
    def scribble(self) -> Tensor:
        """The strokes as lines with soft edges, (1, H, W) in [0, 1], 1 on a line: as `scenes.scribbles` has them."""
        return torch.from_numpy(self._ink[None].copy())

    def stroke(self, points: Sequence[Point], brush: float | None = None) -> None:
        """Draw a line through points (x, y) in pixels of the picture: (0.5, 0.5) is the centre of the upper left pixel.

        brush is the slider's by default. Raises ValueError for no points, points that are not pairs of finite numbers, and
        a brush that is not positive.
        """
        found = np.asarray(points, float)
        if found.ndim != 2 or found.shape[1] != 2 or not len(found) or not np.isfinite(found).all():
            raise ValueError(f"points = {points!r}; expected at least one pair (x, y) of finite numbers")
        line = tuple((float(x), float(y)) for x, y in found)
        brush = self.brush.value if brush is None else _brush(brush)
        self.value = Drawing((*self.value.strokes, Stroke(line, brush)))

    def clear(self) -> None:
        """Take all strokes away."""
        self.value = Drawing()

    @property
    def picture(self) -> Tensor | None:
        """What is drawn on, (3, H, W) in [-1, 1], or None."""
        return torch.from_numpy(self._paper).permute(2, 0, 1) / 127.5 - 1 if self._masks else None

    @picture.setter
    def picture(self, picture: Tensor) -> None:
        if tuple(_checked(picture).shape[1:]) != tuple(self._size):
            raise ValueError(f"picture has shape {tuple(picture.shape)}; expected {self._size[0]} x {self._size[1]} pixels")
        self._paper, self._masks = pictures.to_rgb(picture[None], "picture")[0], True
        self._update_page()

    # --- events -----------------------------------------------------------------------------------

    def _down(self, x: float, y: float) -> None:
        self._up()  # of a stroke whose end was not heard of
        self._points = [(x / self._scale, y / self._scale)]
        self._draw_on()

    def _move(self, x: float, y: float) -> None:
        if self._points:
            self._points.append((x / self._scale, y / self._scale))
            self._draw_on()

    def _up(self, *at: float) -> None:
        if self._points:
            self._move(*at) if at else None
            points, self._points = self._points, []
            self.stroke(points)

    def _draw_on(self) -> None:
        _lay(self._ink, self._points[-2:], self.brush.value)
        self._update_page()

    def _redrawn(self, change: Any) -> None:
        before, strokes = change["old"].strokes, change["new"].strokes
        if strokes[: len(before)] != before:
            before, self._ink[:] = (), 0
        for stroke in strokes[len(before) :]:
            _lay(self._ink, *stroke)
        self._update_page()

    # --- what is seen -----------------------------------------------------------------------------

    def _seen(self) -> Array:
        """The pixels as they look, (H, W, 3) uint8: a mask in the colour of measurements over its picture, or black ink."""
        share = OPACITY * (self._ink >= 0.5) if self._masks else self._ink
        colour = np.array(matplotlib.colors.to_rgb(style.COLOURS["guide"] if self._masks else "black"))
        return np.round(self._paper + share[..., None] * (255 * colour - self._paper)).astype(np.uint8)

    def _update_page(self) -> None:
        """Paint the pixels that the page does not show yet, each as a square: exact, and one message however many there are."""
        if self._sent is None:  # no page has asked yet
            return
        seen = self._seen()
        rows, columns = (seen != self._sent).any(-1).nonzero()
        if len(rows):
            self._paint(seen, rows, columns)

    def _paint_page(self) -> None:
        """Paint all for a page that opens the canvas; what was sent before reached other pages alone."""
        # ipycanvas names the canvas of a command only where the last one was for another; a new page knows of no last one
        self._aside.clear()
        self._paint(self._seen(), *(at.ravel() for at in np.indices(self._size)))

    def _paint(self, seen: Array, rows: Array, columns: Array) -> None:
        scale = self._scale
        self.surface.fill_styled_rects(columns * scale, rows * scale, scale, scale, seen[rows, columns])
        self._sent = seen

    def poster(self) -> bytes:
        """What is seen now, as PNG."""
        large = self._seen().repeat(self._scale, 0).repeat(self._scale, 1)
        return pictures.small_png(pillow.fromarray(large))

    def __repr__(self) -> str:
        H, W = self._size
        return f"Canvas({H} x {W} pixels, {self.value!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The live canvas, and a PNG poster of it for viewers without a kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "image/png": base64.b64encode(self.poster()).decode("ascii")}


def _lay(ink: Array, points: Sequence[Point], brush: float) -> None:
    """Raise `ink` (H, W), in place, to clamp(r + 1/2 - d, 0, 1): d from a pixel's centre to the line, r half the brush."""
    H, W = ink.shape
    r = max(brush, math.sqrt(2)) / 2  # each point is at most so far from the nearest centre
    for (x0, y0), (x1, y1) in pairwise([points[0], *points]):
        left, right = (min(max(int(end), 0), W) for end in (min(x0, x1) - r - 1, max(x0, x1) + r + 2))
        top, bottom = (min(max(int(end), 0), H) for end in (min(y0, y1) - r - 1, max(y0, y1) + r + 2))
        y, x = np.mgrid[top:bottom, left:right] + 0.5
        across, down = x1 - x0, y1 - y0
        along = ((x - x0) * across + (y - y0) * down) / max(across**2 + down**2, 1e-12)
        along = along.clip(0, 1)
        away = np.hypot(x - x0 - along * across, y - y0 - along * down)
        part = ink[top:bottom, left:right]
        np.maximum(part, (r + 0.5 - away).clip(0, 1), out=part, casting="same_kind")


def _brush(brush: float) -> float:
    if not (math.isfinite(brush) and brush > 0):
        raise ValueError(f"brush = {brush!r}; expected a positive diameter in pixels of the picture")
    return float(brush)


def _checked(picture: Tensor) -> Tensor:
    if picture.ndim != 3 or picture.shape[0] not in (1, 3) or 0 in picture.shape:
        raise ValueError(f"picture has shape {tuple(picture.shape)}; expected (1, H, W) or (3, H, W), in [-1, 1]")
    return picture
