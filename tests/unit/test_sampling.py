"""The one loop, and where each sampler's samples end: against its exact law, discretisation included."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib.denoisers import from_edm
from course_lib.gaussians import Mixture
from course_lib.metrics import sliced_wasserstein, sliced_wasserstein_floor
from course_lib.nets.mlp import MLP
from course_lib.sample import Trajectory, sample
from course_lib.schedules import EDM, Discrete, karras, linear_betas, uniform
from course_lib.steps import ddim, ddim_eta, ddpm
from course_lib.worlds.toys import three_blobs, two_peaks
from tests.draws import noise_of

SE = 4.5  # standard errors
F64 = torch.float64


# --- the loop ---------------------------------------------------------------------------------------------------


def test_the_loop_hands_on_levels_and_memory():
    grid, seen, told = torch.tensor([3.0, 2.0, 0.5, 0.0]), [], []

    def step(D, x, sigma, sigma_next, memory=None):
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        seen.append((float(sigma), float(sigma_next), memory))
        return x + 1, len(seen)

    end = sample(lambda x, s: x, torch.zeros(2, 1), grid, step, on_step=lambda x, s: told.append((float(x[0]), float(s))))
    assert seen == [(3.0, 2.0, None), (2.0, 0.5, 1), (0.5, 0.0, 2)]
    assert told == [(1.0, 2.0), (2.0, 0.5), (3.0, 0.0)]
    assert end.tolist() == [[3.0], [3.0]]


def test_a_trajectory_holds_every_state():
    D, x, grid = three_blobs().denoiser, torch.randn(4, 2, dtype=F64), karras(5, 0.1, 3.0)
    record = Trajectory(x, grid[0])
    end = sample(D, x, grid, on_step=record)
    assert record.x.shape == (6, 4, 2) and record.sigmas == grid.tolist()
    assert torch.equal(record.x[0], x) and torch.equal(record.x[-1], end)
    assert_close(record.x[1], ddim(D, x, grid[0], grid[1])[0])


def test_guidance_may_open_gradients_in_the_loop():
    def D(x, sigma):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((z**2).sum() / 4, z)
        return slope

    x = torch.randn(3, 2, requires_grad=True)
    end = sample(D, x, karras(3, 0.1, 3.0))
    assert not end.requires_grad and bool(torch.isfinite(end).all())


@pytest.mark.parametrize("grid", [[1.0, 2.0, 0.5], [0.0, 1.0], [1.0], [1.0, float("nan")], [1.0, -1.0]])
def test_the_loop_checks_its_grid_before_it_moves(grid):
    def step(*args):
        raise AssertionError("no step on a bad grid")

    with pytest.raises(ValueError, match="sigmas.*expected"):
        sample(lambda x, s: x, torch.zeros(1, 1), torch.tensor(grid), step)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_network_that_breaks_is_reported_with_its_level(bad):
    told = []
    D = lambda x, sigma: torch.where(sigma < 1, bad, 0.0) + 0 * x
    with pytest.raises(FloatingPointError, match=r"not finite.*sigma = 0\.5;.*network"):
        sample(D, torch.ones(2, 2), torch.tensor([3.0, 2.0, 0.5, 0.1, 0.0]), on_step=lambda x, s: told.append(float(s)))
    assert told == [2.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_type_of_x_is_kept(dtype):
    assert sample(from_edm(MLP().to(dtype)), 3 * torch.randn(4, 2, dtype=dtype), karras(3, 0.1, 3.0)).dtype == dtype


# --- end distributions: a Gaussian, by the exact recursion of mean and variance -------------------------------------


def transfer(kind: str, sigma: float, sigma_next: float, variances: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Along an axis of variance v the denoiser is m + c (x - m), c = v / (v + sigma^2): x' - m = A (x - m) + s z."""
    c, r = variances / (variances + sigma**2), sigma_next / sigma
    if kind == "ddim":
        return c + r * (1 - c), 0.0
    if kind == "eta 0.5":
        s = 0.5 * sigma_next * math.sqrt(1 - r**2)
        return c + math.sqrt(sigma_next**2 - s**2) / sigma * (1 - c), s
    large = (1 + sigma_next**2) * (sigma**2 - sigma_next**2) / (1 + sigma**2)
    s2 = r**2 * (sigma**2 - sigma_next**2) if kind == "ddpm" else large
    return c + r**2 * (1 - c), math.sqrt(s2) if sigma_next > 0 else 0.0


