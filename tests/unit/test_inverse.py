"""The comparison of solvers on digits and scenes: what each may spend, what was chosen, and what the stored rows claim."""

import math
import statistics

import pytest
import torch

from course_lib import restoring
from course_lib.devices import SampleNoise
from course_lib.gaussians import Mixture
from course_lib.operators import BlockAverage, Blur, Grey, Mask, gaussian_kernel, measure
from course_lib.restoring import SETTINGS, SOLVERS, Task
from course_lib.zoo import inverse
from course_lib.zoo.inverse import measure as compared
from course_lib.zoo.inverse.problems import DENOISE, PROBLEMS, classical, posed
from tests.draws import normal

SHAPE = (1, 4, 4)
PRIOR = Mixture.gaussian(torch.zeros(16), 0.25 * torch.eye(16))
A = BlockAverage(SHAPE, 2)


def denoiser(calls):
    """The exact denoiser of N(0, 1/4), which counts."""

    def D(x, sigma):
        calls.append(len(x))
        return PRIOR.denoiser(x.flatten(1), sigma).reshape(x.shape)

    return D


def task(calls, n=6, sigma_y=0.1, noise=None):
    y = A(0.5 * normal(n, *SHAPE))
    return Task(denoiser(calls), A, y, sigma_y, 20, 0.01, 5.0, noise or SampleNoise(0))


@pytest.mark.parametrize(("name", "k"), [(name, k) for name in SETTINGS for k in range(4)])
def test_no_solver_spends_more_than_its_calls_at_any_setting(name, k):
    calls = []
    x = SOLVERS[name](task(calls), **SETTINGS[name][k])
    assert x.shape == (6, *SHAPE) and bool(x.isfinite().all())
    assert 15 <= len(calls) <= 20 or (name == "CCDF" and len(calls) == round(20 * SETTINGS[name][k]["t0"]))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_comes_nearer_to_the_measurement_than_the_prior(name):
    """Samples that do not look at y leave A x - y with the deviation of A (x - x0), 0.25 sqrt(2): each solver less than half.

    Not 0: y is nearly exact here, and who mixes y with noise down to its own level, or takes few levels, ends beside it.
    """
    given = task([], n=200, sigma_y=0.01)
    gap = float((A(SOLVERS[name](given)) - given.y).square().mean().sqrt())
    assert gap < 0.5 * 0.25 * 2**0.5


def test_a_sample_does_not_change_with_its_batch():
    many, few = (SOLVERS["DDRM"](task([], n)) for n in (6, 2))
    torch.testing.assert_close(many[:2], few, rtol=0, atol=1e-9)


def test_the_estimate_is_the_posteriors_mean_of_that_prior():
    given = task([], sigma_y=0.2)
    matrix = torch.stack([A(row.reshape(1, *SHAPE)).flatten() for row in torch.eye(16, dtype=torch.float64)], 1)
    for row, y in zip(given.estimate(), given.y, strict=True):
        exact = PRIOR.posterior(matrix, y.flatten(), 0.2).mean
        torch.testing.assert_close(row.flatten(), exact.to(row), rtol=0, atol=1e-6)


# --- problems -----------------------------------------------------------------------------------------------------------


BIG = (3, 16, 16)


@pytest.mark.parametrize("operator", [Mask.box(BIG, 4), BlockAverage(BIG, 4), Blur(gaussian_kernel(1.0), BIG), Grey(BIG)])
def test_classical_methods_restore_a_smooth_picture(operator):
    """Two waves around the edges in all colours, without noise: an error of a tenth of the range, and less than that of A^T y."""
    place = 2 * math.pi * torch.arange(16) / 16
    x = (0.5 * (place.cos() + place.cos()[:, None])).expand(1, 3, 16, 16).contiguous()
    y = measure(operator, x)
    plain, found = operator.adjoint(y), classical(operator, y, 0.0)
    assert found.shape == x.shape
    assert float((found - x).square().mean()) < min(0.04, float((plain - x).square().mean()))


def test_a_problem_is_posed_once_and_splits_differ():
    _, x0, y = posed("digits", "half", "validation")
    assert torch.equal(y, posed("digits", "half", "validation")[2])
    held = posed("digits", "half", "held out")[1]
    assert not (x0[:, None] == held[None]).flatten(2).all(2).any()


# --- what is stored ------------------------------------------------------------------------------------------------------


def over_seeds(world, problem, solver, key):
    rows = [row for row in inverse.rows("solvers") if (row["world"], row["problem"], row["solver"]) == (world, problem, solver)]
    assert [row["seed"] for row in rows] == list(compared.SEEDS)
    return [row[key] for row in rows if key in row]


