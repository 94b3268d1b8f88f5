"""What every solver asks of its problem before it starts, and of x on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib.operators.base import LinearOperator, Operator
from course_lib.types import Denoiser, Noise, Step, right


def check_problem(A: Operator, y: Tensor, sigma_y: float, solver: str) -> Tensor:
    """Return y; raise ValueError for an operator that is not linear, a y that is not its measurement, or sigma_y < 0."""
    if not isinstance(A, LinearOperator):
        raise ValueError(
            f"A = {type(A).__name__} is not linear and {solver} takes linear operators only; expected a LinearOperator, "
            "or use ddrm_jpeg for one that has `decode` (JPEG), or DPS (Chung et al. 2023) for any differentiable one"
        )
    if not 0 <= sigma_y < float("inf"):
        raise ValueError(f"sigma_y = {sigma_y}; expected the measurement's standard deviation, a finite number >= 0")
    return A.check_measurement(y)


def check_share(name: str, value: float) -> None:
    """Raise ValueError where `value` is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value}; expected a number from 0 to 1")


def for_batch(y: Tensor, x: Tensor, name: str = "y") -> Tensor:
    """Return y in the type and on the device of x; raise ValueError where it has neither one row nor as many as x."""
    if len(y) not in (1, len(x)):
        raise ValueError(f"{name} has {len(y)} rows and x has {len(x)}; expected one for all samples or one for each")
    return y.to(x.device, x.dtype.to_complex() if y.is_complex() else x.dtype)


def watched(step: Step, limit: float = 100.0) -> Step:
    """The same step, stopped where x leaves the range that x0 + sigma' eps can have: |x'| <= limit (1 + sigma').

    `limit` is in units of the data's own size plus the noise: pictures in [-1, 1] stay under 10. Raises FloatingPointError,
    naming sigma, where an entry of x' is larger or not finite. On a GPU this waits for each step.
    """
    if not limit > 0:
        raise ValueError(f"limit = {limit}; expected a number > 0")

    def step_watched(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        x, memory = step(D, x, sigma, sigma_next, memory)
        inside = x.abs() <= limit * (1 + right(sigma_next, x))  # False for nan
        if not bool(inside.all()):
            raise FloatingPointError(
                f"x diverged in the step at sigma = {float(sigma.max()):.6g}: its largest entry is {float(x.abs().max()):.3g}, "
                f"expected at most {limit:g} (1 + sigma'); take shorter steps or a smaller step size of the solver"
            )
        return x, memory

    return step_watched


def drawn(noise: Noise, x: Tensor, level: Tensor) -> Tensor:
    """level * z with z = noise(x), and no draw where no level is above 0."""
    return right(level, x) * noise(x) if bool((level > 0).any()) else torch.zeros_like(x)
