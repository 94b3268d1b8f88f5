"""Noise priors against exact moments: a world of Gaussians whose mean and variance depend on class and place."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib.devices import SampleNoise
from course_lib.noise_priors import NoisePrior, categorical, coarse, joint, plain, spatial
from tests.draws import noise_of, normal

CLASSES, SHAPE, N = 3, (2, 2, 3), 40_000
SIGMA = 14.6
"""About where the schedule of Stable Diffusion ends, alpha_bar = 0.0047."""
SE = 5.0
"""Standard errors that a moment may be off: of 72 compared, one in 24,000 runs would be by chance."""
MEAN = normal(CLASSES, *SHAPE, seed=1)
VARIANCE = 0.2 + normal(CLASSES, *SHAPE, seed=2) ** 2
SHARES = torch.tensor([0.5, 0.3, 0.2])


def world(n=N, seed=3):
    """Classes drawn place by place, and latents that are Gaussian under them."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(SHARES, n * 6, replacement=True, generator=source).view(n, *SHAPE[1:])
    mean, variance = NoisePrior(MEAN, VARIANCE).moments(labels)
    return mean + variance.sqrt() * normal(n, *SHAPE, seed=seed + 1), labels


X0, LABELS = world()


def close_to(prior, mean, variance, fourth, count):
    """Both moments within SE standard errors: sqrt(v / n) of the mean, sqrt((m4 - v^2) / n) of the variance."""
    assert bool(((prior.mean - mean).abs() < SE * (variance / count).sqrt()).all())
    assert bool(((prior.variance - variance).abs() < SE * ((fourth - variance**2) / count).sqrt()).all())


def mixture(shares, mean, variance):
    """Mean, variance and fourth central moment of a mixture over the first axis."""
    m = (shares * mean).sum(0)
    off = mean - m
    v = (shares * (variance + off**2)).sum(0)
    return m, v, (shares * (3 * variance**2 + 6 * variance * off**2 + off**4)).sum(0)


def test_the_joint_prior_has_the_exact_moments_of_the_noised_world():
    prior = joint(X0, LABELS, CLASSES)
    count = torch.stack([(k == LABELS).sum(0) for k in range(CLASSES)])[:, None]
    close_to(prior, MEAN, VARIANCE, 3 * VARIANCE**2, count)
    everywhere = torch.arange(CLASSES)[:, None, None].expand(-1, *SHAPE[1:])
    mean, variance = prior.moments(everywhere, SIGMA)  # of x: the noise's variance is known, and adds no error
    close_to(NoisePrior(mean, variance - SIGMA**2), MEAN, VARIANCE, 3 * VARIANCE**2, count)


def test_the_categorical_and_spatial_priors_have_the_moments_of_what_they_mix():
    places = torch.full((6, 1), 1 / 6, dtype=torch.float64)
    for k in range(CLASSES):
        of = (part[k].flatten(1).T for part in (MEAN, VARIANCE))  # (places, C)
        m, v, fourth = (part[:, None, None] for part in mixture(places, *of))
        found = categorical(X0, LABELS, CLASSES)
        close_to(NoisePrior(found.mean[k], found.variance[k]), m, v, fourth, int((k == LABELS).sum()))
    close_to(spatial(X0, CLASSES), *mixture(SHARES.double()[:, None, None, None], MEAN, VARIANCE), N)


def test_one_class_and_no_places_give_the_plain_start():
    """Of latents with mean 0 and variance 1, to the last bit where these are exact."""
    x0 = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(50, 1)[:, :, None, None].expand(-1, -1, 2, 3)
    unbiased = 100 / 99
    labels = torch.zeros(100, 2, 3, dtype=torch.long)
    usual = math.hypot(1, SIGMA) * SampleNoise(5)(torch.empty(4, *SHAPE))
    assert_close(plain(SHAPE).start(labels[:4], SIGMA, SampleNoise(5)), usual, rtol=1e-6, atol=0)
    for prior in (spatial(x0, 1), joint(x0, labels, 1)):
        assert_close(prior.mean, torch.zeros(1, *SHAPE))
        assert_close(prior.variance, torch.full((1, *SHAPE), unbiased))
    whole = categorical(x0, labels, 1)
    assert_close(whole.variance, torch.full((1, *SHAPE), 600 / 599))
    assert_close(whole.start(labels[:4], SIGMA, SampleNoise(5)), usual, rtol=1e-4, atol=0)


