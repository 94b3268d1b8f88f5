"""The fast samplers against diffusers' schedulers: the same network, start, levels and times, clipping off.

Both are told the same times (checked). Where the scheduler computes in float64 the ends agree to its float64 rounding;
DPM-Solver multistep and Euler round each x to float32, and so agree to that.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from course_lib.denoisers import PREDICTIONS, NetworkDenoiser, discrete_of
from course_lib.multistep import deis, dpm_solver_pp_2m, dpm_solver_pp_3m, ipndm, lms, plms, unip, unipc
from course_lib.sample import sample
from course_lib.singlestep import dpm_solver_2, dpm_solver_pp_2s, heun
from course_lib.steps import ddim
from course_lib.types import Step
from tests.draws import normal
from tests.parity.tools import Network, Run, gap, in_turn, levels_of, net, ours, ready, theirs, tiny_unet
from tests.published import composed_third_order, halved_3m

F64 = torch.float64
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # Stable Diffusion's table
# Relative: float64; 20 roundings of x and of eps = (x - x0) / sigma to float32; times told in float32, to 2^-24.
DOUBLE, SINGLE, TIMES = 1e-12, 1e-5, 1e-9


def history(step: Step, n: int) -> Step:
    """The rule with no more than n earlier values."""
    return lambda D, x, s, s_next, memory=None: step(D, x, s, s_next, (memory or ())[:n])


def lowered(family: Callable[[int], Step], order: int, n: int) -> list[Step]:
    """lower_order_final: of order `order`, 2 in the last step but one and 1 in the last."""
    return [family(order)] * (n - 2) + [family(min(2, order)), family(1)]


class Blocks(NamedTuple):
    """Singlestep runs: a step of order p spans p of the scheduler's levels, whose inner ones fix r (in units of h)."""

    orders: Sequence[int]
    rule: Callable[..., Step]

    def on(self, levels: torch.Tensor) -> tuple[torch.Tensor, Step]:
        at, steps = [0], []
        for p in self.orders:
            start, end = at[-1], at[-1] + p
            h = (levels[start] / levels[end]).log()
            inner = [float((levels[start] / s).log() / h) for s in levels[start + 1 : end]]
            steps.append(self.rule(*inner) if inner else ddim)
            at.append(end)
        return levels[at], in_turn(steps, levels[at])


class Case(NamedTuple):
    scheduler: type
    step: Step | Sequence[Step] | Blocks
    options: Mapping[str, Any] = MappingProxyType({})
    steps: int = 20
    bound: float = DOUBLE


def third(predict: str) -> Callable[..., Step]:
    """Blocks of order 2 and 3 as published code has them."""
    second = dpm_solver_pp_2s if predict == "x0" else dpm_solver_2
    return lambda *r: second(*r) if len(r) == 1 else composed_third_order(*r, predict)


