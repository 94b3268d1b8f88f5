"""`course build`: the only writer of notebooks.

lectures/NN.py    -> lectures/NN.ipynb, executed
solutions/NN.py   -> solutions/NN.ipynb, executed, and exercises/NN.ipynb, executed blank

A rebuild gives identical cells and metadata; an interruption leaves the last good file.
"""

from __future__ import annotations

import base64
import copy
import re
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_lib.grading import pictures, source
from course_lib.grading.paths import CourseError, one_thread_env, root, sources
from course_lib.training import write_atomically

LIMIT = 500_000  # bytes a notebook
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
WIDGET = "application/vnd.jupyter.widget-view+json"
Say = Callable[[str], None]


def targets(number: str, base: Path | None = None) -> dict[Path, NotebookNode]:
    """The notebooks of one number, without outputs: path -> notebook."""
    base = base or root()
    result: dict[Path, NotebookNode] = {}
    lecture = sources("lectures", base).get(number)
    if lecture is not None:
        result[lecture.with_suffix(".ipynb")] = source.read(lecture)
    answers = sources("solutions", base).get(number)
    if answers is not None:
        read = source.read(answers)
        result[answers.with_suffix(".ipynb")] = source.answer_sheet(read)
        result[base / "exercises" / f"{answers.stem}.ipynb"] = source.exercise(read)
    for notebook in result.values():
        notebook.metadata["course"] = {"content": source.content_hash(notebook)}
        hashes = source.source_hashes(notebook)
        for cell, tag in zip(notebook.cells, hashes, strict=True):
            if cell.cell_type == "code":
                cell.metadata["source_hash"] = tag
    return result


def build(number: str, base: Path | None = None, force: bool = False, say: Say = print) -> None:
    """Write and execute the notebooks of one number; CourseError where one was edited by hand or a cell fails."""
    for path, notebook in targets(number, base).items():
        refuse_edited(path, force)
        start = time.perf_counter()
        execute(notebook, path.parent, path.name)
        data = nbformat.writes(notebook) + "\n"
        if len(data.encode()) > LIMIT:
            raise CourseError(
                f"{path.name} would be {len(data.encode()) / 1e6:.2f} MB; expected at most 0.5 MB: make its pictures smaller"
            )
        write_atomically(path, lambda temporary, data=data: temporary.write_text(data))
        say(f"{path.parent.name}/{path.name}: {time.perf_counter() - start:.0f} s, {len(data) / 1000:.0f} kB")


def refuse_edited(path: Path, force: bool = False) -> None:
    """Raise CourseError where a built notebook's cells are not those that were built."""
    if force or not path.exists():
        return
    try:
        existing = nbformat.read(path, as_version=4)
    except Exception as error:
        raise CourseError(f"{path} cannot be read ({type(error).__name__}); delete it, or build with --force") from None
    if existing.metadata.get("course", {}).get("content") != source.content_hash(existing):
        twin = "solutions" if path.parent.name == "exercises" else path.parent.name
        raise CourseError(
            f"{path.parent.name}/{path.name} was edited by hand; put the change into {twin}/{path.stem}.py, "
            "then `course build --force` (students work in copies: `course lab`)"
        )


def problems(number: str, base: Path | None = None) -> list[str]:
    """What `course build --check` reports: notebooks that are missing, edited, not rebuilt, or whose outputs are stale."""
    found = []
    for path, fresh in targets(number, base).items():
        label = f"{path.parent.name}/{path.name}"
        if not path.exists():
            found.append(f"{label} is missing; run `course build {number}`")
            continue
        built = nbformat.read(path, as_version=4)
        for cell in built.cells:
            if cell.cell_type == "code" and cell.outputs and cell.metadata.get("outputs_of") != cell.metadata.get("source_hash"):
                found.append(f"{label}, {cell.id}: outputs are stale; run `course build {number}`")
        if skeleton(built) != skeleton(fresh):
            found.append(f"{label} differs from its source; run `course build {number}`")
    return found


def skeleton(notebook: NotebookNode) -> tuple:
    """What a rebuild must reproduce: cells and metadata, without outputs, counts and their tags."""
    cells = [
        (cell.id, cell.cell_type, cell.source, {k: v for k, v in cell.metadata.items() if k != "outputs_of"})
        for cell in notebook.cells
    ]
    return cells, dict(notebook.metadata), notebook.nbformat, notebook.nbformat_minor


def execute(notebook: NotebookNode, folder: Path, name: str) -> None:
    """Run a notebook in a fresh kernel on one thread, in place; CourseError names the cell that fails."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    metadata = copy.deepcopy(notebook.metadata)  # the kernel adds its version and the state of widgets
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}},
                            record_timing=False, store_widget_state=False)  # fmt: skip
    try:
        client.execute(env=one_thread_env())
    except CellExecutionError as error:
        lines = str(error).strip().splitlines()
        raise CourseError(f"{name} failed: {lines[-1]}\n" + "\n".join(lines[-30:])) from None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _merge([kept for output in cell.outputs if (kept := _strip(output)) is not None])
            cell.metadata["outputs_of"] = cell.metadata["source_hash"]
    notebook.metadata = metadata


def _merge(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring pieces of printed text, whose cuts depend on timing."""
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def _strip(output: NotebookNode) -> NotebookNode | None:
    """Drop stderr, progress bars, LaTeX twins and widget views (a poster stays); shrink pictures, blank out memory addresses."""
    if output.output_type == "stream":
        return None if output.name == "stderr" else output
    data = output.get("data", {})
    if WIDGET in data:
        del data[WIDGET]
        if "image/png" not in data:
            return None
        data["text/plain"] = "Explorer: run this cell to use it"
    if "text/plain" in data:
        data["text/plain"] = _ADDRESS.sub("", data["text/plain"])
    data.pop("text/latex", None)
    if "image/png" in data:
        data["image/png"] = base64.b64encode(pictures.smaller(base64.b64decode(data["image/png"]))).decode()
    output.get("metadata", {}).pop(WIDGET, None)
    return output
