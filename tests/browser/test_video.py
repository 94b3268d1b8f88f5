"""The video explorer on the stage: clips play in the page, mixing 0 is the image model, and a clip is saved where it is said."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from course_lib.study.clips import UNSEEN
from course_lib.study.video import CELL, GAP, TOP
from tests.browser.test_stage import Show
from tests.browser.tools import SHOTS, until

PNG = """async img => {
    const bytes = new Uint8Array(await (await fetch(img.src)).arrayBuffer());
    return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(""));
}"""


@pytest.mark.browser
@pytest.mark.slow
def test_clips_play_and_at_mixing_zero_they_are_the_image_models(stage, hall):
    hall.foreign.clear()
    hall.errors.clear()
    page, show = hall.page, Show(hall.page)
    print(f"\nfirst clip {show.open(f'{stage.base}/11.ipynb'):.1f} s after the page was asked for")
    view = page.locator("img.widget-image:visible")

    def menu(name):
        return page.locator(".widget-dropdown", has_text=name).locator("select")

    def panels():
        """The frames of both clips, (2, T, CELL, CELL, 3)."""
        image, frames = Image.open(io.BytesIO(base64.b64decode(view.evaluate(PNG)))), []
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB"))[TOP : TOP + CELL])
        lefts = GAP, 2 * GAP + CELL
        return np.stack([np.stack([frame[:, x : x + CELL] for frame in frames]) for x in lefts]).astype(int)

    def followed(before):
        until(page, lambda: show.redraws() > before, "a redraw", seconds=120)
        show.arrived()

    def shot(name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"video_{name}.png")

    # The clips play: what the page shows changes, though no control moves.
    clip, alone = panels()
    assert len(clip) > 1 and np.abs(clip - alone).mean() > 1
    first = view.screenshot()
    until(page, lambda: view.screenshot() != first, "another frame on the page")
    assert show.message() == []
    shot("first")

    # Another motion: the clip follows, the image model is not told of it.
    before = show.redraws()
    menu("motion").select_option("camera zooms out")
    followed(before)
    moved, same = panels()
    apart = 2 * UNSEEN  # two palettes, each of which may err by as much
    assert np.abs(moved - clip).mean() > apart > np.abs(same - alone).mean()
    shot("zoom")

    # Down to mixing 0, with noise of its own for each frame: both are the image model.
    page.evaluate("document.activeElement.blur()")
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    until(page, lambda: show.value() == "0.00", "mixing 0")
    show.arrived()
    before = show.redraws()
    menu("noise").select_option("each frame its own")
    followed(before)
    clip, alone = panels()
    assert np.array_equal(clip, alone) and show.message() == []
    shot("zero")

    # A clip is saved in the home folder of who runs the stage.
    page.get_by_role("button", name="save MP4").click()
    line = page.get_by_text(re.compile(r"(saved|was saved:) /"))
    line.wait_for(timeout=20_000)
    path = Path(line.inner_text().split()[-1])
    assert path.is_file() and path.stat().st_size > 1000 and path.stem.endswith("zooms_out_1")

    show.click("Reset")
    until(page, lambda: show.value() == "1.00", "the first values", seconds=120)
    show.arrived()
    assert menu("motion").input_value() == "sliding left" and show.message() == []
    assert hall.foreign == [] and hall.errors == []
