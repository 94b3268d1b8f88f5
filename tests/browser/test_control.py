"""The explorer of spatial control on the stage: the picture follows a drawing by mouse; at scale 0 nothing of it is left."""

import base64

import numpy as np
import pytest

from course_lib.study.control import CELL, EMPTY, GAP, HEAD, SHEET, TOP
from tests.browser.test_stage import Show
from tests.browser.tools import SHOTS, until
from tests.shown import crop

PNG = """async img => {
    const bytes = new Uint8Array(await (await fetch(img.src)).arrayBuffer());
    return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(""));
}"""
CORNERS = [(20.0, 45.0), (32.0, 15.0), (44.0, 45.0), (20.0, 45.0)]


@pytest.mark.browser
@pytest.mark.slow
def test_a_drawing_becomes_a_picture_and_scale_zero_is_without_it(stage, hall):
    hall.foreign.clear()
    hall.errors.clear()
    page, show = hall.page, Show(hall.page)
    print(f"\nfirst picture {show.open(f'{stage.base}/13.ipynb'):.1f} s after the page was asked for")
    view, sheet = page.locator("img.widget-image:visible"), page.locator(".stage-view canvas")
    menu = page.locator(".widget-dropdown", has_text="start").locator("select")

    def panel(place):
        x, y = GAP + place % 3 * (CELL + GAP), TOP + HEAD + place // 3 * (CELL + HEAD)
        return crop(base64.b64decode(view.evaluate(PNG)), x + 3, y + 3, CELL - 6).astype(int)

    def followed(before):
        until(page, lambda: show.redraws() > before, "a redraw", seconds=120)
        show.rest()

    def shot(name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"control_{name}.png")

    # An empty sheet is said, and the one picture is that without control.
    before = show.redraws()
    menu.select_option("nothing")
    followed(before)
    assert show.message() == [EMPTY]
    assert len(np.unique(panel(2))) == 1 < len(np.unique(panel(1)))
    shot("empty")

    # A triangle, drawn with the mouse on a page that shows the sheet larger than it is.
    box, before = sheet.bounding_box(), show.redraws()
    assert box["width"] > SHEET
    for k, (x, y) in enumerate(CORNERS):
        page.mouse.move(box["x"] + box["width"] * x / 64, box["y"] + box["height"] * y / 64, steps=8)
        if k == 0:
            page.mouse.down()
    page.mouse.up()
    followed(before)
    assert show.message() == []
    lines = (panel(0).mean(-1) > 127).nonzero()
    corners = np.array([(lines[1].min(), lines[0].min()), (lines[1].max(), lines[0].max())]) / 3 + 1  # within the frame
    print(f"a triangle from {corners[0].round(1)} to {corners[1].round(1)}")
    assert np.abs(corners - [(20, 15), (44, 45)]).max() < 2.5  # its lines are 2 pixels thick
    assert np.abs(panel(1) - panel(2)).mean() > 1, "the picture does not follow"
    shot("drawn")

    # Down to scale 0: the two pictures are one.
    page.evaluate("document.activeElement.blur()")
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    until(page, lambda: show.value() == "0.00", "scale 0")
    show.arrived()
    assert np.array_equal(panel(1), panel(2)) and show.message() == []
    shot("zero")
    drawn = view.evaluate(PNG)

    # Cleared, and drawn on again by Reset's own values.
    before = show.redraws()
    page.locator(".stage-view").get_by_role("button", name="Clear").click()
    followed(before)
    assert show.message() == [EMPTY] and view.evaluate(PNG) != drawn
    show.click("Reset")
    until(page, lambda: show.value() == "1.00" and show.message() == [], "the first values", seconds=120)
    show.arrived()
    assert menu.input_value() == "car"
    assert hall.foreign == [] and hall.errors == []
