"""The course's grids against the levels that diffusers' schedulers visit, in the configurations of published models.

The tables are the schedulers' own, so that what remains is their float32: three operations of 2^-24 from alpha_bar to sigma
and one in the copy, or, in EDM's exponential grid, logarithms up to 6.2 that are rounded by 2^-22, three times.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch.testing import assert_close

from course_lib.denoisers import discrete_of
from course_lib.schedules import Discrete, exponential, karras, leading, linspace, log_snr, trailing, uniform
from tests.parity.tools import levels_of

F64 = torch.float64
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD_DDIM = {**SD, "steps_offset": 1, "set_alpha_to_one": False}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
KARRAS, EXPONENTIAL, TO_MIN = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"final_sigmas_type": "sigma_min"}
ROUNDINGS = 4 * 2**-22  # 9.5e-7


class Case(NamedTuple):
    scheduler: str
    options: Mapping[str, Any]
    ours: Callable[[Discrete, int], torch.Tensor]
    steps: tuple[int, ...] = (1, 4, 20, 25, 50)


def ends(table: Discrete) -> tuple[float, float]:
    return float(table.sigma(0.0)), float(table.sigma(table.t_max))


def spaced(spacing: str, **options: Any) -> dict[str, Any]:
    return {**SD, "timestep_spacing": spacing, **options}


CASES = {
    # named after who published with them
    "DDPM": Case("DDPMScheduler", {}, leading, (1000,)),
    "DDIM": Case("DDIMScheduler", {}, leading, (10, 20, 50, 100, 1000)),
    "Improved DDPM": Case("DDPMScheduler", {**COSINE, "timestep_spacing": "linspace"}, linspace, (25, 50, 100, 200, 1000)),
    "Stable Diffusion 1.5 (PLMS)": Case(
        "PNDMScheduler", {**SD_DDIM, "skip_prk_steps": True}, lambda table, n: leading(table, n, 1, to_zero=False), (4, 20, 50)
    ),
    "Stable Diffusion 2 (DDIM)": Case("DDIMScheduler", SD_DDIM, lambda table, n: leading(table, n, 1, to_zero=False)),
    "Stable Diffusion XL (Euler)": Case(
        "EulerDiscreteScheduler", spaced("leading", steps_offset=1), lambda table, n: leading(table, n, 1)
    ),
    "SDXL-Turbo (Euler ancestral)": Case("EulerAncestralDiscreteScheduler", spaced("trailing"), trailing, (1, 2, 3, 4)),
    "Lin et al.": Case("DDIMScheduler", spaced("trailing"), trailing),
    "DPM-Solver++(2M)": Case("DPMSolverMultistepScheduler", SD, lambda table, n: linspace(table, n, drop_lowest=True)),
    "DPM-Solver++(2M), as in SD 2": Case(
        "DPMSolverMultistepScheduler", spaced("leading", steps_offset=1), lambda table, n: leading(table, n, 1, drop_lowest=True)
    ),
    "DPM-Solver in log-SNR": Case("DPMSolverMultistepScheduler", {**SD, "use_lu_lambdas": True}, log_snr, (2, 20, 50)),
    "EDM": Case("EDMEulerScheduler", {}, lambda _, n: karras(n), (2, 18, 40)),
    # what else a scheduler can be told
    "DPM-Solver++(2M) to sigma_min": Case(
        "DPMSolverMultistepScheduler", {**SD, **TO_MIN}, lambda table, n: linspace(table, n, to_zero=False, drop_lowest=True)
    ),
    "DPM-Solver++(2S)": Case("DPMSolverSinglestepScheduler", SD, lambda table, n: linspace(table, n, drop_lowest=True), (20, 50)),
    "UniPC": Case("UniPCMultistepScheduler", SD, lambda table, n: linspace(table, n, drop_lowest=True)),
    "UniPC, leading to sigma_min": Case(
        "UniPCMultistepScheduler",
        spaced("leading", **TO_MIN),
        lambda table, n: leading(table, n, to_zero=False, drop_lowest=True),
    ),
    "UniPC, trailing to sigma_min": Case(
        "UniPCMultistepScheduler", spaced("trailing", **TO_MIN), lambda table, n: trailing(table, n, to_zero=False)
    ),
    "DEIS": Case("DEISMultistepScheduler", SD, lambda table, n: linspace(table, n, to_zero=False, drop_lowest=True)),
    "PNDM, linspace": Case("PNDMScheduler", spaced("linspace", skip_prk_steps=True, set_alpha_to_one=True), linspace, (4, 20)),
    "Heun, leading": Case("HeunDiscreteScheduler", spaced("leading"), leading, (2, 20, 50)),
    "LMS, trailing": Case("LMSDiscreteScheduler", spaced("trailing"), trailing),
    "DPM-Solver++(2M), karras": Case(
        "DPMSolverMultistepScheduler", {**SD, **KARRAS}, lambda table, n: karras(n, *ends(table)), (2, 20, 50)
    ),
    "UniPC, karras to sigma_min": Case(  # they repeat the last level, which is no step
        "UniPCMultistepScheduler",
        {**SD, **KARRAS, **TO_MIN},
        lambda table, n: karras(n - 1, *ends(table), to_zero=False),
        (3, 20),
    ),
    "Euler, exponential": Case(
        "EulerDiscreteScheduler", {**SD, **EXPONENTIAL}, lambda table, n: exponential(n, *ends(table)), (2, 20, 50)
    ),
    "EDM, exponential": Case("EDMEulerScheduler", {"sigma_schedule": "exponential"}, lambda _, n: exponential(n), (2, 18, 40)),
}  # fmt: skip


def visited(scheduler: Any, n: int) -> torch.Tensor:
    """The levels of an n-step run, each once: their `sigmas`, or those of their times and the one at which they end."""
    scheduler.set_timesteps(n)
    if hasattr(scheduler, "sigmas"):
        return levels_of(scheduler)
    table = discrete_of(scheduler)
    levels = table.sigma(scheduler.timesteps.double())
    last = 1 / float(getattr(scheduler, "final_alpha_cumprod", 1.0)) - 1
    return torch.cat([levels, levels.new_tensor([last]).sqrt()]).unique().flip(0)


def of_published(case: Case) -> tuple[Any, Discrete]:
    scheduler = getattr(diffusers, case.scheduler)(**case.options)
    return scheduler, None if case.scheduler.startswith("EDM") else discrete_of(scheduler)


@pytest.mark.parametrize(("name", "n"), [(name, n) for name, case in CASES.items() for n in case.steps])
def test_grids_are_the_levels_that_their_schedulers_visit(name, n):
    scheduler, table = of_published(CASES[name])
    assert_close(CASES[name].ours(table, n), visited(scheduler, n), rtol=ROUNDINGS, atol=0)


# --- where theirs differ -----------------------------------------------------------------------------------------------


DDIM = {name: diffusers.DDIMScheduler(timestep_spacing=name) for name in ("leading", "linspace", "trailing")}
TABLE = discrete_of(DDIM["leading"])


def times(spacing: str, n: int) -> list[int]:
    DDIM[spacing].set_timesteps(n)
    return DDIM[spacing].timesteps.tolist()


def ours(make: Callable[[Discrete, int], torch.Tensor], n: int) -> list[int]:
    return TABLE.t_of_sigma(make(TABLE, n)[:-1]).round().long().tolist()


@pytest.mark.parametrize("n", [*range(2, 101), 144, 176, 192, 199, 208, 233, 250, 333, 500, 656, 1000])
def test_their_times_are_ours_but_at_halves(n):
    """Steps of a rounded length meet a half only by luck, and then round to either side: one time off there, none elsewhere."""
    exact = {"linspace": [Fraction(999 * k, n - 1) for k in range(n)], "trailing": [Fraction(1000 * k, n) for k in range(n)]}
    assert times("leading", n) == ours(leading, n)
    for spacing, make in (("linspace", linspace), ("trailing", trailing)):
        off = [abs(a - b) for a, b in zip(times(spacing, n), ours(make, n), strict=False)]
        assert all(d <= (t.denominator == 2) for d, t in zip(off, exact[spacing], strict=True))


def test_their_trailing_times_can_leave_the_table():
    """numpy's arange from T to 0 in steps of T / n has n + 1 entries where its length rounds up: the last time is -1."""
    beyond = [n for n in range(1, 1001) if len(times("trailing", n)) > n]
    assert 61 in beyond and len(beyond) > 50
    assert times("trailing", 61)[-1] == -1 and len(ours(trailing, 61)) == 61


