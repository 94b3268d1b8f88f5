"""DPS in both forms and PiGDM: their recursions on Gaussians, where they are exact, and how large their bias is."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib.gaussians import Mixture
from course_lib.metrics import sliced_wasserstein, sliced_wasserstein_floor
from course_lib.operators import (
    HDR,
    JPEG,
    BlockAverage,
    Blur,
    GaussianNoise,
    Mask,
    Matrix,
    PhaseRetrieval,
    PoissonNoise,
    gaussian_kernel,
    measure,
)
from course_lib.operators.base import LinearOperator
from course_lib.posterior import dps, dps_score, gaussian_variance, pigdm
from course_lib.posterior.moments import Relay, moments
from course_lib.sample import sample
from course_lib.schedules import Linear
from course_lib.steps import ddim, ddpm
from tests.affine import F64, Problem, shrink
from tests.draws import level, noise_of, normal

EXACT = {"rtol": 0, "atol": 1e-9}
"""Both sides are float64 matrix algebra with numbers up to 100: rounding is 1e-13, a wrong term is 1e-3 and more."""
LEVELS = [0.02, 0.3, 1.0, 5.0, 80.0]
GRID = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.3, 0.1, 0.0], dtype=F64)
ONE = torch.ones(1, 1, dtype=F64)


def geometric(n, high=80.0, low=0.002):
    """n levels from high to low in equal ratios, and 0."""
    return torch.cat([torch.logspace(math.log10(high), math.log10(low), n, dtype=F64), torch.zeros(1, dtype=F64)])


def flat(D):
    """A Denoiser of vectors as one of pictures."""
    return lambda x, sigma: D(x.flatten(1), sigma).reshape(x.shape)


# --- PiGDM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sigma_y", [0.0, 0.3])
@pytest.mark.parametrize("sigma", LEVELS)
def test_pigdm_is_the_exact_posteriors_denoiser_on_a_round_gaussian(std, sigma_y, sigma):
    p = Problem(0, sigma_y=sigma_y)
    prior = Mixture.gaussian(p.prior.means[0], std**2 * p.I)
    x = normal(6, p.d, seed=1) * (1 + sigma)
    found = pigdm(prior.denoiser, Matrix(p.A), p.y, sigma_y, gaussian_variance(std))(x, level(sigma))
    assert_close(found, prior.posterior(p.A, p.y, sigma_y).denoiser(x, sigma), **EXACT)
    assert float((found - prior.denoiser(x, sigma)).abs().max()) > 1e-3


@pytest.mark.parametrize("std", [0.5, 2.0])
@pytest.mark.parametrize("sigma", LEVELS)
def test_the_papers_variance_is_that_of_a_prior_of_deviation_1_and_biased_elsewhere(std, sigma):
    """A = 1: D' - E[x0 | x, y] = r^2 (1 / (r_1^2 + sigma_y^2) - 1 / (r^2 + sigma_y^2)) (y - D), r_1 the paper's and r the right
    one."""
    prior, sigma_y, y, x = Mixture.gaussian(torch.zeros(1), std**2 * ONE), 0.1, 0.5 * ONE, (1 + sigma) * normal(5, 1)
    found = pigdm(prior.denoiser, Matrix(ONE), y, sigma_y)(x, level(sigma))
    bias = found - prior.posterior(ONE, y, sigma_y).denoiser(x, sigma)
    r2, paper = sigma**2 * std**2 / (sigma**2 + std**2), sigma**2 / (1 + sigma**2)
    expected = r2 * (1 / (paper + sigma_y**2) - 1 / (r2 + sigma_y**2)) * (y - prior.denoiser(x, sigma))
    assert_close(bias, expected, **EXACT)
    assert sigma < 0.1 or float(bias.abs().max()) > 1e-3
    exact = pigdm(Mixture.gaussian(torch.zeros(1), ONE).denoiser, Matrix(ONE), y, sigma_y)(x, level(sigma))
    assert_close(exact, Mixture.gaussian(torch.zeros(1), ONE).posterior(ONE, y, sigma_y).denoiser(x, sigma), **EXACT)


def test_what_pigdm_draws_with_the_papers_variance():
    """N(0, 1/4), sigma_y = 0.1, y = 0.5; the posterior is N(0.481, 0.098^2). DDPM's chain in n steps has an error of order 1 / n
    even for the exact denoiser: its deviation is 0.001 short in 500 steps, so 0.0015 is allowed."""
    D, noise = (lambda x, sigma: x / (1 + 4 * sigma**2)), Relay()

    def drawn(variance):
        guided = pigdm(D, Matrix(ONE), 0.5 * ONE, 0.1, variance)
        mean, cov = moments(ddpm(noise), guided, noise, geometric(500), torch.zeros(1, dtype=F64), 6400 * ONE)
        return float(mean), math.sqrt(float(cov))

    assert drawn(gaussian_variance(0.5)) == pytest.approx((0.4808, 0.0981), abs=1.5e-3)
    assert drawn(gaussian_variance(1.0)) == pytest.approx((0.465, 0.102), abs=1.5e-3)


def pigdm_map(p, sigma):
    """M, b of PiGDM's estimate on any Gaussian, with the paper's r^2."""
    K, k = shrink(p.prior, sigma)
    r2 = sigma**2 / (1 + sigma**2)
    G = sigma**2 * K.T @ p.A.T @ torch.linalg.inv(r2 * p.A @ p.A.T + p.sigma_y**2 * torch.eye(len(p.A), dtype=F64))
    return K - G @ p.A @ K, k + G @ (p.y[0] - p.A @ k)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sigma_y", [0.0, 0.3])
def test_pigdm_is_its_own_recursion(seed, sigma_y):
    p, noise = Problem(seed, sigma_y=sigma_y), Relay()
    mean, cov = p.start(5.0)
    guided = pigdm(p.prior.denoiser, Matrix(p.A), p.y, sigma_y)
    found = moments(ddpm(noise), guided, noise, GRID, mean, cov)
    for sigma, sigma_next in pairwise(GRID):
        mean, cov = after_ddpm(mean, cov, *pigdm_map(p, sigma), sigma, sigma_next)
    assert_close(found, (mean, cov), **EXACT)


def after_ddpm(mean, cov, M, b, sigma, sigma_next):
    """Moments after DDPM's step with the estimate M x + b."""
    rho2, I = (sigma_next / sigma) ** 2, torch.eye(len(mean), dtype=F64)
    M, b = (1 - rho2) * M + rho2 * I, (1 - rho2) * b
    return M @ mean + b, M @ cov @ M.T + sigma_next**2 * (1 - rho2) * I


