"""What guidance is often said to sample, p_cond^w p_ref^(1 - w), and how far the field of `cfg` is from its score.

At each level CFG adds the scores of the *noised* densities. The tilted density, noised, has another score: raising to a power
and adding noise do not commute. Here is that score, in closed form for Gaussians and by quadrature in one and two dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from course_lib.gaussians import Mixture
from course_lib.guidance.free import cfg
from course_lib.types import Denoiser, float64

F64 = torch.float64
CHUNK = 2**22
"""Numbers of the largest table that the quadrature holds at once."""


def tilted_gaussian(cond: Mixture, ref: Mixture, w: float) -> Mixture:
    """p_cond^w p_ref^(1 - w), normalised, of two Gaussians: a Gaussian with the precisions added in these shares.

    C^-1 = w C_c^-1 + (1 - w) C_r^-1,  C^-1 m = w C_c^-1 m_c + (1 - w) C_r^-1 m_r.
    Raises ValueError for several components, and where C is not positive definite: the product then cannot be normalised.
    """
    for name, mixture in (("cond", cond), ("ref", ref)):
        if len(mixture.weights) > 1:
            raise ValueError(f"{name} has {len(mixture.weights)} components; expected one Gaussian, or use Tilted")
    P_c, P_r = torch.linalg.inv(cond.covs[0]), torch.linalg.inv(ref.covs[0])
    P = w * P_c + (1 - w) * P_r
    lowest = float(torch.linalg.eigvalsh(P)[0])
    if not lowest > 0:
        raise ValueError(f"w = {w:g} gives a precision with the eigenvalue {lowest:.3g}; expected > 0: cond no wider than ref")
    C = torch.linalg.inv(P)
    return Mixture.gaussian(C @ (w * P_c @ cond.means[0] + (1 - w) * P_r @ ref.means[0]), (C + C.T) / 2)


class Tilted:
    """p_cond^w p_ref^(1 - w) of two mixtures in one or two dimensions, by quadrature on a square lattice.

    lower, upper  ends of the lattice along every axis; points along each, so that cells have the side h
    `denoiser` is E[x0 | x] under x0 ~ p_tilted, exact up to the quadrature: sums of smooth functions over a lattice converge
    faster than any power of h once h is below the widths of the parts and sigma. Raises ValueError in more dimensions, where
    mass lies at the lattice's edge, and for 0 < sigma < h.
    """

    def __init__(self, cond: Mixture, ref: Mixture, w: float, lower: float, upper: float, points: int | None = None):
        d = cond.dim
        if d not in (1, 2) or ref.dim != d:
            raise ValueError(f"cond has dimension {d} and ref {ref.dim}; expected both 1 or both 2")
        axis = torch.linspace(lower, upper, points or (2001 if d == 1 else 161), dtype=F64)
        self.spacing = float(axis[1] - axis[0])
        self.points = torch.cartesian_prod(*[axis] * d).reshape(-1, d)  # (G, d)
        log_p = w * cond.log_prob(self.points) + (1 - w) * ref.log_prob(self.points)
        self.log_weights = log_p - torch.logsumexp(log_p, 0)  # (G,)
        edge = ((self.points == axis[0]) | (self.points == axis[-1])).any(1)
        outside = float(self.log_weights[edge].exp().max()) / float(self.log_weights.max().exp())
        if outside > 1e-8:
            raise ValueError(
                f"lower = {lower:g} and upper = {upper:g}: the density at the edge is {outside:.2g} of its maximum; "
                "expected under 1e-8: widen them, or lower w"
            )

    def _chunks(self, x: Tensor, sigma: Tensor | float):
        level = float64(sigma)
        if not bool((level >= self.spacing).all()):
            raise ValueError(f"sigma = {float(level.min()):.6g}; expected at least {self.spacing:.6g}, the lattice's spacing")
        flat = x.reshape(len(x), -1).to("cpu", F64)
        rows = max(1, CHUNK // len(self.points))
        for part, s in zip(flat.split(rows), level.expand(len(flat)).split(rows), strict=True):
            square = torch.cdist(part, self.points, compute_mode="donot_use_mm_for_euclid_dist") ** 2
            yield self.log_weights - square / (2 * s[:, None] ** 2), s

    def denoiser(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x], the shape of x (B, d): a `Denoiser`."""
        found = torch.cat([torch.softmax(log_p, 1) @ self.points for log_p, _ in self._chunks(x, sigma)])
        return found.reshape(x.shape).to(x.device, x.dtype)

    def score(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """grad log of the tilted density after noise: (E[x0 | x] - x) / sigma^2, the shape of x."""
        return (self.denoiser(x, sigma) - x) / float64(sigma).reshape(-1, *[1] * (x.ndim - 1)).to(x) ** 2

    def log_prob(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """log (p_tilted * N(0, sigma^2 I))(x), (B,) in nats."""
        d = self.points.shape[1]
        found = [torch.logsumexp(log_p, 1) - d * (s.log() + math.log(2 * math.pi) / 2) for log_p, s in self._chunks(x, sigma)]
        return torch.cat(found).to(x.device, x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n points of the tilted density, (n, d) float64: lattice points, moved evenly within their cells."""
        which = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        return self.points[which] + self.spacing * (torch.rand(n, self.points.shape[1], generator=generator, dtype=F64) - 0.5)


def tilt_gap(
    cond: Mixture, ref: Mixture, tilted: Mixture | Tilted, w: float, sigma: float, n: int = 1000, seed: int = 0
) -> dict[str, float]:
    """How far CFG's field is from the score of the noised tilted density, over x of that density at level sigma.

    `score_rms` = (E|s_cfg - s_tilted|^2 / d)^(1/2); `relative` is it over (E|s_tilted|^2 / d)^(1/2); `denoiser_rms`, it times
    sigma^2, is the gap between the two E[x0 | x], in the units of x0.
    """
    generator = torch.Generator().manual_seed(seed)
    x0 = tilted.sample(n, generator)
    x = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=F64)
    D: Denoiser = cfg(cond.denoiser, ref.denoiser, w)
    exact = tilted.denoiser(x, sigma)
    off = float((D(x, float64(sigma)) - exact).square().mean().sqrt())
    size = float((exact - x).square().mean().sqrt())
    return {"denoiser_rms": off, "score_rms": off / sigma**2, "relative": off / size}
