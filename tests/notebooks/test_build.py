"""Built notebooks are what their sources make them: identical on a rebuild, outputs not stale, no solution leaked."""

import re

import nbformat
import pytest

from course_lib.grading import build, paths, source, verdicts
from course_lib.grading.items import items_of, set_names

NUMBERS = sorted(paths.sources("lectures") | paths.sources("solutions"))
EACH = pytest.mark.parametrize("number", NUMBERS, ids=[f"set_{number}" for number in NUMBERS])
SETS = pytest.mark.parametrize("number", set_names(), ids=[f"set_{number}" for number in set_names()])

TINY = '''# %% [markdown]
# # A tiny set

# %%
import torch
from course_lib.grading.check import check

# %% [markdown] item="01.1"
# One step.

# %% item="01.1"
def noising_step(x_prev, beta, eps):
    """One step."""
    ### BEGIN SOLUTION
    kept = (1 - beta).sqrt()
    return kept * x_prev + beta.sqrt() * eps
    ### END SOLUTION

# %% item="01.1"
# NBVAL_CHECK_OUTPUT
noising_step = check("01.1", noising_step)
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A course of one item, in a folder of its own."""
    for kind in paths.KINDS:
        (tmp_path / kind).mkdir()
    (tmp_path / "solutions" / "01_tiny.py").write_text(TINY)
    one = {"01.1": items_of("01")["01.1"]}
    monkeypatch.setattr(source, "items_of", lambda number: one)
    return tmp_path


@EACH
def test_committed_notebooks_are_current(number):
    assert build.problems(number) == []


@EACH
def test_a_rebuild_gives_identical_cells_and_metadata(number):
    first, second = (list(build.targets(number).values()) for _ in range(2))
    assert [build.skeleton(one) for one in first] == [build.skeleton(one) for one in second]


@EACH
def test_outputs_are_clean(number):
    for path in build.targets(number):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert "widgets" not in notebook.metadata and "jupytext" not in notebook.metadata
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error" and output.get("name") != "stderr"
                assert build.WIDGET not in output.get("data", {})
                assert not re.search(r"0x[0-9a-f]{6,}", str(output.get("data", {}).get("text/plain", "")))


@SETS
def test_no_solution_line_leaks(number):
    lines = source.solution_lines(paths.sources("solutions")[number])
    assert len(lines) > 10
    exercise = next(path for path in build.targets(number) if path.parent.name == "exercises")
    text = "\n".join(cell.source for cell in nbformat.read(exercise, as_version=4).cells)
    leaked = {line for line in lines if line in {row.strip() for row in text.splitlines()}}
    assert not leaked
    assert source.BEGIN not in text and "return ..." in text


@SETS
def test_verdicts_in_the_committed_notebooks(number):
    """The solved set prints 'correct' for every item, the blank set 'not attempted'."""
    for path in build.targets(number):
        if path.parent.name == "lectures":
            continue
        printed = "".join(
            output.get("text", "") for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])
        )
        wanted = verdicts.CORRECT if path.parent.name == "solutions" else verdicts.NOT_ATTEMPTED
        for item_id in items_of(number):
            assert f"{item_id} {wanted}" in printed


def test_build_writes_three_twins_and_reports_hand_edits(tiny):
    build.build("01", base=tiny, say=lambda _: None)
    solved, blank = tiny / "solutions" / "01_tiny.ipynb", tiny / "exercises" / "01_tiny.ipynb"
    assert "01.1 correct: 1 point" in solved.read_text()
    assert "01.1 not attempted" in blank.read_text() and "kept" not in blank.read_text()
    assert build.problems("01", base=tiny) == []

    notebook = nbformat.read(blank, as_version=4)
    notebook.cells[0].source = "# changed by hand"
    nbformat.write(notebook, blank)
    before = blank.read_bytes()
    with pytest.raises(paths.CourseError, match="edited by hand; put the change into solutions/01_tiny.py"):
        build.build("01", base=tiny, say=lambda _: None)
    assert blank.read_bytes() == before
    assert any("differs from its source" in one for one in build.problems("01", base=tiny))


def test_a_failing_cell_leaves_the_last_good_notebook(tiny):
    build.build("01", base=tiny, say=lambda _: None)
    path = tiny / "solutions" / "01_tiny.py"
    good = (tiny / "solutions" / "01_tiny.ipynb").read_bytes()
    path.write_text(TINY + "\n# %%\n1 / 0\n")
    assert any("differs" in one for one in build.problems("01", base=tiny))
    with pytest.raises(paths.CourseError, match="ZeroDivisionError"):
        build.build("01", base=tiny, say=lambda _: None)
    assert (tiny / "solutions" / "01_tiny.ipynb").read_bytes() == good


def test_stale_outputs_are_reported(tiny):
    build.build("01", base=tiny, say=lambda _: None)
    path = tiny / "solutions" / "01_tiny.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.outputs:
            cell.metadata["outputs_of"] = "0" * 16
    nbformat.write(notebook, path)
    assert any("outputs are stale" in one for one in build.problems("01", base=tiny))


def test_an_item_without_a_cell_is_an_error(tiny):
    (tiny / "solutions" / "01_tiny.py").write_text("# %% [markdown]\n# nothing\n")
    with pytest.raises(paths.CourseError, match=r"no cell carries item 01\.1"):
        build.targets("01", base=tiny)
    (tiny / "solutions" / "01_tiny.py").write_text('# %% item="01.9"\n1\n')
    with pytest.raises(paths.CourseError, match=r"item = '01\.9'; expected one of 01\.1"):
        build.targets("01", base=tiny)
