"""The variational bound on a Gaussian, to the last digit; and metrics on sets whose answer is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

from course_lib import metrics
from course_lib.gaussians import Mixture
from course_lib.likelihood import bound_gap, variational_bound
from course_lib.schedules import Discrete, equal_information, exponential, karras, linear_betas
from course_lib.worlds.toys import three_blobs

SE = 4.5  # standard errors
F64 = torch.float64
LN2 = math.log(2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --- the variational bound ----------------------------------------------------------------------------------------


def gaussian() -> Mixture:
    return Mixture.gaussian(torch.tensor([0.2, -0.1]), torch.tensor([[1.0, 0.3], [0.3, 0.8]]))


def grid_of(T: int) -> torch.Tensor:
    """T levels from 80 to 0.1 on which a unit Gaussian's gap per step is the same everywhere."""
    return equal_information(T, 0.1)


def averaged_bound(data: Mixture, sigmas: torch.Tensor) -> dict[str, float]:
    """The bound averaged over x0 and noise, exactly: it is quadratic in both, so +-sqrt(d) along each axis integrates it."""
    d = data.dim
    nodes = math.sqrt(d) * torch.cat([torch.eye(d, dtype=F64), -torch.eye(d, dtype=F64)])
    x0 = (data.mean + nodes @ torch.linalg.cholesky(data.cov).T).repeat_interleave(2 * d, 0)
    eps = nodes.repeat(2 * d, 1)
    bound = variational_bound(data.denoiser, x0, sigmas, lambda x: eps)
    return {name: float(getattr(bound, name).mean()) for name in ("prior", "diffusion", "reconstruction", "total")}


def entropy(data: Mixture) -> float:
    """E[-log2 p(x0)] / d."""
    return float(MultivariateNormal(data.mean, data.cov).entropy()) / data.dim / LN2


GRIDS = {
    "even in log(1 + 1 / sigma^2)": grid_of,
    "even in log sigma": lambda T: exponential(T - 1, 0.1, 80.0, to_zero=False),
    "Karras": lambda T: karras(T - 1, 0.1, 80.0, to_zero=False),
    "DDPM's table": lambda T: Discrete(linear_betas(T)).sigma(torch.arange(T, dtype=F64).flip(0)),
}