def step_of(kind: str, seed: int = 0):
    noise = noise_of(seed)
    return {"ddim": ddim, "eta 0.5": ddim_eta(0.5, noise), "ddpm": ddpm(noise), "ddpm large": ddpm(noise, "large")}[kind]


KINDS = ["ddim", "eta 0.5", "ddpm", "ddpm large"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [0.0, 0.3])
def test_end_moments_on_a_gaussian(kind, end):
    """8 coarse steps from N(0, 10^2), 30,000 runs: each sampler's own mean and variance, biased as they are.

    Standard errors of a Gaussian: sqrt(v / n) of the mean, v sqrt(2 / n) of the variance, sqrt(v v' / n) of a
    covariance that is 0.
    """
    n = 30_000
    root = torch.tensor([[0.6, 0.0], [0.5, 0.3]], dtype=F64)
    gaussian = Mixture.gaussian(torch.tensor([1.0, -0.5]), root @ root.T)
    variances, axes = torch.linalg.eigh(root @ root.T)
    grid = torch.tensor([10.0, 7.0, 4.0, 2.5, 1.5, 1.0, 0.7, 0.5, end], dtype=F64)
    x = 10 * torch.randn(n, 2, generator=torch.Generator().manual_seed(9), dtype=F64)
    x = sample(gaussian.denoiser, x, grid, step_of(kind))
    mean, variance = -gaussian.mean @ axes, torch.full((2,), 100.0, dtype=F64)
    for sigma, sigma_next in pairwise(grid.tolist()):
        A, s = transfer(kind, sigma, sigma_next, variances)
        mean, variance = A * mean, A**2 * variance + s**2
    along = (x - gaussian.mean) @ axes
    assert bool(((along.mean(0) - mean).abs() < SE * (variance / n).sqrt()).all())
    assert bool(((along.var(0) - variance).abs() < SE * variance * math.sqrt(2 / n)).all())
    assert abs(float(torch.cov(along.T)[0, 1])) < SE * float((variance.prod() / n).sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_the_recursion_tends_to_the_data(kind):
    """The exact recursion itself: its end variance tends to that of the noised data, at first order or better.

    This ties the biased laws above to the target; no sample is drawn.
    """

    def error(n: int) -> float:
        v, variance, grid = torch.tensor(0.25, dtype=F64), 100.25, EDM(0.01, 10.0).sigma(torch.linspace(1, 0, n + 1, dtype=F64))
        for sigma, sigma_next in pairwise(grid.tolist()):
            A, s = transfer(kind, sigma, sigma_next, v)
            variance = float(A**2 * variance + s**2)
        return abs(variance - (0.25 + 0.01**2))

    assert math.log2(error(400) / error(800)) > 0.9


# --- end distributions: a mixture in one dimension, by the exact density of the chain ---------------------------------


@pytest.mark.parametrize("kind", KINDS[1:])
def test_end_distribution_on_a_mixture(kind):
    """7 coarse steps on two unequal peaks. The chain's kernels are Gaussian, so its density is a quadrature.

    Kolmogorov's bound: the largest gap of the empirical distribution function exceeds 2.6 / sqrt(n) with
    probability 2 exp(-2 * 2.6^2) = 3e-6. The quadrature's own error is below 1e-3 of that.
    """
    mixture, n = two_peaks(weight=0.3), 20_000
    grid = torch.tensor([8.0, 5.0, 3.0, 1.8, 1.1, 0.7, 0.5, 0.35], dtype=F64)
    start = 8 * torch.randn(n, 1, generator=torch.Generator().manual_seed(3), dtype=F64)
    ends = sample(mixture.denoiser, start, grid, step_of(kind)).flatten().sort().values

    nodes = torch.linspace(-7, 7, 1501, dtype=F64) * 8
    weights = torch.softmax(-((nodes / 8) ** 2) / 2, 0)
    for sigma, sigma_next in pairwise(grid):
        # the step with the noise replaced by 0 and by 1 gives the kernel's mean and deviation
        centre, shifted = (
            (ddpm(lambda x, z=z: z + 0 * x, "large" if "large" in kind else "small") if "ddpm" in kind
             else ddim_eta(0.5, lambda x, z=z: z + 0 * x))(mixture.denoiser, nodes[:, None], sigma, sigma_next)[0].flatten()
            for z in (0.0, 1.0)
        )  # fmt: skip
        deviation = (shifted - centre)[0]
        following = torch.linspace(-1, 1, 1501, dtype=F64) * (7 * sigma_next + 3)
        kernel = (-((following - centre[:, None]) ** 2) / (2 * deviation**2)).exp()
        weights = weights @ kernel
        nodes, weights = following, weights / weights.sum()
    width = nodes[1] - nodes[0]
    cdf = weights.cumsum(0)  # at the right edge of each node's cell
    at = ((ends - nodes[0] + width / 2) / width).clamp(0, len(nodes) - 1.001)
    left = at.floor().long()
    below = torch.cat([cdf.new_zeros(1), cdf])
    model = below[left] + (at - left) * (below[left + 1] - below[left])
    rank = torch.arange(n + 1, dtype=F64) / n
    gap = torch.maximum((model - rank[:-1]).abs(), (model - rank[1:]).abs()).max()
    assert float(gap) < 2.6 / math.sqrt(n)


# --- end distributions: a mixture in the plane ----------------------------------------------------------------------


def test_ddim_on_the_blobs_is_as_near_as_its_trajectories():
    """Coupling: the distance of two sets is at most the mean distance of paired points.

    The exact flow carries samples of p_20 to samples of p_0.02, so DDIM's set lies within the floor, plus the mean
    distance between its ends and the exact ends of the same starts.
    """
    mixture, n, low = three_blobs(), 1000, 0.02
    x = mixture.sample(n, torch.Generator().manual_seed(4), 20.0)
    ends = sample(mixture.denoiser, x, EDM(low, 20.0).sigma(torch.linspace(1, 0, 41, dtype=F64)))
    bias = float((ends - mixture.reference_flow(x, 20.0, low, tolerance=1e-6)).norm(dim=1).mean())
    floor, spread = sliced_wasserstein_floor(lambda m, g: mixture.sample(m, g, low), n, rounds=16)
    exact = mixture.sample(n, torch.Generator().manual_seed(5), low)
    assert sliced_wasserstein(ends, exact) < floor + SE * spread + bias
    assert bias < 0.1  # or the bound would say nothing: the blobs are two units apart


def test_ddpm_on_the_blobs_converges_to_them():
    """Weak order 1: from 12 to 192 steps the bias falls 16 times; half of that is asked for."""
    mixture, n, low = three_blobs(), 2000, 0.02
    exact = mixture.sample(n, torch.Generator().manual_seed(6), low)
    floor, spread = sliced_wasserstein_floor(lambda m, g: mixture.sample(m, g, low), n, rounds=16)

    def distance(steps: int) -> float:
        x = mixture.sample(n, torch.Generator().manual_seed(7), 20.0)
        grid = EDM(low, 20.0).sigma(torch.linspace(1, 0, steps + 1, dtype=F64))
        return sliced_wasserstein(sample(mixture.denoiser, x, grid, ddpm(noise_of(8))), exact)

    coarse = distance(12)
    assert coarse > floor + SE * spread  # else there would be no bias to see falling
    assert distance(192) < floor + SE * spread + coarse / 8


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_in_a_thousand_steps_is_within_the_floor(variance):
    """DDPM as published, from pure noise along its own table to 0: 10,000 samples, as near as 10,000 exact ones.

    Its distance is held against the mean and deviation of the floor, what pairs of exact sets of 10,000 show; so is the
    bias that 1,000 steps leave, which is below that. 10 steps of the same table are far outside.
    """
    mixture, n = three_blobs(), 10_000
    floor, spread = sliced_wasserstein_floor(mixture.sample, n, rounds=16)
    exact = mixture.sample(n, torch.Generator().manual_seed(11))
    table = Discrete(linear_betas())

    def distance(steps: int) -> float:
        grid = uniform(table, steps)
        x = float(1 + grid[0] ** 2) ** 0.5 * noise_of(12)(torch.empty(n, 2, dtype=F64))
        return sliced_wasserstein(sample(mixture.denoiser, x, grid, ddpm(noise_of(13), variance)), exact)

    assert distance(1000) < floor + SE * spread
    assert distance(10) > floor + SE * spread


def test_conditional_denoiser_moves_samples_to_the_posterior():
    """A posterior is a mixture too: DDIM under its denoiser ends in it, within coupling and Monte-Carlo error."""
    prior, n = three_blobs(), 2000
    posterior = prior.posterior(torch.tensor([[1.0, 0.0]]), torch.tensor([0.8]), 0.2)
    x = posterior.sample(n, torch.Generator().manual_seed(1), 20.0)
    ends = sample(posterior.denoiser, x, karras(60, 0.01, 20.0))
    bias = (ends - posterior.reference_flow(x, 20.0, 0.01, tolerance=1e-6)).abs().mean(0)
    error = SE * (posterior.cov.diagonal() / n).sqrt()
    assert bool(((ends.mean(0) - posterior.mean).abs() < error + bias).all())
