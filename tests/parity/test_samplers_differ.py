"""Where diffusers' schedulers differ from the papers, and which is nearer to the flow that both approximate.

The network is exact: the noise, sample or v of a mixture whose flow is known. Each test names one difference.
"""

import math

import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from course_lib.denoisers import discrete_of, from_eps
from course_lib.multistep import dpm_solver_pp_2m, dpm_solver_pp_3m, plms, unipc
from course_lib.sample import sample
from course_lib.schedules import Discrete, Schedule, exponential, linear_betas, scaled_linear_betas
from course_lib.singlestep import dpm_solver_3
from course_lib.worlds.toys import three_blobs
from tests.draws import normal
from tests.parity.tools import gap, levels_of, net, ready, theirs

F64 = torch.float64
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KARRAS, EXPONENTIAL, TO_MIN = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"final_sigmas_type": "sigma_min"}
FULL = {"lower_order_final": False}
BLOBS = three_blobs()


def exact(table: Schedule, prediction: str = "epsilon"):
    """The network that a mixture would have: its prediction from x_t = x / sqrt(1 + sigma^2) and the time of sigma."""

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        sigma = table.sigma(torch.as_tensor(float(t), dtype=F64))
        alpha = (1 + sigma**2).rsqrt()
        x = x_t.double() / alpha
        x0 = BLOBS.denoiser(x, sigma)
        eps = (x - x0) / sigma
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * (eps - sigma * x0)}[prediction].to(x_t)

    return model


def start_at(sigma: Tensor, n: int = 16) -> Tensor:
    return BLOBS.sample(n, torch.Generator().manual_seed(0), float(sigma))


def error(x: Tensor, start: Tensor, sigma: Tensor, end: Tensor) -> float:
    """Mean distance to where the exact flow carries the start."""
    return float((x - BLOBS.reference_flow(start, float(sigma), float(end), 1e-11)).norm(dim=1).mean())


# --- the rule ------------------------------------------------------------------------------------------------------------


def edm_errors(order: int, step, n: int, exact_steps: int) -> tuple[float, float]:
    """EDM's scheduler and our step on n geometric steps from 3 to 0.15; the first states are exact ones."""
    high, low = 3.0, 0.15
    scheduler = EDMDPMSolverMultistepScheduler(solver_order=order, lower_order_final=False)
    scheduler.set_timesteps(n + 1)
    levels = exponential(n, low, high, to_zero=False)
    scheduler.sigmas = torch.cat([levels, torch.zeros(1, dtype=F64)])  # its own last step, to 0, is not taken
    scheduler.set_begin_index(0)
    x = found = start = start_at(levels[0])
    memory = None
    for i, (t, sigma, sigma_next) in enumerate(zip(scheduler.timesteps, levels[:-1], levels[1:], strict=False)):
        if 0 < i <= exact_steps:
            x = found = BLOBS.reference_flow(start, high, float(sigma), 1e-13)
        share = 0.25 / (sigma**2 + 0.25)  # c_skip and c_out for sigma_data = 1/2
        output = (BLOBS.denoiser(x, sigma) - share * x) / (sigma * share.sqrt())
        x = scheduler.step(output, t, x).prev_sample
        found, memory = step(BLOBS.denoiser, found, sigma, sigma_next, memory)
    end = BLOBS.reference_flow(start, high, low, 1e-13)
    return float((x - end).norm(dim=1).mean()), float((found - end).norm(dim=1).mean())


def test_their_third_order_multistep_is_of_second_order():
    """D2 lacks the 2 of a second derivative. From exact starts: order 2 for 3, and 20 times the error at 256 steps.

    From a cold start both are of order 2, and theirs has the smaller constant here (3.3e-6 against 4.8e-6).
    """
    coarse, fine = (edm_errors(3, dpm_solver_pp_3m, n, 2) for n in (128, 256))
    # as in the table of orders: the next term of the error moves a measured order by less than 0.2, two orders differ by 1
    assert math.log2(coarse[0] / fine[0]) == pytest.approx(2, abs=0.2)
    assert math.log2(coarse[1] / fine[1]) == pytest.approx(3, abs=0.2)
    assert fine[0] > 15 * fine[1]
    second = edm_errors(2, dpm_solver_pp_2m, 64, 1)
    assert second[0] == pytest.approx(second[1], rel=1e-6)  # 2M is as published
    cold = edm_errors(3, dpm_solver_pp_3m, 256, 0)
    assert 0.5 < cold[0] / cold[1] < 2


def test_their_singlestep_third_order_composes_a_second_order_step():
    """Algorithm 5's second inner point takes phi(r2 h); theirs is a whole midpoint step, and r comes from the grid of t.

    On that grid the two differ little. With r1 = 1/3 and r2 = 2/3, which order 3 needs, Algorithm 5 has half the error.
    """
    options = {**SD, **TO_MIN, "algorithm_type": "dpmsolver", "solver_order": 3, "lower_order_final": False}
    scheduler = ready(DPMSolverSinglestepScheduler(**options), 84)
    levels = levels_of(scheduler)
    x = start_at(levels[0])
    run = theirs(scheduler, exact(discrete_of(scheduler)), x, levels[0], levels[-1])
    found = sample(BLOBS.denoiser, x, levels[::3], dpm_solver_3())
    assert error(run.x, x, levels[0], levels[-1]) > 1.5 * error(found, x, levels[0], levels[-1])


