"""How samples are judged: distances between sets, precision and recall, and picture quality."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.gaussians import Mixture
from course_lib.types import float64


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2}) between two sets of features, (N, d) and (M, d).

    Heusel et al. 2017, Eq. 6, on whatever features are given. Raises ValueError with fewer than d + 2 rows.
    """
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < features.shape[1] + 2:
            raise ValueError(
                f"{name} has shape {tuple(features.shape)}; expected (N, d) with N >= d + 2, or the covariance is singular"
            )
    a, b = float64(a), float64(b)
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
    mean = float64(reference).mean(0)
    _, _, axes = torch.linalg.svd(float64(reference) - mean, full_matrices=False)
    return lambda rows: (float64(rows) - mean) @ axes[:components].T


def sliced_wasserstein(a: Tensor, b: Tensor, slices: int = 100, seed: int = 0) -> float:
    """Mean over random directions of the 1-d Wasserstein-1 distance of the projections; a (N, d), b (M, d).

    Bonneel et al. 2015.
    """
    if a.shape[1:] != b.shape[1:] or a.ndim != 2:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; expected (N, d) and (M, d)")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], slices, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    p, q = ((float64(rows) @ directions).sort(0).values for rows in (a, b))
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

    real, fake = float64(real), float64(fake)
    distance = torch.cdist(fake, real)  # (M, N)
    precision = (distance <= radii(real)[None]).any(1).double().mean()
    recall = (distance <= radii(fake)[:, None]).any(0).double().mean()
    return float(precision), float(recall)


def nearest_distance(points: Tensor, reference: Tensor) -> Tensor:
    """Distance of each point to the nearest of `reference`; (N, d), (M, d) -> (N,) float64 on the CPU."""
    return torch.cdist(float64(points), float64(reference)).min(1).values