def test_every_row_was_tuned_with_the_same_budget_on_other_pictures():
    tuned = {(row["world"], row["problem"], row["solver"]): row for row in inverse.rows("tuning")}
    assert len(tuned) == len(compared.keys())
    for (*_, solver), row in tuned.items():
        assert len(row["tried"]) == len(DENOISE) == 4
        best = max((one for one in row["tried"] if one["psnr"] is not None), key=lambda one: one["psnr"], default=None)
        assert row["chosen"] == (best and {name: best[name] for name in compared.settings(solver)[0]})
    for row in inverse.rows("solvers"):
        assert row["setting"] == tuned[row["world"], row["problem"], row["solver"]]["chosen"]
        assert row.get("calls", 0) <= compared.CALLS


@pytest.mark.parametrize("problem", ["super-resolution", "deblurring"])
def test_a_model_beats_the_classical_method_by_two_decibels(problem):
    """On 64 held-out scenes at sigma_y = 0.05, on each of three seeds: the mean of DDRM's three samples."""
    plain = statistics.mean(over_seeds("scenes", problem, "classical", "psnr"))
    assert min(over_seeds("scenes", problem, "DDRM", "psnr_of_mean")) > plain + 2


def test_in_a_hole_a_model_is_nearer_as_a_set():
    """The posterior is broad there; the classical filling paints its mean, and is nearer in PSNR."""
    plain = min(over_seeds("scenes", "box", "classical", "frechet"))
    assert max(over_seeds("scenes", "box", "mixed projection", "frechet")) < plain / 1.3


def test_through_the_networks_jacobian_scattered_pixels_beat_a_smooth_filling():
    """On both counts and each seed, where the methods that overwrite lose on both."""
    plain = {key: statistics.mean(over_seeds("scenes", "random", "classical", key)) for key in ("psnr", "frechet")}
    for solver, wins in (("PiGDM", True), ("DDRM", False), ("replacement", False)):
        means, sets = (over_seeds("scenes", "random", solver, key) for key in ("psnr_of_mean", "frechet"))
        assert all((mean > plain["psnr"] + 0.5) is wins for mean in means), solver
        assert all((distance < plain["frechet"]) is wins for distance in sets), solver


def test_snips_gains_decibels_at_its_published_count():
    """2,500 calls for 20, on each seed. The mean PSNR of eight pictures is known to about 1 dB, and the gain is above 3."""
    runs = inverse.rows("published SNIPS")
    assert {row["calls"] for row in runs} == {2500} and len(runs) == 2 * len(compared.SEEDS)
    for row in runs:
        assert row["psnr"] > max(over_seeds("scenes", row["problem"], "SNIPS", "psnr")) + 3


def test_a_pass_back_through_the_network_takes_several_times_the_memory():
    """Of a step without one: the graph holds the activations of all layers, which else are let go one by one."""
    held = {row["solver"]: row["megabytes"] for row in inverse.rows("memory")}
    assert set(held) == set(SETTINGS) - {"ILVR"}
    guided = ("DPS", "PiGDM", "MCG")
    assert min(held[name] for name in guided) > 3 * max(held[name] for name in held if name not in guided)


def test_dividing_by_a_blurs_singular_values_diverges():
    """Replacement by A^+ multiplies noise by 1 / s; DDRM, which weighs s, does not mind."""
    assert over_seeds("scenes", "deblurring", "replacement", "psnr") == []
    assert len(over_seeds("scenes", "deblurring", "DDRM", "psnr")) == 3
    with pytest.raises(FloatingPointError, match="x diverged in the step at sigma"):
        compared.restore("scenes", "deblurring", "mixed projection", {"lam": 1.0}, "validation", 0)


@pytest.mark.parametrize("problem", ["super-resolution", "deblurring"])
def test_ccdf_improves_an_estimate_with_a_third_of_the_calls(problem):
    """It starts from the linear estimate; how little a third of the calls loses, at the same spacing, is the lecture's claim."""
    short = over_seeds("scenes", problem, "CCDF", "psnr")
    assert min(short) > statistics.mean(over_seeds("scenes", problem, "classical", "psnr"))
    assert max(over_seeds("scenes", problem, "CCDF", "calls")) <= compared.CALLS / 3


def test_solvers_are_those_of_the_table():
    assert set(compared.NAMES) == {"classical", *SETTINGS} and set(SETTINGS) < set(restoring.SOLVERS)
    assert {solver for solver in SOLVERS if solver not in SETTINGS} == {"DDNM"}
    assert len({world for world, _ in PROBLEMS}) == 2