def test_one_step_of_their_linspace_starts_at_the_lowest_level():
    """numpy's linspace(0, 999, 1) is its start. One step from noise alone must start at the last time."""
    assert times("linspace", 1) == [0]
    assert ours(linspace, 1) == [999]


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"])
def test_k_diffusion_schedulers_read_linspace_between_the_entries(scheduler):
    """Times stay fractions there, and sigma is interpolated linearly; `uniform` interpolates log sigma.

    Between two entries whose logarithms are h apart the two differ by at most h^2 / 8 of sigma, to first order. Where
    (T - 1) / (n - 1) is whole, as for 28 steps, there is nothing to interpolate, and `linspace` is the same grid.
    """
    theirs = getattr(diffusers, scheduler)(**SD)
    table = discrete_of(theirs)
    logs = table.sigma(torch.arange(1000, dtype=F64)).log()
    assert_close(linspace(table, 28), visited(theirs, 28), rtol=ROUNDINGS, atol=0)
    found, grid = visited(theirs, 20), uniform(table, 20)
    t = torch.linspace(999, 0, 20, dtype=F64)
    h = logs[t.ceil().long()] - logs[t.floor().long()]
    gap = (found / grid)[:-1].log()
    assert bool((gap <= h**2 / 8 + ROUNDINGS).all() and (gap >= -ROUNDINGS).all())
    assert float(gap.max()) > 1e-5 and not torch.allclose(found, linspace(table, 20), rtol=1e-3)
