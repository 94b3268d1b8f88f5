"""Chamfer distance, and which modes of a mixture a set of points reaches, on sets whose answer is known."""

import math

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch

from course_lib import metrics
from course_lib.gaussians import Mixture
from course_lib.worlds.toys import ring, three_blobs, two_peaks

SE = 4.5  # standard errors
F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --- Chamfer distance ------------------------------------------------------------------------------------------------


def test_chamfer_by_hand():
    """0, 1, 5 and 0, 3 on a line: 0 + 1 + 4 to the nearest of the second, 0 + 4 to the nearest of the first."""
    a, b = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0], [3.0]])
    assert metrics.chamfer(a, b) == metrics.chamfer(b, a) == 9
    assert metrics.chamfer(a, a.flip(0)) == 0


@pytest.mark.parametrize("d", [1, 2, 5])
def test_chamfer_is_its_definition(d):
    """The sums over nearest neighbours that scipy's tree finds."""
    a, b = normal(70, d), 1.3 * normal(45, d, seed=1) + 0.4
    nearest = (scipy.spatial.KDTree(q.numpy()).query(p.numpy())[0] for p, q in ((a, b), (b, a)))
    assert metrics.chamfer(a, b) == pytest.approx(sum(float((distance**2).sum()) for distance in nearest), rel=1e-12)
    assert metrics.chamfer(3 * a, 3 * b) == pytest.approx(9 * metrics.chamfer(a, b), rel=1e-12)
    assert metrics.chamfer(torch.cat([a, a]), b) - metrics.chamfer(a, b) == pytest.approx(
        float((metrics.nearest_distance(a, b) ** 2).sum()), rel=1e-9
    )  # a sum: each point of the first set counts


def test_chamfer_sees_small_distances_far_from_the_origin():
    """1e-5 apart at 1e3: |a|^2 - 2 ab + |b|^2 would round this to 0 or to something ten times as large."""
    a = 1e3 + 10 * torch.arange(50, dtype=F64)[:, None].expand(50, 2)
    assert metrics.chamfer(a, a + 1e-5) == pytest.approx(2 * 50 * 2e-10, rel=1e-6)


@pytest.mark.parametrize(("a", "b"), [((5, 2), (5, 3)), ((0, 2), (5, 2)), ((5,), (5,))])
def test_chamfer_errors(a, b):
    with pytest.raises(ValueError, match=r"a has shape \(.*\) and b \(.*\); expected \(N, d\) and \(M, d\) with a point in each"):
        metrics.chamfer(torch.zeros(a), torch.zeros(b))


# --- modes -----------------------------------------------------------------------------------------------------------


SEPARATE = {"blobs": three_blobs(), "ring": ring(), "peaks": two_peaks(weight=0.3)}


@pytest.mark.parametrize("name", SEPARATE)
def test_modes_of_exact_samples(name):
    """The share on modes within its binomial error; the imbalance, averaged over sets, within its own of the floor."""
    mixture, n, rounds = SEPARATE[name], 2000, 60
    found = [metrics.mode_coverage(mixture.sample(n, torch.Generator().manual_seed(k)), mixture) for k in range(rounds)]
    assert {coverage.covered for coverage in found} == {len(mixture.weights)}
    q = metrics.on_mode_exact(mixture.dim)
    assert abs(np.mean([coverage.on_mode for coverage in found]) - q) < SE * math.sqrt(q * (1 - q) / n / rounds)
    imbalance = np.array([coverage.imbalance for coverage in found])
    # the shares are of the n q points on modes
    floor = metrics.imbalance_floor(mixture, round(n * q))
    assert abs(imbalance.mean() - floor) < SE * imbalance.std(ddof=1) / math.sqrt(rounds)


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_the_share_on_modes_is_that_of_chi_squared(dim):
    assert metrics.on_mode_exact(dim) == pytest.approx(scipy.stats.chi2.cdf(9, dim), rel=1e-12)
    assert metrics.on_mode_exact(dim, 2.0) == pytest.approx(scipy.stats.chi2.cdf(4, dim), rel=1e-12)


@pytest.mark.parametrize("n", [1, 7, 40])
def test_the_floor_of_the_imbalance_is_the_binomials_mean_deviation(n):
    mixture, k = three_blobs(), np.arange(n + 1)
    each = [(np.abs(k / n - w) * scipy.stats.binom.pmf(k, n, w)).sum() for w in mixture.weights.numpy()]
    assert metrics.imbalance_floor(mixture, n) == pytest.approx(sum(each) / 2, rel=1e-10)


