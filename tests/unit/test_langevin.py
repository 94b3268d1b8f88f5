"""Langevin correction: the published step, what it leaves behind, and how it repairs a coarse predictor."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib.gaussians import Mixture
from course_lib.langevin import langevin, predictor_corrector
from course_lib.metrics import sliced_wasserstein, sliced_wasserstein_floor
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim, ddpm
from course_lib.stochastic import dpm_solver_pp_sde_2m, reverse_diffusion
from course_lib.worlds.toys import three_blobs
from tests.draws import level, noise_of, normal

F64 = torch.float64
SE = 4.5  # standard errors


def fixed(z):
    return lambda x: z


# --- the published step ---------------------------------------------------------------------------------------------------


def test_the_step_is_algorithm_4():
    """VE: g = score, e = 2 (r |z| / |g|)^2, x + e g + sqrt(2 e) z, sample by sample."""
    mixture, x, z, r = three_blobs(), normal(5, 2), normal(5, 2, seed=1), 0.16
    found = langevin(mixture.denoiser, x, level(0.7), fixed(z), r)
    for i in range(5):
        g = mixture.score(x[i : i + 1], 0.7)[0]
        e = 2 * (r * z[i].norm() / g.norm()) ** 2
        assert_close(found[i], x[i] + e * g + (2 * e).sqrt() * z[i], rtol=1e-10, atol=1e-10)


def test_the_vp_form_is_the_same_step():
    """Algorithm 5, in x_t = sqrt(abar) x: e = 2 alpha_i (r |z| / |g|)^2 with the score of x_t, which is score / sqrt(abar)."""
    mixture, x, z, r, alpha_i = three_blobs(), normal(5, 2), normal(5, 2, seed=1), 0.16, 0.98
    root = 1 / math.sqrt(1 + 0.7**2)
    g = mixture.score(x, 0.7) / root
    e = 2 * alpha_i * (r * z.norm(dim=1, keepdim=True) / g.norm(dim=1, keepdim=True)) ** 2
    expected = root * x + e * g + (2 * e).sqrt() * z
    assert_close(root * langevin(mixture.denoiser, x, level(0.7), fixed(z), r, alpha_i), expected, rtol=1e-10, atol=1e-10)


def test_a_sample_does_not_change_with_its_batch():
    mixture, x, z = three_blobs(), normal(5, 2), normal(5, 2, seed=1)
    together = langevin(mixture.denoiser, x, level(0.7), fixed(z), 0.16)
    assert_close(together[3:4], langevin(mixture.denoiser, x[3:4], level(0.7), fixed(z[3:4]), 0.16))
    mixed = torch.tensor([0.7, 0.0, 2.0, 0.7, 0.1], dtype=F64)
    found = langevin(mixture.denoiser, x, mixed, fixed(z), 0.16)
    assert_close(found[0], together[0])
    assert torch.equal(found[1], x[1])  # no noise, no score: it stays


# --- where it leads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr", [0.1, 0.4])
def test_the_stationary_variance(snr):
    """On N(0, S) in many dimensions the step leaves the variance S (1 + snr^2): right as snr tends to 0, and then slow.

    |z|^2 = d and |x|^2 = d V make e = 2 snr^2 S^2 / V; V = (1 - e / S)^2 V + 2 e has the solution V = S (1 + snr^2). In d
    dimensions the norms vary by 1 / sqrt(2 d) each; the mean square of d n numbers, by sqrt(2 / (d n)) if they were
    independent. 40 / snr^2 steps of relaxation time 1 / (4 snr^2) forget the start. Without the factor 2 in e, or with
    sqrt(e) for sqrt(2 e), V would be S (1 + snr^2 / 2) or about S / 2.
    """
    S, sigma, d, n = 2.0, 1.0, 4000, 4
    D = lambda x, s: (S - s**2) / S * x  # N(0, S - sigma^2) noised to S
    x, noise = math.sqrt(S) * normal(n, d), noise_of(3)
    for _ in range(round(10 / snr**2)):
        x = langevin(D, x, level(sigma), noise, snr)
    assert float(x.square().mean()) == pytest.approx(S * (1 + snr**2), rel=SE * math.sqrt(2 / (n * d)) + 2 / d)
    assert SE * math.sqrt(2 / (n * d)) + 2 / d < 0.06


def test_corrections_repair_a_coarse_predictor():
    """12 steps of reverse diffusion leave a bias on the blobs above the floor; corrections bring it within the floor.

    2,000 samples; the floor is what pairs of exact sets show, 4.5 deviations are allowed. Two ways to fail are told apart:
    without noise in the correction samples climb to the peaks, and in two dimensions a step of each sample's own does not
    keep the law.
    """
    mixture, n, low = three_blobs(), 2000, 0.1
    exact = mixture.sample(n, torch.Generator().manual_seed(6), low)
    floor, spread = sliced_wasserstein_floor(lambda m, g: mixture.sample(m, g, low), n, rounds=16)

    def distance(corrections: int, shared: bool = True, loud: float = 1.0) -> float:
        x = mixture.sample(n, torch.Generator().manual_seed(7), 20.0)
        grid = karras(12, low, 20.0, to_zero=False)

        def corrected(D, x, sigma, sigma_next, memory=None):
            x, _ = reverse_diffusion(first)(D, x, sigma, sigma_next)
            for _ in range(corrections):
                z = second(x)
                moved = langevin(D, x, sigma_next, lambda x, z=z: z, 0.1, shared=shared)
                still = langevin(D, x, sigma_next, lambda x, z=z: -z, 0.1, shared=shared)
                x = moved if loud else (moved + still) / 2  # the noise cancels, the pull stays
            return x, None

        first, second = noise_of(8), noise_of(9)
        return sliced_wasserstein(sample(mixture.denoiser, x, grid, corrected), exact)

    assert distance(0) > floor + SE * spread
    assert distance(16) < floor + SE * spread
    assert distance(16, loud=False) > floor + SE * spread
    assert distance(16, shared=False) > floor + SE * spread


# --- the wrapper ----------------------------------------------------------------------------------------------------------


def test_predict_then_correct_at_the_new_level():
    mixture, x, noise = three_blobs(), normal(4, 2), noise_of(2)
    found, memory = predictor_corrector(ddim, noise, 0.2, corrections=2)(mixture.denoiser, x, level(2.0), level(0.8))
    noise = noise_of(2)
    expected = ddim(mixture.denoiser, x, level(2.0), level(0.8))[0]
    for _ in range(2):
        expected = langevin(mixture.denoiser, expected, level(0.8), noise, 0.2)
    assert memory is None
    assert_close(found, expected)


def test_a_multistep_predictor_loses_its_history():
    """The memory is None after a correction, so that SDE-DPM-Solver++(2M) takes DDPM's step; without corrections it is kept."""
    mixture, x, grid = three_blobs(), normal(4, 2), torch.tensor([4.0, 2.0, 1.0], dtype=F64)
    run = lambda predictor, k: sample(mixture.denoiser, x, grid, predictor_corrector(predictor, noise_of(5), 0.2, k))
    assert_close(run(dpm_solver_pp_sde_2m(noise_of(1)), 1), run(ddpm(noise_of(1)), 1))
    kept = sample(mixture.denoiser, x, grid, dpm_solver_pp_sde_2m(noise_of(1)))
    assert_close(run(dpm_solver_pp_sde_2m(noise_of(1)), 0), kept)


