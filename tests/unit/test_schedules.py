"""Every schedule keeps the promises of the interface: VDM's algebra, falling SNR, inverses, the forward chain."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from course_lib import schedules
from course_lib.schedules import (
    EDM,
    Cosine,
    Discrete,
    Flow,
    Linear,
    Schedule,
    exponential,
    karras,
    leading,
    linspace,
    log_snr,
    trailing,
    uniform,
)
from course_lib.types import check_grid

SE = 4.5  # standard errors
F64 = torch.float64
CONTINUOUS = [Linear(), Cosine(), EDM(), Flow()]
TABLES = [Discrete(betas(), name=name) for name, betas in schedules.TABLES.items()]
ALL = [*CONTINUOUS, *TABLES]
names = lambda schedule: f"{type(schedule).__name__}-{schedule.name}"
every = pytest.mark.parametrize("schedule", ALL, ids=names)
every_table = pytest.mark.parametrize("schedule", TABLES, ids=names)
STABLE = Discrete(schedules.scaled_linear_betas())
TOP, BOTTOM = (float(STABLE.sigma(t)) for t in (999.0, 0.0))


def inner_times(schedule: Schedule, n: int = 501) -> torch.Tensor:
    """Times away from the ends, where sigma is 0 or infinite; between the entries of a table too."""
    return schedule.t_min + (schedule.t_max - schedule.t_min) * torch.linspace(0.01, 0.99, n, dtype=F64)


@every
def test_variance_is_preserved_exactly_where_promised(schedule):
    t = inner_times(schedule)
    total = schedule.alpha(t) ** 2 + schedule.std(t) ** 2
    kept = bool((total - 1).abs().max() < 1e-13)
    assert kept is schedule.preserves_variance


@every
def test_snr_falls_strictly(schedule):
    t = inner_times(schedule)
    assert bool((schedule.snr(t).diff() < 0).all())
    assert_close(schedule.snr(t), schedule.alpha(t) ** 2 / schedule.std(t) ** 2, rtol=1e-10, atol=0)
    assert_close(schedule.log_snr(t), schedule.snr(t).log(), rtol=0, atol=1e-10)
    assert_close(schedule.sigma(t), schedule.snr(t) ** -0.5, rtol=1e-12, atol=0)


@every_table
def test_snr_of_a_table_falls_at_every_entry(schedule):
    assert bool((schedule.snr(torch.arange(1000, dtype=F64)).diff() < 0).all())


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Flow()], ids=names)
def test_time_zero_is_clean_data(schedule):
    assert float(schedule.alpha(0.0)) == pytest.approx(1, abs=1e-15)
    assert float(schedule.std(0.0)) == pytest.approx(0, abs=1e-7)  # nan would mean 1 - alpha_bar < 0
    assert float(schedule.sigma(0.0)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=names)
def test_small_noise_is_not_lost_to_rounding(schedule):
    """sigma^2 = 1/alpha_bar - 1 is linear in t near 0; 1 - alpha_bar in float64 would lose all digits at 1e-14."""
    if schedule.name == "linear":
        rate = schedule.beta_min
    else:  # -d log cos^2(a) / dt = 2 tan(a) da/dt
        width = math.pi / 2 / (1 + schedule.s)
        rate = 2 * math.tan(width * schedule.s) * width
    assert float(schedule.sigma(1e-7)) ** 2 == pytest.approx(1e-7 * rate, rel=1e-4)


@every
def test_t_of_sigma_inverts_sigma(schedule):
    t = inner_times(schedule)
    scale = schedule.t_max - schedule.t_min
    assert_close(schedule.t_of_sigma(schedule.sigma(t)), t, rtol=0, atol=1e-9 * scale)
    assert_close(Schedule.t_of_sigma(schedule, schedule.sigma(t)), t, rtol=0, atol=1e-9 * scale)  # by bisection


@every
def test_t_of_sigma_is_clamped_to_the_times_there_are(schedule):
    for invert in (schedule.t_of_sigma, lambda s: Schedule.t_of_sigma(schedule, s)):
        # bisection reaches an end to one unit in the last place
        assert float(invert(torch.tensor(0.0, dtype=F64))) == pytest.approx(schedule.t_min, abs=1e-12)
        assert float(invert(torch.tensor(1e30, dtype=F64))) == pytest.approx(schedule.t_max, rel=1e-12)


def test_a_students_schedule_needs_alpha_and_std_only():
    class Parabola(Schedule):
        def alpha(self, t):
            return 1 - t**2

        def std(self, t):
            return t

    schedule, t = Parabola(), torch.linspace(0.05, 0.95, 19, dtype=F64)
    assert_close(schedule.sigma(t), t / (1 - t**2))
    assert_close(schedule.t_of_sigma(schedule.sigma(t)), t, rtol=0, atol=1e-12)
    d_alpha, d_std = schedule.velocity(t)
    assert_close(d_alpha, -2 * t)
    assert_close(d_std, torch.ones_like(t))
    with pytest.raises(NotImplementedError, match="Schedule must define alpha"):
        Schedule().alpha(t)


# --- the forward chain q(x_t | x_prev) and the closed form q(x_t | x_0) ------------------------------------------


@every
def test_the_chain_composes_to_the_closed_form(schedule):
    """Products of a, and the recursion v <- a^2 v + b^2, from the first time to each later one."""
    t = torch.arange(1000, dtype=F64) if isinstance(schedule, Discrete) else inner_times(schedule, 200)
    scale, variance = schedule.alpha(t[0]), schedule.std(t[0]) ** 2
    for prev, now in pairwise(t):
        a, b = schedule.transition(prev, now)
        scale, variance = a * scale, a**2 * variance + b**2
        assert float(scale) == pytest.approx(float(schedule.alpha(now)), rel=1e-10)
        assert float(variance) == pytest.approx(float(schedule.std(now)) ** 2, rel=1e-9)


@every_table
def test_a_step_of_a_table_is_ddpms(schedule):
    """q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t), Ho et al. 2020, Eq. 2."""
    t = torch.arange(1, 1000, dtype=F64)
    a, b = schedule.transition(t - 1, t)
    assert_close(a**2, 1 - schedule.betas[1:], rtol=1e-9, atol=1e-12)
    assert_close(b**2, schedule.betas[1:], rtol=1e-9, atol=1e-12)
    assert_close(schedule.alpha(torch.tensor(0.0)) ** 2, 1 - schedule.betas[0])


@every
def test_the_simulated_chain_has_the_moments_of_the_closed_form(schedule):
    """x0 ~ N(m, C) walked through 8 steps: mean and covariance of (x_t, x0) against alpha m, alpha^2 C + std^2 I, alpha C."""
    n, generator = 40_000, torch.Generator().manual_seed(1)
    m, C = torch.tensor([0.7, -0.3], dtype=F64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    x0 = m + torch.randn(n, 2, generator=generator, dtype=F64) @ torch.linalg.cholesky(C).T
    low, high = schedule.t_min, schedule.t_max
    t = low + (high - low) * torch.linspace(0.02, 0.7, 9, dtype=F64)
    x = schedule.add_noise(x0, t[0], torch.randn(n, 2, generator=generator, dtype=F64))
    for prev, now in pairwise(t):
        a, b = schedule.transition(prev, now)
        x = a * x + b * torch.randn(n, 2, generator=generator, dtype=F64)
    alpha, std = schedule.alpha(t[-1]), schedule.std(t[-1])
    mean = torch.cat([alpha * m, m])
    top, cross = alpha**2 * C + std**2 * torch.eye(2, dtype=F64), alpha * C
    cov = torch.cat([torch.cat([top, cross], 1), torch.cat([cross, C], 1)])
    both = torch.cat([x, x0], 1)
    variances = cov.diagonal()
    assert bool(((both.mean(0) - mean).abs() < SE * (variances / n).sqrt()).all())
    # standard error of a Gaussian's sample covariance: sqrt((c_ii c_jj + c_ij^2) / n)
    error = ((variances[:, None] * variances + cov**2) / n).sqrt()
    assert bool(((torch.cov(both.T) - cov).abs() < SE * error).all())


@every
def test_add_noise_is_its_equation(schedule):
    x0, eps = torch.randn(3, 2, 2, dtype=F64), torch.randn(3, 2, 2, dtype=F64)
    t = inner_times(schedule, 3)
    rows = torch.stack([schedule.alpha(s) * a + schedule.std(s) * e for s, a, e in zip(t, x0, eps, strict=True)])
    assert_close(schedule.add_noise(x0, t, eps), rows)
    assert_close(schedule.add_noise(x0, float(t[1]), eps)[1], rows[1])
    assert schedule.add_noise(x0.float(), t, eps.float()).dtype == torch.float32


@every
def test_velocity_is_the_derivative(schedule):
    """Against a central difference, whose own error is h^2 f'''/6 + 1e-16 / h; off the knots of a table."""
    scale = schedule.t_max - schedule.t_min
    t = inner_times(schedule, 48)
    if isinstance(schedule, Discrete):
        t = t.floor() + 0.4  # a piecewise map has no derivative at its knots
    h = 1e-5 * scale
    d_alpha, d_std = schedule.velocity(t)
    assert_close(d_alpha * scale, (schedule.alpha(t + h) - schedule.alpha(t - h)) / 2e-5, rtol=1e-5, atol=1e-6)
    assert_close(d_std * scale, (schedule.std(t + h) - schedule.std(t - h)) / 2e-5, rtol=1e-5, atol=1e-6)


# --- tables and what they approximate -------------------------------------------------------------------------------


def test_the_linear_table_approximates_the_vp_sde():
    """log alpha_bar = sum log(1 - beta_i) against -0.1 t - 9.95 t^2 at t = (i + 1) / 1000.

    sum log(1 - beta) lies below -sum beta by sum (beta^2/2 + beta^3/3 + ...) <= sum (beta^2/2 + beta^3/2), and the
    sum of the equally spaced betas differs from the integral of the line by at most 0.0199 / 8.
    """
    table = Discrete(schedules.linear_betas())
    t = torch.arange(1, 1001, dtype=F64) / 1000
    excess = table.table.log() - Linear().log_alpha_bar(t)
    below = (table.betas**2 / 2 + table.betas**3 / 2).cumsum(0)
    riemann = 0.0199 / 8 + 1e-12
    assert bool((excess <= riemann).all()) and bool((excess >= -below - riemann).all())


def test_the_linear_table_converges_at_first_order():
    gap = {
        T: float(Discrete(schedules.linear_betas(T, 0.1 / T, 20 / T)).table[-1].log() - Linear().log_alpha_bar(torch.tensor(1.0)))
        for T in (2000, 4000)
    }
    # gap = c / T + O(1/T^2), and the next term is about 20/T of the first
    assert gap[2000] / gap[4000] == pytest.approx(2, rel=0.02)


def test_the_cosine_table_is_the_cosine_until_it_is_clipped():
    table = Discrete(schedules.cosine_betas())
    assert float(table.betas[-1]) == 0.999 and bool((table.betas[:-1] < 0.999).all())
    t = torch.arange(1, 1000, dtype=F64) / 1000
    angle = (t + 0.008) / 1.008 * math.pi / 2
    assert_close(table.table[:-1], angle.cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rtol=1e-9, atol=1e-15)


def test_published_betas():
    linear, scaled = schedules.linear_betas(), schedules.scaled_linear_betas()
    assert_close(linear, torch.as_tensor(1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999))
    root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * np.arange(1000) / 999
    assert_close(scaled, torch.as_tensor(root**2))


@every_table
def test_a_table_is_read_in_log_sigma(schedule):
    """At an entry alpha_bar is the running product; between two, log sigma is their mean at the middle."""
    t = torch.arange(1000, dtype=F64)
    assert_close(schedule.alpha_bar(t), torch.cumprod(1 - schedule.betas, 0), rtol=1e-9, atol=0)
    middle = schedule.sigma(t[:-1] + 0.5).log()
    assert_close(middle, (schedule.sigma(t[:-1]).log() + schedule.sigma(t[1:]).log()) / 2, rtol=0, atol=1e-9)
    assert_close(schedule.t_of_sigma(schedule.sigma(t)), t, rtol=0, atol=1e-8)


def test_rounding_keeps_to_trained_times():
    schedule = Discrete(schedules.linear_betas(), rounding=True)
    t = torch.tensor([0.0, 3.3, 3.7, 500.2, 999.0])
    plain = Discrete(schedules.linear_betas())
    assert schedule.t_of_sigma(plain.sigma(t)).tolist() == [0, 3, 4, 500, 999]


# --- grids ------------------------------------------------------------------------------------------------------------


def test_karras_is_edms_equation_5():
    n, low, high, rho = 18, 0.002, 80.0, 7.0
    i = np.arange(n)
    expected = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    assert_close(karras(n), torch.as_tensor(np.append(expected, 0.0)), rtol=1e-12, atol=0)
    assert karras(n).dtype == F64 and torch.equal(check_grid(karras(n)), karras(n))
    assert_close(karras(1), torch.tensor([80.0, 0.0], dtype=F64))


@every
@pytest.mark.parametrize("n", [1, 2, 10])
def test_a_uniform_grid_has_n_steps_evenly_spaced_in_time(schedule, n):
    grid = uniform(schedule, n, t_max=0.9 * schedule.t_max)
    assert grid.shape == (n + 1,) and float(grid[-1]) == 0
    assert torch.equal(check_grid(grid), grid)
    t = schedule.t_of_sigma(grid[:-1])
    assert float(t[0]) == pytest.approx(0.9 * schedule.t_max, rel=1e-9)
    assert_close(t.diff(), (t[-1] - t[0]).expand(n - 1) / max(1, n - 1), rtol=0, atol=1e-8 * schedule.t_max)


@pytest.mark.parametrize("schedule", [Cosine(), Flow()], ids=names)
def test_a_grid_from_infinite_sigma_is_refused(schedule):
    """At t = 1 no signal is left: cos(pi/2) = 0 is 6e-17 in float64, and sigma = 1.6e16 is rounding, not a level."""
    with pytest.raises(ValueError, match=r"t_max = 1\.0.*infinite.*expected t_max <"):
        uniform(schedule, 10)


GRIDS = {
    "uniform": lambda n, **end: uniform(STABLE, n, **end),
    "karras": lambda n, **end: karras(n, BOTTOM, TOP, **end),
    "exponential": lambda n, **end: exponential(n, BOTTOM, TOP, **end),
    "log_snr": lambda n, **end: log_snr(STABLE, n, **end),
    "leading": lambda n, **end: leading(STABLE, n, 1, **end),
    "leading, upper": lambda n, **end: leading(STABLE, n, drop_lowest=True, **end),
    "linspace, upper": lambda n, **end: linspace(STABLE, n, drop_lowest=True, **end),
    "trailing": lambda n, **end: trailing(STABLE, n, **end),
}


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("n", [1, 2, 7, 50, 500])
@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_of_n_steps_has_n_and_one_falling_levels(name, n, to_zero):
    grid = GRIDS[name](n, to_zero=to_zero)
    assert grid.shape == (n + 1,) and grid.dtype == F64 and torch.equal(check_grid(grid), grid)
    assert float(grid[-1]) == (0 if to_zero else pytest.approx(BOTTOM, rel=1e-12))
    assert float(grid[0]) <= TOP * (1 + 1e-12)
    if not name.startswith("leading"):
        assert float(grid[0]) == pytest.approx(TOP, rel=1e-12)


@pytest.mark.parametrize("name", ["uniform", "karras", "exponential", "log_snr"])
def test_without_zero_the_last_step_ends_at_the_lowest_level(name):
    """The levels of one step more, whose last step, to 0, is left out."""
    assert_close(GRIDS[name](20, to_zero=False), GRIDS[name](21)[:-1], rtol=1e-12, atol=0)


def test_a_uniform_grid_of_a_schedule_that_ends_at_0_ends_there_either_way():
    assert_close(uniform(Linear(), 10, to_zero=False), Linear().sigma(torch.linspace(1, 0, 11, dtype=F64)))
    assert torch.equal(uniform(Linear(), 10, to_zero=False), uniform(Linear(), 10))


def test_exponential_levels_have_one_ratio():
    grid = exponential(12, 0.03, 15.0)
    assert_close(grid[1:-1] / grid[:-2], torch.full((11,), (0.03 / 15.0) ** (1 / 11), dtype=F64), rtol=1e-12, atol=0)


def test_karras_becomes_exponential():
    """With a = sigma^(1/rho), log sigma at the share u is rho log((1 - u) a + u b): by its cumulants (1 - u) log sigma_max
    + u log sigma_min + u (1 - u) L^2 / (2 rho) + O(L^3 / rho^2), L = log(sigma_max / sigma_min) = 10.6."""
    u, L, rho = torch.linspace(0, 1, 15, dtype=F64)[1:-1], math.log(80 / 0.002), 1e5
    excess = (karras(15, rho=rho)[1:-2] / exponential(15)[1:-2]).log()
    assert_close(excess * rho, u * (1 - u) * L**2 / 2, rtol=L / rho, atol=1e-5)  # 2^-53 in a root, times rho in its power


@every
def test_log_snr_is_even_in_log_snr(schedule):
    """To the ends given in time; and `exponential` of the same ends is the same grid."""
    low, high = (schedule.t_min + share * (schedule.t_max - schedule.t_min) for share in (0.02, 0.9))
    grid = log_snr(schedule, 9, low, high, to_zero=False)
    t = schedule.t_of_sigma(grid)
    assert float(t[0]) == pytest.approx(high, rel=1e-9) and float(t[-1]) == pytest.approx(low, rel=1e-9)
    steps = schedule.log_snr(t).diff()
    assert_close(steps, steps.mean().expand(9), rtol=1e-10, atol=0)  # t(sigma) and back, a rounding times d log SNR / d log t
    assert_close(exponential(9, float(grid[-1]), float(grid[0]), to_zero=False), grid, rtol=1e-12, atol=0)


TEN_OF_1000 = {  # Lin et al. 2024, Tab. 2, whose times begin at 1
    "leading": (leading, range(901, 0, -100)),
    "linspace": (linspace, [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]),
    "trailing": (trailing, range(1000, 0, -100)),
}


@pytest.mark.parametrize("name", TEN_OF_1000)
def test_ten_steps_of_a_thousand_are_as_tabled(name):
    make, times = TEN_OF_1000[name]
    expected = STABLE.sigma(torch.tensor(list(times), dtype=F64) - 1)
    assert_close(make(STABLE, 10), torch.cat([expected, torch.zeros(1, dtype=F64)]), rtol=1e-12, atol=0)


def times_of(grid: torch.Tensor) -> list[int]:
    """The whole times of a grid's levels above 0."""
    t = STABLE.t_of_sigma(grid[grid > 0])
    assert_close(t, t.round(), rtol=0, atol=1e-7)
    return t.round().long().tolist()


@pytest.mark.parametrize("n", [2, 3, 6, 7, 47, 48, 61, 96, 103, 121, 240, 333, 666, 999, 1000])
def test_times_are_rounded_from_their_exact_fractions(n):
    """Halves go to the even time, as round() has it; in floating point a step of 1000/48 meets 62.5 only by luck."""
    assert times_of(trailing(STABLE, n)) == [round(1000 - Fraction(1000 * k, n)) - 1 for k in range(n)]
    assert times_of(linspace(STABLE, n)) == [round(999 - Fraction(999 * k, n - 1)) for k in range(n)]
    stride = 1000 // n
    assert times_of(leading(STABLE, n)) == [stride * k for k in range(n)][::-1]


@pytest.mark.parametrize("n", [1, 4, 25, 999])
def test_dropping_the_lowest_time_leaves_the_others(n):
    for make in (leading, linspace):
        assert times_of(make(STABLE, n, drop_lowest=True)) == times_of(make(STABLE, n + 1))[:-1]
        assert times_of(make(STABLE, n, to_zero=False, drop_lowest=True)) == times_of(make(STABLE, n + 1))
    if n < 999:
        shifted = leading(STABLE, n, 1, drop_lowest=True)
        assert times_of(shifted) == [t + 1 for t in times_of(leading(STABLE, n, drop_lowest=True))]


def test_all_thousand_steps_are_the_whole_table():
    """Where n = T the three spacings are one: DDPM's own walk."""
    whole = torch.cat([STABLE.sigma(torch.arange(999, -1, -1, dtype=F64)), torch.zeros(1, dtype=F64)])
    for make in (leading, linspace, trailing):
        assert_close(make(STABLE, 1000), whole, rtol=1e-12, atol=0)


BAD_GRIDS = {
    "leading, no steps": (lambda: leading(STABLE, 0), "n = 0; expected at least one"),
    "leading, too many": (lambda: leading(STABLE, 1001), "n = 1001; expected at most 1000 steps in a table of 1000"),
    "leading, too many by one": (lambda: leading(STABLE, 1000, drop_lowest=True), "n = 1000; expected at most 999 steps"),
    "linspace, too many": (lambda: linspace(STABLE, 1001), "n = 1001; expected at most 1000"),
    "trailing, too many": (lambda: trailing(STABLE, 1001), "n = 1001; expected at most 1000"),
    "beyond the table": (lambda: leading(STABLE, 1000, 1), "offset = 1 leads to time 1000; expected times from 0 to 999"),
    "before the table": (lambda: leading(STABLE, 10, -1), "offset = -1 leads to time 899; expected times from 0"),
    "no table": (lambda: trailing(Linear(), 10), "table is a Linear schedule; expected a Discrete"),
    "ends twice": (lambda: leading(STABLE, 10, to_zero=False), "to_zero = False, but the lowest time is 0 already; expected an"),
    "ends twice, rounded": (lambda: trailing(STABLE, 700, to_zero=False), "to_zero = False, but the lowest time is 0"),
    "exponential, no steps": (lambda: exponential(0), "n = 0; expected at least one"),
    "exponential, to 0": (lambda: exponential(5, 0.0, 1.0), r"sigma_min = 0\.0, sigma_max = 1\.0; expected 0 <"),
    "exponential, rising": (lambda: exponential(5, 2.0, 1.0), r"sigma_min = 2\.0, sigma_max = 1\.0; expected 0 <"),
    "no noise": (lambda: log_snr(Linear(), 5), r"t_min = 0\.0 of the linear schedule has no noise.*expected t_min > 0"),
    "no signal": (lambda: log_snr(Flow(), 5, 0.1), r"t_max = 1\.0 of the flow schedule leaves no signal.*expected t_max <"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_GRIDS)
def test_errors_of_grids(name):
    make, message = BAD_GRIDS[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_errors_of_schedules():
    with pytest.raises(ValueError, match="n = 0; expected at least one"):
        uniform(Linear(), 0)
    with pytest.raises(ValueError, match="n = 0; expected at least one"):
        karras(0)
    with pytest.raises(ValueError, match=r"'linaer'; expected one of linear, cosine, edm, flow \(did you mean 'linear'"):
        schedules.get("linaer")
    for name in ("linear", "cosine", "edm", "flow"):
        assert schedules.get(name).name == name
    for bad in ([0.1, 0.0], [0.1, 1.0], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="betas has shape .* expected one number in \\(0, 1\\)"):
            Discrete(torch.tensor(bad))


@pytest.mark.parametrize(("sigma_min", "sigma_max"), [(5.0, 1.0), (1.0, 1.0), (-0.1, 1.0), (0.002, float("nan"))])
def test_impossible_levels_are_refused_by_name(sigma_min, sigma_max):
    with pytest.raises(ValueError, match="sigma_m.*expected"):
        karras(10, sigma_min, sigma_max)
