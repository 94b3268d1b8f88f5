"""The explorers of schedules and of the reverse process: what is shown is the schedule, and the run of `sample`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from course_lib import schedules
from course_lib.devices import SampleNoise
from course_lib.gaussians import Empirical
from course_lib.sample import sample
from course_lib.steps import ddpm
from course_lib.study.explorers import ReverseExplorer, ScheduleExplorer
from course_lib.worlds import digits
from tests.shown import decode, levels


@pytest.fixture(scope="module")
def schedule_explorer():
    return ScheduleExplorer()


@pytest.mark.parametrize("t", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("name", schedules.CONTINUOUS)
def test_schedule_explorer_shows_the_schedule(schedule_explorer, name, t):
    shown, schedule, time = schedule_explorer, schedules.get(name), torch.tensor(t, dtype=torch.float64)
    shown.controls["schedule"].value, shown.controls["t"].value = name, t
    assert shown.message.value == ""
    assert decode(shown.picture.value).shape == (380, 900, 3)

    x0 = digits.load("train")[0][:1].double()
    eps = SampleNoise(0)(torch.empty(1, 1, 16, 16, dtype=torch.float64))
    expected = (schedule.alpha(time) * x0 + schedule.std(time) * eps).clamp(-1, 1)
    assert np.allclose(shown._picture.get_array(), expected[0, 0])

    text = shown._line.get_text()
    for symbol, value in [
        ("α", schedule.alpha(time)),
        ("std", schedule.std(time)),
        ("σ", schedule.sigma(time)),
        ("SNR", (schedule.alpha(time) / schedule.std(time)) ** 2),
    ]:
        assert f"{symbol} = {'∞' if value == math.inf else f'{float(value) + 0.0:.3g}'}" in text
    at, height = (float(axis[0]) for axis in shown._point.get_data())
    assert at == t and height == pytest.approx(float(schedule.log_snr(time).clamp(-shown.LIMIT, shown.LIMIT)))

    density, edges, _ = shown._bars.get_data()
    mass = float((density * np.diff(edges)).sum())
    assert mass == pytest.approx(1) and density.max() <= shown._pixels.get_ylim()[1]
    assert shown._pixels.get_xlim()[1] == edges[-1] >= float(schedule.alpha(time) + 3 * schedule.std(time))
    assert shown._normal[0].get_visible() == (name != "edm"), "only EDM keeps its signal"


def test_at_the_end_of_a_variance_preserving_schedule_the_pixels_are_standard_normal(schedule_explorer):
    schedule_explorer.controls["schedule"].value, schedule_explorer.controls["t"].value = "linear", 1.0
    density, edges, _ = schedule_explorer._bars.get_data()
    count = schedule_explorer.DRAWS * 256
    width = edges[1] - edges[0]
    p = np.exp(-((edges[1:] + edges[:-1]) ** 2) / 8) / math.sqrt(2 * math.pi)
    error = (density - p) / np.sqrt(np.maximum(p, 1e-3) / (count * width))  # standard errors of a histogram
    assert np.abs(error).max() < 5


def test_redraws_leave_no_artists_behind(schedule_explorer):
    def count():
        return len(schedule_explorer._figure.findobj())

    schedule_explorer.draw(t=0.3, schedule="edm")
    before = count()
    for t in (0.1, 0.3):
        schedule_explorer.draw(t=t, schedule="edm")
    assert count() == before


def test_schedule_explorer_names_a_wrong_image():
    with pytest.raises(ValueError, match=r"image has shape \(16, 16\); expected \(1, H, W\)"):
        ScheduleExplorer(torch.zeros(16, 16))


class Counted:
    """The exact denoiser of the real digits, which counts its calls."""

    def __init__(self):
        self.exact, self.calls = Empirical(digits.load("train")[0]), 0

    def __call__(self, x, sigma):
        self.calls += 1
        return self.exact(x, sigma)


def test_reverse_explorer_calls_the_denoiser_once_a_level_and_not_to_scrub():
    D = Counted()
    shown = ReverseExplorer(D, "exact", n=2)
    assert D.calls == 20
    for level in range(21):
        shown.controls["level"].value = level
    assert D.calls == 20 and shown.message.value == ""
    shown.controls["seed"].value = 1
    assert D.calls == 40
    shown.controls["steps"].value = 5
    assert D.calls == 45 and shown.controls["level"].value == 5
    shown.controls["steps"].value = 8
    assert D.calls == 53 and shown.controls["level"].value == 8, "the level stays at the end"


def test_reverse_explorer_walks_as_sample_does_whatever_the_step_asks_of_the_denoiser():
    def curious(D, x, sigma, sigma_next, memory=None):
        believed = (D(x, sigma) + D(x, 2 * sigma) + D(0.9 * x, 2 * sigma)) / 3  # other levels and other states
        return believed + sigma_next / sigma * (x - believed), None

    D, grid = Empirical(digits.load("train")[0]), schedules.karras(6)
    shown = ReverseExplorer(D, "exact", n=2, sigmas=grid, step=curious)
    start = SampleNoise(0).start((2, 1, 16, 16), grid[0])
    assert torch.equal(shown._record.states[-1], sample(D, start, grid, curious))


def test_reverse_explorer_shows_the_state_and_the_belief():
    train = digits.load("train")[0]
    D = Empirical(train)
    shown = ReverseExplorer(D, "exact", n=3)
    level = 8
    shown.controls["level"].value = level
    sigma = float(schedules.karras(20)[level])
    assert f"σ = {sigma:.3g}" in shown._heading.get_text() and "exact" in shown._heading.get_text()

    x = shown._record.states[level]
    for row, images in zip(shown._rows, (x / math.sqrt(1 + sigma**2), D(x, torch.tensor(sigma))), strict=True):
        for i, image in enumerate(images):
            assert np.abs(row.get_array()[:, 17 * i : 17 * i + 16].astype(int) - levels(image, 1).astype(int)).max() <= 1
    distance = torch.cdist(shown._record.states[-1].flatten(1), train.flatten(1)).min(1).values
    assert (distance < 1e-2).all(), "samples of the memorising denoiser are training digits"
    assert 600 < decode(shown.picture.value).shape[1] <= 900


def test_reverse_explorer_image_does_not_depend_on_n():
    D = Empirical(digits.load("train")[0])
    few, many = (ReverseExplorer(D, "exact", n=n)._record.states[-1] for n in (2, 4))
    assert torch.allclose(few, many[:2], atol=1e-4)


def test_reverse_explorer_takes_grids_and_stochastic_steps():
    D = Empirical(digits.load("train")[0])
    grid = torch.tensor([80.0, 10.0, 1.0, 0.5])  # ends above 0, where D still speaks
    shown = ReverseExplorer(D, "exact", n=1, sigmas=grid, noisy_step=ddpm)
    assert "steps" not in shown.controls and shown.controls["level"].max == 3
    last = shown._record
    assert torch.allclose(last.estimates[-1], D(last.states[-1], torch.tensor(0.5)))
    first = last.states[-1]
    shown.controls["seed"].value = 1
    assert not torch.allclose(shown._record.states[-1], first)
    shown.controls["seed"].value = 0
    assert torch.equal(shown._record.states[-1], first), "a seed gives its run again"


def test_reverse_explorer_tells_of_a_run_that_fails():
    exact, works = Empirical(digits.load("train")[0]), [True]
    shown = ReverseExplorer(lambda x, sigma: exact(x, sigma) if works else x * math.nan, "exact", n=1)
    before = shown.picture.value
    works.clear()
    shown.controls["seed"].value = 1
    assert "FloatingPointError: x is not finite after the step at sigma = 80" in shown.message.value
    assert shown.picture.value == before
    works.append(True)
    shown.controls["seed"].value = 2
    assert shown.message.value == "" and shown.picture.value != before
