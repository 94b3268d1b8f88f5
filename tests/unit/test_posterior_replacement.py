"""Replacement, RePaint, ILVR, DDNM, score-based projection and CCDF: their recursions on Gaussians, and what each is for."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib.gaussians import Mixture
from course_lib.operators.base import Matrix
from course_lib.posterior import come_closer, ilvr, mixed_projection, null_space, repaint, replacement
from course_lib.posterior.moments import Relay, moments
from course_lib.sample import sample
from course_lib.schedules import Linear
from course_lib.steps import ddim, ddpm
from tests.affine import F64, Problem, shrink, w2
from tests.draws import level, noise_of, normal

EXACT = {"rtol": 0, "atol": 1e-9}
"""Both sides are float64 matrix algebra with numbers up to 100: rounding is 1e-13, a wrong term is 1e-2 and more."""
GRID = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.3, 0.1, 0.0], dtype=F64)
FIRST = Matrix(torch.tensor([[1.0, 0.0]], dtype=F64))
"""The mask that sees the first of two coordinates."""
TWINS = Mixture.isotropic(torch.tensor([[2.0, 2.0], [-2.0, -2.0]]), 0.3)
"""Two modes: where the first coordinate is, there must the second be."""


def ddpm_map(p: Problem, sigma, sigma_next):
    """M, b, Q of DDPM's step on the prior."""
    K, k = shrink(p.prior, sigma)
    rho2 = (sigma_next / sigma) ** 2
    return (1 - rho2) * K + rho2 * p.I, (1 - rho2) * k, sigma_next**2 * (1 - rho2) * p.I


def replaced(p: Problem, M, b, Q, sigma_next):
    """... and of the replacement after it."""
    if sigma_next < p.sigma_y:
        return M, b, Q
    N = p.I - p.P
    return N @ M, N @ b + p.pinv @ p.y[0], N @ Q @ N + (sigma_next**2 - p.sigma_y**2) * p.P


def after(mean, cov, M, b, Q):
    return M @ mean + b, M @ cov @ M.T + Q


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sigma_y", [0.0, 0.3])
def test_replacement_is_its_own_recursion(seed, sigma_y):
    p, noise = Problem(seed, sigma_y=sigma_y), Relay()
    mean, cov = p.start(5.0)
    found = moments(replacement(ddpm(noise), Matrix(p.A), p.y, noise, sigma_y), p.prior.denoiser, noise, GRID, mean, cov)
    for sigma, sigma_next in pairwise(GRID):
        mean, cov = after(mean, cov, *replaced(p, *ddpm_map(p, sigma, sigma_next), sigma_next))
    assert_close(found, (mean, cov), **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("jump", "resamplings"), [(1, 3), (2, 3), (4, 2), (3, 1)])
