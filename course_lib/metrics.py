"""How samples are judged: distances between sets, precision and recall, and picture quality."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2}) between two sets of features, (N, d) and (M, d).

    Heusel et al. 2017, Eq. 6, on whatever features are given. Raises ValueError with fewer than d + 2 rows.
    """
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < features.shape[1] + 2:
            raise ValueError(
                f"{name} has shape {tuple(features.shape)}; expected (N, d) with N >= d + 2, or the covariance is singular"
            )
    a, b = a.double(), b.double()
    C_a, C_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    # the eigenvalues of C_a C_b are those of the symmetric C_a^{1/2} C_b C_a^{1/2}
    values, vectors = torch.linalg.eigh(C_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ C_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + C_a.trace() + C_b.trace() - 2 * cross)


def bootstrap(metric, *sets: Tensor, rounds: int = 100, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Normal interval of `metric(*sets)`, its deviation taken from sets whose rows are drawn again with replacement.

    It is centred at the metric itself: rows drawn twice push a distance up, so that percentiles would be biased
    (Efron and Tibshirani 1993, Ch. 12 and 13).
    """
    generator = torch.Generator().manual_seed(seed)
    values = [
        metric(*(rows[torch.randint(len(rows), (len(rows),), generator=generator)] for rows in sets)) for _ in range(rounds)
    ]
    reach = NormalDist().inv_cdf((1 + level) / 2) * float(np.std(values, ddof=1))
    centre = metric(*sets)
    return centre - reach, centre + reach


def pca_features(reference: Tensor, components: int = 16):
    """Return a function that projects flat rows on the leading principal axes of `reference` (N, d)."""
    mean = reference.double().mean(0)
    _, _, axes = torch.linalg.svd(reference.double() - mean, full_matrices=False)
    return lambda rows: (rows.double() - mean) @ axes[:components].T


def sliced_wasserstein(a: Tensor, b: Tensor, slices: int = 100, seed: int = 0) -> float:
    """Mean over random directions of the 1-d Wasserstein-1 distance of the projections; a (N, d), b (M, d).

    Bonneel et al. 2015.
    """
    if a.shape[1:] != b.shape[1:] or a.ndim != 2:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; expected (N, d) and (M, d)")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], slices, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    p, q = ((rows.double() @ directions).sort(0).values for rows in (a, b))
    N, M = len(p), len(q)
    # between these levels, in units of 1 / (N M), both quantile functions are constant
    levels = torch.cat([torch.arange(1, N + 1) * M, torch.arange(1, M + 1) * N]).unique()
    width = levels.diff(prepend=levels.new_zeros(1)).double() / (N * M)
    return float((width @ (p[(levels - 1) // M] - q[(levels - 1) // N]).abs()).mean())


def sliced_wasserstein_floor(draw, n: int, rounds: int = 8, slices: int = 100) -> tuple[float, float]:
    """What two exact sets of n points give by chance: mean and standard deviation over `rounds` pairs.

    `draw(n, generator)` returns (n, d) exact samples.
    """
    values = []
    for k in range(rounds):
        generator = torch.Generator().manual_seed(10_000 + k)
        values.append(sliced_wasserstein(draw(n, generator), draw(n, generator), slices, seed=k))
    return float(np.mean(values)), float(np.std(values, ddof=1))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fake points within the real set's manifold, and of real points within the fake set's.

    A set's manifold is the union of balls around its points that reach to their k-th neighbour
    (Kynkaanniemi et al. 2019, Eq. 1 and 2). real (N, d), fake (M, d). Raises ValueError with k or fewer points.
    """
    for name, points in (("real", real), ("fake", fake)):
        if len(points) <= k:
            raise ValueError(f"{name} has {len(points)} points; expected more than k = {k}")

    def radii(points: Tensor) -> Tensor:
        return torch.cdist(points, points).kthvalue(k + 1, dim=1).values  # the nearest is the point itself

    distance = torch.cdist(fake.double(), real.double())  # (M, N)
    precision = (distance <= radii(real.double())[None]).any(1).double().mean()
    recall = (distance <= radii(fake.double())[:, None]).any(0).double().mean()
    return float(precision), float(recall)


def nearest_distance(points: Tensor, reference: Tensor) -> Tensor:
    """Distance of each point to the nearest of `reference`; (N, d), (M, d) -> (N,)."""
    return torch.cdist(points.double(), reference.double()).min(1).values


def psnr(image: Tensor, reference: Tensor, data_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB; `data_range` is 2 for pictures in [-1, 1]."""
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(reference.numpy(), image.numpy(), data_range=data_range))


def ssim(image: Tensor, reference: Tensor, data_range: float = 2.0) -> float:
    """Structural similarity of two pictures (C, H, W) (Wang et al. 2004)."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(reference.numpy(), image.numpy(), data_range=data_range, channel_axis=0))
