"""MCGdiff and TDS: unbiased resampling and evidence, the chain's own posterior in the limit, the exact one with finer grids."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib import metrics
from course_lib.devices import generator
from course_lib.gaussians import Mixture
from course_lib.operators import Operator
from course_lib.operators.base import LinearOperator, Matrix
from course_lib.posterior import mcgdiff, tds
from course_lib.posterior.moments import Relay, affine, moments
from course_lib.posterior.particles import effective_sample_size, multinomial, systematic
from course_lib.sample import sample
from course_lib.steps import ddim_eta
from tests.affine import F64, Problem, w2
from tests.draws import level, noise_of, normal

SE = 4.5  # standard errors
SAMPLERS = {"mcgdiff": mcgdiff, "tds": tds}


def geometric(n: int, high: float = 20.0, low: float = 0.02) -> torch.Tensor:
    """n levels from high to low in equal ratios, and 0."""
    levels = torch.logspace(math.log10(high), math.log10(low), n, dtype=F64)
    return torch.cat([levels, torch.zeros(1, dtype=F64)])


def kept(weights: torch.Tensor, noise) -> torch.Tensor:
    """A resampler that selects nobody: the weights are switched off."""
    return torch.arange(weights.shape[1]).expand_as(weights)


def walked(step, D, x, grid):
    """x at the end of the grid, and the last memory."""
    memory = None
    for sigma, sigma_next in pairwise(grid):
        x, memory = step(D, x, sigma, sigma_next, memory)
    return x, memory


# --- resampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [systematic, multinomial])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_resampling_is_unbiased_with_the_variance_that_it_has(rule, seed):
    """Copies of particle i over 4,000 draws: mean N w_i; multinomial variance N w (1 - w), systematic f (1 - f), f = N w mod 1.

    The standard error of a variance of n draws is sqrt((m4 - v^2) / n), m4 the fourth central moment, taken from the draws.
    """
    N, draws = 7, 4000
    w = torch.softmax(1.5 * normal(N, seed=seed), 0)
    chosen = rule(w.expand(draws, N), noise_of(seed))
    copies = torch.nn.functional.one_hot(chosen, N).sum(1).double()
    share = (N * w) % 1
    variance = N * w * (1 - w) if rule is multinomial else share * (1 - share)
    assert bool(((copies.mean(0) - N * w).abs() <= SE * (variance / draws).sqrt()).all())
    apart = copies - copies.mean(0)
    error = ((apart**4).mean(0) - (apart**2).mean(0) ** 2).clamp_min(0).sqrt() / math.sqrt(draws)
    assert bool((((apart**2).mean(0) - variance).abs() <= SE * error + 1e-3).all())
    if rule is systematic:
        assert bool(((copies - N * w).abs() < 1).all())


def test_equal_weights_are_resampled_to_the_same_particles_and_a_lone_one_to_itself():
    equal = torch.full((3, 5), 0.2, dtype=F64)
    assert bool((systematic(equal, noise_of(1)) == torch.arange(5)).all())
    lone = torch.eye(5, dtype=F64)[2:4]
    for rule in (systematic, multinomial):
        assert bool((rule(lone, noise_of(2)) == torch.tensor([[2], [3]])).all())


def test_the_effective_sample_size_lies_between_one_and_n():
    log_w = torch.cat([torch.zeros(1, 6), torch.eye(6)[:1] * 1e4, 3 * normal(200, 6).float()])
    ess = effective_sample_size(log_w)
    assert_close(ess[:2], torch.tensor([6.0, 1.0]))
    assert bool(((ess >= 1 - 1e-6) & (ess <= 6 + 1e-5)).all())
    w = torch.softmax(log_w[5].double(), 0)
    assert float(ess[5]) == pytest.approx(float(1 / (w**2).sum()), rel=1e-5)
    assert_close(effective_sample_size(log_w + 50.0), ess, rtol=1e-4, atol=0)  # weights need no normalisation


# --- the limit of many particles, on a Gaussian: known in closed form ---------------------------------------------------


def chain(p: Problem, eta: float, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    noise = Relay()
    return moments(ddim_eta(eta, noise), p.prior.denoiser, noise, grid, *p.start(float(grid[0])))


def observed(mean, cov, H, y, R):
    """The law of x ~ N(mean, cov) given y = H x + N(0, R), and log N(y; H mean, H cov H^T + R)."""
    S = H @ cov @ H.T + R
    K = cov @ H.T @ torch.linalg.inv(S)
    gap = y - H @ mean
    log = -(gap @ torch.linalg.solve(S, gap) + torch.logdet(2 * math.pi * S)) / 2
    return mean + K @ gap, cov - K @ H @ cov, log


def limit(name: str, p: Problem, eta: float, grid: torch.Tensor):
    """Mean and covariance of infinitely many particles, and the log of p(y / s) under the chain: Kalman's formulas.

    TDS: the chain's x0, then y. MCGdiff: at each level r_i, which the grid must hold, coordinate i of V^T x is y_i.
    """
    zero = torch.zeros(1, 1, dtype=F64)
    if name == "tds":
        r = (p.s > 0).nonzero()[:, 0]
        return observed(*chain(p, eta, grid), p.V.T[r], p.y_bar[r], torch.diag((p.sigma_y / p.s[r]) ** 2))
    noise = Relay()
    (mean, cov), evidence = p.start(float(grid[0])), torch.zeros((), dtype=F64)
    for sigma, sigma_next in pairwise(grid):
        M, b, N, _ = affine(ddim_eta(eta, noise), p.prior.denoiser, noise, p.d, sigma, sigma_next)
        mean, cov = M @ mean + b, M @ cov @ M.T + N @ N.T
        for i in range(p.d):
            if p.s[i] > 0 and abs(float(sigma_next) - p.sigma_y / float(p.s[i])) < 1e-12:
                mean, cov, log = observed(mean, cov, p.V.T[i : i + 1], p.y_bar[i : i + 1], zero)
                evidence = evidence + log
    return mean, cov, evidence


def with_levels(p: Problem, grid: torch.Tensor) -> torch.Tensor:
    """The grid with the levels sigma_y / s_i."""
    return torch.cat([grid, p.sigma_y / p.s[p.s > 0]]).sort(descending=True).values


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("seed", "eta"), [(0, 1.0), (1, 0.9), (2, 0.95)])
def test_the_evidence_is_unbiased_and_the_mean_converges_to_the_chains_posterior(name, seed, eta):
    """2,000 runs of 8 particles: the mean of exp(evidence) is p(y) of the chain, to 4.5 standard errors, though 8 are few.

    50 runs of 400: mean and variances to those of the limit, to 4.5 standard errors that their own spread gives, since a
    particle filter's variance is that of independent draws times a factor that depends on the problem.
    """
    p = Problem(seed, d=3, e=2)
    grid = with_levels(p, geometric(8, 6.0, 0.1))
    mean, cov, log_evidence = limit(name, p, eta, grid)
    start = lambda n: float(grid[0]) * normal(n, p.d, seed=seed)
    step = SAMPLERS[name](Matrix(p.A), p.y, p.sigma_y, noise_of(seed + 10), eta, particles=8)
    _, memory = walked(step, p.prior.denoiser, start(16_000), grid)
    ratio = (memory.evidence - log_evidence).exp()
    assert abs(float(ratio.mean()) - 1) < SE * float(ratio.std()) / math.sqrt(len(ratio))
    assert float(ratio.std()) / math.sqrt(len(ratio)) < 0.1  # or the last line could not fail

    step = SAMPLERS[name](Matrix(p.A), p.y, p.sigma_y, noise_of(seed + 20), eta, particles=400)
    x, _ = walked(step, p.prior.denoiser, start(20_000), grid)
    runs = x.view(50, 400, p.d)
    for found, wanted in ((runs.mean(1), mean), (((runs - mean) ** 2).mean(1), cov.diagonal())):
        error = found.std(0) / math.sqrt(50)
        assert bool(((found.mean(0) - wanted).abs() < SE * error + 0.01).all())  # a run of 400 is biased by O(1 / 400)
        assert float(error.max()) < 0.06


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_error_falls_as_one_over_the_root_of_the_particles(name, seed):
    """Mean squared error of a run's mean to the limit: 16 times the particles, a sixteenth of it.

    100 runs give each mean square to 14 % if one direction dominates (a chi-square of 100), and their ratio to 20 %; 8 to 32 is
    16 within 3.5 of these. One measured number: with several, few of 64 particles have any weight, and the law begins later.
    """
    p = Problem(seed, d=2, e=1)
    grid = with_levels(p, geometric(6, 6.0, 0.1))
    wanted = limit(name, p, 1.0, grid)[0]

    def error(N):
        step = SAMPLERS[name](Matrix(p.A), p.y, p.sigma_y, noise_of(seed + 30), particles=N)
        x = sample(p.prior.denoiser, 6.0 * normal(100 * N, p.d, seed=seed), grid, step)
        return float(((x.view(100, N, p.d).mean(1) - wanted) ** 2).sum(1).mean())

    assert 8 < error(64) / error(1024) < 32


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_limit_goes_to_the_posterior_as_the_grid_is_refined(name):
    """In closed form, without a sample: eta = 1 is a first-order solution of the reverse SDE, so W2 halves with the steps."""
    for seed in (0, 1, 2):
        p = Problem(seed, d=3, e=2)
        gaps = []
        for n in (40, 80):
            mean, cov, _ = limit(name, p, 1.0, with_levels(p, geometric(n, 80.0, 0.01)))
            gaps.append(w2(mean, (cov + cov.T) / 2, p.posterior))
        assert gaps[1] < 0.65 * gaps[0], gaps


def test_mcgdiff_needs_no_level_at_the_measurement():
    """With eta = 1 two moves that share x0 are one: the grid without the levels r_i gives the same limit but for D at r_i.

    So a grid with and one without differ by less than the two differ from the exact posterior.
    """
    p, n = Problem(1, d=3, e=2), 16_000
    grid = geometric(30, 20.0, 0.02)
    step = mcgdiff(Matrix(p.A), p.y, p.sigma_y, noise_of(5), particles=800)
    x = sample(p.prior.denoiser, 20.0 * normal(n, p.d, seed=3), grid, step)
    mean, cov, _ = limit("mcgdiff", p, 1.0, with_levels(p, grid))
    assert bool(((x.mean(0) - mean).abs() < 0.1 * cov.diagonal().sqrt()).all())
    assert w2(mean, (cov + cov.T) / 2, p.posterior) < 0.15
    assert w2(x.mean(0), x.T.cov(), p.posterior) < 0.2


# --- a mixture, where a weight decides between modes ---------------------------------------------------------------------


def modes(seed: int) -> tuple[Mixture, torch.Tensor, torch.Tensor, float]:
    """Six modes in 2-D and one noisy number of them."""
    source = generator(seed, 77)
    prior = Mixture.isotropic(4 * torch.randn(6, 2, dtype=F64, generator=source), 0.5, torch.rand(6, generator=source) + 0.2)
    A = torch.randn(1, 2, dtype=F64, generator=source)
    y = prior.sample(1, source) @ A.T + 0.5 * torch.randn(1, 1, dtype=F64, generator=source)
    return prior, A, y, 0.5


def distance(name: str, seed: int, N: int, grid: torch.Tensor, n: int = 2000, **options) -> float:
    prior, A, y, sigma_y = modes(seed)
    step = SAMPLERS[name](Matrix(A), y, sigma_y, noise_of(seed), particles=N, **options)
    x = sample(prior.denoiser, float(grid[0]) * normal(n, 2, seed=seed), grid, step)
    return metrics.sliced_wasserstein(x, prior.posterior(A, y[0], sigma_y).sample(n, generator(seed, 1)), slices=50, seed=seed)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_a_mixture_the_distance_falls_to_the_floor(name, seed):
    """2,000 samples in runs of 2 and of 2,000: the last is within 0.15 of exact against exact, and far under the first.

    0.15 is 3 % of the modes' spread of 5: at 100 steps the chain is that good, as the prior's own samples show.
    """
    prior, A, y, sigma_y = modes(seed)
    posterior, grid = prior.posterior(A, y[0], sigma_y), geometric(100, 40.0, 0.02)
    floor = metrics.sliced_wasserstein(
        posterior.sample(2000, generator(seed, 2)), posterior.sample(2000, generator(seed, 1)), slices=50, seed=seed
    )
    few, many = (distance(name, seed, N, grid) for N in (2, 2000))
    assert many < floor + 0.15 and many < few / 2, (few, many, floor)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_switched_off_worsen_it(name, seed):
    grid = geometric(30, 40.0, 0.02)
    right = distance(name, seed, 1000, grid)
    assert right < 0.6 * distance(name, seed, 1000, grid, resample=kept)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_twisting_switched_off_costs_particles(seed):
    """With few particles a run: the mean squared error of the posterior's mean over 200 runs of 10."""
    prior, A, y, sigma_y = modes(seed)
    grid, wanted = geometric(30, 40.0, 0.02), prior.posterior(A, y[0], sigma_y).mean

    def error(guide):
        step = tds(Matrix(A), y, sigma_y, noise_of(seed), particles=10, guide=guide)
        x = sample(prior.denoiser, 40.0 * normal(2000, 2, seed=seed), grid, step)
        return float(((x.view(200, 10, 2).mean(1) - wanted) ** 2).sum(1).mean())

    assert error(1.0) < 0.8 * error(0.0)


