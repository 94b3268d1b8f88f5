"""`digits-progressive`, `digits-consistency`: students of `digits` that draw in 4 steps, 2 or 1, for its 64.

Progressive distillation (Salimans and Ho 2022) in rounds of 64 -> 32 -> 16 -> 8 -> 4 -> 2 -> 1 steps, of which the last
three students are kept; consistency distillation (Song et al. 2023). Each student is a low-rank change of the weights
of `digits`: train them again after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import metrics
from course_lib.denoisers import NetworkDenoiser, from_edm
from course_lib.devices import SampleNoise, autocast, channels_last, generator, pick_device
from course_lib.distillation import consistency_distillation, consistency_step, from_consistency, progressive_round
from course_lib.nets.lora import low_rank
from course_lib.nets.unet import UNet
from course_lib.sample import sample
from course_lib.steps import ddim
from course_lib.training import Fit, Rows, check_data
from course_lib.types import Noise, Step
from course_lib.worlds import digits
from course_lib.zoo.recipes import digits as teacher_recipe
from course_lib.zoo.recipes.digits import CLASS_DROPOUT, SIGMA_DATA

DATA = "the samples of `digits` along its own flow, from scikit-learn's first 1,437 digits with noise, 16 x 16"
RANK, BATCH, LR, SEED = 8, 32, 2e-3, 0
TEACHER_STEPS = 64
ROUNDS = {32: 150, 16: 250, 8: 500, 4: 1300, 2: 500, 1: 500}
"""The student's steps -> how long it trains: the long strides are the hard ones."""
KEPT = (4, 2, 1)
CONSISTENCY_STEPS, LEVELS, MU = 1200, 18, 0.95
HUBER = 0.00054 * 16
"""c of the pseudo-Huber metric: 0.00054 sqrt(d) with d = 256 pixels (Song and Dhariwal 2024, Sec. 3.3)."""
SIGMA_MIN, SIGMA_MAX = 0.01, 15.0
CALLS = {1: (15.0,), 2: (15.0, 0.9), 4: (15.0, 4.0, 1.2, 0.5)}
"""The levels from which the consistency function is called, by the number of calls."""
JUDGED = 1797
"""Samples of each row of the card: one for each real digit, of its class."""


