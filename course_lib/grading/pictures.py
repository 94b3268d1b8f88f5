"""Pictures of built notebooks: as few colours as the eye cannot tell from the original, and no transparency."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

PALETTES = (16, 24, 32, 48, 64, 96, 128, 192, 256)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of 8 bits a channel or fewer; others stay as they are
BLOCK = 16  # pixels
WHOLE, WORST = 2.0, 5.0  # root mean square of the error, in levels of 255: 42 dB in the picture, 34 dB in its worst block


def smaller(png: bytes) -> bytes:
    """The same picture as a PNG that is no larger, on white where it was transparent; an animation stays as it is.

    It takes the first of PALETTES whose error is at most WHOLE in the picture and WORST in each block of it: a mean over
    a white page hides a small photograph in bands. Where none does, each channel is rounded to a multiple of 5,
    which keeps black and white and errs by at most 2 levels.
    """
    with Image.open(io.BytesIO(png)) as picture:
        if picture.format != "PNG" or picture.mode not in MODES or getattr(picture, "is_animated", False):
            return png
        opaque = not picture.has_transparency_data
        page = picture.convert("RGBA")
    white = Image.new("RGBA", page.size, "white")
    rgb = Image.alpha_composite(white, page).convert("RGB")
    found = [_written(rgb), *([png] if opaque else [])]
    for colours in PALETTES:
        # the palette that comes nearest to each colour, be it rare, moved to the means of its clusters
        few = rgb.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        few = _exact_flats(few, rgb)
        whole, worst = errors(few, rgb)
        if whole <= WHOLE and worst <= WORST:
            return min(*found, _written(few), key=len)
    found.append(_written(rgb.point(lambda level: (level + 2) // 5 * 5)))
    return min(found, key=len)


def errors(picture: Image.Image, original: Image.Image) -> tuple[float, float]:
    """Root mean square of the error over the picture, and over the worst of its blocks, in levels of 255."""
    squared = (np.asarray(picture.convert("RGB"), np.float64) - np.asarray(original.convert("RGB"), np.float64)) ** 2
    H, W = squared.shape[:2]
    filled = np.pad(squared, ((0, -H % BLOCK), (0, -W % BLOCK), (0, 0)), mode="edge")
    blocks = filled.reshape(len(filled) // BLOCK, BLOCK, -1, BLOCK, 3).mean((1, 3, 4))
    return float(np.sqrt(squared.mean())), float(np.sqrt(blocks.max()))


def _exact_flats(few: Image.Image, original: Image.Image) -> Image.Image:
    """Give each entry of the palette the colour that most of its pixels had: a mean would tint a white page."""
    index = np.asarray(few, np.int64).ravel()
    R, G, B = np.asarray(original, np.int64).reshape(-1, 3).T
    pairs, counts = np.unique(index << 24 | R << 16 | G << 8 | B, return_counts=True)
    entry, colour = pairs >> 24, pairs & 0xFFFFFF
    most = 2 * counts > np.bincount(entry, counts)[entry]
    palette = np.array(few.getpalette()).reshape(-1, 3)
    palette[entry[most]] = (colour[most][:, None] >> np.array([16, 8, 0])) & 0xFF
    few.putpalette(palette.ravel().tolist())
    return few


def _written(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()
