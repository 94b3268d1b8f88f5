"""The explorer of posteriors: what it says is measured on what it shows."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib import metrics
from course_lib.devices import generator
from course_lib.gaussians import Mixture
from course_lib.study.posteriors import HEIGHT, SOLVERS, WIDTH, PosteriorExplorer, Problem
from course_lib.worlds.toys import three_blobs
from tests.shown import REDRAW, SLACK, decode, seconds


@pytest.fixture
def explorer():
    return PosteriorExplorer(three_blobs(), solver="DDRM")


def test_it_draws_what_is_chosen(explorer):
    assert decode(explorer.picture.value).shape[:2] == (HEIGHT, WIDTH)
    changed = {"y": -1.0, "angle": 20, "sigma_y": 0.5, "solver": "replacement", "calls": 20, "seed": 3}
    for name, value in changed.items():
        before, old = explorer.picture.value, explorer.controls[name].value
        explorer.controls[name].value = value
        assert explorer.message.value == "" and explorer.picture.value != before, name
        explorer.controls[name].value = old
        assert explorer.picture.value == before, name


def test_the_picture_is_a_function_of_the_controls_alone(explorer):
    """No time of a clock is in it: computed anew it is the same, byte for byte."""
    before = explorer.picture.value
    explorer.drawn = explorer._drawn
    for seed in (1, 0):
        explorer.controls["seed"].value = seed
    assert explorer.picture.value == before


def test_the_exact_posterior_is_of_the_measured_coordinate(explorer):
    """With y = a . x0, a at 90 degrees, and little noise, x_2 is y, and x_1 is what the prior has there."""
    exact = explorer.exact(Problem(90, 0.4, 0.01))
    x = exact.sample(4000, generator(0))
    assert_close(x[:, 1], torch.full((4000,), 0.4, dtype=x.dtype), atol=0.06, rtol=0)
    near = three_blobs().sample(200_000, generator(1))
    near = near[(near[:, 1] - 0.4).abs() < 0.02][:, 0]
    error = float((near.var() / len(near) + x[:, 0].var() / len(x)).sqrt())
    assert abs(float(x[:, 0].mean() - near.mean())) < 4 * error


def test_the_distance_is_that_of_the_points_shown_and_exact_points_are_at_the_floor(explorer):
    problem = Problem(60, 0.3, 0.2)
    drawn = explorer.drawn(problem, "DDRM", 40, 0)
    exact = explorer.exact(problem).sample(explorer.SET, generator(1, 0))
    assert drawn.points.shape == (explorer.SET, 2) and drawn.calls == 40
    assert drawn.distance == metrics.sliced_wasserstein(drawn.points, exact) > 2 * explorer.floor(problem)
    assert f"distance {drawn.distance:.2f} (exact {explorer.floor(problem):.2f})" in explorer._figure.axes[0].get_title()


def test_a_solver_that_cannot_says_so_in_its_place(explorer, monkeypatch):
    def refuse(task, **setting):
        raise ValueError("expected another problem")

    monkeypatch.setitem(SOLVERS, "DDRM", refuse)
    explorer.controls["seed"].value = 9
    assert explorer.message.value == ""
    shown = [text.get_text() for text in explorer._figure.axes[0].texts]
    assert "expected another problem" in shown and "no samples" in explorer._figure.axes[0].get_title()
    assert math.isnan(explorer.drawn(Problem(60, 0.3, 0.2), "DDRM", 40, 9).distance)


def test_a_redraw_takes_a_fifth_of_a_second_and_new_samples_as_long_again(explorer):
    """With the samples at hand; computed anew, 40 calls on a thousand points, twice that."""
    assert seconds(explorer) < REDRAW * SLACK
    explorer.drawn = explorer._drawn
    assert seconds(explorer) < 2 * REDRAW * SLACK


def test_bad_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="prior is in 1 dimensions; expected 2"):
        PosteriorExplorer(Mixture.gaussian(torch.zeros(1), torch.eye(1)))
    with pytest.raises(ValueError, match=r"solver = 'magic'; expected one of .*DDRM"):
        PosteriorExplorer(three_blobs(), solver="magic")
