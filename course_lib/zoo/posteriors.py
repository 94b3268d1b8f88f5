"""One problem in the plane and its exact posterior: which solver draws it, which only finds a likely point, at what cost.

`python -m course_lib.zoo.posteriors` tunes and measures what `posteriors.json` has not yet, `table()` is what came out, and
`samples(...)` draws one solver's points for a figure.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_lib import devices, metrics, restoring
from course_lib.denoisers import Counted
from course_lib.gaussians import Mixture
from course_lib.nets.realnvp import RealNVP
from course_lib.operators import Matrix
from course_lib.posterior import dps_score, mcgdiff, tds
from course_lib.restoring import Task
from course_lib.steps import ddpm
from course_lib.variational import fit_posterior
from course_lib.zoo import stored
from course_lib.zoo.stored import Row

F64 = torch.float64
STORED = Path(__file__).with_name("posteriors.json")
COMMAND = "python -m course_lib.zoo.posteriors"
PRIOR = Mixture.isotropic(
    torch.tensor([[-2.0, -1.5], [-1.5, 2.0], [2.0, -2.0], [2.0, 1.5], [0.2, 0.0]]), 0.5, torch.tensor([5.0, 4.0, 4.0, 4.0, 3.0])
)
OPERATOR = Matrix(torch.tensor([[1.0, 0.5]], dtype=F64))
Y, SIGMA_Y = 0.4, 0.5
"""Three of the five modes explain this y, along the line that A does not see."""
CALLS, LOW, HIGH, N = 100, 0.02, 10.0, 2000
"""Calls of D for each sample, but for RealNVP's fit; the levels' ends; samples."""
SEEDS, TUNING_SEED = (0, 1, 2), 100


@functools.cache
def posterior() -> Mixture:
    """p(x0 | y), exactly."""
    return PRIOR.posterior(OPERATOR.A, torch.tensor([Y]), SIGMA_Y)


@functools.cache
def exact() -> Tensor:
    """The points that samples are held against, so many that their own chance hardly counts; (20 N, 2)."""
    return posterior().sample(20 * N, devices.generator(0, 8))


def _dps_score(task: Task, zeta: float = 1.0) -> Tensor:
    return task.run(ddpm(task.noise), D=dps_score(task.D, task.A, task.y, task.sigma_y, zeta))


def _mcgdiff(task: Task, particles: int = 1000) -> Tensor:
    return task.run(mcgdiff(task.A, task.y[:1], task.sigma_y, task.noise, particles=particles))


def _tds(task: Task, particles: int = 1000) -> Tensor:
    return task.run(tds(task.A, task.y[:1], task.sigma_y, task.noise, particles=particles))


def _realnvp(task: Task, lr: float = 3e-3, batch: int = 64, steps: int = 600, entropy: float = 1.0) -> Tensor:
    """The network's first weights are drawn of a seed that is the first number of the task's noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(abs(int(1e9 * float(task.noise(torch.zeros(1, dtype=F64))))))
        q = RealNVP(2, layers=8, width=64)
    fit_posterior(q, task.D, task.A, task.y[:1], task.sigma_y, task.noise, steps, batch, lr, entropy, task.low, 80.0)
    return q.inverse(task.noise(torch.zeros(len(task.y), 2)))


SOLVERS: dict[str, Callable[..., Tensor]] = {
    **{name: solve for name, solve in restoring.SOLVERS.items() if name not in ("ILVR", "CCDF", "DDNM", "mixed projection")},
    "DPS, score form": _dps_score,
    "MCGdiff": _mcgdiff,
    "TDS": _tds,
    "RealNVP": _realnvp,
}
"""Name -> solver(task, **setting). Of lecture 06's those that take noise into account and ask for no estimate to start from."""

SETTINGS: dict[str, list[dict[str, Any]]] = {
    **restoring.SETTINGS,
    "RePaint": [{"jump": 1, "resamplings": n} for n in (2, 3, 4, 6)],
    "CSGM": [{"c": c, "share": share} for c in (0.1, 0.5) for share in (0.3, 1.0)],
    "RED-diff": [{"lr": lr, "share": share} for lr in (0.03, 0.1) for share in (0.3, 1.0)],
    "DAPS": [{"ode_steps": n, "c": c} for n in (1, 2) for c in (0.05, 0.2)],
    "PnP-Flow": [{"alpha": alpha, "share": share} for alpha in (0.5, 1.0) for share in (0.3, 1.0)],
    "DPS": [{"zeta": zeta} for zeta in (0.3, 1.0, 3.0, 6.0)],
    "MCG": [{"zeta": zeta} for zeta in (0.1, 0.3, 1.0, 3.0)],
    "DPS, score form": [{"zeta": zeta} for zeta in (0.1, 0.3, 0.6, 1.0)],
    "MCGdiff": [{"particles": n} for n in (250, 500, 1000, 2000)],
    "TDS": [{"particles": n} for n in (250, 500, 1000, 2000)],
    "RealNVP": [{"lr": lr, "batch": batch} for lr in (3e-3, 1e-2) for batch in (32, 64)],
}
"""Four settings for each solver; those of `restoring` but where they are sizes of pictures."""