@pytest.mark.parametrize("sigmas", [grid_of(20), karras(30)[:-1], torch.tensor([5.0, 1.0], dtype=F64)])
def test_the_bound_exceeds_the_entropy_by_its_divergences(sigmas):
    data = gaussian()
    gap = averaged_bound(data, sigmas)["total"] - entropy(data)
    assert gap > 0
    assert gap == pytest.approx(bound_gap(data, sigmas), rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("name", GRIDS)
def test_the_gap_at_a_thousand_steps_depends_on_the_grid(name):
    """0.0073, 0.017, 0.024 and 0.67 bits a dimension, down to sigma = 0.1 and, in DDPM's table, 0.01.

    The table's last steps are its coarse ones: sigma falls from 0.1 to 0.01 in 27 of the thousand.
    """
    data, sigmas = gaussian(), GRIDS[name](1000)
    gap = averaged_bound(data, sigmas)["total"] - entropy(data)
    assert gap == pytest.approx(bound_gap(data, sigmas), rel=1e-6)
    assert (0 < gap < 0.01) == (name == "even in log(1 + 1 / sigma^2)")
    if name == "DDPM's table":
        low = sigmas < 0.1
        assert int(low.sum()) == 27 and bound_gap(data, sigmas[~low]) < gap / 10


def test_the_gap_falls_as_one_over_T():
    """Apart from the ends, which T does not change, a step adds r^2/4 - r^3/6 + O(r^4) nats, with r = O(1/T).

    Between T and 2T levels, which are T - 1 and 2T - 1 steps, the ratio is 2 to the first order; the next adds 1/(T - 1)
    and takes off 2 r / 3, r the largest of the coarser grid.
    """
    data = gaussian()
    v = float(torch.linalg.eigvalsh(data.cov)[-1])
    ends = bound_gap(data, torch.tensor([80.0, 0.1], dtype=F64)) - _step(data, 80.0, 0.1)
    gap = {T: averaged_bound(data, grid_of(T))["total"] - entropy(data) - ends for T in (250, 500, 1000)}
    for T in (250, 500):
        s = grid_of(T)
        r = float((v * s[:-1] ** 2 / (v + s[:-1] ** 2) * (s[1:] ** -2 - s[:-1] ** -2)).max())
        assert abs(gap[T] / gap[2 * T] - 2) < 2 * r / 3 + 1 / (T - 1)


def _step(data: Mixture, sigma: float, sigma_next: float) -> float:
    """What one step adds to the gap."""
    v = torch.linalg.eigvalsh(data.cov)
    r = v * sigma**2 / (v + sigma**2) * (sigma_next**-2 - sigma**-2)
    return float((r - r.log1p()).sum()) / 2 / data.dim / LN2


def test_bound_gap_errors():
    with pytest.raises(ValueError, match="sigmas ends at 0; expected a falling grid whose last level is above 0"):
        bound_gap(gaussian(), torch.tensor([80.0, 0.0]))
    with pytest.raises(ValueError, match="gaussian has 3 components; expected one"):
        bound_gap(three_blobs(), grid_of(20))


def test_each_part_of_the_bound_is_its_definition():
    data, x0, eps = gaussian(), normal(4, 2), normal(4, 2, seed=1)
    sigmas = torch.tensor([6.0, 2.0, 0.5], dtype=F64)
    bound = variational_bound(data.denoiser, x0, sigmas, lambda x: eps)
    to_bits = 1 / (2 * LN2)
    prior = kl_divergence(Normal(x0, sigmas[0]), Normal(torch.zeros_like(x0), (1 + sigmas[0] ** 2).sqrt()))
    assert_close(bound.prior, prior.sum(1) * to_bits)
    terms = torch.zeros(4, dtype=F64)
    for s, s_next in pairwise(sigmas):  # KL( q(x' | x, x0) || p(x' | x) ), both of DDPM's small variance
        x, deviation = x0 + s * eps, (s_next**2 * (s**2 - s_next**2)).sqrt() / s
        true, model = (x_0 + (s_next / s) ** 2 * (x - x_0) for x_0 in (x0, data.denoiser(x, s)))
        terms += kl_divergence(Normal(true, deviation), Normal(model, deviation)).sum(1)
    assert_close(bound.diffusion, terms * to_bits)
    low = sigmas[-1]
    decoded = Normal(data.denoiser(x0 + low * eps, low), low)
    assert_close(bound.reconstruction, -decoded.log_prob(x0).sum(1) * to_bits)
    assert_close(bound.total, bound.prior + bound.diffusion + bound.reconstruction)


def test_a_random_bound_is_unbiased():
    """Real noise, 4,000 data: the mean within its standard error of the exact one."""
    data, sigmas, n = gaussian(), grid_of(50), 4000
    g = torch.Generator().manual_seed(2)
    found = variational_bound(
        data.denoiser, data.sample(n, g), sigmas, lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype)
    ).total
    assert abs(float(found.mean()) - averaged_bound(data, sigmas)["total"]) < SE * float(found.std()) / math.sqrt(n)


def test_the_bound_of_pictures_in_single_precision():
    data = Mixture.gaussian(torch.zeros(4), torch.eye(4))
    x0, eps = normal(3, 4), normal(3, 4, seed=1)
    flat = variational_bound(data.denoiser, x0, grid_of(20), lambda x: eps).total
    picture = variational_bound(
        data.denoiser, x0.float().reshape(3, 1, 2, 2), grid_of(20), lambda x: eps.float().reshape(x.shape)
    ).total
    assert_close(picture.double(), flat, rtol=1e-4, atol=1e-4)  # x0 - D(x) is a difference of numbers up to 80


@pytest.mark.parametrize("sigmas", [[80.0, 1.0, 0.0], [0.1, 1.0, 80.0]])
def test_the_bound_needs_a_falling_grid_above_zero(sigmas):
    with pytest.raises(ValueError, match="sigmas ends at .*; expected a falling grid whose last level is above 0"):
        variational_bound(gaussian().denoiser, normal(2, 2), torch.tensor(sigmas), torch.zeros_like)


# --- Frechet distance ----------------------------------------------------------------------------------------------


def with_moments(n: int, mean: torch.Tensor, cov: torch.Tensor, seed: int) -> torch.Tensor:
    """n points whose sample mean and sample covariance are exactly these."""
    z = normal(n, len(mean), seed=seed)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(z.T).reshape(len(mean), -1)), z.T, upper=False).T
    return mean + z @ torch.linalg.cholesky(cov).T


