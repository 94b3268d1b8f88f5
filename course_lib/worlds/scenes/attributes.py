"""What a scene is made of: its attributes, their values, and a batch of scenes as a structure of arrays.

World coordinates are right-handed with z up; the ground is z = 0. The camera stands at `azimuth` about z, counted
from +x towards +y, and looks at `TARGET`. Seen from it, right is the direction (-sin azimuth, cos azimuth, 0).
An object's front points along +x turned by `yaw` about z, so its own left is +y turned likewise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("sphere", "cube", "cylinder", "cone", "car", "mug", "snowman", "house")
ORIENTED = SHAPES[4:]
"""The shapes with an unmistakable front."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.77, 0.05, 0.05),
    "orange": (0.94, 0.47, 0.03),
    "yellow": (0.94, 0.91, 0.12),
    "green": (0.07, 0.48, 0.27),
    "cyan": (0.35, 0.92, 0.96),
    "blue": (0.06, 0.27, 0.88),
    "purple": (0.50, 0.18, 0.48),
    "pink": (0.93, 0.62, 0.72),
}
"""Main colours of objects, RGB in [0, 1]; they differ in lightness as well as in hue."""

SIZES: dict[str, float] = {"small": 0.55, "large": 0.85}
"""Scale of an object: every shape at scale 1 fits the ball of radius 1 around its centre."""

GROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "grey": ((0.55, 0.55, 0.55), (0.55, 0.55, 0.55)),
    "white": ((0.94, 0.94, 0.94), (0.94, 0.94, 0.94)),
    "grass": ((0.46, 0.62, 0.34), (0.46, 0.62, 0.34)),
    "sand": ((0.86, 0.77, 0.58), (0.86, 0.77, 0.58)),
    "checkered": ((0.44, 0.44, 0.46), (0.82, 0.82, 0.80)),
    "plain": ((0.72, 0.75, 0.80), (0.72, 0.75, 0.80)),
}
"""The two colours of each ground. "plain" is no ground and no shadow: one even background colour."""

LIGHTS: dict[str, float] = {"left": -60.0, "right": 60.0, "front": 0.0}
"""Azimuth of the light in degrees relative to the camera's: the light of a scene stands at azimuth + this."""

RELATIONS = ("left of", "right of", "in front of", "behind", "on top of")
"""What object 0 is to object 1, as the viewer sees it."""

VIEWS = ("front", "left", "back", "right")
"""The side of an object that the camera sees, in the order of (azimuth - yaw) / 90 degrees: its own left and right."""

FIELD_OF_VIEW = 45.0
"""Vertical field of view of the camera, in degrees."""

TARGET = (0.0, 0.0, 0.6)
"""The point at which the camera looks; `distance` is measured from it."""

SUPPORTS: dict[str, float] = {"cube": 2 / 3**0.5, "cylinder": 1.4}
"""Height at scale 1 of the shapes with a flat top, on which another object can stand."""


@dataclass
class Scenes:
    """A batch of N scenes with room for K objects each.

    shape, colour, size (N, K) long: index into SHAPES, COLOURS, SIZES; -1 where there is no object.
    position (N, K, 3): centre of the object's foot, in world units. yaw (N, K): degrees, see the module.
    ground, light (N,) long: index into GROUNDS, LIGHTS. azimuth, elevation (N,): degrees; distance (N,): world units.
    Raises ValueError where the shapes disagree.
    """

    shape: Tensor
    colour: Tensor
    size: Tensor
    position: Tensor
    yaw: Tensor
    ground: Tensor
    light: Tensor
    azimuth: Tensor
    elevation: Tensor
    distance: Tensor

    def __post_init__(self) -> None:
        if self.shape.ndim != 2:
            raise ValueError(f"shape has shape {tuple(self.shape.shape)}; expected (N, K)")
        n, k = self.shape.shape
        expected = {"colour": (n, k), "size": (n, k), "position": (n, k, 3), "yaw": (n, k)}
        for field in dataclasses.fields(self):
            got, want = tuple(getattr(self, field.name).shape), expected.get(field.name, (n,))
            if field.name != "shape" and got != want:
                raise ValueError(f"{field.name} has shape {got}; expected {want} beside shape (N, K) = {(n, k)}")

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: int | slice | Tensor) -> Scenes:
        """The scenes of a slice, an index tensor or a mask, in their order; a single number gives a batch of one."""
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"rows = {rows}; expected a number from {-len(self)} to {len(self) - 1}")
            rows = slice(rows, rows + 1 or None)
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        return Scenes(**{field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)})

    @property
    def present(self) -> Tensor:
        """Whether there is an object: (N, K) bool."""
        return self.shape >= 0

    @property
    def scale(self) -> Tensor:
        """Scale of each object in world units, 0 where there is none: (N, K) float32."""
        sizes = torch.tensor(list(SIZES.values()), device=self.size.device)
        return sizes[self.size.clamp(min=0)] * self.present
