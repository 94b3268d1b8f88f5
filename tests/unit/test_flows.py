"""Flow matching, reflow, straightness and slerp, against closed forms: mixtures, and the one Gaussian whose reflow is known."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib import zoo
from course_lib.denoisers import from_flow
from course_lib.flows import flow_grid, flow_matching_loss, flow_paths, reflow_pairs, slerp, straightness, velocity
from course_lib.gaussians import Mixture
from course_lib.likelihood import exact_log_likelihood
from course_lib.multistep import dpm_solver_pp_2m, unipc
from course_lib.schedules import EDM, Cosine, Flow, Linear
from course_lib.sdes import VE, VP, SubVP
from course_lib.singlestep import dpm_solver_2
from course_lib.steps import ddim, ddpm
from course_lib.training import denoising_loss
from course_lib.types import right
from course_lib.worlds.toys import three_blobs
from course_lib.zoo.recipes import reflow as recipe
from tests.draws import level, normal

F64 = torch.float64
SE = 4.5  # standard errors
BLOBS = three_blobs()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(t: float, n: int = 8, seed: int = 0) -> torch.Tensor:
    """Points of the blobs on the straight way to noise, in the flow's coordinates."""
    return Flow().add_noise(BLOBS.sample(n, generator(seed)), t, normal(n, 2, seed=seed + 1))


# --- the velocity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.02, 0.4, 0.9, 0.999])
def test_the_velocity_is_the_mean_of_eps_minus_x0_given_x_t(t):
    """Without D: (x0, eps) is a mixture in four dimensions, and x_t = (1 - t) x0 + t eps is an observation of it."""
    covs = torch.stack([torch.block_diag(C, torch.eye(2, dtype=F64)) for C in BLOBS.covs])
    both = Mixture(BLOBS.weights, torch.cat([BLOBS.means, torch.zeros(3, 2)], 1), covs)
    observe = torch.cat([(1 - t) * torch.eye(2, dtype=F64), t * torch.eye(2, dtype=F64)], 1)
    x_t = at(t)
    mean = torch.stack([both.posterior(observe, x, 0.0).mean for x in x_t])
    assert_close(velocity(BLOBS.denoiser, x_t, t), mean[:, 2:] - mean[:, :2], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE()], ids=lambda sde: sde.name)
def test_in_the_time_of_an_sde_it_is_the_drift_of_the_probability_flow(sde):
    """Flow matching's alpha' x0 + std' eps and ScoreSDE's f - g^2 score / 2 are one velocity."""
    for t in (0.05, 0.5, 0.95):
        x_t = sde.alpha(level(t)) * BLOBS.sample(8, generator(2), float(sde.sigma(level(t))))
        assert_close(velocity(BLOBS.denoiser, x_t, t, sde), sde.flow_drift(BLOBS.denoiser, x_t, level(t)), rtol=1e-8, atol=1e-8)


def test_a_denoiser_of_a_velocity_has_that_velocity():
    """from_flow and velocity undo one another, also where each row has its own time."""
    v = lambda x_t, t: torch.sin(x_t) * right(t, x_t) + x_t.flip(-1)
    t, x_t = torch.linspace(0.1, 0.9, 8, dtype=F64), at(0.5)
    assert_close(velocity(from_flow(v), x_t, t), v(x_t, t), rtol=1e-12, atol=1e-12)


