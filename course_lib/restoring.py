"""Solvers of linear inverse problems by name, each as one function of a task, with the same calls of the prior for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from course_lib.operators import LinearOperator
from course_lib.posterior import (
    come_closer,
    csgm,
    daps,
    ddnm_plus,
    ddrm,
    ddrm_start,
    diffpir,
    dps,
    gaussian_variance,
    ilvr,
    mcg,
    mixed_projection,
    null_space,
    pigdm,
    pnp_flow,
    red_diff,
    repaint,
    replacement,
    snips,
    watched,
)
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddim_eta, ddpm
from course_lib.types import Denoiser, Noise, Step


@dataclass(frozen=True)
class Task:
    """A problem as a solver sees it: the prior, A, y, sigma_y, calls of D to spend, the levels' ends, and fresh noise."""

    D: Denoiser
    A: LinearOperator
    y: Tensor
    sigma_y: float
    calls: int
    low: float
    high: float
    noise: Noise

    def estimate(self) -> Tensor:
        """(A^T A + ridge I)^-1 A^T y: the ridge is the variance of y's noise over that of pictures, about 1/4."""
        return self.A.solve(self.A.adjoint(self.y), max(4 * self.sigma_y**2, 1e-6))

    def pure(self) -> Tensor:
        """Standard normal noise in the shape of the pictures."""
        return self.noise(self.y.new_empty(len(self.y), *self.A.shape))

    def run(self, step: Step, steps: int | None = None, D: Denoiser | None = None) -> Tensor:
        """Samples from pure noise in so many steps, as many as there are calls unless given."""
        sigmas = karras(self.calls if steps is None else max(1, steps), self.low, self.high)
        return sample(D or self.D, self.high * self.pure(), sigmas, watched(step))


def _replacement(task: Task, eta: float = 1.0) -> Tensor:
    return task.run(replacement(ddim_eta(eta, task.noise), task.A, task.y, task.noise, task.sigma_y))


def _repaint(task: Task, jump: int = 1, resamplings: int = 2) -> Tensor:
    """As many levels as the calls allow."""
    steps = task.calls
    while steps > 1 and _repainted(karras(steps, task.low, task.high), task.sigma_y, jump, resamplings) > task.calls:
        steps -= 1
    return task.run(repaint(ddpm(task.noise), task.A, task.y, task.noise, jump, resamplings, task.sigma_y), steps)


def _repainted(sigmas: Tensor, sigma_y: float, jump: int, resamplings: int) -> int:
    """Calls of RePaint on a grid: a stretch of `jump` steps is repeated where it ends above 0 and not below sigma_y."""
    calls = length = 0
    for level in sigmas[1:].tolist():
        calls, length = calls + 1, length + 1
        if length >= jump and level > 0 and level >= sigma_y:
            calls, length = calls + (resamplings - 1) * length, 0
    return calls


def _ilvr(task: Task, until: float | None = None) -> Tensor:
    """The low frequencies are A^+ y's, down to the noise of y unless `until` says otherwise."""
    return task.run(ilvr(ddpm(task.noise), task.A, task.A.pinv(task.y), task.noise, task.sigma_y if until is None else until))


def _projection(task: Task, lam: float = 1.0) -> Tensor:
    return task.run(mixed_projection(ddpm(task.noise), task.A, task.y, task.noise, lam))


def _ddrm(task: Task, eta: float = 0.85, eta_b: float = 1.0) -> Tensor:
    sigmas = karras(task.calls, task.low, task.high)
    x = ddrm_start(task.high * task.pure(), sigmas[0], task.A, task.y, task.sigma_y)
    return sample(task.D, x, sigmas, watched(ddrm(task.A, task.y, task.sigma_y, task.noise, eta, eta_b)))


def _ddnm(task: Task) -> Tensor:
    return task.run(ddpm(task.noise), D=null_space(task.D, task.A, task.y))


def _ddnm_plus(task: Task, share: float = 1.0) -> Tensor:
    """From this share of the highest level, as DDRM starts: where y says much, the levels above are wasted."""
    sigmas = karras(task.calls, task.low, share * task.high)
    x = ddrm_start(share * task.high * task.pure(), sigmas[0], task.A, task.y, task.sigma_y)
    return sample(task.D, x, sigmas, watched(ddnm_plus(task.A, task.y, task.sigma_y, task.noise)))


