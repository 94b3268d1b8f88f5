"""The benchmark `deepinv`: our solvers of inverse problems beside deepinv's, on the same y, with the same A, network and calls.

deepinv is no requirement of the course. `python -m course_lib.bench_deepinv`, in an environment that has it, measures what
`zoo/deepinv.json` has not yet, row by row, so that a run that was interrupted goes on; `rows(part)` reads it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from course_lib import metrics
from course_lib.denoisers import Counted, low_precision
from course_lib.devices import SampleNoise, generator, one_thread
from course_lib.operators import Blur, LinearOperator, Mask
from course_lib.posterior import ddnm_plus, ddrm, ddrm_start
from course_lib.posterior.gradient import dps, dps_score
from course_lib.posterior.plug_and_play import diffpir
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddpm
from course_lib.types import Denoiser, Noise, float64
from course_lib.zoo import stored
from course_lib.zoo.inverse.problems import SIGMA_Y, WORLDS, posed
from course_lib.zoo.stored import Row

STORED, COMMAND = Path(__file__).parent / "zoo" / "deepinv.json", "python -m course_lib.bench_deepinv"
VERSION = "0.5.0"
INSTALL = f"pip install deepinv=={VERSION}"
PROBLEMS = ("box", "super-resolution", "deblurring")
CALLS, LOW, HIGH, SEEDS, FIRST = 20, 0.01, WORLDS["scenes"].top, (0, 1, 2), 4
"""Calls a picture, the last level above 0 and the first, seeds of the noise, and pictures whose PSNR is stored one by one."""
CLOSE = 0.3
"""Decibels that ours may be behind."""
Setting, Solver = dict[str, Any], Callable[..., Tensor]

GRIDS: dict[str, Callable[[], Tensor]] = {
    "karras": lambda: karras(CALLS, LOW, HIGH),
    # deepinv's own for DDRM, 1 ... 0 of pictures in [0, 1]; it spends a call on 0, which is left out for both
    "even": lambda: torch.linspace(2, 0, CALLS + 1, dtype=torch.float64),
    # deepinv's own for DPS, even in the time of the variance-preserving SDE
    "vp": lambda: _vp_levels(),
}


def peer() -> Any:
    """deepinv and its solvers; ValueError, with the command that installs it, where it cannot be imported."""
    try:
        import deepinv
        import deepinv.sampling
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the second
        raise ValueError(
            f"deepinv cannot be imported ({str(error).splitlines()[0]}); expected an environment of its own with `{INSTALL}`"
        ) from None
    return deepinv


def rows(part: str) -> list[Row]:
    """The stored rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)


# --- the same problem in deepinv's words ---------------------------------------------------------------------------------


def physics(A: LinearOperator, sigma_y: float, own: bool = True) -> Any:
    """A as deepinv's physics: its own masks and blurs, any other A, or all without `own`, by our SVD.

    Its solvers want as many coordinates of y as of x: those that are not measured get the singular value 0.
    """
    dinv = peer()
    noise = dinv.physics.GaussianNoise(sigma_y)
    if own and isinstance(A, Mask):
        return dinv.physics.Inpainting(A.shape, mask=A.observed.float(), noise_model=noise)
    if own and isinstance(A, Blur):
        return dinv.physics.BlurFFT(A.shape, filter=A.kernel.float()[None, None], noise_model=noise)
    svd, n = A.svd(), math.prod(A.shape)
    r = len(svd.s)

    def padded(c: Tensor) -> Tensor:
        return torch.nn.functional.pad(c, (0, n - r))

    return dinv.physics.DecomposablePhysics(
        U=lambda c: svd.U(c[:, :r]),
        U_adjoint=lambda y: padded(svd.Ut(y)),
        V=svd.V,
        V_adjoint=svd.Vt,
        mask=padded(svd.s[None]).to(torch.get_default_dtype()),
        img_size=A.shape,
        noise_model=noise,
    )


def apart(A: LinearOperator) -> float:
    """The largest difference of our A x and deepinv's, over its root mean square, of eight normal x."""
    x = torch.randn(8, *A.shape, generator=generator(1))
    y = A(x)
    return float((physics(A, SIGMA_Y).A(x) - y).abs().max() / y.square().mean().sqrt())


class AsModel(nn.Module):
    """Our Denoiser as deepinv's model(x, sigma), of pictures in [-1, 1]; with `unit` in [0, 1], where sigma is halved."""

    def __init__(self, D: Denoiser, unit: bool = False):
        super().__init__()
        self.D, self.unit = D, unit

    def forward(self, x: Tensor, sigma: Any, **_: Any) -> Tensor:
        sigma = torch.as_tensor(sigma)
        return (self.D(2 * x - 1, 2 * sigma) + 1) / 2 if self.unit else self.D(x, sigma)


