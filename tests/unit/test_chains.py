"""The density of the ancestral chain, without samples: exact on a Gaussian, and as near to the data as 1 / steps."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib.chains import chain_density, line, wasserstein
from course_lib.gaussians import Mixture
from course_lib.schedules import karras
from course_lib.worlds.toys import three_blobs, two_peaks

F64 = torch.float64
COARSE = torch.tensor([12.0, 7.0, 4.0, 2.5, 1.5, 1.0, 0.7, 0.5, 0.35], dtype=F64)


def grid_of(n: int) -> torch.Tensor:
    return karras(n, 0.05, 80.0, to_zero=False)


def kernel_of(sigma: float, sigma_next: float, variance: str) -> tuple[float, float]:
    """r and s of x' = D + r (x - D) + s z: Ho et al. 2020, Eq. 7 and Sec. 3.2, in x = x0 + sigma eps."""
    gap = sigma**2 - sigma_next**2
    s2 = sigma_next**2 * gap / sigma**2 if variance == "small" else (1 + sigma_next**2) * gap / (1 + sigma**2)
    return sigma_next**2 / sigma**2, math.sqrt(s2)


def normal_density(x: torch.Tensor, mean: float, variance: float) -> torch.Tensor:
    return (-((x - mean) ** 2) / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_chain_of_a_gaussian_is_gaussian(variance):
    """x' - m = A (x - m) + s z with A = c + r (1 - c), c = v / (v + sigma^2): a recursion for the variance alone.

    The quadrature errs by 5e-9 a step; the density is of the order of 1.
    """
    m, v = 0.4, 0.25
    gaussian = Mixture.gaussian(torch.tensor([m]), torch.tensor([[v]]))
    end = v + float(COARSE[0]) ** 2
    for sigma, sigma_next in pairwise(COARSE.tolist()):
        r, s = kernel_of(sigma, sigma_next, variance)
        c = v / (v + sigma**2)
        end = (c + r * (1 - c)) ** 2 * end + s**2
    lattice = line(gaussian)
    found = chain_density(gaussian, COARSE, variance, lattice)
    assert_close(found, normal_density(lattice, m, end), rtol=0, atol=5e-8)
    assert abs(end - v - float(COARSE[-1]) ** 2) > 0.01  # it is the chain's law that was found, not the data's


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("levels", [[3.0, 0.6], [3.0, 2.9], COARSE.tolist()])
def test_the_chain_of_a_mixture_is_its_matrix_of_kernels(variance, levels):
    """The same integral as a full matrix on wide lattices of x itself; kernels from narrower than 2 spacings to far wider."""
    mixture = two_peaks(weight=0.3)
    lattice = line(mixture, levels[-1])
    nodes = torch.linspace(-1, 1, 1601, dtype=F64) * (8 * levels[0] + 2)
    p = mixture.log_prob(nodes[:, None], levels[0]).exp()
    for sigma, sigma_next in pairwise(levels):
        r, s = kernel_of(sigma, sigma_next, variance)
        D = mixture.denoiser(nodes[:, None], sigma).flatten()
        following = lattice if sigma_next == levels[-1] else torch.linspace(-1, 1, 1601, dtype=F64) * (8 * sigma_next + 2)
        p = (p * (nodes[1] - nodes[0])) @ normal_density(following, (D + r * (nodes - D))[:, None], s**2)
        nodes = following
    assert_close(chain_density(mixture, torch.tensor(levels, dtype=F64), variance, lattice), p, rtol=0, atol=1e-7)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_gap_of_the_chain_falls_as_one_over_its_steps(variance):
    """W1 between the chain's end and the exact law, from 50 to 400 steps, on two unequal peaks.

    The gap is a series in the step's size delta = log(sigma / sigma'), a delta + b delta^2 + ..., so that the slope over
    a doubling is -1 + O(delta), and two slopes extrapolated to delta = 0 are -1 + O(delta^2); delta is the largest of
    the grid, and the constants are of the order of 1. The quadrature's own share is below 1e-6.
    """
    mixture = two_peaks(weight=0.3)
    lattice = line(mixture)
    steps = (50, 100, 200, 400)
    exact = mixture.log_prob(lattice[:, None], 0.05).exp()
    gap = [wasserstein(chain_density(mixture, grid_of(n), variance, lattice), exact, lattice) for n in steps]
    delta = [float(-grid_of(n).log().diff().min()) for n in steps]
    slope = [math.log2(after / before) for before, after in pairwise(gap)]
    for k in range(3):
        assert abs(slope[k] + 1) < delta[k], (slope, delta)
    for k in range(2):
        assert abs(2 * slope[k + 1] - slope[k] + 1) < delta[k] ** 2, (slope, delta)


def test_the_density_does_not_depend_on_the_lattice():
    mixture = two_peaks(weight=0.3)
    coarse, fine = line(mixture, n=1501), torch.linspace(-9, 9, 3601, dtype=F64)
    shared = coarse[500:1001:50]  # -2.5 ... 2.5 by 0.5, and so points of the second lattice
    found = [chain_density(mixture, grid_of(30), "small", lattice) for lattice in (coarse, fine)]
    at = ((shared + 9) / 0.005).round().long()
    assert_close(fine[at], shared)
    assert_close(found[1][at], found[0][500:1001:50], rtol=0, atol=1e-7)


def test_wasserstein_of_densities():
    """A shift costs itself; from N(0, a^2) to N(0, b^2) it is |a - b| sqrt(2 / pi). The cdfs are read h apart."""
    x = torch.linspace(-10, 10, 4001, dtype=F64)
    assert wasserstein(normal_density(x, 0.0, 1.0), normal_density(x, 0.7, 1.0), x) == pytest.approx(0.7, rel=1e-9)
    found = wasserstein(normal_density(x, 0.0, 1.0), normal_density(x, 0.0, 0.25), x)
    assert found == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=1e-5)  # the kink at 0 costs h^2 = 2.5e-5 at most
    assert wasserstein(x, x, x) == 0


