"""The benchmark `gmm`: solvers of y = A x0 + sigma_y n on mixtures of 25 Gaussians, against the exact posterior.

The setting of MCGdiff (Cardoso, Janati El Idrissi, Le Corff and Moulines 2023), as its authors' code has it. The problems are
drawn once and stored, since the signs of singular vectors differ between machines. `python -m course_lib.bench_gmm` measures
what `gmm.json` has not yet, cell by cell, so that a run that was interrupted goes on; `rows()` reads it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from course_lib import devices, metrics
from course_lib.operators.base import SVD
from course_lib.operators.decomposed import Decomposed
from course_lib.posterior import (
    ddnm_plus,
    ddrm,
    ddrm_start,
    dps,
    gaussian_variance,
    ilvr,
    mcgdiff,
    null_space,
    pigdm,
    replacement,
    tds,
)
from course_lib.sample import sample
from course_lib.schedules import linear_betas
from course_lib.steps import ddim_eta
from course_lib.types import Denoiser, Noise, Step, float64
from course_lib.zoo import stored
from course_lib.zoo.stored import Row

F64 = torch.float64
ZOO = Path(__file__).parent / "zoo"
PROBLEMS, STORED = ZOO / "gmm.safetensors", ZOO / "gmm.json"
COMMAND = "python -m course_lib.bench_gmm"
D_X, D_Y, SEEDS, SAMPLES = (8, 80, 800), (1, 2, 4), 20, 2000
PARTICLES = 1000
"""Of each run of a particle method: 2,000 samples are two runs."""
ETA = {20: 0.6, 100: 0.85}
"""Levels of the grid, and the share of fresh noise that goes with them."""
ALPHA_BAR = torch.cat([torch.ones(1, dtype=F64), torch.cumprod(1 - linear_betas(999, 0.02, 1e-4), 0)])
"""alpha_bar at t = 0 ... 999: it starts at 1, and beta falls."""
WIDTH = math.sqrt(1 + 8**2 * 2)
"""The prior's standard deviation in each coordinate of x0, were its weights equal."""
MODE = 0.01
"""A mode of the posterior is a component of at least this weight."""


class Diagonal(Decomposed):
    """y_i = s_i x_i of the first entries of x (B, d_x): any A in the bases of its singular vectors. s (d_y,) > 0."""

    def __init__(self, s: Tensor, d_x: int):
        self.s, self.shape, self.out = s, (d_x,), (len(s),)

    def apply(self, x: Tensor) -> Tensor:
        return x[:, : len(self.s)] * self.s.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._padded(self._checked(y, "y", self.out) * self.s.to(y))

    def svd(self) -> SVD:
        r = len(self.s)
        return SVD(self.s, lambda x: x, lambda c: c, lambda y: y, lambda c: c[:, :r])

    def _padded(self, c: Tensor) -> Tensor:
        return torch.cat([c, c.new_zeros(len(c), self.shape[0] - c.shape[1])], 1)


