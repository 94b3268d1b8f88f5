"""Few-step students of a trained denoiser: progressive distillation and consistency distillation.

Both learn from the teacher's probability flow, at points x = x0 + sigma eps of noised data. A progressive student is a
denoiser that is right for the steps of *one* grid: `ddim` along that grid lands where the teacher does with twice as
many. A consistency function goes from any level to the end of the flow at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.denoisers import Network, NetworkDenoiser, from_edm
from course_lib.integrals import ratio
from course_lib.singlestep import heun
from course_lib.steps import check_falling, ddim
from course_lib.training import Fit, Rows, fit
from course_lib.types import Denoiser, Noise, Step, check_grid, right

Belief = Callable[..., NetworkDenoiser]
"""`belief(net, *condition)`: the Denoiser, or the consistency function, that a network is under the condition of a batch."""


# --- progressive distillation (Salimans and Ho 2022) ------------------------------------------------------------------


def two_step_target(D: Denoiser, x: Tensor, sigma: Tensor, sigma_mid: Tensor, sigma_next: Tensor) -> Tensor:
    """The clean sample x~ with which *one* DDIM step from sigma to sigma'' lands where two steps of D do, by sigma'.

    x' = ddim(x), x'' = ddim(x');  x~ + rho (x - x~) = x''  =>  x~ = (x'' - rho x) / (1 - rho),  rho = sigma'' / sigma
    (Salimans and Ho 2022, Algorithm 2 and App. G; their alpha cancels in this coordinate). x (B, ...), levels 0-d or (B,).
    Raises ValueError unless sigma > sigma'' >= 0.
    """
    if not bool((sigma > sigma_next).all()):
        raise ValueError(f"sigma = {sigma.tolist()} and sigma_next = {sigma_next.tolist()}; expected a step down in every row")
    x_mid, _ = ddim(D, x, sigma, sigma_mid)
    x_next, _ = ddim(D, x_mid, sigma_mid, sigma_next)
    rho = right(ratio(sigma, sigma_next), x)
    return (x_next - rho * x) / (1 - rho)


def truncated_snr(sigma: Tensor) -> Tensor:
    """max(SNR, 1) = max(sigma^-2, 1): the larger of the errors of x0 and of eps (Salimans and Ho 2022, Eq. 9)."""
    return (sigma**-2).clamp_min(1)


def progressive_loss(student: Denoiser, teacher: Denoiser, x0: Tensor, eps: Tensor, k: Tensor, sigmas: Tensor) -> Tensor:
    """max(SNR, 1) |D_student(x, sigma) - x~|^2 / d for each sample, (B,), where x~ is the teacher's `two_step_target`.

    x0, eps (B, ...); sigmas (2 n + 1,), the teacher's grid; k (B,) from 0 to n - 1 is the student's step, from
    sigmas[2 k] to sigmas[2 k + 2] (Salimans and Ho 2022, Algorithm 2).
    """
    sigmas = sigmas.to(k.device)
    sigma, sigma_mid, sigma_next = (sigmas[2 * k + j] for j in range(3))
    x = x0 + right(sigma, x0) * eps
    with torch.no_grad():
        target = two_step_target(teacher, x, sigma, sigma_mid, sigma_next)
    error = (student(x, sigma) - target).float().square().flatten(1).mean(1)
    return truncated_snr(sigma).to(error) * error


def progressive_round(
    teacher: Callable[..., Denoiser],
    net: nn.Module,
    belief: Belief,
    draw: Callable[[torch.Generator], Rows],
    sigmas: Tensor,
    **options: Any,
) -> Fit:
    """Train `net` to do in one step of `sigmas[::2]` what the teacher does in two of `sigmas`; one round of Algorithm 2.

    teacher  *condition -> Denoiser; it must be where the network will be trained
    net      the student, which starts as the teacher where that is a network; belief(net, *condition) is its Denoiser
    draw     generator -> (x0, eps, *condition), a batch
    sigmas   the teacher's grid of 2 n steps; options go to `training.fit`

    Salimans and Ho 2022. Raises ValueError for a grid with an odd number of steps.
    """
    sigmas = check_grid(sigmas)
    steps, odd = divmod(len(sigmas) - 1, 2)
    if odd:
        raise ValueError(f"sigmas has {len(sigmas) - 1} steps; expected an even number, which the student halves")

    def rows(generator: torch.Generator) -> Rows:
        x0, eps, *condition = draw(generator)
        return (x0, eps, torch.randint(steps, (len(x0),), generator=generator), *condition)

    def loss(net: nn.Module, x0: Tensor, eps: Tensor, k: Tensor, *condition: Tensor) -> Tensor:
        return progressive_loss(belief(net, *condition), teacher(*condition), x0, eps, k, sigmas)

    return fit(net, rows, loss, **options)


# --- consistency distillation (Song et al. 2023) ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Boundary:
    """Coefficients of `from_consistency`."""

    sigma_data: float
    sigma_min: float

    def __call__(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        above, scale = s - self.sigma_min, (s**2 + self.sigma_data**2).rsqrt()
        return self.sigma_data**2 / (above**2 + self.sigma_data**2), self.sigma_data * above * scale, scale


def from_consistency(net: Network, sigma_data: float = 0.5, sigma_min: float = 0.002, **condition: Any) -> NetworkDenoiser:
    """A consistency function: f(x, sigma) = c_skip x + c_out net(c_in x, c_noise) is the end of the flow through x.

    c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2),  c_out = sd (sigma - sigma_min) / sqrt(sigma^2 + sd^2), so that
    f(x, sigma_min) = x whatever the network says: the boundary condition (Song et al. 2023, Eq. 5 and App. C). c_in and
    c_noise are EDM's; where sigma is far above sigma_min a network of `from_edm` is hence a good start.
    """
    return replace(from_edm(net, sigma_data, **condition), coefficients=_Boundary(sigma_data, sigma_min))


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(|d|^2 + c^2) - c for each sample, (B,): |d|^2 / (2 c) near 0, |d| far from it (Song and Dhariwal 2024, Sec. 3.3)."""
    square = difference.float().square().flatten(1).sum(1)
    return square / ((square + c**2).sqrt() + c)  # without the difference of two near numbers


