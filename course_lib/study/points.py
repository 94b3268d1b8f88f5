"""Figures in the plane: a density, points and a vector field, on axes with equal units."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import BoundaryNorm
from matplotlib.contour import QuadContourSet
from matplotlib.quiver import Quiver
from torch import Tensor

from course_lib.study.style import COLOURS, DENSITY

F64 = torch.float64
Extent = tuple[float, float, float, float]
"""(left, right, bottom, top), as in matplotlib."""


def plane(ax: Axes, extent: Extent, names: tuple[str, str] = ("$x_1$", "$x_2$")) -> None:
    """Make `ax` a plane: named axes, equal units, no grid, and the limits of `extent`."""
    left, right, bottom, top = _check(extent)
    ax.set(xlim=(left, right), ylim=(bottom, top), xlabel=names[0], ylabel=names[1], aspect="equal")
    ax.grid(False)


def density(
    ax: Axes, log_prob: Callable[[Tensor], Tensor], extent: Extent, n: int = 160, levels: int = 10, cmap: str = DENSITY
) -> QuadContourSet:
    """Filled contours of p = exp(log_prob), white below 1 / levels^2 of the peak.

    log_prob  (N, 2) float64 -> (N,), in nats; called once on an n x n lattice

    Contours are evenly spaced in sqrt(p), so that a low wide peak shows beside a high narrow one.
    """
    points, x, y = _lattice(extent, n, n)
    values = log_prob(points)
    if values.shape != (len(points),):
        raise ValueError(f"log_prob returned shape {tuple(values.shape)} for {len(points)} points; expected ({len(points)},)")
    p = values.exp().reshape(n, n).detach().numpy()
    if not (np.isfinite(p).all() and p.max() > 0):
        raise ValueError(f"exp(log_prob) runs from {p.min():.3g} to {p.max():.3g} in extent = {extent}; expected a density there")
    plane(ax, extent)
    edges = p.max() * np.linspace(1 / levels, 1, levels) ** 2
    shades = BoundaryNorm(edges, ncolors=256)  # a shade for each band, as even as the contours
    return ax.contourf(x, y, p, levels=edges, norm=shades, cmap=cmap, zorder=0)


def outline(
    ax: Axes,
    log_prob: Callable[[Tensor], Tensor],
    extent: Extent,
    n: int = 90,
    colour: str = COLOURS["muted"],
    level: float = 0.1,
) -> QuadContourSet:
    """One dotted contour of p = exp(log_prob), where it is `level` of its peak; log_prob as for `density`."""
    points, x, y = _lattice(extent, n, n)
    p = log_prob(points).exp().reshape(n, n).detach().numpy()
    return ax.contour(x, y, p, levels=[level * p.max()], colors=COLOURS["muted"], linestyles="dotted", linewidths=1.4)


def scatter(
    ax: Axes, points: Tensor, colour: str = COLOURS["data"], size: float = 12, alpha: float = 0.7, label: str | None = None
) -> PathCollection:
    """Points (N, 2) as dots with equal units on both axes; `size` in points squared, `colour` any of matplotlib's."""
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points has shape {tuple(points.shape)}; expected (N, 2)")
    x, y = points.detach().cpu().numpy().T
    ax.set(xlabel=ax.get_xlabel() or "$x_1$", ylabel=ax.get_ylabel() or "$x_2$", aspect="equal")
    return ax.scatter(x, y, s=size, color=colour, alpha=alpha, label=label, zorder=3)


def field(ax: Axes, vector_fn: Callable[[Tensor], Tensor], extent: Extent, n: int = 16, colour: str = COLOURS["exact"]) -> Quiver:
    """Arrows of a vector field on a lattice, n along the longer side.

    vector_fn  (N, 2) float64 -> (N, 2). Lengths are to scale up to the 80th percentile, which is one cell
    long; longer arrows are cut there, so that a few do not hide the rest.
    """
    left, right, bottom, top = _check(extent)
    cell = max(right - left, top - bottom) / n
    columns, rows = max(2, round((right - left) / cell)), max(2, round((top - bottom) / cell))
    inset = (left + cell / 2, right - cell / 2, bottom + cell / 2, top - cell / 2)
    points, *_ = _lattice(inset, columns, rows)
    vectors = vector_fn(points)
    if vectors.shape != points.shape:
        raise ValueError(f"vector_fn returned shape {tuple(vectors.shape)} for points {tuple(points.shape)}; expected the same")
    length = vectors.norm(dim=1, keepdim=True)
    unit = length.quantile(0.8).clamp_min(1e-12)
    arrows = (vectors / unit / (length / unit).clamp_min(1) * cell).detach().numpy()
    plane(ax, extent)
    return ax.quiver(
        *points.numpy().T,
        *arrows.T,
        angles="xy",
        scale_units="xy",
        scale=1.1,
        color=colour,
        width=0.005,
        headwidth=4.5,
        pivot="mid",
        zorder=2,
    )


def _check(extent: Extent) -> Extent:
    if len(extent) != 4 or not (extent[0] < extent[1] and extent[2] < extent[3]):
        raise ValueError(f"extent = {extent}; expected (left, right, bottom, top) with left < right and bottom < top")
    return extent


def _lattice(extent: Extent, columns: int, rows: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Points (rows * columns, 2) row by row, and the coordinates along each axis."""
    left, right, bottom, top = _check(extent)
    x, y = torch.linspace(left, right, columns, dtype=F64), torch.linspace(bottom, top, rows, dtype=F64)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x, grid_y], -1).reshape(-1, 2), x.numpy(), y.numpy()
