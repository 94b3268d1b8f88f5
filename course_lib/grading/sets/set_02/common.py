"""What several items of set 02 share: the numbers of a table of betas, stand-ins for networks, runs of a sampler."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call
from course_lib.grading.sets.tools import T, fit, right

STEPS = ("course_lib.steps.ddpm", "course_lib.steps.ddim", "course_lib.steps.ddim_eta")


# --- the numbers of a table --------------------------------------------------------------------------


def signal(betas: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_bar after each step and before it, (T,) each; before the first step all is signal."""
    after = torch.cumprod(1 - betas, 0)
    return after, torch.cat([torch.ones_like(after[:1]), after[:-1]])


def numbers(betas: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """beta, alpha_bar after the step and alpha_bar before it, at t."""
    after, before = signal(betas)
    return betas[t], after[t], before[t]


def posterior_mean(x0: Tensor, x_t: Tensor, t: Tensor | int, betas: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x0)."""
    beta, a, b = numbers(betas, t)
    return right(b.sqrt() * beta / (1 - a), x0) * x0 + right((1 - beta).sqrt() * (1 - b) / (1 - a), x_t) * x_t


def posterior_variance(betas: Tensor, t: Tensor | int) -> Tensor:
    """Variance of q(x_{t-1} | x_t, x0)."""
    beta, a, b = numbers(betas, t)
    return beta * (1 - b) / (1 - a)


def clean(x_t: Tensor, eps: Tensor, t: int, betas: Tensor) -> Tensor:
    """The estimate of x0 from an estimate of the noise, not clipped."""
    a = signal(betas)[0][t]
    return (x_t - (1 - a).sqrt() * eps) / a.sqrt()


def levels(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """alpha_bar at the case's time or times and one step earlier, as arrays."""
    after = np.cumprod(1 - case["betas"])
    return after[case["t"]], np.concatenate([[1.0], after])[case["t"]]


def noisy(rng: np.random.Generator) -> Case:
    """A noisy batch, a network's answer to it, and a table of ten steps."""
    shape = (3, 1, 4, 4)
    return {"x_t": rng.normal(size=shape) * 1.2, "eps_hat": rng.normal(size=shape), "betas": rng.uniform(0.05, 0.3, 10)}


# --- stand-ins for a network -------------------------------------------------------------------------


def stand_in(answer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor | int], Tensor]:
    """A network that sees every entry of x_t and the time, and refuses times that a real one would refuse."""

    def net(x: Tensor, t: Tensor | int) -> Tensor:
        t = T(t)
        if t.is_floating_point():
            raise Unacceptable(f"net(x, t) is asked with t of {t.dtype}; expected the index of a step: integers, (B,)")
        if t.ndim > 1 or t.numel() not in (1, len(x)):
            raise Unacceptable(f"net(x, t) is asked with t of shape {tuple(t.shape)} for {len(x)} samples; expected (B,)")
        return answer(x, right(t.double().expand(len(x)), x))

    return net


NETS = {
    "zero": stand_in(lambda x, t: 0 * x),
    "wave": stand_in(lambda x, t: torch.sin(x + t / 4)),
    "blend": stand_in(lambda x, t: 0.5 * x + t / 30),
}


def batch(t: int, x: Tensor) -> Tensor:
    """The time t for every sample of x, (B,)."""
    return torch.full((len(x),), t)


# --- driving a sampler --------------------------------------------------------------------------------


class _Draws:
    """A `noise(x)` that hands out the case's draws one after the other."""

    def __init__(self, draws: np.ndarray):
        self.draws, self.used = T(draws), 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.used == len(self.draws):
            raise Unacceptable(f"noise(x) is called more than {self.used} times; one call a step is enough")
        self.used += 1
        return self.draws[self.used - 1].clone()


def drive_sampler(fn, case: Case, *more) -> Outputs:
    """Run a sampler twice on the same noise, and return what it gave."""
    net, start, betas = NETS[case["net"]], T(case["x_T"]), T(case["betas"])
    first, again = (call(fn, net, start, betas, _Draws(case["noise"]), *more) for _ in range(2))
    out, twin = arrays(x0=first), arrays(x0=again)
    if not np.array_equal(out["x0"], twin["x0"], equal_nan=True):
        raise Unacceptable("two runs on the same noise(x) differ; take all noise from noise(x)")
    return out


def sampler_case(rng: np.random.Generator, net: str, T: int, **more) -> Case:
    """A table of T steps, a start, and more draws than a sampler needs."""
    shape = (3, 1, 4, 4)
    return {
        "net": net,
        "betas": rng.uniform(0.05, 0.25, T),
        "x_T": rng.normal(size=shape),
        "noise": rng.normal(size=(2 * T, *shape)),
        **more,
    }


def grown(case: Case, out: Outputs) -> tuple[np.ndarray, float]:
    """The factors of x_T and of each draw of noise in what a sampler returned, and the share that they leave unexplained."""
    return fit(out["x0"], case["x_T"], *case["noise"])
