"""The explorer of guidance: a class in the plane, whose every quantity is exact, and the digits of a network, at one scale."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import SampleNoise, generator, one_thread
from course_lib.gaussians import Mixture
from course_lib.guidance import Classifier, Weight, bayes_classifier, cfg, classifier_guidance, interval
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.study import pictures, style
from course_lib.study.explorer import Explorer
from course_lib.study.points import density, outline, plane, scatter
from course_lib.types import Denoiser
from course_lib.worlds import digits, toys

FREE, BAYES = "classifier-free", "classifier"
ALL = (0.0, math.inf)  # levels, from and to; a menu takes None for no choice
WIDTH, HEIGHT = 900, 470  # of the picture, in screen pixels


class GuidanceExplorer(Explorer):
    """A scale w: where the points of a class end in the plane, how sure and how various they are, and what digits are drawn.

    parts       the classes, `Mixture`s in the plane, equally likely; everything about them is exact
    D           a Denoiser of digits that takes `label`, fp32
    classifier  p(class | x, sigma) of digits, fp32, for guidance by a classifier
    reader      logits of clean digits (N, 1, 16, 16), which says what was drawn

    Adherence is the mean of p(class | x) over SET ends, diversity their root mean square distance from their mean, over that of
    the class itself. In the plane both kinds of guidance are the same field, by Bayes' rule. With `interval` guidance acts
    between the two levels and the conditional model alone outside. Raises ValueError for classes that are not in the plane.
    """

    SET, SHOWN, LOW, HIGH = 500, 250, 0.02, 15.0
    STEPS, COLUMNS, MOST = 6, 5, 12.0
    CURVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, MOST)  # scales
    HALF = 2.6  # of the plane that is shown

    def __init__(self, parts: Sequence[Mixture], D: NetworkDenoiser, classifier: Classifier, reader: Callable[[Tensor], Tensor]):
        for part in parts:
            if part.dim != 2:
                raise ValueError(f"a class is in {part.dim} dimensions; expected 2")
        self._parts, self._all = list(parts), toys.of_classes(parts)
        self._bayes = bayes_classifier(self._parts)
        self._D, self._classifier, self._reader = D, classifier, reader
        self._curves: dict[tuple[int, tuple[float, float]], tuple[list[float], list[float]]] = {}
        self.points, self.digits = (functools.lru_cache(maxsize=64)(draw) for draw in (self._points, self._digits))
        self._figure = pictures.canvas(WIDTH, HEIGHT)
        super().__init__(
            {
                "w": widgets.FloatSlider(2.0, min=0.0, max=self.MOST, step=0.5, description="w", readout_format=".1f"),
                "kind": widgets.Dropdown(options=[FREE, BAYES], description="guidance"),
                "part": widgets.Dropdown(
                    options=[(f"class {k + 1}", k) for k in range(len(self._parts))], description="in the plane"
                ),
                "levels": widgets.Dropdown(
                    options=[
                        ("all levels", ALL),
                        ("0.2 < σ ≤ 2", (0.2, 2.0)),
                        ("σ > 2", (2.0, self.HIGH)),
                        ("σ ≤ 0.2", (0.0, 0.2)),
                    ],
                    description="where",
                ),
                "seed": widgets.BoundedIntText(0, min=0, max=2**31 - 1, description="seed"),
            }
        )

    def _points(self, w: float, part: int, levels: tuple[float, float] = ALL, seed: int = 0) -> Tensor:
        """Where SET points of pure noise end under the exact guided field of a class, (SET, 2)."""
        grid = karras(40, self.LOW, self.HIGH, to_zero=False)
        D = cfg(self._parts[part].denoiser, self._all.denoiser, _scale(w, levels))
        with one_thread():
            x = self.HIGH * torch.randn(self.SET, 2, generator=generator(seed), dtype=torch.float64)
            return sample(D, x, grid, dpm_solver_pp_2m)

    def measure(self, x: Tensor, part: int) -> tuple[float, float]:
        """Adherence and diversity of points (N, 2)."""
        sure = torch.softmax(self._bayes(x, torch.tensor(self.LOW)), 1)[:, part].mean()
        spread = (x.var(0, correction=0).sum() / self._parts[part].cov.trace()).sqrt()
        return float(sure), float(spread)

    def curve(self, part: int, levels: tuple[float, float]) -> tuple[list[float], list[float]]:
        """Adherence and diversity at each w of CURVE, with one set of starts."""
        key = (part, levels)
        if key not in self._curves:
            found = [self.measure(self.points(w, part, levels), part) for w in self.CURVE]
            self._curves[key] = tuple(map(list, zip(*found, strict=True)))
        return self._curves[key]

    @torch.no_grad()
    def _digits(self, w: float, kind: str, levels: tuple[float, float], seed: int) -> Tensor:
        """The digits 0 to 9 under guidance, (10, 1, 16, 16); each keeps its noise when w changes."""
        label = torch.arange(digits.CLASSES)
        x = SampleNoise(seed).start((len(label), *digits.SHAPE), self.HIGH)
        D = self.guided(label, w, kind, levels)
        return sample(D, x, karras(self.STEPS, self.LOW, self.HIGH, to_zero=False), dpm_solver_pp_2m).clamp(-1, 1)

    def guided(self, label: Tensor, w: float, kind: str, levels: tuple[float, float]) -> Denoiser:
        """The guided Denoiser of digits: by the condition that the network was trained with, or by the classifier."""
        null = self._D.given(label=torch.full_like(label, digits.CLASSES))
        if kind == FREE:
            return cfg(self._D.given(label=label), null, _scale(w, levels))
        by_bayes = classifier_guidance(null, self._classifier, label, 1.0)
        return cfg(by_bayes, null, _scale(w, levels)) if levels != ALL else classifier_guidance(null, self._classifier, label, w)

    def draw(self, w: float, kind: str, part: int, levels: tuple[float, float], seed: int) -> bytes:
        """The class in the plane, its two numbers along w, and the digits with what the reader reads."""
        x, images = self.points(w, part, levels, seed), self.digits(w, kind, levels, seed)
        sure, spread = self.measure(x, part)
        figure = self._figure
        figure.clear()
        figure.set_layout_engine("none")
        left = figure.add_axes((0.06, 0.13, 0.43, 0.75))
        box = (-self.HALF, self.HALF) * 2
        density(left, self._parts[part].log_prob, box, levels=8)
        for k, other in enumerate(self._parts):
            if k != part:
                outline(left, other.log_prob, box)
        scatter(left, x[: self.SHOWN], colour=style.COLOURS["guide"], size=9)
        plane(left, box)
        left.set_title(f"p(class {part + 1} | x) = {sure:.3f}, spread {spread:.2f}", fontsize=14)

        right = figure.add_axes((0.6, 0.13, 0.37, 0.27))
        sures, spreads = self.curve(part, levels)
        for values, now, name, colour in ((sures, sure, "p(class | x)", "model"), (spreads, spread, "spread", "noise")):
            right.plot(self.CURVE, values, color=style.COLOURS[colour], label=name)
            right.plot([w], [now], "o", color=style.COLOURS[colour], markersize=9)
        right.axvline(w, color=style.COLOURS["muted"], linewidth=1, zorder=0)
        right.set(xlabel="scale w", xlim=(0, self.MOST), ylim=(0, 1.9))
        right.legend(loc="upper right", ncols=2, fontsize=12)
        self._show_digits(figure, images)
        return pictures.render(figure)

    def _show_digits(self, figure: Figure, images: Tensor) -> None:
        read = self._reader(images).argmax(1)
        wrong = (read != torch.arange(digits.CLASSES)).nonzero()[:, 0].tolist()
        sheet = pictures.tile(images, columns=self.COLUMNS)[0].numpy()
        width = 0.4
        high = width * WIDTH / HEIGHT * sheet.shape[0] / sheet.shape[1]  # square pixels
        ax = figure.add_axes((0.57, 0.88 - high, width, high))
        ax.imshow(sheet, cmap="gray", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
        ax.set_axis_off()
        side = images.shape[-1] + 1
        for i in wrong:
            corner = (i % self.COLUMNS * side - 0.5, i // self.COLUMNS * side - 0.5)
            ax.add_patch(Rectangle(corner, side - 1, side - 1, fill=False, edgecolor=style.COLOURS["warn"], linewidth=3))
        full = float((images.abs() > 0.999).double().mean())
        ax.set_title(f"{10 - len(wrong)} of 10 read as asked, {full:.0%} saturated", fontsize=14)


def _scale(w: float, levels: tuple[float, float]) -> Weight:
    return w if levels == ALL else interval(w, *levels)
