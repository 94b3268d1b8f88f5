"""Score distillation of points in the plane: what SDS minimises and where it stops, whom VSD keeps apart, both measured.

The mixture has three blobs of weights 0.6, 0.3 and 0.1; the points begin as N(0, 2^2).
"""

import functools
import math

import pytest
import torch
from torch.testing import assert_close

from course_lib.denoisers import from_edm
from course_lib.devices import generator
from course_lib.distill import distill, falling, log_uniform, of_score, one, sds, vsd
from course_lib.distill.exact import (
    Points,
    agreement,
    expected,
    follow,
    log_grid,
    mode_of,
    objective,
    of_moments,
    robbins_monro,
    shares,
    spreads,
    three_weights,
)
from course_lib.distill.second import SecondScore
from course_lib.gaussians import Empirical, Mixture
from course_lib.nets.mlp import MLP
from course_lib.training import denoising_loss, fit
from tests.draws import noise_of, normal

SE = 4.5  # standard errors
F64 = torch.float64
MIXTURE = three_weights()
LOW, HIGH = 0.1, 0.6
SIGMAS = log_grid(LOW, HIGH)
SDS = sds(MIXTURE.denoiser, of_score)


def begin(n=128, seed=0):
    return 2 * normal(n, 2, seed=100 + seed)


# --- the quadrature ----------------------------------------------------------------------------------------------------


def test_expectations_are_exact_for_polynomials():
    """E (x0 + sigma eps)^4 = x0^4 + 6 x0^2 sigma^2 + 3 sigma^4, of which three nodes are enough; two are not."""
    x0, sigmas = begin(5), torch.tensor([0.3, 1.1], dtype=F64)
    fourth = lambda x0, sigma, noise: (x0 + sigma[:, None] * noise(x0)) ** 4
    exact = sum(x0**4 + 6 * x0**2 * s**2 + 3 * s**4 for s in sigmas) / 2
    assert_close(expected(fourth, x0, sigmas, 3), exact, rtol=1e-12, atol=1e-12)
    assert float((expected(fourth, x0, sigmas, 2) - exact).abs().max()) > 0.1


def test_the_expected_gradient_is_the_mean_of_draws():
    rows, x0 = 40_000, torch.tensor([[-0.5, 0.8]], dtype=F64)
    sigma = torch.full((rows,), 0.7, dtype=F64)
    draws = SDS(x0.expand(rows, 2), sigma, noise_of(0))
    exact = expected(SDS, x0, sigma[:1], 32)[0]
    assert bool(((draws.mean(0) - exact).abs() < SE * draws.std(0) / math.sqrt(rows)).all())


@pytest.mark.parametrize("weight", [one, of_score])
def test_the_expected_gradient_is_that_of_the_objective(weight):
    """The same rule of quadrature for both; the objective is differentiated by autograd."""
    x0 = begin(16).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(MIXTURE, x0, SIGMAS, weight).sum(), x0)
    assert_close(expected(sds(MIXTURE.denoiser, weight), x0.detach(), SIGMAS), gradient, rtol=0, atol=1e-10)


def test_the_objective_of_a_gaussian_is_its_closed_form():
    mean, s = torch.tensor([0.5, -1.0], dtype=F64), 0.8
    gauss, x0 = Mixture.isotropic(mean[None], s), begin(6)
    square, sigma = ((x0 - mean) ** 2).sum(1, keepdim=True), SIGMAS
    kl = ((s**2 + sigma**2) / sigma**2).log() + (2 * sigma**2 + square) / (2 * (s**2 + sigma**2)) - 1  # (6, S)
    assert_close(objective(gauss, x0, SIGMAS), (sigma * kl).mean(1), rtol=0, atol=1e-12)


def test_what_is_counted():
    points = torch.cat([MIXTURE.means[k] + 0.1 * normal(n, 2, seed=k) for k, n in enumerate((50, 30, 20))])
    assert mode_of(points, MIXTURE).tolist() == [0] * 50 + [1] * 30 + [2] * 20
    assert shares(points, MIXTURE).tolist() == [0.5, 0.3, 0.2]
    for k, part in enumerate(points.split([50, 30, 20])):
        assert float(spreads(points, MIXTURE)[k]) == pytest.approx(float((part.var(0).sum() / (2 * 0.3**2)).sqrt()))
    exact = MIXTURE.sample(4000, generator(0))
    assert_close(spreads(exact, MIXTURE), torch.ones(3, dtype=F64), rtol=0, atol=SE / math.sqrt(4 * 400 * 0.8))
    assert_close(shares(exact, MIXTURE), MIXTURE.weights, rtol=0, atol=SE * math.sqrt(0.25 / 4000))
    lone = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [2.1, 0.0]], dtype=F64)
    assert spreads(lone, MIXTURE).isnan().tolist() == [True, False, True]


