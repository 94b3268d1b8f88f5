"""The three SDEs of ScoreSDE: drift and diffusion against the marginals, forward and reverse runs against exact laws."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib.gaussians import Mixture
from course_lib.metrics import sliced_wasserstein, sliced_wasserstein_floor
from course_lib.sample import sample
from course_lib.sdes import SDE, VE, VP, SubVP, euler_maruyama
from course_lib.steps import euler
from course_lib.stochastic import reverse_diffusion
from course_lib.worlds.toys import three_blobs
from tests.draws import noise_of

F64 = torch.float64
SE = 4.5  # standard errors
ALL = [VP(), SubVP(), VE(), VP(0.2, 7.0), VE(0.05, 9.0)]
IDS = ["vp", "subvp", "ve", "vp 0.2 to 7", "ve 0.05 to 9"]


def times(n: int = 9) -> torch.Tensor:
    return torch.linspace(0.01, 1, n, dtype=F64)


# --- drift, diffusion, marginals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ALL, ids=IDS)
def test_the_moments_obey_the_sde(sde):
    """d alpha/dt = rate alpha and d std^2/dt = 2 rate std^2 + g^2, the derivatives by automatic differentiation."""
    t = times()
    d_alpha, d_std = sde.velocity(t)
    assert_close(d_alpha, sde.rate(t) * sde.alpha(t), rtol=1e-10, atol=1e-12)
    assert_close(2 * sde.std(t) * d_std, 2 * sde.rate(t) * sde.std(t) ** 2 + sde.diffusion(t) ** 2, rtol=1e-9, atol=1e-12)


def test_the_published_forms():
    """Song et al. 2021, Eq. 9, 11, 12 and 29, with the published constants, at t = 0.3."""
    t, x = torch.tensor(0.3, dtype=F64), torch.tensor([[2.0]], dtype=F64)
    beta, integral = 0.1 + 0.3 * 19.9, 0.1 * 0.3 + 19.9 * 0.3**2 / 2
    for sde in (VP(), SubVP()):
        assert_close(sde.drift(x, t), -beta / 2 * x)
        assert float(sde.marginal(x, t)[0]) == pytest.approx(2 * math.exp(-integral / 2))
    assert float(VP().diffusion(t)) == pytest.approx(math.sqrt(beta))
    assert float(VP().std(t)) == pytest.approx(math.sqrt(1 - math.exp(-integral)))
    assert float(SubVP().diffusion(t)) == pytest.approx(math.sqrt(beta * (1 - math.exp(-2 * integral))))
    assert float(SubVP().std(t)) == pytest.approx(1 - math.exp(-integral))
    sigma = 0.01 * 5000**0.3
    assert float(VE().std(t)) == pytest.approx(sigma) == float(VE().marginal(x, t)[1])
    assert float(VE().diffusion(t)) == pytest.approx(sigma * math.sqrt(2 * math.log(5000)))
    assert float(VE().drift(x, t)) == 0


def test_the_variance_of_subvp_is_the_square_of_that_of_vp():
    assert_close(SubVP().std(times()) ** 2, (VP().std(times()) ** 2) ** 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sde", ALL, ids=IDS)
def test_sigma_is_std_over_alpha_and_back(sde):
    t = times()
    assert_close(sde.sigma(t), sde.std(t) / sde.alpha(t), rtol=1e-14, atol=0)
    assert_close(sde.t_of_sigma(sde.sigma(t)), t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sde", ALL, ids=IDS)
def test_the_prior_is_the_noise_at_the_end(sde):
    """std(1) is the prior's deviation, exactly for VE; for the others the signal that is left is alpha(1)^2 of the variance."""
    one = torch.tensor(1.0, dtype=F64)
    assert sde.prior_std**2 == pytest.approx(
        float(sde.std(one)) ** 2, rel=2.01 * float(sde.alpha(one)) ** 2 * (sde.name != "ve") + 1e-12
    )


