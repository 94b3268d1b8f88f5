"""The rules of score distillation against closed forms on Gaussians, quadrature on mixtures, and one another at shared noise.

On N(mu, s^2), with kappa = sigma^2 / (s^2 + sigma^2), D(x, sigma) = mu + (1 - kappa)(x - mu), so that SDS is
w (kappa (x0 - mu) / sigma - (1 - kappa) eps), and w (kappa (x0 - mu) / sigma + kappa eps) without its baseline.
"""

import math
from itertools import pairwise

import pytest
import scipy.stats
import torch
from torch import nn
from torch.testing import assert_close

from course_lib import zoo
from course_lib.denoisers import Counted, from_eps
from course_lib.devices import SampleNoise, generator
from course_lib.distill import (
    dds,
    distill,
    distill_grad,
    dreamfusion,
    falling,
    ism,
    log_uniform,
    nfsd,
    of_score,
    one,
    point,
    sds,
    sjc,
    uniform_times,
    vsd,
)
from course_lib.distill.exact import Points, expected, log_grid, of_moments, robbins_monro
from course_lib.gaussians import Empirical, Mixture
from course_lib.guidance import cfg
from course_lib.schedules import Cosine, Linear
from course_lib.worlds import digits, toys
from tests.draws import level, noise_of, normal

SE = 4.5  # standard errors
F64 = torch.float64
MU, S = 1.3, 0.7
WEIGHTS = (one, dreamfusion, of_score)


def gauss(mu=MU, s=S):
    """N(mu, s^2) in any number of coordinates, each by itself."""
    return lambda x, sigma: mu + s**2 / (s**2 + right(sigma, x) ** 2) * (x - mu)


def right(sigma, x):
    return sigma if sigma.ndim == 0 else sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def kappa(sigma, s=S):
    return sigma**2 / (s**2 + sigma**2)


def fixed(eps):
    """A source of noise that gives the same numbers whenever it is asked."""
    return lambda x: eps.to(x)


def at(sigma):
    """Levels of distillation: always sigma."""
    return lambda progress, rows, draws: torch.full((rows,), float(sigma), dtype=F64)