def test_the_step_to_zero_is_not_corrected():
    def forbidden(x):
        raise AssertionError("no noise is asked for at sigma = 0")

    mixture, x = three_blobs(), normal(4, 2)
    found, _ = predictor_corrector(ddim, forbidden, 0.2)(mixture.denoiser, x, level(1.0), level(0.0))
    assert_close(found, mixture.denoiser(x, 1.0))


def test_alpha_may_follow_the_level():
    mixture, x = three_blobs(), normal(4, 2)
    told = []

    def alpha(sigma):
        told.append(float(sigma))
        return 1 / (1 + sigma**2)

    found, _ = predictor_corrector(ddim, noise_of(1), 0.2, alpha=alpha)(mixture.denoiser, x, level(2.0), level(0.5))
    moved = ddim(mixture.denoiser, x, level(2.0), level(0.5))[0]
    assert told == [0.5]
    assert_close(found, langevin(mixture.denoiser, moved, level(0.5), noise_of(1), 0.2, 1 / 1.25))


def test_options_are_checked():
    D = Mixture.isotropic(torch.zeros(1, 2), 1.0).denoiser
    for snr in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"snr = {snr}; expected a signal-to-noise ratio > 0"):
            langevin(D, normal(2, 2), level(1.0), noise_of(0), snr)
    with pytest.raises(ValueError, match=r"sigma has shape \(2, 3\); expected one level a sample"):
        langevin(D, normal(2, 3, 2), torch.ones(2, 3, dtype=F64), noise_of(0), 0.1)
    with pytest.raises(ValueError, match="corrections = -1; expected"):
        predictor_corrector(ddim, noise_of(0), 0.1, -1)
