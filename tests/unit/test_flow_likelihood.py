"""The exact likelihood along the flow against the exact density, its trace estimators, and round trips of inversion."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib.gaussians import Mixture
from course_lib.likelihood import exact_log_likelihood, rademacher
from course_lib.sample import sample
from course_lib.schedules import EDM
from course_lib.steps import ddim
from course_lib.stochastic import edm_stochastic
from course_lib.worlds.toys import three_blobs
from tests.draws import noise_of

F64 = torch.float64
SE = 4.5  # standard errors
LN2 = math.log(2)


def points(mixture: Mixture, n: int, sigma: float = 0.002) -> torch.Tensor:
    return mixture.sample(n, torch.Generator().manual_seed(1), sigma)


# --- against the exact density ---------------------------------------------------------------------------------------------


def moments(mixture: Mixture) -> dict:
    return {"data_mean": mixture.mean, "data_var": float(mixture.cov.trace()) / mixture.dim}


def test_the_likelihood_of_a_mixture_is_within_a_hundredth_of_a_bit():
    """bits/dim of 48 samples against the exact -log2 p / d at sigma_min, from 0.002 to 80.

    The integrator: 64 steps differ from 128 by less than 0.002. The prior: of the noised mixture at 80 only mean and mean
    variance are right; what it leaves out is the anisotropy (C / 80^2, 3e-4 of log p) and the third moment (1 / 80^3). The
    whole is held to 0.01, the course's claim, and the parts to a tenth of it.
    """
    mixture = three_blobs()
    x = points(mixture, 48)
    exact = -mixture.log_prob(x, 0.002) / (2 * LN2)
    found = {
        steps: exact_log_likelihood(mixture.denoiser, x, steps=steps, **moments(mixture)).bits_per_dim for steps in (64, 128)
    }
    assert float((found[64] - exact).abs().max()) < 0.01
    assert float((found[128] - exact).abs().max()) < 0.001
    plain = exact_log_likelihood(mixture.denoiser, x).bits_per_dim  # the published prior, N(0, sigma_max^2)
    assert float((plain - exact).abs().max()) < 0.01


def test_the_error_of_the_prior_is_the_documented_one():
    """On a Gaussian, solved to 1e-5 by 150 steps: the prior N(0, sigma_max^2) is off by -(m z / s + v (z^2 - 1) / (2 s^2)).

    The next order is (m / s)^2 / 2, v m z / s^3 and v^2 / s^4: for m = 0.5, v = 0.3, s = 40 below 2e-4 with |z| < 3.
    """
    m, v, s = 0.5, 0.3, 40.0
    gaussian = Mixture.gaussian(torch.tensor([m]), torch.tensor([[v]]))
    x = torch.linspace(-1, 2, 9, dtype=F64)[:, None]
    exact = gaussian.log_prob(x, 0.01)
    right = exact_log_likelihood(gaussian.denoiser, x, 0.01, s, 150, data_mean=m, data_var=v)
    assert_close(right.log_prob, exact, rtol=0, atol=1e-5)
    plain = exact_log_likelihood(gaussian.denoiser, x, 0.01, s, 150)
    z = plain.latent.flatten() / s
    first = -(m * z / s + v * (z**2 - 1) / (2 * s**2))
    assert_close(plain.log_prob - exact, first, rtol=0, atol=2e-4)
    assert float(first.abs().max()) > 1e-2  # else this would say nothing


def test_the_latent_is_the_end_of_the_flow_and_the_order_is_four():
    """On a Gaussian both are closed: x and log p converge at fourth order."""
    gaussian = Mixture.gaussian(torch.tensor([0.4, -0.2]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
    x = points(gaussian, 8)
    gaps = []
    fine = exact_log_likelihood(gaussian.denoiser, x, 0.01, 40.0, 200)
    for steps in (20, 40):
        found = exact_log_likelihood(gaussian.denoiser, x, 0.01, 40.0, steps)
        gaps.append(
            (
                float((found.latent - gaussian.flow(x, 0.01, 40.0)).abs().max()),
                float((found.log_prob - fine.log_prob).abs().max()),
            )
        )
    for coarse, finer in zip(*gaps, strict=True):
        assert math.log2(coarse / finer) == pytest.approx(4, abs=0.4)


def test_pictures_have_any_shape_and_keep_their_type():
    """(B, C, H, W) in float32: the same numbers as its flat rows, in float64, up to rounding."""
    mixture = Mixture.isotropic(torch.tensor([[0.5] * 8, [-0.4] * 8]), 0.3)
    x = points(mixture, 3).float()
    D = lambda x, s: mixture.denoiser(x, s)
    flat = exact_log_likelihood(D, x.double(), 0.05, 20.0, 32)
    found = exact_log_likelihood(D, x.reshape(3, 2, 2, 2), 0.05, 20.0, 32)
    assert found.log_prob.dtype == F64 and found.latent.dtype == torch.float32
    assert found.latent.shape == (3, 2, 2, 2)
    # 128 stages of rounding 2^-24 relative to x of 60 in all, each moving log p by its slope of at most x / s^2: 1e-3
    assert_close(found.log_prob, flat.log_prob, rtol=0, atol=1e-3)
    assert_close(found.bits_per_dim, -found.log_prob / (8 * LN2))


# --- the trace estimators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_hutchinson_is_unbiased(kind):
    """600 copies of one point with a probe each: their mean is the exact-trace value within 4.5 standard errors.

    The spread is known, too, where J is the same along the path: a check that the probes are what they are said to be.
    """
    mixture = three_blobs()
    x = points(mixture, 1, 0.3)
    options = {"sigma_min": 0.3, "sigma_max": 20.0, "steps": 24}
    exact = exact_log_likelihood(mixture.denoiser, x, **options).log_prob
    z = noise_of(2) if kind == "normal" else rademacher(noise_of(2))
    many = exact_log_likelihood(mixture.denoiser, x.expand(600, 2), divergence="hutchinson", noise=z, **options).log_prob
    error = float(many.std()) / math.sqrt(600)
    assert error > 1e-4  # the estimates do vary
    assert abs(float(many.mean() - exact)) < SE * error
    wrong = exact_log_likelihood(
        mixture.denoiser, x.expand(600, 2), divergence="hutchinson", noise=lambda x, z=z: 1.2 * z(x), **options
    ).log_prob
    assert abs(float(wrong.mean() - exact)) > SE * float(wrong.std()) / math.sqrt(600)


def test_the_variance_of_a_probe():
    """D = x A with a constant A: log p varies with z as h tr_z, h = log(sigma_max / sigma_min); variances as documented."""
    A = torch.tensor([[0.3, 0.2, 0.0], [0.4, 0.1, -0.1], [0.0, 0.3, 0.2]], dtype=F64)
    D = lambda x, s: x @ A
    S, n, h = (A + A.T) / 2, 4000, math.log(4)
    x = torch.zeros(n, 3, dtype=F64)
    run = lambda z: exact_log_likelihood(D, x, 0.5, 2.0, 2, "hutchinson", z).log_prob
    off = S - torch.diag(S.diagonal())
    for z, variance in ((noise_of(1), 2 * S.square().sum()), (rademacher(noise_of(1)), 2 * off.square().sum())):
        # of a quadratic form in 3 normals the kurtosis is at most 15: the variance of n has the deviation sqrt(14 / n)
        assert float(run(z).var()) == pytest.approx(float(h**2 * variance), rel=SE * math.sqrt(14 / n))


def test_probes_average_over_one_path():
    mixture, options = three_blobs(), {"sigma_min": 0.3, "sigma_max": 20.0, "steps": 8, "divergence": "hutchinson"}
    x = points(mixture, 4, 0.3)
    z = [noise_of(5)(x)]
    z.append(noise_of(6)(x))
    rows = iter(z)
    both = exact_log_likelihood(mixture.denoiser, x, noise=lambda x: next(rows), probes=2, **options)
    each = [exact_log_likelihood(mixture.denoiser, x, noise=lambda x, v=v: v, **options) for v in z]
    assert_close(both.log_prob, (each[0].log_prob + each[1].log_prob) / 2)
    assert_close(both.latent, each[0].latent)


def test_signs_are_signs():
    z = rademacher(noise_of(0))(torch.zeros(2000, dtype=torch.float32))
    assert z.dtype == torch.float32 and set(z.tolist()) == {-1.0, 1.0}
    assert abs(float(z.mean())) < SE / math.sqrt(2000)


# --- what has no likelihood ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("kind", ["static", "dynamic", "one entry"])
def test_a_clipped_denoiser_is_refused(kind, divergence):
    """Clipping to [-1, 1], to a quantile of the sample, or of a single entry of one sample: the error names the value."""
    mixture = three_blobs()
    x = points(mixture, 8)

    def D(x, sigma):
        x0 = mixture.denoiser(x, sigma)
        if kind == "static":
            return x0.clamp(-1, 1)
        if kind == "dynamic":
            return x0.clamp(-0.5, 0.5) / 0.5
        return x0.clamp(max=float(x.detach()[3].max()) - 0.05)

    noise = noise_of(0) if divergence == "hutchinson" else None
    with pytest.raises(ValueError, match="D is clipped at sigma = .* does not depend on x; expected D without clipping"):
        exact_log_likelihood(D, x, divergence=divergence, noise=noise)


def test_clipping_leaves_no_density():
    """Why it is refused: what the flow assigns to a point on the face grows as log(1 / sigma_min), by log 10 a decade."""
    D = lambda x, s: (x / (1 + s**2)).clamp(-1, 1) + 1e-9 * x  # a trace of slope hides the clipping from the check
    x = torch.tensor([[1.0]], dtype=F64)
    values = []
    for low in (1e-2, 1e-3, 1e-4):
        values.append(float(exact_log_likelihood(D, x * (1 + 0.5 * low), low, 20.0, 200).log_prob))
    # the point 1 + low / 2 is clipped at all levels up to 0.5, where x / (1 + s^2) comes within
    assert values[1] - values[0] == pytest.approx(math.log(10), abs=0.15)
    assert values[2] - values[1] == pytest.approx(math.log(10), abs=0.15)


def test_errors_name_what_is_wrong():
    D, x = three_blobs().denoiser, torch.zeros(2, 2, dtype=F64)
    for options, said in (
        ({"sigma_min": 0.0}, "sigma_min = 0.0, sigma_max = 80.0; expected 0 < sigma_min < sigma_max"),
        ({"sigma_max": math.inf}, "sigma_max = inf; expected 0 < sigma_min < sigma_max, both finite"),
        ({"divergence": "trace"}, "divergence = 'trace'; expected 'exact' or 'hutchinson'"),
        ({"steps": 0}, "steps = 0; expected at least 1"),
        ({"divergence": "hutchinson", "noise": noise_of(0), "probes": 0}, "probes = 0; expected at least 1"),
        ({"divergence": "hutchinson"}, "expected noise for 'hutchinson'"),
        ({"noise": noise_of(0)}, "expected noise for 'hutchinson', and only for it"),
    ):
        with pytest.raises(ValueError, match=said):
            exact_log_likelihood(D, x, **options)
    with pytest.raises(ValueError, match="carries no gradient in x"):
        exact_log_likelihood(torch.no_grad()(D), x)
    with pytest.raises(FloatingPointError, match="not finite at sigma = 0.002; expected finite numbers"):
        exact_log_likelihood(lambda x, s: D(x, s) / 0, x)
    with pytest.raises(FloatingPointError, match="divergence is not finite"):
        exact_log_likelihood(lambda x, s: x.abs().sqrt() + D(x, s), x)


# --- inversion --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixture", [Mixture.gaussian(torch.tensor([0.4, -0.2]), torch.diag(torch.tensor([0.5, 0.1]))), three_blobs()]
)
def test_a_round_trip_comes_back_at_the_order_of_ddim(mixture):
    """Up a rising grid and down again: D is taken at the lower end of a step on the way up and at the upper on the way down,
    so that each pair leaves an error of second order in the step, and the trip one of first. From 400 to 800 steps; the
    second order still shows by 0.2 near the separatrices of the blobs, and 0.3 is allowed.
    """
    x = points(mixture, 16, 0.02)

    def gap(n: int) -> float:
        grid = EDM(0.02, 20.0).sigma(torch.linspace(0, 1, n + 1, dtype=F64))
        up = sample(mixture.denoiser, x, grid, ddim)
        return float((sample(mixture.denoiser, up, grid.flip(0), ddim) - x).abs().max())

    assert math.log2(gap(400) / gap(800)) == pytest.approx(1, abs=0.3)


def test_a_round_trip_of_edm_without_churn():
    """S_churn = 0 is Heun's method: up a grid and down again comes back, with an error of second order."""
    mixture, x = three_blobs(), noise_of(0)(torch.empty(16, 2, dtype=F64))

    def gap(n: int) -> float:
        grid = EDM(0.05, 20.0).sigma(torch.linspace(0, 1, n + 1, dtype=F64))
        step = edm_stochastic(noise_of(0), 0.0, n)
        return float((sample(mixture.denoiser, sample(mixture.denoiser, x, grid, step), grid.flip(0), step) - x).abs().max())

    assert math.log2(gap(200) / gap(400)) > 1.85  # Heun's round trip is at least of its own order
