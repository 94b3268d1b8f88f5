"""Pictures that never stretch: grids, tables, animations, and figures as PNG bytes.

Every image is shown by whole screen pixels, `scale` of them a side for each of its own, without smoothing.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image as pillow
from torch import Tensor

from course_lib.study import style

WIDTH = 900  # screen pixels of a picture as wide as a slide
DPI = 100
_GAP, _LINE = 6, 21  # screen pixels between images, and of one line of text
_CELL = (80, 160)  # smallest and largest side that an image is given where there is a choice, in screen pixels

Array = np.ndarray
Images = Tensor | Sequence[Tensor]


class Picture(Figure):
    """A figure outside pyplot: a notebook shows it once, as PNG, whatever the backend."""

    def _repr_png_(self) -> bytes:
        return render(self)


def canvas(width: int = WIDTH, height: int = 340) -> Picture:
    """An empty figure of `width` x `height` screen pixels in the course's style, drawn by Agg."""
    with style.context():
        # Agg truncates inches * dpi, so that 8.51 in would give 850 pixels
        figure = Picture(figsize=((width + 1e-6) / DPI, (height + 1e-6) / DPI), dpi=DPI)
        FigureCanvasAgg(figure)
    return figure


def render(figure: Figure) -> bytes:
    """Draw `figure` and return it as PNG, which stays open."""
    return small_png(pillow.fromarray(_pixels(figure)))


def small_png(picture: pillow.Image, palettes: Sequence[int] = (256,)) -> bytes:
    """Write an RGB picture as PNG, with the first of these palettes where the eye cannot tell; without one where it can."""
    out, pixels = io.BytesIO(), np.asarray(picture, np.int16)
    for colours in palettes:
        small = picture.quantize(colours, method=pillow.Quantize.MEDIANCUT, dither=pillow.Dither.NONE)
        if np.abs(np.asarray(small.convert("RGB"), np.int16) - pixels).mean() < 0.5:  # of 255 levels, on average
            small.save(out, "PNG")
            return out.getvalue()
    picture.save(out, "PNG")
    return out.getvalue()


def png(figure: Figure) -> bytes:
    """Return `figure` as PNG and close it, so that pyplot neither shows nor keeps it."""
    out = render(figure)
    plt.close(figure)
    return out


