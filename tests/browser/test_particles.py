"""The plotly figure of a ParticleExplorer in JupyterLab: offline, rendered, in step with its slider, small on disk."""

import os
from itertools import pairwise
from pathlib import Path

import pytest

from tests.browser.tools import open_code, run_all, title, until

NOTEBOOK = "particles.ipynb"
SOURCE = """from IPython.display import display

from course_lib import study
from course_lib.worlds import toys

shown = study.ParticleExplorer(toys.ring(8))
display(shown)
shown.controls["level"].value = 10  # before the page has drawn"""
PARTICLES = """plot => {
    const at = node => node.getAttribute("transform");
    return Array.from(plot.querySelectorAll(".scatterlayer .trace:last-child .points path"), at);
}"""
RECORD = """plot => {
    window.keys = []; window.drawn = [];
    document.addEventListener("keydown", () => window.keys.push(performance.now()), true);
    plot.on("plotly_afterplot", () => requestAnimationFrame(() => window.drawn.push(performance.now())));
}"""


@pytest.mark.browser
@pytest.mark.slow
def test_particles_are_drawn_in_jupyterlab_and_follow_the_slider(lab, watched):
    page = watched.page
    path = open_code(page, lab, NOTEBOOK, SOURCE)
    (cell,) = run_all(page, path)

    # What a viewer without a kernel gets is a picture and a line of text, and no library.
    (output,) = cell.outputs
    assert set(output.data) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    size = path.stat().st_size
    print(f"saved notebook: {size / 1000:.0f} kB")
    assert size < 200_000

    plot = page.locator(".js-plotly-plot")
    plot.locator(".scatterlayer .trace:last-child .points path").first.wait_for(timeout=30_000)
    positions = lambda: plot.evaluate(PARTICLES)
    assert len(positions()) == 300 and plot.locator(".contourfill path").count() > 5
    until(page, lambda: "level 10 of 20" in title(plot), "the level that was set before the page drew")
    plot.evaluate(RECORD)
    if folder := os.environ.get("SHOTS"):  # a folder for screenshots, to look at
        plot.screenshot(path=Path(folder) / "level_10.png")

    # A key moves all particles, and the key back brings them back.
    handle = page.locator(".jp-OutputArea-output .noUi-handle").first
    seen, level, waits = [positions()], 10, []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        before = page.evaluate("window.drawn.length")
        handle.press(key)
        level += 1 if key == "ArrowRight" else -1
        until(page, lambda level=level: f"level {level} of 20" in title(plot), f"level {level}")
        until(page, lambda before=before: page.evaluate("window.drawn.length") > before, "a new picture")
        page.wait_for_timeout(400)
        waits.append(page.evaluate("window.drawn.find(one => one > window.keys.at(-1)) - window.keys.at(-1)"))
        seen.append(positions())
    print(f"key to picture: {', '.join(f'{wait:.0f}' for wait in waits)} ms")
    assert min(waits) < 600  # other tests share the machine and only add to a wait
    assert seen[3] == seen[1]
    assert all(sum(a != b for a, b in zip(old, new, strict=True)) > 290 for old, new in pairwise(seen))

    # A burst of keys ends at the last level; the levels between are dropped.
    before = page.evaluate("window.drawn.length")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    until(page, lambda: "level 20 of 20" in title(plot), "the last level")
    page.wait_for_timeout(1000)
    print(f"burst: 20 keys, {page.evaluate('window.drawn.length') - before} pictures")
    assert "level 20 of 20" in title(plot)
    last = positions()
    if folder:
        plot.screenshot(path=Path(folder) / "level_20.png")

    # Opened anew on the same kernel, the figure shows the level that the slider says.
    page.reload()
    plot.locator(".scatterlayer .trace:last-child .points path").first.wait_for(timeout=60_000)
    until(page, lambda: "level 20 of 20" in title(plot), "the level after the page was loaded anew")
    assert positions() == last

    assert watched.foreign == [] and watched.errors == []