MULTI, SINGLE_STEP, UNIPC, EDM_MULTI = (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
)
NOISE, TO_MIN = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min"}
KARRAS, LEADING = {"use_karras_sigmas": True}, {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING, EXPONENTIAL = {"timestep_spacing": "trailing"}, {"use_exponential_sigmas": True}
FULL, LOWER = {"lower_order_final": False}, {"lower_order_final": True}

CASES = {
    "euler": Case(EulerDiscreteScheduler, ddim, bound=SINGLE),
    "euler, karras": Case(EulerDiscreteScheduler, ddim, {**SD, **KARRAS}, bound=SINGLE),
    "euler, leading": Case(EulerDiscreteScheduler, ddim, {**SD, **LEADING}, bound=SINGLE),
    "euler, trailing, to sigma_min": Case(EulerDiscreteScheduler, ddim, {**SD, **TRAILING, **TO_MIN}, bound=SINGLE),
    "heun": Case(HeunDiscreteScheduler, heun),
    "heun, karras": Case(HeunDiscreteScheduler, heun, {**SD, **KARRAS}),
    "heun, leading": Case(HeunDiscreteScheduler, heun, {**SD, **LEADING}),
    "heun, trailing": Case(HeunDiscreteScheduler, heun, {**SD, **TRAILING}),
    "2M": Case(MULTI, dpm_solver_pp_2m, bound=SINGLE),
    "2M, 10 steps": Case(MULTI, dpm_solver_pp_2m, SD, 10, SINGLE),
    "2M, karras": Case(MULTI, dpm_solver_pp_2m, {**SD, **KARRAS}, bound=SINGLE),
    "2M, trailing": Case(MULTI, dpm_solver_pp_2m, {**SD, **TRAILING}, bound=SINGLE),
    "2M, leading": Case(MULTI, dpm_solver_pp_2m, {**SD, **LEADING}, bound=SINGLE),
    "2M, to sigma_min": Case(MULTI, dpm_solver_pp_2m, {**SD, **TO_MIN}, bound=SINGLE),
    "2M, to sigma_min, 10 steps": Case(MULTI, [dpm_solver_pp_2m] * 9 + [ddim], {**SD, **TO_MIN}, 10, SINGLE),
    "2M, euler_at_final": Case(MULTI, [dpm_solver_pp_2m] * 19 + [ddim], {**SD, **TO_MIN, "euler_at_final": True}, 20, SINGLE),
    "2M, heun type": Case(MULTI, history(dpm_solver_pp_3m, 1), {"solver_type": "heun"}, bound=SINGLE),
    "3M": Case(MULTI, halved_3m(), {"solver_order": 3}, bound=SINGLE),
    "3M, karras": Case(MULTI, halved_3m(), {**SD, **KARRAS, "solver_order": 3}, bound=SINGLE),
    "3M, 10 steps": Case(MULTI, [halved_3m()] * 8 + [dpm_solver_pp_2m, ddim], {"solver_order": 3}, 10, SINGLE),
    "dpm-solver 1": Case(MULTI, ddim, {**NOISE, "solver_order": 1}, bound=SINGLE),
    "dpm-solver 2M": Case(MULTI, unip(2, "bh2", "eps"), {**NOISE}, bound=SINGLE),
    "dpm-solver 2M, heun type": Case(MULTI, deis(2), {**NOISE, "solver_type": "heun"}, bound=SINGLE),
    "dpm-solver 3M": Case(MULTI, halved_3m("eps"), {**NOISE, "solver_order": 3}, bound=SINGLE),
    "2S": Case(SINGLE_STEP, Blocks([2] * 9 + [1, 1], dpm_solver_pp_2s)),
    "2S, odd": Case(SINGLE_STEP, Blocks([2] * 10 + [1], dpm_solver_pp_2s), SD, 21),
    "2S, karras": Case(SINGLE_STEP, Blocks([2] * 9 + [1, 1], dpm_solver_pp_2s), {**SD, **KARRAS}),
    "dpm-solver-2": Case(SINGLE_STEP, Blocks([2] * 10, dpm_solver_2), {**NOISE, **FULL}),
    "dpm-solver-2, lower_order_final": Case(
        SINGLE_STEP, Blocks([2] * 9 + [1, 1], dpm_solver_2), {**SD, **NOISE, "lower_order_final": True}
    ),
    "dpm-solver-2, exponential": Case(SINGLE_STEP, Blocks([2] * 10, dpm_solver_2), {**SD, **NOISE, **EXPONENTIAL}, 21),
    "3S": Case(SINGLE_STEP, Blocks([3] * 6 + [2, 1], third("x0")), {"solver_order": 3}, 21),
    "dpm-solver-3": Case(SINGLE_STEP, Blocks([3] * 7, third("eps")), {**NOISE, **FULL, "solver_order": 3}, 21),
    "unipc-1": Case(UNIPC, unipc(1), {"solver_order": 1}),
    "unipc-2": Case(UNIPC, unipc(2), SD),
    "unipc-2, bh1": Case(UNIPC, unipc(2, "bh1"), {**SD, **TO_MIN, **FULL, "solver_type": "bh1"}),
    "unipc-2, karras": Case(UNIPC, unipc(2), {**SD, **KARRAS}),
    "unipc-2, trailing": Case(UNIPC, unipc(2), {**SD, **TRAILING}),
    "unipc-2 of the noise": Case(UNIPC, unipc(2, predict="eps"), {**TO_MIN, **FULL, "predict_x0": False}),
    "unipc-2 of the noise, bh1": Case(
        UNIPC, unipc(2, "bh1", "eps"), {**TO_MIN, **FULL, "predict_x0": False, "solver_type": "bh1"}
    ),
    "unipc-3": Case(UNIPC, lowered(unipc, 3, 20), {"solver_order": 3}),
    "unipc-3, bh1, 8 steps": Case(
        UNIPC, lowered(lambda p: unipc(p, "bh1"), 3, 8), {"solver_order": 3, "solver_type": "bh1", **TO_MIN}, 8
    ),
    "unipc-3, full order": Case(UNIPC, unipc(3), {"solver_order": 3, **TO_MIN, **FULL}),
    "unip-2": Case(UNIPC, unip(2), {"disable_corrector": list(range(20))}),
    "unip-3": Case(UNIPC, unip(3), {"disable_corrector": list(range(20)), "solver_order": 3, **TO_MIN, **FULL}),
    "deis-1": Case(DEISMultistepScheduler, deis(1), {"solver_order": 1}),
    "deis-2": Case(DEISMultistepScheduler, deis(2), SD),
    "deis-2, 10 steps": Case(DEISMultistepScheduler, [deis(2)] * 9 + [ddim], SD, 10),
    "deis-2, karras": Case(DEISMultistepScheduler, deis(2), {**SD, **KARRAS}),
    "deis-3": Case(DEISMultistepScheduler, deis(3), {"solver_order": 3}),
    "deis-3, leading": Case(DEISMultistepScheduler, deis(3), {**SD, **LEADING, "solver_order": 3}),
    "deis-3, 10 steps": Case(DEISMultistepScheduler, lowered(deis, 3, 10), {"solver_order": 3}, 10),
    "lms": Case(LMSDiscreteScheduler, lms(4)),
    "lms, karras": Case(LMSDiscreteScheduler, lms(4), {**SD, **KARRAS}),
    "lms, leading": Case(LMSDiscreteScheduler, lms(4), {**SD, **LEADING}),
    "edm euler": Case(EDMEulerScheduler, ddim, bound=SINGLE),
    "edm euler, exponential": Case(EDMEulerScheduler, ddim, {"sigma_schedule": "exponential"}, bound=SINGLE),
    "edm 2M": Case(EDM_MULTI, dpm_solver_pp_2m, bound=TIMES),
    "edm 2M, 10 steps, exponential": Case(EDM_MULTI, dpm_solver_pp_2m, {"sigma_schedule": "exponential"}, 10, TIMES),
    "edm 2M, euler_at_final": Case(
        EDM_MULTI, [dpm_solver_pp_2m] * 19 + [ddim], {"euler_at_final": True, "sigma_min": 0.01}, bound=TIMES
    ),
    "edm 3M": Case(EDM_MULTI, halved_3m(), {"solver_order": 3}, bound=TIMES),
}


def both(case: Case, prediction: str, model: Network, x: torch.Tensor, widen: bool = True) -> tuple[Run, Run]:
    """Their run and ours, from x sqrt(1 + sigma^2) at the scheduler's first level."""
    scheduler = ready(case.scheduler(prediction_type=prediction, **case.options), case.steps, widen)
    levels = levels_of(scheduler)
    start = x * (1 + levels[0].to(x) ** 2).sqrt()
    if isinstance(case.step, Blocks):
        levels, step = case.step.on(levels)
    else:
        step = case.step if callable(case.step) else in_turn(case.step, levels)
    with torch.no_grad():
        found = ours(scheduler, model, start, levels, step)
        return theirs(scheduler, model, start, levels[0], levels[-1]), found


def predictions(case: Case) -> list[str]:
    return ["epsilon"] if case.scheduler in (EDMEulerScheduler, EDM_MULTI) else list(PREDICTIONS)


@pytest.mark.parametrize(("name", "prediction"), [(n, p) for n, c in CASES.items() for p in predictions(c)])
def test_runs(name, prediction):
    expected, found = both(CASES[name], prediction, net, normal(4, 3))
    assert found.times == pytest.approx(expected.times, abs=1e-6)
    assert gap(found.x, expected.x) < CASES[name].bound


@pytest.mark.parametrize("name", CASES)
def test_runs_in_their_own_precision(name):
    """float32 throughout, the scheduler as it comes: float32's 6e-8 times the steps and what cancels in lambda' - lambda."""
    expected, found = both(CASES[name], "epsilon", net, normal(4, 3).float(), widen=False)
    assert found.x.dtype == expected.x.dtype == torch.float32
    assert gap(found.x, expected.x) < 1e-4


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["euler", "heun", "2M", "3M", "dpm-solver 2M", "2S", "dpm-solver-3", "unipc-2", "deis-3", "lms"])
def test_a_unet_runs_as_in_its_own_loop(name, prediction):
    unet = tiny_unet().to(F64)
    expected, found = both(CASES[name], prediction, lambda x, t: unet(x, t).sample, normal(2, 2, 8, 8))
    assert gap(found.x, expected.x) < CASES[name].bound


