"""Points in the plane: densities, samples and fields are drawn where they are."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from course_lib.gaussians import Mixture
from course_lib.study import points, style
from course_lib.worlds import toys

EXTENT = (-3.0, 3.0, -2.0, 2.0)


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_density_fills_the_contours_of_the_mixture(ax):
    blob = Mixture.gaussian(torch.zeros(2), torch.eye(2))
    shown = points.density(ax, blob.log_prob, EXTENT, n=201, levels=4)
    peak = 1 / (2 * math.pi)
    assert np.allclose(shown.levels, peak * np.array([1, 4, 9, 16]) / 16)
    outer = np.concatenate([path.vertices for path in shown.get_paths()[:1]])
    radius = np.linalg.norm(outer, axis=1)  # between the contours of p = peak/16 and peak/4
    assert radius.min() == pytest.approx(math.sqrt(2 * math.log(4)), abs=0.01)
    assert np.abs(outer[:, 1]).max() <= 2
    assert ax.get_aspect() == 1 and ax.get_xlabel() == "$x_1$" and ax.get_ylabel() == "$x_2$"
    assert ax.get_xlim() == EXTENT[:2] and ax.get_ylim() == EXTENT[2:]


def test_scatter_puts_points_where_they_are(ax):
    x = toys.moons(50)
    shown = points.scatter(ax, x, style.COLOURS["model"], label="moons")
    assert np.allclose(shown.get_offsets(), x)
    assert ax.get_aspect() == 1 and ax.get_xlabel() and ax.get_ylabel()


def test_field_arrows_point_along_the_vectors_and_the_longest_are_cut(ax):
    mixture = toys.three_blobs()
    arrows = points.field(ax, lambda x: mixture.score(x, 0.5), EXTENT, n=12)
    place = torch.tensor(arrows.XY)
    score = mixture.score(place, 0.5)
    drawn = torch.tensor(np.stack([arrows.U, arrows.V], -1))
    length, wanted = drawn.norm(dim=1), score.norm(dim=1)
    assert torch.allclose((drawn * score).sum(1), length * wanted, rtol=1e-6), "not parallel"
    cut = wanted > wanted.quantile(0.8)
    assert torch.allclose(length[cut], length.max()) and 0 < cut.sum() < len(cut)
    ratio = length[~cut] / wanted[~cut]
    assert torch.allclose(ratio, ratio[0])
    assert len(place) == 12 * 8 and ax.get_aspect() == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda ax: points.scatter(ax, torch.zeros(5, 3)), r"points has shape \(5, 3\); expected \(N, 2\)"),
        (lambda ax: points.density(ax, lambda x: x, EXTENT, n=4), r"log_prob returned shape \(16, 2\)"),
        (lambda ax: points.density(ax, lambda x: x[:, 0] - math.inf, EXTENT), "expected a density there"),
        (lambda ax: points.density(ax, lambda x: x[:, 0], (1, 0, 0, 1)), r"extent = \(1, 0, 0, 1\); expected \(left, right"),
        (lambda ax: points.field(ax, lambda x: x[:, :1], EXTENT), r"vector_fn returned shape \(\d+, 1\)"),
    ],
)
def test_bad_points_are_named(ax, call, message):
    with pytest.raises(ValueError, match=message):
        call(ax)
