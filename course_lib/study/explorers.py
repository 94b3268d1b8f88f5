"""The explorers of the first lectures: a schedule at work on a digit, and a run of the reverse process."""

from __future__ import annotations

import math
from collections.abc import Callable

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from course_lib import schedules
from course_lib.devices import SampleNoise
from course_lib.sample import Trajectory, sample
from course_lib.steps import ddim
from course_lib.study import pictures, style
from course_lib.study.explorer import Explorer, keep_share
from course_lib.types import Denoiser, Noise, Step, check_grid
from course_lib.worlds import digits

F64 = torch.float64


class ScheduleExplorer(Explorer):
    """One image at one time of a schedule: x_t, the distribution of its pixels, and where that is on the log-SNR curves.

    image  (1, H, W) in [-1, 1]; by default the first digit. The noise is fixed, so that a slider changes `t` alone.
    """

    DRAWS = 64  # of noise for the histogram: one image has too few pixels for a smooth one
    LIMIT = 14.0  # nats of log-SNR on the axis; t = 0 and t = 1 may lie beyond

    def __init__(self, image: Tensor | None = None):
        image = digits.load("train")[0][0] if image is None else image
        if image.ndim != 3 or image.shape[0] != 1:
            raise ValueError(f"image has shape {tuple(image.shape)}; expected (1, H, W), in grey values from -1 to 1")
        self._image = image.to(F64)
        self._noise = SampleNoise(0)(torch.empty(self.DRAWS, *image.shape, dtype=F64))
        self._schedules = {name: schedules.get(name) for name in schedules.CONTINUOUS}
        self._figure = pictures.canvas(900, 380)
        with style.context():
            self._build()
        names = {"linear": "linear β (DDPM)", "cosine": "cosine", "edm": "EDM", "flow": "flow (straight line)"}
        super().__init__(
            {
                "t": widgets.FloatSlider(0.2, min=0.0, max=1.0, step=0.01, description="time t", readout_format=".2f"),
                "schedule": widgets.Dropdown(
                    options=[(names.get(name, name), name) for name in self._schedules], value="linear", description="schedule"
                ),
            }
        )

    def _build(self) -> None:
        """Make the artists once: a redraw only moves them, since a new layout takes longer than the rest."""
        figure = self._figure
        figure.set_layout_engine("none")
        left = figure.add_axes((0.01, 0.17, 0.2533, 0.6))
        left.set_axis_off()
        left.set_title("$x_t$, clipped to [−1, 1]")
        self._picture = left.imshow(self._image[0].numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")

        self._pixels = figure.add_axes((0.36, 0.17, 0.255, 0.6))
        self._pixels.set(xlabel="pixel value", ylabel="density", title="pixels of $x_t$")
        self._pixels.yaxis.set_label_coords(-0.27, 0.5)  # beyond the widest tick label, so that it never moves
        self._pixels.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 4, 5, 10]))
        zeros = np.zeros(60)
        self._bars = self._pixels.stairs(zeros, np.linspace(-4, 4, 61), fill=True, color=style.COLOURS["data"])
        z = np.linspace(-4, 4, 121)
        normal = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        limit = self._pixels.text(
            0.98,
            0.98,
            "N(0, 1)",
            color=style.COLOURS["warn"],
            transform=self._pixels.transAxes,
            ha="right",
            va="top",
            fontsize=14,
        )
        self._normal = [*self._pixels.plot(z, normal, color=style.COLOURS["warn"]), limit]

        right = figure.add_axes((0.71, 0.17, 0.265, 0.6))
        right.set(
            xlabel="time t",
            ylabel="log SNR (nats)",
            title="signal against noise",
            xlim=(0, 1),
            xticks=[0, 0.5, 1],
            ylim=(-self.LIMIT, self.LIMIT),
        )
        t = torch.linspace(0.001, 0.999, 200, dtype=F64)
        self._curves = {}
        for name, schedule in self._schedules.items():
            (self._curves[name],) = right.plot(t.numpy(), schedule.log_snr(t).numpy(), label=name)
        (self._point,) = right.plot([0], [0], "o", markersize=12, color="black", clip_on=False, zorder=5)
        right.legend(loc="upper right", handlelength=1.2, borderaxespad=0.1, labelspacing=0.25)
        self._line = figure.text(0.5, 0.95, "", ha="center", va="center", fontsize=15)

    def draw(self, t: float, schedule: str) -> bytes:
        """The three panels at time `t` of the schedule of this name."""
        chosen, time = self._schedules[schedule], torch.tensor(t, dtype=F64)
        alpha, std, sigma = (float(f(time)) for f in (chosen.alpha, chosen.std, chosen.sigma))
        x = chosen.add_noise(self._image, time, self._noise)  # (DRAWS, 1, H, W)
        self._picture.set_data(x[0, 0].clamp(-1, 1).numpy())

        half = _double(4.0, alpha + 3 * std)
        density, edges = np.histogram(x.numpy(), bins=60, range=(-half, half), density=True)
        self._bars.set_data(density, edges)
        self._pixels.set(xlim=(-half, half), ylim=(0, _double(2.5 / half, float(density.max()))))
        vanishes = float(chosen.alpha(torch.tensor(chosen.t_max))) < 0.1  # the signal does, so x_t tends to N(0, 1)
        for artist in self._normal:
            artist.set_visible(vanishes)

        for name, curve in self._curves.items():
            curve.set(linewidth=4.5 if name == schedule else 1.8, alpha=1.0 if name == schedule else 0.6)
        log_snr = max(-self.LIMIT, min(self.LIMIT, float(chosen.log_snr(time))))
        self._point.set_data([t], [log_snr])
        self._line.set_text(
            f"{schedule}, t = {t:.2f}:   α = {_number(alpha)}   std = {_number(std)}   σ = {_number(sigma)}   "
            f"SNR = {_number(float(chosen.snr(time)))}"
        )
        return pictures.render(self._figure)


