"""Sketches of scenes as a hand would draw them: line drawings with wobbling, broken, thick lines."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from course_lib.worlds.scenes.render import Rendered, edges
from course_lib.worlds.scenes.sampling import uniforms

FIRST_STREAM = 2000
"""Sketches draw from streams that neither scenes nor captions draw from, so that one seed may serve all."""
WAVES = 6  # plane waves in each random field
WOBBLE = 1 / 64  # root mean square displacement of a line along each axis, as a share of the picture
PERIODS = (0.25, 0.7)  # wavelengths of a field, as a share of the picture
THICK = 1 / 64  # half the thickness of a line, as a share of the picture


def _field(u: Tensor, points: Tensor) -> Tensor:
    """Smooth random fields of mean square 1 over their phases: u (N, 3 WAVES) in [0, 1), points (..., 2) -> (N, ...).

    f(p) = sqrt(2 / W) sum_i cos(2 pi (p . k_i + phase_i)), k_i of random direction and length 1 / period.
    """
    angle, period, phase = u.float().view(len(u), 3, WAVES).unbind(1)
    length = 1 / (PERIODS[0] + (PERIODS[1] - PERIODS[0]) * period)
    k = torch.stack((length * torch.cos(2 * torch.pi * angle), length * torch.sin(2 * torch.pi * angle)), -1)
    turns = torch.einsum("...c,nwc->n...w", points, k) + phase.view(len(u), *[1] * (points.ndim - 1), WAVES)
    return (2 / WAVES) ** 0.5 * torch.cos(2 * torch.pi * turns).sum(-1)


def scribbles(lines: Rendered | Tensor, seed: int, first: int = 0, wobble: float = 1.0, dropped: float = 0.15) -> Tensor:
    """Sketches (N, 1, H, W) in [0, 1], 1 on a line, of the edges of `lines`: Rendered, or a line drawing (N, 1, H, W) in {0, 1}.

    The line at p + wobble f(p) is drawn at p, with f smooth and random, 1 pixel in root mean square at 64 px. A line is
    left out where another such field is low: about the share `dropped` of it. Lines are 2 pixels thick at 64 px, and all
    lengths grow with the picture. Sketch i depends on (seed, first + i) and its lines alone. Scribbles as a condition:
    Zhang et al. 2023 (ControlNet). Raises ValueError for other shapes, for wobble outside 0 to 4 and dropped outside 0 to
    0.99.
    """
    if isinstance(lines, Rendered):
        lines = edges(lines.depth, lines.normal, lines.segmentation)
    if lines.ndim != 4 or lines.shape[1] != 1:
        raise ValueError(f"lines has shape {tuple(lines.shape)}; expected (N, 1, H, W), or what `render` returns")
    for name, value, most in (("wobble", wobble, 4), ("dropped", dropped, 0.99)):
        if not 0 <= value <= most:
            raise ValueError(f"{name} = {value!r}; expected a number from 0 to {most}")
    n, _, h, w = lines.shape
    u = uniforms(seed, torch.arange(first, first + n), 9 * WAVES, FIRST_STREAM).to(lines.device)
    y = ((torch.arange(h, device=lines.device) + 0.5) / h)[:, None].expand(h, w)
    x = ((torch.arange(w, device=lines.device) + 0.5) / w)[None].expand(h, w)
    points = torch.stack((x, y), -1)
    right, down, gap = (_field(part, points) for part in u.chunk(3, 1))

    # A thin line would alias under the displacement; the distance to the nearest line is smooth.
    away = torch.stack([_distance(line) for line in lines[:, 0].cpu() > 0.5]).to(lines.device)
    grid = 2 * (points + wobble * WOBBLE * torch.stack((right, down), -1)) - 1
    away = F.grid_sample(away[:, None], grid, padding_mode="border", align_corners=False)
    half = THICK * max(h, w)
    ink = (half + 0.5 - away).clamp(0, 1)
    quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(2.0 * dropped - 1)))
    return ink * ((gap[:, None] - quantile) * 4 * half + 0.5).clamp(0, 1)  # a stroke ends within about its thickness


def _distance(line: Tensor) -> Tensor:
    """Distance in pixels (H, W) of each pixel to the nearest one of `line` (H, W) bool; where there is none, far off."""
    if not bool(line.any()):
        return torch.full(line.shape, float(max(line.shape)))
    return torch.from_numpy(ndimage.distance_transform_edt(~line.numpy())).float()