# --- SDS ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
def test_sds_follows_the_gradient_of_the_time_weighted_kl(weight):
    """KL(N(x0, sigma^2) | N(mu, s^2 + sigma^2)), written out and differentiated; SDS is linear in eps, so quadrature is exact."""
    sigmas, x0 = log_grid(0.05, 20.0, 12), (3 * normal(16, 1)).requires_grad_()
    total = S**2 + sigmas**2
    kl = 0.5 * ((total / sigmas**2).log() + (sigmas**2 + (x0 - MU) ** 2) / total - 1)  # (16, 12)
    (gradient,) = torch.autograd.grad((weight(sigmas) * sigmas * kl).mean(1).sum(), x0)
    assert_close(expected(sds(gauss(), weight), x0.detach(), sigmas), gradient, rtol=0, atol=1e-12)
    # and with noise: pairs of opposite sign have the exact mean, too
    eps, sigma = normal(16, 1, seed=1), level(0.8)
    pair = [sds(gauss(), weight)(x0.detach(), sigma, fixed(sign * eps)) for sign in (1, -1)]
    exact = weight(sigma) * sigma * (x0.detach() - MU) / (S**2 + sigma**2)
    assert_close(sum(pair) / 2, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("baseline", [True, False])
def test_sds_is_its_closed_form_with_and_without_the_baseline(weight, baseline):
    x0, eps, sigma = normal(8, 3), normal(8, 3, seed=1), torch.linspace(0.1, 5, 8, dtype=F64)
    k = kappa(sigma)[:, None]
    noise = -(1 - k) * eps if baseline else k * eps
    exact = weight(sigma)[:, None] * (k * (x0 - MU) / sigma[:, None] + noise)
    assert_close(sds(gauss(), weight, baseline)(x0, sigma, fixed(eps)), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_dropping_eps_keeps_the_mean_and_multiplies_the_variance(ratio):
    """By kappa^2 / (1 - kappa)^2, above 1 for sigma > s alone. A variance of n draws is off by sqrt(2 / n) of itself."""
    n, sigma = 40_000, level(ratio * S)
    x0 = torch.full((n, 1), 2.0, dtype=F64)
    with_, without = (sds(gauss(), baseline=b)(x0, sigma, noise_of(int(b))) for b in (True, False))
    k = kappa(float(sigma))
    for found, deviation in ((with_, 1 - k), (without, k)):
        assert abs(float(found.mean()) - k * (2.0 - MU) / float(sigma)) < SE * deviation / math.sqrt(n)
    exact = k**2 / (1 - k) ** 2
    assert float(without.var() / with_.var()) == pytest.approx(exact, rel=SE * math.sqrt(4 / n))
    assert (exact > 1 + 1e-9) == (ratio > 1) and exact == pytest.approx(ratio**4)


def settled(baseline, sigma, lr, steps, hold=None, n=2000):
    """Variance and mean of SDS's points, 4 n of them, after so many steps; all begin at 3."""
    theta = Points(torch.full((4, n), 3.0, dtype=F64))
    optimizer = torch.optim.SGD(theta.parameters(), lr=lr)
    on_step = robbins_monro(optimizer, hold) if hold else lambda step, x0: None
    end = distill(theta, sds(gauss(), baseline=baseline), at(sigma), optimizer, steps, seed=int(baseline), on_step=on_step)
    return float(end.var()), float(end.mean())


def predicted(baseline, sigma, rates):
    """The recursion of mean and variance: theta' - mu = (1 - lr kappa / sigma)(theta - mu) + lr c eps, c = 1 - kappa or kappa."""
    k, mean, variance = kappa(sigma), 3.0 - MU, 0.0
    c = 1 - k if baseline else k
    for lr in rates:
        shrink = 1 - lr * k / sigma
        mean, variance = shrink * mean, shrink**2 * variance + (lr * c) ** 2
    return variance, MU + mean


@pytest.mark.parametrize("steps", [20, 300])
def test_sds_converges_to_mu_with_zero_variance_as_its_rate_falls(steps):
    """Each run against its exact recursion; the variance dies out as 1 / steps."""
    rates = [0.5 * 10 / (10 + k) for k in range(steps)]
    variance, mean = settled(True, 0.8, 0.5, steps, hold=10)
    exact, centre = predicted(True, 0.8, rates)
    assert variance == pytest.approx(exact, rel=SE * math.sqrt(2 / 8000))
    assert abs(mean - centre) < SE * math.sqrt(exact / 8000)
    if steps == 300:
        k, c = kappa(0.8), 5.0  # the rate is c / (10 + k)
        assert exact == pytest.approx(c**2 * (1 - k) ** 2 / (2 * c * k / 0.8 - 1) / 310, rel=0.05)
        assert exact < 0.01 * S**2 and abs(centre - MU) < 1e-4


def test_without_noise_sds_arrives_exactly():
    x0 = 3 * normal(8, 1)
    for _ in range(200):
        x0 = x0 - 0.5 * expected(sds(gauss()), x0, log_grid(0.1, 5.0))
    assert_close(x0, torch.full_like(x0, MU), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.35, 1.4])
def test_at_a_constant_rate_points_keep_the_variance_of_the_noise(sigma):
    """lr^2 c^2 / (1 - (1 - lr kappa / sigma)^2): the ratio without the baseline is again kappa^2 / (1 - kappa)^2."""
    lr, k = 0.2, kappa(sigma)
    floor = [lr**2 * c**2 / (1 - (1 - lr * k / sigma) ** 2) for c in (1 - k, k)]
    found = [settled(baseline, sigma, lr, 120)[0] for baseline in (True, False)]
    for variance, exact in zip(found, floor, strict=True):
        assert variance == pytest.approx(exact, rel=SE * math.sqrt(2 / 8000))
    assert (found[1] > found[0]) == (sigma > S)


# --- the Jacobian ------------------------------------------------------------------------------------------------------


def test_with_the_jacobian_a_gaussian_gets_the_factor_kappa_over_sigma():
    x0, eps, sigma = normal(8, 3), normal(8, 3, seed=1), torch.linspace(0.1, 5, 8, dtype=F64)
    plain, through = (sds(gauss(), dreamfusion, jacobian=j)(x0, sigma, fixed(eps)) for j in (False, True))
    assert_close(through, (kappa(sigma) / sigma)[:, None] * plain, rtol=0, atol=1e-12)
    assert not through.requires_grad and not x0.requires_grad


def test_with_the_jacobian_it_is_the_gradient_of_the_denoising_loss():
    """w ((I - dD/dx) / sigma)^T (eps_hat - eps) on a mixture, where dD/dx is no multiple of I; by differences of the loss."""
    mixture, eps, x0, sigma, h = toys.three_blobs(), normal(5, 2, seed=1), normal(5, 2), level(0.6), 1e-5

    def loss(x0):
        eps_hat = (x0 + sigma * eps - mixture.denoiser(x0 + sigma * eps, sigma)) / sigma
        return 0.5 * dreamfusion(sigma) * ((eps_hat - eps) ** 2).sum(1)

    differences = torch.stack([(loss(x0 + h * e) - loss(x0 - h * e)) / (2 * h) for e in torch.eye(2, dtype=F64)], 1)
    with torch.no_grad():  # as in the loop
        found = sds(mixture.denoiser, dreamfusion, jacobian=True)(x0, sigma, fixed(eps))
    assert_close(found, differences, rtol=0, atol=1e-8)


# --- VSD ---------------------------------------------------------------------------------------------------------------


def test_the_one_line_is_the_difference_of_two_scores():
    """w sigma (score of the fake - score of the real), with the exact scores of two mixtures."""
    real, fake, sigma = toys.three_blobs(), toys.ring(), torch.tensor([0.3, 1.0, 4.0], dtype=F64)
    x0, eps = normal(3, 2), normal(3, 2, seed=1)
    x = x0 + sigma[:, None] * eps
    exact = (dreamfusion(sigma) * sigma)[:, None] * (fake.score(x, sigma) - real.score(x, sigma))
    found = distill_grad(real.denoiser, fake.denoiser, x0, sigma, fixed(eps), dreamfusion)
    assert_close(found, exact, rtol=0, atol=1e-12)
    assert torch.equal(vsd(real.denoiser, fake.denoiser, dreamfusion)(x0, sigma, fixed(eps)), found)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_with_a_point_for_the_second_score_vsd_is_sds(dtype):
    x0, eps, sigma = normal(6, 2).to(dtype), normal(6, 2, seed=1), torch.linspace(0.2, 6, 6, dtype=F64)
    D = toys.three_blobs().denoiser
    pair = vsd(D, point(x0), dreamfusion)(x0, sigma, fixed(eps)), sds(D, dreamfusion)(x0, sigma, fixed(eps))
    assert_close(*pair, rtol=0, atol=1e-6)
    lone = Empirical(x0[:1])  # and a point is what one particle has for its exact Denoiser
    pair = (rule(x0[:1], sigma[0], fixed(eps[:1])) for rule in (vsd(D, lone), sds(D)))
    assert_close(*pair, rtol=0, atol=1e-6)


def test_the_distribution_itself_is_the_fixed_point_of_vsd():
    """At every point, level and draw of noise; and nowhere else does the gradient vanish like that."""
    mixture = toys.three_blobs()
    x0, sigma = mixture.sample(64, generator(0)), torch.logspace(-2, 1, 64, dtype=F64)
    assert float(vsd(mixture.denoiser, mixture.denoiser)(x0, sigma, noise_of(0)).abs().max()) == 0
    wider = Mixture(mixture.weights, mixture.means, 1.1 * mixture.covs)
    assert float(vsd(mixture.denoiser, wider.denoiser)(x0, sigma, noise_of(0)).abs().max()) > 0.05


def test_vsd_brings_a_wrong_gaussian_to_the_right_one():
    """With the exact Denoiser of a Gaussian of the points' own moments; both moments, and all noise has cancelled at the end."""
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    target = Mixture.gaussian(torch.tensor([1.0, -0.5], dtype=F64), cov)
    theta = Points(3.0 + 2.0 * normal(64, 2))
    optimizer = torch.optim.SGD(theta.parameters(), lr=0.5)
    rule = vsd(target.denoiser, of_moments(theta.theta), of_score)
    end = distill(theta, rule, falling(3.0, 0.3), optimizer, 400)
    assert_close(end.mean(0), target.mean, rtol=0, atol=1e-6)
    assert_close(torch.cov(end.T), cov, rtol=0, atol=1e-6)
    # SDS from the same start does not keep the points apart
    theta = Points(3.0 + 2.0 * normal(64, 2))
    optimizer = torch.optim.SGD(theta.parameters(), lr=0.5)
    end = distill(theta, sds(target.denoiser, of_score), falling(3.0, 0.3), optimizer, 400)
    assert float(torch.cov(end.T).trace()) < 0.5 * float(cov.trace())


# --- SJC ---------------------------------------------------------------------------------------------------------------


def test_sjc_of_one_draw_is_sds_and_averages_have_the_same_mean():
    D, sigmas, x0 = toys.three_blobs().denoiser, log_grid(0.1, 5.0), normal(6, 2)
    eps, sigma = normal(6, 2, seed=1), torch.linspace(0.2, 6, 6, dtype=F64)
    pair = (rule(x0, sigma, fixed(eps)) for rule in (sjc(D, weight=dreamfusion), sds(D, dreamfusion)))
    assert_close(*pair, rtol=0, atol=1e-12)
    assert_close(expected(sjc(D, 3), x0, sigmas, 16), expected(sds(D), x0, sigmas, 16), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4])
