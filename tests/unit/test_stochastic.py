"""Steps that add noise: the published equations, and the weak order of each, from its exact moments on a Gaussian."""

import math
from itertools import pairwise

import pytest
import scipy.integrate
import torch
from torch.testing import assert_close

from course_lib.metrics import sliced_wasserstein, sliced_wasserstein_floor
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddpm
from course_lib.stochastic import dpm_solver_pp_sde_2m, dpm_solver_sde, edm_stochastic, reverse_diffusion
from course_lib.types import right
from course_lib.worlds.toys import three_blobs
from tests.draws import level, normal

F64 = torch.float64
SE = 4.5  # standard errors


def given(*draws: torch.Tensor):
    """A noise source that hands out these draws in order."""
    rows = iter(draws)
    return lambda x: next(rows)


def forbidden(x):
    raise AssertionError("no noise is asked for here")


def net(x, sigma):
    """Some nonlinear denoiser."""
    return torch.sin(1.3 * x) / (1 + float(sigma)) + 0.2 * x.flip(-1)


# --- the published equations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "sigma_next"), [(40.0, 9.0), (0.6, 0.4), (0.02, 0.01), (0.5, 0.0)])
def test_edm_is_algorithm_2(sigma, sigma_next):
    """Karras et al. 2022, Algorithm 2, lines 4 to 13, with the published constants for ImageNet."""
    S_churn, N, S_min, S_max, S_noise = 40.0, 256, 0.05, 50.0, 1.003
    x, z = normal(4, 3), normal(4, 3, seed=1)
    gamma = min(S_churn / N, math.sqrt(2) - 1) if S_min <= sigma <= S_max else 0.0
    t_hat = sigma + gamma * sigma
    x_hat = x + math.sqrt(t_hat**2 - sigma**2) * S_noise * z
    d = (x_hat - net(x_hat, t_hat)) / t_hat
    expected = x_hat + (sigma_next - t_hat) * d
    if sigma_next != 0:
        d_next = (expected - net(expected, sigma_next)) / sigma_next
        expected = x_hat + (sigma_next - t_hat) * (d / 2 + d_next / 2)
    step = edm_stochastic(given(z), S_churn, N, S_min, S_max, S_noise)
    found, memory = step(net, x, level(sigma), level(sigma_next))
    assert memory is None
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_edm_churn_has_the_published_ceiling():
    """gamma is at most sqrt(2) - 1: the noise variance at most doubles."""
    seen = []
    step = edm_stochastic(lambda x: 0 * x, 1e9, 10)
    step(lambda x, s: (seen.append(float(s)), 0 * x)[1], torch.ones(1, 1, dtype=F64), level(2.0), level(0.0))
    assert seen == pytest.approx([2 * math.sqrt(2)], rel=1e-12)


def vp(sigma: float) -> tuple[float, float, float]:
    """alpha, std and lambda = log(alpha / std) of the variance-preserving chain at this noise-to-signal ratio."""
    alpha = 1 / math.sqrt(1 + sigma**2)
    return alpha, sigma * alpha, -math.log(sigma)


