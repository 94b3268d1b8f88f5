"""A solid of voxels, seen by volume rendering (Mildenhall et al. 2020)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets.pixels import particles

Rays = tuple[Tensor, Tensor]
"""Origins and unit directions, (1, H * W, 3) for all particles or (n, H * W, 3), row by row: as `scenes.rays` returns them."""


def in_cube(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter [-1, 1]^3, and how long they stay: (..., 3) twice -> (...), (...); length 0 where they miss it."""
    d = torch.where(directions.abs() < 1e-9, 1e-9, directions)  # parallel to a side: its planes are far away
    a, b = (-1 - origins) / d, (1 - origins) / d
    near = torch.minimum(a, b).amax(-1).clamp(min=0)
    return near, (torch.maximum(a, b).amin(-1) - near).clamp(min=0)


def absorb(density: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """How much each sample of a ray adds, w_i, and how much passes all: (..., S) and a step -> (..., S), (...).

    alpha_i = 1 - exp(-density_i delta_i),  T_i = exp(-sum_{j < i} density_j delta_j),  w_i = T_i alpha_i  (Mildenhall et al.
    2020, Eq. 3).
    """
    depth = density * delta
    passed = depth.cumsum(-1)
    return torch.exp(depth - passed) * -torch.expm1(-depth), torch.exp(-passed[..., -1])


class VoxelField(nn.Module):
    """field() -> (n, 3, H, W) in (-1, 1): density and colour on the corners of a grid in [-1, 1]^3, seen along `rays`.

    C = sum_i w_i c_i + T_end background, with w of `absorb` at `samples` midpoints of equal steps between where the ray enters
    the cube and where it leaves. Density softplus(theta_0) / voxel and colour tanh(theta_1, theta_2, theta_3) are those of the
    corners, whose distance is voxel, and trilinear between them: theta_0 = 5 hides what is behind within a voxel. theta: `grid`
    (n, 4, z, y, x) and `background` (n, 3), before tanh. field(rays) looks along others. Raises ValueError for n < 1, resolution
    < 2, samples < 1, and for rays of another shape.
    """

    def __init__(self, n: int, rays: Rays, resolution: int = 32, samples: int = 48, seed: int = 0):
        super().__init__()
        if resolution < 2 or samples < 1:
            raise ValueError(f"resolution = {resolution}, samples = {samples}; expected at least 2 corners a side and 1 sample")
        normal = particles(n, seed)
        self.samples = samples
        start = torch.tensor([-4.0, 0.0, 0.0, 0.0]).reshape(4, 1, 1, 1)  # a haze: 32^3 corners absorb 43% in 2 units
        self.grid = nn.Parameter(start + 0.1 * normal(4, resolution, resolution, resolution))
        self.background = nn.Parameter(0.1 * normal(3))
        for name, value in zip(("origins", "directions"), self._checked(rays), strict=True):
            self.register_buffer(name, value, persistent=False)

    def forward(self, rays: Rays | None = None) -> Tensor:
        origins, directions = (self.origins, self.directions) if rays is None else self._checked(rays)
        near, length = in_cube(origins, directions)
        middles = (torch.arange(self.samples).to(near) + 0.5) / self.samples
        points = origins[:, :, None] + (near[..., None] + length[..., None] * middles)[..., None] * directions[:, :, None]
        density, colour = self.at(points).split([1, 3], 1)
        weights, T_end = absorb(density, (length / self.samples)[:, None, :, None])  # (n, 1, P, S), (n, 1, P)
        picture = (weights * colour).sum(-1) + T_end * self.background.tanh()[..., None]
        size = math.isqrt(picture.shape[-1])
        return picture.reshape(-1, 3, size, size)

    def at(self, points: Tensor) -> Tensor:
        """Density and colour at points (1 or n, P, S, 3) of the cube, (n, 4, P, S); its sides are corners of the grid."""
        density = F.softplus(self.grid[:, :1]) * (self.grid.shape[-1] - 1) / 2
        values = torch.cat([density, self.grid[:, 1:].tanh()], 1)
        values = values.reshape(len(points), -1, *values.shape[2:])  # points that all particles share are looked up once
        found = F.grid_sample(values, points[..., None, :], padding_mode="border", align_corners=True)
        return found.reshape(len(self.grid), 4, *points.shape[1:3])

    def _checked(self, rays: Rays) -> Rays:
        for name, value in zip(("origins", "directions"), rays, strict=True):
            good = value.ndim == 3 and len(value) in (1, len(self.grid)) and math.isqrt(value.shape[1]) ** 2 == value.shape[1]
            if not good or value.shape[-1] != 3 or value.shape != rays[0].shape:
                raise ValueError(
                    f"rays has {name} of shape {tuple(value.shape)}; expected (1 or {len(self.grid)}, H * H, 3), of both the same"
                )
        return rays