class NoSVD(LinearOperator):
    """The same operator, of which nothing is known but what it does."""

    def __init__(self, A):
        self.A, self.shape, self.out = A, A.shape, A.out

    def apply(self, x):
        return self.A.apply(x)


SHAPE = (3, 8, 8)
OPERATORS = {
    "mask": lambda: Mask.box(SHAPE, 4),
    "super-resolution": lambda: BlockAverage(SHAPE, 2),
    "blur": lambda: Blur(gaussian_kernel(1.0, 5), SHAPE),
}


@pytest.mark.parametrize(
    ("name", "sigma_y"),
    [(name, sigma_y) for name in OPERATORS for sigma_y in (0.0, 0.2) if (name, sigma_y) != ("blur", 0.0)],
)
@pytest.mark.parametrize("each", [False, True])
def test_pigdm_inverts_by_the_svd_and_by_conjugate_gradients_alike(name, sigma_y, each):
    """`solve` stops at a residual of 1e-6 of its right-hand side; the inverse makes of it 1e-6 times the condition number, which
    is 1 for the first two, and at most 1 + (r / sigma_y)^2 = 26 for the blur. Without noise the blur is left out: its singular
    values fall to 0, and each of the two stops at one of its own."""
    A, sigma = OPERATORS[name](), level(1.0)
    y = measure(A, normal(1, *SHAPE, seed=1), GaussianNoise(sigma_y), torch.Generator().manual_seed(0))
    D = lambda x, sigma: x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)
    x, sigma = normal(3, *SHAPE), sigma.expand(3) if each else sigma
    found = pigdm(D, NoSVD(A), y, sigma_y)(x, sigma)
    assert_close(found, pigdm(D, A, y, sigma_y)(x, sigma), rtol=0, atol=1e-4)
    assert float((found - D(x, sigma)).abs().max()) > 0.1


