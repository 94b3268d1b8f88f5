"""The order of each rule, measured on the flow of a mixture whose denoiser is exact.

The mean distance to the exact end falls as n^-p with n steps. Multistep rules start from exact states on levels before
the grid, so that the order is the rule's own; what a start of lower order costs has a test of its own.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

from course_lib.gaussians import Mixture
from course_lib.multistep import deis, dpm_solver_pp_2m, dpm_solver_pp_3m, ipndm, lms, plms, unip, unipc
from course_lib.sample import sample
from course_lib.schedules import EDM, Linear, Schedule
from course_lib.singlestep import dpm_solver_2, dpm_solver_3, dpm_solver_pp_2s, heun
from course_lib.steps import ddim, euler
from course_lib.types import Step
from course_lib.worlds.toys import three_blobs
from tests.published import composed_third_order, halved_3m

F64 = torch.float64
HIGH, LOW, POINTS = 3.0, 0.15, 32
BLOBS = three_blobs()


class Geometric(Schedule):
    """A time in which log sigma, and so log-SNR, is uniform; sigma(0) = LOW, sigma(1) = HIGH."""

    def alpha(self, t):
        return torch.ones_like(t)

    def std(self, t):
        return LOW * (HIGH / LOW) ** t


LOG_SNR, LEVEL, VP = Geometric(), EDM(LOW, HIGH, rho=1.0), Linear()


def grid_of(time: Schedule, n: int, before: int = 0) -> torch.Tensor:
    """n steps from HIGH to LOW, uniform in the time of a schedule, and the same spacing for `before` levels above."""
    first, last = (float(time.t_of_sigma(s)) for s in (HIGH, LOW))
    return time.sigma(last + (first - last) * torch.arange(n + before, -1, -1, dtype=F64) / n)


@pytest.fixture(scope="module")
def flow():
    """Points of the noised mixture at HIGH; the exact flow from there to any level, computed once for each."""
    start, known = BLOBS.sample(POINTS, torch.Generator().manual_seed(0), HIGH), {}

    def at(level: torch.Tensor) -> torch.Tensor:
        if float(level) not in known:
            known[float(level)] = BLOBS.reference_flow(start, HIGH, float(level), tolerance=1e-13)
        return known[float(level)]

    return at


def error(flow, step: Step, time: Schedule, n: int, before: int) -> float:
    """Mean distance to the exact end after n steps, with the memory that exact states on `before` levels leave."""
    grid, memory = grid_of(time, n, before), None
    for sigma, sigma_next in pairwise(grid[: before + 1]):
        _, memory = step(BLOBS.denoiser, flow(sigma), sigma, sigma_next, memory)
        if hasattr(memory, "x"):  # UniPC remembers where it corrected to: that too is made exact
            memory = memory._replace(x=flow(sigma))
    x = flow(grid[before])
    for sigma, sigma_next in pairwise(grid[before:]):
        x, memory = step(BLOBS.denoiser, x, sigma, sigma_next, memory)
    return float((x - flow(grid[-1])).norm(dim=1).mean())


class Rule(NamedTuple):
    make: Callable[[], Step]
    order: int
    before: int = 0
    time: Schedule = LOG_SNR
    finest: int | None = None

    @property
    def steps(self) -> int:
        """Of the finest grid; a rule of low order is asymptotic sooner."""
        return self.finest or {1: 64, 2: 128}.get(self.order, 256)


RULES = {
    "ddim": Rule(lambda: ddim, 1),
    "euler in the VP time": Rule(lambda: euler(VP), 1),
    "heun": Rule(lambda: heun, 2),
    "dpm-solver-2": Rule(dpm_solver_2, 2),
    "dpm-solver-2, r1 = 0.8": Rule(lambda: dpm_solver_2(0.8), 2),
    "dpm-solver-3": Rule(dpm_solver_3, 3),
    "dpm-solver-3, r1 = 1/4": Rule(lambda: dpm_solver_3(0.25), 3),
    "dpm-solver-3, r2 = 3/4": Rule(lambda: dpm_solver_3(0.5, 0.75), 2),  # order 3 needs r2 = 2/3
    "dpm-solver-3 as published code composes it": Rule(lambda: composed_third_order(1 / 3, 2 / 3, "eps"), 3),
    "dpm-solver++ (3S) as published code composes it": Rule(lambda: composed_third_order(1 / 3, 2 / 3, "x0"), 3),
    "dpm-solver++ (2S)": Rule(dpm_solver_pp_2s, 2),
    "dpm-solver++ (2M)": Rule(lambda: dpm_solver_pp_2m, 2, 1),
    "dpm-solver++ (3M)": Rule(lambda: dpm_solver_pp_3m, 3, 2),
    "plms": Rule(plms, 2, 3, VP, 256),
    "plms, uniform in sigma": Rule(plms, 4, 3, LEVEL, 1024),
    "plms with Runge-Kutta start": Rule(lambda: plms(VP), 2, 0, VP, 256),
}
for p in (1, 2, 3, 4):
    RULES[f"deis-{p}"] = Rule(lambda p=p: deis(p), p, p - 1)
    RULES[f"lms-{p}"] = Rule(lambda p=p: lms(p), p, p - 1)
    RULES[f"ipndm-{p}"] = Rule(lambda p=p: ipndm(p), min(p, 2), p - 1)
    RULES[f"ipndm-{p}, uniform in sigma"] = Rule(lambda p=p: ipndm(p), p, p - 1, LEVEL, 512 if p < 3 else 1024)
    for variant in ("bh1", "bh2") if p < 3 else ("bh2",):  # B(h) cancels from order 3 on
        for predict in ("x0", "eps"):
            name = f"{p} {variant} of {predict}"
            RULES[f"unip-{name}"] = Rule(lambda p=p, v=variant, f=predict: unip(p, v, f), p, p - 1)
            RULES[f"unipc-{name}"] = Rule(
                lambda p=p, v=variant, f=predict: unipc(p, v, f), p + 1, p, finest=512 if p == 3 else None
            )


def orders(flow, rule: Rule) -> list[float]:
    errors = [error(flow, rule.make(), rule.time, n, rule.before) for n in (rule.steps // 4, rule.steps // 2, rule.steps)]
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def check(flow, rule: Rule) -> None:
    """The order of the finest pair of grids is the claimed one, and so is already that of the pair before."""
    before, last = orders(flow, rule)
    assert last == pytest.approx(rule.order, abs=0.2), f"order {last:.2f}, claimed {rule.order}"
    assert before == pytest.approx(last, abs=0.2), f"not yet asymptotic: {before:.2f}, then {last:.2f}"


def test_the_reference_is_exact():
    """The solver of the exact ends, against the closed flow of one Gaussian: far below the smallest error compared, 3e-10."""
    gaussian = Mixture.gaussian(BLOBS.means[0], BLOBS.covs[0])
    x = gaussian.sample(POINTS, torch.Generator().manual_seed(0), HIGH)
    found = gaussian.reference_flow(x, HIGH, LOW, tolerance=1e-13)
    assert_close(found, gaussian.flow(x, HIGH, LOW), rtol=0, atol=1e-11)


def test_the_reference_is_the_rules_own_limit(flow):
    """On the mixture, where no flow is closed: UniPC-3 with 64 times 32 steps ends where the reference does."""
    found = sample(BLOBS.denoiser, flow(grid_of(LOG_SNR, 1)[0]), grid_of(LOG_SNR, 2048), unipc(3))
    assert float((found - flow(grid_of(LOG_SNR, 1)[-1])).norm(dim=1).mean()) < 1e-9


@pytest.mark.parametrize("name", RULES)
def test_order(name, flow):
    check(flow, RULES[name])


# --- what is not of its order is refused --------------------------------------------------------------------------------


def forgetful(step: Step) -> Step:
    """The rule without its history."""
    return lambda D, x, sigma, sigma_next, memory=None: step(D, x, sigma, sigma_next, None)


def untransferred(D, x, sigma, sigma_next, memory=None):
    """Heun's rule that evaluates the second slope at the first level."""
    slope = (x - D(x, sigma)) / sigma
    moved = x + (sigma_next - sigma) * slope
    return x + (sigma_next - sigma) * (slope + (moved - D(moved, sigma)) / sigma) / 2, None


