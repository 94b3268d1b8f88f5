"""Adaptive steps: the flow within its tolerance and with fewer calls, the SDE with the right law, and a loop that ends."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib.adaptive import sample_adaptive
from course_lib.devices import SampleNoise
from course_lib.worlds.toys import three_blobs, two_peaks
from tests.draws import noise_of

F64 = torch.float64
SE = 4.5  # standard errors
LOW, HIGH = 0.02, 20.0


def counted(D):
    """D, and how often it was called."""

    def call(x, sigma):
        call.times += 1
        return D(x, sigma)

    call.times = 0
    return call


# --- the algorithm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True])
def test_one_round_is_algorithm_1(stochastic):
    """Jolicoeur-Martineau et al. 2021 for the VE SDE in the time log sigma: f = 0, g^2 = 2 sigma^2, and g^2 / 2 for the flow.

    A tolerance so loose that one round goes all the way: x'' = (x' + x~) / 2.
    """
    mixture, x = three_blobs(), 3 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    noise = noise_of(1) if stochastic else None
    found = sample_adaptive(mixture.denoiser, x, 2.0, 1.5, noise, rtol=0.0, atol=1e6, first=1.0)
    h, z = math.log(2.0 / 1.5), noise_of(1)(x) * stochastic
    g2 = lambda sigma: 2 * sigma**2 * (1.0 if stochastic else 0.5)
    x1 = x + h * g2(2.0) * mixture.score(x, 2.0) + math.sqrt(h * g2(2.0)) * z
    x2 = x + h * g2(1.5) * mixture.score(x1, 1.5) + math.sqrt(h * g2(1.5)) * z
    assert found.calls == 2
    assert_close(found.x, (x1 + x2) / 2, rtol=1e-10, atol=1e-10)
    assert all(row.tolist() == pytest.approx([2.0, 1.5]) for row in found.levels)


def test_the_error_decides_and_sets_the_next_step():
    """A point mass at 0, D = 0, on a line, the flow: x1 = (1 - h) x, x_new = (1 - h + h^2 / 2) x, error = h^2 |x| / (2 atol).

    So each round is known in full: refused or accepted, and the next h = 0.9 h error^-0.9, or what is left.
    """
    atol, span = 0.01, math.log(10)
    x, left, h, levels = 5.0, span, 0.2 * span, [1.0]
    calls = 0
    while left > 0:
        error = h**2 / 2 * x / atol
        calls += 2
        if error <= 1:
            x, left = x * (1 - h + h**2 / 2), left - h
            levels.append(0.1 * math.exp(left))
        h = min(left, 0.9 * h * error**-0.9)
    found = sample_adaptive(lambda x, s: 0 * x, torch.tensor([[5.0]], dtype=F64), 1.0, 0.1, None, 0.0, atol, first=0.2)
    assert found.calls == calls > 2 * (len(levels) - 1)  # the first step was refused
    assert found.levels[0].tolist() == pytest.approx(levels, rel=1e-9)
    assert float(found.x) == pytest.approx(x, rel=1e-9)


# --- the flow ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blobs_flow():
    """256 points of the noised mixture at 20, and where the exact flow carries them at 0.02."""
    mixture = three_blobs()
    x = mixture.sample(256, torch.Generator().manual_seed(0), HIGH)
    return mixture, x, mixture.reference_flow(x, HIGH, LOW, tolerance=1e-8)


def rms(found, end) -> float:
    return float((found - end).square().mean().sqrt())


def test_the_flow_is_within_its_tolerance(blobs_flow):
    """With rtol = 0 each accepted step of Euler's method errs by at most atol, Heun's by a factor O(h) less; the flow of the
    blobs contracts as a whole (a point mass would by sigma' / sigma), so that the errors do not pile up: the end is within
    atol in the mean square, and halving atol lowers the error each time.
    """
    mixture, x, end = blobs_flow
    gaps = []
    for atol in (0.08, 0.04, 0.02, 0.01):
        found = sample_adaptive(mixture.denoiser, x, HIGH, LOW, None, rtol=0.0, atol=atol)
        gaps.append(rms(found.x, end))
        assert gaps[-1] < atol
    assert all(fine < coarse for coarse, fine in pairwise(gaps))


def test_fewer_calls_than_fixed_steps(blobs_flow):
    """The same rule, Heun's method in log sigma, in even steps with as many calls of the network errs more than twice as much.

    At a loose tolerance: the blobs part in a short range of sigma, which even steps miss. The batch goes on until its slowest
    sample arrives, while a sample of its own needs fewer calls: on average not two thirds of them.
    """
    mixture, x, end = blobs_flow
    D = counted(mixture.denoiser)
    found = sample_adaptive(D, x, HIGH, LOW, None, rtol=0.0, atol=0.05)
    assert found.calls == D.times

    def fixed(n: int) -> float:
        y, h = x, math.log(HIGH / LOW) / n
        for k in range(n):
            s, s_next = (HIGH * math.exp(-h * i) for i in (k, k + 1))
            y1 = y + h * (mixture.denoiser(y, s) - y)
            y = (y1 + y + h * (mixture.denoiser(y1, s_next) - y1)) / 2
        return rms(y, end)

    assert fixed(found.calls // 2) > 2 * rms(found.x, end)
    accepted = [2 * (len(row) - 1) for row in found.levels]
    assert sum(accepted) / len(accepted) < 2 / 3 * found.calls


# --- the SDE ----------------------------------------------------------------------------------------------------------------

V = 1.0


def gaussian(x, sigma):
    """The denoiser of N(0, V), with a level for each row."""
    return V / (V + sigma[:, None] ** 2).to(x) * x


def variance(redraw: bool, rtol: float, n: int = 6000) -> float:
    x = math.sqrt(V + HIGH**2) * noise_of(1)(torch.empty(n, 1, dtype=F64))
    return float(sample_adaptive(gaussian, x, HIGH, LOW, noise_of(2), rtol, 0.0078, redraw=redraw).x.square().mean())


def test_the_sde_ends_in_the_law_of_the_data():
    """6,000 samples of a Gaussian on a line: the mean square within 4.5 standard errors of V + sigma_min^2, and the bias of the
    scheme, at most the sum of what the tolerance allows of the standard deviation of 1, rtol in all.
    """
    assert variance(False, 0.05) == pytest.approx(V + LOW**2, rel=SE * math.sqrt(2 / 6000) + 0.05)


def test_drawing_anew_spoils_the_law():
    """As published, a refused step draws new noise: what is accepted is then not Gaussian, and in one dimension the variance at
    the end is far outside of the bound that the kept path meets.
    """
    assert abs(variance(True, 0.05) - (V + LOW**2)) > 4 * (SE * math.sqrt(2 / 6000) + 0.05)


def test_a_kept_path_is_brownian():
    """Whatever is refused, the increments that a sample sees add up to a Brownian path, with Var(dW) = h in all.

    A denoiser of D = x leaves only noise: x_new = x + (sigma + sigma') / sqrt(2) dW. With rtol such that many steps are
    refused, the variance of the end is that of the integral of sqrt(2) sigma dW, HIGH^2 - LOW^2, up to the midpoint's error,
    which is h^2 / 12 of it at most.
    """
    n, high, low = 6000, 1.0, 0.2
    ends = {}
    for redraw in (False, True):
        found = sample_adaptive(
            lambda x, s: x, torch.zeros(n, 1, dtype=F64), high, low, noise_of(3), 0.0, 0.05, first=0.3, redraw=redraw
        )
        ends[redraw] = float(found.x.square().mean()) / (high**2 - low**2)
    assert ends[False] == pytest.approx(1, abs=SE * math.sqrt(2 / n) + 0.02)
    assert ends[True] < 1 - SE * math.sqrt(2 / n) - 0.02


def test_a_sample_does_not_change_with_its_batch():
    mixture = two_peaks()
    x = HIGH * SampleNoise(0)(torch.empty(5, 1, dtype=F64))
    together = sample_adaptive(mixture.denoiser, x, HIGH, 0.1, SampleNoise(1), rtol=0.3)
    alone = sample_adaptive(mixture.denoiser, x[3:4], HIGH, 0.1, SampleNoise(1, first=3), rtol=0.3)
    assert_close(together.x[3:4], alone.x)
    assert_close(together.levels[3], alone.levels[0])
    assert len({len(row) for row in together.levels}) > 1  # they do take different steps


def test_levels_fall_from_first_to_last():
    found = sample_adaptive(two_peaks().denoiser, torch.ones(3, 1, dtype=F64), 5.0, 0.1, SampleNoise(0), rtol=0.2)
    for row in found.levels:
        assert row[0] == pytest.approx(5.0) and row[-1] == pytest.approx(0.1)
        assert bool((row.diff() < 0).all())


# --- a loop that ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_network_that_breaks_is_reported_with_its_level(stochastic):
    D = lambda x, s: torch.where(s[:, None] < 1, float("nan"), 0.0).to(x) + 0 * x
    with pytest.raises(FloatingPointError, match="not finite after the step at sigma = [0-9.]+; expected finite"):
        sample_adaptive(D, torch.ones(2, 1, dtype=F64), 3.0, 0.1, noise_of(0) if stochastic else None)


def test_a_tolerance_that_cannot_be_met_ends():
    with pytest.raises(RuntimeError, match="max_calls = 40 is spent at sigma = .*loosen rtol or atol"):
        sample_adaptive(three_blobs().denoiser, torch.ones(2, 2, dtype=F64), 20.0, 0.02, None, 0.0, 1e-9, max_calls=40)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sigma_min": 0.0}, "sigma_min = 0.0, sigma_max = 20.0; expected 0 < sigma_min < sigma_max"),
        ({"sigma_min": 30.0}, "expected 0 < sigma_min < sigma_max"),
        ({"rtol": -0.1}, "rtol = -0.1"),
        ({"rtol": 0.0, "atol": 0.0}, "expected tolerances >= 0, at least one of them above 0"),
        ({"first": 0.0}, r"first = 0.0; expected a number in \(0, 1\]"),
        ({"exponent": 2.0}, "exponent = 2.0"),
        ({"safety": float("nan")}, "safety = nan"),
    ],
)
def test_options_are_checked(options, said):
    with pytest.raises(ValueError, match=said):
        sample_adaptive(three_blobs().denoiser, torch.ones(2, 2), **{"sigma_max": 20.0, "sigma_min": 0.02, **options})


def test_the_bar_and_the_type_of_x(capsys):
    found = sample_adaptive(two_peaks().denoiser, torch.ones(2, 1), 5.0, 0.1, noise_of(0), rtol=0.5, progress=True)
    assert found.x.dtype == torch.float32
    assert "adaptive sampling: 100%" in capsys.readouterr().err
