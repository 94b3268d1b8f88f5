"""The README's picture of the stage, by the code that tests it: `python -m tests.browser.screenshots`.

It serves one lecture's demo, moves the main slider, and writes what the window shows to lectures/demo.png.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from course_lib.study.pictures import small_png
from tests.browser.test_stage import Show
from tests.browser.tools import ROOT, find_chromium, free_port, running, said, stranger, watching

LIMIT = 150_000  # bytes


def main():
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("number", nargs="?", default="04", help="the lecture")
    asked.add_argument("--out", type=Path, default=ROOT / "lectures" / "demo.png")
    asked.add_argument("--keys", type=int, default=2, help="how often the right arrow is pressed")
    asked = asked.parse_args()
    if (chromium := find_chromium()) is None:
        sys.exit("chromium is missing (Debian and Ubuntu: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        base, port = Path(folder), free_port()
        env = stranger(base / "home") | {"TMPDIR": folder}
        command = [sys.executable, "-m", "course_lib.cli", "demo", asked.number, "--no-browser", "--port", str(port)]
        with running(command, ROOT, env, base / "log") as course, watching(chromium, base / "browser", 1400, 860) as watched:
            address = said(course, base / "log", r"(http://\S+)\s[\s\S]*Ctrl-C")[1]
            show = Show(watched.page)
            print(f"first picture after {show.open(address):.1f} s")
            for _ in range(asked.keys):
                show.press("ArrowRight")
            assert watched.foreign == [] and watched.errors == [] and show.message() == []
            shot = Image.open(io.BytesIO(watched.page.screenshot())).convert("RGB")
    png = small_png(shot, palettes=(256, 128, 64))
    assert len(png) <= LIMIT, f"{len(png)} bytes; expected at most {LIMIT}"
    asked.out.write_bytes(png)
    print(f"written: {asked.out.relative_to(ROOT) if asked.out.is_relative_to(ROOT) else asked.out}, {len(png) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