def test_an_average_of_n_draws_has_the_mean_of_sds_and_a_part_of_its_variance(n):
    """On a mixture, at a point between two blobs. The errors of mean and variance are estimated from the draws themselves."""
    rows, sigma, D = 20_000, level(1.0), toys.three_blobs().denoiser
    x0 = torch.tensor([[0.3, -0.2]], dtype=F64)
    exact = expected(sds(D), x0, sigma[None], 40)
    square = expected(lambda x, level, noise: sds(D)(x, level, noise) ** 2, x0, sigma[None], 40)
    found = sjc(D, n)(x0.expand(rows, 2), sigma, noise_of(n))
    assert bool(((found.mean(0) - exact[0]).abs() < SE * found.std(0) / math.sqrt(rows)).all())
    centred = (found - exact) ** 2
    assert bool(((centred.mean(0) - (square - exact**2)[0] / n).abs() < SE * centred.std(0) / math.sqrt(rows)).all())


def test_without_perturbing_a_gaussian_has_the_same_mean_and_a_mixture_has_not():
    x0, sigma = normal(6, 2), torch.linspace(0.2, 6, 6, dtype=F64)
    alone = sjc(gauss(), perturb=False)
    assert torch.equal(alone(x0, sigma, noise_of(0)), alone(x0, sigma, noise_of(1)))
    for row, s in zip(x0, sigma, strict=True):
        assert_close(alone(row[None], s, noise_of(0)), expected(sds(gauss()), row[None], s[None]), rtol=0, atol=1e-12)
    # two peaks at -1 and 1: D at a point between is tanh-like, and its mean over noise is flatter
    D, x0, sigma = toys.two_peaks(2.0, 0.3).denoiser, torch.tensor([[0.5]], dtype=F64), level(0.5)
    gap = sjc(D, perturb=False)(x0, sigma, noise_of(0)) - expected(sds(D), x0, sigma[None], 40)
    x = torch.linspace(-8, 8, 20_001, dtype=F64)[:, None]
    density = (-(x**2) / 2).exp() / math.sqrt(2 * math.pi)
    exact = torch.trapezoid(density * D(x0 + sigma * x, sigma), x, dim=0) - D(x0, sigma)[0]
    assert_close(gap[0], exact / sigma, rtol=0, atol=1e-5)
    assert float(gap.abs()) > 0.2 * float(expected(sds(D), x0, sigma[None], 40).abs())