@dataclass(frozen=True)
class Problem:
    """y = A x0 + sigma_y n with x0 ~ sum_k w_k N(m_k, I), turned into the bases of A's singular vectors.

    A (d_y, d_x), y (d_y,), weights (25,), float64. With A = U diag(s) V^T, all that follows is of V^T x0 and U^T y: a
    rotation changes no distance, and each measured coordinate then falls apart from the others.
    """

    A: Tensor
    y: Tensor
    sigma_y: float
    weights: Tensor

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.linalg.svd(self.A, full_matrices=True)

    @property
    def s(self) -> Tensor:
        """Singular values, (d_y,)."""
        return self._svd[1]

    @property
    def turn(self) -> Tensor:
        """V, (d_x, d_x): x0 = V c for the coordinates c of this class."""
        return self._svd[2].T

    @cached_property
    def means(self) -> Tensor:
        """V^T m_k, (25, d_x)."""
        return grid_means(self.A.shape[1]) @ self.turn

    @cached_property
    def operator(self) -> Diagonal:
        """A between the turned bases."""
        return Diagonal(self.s, self.A.shape[1])

    @cached_property
    def measurement(self) -> Tensor:
        """U^T y as one row, (1, d_y)."""
        return (self.y @ self._svd[0])[None]

    def denoiser(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] of the prior: (x + sigma^2 sum_k p(k | x) m_k) / (1 + sigma^2), x (B, d_x), sigma 0-d."""
        sigma2 = float64(sigma) ** 2
        logits = self.weights.log() + (x @ self.means.T - (self.means**2).sum(1) / 2) / (1 + sigma2)
        return (x + sigma2 * torch.softmax(logits, 1) @ self.means) / (1 + sigma2)

    @cached_property
    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (25,), means (25, d_x) and the variances (d_x,) that all components share, of p(x0 | y).

        Of a measured coordinate v_i = sigma_y^2 / (s_i^2 + sigma_y^2) and mu_ki = m_ki + s_i (y_i - s_i m_ki) / (s_i^2 +
        sigma_y^2); log w_k' = log w_k - sum_i (y_i - s_i m_ki)^2 / (2 (s_i^2 + sigma_y^2)) up to a constant; others keep m_ki
        and 1.
        """
        r, total = len(self.s), self.s**2 + self.sigma_y**2
        residual = self.measurement - self.s * self.means[:, :r]
        weights = torch.softmax(self.weights.log() - (residual**2 / (2 * total)).sum(1), 0)
        means, variances = self.means.clone(), torch.ones(self.means.shape[1], dtype=F64)
        means[:, :r] += self.s / total * residual
        variances[:r] = self.sigma_y**2 / total
        return weights, means, variances

    def exact(self, n: int, generator: torch.Generator) -> Tensor:
        """n samples of the posterior, (n, d_x)."""
        weights, means, variances = self.posterior
        which = torch.multinomial(weights, n, replacement=True, generator=generator)
        return means[which] + variances.sqrt() * torch.randn(n, len(variances), dtype=F64, generator=generator)

    def shares(self, x: Tensor) -> Tensor:
        """Share of the samples x (n, d_x) that belong to each component of the posterior, each to the likeliest; (25,)."""
        weights, means, variances = self.posterior
        pull = means / variances
        logits = weights.clamp_min(1e-300).log() + x @ pull.T - (means * pull).sum(1) / 2
        return torch.bincount(logits.argmax(1), minlength=len(weights)).double() / len(x)