def _snips(task: Task, c: float = 0.3, steps: int = 2) -> Tensor:
    return task.run(snips(task.A, task.y, task.sigma_y, task.noise, c, steps), task.calls // steps)


def _ccdf(task: Task, t0: float = 0.3) -> Tensor:
    """DDNM+ on the last t0 of the levels, at the same spacing, from the noised estimate."""
    x, sigmas = come_closer(task.estimate(), karras(task.calls, task.low, task.high), t0, task.noise)
    return sample(task.D, x, sigmas, watched(ddnm_plus(task.A, task.y, task.sigma_y, task.noise)))


def _dps(task: Task, zeta: float = 1.0) -> Tensor:
    return task.run(dps(ddpm(task.noise), task.A, task.y, zeta))


def _pigdm(task: Task, std: float = 1.0) -> Tensor:
    return task.run(ddpm(task.noise), D=pigdm(task.D, task.A, task.y, task.sigma_y, gaussian_variance(std)))


def _mcg(task: Task, zeta: float = 1.0) -> Tensor:
    return task.run(mcg(ddpm(task.noise), task.A, task.y, task.noise, zeta, task.sigma_y))


def _csgm(task: Task, c: float = 0.5, share: float = 0.1) -> Tensor:
    """One Langevin move at each level, from this share of the highest: few calls leave no time for many levels."""
    start = share * task.high
    x = task.estimate() + start * task.pure()
    step = csgm(task.A, task.y, task.sigma_y, task.noise, c, steps=1)
    return sample(task.D, x, karras(task.calls, task.low, start), watched(step))


def _red_diff(task: Task, lr: float = 0.1, share: float = 1.0) -> Tensor:
    grid = karras(task.calls, task.low, share * task.high)
    return red_diff(task.D, task.estimate(), task.A, task.y, task.sigma_y, grid, task.noise, lr=lr)


def _diffpir(task: Task, lam: float = 7.0, zeta: float = 0.3) -> Tensor:
    return task.run(diffpir(task.A, task.y, task.sigma_y, task.noise, lam, zeta))


def _daps(task: Task, ode_steps: int = 5, c: float = 0.2) -> Tensor:
    return task.run(daps(task.A, task.y, task.sigma_y, task.noise, ode_steps, c=c), task.calls // ode_steps)


def _pnp_flow(task: Task, alpha: float = 0.5, share: float = 0.05) -> Tensor:
    """From an estimate, with the longest stable step of the data term."""
    step = pnp_flow(task.A, task.y, task.noise, 1 / task.A.norm() ** 2, alpha)
    return sample(task.D, task.estimate(), karras(task.calls, task.low, share * task.high), watched(step))


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "replacement": _replacement,
    "RePaint": _repaint,
    "ILVR": _ilvr,
    "mixed projection": _projection,
    "DDRM": _ddrm,
    "DDNM": _ddnm,
    "DDNM+": _ddnm_plus,
    "SNIPS": _snips,
    "CCDF": _ccdf,
    "DPS": _dps,
    "PiGDM": _pigdm,
    "MCG": _mcg,
    "CSGM": _csgm,
    "RED-diff": _red_diff,
    "DiffPIR": _diffpir,
    "DAPS": _daps,
    "PnP-Flow": _pnp_flow,
}
"""Name -> solver(task, **setting) -> samples; without a setting that of its authors, or near it. None spends more calls."""

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "replacement": [{"eta": eta} for eta in (0.0, 0.3, 0.7, 1.0)],
    "RePaint": [{"jump": jump, "resamplings": n} for jump, n in ((1, 2), (1, 4), (3, 2), (3, 4))],
    "ILVR": [{"until": until} for until in (0.02, 0.05, 0.1, 0.3)],
    "mixed projection": [{"lam": lam} for lam in (0.3, 0.5, 0.7, 1.0)],
    "DDRM": [{"eta": eta, "eta_b": eta_b} for eta, eta_b in ((0.5, 1.0), (0.7, 1.0), (0.85, 1.0), (1.0, 1.0))],
    "DDNM+": [{"share": share} for share in (1.0, 0.3, 0.1, 0.03)],
    "SNIPS": [{"c": c, "steps": steps} for c, steps in ((0.5, 1), (1.0, 1), (0.5, 2), (1.0, 2))],
    "CCDF": [{"t0": t0} for t0 in (0.15, 0.2, 0.25, 0.3)],
    "DPS": [{"zeta": zeta} for zeta in (1.0, 3.0, 6.0, 10.0)],
    "PiGDM": [{"std": std} for std in (0.25, 0.5, 1.0, 2.0)],
    "MCG": [{"zeta": zeta} for zeta in (0.3, 1.0, 2.0, 4.0)],
    "CSGM": [{"c": c, "share": share} for c in (0.2, 0.5) for share in (0.01, 0.03)],
    "RED-diff": [{"lr": lr, "share": share} for lr, share in ((0.1, 1.0), (0.03, 0.05), (0.1, 0.05), (0.3, 0.05))],
    "DiffPIR": [{"lam": lam, "zeta": zeta} for lam in (1.0, 7.0) for zeta in (0.3, 1.0)],
    "DAPS": [{"ode_steps": n, "c": c} for n, c in ((1, 0.05), (1, 0.2), (2, 0.2), (4, 0.2))],
    "PnP-Flow": [{"alpha": alpha, "share": share} for alpha in (0.2, 0.5) for share in (0.02, 0.05)],
}
"""What a solver may choose among where it is tuned: four settings for each. DDNM takes y for exact and has none."""
