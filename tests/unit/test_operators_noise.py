"""Noise of measurements: its moments, its density, and a measurement in one call."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib.operators import BlockAverage, GaussianNoise, Mask, PoissonNoise, measure
from tests.draws import normal

F64 = torch.float64
N = 40_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_gaussian_noise_has_its_moments():
    """Mean and variance within 4.5 of their standard errors, std / sqrt(N) and var sqrt(2 / N)."""
    clean = torch.full((1, N), 0.3, dtype=F64)
    y = GaussianNoise(0.2)(clean, seeded())
    assert abs(float(y.mean()) - 0.3) < 4.5 * 0.2 / N**0.5
    assert abs(float(y.var()) - 0.04) < 4.5 * 0.04 * (2 / N) ** 0.5
    assert torch.equal(y, GaussianNoise(0.2)(clean, seeded()))


def test_gaussian_density():
    y, clean = normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
    expected = torch.distributions.Normal(clean, 0.7).log_prob(y).flatten(1).sum(1)
    assert_close(GaussianNoise(0.7).log_prob(y, clean), expected)


def test_no_noise_is_no_noise():
    y = normal(1, 3)
    assert GaussianNoise(0)(y) is y
    with pytest.raises(ValueError, match="std = 0 has no density; expected std > 0"):
        GaussianNoise(0).log_prob(y, y)


@pytest.mark.parametrize("black", [0.0, -1.0])
def test_poisson_noise_has_its_moments(black):
    """Mean v and variance (v - black) / rate.

    Standard errors: sqrt(var / N), and for the variance sqrt((2 + 1/m) / N) of it with m the mean count (kurtosis 3 + 1/m).
    """
    rate, value = 20.0, 0.4
    y = PoissonNoise(rate, black)(torch.full((1, N), value, dtype=F64), seeded())
    variance, mean_count = (value - black) / rate, rate * (value - black)
    assert abs(float(y.mean()) - value) < 4.5 * (variance / N) ** 0.5
    assert abs(float(y.var()) - variance) < 4.5 * variance * ((2 + 1 / mean_count) / N) ** 0.5
    counts = (y - black) * rate
    assert_close(counts, counts.round())


def test_poisson_density():
    noise, clean = PoissonNoise(5.0, -1.0), torch.rand(2, 3, 3, generator=seeded(), dtype=F64) * 2 - 1
    y = noise(clean, seeded(1))
    expected = torch.distributions.Poisson(5 * (clean + 1)).log_prob((5 * (y + 1)).round()).flatten(1).sum(1)
    assert_close(noise.log_prob(y, clean), expected)
    single = noise.log_prob(y.float(), clean.float())  # a count that float32 rounds is still that count
    assert_close(single.double(), expected, rtol=1e-5, atol=1e-4)
    dark = torch.full((1, 2), -1.0)
    assert_close(noise.log_prob(dark, dark), torch.zeros(1))  # no light, no count: certain


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: GaussianNoise(-0.1), "std = -0.1; expected a standard deviation >= 0"),
        (lambda: GaussianNoise(math.nan), "std = nan; expected"),
        (lambda: PoissonNoise(0), "rate = 0; expected a number of counts > 0"),
        (
            lambda: PoissonNoise(9)(torch.tensor([[-0.5]])),
            r"clean has .* -0.5, a negative intensity; .*black = 0 \(black = -1",
        ),
        (lambda: PoissonNoise(9).log_prob(torch.ones(1, 1), -torch.ones(1, 1)), "a negative intensity"),
        (lambda: PoissonNoise(9).log_prob(-torch.ones(1, 1), torch.ones(1, 1)), "y has a value of -1, a negative count"),
    ],
)
def test_bad_noise(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_measure():
    x, A = normal(2, 1, 8, 8), BlockAverage((1, 8, 8), 2)
    assert_close(measure(A, x), A(x))
    noise = GaussianNoise(0.1)
    assert_close(measure(A, x, noise, seeded(4)), noise(A(x), seeded(4)))
    hidden = Mask.box((1, 8, 8), 4)
    y = measure(hidden, x, noise, seeded(4))
    assert_close(y, hidden(noise(x, seeded(4))))  # no noise where there is no measurement
    assert hidden.check_measurement(y) is y
    white = PoissonNoise(10.0, -1.0)
    y = measure(hidden, x.clamp(-1, 1), white, seeded(5))
    assert float(y[..., 2:6, 2:6].abs().max()) == 0
    with pytest.raises(ValueError, match=r"x has shape \(2, 1, 8, 8\); expected \(B, 1, 6, 6\) for BlockAverage"):
        measure(BlockAverage((1, 6, 6), 2), x)
