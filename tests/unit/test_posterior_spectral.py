"""DDRM, DDNM+ and SNIPS on Gaussians: each step is the affine map that its equations say, and its bias is what it is."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib.gaussians import Mixture
from course_lib.operators.base import Matrix
from course_lib.posterior import ddnm_plus, ddrm, ddrm_jpeg, ddrm_start, null_space, snips
from course_lib.posterior.moments import Relay, affine, moments
from course_lib.sample import sample
from course_lib.steps import ddpm
from tests.affine import F64, Problem, shrink, w2
from tests.draws import level, noise_of, normal

EXACT = {"rtol": 0, "atol": 1e-9}
"""Both sides are float64 matrix algebra with numbers up to 100: rounding is 1e-13, a wrong term is 1e-2 and more."""


def geometric(n: int, high: float = 80.0, low: float = 0.002) -> torch.Tensor:
    """n levels from high to low in equal ratios, and 0."""
    levels = torch.logspace(math.log10(high), math.log10(low), n, dtype=F64)
    return torch.cat([levels, torch.zeros(1, dtype=F64)])


def ddrm_map(p: Problem, sigma, sigma_next, eta, eta_b):
    """M, b, Q of DDRM's x' = M x + b + N(0, Q), written coordinate by coordinate from the paper's three cases."""
    K, k = shrink(p.prior, sigma)
    K, k = p.V.T @ K @ p.V, p.V.T @ k  # x0 = K x + k in the SVD's coordinates
    M, b, q = torch.zeros(p.d, p.d, dtype=F64), torch.zeros(p.d, dtype=F64), torch.zeros(p.d, dtype=F64)
    for i in range(p.d):
        e_i = p.I[i]
        if p.s[i] == 0:
            w = sigma_next * (1 - eta**2) ** 0.5 / sigma
            M[i], b[i], q[i] = (1 - w) * K[i] + w * e_i, (1 - w) * k[i], (eta * sigma_next) ** 2
        elif sigma_next < p.sigma_y / p.s[i]:
            w = sigma_next * (1 - eta**2) ** 0.5 * p.s[i] / p.sigma_y
            M[i], b[i], q[i] = (1 - w) * K[i], (1 - w) * k[i] + w * p.y_bar[i], (eta * sigma_next) ** 2
        else:
            M[i], b[i] = (1 - eta_b) * K[i], (1 - eta_b) * k[i] + eta_b * p.y_bar[i]
            q[i] = sigma_next**2 - (eta_b * p.sigma_y / p.s[i]) ** 2
    return p.V @ M @ p.V.T, p.V @ b, p.V @ torch.diag(q) @ p.V.T


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (0.0, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("sigma_y", [0.0, 0.3])
def test_ddrm_is_its_own_recursion(seed, eta, eta_b, sigma_y):
    p, noise = Problem(seed, sigma_y=sigma_y), Relay()
    step = ddrm(Matrix(p.A), p.y, sigma_y, noise, eta, eta_b)
    mean, cov = p.start(5.0)
    grid = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.3, 0.1, 0.05, 0.0], dtype=F64)
    found = moments(step, p.prior.denoiser, noise, grid, mean, cov)
    for sigma, sigma_next in pairwise(grid):
        M, b, Q = ddrm_map(p, sigma, sigma_next, eta, eta_b)
        mean, cov = M @ mean + b, M @ cov @ M.T + Q
    assert_close(found, (mean, cov), **EXACT)


