"""The explorer of posteriors: one measurement of a point in the plane, the exact answer, and what a solver draws instead."""

from __future__ import annotations

import functools
import math
import textwrap
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from course_lib import metrics
from course_lib.denoisers import Counted
from course_lib.devices import SampleNoise, generator, one_thread
from course_lib.gaussians import Mixture
from course_lib.operators import Matrix
from course_lib.restoring import Task
from course_lib.study import pictures, style
from course_lib.study.explorer import Explorer
from course_lib.study.points import density, outline, plane, scatter
from course_lib.zoo import posteriors

F64 = torch.float64
WIDTH, HEIGHT = 900, 470  # of the picture, in screen pixels
SOLVERS = {name: solve for name, solve in posteriors.SOLVERS.items() if name != "RealNVP"}
"""What the menu offers: a normalising flow takes ten seconds to fit."""


class Problem(NamedTuple):
    """One number is measured of a point: its coordinate in the direction `angle` (degrees), with noise sigma_y."""

    angle: float
    y: float
    sigma_y: float


class Drawn(NamedTuple):
    """What a solver drew, (N, 2), or None and why; its distance to exact samples, and calls of D a sample."""

    points: Tensor | None
    distance: float
    calls: int
    trouble: str = ""


class PosteriorExplorer(Explorer):
    """p(x0 | y) of a mixture in the plane, y = a . x0 + sigma_y n: exact contours, a solver's samples, and how far they are off.

    prior    any `Mixture` in the plane: its Denoiser is exact, so that what is wrong is the solver's doing
    solver   one of SOLVERS to begin with; each has the setting that was chosen for it on the mixture of `zoo.posteriors`

    Beside the plane are the two coordinates of the samples, the measured one and the free one, above the exact densities. The
    distance is the sliced Wasserstein distance to as many exact samples, beside what two exact sets are apart. All noise is the
    seed's and stays as the measurement changes. A solver that refuses the problem, or diverges, says so. Raises ValueError for
    a prior that is not in the plane and an unknown solver.
    """

    SET, SHOWN, LOW, HIGH, KEPT = 1000, 300, 0.01, 10.0, 64

    def __init__(self, prior: Mixture, solver: str = "DPS", angle: float = 60, y: float = 0.3, sigma_y: float = 0.2):
        if prior.dim != 2:
            raise ValueError(f"prior is in {prior.dim} dimensions; expected 2")
        if solver not in SOLVERS:
            raise ValueError(f"solver = {solver!r}; expected one of {', '.join(SOLVERS)}")
        self._prior = prior
        reach = prior.means.abs().amax(1) + 2.5 * prior.covs.diagonal(dim1=1, dim2=2).amax(1).sqrt()
        self.half = round(float(reach.max()), 1)  # of the plane that is shown
        self.far = round(float(prior.means.norm(dim=1).max() + 3 * prior.covs.diagonal(dim1=1, dim2=2).max().sqrt()), 1)
        self.drawn = functools.lru_cache(maxsize=self.KEPT)(self._drawn)
        self._figure = pictures.canvas(WIDTH, HEIGHT)
        slider = functools.partial(widgets.FloatSlider, continuous_update=True)
        super().__init__(
            {
                "y": slider(y, min=-2.0, max=2.0, step=0.1, description="y", readout_format=".1f"),
                "angle": slider(angle, min=0, max=180, step=5, description="direction", readout_format=".0f"),
                "sigma_y": slider(sigma_y, min=0.05, max=1.0, step=0.05, description="noise", readout_format=".2f"),
                "solver": widgets.Dropdown(options=list(SOLVERS), value=solver, description="solver"),
                "calls": widgets.IntSlider(40, min=5, max=200, step=5, description="calls"),
                "seed": widgets.BoundedIntText(0, min=0, max=2**31 - 1, description="seed"),
            }
        )

    # --- what is computed -------------------------------------------------------------------------

    @staticmethod
    def direction(angle: float) -> Tensor:
        """The row a of A = a^T, (2,)."""
        return torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle))], dtype=F64)

    def exact(self, problem: Problem) -> Mixture:
        """The posterior."""
        return self._prior.posterior(self.direction(problem.angle)[None], torch.tensor([problem.y]), problem.sigma_y)

    def _drawn(self, problem: Problem, solver: str, calls: int, seed: int) -> Drawn:
        A = Matrix(self.direction(problem.angle)[None])
        D = Counted(self._prior.denoiser)
        y = torch.full((self.SET, 1), problem.y, dtype=F64)
        with one_thread():
            try:
                task = Task(D, A, y, problem.sigma_y, calls, self.LOW, self.HIGH, SampleNoise(seed))
                x = SOLVERS[solver](task, **posteriors.chosen(solver))
            except (ValueError, FloatingPointError) as error:  # it cannot take this problem; others may
                return Drawn(None, math.nan, D.calls, str(error))
            return Drawn(x, self._distance(problem, x), D.calls)

    def _distance(self, problem: Problem, x: Tensor) -> float:
        return metrics.sliced_wasserstein(x, self.exact(problem).sample(self.SET, generator(1, 0)))

    def floor(self, problem: Problem) -> float:
        """What two exact sets are apart."""
        return self._distance(problem, self.exact(problem).sample(self.SET, generator(1, 1)))

    # --- what is shown ----------------------------------------------------------------------------

    def draw(self, y: float, angle: float, sigma_y: float, solver: str, calls: int, seed: int) -> bytes:
        """The plane on the left; on the right the measured coordinate above the free one."""
        problem = Problem(angle, y, sigma_y)
        exact, drawn = self.exact(problem), self.drawn(problem, solver, calls, seed)
        figure = self._figure
        figure.clear()
        figure.set_layout_engine("none")
        left = figure.add_axes((0.06, 0.13, 0.43, 0.75))
        box = (-self.half, self.half) * 2
        density(left, exact.log_prob, box, levels=8)
        outline(left, self._prior.log_prob, box)
        a = self.direction(angle)
        left.axline(tuple((y * a).tolist()), tuple((y * a + torch.stack([-a[1], a[0]])).tolist()), color=style.COLOURS["exact"])
        if drawn.points is None:
            left.text(0, 0, textwrap.fill(drawn.trouble, 40), ha="center", va="center", fontsize=12)
        else:
            scatter(left, drawn.points[: self.SHOWN], colour=style.COLOURS["model"], size=9)
        plane(left, box)
        left.set_title(self._said(solver, drawn, self.floor(problem)), fontsize=14)
        for bottom, name, along in ((0.57, "measured", a), (0.13, "free", torch.stack([-a[1], a[0]]))):
            ax = figure.add_axes((0.6, bottom, 0.37, 0.31))
            self._coordinate(ax, exact, along, drawn.points)
            ax.set_title(f"{name} coordinate", fontsize=13)
            if name == "measured":
                ax.legend(loc="upper center", ncols=2, fontsize=11)
        return pictures.render(figure)

    @staticmethod
    def _said(solver: str, drawn: Drawn, floor: float) -> str:
        if drawn.points is None:
            return f"{solver}: no samples"
        return f"{solver}: distance {drawn.distance:.2f} (exact {floor:.2f})\n{drawn.calls} calls"

    def _coordinate(self, ax: Axes, exact: Mixture, along: Tensor, points: Tensor | None) -> None:
        """The exact density of one coordinate, and the histogram of the samples'."""
        places = torch.linspace(-self.far, self.far, 400, dtype=F64)
        means, stds = exact.means @ along, torch.einsum("i,kij,j->k", along, exact.covs, along).sqrt()
        p = (exact.weights * torch.distributions.Normal(means, stds).log_prob(places[:, None]).exp()).sum(1)
        if points is not None:
            bins = np.linspace(-self.far, self.far, 81)
            ax.hist((points @ along).numpy(), bins=bins, density=True, color=style.COLOURS["model"], alpha=0.5, label="samples")
        ax.plot(places, p, color=style.COLOURS["exact"], label="exact")
        ax.set(xlim=(-self.far, self.far), ylim=(0, 1.6 * float(p.max())), ylabel="density")
