"""Reading a submission as data: which code answers which item, without running anything.

Cells are found by id, then by the name of the function that they define. For one item only the student's
function and the statements that it needs are taken (imports, functions, classes, assignments): a loop or
a crash elsewhere in the notebook cannot touch it.
"""

from __future__ import annotations

import ast
import symtable
from dataclasses import dataclass
from pathlib import Path

import nbformat

from course_lib.grading.items import Item, items_of
from course_lib.grading.source import function_in

MAX_BYTES = 20_000_000


class Unreadable(ValueError):
    """The file is no notebook that can be graded; the message says why."""


@dataclass(frozen=True)
class Answer:
    """Code that defines the item's function when run, or, where `missing` is not empty, why there is none."""

    code: str
    missing: str = ""


def read(path: Path) -> nbformat.NotebookNode:
    """Read a notebook file; Unreadable where it is too large, no UTF-8, or no notebook."""
    path = Path(path)
    if not path.is_file():
        raise Unreadable(f"{path} is not a file")
    if path.stat().st_size > MAX_BYTES:
        raise Unreadable(f"{path.name} has {path.stat().st_size / 1e6:.0f} MB; expected at most {MAX_BYTES / 1e6:.0f} MB")
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        cells = notebook.cells
    except UnicodeDecodeError:
        raise Unreadable(f"{path.name} is not UTF-8 text") from None
    except Exception as error:  # nbformat raises many types on a malformed file
        raise Unreadable(f"{path.name} is not a notebook ({type(error).__name__})") from None
    if not isinstance(cells, list) or not all(isinstance(cell.get("source", ""), str) for cell in cells):
        raise Unreadable(f"{path.name} has cells that are not text")
    return notebook


def guess_set(path: Path, notebook: nbformat.NotebookNode) -> str:
    """The number of the set that a submission answers, from its cell ids or its name; Unreadable where neither tells."""
    from course_lib.grading.items import set_names

    for cell in notebook.cells:
        parts = str(cell.get("id", "")).split("-")
        if parts[0] == "item" and len(parts) > 2 and parts[1] in set_names():
            return parts[1]
    if path.name[:2] in set_names():
        return path.name[:2]
    raise Unreadable(f"{path.name} names no exercise set; expected a name that starts with {' or '.join(set_names())}")


def answers(notebook: nbformat.NotebookNode, number: str) -> dict[str, Answer]:
    """For each item of the set the code that answers it."""
    items = items_of(number)
    cells = [cell.get("source", "") for cell in notebook.cells if cell.get("cell_type") == "code"]
    ids = [cell.get("id") for cell in notebook.cells if cell.get("cell_type") == "code"]
    return {one.id: _answer(one, cells, ids) for one in items.values()}


def _answer(item: Item, cells: list[str], ids: list[str | None]) -> Answer:
    wanted = f"item-{item.id.replace('.', '-')}-answer"
    candidates = [k for k, cell_id in enumerate(ids) if cell_id == wanted]
    candidates += [k for k, code in enumerate(cells) if function_in(code) == item.function]
    for k in candidates:
        try:
            ast.parse(cells[k])
        except SyntaxError as error:
            return Answer("", f"the cell of {item.id} does not parse: {error.msg} in line {error.lineno}")
        own = _statements(cells[k])
        if any(item.function in _defines(node) for node in own):
            others = [node for j, code in enumerate(cells) if j != k for node in _statements(code)]
            return Answer(ast.unparse(ast.Module(_needed(own, others) + own, [])))
    return Answer("", f"no cell defines the function {item.function}")


def _statements(code: str) -> list[ast.stmt]:
    """The top-level imports, definitions and assignments of a cell; nothing of a cell that does not parse."""
    try:
        body = ast.parse(code).body
    except SyntaxError:
        return []
    return [node for node in body if _defines(node) is not None]


def _defines(node: ast.stmt) -> set[str] | None:
    """The names that a top-level statement binds, or None for a statement that is not carried along."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        if _is_check(node.value):
            return None  # f = check("01.2", f) is a test cell of ours
        return {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)}
    return None


def _is_check(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "check"


def _needed(own: list[ast.stmt], others: list[ast.stmt]) -> list[ast.stmt]:
    """Those of `others` that define a name which `own` reads from the notebook, transitively, in the notebook's order."""
    wanted, kept = set().union(*map(_reads, own)), set()
    while found := {k for k, node in enumerate(others) if k not in kept and _defines(node) & wanted}:
        kept |= found
        wanted |= set().union(*(_reads(others[k]) for k in found))
    return [node for k, node in enumerate(others) if k in kept]


def _reads(node: ast.stmt) -> set[str]:
    """The global names that a statement reads, in its nested functions too; parameters and local variables do not count."""

    def walk(table: symtable.SymbolTable) -> set[str]:
        top = table.get_type() == "module"
        names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
        return names.union(*map(walk, table.get_children()))

    return walk(symtable.symtable(ast.unparse(node), "<cell>", "exec"))
