"""The canvas in JupyterLab: offline, drawn on with the mouse, what the page shows is the mask that the kernel reads."""

import base64
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.browser.tools import open_code, run_all, until
from tests.shown import decode

NOTEBOOK = "canvas.ipynb"
SOURCE = """import ipywidgets as widgets
from IPython.display import display

from course_lib import study
from course_lib.worlds import digits

canvas, said = study.Canvas(digits.load("test")[0][0], brush=1.5), widgets.Label()
said.layout.width = "1px"

def tell(change):
    said.value = "mask " + "".join(str(int(marked)) for marked in canvas.mask.flatten())

canvas.observe(tell, names="value")
display(said)
canvas"""
COLOURS = """canvas => {
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return [data.height, data.width, Array.from(data.data)];
}"""


@pytest.mark.browser
@pytest.mark.slow
def test_a_mask_is_drawn_with_the_mouse_and_read_back(lab, watched):
    page = watched.page
    path = open_code(page, lab, NOTEBOOK, SOURCE)
    (cell,) = run_all(page, path)

    # What a viewer without a kernel gets is a picture and a line of text, and no library.
    output = cell.outputs[-1]
    assert set(output.data) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    size = path.stat().st_size
    print(f"saved notebook: {size / 1000:.0f} kB")
    assert size < 20_000

    shown = page.locator(".jp-OutputArea-output")
    surface, said = shown.locator("canvas"), shown.locator(".widget-label", has_text="mask")
    surface.wait_for(timeout=30_000)
    clean = decode(base64.b64decode(output.data["image/png"])).astype(int)

    def pixels():
        height, width, data = surface.evaluate(COLOURS)
        return np.array(data, np.uint8).reshape(height, width, 4)[..., :3].astype(int)

    def mask():
        return np.array([one == "1" for one in said.text_content().removeprefix("mask ")]).reshape(16, 16)

    def marked():
        """The squares that the page shows in another colour than the picture's; each is whole."""
        changed = (np.abs(pixels() - clean) > 2).any(-1).reshape(16, 20, 16, 20)
        assert (changed.all((1, 3)) == changed.any((1, 3))).all()
        return changed.all((1, 3))

    def shot(name):
        if folder := os.environ.get("SHOTS"):  # a folder for screenshots, to look at
            shown.last.screenshot(path=Path(folder) / f"canvas_{name}.png")

    # The picture is the poster's, but for the poster's palette.
    assert clean.shape == (320, 320, 3) and len(np.unique(clean)) > 8
    until(page, lambda: not marked().any(), "the picture")
    size = surface.bounding_box()
    assert (size["width"], size["height"]) == (320, 320)

    def to(x, y, steps=1):
        """Move the mouse to a place in pixels of the picture."""
        box = surface.bounding_box()
        page.mouse.move(box["x"] + 20 * x, box["y"] + 20 * y, steps=steps)

    # A stroke is painted while the button is down, and read when it is released.
    to(2.5, 4.5)
    page.mouse.down()
    to(13.5, 4.5, 12)
    until(page, lambda: marked().sum() == 12, "the stroke, before its end")
    assert said.count() == 0
    page.mouse.up()
    begun = time.monotonic()
    until(page, lambda: said.count() == 1, "the mask")
    print(f"mouse up to mask: {1000 * (time.monotonic() - begun):.0f} ms")
    assert mask().sum() == 12 and mask()[4, 2:14].all() and (marked() == mask()).all()
    shot("stroke")

    # A thicker brush, dragged out of the canvas: the stroke ends there, whatever the mouse does outside.
    handle = shown.locator(".noUi-handle")
    for _ in range(3):
        handle.press("ArrowRight")
    first = said.text_content()
    to(4.5, 9.5)
    page.mouse.down()
    to(8.5, 18.5, 12)
    until(page, lambda: said.text_content() != first, "the end of the stroke")
    page.mouse.up()
    to(13.5, 13.5, 3)
    page.wait_for_timeout(300)
    assert mask()[15].any() and not mask()[13:, 12:].any() and mask()[9, 3:6].all() and not mask()[5:8].any()
    assert (marked() == mask()).all()
    shot("two")

    # Opened anew on the same kernel, the page shows the drawing, and goes on with it.
    before = mask()
    page.reload()
    surface.wait_for(timeout=60_000)
    until(page, lambda: (marked() == before).all(), "the drawing after the page was loaded anew")
    surface.scroll_into_view_if_needed()
    to(14.5, 12.5)
    page.mouse.down()
    page.mouse.up()
    until(page, lambda: mask()[12, 14], "a dot")
    assert (mask() >= before).all()
    until(page, lambda: (marked() == mask()).all(), "the dot on the page")

    # Cleared, it is the picture again.
    shown.get_by_role("button", name="Clear").click()
    until(page, lambda: not mask().any(), "an empty mask")
    until(page, lambda: not marked().any(), "the picture")

    assert watched.foreign == [] and watched.errors == []