def test_frechet_distance_of_gaussians():
    d, root_a, root_b = 5, normal(5, 5, seed=1), normal(5, 5, seed=2)
    C_a, C_b = root_a @ root_a.T + 0.1 * torch.eye(d), root_b @ root_b.T + 0.1 * torch.eye(d)
    m_a, m_b = normal(d, seed=3), normal(d, seed=4)
    a, b = with_moments(40, m_a, C_a, 5), with_moments(70, m_b, C_b, 6)
    root = torch.as_tensor(scipy.linalg.sqrtm((C_a @ C_b).numpy()).real)
    expected = float((m_a - m_b).square().sum() + (C_a + C_b - 2 * root).trace())
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(a, a + m_b) == pytest.approx(float(m_b.square().sum()), rel=1e-9)


def test_frechet_distance_along_axes():
    """Covariances that commute: sum of (sqrt(v) - sqrt(w))^2; one of them may be flat."""
    v, w = torch.tensor([4.0, 1.0, 0.25], dtype=F64), torch.tensor([1.0, 9.0, 1e-12], dtype=F64)
    zero = torch.zeros(3, dtype=F64)
    a, b = with_moments(50, zero, v.diag(), 1), with_moments(50, zero, w.diag(), 2)
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + 4 + 0.25, abs=2e-6)
    one = with_moments(10, zero[:1] + 3, torch.tensor([[4.0]], dtype=F64), 3)
    assert metrics.frechet_distance(one, -one / 2) == pytest.approx(4.5**2 + 1, rel=1e-9)


@pytest.mark.parametrize("shape", [(4, 3), (10,)])
def test_frechet_distance_refuses_few_rows(shape):
    with pytest.raises(ValueError, match=r"b has shape .*; expected \(N, d\) with N >= d \+ 2"):
        metrics.frechet_distance(normal(20, 3), normal(*shape))


# --- sliced Wasserstein ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3, 10])
def test_sliced_wasserstein_of_a_shift(d):
    """Mean |<u, shift>| over directions: |shift| Gamma(d/2) / (sqrt(pi) Gamma((d + 1)/2)), and E <u, shift>^2 = |shift|^2 / d."""
    a, shift, slices = normal(50, d), normal(d, seed=1), 2000
    size = float(shift.norm())
    expected = size * math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    error = SE * math.sqrt(max(0.0, size**2 / d - expected**2) / slices) + 1e-9
    assert abs(metrics.sliced_wasserstein(a, a + shift, slices) - expected) < error
    assert metrics.sliced_wasserstein(a, a[torch.randperm(50)], slices) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_is_a_distance():
    a, b, c = normal(60, 3), normal(60, 3, seed=1) * 2, normal(60, 3, seed=2) + 1
    ab, bc, ac = (metrics.sliced_wasserstein(p, q) for p, q in ((a, b), (b, c), (a, c)))
    assert metrics.sliced_wasserstein(b, a) == pytest.approx(ab) and ac <= ab + bc
    assert metrics.sliced_wasserstein(3 * a, 3 * b) == pytest.approx(3 * ab)


@pytest.mark.parametrize(("n", "m"), [(100, 100), (100, 37), (7, 200), (1, 2), (50, 100)])
def test_sliced_wasserstein_on_a_line_is_scipys(n, m):
    a, b = normal(n, 1), 1.5 * normal(m, 1, seed=1) + 0.3
    expected = scipy.stats.wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert metrics.sliced_wasserstein(a, b) == pytest.approx(expected, rel=1e-9)


def test_sliced_wasserstein_floor():
    """Two sets of n standard normals: int E|F_n - G_n| dx, E|X - Y| = 2 sum_k P(X <= k) P(X > k) for binomial X, Y.

    A projection of a round Gaussian is standard normal in every direction, so the same holds in the plane.
    """
    n, rounds = 200, 64
    x = np.linspace(-6, 6, 1201)
    below = scipy.stats.binom.cdf(np.arange(n)[:, None], n, scipy.stats.norm.cdf(x)[None])
    exact = float(np.trapezoid(2 * (below * (1 - below)).sum(0) / n, x))
    for d in (1, 2):
        draw = lambda m, g, d=d: torch.randn(m, d, generator=g, dtype=F64)
        mean, spread = metrics.sliced_wasserstein_floor(draw, n, rounds=rounds)
        assert abs(mean - exact) < SE * spread / math.sqrt(rounds)