@pytest.mark.parametrize("sigma_y", [0.0, 0.4])
def test_repaint_is_its_own_recursion(seed, jump, resamplings, sigma_y):
    """The whole chain of levels written out beforehand, up and down, as the paper's schedule is."""
    p, noise = Problem(seed, sigma_y=sigma_y), Relay()
    mean, cov = p.start(5.0)
    step = repaint(ddpm(noise), Matrix(p.A), p.y, noise, jump, resamplings, sigma_y)
    found = moments(step, p.prior.denoiser, noise, GRID, mean, cov)
    path = [GRID[0]]
    for i in range(0, len(GRID) - 1, jump):
        stretch = GRID[i : i + jump + 1]
        whole = len(stretch) == jump + 1 and stretch[-1] > 0 and stretch[-1] >= sigma_y
        for _ in range(resamplings if whole else 1):
            path += [stretch[0]] if path[-1] != stretch[0] else []
            path += list(stretch[1:])
    for sigma, sigma_next in pairwise(path):
        if sigma_next > sigma:
            mean, cov = mean, cov + (sigma_next**2 - sigma**2) * p.I
        else:
            mean, cov = after(mean, cov, *replaced(p, *ddpm_map(p, sigma, sigma_next), sigma_next))
    assert_close(found, (mean, cov), **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("until", [0.0, 0.4])
def test_ilvr_is_its_own_recursion(seed, until):
    p, noise = Problem(seed), Relay()
    reference = p.prior.sample(1, torch.Generator().manual_seed(seed))
    mean, cov = p.start(5.0)
    found = moments(ilvr(ddpm(noise), Matrix(p.A), reference, noise, until), p.prior.denoiser, noise, GRID, mean, cov)
    for sigma, sigma_next in pairwise(GRID):
        mean, cov = after(mean, cov, *ddpm_map(p, sigma, sigma_next))
        if sigma_next >= until:
            N = p.I - p.P
            mean, cov = N @ mean + p.P @ reference[0], N @ cov @ N + sigma_next**2 * p.P
    assert_close(found, (mean, cov), **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_mixed_projection_is_its_own_recursion(seed, lam):
    p, noise = Problem(seed), Relay()
    mean, cov = p.start(5.0)
    found = moments(mixed_projection(ddpm(noise), Matrix(p.A), p.y, noise, lam), p.prior.denoiser, noise, GRID, mean, cov)
    for sigma, sigma_next in pairwise(GRID):
        N = p.I - lam * p.P
        mean, cov = N @ mean + lam * p.pinv @ p.y[0], N @ cov @ N + (lam * sigma) ** 2 * p.P
        mean, cov = after(mean, cov, *ddpm_map(p, sigma, sigma_next))
    assert_close(found, (mean, cov), **EXACT)


def test_mixed_projection_is_the_papers_formula_for_a_mask_in_a_transform():
    """x + lam A^+ (y_t - A x) against T^-1 [lam L P^-1 y_t + (1 - lam) L T x + (1 - L) T x], T orthogonal, A = P L T."""
    T = torch.linalg.qr(normal(4, 4))[0]
    L, P = torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=F64)), torch.eye(4, dtype=F64)[[0, 2]]
    x, y, z, lam = normal(3, 4, seed=1), normal(1, 2, seed=2), normal(3, 4, seed=3), 0.6
    A = Matrix(P @ L @ T)
    seen = []

    def look(D, x, sigma, sigma_next, memory=None):
        seen.append(x)
        return x, None

    mixed_projection(look, A, y, lambda _: z, lam)(None, x, level(0.5), level(0.3))
    y_t = y + 0.5 * A(z)
    in_T = lam * y_t @ P @ L + ((1 - lam) * x @ T.T) @ L + (x @ T.T) @ (torch.eye(4, dtype=F64) - L)
    assert_close(seen[0], in_T @ T, **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ddnm_is_its_own_recursion(seed):
    p, noise = Problem(seed, sigma_y=0.0), Relay()
    mean, cov = p.start(5.0)
    found = moments(ddpm(noise), null_space(p.prior.denoiser, Matrix(p.A), p.y), noise, GRID, mean, cov)
    for sigma, sigma_next in pairwise(GRID):
        K, k = shrink(p.prior, sigma)
        N, rho2 = p.I - p.P, (sigma_next / sigma) ** 2
        M, b = (1 - rho2) * N @ K + rho2 * p.I, (1 - rho2) * (N @ k + p.pinv @ p.y[0])
        mean, cov = after(mean, cov, M, b, sigma_next**2 * (1 - rho2) * p.I)
    assert_close(found, (mean, cov), **EXACT)


@pytest.mark.parametrize("solver", ["replacement", "repaint", "ilvr", "null_space"])
def test_what_was_measured_is_in_the_result(solver):
    """In float32, as pictures are: the consistency |A x - y| of the noiseless forms is rounding, numbers up to 5 times 1e-7."""
    p = Problem(0, sigma_y=0.0)
    A, y, noise = Matrix(p.A.float()), p.y.float(), noise_of(3)
    D, step = p.prior.denoiser, ddpm(noise_of(4))
    if solver == "null_space":
        D = null_space(D, A, y)
    else:
        step = {
            "replacement": lambda: replacement(step, A, y, noise),
            "repaint": lambda: repaint(step, A, y, noise, 2, 3),
            "ilvr": lambda: ilvr(step, A, A.pinv(y), noise),
        }[solver]()
    x = sample(D, 5 * normal(6, p.d, dtype=torch.float32), GRID, step)
    assert x.dtype == torch.float32
    assert float((A(x) - y).abs().max()) < 1e-5
    without = sample(p.prior.denoiser, 5 * normal(6, p.d, dtype=torch.float32), GRID, ddpm(noise_of(4)))
    assert float((A(without) - y).abs().max()) > 0.1


def test_ilvr_has_the_references_low_frequencies_at_its_last_conditioned_step():
    """phi(x') = phi(reference + sigma' z) exactly, with the z that it drew; below `until` it is let go."""
    average = Matrix(torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=F64))
    p, drawn, reference = Problem(1), [], normal(5, 4, seed=8)
    source = noise_of(2)

    def noise(x):
        drawn.append(source(x))
        return drawn[-1]

    step = ilvr(ddim, average, reference, noise, until=0.3)
    ends = {}
    sample(p.prior.denoiser, 5 * normal(5, 4), GRID, step, on_step=lambda x, sigma: ends.update({float(sigma): x}))
    assert len(drawn) == 4  # at 2, 1, 0.5 and 0.3
    assert_close(average(ends[0.3]), average(reference + 0.3 * drawn[-1]), rtol=0, atol=1e-12)
    assert float((average(ends[0.1]) - average(reference)).abs().max()) > 1e-2


