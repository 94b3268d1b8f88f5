"""DiffPIR, DAPS and PnP-flow: their recursions on Gaussians, where they are exact, what each term is for, what they refuse."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib.denoisers import Counted, from_flow
from course_lib.devices import SampleNoise
from course_lib.flows import velocity
from course_lib.gaussians import Mixture
from course_lib.metrics import sliced_wasserstein
from course_lib.operators.base import Matrix, Operator
from course_lib.operators.jpeg import JPEG
from course_lib.posterior import daps, diffpir, pnp_flow
from course_lib.posterior.moments import Relay, affine, moments
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim, ddpm
from tests.affine import F64, Problem, shrink, w2
from tests.draws import level, noise_of, normal

EXACT = {"rtol": 0, "atol": 1e-9}
"""Both sides are float64 matrix algebra with numbers up to 100: rounding is 1e-13, a wrong term is 1e-2 and more."""
GRID = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.3, 0.1, 0.0], dtype=F64)
TWO = Mixture.isotropic(torch.tensor([[2.0, 1.0], [-1.0, -2.0], [2.0, -1.5]]), 0.4)
ROW = torch.tensor([[1.0, 0.3]], dtype=F64)
SIGMA_Y = 0.4


class Bent(Operator):
    """y = x + x^2 / 4, of slope 1 + x / 2."""

    shape, out = (2,), (2,)

    def apply(self, x):
        return x + x**2 / 4


def measured(seed: int) -> tuple[torch.Tensor, Mixture]:
    """A measurement (1, 1) of a draw of the mixture, and the exact posterior."""
    source = torch.Generator().manual_seed(seed)
    y = TWO.sample(1, source) @ ROW.T + SIGMA_Y * torch.randn(1, 1, dtype=F64, generator=source)
    return y, TWO.posterior(ROW, y, SIGMA_Y)


def gap(x: torch.Tensor, posterior: Mixture) -> float:
    """Sliced Wasserstein to as many exact samples."""
    return sliced_wasserstein(x, posterior.sample(len(x), torch.Generator().manual_seed(99)), 50)


# --- DiffPIR -----------------------------------------------------------------------------------------------------------


def diffpir_map(p: Problem, sigma, sigma_next, lam, zeta):
    """M, b, Q: the proximal step as the solution of its normal equations, (A^T A + rho I) z = A^T y + rho x0."""
    K, k = shrink(p.prior, sigma)
    rho = lam * p.sigma_y**2 / sigma**2
    G = torch.linalg.inv(p.A.T @ p.A + rho * p.I)
    P, q = rho * G @ K, G @ (p.A.T @ p.y[0] + rho * k)  # z = P x + q
    w = sigma_next * (1 - zeta) ** 0.5 / sigma
    return (1 - w) * P + w * p.I, (1 - w) * q, zeta * sigma_next**2 * p.I


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("lam", "zeta"), [(1.0, 1.0), (7.0, 0.3), (0.5, 0.0)])
def test_diffpir_is_its_own_recursion(seed, lam, zeta):
    p, noise = Problem(seed), Relay()
    mean, cov = p.start(5.0)
    found = moments(diffpir(Matrix(p.A), p.y, p.sigma_y, noise, lam, zeta), p.prior.denoiser, noise, GRID, mean, cov)
    for sigma, sigma_next in pairwise(GRID):
        M, b, Q = diffpir_map(p, sigma, sigma_next, lam, zeta)
        mean, cov = M @ mean + b, M @ cov @ M.T + Q
    assert_close(found, (mean, cov), **EXACT)


def test_diffpirs_data_step_is_the_minimum():
    """No move away from x0_hat lowers |y - A z|^2 + rho |z - x0|^2: the gradient is 0 to rounding."""
    p = Problem(4)
    x0_hat, _ = diffpir(Matrix(p.A), p.y, 0.3, noise_of(0), 2.0)(lambda x, s: x, x := normal(3, p.d), level(0.8), level(0.0))
    z = x0_hat.requires_grad_()
    loss = (p.y - z @ p.A.T).square().sum() + 2.0 * 0.3**2 / 0.8**2 * (z - x).square().sum()
    assert float(torch.autograd.grad(loss, z)[0].abs().max()) < 1e-10


def test_diffpir_without_noise_projects_and_with_all_weight_on_the_prior_is_ddim():
    p = Problem(5, sigma_y=0.0)
    A, D, x = Matrix(p.A), p.prior.denoiser, normal(3, p.d)
    x0, _ = diffpir(A, p.y, 0.0, noise_of(0))(D, x, level(0.5), level(0.0))
    assert_close(x0, A.project(D(x, level(0.5)), p.y), **EXACT)
    free, _ = diffpir(A, p.y, 0.3, noise_of(0), lam=1e15, zeta=0.0)(D, x, level(0.5), level(0.2))
    assert_close(free, ddim(D, x, level(0.5), level(0.2))[0], **EXACT)


def test_diffpir_leaves_the_null_space_to_the_prior():
    """The map of x differs from DDPM's on the prior only through the data step: in the null space of A it is the same."""
    p, noise = Problem(6), Relay()
    A = Matrix(p.A)
    null = p.I - p.P
    found = affine(diffpir(A, p.y, p.sigma_y, noise, 1.0, 1.0), p.prior.denoiser, noise, p.d, level(1.0), level(0.0))
    prior = affine(ddpm(noise), p.prior.denoiser, noise, p.d, level(1.0), level(0.0))
    assert_close(null @ found[0], null @ prior[0], **EXACT)
    assert float((found[0] - prior[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_diffpir_needs_its_data_step(seed):
    """Sliced Wasserstein on the mixture: y left out, lam -> infinity, is the prior; sigma_y = 0 keeps all of y's noise."""
    y, posterior = measured(seed)

    def run(lam, sigma_y=SIGMA_Y):
        step = diffpir(Matrix(ROW), y, sigma_y, noise_of(seed), lam, zeta=1.0)
        return gap(sample(TWO.denoiser, 20 * normal(1000, 2, seed=seed), karras(30, 0.02, 20.0), step), posterior)

    found = run(1.0)
    assert found < 0.7 * run(1e15)
    assert found < 0.9 * run(1.0, sigma_y=0.0)


# --- DAPS --------------------------------------------------------------------------------------------------------------


def daps_map(p: Problem, sigma, sigma_next, ode_steps, steps, c):
    """M, b, Q: Euler in sigma as matrices, then Langevin's sums, powers of I - a H, written out."""
    E, e = p.I, torch.zeros(p.d, dtype=F64)
    levels = [sigma * (1 - k / ode_steps) ** 7 for k in range(ode_steps + 1)]
    for high, low in pairwise(levels):
        K, k = shrink(p.prior, high)
        F = (1 - low / high) * K + low / high * p.I
        E, e = F @ E, F @ e + (1 - low / high) * k
    a = c / (1 / sigma**2 + torch.linalg.matrix_norm(p.A, 2) ** 2 / p.sigma_y**2)
    H = p.I / sigma**2 + p.A.T @ p.A / p.sigma_y**2
    L = p.I - a * H
    power = torch.linalg.matrix_power
    mean_of = sum((power(L, j) for j in range(steps)), torch.zeros_like(L))  # of the constant drift
    on_x0 = power(L, steps) + a / sigma**2 * mean_of
    Q = sum((2 * a * power(L, 2 * j) for j in range(steps)), torch.zeros_like(L))
    shift = a * mean_of @ p.A.T @ p.y[0] / p.sigma_y**2
    return on_x0 @ E, on_x0 @ e + shift, Q + sigma_next**2 * p.I


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("ode_steps", "steps", "c"), [(1, 4, 0.2), (3, 10, 0.9), (5, 0, 0.5)])
def test_daps_is_its_own_recursion(seed, ode_steps, steps, c):
    """To 1e-5: |A| is the power iteration's, 100 steps of it; the recursion is linear in a to first order."""
    p, noise = Problem(seed), Relay()
    mean, cov = p.start(5.0)
    step = daps(Matrix(p.A), p.y, p.sigma_y, noise, ode_steps, steps, c)
    found = moments(step, p.prior.denoiser, noise, GRID, mean, cov)
    for sigma, sigma_next in pairwise(GRID):
        M, b, Q = daps_map(p, sigma, sigma_next, ode_steps, steps, c)
        mean, cov = M @ mean + b, M @ cov @ M.T + Q
    assert_close(found, (mean, cov), rtol=0, atol=1e-5)


def test_daps_is_exact_on_a_round_gaussian_as_langevin_runs_longer():
    """x0 ~ N(m, s^2 I), one Euler step, r^2 = s^2 sigma^2 / (s^2 + sigma^2): p(x0 | x) is N(D(x), r^2 I) itself, and a step from
    p(x | y) ends on p(x' | y). Langevin's stationary covariance is H^-1 (I - a H / 2)^-1, at most c / 2 = 1 % of the variance too
    wide, and its memory of the start at most exp(-2 * 400 * 0.02 * 6 / 11) = 0.02 % of it: W2 is under 0.5 % of the spread."""
    s, m = 0.7, torch.tensor([0.5, -1.0], dtype=F64)
    prior = Mixture.gaussian(m, s**2 * torch.eye(2, dtype=F64))
    A, y = torch.tensor([[1.0, 0.4]], dtype=F64), torch.tensor([[0.3]], dtype=F64)
    noise, posterior = Relay(), prior.posterior(A, y, 0.5)
    start = posterior.means[0], posterior.covs[0] + 0.25 * torch.eye(2, dtype=F64)

    def error(c, steps, radius):
        step = daps(Matrix(A), y, 0.5, noise, 1, steps, c, radius)
        return w2(*moments(step, prior.denoiser, noise, torch.tensor([0.5, 0.0], dtype=F64), *start), posterior)

    exact = lambda sigma: s * sigma * (s**2 + sigma**2).rsqrt()
    spread = float(posterior.covs[0].trace().sqrt())
    assert error(0.02, 400, exact) < 0.005 * spread
    assert error(0.16, 50, exact) > 2 * error(0.02, 400, exact)
    assert error(0.02, 400, lambda sigma: sigma) > 10 * error(0.02, 400, exact)  # the paper's radius is wider than p(x0 | x)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_daps_needs_langevin_and_the_new_noise(seed):
    """Sliced Wasserstein on the mixture: without Langevin y is left out; without the decoupling, x' = z + (sigma' / sigma)
    (x - D(x)), the noise that is kept holds x to the mode that it came from."""
    y, posterior = measured(seed)

    def run(steps, coupled=False):
        step = daps(Matrix(ROW), y, SIGMA_Y, noise_of(seed), 2, steps, 0.2)

        def kept(D, x, sigma, sigma_next, memory=None):
            z, _ = step(D, x, sigma, torch.zeros_like(sigma))
            return z + (sigma_next / sigma) * (x - D(x, sigma)), None

        x = sample(TWO.denoiser, 20 * normal(500, 2, seed=seed), karras(20, 0.05, 20.0), kept if coupled else step)
        return gap(x, posterior)

    found = run(30)
    assert found < 0.7 * run(0)
    assert found < 0.9 * run(30, coupled=True)


def test_daps_takes_a_nonlinear_operator():
    """y = x + x^2 / 4 at sigma_y = 0.1: the residual is of the size of the noise, and without Langevin ten times that."""
    A, x0 = Bent(), torch.tensor([[2.0, 1.0]], dtype=F64)
    y = A(x0)

    def residual(steps):
        step = daps(A, y, 0.1, noise_of(1), 2, steps, 0.1)
        x = sample(TWO.denoiser, 20 * normal(200, 2), karras(15, 0.05, 20.0), step)
        return float((A(x) - y).square().mean().sqrt())

    assert residual(60) < 0.2
    assert residual(0) > 1.0


# --- PnP-flow ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("lr", "alpha", "draws"), [(0.2, 0.5, 1), (0.1, 1.0, 3), (0.0, 0.5, 2)])
def test_pnp_flow_is_its_own_recursion(seed, lr, alpha, draws):
    p, noise = Problem(seed), Relay()
    mean, cov = p.start(1.0)
    found = moments(pnp_flow(Matrix(p.A), p.y, noise, lr, alpha, draws), p.prior.denoiser, noise, GRID, mean, cov)
    for sigma in GRID[:-1]:
        K, k = shrink(p.prior, sigma)
        rate = lr * (sigma / (1 + sigma)) ** alpha
        M = K @ (p.I - rate * p.A.T @ p.A)
        mean = M @ mean + rate * K @ p.A.T @ p.y[0] + k
        cov = M @ cov @ M.T + sigma**2 / draws * K @ K.T
    assert_close(found, (mean, cov), **EXACT)


def test_pnp_flow_is_the_papers_step_with_a_velocity():
    """In the flow's coordinates and the paper's time T = 1 - t: z~ = T z + (1 - T) eps, x' = z~ + (1 - T) v(z~), v = x0 - eps."""
    v = lambda x_t, t: velocity(TWO.denoiser, x_t, t)
    D = from_flow(v)
    y, _ = measured(0)
    x, eps, T = normal(5, 2), normal(5, 2, seed=1), 0.3
    z = x + 0.8 * (1 - T) ** 0.7 * (y - x @ ROW.T) @ ROW
    tilde = T * z + (1 - T) * eps
    expected = tilde - (1 - T) * v(tilde, torch.full((5,), 1 - T, dtype=F64))  # the course's velocity is eps - x0
    found, _ = pnp_flow(Matrix(ROW), y, lambda _: eps, 0.8, 0.7)(D, x, level((1 - T) / T), level(0.1))
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pnp_flow_needs_the_data_step_the_denoiser_and_the_falling_levels(seed):
    """RMSE to x0 of draws of the mixture, each with a measurement of its own: y left out; the identity for D; D at the lowest
    level throughout, as in plug and play before flows, which leaves x in the mode where it started."""
    source = torch.Generator().manual_seed(seed)
    x0 = TWO.sample(500, source)
    y = x0 @ ROW.T + SIGMA_Y * torch.randn(500, 1, dtype=F64, generator=source)
    grid = torch.cat([1 / torch.linspace(0, 1, 41, dtype=F64)[1:-1] - 1, torch.zeros(1, dtype=F64)])

    def rmse(D=TWO.denoiser, lr=0.8):
        x = sample(D, y @ ROW, grid, pnp_flow(Matrix(ROW), y, noise_of(seed), lr, draws=5))
        return float((x - x0).square().mean().sqrt())

    found = rmse()
    assert found < 0.9 * rmse(lr=0.0)
    assert found < 0.9 * rmse(D=lambda x, sigma: x)
    assert found < 0.9 * rmse(D=lambda x, sigma: TWO.denoiser(x, grid[-2]))


def test_what_pnp_flow_draws_is_no_posterior():
    """N(0, 1), A = 1, sigma_y = 0.5, y = 1.5: the posterior has variance 0.2, and what eps leaves falls with the last level."""
    noise, one = Relay(), torch.ones(1, 1, dtype=F64)
    left = []
    for n in (20, 200):
        grid = torch.cat([1 / torch.linspace(0, 1, n + 1, dtype=F64)[1:-1] - 1, torch.zeros(1, dtype=F64)])
        step = pnp_flow(Matrix(one), 1.5 * one, noise, 0.9)
        _, cov = moments(step, lambda x, sigma: x / (1 + sigma**2), noise, grid, torch.zeros(1, dtype=F64), one)
        left.append(float(cov))
    assert left[1] < 0.5 * left[0] < 0.05


# --- all three -----------------------------------------------------------------------------------------------------------


def steps_of(noise, A=None, y=None, sigma_y=0.3):
    A, y = A or Matrix(ROW), torch.full((1, 1), 0.4, dtype=F64) if y is None else y
    return {
        "diffpir": lambda: diffpir(A, y, sigma_y, noise),
        "daps": lambda: daps(A, y, sigma_y, noise, 2, 5),
        "pnp_flow": lambda: pnp_flow(A, y, noise, draws=2),
    }


NAMES = list(steps_of(noise_of(0)))
CALLS = {"diffpir": 1, "daps": 2, "pnp_flow": 2}


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_D(name):
    D = Counted(TWO.denoiser)
    sample(D, normal(4, 2), GRID, steps_of(noise_of(0))[name]())
    assert D.calls == CALLS[name] * (len(GRID) - 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    ys = torch.arange(5, dtype=F64)[:, None]

    def run(first, n):
        noise = SampleNoise(7, first=first)
        return sample(TWO.denoiser, noise.start((n, 2), 5.0, F64), GRID, steps_of(noise, y=ys[first : first + n])[name]())

    assert_close(run(0, 5)[3:4], run(3, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_x_keeps_its_type_and_a_level_each_is_the_level_of_all(name):
    found, _ = steps_of(noise_of(1))[name]()(TWO.denoiser, normal(4, 2, dtype=torch.float32), level(1.0), level(0.5))
    assert found.dtype == torch.float32
    each, _ = steps_of(noise_of(1))[name]()(TWO.denoiser, normal(4, 2), level(1.0).expand(4), level(0.5).expand(4))
    every, _ = steps_of(noise_of(1))[name]()(TWO.denoiser, normal(4, 2), level(1.0), level(0.5))
    assert_close(each, every, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_measurement_of_another_shape_batch_or_not_finite_is_refused(name):
    with pytest.raises(ValueError, match=r"y has shape \(1, 3\); expected \(B, 1\) for Matrix"):
        steps_of(noise_of(0), y=torch.zeros(1, 3))[name]()
    with pytest.raises(ValueError, match="not finite"):
        steps_of(noise_of(0), y=torch.full((1, 1), torch.nan))[name]()
    with pytest.raises(ValueError, match="y has 2 rows and x has 5; expected one for all samples or one for each"):
        steps_of(noise_of(0), y=torch.zeros(2, 1))[name]()(TWO.denoiser, normal(5, 2), level(1.0), level(0.5))


def test_operators_that_a_solver_cannot_take_are_refused():
    jpeg = JPEG((3, 16, 16), 50)
    y = torch.zeros(1, *jpeg.out)
    for name in ("daps", "pnp_flow"):
        with pytest.raises(ValueError, match=f"A = JPEG has no gradient and {name} follows that of .*ddrm_jpeg"):
            steps_of(noise_of(0), jpeg, y)[name]()
    with pytest.raises(ValueError, match="A = Bent is not linear and diffpir takes linear operators only"):
        diffpir(Bent(), torch.zeros(1, 2), 0.1, noise_of(0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda A, y, n: diffpir(A, y, -0.1, n), "sigma_y = -0.1; expected the measurement's standard deviation"),
        (lambda A, y, n: diffpir(A, y, 0.1, n, lam=-1.0), "lam = -1.0; expected a weight >= 0"),
        (lambda A, y, n: diffpir(A, y, 0.1, n, zeta=1.5), "zeta = 1.5; expected a number from 0 to 1"),
        (lambda A, y, n: daps(A, y, 0.0, n), "sigma_y = 0; daps divides by it: .* use diffpir or null_space"),
        (lambda A, y, n: daps(A, y, float("nan"), n), "sigma_y = nan"),
        (lambda A, y, n: daps(A, y, 0.1, n, ode_steps=0), "ode_steps = 0; expected a whole number >= 1"),
        (lambda A, y, n: daps(A, y, 0.1, n, steps=1.5), "steps = 1.5; expected a whole number >= 0"),
        (lambda A, y, n: daps(A, y, 0.1, n, c=0.0), "c = 0.0; expected a number > 0"),
        (lambda A, y, n: pnp_flow(A, y, n, lr=-1.0), "lr = -1.0; expected a number >= 0"),
        (lambda A, y, n: pnp_flow(A, y, n, alpha=-0.5), "alpha = -0.5; expected a number >= 0"),
        (lambda A, y, n: pnp_flow(A, y, n, draws=0), "draws = 0; expected a whole number >= 1"),
    ],
)
def test_values_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make(Matrix(ROW), torch.zeros(1, 1), noise_of(0))


@pytest.mark.parametrize("name", ["diffpir", "daps"])
def test_steps_that_add_noise_refuse_a_rising_grid(name):
    with pytest.raises(ValueError, match="expected a falling grid"):
        steps_of(noise_of(0))[name]()(TWO.denoiser, normal(2, 2), level(0.5), level(1.0))
