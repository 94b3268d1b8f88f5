"""Particles in the plane on their way from noise to data, above the score that moves them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets
import matplotlib
import numpy as np
import plotly.graph_objects as go  # loads the figure's widget when it is first made, not here
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from course_lib import schedules
from course_lib.devices import SampleNoise, one_thread
from course_lib.gaussians import Mixture
from course_lib.sample import Trajectory, sample
from course_lib.steps import ddim, ddpm
from course_lib.study import live, pictures, points, style
from course_lib.study.explorer import Panel, keep_share
from course_lib.types import Denoiser, Noise, Step, check_grid

F64 = torch.float64
Array = np.ndarray

SAMPLERS: dict[str, Callable[[Noise], Step]] = {
    "DDIM": lambda noise: ddim,
    "DDPM, small variance": lambda noise: ddpm(noise, "small"),
    "DDPM, large variance": lambda noise: ddpm(noise, "large"),
}
"""What the menu "sampler" offers: name -> step factory."""

AXES = ("x₁ / √(1 + σ²)", "x₂ / √(1 + σ²)")
WIDTH, HEIGHT, SIDE = 900, 600, 500  # of the figure, and of the square in it, in screen pixels
LEFT, BOTTOM = 66, 56  # of the square's corner

INK = {"density": 0.6, "score": 0.8}
"""Name -> opacity of what lies below the particles."""

LINES = {"tails": ("model", 1.0, 0.4), "trails": ("noise", 2.0, 1.0)}
"""Name -> role of its colour, width in screen pixels, opacity."""


@dataclass(frozen=True)
class Run:
    """A run of a sampler: states x (levels, n, 2), the same divided by sqrt(1 + sigma^2), and its levels, all float64."""

    x: Array
    scaled: Array
    sigmas: list[float]


@dataclass(frozen=True)
class Field:
    """The score on a lattice at one level: places (N, 2) of the axes, score (N, 2), arrows (N, 2) of the axes, centred.

    `cell` is the size of the score whose arrow is as long as a cell, and so the longest.
    """

    places: Array
    score: Array
    arrows: Array
    cell: float


class ParticleExplorer(Panel):
    """Particles of a sampling run in the plane at one noise level, their trails, the score, and the density where it is known.

    D        a Denoiser of (B, 2), fp32, on `device`; or a `Mixture`, whose denoiser, score and density are then exact
    data     points (N, 2), of which at most 600 are shown; or the `Mixture` that D was trained on, for its density
    n        particles, drawn from `SampleNoise(seed)`, so that particle i does not depend on n
    sigmas   a falling grid, or a function n_steps -> grid; `karras` by default. A grid leaves no "steps" control
    extent   (left, right, bottom, top) of the axes; by default a square around the origin that holds noise and data

    Everything is shown as x / sqrt(1 + sigma^2), which keeps the size of the picture, each point of a trail by its
    own sigma. Arrows are the score (D(x, sigma) - x) / sigma^2; their lengths are to scale at a level, cut as in
    `points.field`. At sigma = 0 a Denoiser has no score. A (steps, seed, sampler) is run once; a level only moves
    what is drawn. `figure` is the plotly widget; `poster()` draws the same by matplotlib.

    Raises ValueError for a D or data that is not in the plane, and for n < 1.
    """

    FOLLOWED = 5  # the last particles, whose whole trail is drawn; that of every particle would hide the rest
    TAIL = 2  # steps of the trail of all others
    ARROWS = 17  # on a side of the lattice
    DENSITY = 72  # points on a side of the lattice of the density; the contours between them are interpolated
    BANDS = 10  # of the density, evenly spaced in sqrt(p), as in `points.density`
    DATA = 600

    def __init__(
        self,
        D: Denoiser | Mixture,
        data: Tensor | Mixture | None = None,
        n: int = 300,
        sigmas: Tensor | Callable[[int], Tensor] | None = None,
        seed: int = 0,
        extent: points.Extent | None = None,
        device: torch.device | str = "cpu",
    ):
        if n < 1:
            raise ValueError(f"n = {n}; expected at least one particle")
        exact = D if isinstance(D, Mixture) else None
        density = exact if data is None or isinstance(data, Tensor) else data
        for name, mixture in (("D", exact), ("data", density)):
            if mixture is not None and mixture.dim != 2:
                raise ValueError(f"{name} is a mixture in {mixture.dim} dimensions; expected 2")
        if isinstance(data, Tensor) and (data.ndim != 2 or data.shape[1] != 2 or len(data) == 0):
            raise ValueError(f"data has shape {tuple(data.shape)}; expected (N, 2) with N >= 1")
        self._exact, self._density_of, self._n, self._device = exact, density, n, device
        self._D = _checked(exact.denoiser if exact is not None else D)
        self._data = data[: self.DATA].detach().cpu().double().numpy() if isinstance(data, Tensor) else None
        fixed = check_grid(sigmas) if isinstance(sigmas, Tensor) else None
        self._make_grid = (lambda steps: fixed) if fixed is not None else sigmas or schedules.karras
        self.extent = extent or self._square(data)
        self.run = functools.lru_cache(maxsize=32)(self._run)
        self.field = functools.lru_cache(maxsize=128)(self._field)
        self.density = functools.lru_cache(maxsize=128)(self._density)
        self._build()

        steps = 20 if fixed is None else len(fixed) - 1
        controls = {
            "level": widgets.IntSlider(round(0.65 * steps), min=0, max=steps, description="level"),
            "sampler": widgets.Dropdown(options=list(SAMPLERS), description="sampler"),
            "seed": widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
        }
        if fixed is None:
            controls["steps"] = widgets.IntSlider(steps, min=1, max=60, description="steps")
            keep_share(controls["level"], controls["steps"])
        super().__init__(controls, self.figure)

    # --- what is shown ----------------------------------------------------------------------------

    def _square(self, data: Tensor | Mixture | None) -> points.Extent:
        """The square around the origin that holds N(0, I) to three deviations, the data, and the mixtures."""
        reach = [3.0]
        for mixture in {self._exact, self._density_of} - {None}:
            std = mixture.covs.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
            reach.append(float((mixture.means.abs() + 3 * std).max()))
        if isinstance(data, Tensor):
            reach.append(1.05 * float(data.abs().max()))
        half = max(reach)
        return (-half, half, -half, half)

    @torch.no_grad()
    def _run(self, steps: int, seed: int, sampler: str) -> Run:
        sigmas, noise = check_grid(self._make_grid(steps)), SampleNoise(seed)
        if sigmas[0] < sigmas[-1]:
            raise ValueError(f"sigmas rises from {sigmas[0]:.3g} to {sigmas[-1]:.3g}; expected a falling grid")
        x = noise.start((self._n, 2), sigmas[0], device=self._device)
        record = Trajectory(x, sigmas[0])
        with one_thread():
            sample(self._D, x, sigmas, SAMPLERS[sampler](noise), on_step=record)
        x = record.x.double()
        scaled = x / (1 + torch.tensor(record.sigmas, dtype=F64) ** 2).sqrt()[:, None, None]
        return Run(x.numpy(), scaled.numpy(), record.sigmas)

    @torch.no_grad()
    def _score(self, x: Tensor, sigma: float) -> Tensor:
        """(D(x, sigma) - x) / sigma^2 at x (N, 2) float64; of a `Mixture` as it is, since the difference loses digits."""
        if self._exact is not None:
            return self._exact.score(x, sigma)
        seen = x.to(self._device, torch.float32)
        return ((self._D(seen, torch.tensor(sigma, dtype=F64)) - seen) / sigma**2).cpu().double()

    def _field(self, sigma: float) -> Field | None:
        """The score at one level, or None where there is none: at sigma = 0, but for a mixture that has a density there."""
        if sigma == 0 and (self._exact is None or not _smooth(self._exact)):
            return None
        scores = []

        def score(place: Tensor) -> Tensor:
            scores.append(self._score(place * math.sqrt(1 + sigma**2), sigma))
            return scores[0]

        figure = pictures.canvas(100, 100)  # the lengths of the arrows are decided in one place, points.field
        with one_thread():
            drawn = points.field(figure.add_subplot(), score, self.extent, n=self.ARROWS)
        arrows = np.stack([drawn.U, drawn.V], -1) / drawn.scale
        size, length = np.linalg.norm(scores[0], axis=1), np.linalg.norm(arrows, axis=1)
        longest = length.max()
        cell = float(size[length > 0.999 * longest].min()) if longest > 0 else 0.0
        return Field(np.asarray(drawn.XY), scores[0].numpy(), arrows, cell)

    def _log_density(self, place: Tensor, sigma: float) -> Tensor:
        """log p_sigma at the place x / sqrt(1 + sigma^2), less its largest value there."""
        log_p = self._density_of.log_prob(place * math.sqrt(1 + sigma**2), sigma)
        return log_p - log_p.max()

    def _density(self, sigma: float) -> Array | None:
        """sqrt(p_sigma) over its largest value, (DENSITY, DENSITY); None without a mixture, or where it has no density."""
        if self._density_of is None or (sigma == 0 and not _smooth(self._density_of)):
            return None
        x, y = (torch.as_tensor(axis) for axis in self._lattice())
        place = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
        with one_thread():
            log_p = self._log_density(place, sigma)
        return np.round((log_p / 2).exp().reshape(len(y), len(x)).numpy(), 3)  # it travels as text

    def _lattice(self) -> tuple[Array, Array]:
        left, right, bottom, top = self.extent
        return np.linspace(left, right, self.DENSITY), np.linspace(bottom, top, self.DENSITY)

    def _trails(self, run: Run, level: int) -> dict[str, Array]:
        """Lines (N, 2) parted by nan: all of the way of those that are followed, and the last steps of the others."""
        past = run.scaled[: level + 1]
        return {"tails": live.parted(past[-self.TAIL - 1 :, : -self.FOLLOWED]), "trails": live.parted(past[:, -self.FOLLOWED :])}

    def _data_at(self, sigma: float) -> Array:
        return self._data / math.sqrt(1 + sigma**2)

    def _heading(self, run: Run, level: int, sampler: str) -> str:
        return f"σ = {run.sigmas[level]:.3g}   (level {level} of {len(run.sigmas) - 1}, {sampler})"

    # --- the live figure --------------------------------------------------------------------------

    def _build(self) -> None:
        """Make the figure and its traces once; a redraw only fills them."""
        colours = style.COLOURS
        said = "x = (%{customdata[0]:.3g}, %{customdata[1]:.3g})<br>x / √(1 + σ²) = (%{x:.3f}, %{y:.3f})"
        traces = {
            "density": live.contours(*self._lattice(), bands=self.BANDS, opacity=INK["density"]),
            "data": go.Scatter(mode="markers", marker={"color": colours["data"], "size": 4, "opacity": 0.5}, hoverinfo="skip"),
            **live.arrows(self._arrow_colour, INK["score"]),
            **{name: live.lines(colours[colour], width, opacity) for name, (colour, width, opacity) in LINES.items()},
            "particles": go.Scatter(
                mode="markers",
                marker={"color": self._colours, "size": 7, "line": {"color": "white", "width": 1}, "opacity": 1},
                hovertemplate=f"particle %{{pointNumber}}<br>{said}<extra></extra>",
            ),
        }
        if self._density_of is None:
            del traces["density"]
        if self._data is None:
            del traces["data"]
        margin = {"l": LEFT, "r": WIDTH - LEFT - SIDE, "b": BOTTOM, "t": HEIGHT - BOTTOM - SIDE}
        layout = live.layout(self.extent, AXES, {"width": WIDTH, "height": HEIGHT, "margin": margin})
        self.figure = live.figure_type()(list(traces.values()), layout)
        self._traces = dict(zip(traces, self.figure.data, strict=True))

    @property
    def _colours(self) -> list[str]:
        """The colour of each particle."""
        return [style.COLOURS["model" if i < self._n - self.FOLLOWED else LINES["trails"][0]] for i in range(self._n)]

    @property
    def _arrow_colour(self) -> str:
        return style.COLOURS["exact" if self._exact is not None else "muted"]

    def _names(self, field: Field | None) -> dict[str, str]:
        """What the legend says."""
        size = f"size ≥ {field.cell:.3g} at the longest" if field is not None else "none at σ = 0"
        return {
            "particles": f"{self._n} particles",
            "trails": f"whole trails of {min(self._n, self.FOLLOWED)}",
            "tails": f"last {self.TAIL} steps of the others",
            "score": f"score (D(x, σ) − x) / σ²\n{size}",
            "density": "density of x, exact",
            "data": "data",
        }

    def _show(self, values: dict[str, Any]) -> None:
        steps, level, sampler = values.get("steps", 0), values["level"], values["sampler"]
        run = self.run(steps, values["seed"], sampler)
        level = min(level, len(run.sigmas) - 1)
        sigma = run.sigmas[level]
        field, density = self.field(sigma), self.density(sigma)
        none = np.zeros((0, 2))
        updates = {
            "particles": {**live.xy(run.scaled[level]), "customdata": np.round(run.x[level], 4)},
            **{name: live.xy(path) for name, path in self._trails(run, level).items()},
            **(live.arrows_at(field.places, field.arrows, field.score) if field else live.arrows_at(none, none, none)),
            "density": {"z": density, "visible": density is not None},
        }
        if self._data is not None:
            updates["data"] = live.xy(self._data_at(sigma))
        for name, text in self._names(field).items():
            updates.setdefault(name, {})["name"] = text.replace("\n", "<br>")
        with self.figure.batch_update():
            for name, trace in self._traces.items():
                trace.update(updates[name])
            self.figure.layout.title.text = self._heading(run, level, sampler)
        self._shown = run, level, sampler

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        self.figure.send_state(["_widget_data", "_widget_layout"])  # what was drawn before the page could listen
        return bundle

    # --- the poster -------------------------------------------------------------------------------

    def poster(self) -> bytes:
        """The same picture drawn by matplotlib, as PNG."""
        run, level, sampler = self._shown
        sigma, colours = run.sigmas[level], style.COLOURS
        field = self.field(sigma)
        names = self._names(field)
        figure, legend = pictures.canvas(WIDTH, HEIGHT), {}
        with style.context():
            figure.set_layout_engine("none")
            ax = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, SIDE / WIDTH, SIDE / HEIGHT))
            if self.density(sigma) is not None:
                shades = points.density(ax, lambda place: self._log_density(place, sigma), self.extent, levels=self.BANDS)
                shades.set_alpha(INK["density"])
                legend["density"] = Patch(color=matplotlib.colormaps[style.DENSITY](0.5))
            if self._data is not None:
                legend["data"] = points.scatter(ax, torch.from_numpy(self._data_at(sigma)), colours["data"], size=8, alpha=0.5)
            if field is not None:
                score = torch.from_numpy(field.score)
                arrows = points.field(ax, lambda place: score, self.extent, n=self.ARROWS, colour=self._arrow_colour)
                arrows.set(alpha=INK["score"])
                arrows.width = 0.0035
            legend["score"] = Line2D([], [], color=self._arrow_colour, marker=">", markevery=(1, 2), linewidth=1.4, markersize=6)
            for name, path in self._trails(run, level).items():
                colour, width, opacity = LINES[name]
                (legend[name],) = ax.plot(*path.T, color=colours[colour], linewidth=width, alpha=opacity)
            places = torch.from_numpy(run.scaled[level])
            legend["particles"] = points.scatter(ax, places, self._colours, size=30, alpha=1)
            legend["particles"].set(edgecolors="white", linewidth=0.8)
            points.plane(ax, self.extent, AXES)
            order = [name for name in names if name in legend]
            ax.legend(
                [legend[name] for name in order], [names[name] for name in order], loc="upper left", bbox_to_anchor=(1.02, 1)
            )
            figure.text(0.01, 0.97, self._heading(run, level, sampler), ha="left", va="top", fontsize=15)
            return pictures.render(figure)


def _checked(D: Denoiser) -> Denoiser:
    """D, refused where its answer has another shape: (B, 1) would pass unseen for both coordinates."""

    def same_shape(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = D(x, sigma)
        if x0.shape != x.shape:
            raise ValueError(f"D returned shape {tuple(x0.shape)} for x of shape {tuple(x.shape)}; expected the same")
        return x0

    return same_shape


def _smooth(mixture: Mixture) -> bool:
    """Whether the mixture has a density without noise: no component is flat."""
    return bool((mixture.variances > 0).all())