def grid_means(d_x: int) -> Tensor:
    """The prior's means, -8 (i, j) for i, j = -2 ... 2, each pair repeated d_x / 2 times: (25, d_x)."""
    pairs = torch.cartesian_prod(torch.arange(-2.0, 3.0), torch.arange(-2.0, 3.0)).to(F64)
    return -8 * pairs.repeat(1, d_x // 2)


def draw(d_x: int, d_y: int, seed: int) -> Problem:
    """A new problem: A has sorted U(0, 1) singular values, sigma_y is U(0, 1) times the largest, weights are z^2 normalised."""
    source = devices.generator(d_x, d_y, seed)
    U, _, Vt = torch.linalg.svd(torch.randn(d_y, d_x, dtype=F64, generator=source), full_matrices=False)
    s = torch.rand(d_y, dtype=F64, generator=source).sort(descending=True).values
    weights = torch.randn(25, dtype=F64, generator=source) ** 2
    sigma_y = float(torch.rand(1, dtype=F64, generator=source) * s[0])
    A = U * s @ Vt
    which = torch.multinomial(weights, 1, generator=source)[0]
    x0 = grid_means(d_x)[which] + torch.randn(d_x, dtype=F64, generator=source)
    return Problem(A, A @ x0 + sigma_y * torch.randn(d_y, dtype=F64, generator=source), sigma_y, weights / weights.sum())


def store_problems() -> None:
    """Draw all problems anew and write them; only where the setting changes, since every stored number hangs on them."""
    tensors = {}
    for d_x, d_y in product(D_X, D_Y):
        drawn = [draw(d_x, d_y, seed) for seed in range(SEEDS)]
        cell = {name: torch.stack([getattr(p, name) for p in drawn]).float() for name in ("A", "y", "weights")}
        cell["sigma_y"] = torch.tensor([p.sigma_y for p in drawn])
        tensors |= {f"{d_x}.{d_y}.{name}": value.contiguous() for name, value in cell.items()}
    save_file(tensors, PROBLEMS)


@cache
def _all_problems() -> dict[str, Tensor]:
    return load_file(PROBLEMS)


def problem(d_x: int, d_y: int, seed: int) -> Problem:
    """A stored problem, seed 0 ... 19; what is stored in float32 *is* the problem. ValueError for one that there is not."""
    if d_x not in D_X or d_y not in D_Y or seed not in range(SEEDS):
        raise ValueError(f"(d_x, d_y, seed) = ({d_x}, {d_y}, {seed}); expected d_x of {D_X}, d_y of {D_Y}, seed under {SEEDS}")
    cell = {name: _all_problems()[f"{d_x}.{d_y}.{name}"][seed].double() for name in ("A", "y", "sigma_y", "weights")}
    return Problem(cell["A"], cell["y"], float(cell["sigma_y"]), cell["weights"] / cell["weights"].sum())


def grid(s: Tensor, sigma_y: float, n: int) -> Tensor:
    """n noise levels from alpha_bar's last down to 0, so n - 1 moves: even in sqrt(alpha_bar), with the levels sigma_y / s_i.

    Walking up from t = 0, a time is taken where sqrt(alpha_bar) has fallen by (1 - 0.01) / (n - 1 - d_y) since the last, and
    where sigma = sigma_y / s_i: there a coordinate is as noisy as its measurement. Under sqrt(alpha_bar) = 0.01 those that are
    left are even in t. MCGdiff's code means the same times, but looks for sigma_y / s_i in a sorted list, not over t.
    """
    root = ALPHA_BAR.sqrt()
    apart = (sigma_y**2 * ALPHA_BAR[:, None] - (1 - ALPHA_BAR[:, None]) * s**2).abs()
    wanted = set(apart.argmin(0).tolist()) - {0}
    end = int((root < 1e-2).nonzero()[0])
    fall = float(1 - root[end]) / (n - 1 - len(wanted))
    times = [0]
    for t in range(1, end):
        if root[times[-1]] - root[t] >= fall or t in wanted:
            times.append(t)
    left = torch.linspace(times[-1], len(root) - 1, n - len(times) + 1).ceil().long().tolist()[1:]
    times = torch.tensor([*times, *left]).flip(0)
    return (1 / ALPHA_BAR[times] - 1).sqrt()


# --- solvers: a new one is one line of SOLVERS -----------------------------------------------------------------------

Solver = Callable[[Denoiser, Problem, Tensor, Tensor, Noise], Tensor]
"""(D, problem, x at sigmas[0], sigmas, noise) -> samples of p(x0 | y), as many as x has rows."""


def _stepped(step: Callable[[Problem, Step, Noise], Step]) -> Solver:
    """A solver that is a Step, made of the problem and of DDIM with the grid's share of noise."""

    def solve(D: Denoiser, p: Problem, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
        return sample(D, x, sigmas, step(p, ddim_eta(ETA[len(sigmas)], noise), noise))

    return solve


def in_runs(method: Callable[..., Step], particles: int = PARTICLES) -> Solver:
    """A particle method, in runs of so many; fewer samples than that are one run."""

    def solve(D: Denoiser, p: Problem, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
        given = p.operator, p.measurement, p.sigma_y, noise
        return sample(D, x, sigmas, method(*given, eta=ETA[len(sigmas)], particles=min(particles, len(x))))

    return solve


def _ddrm(D: Denoiser, p: Problem, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    given = p.operator, p.measurement, p.sigma_y
    return sample(D, ddrm_start(x, sigmas[0], *given), sigmas, ddrm(*given, noise, eta=0.85, eta_b=1.0))


def _ddnm(D: Denoiser, p: Problem, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    return sample(null_space(D, p.operator, p.measurement), x, sigmas, ddim_eta(ETA[len(sigmas)], noise))


def _pigdm(std: float) -> Solver:
    """PiGDM for a prior of this standard deviation; 1 is the paper's."""

    def solve(D: Denoiser, p: Problem, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
        guided = pigdm(D, p.operator, p.measurement, p.sigma_y, gaussian_variance(std))
        return sample(guided, x, sigmas, ddim_eta(ETA[len(sigmas)], noise))

    return solve


SOLVERS: dict[str, Solver] = {
    "prior": _stepped(lambda p, step, noise: step),
    "replacement": _stepped(lambda p, step, noise: replacement(step, p.operator, p.measurement, noise, p.sigma_y)),
    "ILVR": _stepped(lambda p, step, noise: ilvr(step, p.operator, p.operator.pinv(p.measurement), noise)),
    "DDNM": _ddnm,
    "DDNM+": _stepped(lambda p, step, noise: ddnm_plus(p.operator, p.measurement, p.sigma_y, noise)),
    "DDRM": _ddrm,
    "DPS": _stepped(lambda p, step, noise: dps(step, p.operator, p.measurement, zeta=2 * 0.1)),
    "PiGDM": _pigdm(1.0),
    "PiGDM, wide": _pigdm(WIDTH),
    "MCGdiff": in_runs(mcgdiff),
    "TDS": in_runs(tds),
}
"""'prior' does not look at y: what a solver must beat. DPS: 0.1 / |r| times the gradient of |r|^2 is 0.2 times that of |r|.
'PiGDM' takes the paper's r^2, that of a prior of variance 1; 'PiGDM, wide' that of the width that this prior has."""


RUNS = [
    {"method": method, "d_x": 8, "d_y": d_y, "levels": 100, "particles": particles}
    for d_y, particles, method in product(D_Y, (10, 100, 1000, 10_000), ("MCGdiff", "TDS"))
]
"""How the distance falls with the particles of a run."""


# --- what is measured --------------------------------------------------------------------------------------------------


def judge(p: Problem, x: Tensor, seed: int = 0) -> dict[str, float]:
    """Samples x (n, d_x) against exact ones: the mean W1 over 100 random slices, and how the modes are shared.

    w1     sliced Wasserstein-1 to n exact samples; for exact x it is the floor
    found  share of the posterior's modes (components of weight >= 0.01) that hold at least a quarter of their due share
    tv     total variation between the shares of x that belong to each component, and the weights
    """
    weights, held = p.posterior[0], p.shares(x)
    modes = weights >= MODE
    exact = p.exact(len(x), devices.generator(seed, 1))
    return {
        "w1": metrics.sliced_wasserstein(x, exact, slices=100, seed=seed),
        "found": float((held >= weights / 4)[modes].double().mean()),
        "tv": float((held - weights).abs().sum() / 2),
    }


def run(solver: str, p: Problem, levels: int, seed: int = 0, n: int = SAMPLES, solve: Solver | None = None) -> tuple[Tensor, int]:
    """n samples of a named solver on the grid of `levels` levels, and its calls of D; ValueError for an unknown name.

    `solve` stands in for what the name means, for example with another number of particles.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver = {solver!r}; expected one of {', '.join(SOLVERS)}")
    if levels not in ETA:
        raise ValueError(f"levels = {levels}; expected one of {', '.join(map(str, ETA))}")
    source, calls = devices.generator(seed, 2), 0

    def D(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return p.denoiser(x, sigma)

    noise = lambda x: torch.randn(x.shape, dtype=x.dtype, generator=source)
    sigmas = grid(p.s, p.sigma_y, levels)
    x = (1 + sigmas[0] ** 2).sqrt() * noise(torch.empty(n, p.A.shape[1], dtype=F64))  # N(0, I) where the variance is preserved
    return (solve or SOLVERS[solver])(D, p, x, sigmas, noise), calls


def measure(solver: str, d_x: int, d_y: int, levels: int, seeds: int = SEEDS) -> Row:
    """One cell of the table: means over the problems, and `reach`, 1.96 standard errors of the W1.

    `solver` may be 'exact', whose row is the floor; seconds of the processor for a problem, on one thread.
    """
    found, seconds, calls = [], [], 0
    with devices.one_thread():
        for seed in range(seeds):
            p = problem(d_x, d_y, seed)
            start = time.process_time()
            if solver == "exact":
                x = p.exact(SAMPLES, devices.generator(seed, 3))
            else:
                x, calls = run(solver, p, levels, seed)
            seconds.append(time.process_time() - start)
            found.append(judge(p, x, seed))
    reach = 1.96 * statistics.stdev(f["w1"] for f in found) / math.sqrt(seeds) if seeds > 1 else math.nan
    means = {name: round(statistics.mean(f[name] for f in found), 4) for name in found[0]}
    key = {"solver": solver, "d_x": d_x, "d_y": d_y, "levels": levels, "seeds": seeds}
    return {**key, **means, "reach": round(reach, 4), "calls": calls, "seconds": round(statistics.median(seconds), 3)}


def measure_particles(method: str, d_x: int, d_y: int, levels: int, particles: int, seeds: int = SEEDS) -> Row:
    """W1 of 2,000 samples in runs of `particles` (of a longer run, 2,000 of its samples), as a mean over the problems."""
    solve, w1 = in_runs({"MCGdiff": mcgdiff, "TDS": tds}[method], particles), []
    with devices.one_thread():
        for seed in range(seeds):
            p = problem(d_x, d_y, seed)
            x = run(method, p, levels, seed, max(SAMPLES, particles), solve)[0]
            w1.append(judge(p, x[:: len(x) // SAMPLES], seed)["w1"])
    reach = 1.96 * statistics.stdev(w1) / math.sqrt(seeds)
    key = {"method": method, "d_x": d_x, "d_y": d_y, "levels": levels, "particles": particles, "seeds": seeds}
    return {**key, "w1": round(statistics.mean(w1), 4), "reach": round(reach, 4)}


def rows(part: str = "cells", /, **key: object) -> list[Row]:
    """The stored rows with these entries, for example `rows(d_x=8, levels=20)`; ValueError, with the command, where none is.

    `part`: 'cells' is the table; 'particles' the distance against the number of particles.
    """
    chosen = [row for row in stored.rows(STORED, COMMAND, part) if key.items() <= row.items()]
    if not chosen:
        raise ValueError(f"no row of {STORED.name} has {key}; run `{COMMAND}`")
    return chosen


def main(argv: list[str] | None = None) -> None:
    """Measure the cells of the named dimensions and numbers of levels that are not stored yet, and what more particles bring."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=main.__doc__)
    parser.add_argument("parts", nargs="*", help="cells, particles or both")
    parser.add_argument("--dims", type=int, nargs="*", default=D_X, help="values of d_x")
    parser.add_argument("--levels", type=int, nargs="*", default=tuple(ETA), help="20, 100 or both")
    asked = parser.parse_args(argv)
    cells = product(asked.levels, asked.dims, D_Y, ("exact", *SOLVERS))
    keys = [{"solver": solver, "d_x": d_x, "d_y": d_y, "levels": levels} for levels, d_x, d_y, solver in cells]
    stored.run(STORED, COMMAND, {"cells": (measure, keys), "particles": (measure_particles, RUNS)}, asked.parts)


if __name__ == "__main__":
    main()