def test_a_network_is_less_right_where_it_never_saw_its_level_without_noise():
    """`digits` against the exact Denoiser of its training set, at blurred digits, sigma = 2, where the two nearly agree.

    At x0 itself the network is off by nearly twice as much as its mean over noise is, and the unperturbed gradient turns
    further than the exact one does; both by over 4.5 standard errors of the 48 pictures.
    """
    D, exact = zoo.load("digits", device="cpu"), Empirical(digits.load("train")[0])
    x0 = nn.functional.avg_pool2d(digits.load("test")[0][:48], 7, 1, 3, count_include_pad=False)
    D, sigma, noise = D.given(label=torch.full((48,), digits.CLASSES)), level(2.0), SampleNoise(0)
    draws = [sign * eps for eps in (noise(x0) for _ in range(6)) for sign in (1, -1)]
    with torch.no_grad():
        alone, mean = zip(*((f(x0, sigma), sum(f(x0 + 2.0 * e, sigma) for e in draws) / 12) for f in (D, exact)), strict=True)
    off_alone, off_mean = ((net - right).flatten(1).norm(dim=1) for net, right in (alone, mean))
    ratio = (off_alone / off_mean).log()
    assert float(ratio.mean()) > math.log(1.5) + SE * float(ratio.std()) / math.sqrt(48)
    cosines = [
        nn.functional.cosine_similarity((x0 - a).flatten(1), (x0 - m).flatten(1)) for a, m in zip(alone, mean, strict=True)
    ]
    turned = cosines[1] - cosines[0]
    assert float(turned.mean()) > SE * float(turned.std()) / math.sqrt(48)


