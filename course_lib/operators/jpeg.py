"""JPEG compression as a measurement: cosine coefficients of 8 x 8 blocks, divided by a table and rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.operators.base import Operator, Shape
from course_lib.operators.bases import Copies, cosine

# Tables K.1 (luminance) and K.2 (chrominance) of ITU-T T.81 (1992), annex K.
LUMINANCE = """
16 11 10 16  24  40  51  61
12 12 14 19  26  58  60  55
14 13 16 24  40  57  69  56
14 17 22 29  51  87  80  62
18 22 37 56  68 109 103  77
24 35 55 64  81 104 113  92
49 64 78 87 103 121 120 101
72 92 95 98 112 100 103  99
"""
CHROMINANCE = """
17 18 24 47 99 99 99 99
18 21 26 66 99 99 99 99
24 26 56 99 99 99 99 99
47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
99 99 99 99 99 99 99 99
"""

# Y, Cb, Cr of R, G, B without offsets (JFIF 1.02, ITU-R BT.601).
YCBCR = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))


class JPEG(Operator):
    """y = round(C b C^T / Q), the stored numbers of each 8 x 8 block b: (C, H, W) -> (C, H / 8, W / 8, 8, 8).

    Pictures in [-1, 1] of one channel (grey) or three (RGB) become levels 127.5 (x + 1) - 128, colours become YCbCr without
    subsampling, C is the cosine transform and Q the table of libjpeg at this quality. `decode` gives the picture y stands
    for; nothing is clipped there, so that A(decode(y)) = y and it is a pseudo-inverse (Kawar et al. 2022). Rounding has no
    gradient.

    Raises ValueError unless 1 <= quality <= 100, H and W are multiples of 8 and C is 1 or 3.
    """

    differentiable = False

    def __init__(self, shape: Shape, quality: int):
        if not 1 <= quality <= 100:
            raise ValueError(f"quality = {quality}; expected 1 to 100")
        if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] % 8 or shape[2] % 8:
            raise ValueError(f"shape = {tuple(shape)}; expected 1 or 3 channels and a height and width that 8 divides")
        self.shape, self.out = tuple(shape), (shape[0], shape[1] // 8, shape[2] // 8, 8, 8)
        self.quality = quality
        tables = [quantisation(LUMINANCE, quality)] + [quantisation(CHROMINANCE, quality)] * (shape[0] - 1)
        self.tables = Copies(torch.stack(tables)[:, None, None])  # (C, 1, 1, 8, 8)
        self._cosine = Copies(cosine(8))
        colours = torch.tensor(YCBCR, dtype=torch.float64) if shape[0] == 3 else torch.eye(1, dtype=torch.float64)
        self._colours, self._back = Copies(colours), Copies(torch.linalg.inv(colours))

    def apply(self, x: Tensor) -> Tensor:
        levels = torch.einsum("ij,bjhw->bihw", self._colours.like(x), 127.5 * (x + 1))
        levels = torch.cat([levels[:, :1] - 128, levels[:, 1:]], 1)
        blocks = levels.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
        C = self._cosine.like(x)
        ratio = C @ blocks @ C.T / self.tables.like(x)
        return torch.trunc(ratio + torch.copysign(torch.full_like(ratio, 0.5), ratio))  # libjpeg rounds halves away from 0

    def decode(self, y: Tensor) -> Tensor:
        """The picture of stored numbers, (B, *out) -> (B, *shape)."""
        C = self._cosine.like(self._checked(y, "y", self.out))
        blocks = C.T @ (y * self.tables.like(y)) @ C
        levels = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        levels = torch.cat([levels[:, :1] + 128, levels[:, 1:]], 1)
        return torch.einsum("ij,bjhw->bihw", self._back.like(y), levels) / 127.5 - 1

    def pinv(self, y: Tensor) -> Tensor:
        """`decode`: of all pictures with these numbers the one in the middle of every interval of rounding."""
        return self.decode(y)


def quantisation(table: str, quality: int) -> Tensor:
    """Q = clip((table * scale + 50) // 100, 1, 255), scale = 5000 // quality below 50, else 200 - 2 quality (libjpeg)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = torch.tensor([int(value) for value in table.split()]).reshape(8, 8)
    return ((base * scale + 50) // 100).clamp(1, 255).double()
