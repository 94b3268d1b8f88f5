"""Sets of points in the plane, and mixtures whose every quantity is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from course_lib.gaussians import Mixture

F64 = torch.float64


def three_blobs() -> Mixture:
    """Three anisotropic Gaussians of unequal weight, within about two units of the origin."""

    def cov(angle: float, long: float, short: float) -> Tensor:
        c, s = math.cos(angle), math.sin(angle)
        R = torch.tensor([[c, -s], [s, c]], dtype=F64)
        return R @ torch.diag(torch.tensor([long**2, short**2], dtype=F64)) @ R.T

    means = torch.tensor([[-1.4, 0.2], [1.1, 1.0], [0.7, -1.2]], dtype=F64)
    covs = torch.stack([cov(0.9, 0.45, 0.15), cov(-0.5, 0.5, 0.2), cov(0.2, 0.6, 0.12)])
    return Mixture(torch.tensor([0.5, 0.3, 0.2]), means, covs)


def ring(components: int = 8, radius: float = 1.5, std: float = 0.15) -> Mixture:
    """Equal round Gaussians on a circle."""
    angle = torch.arange(components, dtype=F64) * 2 * math.pi / components
    return Mixture.isotropic(radius * torch.stack([angle.cos(), angle.sin()], -1), std)


def three_classes() -> list[Mixture]:
    """Three classes that overlap around the origin: each has a wide part outside and a small part, 3 in 10, inside."""

    def part(angle: float) -> Mixture:
        c, s = math.cos(angle), math.sin(angle)
        out, along = torch.tensor([c, s], dtype=F64), torch.tensor([-s, c], dtype=F64)
        wide = 0.3**2 * torch.outer(out, out) + 0.6**2 * torch.outer(along, along)
        return Mixture(
            torch.tensor([0.7, 0.3]), torch.stack([1.3 * out, 0.35 * out]), torch.stack([wide, 0.25**2 * torch.eye(2)])
        )

    return [part(math.pi * turn) for turn in (1 / 2, 7 / 6, 11 / 6)]


def of_classes(parts: Sequence[Mixture], weights: Sequence[float] | None = None) -> Mixture:
    """All classes as one mixture; `weights` are their shares, equal by default."""
    shares = [1 / len(parts)] * len(parts) if weights is None else weights
    return Mixture(
        torch.cat([share * part.weights for share, part in zip(shares, parts, strict=True)]),
        torch.cat([part.means for part in parts]),
        torch.cat([part.covs for part in parts]),
    )


def two_peaks(distance: float = 2.0, std: float = 0.3, weight: float = 0.5) -> Mixture:
    """Two Gaussians on a line, at -distance/2 and +distance/2; one-dimensional."""
    means = torch.tensor([[-distance / 2], [distance / 2]], dtype=F64)
    return Mixture.isotropic(means, std, torch.tensor([weight, 1 - weight]))


def moons(n: int, generator: torch.Generator | None = None, std: float = 0.08) -> Tensor:
    """Two interleaved half circles with noise, (n, 2) fp32 within about 1.5 of the origin."""
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, y], -1) + std * torch.randn(n, 2, generator=generator)


def swiss_roll(n: int, generator: torch.Generator | None = None, std: float = 0.02) -> Tensor:
    """A spiral of one and a half turns with noise, (n, 2) fp32 within [-1, 1]."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    spiral = torch.stack([angle.cos(), angle.sin()], -1) * angle[:, None] / (4.5 * math.pi)
    return spiral + std * torch.randn(n, 2, generator=generator)


def classroom_roll(n: int, generator: torch.Generator | None = None) -> Tensor:
    """The swiss roll of many an assignment, a curve without noise, (n, 2) fp32 within about 4 of the origin.

    The two rolled coordinates, (t cos t, t sin t), of scikit-learn's `make_swiss_roll(n, noise=0, hole=True)`: t is uniform
    on each third of [1.5 pi, 4.5 pi], and the middle one, which has the hole, holds 2 of 8 points. All entries together
    have mean 0 and deviation 2, by their exact moments, so that two sets lie on the same curve.
    """
    ends = 1.5 * math.pi + math.pi * torch.arange(4, dtype=F64)
    share = torch.tensor([3, 2, 3], dtype=F64) / 8
    x = share @ (ends * ends.sin() + ends.cos()).diff() / math.pi  # E[t cos t], E[t sin t], E[t^2]
    y = share @ (ends.sin() - ends * ends.cos()).diff() / math.pi
    square = share @ (ends**3 / 3).diff() / math.pi
    mean = (x + y) / 2
    third = torch.multinomial(share, n, replacement=True, generator=generator)
    t = ends[third] + math.pi * torch.rand(n, generator=generator)
    roll = torch.stack([t.cos(), t.sin()], -1) * t[:, None]
    return (2 * (roll - mean) / (square / 2 - mean**2).sqrt()).float()
