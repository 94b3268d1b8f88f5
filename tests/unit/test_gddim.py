"""gDDIM on CLD: its matrices against their equations, one datum in one step, a mixture against the exact flow."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from course_lib.devices import generator
from course_lib.gaussians import Mixture
from course_lib.gddim import CLD, gddim, push
from course_lib.worlds.toys import three_blobs

F64 = torch.float64
ONE_STEP = torch.tensor([1.0, 0.0], dtype=F64)
BLOBS = three_blobs()
DATUM = Mixture.gaussian(torch.tensor([0.7, -0.4]), torch.zeros(2, 2))


@pytest.fixture(scope="module")
def cld():
    return CLD()


def states(cld, data, rows, seed, t=1.0):
    """Exact draws of u at time t, (rows, 2, d)."""
    return cld.noised(data, t).sample(rows, generator(seed)).reshape(rows, 2, -1)


def squared(n):
    """n steps, even in sqrt(t), as in the paper."""
    return torch.linspace(1, 0, n + 1, dtype=F64) ** 2


def act(matrix, u):
    return torch.einsum("ij,bjd->bid", matrix, u)


def euler(cld, score, u, times):
    """The same flow by Euler's method: du/dt = F u - G G^T score / 2."""
    for t, t_next in pairwise(times.tolist()):
        u = u + (t_next - t) * (act(cld.F, u) - act(cld.GG, score(u, t)) / 2)
    return u


def apart(u, other):
    """Mean distance of the positions."""
    return float((u - other)[:, 0].norm(dim=1).mean())


# --- the process ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"beta": 2.0, "mass": 1.0, "gamma": 0.5, "width": 0.1}])
@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_mean_covariance_and_root_obey_their_equations(options, t):
    """Psi is exp(t F); d Sigma/dt = F Sigma + Sigma F^T + G G^T; dR/dt = F R + G G^T R^-T / 2; R R^T = L L^T = Sigma.

    Central differences of step h = 1e-4: error h^2 Y''' / 6, with Y''' up to rate^3 = 512 (beta / sqrt(M) = 8) near 1e-6 each,
    and more for small t, where R bends within t: 1e-3 there is far below the terms, which are of size 1 to 10.
    """
    cld, h = CLD(**options), 1e-4
    slope = lambda Y: (Y(t + h) - Y(t - h)) / (2 * h)
    if t == 1.0:
        slope = lambda Y: (3 * Y(t) - 4 * Y(t - h) + Y(t - 2 * h)) / (2 * h)  # R ends at 1
    assert_close(cld.psi(t, 0.2), torch.matrix_exp((t - 0.2) * cld.F), rtol=1e-12, atol=1e-12)
    S, R = cld.cov(t), cld.R(t)
    assert_close(slope(cld.cov), cld.F @ S + S @ cld.F.T + cld.GG, rtol=0, atol=1e-3)
    assert_close(slope(cld.R), cld.F @ R + cld.GG @ torch.linalg.inv(R).T / 2, rtol=0, atol=1e-3)
    assert_close(R @ R.T, S, rtol=0, atol=1e-11)
    assert_close(cld.L(t) @ cld.L(t).T, S, rtol=0, atol=1e-12)


def test_it_begins_at_the_data_and_ends_at_rest(cld):
    """x of deviation 1e-3 about the datum and v ~ N(0, gamma M), gamma M = 0.01; at the end N(0, 1) and N(0, M), up to
    Psi(1, 0) = e^-8 (1 + 8 ...), below 0.02, of the beginning."""
    first, last = cld.noised(DATUM, 0.0), cld.noised(DATUM, 1.0)
    assert_close(first.means[0], torch.tensor([0.7, -0.4, 0, 0], dtype=F64))
    assert_close(first.covs[0].diagonal(), torch.tensor([1e-6, 1e-6, 0.01, 0.01], dtype=F64), rtol=1e-9, atol=0)
    assert_close(last.means[0], torch.zeros(4, dtype=F64), rtol=0, atol=0.02)
    assert_close(last.covs[0], torch.diag(torch.tensor([1.0, 1, 0.25, 0.25], dtype=F64)), rtol=0, atol=0.02)


def test_the_noised_mixture_has_the_moments_of_the_process(cld):
    """Law of total covariance: mean Psi (E x0, 0), covariance Psi (Cov x0 in x) Psi^T + Sigma_t, at a time halfway."""
    law, Psi = cld.noised(BLOBS, 0.3), cld.psi(0.3, 0.0)
    assert_close(law.mean.reshape(2, 2), torch.outer(Psi[:, 0], BLOBS.mean))
    within = torch.einsum("i,j,de->idje", Psi[:, 0], Psi[:, 0], BLOBS.cov)
    noise = torch.einsum("ij,de->idje", cld.cov(0.3), torch.eye(2, dtype=F64))
    assert_close(law.cov.reshape(2, 2, 2, 2), within + noise)


