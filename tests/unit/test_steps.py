"""Each step is the published equation: written out in DDPM's own coordinates, and of the order that theory gives."""

import math

import pytest
import torch
from torch.testing import assert_close

from course_lib import schedules
from course_lib.sample import sample
from course_lib.schedules import EDM, Cosine, Discrete, Flow, Linear, Schedule
from course_lib.steps import ddim, ddim_eta, ddpm, euler
from course_lib.types import right
from course_lib.worlds.toys import three_blobs

F64 = torch.float64
TABLES = [Discrete(betas(), name=name) for name, betas in schedules.TABLES.items()]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def level(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


def fixed(z: torch.Tensor):
    """A noise source that gives `z`."""
    return lambda x: z


def net(x: torch.Tensor) -> torch.Tensor:
    """Some nonlinear prediction of the noise."""
    return torch.sin(1.3 * x) + 0.4 * x.flip(-1)


def from_net(alpha_bar: torch.Tensor):
    """The Denoiser of `net` at one level: x0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), Ho et al. 2020, Eq. 15."""

    def D(x, sigma):
        x_t = alpha_bar.sqrt() * x
        return (x_t - (1 - alpha_bar).sqrt() * net(x_t)) / alpha_bar.sqrt()

    return D


def sigma_of(alpha_bar: torch.Tensor) -> torch.Tensor:
    return ((1 - alpha_bar) / alpha_bar).sqrt()


# --- the published equations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("t", [999, 500, 1])
def test_ddpm_is_algorithm_2(table, variance, t):
    """x_{t-1} = (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(1 - beta_t) + s_t z, s_t^2 = beta-tilde_t or beta_t."""
    beta, abar = table.betas[t], torch.cumprod(1 - table.betas, 0)
    x_t, z = normal(4, 3), normal(4, 3, seed=1)
    s2 = beta if variance == "large" else (1 - abar[t - 1]) / (1 - abar[t]) * beta
    expected = (x_t - beta / (1 - abar[t]).sqrt() * net(x_t)) / (1 - beta).sqrt() + s2.sqrt() * z
    step = ddpm(fixed(z), variance)
    x, memory = step(from_net(abar[t]), x_t / abar[t].sqrt(), sigma_of(abar[t]), sigma_of(abar[t - 1]))
    assert memory is None
    # at t = 1 the product loses four digits in 1 - abar = 3e-4; elsewhere rounding alone
    assert_close(x * abar[t - 1].sqrt(), expected, rtol=1e-9, atol=1e-9)


def test_ddpm_ends_without_noise():
    """The last step of Algorithm 2 has z = 0 and returns the predicted x0."""
    abar, x = level(0.9), normal(4, 3)

    def forbidden(x):
        raise AssertionError("no noise is asked for in the step to 0")

    end, _ = ddpm(forbidden)(from_net(abar), x, sigma_of(abar), level(0.0))
    assert_close(end, from_net(abar)(x, None))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("abar", "abar_next"), [(1e-4, 0.1), (0.2, 0.5), (0.9, 0.999), (0.5, 1.0)])
def test_ddim_is_equation_12(eta, abar, abar_next):
    """Song et al. 2021, Eq. 12 with Eq. 16 for s; between any two levels, and to alpha_bar = 1."""
    abar, abar_next = level(abar), level(abar_next)
    x_t, z = normal(4, 3), normal(4, 3, seed=1)
    s = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)).sqrt()
    x0 = (x_t - (1 - abar).sqrt() * net(x_t)) / abar.sqrt()
    expected = abar_next.sqrt() * x0 + (1 - abar_next - s**2).sqrt() * net(x_t) + s * z
    steps = [ddim_eta(eta, fixed(z))] + ([ddim] if eta == 0 else [])
    for step in steps:
        x, memory = step(from_net(abar), x_t / abar.sqrt(), sigma_of(abar), sigma_of(abar_next))
        assert memory is None
        assert_close(x * abar_next.sqrt(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(80.0, 20.0), (2.0, 1.9), (0.5, 0.01), (1.0, 0.0)])
def test_eta_joins_ddim_and_ddpm(sigma, sigma_next):
    D, x, z = three_blobs().denoiser, normal(6, 2), normal(6, 2, seed=1)
    levels = level(sigma), level(sigma_next)
    assert_close(ddim_eta(0.0, fixed(z))(D, x, *levels)[0], ddim(D, x, *levels)[0], rtol=1e-13, atol=1e-13)
    assert_close(ddim_eta(1.0, fixed(z))(D, x, *levels)[0], ddpm(fixed(z))(D, x, *levels)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(20.0, 5.0), (1.0, 0.9), (0.5, 0.01)])
