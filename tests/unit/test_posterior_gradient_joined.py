"""Guidance by the gradient joined with replacement: reconstruction guidance of video, and MCG."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib.gaussians import Mixture
from course_lib.metrics import sliced_wasserstein
from course_lib.operators import Mask, Matrix
from course_lib.posterior import dps, dps_score, mcg, replacement
from course_lib.posterior.moments import Relay, moments
from course_lib.sample import sample
from course_lib.steps import ddim, ddpm
from tests.affine import F64, Problem, w2
from tests.draws import level, noise_of, normal

EXACT = {"rtol": 0, "atol": 1e-9}
"""Both sides are float64 matrix algebra with numbers up to 100: rounding is 1e-13, a wrong term is 1e-3 and more."""


def geometric(n, high, low):
    """n levels from high to low in equal ratios, and 0."""
    return torch.cat([torch.logspace(math.log10(high), math.log10(low), n, dtype=F64), torch.zeros(1, dtype=F64)])


# --- reconstruction guidance of video ----------------------------------------------------------------------------------------

FRAMES = torch.arange(8.0, dtype=F64)
CLIP = Mixture.gaussian(torch.zeros(8), 0.9 ** (FRAMES - FRAMES[:, None]).abs())
"""A pixel over eight frames: neighbours have a correlation of 0.9."""
GIVEN = Mask(torch.arange(8) < 3)


@pytest.mark.parametrize("w_r", [0.5, 2.0])
def test_reconstruction_guidance_is_its_equation(w_r):
    """Ho et al. 2022, Eq. 7: D - (w_r / 2) grad_x |x^a - D^a|^2."""
    y = GIVEN(normal(1, 8))
    x, sigma = 2 * normal(5, 8, seed=1), level(1.5)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad((y - GIVEN(CLIP.denoiser(leaf, sigma))).square().sum(), leaf)
    found = dps_score(CLIP.denoiser, GIVEN, y, 0.0, w_r, variance=lambda sigma: sigma**2)(x, sigma)
    assert_close(found, CLIP.denoiser(x, sigma) - w_r / 2 * slope, **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reconstruction_guidance_follows_the_given_frames_where_replacement_breaks_off(seed):
    """The step from the last given frame to the first drawn one: E |x_4 - x_3|^2 has an excess over that of the exact posterior,
    0.2. Replacement's is more than twice that of guidance with replacement, whose D sees the given frames. All exact."""
    y, noise = GIVEN(CLIP.sample(1, torch.Generator().manual_seed(seed))), Relay()
    A = torch.eye(8, dtype=F64)[:3]
    posterior = CLIP.posterior(A, y[0, :3], 0.0)
    grid, start = geometric(30, 20.0, 0.02), (torch.zeros(8, dtype=F64), 400 * torch.eye(8, dtype=F64))
    step = replacement(ddpm(noise), GIVEN, y, noise)

    def excess(D):
        mean, cov = moments(step, D, noise, grid, *start)
        jump = lambda m, c: float((m[3] - m[2]) ** 2 + c[3, 3] + c[2, 2] - 2 * c[2, 3])
        return abs(jump(mean, cov) - jump(posterior.means[0], posterior.covs[0])), w2(mean, cov, posterior)

    plain = excess(CLIP.denoiser)
    guided = excess(dps_score(CLIP.denoiser, GIVEN, y, 0.0, 2.0, variance=lambda sigma: sigma**2))
    assert guided[1] < plain[1]
    assert guided[0] < 0.5 * plain[0]


# --- MCG ---------------------------------------------------------------------------------------------------------------------

TWINS = Mixture.isotropic(torch.tensor([[2.0, 2.0], [-2.0, -2.0]]), 0.3)
"""Two modes: where the first coordinate is, there must the second be."""
FIRST = torch.tensor([[1.0, 0.0]], dtype=F64)


def test_mcg_is_the_move_of_dps_and_then_replacement():
    p, x, noise = Problem(0), normal(5, 4), noise_of(1)
    found, memory = mcg(ddim, Matrix(p.A), p.y, noise, 0.4, 0.1)(p.prior.denoiser, x, level(1.0), level(0.5))
    moved, _ = dps(ddim, Matrix(p.A), p.y, 0.4)(p.prior.denoiser, x, level(1.0), level(0.5))
    stay = lambda D, x, sigma, sigma_next, memory=None: (moved, None)
    expected, _ = replacement(stay, Matrix(p.A), p.y, noise_of(1), 0.1)(None, x, level(1.0), level(0.5))
    assert memory is None
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mcg_mends_replacement_without_noise_and_breaks_with_it(seed):
    """Sliced W1 to the exact posterior for y = 2, 500 draws. Without noise draws of the exact posterior are 0.01 to 0.03 apart,
    and a draw in the wrong mode, which replacement sees too late, costs 4. The paper's form takes y for exact: its draws have no
    width in the first coordinate, whose posterior is s = 0.21 wide at sigma_y = 0.3 and 0.29 at 1. The mean over directions t of
    sqrt(2 / pi) (sqrt(0.3^2 sin^2 t + s^2 cos^2 t) - 0.3 |sin t|) is 0.053 and 0.082; what is found differs by the gap
    without noise at most, by the triangle inequality, and by 0.02 of the draws."""
    y, n, grid, start = torch.full((1, 1), 2.0, dtype=F64), 500, geometric(24, 10.0, 0.01), 10 * normal(500, 2, seed=seed)

    def gap(step, sigma_y):
        exact = TWINS.posterior(FIRST, y, sigma_y).sample(n, torch.Generator().manual_seed(9))
        return sliced_wasserstein(sample(TWINS.denoiser, start, grid, step), exact)

    A = Matrix(FIRST)
    steps = lambda: (ddpm(noise_of(10 + seed)), A, y, noise_of(20 + seed))
    gaps = [gap(mcg(*steps(), 0.3), sigma_y) for sigma_y in (0.0, 0.3, 1.0)]
    assert gaps[0] < 0.5 * gap(replacement(*steps()), 0.0)
    assert gaps[0] < 0.5 * gap(dps(steps()[0], A, y, 0.3), 0.0)
    assert gaps[1:] == pytest.approx([0.053, 0.082], abs=gaps[0] + 0.02)
    assert gaps[0] < gaps[1] < gaps[2]