# --- one datum ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1e-3, 0.1])
def test_one_datum_in_one_step(width):
    """A Dirac (of width 0.001) and a Gaussian: with R one step of any length is the exact flow. The defining term off, L or
    Euler's method, is off by thousands: back in time Psi grows by 4.8e4, which eps must cancel.

    R is known to 1e-13, and 1e-13 x 4.8e4 is 5e-9.
    """
    cld = CLD(width=width)
    score, u = cld.score(DATUM), states(cld, DATUM, 20, 1)
    exact = cld.flow(score, u, 1.0, 0.0, tolerance=1e-13)
    assert_close(gddim(cld, score, u, ONE_STEP), exact, rtol=0, atol=1e-8)
    assert apart(gddim(cld, score, u, ONE_STEP, cld.L), exact) > 1e3
    assert apart(euler(cld, score, u, ONE_STEP), exact) > 1
    assert_close(
        gddim(cld, score, u, torch.tensor([1.0, 0.6, 0.1], dtype=F64)), cld.flow(score, u, 1.0, 0.1, 1e-13), rtol=0, atol=1e-8
    )


def test_eps_stays_with_r_and_turns_with_l(cld):
    """Along the exact flow of one datum -R^T score is constant; -L^T score keeps its length and turns."""
    score, u = cld.score(DATUM), states(cld, DATUM, 5, 2)
    along = [(t, u if t == 1.0 else gddim(cld, score, u, torch.tensor([1.0, t], dtype=F64))) for t in (1.0, 0.7, 0.4, 0.1)]
    by_R, by_L = (torch.stack([-act(root(t).T, score(v, t)) for t, v in along]) for root in (cld.R, cld.L))
    assert_close(by_R, by_R[:1].expand_as(by_R), rtol=0, atol=1e-8)
    assert_close(by_L.norm(dim=2), by_R.norm(dim=2), rtol=0, atol=1e-8)
    assert float((by_L[1:] - by_L[:1]).norm(dim=2).mean()) > 0.5


@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.6), (0.3, 0.02), (0.2, 0.5)])
def test_the_integral_with_r_is_a_difference(cld, t, t_next):
    """R obeys an equation whose solution by variation of constants is R' = Psi R + integral; the integral is solved to 1e-10,
    and grows back in time as Psi does, here by at most 150."""
    assert_close(push(cld, lambda s: cld.R(s), t, t_next), push(cld, cld.R, t, t_next), rtol=0, atol=1e-7)


# --- a mixture ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_mixture_is_met_in_few_steps(cld, seed):
    """Three blobs, the mean distance of the ends from the exact flow. Measured: 0.45, 0.25, 0.13 for 10, 20, 50 steps; with L
    19, 2.5, 1.4, by Euler's method 12.7, 3.8, 1.1. A ratio of 5 is asked for."""
    score, u = cld.score(BLOBS), states(cld, BLOBS, 60, seed)
    exact = cld.flow(score, u, 1.0, 0.0, tolerance=1e-6)
    errors = []
    for n in (10, 20, 50):
        errors.append(apart(gddim(cld, score, u, squared(n)), exact))
        assert apart(gddim(cld, score, u, squared(n), cld.L), exact) > 5 * errors[-1]
        assert apart(euler(cld, score, u, squared(n)), exact) > 5 * errors[-1]
    assert errors[0] < 0.6 and all(more < fewer for fewer, more in pairwise(errors))


def test_it_is_of_first_order(cld):
    """Halved steps halve the error, once they are short: 2^0.8 to 2^1.2 times."""
    score, u = cld.score(BLOBS), states(cld, BLOBS, 40, 4)
    exact = cld.flow(score, u, 1.0, 0.0, tolerance=1e-7)
    half, whole = (apart(gddim(cld, score, u, squared(n)), exact) for n in (240, 120))
    assert 2**0.8 < whole / half < 2**1.2


def test_a_sample_does_not_change_with_its_batch(cld):
    score, u = cld.score(BLOBS), states(cld, BLOBS, 30, 5)
    assert_close(gddim(cld, score, u[3:5], squared(5)), gddim(cld, score, u, squared(5))[3:5], rtol=0, atol=1e-10)
    assert gddim(cld, lambda u, t: -u, u.float(), squared(2)).dtype == torch.float32


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("mass", -1.0), ("gamma", 0.0), ("width", 0.0)])
def test_a_process_without_extent_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} = {value}; expected a number > 0"):
        CLD(**{name: value})


@pytest.mark.parametrize(
    ("times", "shape", "message"),
    [
        ([1.0], (3, 2, 2), r"^times = \[1\.0\]; expected at least two times in \[0, 1\]"),
        ([1.5, 0.0], (3, 2, 2), r"^times = \[1\.5, 0\.0\]; expected at least two times"),
        ([1.0, 0.0], (3, 4), r"^u has shape \(3, 4\); expected \(B, 2, d\)"),
    ],
)
def test_wrong_times_and_states_are_named(cld, times, shape, message):
    with pytest.raises(ValueError, match=message):
        gddim(cld, cld.score(BLOBS), torch.zeros(shape, dtype=F64), torch.tensor(times))
