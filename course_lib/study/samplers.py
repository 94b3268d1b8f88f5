"""Samplers at equal cost: the paths of particles in the plane, and the pictures of a network, at one setting."""

from __future__ import annotations

import functools
import io
import math
import time
from collections.abc import Iterator
from typing import Any

import ipywidgets as widgets
import matplotlib
import numpy as np
import plotly.graph_objects as go  # loads the figure's widget when it is first made, not here
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image as pillow
from torch import Tensor

from course_lib import metrics
from course_lib.denoisers import Counted
from course_lib.devices import SampleNoise, generator, one_thread
from course_lib.gaussians import Mixture
from course_lib.sample import Trajectory, sample
from course_lib.study import live, pictures, points, style
from course_lib.study.explorer import Panel
from course_lib.study.particles import AXES
from course_lib.study.settings import GRIDS, RULES, Run, Setting
from course_lib.types import Denoiser
from course_lib.worlds import digits

F64 = torch.float64
Array = np.ndarray

WIDTH, HEIGHT, SIDE = 540, 672, 460  # of the figure, and of the square in it, in screen pixels
LEFT, TOP = 66, 92  # of the square's corner
LEGEND = ((8 - LEFT) / SIDE, -60 / SIDE)  # its top-left corner, in sides from the square's lower left corner
BLOCK = (350, 250)  # largest width and height of a block of pictures, three in a row
HEADS = (TOP, 396)  # where the two blocks begin, each with its title above

MARKS = (("noise", "circle", "o"), ("model", "square", "s"), ("guide", "triangle-up", "^"), ("warn", "diamond", "D"))
"""For each component in turn: role of its colour, its mark in plotly and in matplotlib; none is blue, as the density is."""


