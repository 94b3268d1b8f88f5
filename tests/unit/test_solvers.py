"""What every deterministic rule keeps: shapes of sigma, frames without noise, both directions, types, calls of D."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

from course_lib.gaussians import Mixture
from course_lib.integrals import data_weights, lagrange_weights, level_weights, noise_weights
from course_lib.multistep import deis, dpm_solver_pp_2m, dpm_solver_pp_3m, ipndm, lms, plms, unip, unipc
from course_lib.sample import sample
from course_lib.schedules import EDM, karras
from course_lib.singlestep import dpm_solver_2, dpm_solver_3, dpm_solver_pp_2s, heun
from course_lib.steps import ddim
from course_lib.types import Step, right
from tests.draws import normal

F64 = torch.float64


class Rule(NamedTuple):
    make: Callable[[], Step]
    calls: tuple[int, ...]  # of D in the first steps, then in each; the last entry is the step to sigma' = 0
    history: int = 0  # earlier evaluations that a full step uses


RULES = {
    "heun": Rule(lambda: heun, (2, 1)),
    "dpm_solver_2": Rule(dpm_solver_2, (2, 1)),
    "dpm_solver_3": Rule(dpm_solver_3, (3, 1)),
    "dpm_solver_pp_2s": Rule(dpm_solver_pp_2s, (2, 1)),
    "dpm_solver_pp_2m": Rule(lambda: dpm_solver_pp_2m, (1, 1), 1),
    "dpm_solver_pp_3m": Rule(lambda: dpm_solver_pp_3m, (1, 1), 2),
    "plms": Rule(plms, (2, 1, 1), 3),
    "plms with a schedule": Rule(lambda: plms(EDM(0.001, 200.0)), (4, 4, 4, 1, 1), 3),
    **{f"deis({p})": Rule(lambda p=p: deis(p), (1, 1), p - 1) for p in (1, 2, 3, 4)},
    **{f"lms({p})": Rule(lambda p=p: lms(p), (1, 1), p - 1) for p in (1, 2, 4)},
    **{f"ipndm({p})": Rule(lambda p=p: ipndm(p), (1, 1), p - 1) for p in (1, 2, 3, 4)},
    **{f"unip({p})": Rule(lambda p=p: unip(p), (1, 1), p - 1) for p in (1, 2, 3)},
    **{f"unipc({p})": Rule(lambda p=p: unipc(p), (1, 1), p) for p in (1, 2, 3)},
    "unipc(2, bh1)": Rule(lambda: unipc(2, "bh1"), (1, 1), 2),
    "unipc(3) of eps": Rule(lambda: unipc(3, predict="eps"), (1, 1), 3),
}
CASES = pytest.mark.parametrize("name", RULES)


def bend(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Some smooth nonlinear D, entry by entry, that depends on its level."""
    s = right(torch.as_tensor(sigma, dtype=F64), x)
    return torch.tanh(x / (1 + s)) + 0.3 * s / (1 + s)


def walk(step: Step, D, x: torch.Tensor, levels: list[torch.Tensor]) -> torch.Tensor:
    """The loop for levels of any shape."""
    memory = None
    for sigma, sigma_next in pairwise(levels):
        x, memory = step(D, x, sigma, sigma_next, memory)
    return x


def per_frame() -> list[torch.Tensor]:
    """Five levels for each of 2 x 3 frames: one without noise throughout, one that reaches 0 early, one that waits."""
    levels = (
        torch.tensor([[8.0, 0.0, 5.0], [3.0, 6.0, 2.0]], dtype=F64)
        * torch.tensor([1, 0.6, 0.3, 0.1, 0.04], dtype=F64)[:, None, None]
    )
    levels[3:, 0, 2] = 0.0  # at 0 one step before the others
    levels[4, 1, 0] = 0.0  # at 0 in the last
    levels[2, 1, 1] = levels[1, 1, 1]  # waits, then goes on
    return list(levels)


# --- shapes of sigma -----------------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("pick", [lambda s: s, lambda s: s[:, 0], lambda s: s[:, 2]], ids=["(B, T)", "(B,)", "(B,) to 0"])
def test_a_level_per_frame_is_a_run_per_frame(name, pick):
    """Whole runs with memory; each entry ends where it ends alone, with 0-d levels."""
    levels, x = [pick(s) for s in per_frame()], normal(2, 3, 4)
    found = walk(RULES[name].make(), bend, x, levels)
    assert bool(torch.isfinite(found).all())
    for at in torch.cartesian_prod(*(torch.arange(n) for n in levels[0].shape)).reshape(-1, levels[0].ndim).tolist():
        at = tuple(at)
        alone = walk(RULES[name].make(), bend, x[at], [s[at] for s in levels])
        assert_close(found[at], alone, rtol=1e-12, atol=1e-12)


