"""What several items of set 03 share: exact denoisers by name, draws for a step, checks of what came back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays
from course_lib.grading.sets.tools import T, right

PLANE, PICTURE = (3, 2), (3, 1, 2, 2)
NOT_FINITE = "x has values that are not finite; look for a division by 0, or a logarithm of 0"


# --- exact denoisers, by name ------------------------------------------------------------------------


def per_sample(value: Tensor | float, x: Tensor, name: str) -> Tensor:
    """A level or a time as (B, 1, ...); Unacceptable for the shapes that a real network would refuse."""
    value = T(value, dtype=torch.float64)
    if value.ndim > 1 or value.numel() not in (1, len(x)):
        raise Unacceptable(f"{name} has shape {tuple(value.shape)}; expected a single number or (B,)")
    return right(value.expand(len(x)), x)


def _stand_in(answer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor | float], Tensor]:
    """A denoiser of x and of sigma as (B, 1, ...)."""
    return lambda x, sigma: answer(x, per_sample(sigma, x, "sigma, with which D(x, sigma) is asked,"))


def _gaussian(x: Tensor, s: Tensor) -> Tensor:
    """E[x0 | x] of N(0.4, 0.5) in each number."""
    return 0.4 + 0.5 / (0.5 + s**2) * (x - 0.4)


def _peaks(x: Tensor, s: Tensor) -> Tensor:
    """E[x0 | x] of two equal Gaussians at -1 and 1, of variance 0.2, in each number."""
    total = 0.2 + s**2
    return (0.2 * x + s**2 * torch.tanh(x / total)) / total


def _mirror(x: Tensor) -> Tensor:
    """A reflection that mixes all numbers of a sample, and no sum of them is left alone."""
    flat = x.flatten(1)
    u = torch.arange(1, flat.shape[1] + 1, dtype=x.dtype)
    return (flat - 2 * (flat @ u)[:, None] * u / (u @ u)).reshape(x.shape)


DENOISERS = {
    "point": _stand_in(lambda x, s: 0 * x + 0.3),  # all data are one point
    "gaussian": _stand_in(_gaussian),
    "peaks": _stand_in(_peaks),
    "turned": _stand_in(lambda x, s: _mirror(_peaks(_mirror(x), s))),  # peaks in a turned frame: its Jacobian is full
}


def ask(case: Case, x: np.ndarray, sigma: float) -> np.ndarray:
    """The case's D(x, sigma), for a law."""
    return DENOISERS[case["D"]](T(x), sigma).numpy()


def level(value: float) -> Tensor:
    """A noise level or a time, 0-d float64: what a student's function is given."""
    return torch.tensor(value, dtype=torch.float64)


# --- draws -------------------------------------------------------------------------------------------


def noised(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Points as they are found at the level sigma."""
    return rng.normal(size=shape) * (1 + sigma**2) ** 0.5


def step_case(rng: np.random.Generator, D: str, shape: tuple[int, ...], ratio: float | None = None) -> Case:
    """A denoiser, a batch at sigma, and the level to go to, ratio * sigma; drawn below sigma where no ratio is given."""
    sigma = float(rng.uniform(0.7, 2.5))
    return {
        "D": D,
        "x": noised(rng, shape, sigma),
        "sigma": sigma,
        "sigma_next": sigma * (float(rng.uniform(0.3, 0.7)) if ratio is None else ratio),
    }


def geometric(rng: np.random.Generator, n: int, low: float, high: float) -> np.ndarray:
    """A falling grid of n + 1 levels from high to low, in uneven steps of log sigma."""
    inner = np.cumsum(rng.uniform(0.5, 1.5, n))
    return high * (low / high) ** np.concatenate([[0.0], inner / inner[-1]])


# --- what a student's function returned --------------------------------------------------------------


def checked(value: object, name: str, like: Tensor) -> Tensor:
    """`value`, where it is a tensor of the shape of `like`; Unacceptable elsewhere."""
    if not isinstance(value, Tensor) or value.shape != like.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise Unacceptable(f"{name} comes back with {got}; expected a tensor of shape {tuple(like.shape)}")
    return value


def with_gaps(x: object) -> Outputs:
    """x with 0 where it is not finite, and a map of where it is: so a division by 0 can be a known mistake, with a name."""
    out = arrays(x=x)["x"]
    known = np.isfinite(out)
    return {"x": np.where(known, out, 0.0), "finite": known.astype(float)}