# --- the solvers: (D, A, y, noise, setting) of ours, (D, A, y, setting) of theirs, both in [-1, 1] ------------------------


def _start(A: LinearOperator, y: Tensor, noise: Noise, sigma: Tensor) -> Tensor:
    return float(sigma) * noise(y.new_empty(len(y), *A.shape))


def _ddrm(D: Denoiser, A: LinearOperator, y: Tensor, noise: Noise, grid: str, eta: float) -> Tensor:
    sigmas = GRIDS[grid]()
    x = ddrm_start(_start(A, y, noise, sigmas[0]), sigmas[0], A, y, SIGMA_Y)
    return sample(D, x, sigmas, ddrm(A, y, SIGMA_Y, noise, eta))


def _ddrm_with_half(D: Denoiser, A: LinearOperator, y: Tensor, noise: Noise, **setting: Any) -> Tensor:
    """What deepinv draws for a mask or a block average: samples nearer to the mean, with less noise than D is told.

    Its DDRM halves the variance of every coordinate. That is right for its own blur, whose coordinates are the real and the
    imaginary part of half a spectrum, and of all others, which are orthonormal, leaves out half.
    """
    return _ddrm(D, A, y, lambda x: math.sqrt(0.5) * noise(x), **setting)


def _their_ddrm(D: Denoiser, A: LinearOperator, y: Tensor, grid: str, eta: float) -> Tensor:
    """It returns D at the last of its levels, where our step to 0 ends."""
    return peer().sampling.DDRM(AsModel(D), sigmas=GRIDS[grid]()[:-1].numpy(), eta=eta)(y, physics(A, SIGMA_Y))


def _ddnm_plus(D: Denoiser, A: LinearOperator, y: Tensor, noise: Noise, share: float) -> Tensor:
    """From this share of the highest level, as in `restoring`."""
    sigmas = karras(CALLS, LOW, share * HIGH)
    x = ddrm_start(_start(A, y, noise, sigmas[0]), sigmas[0], A, y, SIGMA_Y)
    return sample(D, x, sigmas, ddnm_plus(A, y, SIGMA_Y, noise))


def _diffpir(D: Denoiser, A: LinearOperator, y: Tensor, noise: Noise, lam: float, zeta: float) -> Tensor:
    sigmas = GRIDS["karras"]()
    return sample(D, _start(A, y, noise, sigmas[0]), sigmas, diffpir(A, y, SIGMA_Y, noise, lam, zeta))


def _their_diffpir(D: Denoiser, A: LinearOperator, y: Tensor, lam: float, zeta: float) -> Tensor:
    """On its own grid, which cannot be chosen; its pictures are in [0, 1], and y is moved there by A 1."""
    dinv = peer()
    solver = dinv.sampling.DiffPIR(
        AsModel(D, unit=True), dinv.optim.data_fidelity.L2(), sigma=SIGMA_Y / 2, max_iter=CALLS, zeta=zeta, lambda_=lam
    )
    return 2 * solver((y + A(torch.ones(1, *A.shape))) / 2, physics(A, SIGMA_Y / 2)) - 1


def _dps(D: Denoiser, A: LinearOperator, y: Tensor, noise: Noise, grid: str, guidance: str, weight: float) -> Tensor:
    """The step of the paper, or the score with the measurement's variance raised by sigma^2, as deepinv calls its two."""
    sigmas, step = GRIDS[grid](), ddpm(noise)
    if guidance == "norm":
        step = dps(step, A, y, weight)
    else:
        D = dps_score(D, A, y, SIGMA_Y, weight, variance=lambda sigma: sigma**2)
    return sample(D, _start(A, y, noise, sigmas[0]), sigmas, step)


def _their_dps(D: Denoiser, A: LinearOperator, y: Tensor, grid: str, guidance: str, weight: float) -> Tensor:
    """On its variance-preserving SDE, at the times of our levels."""
    solver = peer().sampling.DDPMSolver(timesteps=vp_times(GRIDS[grid]()))
    model = peer().sampling.DPS(AsModel(D), solver=solver, weight=weight, guidance=guidance, minus_one_one=False)
    return model(y, physics(A, SIGMA_Y)).float()


def vp_times(sigma: Tensor, low: float = 0.1, high: float = 20.0) -> Tensor:
    """t of deepinv's VariancePreservingDiffusion at these levels: low t + (high - low) t^2 / 2 = log(1 + sigma^2)."""
    return ((low**2 + 2 * (high - low) * torch.log1p(float64(sigma) ** 2)).sqrt() - low) / (high - low)


def _vp_levels(low: float = 0.1, high: float = 20.0) -> Tensor:
    t = torch.linspace(1, 0, CALLS + 1, dtype=torch.float64)
    return torch.expm1(low * t + (high - low) * t**2 / 2).sqrt()


