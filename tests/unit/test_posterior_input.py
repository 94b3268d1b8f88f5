"""What the solvers refuse, in one line; that they keep samples apart; that they stop where x diverges."""

import pytest
import torch

from course_lib.gaussians import Mixture
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.operators.base import LinearOperator, Matrix, Operator
from course_lib.posterior import (
    come_closer,
    ddnm_plus,
    ddrm,
    ddrm_jpeg,
    ddrm_start,
    ilvr,
    mixed_projection,
    null_space,
    repaint,
    replacement,
    snips,
    watched,
)
from course_lib.sample import sample
from course_lib.steps import ddim, ddpm
from tests import solver_laws
from tests.draws import level, noise_of, normal

F64 = torch.float64
A = Matrix(torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]], dtype=F64))
Y = torch.tensor([[0.3, -0.2]], dtype=F64)
PRIOR = Mixture.isotropic(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.5, 0.0]]), 0.4)
GRID = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.2, 0.0], dtype=F64)


class Squared(Operator):
    shape, out = (3,), (3,)

    def apply(self, x):
        return x**2


class NoSVD(LinearOperator):
    shape, out = (3,), (3,)

    def apply(self, x):
        return 2 * x


def solvers(noise, A=A, y=Y, sigma_y=0.1):
    """Every solver by name, as the Denoiser and the Step that it makes of an unconditional pair."""
    D = PRIOR.denoiser
    return {
        "replacement": lambda: (D, replacement(ddpm(noise), A, y, noise, sigma_y)),
        "repaint": lambda: (D, repaint(ddpm(noise), A, y, noise, 2, 2, sigma_y)),
        "mixed_projection": lambda: (D, mixed_projection(ddpm(noise), A, y, noise, 0.7)),
        "null_space": lambda: (null_space(D, A, y), ddpm(noise)),
        "ddnm_plus": lambda: (D, ddnm_plus(A, y, sigma_y, noise)),
        "ddrm": lambda: (D, ddrm(A, y, sigma_y, noise)),
        "snips": lambda: (D, snips(A, y, sigma_y, noise)),
    }


NAMES = list(solvers(noise_of(0)))
SPECTRAL = ["ddnm_plus", "ddrm", "snips"]
WITH_SIGMA_Y = ["replacement", "repaint", *SPECTRAL]


@pytest.mark.parametrize("name", NAMES)
def test_a_nonlinear_operator_is_refused_and_the_way_out_named(name):
    said = "replacement" if name == "repaint" else name  # which is built on it
    with pytest.raises(ValueError, match=f"A = Squared is not linear and {said} takes linear operators only.*ddrm_jpeg.*DPS"):
        solvers(noise_of(0), A=Squared(), y=torch.zeros(1, 3))[name]()


@pytest.mark.parametrize("name", NAMES)
def test_a_measurement_of_another_shape_or_not_finite_is_refused(name):
    with pytest.raises(ValueError, match=r"y has shape \(1, 3\); expected \(B, 2\) for Matrix"):
        solvers(noise_of(0), y=torch.zeros(1, 3))[name]()
    with pytest.raises(ValueError, match="not finite"):
        solvers(noise_of(0), y=Y * float("nan"))[name]()


@pytest.mark.parametrize("name", NAMES)
def test_measurements_of_another_batch_are_refused(name):
    D, step = solvers(noise_of(0), y=Y.repeat(2, 1))[name]()
    with pytest.raises(ValueError, match="y has 2 rows and x has 5; expected one for all samples or one for each"):
        step(D, normal(5, 3), level(1.0), level(0.5))


@pytest.mark.parametrize("name", WITH_SIGMA_Y)
@pytest.mark.parametrize("sigma_y", [-0.1, float("nan"), float("inf")])
def test_a_noise_level_of_the_measurement_that_is_none_is_refused(name, sigma_y):
    with pytest.raises(ValueError, match="sigma_y = .*; expected the measurement's standard deviation, a finite number >= 0"):
        solvers(noise_of(0), sigma_y=sigma_y)[name]()