def test_ddrm_draws_what_its_recursion_says():
    """Sampled moments, at 4.5 standard errors of 20,000 draws: the chain of `sample` draws as the probe assumes."""
    p, noise, n = Problem(3), Relay(), 20_000
    grid = geometric(12, 20.0, 0.02)
    mean, cov = moments(ddrm(Matrix(p.A), p.y, p.sigma_y, noise), p.prior.denoiser, noise, grid, *p.start(20.0))
    step = ddrm(Matrix(p.A), p.y, p.sigma_y, noise_of(1))
    x = sample(p.prior.denoiser, 20.0 * normal(n, p.d, seed=2), grid, step)
    error = (cov.diagonal() / n).sqrt()
    assert bool(((x.mean(0) - mean).abs() < 4.5 * error).all())
    error = ((cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / n).sqrt()
    assert bool(((x.T.cov() - cov).abs() < 4.5 * error).all())


@pytest.mark.parametrize(("steps", "variance"), [(20, 0.043), (1000, 0.002)])
def test_ddrm_is_biased_and_more_steps_make_it_worse(steps, variance):
    """N(0, 1), sigma_y = 0.5, y = 1.5: the posterior is N(1.2, 0.2). Levels from 80 to 0.002 in equal ratios, then 0."""
    prior, noise = Mixture.gaussian(torch.zeros(1), torch.ones(1, 1)), Relay()
    D = lambda x, sigma: x / (1 + sigma**2)  # the prior's, at a tenth of its time
    y = torch.full((1, 1), 1.5, dtype=F64)
    step = ddrm(Matrix(torch.ones(1, 1, dtype=F64)), y, 0.5, noise, eta=0.85, eta_b=1.0)
    start = torch.zeros(1, dtype=F64), torch.full((1, 1), 80.0**2, dtype=F64)
    mean, cov = moments(step, D, noise, geometric(steps), *start)
    assert float(cov) == pytest.approx(variance, abs=5e-4)  # the last digit shown
    exact = prior.posterior(torch.ones(1, 1), y, 0.5)
    assert float(exact.cov) == pytest.approx(0.2)
    m, v = 1.5, 80.0**2 - 0.25  # the scalar recursion, from a start that knows y: forgotten by the first step above r
    for sigma, sigma_next in pairwise(geometric(steps).tolist()):
        shrunk = 1 / (1 + sigma**2)
        w = (1 - 0.85**2) ** 0.5 * sigma_next / 0.5
        below = ((1 - w) * shrunk * m + w * 1.5, ((1 - w) * shrunk) ** 2 * v + (0.85 * sigma_next) ** 2)
        m, v = below if sigma_next < 0.5 else (1.5, sigma_next**2 - 0.25)
    assert (float(mean), float(cov)) == pytest.approx((m, v), abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ddrm_needs_its_measurement_and_its_noise_level(seed):
    """W2 to the posterior where y says more than the prior: without y (eta = 1, eta_b = 0), and with all of y's noise kept."""
    p, noise = Problem(seed, d=2, e=2, sigma_y=0.2), Relay()

    def gap(eta, eta_b, sigma_y):
        step = ddrm(Matrix(p.A), p.y, sigma_y, noise, eta, eta_b)
        return w2(*moments(step, p.prior.denoiser, noise, geometric(20), *p.start(80.0)), p.posterior)

    assert gap(0.85, 1.0, 0.2) < 0.8 * min(gap(1.0, 0.0, 0.2), gap(0.85, 1.0, 0.0))


@pytest.mark.parametrize("sigma", [0.2, 3.0])
def test_ddrm_starts_at_the_measurement(sigma):
    """x_T,i ~ N(y_i, sigma^2 - r_i^2) where sigma >= r_i, else N(0, sigma^2); exact, as the map is affine in x."""
    p = Problem(1)
    x = torch.cat([torch.zeros(1, p.d, dtype=F64), p.V.T])  # 0 and the unit vectors of the SVD's coordinates
    out = ddrm_start(x, level(sigma), Matrix(p.A), p.y, p.sigma_y) @ p.V
    r = p.sigma_y / p.s
    near = sigma >= r
    assert_close(out[0], torch.where(near, p.y_bar, 0.0), **EXACT)
    assert_close((out[1:] - out[0]), torch.diag(torch.where(near, (1 - (r / sigma) ** 2).clamp_min(0).sqrt(), 1.0)), **EXACT)


class Rounding(Matrix):
    """A x rounded to whole numbers, and decoded by A^+: the smallest JPEG."""

    def apply(self, x):
        return super().apply(x).round()

    def decode(self, y):
        return self.pinv(y)


def test_ddrm_for_jpeg_is_its_equation():
    p = Problem(2)
    A, x, z = Rounding(3 * p.A), normal(5, p.d), normal(5, p.d, seed=1)
    y = A(normal(1, p.d, seed=2))
    for eta, eta_b in ((1.0, 0.4), (0.6, 1.0)):
        found, _ = ddrm_jpeg(A, y, lambda _: z, eta, eta_b)(p.prior.denoiser, x, level(0.8), level(0.3))
        x0 = p.prior.denoiser(x, level(0.8))
        eps = (x - x0) / 0.8
        projected = x0 - A.decode(A(x0)) + A.decode(y)
        assert_close(found, eta_b * projected + (1 - eta_b) * x0 + 0.3 * (eta * z + (1 - eta) * eps), **EXACT)


def ddnm_map(p: Problem, sigma, sigma_next):
    """M, b, Q of DDNM+: DDPM's posterior with lambda and gamma in each coordinate."""
    K, k = shrink(p.prior, sigma)
    rho2 = (sigma_next / sigma) ** 2
    a, s = 1 - rho2, sigma_next * (1 - rho2) ** 0.5
    l, q = torch.zeros(p.d, dtype=F64), torch.full((p.d,), float(s**2), dtype=F64)
    for i in range(p.d):
        if p.s[i] > 0:
            r = p.sigma_y / p.s[i]
            l[i] = 1.0 if s >= a * r else s / (a * r)
            q[i] = s**2 - (a * l[i] * r) ** 2
    L, keep = p.V @ torch.diag(l) @ p.V.T, p.V @ torch.diag(1 - l) @ p.V.T
    return a * keep @ K + rho2 * p.I, a * (keep @ k + L @ p.V @ p.y_bar), p.V @ torch.diag(q) @ p.V.T


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sigma_y", [0.0, 0.3])
def test_ddnm_plus_is_its_own_recursion(seed, sigma_y):
    p, noise = Problem(seed, sigma_y=sigma_y), Relay()
    mean, cov = p.start(5.0)
    grid = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.3, 0.1, 0.05, 0.0], dtype=F64)
    found = moments(ddnm_plus(Matrix(p.A), p.y, sigma_y, noise), p.prior.denoiser, noise, grid, mean, cov)
    for sigma, sigma_next in pairwise(grid):
        M, b, Q = ddnm_map(p, sigma, sigma_next)
        mean, cov = M @ mean + b, M @ cov @ M.T + Q
    assert_close(found, (mean, cov), **EXACT)


