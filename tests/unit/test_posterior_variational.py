"""RED-diff and CSGM's annealed Langevin dynamics: recursions on Gaussians, what they tend to, and what they refuse."""

import pytest
import torch
from torch.testing import assert_close

from course_lib.denoisers import Counted
from course_lib.devices import SampleNoise
from course_lib.gaussians import Mixture
from course_lib.metrics import sliced_wasserstein
from course_lib.operators import HDR
from course_lib.operators.base import Matrix, Operator
from course_lib.operators.jpeg import JPEG
from course_lib.posterior import csgm, red_diff
from course_lib.posterior.moments import Relay, affine, moments
from course_lib.sample import sample
from tests.affine import F64, Problem, shrink, w2
from tests.draws import level, noise_of, normal

EXACT = {"rtol": 0, "atol": 1e-9}
"""Both sides are float64 matrix algebra with numbers up to 100: rounding is 1e-13, a wrong term is 1e-2 and more."""
GRID = torch.tensor([2.0, 1.0, 0.5, 0.3, 0.1, 0.0], dtype=F64)
MODES = Mixture.isotropic(torch.tensor([[2.0, 1.0], [-1.0, -2.0], [2.0, -1.5]]), 0.4)
ROW = torch.tensor([[1.0, 0.3]], dtype=F64)


class Bent(Operator):
    """y = asinh(x)."""

    shape, out = (2,), (2,)

    def apply(self, x):
        return x.asinh()


def geometric(n: int, high: float, low: float) -> torch.Tensor:
    """n levels in equal ratios, and 0."""
    return torch.cat([torch.logspace(0, 1, n, base=low / high, dtype=F64) * high, torch.zeros(1, dtype=F64)])


# --- RED-diff ------------------------------------------------------------------------------------------------------------


class Mirrored:
    """Noise in pairs, +z and -z: what is linear in it cancels in the mean of two runs that start together."""

    def __init__(self, seed: int):
        self.source = noise_of(seed)

    def __call__(self, x):
        z = self.source(x[:1])
        return torch.cat([z, -z])


def mean_update(p: Problem, mu, sigma, lam, lr):
    """The expected update: E[eps_hat - eps] = sigma (C + sigma^2 I)^-1 (mu - m)."""
    C, m = p.prior.covs[0], p.prior.means[0]
    prior = lam * sigma * torch.linalg.solve(C + sigma**2 * p.I, mu - m)
    return mu - lr * (prior - p.A.T @ (p.y[0] - p.A @ mu) / p.sigma_y**2)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weight", [None, lambda sigma: 1 / sigma])