@pytest.mark.parametrize("sigma_y", [0.0, 0.05])
@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_pigdm_for_jpeg_is_its_formula(sigma, sigma_y):
    """D' = D + sigma^2 / (r^2 + sigma_y^2) J^T (decode(y) - decode(A(D))) with the J of a Gaussian, K = C (C + sigma^2)^-1."""
    A, p = JPEG((1, 8, 8), 20), Problem(0, d=64)
    y = A(normal(1, 1, 8, 8, seed=4) / 2)
    x = (1 + sigma) * normal(3, 1, 8, 8, seed=2)
    K, k = shrink(p.prior, level(sigma))
    estimate = (x.flatten(1) @ K.T + k).reshape(x.shape)
    apart = (A.decode(y) - A.decode(A(estimate))).flatten(1)
    expected = estimate + (sigma**2 / (sigma**2 / (1 + sigma**2) + sigma_y**2) * apart @ K).reshape(x.shape)
    assert_close(pigdm(flat(p.prior.denoiser), A, y, sigma_y)(x, level(sigma)), expected, **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pigdm_restores_jpeg(seed):
    """Six smooth pictures, each with noise of 0.05, at quality 5: the decoded file is off by 0.12 to 0.13, two draws of one mode
    by 0.07."""
    place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()
    C = 0.25 * torch.exp(-(torch.cdist(place, place) ** 2) / 18) + 1e-4 * torch.eye(64, dtype=F64)
    modes = Mixture.gaussian(torch.zeros(64), C).sample(6, torch.Generator().manual_seed(seed))
    prior, A = Mixture.isotropic(modes, 0.05), JPEG((1, 8, 8), 5)
    x0 = prior.sample(40, torch.Generator().manual_seed(seed)).reshape(40, 1, 8, 8)
    guided = pigdm(flat(prior.denoiser), A, A(x0))
    x = sample(guided, 20 * normal(40, 1, 8, 8, seed=seed + 5), geometric(30, 20.0, 0.01), ddpm(noise_of(seed)))
    rmse = lambda a: float((a - x0).square().mean().sqrt())
    assert rmse(x) < 0.7 * rmse(A.decode(A(x0)))


# --- DPS -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("zeta", "variance"), [(1.0, None), (0.3, None), (1.0, gaussian_variance(0.7))])
def test_dps_score_is_its_own_recursion(seed, zeta, variance):
    p, noise = Problem(seed, sigma_y=0.5), Relay()
    mean, cov = p.start(5.0)
    guided = dps_score(p.prior.denoiser, Matrix(p.A), p.y, p.sigma_y, zeta, variance=variance)
    found = moments(ddpm(noise), guided, noise, GRID, mean, cov)
    for sigma, sigma_next in pairwise(GRID):
        K, k = shrink(p.prior, sigma)
        total = p.sigma_y**2 + (variance(sigma) if variance else 0.0)
        G = zeta * sigma**2 / total * K.T @ p.A.T
        mean, cov = after_ddpm(mean, cov, K - G @ p.A @ K, k + G @ (p.y[0] - p.A @ k), sigma, sigma_next)
    assert_close(found, (mean, cov), rtol=1e-12, atol=1e-9)  # where zeta sigma^2 / sigma_y^2 is too much it grows to 1e7


@pytest.mark.parametrize(("sigma", "sigma_next"), [(5.0, 2.0), (0.5, 0.3), (0.1, 0.0)])
@pytest.mark.parametrize("zeta", [0.0, 0.5])
def test_a_step_of_dps_is_the_formula_by_hand(sigma, sigma_next, zeta):
    """grad_x |y - A D| = -K^T A^T r / |r| with the K of a Gaussian; no gradient, and no nan, where r = 0."""
    p, x = Problem(1), normal(5, 4, seed=3)
    sigma, sigma_next = level(sigma), level(sigma_next)
    K, _ = shrink(p.prior, sigma)
    x0 = p.prior.denoiser(x, sigma)
    r = p.y - x0 @ p.A.T
    slope = -(r / r.norm(dim=1, keepdim=True)) @ p.A @ K
    plain, _ = ddim(p.prior.denoiser, x, sigma, sigma_next)
    found, memory = dps(ddim, Matrix(p.A), p.y, zeta)(p.prior.denoiser, x, sigma, sigma_next)
    assert memory is None
    assert_close(found, plain - zeta * torch.sqrt((1 + sigma**2) * (1 + sigma_next**2)) * slope, **EXACT)
    met, _ = dps(ddim, Matrix(p.A), x0 @ p.A.T, 1.0)(p.prior.denoiser, x, sigma, sigma_next)
    assert_close(met, plain, **EXACT)


@pytest.mark.parametrize("zeta", [0.2, 1.0])
def test_dps_is_the_published_algorithm_in_its_own_coordinate(zeta):
    """Algorithm 1 as it is printed, for DDPM's table: x_{i-1} = a x_i + b x0 + s z - zeta / |r| grad_{x_i} |r|^2, all in x_vp.

    The squared norm's zeta is half of ours. One chain of 40 steps in both coordinates, with the same noise."""
    p, noise = Problem(2), noise_of(5)
    schedule = Linear()
    sigmas = torch.cat([schedule.sigma(torch.linspace(1, 1 / 40, 40, dtype=F64)), torch.zeros(1, dtype=F64)])
    alpha_bar = 1 / (1 + sigmas**2)
    start = normal(4, p.d, seed=6)
    x = start.clone()
    for at, after in pairwise(alpha_bar):
        alpha = at / after
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            x0 = p.prior.denoiser(leaf / at.sqrt(), (1 / at - 1).sqrt())
            r = p.y - x0 @ p.A.T
            (slope,) = torch.autograd.grad(r.square().sum(), leaf)
        mean = alpha.sqrt() * (1 - after) / (1 - at) * x + after.sqrt() * (1 - alpha) / (1 - at) * x0.detach()
        spread = ((1 - after) / (1 - at) * (1 - alpha)).sqrt()
        z = noise(x) if after < 1 else 0.0
        x = mean + spread * z - zeta / 2 / r.detach().norm(dim=1, keepdim=True) * slope
    step = dps(ddpm(noise_of(5)), Matrix(p.A), p.y, zeta)
    assert_close(sample(p.prior.denoiser, start / alpha_bar[0].sqrt(), sigmas, step), x, **EXACT)


COUNTS = PoissonNoise(30.0, black=-1.0)


def test_the_poisson_norm_is_the_gaussians_on_whitened_counts():
    """|r|_L with L = diag(1 / (2 N)) and r in counts is |r / sqrt(2 v)|, v = N / rate^2; a count of 0 weighs as one of 1."""
    p = Problem(0)
    y = torch.tensor([[-1.0, 0.4]], dtype=F64)
    v = torch.tensor([1.0, 30 * 1.4], dtype=F64) / 30**2
    x, sigma, sigma_next = normal(5, p.d), level(1.0), level(0.5)
    for scale, weights in ((2.0, (2 * v).rsqrt()), (1.0, v.rsqrt())):
        white, y_white = Matrix(weights[:, None] * p.A), y * weights
        if scale == 2.0:
            found, _ = dps(ddim, Matrix(p.A), y, 0.3, COUNTS)(p.prior.denoiser, x, sigma, sigma_next)
            expected, _ = dps(ddim, white, y_white, 0.3)(p.prior.denoiser, x, sigma, sigma_next)
        else:
            found = dps_score(p.prior.denoiser, Matrix(p.A), y, 0.0, 0.3, COUNTS)(x, sigma)
            expected = dps_score(p.prior.denoiser, white, y_white, 1.0, 0.3)(x, sigma)
        assert_close(found, expected, **EXACT)
    counts = torch.tensor([[3.0, 40.0]], dtype=F64)
    found, _ = dps(ddim, Matrix(p.A), counts, 0.3, "poisson")(p.prior.denoiser, x, sigma, sigma_next)
    expected, _ = dps(ddim, Matrix(p.A), counts, 0.3, PoissonNoise(1.0))(p.prior.denoiser, x, sigma, sigma_next)
    assert torch.equal(found, expected)


def smooth(mean_scale, std, seed, side=4):
    """A Gaussian of smooth pictures around a mean drawn from the seed."""
    place = torch.cartesian_prod(torch.arange(float(side)), torch.arange(float(side))).double()
    C = std**2 * torch.exp(-(torch.cdist(place, place) ** 2) / 8) + 1e-3 * torch.eye(side**2, dtype=F64)
    return Mixture.gaussian(mean_scale * normal(side**2, seed=seed).clamp(-1, 1), C)


SMALL = (1, 4, 4)
PHOTONS = PoissonNoise(50.0, black=-1.0)
RECOVERED = {  # operator, noise, likelihood, zeta of both forms, the prior's mean and deviation
    "phase retrieval": (PhaseRetrieval(SMALL), GaussianNoise(0.02), "gaussian", (0.3, 1.0), 1.0, 0.2),
    "clipped light": (HDR(SMALL, 3.0), GaussianNoise(0.2), "gaussian", (0.3, 0.1), 0.5, 0.4),
    "blur": (Blur(gaussian_kernel(0.8, 3), SMALL), GaussianNoise(0.05), "gaussian", (0.3, 1.0), 0.5, 0.4),
    "photons": (BlockAverage(SMALL, 2), PHOTONS, PHOTONS, (0.1, 1.0), 0.5, 0.4),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", RECOVERED)
def test_both_forms_recover_from_linear_nonlinear_and_poisson_measurements(name, seed):
    """RMSE to the picture, against that of draws that do not look at y: at most three quarters, so that nearly half of the
    squared error is gone."""
    A, noise_y, likelihood, (zeta, zeta_score), mean_scale, std = RECOVERED[name]
    prior, n = smooth(mean_scale, std, seed), 30
    x0 = prior.sample(n, torch.Generator().manual_seed(seed + 5)).reshape(n, *SMALL).clamp(-1, 1)
    y = measure(A, x0, noise_y, torch.Generator().manual_seed(3))
    D, start, grid = flat(prior.denoiser), 20 * normal(n, *SMALL, seed=seed + 9), geometric(30, 20.0, 0.01)
    sigma_y = 0.0 if likelihood is PHOTONS else noise_y.std
    score = dps_score(D, A, y, sigma_y, zeta_score, likelihood, variance=gaussian_variance(1.0))
    found = {
        "prior": sample(D, start, grid, ddpm(noise_of(1))),
        "paper": sample(D, start, grid, dps(ddpm(noise_of(1)), A, y, zeta, likelihood)),
        "score": sample(score, start, grid, ddpm(noise_of(1))),
    }
    rmse = {key: float((x - x0).square().mean().sqrt()) for key, x in found.items()}
    assert max(rmse["paper"], rmse["score"]) < 0.75 * rmse["prior"], rmse


CORNERS = Mixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[2.0, 2.0], [-2.0, 1.0], [0.0, -2.0]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.4, -0.2], [-0.2, 0.3]]]),
)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_bias_of_dps_score_on_a_mixture(seed):
    """Sliced W1 to the exact posterior, 500 draws: above the floor by five of its deviations and twice over, under half of the
    distance of draws that do not look at y. The exact denoiser in as many steps is under half of the bias: steps are not it."""
    A, y, sigma_y, n = torch.tensor([[1.0, 0.5]], dtype=F64), ONE, 0.5, 500
    posterior, grid, start = CORNERS.posterior(A, y, sigma_y), geometric(50, 40.0, 0.01), 40 * normal(n, 2, seed=seed)
    floor, spread = sliced_wasserstein_floor(posterior.sample, n)
    exact = posterior.sample(n, torch.Generator().manual_seed(seed + 30))

    def gap(D):
        return sliced_wasserstein(sample(D, start, grid, ddpm(noise_of(seed + 10))), exact)

    bias = gap(dps_score(CORNERS.denoiser, Matrix(A), y, sigma_y))
    assert bias > max(2 * floor, floor + 5 * spread)
    assert bias < 0.5 * gap(CORNERS.denoiser)
    assert gap(posterior.denoiser) < 0.5 * bias
    assert gap(pigdm(CORNERS.denoiser, Matrix(A), y, sigma_y)) < bias