def test_a_known_x0_leaves_the_exact_marginal(sigma, sigma_next):
    """With D(x, sigma) = x0, both DDIM(eta) and DDPM (small) carry N(x0, sigma^2) to N(x0, sigma'^2) exactly.

    A step is linear in eps and z, so its variance is the sum of the squares of its two responses.
    """
    x0 = torch.tensor([[0.3]], dtype=F64)
    one, nil = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    for make in (lambda noise: ddim_eta(0.0, noise), lambda noise: ddim_eta(0.6, noise), ddpm):
        response = [
            make(fixed(z))(lambda x, s: x0, x0 + sigma * eps, level(sigma), level(sigma_next))[0] - x0
            for eps, z in ((one, nil), (nil, one))
        ]
        assert float(response[0] ** 2 + response[1] ** 2) == pytest.approx(sigma_next**2, rel=1e-12)


# --- Euler's method in a schedule's own time ----------------------------------------------------------------------------


class Sigma(Schedule):
    """Time is sigma itself."""

    t_max = 1e3

    def alpha(self, t):
        return torch.ones_like(t)

    def std(self, t):
        return t * 1.0


@pytest.mark.parametrize("schedule", [Sigma(), Flow(), EDM(rho=1.0)], ids=["sigma", "flow", "edm, rho 1"])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(80.0, 20.0), (3.0, 2.5), (0.5, 0.01), (0.5, 0.0), (0.3, 0.7)])
def test_euler_is_ddim_where_alpha_and_std_are_straight(schedule, sigma, sigma_next):
    D, x = three_blobs().denoiser, normal(6, 2)
    if schedule.name == "edm":
        sigma_next = max(sigma_next, 0.002)  # where EDM's time ends
    found = euler(schedule)(D, x, level(sigma), level(sigma_next))[0]
    # the time is found to 1e-14 of the longest, by bisection over [0, 1000] in the first case
    assert_close(found, ddim(D, x, level(sigma), level(sigma_next))[0], rtol=0, atol=1e-10)


def test_euler_is_not_ddim_in_vp_time():
    """It is Euler for Song et al. 2021, Eq. 13: x_t + (t' - t) (f x_t - g^2 / 2 score), f = -beta/2, g^2 = beta."""
    mixture, schedule, x = three_blobs(), Linear(), normal(6, 2)
    t, t_next = level(0.6), level(0.5)
    sigma, sigma_next = schedule.sigma(t), schedule.sigma(t_next)
    found = euler(schedule)(mixture.denoiser, x, sigma, sigma_next)[0]
    alpha, beta = schedule.alpha(t), 0.1 + 19.9 * t
    score = mixture.score(x, sigma) / alpha  # of the density of x_t = alpha x
    expected = alpha * x + (t_next - t) * (-beta / 2 * alpha * x - beta / 2 * score)
    assert_close(found * schedule.alpha(t_next), expected, rtol=1e-10, atol=1e-10)
    assert float((found - ddim(mixture.denoiser, x, sigma, sigma_next)[0]).abs().max()) > 1e-2


@pytest.fixture(scope="module")
def blobs_flow():
    """64 points of the noised mixture at sigma = 20, and where the exact flow carries them at 0.02."""
    mixture = three_blobs()
    x = mixture.sample(64, torch.Generator().manual_seed(0), 20.0)
    return mixture.denoiser, x, mixture.reference_flow(x, 20.0, 0.02)


def even_grid(schedule: Schedule, n: int, high: float = 20.0, low: float = 0.02) -> torch.Tensor:
    times = torch.linspace(float(schedule.t_of_sigma(high)), float(schedule.t_of_sigma(low)), n + 1, dtype=F64)
    return schedule.sigma(times)


@pytest.mark.parametrize(
    ("step", "time"),
    [(ddim, EDM(0.02, 20.0)), (euler(Linear()), Linear()), (euler(Linear()), EDM(0.02, 20.0)), (euler(Cosine()), Cosine())],
    ids=["ddim", "euler linear", "euler linear on EDM's grid", "euler cosine"],
)
def test_order_of_convergence_is_one(step, time, blobs_flow):
    """Largest error over 64 exact trajectories; 200 steps resolve the separatrices between the blobs."""
    D, x, end = blobs_flow
    gap = {n: float((sample(D, x, even_grid(time, n), step) - end).abs().max()) for n in (200, 400)}
    assert math.log2(gap[200] / gap[400]) == pytest.approx(1.0, abs=0.15)


