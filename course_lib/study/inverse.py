"""The explorer of inverse problems: a measurement, what two solvers make of it with one prior, and the truth."""

from __future__ import annotations

import functools
import io
import textwrap
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image as pillow
from torch import Tensor

from course_lib import metrics
from course_lib.denoisers import Counted
from course_lib.devices import SampleNoise, generator
from course_lib.operators import BlockAverage, Blur, GaussianNoise, Grey, LinearOperator, Mask, gaussian_kernel, measure
from course_lib.restoring import SOLVERS, Task
from course_lib.study import pictures, style
from course_lib.study.canvas import Canvas, Drawing
from course_lib.study.explorer import Panel
from course_lib.types import Denoiser

Array = np.ndarray
Shape = tuple[int, int, int]

SIDE, GAP, HEAD, FOOT = 256, 16, 46, 26  # screen pixels: of a picture at most, between two, above each, below all
DRAWN = "drawn mask"
SEEN = 0.3  # share of the pixels that a random mask observes


def _box(shape: Shape, hidden: Tensor, source: torch.Generator) -> LinearOperator:
    return Mask.box(shape, (3 * shape[1] // 8, 3 * shape[2] // 8))


OPERATORS: dict[str, Callable[[Shape, Tensor, torch.Generator], LinearOperator]] = {
    DRAWN: lambda shape, hidden, source: Mask(~hidden[None], shape),
    "box mask": _box,
    f"random mask ({SEEN:.0%} seen)": lambda shape, hidden, source: Mask.random(shape, SEEN, source),
    "super-resolution × 4": lambda shape, hidden, source: BlockAverage(shape, 4),
    "blur": lambda shape, hidden, source: Blur(gaussian_kernel(max(shape[1:]) / 16), shape),
    "colourise": lambda shape, hidden, source: Grey(shape),
}
"""What the menu "operator" offers: (shape, hidden (H, W) bool, source of chance) -> A; to colourise takes three channels."""


class Problem(NamedTuple):
    """What is measured of which picture; the drawing is empty where the operator does not read it."""

    operator: str
    drawing: Drawing
    sigma_y: float
    picture: int
    seed: int


class Result(NamedTuple):
    """What a solver made, (1, C, H, W), or None and why; its PSNR in dB, seconds and calls of D."""

    picture: Tensor | None
    psnr: float
    seconds: float
    calls: int
    trouble: str = ""

    @property
    def said(self) -> str:
        return f"{self.psnr:.1f} dB, {self.seconds:.2f} s, {self.calls} calls" if self.picture is not None else "no picture"


class InverseExplorer(Panel):
    """A measurement y = A x0 + sigma_y n of a picture, and one sample of each of two solvers: with PSNR, seconds and calls of D.

    D          any Denoiser of (1, C, H, W) on `device`, trained on pictures as these
    images     (N, C, H, W) in [-1, 1], C = 1 or 3: the truths to choose from
    low, high  ends of the noise levels, Karras's; sampling starts from high N(0, I), and the last step goes from low to 0

    Draw on the canvas to hide pixels. A new operator, sigma_y, solver or number of calls keeps all noise, which is the seed's:
    that of y, that of the samplers and of the random mask. A result is kept with its seconds, so that only what has changed is
    computed. A solver that refuses the problem, or diverges, says so in its place. Raises ValueError for images of another
    shape, an unknown operator or solver, and unless 0 < low < high.
    """

    KEPT = 64  # results that are kept
    CALLS = (4, 100)

    def __init__(
        self,
        D: Denoiser,
        images: Tensor,
        first: str = "DDRM",
        second: str = "replacement",
        operator: str = DRAWN,
        sigma_y: float = 0.05,
        calls: int = 20,
        seed: int = 0,
        low: float = 0.02,
        high: float = 15.0,
        device: torch.device | str = "cpu",
    ):
        if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected (N, 1, H, W) or (N, 3, H, W), N >= 1")
        if not 0 < low < high:
            raise ValueError(f"low = {low}, high = {high}; expected 0 < low < high")
        self._shape: Shape = tuple(images.shape[1:])
        operators = [name for name in OPERATORS if name != "colourise" or self._shape[0] == 3]
        for name, value, among in (("operator", operator, operators), ("first", first, SOLVERS), ("second", second, SOLVERS)):
            if value not in among:
                raise ValueError(f"{name} = {value!r}; expected one of {', '.join(among)}")
        self._D, self._images, self._low, self._high, self._device = D, images.float(), low, high, device
        self.measured = functools.lru_cache(maxsize=self.KEPT)(self._measured)
        self.solved = functools.lru_cache(maxsize=self.KEPT)(self._solved)
        with style.context():
            self._build()
        _, H, W = self._shape
        self.canvas = Canvas(images[0])
        self.canvas.stroke([(0.25 * W, 0.55 * H), (0.75 * W, 0.55 * H)], brush=0.2 * max(H, W))
        solvers = [widgets.Dropdown(options=list(SOLVERS), value=one) for one in (first, second)]
        solvers[0].description, solvers[1].description = "solver", "and"
        controls = {
            "operator": widgets.Dropdown(options=operators, value=operator, description="operator"),
            "sigma_y": widgets.FloatSlider(sigma_y, min=0.0, max=0.5, step=0.01, description="noise", readout_format=".2f"),
            "first": solvers[0],
            "second": solvers[1],
            "calls": widgets.IntSlider(calls, min=self.CALLS[0], max=self.CALLS[1], description="calls"),
            "picture": widgets.IntSlider(0, min=0, max=len(images) - 1, description="picture"),
            "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
            "drawing": self.canvas,
        }
        self.canvas.observe(self._drawn_on, names="value")
        self.picture = widgets.Image(format="png", layout=widgets.Layout(flex="none"))
        wrap = widgets.Layout(flex_flow="row wrap", align_items="flex-start")
        hint = widgets.HTML("draw here to hide pixels")
        left = widgets.VBox([hint, self.canvas], layout=widgets.Layout(flex="none"))
        super().__init__(controls, widgets.HBox([left, self.picture], layout=wrap))
        top = self.children[0]  # the canvas is a control that stands in the view
        top.children = [control for control in top.children if control is not self.canvas]

    def _build(self) -> None:
        """Make the artists once: a redraw only changes them."""
        _, H, W = self._shape
        scale = max(1, SIDE // max(H, W))
        wide, high = W * scale, H * scale
        total = 2 * wide + 3 * GAP, 2 * (high + HEAD) + FOOT
        self._figure = figure = pictures.canvas(*total)
        figure.set_layout_engine("none")

        def place(column: int, row: int) -> Axes:
            left, top = GAP + column * (wide + GAP), HEAD + row * (high + HEAD)
            axes = figure.add_axes((left / total[0], 1 - (top + high) / total[1], wide / total[0], high / total[1]))
            axes.set_axis_off()
            return axes

        self._axes = [place(column, row) for row in (0, 1) for column in (0, 1)]
        blank = np.full((H, W, 3), 255, np.uint8)
        look = {"extent": (0, W, H, 0), "aspect": "auto", "interpolation": "nearest"}
        self._shown = [axes.imshow(blank, **look) for axes in self._axes]
        self._titles = [axes.set_title("", fontsize=13, pad=5) for axes in self._axes]
        self._troubles = [axes.text(W / 2, H / 2, "", ha="center", va="center", fontsize=12) for axes in self._axes]
        self._foot = figure.text(0.5, FOOT / 2 / total[1], "", ha="center", va="center", fontsize=12)

    # --- what is computed -------------------------------------------------------------------------

    def problem(self, operator: str, sigma_y: float, picture: int, seed: int, drawing: Drawing, **others: Any) -> Problem:
        """What the controls ask to be measured."""
        return Problem(operator, drawing if operator == DRAWN else Drawing(), sigma_y, picture, seed)

    def _measured(self, problem: Problem) -> tuple[LinearOperator, Tensor]:
        """A and y (1, *out) of a problem."""
        hidden = torch.from_numpy(problem.drawing.ink(*self._shape[1:]) >= 0.5)
        A = OPERATORS[problem.operator](self._shape, hidden, generator(problem.seed, 0))
        x0 = self._images[problem.picture : problem.picture + 1]
        return A, measure(A, x0, GaussianNoise(problem.sigma_y), generator(problem.seed, 1))

    @torch.no_grad()
    def _solved(self, problem: Problem, solver: str, calls: int) -> Result:
        A, y = self.measured(problem)
        D = Counted(self._D)
        noise = SampleNoise(problem.seed)
        task = Task(D, A, y.to(self._device), problem.sigma_y, calls, self._low, self._high, noise)
        begun = time.perf_counter()
        try:
            x = SOLVERS[solver](task).clamp(-1, 1).cpu()
        except (ValueError, FloatingPointError) as error:  # it cannot take this problem; the other may
            return Result(None, 0.0, 0.0, D.calls, str(error))
        seconds = time.perf_counter() - begun
        return Result(x, metrics.psnr(x[0], self._images[problem.picture]), seconds, D.calls)

    # --- what is shown ----------------------------------------------------------------------------

    def _drawn_on(self, change: Any) -> None:
        """A new stroke is meant to hide something."""
        if len(change["new"].strokes) > len(change["old"].strokes):
            self.controls["operator"].value = DRAWN

    def _show(self, values: dict[str, Any]) -> None:
        image = self.draw(**values)
        self.canvas.picture = self._images[values["picture"]]
        self.picture.value = image

    def draw(
        self, operator: str, sigma_y: float, first: str, second: str, calls: int, picture: int, seed: int, drawing: Drawing
    ) -> bytes:
        """The measurement, the truth, and below them what the two solvers made."""
        problem = self.problem(operator, sigma_y, picture, seed, drawing)
        A, y = self.measured(problem)
        truth = self._images[picture : picture + 1]
        simple = metrics.psnr(A.pinv(y)[0].clamp(-1, 1), truth[0])
        self._set(0, _seen(A, y), f"measurement\n$A^+ y$: {simple:.1f} dB")
        self._set(1, truth, f"truth\npicture {picture}")
        for place, solver in ((2, first), (3, second)):
            result = self.solved(problem, solver, calls)
            self._set(place, result.picture, f"{solver}\n{result.said}", result.trouble)
        share = f", {float((~A.observed).float().mean()):.0%} hidden" if A.observed is not None else ""
        self._foot.set_text(f"{operator}{share}, $\\sigma_y$ = {sigma_y:.2f}")
        return pictures.render(self._figure)

    def _set(self, place: int, image: Tensor | Array | None, title: str, trouble: str = "") -> None:
        if image is None:
            image = np.full((1, 1, 3), 238, np.uint8)
        self._shown[place].set_data(pictures.to_rgb(image, "image")[0] if isinstance(image, Tensor) else image)
        self._titles[place].set_text(title)
        self._troubles[place].set_text(textwrap.fill(trouble, 32))

    def poster(self) -> bytes:
        """The canvas as it is, and beside it the picture."""
        parts = [pillow.open(io.BytesIO(png)).convert("RGB") for png in (self.canvas.poster(), self.picture.value)]
        sheet = pillow.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
        sheet.paste(parts[0], (0, HEAD))
        sheet.paste(parts[1], (parts[0].width, 0))
        return pictures.small_png(sheet)


def _seen(A: LinearOperator, y: Tensor) -> Array:
    """The measurement as it looks, (H', W', 3) uint8: what a mask hides in the colour in which it is drawn."""
    image = pictures.to_rgb(y, "y")[0].copy()
    if A.observed is not None:
        image[~A.observed.all(0).numpy()] = np.round(255 * np.array(to_rgb(style.COLOURS["guide"])))
    return image
