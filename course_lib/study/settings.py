"""What a `SamplerExplorer` compares: samplers with what they cost, grids with the same ends, a choice of them, and its run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from course_lib import schedules
from course_lib.multistep import deis, dpm_solver_pp_2m, dpm_solver_pp_3m, ipndm, lms, plms, unipc
from course_lib.singlestep import dpm_solver_2, dpm_solver_3, dpm_solver_pp_2s, heun
from course_lib.steps import ddim, ddim_eta
from course_lib.stochastic import dpm_solver_pp_sde_2m, dpm_solver_sde, edm_stochastic
from course_lib.types import Noise, Step


class Rule(NamedTuple):
    """A sampler of the menu: `make(noise, eta, steps)` is its step, a run costs `each * steps + more` calls of D.

    noise  "" where it draws none, "eta" where the share eta of it is chosen, "full" where it is not
    """

    make: Callable[[Noise, float, int], Step]
    each: int = 1
    more: int = 0
    noise: str = ""

    def steps(self, calls: int) -> int:
        """The most steps that this number of calls pays for, at least one."""
        return max(1, (calls - self.more) // self.each)


def _silent(step: Step, each: int = 1, more: int = 0) -> Rule:
    """A rule without noise."""
    return Rule(lambda noise, eta, steps: step, each, more)


CHURN = math.sqrt(2) - 1
"""The largest gamma of EDM's sampler (Karras et al. 2022, Algorithm 2); eta is the share of it."""

RULES: dict[str, Rule] = {
    "DDIM (Euler in σ)": _silent(ddim),
    "Heun (EDM)": _silent(heun, 2),
    "DPM-Solver-2": _silent(dpm_solver_2(), 2),
    "DPM-Solver-3": _silent(dpm_solver_3(), 3),
    "DPM-Solver++(2S)": _silent(dpm_solver_pp_2s(), 2),
    "DPM-Solver++(2M)": _silent(dpm_solver_pp_2m),
    "DPM-Solver++(3M)": _silent(dpm_solver_pp_3m),
    "UniPC-2": _silent(unipc(2)),
    "UniPC-3": _silent(unipc(3)),
    "DEIS-3": _silent(deis(3)),
    "PLMS (PNDM)": _silent(plms(), more=1),  # its first step takes two calls
    "iPNDM": _silent(ipndm()),
    "LMS-4": _silent(lms(4)),
    "DDIM with η (1: ancestral)": Rule(lambda noise, eta, steps: ddim_eta(eta, noise), noise="eta"),
    "DPM-Solver++ SDE": Rule(lambda noise, eta, steps: dpm_solver_sde(noise), 2, noise="full"),
    "DPM-Solver++(2M) SDE": Rule(lambda noise, eta, steps: dpm_solver_pp_sde_2m(noise), noise="full"),
    "EDM with churn γ = 0.41 η": Rule(
        lambda noise, eta, steps: edm_stochastic(noise, eta * CHURN * steps, steps), 2, noise="eta"
    ),
}
"""What the menu "sampler" offers."""

Grid = Callable[[int, float, float], Tensor]

TABLE = schedules.Discrete(schedules.scaled_linear_betas())
"""Stable Diffusion's levels, from 14.6 down to 0.029."""


def _even(schedule: schedules.Schedule) -> Grid:
    """The levels at times of `schedule` that are evenly spaced."""

    def grid(steps: int, low: float, high: float) -> Tensor:
        ends = schedule.t_of_sigma(torch.tensor([low, high], dtype=torch.float64)).tolist()
        return schedules.uniform(schedule, steps, *ends, to_zero=False)

    return grid


def _of_table(choose: Callable[[schedules.Discrete, int], Tensor]) -> Grid:
    """The levels of TABLE that `choose` takes, between high and low, and `low` in the place of 0."""

    def grid(steps: int, low: float, high: float) -> Tensor:
        levels = choose(TABLE, steps)
        return torch.cat([levels[(levels > low) & (levels <= high)], levels.new_tensor([low])])

    return grid


GRIDS: dict[str, Grid] = {
    "Karras": lambda steps, low, high: schedules.karras(steps, low, high, to_zero=False),
    "exponential (even in λ)": lambda steps, low, high: schedules.exponential(steps, low, high, to_zero=False),
    "even in σ": lambda steps, low, high: schedules.karras(steps, low, high, rho=1.0, to_zero=False),
    "even in t (linear β)": _even(schedules.Linear()),
    "even in t (cosine)": _even(schedules.Cosine()),
    "even in t (flow)": _even(schedules.Flow()),
    "leading (SD's table)": _of_table(lambda table, steps: schedules.leading(table, steps, offset=1)),
    "trailing (SD's table)": _of_table(schedules.trailing),
}
"""What the menu "grid" offers: (steps, low, high) -> (steps + 1,) levels down to low; all but those of a table from high."""


@dataclass(frozen=True)
class Setting:
    """A sampler of RULES, the calls of D that it may spend, a grid of GRIDS, its share of fresh noise, and a seed."""

    sampler: str
    calls: int
    grid: str
    eta: float
    seed: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Setting:
        """What the controls say; eta is 0 where the sampler does not read it, so that equal runs have equal settings."""
        return cls(**{**values, "eta": values["eta"] if RULES[values["sampler"]].noise == "eta" else 0.0})

    @property
    def rule(self) -> Rule:
        """The sampler."""
        return RULES[self.sampler]

    @property
    def steps(self) -> int:
        """As many as the calls pay for."""
        return self.rule.steps(self.calls)

    @property
    def noisy(self) -> bool:
        """Whether the run draws noise, so that its end is no function of its start."""
        return self.rule.noise == "full" or self.eta > 0

    def levels(self, low: float, high: float) -> Tensor:
        """The grid, (steps + 1,) float64, down to low."""
        return GRIDS[self.grid](self.steps, low, high)

    def step(self, noise: Noise) -> Step:
        """How to move; the step of a run, since it may count its steps."""
        return self.rule.make(noise, self.eta, self.steps)


@dataclass(frozen=True)
class Run:
    """A run in the plane: states (levels, n, 2) over sqrt(1 + sigma^2), their levels, calls of D, and what was measured.

    component (n,) gives the colours: of the exact ends (n, 2) where there are any, else of the ends that were reached.
    """

    scaled: np.ndarray
    sigmas: list[float]
    calls: int
    component: np.ndarray
    exact: np.ndarray | None
    said: str

    @property
    def ink(self) -> float:
        """Opacity of the paths: those with noise cross everywhere."""
        return 0.4 if self.exact is None else 0.8
