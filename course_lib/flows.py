"""Flow matching and reflow: a velocity learned on straight lines between data and noise, and paths made straight.

In the flow's own coordinates x_t = (1 - t) x0 + t eps, with t = sigma / (1 + sigma): data at t = 0, noise at t = 1, and
x = x_t / (1 - t) is the course's. Where x0 and eps are independent this is the probability flow of diffusion in another
time: `denoisers.from_flow` makes a Denoiser of a velocity, `velocity` a velocity of a Denoiser, and everything applies.

Reflow pairs each eps with an x0 of its own. Then `from_flow(v)` is the mean of x0 over the *pairs* whose line passes through
x_t, not over all ways to noise x0, and (D - x) / sigma^2 is no score. The ODE dx/dsigma = (x - D) / sigma still is the
flow's: deterministic steps, inversion and `exact_log_likelihood` hold (the last with sigma_max of 1e4 or more: x0 and eps
depend on one another, so that x / sigma is normal only up to 1 / sigma_max). Steps that add noise, Langevin correctors and
all else that reads a score from D do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from course_lib.multistep import unipc
from course_lib.sample import Trajectory, sample
from course_lib.schedules import NO_SIGNAL, Flow, Schedule, uniform
from course_lib.types import Denoiser, Step, float64, right

Velocity = Callable[[Tensor, Tensor], Tensor]
"""`v(x_t, t)` returns the mean of dx_t/dt, of the shape of x_t (B, ...); t is (B,) or 0-d, 0 at the data and 1 at the noise."""

ALMOST_NOISE = 1 - 1e-6
"""Where samplers start: at t = 1 sigma is infinite, and here a millionth of the signal is left."""
ACCURATE: Step = unipc(2)
"""In even steps of t the nearest to the exact flow of the rules with one evaluation a step, of those tried."""


def velocity(D: Denoiser, x_t: Tensor, t: Tensor | float, schedule: Schedule | None = None) -> Tensor:
    """The velocity of the probability flow in a schedule's time, E[dx_t/dt | x_t], from the Denoiser; the shape of x_t.

    v = alpha' x0 + std' (x_t - alpha x0) / std,  x0 = D(x_t / alpha, std / alpha)  (Lipman et al. 2023, Eq. 8 and 15);
    without `schedule` the straight flow's, v = (x_t - x0) / t = E[eps - x0 | x_t]  (Liu et al. 2023, Eq. 2).
    x_t (B, ...) in the schedule's coordinates, t 0-d or (B,). Raises ValueError where no signal is left, as at t = 1, or no
    noise, as at t = 0: what D says there does not give the velocity.
    """
    schedule, t = schedule or Flow(), float64(t)
    alpha, std = schedule.alpha(t), schedule.std(t)
    lost = (alpha < NO_SIGNAL) | (std <= 0)
    if bool(lost.any()):
        raise ValueError(
            f"t = {float(t[lost][0]):.6g} of the {schedule.name} schedule leaves no signal or no noise; expected a time "
            f"where both are left, for example {ALMOST_NOISE} for 1"
        )
    x0 = D(x_t / right(alpha, x_t), std / alpha)
    eps = (x_t - right(alpha, x_t) * x0) / right(std, x_t)
    d_alpha, d_std = schedule.velocity(t)
    return right(d_alpha, x_t) * x0 + right(d_std, x_t) * eps


def flow_matching_loss(v: Velocity, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """|v(x_t, t) - (eps - x0)|^2 / d with x_t = (1 - t) x0 + t eps, for each sample, (B,).

    x0, eps (B, ...) are pairs: independent ones teach `velocity`, those of `reflow_pairs` a straighter flow. t (B,) in [0, 1].
    It is `training.denoising_loss(from_flow(v), x0, t / (1 - t), eps, "flow")`, and finite at both ends. Raises ValueError for
    a t of another shape or beyond [0, 1].
    Conditional flow matching, Lipman et al. 2023, Eq. 9 and 23 with sigma_min = 0; rectified flow, Liu et al. 2023, Eq. 1.
    """
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)}; expected {tuple(x0.shape[:1])}, a time for each sample")
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t runs from {float(t.min()):.6g} to {float(t.max()):.6g}; expected times from 0 (data) to 1 (noise)")
    t = t.to(x0)
    x_t, target = (1 - right(t, x0)) * x0 + right(t, x0) * eps, eps - x0
    return (v(x_t, t) - target).square().flatten(1).mean(1)


def flow_grid(n: int) -> Tensor:
    """The levels of n even steps of t from noise to data, sigma = t / (1 - t) from 1e6 to 0; (n + 1,) float64.

    `ddim` on this grid is Euler's method in t. Raises ValueError for n < 1.
    """
    return uniform(Flow(), n, t_max=ALMOST_NOISE)


def reflow_pairs(D: Denoiser, eps: Tensor, n: int = 100, step: Step = ACCURATE) -> tuple[Tensor, Tensor]:
    """Pairs (x0, eps) of the flow's own: x0 is where D's flow carries each eps, in n steps even in t; both (B, ...).

    The data of the next `flow_matching_loss`, whose flow is straighter than D's (Liu et al. 2023, Algorithm 1, and
    Theorem 3.5: the mean of |eps - x0|^2 does not rise). No gradient flows through them.
    """
    sigmas = flow_grid(n)
    return sample(D, float(sigmas[0]) * eps, sigmas, step), eps


def flow_paths(D: Denoiser, eps: Tensor, n: int = 100, step: Step = ACCURATE) -> tuple[Tensor, Tensor]:
    """The paths of D's flow from noise to data in its own coordinates, x_t = x / (1 + sigma), at n + 1 even times.

    Returns times (n + 1,), falling from 1 to 0, and states (n + 1, B, ...), from eps to x0; float64 and x's type, on the CPU.
    """
    sigmas = flow_grid(n)
    start = float(sigmas[0]) * eps
    seen = Trajectory(start, sigmas[0])
    sample(D, start, sigmas, step, on_step=seen)
    return Flow().t_of_sigma(sigmas), seen.x / right(1 + sigmas, seen.x)


def straightness(times: Tensor, paths: Tensor) -> Tensor:
    """S = integral over t of |(eps - x0) - dx_t/dt|^2 of each path: 0 for a straight line at even speed; (B,) float64.

    Its mean over paths is S(Z) of Liu et al. 2023, Sec. 2.2 and Theorem 3.7. times (n + 1,) falling from 1 to 0, paths
    (n + 1, B, ...), first eps, last x0; in squared units of x. S is the integral of |v|^2 less |eps - x0|^2: what the path
    costs beyond its straight line. The velocity is averaged over each interval, which leaves out n^-2 of an exact path's S.
    Raises ValueError where times do not fall, or are not one for each state.
    """
    if times.shape != paths.shape[:1] or len(times) < 2 or not bool((times.diff() < 0).all()):
        raise ValueError(
            f"times has shape {tuple(times.shape)} for paths of shape {tuple(paths.shape)}; expected two or more falling "
            "times, one for each state"
        )
    times, paths = float64(times), float64(paths).flatten(2)  # (n + 1,), (n + 1, B, d)
    dt = times.diff()[:, None, None]
    whole = (paths[-1] - paths[0]) / (times[-1] - times[0])
    return (-dt * (whole - paths.diff(dim=0) / dt) ** 2).sum((0, 2))


def slerp(a: Tensor, b: Tensor, share: Tensor | float) -> Tensor:
    """Between two latents along the sphere, row by row: share = 0 gives a, share = 1 gives b; (B, ...).

    sin((1 - share) theta) / sin(theta) a + sin(share theta) / sin(theta) b,  theta = arccos(a . b / (|a| |b|))
    a, b (B, ...), share in [0, 1], a number or (B,). Between rows of one length it keeps the length, which noise in many
    dimensions nearly has: halfway between two independent draws the straight line is sqrt(2) too short. Parallel rows are
    joined by that line. Raises ValueError for unequal shapes, a share outside [0, 1], rows of zeros, and opposite rows.
    Shoemake 1985; Song et al. 2021, DDIM, Eq. 67.
    """
    if a.shape != b.shape:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; expected equal shapes")
    share = float64(share)
    if share.shape not in ((), a.shape[:1]) or not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(f"share = {share.tolist()}; expected a number from 0 to 1, or one for each of {len(a)} rows")
    u, w = (float64(rows).flatten(1) for rows in (a, b))
    for name, rows in (("a", u), ("b", w)):
        if bool((rows == 0).all(1).any()):
            raise ValueError(f"{name} has a row of zeros, which has no direction; expected latents")
    u, w = u / u.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
    theta = 2 * torch.atan2((u - w).norm(dim=1), (u + w).norm(dim=1))  # exact where arccos is not, near 0 and pi
    if bool((theta > math.pi - 1e-6).any()):
        raise ValueError("a and b have opposite rows, between which every way round is as short; expected other latents")

    def weight(s: Tensor) -> Tensor:
        return torch.where(theta > 1e-6, (s * theta).sin() / theta.sin(), s)  # below, the two are equal to 1e-12

    return right(weight(1 - share), a) * a + right(weight(share), a) * b