@pytest.mark.parametrize("levels", [(30.0, 12.0, 7.0), (0.9, 0.7, 0.2)])
def test_2m_is_the_published_equation(levels):
    """Lu et al. 2022b, SDE-DPM-Solver++(2M), written in the VP coordinates of the paper."""
    last, sigma, sigma_next = levels
    (_, _, lam_r), (a_s, s_s, lam_s), (a_t, s_t, lam_t) = (vp(s) for s in levels)
    x, x_last, z, z_last = (normal(4, 3, seed=i) for i in range(4))
    h, h_last = lam_t - lam_s, lam_s - lam_r
    x0, x0_last = net(x, sigma), net(x_last, last)
    D1 = (x0 - x0_last) / (h_last / h)
    first = -math.expm1(-2 * h)
    expected = s_t / s_s * math.exp(-h) * (a_s * x) + a_t * first * (x0 + D1 / 2) + s_t * math.sqrt(first) * z

    step = dpm_solver_pp_sde_2m(given(z_last, z))
    moved, memory = step(net, x_last, level(last), level(sigma))
    assert_close(moved, ddpm(given(z_last))(net, x_last, level(last), level(sigma))[0], rtol=1e-12, atol=1e-12)
    found, memory = step(net, x, level(sigma), level(sigma_next), memory)
    assert_close(found * a_t, expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(memory[0], x0) and memory[1] == sigma


def test_reverse_diffusion_is_algorithm_2():
    """Song et al. 2021, Algorithm 2: x + (sigma^2 - sigma'^2) score + sqrt(sigma^2 - sigma'^2) z."""
    mixture, x, z = three_blobs(), normal(6, 2), normal(6, 2, seed=1)
    gap = 1.4**2 - 0.9**2
    expected = x + gap * mixture.score(x, 1.4) + math.sqrt(gap) * z
    found = reverse_diffusion(given(z))(mixture.denoiser, x, level(1.4), level(0.9))[0]
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clock", ["exact", "sigma"])
def test_the_single_step_solver_is_two_ancestral_steps_on_one_path(clock):
    """Ancestral steps in the form of k-diffusion: down to s_down by Euler, then up by noise of deviation s_up."""
    sigma, sigma_next = 3.0, 1.1
    x, z_m, z_2 = (normal(4, 3, seed=i) for i in range(3))
    m = math.sqrt(sigma * sigma_next)

    def ancestral(x0, to, z):
        up = math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2)
        down = math.sqrt(to**2 - up**2)
        return x + (down - sigma) * (x - x0) / sigma + up * z

    T = (lambda s: s**-2) if clock == "exact" else (lambda s: s)
    c = (T(m) - T(sigma)) / (T(sigma_next) - T(sigma))
    middle = ancestral(net(x, sigma), m, z_m)
    expected = ancestral(net(middle, m), sigma_next, math.sqrt(c) * z_m + math.sqrt(1 - c) * z_2)
    found, memory = dpm_solver_sde(given(z_m, z_2), clock)(net, x, level(sigma), level(sigma_next))
    assert memory is None
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_exact_clock_is_the_path_of_the_equation():
    """With a constant D the equation is Markov and linear: Cov(x_m, x') = (sigma' / m)^2 Var(x_m). Responses to z give both."""
    sigma, sigma_next = 3.0, 1.1
    m, nil = math.sqrt(sigma * sigma_next), torch.zeros(1, 1, dtype=F64)
    middles = []

    def constant(x, s):
        middles.append(x)
        return 0 * x

    gap = {}
    for clock in ("exact", "sigma"):
        ends = []
        middles.clear()
        for pair in ((1.0, 0.0), (0.0, 1.0)):
            z = [torch.full((1, 1), value, dtype=F64) for value in pair]
            ends.append(dpm_solver_sde(given(*z), clock)(constant, nil, level(sigma), level(sigma_next))[0])
        at_middle = middles[1::2]  # the responses of x_m to z_m and to z_2
        covariance = sum(float(a * b) for a, b in zip(at_middle, ends, strict=True))
        variance = sum(float(a**2) for a in at_middle)
        assert sum(float(b**2) for b in ends) == pytest.approx(sigma_next**2 * (1 - (sigma_next / sigma) ** 2), rel=1e-12)
        gap[clock] = covariance - (sigma_next / m) ** 2 * variance
    assert abs(gap["exact"]) < 1e-12
    assert abs(gap["sigma"]) > 0.05


# --- weak order: exact moments, no sampling -----------------------------------------------------------------------------

V, MEAN, LOW, HIGH = 0.25, 1.0, 0.02, 20.0


def gaussian(x, sigma):
    """The denoiser of N(MEAN, V)."""
    return MEAN + V / (V + sigma**2) * (x - MEAN)


def linear(x, sigma):
    """No Gaussian's denoiser, for which some rules are exact by accident, but linear: D = c x, c = (1 + sin(log sigma)) / 2."""
    return (1 + torch.as_tensor(sigma).log().sin()) / 2 * x