class ReverseExplorer(Explorer):
    """A run of the reverse process, level by level: the state x_t above what D believes the clean images to be.

    D        any Denoiser of (B, *shape) on `device`, shape (C, H, W) with C = 1 or 3
    n        images, drawn from `SampleNoise(seed)`, so that image i does not depend on n
    sigmas   a grid, or a function n_steps -> grid; `karras` by default. A grid leaves no "steps" control
    step     how to move; for a stochastic step give its factory as `noisy_step`, for example `ddpm`, so that
             each run draws its noise from `SampleNoise(seed)` anew

    It samples when built and when "steps" or "seed" changes, calling D once a level where `step` does.
    """

    def __init__(
        self,
        D: Denoiser,
        title: str,
        n: int = 6,
        sigmas: Tensor | Callable[[int], Tensor] | None = None,
        seed: int = 0,
        step: Step = ddim,
        noisy_step: Callable[[Noise], Step] | None = None,
        shape: tuple[int, int, int] = digits.SHAPE,
        device: torch.device | str = "cpu",
    ):
        if n < 1:
            raise ValueError(f"n = {n}; expected at least one image")
        self._D, self._title, self._shape, self._device = D, title, (n, *shape), device
        self._make_step = noisy_step or (lambda noise: step)
        fixed = check_grid(sigmas) if isinstance(sigmas, Tensor) else None
        self._make_grid = (lambda steps: fixed) if fixed is not None else sigmas or schedules.karras
        self._ran: tuple[int, int] | None = None
        with style.context():
            self._build()
        steps = 20 if fixed is None else len(fixed) - 1
        level = widgets.IntSlider(steps // 2, min=0, max=steps, description="level")
        controls = {"level": level, "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed")}
        if fixed is None:
            controls["steps"] = widgets.IntSlider(steps, min=1, max=60, description="steps")
            keep_share(level, controls["steps"])
        super().__init__(controls)

    def _build(self) -> None:
        n, _, H, W = self._shape
        label, head, foot = 90, 56, 44
        scale = max(1, (pictures.WIDTH - label) // (n * (W + 1) - 1))
        width, height = (n * (W + 1) - 1) * scale, H * scale
        total = label + max(width, 480), head + 2 * height + 8 + foot
        self._figure = pictures.canvas(*total)
        self._figure.set_layout_engine("none")
        blank = np.zeros((H, n * (W + 1) - 1, 3), np.uint8)
        self._rows = []
        for name, bottom in (("$x_t$", foot + height + 8), (r"$\hat{x}_0$", foot)):
            axes = self._figure.add_axes((label / total[0], bottom / total[1], width / total[0], height / total[1]))
            axes.set_axis_off()
            self._rows.append(axes.imshow(blank, interpolation="nearest", vmin=0, vmax=255))
            self._figure.text(label / 2 / total[0], (bottom + height / 2) / total[1], name, ha="center", va="center", fontsize=20)
        middle = (label + width / 2) / total[0]
        self._heading = self._figure.text(middle, 1 - head / 2 / total[1], "", ha="center", va="center", fontsize=15)
        caption = "$x_t$ is shown as $x / \\sqrt{1 + \\sigma^2}$, and both rows are clipped to [−1, 1]"
        self._figure.text(middle, foot / 2 / total[1], caption, ha="center", va="center", fontsize=12)

    @torch.no_grad()
    def _run(self, steps: int, seed: int) -> None:
        sigmas, noise = check_grid(self._make_grid(steps)), SampleNoise(seed)
        x = noise.start(self._shape, sigmas[0], device=self._device)
        D = _Remembered(self._D)
        record = _Estimates(D, x, sigmas[0])
        sample(D, x, sigmas, self._make_step(noise), on_step=record)
        self._record, self._ran = record, (steps, seed)

    def draw(self, level: int, seed: int, steps: int = 0) -> bytes:
        """States and estimates at grid point `level` of the run with this `seed` and number of `steps`."""
        if self._ran != (steps, seed):
            self._run(steps, seed)
        level = min(level, len(self._record.sigmas) - 1)
        sigma = self._record.sigmas[level]
        shown = (self._record.states[level] / math.sqrt(1 + sigma**2), self._record.estimates[level])
        for row, images in zip(self._rows, shown, strict=True):
            row.set_data(pictures.to_rgb(pictures.tile(images, columns=len(images))[None], "x")[0])
        self._heading.set_text(f"{self._title}:   σ = {_number(sigma)}   (level {level} of {len(self._record.sigmas) - 1})")
        return pictures.render(self._figure)


class _Remembered:
    """A Denoiser that keeps its last answer, so that looking at D(x, sigma) before a step costs no second call."""

    def __init__(self, D: Denoiser):
        self._D, self._last = D, None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x or not torch.equal(self._last[1], sigma):
            self._last = (x, sigma, self._D(x, sigma))
        return self._last[2]


class _Estimates(Trajectory):
    """A trajectory that records D(x, sigma) at each level as well; at sigma = 0 that is x itself."""

    def __init__(self, D: Denoiser, x: Tensor, sigma: Tensor):
        super().__init__(x, sigma)
        self._D, self.estimates = D, [D(x, sigma).cpu()]

    def __call__(self, x: Tensor, sigma: Tensor) -> None:
        super().__call__(x, sigma)
        self.estimates.append((self._D(x, sigma) if sigma > 0 else x).detach().cpu())


def _double(start: float, least: float) -> float:
    """`start`, doubled until it is at least `least`: axes that rarely move."""
    return start * 2 ** max(0, math.ceil(math.log2(least / start)))


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value + 0.0:.3g}"  # + 0.0 takes the sign from -0
