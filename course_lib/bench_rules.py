"""Every rule that `sample` can walk by, as the benchmark `rules` runs it, and diffusers' scheduler for the same rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from course_lib.adaptive import sample_adaptive
from course_lib.denoisers import Counted
from course_lib.devices import SampleNoise
from course_lib.langevin import predictor_corrector
from course_lib.multistep import deis, dpm_solver_pp_2m, dpm_solver_pp_3m, ipndm, lms, plms, unip, unipc
from course_lib.sample import sample
from course_lib.schedules import Flow, Linear, karras
from course_lib.sdes import VP, euler_maruyama
from course_lib.singlestep import dpm_solver_2, dpm_solver_3, dpm_solver_pp_2s, heun
from course_lib.steps import ddim, ddim_eta, ddpm, euler
from course_lib.stochastic import dpm_solver_pp_sde_2m, dpm_solver_sde, edm_stochastic, reverse_diffusion
from course_lib.types import Denoiser, Noise, Step

LOW, HIGH = 0.02, 15.0
Rule = Callable[[Noise], Step]

RULES: dict[str, Rule] = {
    "ddim": lambda noise: ddim,
    "ddim_eta": lambda noise: ddim_eta(1.0, noise),
    "ddpm": ddpm,
    "euler": lambda noise: euler(Linear()),
    "heun": lambda noise: heun,
    "dpm_solver_2": lambda noise: dpm_solver_2(),
    "dpm_solver_3": lambda noise: dpm_solver_3(),
    "dpm_solver_pp_2s": lambda noise: dpm_solver_pp_2s(),
    "dpm_solver_pp_2m": lambda noise: dpm_solver_pp_2m,
    "dpm_solver_pp_3m": lambda noise: dpm_solver_pp_3m,
    "deis": lambda noise: deis(3),
    "lms": lambda noise: lms(4),
    "ipndm": lambda noise: ipndm(4),
    "plms": lambda noise: plms(),
    "unip": lambda noise: unip(3),
    "unipc": lambda noise: unipc(3),
    "reverse_diffusion": reverse_diffusion,
    "edm_stochastic": lambda noise: edm_stochastic(noise, 40.0, 100),
    "dpm_solver_pp_sde_2m": dpm_solver_pp_sde_2m,
    "dpm_solver_sde": dpm_solver_sde,
    "predictor_corrector": lambda noise: predictor_corrector(reverse_diffusion(noise), noise, 0.16),
    "euler_maruyama": lambda noise: euler_maruyama(VP(), noise),
}
"""The public rules by their names, each at the order at which it is used."""


def in_samplers(D: Denoiser, x: Tensor, steps: int) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Each rule in `sample`, and the adaptive loop, from x at level HIGH: name, a run, and the calls of D that it makes."""
    grid = karras(steps, LOW, HIGH)
    for name, make in RULES.items():
        step = make(SampleNoise(0))
        sample(counted := Counted(D), x, grid, step)
        yield name, lambda step=step: sample(D, x, grid, step), counted.calls

    def adaptive(D: Denoiser) -> Any:
        # each run with its own stream, from its start: the noise decides how many calls it takes
        return sample_adaptive(D, x, HIGH, HIGH / 2, SampleNoise(0), rtol=0.5, first=0.1)

    adaptive(counted := Counted(D))
    yield "sample_adaptive", lambda: adaptive(D), counted.calls


# --- beside diffusers ------------------------------------------------------------------------------------------------

Walk = Callable[[Any, Tensor, Tensor, torch.Generator], int]
"""(scheduler, the network's output, x, generator): a run of its step on one stored output; returns how many it took."""


def _steps(draws: bool = False, **options: Any) -> Walk:
    def walk(scheduler: Any, out: Tensor, x: Tensor, generator: torch.Generator) -> int:
        extra = {**options, "generator": generator} if draws else options
        for t in scheduler.timesteps:
            x = scheduler.step(out, t, x, return_dict=False, **extra)[0]
        return len(scheduler.timesteps)

    return walk


def _score_sde(scheduler: Any, out: Tensor, x: Tensor, generator: torch.Generator) -> int:
    for t in scheduler.timesteps:
        x = scheduler.step_pred(out, t, x, generator, return_dict=False)[0]
    return len(scheduler.timesteps)


def _score_sde_corrected(scheduler: Any, out: Tensor, x: Tensor, generator: torch.Generator) -> int:
    for t in scheduler.timesteps:
        x = scheduler.step_correct(out, x, generator, return_dict=False)[0]
        x = scheduler.step_pred(out, t, x, generator, return_dict=False)[0]
    return 2 * len(scheduler.timesteps)


def _churned(scheduler: Any, out: Tensor, x: Tensor, generator: torch.Generator) -> int:
    levels = torch.cat([scheduler.schedule, scheduler.schedule.new_zeros(1)])
    for sigma, sigma_next in pairwise(levels):
        x, raised = scheduler.add_noise_to_input(x, sigma, generator)
        moved, slope = scheduler.step(out, raised, sigma_next, x, return_dict=False)
        if sigma_next > 0:
            moved = scheduler.step_correct(out, raised, sigma_next, x, moved, slope, return_dict=False)[0]
        x = moved
    return 2 * len(levels) - 3


class Peer(NamedTuple):
    """A rule of ours, and the scheduler of diffusers that has it, told to take the network's output for x0 where it can."""

    ours: Rule
    scheduler: str
    options: dict[str, Any]
    walk: Walk = _steps()
    limit: float | None = 1.0


X0 = {"prediction_type": "sample"}
UNCLIPPED = {**X0, "clip_sample": False}
NOISE_FORM = {**X0, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "lower_order_final": True}
NO_CORRECTOR = {"disable_corrector": list(range(100))}