def test_euler_in_t_is_ddim():
    """x_t + (t' - t) v, divided by 1 - t', is DDIM's x' at sigma' = t' / (1 - t')."""
    t, t_next = 0.7, 0.4
    moved = at(t) + (t_next - t) * velocity(BLOBS.denoiser, at(t), t)
    ours, _ = ddim(BLOBS.denoiser, at(t) / (1 - t), level(t / (1 - t)), level(t_next / (1 - t_next)))
    assert_close(moved / (1 - t_next), ours, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule, t", [(None, 1.0), (None, 0.0), (Linear(), 0.0), (Cosine(), 0.0), (SubVP(), 0.0)])
def test_the_velocity_at_an_end_is_refused(schedule, t):
    with pytest.raises(ValueError, match=f"t = {t:g} of the .* schedule leaves no signal or no noise; expected a time"):
        velocity(BLOBS.denoiser, at(0.5), t, schedule)
    with pytest.raises(ValueError, match=f"t = {t:g} "):
        velocity(BLOBS.denoiser, at(0.5), torch.tensor([0.5] * 7 + [t]), schedule)
    assert bool(torch.isfinite(velocity(BLOBS.denoiser, at(0.5), 1 - 1e-6)).all())
    assert bool(torch.isfinite(velocity(BLOBS.denoiser, at(0.5), 0.0, EDM())).all())  # sigma_min is above 0


# --- the loss ---------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_denoising_loss_in_another_time():
    v = lambda x_t, t: torch.cos(3 * x_t) - right(t, x_t) * x_t
    x0, eps, t = BLOBS.sample(64, generator(0)), normal(64, 2), torch.rand(64, generator=generator(1), dtype=F64)
    theirs = denoising_loss(from_flow(v), x0, t / (1 - t), eps, "flow")
    assert_close(flow_matching_loss(v, x0, eps, t).float(), theirs.float())  # that loss is fp32
    ends = torch.arange(64) % 2  # t = 0 and t = 1, where sigma is 0 and infinite
    x_t = torch.where(ends[:, None] == 1, eps, x0)
    expected = (v(x_t, ends.double()) - (eps - x0)).square().mean(1)
    assert_close(flow_matching_loss(v, x0, eps, ends), expected)


def test_matching_the_pairs_is_matching_the_velocity():
    """Conditional flow matching is flow matching and a constant (Lipman et al. 2023, Theorem 2): any w added to the exact
    velocity u costs E|w|^2 / d and no more. The differences have a mean of 0 within 4.5 standard errors; pairs of the flow's
    own, for which u is not the answer, are the control.
    """
    n = 20_000
    eps, t = normal(n, 2, seed=3), 0.02 + 0.96 * torch.rand(n, generator=generator(4), dtype=F64)
    u = lambda x_t, t: velocity(BLOBS.denoiser, x_t, t)
    w = lambda x_t, t: x_t - 0.5 * right(t, x_t)

    def excess(x0: torch.Tensor) -> float:
        """(loss of u + w) - (loss of u) - |w|^2 / d, in standard errors of its mean."""
        x_t = x0 + right(t, x0) * (eps - x0)
        more = flow_matching_loss(lambda x, t: u(x, t) + w(x, t), x0, eps, t) - flow_matching_loss(u, x0, eps, t)
        values = more - w(x_t, t).square().mean(1)
        return float(values.mean() / values.std() * n**0.5)

    assert abs(excess(BLOBS.sample(n, generator(5)))) < SE
    assert abs(excess(reflow_pairs(BLOBS.denoiser, eps, 20)[0])) > 3 * SE


def test_the_loss_names_bad_times():
    x0, eps, v = normal(4, 2), normal(4, 2), lambda x_t, t: x_t
    for t, said in (
        (torch.tensor(0.5), r"t has shape \(\); expected \(4,\), a time for each sample"),
        (torch.rand(4, 2), r"t has shape \(4, 2\); expected \(4,\)"),
        (torch.tensor([0.1, 0.5, 1.5, 0.0]), "t runs from 0 to 1.5; expected times from 0"),
        (torch.tensor([0.1, 0.5, -0.5, 0.0]), "t runs from -0.5 to 0.5"),
        (torch.tensor([0.1, 0.5, math.nan, 0.0]), "t runs from nan to nan"),
    ):
        with pytest.raises(ValueError, match=said):
            flow_matching_loss(v, x0, eps, t)


# --- paths and pairs ----------------------------------------------------------------------------------------------------------


def test_the_grid_is_even_in_t_and_runs_from_noise_to_data():
    """The millionth that is cut off at t = 1 is the whole difference from even times, and a hundredth of it for rounding."""
    assert_close(Flow().t_of_sigma(flow_grid(8)), torch.linspace(1, 0, 9, dtype=F64), rtol=0, atol=1.01e-6)
    assert len(flow_grid(1)) == 2 and float(flow_grid(1)[1]) == 0
    with pytest.raises(ValueError, match="n = 0; expected at least one step"):
        flow_grid(0)


def test_pairs_and_paths_end_where_the_exact_flow_does():
    """From sigma = 1e6 to 1e-6, beyond which the flow does not move by more than 1e-6. Euler has order 1; the default at least
    1.5 (it falls to order 1 in its first and its last step), and with its 100 steps the error is under 1e-3.
    """
    eps = normal(100, 2)
    exact = BLOBS.reference_flow(1e6 * eps, 1e6, 1e-6)

    def gap(n: int, **options) -> float:
        return float((reflow_pairs(BLOBS.denoiser, eps, n, **options)[0] - exact).norm(dim=1).mean())

    assert math.log2(gap(50, step=ddim) / gap(200, step=ddim)) / 2 == pytest.approx(1, abs=0.1)  # order 2 would give 2
    assert math.log2(gap(25) / gap(200)) / 3 > 1.5
    assert gap(100) < 1e-3
    times, paths = flow_paths(BLOBS.denoiser, eps, 50)
    assert times.shape == (51,) and paths.shape == (51, 100, 2)
    assert_close(paths[0], eps, rtol=2e-6, atol=0)
    x0, same = reflow_pairs(BLOBS.denoiser, eps, 50)
    assert torch.equal(paths[-1], x0) and torch.equal(same, eps)


def test_pairs_carry_no_gradient():
    weight = torch.tensor(0.3, requires_grad=True)
    x0, _ = reflow_pairs(from_flow(lambda x, t: weight * x), normal(4, 2), 5)
    assert not x0.requires_grad


# --- straightness -------------------------------------------------------------------------------------------------------------


def test_straightness_of_a_gaussians_flow_is_its_integral():
    """x_t = (1 - t) m + r(t) z with r^2 = (1 - t)^2 v + t^2, so S = z^2 (integral of r'^2 - (1 - s)^2) for each path.

    The integral by 10^5 midpoints. Averaging the velocity over intervals loses n^-2 of it, always from above.
    """
    m, s = 0.4, 0.3
    t = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    rate = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2).sqrt()
    exact = float((rate**2).mean()) - (1 - s) ** 2
    z = normal(5, 1)

    def measured(n: int) -> torch.Tensor:
        times = torch.linspace(1, 0, n + 1, dtype=F64)[:, None, None]
        paths = (1 - times) * m + ((1 - times) ** 2 * s**2 + times**2).sqrt() * z
        return straightness(times.flatten(), paths) / z[:, 0] ** 2

    lost = [exact - measured(n) for n in (100, 200)]
    assert bool((lost[1] > 0).all()) and float(lost[0].max()) < 1e-3 * exact
    assert_close(lost[0] / lost[1], torch.full_like(lost[0], 4), rtol=0.02, atol=0)
    gaussian = Mixture.gaussian([m], [[s**2]])
    assert_close(straightness(*flow_paths(gaussian.denoiser, z, 200)), exact * z[:, 0] ** 2, rtol=2e-3, atol=0)