def test_starts_are_drawn_with_these_moments():
    labels, n = LABELS[:1].expand(20_000, -1, -1), 20_000
    mean, variance = NoisePrior(MEAN, VARIANCE).moments(LABELS[:1], 2.0)
    x = NoisePrior(MEAN, VARIANCE).start(labels, 2.0, noise_of(7))
    assert bool(((x.mean(0) - mean[0]).abs() < SE * (variance[0] / n).sqrt()).all())
    assert bool(((x.var(0) - variance[0]).abs() < SE * variance[0] * math.sqrt(2 / n)).all())


def test_nats_are_the_cross_entropy_of_the_noised_world():
    """By the draw of many x, and least for the moments that the world has."""
    exact, sigma, n = NoisePrior(MEAN, VARIANCE), 2.0, 20_000
    x0, labels = X0[:1], LABELS[:1]
    x = x0 + sigma * normal(n, *SHAPE, seed=9)
    mean, variance = exact.moments(labels, sigma)
    drawn = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(x).flatten(1).sum(1)
    assert abs(float(drawn.mean() - exact.nats(x0, labels, sigma))) < SE * float(drawn.std()) / math.sqrt(n)
    at = X0[:2000], LABELS[:2000], sigma
    best = exact.nats(*at)
    for prior in (plain(SHAPE, CLASSES), spatial(X0, CLASSES), categorical(X0, LABELS, CLASSES)):
        more = prior.nats(*at) - best
        assert float(more.mean()) > SE * float(more.std()) / math.sqrt(len(more))


def test_a_class_that_was_not_met_at_a_place_falls_back():
    labels = LABELS[:100].clone()
    labels[:, 0, 0] = labels[:, 0, 0].clamp_max(1)  # class 2 never lies there
    labels[0, 1, 1], labels[1:, 1, 1] = 2, 0  # and once here
    by_place, by_class = spatial(X0[:100], CLASSES), categorical(X0[:100], labels, CLASSES)
    for otherwise, expected in ((None, by_place), (by_class, by_class)):
        prior = joint(X0[:100], labels, CLASSES, otherwise)
        for place in ((0, 0), (1, 1)):
            at = (2, slice(None), *place)
            assert_close(prior.mean[at], expected.mean[at], rtol=0, atol=0)
            assert_close(prior.variance[at], expected.variance[at], rtol=0, atol=0)
    there = X0[:100][labels[:, 0, 1] == 2][:, :, 0, 1]
    assert_close(prior.mean[2, :, 0, 1], there.mean(0))
    assert_close(prior.variance[2, :, 0, 1], there.var(0))


def test_a_block_has_the_class_of_most_of_its_pixels():
    labels = torch.tensor([[[0, 1, 2, 2], [1, 1, 2, 0], [0, 0, 1, 1], [0, 0, 2, 2]]])
    assert coarse(labels, 2, 3).tolist() == [[[1, 2], [0, 1]]]
    assert_close(coarse(labels, 1, 3), labels)


def test_bad_input_is_an_error_in_one_line():
    prior, labels = plain(SHAPE, CLASSES), LABELS[:4]
    with pytest.raises(ValueError, match=r"labels is torch.int64 of shape \(4, 2, 2\); expected whole numbers \(B, 2, 3\)"):
        prior.start(labels[:, :, :2], SIGMA, noise_of(0))
    with pytest.raises(ValueError, match="labels is torch.float32"):
        prior.start(labels.float(), SIGMA, noise_of(0))
    with pytest.raises(ValueError, match="labels run from 3 to 3; expected classes from 0 to 2"):
        prior.moments(torch.full_like(labels, 3))
    with pytest.raises(ValueError, match=r"expected whole numbers \(5, 2, 3\)"):
        joint(X0[:5], labels, CLASSES)
    with pytest.raises(ValueError, match="least = 1; expected at least 2"):
        joint(X0[:4], labels, CLASSES, least=1)
    with pytest.raises(ValueError, match="x0 has 1 rows; expected at least 2"):
        spatial(X0[:1], CLASSES)
    with pytest.raises(ValueError, match="class 2 covers 0 places of labels; expected at least 2"):
        categorical(X0[:9], LABELS[:9].clamp_max(1), CLASSES)
    with pytest.raises(ValueError, match="factor = 4"):
        coarse(torch.zeros(1, 6, 8, dtype=torch.long), 4, 2)