# --- NFSD --------------------------------------------------------------------------------------------------------------

COND, REF, BAD = gauss(2.0), gauss(-1.0), gauss(4.0)
W = 7.5


def nfsd_at(sigma, w=W, split=1.0, bad=BAD, seed=0, weight=one):
    x0, sigma = normal(5, 2), torch.as_tensor(sigma, dtype=F64)
    return x0, nfsd(COND, REF, bad, w, split, weight)(x0, sigma, fixed(normal(5, 2, seed=seed)))


def test_above_the_split_nfsd_has_no_noise():
    """For equal variances w_sigma kappa / sigma ((mu_bad - mu_ref) + w (mu_ref - mu_cond)), wherever x is."""
    k = kappa(2.0)
    _, first = nfsd_at(2.0, weight=dreamfusion)
    exact = float(dreamfusion(level(2.0))) * k / 2.0 * ((4.0 + 1.0) + W * (-1.0 - 2.0))
    assert_close(first, torch.full_like(first, exact), rtol=0, atol=1e-12)
    assert_close(nfsd_at(2.0, weight=dreamfusion, seed=1)[1], first, rtol=0, atol=1e-12)


def test_below_the_split_nfsd_takes_all_of_eps_ref():
    x0, found = nfsd_at(0.5)
    k, eps = kappa(0.5), normal(5, 2)
    exact = k * (x0 + 1.0) / 0.5 + k * eps + W * k / 0.5 * (-1.0 - 2.0)
    assert_close(found, exact, rtol=0, atol=1e-12)


def test_the_split_is_by_row_and_belongs_to_the_upper_branch():
    sigma = torch.tensor([0.5, 0.99, 1.0, 1.01, 2.0], dtype=F64)
    _, mixed = nfsd_at(sigma)
    for i, s in enumerate(sigma.tolist()):
        branch = nfsd_at(sigma, split=100.0 if s < 1 else 0.0)[1]
        assert torch.equal(mixed[i], branch[i])


def test_endpoints_of_nfsd():
    x0, eps = normal(5, 2), fixed(normal(5, 2))
    sigma = level(0.8)
    for w in (0.0, 1.0, W):
        D = cfg(COND, REF, w)
        # always below the split: SDS of the guided Denoiser without its baseline
        assert_close(nfsd_at(0.8, w, 10.0)[1], sds(D, baseline=False)(x0, sigma, eps), rtol=0, atol=1e-11)
        # always above, with a point for the bad Denoiser: SDS with it
        assert_close(nfsd_at(0.8, w, 0.0, point(x0))[1], sds(D)(x0, sigma, eps), rtol=0, atol=1e-11)
    # w = 0 leaves delta_D alone, and a bad Denoiser that is the reference leaves w delta_C alone
    assert_close(nfsd_at(0.8, 0.0, 0.0)[1], distill_grad(REF, BAD, x0, sigma, eps), rtol=0, atol=1e-12)
    assert_close(nfsd_at(0.8, W, 0.0, REF)[1], W * distill_grad(COND, REF, x0, sigma, eps), rtol=0, atol=1e-11)
    assert float(nfsd_at(0.8, 0.0, 0.0, REF)[1].abs().max()) == 0


# --- DDS and ISM -------------------------------------------------------------------------------------------------------


