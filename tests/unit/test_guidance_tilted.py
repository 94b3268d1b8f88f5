"""What CFG does not sample: the noised tilted density, exactly for Gaussians and by quadrature, and how far its score is."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib.devices import generator
from course_lib.gaussians import Mixture
from course_lib.guidance import Tilted, cfg, tilt_gap, tilted_gaussian
from tests.draws import level, normal

F64 = torch.float64
NARROW = Mixture.gaussian(torch.tensor([0.6]), torch.tensor([[0.2]]))
WIDE = Mixture.gaussian(torch.tensor([-0.2]), torch.tensor([[1.0]]))
NARROW_2 = Mixture.gaussian(torch.tensor([0.6, 0.1]), torch.tensor([[0.2, 0.05], [0.05, 0.3]]))
WIDE_2 = Mixture.gaussian(torch.tensor([-0.2, 0.0]), torch.tensor([[1.0, 0.1], [0.1, 0.8]]))
CLASS = Mixture.isotropic(torch.tensor([[1.0]]), 0.3)
ALL = Mixture.isotropic(torch.tensor([[1.0], [-1.0]]), 0.3)
"""A class, and two classes in equal parts."""


@pytest.mark.parametrize(("cond", "ref"), [(NARROW, WIDE), (NARROW_2, WIDE_2)], ids=["1-D", "2-D"])
@pytest.mark.parametrize("w", [-0.2, 0.0, 1.0, 3.0])
def test_the_tilted_gaussian_has_the_tilted_log_density(cond, ref, w):
    """log p_tilted - w log p_cond - (1 - w) log p_ref is the same number everywhere: the norm."""
    x = normal(50, cond.dim)
    difference = tilted_gaussian(cond, ref, w).log_prob(x) - w * cond.log_prob(x) - (1 - w) * ref.log_prob(x)
    assert_close(difference, difference[:1].expand(50), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("dim", [1, 2])
def test_quadrature_agrees_with_the_closed_form(dim, sigma):
    """Widths of 0.2 and more over cells of 0.005 (1-D) or 0.044 (2-D, where sigma = 0.05 is one cell): errors of the order of
    exp(-2 pi^2 (s / h)^2), with 1 / s^2 = 1 / C + 1 / sigma^2, which is 1e-7 in the coarsest case and nothing in the others."""
    cond, ref = ((NARROW, WIDE), (NARROW_2, WIDE_2))[dim - 1]
    exact, found = tilted_gaussian(cond, ref, 2.0), Tilted(cond, ref, 2.0, -3.5, 3.5)
    x = exact.sample(40, generator(1), sigma)
    tolerance = 1e-5 if dim == 2 and sigma < 0.1 else 1e-9
    assert_close(found.denoiser(x, sigma), exact.denoiser(x, sigma), rtol=0, atol=tolerance)
    assert_close(found.score(x, sigma), exact.score(x, sigma), rtol=0, atol=tolerance / sigma**2)
    assert_close(found.log_prob(x, sigma), exact.log_prob(x, sigma), rtol=0, atol=tolerance)
    each = torch.linspace(sigma, 2 * sigma, 40, dtype=F64)  # a level for each row
    assert_close(found.score(x, each), exact.score(x, each), rtol=0, atol=tolerance / sigma**2)


def test_samples_have_the_tilted_moments():
    exact, n = tilted_gaussian(NARROW, WIDE, 2.0), 20_000
    x = Tilted(NARROW, WIDE, 2.0, -3.5, 3.5).sample(n, generator(0))
    var = float(exact.covs)
    assert abs(float(x.mean() - exact.mean)) < 4.5 * (var / n) ** 0.5
    assert abs(float(x.var()) - var) < 4.5 * var * (2 / n) ** 0.5


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("w", [2.0, 5.0])
def test_the_field_is_not_the_score_of_the_noised_tilted_density(w, sigma):
    """In one dimension both are lines: of slope -(w / (c + s^2) + (1 - w) / (r + s^2)), and -1 / (t + s^2) with
    1 / t = w / c + (1 - w) / r. By the convexity of u -> 1 / (1 / u + s^2) they differ at every w but 0 and 1.
    """
    c, r, v = 0.2, 1.0, sigma**2
    tilted = tilted_gaussian(NARROW, WIDE, w)
    x = tilted.sample(200, generator(2), sigma)
    field = (cfg(NARROW.denoiser, WIDE.denoiser, w)(x, level(sigma)) - x) / v
    slope = -(w / (c + v) + (1 - w) / (r + v))
    offset = w * 0.6 / (c + v) + (1 - w) * -0.2 / (r + v)
    assert_close(field, slope * x + offset, rtol=0, atol=1e-6)  # the fp32 means and covariances above
    gap = (field - tilted.score(x, sigma)).square().mean().sqrt()
    t = 1 / (w / c + (1 - w) / r)
    assert abs(slope + 1 / (t + v)) > 1e-3
    found = tilt_gap(NARROW, WIDE, tilted, w, sigma, n=200_000, seed=4)
    # over x ~ N(m, t + v) the gap is a line a (x - m) + b: its mean square is a^2 (t + v) + b^2
    a, m = slope + 1 / (t + v), float(tilted.mean)
    expected = math.sqrt(a**2 * (t + v) + (slope * m + offset) ** 2)
    assert abs(found["score_rms"] / expected - 1) < 0.02  # 200,000 points: the mean square is known to 0.5 %
    assert abs(found["denoiser_rms"] / (v * expected) - 1) < 0.02
    assert abs(found["relative"] / (expected * math.sqrt(t + v)) - 1) < 0.02  # E s^2 = 1 / (t + v)
    assert 0.5 < float(gap) / expected < 2


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_there_is_no_gap_at_the_ends(w):
    assert tilt_gap(NARROW, WIDE, tilted_gaussian(NARROW, WIDE, w), w, 0.7)["relative"] < 1e-12


def test_there_is_no_gap_between_gaussians_of_one_covariance():
    """Both are then lines of slope -1 / (c + sigma^2) through w m_c + (1 - w) m_r: the case in which the folklore holds."""
    other = Mixture.gaussian(torch.tensor([-1.0]), NARROW.covs[0])
    assert tilt_gap(NARROW, other, tilted_gaussian(NARROW, other, 4.0), 4.0, 0.7)["relative"] < 1e-12


def test_the_gap_of_a_class_among_two():
    """p(c)^w p^(1 - w) of a class is that class, more or less: its tilted density stays put, CFG's field pushes outwards."""
    w = 4.0
    tilted = Tilted(CLASS, ALL, w, -3.0, 4.0)
    gaps = {sigma: tilt_gap(CLASS, ALL, tilted, w, sigma)["relative"] for sigma in (0.05, 1.0, 10.0)}
    assert gaps[0.05] < 0.01 < 0.1 < gaps[1.0]
    x = torch.tensor([[1.0]], dtype=F64)
    assert float(cfg(CLASS.denoiser, ALL.denoiser, w)(x, level(1.0))) > float(tilted.denoiser(x, 1.0)) + 0.1


def test_what_has_no_truth_is_refused():
    with pytest.raises(ValueError, match=r"w = -2 gives a precision with the eigenvalue -\d.*cond no wider than ref"):
        tilted_gaussian(NARROW, WIDE, -2.0)
    with pytest.raises(ValueError, match="ref has 2 components"):
        tilted_gaussian(CLASS, ALL, 2.0)
    with pytest.raises(ValueError, match="expected both 1 or both 2"):
        Tilted(CLASS, WIDE_2, 2.0, -3, 3)
    with pytest.raises(ValueError, match="widen them, or lower w"):
        Tilted(NARROW, WIDE, 2.0, -0.5, 0.5)
    with pytest.raises(ValueError, match=r"sigma = 0.0001; expected at least 0.0035"):
        Tilted(NARROW, WIDE, 2.0, -3.5, 3.5).denoiser(normal(2, 1), 1e-4)
