"""Blind super-resolution of scenes: BlindDiff beside solvers that hold a kernel fixed, the wrong one and the true one.

`python -m course_lib.zoo.blind` measures the seeds that `blind.json` has not yet; `rows()` reads it.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from course_lib import devices, metrics, zoo
from course_lib.devices import SampleNoise, autocast, generator
from course_lib.posterior.blind import BlindDiff, Conditional, gaussian_kernels
from course_lib.restoring import SOLVERS, Task
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.zoo import stored
from course_lib.zoo.recipes.scenes_blind import MIDDLE, SHARPEST, SIGMA_Y, A, draw_kernels, observe, scenes
from course_lib.zoo.stored import Row

STORED = Path(__file__).with_name("blind.json")
COMMAND = "python -m course_lib.zoo.blind"
SEEDS = (0, 1, 2)
N, FIRST = 32, 4
"""Pictures of a seed, and those whose numbers are also stored one by one."""
CALLS, LOW, HIGH = 12, 0.02, 5.0


def problem(seed: int, n: int = N, split: str = "held out") -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (n, 3, 32, 32) of their own for each seed, the theta (n, 3) of their kernels, and measurements (n, 3, 16, 16)."""
    x0 = scenes(split, N * seed + torch.arange(n))
    theta = draw_kernels(N, generator(seed, 0))[:n].double()
    return x0, theta, torch.cat([observe(x0[i : i + 1], theta[i : i + 1], generator(seed, 1, i)) for i in range(n)]).float()


def kernel_error(theta: Tensor, true: Tensor) -> Tensor:
    """|k - k_true| of each row, the Euclidean norm over pixels, (B,); theta (B or 1, 3), true (B, 3)."""
    found, kernel = (gaussian_kernels(one, A.kernel_shape[0]) for one in (theta.double(), true.double()))
    return (found - kernel).flatten(1).norm(dim=1)


def psnr(x: Tensor, x0: Tensor) -> Tensor:
    """Of each picture, in dB, (B,)."""
    return torch.tensor([metrics.psnr(a.clamp(-1, 1), b) for a, b in zip(x, x0, strict=True)])


def restore(y: Tensor, start: Tensor, seed: int, alternate: bool = True) -> tuple[Tensor, Tensor]:
    """BlindDiff from kernels `start`: pictures, and the kernels found; without `alternate` those of the start are kept."""
    D, sigmas = zoo.load("scenes-blind", device="cpu").given(y=y), karras(CALLS, LOW, HIGH)
    step = BlindDiff(A, y, SIGMA_Y, start, alternate=alternate)
    with torch.no_grad(), autocast("cpu"):
        x = sample(D, SampleNoise(seed).start((len(y), *A.shape), HIGH), sigmas, step)
    return x.float(), step.found


def ddnm(y: Tensor, theta: Tensor, seed: int) -> Tensor:
    """DDNM+ with the unconditional `scenes-prior` and kernels theta, (1, 3) for all or one each."""
    prior, pictures = zoo.load("scenes-prior", device="cpu"), []
    kernels = gaussian_kernels(theta, A.kernel_shape[0])
    for first, part in enumerate(y.split(len(y) // len(theta))):
        task = Task(prior, A.at(kernels[first]), part, SIGMA_Y, CALLS, LOW, 40.0, SampleNoise(seed, first))
        with torch.no_grad(), autocast("cpu"):
            pictures.append(SOLVERS["DDNM+"](task).float())
    return torch.cat(pictures)


def of_known_pictures(x0: Tensor, y: Tensor) -> Tensor:
    """The kernels (B, 3) that fit best where the picture is known: least squares, what no blind method can beat."""
    nothing = torch.full((len(y), 3), 1e3, dtype=torch.float64)
    return Conditional(A, y, SIGMA_Y, x0, 1e-12, SHARPEST, nothing).kernel(SHARPEST.expand(len(y), 3), steps=12)


def measure(seed: int) -> Row:
    """Errors of the kernels and PSNR of the pictures, as means over N held-out scenes; BlindDiff starts from SHARPEST."""
    x0, theta, y = problem(seed)
    begun = time.process_time()
    x, found = restore(y, SHARPEST, seed)
    seconds = time.process_time() - begun
    with torch.no_grad():
        guess, _ = zoo.load("scenes-blind", device="cpu").given(y=y).guess(x, torch.tensor(LOW))
    kernels = {"initial": SHARPEST, "middle": MIDDLE, "guess": guess, "found": found, "known_picture": of_known_pictures(x0, y)}
    errors = {name: kernel_error(one, theta) for name, one in kernels.items()}
    wrong_and_true = {"initial": SHARPEST, "middle": MIDDLE, "true": theta}
    restored = {"blind": psnr(x, x0)}
    for name, one in wrong_and_true.items():
        restored[f"kept_{name}"] = psnr(restore(y, one, seed, alternate=False)[0], x0)
        restored[f"ddnm_{name}"] = psnr(ddnm(y, one, seed), x0)
    return {
        "seed": seed,
        "kernel_error": {name: round(float(error.mean()), 5) for name, error in errors.items()},
        "psnr": {name: round(float(of.mean()), 3) for name, of in restored.items()},
        "first": {
            "found": [round(v, 5) for v in errors["found"][:FIRST].tolist()],
            "psnr": [round(v, 2) for v in restored["blind"][:FIRST].tolist()],
        },
        "seconds": round(seconds / N, 4),
    }


def rows() -> list[Row]:
    """The stored rows, one for each seed; ValueError, with the command, where none is."""
    return stored.rows(STORED, COMMAND, "seeds")


def main() -> None:
    """Measure the seeds that are missing, on one thread."""
    with devices.one_thread():
        stored.run(STORED, COMMAND, {"seeds": (measure, [{"seed": seed} for seed in SEEDS])}, ())


if __name__ == "__main__":
    main()