def test_red_diff_is_its_own_recursion(seed, weight):
    """Each update is affine in mu and eps, so the mean of a mirrored pair is the expected one to rounding."""
    p, lr, mu = Problem(seed), 1e-3, normal(4)
    found = red_diff(p.prior.denoiser, mu.repeat(2, 1), Matrix(p.A), p.y, p.sigma_y, GRID, Mirrored(seed), weight, lr, "gradient")
    for sigma in GRID[:-1]:
        lam = 0.25 * sigma / p.sigma_y**2 if weight is None else weight(sigma)
        mu = mean_update(p, mu, sigma, lam, lr)
    assert_close(found.mean(0), mu, **EXACT)
    assert float((found[0] - found[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_red_diff_draws_the_noise_that_its_gradient_has(seed):
    """One update: its covariance is lr^2 lambda^2 K K^T, K = C (C + sigma^2 I)^-1, at 4.5 standard errors of 20,000 draws."""
    p, lr, n, sigma = Problem(seed), 0.1, 20_000, level(0.7)
    grid = torch.stack([sigma, level(0.0)])
    args = Matrix(p.A), p.y, 0.3, grid, noise_of(seed), lambda s: 1 / s, lr, "gradient"
    found = red_diff(p.prior.denoiser, torch.zeros(n, 4, dtype=F64), *args)
    K, _ = shrink(p.prior, sigma)
    exact = (lr / sigma) ** 2 * K @ K.T
    size = exact.diagonal().sqrt()
    assert float(((torch.cov(found.T) - exact) / torch.outer(size, size)).abs().max()) < 4.5 * (2 / n) ** 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_red_diff_finds_the_mode_of_a_gaussian_posterior(seed):
    """lambda = 1 / sigma at one small level s: the fixed point solves the mode's equations with S = C + s^2 I for C. It is off by
    s^2 H^-1 S^-1 C^-1 (mode - m) with H = S^-1 + A^T A / sigma_y^2. H^-1 S^-1 is similar to a symmetric matrix under I, so its
    norm is at most the root of the condition of S, under that of C, and |C^-1| is 1 / c with C's smallest eigenvalue c. Of a
    start's distance (1 - lr h)^n is left, h the smallest eigenvalue of H."""
    p, n, s = Problem(seed), 800, 0.02
    C, m = p.prior.covs[0], p.prior.means[0]
    H = torch.linalg.inv(C + s**2 * p.I) + p.A.T @ p.A / p.sigma_y**2
    mode = p.posterior.means[0]
    h = torch.linalg.eigvalsh(H)
    lr = float(1 / h[-1])
    grid = s * (1 + torch.linspace(1e-9, 0, n, dtype=F64))  # strictly falling, and flat
    start = torch.zeros(2, 4, dtype=F64)
    one_over = lambda sigma: 1 / sigma

    def distance(weight):
        found = red_diff(p.prior.denoiser, start, Matrix(p.A), p.y, p.sigma_y, grid, Mirrored(seed), weight, lr, "gradient")
        return float((found.mean(0) - mode).norm())

    c = torch.linalg.eigvalsh(C)
    bias = float(s**2 / c[0] * (c[-1] / c[0]).sqrt() * (mode - m).norm())
    assert bias < 0.05
    found = distance(one_over)
    assert found < bias + float((1 - lr * h[0]) ** n * mode.norm())
    assert distance(lambda sigma: 0 * sigma) > 10 * found  # without the regulariser: the nearest y = A mu


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_red_diff_with_adam_ends_within_its_steps_of_the_mode(seed):
    """Adam moves each entry by about lr an update while its gradient keeps its sign: from 0 to the mode in |mode| / lr updates,
    and then to and fro within a few lr. The noise of the gradient is left out, eps = 0, so that nothing else moves it."""
    p, lr, s = Problem(seed), 0.01, 0.02
    grid = s * (1 + torch.linspace(1e-9, 0, 2000, dtype=F64))
    args = Matrix(p.A), p.y, p.sigma_y, grid, torch.zeros_like, lambda sigma: 1 / sigma
    found = red_diff(p.prior.denoiser, torch.zeros(1, 4, dtype=F64), *args, lr=lr)
    assert float((found[0] - p.posterior.means[0]).abs().max()) < 3 * lr


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_red_diff_needs_its_regulariser(seed):
    """RMSE to draws of a mixture, each with a measurement of its own, with the paper's weight and without."""
    source = torch.Generator().manual_seed(seed)
    x0 = MODES.sample(300, source)
    y = x0 @ ROW.T + 0.3 * torch.randn(300, 1, dtype=F64, generator=source)

    def rmse(weight):
        x = red_diff(MODES.denoiser, y @ ROW, Matrix(ROW), y, 0.3, geometric(60, 5.0, 0.05), noise_of(seed), weight)
        return float((x - x0).square().mean().sqrt())

    assert rmse(None) < 0.9 * rmse(lambda sigma: 0 * sigma)


def test_red_diff_has_no_width():
    """300 runs from one start, one measurement that leaves a coordinate open: what they differ by is the noise of the descent,
    far under the posterior's spread."""
    prior = Mixture.gaussian(torch.zeros(2), torch.eye(2))
    y = torch.full((1, 1), 1.0, dtype=F64)
    args = Matrix(torch.tensor([[1.0, 0.0]], dtype=F64)), y, 0.3, geometric(200, 5.0, 0.02), noise_of(0)
    x = red_diff(prior.denoiser, torch.zeros(300, 2, dtype=F64), *args, lr=0.02)
    assert float(x[:, 1].std()) < 0.3 < float(prior.posterior(args[0].A, y, 0.3).covs[0, 1, 1].sqrt())


def test_red_diff_takes_a_nonlinear_operator():
    """Clipped light: where y is clipped nothing pulls, elsewhere mu is at y / factor."""
    A, x0 = HDR((1, 2, 2), 2.0), torch.tensor([[[[0.2, -0.3], [0.9, -0.1]]]], dtype=F64)
    D = lambda x, sigma: x / (1 + sigma**2)
    grid = geometric(400, 1.0, 0.01)
    found = red_diff(D, 0 * x0, A, A(x0), 0.01, grid, noise_of(0), lambda s: 1 / s, 1e-5, "gradient")
    assert float((A(found) - A(x0)).abs()[A(x0).abs() < 1].max()) < 0.05


def test_red_diff_calls_D_once_a_level_and_never_backwards():
    def D(x, sigma):
        assert not torch.is_grad_enabled()
        return MODES.denoiser(x, sigma)

    counted = Counted(D)
    red_diff(counted, normal(3, 2), Matrix(ROW), torch.zeros(1, 1, dtype=F64), 0.3, GRID, noise_of(0))
    assert counted.calls == len(GRID) - 1


@pytest.mark.parametrize("optimiser", ["adam", "gradient"])
def test_a_run_of_red_diff_does_not_depend_on_its_batch(optimiser):
    ys = torch.arange(5, dtype=F64)[:, None]

    def run(first, n):
        noise = SampleNoise(3, first=first)
        y = ys[first : first + n]
        return red_diff(MODES.denoiser, y @ ROW, Matrix(ROW), y, 0.3, GRID, noise, None, 0.01, optimiser)

    assert_close(run(0, 5)[3:4], run(3, 1), rtol=0, atol=1e-12)
    assert red_diff(MODES.denoiser, normal(2, 2).float(), Matrix(ROW), ys[:1], 0.3, GRID, noise_of(0)).dtype == torch.float32


def test_red_diff_that_diverges_says_where():
    args = Matrix(ROW), torch.zeros(1, 1, dtype=F64), 0.01, geometric(200, 5.0, 0.1), noise_of(0)
    with pytest.raises(FloatingPointError, match=r"mu is not finite after the update at sigma = .*; take a smaller lr"):
        red_diff(MODES.denoiser, normal(2, 2), *args, lr=1e6, optimiser="gradient")


# --- CSGM ----------------------------------------------------------------------------------------------------------------


def csgm_map(p: Problem, sigma, c, gamma):
    """M, b, Q of one Langevin move, score and step size as the paper has them, nothing cancelled."""
    K, k = shrink(p.prior, sigma)
    a, total = c * sigma**2, p.sigma_y**2 + (gamma * sigma) ** 2
    M = p.I + a * ((K - p.I) / sigma**2 - p.A.T @ p.A / total)
    return M, a * (k / sigma**2 + p.A.T @ p.y[0] / total), 2 * a * p.I


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("c", "steps", "gamma"), [(0.1, 3, 1.0), (0.02, 1, 0.5)])
def test_csgm_is_its_own_recursion(seed, c, steps, gamma):
    p, noise = Problem(seed), Relay()
    mean, cov = p.start(2.0)
    found = moments(csgm(Matrix(p.A), p.y, p.sigma_y, noise, c, steps, gamma), p.prior.denoiser, noise, GRID, mean, cov)
    for sigma in GRID[:-1]:
        M, b, Q = csgm_map(p, sigma, c, gamma)
        for _ in range(steps):
            mean, cov = M @ mean + b, M @ cov @ M.T + Q
    assert_close(found, (mean, cov), **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_csgm_approaches_the_posterior(seed):
    """At one level the stationary law is N(., H^-1 (I - a H / 2)^-1), H = (C + s^2 I)^-1 + A^T A / (sigma_y^2 + s^2): its error
    is of the order of c and of s^2. Both fall fourfold, and the moves that mixing takes are 4 x 4 as many."""
    p, noise = Problem(seed), Relay()

    def error(c, steps, low):
        once = csgm(Matrix(p.A), p.y, p.sigma_y, noise, c, steps=1)
        mean, cov = p.start(5.0)
        for sigma in geometric(12, 5.0, low)[:-1]:
            M, b, N, _ = affine(once, p.prior.denoiser, noise, p.d, sigma, sigma)
            for _ in range(steps):
                mean, cov = M @ mean + b, M @ cov @ M.T + N @ N.T
        return w2(mean, cov, p.posterior)

    coarse, fine = error(0.05, 200, 0.2), error(0.0125, 3200, 0.1)
    assert fine < 0.5 * coarse


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_csgm_needs_the_likelihood_and_its_annealing(seed):
    """Sliced Wasserstein on a mixture: gamma -> infinity leaves y out. gamma = 0 holds x at every level to y as it is, which
    needs steps so short at the high levels (c < 2 sigma_y^2 / sigma^2) that with these it diverges."""
    source = torch.Generator().manual_seed(seed)
    y = MODES.sample(1, source) @ ROW.T + 0.4 * torch.randn(1, 1, dtype=F64, generator=source)
    posterior = MODES.posterior(ROW, y, 0.4)

    def run(gamma):
        step = csgm(Matrix(ROW), y, 0.4, noise_of(seed), 0.15, 5, gamma)
        return sample(MODES.denoiser, 10 * normal(500, 2, seed=seed), geometric(20, 10.0, 0.05), step)

    def gap(x):
        return sliced_wasserstein(x, posterior.sample(500, torch.Generator().manual_seed(99)), 50)

    assert gap(run(1.0)) < 0.7 * gap(run(1e9))
    assert float(run(0.0).abs().max()) > 1e6


def test_csgm_takes_a_nonlinear_operator_and_counts_its_calls():
    """y = asinh(x), of slope sqrt(1 + sinh(y)^2)^-1: the residual is of the size of sigma_y. Clipping would not do: Langevin
    finds no way back from where its gradient is 0."""
    A, x0 = Bent(), torch.tensor([[0.4, -1.2]], dtype=F64)
    D = Counted(lambda x, sigma: x / (1 + sigma**2))
    x = sample(D, 5 * normal(200, 2), geometric(30, 5.0, 0.02), csgm(A, A(x0), 0.05, noise_of(0), 0.1, 10))
    assert D.calls == 30 * 10
    assert 0.04 < float((A(x) - A(x0)).square().mean().sqrt()) < 0.07


def test_a_sample_of_csgm_does_not_depend_on_its_batch_nor_on_how_the_level_comes():
    ys = torch.arange(5, dtype=F64)[:, None]

    def run(first, n):
        noise = SampleNoise(7, first=first)
        step = csgm(Matrix(ROW), ys[first : first + n], 0.3, noise)
        return sample(MODES.denoiser, noise.start((n, 2), 2.0, F64), GRID, step)

    assert_close(run(0, 5)[3:4], run(3, 1), rtol=0, atol=1e-12)
    once = lambda sigma, x: csgm(Matrix(ROW), ys[:1], 0.3, noise_of(1))(MODES.denoiser, x, sigma, sigma / 2)[0]
    assert_close(once(level(1.0).expand(4), normal(4, 2)), once(level(1.0), normal(4, 2)), rtol=0, atol=1e-12)
    assert once(level(1.0), normal(4, 2).float()).dtype == torch.float32


# --- what both refuse ------------------------------------------------------------------------------------------------------


def red(A, y, sigma_y=0.1, sigmas=GRID, **kwargs):
    return red_diff(MODES.denoiser, torch.zeros(5, *A.shape), A, y, sigma_y, sigmas, noise_of(0), **kwargs)


def langevin(A, y, sigma_y=0.1, **kwargs):
    return csgm(A, y, sigma_y, noise_of(0), **kwargs)(MODES.denoiser, torch.zeros(5, *A.shape), level(1.0), level(0.5))


@pytest.mark.parametrize("solve", [red, langevin])
def test_bad_measurements_and_operators_are_refused(solve):
    A = Matrix(ROW)
    with pytest.raises(ValueError, match=r"y has shape \(1, 3\); expected \(B, 1\) for Matrix"):
        solve(A, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        solve(A, torch.full((1, 1), torch.nan))
    with pytest.raises(ValueError, match="y has 2 rows and x has 5; expected one for all samples or one for each"):
        solve(A, torch.zeros(2, 1))
    jpeg = JPEG((3, 16, 16), 50)
    with pytest.raises(ValueError, match="A = JPEG has no gradient and (red_diff|csgm) follows that of .*ddrm_jpeg"):
        solve(jpeg, torch.zeros(1, *jpeg.out))
    for sigma_y in (-0.1, float("inf")):
        with pytest.raises(ValueError, match="sigma_y = .*; expected the measurement's standard deviation, a finite number >= 0"):
            solve(A, torch.zeros(1, 1), sigma_y)


@pytest.mark.parametrize(
    ("solve", "said"),
    [
        (lambda A, y: red(A, y, 0.0), "sigma_y = 0; red_diff divides by it: .* use diffpir or null_space"),
        (lambda A, y: red(A, y, optimiser="lion"), "optimiser = 'lion'; expected one of adam, gradient"),
        (lambda A, y: red(A, y, lr=0.0), "lr = 0.0; expected a step size > 0"),
        (lambda A, y: red(A, y, sigmas=GRID[:-1].flip(0)), "sigmas rises from 0.1 to 2; expected a falling grid"),
        (lambda A, y: langevin(A, y, c=0.0), "c = 0.0; expected a number > 0"),
        (lambda A, y: langevin(A, y, steps=0), "steps = 0; expected a whole number >= 1"),
        (lambda A, y: langevin(A, y, gamma=-1.0), "gamma = -1.0 with sigma_y = 0.1; expected gamma >= 0"),
        (lambda A, y: langevin(A, y, 0.0, gamma=0.0), "gamma = 0.0 with sigma_y = 0.0; expected gamma >= 0, and above 0"),
    ],
)
def test_values_out_of_range_are_refused(solve, said):
    with pytest.raises(ValueError, match=said):
        solve(Matrix(ROW), torch.zeros(1, 1))
