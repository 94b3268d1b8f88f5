"""A plane in plotly: its layout, contours, arrows and lines, and a figure whose state is what it shows."""

from __future__ import annotations

import functools
from typing import Any

import matplotlib
import numpy as np
import plotly.graph_objects as go  # loads the figure's widget when it is first made, not here

from course_lib.study import style
from course_lib.study.points import Extent

Array = np.ndarray


@functools.cache  # made when first needed: plotly's widget takes a second to load
def figure_type() -> type[go.FigureWidget]:
    """The class of live figures: `figure_type()(traces, layout)`."""

    class LiveFigure(go.FigureWidget):
        """A figure whose state is what it shows; plotly's is what it showed first, and a page loaded anew would show that."""

        def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
            state = super().get_state(key, drop_defaults)
            if hasattr(self, "_data_objs"):  # not while it is made
                now = self.to_plotly_json()
                fresh = {"_widget_data": now["data"], "_widget_layout": now["layout"]}
                state.update({name: fresh[name] for name in state.keys() & fresh.keys()})
            return state

    return LiveFigure


def layout(extent: Extent, names: tuple[str, str], size: dict[str, Any]) -> dict[str, Any]:
    """A plane with named axes in equal units, no grid, the limits of `extent`, and a legend on its right.

    size  width, height and margin, in screen pixels
    """
    left, right, bottom, top = extent
    axis = {"showgrid": False, "zeroline": False, "showline": True, "ticks": "outside", "linecolor": "#555555"}
    return {
        "template": "none",
        **size,
        "font": {"family": "DejaVu Sans, Verdana, sans-serif", "size": 14, "color": "black"},
        "title": {"x": 0.01, "xanchor": "left", "y": 0.97, "yanchor": "top", "font": {"size": 18}},
        "xaxis": {**axis, "title": {"text": names[0]}, "range": [left, right], "constrain": "domain"},
        "yaxis": {**axis, "title": {"text": names[1]}, "range": [bottom, top], "scaleanchor": "x", "constrain": "domain"},
        "legend": {"x": 1.03, "y": 1, "traceorder": "reversed", "itemsizing": "constant"},
        "hoverlabel": {"bgcolor": "white"},
        "modebar": {"remove": ["select2d", "lasso2d", "toImage"]},
    }


def contours(x: Array, y: Array, bands: int, opacity: float) -> go.Contour:
    """Filled contours of a z from 0 to 1, `bands` of even width in the course's colours, white below the first edge."""
    shades = [(1, 1, 1), *matplotlib.colormaps[style.DENSITY](np.linspace(0, 1, bands - 1))]
    scale = [[float(at), matplotlib.colors.to_hex(shade)] for at, shade in zip(np.linspace(0, 1, bands), shades, strict=True)]
    step = 1 / bands
    look = {"line": {"width": 0}, "showscale": False, "showlegend": True, "hoverinfo": "skip", "opacity": opacity}
    edges = {"start": step, "end": 1 - step, "size": step}
    return go.Contour(x=x, y=y, colorscale=scale, zmin=step / 2, zmax=1 - step / 2, contours=edges, **look)


def lines(colour: str, width: float, opacity: float, **look: Any) -> go.Scatter:
    """Lines of `width` screen pixels, that do not answer to the pointer."""
    return go.Scatter(mode="lines", line={"color": colour, "width": width}, opacity=opacity, hoverinfo="skip", **look)


def arrows(colour: str, opacity: float) -> dict[str, go.Scatter]:
    """The two traces of a field, "shafts" and "score", whose heads tell the score under the pointer; `arrows_at` fills them."""
    said = "score = (%{customdata[0]:.3g}, %{customdata[1]:.3g}), size %{customdata[2]:.3g}<extra></extra>"
    head = {"symbol": "arrow", "color": colour, "line": {"width": 0}, "opacity": opacity}
    return {
        "shafts": lines(colour, 1.4, opacity, legendgroup="score", showlegend=False),
        "score": go.Scatter(mode="markers", marker=head, legendgroup="score", hovertemplate=said),
    }


def arrows_at(places: Array, vectors: Array, score: Array) -> dict[str, dict[str, Any]]:
    """Arrows along `vectors`, centred on `places`; all (N, 2), and no arrow where N = 0."""
    tail, tip = places - vectors / 2, places + vectors / 2
    length = np.linalg.norm(vectors, axis=1)
    heads = 9 * np.maximum(length / max(length.max(initial=0), 1e-12), 0.4)  # screen pixels
    size = np.linalg.norm(score, axis=1, keepdims=True)
    marker = {"angle": np.float32(np.degrees(np.arctan2(*vectors.T))), "size": np.float32(heads)}  # clockwise from upward
    return {
        "shafts": xy(parted(np.stack([tail, tip]))),
        "score": {**xy(tip), "marker": marker, "customdata": np.hstack([score, size]).round(6)},
    }


def xy(places: Array) -> dict[str, Array]:
    """Places (N, 2) as plotly takes them, in the precision of a screen."""
    x, y = places.T.astype(np.float32)
    return {"x": x, "y": y}


def parted(paths: Array) -> Array:
    """Paths (levels, n, 2) as one line (n (levels + 1), 2), parted by nan."""
    gap = np.full((1, *paths.shape[1:]), np.nan)
    return np.concatenate([paths, gap]).transpose(1, 0, 2).reshape(-1, 2)
