"""The stage without a browser: the table of demos, the widget around the explorers, slow frames, errors, and the slides."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import socket
import time
from pathlib import Path

import ipywidgets as widgets
import matplotlib
import nbformat
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from course_lib import cli
from course_lib.grading import paths
from course_lib.stage import deck, demos, frames, server
from course_lib.stage.frames import HIDDEN, Frames
from course_lib.stage.show import SEEDS, Stage
from course_lib.study import explorer
from course_lib.study.explorer import Explorer

STATIC = Path(deck.__file__).parent / "static"


class Toy(Explorer):
    """A picture of one grey level; `cost` is what a frame takes, in seconds."""

    def __init__(self, cost=0.0, level=40):
        self.cost, self.drawn, self.styles = cost, [], []
        level = widgets.IntSlider(level, max=80, description="level")
        super().__init__({"note": widgets.Text(""), "level": level, "seed": widgets.BoundedIntText(0, max=2**31 - 1)})

    def draw(self, level, note, seed):
        if note == "bad":
            raise ValueError(f"note = {note!r}; expected a <good> one")
        time.sleep(self.cost)
        self.drawn.append(level)
        self.styles.append(dict(matplotlib.rcParams))
        out = io.BytesIO()
        Image.fromarray(np.full((4, 4), level, np.uint8)).save(out, "PNG")
        return out.getvalue()


def level_of(png):
    return int(np.asarray(Image.open(io.BytesIO(png))).max())


# --- the table and the widget -------------------------------------------------------------------------


@pytest.mark.parametrize("number", demos.DEMOS)
def test_a_row_has_the_lectures_title_and_explorers_that_build_and_move(number):
    lecture = paths.sources("lectures")[number].read_text()
    assert f"# # {number} {demos.DEMOS[number].title}\n" in lecture
    stage = Stage(demos.DEMOS[number].explorers)
    for name in demos.DEMOS[number].explorers:
        stage.choice.value = name
        panel = stage.built[name]
        assert stage.trouble.value == "" and "stage-main" in panel.main._dom_classes
        assert panel.view in panel.children and "stage-view" in panel.view._dom_classes
        assert [one for one, control in panel.controls.items() if getattr(control, "index", 0) is None] == [], "an empty menu"
        opened = panel.values
        panel.main.value += panel.main.step
        assert panel.redraws == 1 and panel.message.value == "" and panel.values != opened
        stage.put_back()
        assert panel.values == opened


def test_reset_and_surprise():
    stage = Stage({"toy": Toy, "other": Toy})
    toy = stage.built["toy"]
    assert list(stage.built) == ["toy"], "an explorer is built when it is first chosen"
    toy.controls["level"].value = 7
    for _ in range(20):
        before = toy.controls["seed"].value
        stage.surprise.click()
        assert toy.controls["seed"].value != before and toy.controls["seed"].value < SEEDS
    stage.reset.click()
    assert toy.values == {"note": "", "level": 40, "seed": 0} and level_of(toy.picture.value) == 40
    assert re.fullmatch(r'<span data-at="40">redraw \d+: \d+ ms</span>', stage.status.value)
    stage.choice.value = "other"
    stage.surprise.click()
    assert toy.controls["seed"].value == 0 and stage.built["other"].controls["seed"].value > 0


def test_an_explorer_that_cannot_be_built_says_so_and_the_others_stay():
    def broken():
        raise RuntimeError("no <data>")

    stage = Stage({"toy": Toy, "broken": broken})
    stage.choice.value = "broken"
    assert stage.trouble.value == "broken: RuntimeError: no &lt;data&gt;"
    stage.reset.click()
    stage.surprise.click()
    stage.choice.value = "toy"
    assert stage.trouble.value == "" and stage.built["toy"] in stage._place.children
    with pytest.raises(paths.CourseError, match="explorers is empty"):
        Stage({})


# --- bursts and slow frames ---------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [0.0, 0.25])
def test_ten_moves_in_a_second_are_two_computations_and_end_at_the_last(cost):
    toy = Toy(cost)

    async def drag():
        for level in range(1, 11):
            toy.controls["level"].value = level
            await asyncio.sleep(0.1)
        await asyncio.sleep(explorer.REST + 2 * cost + 0.2)

    asyncio.run(drag())
    assert toy.redraws <= 2 and toy.drawn[-1] == 10 and level_of(toy.picture.value) == 10


def test_a_burst_that_goes_on_is_drawn_each_second_and_single_moves_at_once(monkeypatch):
    monkeypatch.setattr(explorer, "LONGEST", 0.4)
    toy, seen = Toy(), []

    async def drag():
        for level in range(1, 31):
            toy.controls["level"].value = level
            await asyncio.sleep(0.05)
        seen.append(list(toy.drawn))
        await asyncio.sleep(2 * explorer.REST)
        toy.controls["level"].value = 50
        await asyncio.sleep(explorer.PAUSE + 0.1)

    asyncio.run(drag())
    (during,) = seen
    assert 3 <= len(during) - 1 <= 5  # 1.5 s: the first, and one each 0.4 s; the loop's own time only adds to the 1.5 s
    assert toy.drawn[-2:] == [30, 50]


async def until(holds):
    """Wait until this holds, on however busy a machine."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