def chamfer(a: Tensor, b: Tensor) -> float:
    """Summed squared Chamfer distance, sum_i min_j |a_i - b_j|^2 + sum_j min_i |a_i - b_j|^2; a (N, d), b (M, d).

    Fan et al. 2017, Eq. 1. A sum: it grows with the number of points, in their squared units. Two exact sets do
    not give 0, so print it beside what they give. Raises ValueError where the dimensions differ or a set is empty.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; expected (N, d) and (M, d) with a point in each")
    # differences of coordinates, not |a|^2 - 2 ab + |b|^2, whose rounding hides small distances
    square = torch.cdist(float64(a), float64(b), compute_mode="donot_use_mm_for_euclid_dist") ** 2  # (N, M)
    return float(square.min(1).values.sum() + square.min(0).values.sum())


# --- modes: which parts of a mixture a sampler reaches ------------------------------------------------------------

MODE_RADIUS = 3.0
"""A point is on a mode up to this Mahalanobis distance, in standard deviations."""


class Coverage(NamedTuple):
    """What `mode_coverage` returns: modes covered, the share of points on any mode, and how unevenly they share it."""

    covered: int
    on_mode: float
    imbalance: float


def on_mode_exact(dim: int, radius: float = MODE_RADIUS) -> float:
    """Share of a Gaussian's own samples within `radius` standard deviations: P(chi^2_d <= radius^2).

    0.9973, 0.9889 and 0.9707 in 1, 2 and 3 dimensions: what exact samples score in `mode_coverage(...).on_mode`, with a
    standard error of sqrt(q (1 - q) / n).
    """
    return float(torch.special.gammainc(torch.tensor(dim / 2).double(), torch.tensor(radius**2 / 2).double()))


def imbalance_floor(mixture: Mixture, n: int) -> float:
    """What `mode_coverage(...).imbalance` is on average for n exact points: half the sum over k of E|n_k / n - w_k|.

    n_k is binomial, E|n_k - n w| = 2 v (1 - w) P(n_k = v) with v = floor(n w) + 1 (de Moivre 1730), about
    sqrt(2 n w (1 - w) / pi), so that the floor falls as 1 / sqrt(n).
    """
    from scipy.stats import binom

    w = mixture.weights.numpy()
    v = np.floor(n * w) + 1
    return float((v * (1 - w) * binom.pmf(v, n, w)).sum() / n)


def mode_coverage(points: Tensor, mixture: Mixture) -> Coverage:
    """Which components of a mixture of separate components the points (N, d) reach, and in which shares.

    A point is on mode k where (x - m_k)^T C_k^{-1} (x - m_k) <= 3^2; the regions may not meet, so it is on one at most.
    covered    how many modes hold at least a quarter of their due share, w_k N, of the points
    on_mode    share of the points on any mode; exact samples have `on_mode_exact(d)`, bridges between modes lower it
    imbalance  total variation 1/2 sum_k |n_k / sum_j n_j - w_k| between the shares of the points on modes and the
               weights, from 0 to 1 (1 where none is on a mode); exact samples have `imbalance_floor(mixture, n)`

    Raises ValueError for points of another dimension or that are not finite, and where two regions meet.
    """
    if points.ndim != 2 or points.shape[1] != mixture.dim or not len(points):
        raise ValueError(f"points has shape {tuple(points.shape)}; expected (N, {mixture.dim}) with N >= 1")
    if not bool(torch.isfinite(points).all()):
        where = int((~torch.isfinite(points)).any(1).nonzero()[0])
        raise ValueError(f"points[{where}] = {points[where].tolist()}; expected finite numbers")
    _check_separate(mixture)
    centred = torch.einsum("nkd,kde->nke", float64(points)[:, None] - mixture.means, mixture.axes)
    on = (centred**2 / mixture.variances).sum(-1) <= MODE_RADIUS**2  # (N, K)
    held = on.double().sum(0)
    covered = int((held >= mixture.weights * len(points) / 4).sum())
    shares = held / held.sum() if held.sum() else None
    imbalance = 1.0 if shares is None else float((shares - mixture.weights).abs().sum() / 2)
    return Coverage(covered, float(on.any(1).double().mean()), imbalance)


def _check_separate(mixture: Mixture) -> None:
    """Raise ValueError where two modes' ellipsoids meet, or one has no volume.

    x^T A^{-1} x <= 1 and (x - m)^T B^{-1} (x - m) <= 1 are disjoint where s (1 - s) m^T ((1 - s) A + s B)^{-1} m
    exceeds 1 for some s in (0, 1) (Perram and Wertheim 1985); the maximum is flat, so that a lattice of s finds it.
    """
    if not bool((mixture.variances > 0).all()):
        raise ValueError("mixture has a component without extent along some axis; expected covariances of full rank")
    s = torch.linspace(0, 1, 201, dtype=torch.float64)[1:-1, None, None]
    for j in range(len(mixture.weights)):
        for k in range(j):
            between = mixture.means[j] - mixture.means[k]
            C = MODE_RADIUS**2 * ((1 - s) * mixture.covs[j] + s * mixture.covs[k])
            gap = s[:, 0, 0] * (1 - s[:, 0, 0]) * (torch.linalg.solve(C, between) @ between)
            if float(gap.max()) <= 1:
                raise ValueError(
                    f"components {k} and {j} of mixture meet within {MODE_RADIUS:g} standard deviations; expected separate modes"
                )


def psnr(image: Tensor, reference: Tensor, data_range: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB; `data_range` is 2 for pictures in [-1, 1]."""
    from skimage.metrics import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(reference.cpu().numpy(), image.cpu().numpy(), data_range=data_range))


def flops(net: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of one call, a multiplication and an addition counted as two: matrices and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*inputs)
    return counter.get_total_flops()


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of CPU tensors that live at one time in `run()`, beyond those from before, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def mean_psnr(images: Tensor, references: Tensor) -> float:
    """The mean over pictures (B, C, H, W) in [-1, 1] of each one's PSNR, in dB: not that of their mean error."""
    return sum(psnr(a, b) for a, b in zip(images, references, strict=True)) / len(references)


def ssim(image: Tensor, reference: Tensor, data_range: float = 2.0) -> float:
    """Structural similarity of two pictures (C, H, W) (Wang et al. 2004)."""
    from skimage.metrics import structural_similarity

    pair = reference.cpu().numpy(), image.cpu().numpy()
    return float(structural_similarity(*pair, data_range=data_range, channel_axis=0))