def grid(steps: int) -> Tensor:
    """The levels of a progressive student of 64, 32, ..., 2 or 1 steps, (steps + 1,): some of those of the teacher's 64."""
    if steps not in (TEACHER_STEPS, *ROUNDS):
        raise ValueError(f"steps = {steps}; expected one of {', '.join(map(str, (TEACHER_STEPS, *ROUNDS)))}")
    return teacher_recipe.grid(TEACHER_STEPS)[:: TEACHER_STEPS // steps]


def levels(calls: int) -> Tensor:
    """The grid of 1, 2 or 4 calls of the consistency function, for `consistency_step`, (calls + 1,)."""
    if calls not in CALLS:
        raise ValueError(f"calls = {calls}; expected one of {', '.join(map(str, CALLS))}")
    return torch.tensor([*CALLS[calls], 0.0], dtype=torch.float64)


def teacher_net() -> UNet:
    """The network of `digits`, without the dropout of its training: the target is a function."""
    from course_lib import zoo

    net = UNet(channels=1, widths=(32, 64), blocks=2, attention=(1,), classes=digits.CLASSES)
    net.load_state_dict(zoo.read("digits").state_dict())
    return net.eval().requires_grad_(False)


def network(name: str) -> nn.Module:
    """A student that is still its teacher; of `digits-progressive` the three that are kept."""
    parent = teacher_net()
    return low_rank(parent, RANK) if name == "digits-consistency" else nn.ModuleList(low_rank(parent, RANK) for _ in KEPT)


def believed(net: nn.Module, label: Tensor) -> NetworkDenoiser:
    """The Denoiser that a network is for these classes."""
    return from_edm(net, SIGMA_DATA, label=label)


def consistent(net: nn.Module, label: Tensor) -> NetworkDenoiser:
    """The consistency function that a network is for these classes."""
    return from_consistency(net, SIGMA_DATA, SIGMA_MIN, label=label)


def wrap(net: nn.Module) -> NetworkDenoiser | dict[int, NetworkDenoiser]:
    """What `zoo.load` returns: the consistency function, for `levels`; or Denoisers by their number of steps, for `grid`.

    `.given(label=...)` asks for classes, as of `digits`.
    """
    net.eval()
    if isinstance(net, nn.ModuleList):
        return {steps: from_edm(one, SIGMA_DATA) for steps, one in zip(KEPT, net, strict=True)}
    return from_consistency(net, SIGMA_DATA, SIGMA_MIN)


def train(name: str, net: nn.Module | None = None, lr: float = LR, seed: int = SEED, **options: Any) -> Fit:
    """Distil the embedded `digits`; `steps` counts those of all rounds."""
    images, labels = digits.load("train")
    check_data(images, "images")

    def batch(source: torch.Generator) -> Rows:
        rows = torch.randint(len(images), (BATCH,), generator=source)
        dropped = torch.rand(BATCH, generator=source) < CLASS_DROPOUT
        eps = torch.randn((BATCH, *digits.SHAPE), generator=source)
        return images[rows], eps, labels[rows].masked_fill(dropped, digits.CLASSES)

    torch.manual_seed(seed)
    where = pick_device(options.get("device"))
    teacher = channels_last(teacher_net(), where)
    if name == "digits-progressive":
        return _rounds(teacher, net, batch, lr=lr, seed=seed, **options)
    options = {"steps": CONSISTENCY_STEPS, **options}
    student = network(name) if net is None else net
    sigmas = teacher_recipe.grid(LEVELS)[:-1]
    return consistency_distillation(
        lambda label: believed(teacher, label), student, consistent, batch, sigmas, c=HUBER, mu=MU, lr=lr, seed=seed, **options
    )


def _rounds(
    teacher: nn.Module,
    net: nn.ModuleList | None,
    batch: Callable[[torch.Generator], Rows],
    *,
    seed: int,
    steps: int | None = None,
    stop_at: int | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> Fit:
    """All rounds of progressive distillation, each from the student before; those that are kept start from `net` if given."""
    student, begin, total, done = low_rank(teacher, RANK), 0, sum(ROUNDS.values()), 0
    kept, losses, stages = {}, [], {}
    for index, (n, length) in enumerate(ROUNDS.items()):
        done += length
        end = done if steps is None else done * steps // total
        if stop_at is not None and begin >= stop_at:
            break
        if net is not None and n in KEPT:
            student = net[KEPT.index(n)]
        if end > begin:
            one = {"steps": end - begin, "stop_at": None if stop_at is None else stop_at - begin, "seed": seed + index, **options}
            one["checkpoint"] = None if checkpoint is None else checkpoint.with_suffix(f".{n}{checkpoint.suffix}")
            believed_of_teacher = lambda label, net=teacher: believed(net, label)
            run = progressive_round(believed_of_teacher, student, believed, batch, grid(2 * n), **one)
            student, losses, begin = run.net, losses + run.losses, end
            stages[f"{n} steps"] = run.seconds
        if n in KEPT:
            kept[n] = student
        teacher, student = student, copy.deepcopy(student).requires_grad_(True)
    return Fit(nn.ModuleList(kept.values()), losses, sum(stages.values()), stages)


def draw(
    D: NetworkDenoiser, labels: Tensor, sigmas: Tensor, seed: int = 1, step: Callable[[Noise], Step] = lambda noise: ddim
) -> Tensor:
    """Sample one digit per label along `sigmas`; (N, 1, 16, 16), clipped to [-1, 1]. Digit i has the same noise in every call."""
    out = []
    for first in range(0, len(labels), 500):
        chunk, noise = labels[first : first + 500], SampleNoise(seed, first)
        x = noise.start((len(chunk), *digits.SHAPE), sigmas[0])
        with autocast(x.device):
            out.append(sample(D.given(label=chunk), x, sigmas, step(noise)).clamp(-1, 1))
    return torch.cat(out)


def consistency(noise: Noise) -> Step:
    """The step of the consistency function, for `draw`."""
    return consistency_step(noise, SIGMA_MIN)


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """The numbers of the card: distance, precision and recall, and classes read, by the number of calls, beside the teacher's.

    Row i of every sample has the same noise and class. The interval of `frechet_4_over_64` draws rows of student and
    teacher together; `frechet_floor` is what as many real digits, drawn with replacement, give.
    """
    from course_lib import zoo
    from course_lib.zoo import judge_digits

    readers = {reader: zoo.load(reader, device="cpu") for reader in ("digits-reader", "digits-reader-2")}
    images, labels = digits.load("all")
    real, asked = judge_digits.grey(images), labels[torch.arange(JUDGED) % len(labels)]
    D, teacher = wrap(channels_last(net, "cpu")), zoo.load("digits", device="cpu")
    if name == "digits-progressive":
        students = {calls: draw(D[calls], asked, grid(calls)) for calls in KEPT}
        teachers = {calls: draw(teacher, asked, grid(calls)) for calls in (TEACHER_STEPS, *KEPT)}
    else:
        students, teachers = {calls: draw(D, asked, levels(calls), step=consistency) for calls in CALLS}, {}
    teachers[20] = draw(teacher, asked, teacher_recipe.grid(20))

    def row(samples: Tensor) -> dict[str, Any]:
        read = {key: round(float((reader(samples).argmax(1) == asked).double().mean()), 4) for key, reader in readers.items()}
        return {**judge_digits.quality(judge_digits.grey(samples), real), "class_read_as_asked": read}

    features = metrics.pca_features(real, 16)
    facts = {
        "teacher_sha256": zoo.card("digits")["sha256"],
        "samples": JUDGED,
        "student": {str(calls): row(samples) for calls, samples in students.items()},
        "teacher": {str(calls): row(samples) for calls, samples in teachers.items()},
        "frechet_floor": round(_floor(features(real)), 4),
    }
    if TEACHER_STEPS not in teachers:
        return facts
    pair = torch.cat([features(judge_digits.grey(samples)) for samples in (students[4], teachers[TEACHER_STEPS])], 1)
    ratio = lambda pair: (
        metrics.frechet_distance(features(real), pair[:, :16]) / metrics.frechet_distance(features(real), pair[:, 16:])
    )
    gaps = {calls: (samples - teachers[TEACHER_STEPS]).square().mean().sqrt() for calls, samples in students.items()}
    plain = {calls: (teachers[calls] - teachers[TEACHER_STEPS]).square().mean().sqrt() for calls in KEPT}
    return facts | {
        "frechet_4_over_64": round(ratio(pair), 4),
        "frechet_4_over_64_interval": [round(end, 4) for end in metrics.bootstrap(ratio, pair)],
        "rms_from_64_steps": {str(calls): round(float(gap), 4) for calls, gap in gaps.items()},
        "rms_from_64_steps_of_the_teacher": {str(calls): round(float(gap), 4) for calls, gap in plain.items()},
    }


def _floor(real: Tensor, rounds: int = 8) -> float:
    """Mean Frechet distance of JUDGED rows, drawn from `real` with replacement, to `real`."""
    draws = [real[torch.randint(len(real), (JUDGED,), generator=generator(90, k))] for k in range(rounds)]
    return sum(metrics.frechet_distance(real, rows) for rows in draws) / rounds