def response(make, D, n: int, at: float = 0.0) -> tuple[float, torch.Tensor]:
    """How the end of a whole run responds to its start and to each of its noises.

    With a denoiser that is linear in x - `at`, the end is at + a (x - at) + sum_k w_k z_k. One run of a batch finds all: row 0
    is driven by nothing, row 1 by x - at = 1, row k + 2 by z_k = 1. The run is `sample` itself, memory included.
    """
    grid = karras(n, LOW, HIGH, to_zero=False)
    calls = []
    sample(D, torch.zeros(1, 1, dtype=F64), grid, make(lambda x: (calls.append(1), 0 * x)[1], n))
    drawn = iter(range(len(calls)))

    def unit(x):
        z = torch.zeros_like(x)
        z[2 + next(drawn)] = 1
        return z

    x = torch.full((len(calls) + 2, 1), at, dtype=F64)
    x[1] += 1
    end = sample(D, x, grid, make(unit, n)).flatten()
    assert float(end[0]) == pytest.approx(at, abs=1e-12)  # what starts at the fixed point stays there
    return float(end[1] - end[0]), end[2:] - end[0]


def exact_linear() -> tuple[float, float]:
    """a and sum_k w_k^2 of the reverse SDE itself under `linear`: dx = 2 (1 - c) x dl + sqrt(2) sigma dw, l = log sigma.

    A(l) = exp(-integral from log LOW to l of 2 (1 - c)) carries x from l to the end, 2 - 2 c = 1 - sin l; the noise that
    enters at l has the variance 2 sigma^2 dl.
    """
    low, high = math.log(LOW), math.log(HIGH)
    A = lambda l: math.exp(-(l - low) - (math.cos(l) - math.cos(low)))
    noise, _ = scipy.integrate.quad(lambda l: 2 * math.exp(2 * l) * A(l) ** 2, low, high, epsabs=1e-14, epsrel=1e-12, limit=200)
    return A(high), noise


def errors(make, n: int) -> tuple[float, float]:
    """Of the response to the start (the mean) and of the variance that the noises add, under `linear`."""
    (a, w), (exact_a, exact_noise) = response(make, linear, n), exact_linear()
    return a / exact_a - 1, float((w**2).sum()) / exact_noise - 1


def variance_error(make, n: int) -> float:
    """Of the variance at the end on the Gaussian, from the exact law at HIGH, V + HIGH^2, to that at LOW."""
    a, w = response(make, gaussian, n, at=MEAN)
    return a**2 * (V + HIGH**2) + float((w**2).sum()) - (V + LOW**2)


def order(make, error=variance_error, n: int = 200) -> float:
    return math.log2(abs(error(make, n) / error(make, 2 * n)))


RULES = {
    "ddpm": (lambda z, n: ddpm(z), 1),
    "reverse diffusion": (lambda z, n: reverse_diffusion(z), 1),
    "sde 2m": (lambda z, n: dpm_solver_pp_sde_2m(z), 2),
    "sde single step": (lambda z, n: dpm_solver_sde(z), 2),
    "sde single step, clock of diffusers": (lambda z, n: dpm_solver_sde(z, "sigma"), 2),
}


@pytest.mark.parametrize("name", RULES)
def test_weak_order(name):
    """Each doubling of the steps divides each error by 2^order (1 + O(h)): the estimate tends to the order as h does to 0.

    0.25 from 200 to 400 steps holds orders 1 and 2 apart with a wide margin, and doubling once more must come nearer.
    """
    make, expected = RULES[name]
    for error in (lambda *run: errors(*run)[0], lambda *run: errors(*run)[1], variance_error):
        coarse, fine = (abs(order(make, error, n) - expected) for n in (100, 200))
        assert fine < 0.25 and fine < coarse