def test_dds_is_sds_less_that_of_the_source_at_the_same_noise():
    source, x0, sigma, eps = normal(5, 2), normal(5, 2, seed=3), torch.linspace(0.2, 4, 5, dtype=F64), fixed(normal(5, 2, seed=1))
    target, before = toys.three_blobs().denoiser, toys.ring().denoiser
    found = dds(target, before, source, dreamfusion)(x0, sigma, eps)
    difference = sds(target, dreamfusion)(x0, sigma, eps) - sds(before, dreamfusion)(source, sigma, eps)
    assert_close(found, difference, rtol=0, atol=1e-12)
    same = dds(target, target, source)(source, sigma, noise_of(0))
    assert float(same.abs().max()) == 0  # nothing to edit


def test_on_gaussians_dds_has_no_noise():
    """kappa / sigma ((x0 - mu) - (source - mu_source)) for equal variances: it stops where x0 has moved by mu - mu_source."""
    source, x0 = normal(5, 2), normal(5, 2, seed=3)
    found = [dds(COND, REF, source)(x0, level(0.8), noise_of(k)) for k in (0, 1)]
    exact = kappa(0.8) / 0.8 * ((x0 - 2.0) - (source + 1.0))
    for one_ in found:
        assert_close(one_, exact, rtol=0, atol=1e-12)
    assert float(dds(COND, REF, source)(source + 3.0, level(0.8), noise_of(0)).abs().max()) < 1e-12


def inverted(x0, low, sigma, mu, s=S):
    """The probability flow of N(mu, s^2) from level low to sigma, exactly."""
    return mu + math.sqrt((s**2 + sigma**2) / (s**2 + low**2)) * (x0 - mu)


def test_ism_is_deterministic_and_pulls_towards_the_mode():
    x0, sigma = 3 * normal(64, 1), level(1.5)
    rule = ism(gauss(), gauss())
    found = rule(x0, sigma, noise_of(0))
    assert torch.equal(found, rule(x0, sigma, noise_of(1)))
    assert bool((found * (x0 - MU) > 0).all())  # a step against it goes to mu


def test_ism_converges_to_the_difference_of_two_noises_on_the_exact_flow():
    """eps_hat = sigma (x - mu) / (s^2 + sigma^2), at s on the flow and at t one step on; Euler's error falls as 1 / steps."""
    x0, t, s, low = 3 * normal(8, 1), 1.5, 1.2, 0.02
    x_s = inverted(x0, low, s, MU)
    start = s * (x_s - MU) / (S**2 + s**2)
    end = t * (x_s + (t - s) * start - MU) / (S**2 + t**2)
    gaps = []
    for steps in (200, 400, 800):
        found = ism(gauss(), gauss(), s / t, steps, low)(x0, level(t), noise_of(0))
        gaps.append(float((found - (end - start)).abs().max() / (end - start).abs().max()))
    assert gaps[2] < 0.02 and all(1.8 < a / b < 2.2 for a, b in pairwise(gaps))


def test_in_a_small_interval_ism_is_the_prompt_alone():
    """Under one prompt the gradient vanishes as 1 - ratio; between two it tends to eps_cond - eps_ref, w times it under CFG."""
    x0, sigma = normal(8, 1), level(1.5)
    sizes = [float(ism(REF, REF, ratio, 50)(x0, sigma, noise_of(0)).abs().max()) for ratio in (0.98, 0.99, 0.995)]
    assert all(1.8 < a / b < 2.2 for a, b in pairwise(sizes))
    found = ism(cfg(COND, REF, W), REF, 1 - 1e-6, 50)(x0, sigma, noise_of(0))
    exact = W * kappa(1.5) / 1.5 * (-1.0 - 2.0)
    assert_close(found, torch.full_like(found, exact), rtol=0, atol=1e-4)


# --- weights and levels ------------------------------------------------------------------------------------------------


def test_weights():
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    alpha_bar = 1 / (1 + sigma**2)
    assert_close(one(sigma), torch.ones(3, dtype=F64), rtol=0, atol=0)
    assert_close(dreamfusion(sigma), 1 - alpha_bar, rtol=1e-12, atol=0)
    x0, eps = normal(3, 2), normal(3, 2, seed=1)
    x = x0 + sigma[:, None] * eps
    assert_close(sds(gauss(), of_score)(x0, sigma, fixed(eps)), x0 - gauss()(x, sigma), rtol=0, atol=1e-12)