@pytest.mark.parametrize("name", SPECTRAL)
def test_an_operator_without_an_svd_is_refused(name):
    with pytest.raises(ValueError, match="NoSVD has no singular value decomposition here"):
        solvers(noise_of(0), A=NoSVD(), y=torch.zeros(1, 3))[name]()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda n: snips(A, Y, 0.0, n), "sigma_y = 0; snips divides by it: .* use ddrm or null_space"),
        (lambda n: snips(A, Y, 0.1, n, c=0.0), "c = 0.0; expected a number > 0"),
        (lambda n: snips(A, Y, 0.1, n, steps=1.5), "steps = 1.5; expected a whole number >= 1"),
        (lambda n: ddrm(A, Y, 0.1, n, eta=1.1), "eta = 1.1; expected a number from 0 to 1"),
        (lambda n: ddrm(A, Y, 0.1, n, eta_b=-0.1), "eta_b = -0.1; expected a number from 0 to 1"),
        (lambda n: ddrm_jpeg(A, Y, n), "A = Matrix has no `decode`; expected an operator such as JPEG, or use ddrm"),
        (lambda n: ddrm_start(normal(2, 3), level(5.0), A, Y, -1.0), "sigma_y = -1.0"),
        (lambda n: repaint(ddpm(n), A, Y, n, jump=0), "jump = 0; expected a whole number >= 1"),
        (lambda n: repaint(ddpm(n), A, Y, n, resamplings=1.5), "resamplings = 1.5; expected a whole number >= 1"),
        (lambda n: mixed_projection(ddpm(n), A, Y, n, lam=1.2), "lam = 1.2; expected a number from 0 to 1"),
        (lambda n: ilvr(ddpm(n), A, torch.zeros(1, 2), n), r"reference has shape \(1, 2\); expected \(B, 3\)"),
        (lambda n: ilvr(ddpm(n), A, torch.zeros(1, 3), n, until=-1.0), "until = -1.0; expected a noise level >= 0"),
        (lambda n: come_closer(normal(2, 3), GRID, 0.0, n), "t0 = 0.0; expected a share of the grid's 5 steps"),
        (lambda n: come_closer(normal(2, 3), GRID, 0.05, n), "t0 = 0.05; .* leaves at least one"),
        (lambda n: watched(ddim, limit=0.0), "limit = 0.0; expected a number > 0"),
    ],
)
def test_values_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make(noise_of(0))


@pytest.mark.parametrize("name", SPECTRAL[:2])
def test_steps_that_add_noise_refuse_a_rising_grid(name):
    D, step = solvers(noise_of(0))[name]()
    with pytest.raises(ValueError, match="expected a falling grid"):
        step(D, normal(2, 3), level(0.5), level(1.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    solver_laws.samples_do_not_depend_on_their_batch(lambda noise, y: solvers(noise, y=y)[name](), Y, GRID)


@pytest.mark.parametrize("name", NAMES)
def test_x_keeps_its_type_and_a_level_each_is_the_level_of_all(name):
    solver_laws.x_keeps_its_type_and_a_level_each_is_the_level_of_all(lambda noise, y: solvers(noise, y=y)[name](), Y)


def test_an_edited_x_clears_the_solvers_history():
    """Two steps of DPM-Solver++(2M) under replacement are two first steps, whatever the memory that is handed on."""
    step = replacement(dpm_solver_pp_2m, A, Y, noise_of(2))
    x, memory = step(PRIOR.denoiser, normal(4, 3), level(2.0), level(1.0))
    assert memory is None
    free, kept = dpm_solver_pp_2m(PRIOR.denoiser, x, level(1.0), level(0.5))
    assert kept is not None
    far = replacement(dpm_solver_pp_2m, A, Y, noise_of(2), sigma_y=9.0)  # nothing is replaced, so nothing is stale
    again, memory = far(PRIOR.denoiser, x, level(1.0), level(0.5))
    assert torch.equal(again, free) and memory is not None


def test_divergence_is_stopped_where_it_happens():
    """SNIPS with steps far too long: without a watch the loop goes on until infinity, with it it names the level."""
    wild = snips(A, Y, 0.1, noise_of(3), c=5.0, steps=4)
    grid = torch.logspace(1, -2, 12, dtype=F64)
    with pytest.raises(FloatingPointError, match=r"x diverged in the step at sigma = 10: its largest entry is .*shorter steps"):
        sample(PRIOR.denoiser, 10 * normal(4, 3), grid, watched(wild, limit=20.0))
    calm = snips(A, Y, 0.1, noise_of(3), c=0.05, steps=4)
    plain = sample(PRIOR.denoiser, 10 * normal(4, 3), grid, calm)
    again = snips(A, Y, 0.1, noise_of(3), c=0.05, steps=4)
    assert torch.equal(sample(PRIOR.denoiser, 10 * normal(4, 3), grid, watched(again)), plain)


def test_a_value_that_is_no_number_is_stopped():
    def broken(D, x, sigma, sigma_next, memory=None):
        return x * torch.where(sigma < 1.0, torch.nan, 1.0), None

    with pytest.raises(FloatingPointError, match=r"x diverged in the step at sigma = 0.5"):
        sample(PRIOR.denoiser, normal(4, 3), GRID, watched(broken))