def test_inversion_follows_the_flow_at_first_order(blobs_flow):
    """DDIM up a rising grid, from the ends of the exact trajectories back to their starts."""
    D, x, end = blobs_flow
    gap = {n: float((sample(D, end, even_grid(EDM(0.02, 20.0), n).flip(0), ddim) - x).abs().max()) for n in (200, 400)}
    assert math.log2(gap[200] / gap[400]) == pytest.approx(1.0, abs=0.15)


# --- shapes of sigma ---------------------------------------------------------------------------------------------------


def unit(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The denoiser of independent N(0, 1) entries."""
    return x / (1 + right(torch.as_tensor(sigma) ** 2, x))


def all_steps(z: torch.Tensor):
    return {
        "ddim": ddim,
        "eta 0": ddim_eta(0.0, fixed(z)),
        "eta 0.6": ddim_eta(0.6, fixed(z)),
        "ddpm": ddpm(fixed(z)),
        "ddpm large": ddpm(fixed(z), "large"),
        "euler": euler(Linear()),
    }


@pytest.mark.parametrize("name", all_steps(torch.zeros(1)))
def test_a_level_per_frame_is_a_step_per_frame(name):
    """sigma (B, T) and (B,): each entry moves as it would alone."""
    x, z = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    sigma = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.6, 9.0]], dtype=F64)
    sigma_next = sigma * torch.tensor([[0.5, 0.7, 0.0], [0.1, 0.9, 0.3]], dtype=F64)
    for pick in (lambda v: v, lambda v: v[:, 0]):
        s, s_next = pick(sigma), pick(sigma_next)
        found = all_steps(z)[name](unit, x, s, s_next)[0]
        for index in torch.cartesian_prod(*(torch.arange(n) for n in s.shape)).reshape(-1, s.ndim).tolist():
            at = tuple(index)
            alone = all_steps(z[at])[name](unit, x[at], s[at], s_next[at])[0]
            assert_close(found[at], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", all_steps(torch.zeros(1)))
def test_frames_without_noise_pass_unchanged(name):
    """Settled for video: frames with sigma = 0 are given, and a step leaves them alone."""
    x = normal(2, 3, 4)
    sigma = torch.tensor([[1.0, 0.0, 2.0], [0.5, 3.0, 0.0]], dtype=F64)
    found = all_steps(normal(2, 3, 4, seed=1))[name](unit, x, sigma, sigma / 2)[0]
    assert torch.equal(found[sigma == 0], x[sigma == 0])
    assert bool(torch.isfinite(found).all())


# --- errors --------------------------------------------------------------------------------------------------------------


def test_options_are_checked():
    noise = fixed(torch.zeros(1))
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"eta = {eta}; expected a number from 0"):
            ddim_eta(eta, noise)
    with pytest.raises(ValueError, match="variance = 'fixed_small'; expected 'small'.*'large'"):
        ddpm(noise, "fixed_small")


def test_eta_zero_inverts_like_ddim():
    """eta = 0 is deterministic, so it may walk a rising grid."""
    D, x, grid = three_blobs().denoiser, normal(4, 2), torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=F64)
    assert_close(sample(D, x, grid, ddim_eta(0.0, fixed(torch.zeros(4, 2)))), sample(D, x, grid, ddim))


@pytest.mark.parametrize("name", ["eta 0.6", "ddpm", "ddpm large"])
def test_a_stochastic_step_up_is_refused(name):
    """Its variance would be negative; the error must name the levels, not blame the network."""
    D, grid = three_blobs().denoiser, torch.tensor([0.1, 0.5, 2.0], dtype=F64)
    with pytest.raises(ValueError, match=r"sigma_next.*0\.5.*0\.1|sigma.*0\.1.*0\.5"):
        sample(D, normal(4, 2), grid, all_steps(torch.zeros(4, 2))[name])


@pytest.mark.parametrize(
    ("schedule", "sigma", "sigma_next"),
    [
        (EDM(), 0.002, 0.0),
        (EDM(rho=1.0), 0.5, 0.0),
        (EDM(), 100.0, 50.0),
        (Discrete(schedules.linear_betas()), 0.5, 0.0),
        (Discrete(schedules.linear_betas()), 0.005, 0.001),
        (Discrete(schedules.linear_betas()), 500.0, 1.0),
    ],
)
def test_euler_refuses_a_level_that_its_time_cannot_express(schedule, sigma, sigma_next):
    """t_of_sigma is clamped to the schedule's range: Euler's step would end, unnoticed, at another level than asked."""
    with pytest.raises(ValueError, match="sigma.*expected"):
        euler(schedule)(unit, normal(2, 1), level(sigma), level(sigma_next))