def far_from(values, cdf):
    """Kolmogorov's statistic in units of 1 / sqrt(n); above 2.6 with probability 2 exp(-2 * 2.6^2) = 3e-6."""
    return scipy.stats.kstest(values.numpy(), cdf).statistic * math.sqrt(len(values))


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_times_are_uniform_up_to_a_share_that_falls(schedule, progress):
    draw = uniform_times(schedule, 0.02, 0.98, 0.5)
    sigma = draw(progress, 4000, generator(1))
    assert sigma.shape == (4000,) and sigma.dtype == F64
    top = 0.98 - 0.48 * progress
    times = schedule.t_of_sigma(sigma) / schedule.t_max
    assert far_from(times, scipy.stats.uniform(0.02, top - 0.02).cdf) < 2.6
    assert float(times.min()) >= 0.02 - 1e-9 and float(times.max()) <= top + 1e-9
    if progress:
        assert far_from(times, scipy.stats.uniform(0.02, 0.96).cdf) > 2.6  # the test would see a range that stays
        always = schedule.t_of_sigma(uniform_times(schedule)(progress, 4000, generator(1)))
        assert float(always.max()) > 0.97  # without an end the range stays


def test_log_uniform_levels_and_the_falling_one():
    sigma = log_uniform(0.1, 3.0)(0.7, 4000, generator(2))
    assert far_from((sigma / 0.1).log() / math.log(30), "uniform") < 2.6
    draw = falling(10.0, 0.1)
    ends = [float(draw(progress, 3, generator(3)).unique()) for progress in (0.0, 0.5, 1.0)]
    assert ends == pytest.approx([10.0, 1.0, 0.1])
    spread = falling(10.0, 0.1, 4.0)(0.5, 4000, generator(4))
    assert far_from(-spread.log() / math.log(4), "uniform") < 2.6


def test_a_row_has_its_level_whatever_the_batch():
    for draw in (uniform_times(Linear()), log_uniform(0.1, 3.0), falling(3.0, 0.1, 2.0)):
        assert torch.equal(draw(0.3, 40, generator(5))[:7], draw(0.3, 7, generator(5)))


def test_the_quadrature_of_levels_is_that_of_log_uniform():
    """The mean of sigma is (high - low) / log(high / low)."""
    exact = (3.0 - 0.1) / math.log(30)
    errors = [abs(float(log_grid(0.1, 3.0, n).mean()) - exact) for n in (8, 16, 32)]
    assert errors[2] < 0.01 and all(3.5 < a / b < 4.5 for a, b in pairwise(errors))


# --- rows and calls ----------------------------------------------------------------------------------------------------