@pytest.mark.parametrize("name", [name for name in RULES if name != "sde 2m"])
def test_the_mean_is_exact_on_a_gaussian(name):
    """The reverse SDE carries the mean's offset as V + sigma^2, and so do these rules: c + rho^2 (1 - c) is that ratio."""
    a, _ = response(RULES[name][0], gaussian, 20, at=MEAN)
    assert a == pytest.approx((V + LOW**2) / (V + HIGH**2), rel=1e-10)


@pytest.mark.parametrize("S_churn", [0.0, 10.0, 40.0])
def test_weak_order_of_edm(S_churn):
    """Churn raises the noise by an exact Gaussian, and Heun carries it: second order, whatever the amount."""
    assert order(lambda z, n: edm_stochastic(z, S_churn, n)) == pytest.approx(2, abs=0.15)


def test_the_second_order_rules_need_each_of_their_parts():
    """What the orders above rest on: without it the variance converges at first order, or not at all."""

    def forgets(z, n):
        step = dpm_solver_pp_sde_2m(z)
        return lambda D, x, s, s_next, memory=None: step(D, x, s, s_next, None)

    def independent(z, n):
        """The two noises of the single step drawn on separate paths."""

        def step(D, x, s, s_next, memory=None):
            m = (s * s_next).sqrt()
            x_m = ddpm(z)(D, x, s, m)[0]
            return ddpm(z)(lambda x, _: D(x_m, m), x, s, s_next)

        return step

    assert order(forgets) == pytest.approx(1, abs=0.15)
    assert order(independent) == pytest.approx(1, abs=0.15)
    assert abs(order(lambda z, n: edm_stochastic(z, 40.0, n, S_noise=1.05))) < 0.15  # tends to another variance
    assert abs(order(lambda z, n: edm_stochastic(lambda x: 0 * z(x), 40.0, n))) < 0.15  # churn that adds no noise
    assert abs(order(lambda z, n: ddpm(lambda x: 0 * z(x)))) < 0.15


# --- end distributions on a mixture --------------------------------------------------------------------------------------

ON_BLOBS = {
    "reverse diffusion": (lambda z, n: reverse_diffusion(z), 200),
    "sde 2m": (lambda z, n: dpm_solver_pp_sde_2m(z), 60),
    "sde single step": (lambda z, n: dpm_solver_sde(z), 60),
    "edm": (lambda z, n: edm_stochastic(z, 30.0, n), 60),
}


@pytest.mark.parametrize("name", ON_BLOBS)
def test_ends_on_the_blobs(name):
    """From exact samples at sigma = 20 to 0.02, 2,000 of them: as near to an exact set as exact sets are to each other.

    The bound is the floor's mean and 4.5 of its deviations. At 4 steps the bias is above it, and so it is without noise: the
    test can fail.
    """
    make, steps = ON_BLOBS[name]
    mixture, n = three_blobs(), 2000
    exact = mixture.sample(n, torch.Generator().manual_seed(6), LOW)
    floor, spread = sliced_wasserstein_floor(lambda m, g: mixture.sample(m, g, LOW), n, rounds=16)

    def distance(k: int, loud: bool = True) -> float:
        source = torch.Generator().manual_seed(8)
        noise = lambda x: torch.randn(x.shape, generator=source, dtype=F64) * loud
        x = mixture.sample(n, torch.Generator().manual_seed(7), HIGH)
        grid = karras(k, LOW, HIGH, to_zero=False)
        return sliced_wasserstein(sample(mixture.denoiser, x, grid, make(noise, k)), exact)

    assert distance(steps) < floor + SE * spread
    assert distance(4) > floor + SE * spread
    assert distance(steps, loud=False) > floor + SE * spread


# --- shapes, calls and errors ---------------------------------------------------------------------------------------------


def unit(x, sigma):
    """The denoiser of independent N(0, 1) entries."""
    return x / (1 + right(torch.as_tensor(sigma) ** 2, x))