@pytest.mark.parametrize("sde", ALL, ids=IDS)
def test_scores_and_drifts_are_those_of_the_marginal(sde):
    """x_t = alpha x has the density of the mixture scaled by alpha, and the covariances alpha^2 C + std^2."""
    mixture, x_t = three_blobs(), torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    for t in times(3):
        alpha, std, g = sde.alpha(t), sde.std(t), sde.diffusion(t)
        scaled = Mixture(mixture.weights, alpha * mixture.means, alpha**2 * mixture.covs)
        score = scaled.score(x_t, std)
        assert_close(sde.score(mixture.denoiser, x_t, t), score, rtol=1e-7, atol=1e-9)
        assert_close(sde.reverse_drift(mixture.denoiser, x_t, t), sde.drift(x_t, t) - g**2 * score, rtol=1e-7, atol=1e-7)
        assert_close(sde.flow_drift(mixture.denoiser, x_t, t), sde.drift(x_t, t) - g**2 * score / 2, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sde", ALL, ids=IDS)
def test_the_flow_is_that_of_sigma(sde):
    """x = x_t / alpha moves as dx/dsigma = (x - D) / sigma in every SDE: the same flow, at another speed."""
    D, t = three_blobs().denoiser, torch.tensor(0.4, dtype=F64)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    d_sigma = torch.func.jvp(sde.sigma, (t,), (torch.ones_like(t),))[1]
    dx_dt = (sde.flow_drift(D, alpha * x, t) - sde.rate(t) * alpha * x) / alpha
    assert_close(dx_dt, d_sigma * (x - D(x, sigma)) / sigma, rtol=1e-8, atol=1e-9)


# --- runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ALL[:3], ids=IDS[:3])
def test_forward_euler_maruyama_has_the_marginals(sde):
    """100 steps from one x0 to t = 0.6. The scheme's own moments obey a recursion; 20,000 runs lie within 4.5 standard errors
    of it, and it tends to the exact marginal at first order. Together: the code moves as the marginals say.

    The start is the marginal at t = 0.01, since VE's deviation at 0 is sigma_min and not 0.
    """
    x0, n, begin, end = 1.5, 20_000, 0.01, 0.6

    def grid(steps: int) -> torch.Tensor:
        return torch.linspace(begin, end, steps + 1, dtype=F64)

    def recursion(steps: int) -> tuple[float, float]:
        t, h = grid(steps), (end - begin) / steps
        mean, variance = float(x0 * sde.alpha(t[0])), float(sde.std(t[0]) ** 2)
        for s in t[:-1]:
            mean *= 1 + h * float(sde.rate(s))
            variance = variance * (1 + h * float(sde.rate(s))) ** 2 + h * float(sde.diffusion(s)) ** 2
        return mean, variance

    t, noise = grid(100), noise_of(1)
    mean, std = sde.marginal(torch.full((n, 1), x0, dtype=F64), t[0])
    x = mean + std * noise(mean)
    for s, s_next in pairwise(t):
        x = sde.move(x, s, s_next, noise)
    expected_mean, variance = recursion(100)
    assert float(x.mean()) == pytest.approx(expected_mean, abs=SE * math.sqrt(variance / n))
    assert float(x.var()) == pytest.approx(variance, rel=SE * math.sqrt(2 / n))

    exact = float(sde.std(t[-1]) ** 2)
    off = [abs(recursion(steps)[1] - exact) for steps in (400, 800)]
    assert math.log2(off[0] / off[1]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(0.01, 20.0)], ids=IDS[:3])
