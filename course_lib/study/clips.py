"""Clips that play in a notebook, filmstrips of them, and files that play elsewhere.

A clip is (T, 3, H, W) in [-1, 1], T frames. As in `pictures`, each of its pixels is a whole number of screen pixels, unsmoothed.
"""

from __future__ import annotations

import io
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image
from matplotlib.figure import Figure
from PIL import Image as pillow
from torch import Tensor

from course_lib.study import style
from course_lib.study.pictures import WIDTH, canvas, to_rgb
from course_lib.training import write_atomically

Array = np.ndarray
Places = Sequence[tuple[int, int]]

FPS = 8
GAP, LINE, INK = 12, 21, 13  # screen pixels between clips and of a line of text, and the size of text
SIDE, LONGEST = 160, 1280  # screen pixels: the most that a frame of a filmstrip has a side, and the strip across
OF_CLIPS, OF_PAPER = 224, 32
"""Colours of a palette that are kept for clips, and for the paper and the text around them."""
UNSEEN = 1.5
"""Mean error in levels of 255 that a palette may make: a scene's is below, that of noise, which needs all colours, above."""


def animated_png(
    clips: Tensor, fps: float = FPS, scale: int = 3, columns: int | None = None, titles: Sequence[object] | None = None
) -> bytes:
    """Clips (N, T, 3, H, W) or one (T, 3, H, W) in [-1, 1], side by side with titles above, as an endless animated PNG.

    fps      frames a second, all shown equally long; frames that do not differ from the one before are stored as its longer stay
    scale    screen pixels for one pixel of a clip
    columns  clips in a row; by default what 900 screen pixels hold, at least one

    What lies outside [-1, 1] is clipped. Raises ValueError for other shapes, values that are not finite, an fps or a scale
    that is not positive, and another number of titles.
    """
    frames = _frames(clips)
    _check_fps(fps)
    _check_whole("scale", scale)
    sheet, places = _sheet(len(frames), frames.shape[2] * scale, frames.shape[3] * scale, columns, titles)
    return apng(sheet, places, frames, fps, scale)


def play(
    clips: Tensor, fps: float = FPS, scale: int = 3, columns: int | None = None, titles: Sequence[object] | None = None
) -> Image:
    """What `animated_png` makes, as a notebook shows it: it plays where PNG are animated, elsewhere its first frame stands."""
    return Image(data=animated_png(clips, fps, scale, columns, titles), format="png")