@pytest.mark.parametrize("n", [20, 50])
def test_pndm_mixes_v_across_levels(n):
    """It adds v of several levels and turns the sum into eps at the present one; eps must be mixed, as with prediction eps."""
    errors = {}
    for prediction in ("epsilon", "v_prediction"):
        scheduler = ready(PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1, prediction_type=prediction), n)
        times = scheduler.timesteps.unique().flip(0)
        alpha_bar = torch.cat([scheduler.alphas_cumprod[times], scheduler.final_alpha_cumprod.reshape(1)])
        levels = ((1 - alpha_bar) / alpha_bar).sqrt()
        x = start_at(levels[0], 64)
        run = theirs(scheduler, exact(discrete_of(scheduler), prediction), x, levels[0], levels[-1])
        errors[prediction] = error(run.x, x, levels[0], levels[-1])
        found = error(sample(BLOBS.denoiser, x, levels, plms()), x, levels[0], levels[-1])
        assert found == pytest.approx(errors["epsilon"], rel=1e-3)
    assert errors["v_prediction"] > 2 * errors["epsilon"]


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_pndm_strides_by_a_whole_number(spacing):
    """It moves by 1000 // n, whatever the spacing of its times: 150 steps that are 6.7 apart stride by 6, 600 by 1 for 1.67."""
    for n, times_worse in ((150, 10), (600, 200)):
        scheduler = ready(PNDMScheduler(**SD, skip_prk_steps=True, timestep_spacing=spacing), n)
        times = scheduler.timesteps.unique().flip(0)
        assert float(times.diff().double().mean().abs()) > 1000 // n + 0.6
        alpha_bar = torch.cat([scheduler.alphas_cumprod[times], scheduler.final_alpha_cumprod.reshape(1)]).unique()
        levels = ((1 - alpha_bar) / alpha_bar).sqrt()
        x = start_at(levels[0])
        run = theirs(scheduler, exact(discrete_of(scheduler)), x, levels[0], levels[-1])
        found = sample(BLOBS.denoiser, x, levels, plms())
        assert error(run.x, x, levels[0], levels[-1]) > times_worse * error(found, x, levels[0], levels[-1])


def test_unipc_lowers_its_order_at_any_number_of_steps():
    """Its documentation says under 15; the code lowers always, as at 40 steps. On its grid, even in t, that helps.

    The last steps of such a grid are long in lambda: 2.6e-2 against 6.3e-2 at full order. On a grid even in lambda
    full order is nearer.
    """
    errors = {}
    for lowered in (True, False):
        scheduler = ready(UniPCMultistepScheduler(**SD, **TO_MIN, solver_order=3, lower_order_final=lowered), 40)
        levels = levels_of(scheduler)
        x = start_at(levels[0], 64)
        run = theirs(scheduler, exact(discrete_of(scheduler)), x, levels[0], levels[-1])
        errors[lowered] = error(run.x, x, levels[0], levels[-1])
    assert error(sample(BLOBS.denoiser, x, levels, unipc(3)), x, levels[0], levels[-1]) == pytest.approx(errors[False], rel=1e-6)
    assert 2 * errors[True] < errors[False]
    even = exponential(40, float(levels[-1]), float(levels[0]), to_zero=False)
    assert error(sample(BLOBS.denoiser, x, even, unipc(3)), x, even[0], even[-1]) < errors[True]


def test_ipndm_begins_without_a_sample():
    """At its first level alpha = 0 and max(alpha, 1e-8) makes x0 = 0; the exact D there is the mean, (-0.23, 0.16)."""
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(20)
    x, mean = normal(4, 2), BLOBS.mean.expand(4, 2)
    after = scheduler.step(-mean, scheduler.timesteps[0], x).prev_sample  # v = -x0 where alpha = 0
    alpha, std = (float(values[1]) for values in (scheduler.alphas, scheduler.betas))
    assert gap(after, std * x) < 1e-6
    assert gap(after, alpha * mean + std * x) > 1e-3


# --- the times and the tables --------------------------------------------------------------------------------------------------

ROUNDS = {
    DPMSolverMultistepScheduler: True,
    DPMSolverSinglestepScheduler: True,
    UniPCMultistepScheduler: True,
    DEISMultistepScheduler: True,
    HeunDiscreteScheduler: False,
    LMSDiscreteScheduler: False,
    EulerDiscreteScheduler: False,
}