class SamplerExplorer(Panel):
    """A sampler, a number of network calls and a grid: paths in the plane, how far from exact they end, and pictures.

    mixture    a `Mixture` in the plane, whose denoiser, flow and samples are exact
    D          a Denoiser of (n, *shape), fp32, on `device`, shape (C, H, W) with C = 1 or 3
    particles  shown, of SET; they start from the mixture noised to `high`, the pictures from high N(0, I); all end at `low`

    A run takes as many steps as the calls pay for; a grid that begins below `high` begins with the same noise, made smaller,
    as samplers do. States are shown as x / sqrt(1 + sigma^2). Without noise the distance
    is the mean to the exact ends, `Mixture.reference_flow` from the same starts; with noise it is the sliced Wasserstein
    distance of SET points to as many exact ones, beside what two exact sets have. Pictures are compared (root mean square;
    white minus black is 2) with a run of ANSWER calls from the same noise. Particles are redrawn first. The pictures
    follow, unless another change comes meanwhile. `figure` is the plotly widget; `poster()` draws all by matplotlib.

    Raises ValueError for a mixture that is not in the plane, a D whose answer has another shape, n or particles out of
    range, and unless 0 < low < high.
    """

    DENSITY, BANDS = 72, 10  # points on a side of the lattice of the density, and its contours
    SET = 1000  # points whose distribution is measured
    CALLS = (3, 40)  # DPM-Solver-3 takes three a step
    KEPT = 64  # runs that are kept
    SLICE = 0.1  # s of a run of pictures between two looks for another change
    ANSWER = 32  # of UniPC-3 on Karras's grid: on the course's digits its run of 64 calls differs by 0.001

    def __init__(
        self,
        mixture: Mixture,
        D: Denoiser,
        n: int = 6,
        particles: int = 40,
        seed: int = 0,
        high: float = 15.0,
        low: float = 0.02,
        shape: tuple[int, int, int] = digits.SHAPE,
        device: torch.device | str = "cpu",
    ):
        if mixture.dim != 2:
            raise ValueError(f"mixture is in {mixture.dim} dimensions; expected 2")
        if n < 1:
            raise ValueError(f"n = {n}; expected at least one picture")
        if not 1 <= particles <= self.SET:
            raise ValueError(f"particles = {particles}; expected a number from 1 to {self.SET}")
        if not 0 < low < high:
            raise ValueError(f"low = {low}, high = {high}; expected 0 < low < high")
        self._mixture, self._D, self._device = mixture, D, device
        self._particles, self._shape, self._low, self._high = particles, (n, *shape), low, high
        self.start = functools.lru_cache(maxsize=8)(self._start)
        self.ends = functools.lru_cache(maxsize=8)(self._ends)
        self.run = functools.lru_cache(maxsize=self.KEPT)(self._run)
        self._arrived: dict[Setting, Tensor] = {}
        self._way: tuple[Setting, Iterator[Tensor | None]] | None = None  # a run of pictures that waits
        self._drawn: Setting | None = None  # as particles
        self._followed: Setting | None = None  # as pictures
        std = mixture.covs.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        half = max(3.0, float((mixture.means.abs() + 3 * std).max()))  # N(0, I) and all components to three deviations
        self.extent = (-half, half, -half, half)
        self._build()
        with style.context():
            self._build_pictures()

        controls = {
            "sampler": widgets.Dropdown(options=list(RULES), value="DPM-Solver++(2M)", description="sampler"),
            "calls": widgets.IntSlider(12, min=self.CALLS[0], max=self.CALLS[1], description="calls"),
            "grid": widgets.Dropdown(options=list(GRIDS), description="grid"),
            "eta": widgets.FloatSlider(1.0, min=0.0, max=1.0, step=0.1, description="η", readout_format=".1f"),
            "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
        }
        controls["calls"].tooltip = "calls of the network; a step takes one, two or three"
        controls["eta"].tooltip = "share of fresh noise, of samplers that leave the choice"
        wrap = widgets.Layout(flex_flow="row wrap", align_items="flex-start")
        super().__init__(controls, widgets.HBox([self.figure, self.picture], layout=wrap))

    # --- what is shown ----------------------------------------------------------------------------

    def _start(self, seed: int) -> Tensor:
        """Exact draws at the highest level, (SET, 2) float64; the first are shown."""
        return self._mixture.sample(self.SET, generator(seed, 0), self._high)

    def _ends(self, seed: int) -> Tensor:
        """Where the exact flow carries the shown particles, (particles, 2)."""
        return self._mixture.reference_flow(self.start(seed)[: self._particles], self._high, self._low, tolerance=1e-8)

    @functools.cached_property
    def _floor(self) -> tuple[float, float]:
        """Sliced Wasserstein distance of two exact sets: mean and standard deviation."""
        return metrics.sliced_wasserstein_floor(lambda n, source: self._mixture.sample(n, source, self._low), self.SET)

    @torch.no_grad()
    def _run(self, setting: Setting) -> Run:
        levels, source, shown = setting.levels(self._low, self._high), generator(setting.seed, 1), self._particles
        step = setting.step(lambda x: torch.randn(x.shape, generator=source, dtype=x.dtype))
        D = _Counted(self._mixture.denoiser)
        with one_thread():
            x = self.start(setting.seed)[: self.SET if setting.noisy else shown] * (levels[0] / self._high)
            record = Trajectory(x, levels[0])
            reached = sample(D, x, levels, step, on_step=record)
            exact = None if setting.noisy else self.ends(setting.seed)
            component = self._component(reached[:shown] if exact is None else exact)
            said = self._of_set(reached) if exact is None else self._of_flow(reached, exact)
        scale = (1 + torch.tensor(record.sigmas, dtype=F64) ** 2).rsqrt()
        scaled = (record.x[:, :shown] * scale[:, None, None]).numpy()
        return Run(scaled, record.sigmas, D.calls, component, None if exact is None else (exact * scale[-1]).numpy(), said)

    def _component(self, x: Tensor) -> Array:
        return self._mixture.responsibilities(x, self._low).argmax(1).numpy()

    def _of_flow(self, reached: Tensor, exact: Tensor) -> str:
        far = float((reached - exact).norm(dim=1).mean())
        astray = int((self._component(reached) != self._component(exact)).sum())
        return f"{far:.2g} from the exact end, {astray} of {len(exact)} in another component"

    def _of_set(self, reached: Tensor) -> str:
        mean, spread = self._floor
        far = metrics.sliced_wasserstein(reached, self._mixture.sample(self.SET, generator(2), self._low))
        return f"sliced Wasserstein {far:.3f} (exact sets {mean:.3f} ± {spread:.3f})"

    def _walk(self, setting: Setting) -> Iterator[Tensor | None]:
        """The run of the pictures, which pauses after each step with None, and ends with (n, C, H, W) on the CPU."""
        levels, noise = setting.levels(self._low, self._high), SampleNoise(setting.seed)
        x = noise.start(self._shape, levels[0], device=self._device)
        D, step, memory = _Counted(self._D), setting.step(noise), None

        def go_on(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, _: Any) -> tuple[Tensor, Any]:
            nonlocal memory
            x, memory = step(D, x, sigma, sigma_next, memory)
            return x, None

        for pair in levels.unfold(0, 2, 1):
            x = sample(D, x, pair, go_on)
            yield None
        yield x.cpu()

    def images(self, setting: Setting, seconds: float = math.inf) -> Tensor | None:
        """The pictures of this setting; None where they take longer, and then the next call goes on with the run."""
        if setting not in self._arrived:
            way = self._way if self._way is not None and self._way[0] == setting else (setting, self._walk(setting))
            self._way, end = None, time.monotonic() + seconds
            for found in way[1]:
                if found is not None:
                    while len(self._arrived) >= self.KEPT:
                        del self._arrived[next(iter(self._arrived))]
                    self._arrived[setting] = found
                elif time.monotonic() > end:
                    self._way = way
                    return None
        return self._arrived[setting]

    def _answer(self, seed: int) -> Setting:
        """What the pictures are compared with."""
        return Setting("UniPC-3", self.ANSWER, "Karras", 0.0, seed)

    def _heading(self, setting: Setting, run: Run) -> tuple[str, str, str]:
        """The sampler, what it spends and on which grid, and how far from exact it ends."""
        rule, steps = setting.rule, setting.steps
        share = f", η = {setting.eta:.1f}" if rule.noise == "eta" else ""
        each = f" × {rule.each} = {run.calls}" if rule.each > 1 else f", {run.calls}"
        unspent = f" of {setting.calls}" if run.calls < setting.calls else ""
        cost = f"{steps} step{'s' * (steps > 1)}{each}{unspent} calls, {setting.grid}"
        return f"{setting.sampler.partition(' with η')[0]}{share}", cost, run.said

    def _legend(self, run: Run) -> str:
        whose = "reached" if run.exact is None else "of the exact end"
        return f"{self._particles} particles; colours: component {whose}"

    def _paths(self, run: Run) -> list[Array]:
        """The states (levels, n, 2) of the particles of each component."""
        return [run.scaled[:, run.component == k] for k in range(len(self._mixture.weights))]

    def _gaps(self, run: Run) -> Array:
        """Lines from where each particle is to where it should be, parted by nan; none without exact ends."""
        return np.zeros((0, 2)) if run.exact is None else live.parted(np.stack([run.scaled[-1], run.exact]))

    def _log_density(self, place: Tensor) -> Tensor:
        """log p at the lowest level at the place x / sqrt(1 + sigma^2), less its largest value there."""
        log_p = self._mixture.log_prob(place * math.sqrt(1 + self._low**2), self._low)
        return log_p - log_p.max()

    # --- the live figure --------------------------------------------------------------------------

    def _build(self) -> None:
        """Make the figure and its traces once; a redraw only fills them."""
        left, right, bottom, top = self.extent
        x, y = np.linspace(left, right, self.DENSITY), np.linspace(bottom, top, self.DENSITY)
        place = torch.from_numpy(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2))
        shades = live.contours(x, y, bands=self.BANDS, opacity=0.6)
        z = np.round((self._log_density(place) / 2).exp().reshape(len(y), len(x)).numpy(), 3)  # it travels as text
        shades.update(z=z, name=f"density at σ = {self._low:g}", legendrank=1002)
        colours = style.COLOURS
        ring = {"color": colours["muted"], "symbol": "circle-open", "size": 11, "line": {"width": 1.5}}
        traces = {
            "density": shades,
            "gaps": live.lines(colours["muted"], 1.5, 1.0, showlegend=False).update(line_dash="dot"),
            "exact": go.Scatter(mode="markers", marker=ring, name="exact end", hoverinfo="skip", legendrank=1001),
        }
        for k in range(len(self._mixture.weights)):
            role, symbol, _ = MARKS[k % len(MARKS)]
            traces[f"component {k + 1}"] = go.Scatter(
                mode="lines+markers",
                line={"width": 1.4},
                marker={"color": colours[role], "symbol": symbol, "opacity": 1},
                name=str(k + 1),
                hovertemplate=f"σ = %{{customdata:.3g}}<extra>component {k + 1}</extra>",
            )
        margin = {"l": LEFT, "r": WIDTH - LEFT - SIDE, "b": HEIGHT - TOP - SIDE, "t": TOP, "autoexpand": False}
        layout = live.layout(self.extent, AXES, {"width": WIDTH, "height": HEIGHT, "margin": margin})
        layout["legend"] |= {"orientation": "h", "x": LEGEND[0], "y": LEGEND[1], "yanchor": "top", "traceorder": "normal"}
        layout["xaxis"]["title"]["standoff"] = 10
        self.figure = live.figure_type()(list(traces.values()), layout)
        self._traces = dict(zip(traces, self.figure.data, strict=True))

    def _show(self, values: dict[str, Any]) -> None:
        """Redraw the particles, then ask for another redraw, and another, each of which goes on with the pictures."""
        setting, first = Setting.of(values), self._drawn is None
        self.controls["eta"].disabled = setting.rule.noise != "eta"
        if setting != self._drawn:
            self._show_particles(setting)
            if not first:
                self._changed(None)
                return
        if setting != self._followed:
            patience = math.inf if first else self.SLICE
            if all(self.images(one, patience) is not None for one in (setting, self._answer(setting.seed))):
                self._show_pictures(setting)
            else:
                self._changed(None)

    def _show_particles(self, setting: Setting) -> None:
        run = self.run(setting)
        updates = {"gaps": live.xy(self._gaps(run)), "exact": live.xy(np.zeros((0, 2)) if run.exact is None else run.exact)}
        levels = len(run.sigmas)
        for k, paths in enumerate(self._paths(run)):
            n, colour = paths.shape[1], style.COLOURS[MARKS[k % len(MARKS)][0]]
            red, green, blue = (round(255 * c) for c in matplotlib.colors.to_rgb(colour))
            size, edge = np.full(levels + 1, 3.5, np.float32), np.zeros(levels + 1, np.float32)
            size[-2:], edge[-2:] = 10, 1  # the end, and the gap behind it
            updates[f"component {k + 1}"] = {
                **live.xy(live.parted(paths)),
                "line": {"color": f"rgba({red},{green},{blue},{run.ink})"},
                "customdata": np.tile(np.float32([*run.sigmas, 0]), n),
                "marker": {"size": np.tile(size, n), "line": {"color": "white", "width": np.tile(edge, n)}},
            }
        name, *small = self._heading(setting, run)
        with self.figure.batch_update():
            for trace, update in updates.items():
                self._traces[trace].update(update)
            lines = [name, *(f'<span style="font-size:15px">{line}</span>' for line in small)]
            self.figure.layout.title.text = "<br>".join(lines)
            self.figure.layout.legend.title = {"text": self._legend(run), "side": "top", "font": {"size": 14}}
        self._drawn = setting

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        self.figure.send_state(["_widget_data", "_widget_layout"])  # what was drawn before the page could listen
        return bundle

    # --- the pictures -----------------------------------------------------------------------------

    def _build_pictures(self) -> None:
        """Make the artists once; a redraw only fills them."""
        width = pictures.WIDTH - WIDTH
        self.picture = widgets.Image(format="png", layout=widgets.Layout(width=f"{width}px", height=f"{HEIGHT}px"))
        self._canvas = pictures.canvas(width, HEIGHT)
        self._canvas.set_layout_engine("none")
        n, _, H, W = self._shape
        columns = min(n, 3)
        across, down = columns * (W + 1) - 1, math.ceil(n / columns) * (H + 1) - 1
        scale = min(BLOCK[0] / across, BLOCK[1] / down)
        scale = math.floor(scale) if scale >= 1 else scale  # whole screen pixels, but for pictures larger than the block
        self._blocks = []
        for top in HEADS:
            box = (0, 1 - (top + down * scale) / HEIGHT, across * scale / width, down * scale / HEIGHT)
            axes = self._canvas.add_axes(box)
            axes.set_axis_off()
            block = axes.imshow(np.zeros((down, across, 3), np.uint8), interpolation="nearest", aspect="auto")
            title = self._canvas.text(0, 1 - (top - 8) / HEIGHT, "", ha="left", va="bottom", fontsize=13)
            self._blocks.append((block, title))

    def _show_pictures(self, setting: Setting) -> None:
        images, answer, calls = self.images(setting), self.images(self._answer(setting.seed)), self.run(setting).calls
        off = float((images - answer).square().mean().sqrt())
        said = "fresh noise: other pictures" if setting.noisy else f"{off:.3f} off those below (rms)"
        titles = (f"the network, {calls} calls:\n{said}", f"the flow, {self.ANSWER} calls of UniPC-3:")
        for (block, title), shown, text in zip(self._blocks, (images, answer), titles, strict=True):
            block.set_data(pictures.to_rgb(pictures.tile(shown, columns=min(len(shown), 3))[None], "pictures")[0])
            title.set_text(text)
        self.picture.value = pictures.render(self._canvas)
        self._followed = setting

    # --- the poster -------------------------------------------------------------------------------

    def poster(self) -> bytes:
        """The paths drawn by matplotlib, beside the pictures, as PNG."""
        if self._followed != self._drawn:
            self._show_pictures(self._drawn)
        run, figure, colours = self.run(self._drawn), pictures.canvas(WIDTH, HEIGHT), style.COLOURS
        with style.context():
            figure.set_layout_engine("none")
            ax = figure.add_axes((LEFT / WIDTH, 1 - (TOP + SIDE) / HEIGHT, SIDE / WIDTH, SIDE / HEIGHT))
            points.density(ax, self._log_density, self.extent, levels=self.BANDS).set_alpha(0.6)
            legend = {}
            for k, paths in enumerate(self._paths(run)):
                role, _, mark = MARKS[k % len(MARKS)]
                line = {"color": colours[role], "linewidth": 1.2, "alpha": run.ink}
                ax.plot(*live.parted(paths).T, **line, marker=".", markersize=4, zorder=2)
                ax.plot(*paths[-1].T, mark, color=colours[role], markersize=7, markeredgecolor="white", zorder=4)
                legend[str(k + 1)] = Line2D([], [], color=colours[role], linewidth=1.2, marker=mark, markersize=7)
            if run.exact is not None:
                ax.plot(*self._gaps(run).T, ":", color=colours["muted"], linewidth=1.4, zorder=3)
                ring = {"color": colours["muted"], "markersize": 8, "fillstyle": "none", "markeredgewidth": 1.2}
                legend["exact end"] = ax.plot(*run.exact.T, "o", **ring, zorder=3)[0]
            legend[f"density at σ = {self._low:g}"] = Patch(color=matplotlib.colormaps[style.DENSITY](0.5))
            points.plane(ax, self.extent, AXES)
            where = {"loc": "upper left", "bbox_to_anchor": LEGEND, "borderaxespad": 0, "alignment": "left"}
            spaced = {"ncols": len(legend), "columnspacing": 1.0, "handlelength": 1.4, "handletextpad": 0.4, "fontsize": 12}
            ax.legend(legend.values(), legend, title=self._legend(run), **where, **spaced, title_fontsize=12)
            for text, y, size in zip(self._heading(self._drawn, run), (10, 38, 62), (14, 12, 12), strict=True):
                figure.text(0.01, 1 - y / HEIGHT, text, ha="left", va="top", fontsize=size)
            sheet = pillow.new("RGB", (pictures.WIDTH, HEIGHT), "white")
            for x, drawn in ((0, pictures.render(figure)), (WIDTH, self.picture.value)):
                sheet.paste(pillow.open(io.BytesIO(drawn)).convert("RGB"), (x, 0))
        return pictures.small_png(sheet)


class _Counted(Counted):
    """A Denoiser that counts its calls, and is refused where its answer has another shape: that would broadcast unseen."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        x0 = super().__call__(x, sigma)
        if x0.shape != x.shape:
            raise ValueError(f"D returned shape {tuple(x0.shape)} for x of shape {tuple(x.shape)}; expected the same")
        return x0
