"""The exact oracle against independent answers: torch.distributions, quadrature, textbook conditioning, autograd."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.testing import assert_close

from course_lib.gaussians import Empirical, Mixture
from course_lib.worlds.toys import three_blobs, two_peaks

SE = 4.5  # standard errors
F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def draw_mixture(seed: int, K: int, d: int) -> Mixture:
    """Random weights, means of size 2, covariances whose eigenvalues are at least 0.05."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(K, d, d, generator=g, dtype=F64) / math.sqrt(d)
    covs = root @ root.mT + 0.05 * torch.eye(d, dtype=F64)
    return Mixture(0.1 + torch.rand(K, generator=g), 2 * torch.randn(K, d, generator=g, dtype=F64), covs)


mixtures = st.builds(draw_mixture, st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
levels = st.floats(-2.0, 4.0).map(math.exp)  # sigma from 0.14 to 55


def as_distribution(mixture: Mixture, sigma: float) -> MixtureSameFamily:
    covs = mixture.covs + sigma**2 * torch.eye(mixture.dim, dtype=F64)
    return MixtureSameFamily(Categorical(mixture.weights), MultivariateNormal(mixture.means, covs))


def noised_points(mixture: Mixture, sigma: float, n: int = 5) -> torch.Tensor:
    return mixture.sample(n, torch.Generator().manual_seed(7), sigma)


# --- density, score, denoiser ----------------------------------------------------------------------------------


@given(mixtures, levels)
def test_log_prob_is_that_of_torch(mixture, sigma):
    x = noised_points(mixture, sigma)
    assert_close(mixture.log_prob(x, sigma), as_distribution(mixture, sigma).log_prob(x), rtol=1e-9, atol=1e-9)
    assert_close(mixture.log_prob(x), as_distribution(mixture, 0.0).log_prob(x), rtol=1e-8, atol=1e-8)


@given(mixtures, levels)
def test_score_is_the_gradient_of_the_log_density(mixture, sigma):
    x = noised_points(mixture, sigma).requires_grad_()
    for log_prob in (as_distribution(mixture, sigma).log_prob(x), mixture.log_prob(x, sigma)):
        (gradient,) = torch.autograd.grad(log_prob.sum(), x)
        assert_close(mixture.score(x.detach(), sigma), gradient, rtol=1e-7, atol=1e-8)


@given(mixtures, levels)
def test_denoiser_is_tweedie(mixture, sigma):
    """E[x0 | x] = x + sigma^2 grad log p_sigma(x), the score taken from torch.distributions."""
    x = noised_points(mixture, sigma).requires_grad_()
    (score,) = torch.autograd.grad(as_distribution(mixture, sigma).log_prob(x).sum(), x)
    x = x.detach()
    # x and sigma^2 score cancel: rounding is relative to their size, not to that of the result
    assert_close(mixture.denoiser(x, sigma), x + sigma**2 * score, rtol=0, atol=1e-10 * (1 + sigma**2))
    assert_close(mixture.denoiser(x, sigma), x + sigma**2 * mixture.score(x, sigma), rtol=0, atol=1e-10 * (1 + sigma))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0])
def test_denoiser_is_the_integral(sigma):
    """int x0 p(x0) N(x; x0, sigma^2) dx0 / int p(x0) N(x; x0, sigma^2) dx0, by the trapezium rule in one dimension."""
    mixture = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.5]]), torch.tensor([[[0.2]], [[0.05]]], dtype=F64))
    x0 = torch.linspace(-8, 8, 20_001, dtype=F64)  # the rule is exact to rounding for smooth densities on a fine grid
    prior = as_distribution(mixture, 0.0).log_prob(x0[:, None]).exp()
    x = torch.linspace(-3, 3, 13, dtype=F64)
    joint = prior * (-((x[:, None] - x0) ** 2) / (2 * sigma**2)).exp()
    assert_close(mixture.denoiser(x[:, None], sigma)[:, 0], (joint * x0).sum(1) / joint.sum(1), rtol=0, atol=1e-10)


@given(mixtures, levels)
def test_responsibilities_are_bayes_rule(mixture, sigma):
    x = noised_points(mixture, sigma)
    log_parts = as_distribution(mixture, sigma).component_distribution.log_prob(x[:, None]) + mixture.weights.log()
    assert_close(mixture.responsibilities(x, sigma), torch.softmax(log_parts, 1), rtol=0, atol=1e-9)