def test_ddnm_plus_without_noise_is_ddpm_on_the_null_space():
    p, noise = Problem(4, sigma_y=0.0), Relay()
    A = Matrix(p.A)
    for levels in ((3.0, 1.0), (0.5, 0.2), (0.1, 0.0)):
        found = affine(ddnm_plus(A, p.y, 0.0, noise), p.prior.denoiser, noise, p.d, *map(level, levels))
        other = affine(ddpm(noise), null_space(p.prior.denoiser, A, p.y), noise, p.d, *map(level, levels))
        assert_close(found[:2], other[:2], **EXACT)
        Q = other[2] @ other[2].T if other[2].numel() else torch.zeros(p.d, p.d, dtype=F64)  # none drawn in the step to 0
        assert_close(found[2] @ found[2].T, Q, **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ddnm_plus_leaves_the_noise_that_ddnm_keeps(seed):
    """W2 to the posterior at sigma_y = 0.5, against DDNM, whose result lies on the noisy measurement."""
    p, noise = Problem(seed, d=2, e=2, sigma_y=0.5), Relay()
    A, grid = Matrix(p.A), geometric(20)
    plus = moments(ddnm_plus(A, p.y, 0.5, noise), p.prior.denoiser, noise, grid, *p.start(80.0))
    plain = moments(ddpm(noise), null_space(p.prior.denoiser, A, p.y), noise, grid, *p.start(80.0))
    assert w2(*plus, p.posterior) < 0.9 * w2(*plain, p.posterior)


def snips_map(p: Problem, sigma, c):
    """M, b, Q of one Langevin move: score and step size of each coordinate as the paper has them, nothing cancelled."""
    K, k = shrink(p.prior, sigma)
    K, k = p.V.T @ K @ p.V, p.V.T @ k
    M, b, q = p.I.clone(), torch.zeros(p.d, dtype=F64), torch.zeros(p.d, dtype=F64)
    for i in range(p.d):
        e_i, r2 = p.I[i], (p.sigma_y / p.s[i]) ** 2
        prior_M, prior_b = (K[i] - e_i) / sigma**2, k[i] / sigma**2
        if p.s[i] == 0:
            a, score_M, score_b = sigma**2, prior_M, prior_b
        elif sigma**2 < r2:
            a = sigma**2 * (1 - sigma**2 / r2)
            score_M, score_b = prior_M - e_i / (r2 - sigma**2), prior_b + p.y_bar[i] / (r2 - sigma**2)
        else:
            a, score_M, score_b = sigma**2 - r2, -e_i / (sigma**2 - r2), p.y_bar[i] / (sigma**2 - r2)
        M[i] += c * a * score_M
        b[i], q[i] = c * a * score_b, 2 * c * a
    return p.V @ M @ p.V.T, p.V @ b, p.V @ torch.diag(q) @ p.V.T


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_snips_is_its_own_recursion(seed):
    p, noise, c, steps = Problem(seed), Relay(), 0.1, 3
    mean, cov = p.start(5.0)
    grid = torch.tensor([5.0, 1.0, 0.2, 0.05, 0.0], dtype=F64)
    found = moments(snips(Matrix(p.A), p.y, p.sigma_y, noise, c, steps), p.prior.denoiser, noise, grid, mean, cov)
    for sigma in grid[:-1]:
        M, b, Q = snips_map(p, sigma, c)
        for _ in range(steps):
            mean, cov = M @ mean + b, M @ cov @ M.T + Q
    assert_close(found, (mean, cov), **EXACT)


def many(M, b, Q, n):
    """The map of n equal moves, by doubling."""
    all_M, all_b, all_Q = torch.eye(len(b), dtype=F64), torch.zeros_like(b), torch.zeros_like(Q)
    while n:
        if n % 2:
            all_M, all_b, all_Q = M @ all_M, M @ all_b + b, M @ all_Q @ M.T + Q
        M, b, Q, n = M @ M, M @ b + b, M @ Q @ M.T + Q, n // 2
    return all_M, all_b, all_Q


def snips_runs(p: Problem, c: float, steps: int, levels: torch.Tensor, silent: bool = False) -> tuple:
    """Mean and covariance after `steps` moves at each level, from one move's probed map."""
    noise = Relay()
    one = snips(Matrix(p.A), p.y, p.sigma_y, noise, c, steps=1)
    mean, cov = p.start(5.0)
    for sigma in levels:
        M, b, N, _ = affine(one, p.prior.denoiser, noise, p.d, sigma, level(0.0))
        M, b, Q = many(M, b, N @ N.T * (not silent), steps)
        mean, cov = M @ mean + b, M @ cov @ M.T + Q
    return mean, cov


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_snips_approaches_the_posterior_as_its_steps_shrink_and_multiply(seed):
    """W2 to the exact p(x0 | y): what is left of noise at the last level adds its square to a variance, so the gap falls by
    more than the level does, once the moves are many enough; with as few moves as before, or no noise, it does not."""
    p = Problem(seed)

    def gap(steps, last, silent=False):
        return w2(*snips_runs(p, 0.4, steps, geometric(10, 5.0, last)[:-1], silent), p.posterior)

    assert gap(1_000, 0.1) > 2.5 * gap(10_000, 0.03) > 2.5**2 * gap(100_000, 0.01)
    assert gap(100_000, 0.01) < 1e-3
    assert gap(100, 0.01) > 5 * gap(100_000, 0.01)
    assert gap(100_000, 0.01, silent=True) > 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_snips_at_one_level_is_first_order_in_its_step(seed):
    """Below every r the target is the Gaussian of x0 + sigma eps, given y = A (x0 + sigma eps) + e, Cov e = sigma_y^2 I -
    sigma^2 A A^T. Langevin's stationary law is off by O(c): a quarter of c leaves a quarter of the gap."""
    p = Problem(seed)
    sigma = p.sigma_y / p.s.max() / 2
    C = p.prior.covs[0] + sigma**2 * p.I
    S = p.A @ C @ p.A.T + p.sigma_y**2 * torch.eye(2, dtype=F64) - sigma**2 * p.A @ p.A.T
    G = C @ p.A.T @ torch.linalg.inv(S)
    target = Mixture.gaussian(p.prior.mean + G @ (p.y[0] - p.A @ p.prior.mean), C - G @ p.A @ C)
    gaps = [w2(*snips_runs(p, c, 10**6, sigma[None]), target) for c in (0.2, 0.05)]
    assert 3.5 < gaps[0] / gaps[1] < 4.5
