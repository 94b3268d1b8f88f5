"""What a camera sees of the figure: keypoints with noise and gaps, the error of a pose against them, a drawing."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from course_lib.worlds.figures.body import JOINTS, PARENTS, forward
from course_lib.worlds.scenes.camera import Camera, centres, look_at

FIELD_OF_VIEW, DISTANCE, ELEVATION = 30.0, 4.5, 10.0
NOISE, MISSING = 0.02, 0.2
"""Of keypoints: deviation in half pictures, and the share of joints that the detector does not see."""


def camera(azimuth: float = 0.0, elevation: float = ELEVATION, distance: float = DISTANCE) -> Camera:
    """A pinhole camera that looks at the pelvis from `distance` metres: at azimuth 0 into the face of heading 0. Degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    eye = distance * torch.tensor([[math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)]])
    return look_at(eye, torch.zeros(3), FIELD_OF_VIEW)


def project(points: Tensor, view: Camera | None = None) -> Tensor:
    """Where the camera sees points (..., P, 3): (u, v) in half pictures, u to the right and v down, (..., P, 2), differentiable.

    u = f q_x / depth,  v = -f q_y / depth,  f = 1 / tan(fov / 2): the picture is [-1, 1]^2. By default `camera()`.
    """
    view = camera() if view is None else view
    view = Camera(view.eye.to(points), view.axes.to(points), view.fov)
    return view.project(points.reshape(1, -1, 3), 2)[0].reshape(*points.shape[:-1], 2) - 1


class Keypoints(NamedTuple):
    """What a detector of joints returns: places `at` (..., 18, 2) in half pictures, 0 where `seen` (..., 18), bool, is false."""

    at: Tensor
    seen: Tensor

    def flat(self) -> Tensor:
        """As a network reads them, (..., 54): places, then 1 or 0 for seen or not. All zero where nothing is seen."""
        return torch.cat((self.at.flatten(-2), self.seen.to(self.at)), -1)


def observe(
    pose: Tensor, generator: torch.Generator | None = None, noise: float = NOISE, missing: Tensor | float = MISSING
) -> Keypoints:
    """Noisy keypoints of figures (..., 25) seen by `camera()`: y = project(forward(x)) + noise n, each joint missed at random.

    `missing` is the share of joints that are missed, a number or one for each figure, (..., 1).
    """
    return detect(project(forward(pose)), generator, noise, missing)


def detect(
    exact: Tensor, generator: torch.Generator | None = None, noise: float = NOISE, missing: Tensor | float = MISSING
) -> Keypoints:
    """What a detector makes of joints that are seen at `exact` (..., 18, 2), as `observe` says."""
    at = exact + noise * torch.randn(exact.shape, generator=generator).to(exact)
    seen = (torch.rand(exact.shape[:-1], generator=generator) >= torch.as_tensor(missing)).to(exact.device)
    return Keypoints(at * seen[..., None], seen)


def reprojection(pose: Tensor, keypoints: Keypoints) -> Tensor:
    """Half the squared distance of the seen keypoints in units of the noise, summed over joints: (..., 25) -> (...).

    L = 1/2 sum_j seen_j |project(forward(x))_j - y_j|^2 / NOISE^2, which is -log p(y | x) but for a constant.
    """
    error = (project(forward(pose)) - keypoints.at) / NOISE
    return 0.5 * (error.square().sum(-1) * keypoints.seen.to(error)).sum(-1)


def draw(places: Tensor, size: int = 64, width: float = 0.03) -> Tensor:
    """Pictures of figures whose joints are seen at `places` (N, 18, 2), in half pictures: (N, 3, size, size) in [-1, 1].

    On white: the left limbs orange, the right ones blue, the rest dark; a head; lines of `width` half pictures, with soft edges.
    """
    pixels = (2 * centres(size, places.device) / size - 1).to(places)  # (P, 2)
    a, b = places[:, PARENTS[1:]], places[:, 1:]  # (N, 17, 2)
    along, to_pixel = b - a, pixels[None, None] - a[:, :, None]
    share = (to_pixel * along[:, :, None]).sum(-1) / along.square().sum(-1).clamp_min(1e-12)[..., None]
    away = (to_pixel - share.clamp(0, 1)[..., None] * along[:, :, None]).norm(dim=-1)  # (N, 17, P)
    head = JOINTS.index("head")
    away[:, head - 1] = (pixels - places[:, head, None]).norm(dim=-1) - 0.06
    ink = ((width - away) * size / 2 + 0.5).clamp(0, 1)
    sides = {"l": (0.90, 0.62, 0.0), "r": (0.0, 0.45, 0.70)}
    colours = places.new_tensor([sides.get(name[0] if name[1] == "_" else "", (0.2, 0.2, 0.2)) for name in JOINTS[1:]])
    out = places.new_ones(len(places), 3, size * size)
    for j, colour in enumerate(colours):
        out = out + ink[:, j, None] * (colour[:, None] - out)
    return 2 * out.view(-1, 3, size, size) - 1