def test_straightness_is_energy_less_the_energy_of_the_line():
    """E S = integral of E|v(x_t, t)|^2 - E|eps - x0|^2, where x_t may be drawn afresh at each t, since the flow keeps the
    densities of the straight lines that it was made of (Liu et al. 2023, Theorem 3.3). Both sides from draws of their own.
    """
    n = 4000
    eps = normal(n, 2, seed=6)
    times, paths = flow_paths(BLOBS.denoiser, eps, 100)
    own = straightness(times, paths) + (paths[0] - paths[-1]).square().sum(1)
    t = 1e-4 + (1 - 2e-4) * torch.rand(n, generator=generator(7), dtype=F64)
    x0 = BLOBS.sample(n, generator(8))
    x_t = x0 + right(t, x0) * (normal(n, 2, seed=9) - x0)
    fresh = velocity(BLOBS.denoiser, x_t, t).square().sum(1)
    error = math.hypot(float(own.std()), float(fresh.std())) / n**0.5
    assert abs(float(own.mean() - fresh.mean())) < SE * error


def test_only_a_straight_line_at_even_speed_is_straight():
    times, ends = torch.tensor([1.0, 0.6, 0.5, 0.0], dtype=F64), normal(2, 3, 1, 2)
    line = ends[0] + (1 - times)[:, None, None, None] * (ends[1] - ends[0])
    assert float(straightness(times, line).max()) < 1e-28
    uneven = ends[0] + ((1 - times) ** 2)[:, None, None, None] * (ends[1] - ends[0])
    assert float(straightness(times, uneven).min()) > 0
    for bad in (times.flip(0), times[:3], times[:, None], times[:1]):
        with pytest.raises(ValueError, match="expected two or more falling times, one for each state"):
            straightness(bad, line)