def at_means(mixture: Mixture, *counts: int) -> torch.Tensor:
    return mixture.means.repeat_interleave(torch.tensor(counts), 0)


def test_a_missing_mode():
    """Samples of the first two blobs, weights 0.5, 0.3 and 0.2: shares 0.625 and 0.375, imbalance 0.2."""
    blobs, n = three_blobs(), 4000
    two = Mixture(blobs.weights[:2], blobs.means[:2], blobs.covs[:2])
    coverage = metrics.mode_coverage(two.sample(n, torch.Generator().manual_seed(0)), blobs)
    q = metrics.on_mode_exact(2)
    assert coverage.covered == 2 and abs(coverage.on_mode - q) < SE * math.sqrt(q * (1 - q) / n)
    # the third adds 0.2 whatever the others are; these differ from 0.625 by the binomial error, which moves the sum by half
    assert abs(coverage.imbalance - 0.2) < SE * math.sqrt(0.625 * 0.375 / (n * q))
    assert metrics.mode_coverage(at_means(blobs, 50, 30, 0), blobs) == (2, 1.0, pytest.approx(0.2))


def test_a_mode_is_covered_from_a_quarter_of_its_share():
    """Of 100 points a fifth is due to the third blob: 5 cover it, 4 do not."""
    blobs = three_blobs()
    assert metrics.mode_coverage(at_means(blobs, 50, 45, 5), blobs) == (3, 1.0, pytest.approx(0.15))
    assert metrics.mode_coverage(at_means(blobs, 50, 46, 4), blobs) == (2, 1.0, pytest.approx(0.16))


def test_bridges_between_modes_are_on_none():
    """30 of 100 points half-way between two modes; the due share stays that of all 100. Weights are given in fp32."""
    blobs = three_blobs()
    bridge = (blobs.means[:1] + blobs.means[1:2]).expand(30, 2) / 2
    assert metrics.mode_coverage(torch.cat([at_means(blobs, 35, 21, 14), bridge]), blobs) == (3, 0.7, pytest.approx(0, abs=1e-7))
    assert metrics.mode_coverage(torch.cat([at_means(blobs, 53, 13, 4), bridge]), blobs)[:2] == (2, 0.7)
    assert metrics.mode_coverage(bridge, blobs) == (0, 0.0, 1.0)


def test_a_mode_reaches_three_standard_deviations():
    blobs = three_blobs()
    k, axis = 1, 0
    reach = blobs.variances[k, axis].sqrt() * blobs.axes[k, :, axis]
    for size, on in ((2.999, 1.0), (-2.999, 1.0), (3.001, 0.0), (-3.001, 0.0)):
        assert metrics.mode_coverage((blobs.means[k] + size * reach)[None], blobs).on_mode == on


@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_modes_that_meet_are_refused(angle):
    """Tangent ellipses along a common axis, where semi-axes add: 3 (0.5 + 0.2) = 2.1 apart."""
    R = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=F64)
    covs = torch.stack([R @ torch.tensor(v, dtype=F64).square().diag() @ R.T for v in ([0.5, 3.0], [0.2, 0.1])])

    def pair(distance: float) -> Mixture:
        return Mixture(torch.ones(2), torch.stack([torch.zeros(2, dtype=F64), distance * R[:, 0]]), covs)

    assert metrics.mode_coverage(pair(2.11).means, pair(2.11)) == (2, 1.0, 0.0)
    with pytest.raises(ValueError, match="components 0 and 1 of mixture meet within 3 standard deviations"):
        metrics.mode_coverage(pair(2.09).means, pair(2.09))


def test_mode_coverage_errors():
    with pytest.raises(ValueError, match=r"points has shape \(5, 3\); expected \(N, 2\)"):
        metrics.mode_coverage(normal(5, 3), three_blobs())
    with pytest.raises(ValueError, match=r"points\[1\] = \[0.0, nan\]; expected finite numbers"):
        metrics.mode_coverage(torch.tensor([[0.0, 0.0], [0.0, float("nan")]]), three_blobs())
    flat = Mixture.gaussian(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="mixture has a component without extent"):
        metrics.mode_coverage(normal(5, 2), flat)