def tile(images: Images, columns: int | None = None, gap: int = 1) -> Tensor:
    """Lay images (N, C, H, W) side by side into one (C, H', W'), with white gaps of `gap` pixels; 10 columns by default."""
    stacked = _stack(images, "images")
    N, C, H, W = stacked.shape
    columns = _columns(columns, N) or min(N, 10)
    rows = math.ceil(N / columns)
    out = stacked.new_ones(C, rows * (H + gap) - gap, columns * (W + gap) - gap)
    for i, image in enumerate(stacked):
        y, x = (i // columns) * (H + gap), (i % columns) * (W + gap)
        out[:, y : y + H, x : x + W] = image
    return out


def grid(
    images: Images,
    columns: int | None = None,
    titles: Sequence[object] | None = None,
    title: str | None = None,
    scale: int | None = None,
) -> Figure:
    """A grid of images, row by row, each with its title above it.

    images   (N, 1, H, W) or (N, 3, H, W) in [-1, 1], clipped for show; or a list of (C, H, W) or (H, W)
    columns  by default what 900 screen pixels hold, in even rows
    scale    screen pixels for one image pixel; by default what fits

    Raises ValueError for other shapes, for values that are not finite, and for a wrong number of titles.
    """
    arrays = to_rgb(images, "images")
    N, _, W = arrays.shape[:3]
    if titles is not None and len(titles) != N:
        raise ValueError(f"titles has {len(titles)} entries; expected one for each of the {N} images")
    names = [str(t) for t in titles] if titles is not None else []
    columns = _columns(columns, N)
    if columns is None:
        cell = max([W * math.ceil(_CELL[0] / W) + _GAP] + [math.ceil(_text_width(name)) + 10 for name in names])
        most = max(1, (WIDTH + _GAP) // cell)
        columns = math.ceil(N / math.ceil(N / most))  # rows as even as can be
    rows = [arrays[i : i + columns] for i in range(0, N, columns)]
    labels = [names[i : i + columns] for i in range(0, N, columns)]
    return _sheet(rows, labels, [], title, scale)


def strip(
    rows: Sequence[Images],
    row_titles: Sequence[object] | None = None,
    column_titles: Sequence[object] | None = None,
    title: str | None = None,
    scale: int | None = None,
) -> Figure:
    """A table of images: each row is a batch as in `grid`, named at its left; columns are named above.

    Raises ValueError where the rows differ in number or size of images, and for a wrong number of titles.
    """
    arrays = [to_rgb(row, f"rows[{i}]") for i, row in enumerate(rows)]
    if not arrays:
        raise ValueError("rows is empty; expected at least one batch of images")
    for i, row in enumerate(arrays):
        if row.shape != arrays[0].shape:
            raise ValueError(f"rows[{i}] holds {_count(row)}; expected {_count(arrays[0])}, as in rows[0]")
    if row_titles is not None and len(row_titles) != len(arrays):
        raise ValueError(f"row_titles has {len(row_titles)} entries; expected one for each of the {len(arrays)} rows")
    if column_titles is not None and len(column_titles) != len(arrays[0]):
        raise ValueError(f"column_titles has {len(column_titles)} entries; expected one for each of the {len(arrays[0])} columns")
    labels = [[str(t) for t in column_titles or []]] + [[]] * (len(arrays) - 1)
    return _sheet(arrays, labels, [str(t) for t in row_titles or []], title, scale)


def animate(frames: Images | Sequence[Figure] | Sequence[Array], fps: float = 12, scale: int = 8) -> Image:
    """An endless animation of at most 256 colours, whose last frame stays for a second, as an animated PNG.

    frames  (T, C, H, W) or (T, H, W) in [-1, 1], shown `scale` times larger; or a list of figures, which are
            closed, or of RGB arrays (H, W, 3) of uint8, both shown as large as they are

    The format is PNG and not GIF: nbconvert drops GIF, hence the slides would, and noise takes twice the space in it.
    """
    if fps <= 0:
        raise ValueError(f"fps = {fps}; expected a positive number of frames a second")
    first = frames[0] if len(frames) else None
    if isinstance(first, Figure):
        arrays, scale = [_pixels(figure) for figure in frames], 1
        for figure in frames:
            plt.close(figure)
    elif isinstance(first, np.ndarray):
        arrays, scale = list(frames), 1
    else:
        if isinstance(frames, Tensor) and frames.ndim == 3:
            frames = frames[:, None]
        arrays = list(to_rgb(frames, "frames"))
    shape = arrays[0].shape
    for i, array in enumerate(arrays):
        if array.shape != shape or array.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
            raise ValueError(f"frames[{i}] is {array.dtype} of shape {array.shape}; expected uint8 (H, W, 3), all of one size")
    H, W = shape[:2]
    # one palette for all frames: a palette for each would flicker
    film = pillow.fromarray(np.concatenate(arrays)).quantize(256, dither=pillow.Dither.NONE)
    shots = [film.crop((0, i * H, W, (i + 1) * H)) for i in range(len(arrays))]
    shots = [shot.resize((W * scale, H * scale), pillow.Resampling.NEAREST) for shot in shots]
    durations = [round(1000 / fps)] * (len(shots) - 1) + [1000]
    out = io.BytesIO()
    shots[0].save(out, "PNG", save_all=True, append_images=shots[1:], duration=durations, loop=0)
    return Image(data=out.getvalue(), format="png")


# --- how a sheet of images is laid out ----------------------------------------------------------------


def _sheet(rows: list[Array], labels: list[list[str]], names: list[str], title: str | None, scale: int | None) -> Figure:
    """One image that holds all, and text beside it; lengths are in image pixels, `scale` screen pixels each.

    rows  batches (n, H, W, 3) of uint8; labels  per row, the text above each image; names  the text left of each row
    """
    columns = max(len(row) for row in rows)
    H, W = rows[0].shape[1:3]
    left = max((math.ceil(_text_width(name)) + 12 for name in names), default=0)
    if scale is None:
        sizes = range(1, max(1, _CELL[1] // W) + 1)
        scale = max([1] + [s for s in sizes if left + (columns * (W + math.ceil(_GAP / s))) * s - _GAP <= WIDTH])
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale = {scale!r}; expected a whole number of screen pixels for one image pixel, at least 1")

    def units(screen: float) -> int:
        return math.ceil(screen / scale)

    gap, left = units(_GAP), units(left)
    widest = max((_text_width(text) for row in labels for text in row), default=0)
    pitch = max(W + gap, units(widest + 10))
    tops = [units(_LINE * (1 + max(text.count("\n") for text in row)) + 2) if row else 0 for row in labels]
    head = units(_LINE * (1 + title.count("\n")) + 16) if title else 0
    width = left + max(columns * pitch - gap, W)
    if title:
        width = max(width, units(_text_width(title, 15) + 12))
    height = head + sum(tops) + len(rows) * (H + gap) - gap
    sheet = np.full((height, width, 3), 255, np.uint8)

    figure = canvas(width * scale, height * scale)
    with style.context():
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        y = head
        for i, (row, texts, top) in enumerate(zip(rows, labels, tops, strict=True)):
            y += top
            for k, image in enumerate(row):
                x = left + k * pitch + (pitch - gap - W) // 2
                sheet[y : y + H, x : x + W] = image
                if texts:
                    axes.text(x + W / 2, y - units(4), texts[k], ha="center", va="bottom", fontsize=12)
            if names:
                axes.text(left - 10 / scale, y + H / 2, names[i], ha="right", va="center", fontsize=13)
            y += H + gap
        if title:
            axes.text(width / 2, head / 2, title, ha="center", va="center", fontsize=15)
        axes.imshow(sheet, interpolation="nearest", aspect="equal", extent=(0, width, height, 0))
    return figure


@functools.lru_cache(maxsize=1024)
def _text_width(text: str, size: float = 13) -> float:
    """Width of the widest line in screen pixels as Agg draws it: its hinting makes a line wider than its outlines are."""
    with style.context():
        return float(canvas(1, 1).text(0, 0, text, fontsize=size).get_window_extent().width)


def _pixels(figure: Figure) -> Array:
    """Draw a figure by Agg; (H, W, 3) uint8."""
    agg = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    agg.draw()
    return np.ascontiguousarray(np.asarray(agg.buffer_rgba())[..., :3])


# --- what is accepted ---------------------------------------------------------------------------------


def _stack(images: Any, name: str) -> Tensor:
    """Bring a batch or a list of images to (N, C, H, W) with C = 1 or 3; raise ValueError where it is none."""
    expected = "expected (N, 1, H, W) or (N, 3, H, W), or a list of (C, H, W) or (H, W), with N >= 1"
    if not isinstance(images, Tensor):
        images = [torch.as_tensor(image) for image in images]
        shapes = sorted({tuple(image.shape) for image in images})
        if len(shapes) != 1:
            raise ValueError(f"{name} holds images of the shapes {shapes}; {expected}, all of one shape")
        images = torch.stack([image[None] if image.ndim == 2 else image for image in images])
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"{name} has shape {tuple(images.shape)}; {expected}")
    images = images.detach().float().cpu()
    if not bool(torch.isfinite(images).all()):
        where = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{name}[{where}] holds values that are not finite; expected numbers, shown from -1 to 1")
    return images


def to_rgb(images: Any, name: str) -> Array:
    """Images in [-1, 1] as (N, H, W, 3) uint8; what lies outside is clipped."""
    stacked = _stack(images, name).clamp(-1, 1)
    levels = ((stacked + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return levels.expand(*levels.shape[:3], 3).numpy()


def _columns(columns: int | None, N: int) -> int | None:
    if columns is not None and (not isinstance(columns, int) or columns < 1):
        raise ValueError(f"columns = {columns!r}; expected a whole number, at least 1")
    return None if columns is None else min(columns, N)


def _count(row: Array) -> str:
    return f"{len(row)} images of {row.shape[1]} x {row.shape[2]} pixels"
