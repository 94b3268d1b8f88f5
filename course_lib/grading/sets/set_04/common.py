"""What several items of set 04 share: exact denoisers of labelled data, a record of what was asked, laws of weighted sums."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable
from course_lib.grading.sets.tools import T, fit, right

PLANE, PICTURE = (3, 2), (4, 1, 2, 2)
CENTRES = torch.tensor([-1.1, -0.3, 0.6, 1.4, 0.1], dtype=torch.float64)  # the last is the null class
VARIANCES = torch.tensor([0.15, 0.3, 0.2, 0.1, 0.8], dtype=torch.float64)
NULL = len(CENTRES) - 1


class Labelled:
    """D(x, sigma, label) of data that have two peaks in each number, about a centre of their class; counts its calls.

    Refuses what a real network would refuse: labels that it does not know, or levels and labels that do not fit the batch.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, sigma: Tensor | float, label: Tensor | int) -> Tensor:
        s = levels(sigma, x)
        label = T(label)
        if label.is_floating_point() or label.ndim > 1 or label.numel() not in (1, len(x)):
            raise Unacceptable(
                f"D(x, sigma, label) is asked with labels of shape {tuple(label.shape)} and type {label.dtype} for "
                f"{len(x)} samples; expected integers, (B,)"
            )
        if bool(((label < 0) | (label > NULL)).any()):
            raise Unacceptable(
                f"D(x, sigma, label) is asked for a class that it does not know; expected 0 to {NULL}, the null class"
            )
        label = label.reshape(-1).expand(len(x))
        self.calls.append((x.detach(), s.detach().reshape(-1), label))
        m, v = right(CENTRES[label], x), right(VARIANCES[label], x)
        total = v + s**2
        return m + (v * (x - m) + s**2 * 0.7 * torch.tanh(0.7 * (x - m) / total)) / total

    def given(self, label: Tensor | int) -> Given:
        """D(x, sigma) for fixed labels."""
        return Given(self, label)


class Given:
    """D(x, sigma) of one condition, with calls of its own to count."""

    def __init__(self, D: Labelled, label: Tensor | int) -> None:
        self.D, self.label, self.count = D, label, 0

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        self.count += 1
        return self.D(x, sigma, self.label)


def levels(sigma: Tensor | float, x: Tensor) -> Tensor:
    """sigma as (B, 1, ...); Unacceptable for the shapes that a real network would refuse."""
    sigma = T(sigma, dtype=torch.float64)
    if sigma.ndim > 1 or sigma.numel() not in (1, len(x)):
        raise Unacceptable(
            f"D is asked with sigma of shape {tuple(sigma.shape)} for {len(x)} samples; expected a single number or ({len(x)},)"
        )
    return right(sigma.reshape(-1).expand(len(x)), x)


def level(value: float) -> Tensor:
    """A noise level, 0-d float64: what a student's function is given."""
    return torch.tensor(value, dtype=torch.float64)


def ask(case: Case, label: np.ndarray | int) -> np.ndarray:
    """D at the case's x and sigma, for a law."""
    return Labelled()(T(case["x"]), T(case["sigma"], dtype=torch.float64), T(label)).numpy()


def classes(rng: np.random.Generator, n: int) -> np.ndarray:
    """n labels of which neighbours differ."""
    return (rng.integers(NULL) + np.cumsum(rng.integers(1, NULL, n))) % NULL


def noised(rng: np.random.Generator, shape: tuple[int, ...], sigma: np.ndarray | float) -> np.ndarray:
    """Points as they are found at the level sigma, a number or one for each sample."""
    sigma = np.asarray(sigma).reshape(-1, *[1] * (len(shape) - 1))
    return rng.normal(size=shape) * (1 + sigma**2) ** 0.5


def guided_case(rng: np.random.Generator, shape: tuple[int, ...], w: float | None = None) -> Case:
    """A batch at one level, with labels, and a scale above 1 where none is given."""
    sigma = float(rng.uniform(0.5, 1.5))
    return {
        "x": noised(rng, shape, sigma),
        "sigma": sigma,
        "label": classes(rng, shape[0]),
        "w": float(rng.uniform(1.8, 4.0)) if w is None else w,
    }


def factors(target: np.ndarray, *terms: np.ndarray) -> np.ndarray | None:
    """The factors of a weighted sum of `terms`; None where `target` is none."""
    found, rest = fit(target, *terms)
    return found if rest < 1e-8 else None


def close(a: object, b: object) -> bool:
    """Whether two arrays agree, as one truth value for a law."""
    return bool(np.allclose(a, b, rtol=1e-6, atol=1e-9))


def one_call(D: Labelled) -> Outputs:
    """What the network was asked in all its calls, as arrays, and how often it was."""
    if not D.calls:
        raise Unacceptable("the network was never called")
    x, sigma, label = (torch.cat(parts) for parts in zip(*D.calls, strict=True))
    return {
        "net_x": x.numpy(),
        "net_sigma": sigma.numpy(),
        "net_label": label.double().numpy(),
        "calls": np.array(float(len(D.calls))),
    }