@CASES
def test_frames_without_noise_pass_unchanged(name):
    levels, x = per_frame(), normal(2, 3, 4)
    found = walk(RULES[name].make(), bend, x, levels)
    assert torch.equal(found[0, 1], x[0, 1])
    after = walk(RULES[name].make(), bend, x, levels[:4])  # the frame that reached 0 early
    assert_close(found[0, 2], after[0, 2], rtol=0, atol=1e-14)


@CASES
def test_a_frame_that_waits_does_not_move(name):
    """sigma' = sigma with a full memory behind it: h = 0."""
    step, x, memory = RULES[name].make(), normal(2, 3, 4), None
    levels = [torch.full((2,), s, dtype=F64) for s in (8.0, 6.0, 4.5, 3.0, 2.0)]
    for sigma, sigma_next in pairwise(levels):
        x, memory = step(bend, x, sigma, sigma_next, memory)
    moved, after = step(bend, x, levels[-1], levels[-1] * torch.tensor([1.0, 0.5]), memory)
    corrected = after.x if hasattr(after, "x") else x  # UniC still corrects the point at which the frame stands
    assert torch.equal(moved[0], corrected[0])
    assert float((moved[1] - x[1]).abs().max()) > 0.1


# --- starts and ends -----------------------------------------------------------------------------------------------------


@CASES
def test_too_few_steps_start_low(name):
    """One step to 0 is D; from memory None every rule of one evaluation begins with DDIM; two steps are no error."""
    step, x = RULES[name].make(), normal(3, 2)
    one = sample(bend, x, torch.tensor([5.0, 0.0]), step)
    assert_close(one, bend(x, torch.tensor(5.0, dtype=F64)), rtol=0, atol=1e-12)
    if RULES[name].calls[0] == 1:
        first, _ = step(bend, x, torch.tensor(5.0, dtype=F64), torch.tensor(3.0, dtype=F64), None)
        expected, _ = ddim(bend, x, torch.tensor(5.0, dtype=F64), torch.tensor(3.0, dtype=F64))
        assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert bool(torch.isfinite(sample(bend, x, torch.tensor([5.0, 2.0, 0.0]), step)).all())


ORDER_KEPT_TO_ZERO = ("lms", "ipndm", "plms")


@CASES
def test_the_step_to_zero(name):
    """Rules in lambda give D itself at sigma' = 0; those in sigma extrapolate.

    UniPC of the noise gives x^c - sigma eps = D + (x^c - x): D moved as far as the corrector moved x.
    """
    last: list[torch.Tensor] = []

    def D(x, sigma):
        last.append(bend(x, sigma))
        return last[-1]

    end = sample(D, normal(3, 2), karras(6, 0.1, 10.0), RULES[name].make())
    if name == "unipc(3) of eps":
        assert 1e-4 < float((end - last[-1]).abs().max()) < 0.1
    elif name.startswith(ORDER_KEPT_TO_ZERO) and RULES[name].history:
        assert float((end - last[-1]).abs().max()) > 1e-4
    else:
        assert_close(end, last[-1], rtol=0, atol=1e-12)


@CASES
def test_calls_of_D_are_those_of_the_docstring(name):
    calls = []

    def D(x, sigma):
        calls[-1] += 1
        return bend(x, sigma)

    step, x, memory, grid = RULES[name].make(), normal(3, 2), None, karras(8, 0.1, 10.0)
    for sigma, sigma_next in pairwise(grid):
        calls.append(0)
        x, memory = step(D, x, sigma, sigma_next, memory)
    *first, end = RULES[name].calls
    assert calls == [*first, *[first[-1]] * (7 - len(first)), end]


