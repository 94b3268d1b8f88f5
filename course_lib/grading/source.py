"""The source of a notebook: a jupytext py:percent file, and what `course build` makes of it.

An exercise set has one source, solutions/NN_name.py. A cell that belongs to an item carries
`item="NN.k"`; the answer stands between `### BEGIN SOLUTION` and `### END SOLUTION` in the item's
function, and becomes `return ...` in the exercise.
"""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from course_lib.grading.items import Item, items_of
from course_lib.grading.paths import CourseError

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
_REGION = re.compile(rf"^([ \t]*){re.escape(BEGIN)}\n(.*?)^[ \t]*{re.escape(END)}[ \t]*\n?", re.M | re.S)
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def read(path: Path) -> NotebookNode:
    """Read a source as a notebook without outputs: stable cell ids, item headers filled in, nothing of jupytext left."""
    raw = jupytext.read(path, fmt="py:percent")
    number = path.stem.partition("_")[0]
    items = items_of(number) if path.parent.name == "solutions" else {}
    cells, seen = [], {}
    for position, cell in enumerate(raw.cells):
        item_id = cell.metadata.get("item")
        if item_id is not None and item_id not in items:
            raise CourseError(f"{path.name}, cell {position + 1}: item = {item_id!r}; expected one of {', '.join(items)}")
        cells.append(_clean(cell, position, item_id, items, seen))
    missing = [one for one in items if one not in seen]
    if missing:
        raise CourseError(f"{path.name}: no cell carries item {', '.join(missing)}, which the set defines")
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells})


def _clean(cell: NotebookNode, position: int, item_id: str | None, items: dict[str, Item], seen: dict[str, int]) -> NotebookNode:
    text, metadata = cell.source, {}
    if item_id is None:
        cell_id = f"cell-{position:03d}"
    else:
        role = "text" if cell.cell_type == "markdown" else ("check" if f'check("{item_id}"' in text else "answer")
        count = seen[item_id] = seen.get(item_id, 0) + 1
        cell_id = f"item-{item_id.replace('.', '-')}-{role}" + (f"-{count}" if role == "text" and count > 1 else "")
        metadata = {"item": item_id}
        if role == "text" and count == 1:
            text = header(items[item_id]) + "\n\n" + text
    for name in ("tags", "slideshow"):
        if cell.metadata.get(name):
            metadata[name] = cell.metadata[name]
    if cell.cell_type == "markdown":
        return nbformat.from_dict({"cell_type": "markdown", "id": cell_id, "metadata": metadata, "source": text})
    return nbformat.from_dict(
        {"cell_type": "code", "id": cell_id, "metadata": metadata, "source": text, "outputs": [], "execution_count": None}
    )


def header(item: Item) -> str:
    """The line above an item: id, title, points, minutes, difficulty."""
    points = f"{item.points} point{'s' if item.points > 1 else ''}"
    return f"### {item.id} {item.title}\n\n*{points} · about {item.minutes} minutes · difficulty {item.difficulty} of 3*"


def blank(code: str) -> str:
    """Replace each solution by a stub that returns `...`; CourseError where the marks do not pair."""
    if code.count(BEGIN) != code.count(END) or code.count(BEGIN) != len(_REGION.findall(code)):
        raise CourseError(f"{BEGIN} and {END} do not pair in the cell that starts {code.splitlines()[0]!r}")
    return _REGION.sub(lambda match: f"{match[1]}return ...\n", code).rstrip("\n")


def solved(code: str) -> str:
    """Drop the marks and keep the solution."""
    return "\n".join(line for line in code.splitlines() if line.strip() not in (BEGIN, END))


def exercise(notebook: NotebookNode) -> NotebookNode:
    """The unsolved twin of a solution notebook."""
    return _with_code(notebook, blank)


def answer_sheet(notebook: NotebookNode) -> NotebookNode:
    """The solution notebook without the marks."""
    return _with_code(notebook, solved)


def _with_code(notebook: NotebookNode, change) -> NotebookNode:
    twin = nbformat.from_dict(notebook)
    twin.cells = [nbformat.from_dict(dict(cell)) for cell in notebook.cells]
    for cell in twin.cells:
        if cell.cell_type == "code":
            cell.source = change(cell.source)
    return twin


def solution_of(path: Path, item_id: str) -> str:
    """The source of the item's answer cell, solved; CourseError where the set has no such cell."""
    for cell in read(path).cells:
        if cell.cell_type == "code" and cell.metadata.get("item") == item_id and cell.id.endswith("answer"):
            return solved(cell.source)
    raise CourseError(f"{path.name} has no answer cell of item {item_id}")


def solution_lines(path: Path) -> set[str]:
    """Every line that stands in a solution and nowhere else in the source: what an exercise must not contain."""
    text = path.read_text()
    inside = {line.strip() for match in _REGION.finditer(text) for line in match[2].splitlines()}
    outside = {line.strip() for line in _REGION.sub("", text).splitlines()}
    return {line for line in inside - outside if line}


def function_in(code: str) -> str | None:
    """The name of the first function that a cell defines, or None (also where the cell does not parse)."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    return next((node.name for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def content_hash(notebook: NotebookNode) -> str:
    """Hash of what `course build` wrote: ids, types and sources of the cells."""
    parts = [f"{cell.id}\n{cell.cell_type}\n{cell.source}" for cell in notebook.cells]
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()[:16]


def source_hashes(notebook: NotebookNode) -> list[str]:
    """For each cell the hash of all code up to and including it: an output is stale when its cell's tag differs."""
    running, hashes = hashlib.sha256(), []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            running.update(cell.source.encode() + b"\0")
        hashes.append(running.hexdigest()[:16])
    return hashes