def all_steps(*z):
    return {
        "reverse diffusion": reverse_diffusion(given(*z)),
        "edm": edm_stochastic(given(*z), 4.0, 10, S_min=0.55),
        "edm without churn": edm_stochastic(forbidden, 0.0, 10),
        "sde 2m": dpm_solver_pp_sde_2m(given(*z)),
        "sde single step": dpm_solver_sde(given(*z)),
        "sde single step, clock of diffusers": dpm_solver_sde(given(*z), "sigma"),
    }


@pytest.mark.parametrize("name", all_steps())
def test_a_level_per_frame_is_a_step_per_frame(name):
    """sigma (B, T) and (B,): two steps, with memory, move each entry as it would move alone."""
    x, *z = (normal(2, 3, 4, seed=i) for i in range(5))
    sigma = torch.tensor([[1.0, 3.0, 2.0], [0.5, 0.6, 9.0]], dtype=F64)
    grid = [sigma * share for share in (1.0, 0.6, torch.tensor([[0.5, 0.3, 0.0], [0.1, 0.4, 0.3]], dtype=F64))]

    def run(pick, at):
        step, y, memory = all_steps(*(draw[at] for draw in z))[name], x[at], None
        for s, s_next in pairwise(grid):
            y, memory = step(unit, y, pick(s), pick(s_next), memory)
        return y

    for pick, indices in (
        (lambda s: s, [(i, j) for i in range(2) for j in range(3)]),
        (lambda s: s[:, 0], [(i,) for i in range(2)]),
    ):
        together = run(pick, ...)
        for at in indices:
            assert_close(together[at], run(lambda s, at=at, pick=pick: pick(s)[at], at), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", all_steps())
def test_frames_without_noise_pass_unchanged(name):
    x, *z = (normal(2, 3, 4, seed=i) for i in range(5))
    sigma = torch.tensor([[1.0, 0.0, 2.0], [0.5, 3.0, 0.0]], dtype=F64)
    step, y, memory = all_steps(*z)[name], x, None
    for share in (1.0, 0.5):
        y, memory = step(unit, y, sigma * share, sigma * share / 2, memory)
    assert torch.equal(y[sigma == 0], x[sigma == 0])
    assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize(("name", "calls"), [("edm", 2), ("sde 2m", 1), ("sde single step", 2), ("reverse diffusion", 1)])
def test_calls_of_the_network(name, calls):
    """As many as the docstrings say, and one in the step to 0, which returns D without noise (reverse diffusion adds it)."""
    seen = []
    D = lambda x, sigma: (seen.append(float(sigma)), unit(x, sigma))[1]
    x, *z = (normal(2, 3, seed=i).float() for i in range(4))
    found, _ = all_steps(*z)[name](D, x, level(2.0), level(1.0))
    assert len(seen) == calls and found.dtype == torch.float32
    if name in ("sde 2m", "sde single step"):
        assert_close(all_steps()[name](D, x, level(2.0), level(0.0))[0], unit(x, level(2.0)))
        assert len(seen) == calls + 1


@pytest.mark.parametrize("name", [name for name in all_steps() if name != "edm without churn"])
def test_a_stochastic_step_up_is_refused(name):
    step = all_steps(*[torch.zeros(4, 2, dtype=F64)] * 4)[name]
    with pytest.raises(ValueError, match=r"sigma_next = 2.* above sigma = 0\.6; expected a falling grid"):
        step(unit, normal(4, 2), level(0.6), level(2.0))


def test_options_are_checked():
    for options, said in (
        ({"S_churn": -1.0, "steps": 10}, "S_churn = -1.0; expected a number >= 0"),
        ({"S_churn": 1.0, "steps": 0}, "steps = 0; expected a number >= 1"),
        ({"S_churn": float("nan"), "steps": 1}, "S_churn = nan"),
        ({"S_churn": 1.0, "steps": 1, "S_noise": -0.1}, "S_noise = -0.1"),
    ):
        with pytest.raises(ValueError, match=said):
            edm_stochastic(forbidden, **options)
    with pytest.raises(ValueError, match="clock = 'time'; expected 'exact'.*'sigma'"):
        dpm_solver_sde(forbidden, "time")