def test_sliced_wasserstein_errors():
    with pytest.raises(ValueError, match=r"a has shape \(5, 2\) and b \(5, 3\); expected"):
        metrics.sliced_wasserstein(normal(5, 2), normal(5, 3))


# --- precision, recall and the rest ---------------------------------------------------------------------------------------


def test_precision_and_recall_by_hand():
    """k = 1. Real 0 ... 9, radii 1. Fake 0.5, 1.5 (radii 1), 100 (98.5), 200 (100): two of four lie on the real manifold.

    The ball of 100 reaches down to 1.5 and covers what the first two leave out.
    """
    real, fake = torch.arange(10.0)[:, None], torch.tensor([[0.5], [1.5], [100.0], [200.0]])
    assert metrics.precision_recall(real, fake, k=1) == (0.5, 1.0)
    assert metrics.precision_recall(fake, real, k=1) == (1.0, 0.5)
    assert metrics.precision_recall(real, fake[:2], k=1) == (1.0, 0.3)  # 0, 1 and 2 of ten


def test_precision_and_recall_at_the_extremes():
    real = three_blobs().sample(200, torch.Generator().manual_seed(0))
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    assert metrics.precision_recall(real, real + 100) == (0.0, 0.0)
    modes = torch.cat([real[:120], real[120:] + 100])  # 60 % and 40 % of the points, far apart
    assert metrics.precision_recall(modes, modes[:120]) == (1.0, 0.6)  # one mode alone: precise, and blind to the other
    assert metrics.precision_recall(modes[:120], modes) == (0.6, 1.0)
    with pytest.raises(ValueError, match="fake has 3 points; expected more than k = 3"):
        metrics.precision_recall(real, real[:3])


def test_nearest_distance():
    found = metrics.nearest_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    assert_close(found, torch.tensor([1.0, 4.0], dtype=F64))


def test_pca_features_are_the_principal_components():
    reference = normal(200, 6) @ normal(6, 6, seed=1) + 3
    found = metrics.pca_features(reference, 4)(reference)
    cov = torch.cov(found.T)
    assert_close(found.mean(0), torch.zeros(4, dtype=F64), rtol=0, atol=1e-10)
    assert_close(cov, torch.linalg.eigvalsh(torch.cov(reference.T)).flip(0)[:4].diag(), rtol=1e-9, atol=1e-9)


def test_bootstrap_of_a_mean():
    """Its 95 % interval is mean +- 1.96 s / sqrt(n); each end's own error is 0.06 standard errors with 2,000 rounds."""
    n, rows = 400, normal(400, 1)
    low, high = metrics.bootstrap(lambda r: float(r.mean()), rows, rounds=2000)
    error = float(rows.std()) / math.sqrt(n)
    for end, sign in ((low, -1), (high, 1)):
        assert abs(end - float(rows.mean()) - sign * 1.96 * error) < SE * 0.06 * error


def test_the_peak_of_memory_is_of_what_lives_at_one_time():
    """Three tensors of 4 MB, of which two at a time."""

    def run():
        x = torch.ones(1_000_000)
        y = x + 1
        del x
        return y * 2

    assert metrics.peak_bytes(run) == pytest.approx(8e6, rel=0.01)


def test_psnr_and_ssim():
    """20 log10(range / error) of a constant error; (2 a b + c) / (a^2 + b^2 + c), c = (0.01 * 2)^2, of grey pictures."""
    picture = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert metrics.psnr(picture + 0.02, picture) == pytest.approx(40, rel=1e-4)
    assert metrics.psnr(picture + 0.1, picture, data_range=1.0) == pytest.approx(20, rel=1e-4)
    both = torch.stack([picture + 0.02, picture + 0.2])
    assert metrics.mean_psnr(both, torch.stack([picture, picture])) == pytest.approx(30, rel=1e-4)  # of 40 and 20
    assert metrics.ssim(picture, picture) == pytest.approx(1)
    a, b = torch.full((1, 16, 16), 0.5), torch.full((1, 16, 16), -0.2)
    assert metrics.ssim(a, b) == pytest.approx((2 * 0.5 * -0.2 + 4e-4) / (0.25 + 0.04 + 4e-4), rel=1e-4)