@given(mixtures)
def test_no_noise_changes_nothing(mixture):
    x = noised_points(mixture, 0.5)
    assert_close(mixture.denoiser(x, 0.0), x, rtol=0, atol=1e-12)


@given(mixtures)
def test_much_noise_leaves_the_mean(mixture):
    """D(0, sigma) -> E[x0] as sigma -> infinity; the next term is of the order |m|^3 / sigma^2."""
    x = torch.zeros(1, mixture.dim, dtype=F64)
    bound = 10 * (mixture.means.norm(dim=1).max() + mixture.covs.abs().max() + 1) ** 3 / 1e8
    assert float((mixture.denoiser(x, 1e4) - mixture.mean).abs().max()) < float(bound)


# --- moments, samples ---------------------------------------------------------------------------------------------


@given(mixtures)
def test_mean_and_covariance(mixture):
    reference = as_distribution(mixture, 0.0)
    assert_close(mixture.mean, reference.mean)
    assert_close(mixture.cov.diagonal(), reference.variance)
    # law of total covariance, written with centred means
    centred = mixture.means - mixture.mean
    between = sum(w * torch.outer(c, c) for w, c in zip(mixture.weights, centred, strict=True))
    within = sum(w * C for w, C in zip(mixture.weights, mixture.covs, strict=True))
    assert_close(mixture.cov, within + between, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_samples_have_the_moments(sigma):
    mixture, n = three_blobs(), 40_000
    x = mixture.sample(n, torch.Generator().manual_seed(0), sigma)
    cov = mixture.cov + sigma**2 * torch.eye(2, dtype=F64)
    assert x.shape == (n, 2) and x.dtype == F64
    assert bool(((x.mean(0) - mixture.mean).abs() < SE * (cov.diagonal() / n).sqrt()).all())
    products = (x - mixture.mean)[:, :, None] * (x - mixture.mean)[:, None, :]  # their mean is the covariance
    assert bool(((products.mean(0) - cov).abs() < SE * products.std(0) / n**0.5).all())
    counts = mixture.responsibilities(x, sigma).mean(0)  # E p(k | x) = w_k, each term within [0, 1]
    assert bool(((counts - mixture.weights).abs() < SE * 0.5 / n**0.5).all())


# --- shapes and types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["denoiser", "score", "log_prob", "responsibilities"])
def test_a_level_per_sample_is_a_call_per_sample(method):
    mixture = three_blobs()
    call, x, sigma = getattr(mixture, method), normal(4, 2), torch.tensor([0.1, 0.5, 2.0, 30.0], dtype=F64)
    rows = torch.cat([call(x[i : i + 1], sigma[i]) for i in range(4)])
    assert_close(call(x, sigma), rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["denoiser", "score", "log_prob", "responsibilities"])
def test_pictures_and_single_precision(method):
    mixture = draw_mixture(1, 3, 4)
    call, x = getattr(mixture, method), normal(5, 4)
    picture = call(x.reshape(5, 1, 2, 2), 0.5)
    assert_close(picture.reshape(5, -1), call(x, 0.5).reshape(5, -1))
    assert call(x.float(), 0.5).dtype == torch.float32
    assert_close(call(x.float(), torch.tensor(0.5)).double(), call(x.float().double(), 0.5), rtol=1e-6, atol=1e-6)


# --- the exact flow -------------------------------------------------------------------------------------------------


def flow_by_matrix_roots(gaussian: Mixture, x: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """m + (C + s'^2)^{1/2} (C + s^2)^{-1/2} (x - m), each root from an eigendecomposition of its own."""

    def power(level: float, exponent: float) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(gaussian.covs[0] + level**2 * torch.eye(gaussian.dim, dtype=F64))
        return vectors * values**exponent @ vectors.T

    return gaussian.means[0] + (x - gaussian.means[0]) @ power(sigma, -0.5) @ power(sigma_next, 0.5)


@given(st.integers(0, 1000), st.integers(1, 4), levels, levels)
def test_flow_of_a_gaussian(seed, d, sigma, sigma_next):
    gaussian = draw_mixture(seed, 1, d)
    x = noised_points(gaussian, sigma)
    for end in (sigma_next, 0.0):
        assert_close(gaussian.flow(x, sigma, end), flow_by_matrix_roots(gaussian, x, sigma, end), rtol=1e-9, atol=1e-9)


def test_flow_of_a_level_per_sample():
    gaussian = draw_mixture(4, 1, 2)
    x, sigma = noised_points(gaussian, 5.0, 3), torch.tensor([1.0, 5.0, 9.0], dtype=F64)
    rows = torch.cat([gaussian.flow(x[i : i + 1], sigma[i], 0.5) for i in range(3)])
    assert_close(gaussian.flow(x, sigma, 0.5), rows)
    assert_close(gaussian.flow(x, sigma, torch.full((3,), 0.5)), rows)


def test_flow_solves_the_ode_and_equals_the_reference():
    gaussian = draw_mixture(3, 1, 3)
    x = noised_points(gaussian, 20.0)
    for sigma_next in (5.0, 0.3, 0.01, 60.0):
        # the solver's tolerance of 1e-10 a step, over some hundred steps, relative to |x| of about 60
        assert_close(gaussian.flow(x, 20.0, sigma_next), gaussian.reference_flow(x, 20.0, sigma_next), rtol=0, atol=1e-6)
    h = 1e-5  # central difference: error h^2 |x'''| / 6 + 1e-15 |x| / h
    slope = (gaussian.flow(x, 2.0, 2.0 + h) - gaussian.flow(x, 2.0, 2.0 - h)) / (2 * h)
    assert_close(slope, -2.0 * gaussian.score(x, 2.0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("sigma_next", [0.05, 0.4, 20.0])
def test_reference_flow_keeps_the_distribution_function(sigma_next):
    """In one dimension the flow is monotone and carries p_sigma to p_sigma', so F_sigma'(x') = F_sigma(x)."""
    mixture, sigma = two_peaks(weight=0.3), 4.0
    x = torch.linspace(-8, 8, 17, dtype=F64)[:, None]

    def cdf(points: torch.Tensor, level: float) -> torch.Tensor:
        z = (points - mixture.means.T) / (mixture.covs[:, 0, 0] + level**2).sqrt()
        return (mixture.weights * torch.special.ndtr(z)).sum(1)

    end = mixture.reference_flow(x, sigma, sigma_next)
    assert_close(cdf(end, sigma_next), cdf(x, sigma), rtol=0, atol=1e-7)


@pytest.mark.parametrize("level", [0.0, -1.0, math.inf, math.nan])
def test_reference_flow_needs_finite_levels(level):
    mixture = three_blobs()
    with pytest.raises(ValueError, match=f"sigma = {level:g}; expected a finite sigma > 0"):
        mixture.reference_flow(torch.zeros(1, 2), level, 1.0)
    with pytest.raises(ValueError, match=f"sigma_next = {level:g}; expected a finite sigma > 0"):
        mixture.reference_flow(torch.zeros(1, 2), 1.0, level)


def test_reference_flow_runs_back():
    mixture = three_blobs()
    x = mixture.sample(8, torch.Generator().manual_seed(1), 3.0)
    back = mixture.reference_flow(mixture.reference_flow(x, 3.0, 0.5), 0.5, 3.0)
    assert_close(back, x, rtol=0, atol=1e-6)


# --- posteriors -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 2.0))
def test_posterior_is_the_information_form(seed, K, d, e, noise_std):
    """C' = (C^-1 + A^T A / s^2)^-1, m' = C' (C^-1 m + A^T y / s^2), w' ~ w N(y; A m, A C A^T + s^2 I)."""
    mixture = draw_mixture(seed, K, d)
    A, y = normal(e, d, seed=seed), normal(e, seed=seed + 1)
    posterior = mixture.posterior(A, y, noise_std)
    precision = mixture.covs.inverse()
    covs = (precision + A.T @ A / noise_std**2).inverse()
    means = (covs @ (precision @ mixture.means[..., None] + (A.T @ y / noise_std**2)[:, None]))[..., 0]
    evidence = MultivariateNormal(mixture.means @ A.T, A @ mixture.covs @ A.T + noise_std**2 * torch.eye(e, dtype=F64))
    assert_close(posterior.covs, covs, rtol=1e-7, atol=1e-8)
    assert_close(posterior.means, means, rtol=1e-7, atol=1e-7)
    assert_close(posterior.weights, torch.softmax(mixture.weights.log() + evidence.log_prob(y), 0), rtol=1e-7, atol=1e-10)


def test_posterior_by_importance_sampling():
    """Prior samples weighted by N(y; A x0, s^2 I): self-normalised means within their own standard error."""
    mixture, n = three_blobs(), 200_000
    A, y, noise_std = torch.tensor([[1.0, 0.5]], dtype=F64), torch.tensor([0.4], dtype=F64), 0.4
    x0 = mixture.sample(n, torch.Generator().manual_seed(5))
    w = torch.softmax(-((x0 @ A.T - y) ** 2).sum(1) / (2 * noise_std**2), 0)
    posterior = mixture.posterior(A, y, noise_std)
    second = posterior.cov + torch.outer(posterior.mean, posterior.mean)
    for values, exact in ((x0, posterior.mean), ((x0[:, :, None] * x0[:, None, :]).flatten(1), second.flatten())):
        estimate = w @ values
        error = (w**2 @ (values - estimate) ** 2).sqrt()  # the delta method for a ratio of means
        assert bool(((estimate - exact).abs() < SE * error).all())


@given(st.integers(0, 1000), st.integers(1, 3))
def test_an_exact_observation_is_a_gaussian_on_the_plane(seed, K):
    """noise 0: x0 = p + N z with A p = y and A N = 0, and z is Gaussian of precision N^T C^-1 N."""
    mixture = draw_mixture(seed, K, 4)
    A, y = normal(2, 4, seed=seed), normal(2, seed=seed + 1)
    found = mixture.posterior(A, y, 0.0)
    p, N = torch.linalg.pinv(A) @ y, torch.linalg.svd(A).Vh[2:].T
    precision = mixture.covs.inverse()
    inner = (N.T @ precision @ N).inverse()
    means = p + (N @ inner @ N.T @ precision @ (mixture.means - p)[..., None])[..., 0]
    evidence = MultivariateNormal(mixture.means @ A.T, A @ mixture.covs @ A.T).log_prob(y)
    assert_close(found.means, means, rtol=1e-7, atol=1e-7)
    assert_close(found.covs, N @ inner @ N.T, rtol=1e-7, atol=1e-8)
    assert_close(found.weights, torch.softmax(mixture.weights.log() + evidence, 0), rtol=1e-7, atol=1e-9)


@given(st.integers(0, 1000), st.permutations([0, 1, 2, 3]), st.integers(1, 3))
def test_conditional_is_the_schur_complement(seed, order, count):
    mixture = draw_mixture(seed, 3, 4)
    observed, values = list(order[:count]), normal(count, seed=seed)
    kept = [i for i in range(4) if i not in observed]
    found = mixture.conditional(observed, values)
    log_weights = mixture.weights.log()
    for k, (m, C) in enumerate(zip(mixture.means, mixture.covs, strict=True)):
        gain = C[kept][:, observed] @ C[observed][:, observed].inverse()
        assert_close(found.means[k], m[kept] + gain @ (values - m[observed]), rtol=1e-8, atol=1e-8)
        assert_close(found.covs[k], C[kept][:, kept] - gain @ C[observed][:, kept], rtol=1e-8, atol=1e-8)
        log_weights[k] = log_weights[k] + MultivariateNormal(m[observed], C[observed][:, observed]).log_prob(values)
    assert_close(found.weights, torch.softmax(log_weights, 0), rtol=1e-8, atol=1e-10)


def test_conditional_counts_from_the_end_or_refuses():
    """observed = [-1] is the last coordinate; to keep all coordinates would be silently wrong."""
    mixture, value = draw_mixture(2, 2, 3), torch.tensor([0.3], dtype=F64)
    try:
        found = mixture.conditional([-1], value)
    except ValueError as error:
        assert "observed" in str(error)
    else:
        assert_close(found.means, mixture.conditional([2], value).means)


def test_two_observations_are_one_after_the_other():
    mixture, A, y = draw_mixture(9, 3, 3), normal(2, 3, seed=1), normal(2, seed=2)
    at_once = mixture.posterior(A, y, 0.3)
    in_turn = mixture.posterior(A[:1], y[:1], 0.3).posterior(A[1:], y[1:], 0.3)
    for name in ("weights", "means", "covs"):
        assert_close(getattr(at_once, name), getattr(in_turn, name), rtol=1e-9, atol=1e-10)


# --- degenerate covariances and the empirical denoiser ----------------------------------------------------------------


def test_a_flat_gaussian_is_the_limit_of_thin_ones():
    flat = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=F64)  # no variance across the diagonal
    means = torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=F64)
    weights, x = torch.tensor([0.4, 0.6]), normal(20, 2)
    exact, thin = (Mixture(weights, means, (flat + thickness * torch.eye(2)).expand(2, 2, 2)) for thickness in (0.0, 1e-10))
    for sigma in (0.2, 1.0, 10.0):
        # relative change of the variances: 1e-10 / sigma^2, times exponents of at most about 100
        for method in ("denoiser", "score", "log_prob", "responsibilities"):
            assert_close(getattr(exact, method)(x, sigma), getattr(thin, method)(x, sigma), rtol=1e-6, atol=1e-6)
    gaussian = Mixture.gaussian(means[1], flat)
    across = gaussian.denoiser(x, 0.5) @ torch.tensor([1.0, -1.0], dtype=F64)
    assert_close(across, torch.full((20,), 2.0, dtype=F64))  # E[x0 | x] stays on the line through the mean


def test_empirical_is_a_mixture_of_points():
    points, x = normal(40, 3, seed=1), normal(6, 3, seed=2)
    spikes = Mixture.isotropic(points, 0.0)
    for sigma in (torch.tensor(0.3), torch.tensor(4.0), torch.linspace(0.2, 3, 6, dtype=F64)):
        assert_close(Empirical(points)(x, sigma), spikes.denoiser(x, sigma), rtol=1e-9, atol=1e-9)
    pictures = Empirical(points.reshape(40, 3, 1, 1))(x.reshape(6, 3, 1, 1), torch.tensor(0.3))
    assert_close(pictures.flatten(1), Empirical(points)(x, torch.tensor(0.3)))
    nearest = points[torch.cdist(x, points).argmin(1)]
    assert_close(Empirical(points)(x, torch.tensor(1e-3)), nearest, rtol=0, atol=1e-9)


def test_empirical_keeps_its_digits_in_single_precision():
    """Points 0.02 apart and far from 0, where |x|^2 + |y|^2 - 2 x y would lose every digit of the distance.

    Direct differences round by 1e-6 here, that is 1e-4 sigma, which moves the exponents (up to ten) by about 1e-3.
    """
    points = (10 + 0.02 * normal(60, 4, seed=3)).float()
    x = (points + 0.02 * normal(60, 4, seed=4)).float()
    sigma = torch.tensor(0.02)
    exact = Mixture.isotropic(points.double(), 0.0).denoiser(x.double(), sigma.double())
    assert float((Empirical(points)(x, sigma) - exact).abs().max()) < 0.01 * 0.02


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "means", "covs", "message"),
    [
        ([1.0, 1.0], [[0.0, 0.0]], torch.eye(2)[None], r"means has shape \(1, 2\); expected \(2, d\)"),
        ([1.0], [[0.0, 0.0]], torch.eye(3)[None], r"covs has shape \(1, 3, 3\); expected \(1, 2, 2\)"),
        ([0.0, 1.0], [[0.0], [1.0]], torch.ones(2, 1, 1), r"weights = \[0.0, 1.0\]; expected positive"),
        ([1.0], [[0.0, 0.0]], torch.tensor([[[1.0, 0.5], [0.0, 1.0]]]), "covs is not symmetric"),
        ([1.0], [[0.0, 0.0]], torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), "covs has the eigenvalue -1; expected none below 0"),
        ([1.0], [[float("nan"), 0.0]], torch.eye(2)[None], "means.*finite"),
    ],
)
def test_a_bad_mixture_is_named(weights, means, covs, message):
    with pytest.raises(ValueError, match=message):
        Mixture(torch.tensor(weights), torch.tensor(means), covs)


def test_errors_of_methods():
    mixture = three_blobs()
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\); expected 2 entries"):
        mixture.denoiser(torch.zeros(4, 3), 1.0)
    with pytest.raises(ValueError, match="3 components; the flow is closed for one only"):
        mixture.flow(torch.zeros(1, 2), 1.0, 0.5)
    with pytest.raises(ValueError, match=r"A has shape \(1, 3\) and y \(1,\); expected \(e, 2\)"):
        mixture.posterior(torch.ones(1, 3), torch.ones(1), 0.1)


def test_reference_flow_names_a_level_of_zero():
    """log sigma has no end at 0: the message must name the argument, not come from math.log."""
    with pytest.raises(ValueError, match="sigma_next = 0.*expected"):
        three_blobs().reference_flow(torch.zeros(1, 2), 1.0, 0.0)


def test_a_posterior_without_inverse_is_named():
    """The same coordinate observed twice without noise: S is singular."""
    with pytest.raises(ValueError, match="noise_std|A "):
        three_blobs().posterior(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0.1, 0.2]), 0.0)


def test_sigma_of_another_batch_is_named():
    with pytest.raises(ValueError, match="sigma has shape"):
        three_blobs().denoiser(torch.zeros(4, 2), torch.ones(3))