# --- reflow in closed form: a Gaussian ------------------------------------------------------------------------------------

M, S = 0.4, 0.5
GAUSSIAN = Mixture.gaussian([M], [[S**2]])


def straight(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The velocity of the pairs x0 = m + s eps: their lines do not cross, so x_t tells eps, and v = (1 - s) eps - m."""
    t = right(t, x_t)
    return (1 - S) * (x_t - (1 - t) * M) / ((1 - t) * S + t) - M


def test_the_pairs_of_a_gaussian_and_the_straight_flow_that_they_teach():
    eps = normal(50, 1)
    x0, _ = reflow_pairs(GAUSSIAN.denoiser, eps)
    assert_close(x0, M + S * eps, rtol=0, atol=1e-3)
    t = torch.rand(50, generator=generator(2), dtype=F64)
    assert float(flow_matching_loss(straight, M + S * eps, eps, t).max()) < 1e-28
    assert float(flow_matching_loss(straight, M + S * eps.flip(0), eps, t).mean()) > 0.1  # other pairs, another answer
    before, after = (straightness(*flow_paths(D, eps)).mean() for D in (GAUSSIAN.denoiser, from_flow(straight)))
    assert float(before) > 0.05 and float(after) < 1e-9


@pytest.mark.parametrize("step", [ddim, dpm_solver_2(), dpm_solver_pp_2m, unipc(2)], ids=["ddim", "dpm2", "2m", "unipc"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_any_number_of_steps_is_exact_on_a_straight_flow(step, n):
    """So is one step of any rule of the ODE, since D says the same x0 at every level of a path."""
    eps = normal(20, 1)
    x0, _ = reflow_pairs(from_flow(straight), eps, n, step)
    assert_close(x0, M + S * eps, rtol=0, atol=1e-5)  # sigma starts at 1e6, not at infinity


def test_a_straight_flow_has_a_likelihood():
    """The density of m + s eps, by the change of variables along the ODE. At sigma the flow stands at m + (s + sigma) eps, so
    that the prior's variance is s^2 + 2 s sigma_max above sigma_max^2.
    """
    x0, low, high = M + S * normal(20, 1), 0.01, 100.0
    exact = Mixture.gaussian([M], [[(S + low) ** 2]]).log_prob(x0)

    def gap(n: int) -> float:
        prior = {"data_mean": M, "data_var": S**2 + 2 * S * high}
        return float((exact_log_likelihood(from_flow(straight), x0, low, high, n, **prior).log_prob - exact).abs().max())

    # of order 4, so that nothing but the steps is left of the error; order 3 would give 8, order 5 would give 32, and a quarter
    # of 16 is halfway to the nearer
    assert gap(50) / gap(100) == pytest.approx(16, rel=0.25)
    assert gap(100) < 1e-4


def test_a_straight_flow_has_no_score():
    """(D - x) / sigma^2 is not grad log p of data with noise, and DDPM's sampler, which needs that, ends with another spread.

    D is linear, so that one ancestral step takes the variance V to A^2 V + s^2: no draws are needed.
    """
    D, sigma = from_flow(straight), level(0.7)
    x = normal(6, 1)
    assert float(((D(x, sigma) - x) / sigma**2 - GAUSSIAN.score(x, sigma)).abs().max()) > 0.1
    assert_close((GAUSSIAN.denoiser(x, sigma) - x) / sigma**2, GAUSSIAN.score(x, sigma))

    def spread(D, start: float) -> float:
        grid, variance = EDM(0.01, 100.0).sigma(torch.linspace(1, 0, 401, dtype=F64)), start
        for now, after in pairwise(grid):
            rows = ddpm(lambda x: x * 0)(D, torch.tensor([[0.0], [1.0]], dtype=F64), now, after)[0]
            fresh = after**2 * (now**2 - after**2) / now**2
            variance = float((rows[1] - rows[0]) ** 2 * variance + fresh)
        return variance**0.5

    assert spread(GAUSSIAN.denoiser, 100**2 + S**2) == pytest.approx(S, rel=0.02)
    assert abs(spread(D, (100 + S) ** 2) / S - 1) > 0.2


# --- reflow of trained networks ----------------------------------------------------------------------------------------------


def test_reflow_and_its_control_differ_in_the_pairs_alone():
    """The same draw gives the same eps and t, and the same points x0; shuffled, none stands with its own eps."""
    torch.manual_seed(0)
    first = recipe.VelocityMLP(2, 8, 1)
    (x0, eps, t), (x0_moved, eps_too, t_too) = (recipe.coupled(first, 0, shuffled)(generator(1)) for shuffled in (False, True))
    assert torch.equal(eps, eps_too) and torch.equal(t, t_too)
    assert_close(x0, reflow_pairs(from_flow(first), eps, recipe.PAIR_STEPS)[0], rtol=0, atol=1e-4)  # fp32 from sigma = 1e6
    assert torch.equal(x0.sort(0).values, x0_moved.sort(0).values)
    assert not bool((x0 == x0_moved).all(1).any())


@pytest.mark.parametrize("seed", range(3))
def test_reflow_straightens_and_saves_steps_by_its_pairs(seed):
    """The card's numbers, for each seed: flow matching comes to the exact flow's S; reflow divides it by 50 or more, the
    control leaves it. One step after reflow is nearer than eight before, and as near as the flow that it learned from ever
    comes, but for the distance of two exact sets. S is 1 to 3 % below the exact flow's,
    and the control's within 1.5 % of that: a tenth tells both from a reflowed S of nothing.
    """
    card = zoo.card("blobs-reflow")["metrics"]
    first, reflowed, shuffled = (card["seeds"][seed][part] for part in recipe.PARTS)
    gap = {part: card["seeds"][seed][part]["sliced_wasserstein"] for part in recipe.PARTS}
    assert first["straightness"] == pytest.approx(card["exact"]["straightness"], rel=0.1)
    assert first["straightness"] > 50 * reflowed["straightness"]
    assert shuffled["straightness"] == pytest.approx(first["straightness"], rel=0.1)
    assert gap["reflowed"]["1"] < gap["first"]["8"] and gap["reflowed"]["1"] < gap["first"]["1"] / 10
    assert gap["shuffled"]["1"] > 0.9 * gap["first"]["1"]
    assert abs(gap["reflowed"]["1"] - gap["first"]["end"]) < card["sliced_wasserstein_floor"]


def test_the_committed_weights_give_the_numbers_of_the_card():
    """Another processor rounds otherwise; that may not cost more than the distance that two exact sets have by chance."""
    card = zoo.card("blobs-reflow")["metrics"]
    fresh, before = recipe.measure(zoo.load("blobs-reflow", device="cpu")[1]["reflowed"]), card["seeds"][1]["reflowed"]
    assert fresh["straightness"] == pytest.approx(before["straightness"], abs=1e-4)
    for count, value in before["sliced_wasserstein"].items():
        assert abs(fresh["sliced_wasserstein"][count] - value) < card["sliced_wasserstein_floor"]


# --- slerp ----------------------------------------------------------------------------------------------------------------


def test_slerp_turns_at_even_speed_and_keeps_the_length():
    a, b = normal(6, 1, 4, 4), normal(6, 1, 4, 4, seed=1)
    b = b * right(a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1), b)
    angle = lambda u, w: torch.acos((u * w).flatten(1).sum(1) / (u.flatten(1).norm(dim=1) * w.flatten(1).norm(dim=1)))
    for share in (0.1, 0.5, 0.75):
        between = slerp(a, b, share)
        assert_close(between.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
        assert_close(angle(a, between), share * angle(a, b))
        assert_close(angle(between, b), (1 - share) * angle(a, b))


def test_slerp_is_the_published_formula_on_rows_of_any_length():
    """Song et al. 2021, Eq. 67; each row with its own share, as with the same number for all; fp32 stays fp32."""
    a, b, share = normal(5, 3), 2 * normal(5, 3, seed=1), torch.linspace(0, 1, 5)
    theta = torch.acos((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))
    s = share.double()
    expected = (((1 - s) * theta).sin()[:, None] * a + (s * theta).sin()[:, None] * b) / theta.sin()[:, None]
    found = slerp(a, b, share)
    assert_close(found, expected)
    assert torch.equal(found[0], a[0]) and torch.equal(found[-1], b[-1])
    assert_close(slerp(a, b, 0.25)[1], found[1])
    assert slerp(a.float(), b.float(), 0.5).dtype == torch.float32


def test_halfway_between_two_noises_is_noise_again_and_the_straight_line_is_too_short():
    """In d dimensions |z|^2 / d = 1 with deviation sqrt(2 / d); theta is near pi / 2, which costs slerp 1 / d."""
    n, d = 200, 4096
    a, b = normal(n, d), normal(n, d, seed=1)
    power = lambda z: float(z.square().mean())
    tolerance = SE * math.sqrt(2 / (n * d)) + 2 / d
    assert power(slerp(a, b, 0.5)) == pytest.approx(1, abs=tolerance)
    assert power((a + b) / 2) == pytest.approx(0.5, abs=tolerance)


def test_slerp_of_nearly_parallel_and_of_nearly_opposite_rows():
    a = normal(3, 8)
    assert_close(slerp(a, 2 * a, 0.25), 1.25 * a, rtol=1e-12, atol=0)
    for turn in (1e-3, 1e-5, 1e-7, 1e-9):  # on either side of where the straight line takes over
        b = a + turn * normal(3, 8, seed=1)
        assert float((slerp(a, b, 0.3) - (0.7 * a + 0.3 * b)).abs().max()) < turn**2 + 1e-15
    b = -a + 1e-4 * normal(3, 8, seed=1)
    halfway = slerp(a, b * (a.norm(dim=1) / b.norm(dim=1))[:, None], 0.5)  # nearly a right angle from either
    assert_close((halfway * a).sum(1) / a.norm(dim=1) ** 2, torch.zeros(3, dtype=F64), rtol=0, atol=1e-3)
    assert_close(halfway.norm(dim=1), a.norm(dim=1), rtol=1e-6, atol=0)


def test_slerp_names_what_is_wrong():
    a, b = normal(3, 4), normal(3, 4, seed=1)
    for args, said in (
        ((a, b[:2], 0.5), r"a has shape \(3, 4\) and b \(2, 4\); expected equal shapes"),
        ((a, b, 1.5), "share = 1.5; expected a number from 0 to 1"),
        ((a, b, torch.tensor([0.0, -0.1, 1.0])), "share = .*; expected a number from 0 to 1, or one for each of 3 rows"),
        ((a, b, torch.linspace(0, 1, 2)), "one for each of 3 rows"),
        ((a, b, math.nan), "share = nan"),
        ((a * torch.tensor([[1.0], [0.0], [1.0]]), b, 0.5), "a has a row of zeros"),
        ((a, b * 0, 0.5), "b has a row of zeros"),
        ((a, -2 * a, 0.5), "a and b have opposite rows"),
    ):
        with pytest.raises(ValueError, match=said):
            slerp(*args)