@pytest.mark.parametrize("resamplings", [1, 4])
def test_a_noisy_measurement_of_all_is_the_level_sigma_y_itself(resamplings):
    """N(0, 1), A = 1, sigma_y = 0.5, y = 1.5: below sigma_y the chain is DDPM's from x = y, which tends to the posterior,
    N(1.2, 0.2). The errors are of the order of the step in log sigma, and of how far above sigma_y the last level is."""
    noise, one = Relay(), torch.ones(1, 1, dtype=F64)
    step = repaint(ddpm(noise), Matrix(one), 1.5 * one, noise, 5, resamplings, sigma_y=0.5)
    errors = []
    for n in (50, 100):
        grid = torch.cat([torch.logspace(1, -3, n, dtype=F64), torch.zeros(1, dtype=F64)])
        mean, cov = moments(step, lambda x, sigma: x / (1 + sigma**2), noise, grid, torch.zeros(1, dtype=F64), 100 * one)
        errors.append((abs(float(mean) - 1.2), abs(float(cov) - 0.2)))
    assert errors[1][0] < 0.7 * errors[0][0] and errors[1][1] < 0.7 * errors[0][1]
    assert max(errors[1]) < 0.03


def distance_to_conditional(x: torch.Tensor, value: float) -> float:
    """W1 between the second coordinate of x and the exact p(x_2 | x_1 = value), by sorted draws."""
    exact = TWINS.conditional([0], torch.tensor([value])).sample(len(x), torch.Generator().manual_seed(9))
    return float((x[:, 1].sort()[0] - exact[:, 0].sort()[0]).abs().mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_repaint_mends_the_seam_that_replacement_leaves(seed):
    """Two modes, the first coordinate known: W1 of the second to its exact conditional. Between exact draws it is 0.01 to 0.03;
    a draw in the wrong mode, which replacement sees too late, costs 4."""
    y, grid = torch.full((1, 1), 2.0, dtype=F64), torch.cat([torch.logspace(1, -2, 24, dtype=F64), torch.zeros(1, dtype=F64)])
    start = 10 * normal(1000, 2, seed=seed)

    def gap(jump, resamplings):
        step = repaint(ddpm(noise_of(10 + seed)), FIRST, y, noise_of(20 + seed), jump, resamplings)
        return distance_to_conditional(sample(TWINS.denoiser, start, grid, step), 2.0)

    plain, mended = gap(1, 1), gap(4, 6)
    assert plain > 0.1
    assert mended < 0.5 * plain


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_solver_needs_its_term(seed):
    """W2 to the exact posterior, with its term and without: no replacement, lam = 0, D itself, ILVR that never conditions."""
    p, noise = Problem(seed, sigma_y=0.0), Relay()
    A, D = Matrix(p.A), p.prior.denoiser
    posterior = p.prior.posterior(p.A, p.y, 0.0)

    def gap(step, D=D):
        return w2(*moments(step, D, noise, GRID, *p.start(5.0)), posterior)

    without = gap(ddpm(noise))
    assert gap(replacement(ddpm(noise), A, p.y, noise)) < 0.9 * without
    assert gap(mixed_projection(ddpm(noise), A, p.y, noise)) < 0.9 * without
    assert gap(ddpm(noise), null_space(D, A, p.y)) < 0.9 * without
    assert gap(ilvr(ddpm(noise), A, A.pinv(p.y), noise)) < 0.9 * without
    assert gap(mixed_projection(ddpm(noise), A, p.y, noise, lam=0.0)) == pytest.approx(without, abs=1e-12)
    assert gap(ilvr(ddpm(noise), A, A.pinv(p.y), noise, until=1e9)) == pytest.approx(without, abs=1e-12)


def test_come_closer_starts_on_the_grid():
    sigmas = torch.cat([torch.linspace(10.0, 0.5, 20, dtype=F64), torch.zeros(1, dtype=F64)])
    estimate, z = normal(3, 2), normal(3, 2, seed=1)
    x, grid = come_closer(estimate, sigmas, 0.25, lambda _: z)
    assert len(grid) == 6 and torch.equal(grid, sigmas[-6:])
    assert_close(x, estimate + 2.5 * z)
    assert torch.equal(come_closer(estimate, sigmas, 1.0, lambda _: z)[1], sigmas)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_come_closer_is_as_good_with_a_third_of_the_calls(seed):
    """RMSE to x0 on DDPM's grid, equal steps of t: from A^+ y at most 1.2 % (0.1 dB) over the full run's, and lower from a
    better estimate, the posterior's mean. The start is what does it: from 0, and nearer the end, it is worse."""
    p, schedule = Problem(seed, d=6, e=3, sigma_y=0.0), Linear()
    grid = torch.cat([schedule.sigma(torch.linspace(1, 1 / 30, 30, dtype=F64)), torch.zeros(1, dtype=F64)])
    A, x0 = Matrix(p.A), p.prior.sample(1000, torch.Generator().manual_seed(seed))
    y, C, m = A(x0), p.prior.covs[0], p.prior.means[0]
    mean = m + (y - A(m[None])) @ torch.linalg.solve(p.A @ C @ p.A.T, p.A @ C)

    def run(x, grid):
        calls = []

        def D(x, sigma):
            calls.append(sigma)
            return p.prior.denoiser(x, sigma)

        x = sample(D, x, grid, replacement(ddpm(noise_of(1)), A, y, noise_of(2)))
        return float((x - x0).square().mean().sqrt()), len(calls)

    full, calls = run(grid[0] * normal(1000, 6, seed=4), grid)
    near, fewer = run(*come_closer(A.pinv(y), grid, 1 / 3, noise_of(5)))
    assert (calls, fewer) == (30, 10)
    assert near < 1.012 * full
    assert run(*come_closer(mean, grid, 1 / 3, noise_of(5)))[0] < near
    assert run(*come_closer(mean, grid, 0.1, noise_of(5)))[0] < 0.8 * run(*come_closer(0 * mean, grid, 0.1, noise_of(5)))[0]
