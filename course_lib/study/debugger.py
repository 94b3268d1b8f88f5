"""The explorer of the sampling debugger: plant a fault, look at the samples, and read the diagnosis."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from course_lib.debugging import FAULTS, Diagnosis, diagnose, plant
from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import SampleNoise
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.study import pictures, points, style
from course_lib.study.explorer import Explorer

NONE = "none"
LINE = 92  # characters of a diagnosis that fit in one line of the picture


class DebugExplorer(Explorer):
    """Samples of a Denoiser with a planted fault, its error at each level, and what the debugger says.

    models  name -> (a right NetworkDenoiser, data): points (N, 2) or images (N, 1 or 3, H, W); all of one kind
    faults  the keys of FAULTS to choose from; 'none' comes first
    n       samples drawn at a redraw: 300 points, or 24 images
    rows    rows at each level of a diagnosis, as in `diagnose`

    All diagnoses are made when it is built, some 0.4 s each for a small network; a redraw samples only, with DDIM on
    Karras's grid from 20 to 0.02 times the deviation of the data. Raises ValueError for an empty `models`, a wrong
    shape of data, n < 1, and a fault of another name.
    """

    def __init__(
        self,
        models: Mapping[str, tuple[NetworkDenoiser, Tensor]],
        faults: Sequence[str] = tuple(FAULTS),
        n: int | None = None,
        rows: int = 256,
        steps: int = 20,
        seed: int = 0,
    ):
        if not models:
            raise ValueError("models is empty; expected at least one name -> (Denoiser, data)")
        kinds = {data.ndim for _, data in models.values()}
        shapes = [tuple(data.shape) for _, data in models.values()]
        if not (kinds == {2} and all(shape[1] == 2 for shape in shapes)) and not (
            kinds == {4} and all(shape[1] in (1, 3) for shape in shapes)
        ):
            raise ValueError(f"data has the shapes {shapes}; expected points (N, 2) or images (N, 1 or 3, H, W), all of one kind")
        unknown = [name for name in faults if name not in FAULTS]
        if unknown:
            raise ValueError(f"faults holds {unknown[0]!r}; expected keys of FAULTS: {', '.join(FAULTS)}")
        self._plane = kinds == {2}
        self._n = (300 if self._plane else 24) if n is None else n
        if self._n < 1:
            raise ValueError(f"n = {n}; expected at least one sample")
        self._models = dict(models)
        self._read: dict[tuple[str, str], tuple[NetworkDenoiser, Diagnosis]] = {}
        for name, (D, data) in models.items():
            for fault in (NONE, *faults):
                faulty = D if fault == NONE else plant(fault, D)
                raw = D.net if fault == "ema" else None
                self._read[name, fault] = faulty, diagnose(faulty, data, raw, n=rows)
        with style.context():
            self._build()
        super().__init__(
            {
                "model": widgets.Dropdown(options=list(models), description="model"),
                "fault": widgets.Dropdown(options=[NONE, *faults], value=faults[0] if faults else NONE, description="fault"),
                "steps": widgets.IntSlider(steps, min=2, max=60, description="steps"),
                "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
            }
        )

    def _build(self) -> None:
        """Make the artists once: a redraw only moves them."""
        figure = self._figure = pictures.canvas(900, 540)
        figure.set_layout_engine("none")
        self._left = figure.add_axes((0.075, 0.36, 0.355, 0.55))
        if self._plane:
            self._data = points.scatter(self._left, torch.zeros(1, 2), size=8, alpha=0.35, label="data")
            self._samples = points.scatter(self._left, torch.zeros(1, 2), style.COLOURS["warn"], size=10, label="samples")
            self._left.grid(False)
        else:
            self._left.set_axis_off()
            self._samples = self._left.imshow(np.zeros((2, 2, 3), np.uint8), interpolation="nearest")
        self._right = figure.add_axes((0.56, 0.36, 0.42, 0.55))
        self._right.set(xscale="log", yscale="log", xlabel="noise level σ", ylabel="$|D - x_0|^2\\,/\\,d$", title="mean error")
        self._right.minorticks_off()  # each tick takes time to draw
        looks = {
            "as the sampler reads it": {"color": style.COLOURS["warn"], "marker": "o", "markersize": 7},
            "best convention": {"color": style.COLOURS["model"], "linewidth": 3.5},
            "best affine denoiser": {"color": style.COLOURS["exact"], "linestyle": "--", "linewidth": 2},
        }
        self._curves = [self._right.plot([1], [1], label=label, **look)[0] for label, look in looks.items()]
        self._right.legend(loc="lower right", handlelength=1.6, labelspacing=0.25)
        self._words = figure.text(0.02, 0.235, "", ha="left", va="top", fontsize=13, linespacing=1.35)

    def draw(self, model: str, fault: str, steps: int, seed: int) -> bytes:
        """Samples, errors and diagnosis of this model with this fault."""
        D, found = self._read[model, fault]
        data = self._models[model][1]
        deviation = float(data.flatten(1).var(0).mean().sqrt())
        sigmas = karras(steps, 0.02 * deviation, 20 * deviation)
        x = SampleNoise(seed).start((self._n, *data.shape[1:]), sigmas[0]).to(data)
        x = sample(D, x, sigmas)
        self._show_points(x.cpu(), data.cpu()) if self._plane else self._show_images(x.cpu())

        for curve, values in zip(self._curves, (found.errors, found.best, found.linear), strict=True):
            curve.set_data(found.sigmas.numpy(), values.numpy())
        values = torch.cat([found.errors, found.best, found.linear])
        self._right.set(
            xlim=(float(found.sigmas[0]) / 1.2, float(found.sigmas[-1]) * 1.2),
            ylim=(float(values.min()) / 2, float(values.max()) * 2),
        )
        named = ", ".join(found.faults) or "healthy"
        self._words.set_text("\n".join([f"Diagnosis: {named}", *textwrap.wrap(found.words, LINE)]))
        return pictures.render(self._figure)

    def _show_points(self, x: Tensor, data: Tensor) -> None:
        centre, half = data.mean(0), 1.4 * float((data - data.mean(0)).abs().max())
        away = int(((x - centre).abs() > half).any(1).sum())
        self._data.set_offsets(data[:1000].numpy())
        self._samples.set_offsets(x.numpy())
        self._left.set(
            xlim=(float(centre[0]) - half, float(centre[0]) + half),
            ylim=(float(centre[1]) - half, float(centre[1]) + half),
            title=f"{len(x)} samples over the data" + (f" ({away} outside)" if away else ""),
        )

    def _show_images(self, x: Tensor) -> None:
        sheet = pictures.to_rgb(pictures.tile(x, columns=6)[None], "samples")[0]
        self._samples.set_data(sheet)
        self._samples.set_extent((0, sheet.shape[1], sheet.shape[0], 0))
        self._left.set_title(f"{len(x)} samples")
