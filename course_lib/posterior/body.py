"""ScoreHMR: a first guess is inverted to a middle noise level, and sampled back under the gradient of an objective.

The prior does the work of a hand-made one in the classical fit, where the same objective is lowered by Adam from the same
guess (`optimise`). Neither knows what the numbers of x mean: the objective does, a function of the estimate x0 that holds
the forward kinematics, the camera and the keypoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from course_lib.steps import ddim
from course_lib.types import Denoiser, Noise, check_grid, right

Objective = Callable[[Tensor], Tensor]
"""x0 (B, d) -> numbers of any shape, whose sum is lowered: usually -log p(y | x0), and terms that tie rows together."""
Weight = float | Callable[[Tensor], Tensor]
"""A number, or a function of the noise level, which comes in the shape that multiplies x; it may tell the columns of x apart."""


def guided(D: Denoiser, objective: Objective, weight: Weight = 1.0, through: bool = True, reach: float = math.inf) -> Denoiser:
    """Lower an objective of the estimate at every call: a Denoiser for any step (Stathopoulos et al. 2024, Eq. 8 and 10).

    D'(x, sigma) = D(x, sigma) - w(sigma) sigma^2 g,  g = grad_x L(D(x, sigma))

    The paper changes the noise, eps' = eps + sqrt(1 - alpha_bar) grad L, in x_vp = x / sqrt(1 + sigma^2); in our coordinates
    that is eps' = eps + sigma grad_x L. With L = -log p(y | x0) and w = 1 this is the score of DPS (Chung et al. 2023).
    sigma^2 dD/dx is the covariance of x0 given x, so that the gradient moves what is unknown and leaves what is known.
    `through=False` takes the noise for a constant, as the authors' code does: g is the gradient at x0 = D(x, sigma) itself,
    cheaper by the pass back through the network, and the covariance is taken for sigma^2 I. See `widened` for a weight under
    which the step is stable at every level. The move of a row is shortened to `reach` sigma where it is longer, since the
    estimate is about sigma from the truth: where the objective is steep, one figure in a hundred would diverge. weight = 0
    returns D. Raises ValueError for an objective without a gradient and reach <= 0.
    """
    if not reach > 0:
        raise ValueError(f"reach = {reach}; expected a positive number of sigmas")
    if not callable(weight) and weight == 0:
        return D

    def lowered(x: Tensor, sigma: Tensor) -> Tensor:
        level = right(torch.as_tensor(sigma), x)
        w = weight(level) if callable(weight) else weight
        with torch.enable_grad():
            at = x.detach().requires_grad_(through)
            x0 = D(at, sigma)
            point = at if through else x0.detach().requires_grad_(True)
            total = objective(x0 if through else point).sum()
            if not total.requires_grad:
                raise ValueError("objective(x0) does not depend on x0 differentiably; expected a differentiable objective")
            (g,) = torch.autograd.grad(total, point)
        move = w * level**2 * g
        size = move.flatten(1).norm(dim=1)
        return x0.detach() - right((reach * level.reshape(-1) / size).clamp_max(1.0).nan_to_num(1.0), x) * move

    return lowered


def widened(sigma_y: float, spread: float | Tensor = 1.0) -> Callable[[Tensor], Tensor]:
    """w(sigma) = sigma_y^2 / (sigma_y^2 + spread sigma^2): y's noise widened by the estimate's, as in PiGDM (Song et al. 2023).

    For L = |A x0 - y|^2 / (2 sigma_y^2) the move of `guided(..., through=False)` is sigma^2 A^T (y - A x0) / (sigma_y^2 + spread
    sigma^2): with spread the largest eigenvalue of A^T A it never oversteps, however small sigma_y is. A spread of shape (d,)
    gives each number of x its own step, as a diagonal preconditioner does. Raises ValueError for numbers that are not positive.
    """
    if not (sigma_y > 0 and bool((torch.as_tensor(spread) > 0).all())):
        raise ValueError(f"sigma_y = {sigma_y}, spread = {spread}; expected positive numbers")
    return lambda sigma: sigma_y**2 / (sigma_y**2 + spread * sigma**2)


@torch.no_grad()
def score_hmr(
    D: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    objective: Objective,
    weight: Weight = 1.0,
    rounds: int = 1,
    noise: Noise | None = None,
    through: bool = True,
    reach: float = math.inf,
) -> Tensor:
    """Refine a first guess x (B, d): DDIM inversion to a middle level and guided DDIM back, `rounds` times; returns x0.

    sigmas  falling grid from the middle level to the lowest, above 0, at which x counts as a point of the flow; the last step
            of a round goes from there to 0
    noise   where given, the first inversion is replaced by x + sigmas[0] noise(x): the ablation of the inversion
    weight, through, reach   of `guided`

    2 n - 1 calls of D and n gradients of the objective in a round, for n levels (Stathopoulos et al. 2024). Raises
    ValueError for a grid that does not fall or ends at 0, rounds < 1, and FloatingPointError, which names the round, where x
    stops being finite.
    """
    sigmas = check_grid(sigmas)
    if not (sigmas[0] > sigmas[-1] > 0):
        raise ValueError(f"sigmas = {sigmas.tolist()}; expected a grid that falls to a level above 0")
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}; expected at least 1")
    D_guided, up, down = guided(D, objective, weight, through, reach), sigmas.flip(0), torch.cat((sigmas, sigmas.new_zeros(1)))
    for turn in range(rounds):
        if turn == 0 and noise is not None:
            x = x + sigmas[0].to(x) * noise(x)
        else:
            for sigma, sigma_next in pairwise(up):
                x, _ = ddim(D, x, sigma, sigma_next)
        for sigma, sigma_next in pairwise(down):
            x, _ = ddim(D_guided, x, sigma, sigma_next)
        if not bool(torch.isfinite(x).all()):
            raise FloatingPointError(f"x is not finite after round {turn + 1}; take a smaller weight, or one that is `widened`")
    return x


def optimise(x: Tensor, objective: Objective, steps: int, lr: float) -> Tensor:
    """The classical fit: lower the objective from x (B, d) by `steps` steps of Adam (as SMPLify does; Bogo et al. 2016).

    Each row moves by its own gradient: Adam divides by the size of each number's. Returns x of the last step. Raises
    ValueError for steps < 1 and lr <= 0.
    """
    if steps < 1 or not lr > 0:
        raise ValueError(f"steps = {steps}, lr = {lr}; expected at least one step and a positive size")
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_(True)
        adam = torch.optim.Adam([x], lr)
        for _ in range(steps):
            adam.zero_grad()
            objective(x).sum().backward()
            adam.step()
    return x.detach()


def consistency(x0: Tensor) -> Tensor:
    """How far several views of one figure are from each other: sum_v |x_v - mean|^2, (V, ..., d) -> (...), the paper's term."""
    return (x0 - x0.mean(0, keepdim=True)).square().sum((0, -1))


def smoothness(x0: Tensor) -> Tensor:
    """How far a clip's frames are from their neighbours: sum_t |x_(t+1) - x_t|^2, (T, ..., d) -> (...), the paper's term."""
    return x0.diff(dim=0).square().sum((0, -1))
