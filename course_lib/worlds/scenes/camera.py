"""Cameras that look at the scene: one convention, stated once.

World: right-handed, z up, the ground is z = 0. Camera (as in OpenGL): x to the right, y up, and it looks along its own
-z. Pixels: u to the right and v down, in units of pixels, the top-left corner of the picture is (0, 0), so the centre
of the first pixel is (0.5, 0.5). Depth is the distance along the viewing axis, not along the ray. The camera of a scene
stands at `distance` from `TARGET`, at `azimuth` around z (0 is on the +x side, 90 on the +y side) and `elevation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.worlds.scenes.attributes import FIELD_OF_VIEW, TARGET, Scenes


@dataclass
class Camera:
    """A batch of pinhole cameras: `eye` (N, 3), `axes` (N, 3, 3) whose rows are right, up and back in the world.

    A world point p has camera coordinates q = axes (p - eye); it is seen at u = f q_x / depth + size / 2 and
    v = -f q_y / depth + size / 2, where depth = -q_z and f = size / (2 tan(fov / 2)). `fov` in degrees.
    """

    eye: Tensor
    axes: Tensor
    fov: float = FIELD_OF_VIEW

    def focal(self, size: int) -> float:
        """f = size / (2 tan(fov / 2)), in pixels, for pictures of size x size."""
        return size / (2 * math.tan(math.radians(self.fov) / 2))

    def directions(self, n: Tensor, pixels: Tensor, size: int) -> Tensor:
        """Unit directions (M, 3) of the rays of cameras `n` (M,) through `pixels` (M, 2)."""
        x = (pixels[:, :1] - size / 2) / self.focal(size)
        y = (size / 2 - pixels[:, 1:]) / self.focal(size)
        axes = self.axes[n]
        d = x * axes[:, 0] + y * axes[:, 1] - axes[:, 2]
        return d / (1 + x * x + y * y).sqrt()  # the axes are orthonormal, so this is the length

    def project(self, points: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return pixels (N, P, 2) and depth (N, P) of world `points` (N, P, 3); depth <= 0 lies behind the camera."""
        offset = (points - self.eye[:, None])[:, :, None]
        x, y, z = (offset * self.axes[:, None]).sum(-1).unbind(-1)
        f = self.focal(size)
        return torch.stack((f * x / -z + size / 2, size / 2 + f * y / z), -1), -z

    def unproject(self, depth: Tensor) -> Tensor:
        """World points (N, H * W, 3) of the pixel centres of `depth` (N, 1, H, W), row by row."""
        size = depth.shape[-1]
        origins, d = rays(self, size)
        along = -(d * self.axes[:, None, 2]).sum(-1)  # how much depth one unit along the ray gains
        return origins + d * (depth.flatten(1) / along)[..., None]


def look_at(eye: Tensor, target: Tensor, fov: float = FIELD_OF_VIEW) -> Camera:
    """Cameras at `eye` (N, 3) that look at `target` (3,) or (N, 3), upright.

    Raises ValueError where a camera looks straight up or down, since upright is then undefined.
    """
    back = eye - target
    back = back / back.norm(dim=-1, keepdim=True)
    right = torch.stack((-back[:, 1], back[:, 0], torch.zeros_like(back[:, 0])), -1)  # z x back
    length = right.norm(dim=-1, keepdim=True)
    if not bool((length > 1e-4).all()):
        where = int((~(length > 1e-4)).nonzero()[0, 0])
        raise ValueError(f"eye[{where}] = {eye[where].tolist()}; expected a camera that does not look straight up or down")
    right = right / length
    return Camera(eye, torch.stack((right, torch.linalg.cross(back, right), back), 1), fov)


def camera(scenes: Scenes) -> Camera:
    """The cameras of `scenes`: eye = TARGET + distance (cos e cos a, cos e sin a, sin e), looking at TARGET."""
    a, e = torch.deg2rad(scenes.azimuth), torch.deg2rad(scenes.elevation)
    around = torch.stack((e.cos() * a.cos(), e.cos() * a.sin(), e.sin()), -1)
    target = around.new_tensor(TARGET)
    return look_at(target + scenes.distance[:, None] * around, target)


def centres(size: int, device: torch.device | str = "cpu") -> Tensor:
    """The pixel centres of a picture of size x size, row by row: (size * size, 2)."""
    u = torch.arange(size, device=device) + 0.5
    return torch.stack((u.repeat(size), u.repeat_interleave(size)), -1)


def rays(cameras: Camera | Scenes, size: int) -> tuple[Tensor, Tensor]:
    """Origins and unit directions, both (N, size * size, 3), of the rays through the pixel centres, row by row."""
    if not isinstance(cameras, Camera):
        cameras = camera(cameras)
    count, pixels = len(cameras.eye), centres(size, cameras.eye.device)
    n = torch.arange(count, device=cameras.eye.device).repeat_interleave(len(pixels))
    d = cameras.directions(n, pixels.repeat(count, 1), size).view(count, -1, 3)
    return cameras.eye[:, None].expand_as(d), d