@CASES
def test_memory_is_returned_and_not_hidden(name):
    """The same factory serves two interleaved runs; a step leaves the memory that it was given as it was."""
    step, grid = RULES[name].make(), karras(6, 0.1, 10.0)
    a, b = normal(3, 2), normal(3, 2, seed=1)
    memories, xs = [None, None], [a, b]
    for sigma, sigma_next in pairwise(grid):
        for i in (0, 1):
            x_before, memory_before = xs[i], memories[i]
            xs[i], memories[i] = step(bend, x_before, sigma, sigma_next, memory_before)
            again, _ = step(bend, x_before, sigma, sigma_next, memory_before)
            assert torch.equal(again, xs[i])
    assert torch.equal(xs[0], sample(bend, a, grid, RULES[name].make()))
    assert torch.equal(xs[1], sample(bend, b, grid, RULES[name].make()))


@CASES
def test_history_is_used_and_no_longer_than_its_order(name):
    rule = RULES[name]
    step, x, memory, kept = rule.make(), normal(3, 2), None, []
    for sigma, sigma_next in pairwise(karras(8, 0.1, 10.0)[:8]):
        x, memory = step(bend, x, sigma, sigma_next, memory)
        kept.append(len(memory.past if hasattr(memory, "past") else memory or ()))
    assert max(kept) == rule.history


# --- direction and type ----------------------------------------------------------------------------------------------------


