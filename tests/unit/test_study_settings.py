"""What a sampler explorer compares: rules that cost what they say, and grids with the levels of their names."""

from __future__ import annotations

import math

import pytest
import torch

from course_lib import schedules
from course_lib.devices import SampleNoise
from course_lib.sample import sample
from course_lib.study.settings import GRIDS, RULES, Setting

HIGH, LOW = 15.0, 0.02


class Normal:
    """The exact denoiser of N(0, I), which counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma):
        self.calls += 1
        return x / (1 + sigma**2)


@pytest.mark.parametrize("calls", [3, 7, 12])
@pytest.mark.parametrize("sampler", RULES)
def test_a_run_spends_the_calls_and_could_not_take_another_step(sampler, calls):
    setting, D = Setting(sampler, calls, "Karras", 0.5, 0), Normal()
    x = torch.ones(2, 2, dtype=torch.float64)
    sample(D, x, setting.levels(LOW, HIGH), setting.step(SampleNoise(0)))
    assert D.calls <= calls < D.calls + setting.rule.each
    assert D.calls == setting.rule.each * setting.steps + setting.rule.more


@pytest.mark.parametrize("sampler", RULES)
def test_a_rule_draws_noise_where_the_menu_says_so(sampler):
    asked = []

    def noise(x):
        asked.append(x)
        return torch.zeros_like(x)

    for eta in (0.0, 1.0):
        setting = Setting.of({"sampler": sampler, "calls": 6, "grid": "Karras", "eta": eta, "seed": 0})
        sample(Normal(), torch.ones(2, 2, dtype=torch.float64), setting.levels(LOW, HIGH), setting.step(noise))
        assert bool(asked) == setting.noisy
        asked.clear()


@pytest.mark.parametrize("n", [1, 2, 5, 40])
@pytest.mark.parametrize("name", GRIDS)
def test_grids_have_the_steps_and_the_ends(name, n):
    grid = GRIDS[name](n, LOW, HIGH)
    assert grid.shape == (n + 1,) and grid.dtype == torch.float64 and bool((grid.diff() < 0).all())
    of_table = "SD's table" in name
    # a time is found and read again in float64, which the steepest schedule here, at sigma = 15, magnifies 1e4-fold
    assert float(grid[-1]) == pytest.approx(LOW, rel=1e-11)
    assert of_table or float(grid[0]) == pytest.approx(HIGH, rel=1e-11)
    assert float(grid[0]) <= HIGH * (1 + 1e-11)


@pytest.mark.parametrize(
    "name, coordinate",
    [
        ("Karras", lambda sigma: sigma ** (1 / 7)),
        ("exponential (even in λ)", lambda sigma: -sigma.log()),
        ("even in σ", lambda sigma: sigma),
        ("even in t (linear β)", lambda sigma: (2 * 19.9 * torch.log1p(sigma**2) + 0.1**2).sqrt()),
        ("even in t (cosine)", lambda sigma: (math.cos(0.008 / 1.008 * math.pi / 2) / (1 + sigma**2).sqrt()).acos()),
        ("even in t (flow)", lambda sigma: sigma / (1 + sigma)),
    ],
)
def test_grids_are_even_where_they_say(name, coordinate):
    gaps = coordinate(GRIDS[name](12, LOW, HIGH)).diff()
    assert torch.allclose(gaps, gaps.mean(), rtol=1e-9)
    others = [coordinate(make(12, LOW, HIGH)).diff() for other, make in GRIDS.items() if other != name]
    assert not any(torch.allclose(gap, gap.mean(), rtol=1e-3) for gap in others if len(gap) == 12)


def test_grids_of_the_table_have_the_trained_times():
    table = schedules.Discrete(schedules.scaled_linear_betas())
    for name, times in (("leading (SD's table)", (751, 501, 251, 1)), ("trailing (SD's table)", (999, 749, 499, 249))):
        expected = [*table.sigma(torch.tensor(times).double()).tolist(), LOW]
        assert GRIDS[name](4, LOW, HIGH).tolist() == pytest.approx(expected)
