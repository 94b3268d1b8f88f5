"""A lecture in JupyterLab, as a student meets it: offline, run from top to bottom, its explorer moved by hand."""

from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.browser.tools import idle, run_all, until

LECTURE = "lectures/01_forward_process.ipynb"
BURST = 40  # key presses
RECORD = """explorer => {
    window.times = {keys: [], pictures: []};
    explorer.addEventListener("keydown", () => window.times.keys.push(performance.now()), true);
    explorer.querySelector("img").addEventListener("load", () => window.times.pictures.push(performance.now()));
}"""
BYTES = """async image => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return Array.from(bytes, byte => byte.toString(16).padStart(2, "0")).join("");
}"""


class Slider:
    """An explorer's slider, moved by keys, and the picture that it changes."""

    def __init__(self, page, explorer):
        self.page, self.handle, self.image = page, explorer.locator(".noUi-handle"), explorer.locator("img")
        self.message, self.readout = explorer.locator(".widget-html-content"), explorer.locator(".widget-readout")
        explorer.evaluate(RECORD)

    def times(self):
        """When keys were pressed and when pictures were there, in ms."""
        return self.page.evaluate("window.times")

    def picture(self):
        """The picture's bytes, in hexadecimal."""
        return self.image.evaluate(BYTES)

    def press(self, key):
        """Press a key and wait for its picture, the only one that it may bring."""
        before = len(self.times()["pictures"])
        self.handle.press(key)
        answered = lambda: len(self.times()["pictures"]) > before or self.message.inner_text()
        until(self.page, answered, f"a picture after {key}")
        self.page.wait_for_timeout(300)
        assert self.message.inner_text() == ""
        assert len(self.times()["pictures"]) == before + 1
        return self.picture()

    def wait(self):
        """From the last key to the last picture, in ms."""
        return self.times()["pictures"][-1] - self.times()["keys"][-1]


@pytest.mark.browser
@pytest.mark.slow
def test_a_lecture_runs_in_jupyterlab_and_its_explorer_follows_the_slider(lab, watched):
    page, path = watched.page, lab.base / LECTURE
    copies = {mine.name for mine in (lab.base / "my_course").glob("*.ipynb")}
    assert copies == {exercise.name for exercise in (lab.base / "exercises").glob("*.ipynb")} != set()

    # Formulas and the explorer's poster are there before any cell has run.
    page.goto(urlunsplit(urlsplit(lab.url)._replace(path=f"/lab/tree/{LECTURE}")))
    page.locator(".jp-Notebook mjx-container").first.wait_for(timeout=60_000)
    cell = page.locator(".jp-CodeCell").filter(has_text="study.ScheduleExplorer(")
    cell.scroll_into_view_if_needed()
    cell.locator(".jp-OutputArea img").wait_for()

    # Run All. What the cells have left is read from the notebook that JupyterLab saves.
    run_all(page, path)

    # A key brings one new picture, and the key back the old one.
    explorer = cell.locator(".jp-OutputArea-output .widget-vbox")
    explorer.scroll_into_view_if_needed()
    slider = Slider(page, explorer)
    shown, value = [slider.picture()], float(slider.readout.inner_text())
    assert bytes.fromhex(shown[0]).startswith(b"\x89PNG")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        shown.append(slider.press(key))
        print(f"{key} to picture: {slider.wait():.0f} ms")
    assert len(set(shown)) == 4 and shown[4] == shown[2]

    # A burst: two seconds after its last key all work is done, and the picture is that of the last value.
    before = slider.times()
    for _ in range(BURST):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(2000)
    after, last, busy = slider.times(), slider.picture(), not idle(page)
    drawn = len(after["pictures"]) - len(before["pictures"])
    print(f"burst: {BURST} keys, {drawn} pictures, the last {slider.wait():.0f} ms after the last key")
    assert len(after["keys"]) == len(before["keys"]) + BURST
    assert float(slider.readout.inner_text()) == pytest.approx(value + 0.01 * (2 + BURST))
    page.wait_for_timeout(1000)
    assert not busy and slider.times() == after, "the kernel still works two seconds after the last key"
    assert slider.press("ArrowLeft") != last
    assert slider.press("ArrowRight") == last

    assert watched.foreign == [] and watched.errors == []