# --- the forms of the problem ----------------------------------------------------------------------------------------------


def test_mcgdiff_without_noise_ends_on_the_measurement_with_the_conditional_law():
    """N(0, C) given x_1 = y is N(c y, 1 - c^2): 2,000 samples, on a grid whose bias is under 0.02."""
    prior = Mixture.gaussian(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    A, y = Matrix(torch.tensor([[1.0, 0.0]], dtype=F64)), torch.tensor([[1.5]], dtype=F64)
    step = mcgdiff(A, y, 0.0, noise_of(1), particles=2000)
    x = sample(prior.denoiser, 20.0 * normal(4000, 2, seed=2), geometric(120), step)
    assert_close(x[:, 0], torch.full((4000,), 1.5, dtype=F64), rtol=0, atol=1e-12)
    assert abs(float(x[:, 1].mean()) - 1.2) < 0.05
    assert abs(float(x[:, 1].std()) - 0.6) < 0.05


class Square(Operator):
    """y = x^2, entry by entry."""

    shape = out = (1,)

    def apply(self, x):
        return x**2


class Bare(LinearOperator):
    """2 x_1 + x_2, without an SVD."""

    shape, out = (2,), (1,)

    def apply(self, x):
        return 2 * x[:, :1] + x[:, 1:]


def test_tds_takes_a_nonlinear_operator():
    """x ~ N(0.3, 1), y = x^2 + 0.3 n = 1: two modes at -1 and 1, whose weights and moments are integrals over a grid of x."""
    prior, y = Mixture.gaussian(torch.tensor([0.3]), torch.ones(1, 1)), torch.ones(1, 1, dtype=F64)
    at = torch.linspace(-6, 6, 20_001, dtype=F64)
    density = (-((at - 0.3) ** 2) / 2 - (1 - at**2) ** 2 / (2 * 0.3**2)).exp()
    density = density / density.sum()
    step = tds(Square(), y, 0.3, noise_of(3), particles=1000)
    x = sample(prior.denoiser, 20.0 * normal(20_000, 1, seed=4), geometric(60), step)[:, 0]
    for f in (lambda x: x > 0, torch.abs, torch.square):
        runs = f(x).double().view(20, 1000).mean(1)
        exact = float((density * f(at)).sum())
        assert abs(float(runs.mean()) - exact) < SE * float(runs.std()) / math.sqrt(20) + 0.02  # 0.02: the chain of 60 steps


def test_tds_without_an_svd_has_the_same_limit_as_with_one():
    prior, y = Mixture.gaussian(torch.zeros(2), torch.eye(2)), torch.tensor([[2.0]], dtype=F64)
    A = torch.tensor([[2.0, 1.0]], dtype=F64)
    found = []
    for operator in (Bare(), Matrix(A)):
        step = tds(operator, y, 0.5, noise_of(6), particles=1000)
        found.append(sample(prior.denoiser, 20.0 * normal(10_000, 2, seed=7), geometric(40), step).view(10, 1000, 2).mean(1))
    exact = prior.posterior(A, y[0], 0.5).mean
    for means in found:
        assert bool(((means.mean(0) - exact).abs() < SE * means.std(0) / math.sqrt(10) + 0.03).all())


@pytest.mark.parametrize("name", SAMPLERS)
def test_runs_do_not_mix_and_each_may_have_its_own_measurement(name):
    prior = Mixture.gaussian(torch.zeros(2), torch.eye(2))
    A = Matrix(torch.tensor([[1.0, 0.5]], dtype=F64))
    y = torch.tensor([[-2.0], [2.0]], dtype=F64).repeat_interleave(500, 0)
    step = SAMPLERS[name](A, y, 0.2, noise_of(8), particles=500)
    x, memory = walked(step, prior.denoiser, 20.0 * normal(1000, 2, seed=9), geometric(40))
    means = x.view(2, 500, 2).mean(1)
    for i, value in enumerate((-2.0, 2.0)):
        exact = prior.posterior(A.A, torch.tensor([value]), 0.2)
        assert bool(((means[i] - exact.mean).abs() < 0.25).all())
    assert memory.log.shape == (2, 500) and memory.evidence.shape == (2,)
    assert_close(memory.log, torch.full_like(memory.log, -math.log(500)))  # the last step selects


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_weight_at_all_is_said_with_a_way_out(name):
    """In float32 the square of 1e25 is infinite, and with it each log weight."""
    D = lambda x, sigma: x / (1 + sigma**2).to(x)
    step = SAMPLERS[name](Matrix(torch.eye(2)), torch.full((1, 2), 1e25), 0.1, noise_of(1), particles=5)
    with pytest.raises(
        FloatingPointError, match=r"all 5 particles have weight zero at sigma = 3; .* more particles, a larger sigma_y"
    ):
        step(D, normal(10, 2, dtype=torch.float32), level(3.0), level(1.0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_input_is_one_sentence(name):
    make, A, y, noise = SAMPLERS[name], Matrix(torch.eye(2, dtype=F64)), torch.ones(1, 2, dtype=F64), noise_of(1)
    D, x = (lambda x, sigma: x / 2), normal(10, 2)
    for options, message in (
        ({"eta": 0.0}, r"eta = 0.0; expected a number in \(0, 1\]"),
        ({"particles": 0}, r"particles = 0; expected a whole number >= 1"),
        ({"threshold": 2.0}, r"threshold = 2.0; expected a number from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make(A, y, 0.1, noise, **options)
    with pytest.raises(ValueError, match=r"x has 10 rows; expected a multiple of particles = 4"):
        make(A, y, 0.1, noise, particles=4)(D, x, level(2.0), level(1.0))
    with pytest.raises(ValueError, match=r"sigma has shape \(10,\); expected one level"):
        make(A, y, 0.1, noise)(D, x, torch.full((10,), 2.0), torch.ones(10))
    with pytest.raises(ValueError, match="strictly|expected a falling grid"):
        make(A, y, 0.1, noise)(D, x, level(1.0), level(2.0))
    with pytest.raises(ValueError, match="sigma_y = -1"):
        make(A, y, -1.0, noise)


def test_what_each_cannot_take():
    y = torch.ones(1, 1, dtype=F64)
    with pytest.raises(ValueError, match="Square is not linear and mcgdiff takes linear operators only"):
        mcgdiff(Square(), y, 0.1, noise_of(1))
    with pytest.raises(ValueError, match="no singular value decomposition"):
        mcgdiff(Bare(), y, 0.1, noise_of(1))
    with pytest.raises(ValueError, match="sigma_y = 0; tds divides by it: expected sigma_y > 0, or use mcgdiff"):
        tds(Square(), y, 0.0, noise_of(1))
    stiff = Square()
    stiff.differentiable = False
    with pytest.raises(ValueError, match="A = Square has no gradient and tds"):
        tds(stiff, y, 0.1, noise_of(1))