@pytest.mark.parametrize("sigma", [0.05, 1.0, 100.0])
def test_the_line_holds_the_mixture_at_every_level(sigma):
    """Peaks near and far, wide and narrow, and one far from 0, whose chain starts at 0; 1e-10 lies beyond."""
    for mixture in (two_peaks(), two_peaks(6.0, 2.0, 0.1), Mixture.gaussian(torch.tensor([3.0]), torch.tensor([[1e-4]]))):
        x = line(mixture, sigma)
        inside = mixture.log_prob(x[:, None], sigma).exp().sum() * (x[1] - x[0])
        assert abs(float(inside) - 1) < 1e-8
    assert_close(line(two_peaks()), torch.linspace(-7.5, 7.5, 3001, dtype=F64))


def test_wasserstein_and_line_errors():
    x = torch.linspace(0, 1, 5, dtype=F64)
    with pytest.raises(ValueError, match=r"p has shape \(5,\) and q \(5, 1\); expected \(5,\), as lattice has"):
        wasserstein(x, x[:, None], x)
    with pytest.raises(ValueError, match=r"lattice has shape \(5,\); expected at least two evenly spaced"):
        wasserstein(x, x, x**2)
    with pytest.raises(ValueError, match="mixture has dimension 2; expected 1"):
        line(three_blobs())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sigmas": torch.tensor([1.0, 0.0])}, "sigmas ends at 0; expected a falling grid whose last level is above 0"),
        ({"sigmas": torch.tensor([0.1, 1.0])}, "sigmas ends at 1; expected a falling grid"),
        ({"mixture": three_blobs()}, "mixture has dimension 2; expected 1"),
        ({"variance": "beta"}, "variance = 'beta'; expected 'small'"),
        (
            {"lattice": torch.linspace(-2, 2, 501)},
            "from -2 to 2 and holds the probability 0.9.* at sigma = 12; .* make it longer",
        ),
        (
            {"lattice": torch.linspace(-8, 8, 41)},
            r"spacing 0.4, wider than the step to sigma = 0.5; expected at least \d+ points",
        ),
        ({"lattice": torch.tensor([0.0, 1.0, 3.0])}, r"lattice has shape \(3,\); expected at least two evenly spaced"),
        ({"lattice": torch.linspace(8, -8, 501)}, "evenly spaced, rising points"),
    ],
)
def test_chain_errors(change, said):
    given = {"mixture": two_peaks(), "sigmas": COARSE, "variance": "small", "lattice": None} | change
    with pytest.raises(ValueError, match=said):
        chain_density(**given)