@CASES
def test_round_trip(name):
    """Up a rising grid that starts above 0 and down again: back to the start, as near as 200 steps of the rule allow.

    On N(m, C) both ways are also compared with the closed flow. The bounds are those of a first-order rule on this
    grid, |error| < 0.03, which all keep, and 1e-3 for rules of second order and higher.
    """
    gaussian = Mixture.gaussian(torch.tensor([0.5, -1.0]), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
    rising = karras(200, 0.05, 5.0, to_zero=False).flip(0)
    x = gaussian.sample(16, torch.Generator().manual_seed(0), 0.05)
    up = sample(gaussian.denoiser, x, rising, RULES[name].make())
    back = sample(gaussian.denoiser, up, rising.flip(0), RULES[name].make())
    first_order = name in ("deis(1)", "lms(1)", "ipndm(1)", "unip(1)")
    bound = 0.03 if first_order else 1e-3
    assert float((up - gaussian.flow(x, 0.05, 5.0)).abs().max()) < 5 * bound  # in units of sigma = 5
    assert float((back - x).abs().max()) < bound


@CASES
def test_float32_stays_float32(name):
    """x in float32 with levels in float64, as `sample` hands them; close to the float64 run."""
    x, grid = normal(4, 2), karras(8, 0.05, 10.0)

    def D(x, sigma):
        assert sigma.dtype == F64
        return bend(x, sigma).to(x.dtype)

    single = sample(D, x.float(), grid, RULES[name].make())
    assert single.dtype == torch.float32
    assert_close(single.double(), sample(D, x, grid, RULES[name].make()), rtol=0, atol=3e-5)  # 8 steps of x about 10


# --- the same rule under two names, and the weights that they share ---------------------------------------------------------

SAME = {
    "UniP-2 with bh2 is DPM-Solver++(2M)": (unip(2), dpm_solver_pp_2m),
    "UniP-3 is DPM-Solver++(3M)": (unip(3), dpm_solver_pp_3m),
    "UniP-3 of the noise is DEIS-3": (unip(3, predict="eps"), deis(3)),
    "DEIS-1 is DDIM": (deis(1), ddim),
    "LMS-1 is DDIM": (lms(1), ddim),
    "iPNDM-1 is DDIM": (ipndm(1), ddim),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_rule_under_two_names(name):
    """Step by step from one memory, once it is full (UniP-3's second step is UniP-2)."""
    x, memory, (one, other) = normal(8, 2), None, SAME[name]
    for i, (sigma, sigma_next) in enumerate(pairwise(karras(9, 0.05, 10.0))):
        expected, _ = other(bend, x, sigma, sigma_next, memory)
        x, memory = one(bend, x, sigma, sigma_next, memory)
        if i > 1:
            assert_close(x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [3, 4])
def test_B_cancels_from_order_3_on(p):
    """bh1 and bh2 are one predictor once p - 1 values are at hand; before, and in UniC-1, they differ."""
    x, grid, memory = normal(8, 2), karras(9, 0.05, 10.0)[:9], None
    for i, (sigma, sigma_next) in enumerate(pairwise(grid)):
        ends = [unip(p, variant)(bend, x, sigma, sigma_next, memory) for variant in ("bh1", "bh2")]
        assert (float((ends[0][0] - ends[1][0]).abs().max()) < 1e-12) == (i != 1)  # i = 1: one earlier value, a_1 = 1/2
        x, memory = ends[0]
    for predict in ("x0", "eps"):
        runs = [sample(bend, normal(8, 2), grid, unipc(p, variant, predict)) for variant in ("bh1", "bh2")]
        assert float((runs[0] - runs[1]).abs().max()) > 1e-6


def test_a_lower_order_reads_the_memory_of_a_higher_one():
    """How a run ends at lower order: the last steps by the same rule of order 2, then 1."""
    x, grid = normal(8, 2), karras(9, 0.05, 10.0)
    for family in (deis, lms, unip, unipc):
        memory, y = None, x
        for sigma, sigma_next in pairwise(grid[:8]):
            y, memory = family(3)(bend, y, sigma, sigma_next, memory)
        low, _ = family(1)(bend, y, grid[7], grid[8], memory)
        if family is not unipc:
            assert_close(low, ddim(bend, y, grid[7], grid[8])[0], rtol=1e-12, atol=1e-12)
        high, _ = family(3)(bend, y, grid[7], grid[8], memory)
        assert float((low - high).abs().max()) > 1e-6


WEIGHTS = {  # the map, the variable of its polynomial, the measure of its integral over s in sigma
    "data": (data_weights, lambda s: -s.log(), lambda s, s_next: s_next / s**2),  # sigma' e^l dl = -sigma' ds / s^2
    "noise": (noise_weights, lambda s: s.log(), lambda s, s_next: -torch.ones_like(s)),
    "level": (level_weights, lambda s: s, lambda s, s_next: -torch.ones_like(s)),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("sigma_next", [0.9, 2.5])
def test_weights_integrate_polynomials(name, sigma_next):
    """Against Simpson's rule on 4,000 intervals, for every power of the variable up to the number of levels."""
    weights, variable, density = WEIGHTS[name]
    sigma, end = torch.tensor(1.7, dtype=F64), torch.tensor(sigma_next, dtype=F64)
    levels = [torch.tensor(s, dtype=F64) for s in (2.0, 3.1, 3.4)]
    s = torch.linspace(1.7, sigma_next, 4001, dtype=F64)
    simpson = torch.tensor([1.0, *[4.0, 2.0] * 1999, 4.0, 1.0], dtype=F64) * (sigma_next - 1.7) / 12000
    for n in (1, 2, 3):
        found = weights(sigma, end, levels[:n])
        for j in range(1, n + 1):
            power = lambda t, j=j: (variable(t) - variable(sigma)) ** j
            exact = -(simpson * density(s, end) * power(s)).sum()
            assert_close(sum(w * power(level) for w, level in zip(found, levels, strict=False)), exact, rtol=1e-10, atol=1e-12)


def test_weights_are_dropped_where_nodes_coincide():
    u = [torch.tensor([0.5, 0.5, 0.0], dtype=F64), torch.tensor([0.9, 0.5, 0.9], dtype=F64)]
    moments = [torch.full((3,), 0.1, dtype=F64), torch.full((3,), 0.02, dtype=F64)]
    first, second = lagrange_weights(u, moments)
    assert first.tolist()[1:] == second.tolist()[1:] == [0.0, 0.0]
    assert float(0.5 * first[0] + 0.9 * second[0]) == pytest.approx(0.1)
    assert lagrange_weights([], []) == []


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [deis, lms, ipndm, unip, unipc])
@pytest.mark.parametrize("order", [0, 5, -1, 2.0, "2"])
def test_a_bad_order_is_named(make, order):
    with pytest.raises(ValueError, match=rf"order = {order!r}; expected a whole number from 1 to 4"):
        make(order)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: unip(2, "bh3"), "variant = 'bh3'; expected 'bh1' or 'bh2'"),
        (lambda: unipc(2, "bh1", "v"), "predict = 'v'; expected 'x0' or 'eps'"),
        (lambda: dpm_solver_2(0.0), "r1 = 0.0; expected a fraction of the step, above 0 and at most 1"),
        (lambda: dpm_solver_3(0.5, 0.5), "r2 = 0.5; expected a fraction of the step, above 0.5 and at most 1"),
        (lambda: dpm_solver_pp_2s(1.5), "r = 1.5; expected"),
        (lambda: dpm_solver_2(math.nan), "r1 = nan; expected"),
    ],
)
def test_a_bad_option_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