class Score(NamedTuple):
    """PSNR in dB of each picture, calls of the network a picture, and seconds of the processor a picture."""

    psnr: list[float]
    calls: float
    seconds: float


class Pair(NamedTuple):
    """Our solver and deepinv's, and as many settings for each to choose among."""

    ours: Solver
    theirs: Solver
    settings: list[Setting]
    their_settings: list[Setting]


_DDRM: list[Setting] = [{"grid": grid, "eta": eta} for grid in ("karras", "even") for eta in (0.85, 1.0)]


def _diffpir_settings(scale: float) -> list[Setting]:
    return [{"lam": scale * lam, "zeta": zeta} for lam, zeta in ((1.0, 0.3), (0.3, 1.0), (1.0, 1.0), (3.0, 1.0))]


def _dps_settings(**weights: tuple[float, float]) -> list[Setting]:
    return [{"grid": "vp", "guidance": guidance, "weight": weight} for guidance in weights for weight in weights[guidance]]


HALVED = "DDRM, half the variance"
PAIRS: dict[str, Pair] = {
    "DDRM": Pair(_ddrm, _their_ddrm, _DDRM, _DDRM),
    HALVED: Pair(_ddrm_with_half, _their_ddrm, _DDRM, _DDRM),
    "DDNM+ beside DDRM": Pair(_ddnm_plus, _their_ddrm, [{"share": share} for share in (1.0, 0.3, 0.1, 0.03)], _DDRM),
    # deepinv's lambda_ counts in [0, 1], where the variance of y's noise is a quarter: twice ours is the same weight
    "DiffPIR": Pair(_diffpir, _their_diffpir, _diffpir_settings(1.0), _diffpir_settings(2.0)),
    "DPS": Pair(
        _dps,
        _their_dps,
        _dps_settings(norm=(3.0, 6.0), annealed=(4.0, 16.0)),
        _dps_settings(norm=(60.0, 200.0), annealed=(4.0, 16.0)),
    ),
}
"""Name -> what is beside what; deepinv has no DDNM, so that ours stands beside its DDRM, the nearest that it has."""
CLAIMED = {("DDRM", "deblurring"), *((solver, problem) for solver in (HALVED, "DiffPIR", "DPS") for problem in PROBLEMS)}
"""Where ours is to be close: DDRM with all of its noise where deepinv has all, with half where it has half, and beyond."""


# --- what is measured ----------------------------------------------------------------------------------------------------


@functools.cache
def network() -> Denoiser:
    """The prior of the scenes, its network in bfloat16 where the hardware has it; solvers stay in float32."""
    return low_precision(WORLDS["scenes"].prior())


