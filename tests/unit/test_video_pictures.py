"""Figures of video diffusion show the numbers that they are given."""

import matplotlib.colors
import pytest
import torch

from course_lib.study import style
from course_lib.study import video_pictures as figures
from course_lib.study.pictures import png
from tests.shown import decode


def points(ax):
    """The curves of an axis, as lists of (x, y)."""
    return [
        list(zip(*(part.tolist() for part in line.get_data()), strict=True)) for line in ax.lines if len(line.get_xdata()) > 2
    ]


def test_frames_that_are_not_known_are_grey():
    clip, known = torch.randn(4, 3, 2, 2), torch.tensor([True, False, False, True])
    shown = figures.hidden(clip, known)
    assert torch.equal(shown[known], clip[known])
    assert torch.equal(shown[~known], torch.full((2, 3, 2, 2), figures.BLANK))


def test_a_row_over_time_runs_downwards():
    clip = torch.arange(3 * 2 * 4 * 5.0).view(3, 2, 4, 5)
    slices = figures.over_time(clip, 1, 6)
    assert slices.shape == (2, 18, 5)
    for t in range(3):
        for line in range(6):
            assert torch.equal(slices[:, 6 * t + line], clip[t, :, 1])


def test_settings_are_in_order_with_levels_and_ranks():
    rows = [
        {"a": 10.0, "word": 0.7, "flicker": 0.1},
        {"a": 0.0, "word": 0.1, "flicker": 0.4},
        {"a": 2.0, "word": 0.3, "flicker": 0.2},
    ]
    panels, true = {"word": "read", "flicker": "flicker"}, {"true clips": {"word": 0.9}}
    axes = figures.settings(rows, "a", "noise", panels, true).axes
    assert points(axes[0]) == [[(0.0, 0.1), (2.0, 0.3), (10.0, 0.7)]]
    assert points(axes[1]) == [[(0.0, 0.4), (2.0, 0.2), (10.0, 0.1)]]
    assert [len(ax.lines) for ax in axes] == [2, 1]  # the level is drawn where it is known
    assert [ax.get_ylabel() for ax in axes] == list(panels.values())
    ranked = figures.settings(rows, "a", "noise", panels, true, log=True).axes[0]
    assert points(ranked) == [[(0, 0.1), (1, 0.3), (2, 0.7)]]
    assert [label.get_text() for label in ranked.get_xticklabels()] == ["0", "2", "10"]


def test_curves_are_told_apart_and_named():
    curves = {name: ([0.0, 1.0, 2.0], [k, k + 1.0, k + 2.0]) for k, name in enumerate("abcd")}
    ax = figures.lines(curves, "x", "y", ylim=(0, 9)).axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(curves)
    assert len({line.get_color() for line in ax.lines}) == len({line.get_marker() for line in ax.lines}) == 4
    assert ax.get_ylim() == (0, 9)


def test_bands_show_unknown_frames_and_known_ones():
    known, clip = torch.tensor([True, False, False, True]), torch.tensor([2.0, 9.0, 9.0, -1.0])
    exact, drawn = (torch.arange(4.0), torch.ones(4)), {"one": (torch.arange(4.0) + 0.5, torch.full((4,), 0.2))}
    ax = figures.bands(exact, drawn, known, clip).axes[0]
    squares = next(line for line in ax.lines if line.get_color() == style.COLOURS["data"])
    assert list(zip(*squares.get_data(), strict=True)) == [(0, 2.0), (3, -1.0)]
    bars = ax.containers[0].lines[0]
    assert list(zip(*bars.get_data(), strict=True)) == [(1, 1.5), (2, 2.5)]


def test_kinds_of_clips_are_named_where_they_stand():
    ax = figures.against({"frozen": (0.0, 0.1), "shuffled": (0.06, 0.2)}, "flicker", "motion", (0.03, 0.9)).axes[0]
    named = {text.get_text(): text.xy for text in ax.texts}
    assert named == {"frozen": (0.0, 0.1), "shuffled": (0.06, 0.2), "true": (0.03, 0.9)}


@pytest.mark.parametrize("colour", ["data", "noise", "model"])
def test_the_diagram_joins_each_place_over_all_frames(colour):
    """Each of the three places has as many pixels of its colour in every frame, and none outside of the clip on the right."""
    picture = torch.as_tensor(decode(png(figures.space_then_time())).astype("float32")) / 255
    tint = torch.tensor(matplotlib.colors.to_rgb(style.COLOURS[colour]))
    near = ((picture - tint).abs().amax(-1) < 0.02)[:, : 11 * figures.UNIT]
    columns = near.sum(0)
    where = columns.nonzero().flatten()
    assert where.min() > 5 * figures.UNIT
    cell = figures.SIDE / figures.CELLS * figures.UNIT
    assert (columns > 0.7 * cell).sum() == pytest.approx(figures.FRAMES * cell, rel=0.15)