def samples(solver: str, seed: int = 0, n: int = N, **setting: Any) -> tuple[Tensor, Row]:
    """n points of a solver, (n, 2) float64, and what they cost: calls of D, rows of them for a sample, seconds of one thread.

    Without a setting its own defaults. Raises ValueError for an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver = {solver!r}; expected one of {', '.join(SOLVERS)}")
    source, D = devices.generator(seed, 7), Counted(PRIOR.denoiser)
    noise = lambda x: torch.randn(x.shape, generator=source, dtype=x.dtype)
    task = Task(D, OPERATOR, torch.full((n, 1), Y, dtype=F64), SIGMA_Y, CALLS, LOW, HIGH, noise)
    with devices.one_thread(), torch.no_grad():
        begun = time.process_time()
        x = SOLVERS[solver](task, **setting).double()
        seconds = time.process_time() - begun
    return x, {"calls": D.calls, "rows": round(D.rows / n, 2), "seconds": round(seconds, 3)}


def judge(x: Tensor, seed: int = 0) -> Row:
    """Points (n, 2) against the exact posterior.

    w1     sliced Wasserstein-1 over 100 directions; of exact points it is `floor()`
    width  root mean square distance to the mean of the mode that a point belongs to, over the posterior's own: 1 for samples
           of it, near 0 for points that are each the likeliest of a mode
    tv     total variation between the shares of the points that belong to each mode, each to the likeliest, and the weights
    """
    target = posterior()
    mode = target.responsibilities(x).argmax(1)
    own = target.covs.diagonal(dim1=1, dim2=2).sum(1) @ target.weights
    shares = torch.bincount(mode, minlength=len(target.weights)) / len(x)
    found = {
        "w1": metrics.sliced_wasserstein(x, exact(), 100, seed),
        "width": ((x - target.means[mode]).square().sum(1).mean() / own).sqrt(),
        "tv": (shares - target.weights).abs().sum() / 2,
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def measure_floor(points: int) -> Row:
    """The w1 of exact points, mean and standard deviation over eight sets."""
    sets = (posterior().sample(points, devices.generator(k, 9)) for k in range(8))
    values = [metrics.sliced_wasserstein(x, exact(), 100, k) for k, x in enumerate(sets)]
    return {"points": points, "w1": round(statistics.mean(values), 4), "deviation": round(statistics.stdev(values), 4)}


def floor() -> tuple[float, float]:
    """The stored w1 of N exact points by chance, mean and standard deviation."""
    (row,) = rows("floor")
    return row["w1"], row["deviation"]


def settings(solver: str) -> list[dict[str, Any]]:
    """What a solver may choose among."""
    return SETTINGS.get(solver, [{}])


def tune(solver: str) -> Row:
    """The w1 of each setting, with a seed that is not measured with; None where it diverged."""
    tried = []
    for setting in settings(solver):
        try:
            tried.append({**setting, "w1": judge(samples(solver, TUNING_SEED, **setting)[0], TUNING_SEED)["w1"]})
        except FloatingPointError:
            tried.append({**setting, "w1": None})
    sound = [k for k, one in enumerate(tried) if one["w1"] is not None]
    best = settings(solver)[min(sound, key=lambda k: tried[k]["w1"])] if sound else None
    return {"solver": solver, "tried": tried, "chosen": best}


def chosen(solver: str) -> dict[str, Any]:
    """The setting of the lowest w1; ValueError for a solver that was not tuned, or diverged with each."""
    for row in rows("tuning"):
        if row["solver"] == solver and row["chosen"] is not None:
            return row["chosen"]
    raise ValueError(f"solver = {solver!r} has no setting in {STORED.name}; run `{COMMAND}`")


def measure(solver: str, seed: int) -> Row:
    """One solver at its chosen setting."""
    setting = chosen(solver)
    x, cost = samples(solver, seed, **setting)
    return {"solver": solver, "seed": seed, "setting": setting, **judge(x, seed), **cost}


def rows(part: str = "solvers") -> list[Row]:
    """The stored rows of 'solvers', 'tuning' or 'floor'; ValueError, with the command, where there are none."""
    return stored.rows(STORED, COMMAND, part)


def table() -> list[Row]:
    """One row for each solver, nearest first: means over seeds, `deviation` of the w1, and the cost."""
    found = []
    for solver in dict.fromkeys(row["solver"] for row in rows()):
        runs = [row for row in rows() if row["solver"] == solver]
        means = {name: statistics.mean(row[name] for row in runs) for name in ("w1", "width", "tv", "calls", "rows", "seconds")}
        deviation = statistics.stdev(row["w1"] for row in runs) if len(runs) > 1 else 0.0
        found.append({"solver": solver, **means, "deviation": deviation})
    return sorted(found, key=lambda row: row["w1"])


def main() -> None:
    """Tune and measure what is missing."""
    names = [{"solver": solver} for solver in SOLVERS]
    stored.run(STORED, COMMAND, {"floor": (measure_floor, [{"points": N}]), "tuning": (tune, names)}, ())
    sound = [row["solver"] for row in rows("tuning") if row["chosen"] is not None]
    keys = [{"solver": solver, "seed": seed} for solver in sound for seed in SEEDS]
    stored.run(STORED, COMMAND, {"solvers": (measure, keys)}, ())


if __name__ == "__main__":
    main()