@pytest.fixture
def slow(monkeypatch):
    """A toy whose frame takes over the limit, and what stands in; both are quick to test."""
    monkeypatch.setattr(frames, "LIMIT", 0.15)
    monkeypatch.setattr(frames, "COUNT", 5)
    toy = Toy()
    return toy, Frames(toy)


def test_while_frames_are_slow_the_nearest_stands_in_and_the_exact_one_follows(slow):
    toy, ahead = slow

    async def lesson():
        toy.cost = 0.2
        toy.controls["level"].value = 41
        await until(lambda: ahead.slow)
        assert HIDDEN in toy.view._dom_classes and HIDDEN not in ahead.still._dom_classes
        await until(lambda: set(toy.drawn) == {0, 20, 40, 41, 60, 80})
        assert "nearest of 5" in ahead.note.value and "more" not in ahead.note.value and level_of(ahead.still.value) == 41
        toy.controls["level"].value = 72
        await until(lambda: level_of(ahead.still.value) == 80)  # the nearest, before the exact one is computed
        await until(lambda: level_of(ahead.still.value) == 72)
        toy.cost = 0.0
        toy.controls["level"].value = 75
        await until(lambda: not ahead.slow)
        assert HIDDEN not in toy.view._dom_classes and level_of(toy.picture.value) == 75

    asyncio.run(lesson())
    assert toy.message.value == ""
    assert all(one == toy.styles[0] for one in toy.styles), "a frame is drawn in another style"


def test_another_control_makes_other_frames_and_errors_are_told(slow):
    toy, ahead = slow

    async def lesson():
        toy.cost = 0.2
        toy.controls["level"].value = 41
        await until(lambda: len(ahead._frames) == 6)
        toy.controls["note"].value = "other"
        await until(lambda: [dict(key)["note"] for key in ahead._frames] == ["other"] * 6)
        toy.controls["note"].value = "bad"
        await until(lambda: toy.message.value)

    asyncio.run(lesson())
    assert "expected a &lt;good&gt; one" in toy.message.value


# --- the server ---------------------------------------------------------------------------------------


