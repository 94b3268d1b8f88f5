"""Compressed sensing of digits by a sampler of three wired steps, before and after it is trained end to end (Chen et al. 2024).

`python -m course_lib.zoo.invertible` measures the seeds that `invertible.json` has not yet; `rows()` reads it.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from course_lib import devices, metrics, zoo
from course_lib.operators import GaussianCS
from course_lib.reversible import InvertibleSampler, Measured, SavedBytes
from course_lib.sample import sample
from course_lib.training import learning_rate
from course_lib.types import Denoiser
from course_lib.worlds import digits
from course_lib.zoo import stored
from course_lib.zoo.stored import Row

STORED = Path(__file__).with_name("invertible.json")
COMMAND = "python -m course_lib.zoo.invertible"
SEEDS = (0, 1, 2)
SHARE, V = 0.25, 0.2
LEVELS = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
"""The first is about the error of A^+ y in a pixel, which the network takes for noise."""
STEPS, BATCH, LR, TEST = 30, 8, 5e-4, 64


def problem(seed: int) -> GaussianCS:
    """64 Gaussian measurements of the 256 pixels, without noise."""
    n = torch.Size(digits.SHAPE).numel()
    return GaussianCS(digits.SHAPE, round(SHARE * n), devices.generator(seed, 0))


def wired(A: GaussianCS, stored: bool = False) -> InvertibleSampler:
    """Three steps on the network of `digits`, without a class. Each call has the embedded weights anew."""
    return InvertibleSampler(zoo.load("digits", device="cpu"), LEVELS, A, v=V, stored=stored).requires_grad_(True)


def unwired(D: Denoiser, A: GaussianCS, y: Tensor) -> Tensor:
    """The same steps one after the other: DDIM whose x0 is brought to the measurement, the noise's direction kept."""
    return sample(D, A.pinv(y), LEVELS, lambda D, x, high, low, memory=None: (Measured(D, high, low, A)(x, y), None))


def saved_bytes(A: GaussianCS, images: Tensor, stored: bool) -> int:
    """The most bytes that one training step saves for the backward pass."""
    model = wired(A, stored)
    with SavedBytes(model.parameters()) as saved:
        (model(y=A(images)) - images).square().mean().backward()
    return saved.peak


def measure(seed: int, steps: int = STEPS) -> Row:
    """PSNR of held-out digits from A^+ y, from the steps unwired, and from the wired ones before and after training."""
    A, source = problem(seed), devices.generator(seed, 1)
    train, test = digits.load("train")[0], digits.load("test")[0][:TEST]
    model, y = wired(A), A(test)
    with torch.no_grad():
        ways = {"start": A.pinv(y), "unwired": unwired(zoo.load("digits", device="cpu"), A, y), "before": model(y=y)}
    row: Row = {name: metrics.mean_psnr(x, test) for name, x in ways.items()}
    for name, stored_ in (("saved_plain", True), ("saved_reversible", False)):
        row[name] = saved_bytes(A, train[:BATCH], stored_)
    optimiser, start = torch.optim.Adam(model.parameters(), LR), time.process_time()
    for k in range(steps):
        images = train[torch.randint(len(train), (BATCH,), generator=source)]
        optimiser.param_groups[0]["lr"] = learning_rate(k, steps, LR, warmup=5)
        optimiser.zero_grad()
        (model(y=A(images)) - images).square().mean().backward()
        optimiser.step()
    row["seconds"] = round(time.process_time() - start, 2)
    with torch.no_grad():
        row["after"] = metrics.mean_psnr(model(y=y), test)
    return {"seed": seed, "steps": steps, **row}


def rows() -> list[Row]:
    """The stored rows, one for each seed; ValueError, with the command, where none is."""
    return stored.rows(STORED, COMMAND, "seeds")


def main() -> None:
    """Measure the seeds that are missing, on one thread."""
    with devices.one_thread():
        stored.run(STORED, COMMAND, {"seeds": (measure, [{"seed": seed} for seed in SEEDS])}, ())


if __name__ == "__main__":
    main()