@pytest.mark.parametrize("kind", ROUNDS)
def test_which_round_the_times_of_a_karras_grid(kind):
    """Half of them tell the network a whole time, up to half a step off; the others interpolate in log sigma, as we do."""
    scheduler = ready(kind(**SD, **KARRAS), 20)
    levels = scheduler.sigmas[: len(scheduler.timesteps)]
    off = float((discrete_of(scheduler).t_of_sigma(levels) - scheduler.timesteps.double()).abs().max())
    assert (0.4 < off <= 0.5) if ROUNDS[kind] else off < 0.01


@pytest.mark.parametrize("n", [20, 40])
def test_rounded_times_cost_little(n):
    """A network told the rounded time gives the noise of another level; the end moves, by less than the rule's own error."""
    scheduler = ready(DPMSolverMultistepScheduler(**SD, **KARRAS, **TO_MIN), n)
    levels, table = levels_of(scheduler), discrete_of(scheduler)
    x = start_at(levels[0], 64)
    run = theirs(scheduler, exact(table), x, levels[0], levels[-1])
    found = sample(from_eps(exact(table), table.t_of_sigma), x, levels, dpm_solver_pp_2m)
    own = error(found, x, levels[0], levels[-1])
    assert 0 < float((run.x - found).norm(dim=1).mean()) < own / 2  # and so neither error is twice the other


@pytest.mark.parametrize(("options", "betas"), [({}, linear_betas()), (SD, scaled_linear_betas())])
def test_tables_in_float32_blur_the_least_noise(options, betas):
    """1 - alpha_bar cancels where alpha_bar is near 1: sigma at t = 0 is off by 8e-5 of itself with DDPM's table.

    Below 1 single precision rounds by up to 2^-25, which is a share 2^-25 / beta of 1 - alpha_bar = beta, half of it of sigma;
    without the cancellation some roundings of 2^-24 would be all, a tenth of what is seen.
    """
    alpha_bar = DPMSolverMultistepScheduler(**options).alphas_cumprod
    relative = (((1 - alpha_bar) / alpha_bar).sqrt().double() / Discrete(betas).sigma(torch.arange(1000.0)) - 1).abs()
    assert int(relative.argmax()) == 0
    assert 10 * 2**-24 < float(relative[0]) <= 2**-25 / (2 * float(betas[0])) + 2**-22


# --- the last step -----------------------------------------------------------------------------------------------------------

LAST_STEPS = {  # scheduler, options: whether a plain run ends in finite numbers
    "unipc bh1, to 0 as by default": (UniPCMultistepScheduler, {"solver_type": "bh1"}, False),
    "unipc bh2, to 0 as by default": (UniPCMultistepScheduler, {}, True),
    "unipc 3, karras to sigma_min": (UniPCMultistepScheduler, {"solver_order": 3, **FULL, **KARRAS, **TO_MIN}, False),
    "unipc 2, karras to sigma_min": (UniPCMultistepScheduler, {**KARRAS, **TO_MIN}, True),
    "2M, exponential to sigma_min": (DPMSolverMultistepScheduler, {**EXPONENTIAL, **TO_MIN}, True),
    "2M heun, exponential to sigma_min": (DPMSolverMultistepScheduler, {"solver_type": "heun", **EXPONENTIAL, **TO_MIN}, False),
    "3M, exponential to sigma_min": (DPMSolverMultistepScheduler, {"solver_order": 3, **EXPONENTIAL, **TO_MIN}, False),
    "edm 3M, to sigma_min": (EDMDPMSolverMultistepScheduler, {"solver_order": 3, **TO_MIN}, False),
    "deis 3, karras": (DEISMultistepScheduler, {"solver_order": 3, **KARRAS}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", LAST_STEPS)
def test_last_steps_of_no_or_infinite_length(name):
    """bh1 multiplies h = infinity by a sum of nothing, 0. Grids that already end at sigma_min get it once more: that step costs
    a call of the network, moves nothing, and at h = 0 a formula with 1 / h is not finite."""
    kind, options, finite = LAST_STEPS[name]
    scheduler = kind(**options)
    scheduler.set_timesteps(20)
    x = normal(4, 3).float() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    assert bool(torch.isfinite(x).all()) is finite
    last = float(scheduler.sigmas[-2] - scheduler.sigmas[-1])
    assert abs(last) < 1e-9 or float(scheduler.sigmas[-1]) == 0


def test_unipc_3_at_full_order_to_zero_is_refused():
    """Its Vandermonde matrix is singular where h is infinite; ours takes the first-order step there."""
    scheduler = UniPCMultistepScheduler(solver_order=3, lower_order_final=False)
    scheduler.set_timesteps(20)
    x = normal(4, 3)
    with pytest.raises(RuntimeError, match="singular"):
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t), t, x).prev_sample
    assert bool(torch.isfinite(sample(BLOBS.denoiser, start_at(torch.tensor(10.0)), levels_of(scheduler), unipc(3))).all())


def test_ipndm_keeps_every_evaluation():
    """Four are used; the list grows by one tensor of the size of x a step."""
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(20)
    x = normal(4, 3)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x).prev_sample
    assert len(scheduler.ets) == 20
