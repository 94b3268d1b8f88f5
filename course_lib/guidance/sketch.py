"""Guidance by what a small network reads from the denoiser's own features: sketch-guided diffusion (Voynov et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser
from course_lib.nets.edge_predictor import EdgePredictor, tapped
from course_lib.types import Denoiser, Step, float64, right

Predictor = Callable[[Tensor, Tensor], Tensor]
"""`predict(x, sigma)`: an encoded map (B, ...) of the picture that x = x0 + sigma eps is about to become."""


def predictor(D: NetworkDenoiser, net: EdgePredictor, layers: Sequence[nn.Module]) -> Predictor:
    """P(F(x, t), t): D is called once, and `net` reads what `layers`, modules within D's network, return in that call."""

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        with tapped(layers) as features:
            D(x, sigma)
        return net(features, D.c_noise(float64(sigma)).to(x.device, x.dtype)).to(x.dtype)

    return predict


def sketch_guided(step: Step, predict: Predictor, target: Tensor, beta: float, low: float = 0.0, high: float = math.inf) -> Step:
    """Each step, then a move towards where the predicted map is the target (Voynov et al. 2022, Sec. 3).

    z' <- z' - alpha grad_z L,  L = |predict(x, sigma) - target|^2,  alpha = beta |z - z'| / |grad_z L|

    z = x / sqrt(1 + sigma^2) is the paper's variance-preserving coordinate, so that here, with g = grad_x L,
    x' <- x' - beta sqrt(1 + sigma'^2) |z - z'| g / |g|: in z the move is beta times as long as the step itself was. Lengths
    are those of each sample. The gradient goes through the network that `predict` calls, which is one call more, and the way
    back. beta = 0 gives `step`.

    target     (B or 1, ...), in the code that `predict` returns
    beta       the paper's is about 1.6, over the upper half of the times
    low, high  the move is made where low < sigma <= high, and elsewhere the step is as it was

    A Step and not a Denoiser: the size of the move is that of the step's, which a Denoiser does not know. x was edited, so
    memory is None. Raises ValueError for beta < 0, for levels that are no interval, and for a target of another shape.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta = {beta}; expected a finite strength >= 0, where 0 gives the step as it is")
    if not 0 <= low < high:
        raise ValueError(f"low = {low:g} and high = {high:g}; expected noise levels with 0 <= low < high")
    if beta == 0:
        return step

    def guided(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        x_next, new_memory = step(D, x, sigma, sigma_next, memory)
        inside = (low < float64(sigma)) & (float64(sigma) <= high)
        if not bool(inside.any()):
            return x_next, new_memory
        z, z_next = (at * right((1 + level**2).rsqrt(), x) for at, level in ((x, sigma), (x_next, sigma_next)))
        g = slope(predict, x, sigma, target)
        length = beta * norm(z - z_next) / norm(g).clamp_min(torch.finfo(g.dtype).tiny)  # where g is 0 nothing moves
        return x_next - right((1 + sigma_next**2).sqrt() * inside, x) * length * g, None

    return guided


def slope(predict: Predictor, x: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
    """grad_x |predict(x, sigma) - target|^2, the shape of x; a row's does not depend on the others'."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        found = predict(at, sigma)
        if target.shape[1:] != found.shape[1:] or len(target) not in (1, len(x)):
            raise ValueError(
                f"target has shape {tuple(target.shape)}; expected {tuple(found.shape)}, or one row for all, as predict returns"
            )
        (g,) = torch.autograd.grad((found - target.to(found)).square().sum(), at)
    return g


def norm(v: Tensor) -> Tensor:
    """The length of each sample of v (B, ...), with axes of size 1 to the right."""
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)