def test_the_denoiser_of_the_points_own_moments_moves_with_them():
    points, x = begin(50), begin(4, seed=1)
    D = of_moments(points)
    for shift in (0.0, 3.0):
        points += shift
        exact = Mixture.gaussian(points.mean(0), torch.cov(points.T)).denoiser(x, 0.5)
        assert_close(D(x, torch.tensor(0.5)), exact, rtol=0, atol=1e-12)
    assert_close(of_moments(points[:, :1])(x[:, :1], torch.tensor(0.5)).shape, (4, 1))


# --- SDS ---------------------------------------------------------------------------------------------------------------


@functools.cache
def basins():
    """Where the noise-averaged gradient leads each point."""
    return follow(SDS, begin(), SIGMAS, lr=0.5, steps=120)


RATE, HOLD, STEPS = 0.3, 20, 800


@functools.cache
def by_sds():
    """Where SDS leads each, with a fresh draw of noise in each step, at a rate that falls as 1 / k."""
    theta = Points(begin())
    optimizer = torch.optim.SGD(theta.parameters(), lr=RATE)
    return distill(theta, SDS, log_uniform(LOW, HIGH), optimizer, STEPS, on_step=robbins_monro(optimizer, HOLD))


def test_the_averaged_gradient_leads_to_minima_of_the_objective():
    """Stationary to rounding, whether the quadrature is that of the way or finer; and no neighbour is lower."""
    ends = basins()
    assert float(expected(SDS, ends, SIGMAS, 4).norm(dim=1).max()) < 1e-9
    assert float(expected(SDS, ends, SIGMAS, 24).norm(dim=1).max()) < 1e-3
    tops = torch.stack([ends[mode_of(ends, MIXTURE) == k].mean(0) for k in range(3)])
    assert float((tops - MIXTURE.means).norm(dim=1).max()) < 0.02
    for step in 0.1 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=F64):
        assert bool((objective(MIXTURE, tops + step, SIGMAS) > objective(MIXTURE, tops, SIGMAS)).all())


def test_each_point_of_sds_comes_to_rest_and_a_mode_collapses():
    """In each basin the points scatter as Robbins and Monro's do, with variance c^2 C / ((2 c H - 1)(steps + hold)).

    H and C are the slope of the expected gradient and the variance of one draw, by quadrature, c = rate * hold. So the
    spread, of n points, is known within 1 / sqrt(4 n), and the averaged gradient at a point is at most SE standard errors.
    """
    ends, h, c = by_sds(), 1e-4, RATE * HOLD
    which, measured = mode_of(basins(), MIXTURE), spreads(ends, MIXTURE)
    square = lambda x0, sigma, noise: (g := SDS(x0, sigma, noise))[:, :, None].mul(g[:, None]).flatten(1)
    for k in range(3):
        top = basins()[which == k].mean(0, keepdim=True)
        slopes = [
            (expected(SDS, top + h * e, SIGMAS, 24) - expected(SDS, top - h * e, SIGMAS, 24)) / (2 * h) for e in torch.eye(2)
        ]
        H = torch.linalg.eigvalsh(torch.cat(slopes))
        C = torch.linalg.eigvalsh(expected(square, top, SIGMAS, 24).reshape(2, 2))
        deviation = (c**2 * C / ((2 * c * H - 1) * (STEPS + HOLD))).sqrt()
        own = mode_of(ends, MIXTURE) == k
        predicted = float(deviation.square().mean().sqrt()) / 0.3
        assert float(measured[k]) == pytest.approx(predicted, rel=SE / math.sqrt(4 * int(own.sum())))
        assert float(measured[k]) < 0.1  # of the truth
        gradient = expected(SDS, ends[own], SIGMAS, 16)
        assert float(gradient.abs().max()) < SE * float(H.max() * deviation.max()) < 0.03
    assert float(expected(SDS, begin(), SIGMAS, 16).norm(dim=1).median()) > 0.3  # where they began


