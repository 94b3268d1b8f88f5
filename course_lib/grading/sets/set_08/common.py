"""What several items of set 08 share: noised pictures, estimated noise, stand-in networks, and the names that would be the answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.grading.items import Case, Unacceptable
from course_lib.grading.sets.set_03.common import DENOISERS, per_sample
from course_lib.grading.sets.tools import T, right

SQUARE, PICTURES = (4, 4), (4, 1, 2, 4)
"""As many samples as there are columns: a sigma that lies along the wrong axis runs, and is found."""
RULES = tuple(f"course_lib.distill.rules.{name}" for name in ("distill_grad", "sds", "sjc", "vsd", "nfsd", "dds"))


def at_level(x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """x = x0 + sigma eps."""
    return x0 + right(sigma, x0) * eps


def estimated(D, x: Tensor, sigma: Tensor) -> Tensor:
    """eps_hat = (x - D(x, sigma)) / sigma."""
    return (x - D(x, sigma)) / right(sigma, x)


def gap(D, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """x0 - D(x0 + sigma eps, sigma)."""
    return x0 - D(at_level(x0, sigma, eps), sigma)


def asked(case: Case, name: str = "D") -> np.ndarray:
    """The case's denoiser at x0 + sigma eps, for a law."""
    x0, sigma, eps = (T(case[one], dtype=torch.float64) for one in ("x0", "sigma", "eps"))
    return BELIEFS[case[name]](at_level(x0, sigma, eps), sigma).numpy()


def distilled_case(rng: np.random.Generator, shape: tuple[int, ...], **names: object) -> Case:
    """Pictures, a level for each and noise."""
    sigma = rng.uniform(0.5, 1.0, shape[0]) * np.linspace(1, 2, shape[0])
    return {"x0": rng.normal(size=shape), "sigma": sigma, "eps": rng.normal(size=shape), **names}


def one_number(loss: object, name: str = "the loss") -> Tensor:
    """`loss`, where it is a tensor of one number with a graph; Unacceptable elsewhere."""
    if not isinstance(loss, Tensor):
        got = "None (is a return missing?)" if loss is None else f"of type {type(loss).__name__}"
        raise Unacceptable(f"{name} is {got}; expected a tensor")
    if loss.ndim:
        raise Unacceptable(f"{name} has shape {tuple(loss.shape)}; expected one number, 0-d")
    return loss


def slopes(loss: Tensor, *of: Tensor) -> list[Tensor]:
    """The gradient of a loss by each tensor: 0 where it does not depend on it, or has no graph at all."""
    if not loss.requires_grad:
        return [torch.zeros_like(one) for one in of]
    found = torch.autograd.grad(loss, of, allow_unused=True)
    return [torch.zeros_like(one) if slope is None else slope for one, slope in zip(of, found, strict=True)]


# --- stand-ins for networks --------------------------------------------------------------------------------------------


def _skewed(d: int) -> Tensor:
    """A matrix (d, d) that is not symmetric, and fixed."""
    row, column = torch.meshgrid(torch.arange(d), torch.arange(d), indexing="ij")
    return 0.5 * torch.sin(1.0 + 1.7 * row + 0.6 * column * row + 0.9 * column).double()


def _network(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser as a network is one: nobody's posterior mean, so that its Jacobian is not symmetric."""
    level = per_sample(sigma, x, "sigma, with which D(x, sigma) is asked,")
    mixed = x.flatten(1) @ _skewed(x[0].numel()).T
    return 0.3 * x / (1 + level**2) + torch.tanh(mixed.reshape(x.shape) / (1 + level))


BELIEFS = DENOISERS | {"network": _network}


def learner(phi: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser with one parameter for each number of a sample."""

    def D(x: Tensor, sigma: Tensor) -> Tensor:
        level = per_sample(sigma, x, "sigma, with which D_fake(x, sigma) is asked,")
        return phi + torch.tanh(phi * x) / (1 + level**2)

    return D


def render(theta: Tensor) -> Tensor:
    """x0 = g(theta) of the same shape, in which all numbers of a sample meet."""
    return torch.sin(theta) + 0.3 * theta.flatten(1).sum(1).reshape(-1, *[1] * (theta.ndim - 1))


def encode(image: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, 2, H / 2, W / 2), and not linear."""
    kernels = torch.tensor([[[[0.6, -0.2], [0.3, 0.5]]], [[[-0.4, 0.7], [0.1, 0.3]]]], dtype=image.dtype)
    return torch.tanh(F.conv2d(image, kernels, stride=2))


def pull(z: Tensor) -> Tensor:
    """Stands for a rule at fixed noise: a vector that depends on where it is asked, and mixes the numbers of a sample."""
    return torch.sin(1.3 * z) + 0.4 * z.flatten(1).roll(1, 1).reshape(z.shape) ** 2 + 0.2
