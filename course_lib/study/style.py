"""The one plot style of the course, its named colours, and its colour map for densities."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib

SHEET = Path(__file__).with_name("course.mplstyle")

COLOURS = {
    "data": "#0072B2",  # blue: what is real
    "noise": "#E69F00",  # orange
    "model": "#009E73",  # green: what a network or a sampler says
    "exact": "#000000",  # black: the closed form
    "warn": "#D55E00",  # vermilion: the mistake, the failure
    "guide": "#CC79A7",  # purple: guidance, conditions, measurements
    "other": "#56B4E9",  # sky blue
    "muted": "#767676",  # grey: what is there for comparison
}
"""Names of roles -> Okabe and Ito's colours (2008), which colour-blind readers can tell apart."""

DENSITY = "Blues"
"""The sequential colour map of every density: white where there is none, and orange or green points show on it."""


@functools.cache
def _params() -> matplotlib.RcParams:
    return matplotlib.rc_params_from_file(SHEET, use_default_template=False)


def use() -> None:
    """Apply the course's style to every figure made from now on; the backend stays as it is."""
    matplotlib.rcParams.update(_params())


def context() -> AbstractContextManager[None]:
    """Apply the style inside a `with` block only; the library's own figures look the same without `use()`."""
    return matplotlib.rc_context(_params())
