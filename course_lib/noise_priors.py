"""Where sampling starts under a segmentation map: noise with the moments that noised scenes have there (SCP-Diff).

A schedule that ends at alpha_bar > 0 leaves some of x0 in x_T, and networks are trained on that; samplers start from N(0, I) all
the same. Gao et al. 2024 start from what a class is like at each place:

    x = x0 + sigma eps,  x0 ~ N(m, v) in each number,  so x ~ N(m, v + sigma^2)

where m and v are measured on training scenes: at each place (`spatial`), of each class (`categorical`), or of each class at each
place (`joint`). The start that is usual is m = 0 and v = 1 (`plain`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.types import Noise, float64, right


@dataclass(frozen=True)
class NoisePrior:
    """Moments of the latents of K classes at each place: mean and variance (K, C, h, w)."""

    mean: Tensor
    variance: Tensor

    def moments(self, labels: Tensor, sigma: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean and variance of x at level sigma under the classes (B, h, w): two tensors (B, C, h, w).

        Raises ValueError for labels of another shape, and for one that is no class.
        """
        _check_labels(labels, self.mean.shape[-2:], len(self.mean))
        at = labels[:, None, None].expand(-1, 1, *self.mean.shape[1:])  # (B, 1, C, h, w)
        mean, variance = (part.expand(len(labels), *part.shape).gather(1, at)[:, 0] for part in (self.mean, self.variance))
        return mean, variance + right(float64(sigma) ** 2, variance)

    def start(self, labels: Tensor, sigma: Tensor | float, noise: Noise) -> Tensor:
        """x = m + sqrt(v + sigma^2) noise at level sigma, for the classes (B, h, w): (B, C, h, w)."""
        mean, variance = self.moments(labels, sigma)
        return mean + variance.sqrt() * noise(mean)

    def nats(self, x0: Tensor, labels: Tensor, sigma: Tensor | float) -> Tensor:
        """-E log N(x; m, v + sigma^2) over x = x0 + sigma eps, in nats of each scene, (B,); smaller where the start is truer.

        sum ((x0 - m)^2 + sigma^2) / (2 V) + log(2 pi V) / 2,  V = v + sigma^2,  over the numbers of x0 (B, C, h, w)
        """
        mean, variance = (part.double() for part in self.moments(labels, sigma))
        square = (x0.double() - mean) ** 2 + right(float64(sigma) ** 2, mean)
        return (square / variance + (2 * math.pi * variance).log()).flatten(1).sum(1) / 2


def plain(shape: tuple[int, int, int], classes: int = 1) -> NoisePrior:
    """Mean 0 and variance 1 for all classes everywhere, shape (C, h, w): x = sqrt(1 + sigma^2) noise, the usual start."""
    zeros = torch.zeros(classes, *shape)
    return NoisePrior(zeros, torch.ones_like(zeros))


def spatial(x0: Tensor, classes: int) -> NoisePrior:
    """The moments at each place, whatever is there, of latents x0 (N, C, h, w)."""
    _check_enough(len(x0), "x0 has {} rows")
    mean, variance = x0.double().mean(0), x0.double().var(0)
    return NoisePrior(*(part.to(x0).expand(classes, *part.shape).contiguous() for part in (mean, variance)))


def categorical(x0: Tensor, labels: Tensor, classes: int) -> NoisePrior:
    """The moments of each class, wherever it is, of latents x0 (N, C, h, w) and their classes (N, h, w).

    Every place counts; the authors' code draws one place of each picture. Raises ValueError for a class that has fewer than two.
    """
    count, mean, variance = _moments(x0, labels, classes, over=(0, 2, 3))
    for k, n in enumerate(count.flatten().tolist()):
        _check_enough(int(n), f"class {k} covers {{}} places of labels")
    shape = (classes, *x0.shape[1:])
    return NoisePrior(*(part.to(x0).expand(shape).contiguous() for part in (mean, variance)))


def joint(x0: Tensor, labels: Tensor, classes: int, otherwise: NoisePrior | None = None, least: int = 2) -> NoisePrior:
    """The moments of each class at each place, of latents x0 (N, C, h, w) and their classes (N, h, w).

    Where a class was met fewer than `least` times, those of `otherwise`: by default of the place, as in the authors' code.
    Raises ValueError for least < 2, which leaves no variance to measure.
    """
    if least < 2:
        raise ValueError(f"least = {least}; expected at least 2 scenes, of which there is a variance")
    otherwise = spatial(x0, classes) if otherwise is None else otherwise
    count, mean, variance = _moments(x0, labels, classes, over=(0,))
    pairs = ((mean, otherwise.mean), (variance, otherwise.variance))
    return NoisePrior(*(torch.where(count >= least, part.to(x0), other) for part, other in pairs))


def coarse(labels: Tensor, factor: int, classes: int) -> Tensor:
    """The class that covers most of each block of factor x factor pixels, of classes (N, H, W): (N, H / factor, W / factor).

    Of several that cover as much, the first. Raises ValueError where the sides are no multiples of `factor`.
    """
    if labels.shape[-1] % factor or labels.shape[-2] % factor:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected sides that are multiples of factor = {factor}")
    shares = F.one_hot(labels.long(), classes).movedim(-1, 1).float()
    return F.avg_pool2d(shares, factor).argmax(1)


def _moments(x0: Tensor, labels: Tensor, classes: int, over: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and unbiased variance of each class over these axes of (N, C, h, w), the first among them; (K, ...) each."""
    _check_labels(labels, x0.shape[-2:], classes, len(x0))
    found = []
    for k in range(classes):
        of = (labels == k)[:, None].double()  # (N, 1, h, w)
        count = of.sum(over, keepdim=True)
        mean = (of * x0).sum(over, keepdim=True) / count.clamp_min(1)
        variance = (of * (x0 - mean) ** 2).sum(over, keepdim=True) / (count - 1).clamp_min(1)
        found.append((count[0], mean[0], variance[0]))
    count, mean, variance = (torch.stack(parts) for parts in zip(*found, strict=True))
    return count, mean, variance


def _check_labels(labels: Tensor, side: tuple[int, ...], classes: int, rows: int | None = None) -> None:
    if labels.ndim != 3 or labels.shape[1:] != side or rows not in (None, len(labels)) or labels.is_floating_point():
        n = "B" if rows is None else rows
        raise ValueError(
            f"labels is {labels.dtype} of shape {tuple(labels.shape)}; expected whole numbers ({n}, {side[0]}, {side[1]}), "
            "a class for each place of the latents"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels run from {low} to {high}; expected classes from 0 to {classes - 1}")


def _check_enough(n: int, what: str) -> None:
    if n < 2:
        raise ValueError(f"{what.format(n)}; expected at least 2, of which there is a variance")