def test_basins_set_the_shares_of_sds_and_not_the_weights():
    """Points end in the mode to which the averaged gradient leads them; noise carries a few that begin at a ridge over it.

    Sure of its basin is a point whose neighbours, half a unit away, are led to the same mode.
    """
    led, found = mode_of(basins(), MIXTURE), mode_of(by_sds(), MIXTURE)
    around = 0.5 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=F64)
    ends = follow(SDS, torch.cat([begin() + step for step in around]), log_grid(LOW, HIGH, 4), lr=0.5, steps=60, nodes=3)
    sure = (mode_of(ends, MIXTURE).reshape(4, -1) == led).all(0)
    assert float(sure.double().mean()) > 0.75
    assert float((led == found)[sure].double().mean()) > 0.98 and float((led == found).double().mean()) > 0.95
    assert_close(shares(by_sds(), MIXTURE), shares(basins(), MIXTURE), rtol=0, atol=0.03)
    assert float((shares(by_sds(), MIXTURE) - MIXTURE.weights).abs().max()) > 0.1
    # other weights, nearly the same basins: what SDS gives is nearer to the shares of before than to the weights by far
    turned = three_weights((0.1, 0.3, 0.6))
    ends = follow(sds(turned.denoiser, of_score), begin(), SIGMAS, lr=0.5, steps=60)
    found = shares(ends, turned)
    assert float((found - shares(basins(), MIXTURE)).abs().max()) < float((found - turned.weights).abs().max()) / 3


# --- VSD ---------------------------------------------------------------------------------------------------------------


@functools.cache
def by_vsd(levels, seed=0, mixture=MIXTURE):
    """128 points with the exact Denoiser of the points themselves, whose noise levels do as `levels` says."""
    theta = Points(begin(seed=seed))
    optimizer = torch.optim.SGD(theta.parameters(), lr=0.3)
    return distill(theta, vsd(mixture.denoiser, Empirical(theta.theta), of_score), levels, optimizer, 400, seed=seed)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vsd_from_the_mixtures_width_down_has_its_weights_and_spreads(seed):
    """Within 5 points and 15 %: 128 independent exact points would be off by 4 points and, of 13, by 14 % as often as not."""
    width = float((MIXTURE.cov.trace() / 2).sqrt())
    ends = by_vsd(falling(2 * width, 0.2), seed)
    assert float((shares(ends, MIXTURE) - MIXTURE.weights).abs().max()) < 0.05
    assert float((spreads(ends, MIXTURE) - 1).abs().max()) < 0.15


def test_vsd_at_a_fixed_range_keeps_the_basins():
    """Points do not cross between modes at levels below their distance: weights 0.85 and 0.15 are missed by over 25 points.

    Within a mode they spread as they should; annealed, they have the weights too.
    """
    two = Mixture.isotropic(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.3, torch.tensor([0.85, 0.15]))
    ends = by_vsd(log_uniform(0.1, 0.5), 0, two)
    assert 0.25 < float(two.weights[0] - shares(ends, two)[0]) < 0.35
    assert float((spreads(ends, two) - 1).abs().max()) < 0.15
    assert_close(shares(by_vsd(falling(3.0, 0.2), 0, two), two), two.weights, rtol=0, atol=0.05)
    assert float((shares(by_vsd(log_uniform(0.1, 1.0)), MIXTURE) - MIXTURE.weights).abs().max()) > 0.1


# --- a second score that learns ----------------------------------------------------------------------------------------


def test_on_one_frozen_particle_vsd_turns_into_sds_as_its_lora_learns():
    """The teacher is a network trained on the mixture; its LoRA learns the particle, whose exact Denoiser is the point itself."""
    torch.manual_seed(0)

    def draw(g):
        return MIXTURE.sample(256, g).float(), log_uniform(0.1, 5.0)(0.0, 256, g).float(), torch.randn(256, 2, generator=g)

    loss = lambda net, x0, sigma, eps: denoising_loss(from_edm(net, 1.5), x0, sigma, eps)
    net = fit(MLP(2, 64, 2), draw, loss, steps=500, lr=3e-3, half=False, device="cpu", progress=False).net
    D, levels = from_edm(net.eval(), 1.5), log_uniform(0.1, 3.0)
    second = SecondScore(D, levels, rank=2, targets=("first", "1", "last"), lr=1e-2)
    particle, sigma = torch.tensor([[-1.0, 1.0]]), levels(0.0, 256, generator(5))
    with torch.no_grad():
        assert float(vsd(D, second)(particle, sigma[:1], noise_of(0)).abs().max()) == 0  # the LoRA begins as the teacher
    cosines = []
    for step in range(300):
        second.learn(particle.expand(64, 2), 0.0, generator(7, step))
        if step + 1 in (1, 10, 60, 300):
            cosines.append(agreement(vsd(D, second), sds(D), particle.expand(256, 2), sigma))
    assert cosines == sorted(cosines) and cosines[0] < 0.8 and cosines[-1] > 0.98