def consistency_loss(
    f: Denoiser,
    f_target: Denoiser,
    D: Denoiser,
    x0: Tensor,
    eps: Tensor,
    k: Tensor,
    sigmas: Tensor,
    *,
    c: float,
    step: Step = heun,
) -> Tensor:
    """d(f(x, sigma), f^-(x^, sigma')) for each sample, (B,): two neighbours on one path of the flow have one end.

    x = x0 + sigma eps at sigma = sigmas[k]; x^ = step(D, x) at sigma' = sigmas[k + 1], one step of the teacher's flow; d is
    `pseudo_huber` with this c; no gradient flows into f^- (Song et al. 2023, Eq. 7 and Algorithm 2, with lambda = 1).
    x0, eps (B, ...); sigmas (N,) falls to sigma_min; k (B,) from 0 to N - 2.
    """
    sigmas = sigmas.to(k.device)
    sigma, sigma_next = sigmas[k], sigmas[k + 1]
    x = x0 + right(sigma, x0) * eps
    end = f(x, sigma)  # first: a `Followed` network then moves its follower
    with torch.no_grad():
        x_next, _ = step(D, x, sigma, sigma_next)
        target = f_target(x_next, sigma_next)
    return pseudo_huber(end - target, c)


class Followed(nn.Module):
    """A network theta with its follower theta^-, the target of consistency distillation, in one state.

    theta^- <- mu theta^- + (1 - mu) theta before each call with gradients in training mode (Song et al. 2023, Eq. 8);
    `net(..., follower=True)` calls theta^-, which has no gradients. `mu` = 0 is theta itself.
    """

    def __init__(self, net: nn.Module, mu: float = 0.95):
        super().__init__()
        if not 0 <= mu < 1:
            raise ValueError(f"mu = {mu}; expected a number from 0 to below 1")
        self.net, self.follower, self.mu = net, copy.deepcopy(net).requires_grad_(False), mu

    def forward(self, *inputs: Tensor, follower: bool = False, **condition: Any) -> Tensor:
        if follower:
            return self.follower(*inputs, **condition)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                torch._foreach_lerp_(list(self.follower.parameters()), list(self.net.parameters()), 1 - self.mu)
        return self.net(*inputs, **condition)


def consistency_distillation(
    teacher: Callable[..., Denoiser],
    net: nn.Module,
    belief: Belief,
    draw: Callable[[torch.Generator], Rows],
    sigmas: Tensor,
    *,
    c: float,
    mu: float = 0.95,
    step: Step = heun,
    **options: Any,
) -> Fit:
    """Train `net` so that belief(net, *condition) is the teacher's consistency function (Song et al. 2023, Algorithm 2).

    teacher  *condition -> Denoiser; it must be where the network will be trained
    belief   makes a consistency function of a network, see `from_consistency`
    draw     generator -> (x0, eps, *condition), a batch
    sigmas   the levels between which neighbours are compared, (N,), falling to sigma_min > 0
    c, mu    see `pseudo_huber` and `Followed`; options go to `training.fit`

    Raises ValueError for a grid that ends at 0, where the boundary condition would be at no level of the grid.
    """
    sigmas = check_grid(sigmas)
    if not sigmas[0] > sigmas[-1] > 0:
        raise ValueError(f"sigmas runs from {sigmas[0]:g} to {sigmas[-1]:g}; expected it to fall to sigma_min > 0")

    def rows(generator: torch.Generator) -> Rows:
        x0, eps, *condition = draw(generator)
        return (x0, eps, torch.randint(len(sigmas) - 1, (len(x0),), generator=generator), *condition)

    def loss(net: nn.Module, x0: Tensor, eps: Tensor, k: Tensor, *condition: Tensor) -> Tensor:
        f = belief(net, *condition)
        return consistency_loss(f, f.given(follower=True), teacher(*condition), x0, eps, k, sigmas, c=c, step=step)

    run = fit(Followed(net, mu), rows, loss, **options)
    return replace(run, net=run.net.net)


def consistency_step(noise: Noise, sigma_min: float) -> Step:
    """Multistep consistency sampling: to the end of the flow, and back up with fresh noise (Song et al. 2023, Algorithm 1).

    x' = f(x, sigma) + sqrt(sigma'^2 - sigma_min^2) z,  z = noise(x);  x' = f(x, sigma) where sigma' <= sigma_min
    For `sample(f, x, sigmas, ...)`: a grid of n levels and 0 makes n calls. Raises ValueError on a rising grid.
    """

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        check_falling(sigma, sigma_next)
        end, s = D(x, sigma), (sigma_next**2 - sigma_min**2).clamp_min(0).sqrt()
        return (end + right(s, x) * noise(x) if bool((s > 0).any()) else end), None

    return step
