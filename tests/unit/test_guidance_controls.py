"""A control in an interval of noise levels: which Denoiser answers where, how often each is called, and diffusers' fractions."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib.denoisers import Counted, from_eps
from course_lib.gaussians import Mixture
from course_lib.guidance.controls import sigma_interval, within
from course_lib.guidance.free import interval
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim
from tests.draws import level, normal

F64 = torch.float64
LOW, HIGH = 0.5, 2.0


def point(value):
    return lambda x, sigma: torch.full_like(x, value)


@pytest.mark.parametrize(
    ("sigma", "inside"), [(0.1, False), (LOW, False), (0.500001, True), (1.0, True), (HIGH, True), (2.1, False)]
)
def test_one_answers_inside_the_other_outside_and_no_other_is_called(sigma, inside):
    """The ends are those of the guidance interval: low is outside, high inside."""
    D_in, D_out = Counted(point(1.0)), Counted(point(-1.0))
    found = within(D_in, D_out, LOW, HIGH)(normal(3, 2), level(sigma))
    assert torch.equal(found, torch.full_like(found, 1.0 if inside else -1.0))
    assert (D_in.calls, D_out.calls) == (inside, not inside)
    assert float(interval(7.0, LOW, HIGH)(level(sigma))) == (7.0 if inside else 1.0)


def test_levels_of_one_sample_each():
    sigma, x = torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=F64), normal(4, 2)
    D_in, D_out = Counted(lambda x, s: x * s[:, None]), Counted(lambda x, s: -x)
    D = within(D_in, D_out, LOW, HIGH)
    assert_close(D(x, sigma), torch.stack([-x[0], x[1], 2 * x[2], -x[3]]), rtol=0, atol=0)
    assert (D_in.calls, D_out.calls) == (1, 1)
    D(x[1:3], sigma[1:3]), D(x[:1], sigma[:1])
    assert (D_in.calls, D_out.calls) == (2, 2)


def test_denoisers_of_one_network_are_one_call():
    calls = []

    def net(x, time, shift):
        calls.append(len(x))
        return x + shift[:, None]

    D = from_eps(net, lambda s: s)
    D_in, D_out = (D.given(shift=torch.full((1,), value)) for value in (0.5, 2.0))
    sigma, x = torch.tensor([0.1, 1.0], dtype=F64), normal(2, 3)
    found = within(D_in, D_out, LOW, HIGH)(x, sigma)
    assert calls == [4]
    assert_close(found, torch.stack([D_out(x, sigma)[0], D_in(x, sigma)[1]]))


def test_everywhere_and_nowhere():
    """(0, inf] is D_in in every step; an interval above the grid is D_out."""
    D_in, D_out = (Mixture.gaussian(torch.tensor([m, 0.0], dtype=F64), torch.eye(2, dtype=F64)).denoiser for m in (3.0, -3.0))
    sigmas, x = karras(8, 0.01, 20.0), 20 * normal(5, 2)
    assert torch.equal(sample(within(D_in, D_out, 0, math.inf), x, sigmas), sample(D_in, x, sigmas))
    assert torch.equal(sample(within(D_in, D_out, 100, math.inf), x, sigmas), sample(D_out, x, sigmas))


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (-0.1, 1.0), (math.nan, 1.0)])
def test_an_interval_that_is_none_is_refused(low, high):
    with pytest.raises(ValueError, match=r"low = .* and high = .*; expected noise levels with 0 <= low < high"):
        within(point(1.0), point(0.0), low, high)


def kept_by_diffusers(n, start, end):
    """controlnet_keep of StableDiffusionControlNetPipeline, as it stands there."""
    return [bool(1.0 - float(i / n < start or (i + 1) / n > end)) for i in range(n)]


def asked(answered):
    """DDIM, which keeps what D says at the start of each step."""

    def step(D, x, sigma, sigma_next, memory=None):
        answered.append(bool(D(x, sigma)[0, 0]))
        return ddim(D, x, sigma, sigma_next, memory)

    return step


@pytest.mark.parametrize("n", [1, 3, 10, 20, 50])
def test_fractions_of_steps_as_diffusers_reads_them(n):
    """Every step at the level at which it starts, as DDIM calls D: all pairs of tenths, which are not exact in binary."""
    sigmas = karras(n, 0.02, 15.0)
    tried = 0
    for start in (k / 10 for k in range(11)):
        for end in (k / 10 for k in range(11)):
            kept = kept_by_diffusers(n, start, end)
            if start < end and any(kept):
                low, high = sigma_interval(sigmas, start, end)
                answered = []
                sample(within(point(1.0), point(0.0), low, high), normal(1, 2), sigmas, asked(answered))
                assert answered == kept
                tried += 1
            else:
                with pytest.raises(ValueError, match="expected"):
                    sigma_interval(sigmas, start, end)
    assert tried >= (1 if n == 1 else 5)


def test_fractions_are_compared_in_their_roundings():
    """0.28 x 25 = 7.000000000000001, and 7 / 25 = 0.28: step 7 is controlled."""
    sigmas = karras(25, 0.02, 15.0)
    assert 0.28 * 25 > 7 and kept_by_diffusers(25, 0.28, 1.0)[7]
    assert sigma_interval(sigmas, 0.28, 1.0) == (0.0, float(sigmas[7]))


def test_the_whole_grid_has_no_upper_end():
    """A start that is drawn at a level a little above the first, or rounded, is still inside."""
    sigmas = karras(5, 0.02, 15.0)
    assert sigma_interval(sigmas) == (0.0, math.inf)
    assert sigma_interval(sigmas, 0.2, 0.6) == (float(sigmas[3]), float(sigmas[1]))


@pytest.mark.parametrize(
    ("sigmas", "start", "end", "said"),
    [
        (karras(4).flip(0)[1:], 0.0, 1.0, "sigmas rises from .*; expected a falling grid"),
        (karras(4), 0.5, 0.5, "start = 0.5 and end = 0.5; expected fractions of the steps with 0 <= start < end <= 1"),
        (karras(4), 0.5, 1.5, "start = 0.5 and end = 1.5; expected fractions"),
        (karras(4), -0.5, 0.5, "start = -0.5 and end = 0.5; expected fractions"),
        (karras(4), 0.3, 0.45, "start = 0.3 and end = 0.45 have no whole step of 4 between them"),
    ],
)
def test_mistakes_are_named(sigmas, start, end, said):
    with pytest.raises(ValueError, match=said):
        sigma_interval(sigmas, start, end)