def filmstrip(clips: Tensor, row_titles: Sequence[object] | None = None, every: int = 1) -> Figure:
    """Frames from left to right, a row for each of the clips (N, T, 3, H, W) or for one (T, 3, H, W), and time below.

    every  shows frames 0, every, 2 every, ...

    Raises ValueError as `animated_png` does.
    """
    frames = _frames(clips)
    _check_whole("every", every)
    numbers = range(0, frames.shape[1], every)
    frames = frames[:, ::every]
    N, K, H, W = frames.shape[:4]
    names = _names(row_titles, N, "row_titles")
    gap = 4
    scale = max([1] + [s for s in range(1, SIDE // W + 1) if K * (W * s + gap) < LONGEST - 160])
    across, named = K * (W * scale + gap) - gap, max(_width(name, INK) for name in (*names, "frame"))
    wide = across + 26  # and `named` for each unit of text: a strip that is wider than a page is shown smaller, so text is larger
    ink = INK * max(1.0, wide / max(WIDTH - named, WIDTH / 2))
    left = math.ceil(named * ink / INK * 1.02) + 18
    foot = round(2.4 * ink)
    width, height = left + across + 8, N * (H * scale + gap) - gap + foot
    places = [(i * (H * scale + gap), left + k * (W * scale + gap)) for i in range(N) for k in range(K)]
    sheet = painted(np.full((height, width, 3), 255, np.uint8), places, frames.reshape(-1, H, W, 3), scale)

    figure = canvas(width, height)
    with style.context():
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.imshow(sheet, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
        look = {"fontsize": ink, "va": "center", "parse_math": False}
        for (y, _), name in zip(places[::K], names, strict=False):
            axes.text(left - 10, y + H * scale / 2, name, ha="right", **look)
        below = height - 0.4 * foot
        axes.text(left - 10, below, "frame", ha="right", color=style.COLOURS["muted"], **look)
        for (_, x), number in zip(places, numbers, strict=False):
            axes.text(x + W * scale / 2, below, str(number), ha="center", color=style.COLOURS["muted"], **look)
    return figure


def mp4(clip: Tensor, path: Path | str, fps: float = FPS, scale: int = 1) -> Path:
    """Write a clip (T, 3, H, W) to `path` by ffmpeg, as H.264 that any player takes, and return the path that was written.

    An odd side has its last row or column twice. Where ffmpeg is missing, an animated PNG is written beside, its name ending in
    .png, and a line is printed that says so. Either is written to a temporary file first. Raises ValueError for a path that does
    not end in .mp4 and as `animated_png` does, RuntimeError where ffmpeg fails.
    """
    written, said = saved(clip, path, fps, scale)
    if written.suffix != ".mp4":
        print(said)
    return written


def saved(clip: Tensor, path: Path | str, fps: float = FPS, scale: int = 1) -> tuple[Path, str]:
    """What `mp4` does, without a print: the path that was written, and a line that says so."""
    path, frames = Path(path), _frames(clip)
    if path.suffix != ".mp4":
        raise ValueError(f"path = {str(path)!r}; expected a name that ends in .mp4")
    if len(frames) != 1:
        raise ValueError(f"clip has shape {tuple(clip.shape)}; expected one clip (T, 3, H, W)")
    _check_fps(fps)
    _check_whole("scale", scale)
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        path = path.with_suffix(".png")
        write_atomically(path, lambda temporary: temporary.write_bytes(animated_png(clip, fps, scale)))
        return path, f"ffmpeg is missing, so an animated PNG was saved: {path}"
    shots = frames[0].repeat(scale, 1).repeat(scale, 2)  # (T, H, W, 3)
    shots = np.pad(shots, ((0, 0), (0, shots.shape[1] % 2), (0, shots.shape[2] % 2), (0, 0)), mode="edge")
    T, H, W = shots.shape[:3]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{W}x{H}", "-r", f"{fps:g}", "-i", "-", "-frames:v", str(T)]
    coded = ["-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4"]

    def write(temporary: Path) -> None:
        command = [ffmpeg, "-loglevel", "error", "-y", *raw, *coded, str(temporary)]
        done = subprocess.run(command, input=shots.tobytes(), capture_output=True)
        if done.returncode:
            reason = " ".join(done.stderr.decode(errors="replace").split())[-200:]
            raise RuntimeError(f"ffmpeg could not write {str(path)!r}: {reason or f'exit status {done.returncode}'}")

    write_atomically(path, write)
    return path, f"saved {path}"


# --- how an animation is made ---------------------------------------------------------------------------------------------


def painted(paper: Array, places: Places, cells: Array, scale: int) -> Array:
    """A copy of `paper` (height, width, ...) with cells (N, H, W, ...), enlarged, whose corners (y, x) are `places`."""
    out = paper.copy()
    for (y, x), cell in zip(places, cells, strict=True):
        large = cell.repeat(scale, 0).repeat(scale, 1)
        out[y : y + large.shape[0], x : x + large.shape[1]] = large
    return out


def apng(paper: Array, places: Places, frames: Array, fps: float, scale: int) -> bytes:
    """An endless animated PNG of clips `frames` (N, T, H, W, 3) that play at `places` on `paper` (height, width, 3), all uint8.

    Where the eye cannot tell, one palette serves all frames: one for each would flicker, and full colour is three times as large.
    """
    N, T, H, W = frames.shape[:4]
    column, none = frames.reshape(-1, W, 3), pillow.Dither.NONE
    small, around = (
        pillow.fromarray(column).quantize(OF_CLIPS, dither=none),
        pillow.fromarray(paper).quantize(OF_PAPER, dither=none),
    )
    palette = None
    if np.abs(np.asarray(small.convert("RGB"), np.int16) - column).mean() < UNSEEN:
        of_clips = small.getpalette()[: 3 * OF_CLIPS]
        palette = of_clips + [0] * (3 * OF_CLIPS - len(of_clips)) + around.getpalette()[: 3 * OF_PAPER]
        paper, frames = np.asarray(around) + np.uint8(OF_CLIPS), np.asarray(small).reshape(N, T, H, W)
    shots = [pillow.fromarray(painted(paper, places, frames[:, k], scale)) for k in range(T)]
    for shot in shots if palette else ():
        shot.putpalette(palette)
    out = io.BytesIO()
    shots[0].save(out, "PNG", save_all=True, append_images=shots[1:], duration=1000 / fps, loop=0)
    return out.getvalue()


def drawn(figure: Figure) -> Array:
    """The pixels of a figure that `pictures.canvas` made: (H, W, 3) uint8."""
    figure.canvas.draw()
    return np.ascontiguousarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])


def _sheet(
    N: int, high: int, wide: int, columns: int | None, titles: Sequence[object] | None
) -> tuple[Array, list[tuple[int, int]]]:
    """Paper with the titles of N clips of high x wide screen pixels, and the corners (y, x) of these."""
    names = _names(titles, N, "titles")
    pitch = math.ceil(max([wide] + [_width(name, INK) for name in names])) + GAP
    if columns is None:
        columns = max(1, (WIDTH + GAP) // pitch)
    _check_whole("columns", columns)
    columns = min(columns, N)
    top = LINE * (1 + max(name.count("\n") for name in names)) + 4 if names else 0
    rows = math.ceil(N / columns)
    width, height = columns * pitch - GAP, rows * (top + high + GAP) - GAP
    aside = (pitch - GAP - wide) // 2
    places = [(i // columns * (top + high + GAP) + top, i % columns * pitch + aside) for i in range(N)]
    figure = canvas(width, height)
    with style.context():
        for (y, x), name in zip(places, names, strict=False):
            at = (x + wide / 2) / width, 1 - (y - 5) / height
            figure.text(*at, name, ha="center", va="bottom", fontsize=INK, parse_math=False)
        return drawn(figure), places


def _width(text: str, size: float) -> float:
    """Screen pixels of the widest line of a text."""
    with style.context():
        return float(canvas(1, 1).text(0, 0, text, fontsize=size, parse_math=False).get_window_extent().width)


# --- what is accepted -----------------------------------------------------------------------------------------------------


def _frames(clips: Tensor) -> Array:
    """Clips as (N, T, H, W, 3) uint8; ValueError where they are none."""
    clips = torch.as_tensor(clips)
    whole = clips[None] if clips.ndim == 4 else clips
    if whole.ndim != 5 or whole.shape[2] != 3 or 0 in whole.shape:
        raise ValueError(f"clips has shape {tuple(clips.shape)}; expected (N, T, 3, H, W) or (T, 3, H, W), none of them 0")
    finite = torch.isfinite(whole).flatten(2).all(-1)
    if not bool(finite.all()):
        n, k = (~finite).nonzero()[0].tolist()
        raise ValueError(f"clips holds values that are not finite, first in frame {k} of clip {n}; expected numbers from -1 to 1")
    return to_rgb(whole.flatten(0, 1), "clips").reshape(*whole.shape[:2], *whole.shape[3:], 3)


def _names(titles: Sequence[object] | None, N: int, name: str) -> list[str]:
    if titles is not None and len(titles) != N:
        raise ValueError(f"{name} has {len(titles)} entries; expected one for each of the {N} clips")
    return [str(title) for title in titles or ()]


def _check_whole(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value!r}; expected a whole number, at least 1")


def _check_fps(fps: float) -> None:
    if not 0 < fps <= 1000:
        raise ValueError(f"fps = {fps!r}; expected a positive number of frames a second, at most 1000")
