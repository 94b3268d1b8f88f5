"""Source shown in a lecture, and pictures written with as few colours as the eye cannot tell."""

import io

import numpy as np
from PIL import Image

from course_lib import study
from course_lib.steps import ddim, ddpm
from course_lib.study.pictures import small_png


def test_source_is_the_code_as_it_stands():
    shown = study.source(ddim, ddpm).data
    assert shown.startswith("```python\ndef ddim(") and shown.endswith("\n```")
    assert shown.count("```") == 2 and "def ddpm(" in shown and "    x0 = D(x, sigma)" in shown
    assert study.source(study.Explorer.draw).data.splitlines()[1].startswith("def draw(")  # a method loses its indent


def test_a_picture_takes_the_first_palette_that_the_eye_cannot_tell():
    flat = np.zeros((64, 64, 3), np.uint8)
    flat[:, 32:] = (255, 140, 0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    few = Image.open(io.BytesIO(small_png(Image.fromarray(flat), palettes=(2, 256))))
    assert few.mode == "P" and np.array_equal(np.asarray(few.convert("RGB")), flat)
    full = Image.open(io.BytesIO(small_png(Image.fromarray(noise), palettes=(2, 256))))
    assert full.mode == "RGB" and np.array_equal(np.asarray(full), noise)