MIX, OTHER = toys.three_blobs().denoiser, toys.ring().denoiser
RULES = {
    "sds": sds(MIX, dreamfusion),
    "sds without baseline": sds(MIX, dreamfusion, baseline=False),
    "sds with the Jacobian": sds(MIX, dreamfusion, jacobian=True),
    "sjc": sjc(MIX, 3, dreamfusion),
    "sjc unperturbed": sjc(MIX, weight=dreamfusion, perturb=False),
    "vsd": vsd(MIX, OTHER, dreamfusion),
    "nfsd": nfsd(MIX, OTHER, lambda x, sigma: 0.5 * x, 7.5, 1.0, dreamfusion),
    "ism": ism(MIX, OTHER, weight=dreamfusion),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_each_row_has_its_own_level_and_noise(name, dtype):
    """A batch of four levels is four batches of one; shape and type are those of x0, and no gradient is left open."""
    x0, sigma = normal(4, 2).to(dtype), torch.tensor([0.2, 0.9, 1.0, 5.0], dtype=F64)
    found = RULES[name](x0, sigma, SampleNoise(3))
    assert found.shape == x0.shape and found.dtype == dtype and not found.requires_grad
    for i in range(4):
        alone = RULES[name](x0[i : i + 1], sigma[i], SampleNoise(3, first=i))
        assert_close(alone, found[i : i + 1], rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-11)


class Net(nn.Module):
    """A network that counts its calls and the rows of each."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x, time, label):
        self.rows.append(len(x))
        return 0.1 * x + label[:, None]


def prompted(n):
    """One network under a prompt, without one and under a bad one."""
    net = Net()
    D = from_eps(net, lambda sigma: sigma)
    return net, [D.given(label=torch.full((n,), value)) for value in (1.0, 0.0, -1.0)]


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        (lambda D, ref, bad: sds(D), [4]),
        (lambda D, ref, bad: sds(cfg(D, ref, 7.5)), [8]),
        (lambda D, ref, bad: sds(cfg(D, ref, 1.0)), [4]),
        (lambda D, ref, bad: sjc(cfg(D, ref, 7.5), 3), [8, 8, 8]),
        (lambda D, ref, bad: vsd(D, ref), [8]),
        (lambda D, ref, bad: nfsd(D, ref, bad, 7.5, 1.0), [12]),
        (lambda D, ref, bad: ism(D, ref, steps=4), [4] * 6),
    ],
)
def test_what_shares_a_network_is_one_call(rule, rows):
    net, denoisers = prompted(4)
    rule(*denoisers)(normal(4, 2), level(0.8), noise_of(0))
    assert net.rows == rows


def test_a_merged_call_is_the_calls_in_turn():
    _, denoisers = prompted(4)
    x0, sigma = normal(4, 2), torch.tensor([0.2, 0.9, 1.0, 5.0], dtype=F64)
    for rule in (lambda *D: nfsd(*D, 7.5, 1.0), lambda *D: vsd(*D[:2]), lambda *D: sds(cfg(*D[:2], 7.5))):
        together = rule(*denoisers)(x0, sigma, SampleNoise(0))
        apart = rule(*(Counted(D) for D in denoisers))(x0, sigma, SampleNoise(0))
        assert_close(together, apart, rtol=0, atol=1e-12)


def test_the_second_score_of_vsd_is_a_call_of_its_own():
    net, (cond, ref, _) = prompted(4)
    second = Counted(point(normal(4, 2)))
    vsd(cfg(cond, ref, 7.5), second)(normal(4, 2), level(0.8), noise_of(0))
    assert net.rows == [8] and (second.calls, second.rows) == (1, 4)


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sds(MIX, baseline=False, jacobian=True), "baseline = False with jacobian = True; expected the baseline"),
        (lambda: sjc(MIX, 0), "n = 0; expected at least 1 draw"),
        (lambda: nfsd(MIX, MIX, MIX, 7.5, -1.0), "split = -1.0; expected a noise level of 0 or more"),
        (lambda: dds(MIX, MIX, normal(3, 2))(normal(4, 2), level(1.0), noise_of(0)), r"source has shape \(3, 2\); .* \(4, 2\)"),
        (lambda: ism(MIX, MIX, 1.0), "ratio = 1.0, steps = 4, low = 0.02; expected a ratio in"),
        (lambda: ism(MIX, MIX, 0.0), "ratio = 0.0"),
        (lambda: ism(MIX, MIX, steps=0), "steps = 0"),
        (lambda: ism(MIX, MIX, low=0.0), "low = 0.0"),
        (lambda: ism(MIX, MIX)(normal(4, 2), level(0.02), noise_of(0)), "sigma = 0.02; expected levels above .* = 0.025"),
        (lambda: uniform_times(Linear(), 0.0), "low = 0.0, high = 0.98, end = None; expected 0 < low < high <= 1"),
        (lambda: uniform_times(Linear(), 0.5, 0.4), "low = 0.5, high = 0.4"),
        (lambda: uniform_times(Linear(), high=1.1), "high = 1.1"),
        (lambda: uniform_times(Linear(), 0.1, 0.9, 0.1), "end = 0.1"),
        (lambda: log_uniform(0.0, 1.0), "low = 0.0, high = 1.0; expected 0 < low < high"),
        (lambda: log_uniform(1.0, math.nan), "high = nan"),
        (lambda: falling(0.1, 10.0), "low = 10.0, high = 0.1"),
        (lambda: falling(10.0, 0.1, 0.5), "spread = 0.5; expected a factor of at least 1"),
        (lambda: sds(MIX)(normal(4, 2), torch.ones(3, dtype=F64), noise_of(0)), r"sigma has shape \(3,\)"),
    ],
)
def test_bad_input_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
