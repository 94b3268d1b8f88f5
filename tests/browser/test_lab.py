"""A lecture in JupyterLab, as a student meets it: offline, run from top to bottom, its explorer moved by hand."""

from __future__ import annotations

import time
from urllib.parse import urlsplit

import nbformat
import pytest

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
RAN = """() => {
    const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(prompt => prompt.textContent);
    return prompts.some(text => /\\d/.test(text)) && !prompts.some(text => text.includes("*"));
}"""


def choose(page, menu, command):
    """Choose a command from a menu of JupyterLab."""
    page.locator(".lm-MenuBar-item").get_by_text(menu, exact=True).click()
    page.locator(f'.lm-Menu-item[data-command="{command}"]').click()


def until(page, holds, seconds, what):
    """Wait until `holds()`, while the page lives on."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        page.wait_for_timeout(100)


def idle(page):
    """Whether the notebook's kernel says that it is idle."""
    at = urlsplit(page.url)
    (kernel,) = page.request.get(f"{at.scheme}://{at.netloc}/api/kernels").json() or [{"execution_state": "starting"}]
    return kernel["execution_state"] == "idle"


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


class Moved:
    """The explorer's slider, moved by keys, and its picture."""

    def __init__(self, page, explorer):
        self.page, self.handle, self.image = page, explorer.locator(".noUi-handle"), explorer.locator("img")
        explorer.evaluate(RECORD)

    def times(self):
        return self.page.evaluate("window.times")

    def press(self, key):
        """Press a key; returns the new picture, in hexadecimal, and the seconds until it was there."""
        before = len(self.times()["pictures"])
        self.handle.press(key)
        until(self.page, lambda: len(self.times()["pictures"]) > before, 5, f"a picture after {key}")
        self.page.wait_for_timeout(300)  # a second picture for the same key would be one too many
        times = self.times()
        assert len(times["pictures"]) == before + 1
        return self.image.evaluate(BYTES), (times["pictures"][-1] - times["keys"][-1]) / 1000


@pytest.mark.browser
@pytest.mark.slow
def test_a_lecture_runs_in_jupyterlab_and_its_explorer_answers(lab, watched):
    page, path = watched.page, lab.base / LECTURE
    copies = {mine.name for mine in (lab.base / "my_course").glob("*.ipynb")}
    assert copies == {exercise.name for exercise in (lab.base / "exercises").glob("*.ipynb")} != set()

    # The address opens the lecture; formulas and the explorers' posters are there before any cell has run.
    assert urlsplit(lab.url).path == f"/lab/tree/{LECTURE}"
    page.goto(lab.url)
    page.locator(".jp-Notebook mjx-container").first.wait_for(timeout=60_000)
    cell = page.locator(".jp-CodeCell").filter(has_text="study.ScheduleExplorer(")
    assert cell.locator(".jp-OutputArea img").count() == 1
    until(page, lambda: idle(page), 30, "a kernel")

    # Run All. The notebook is read as JupyterLab saves it, which is what every cell has really left.
    choose(page, "Edit", "editmenu:clear-all")
    start = time.monotonic()
    choose(page, "Run", "runmenu:run-all")
    page.wait_for_function(RAN, timeout=90_000)
    until(page, lambda: idle(page), 10, "an idle kernel")
    print(f"\nRun All: {time.monotonic() - start:.1f} s")
    built = path.stat().st_mtime_ns
    choose(page, "File", "docmanager:save")
    until(page, lambda: path.stat().st_mtime_ns != built, 10, "the saved notebook")
    cells = code_cells(path)
    outputs = [output for one in cells for output in one.outputs]
    assert [output for output in outputs if output.output_type == "error" or "Traceback" in output.get("text", "")] == []
    assert [one.execution_count for one in cells] == list(range(1, len(cells) + 1))
    for wrong in (".jupyter-widgets-error-widget", "mjx-merror", ".jp-Dialog"):
        assert page.locator(wrong).count() == 0, wrong

    # One key, one new picture; back, and the old one is there again.
    explorer = cell.locator(".jp-OutputArea-output .widget-vbox")
    explorer.scroll_into_view_if_needed()
    slider, message, readout = (
        Moved(page, explorer),
        explorer.locator(".widget-html-content"),
        explorer.locator(".widget-readout"),
    )
    shown = [slider.image.evaluate(BYTES)]
    assert bytes.fromhex(shown[0]).startswith(b"\x89PNG")
    value, waits = float(readout.inner_text()), []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        picture, seconds = slider.press(key)
        shown.append(picture)
        waits.append(seconds)
        assert message.inner_text() == ""
    assert len(set(shown)) == 4 and shown[4] == shown[2]
    print("key to picture:", ", ".join(f"{seconds * 1000:.0f} ms" for seconds in waits))

    # A burst: two seconds after its last key all work is done, and the picture is that of the last value.
    before = slider.times()
    for _ in range(BURST):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(2000)
    after = slider.times()
    assert idle(page)
    assert len(after["keys"]) == len(before["keys"]) + BURST
    assert float(readout.inner_text()) == pytest.approx(value + 0.01 * (2 + BURST))
    last = slider.image.evaluate(BYTES)
    page.wait_for_timeout(1000)
    assert slider.times() == after, "pictures still come two seconds after the last key"
    other, _ = slider.press("ArrowLeft")
    assert other != last and slider.press("ArrowRight")[0] == last
    assert message.inner_text() == ""
    took = (after["pictures"][-1] - after["keys"][-1]) / 1000
    drawn = len(after["pictures"]) - len(before["pictures"])
    print(f"burst: {BURST} keys, {drawn} pictures, the last {took * 1000:.0f} ms after the last key")

    assert watched.foreign == []
    assert watched.errors == []
