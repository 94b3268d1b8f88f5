"""What figures and explorers show: their pixels, where their texts are, and the time of a redraw."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

REDRAW = 0.2  # s that a redraw may take
SLACK = 2  # times as long while others use the same caches: beside two programs on both cores 0.5 and 1.0 were measured


def decode(data: bytes) -> np.ndarray:
    """The pixels of a PNG: (H, W, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))


def crop(data: bytes, x: int, y: int, side: int) -> np.ndarray:
    """A square of a PNG: (side, side, 3) uint8."""
    return decode(data)[y : y + side, x : x + side]


def levels(image: torch.Tensor, scale: int = 1) -> np.ndarray:
    """What (C, H, W) in [-1, 1] must look like by whole screen pixels: (scale H, scale W, 3) uint8."""
    rgb = np.round((image.clamp(-1, 1).numpy() + 1) * 127.5).astype(np.uint8)
    rgb = np.broadcast_to(rgb, (3, *rgb.shape[1:])).transpose(1, 2, 0)
    return rgb.repeat(scale, 0).repeat(scale, 1)


def inside_and_apart(explorer: Any) -> bool:
    """Whether the texts of a scene or prompt explorer are legible, inside the figure, and on no other text or picture."""
    texts = [text for text in explorer._axes.texts if text.get_text()]
    boxes, whole = [text.get_window_extent() for text in texts], explorer._axes.figure.bbox
    images = [image.get_window_extent() for image in explorer._axes.images]
    assert min(text.get_fontsize() for text in texts) >= 12
    for i, box in enumerate(boxes):
        name = texts[i].get_text()
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, name
        assert not any(box.overlaps(other) for other in (*boxes[:i], *images)), name
    return True


def seconds(explorer: Any) -> float:
    """Processor time of one redraw on one thread, the least of five: other programs only ever add to it."""
    took = []
    for _ in range(5):
        start = time.process_time()
        explorer.draw(**explorer.values)
        took.append(time.process_time() - start)
    print(f"{type(explorer).__name__}: {1000 * min(took):.0f} ms")
    return min(took)


def shots(png):
    """The frames of an animated PNG, (T, H, W, 3), the ms that each stays, and how often it plays, 0 for ever."""
    image, found, stays = Image.open(io.BytesIO(png)), [], []
    for k in range(getattr(image, "n_frames", 1)):
        image.seek(k)
        found.append(np.asarray(image.convert("RGB")))
        stays.append(image.info.get("duration"))
    return np.stack(found), stays, image.info.get("loop")