# --- PNDM and iPNDM, which have no table of sigma -----------------------------------------------------------------------------


def pndm_grid(scheduler: PNDMScheduler) -> torch.Tensor:
    """sigma at the times where steps start, then the last level; each once."""
    times = scheduler.timesteps
    if not scheduler.config.skip_prk_steps:
        times = torch.cat([times[:12:4], times[12:]])
    alpha_bar = torch.cat([scheduler.alphas_cumprod[times], scheduler.final_alpha_cumprod.double().reshape(1)]).unique()
    return ((1 - alpha_bar) / alpha_bar).sqrt()


PNDM = {
    "as in Stable Diffusion": {**SD, "skip_prk_steps": True, "steps_offset": 1},
    "without Runge-Kutta steps": {"skip_prk_steps": True},
    "to alpha_bar = 1": {"skip_prk_steps": True, "set_alpha_to_one": True},
    "with Runge-Kutta steps": {},
    "with Runge-Kutta steps, offset": {**SD, "steps_offset": 1, "set_alpha_to_one": True},
    "trailing": {**SD, "skip_prk_steps": True, "timestep_spacing": "trailing"},
}


@pytest.mark.parametrize("name", PNDM)
def test_pndm_runs(name):
    scheduler = ready(PNDMScheduler(**PNDM[name]), 20)
    grid, x = pndm_grid(scheduler), normal(4, 3)
    start = x * (1 + grid[0] ** 2).sqrt()
    step = plms() if scheduler.config.skip_prk_steps else plms(discrete_of(scheduler))
    found = ours(scheduler, net, start, grid, step)
    expected = theirs(scheduler, net, start, grid[0], grid[-1])
    idle = 21 - len(grid)  # their last step when the first entry of the table is both a level and the end
    assert idle == (name in ("without Runge-Kutta steps", "with Runge-Kutta steps"))
    assert found.times == pytest.approx(expected.times[: len(expected.times) - idle], abs=1e-6)
    assert gap(found.x, expected.x) < 1e-9  # their table's 1 - alpha_bar against ours of log alpha_bar


def test_ipndm_runs():
    """Its schedule is its own, std = sin^2(pi s / 2) and alpha = sqrt(1 - std^2), and it predicts v.

    It starts where alpha = 0, and takes x0 = 0 there; we start at sigma = 1e9, where a step differs by about 1e-9.
    """
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(20)
    scheduler.betas, scheduler.alphas = scheduler.betas.double(), scheduler.alphas.double()
    x = x_t = normal(4, 3)
    for t in scheduler.timesteps:
        x_t = scheduler.step(net(x_t, t), t, x_t).prev_sample
    sigmas = (scheduler.betas / scheduler.alphas).clamp_max(1e9)
    D = NetworkDenoiser(net, PREDICTIONS["v_prediction"], lambda s: scheduler.timesteps[(sigmas[:-1] - s).abs().argmin()])
    found = sample(lambda x, s: D(x, s) if s < 1e9 else 0 * x, x * sigmas[0], sigmas, ipndm())
    assert gap(found, x_t) < 1e-7