def failed(arguments, monkeypatch, capsys):
    """The one line that a command says where it cannot be done."""
    monkeypatch.setattr("sys.argv", ["course", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("course: ") and error.count("\n") == 1
    return error


def test_what_cannot_be_served_is_said_in_one_line(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port = {port} is taken; choose another" in failed(["demo", "01", "--port", port], monkeypatch, capsys)
    assert "port = 70000 is none" in failed(["demo", "01", "--port", "70000"], monkeypatch, capsys)
    assert "did you mean '02_reverse_process'" in failed(["demo", "02_reverse"], monkeypatch, capsys)
    rows = {number: row for number, row in demos.DEMOS.items() if number != "01"}
    monkeypatch.setattr(demos, "DEMOS", rows)
    error = failed(["demo", "1"], monkeypatch, capsys)
    assert f"lecture 01 has no explorer on the stage; those that have one: {', '.join(rows)}" in error
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "the stage needs Voilà, which is not installed; `pip install" in failed(["demo", "02"], monkeypatch, capsys)


def test_without_a_number_the_demos_are_listed():
    result = CliRunner().invoke(cli.app, ["demo"])
    assert result.exit_code == 0 and all(number in result.output for number in demos.DEMOS)


def test_the_notebook_has_two_cells_that_import_the_explorer_and_not_the_lecture():
    notebook = server.notebook("02", "The reverse process")
    nbformat.validate(notebook)
    assert [cell.source for cell in notebook.cells] == ["from course_lib.stage.show import show", "show('02')"]
    assert (server.TEMPLATES / "kernels" / notebook.metadata.kernelspec.name / "kernel.json").exists()


def test_the_template_asks_nobody_else():
    for path in (server.TEMPLATES / "voila").rglob("*"):
        assert path.is_dir() or not re.search(r"//(?! )", path.read_text()), path  # an address, not a comment


# --- the slides ---------------------------------------------------------------------------------------


def book(*cells):
    """A notebook of (slide type, cell)."""
    for kind, cell in cells:
        cell.metadata["slideshow"] = {"slide_type": kind}
    return nbformat.v4.new_notebook(cells=[cell for _, cell in cells])


def test_slide_types_begin_join_and_leave_out():
    text, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [
        ("slide", text("# 01 One\n\nA line with $a<b$.\n\n## Two\nMore.")),
        ("-", code("x = 1")),
        ("skip", text("unseen")),
        ("notes", text("unseen")),
        ("subslide", text("1. a\n\n   b\n2. c\n\n- d\n- e")),
        ("fragment", text("late")),
    ]
    found = list(deck.blocks(book(*cells), "01", Path()))
    assert [one.begins for one in found] == [True, False, False, False, False, True, False, False, False]
    assert [one.heading for one in found] == [True, False, True, False, False, False, False, False, False]
    assert not any("unseen" in one.html for one in found) and 'class="fragment"' in found[-1].html
    assert "$a&lt;b$" in found[1].html and found[4].html.startswith('<div class="code">')


def test_long_code_is_cut_between_statements_and_loses_nothing():
    lines = [line for i in range(30) for line in (f"def f{i}(x):", f"    return x + {i}", *([""] if i % 3 == 0 else []))]
    pieces = [re.sub(r"<[^>]+>", "", one.html) for one in deck._code("\n".join(lines))]
    assert len(pieces) > 1 and all(piece.strip().count("\n") < deck.LINES and piece.startswith("def") for piece in pieces)
    assert [line for piece in pieces for line in piece.split("\n") if line] == [line for line in lines if line]


def test_outputs_are_shown_and_a_live_explorer_leaves_its_poster(tmp_path):
    png = Toy().picture.value
    data = {"image/png": base64.b64encode(png).decode(), "text/plain": "ScheduleExplorer(t=0.2)"}
    cell = nbformat.v4.new_code_cell("1", outputs=[
        nbformat.v4.new_output("stream", text="a < b\n"), nbformat.v4.new_output("display_data", data),
        nbformat.v4.new_output("error", ename="ValueError", evalue="no <x>"),
        nbformat.v4.new_output("execute_result", {"text/markdown": "```python\ny = 2\n```", "text/plain": "-"}),
    ])  # fmt: skip
    parts = [one.html for one in deck.blocks(book(("slide", cell)), "01", tmp_path)]
    assert "a &lt; b" in parts[1] and "data:image/png;base64," in parts[2] and "course demo 01" in parts[2]
    assert "ValueError: no &lt;x&gt;" in parts[3] and "highlight" in parts[4]


def test_a_deck_is_one_file_that_needs_no_other(tmp_path, monkeypatch):
    path = deck.write("01", tmp_path / "deck.html")
    page = path.read_text()
    assert path.stat().st_size < 6_000_000
    assert (STATIC / "reveal/reveal.js").read_text()[1000:2000] in page and deck.mathjax() in page
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # libraries, which the browser test watches
    assert not re.search(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=[\"'](?!data:)", page)
    assert not re.search(r"@import|url\((?![\"']?(?:data:|#))", page)
    with pytest.raises(paths.CourseError, match="is a folder; expected a file"):
        deck.write("01", tmp_path)
    monkeypatch.setattr(deck, "sources", lambda kind: {"01": tmp_path / "01_forward_process.py"})
    with pytest.raises(paths.CourseError, match="is not built; `course build 01` makes it"):
        deck.write("01")


def test_the_slides_say_what_to_install_where_mathjax_is_missing(monkeypatch):
    assert "MathJax" in deck.mathjax() and "</script" not in deck.mathjax()
    for missing in ("no-such-package", "nbformat"):  # nothing of that name; a package that has no such file
        monkeypatch.setattr(deck, "MATHJAX", missing)
        with pytest.raises(paths.CourseError, match=f"slides need MathJax: .* -c constraints.txt {missing}`"):
            deck.mathjax()


def test_what_is_shipped_is_small_and_has_its_licences():
    files = [path for path in STATIC.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000
    assert all((folder / "LICENSE").exists() for folder in STATIC.iterdir())
