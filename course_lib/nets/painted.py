"""A painting in 16 numbers: sky, ground, horizon and one object, a soft superellipse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from course_lib.nets.liif import places
from course_lib.nets.pixels import checked_size, particles

PARTS = {"sky": 3, "ground": 3, "colour": 3, "horizon": 1, "centre": 2, "axes": 2, "turn": 1, "exponent": 1}
"""What theta is made of, and how many numbers each part has."""


def superellipse(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: Tensor) -> Tensor:
    """Signed distance to first order, < 0 inside, of the curve |x / a|^p + |y / b|^p = 1; shapes that broadcast.

    d = (r - 1) / |grad r| with r = (|x / a|^p + |y / b|^p)^(1 / p), as Taubin (1991) measures the distance to a curve. The moduli
    are rounded off at 0, by 0.01, so that gradients are finite on the axes and at the centre as well.
    """
    x, y = x / a, y / b
    X, Y = x * x + 1e-4, y * y + 1e-4
    log_X, log_Y = p / 2 * X.log(), p / 2 * Y.log()  # of |x / a|^p and |y / b|^p
    log_r = torch.logaddexp(log_X, log_Y) / p
    share = torch.sigmoid(log_X - log_Y)  # of x in r^p
    dx, dy = share * x / (X * a), (1 - share) * y / (Y * b)  # grad log r
    r = log_r.exp()
    return (r - 1) / (r * r * (dx * dx + dy * dy) + 1e-2).sqrt()


class Painted(nn.Module):
    """painted() -> (n, 3, size, size) in (-1, 1): an object before a ground and a sky, 16 numbers a picture.

    sky, ground, colour (n, 3)   in (-1, 1)
    horizon (n, 1)               the height at which the ground begins, in (-1, 1)
    centre (n, 2)                (x, y) of the object, in (-1, 1)
    axes (n, 2)                  its half-axes, in (0.05, 1)
    turn (n, 1)                  radians, in (-pi, pi)
    exponent (n, 1)              in (1, 8): 1 a rhombus, 2 an ellipse, 8 nearly a rectangle

    x runs to the right and y down, each from -1 to 1 across the picture. An edge is a sigmoid of the distance over `softness`
    pixels. painted(size) draws the same with other pixels. Raises ValueError for n < 1, size < 2 and softness <= 0.
    """

    def __init__(self, n: int = 1, size: int = 64, softness: float = 1.0, seed: int = 0):
        super().__init__()
        if softness <= 0:
            raise ValueError(f"softness = {softness}; expected more than 0 pixels")
        self.size, self.softness = checked_size(size), softness
        normal = particles(n, seed)
        start = {name: 0.2 * normal(count) for name, count in PARTS.items()}
        start["axes"] -= 0.8  # about 0.2: a large object would sooner learn the background than find the one in it
        self.theta = nn.ParameterDict(start)

    def parts(self) -> dict[str, Tensor]:
        """What theta says, squashed into the ranges above."""
        parts = {name: value.tanh() for name, value in self.theta.items()}
        parts["axes"] = 0.05 + 0.95 * (parts["axes"] + 1) / 2
        parts["turn"] = torch.pi * parts["turn"]
        parts["exponent"] = 8 ** ((parts["exponent"] + 1) / 2)
        return parts

    def forward(self, size: int | None = None) -> Tensor:
        size = self.size if size is None else checked_size(size)
        parts = self.parts()
        at = places((size, size), parts["sky"].device).to(parts["sky"]).flip(-1)  # (x, y)
        width = self.softness * 2 / size
        below = torch.sigmoid((at[:, 1] - parts["horizon"]) / width)[:, None]  # (n, 1, P)
        x, y = (at - parts["centre"][:, None]).unbind(-1)  # (n, P)
        cos, sin = parts["turn"].cos(), parts["turn"].sin()
        a, b = parts["axes"].split(1, -1)
        distance = superellipse(cos * x + sin * y, cos * y - sin * x, a, b, parts["exponent"])
        inside = torch.sigmoid(-distance / width)[:, None]
        sky, ground, colour = (parts[name][..., None] for name in ("sky", "ground", "colour"))
        picture = torch.lerp(torch.lerp(sky, ground, below), colour, inside)
        return picture.reshape(len(picture), 3, size, size)