def test_the_reverse_sde_and_the_flow_end_in_the_same_law(sde):
    """Song et al. 2021, Sec. 4.3: 1,000 samples from the exact law at t = 1 down to sigma = 0.1, by Euler-Maruyama in 400 steps
    and by Euler's method for the flow: each within the floor of an exact set, and of each other. 4.5 deviations of the floor
    are allowed. Half of the noise, or none, is told apart.
    """
    mixture, n, low = three_blobs(), 1000, 0.1
    t = torch.linspace(1, float(sde.t_of_sigma(torch.tensor(low))), 401, dtype=F64)
    start = mixture.sample(n, torch.Generator().manual_seed(3), float(sde.sigma(t[0])))
    exact = mixture.sample(n, torch.Generator().manual_seed(4), low)
    floor, spread = sliced_wasserstein_floor(lambda m, g: mixture.sample(m, g, low), n, rounds=16)
    near = floor + SE * spread

    def ends(share: float) -> torch.Tensor:
        z = noise_of(5)
        return sample(mixture.denoiser, start, sde.sigma(t), euler_maruyama(sde, lambda x: share * z(x)))

    stochastic, flow = ends(1.0), sample(mixture.denoiser, start, sde.sigma(t), euler(sde))
    assert sliced_wasserstein(stochastic, exact) < near
    assert sliced_wasserstein(flow, exact) < near
    assert sliced_wasserstein(stochastic, flow) < near
    assert sliced_wasserstein(ends(0.5), exact) > near


# --- the step ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ALL, ids=IDS)
def test_the_step_is_euler_maruyama_in_the_sdes_own_coordinates(sde):
    D = three_blobs().denoiser
    x, z = (torch.randn(6, 2, generator=torch.Generator().manual_seed(i), dtype=F64) for i in range(2))
    t, t_next = (torch.tensor(v, dtype=F64) for v in (0.5, 0.45))
    found, memory = euler_maruyama(sde, lambda x: z)(D, x, sde.sigma(t), sde.sigma(t_next))
    x_t = sde.alpha(t) * x
    moved = x_t - 0.05 * sde.reverse_drift(D, x_t, t) + sde.diffusion(t) * math.sqrt(0.05) * z
    assert memory is None
    assert_close(found, moved / sde.alpha(t_next), rtol=1e-7, atol=1e-8)


def test_ve_in_small_steps_is_reverse_diffusion():
    """Euler-Maruyama takes g^2 h for sigma^2 - sigma'^2, h = t - t', and they differ at second order.

    With L = log(5000), sigma^2 (2 L h - (1 - e^{-2 L h})) has the next term -2 L h / 3 of the first: 0.8 % in the order here.
    """
    D, x, z, sde = three_blobs().denoiser, torch.ones(1, 2, dtype=F64), torch.ones(1, 2, dtype=F64), VE()
    t = torch.tensor(0.5, dtype=F64)

    def gap(h: float) -> float:
        levels = sde.sigma(t), sde.sigma(t - h)
        pair = (step(D, x, *levels)[0] for step in (euler_maruyama(sde, lambda x: 0 * z), reverse_diffusion(lambda x: 0 * z)))
        return float((next(pair) - next(pair)).abs().max())

    assert math.log2(gap(2e-3) / gap(1e-3)) == pytest.approx(2, abs=0.02)


def test_directions_and_ranges_are_checked():
    sde, x = VP(), torch.zeros(1, 1, dtype=F64)
    D = lambda x, s: 0 * x
    with pytest.raises(ValueError, match="expected the time to rise"):
        sde.move(x, 0.5, 0.4, noise_of(0))
    with pytest.raises(ValueError, match="expected the time to fall"):
        sde.move(x, 0.4, 0.5, noise_of(0), D)
    with pytest.raises(ValueError, match=r"sigma = 1000\.0 is beyond the vp SDE"):
        euler_maruyama(sde, noise_of(0))(D, x, torch.tensor(1000.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="sigma_next = 0.0 is beyond the ve SDE"):
        euler_maruyama(VE(), noise_of(0))(D, x, torch.tensor(1.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match="sigma_min = 2.0, sigma_max = 1.0"):
        VE(2.0, 1.0)
    with pytest.raises(NotImplementedError, match="must define rate"):
        SDE().rate(torch.tensor(0.5))
    with pytest.raises(NotImplementedError, match="must define diffusion"):
        SDE().diffusion(torch.tensor(0.5))