PEERS: dict[str, Peer] = {
    "ddim": Peer(RULES["ddim"], "DDIMScheduler", UNCLIPPED),
    "ddim as Euler": Peer(RULES["ddim"], "EulerDiscreteScheduler", X0),
    "ddim as EDM's Euler": Peer(RULES["ddim"], "EDMEulerScheduler", {}),
    "ddim_eta(1)": Peer(RULES["ddim_eta"], "DDIMScheduler", UNCLIPPED, _steps(True, eta=1.0)),
    "ddim_eta(1) as Euler ancestral": Peer(RULES["ddim_eta"], "EulerAncestralDiscreteScheduler", {}, _steps(True)),
    "ddpm": Peer(RULES["ddpm"], "DDPMScheduler", UNCLIPPED, _steps(True)),
    "ddim as a flow's Euler": Peer(RULES["ddim"], "FlowMatchEulerDiscreteScheduler", {}),
    # the rule for any schedule reads alpha, std and their derivatives at each step; no scheduler does
    "euler(Flow())": Peer(lambda noise: euler(Flow()), "FlowMatchEulerDiscreteScheduler", {}, limit=None),
    "heun": Peer(RULES["heun"], "HeunDiscreteScheduler", X0),
    "dpm_solver_2": Peer(RULES["dpm_solver_2"], "DPMSolverSinglestepScheduler", {**NOISE_FORM, "solver_order": 2}),
    "dpm_solver_3": Peer(RULES["dpm_solver_3"], "DPMSolverSinglestepScheduler", {**NOISE_FORM, "solver_order": 3}),
    "dpm_solver_pp_2s": Peer(RULES["dpm_solver_pp_2s"], "DPMSolverSinglestepScheduler", {**X0, "lower_order_final": True}),
    "dpm_solver_pp_2m": Peer(RULES["dpm_solver_pp_2m"], "DPMSolverMultistepScheduler", X0),
    "dpm_solver_pp_2m as EDM's": Peer(RULES["dpm_solver_pp_2m"], "EDMDPMSolverMultistepScheduler", {}),
    "dpm_solver_pp_3m": Peer(RULES["dpm_solver_pp_3m"], "DPMSolverMultistepScheduler", {**X0, "solver_order": 3}),
    "deis(2)": Peer(lambda noise: deis(2), "DEISMultistepScheduler", X0),
    "deis(3)": Peer(RULES["deis"], "DEISMultistepScheduler", {**X0, "solver_order": 3}),
    "lms(4)": Peer(RULES["lms"], "LMSDiscreteScheduler", X0),
    "ipndm(4)": Peer(RULES["ipndm"], "IPNDMScheduler", {}),
    "plms()": Peer(RULES["plms"], "PNDMScheduler", {"skip_prk_steps": True}),
    "plms(Linear())": Peer(lambda noise: plms(Linear()), "PNDMScheduler", {}),
    "unip(2)": Peer(lambda noise: unip(2), "UniPCMultistepScheduler", {**X0, **NO_CORRECTOR}),
    "unip(3)": Peer(RULES["unip"], "UniPCMultistepScheduler", {**X0, **NO_CORRECTOR, "solver_order": 3}),
    "unipc(2)": Peer(lambda noise: unipc(2), "UniPCMultistepScheduler", X0),
    "unipc(3)": Peer(RULES["unipc"], "UniPCMultistepScheduler", {**X0, "solver_order": 3}),
    "reverse_diffusion": Peer(RULES["reverse_diffusion"], "ScoreSdeVeScheduler", {}, _score_sde),
    "edm_stochastic": Peer(RULES["edm_stochastic"], "KarrasVeScheduler", {}, _churned),
    "dpm_solver_pp_sde_2m": Peer(
        RULES["dpm_solver_pp_sde_2m"], "DPMSolverMultistepScheduler", {**X0, "algorithm_type": "sde-dpmsolver++"}, _steps(True)
    ),
    "predictor_corrector": Peer(RULES["predictor_corrector"], "ScoreSdeVeScheduler", {}, _score_sde_corrected),
}
"""Rules that a scheduler of diffusers has. DPMSolverSDEScheduler (`dpm_solver_sde`) needs torchsde, which the course does not."""


def beside(peer: Peer, x: Tensor, steps: int) -> tuple[Callable[[], Any], int, Callable[[], int], int]:
    """A run of our rule alone and one of diffusers' step, on one stored output, and the network calls that each stands for."""
    source = torch.Generator(x.device).manual_seed(0)
    noise = lambda x: torch.randn(x.shape, generator=source, dtype=x.dtype, device=x.device)
    step, grid, out = peer.ours(noise), karras(steps, LOW, HIGH), noise(x)

    def ours(D: Denoiser) -> None:
        y, memory = x, None
        for sigma, sigma_next in pairwise(grid):
            y, memory = step(D, y, sigma, sigma_next, memory)

    ready = getattr(diffusers, peer.scheduler)(**peer.options)
    ready.set_timesteps(steps, device=x.device)
    if hasattr(ready, "set_begin_index"):
        ready.set_begin_index(0)  # as pipelines do: no search for the time
    if hasattr(ready, "is_scale_input_called"):
        ready.is_scale_input_called = True  # scaling the input is the network's side of a step

    def theirs() -> int:
        scheduler = copy.copy(ready)  # it holds the history of its run: begin each with none
        vars(scheduler).update({name: list(value) for name, value in vars(ready).items() if isinstance(value, list)})
        return peer.walk(scheduler, out, x, source)

    ours(counted := Counted(lambda x, sigma: out))
    return lambda: ours(lambda x, sigma: out), counted.calls, theirs, theirs()
