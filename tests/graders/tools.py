"""Making submissions: notebooks as a student would hand them in; and right answers that are written in another way."""

import inspect
import re
import textwrap
from pathlib import Path
from types import CodeType

import nbformat

from course_lib.grading import source, verdicts
from course_lib.grading.items import Item, items_of, set_names
from course_lib.grading.paths import sources

ITEMS = [(number, item_id) for number in set_names() for item_id in items_of(number)]
IDS = [f"set_{number}-{item_id}" for number, item_id in ITEMS]


def built(number: str, kind: str) -> nbformat.NotebookNode:
    """The 'solved' or 'blank' notebook of a set, fresh from its source."""
    read = source.read(sources("solutions")[number])
    return source.answer_sheet(read) if kind == "solved" else source.exercise(read)


def answer_cell(notebook: nbformat.NotebookNode, item_id: str) -> nbformat.NotebookNode:
    """The cell in which an item is answered."""
    return next(cell for cell in notebook.cells if cell.id == f"item-{item_id.replace('.', '-')}-answer")


def mistaken(item: Item, name: str) -> str:
    """The source of a known mistake, as a student would have written it: under the item's own name."""
    known = next(one for one in item.mistakes if one.name == name)
    code = textwrap.dedent(inspect.getsource(known.fn))
    code = code[re.search(r"^def ", code, re.M).start() :]
    helpers = sorted(_names(known.fn.__code__) & known.fn.__globals__.keys())
    imports = f"from {known.fn.__module__} import {', '.join(helpers)}\n" if helpers else ""
    return imports + code.replace(f"def {name}(", f"def {item.function}(", 1)


def _names(code: CodeType) -> set[str]:
    """Every name that a function reads from its module, in its nested functions too."""
    nested = (one for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*map(_names, nested))


def save(notebook: nbformat.NotebookNode, folder: Path, name: str = "01_forward_process.ipynb") -> Path:
    """Write a submission."""
    path = folder / name
    path.write_text(nbformat.writes(notebook))
    return path


def assert_right(item_id: str, *answers) -> None:
    """Each of these functions is a right answer to the item, on the inputs of two seeds."""
    for fn in answers:
        for seed in (0, 1):
            result = verdicts.judge(item_id, fn, seed)
            assert result.correct, (item_id, fn.__name__, result.message)