WRONG = {
    "2M without history": Rule(lambda: forgetful(dpm_solver_pp_2m), 2, 1),
    "UniPC-2 without corrector": Rule(unip, 3, 1),
    "UniPC-1 without history": Rule(lambda: forgetful(unipc(1)), 2, 1),
    "3M as in published code": Rule(halved_3m, 3, 2),
    "3M of the noise as in published code": Rule(lambda: halved_3m("eps"), 3, 2),
    "Heun at one level": Rule(lambda: untransferred, 2),
    "DEIS-3 called 4": Rule(lambda: deis(3), 4, 3),
    "LMS-4 with weights of equal steps": Rule(lambda: ipndm(4), 4, 3),
    "DPM-Solver-3 off 2/3": Rule(lambda: dpm_solver_3(0.5, 0.75), 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_below_its_name_is_refused(name, flow):
    with pytest.raises(AssertionError, match="claimed"):
        check(flow, WRONG[name])


STARTS = {  # rule, its own order, its order from memory None
    "2M": (lambda: dpm_solver_pp_2m, 2, 2),
    "3M": (lambda: dpm_solver_pp_3m, 3, 2),
    "deis-4": (lambda: deis(4), 4, 2),
    "lms-4": (lambda: lms(4), 4, 2),
    "unipc-3": (lambda: unipc(3), 4, 3),
    "unipc-4": (lambda: unipc(4), 5, 3),
}


@pytest.mark.parametrize("name", STARTS)
def test_what_a_start_of_low_order_costs(name, flow):
    """The first step is DDIM, of local error h^2, or h^3 once UniC-1 has corrected it: that bounds the order of the run."""
    make, own, cold = STARTS[name]
    _, order = orders(flow, Rule(make, cold, finest=1024))
    assert order == pytest.approx(cold, abs=0.1)
    assert cold < own or name == "2M"  # whose first step has the local error that order 2 allows