def solved(
    run: Solver, setting: Setting, D: Denoiser, A: LinearOperator, y: Tensor, seed: int, noise: Noise | None = None
) -> Tensor:
    """Restored pictures in [-1, 1]; deepinv draws from torch's global stream, which is seeded and put back."""
    given = {"noise": noise or SampleNoise(seed)} if "noise" in inspect.signature(run).parameters else {}
    with one_thread(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return run(D, A, y, **given, **setting).clamp(-1, 1)


@functools.cache  # deepinv's DDRM stands beside three of ours
def scored(run: Solver, setting: tuple[tuple[str, Any], ...], problem: str, split: str, seed: int) -> Score:
    """One solver, ours or deepinv's, at the items of one setting, on all pictures of a split."""
    A, x0, y = posed("scenes", problem, split)
    D = Counted(network())
    begun = time.process_time()
    x = solved(run, dict(setting), D, A, y, seed)
    seconds = time.process_time() - begun
    return Score([metrics.psnr(a, b) for a, b in zip(x, x0, strict=True)], D.rows / len(x0), seconds / len(x0))


def tune(problem: str, solver: str) -> Row:
    """The mean PSNR of each setting of both sides on the validation split, with a seed that is not measured with."""
    row, pair = {"problem": problem, "solver": solver}, PAIRS[solver]
    for side, run, settings in (("", pair.ours, pair.settings), ("their_", pair.theirs, pair.their_settings)):
        tried = [round(statistics.mean(scored(run, tuple(s.items()), problem, "validation", 100).psnr), 3) for s in settings]
        row[f"{side}tried"] = [{**setting, "psnr": psnr} for setting, psnr in zip(settings, tried, strict=True)]
        row[f"{side}chosen"] = settings[tried.index(max(tried))]
    return row


def measure(problem: str, solver: str) -> Row:
    """Both sides on the held-out split at their chosen settings, in turn, seed by seed; errors are over pictures.

    psnr, their_psnr    mean in dB, and `_error`, the standard error over pictures of the mean over seeds
    lead, lead_error    ours less theirs, picture by picture
    ratio, ratio_error  our seconds over theirs, mean over seeds, and its standard error; runs that an earlier row made stand
    first               our PSNR of the first pictures with the first seed, which can be computed again in seconds
    """
    tuned = next(row for row in rows("tuning") if (row["problem"], row["solver"]) == (problem, solver))
    sides = {"": PAIRS[solver].ours, "their_": PAIRS[solver].theirs}
    found: dict[str, list[Score]] = {side: [] for side in sides}
    for seed in SEEDS:
        for side, run in sides.items():
            found[side].append(scored(run, tuple(tuned[f"{side}chosen"].items()), problem, "held out", seed))
    row: Row = {"problem": problem, "solver": solver, "apart": apart(posed("scenes", problem, "held out")[0])}
    means = {}
    for side, runs in found.items():
        means[side] = [statistics.mean(of) for of in zip(*(run.psnr for run in runs), strict=True)]
        row[f"{side}setting"] = tuned[f"{side}chosen"]
        row[f"{side}calls"] = runs[0].calls
        row[f"{side}seconds"] = round(statistics.mean(run.seconds for run in runs), 4)
        row |= _mean(f"{side}psnr", means[side])
    row["first"] = [round(psnr, 2) for psnr in found[""][0].psnr[:FIRST]]
    row |= _mean("lead", [a - b for a, b in zip(*means.values(), strict=True)])
    return row | _mean("ratio", [a.seconds / b.seconds for a, b in zip(*found.values(), strict=True)])


def _mean(name: str, values: Sequence[float]) -> Row:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {name: round(statistics.mean(values), 3), f"{name}_error": round(error, 3)}


def alone(problem: str, solver: str, rounds: int = 11, n: int = 16) -> Row:
    """What the solvers cost beside the network: seconds of CALLS calls on n pictures with D = x / (1 + sigma^2), in turn.

    Each at the first of its settings and with noise from torch's global stream; the median ratio has its standard error.
    """
    A, _, y = posed("scenes", problem, "validation")
    pair, times = PAIRS[solver], ([], [])
    D = lambda x, sigma: x / float(1 + sigma**2)
    for round_ in range(rounds + 1):
        for run, settings, seconds in zip(pair[:2], pair[2:], times, strict=True):
            begun = time.process_time()
            solved(run, settings[0], D, A, y[:n], round_, torch.randn_like)
            if round_:  # the first warms up
                seconds.append(time.process_time() - begun)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    error = 1.2533 * statistics.stdev(ratios) / math.sqrt(rounds)  # a median's error is sqrt(pi / 2) of a mean's
    ours, others = (round(statistics.median(of), 5) for of in times)
    found = {
        "seconds": ours,
        "their_seconds": others,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_error": round(error, 3),
    }
    return {"problem": problem, "solver": solver, **found}


def table() -> list[Row]:
    """What `course bench deepinv` prints: PSNR as stored, and time, measured anew where deepinv can be imported."""
    file = stored.read(STORED, COMMAND)
    try:
        peer()
        again, other = alone, "deepinv, without the network"
    except ValueError as error:
        again, other = None, f"deepinv, without the network; stored, {file['hardware']}: {error}"
    found: list[Row] = []
    for row in rows("solvers"):
        beside = f"{row['psnr']:.2f} dB, deepinv's {row['their_psnr']:.2f}, error of the difference {row['lead_error']:.2f}"
        limit = CLOSE if (row["solver"], row["problem"]) in CLAIMED else None
        value = {"value": -row["lead"], "unit": "dB", "limit": limit, "beside": f"{beside}; stored, {file['hardware']}"}
        found.append({"name": f"behind deepinv, {row['problem']}: {row['solver']}", **value})
    for row in rows("alone"):
        row = again(row["problem"], row["solver"]) if again else row
        seconds = {"ours_s": row["seconds"], "other_s": row["their_seconds"], "other": other, "ratio": row["ratio"]}
        found.append({"name": f"{row['problem']}: {row['solver']}", **seconds, "limit": 1 + 3 * row["ratio_error"]})
    return found


def version(package: str) -> Row:
    """The version of a package that the numbers hang on."""
    return {"package": package, "version": importlib.metadata.version(package)}


KEYS = [{"solver": solver, "problem": problem} for solver in PAIRS for problem in PROBLEMS]
PARTS: stored.Parts = {
    "versions": (version, [{"package": package} for package in ("deepinv", "torch", "torchvision")]),
    "tuning": (tune, KEYS),
    "solvers": (measure, KEYS),
    "alone": (alone, KEYS),
}


def main(parts: Sequence[str]) -> None:
    """Measure what is missing of the named parts, or of all; says how to install deepinv where it cannot be imported."""
    try:
        peer()
        stored.run(STORED, COMMAND, PARTS, parts)
    except ValueError as error:
        raise SystemExit(f"{COMMAND}: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
