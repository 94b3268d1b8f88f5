"""Runs of diffusers' schedulers and of our loop on the same network, levels and times."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor

from course_lib.denoisers import PREDICTIONS, NetworkDenoiser, discrete_of, from_edm
from course_lib.sample import sample
from course_lib.types import Denoiser, Step

F64 = torch.float64
Network = Callable[[Tensor, Tensor], Tensor]


def net(x_t: Tensor, t: Tensor) -> Tensor:
    """Some nonlinear network of bounded output, with a time."""
    return torch.sin(1.7 * x_t + 0.002 * t.to(x_t)) + 0.2 * torch.cos(x_t.flip(-1))


def tiny_unet(**options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 16), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(layers_per_block=1, attention_head_dim=4, **sizes, **blocks, **options).eval().requires_grad_(False)


# --- their run ---------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Where a run ended, in the course's coordinate, and the times that the network was told, each once, in order."""

    x: Tensor
    times: list[float]


def scales_input(scheduler: Any) -> bool:
    """Whether the scheduler's sample is x = x0 + sigma eps (k-diffusion's coordinate) and not x / sqrt(1 + sigma^2)."""
    return hasattr(scheduler, "is_scale_input_called") or type(scheduler).__name__.startswith(("Heun", "EDM"))


def ready(scheduler: Any, steps: int, widen: bool = True) -> Any:
    """The scheduler ready to run, from its first level; its tables widened, so that it computes in float64 where it can."""
    scheduler.set_timesteps(steps)
    if widen and hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    if widen and hasattr(scheduler, "alphas_cumprod"):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        if getattr(scheduler.config, "set_alpha_to_one", True) is False:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # rounding can give two levels one time, and the search would take the second
    return scheduler


def each_once(times: Sequence[float]) -> list[float]:
    return [t for i, t in enumerate(times) if i == 0 or t != times[i - 1]]


def theirs(scheduler: Any, model: Network, x: Tensor, sigma: Tensor, end: Tensor) -> Run:
    """Their loop from x at level sigma to level `end`; the time of a last step that stays at its level is left out."""
    scale = (lambda s: 1.0) if scales_input(scheduler) else (lambda s: (1 + s**2).sqrt().to(x))
    x_t, times = x / scale(sigma), []
    for t in scheduler.timesteps:
        times.append(float(t))
        x_t = scheduler.step(model(scheduler.scale_model_input(x_t, t), t), t, x_t).prev_sample
    if hasattr(scheduler, "sigmas") and scheduler.sigmas[-1] == scheduler.sigmas[-2]:
        times.pop()
    return Run(x_t * scale(end), each_once(times))


# --- our run -------------------------------------------------------------------------------------------------------------


def levels_of(scheduler: Any) -> Tensor:
    """The scheduler's levels, each once, in float64."""
    sigmas = scheduler.sigmas.double()
    return sigmas[torch.cat([torch.ones(1, dtype=torch.bool), sigmas.diff() != 0])]


def denoiser_of(scheduler: Any, model: Network, told: list[float]) -> Denoiser:
    """The network as a Denoiser under the scheduler's prediction type, told the time that the scheduler has for each level."""

    def listening(x_t: Tensor, t: Tensor) -> Tensor:
        told.append(float(t))
        return model(x_t, t)

    if type(scheduler).__name__.startswith("EDM"):
        return from_edm(lambda x, t: listening(x, t / 1000))  # c_noise = ln(sigma) / 4 without our factor of 1000
    if not hasattr(scheduler, "sigmas"):
        return NetworkDenoiser(listening, PREDICTIONS[scheduler.config.prediction_type], discrete_of(scheduler).t_of_sigma)
    levels, times = scheduler.sigmas[: len(scheduler.timesteps)].double(), scheduler.timesteps.double()

    def time_of(sigma: Tensor) -> Tensor:
        nearest = (levels - sigma).abs().argmin()
        assert abs(float(levels[nearest] / sigma) - 1) < 1e-6, f"{float(sigma)} is no level of the scheduler"
        return times[nearest]

    return NetworkDenoiser(listening, PREDICTIONS[scheduler.config.prediction_type], time_of)


def in_turn(steps: Sequence[Step], levels: Tensor) -> Step:
    """One step of its own for each interval of the levels: how a run changes its order on the way."""
    by_level = dict(zip(levels.tolist(), steps, strict=False))

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        return by_level[float(sigma)](D, x, sigma, sigma_next, memory)

    return step


def ours(scheduler: Any, model: Network, x: Tensor, levels: Tensor, step: Step) -> Run:
    told: list[float] = []
    return Run(sample(denoiser_of(scheduler, model, told), x, levels, step), each_once(told))


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((one - other).abs().max() / other.abs().max())
