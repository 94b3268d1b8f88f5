"""A student's own folder, `my_course/`: copies of the exercise sets, never overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat

from course_lib.grading.check import PROGRESS, read_progress
from course_lib.grading.items import items_of, set_names
from course_lib.grading.paths import CourseError
from course_lib.training import write_atomically

FOLDER = "my_course"


def _content(path: Path) -> str:
    try:
        return nbformat.read(path, as_version=4).metadata.get("course", {}).get("content", "")
    except Exception as error:
        raise CourseError(f"{path} is not a notebook that can be read ({type(error).__name__}); move it away") from None


def prepare(base: Path) -> list[Path]:
    """Copy each exercise set into my_course/ where it is not there yet; returns the new files."""
    folder = base / FOLDER
    folder.mkdir(exist_ok=True)
    if not (folder / PROGRESS).exists():
        write_atomically(folder / PROGRESS, lambda path: path.write_text("{}"))
    new = []
    for path in sorted((base / "exercises").glob("*.ipynb")):
        target = folder / path.name
        if not target.exists():
            write_atomically(target, lambda temporary, path=path: shutil.copyfile(path, temporary))
            new.append(target)
    return new


def update(base: Path) -> list[Path]:
    """Put a changed exercise set beside the student's copy, as NAME.new.ipynb; returns the files written."""
    written = prepare(base)
    for path in sorted((base / "exercises").glob("*.ipynb")):
        mine = base / FOLDER / path.name
        if mine not in written and _content(mine) != _content(path):
            beside = mine.with_name(f"{mine.stem}.new.ipynb")
            write_atomically(beside, lambda temporary, path=path: shutil.copyfile(path, temporary))
            written.append(beside)
    return written


def progress(base: Path) -> list[dict]:
    """A row per item: id, title, points, status ('open', 'correct', or the last verdict), tries, solved (a date)."""
    recorded = read_progress(base / FOLDER)
    rows = []
    for number in set_names():
        for item in items_of(number).values():
            entry = recorded.get(item.id, {})
            status = "correct" if entry.get("solved") else entry.get("status", "open")
            rows.append({"item": item.id, "title": item.title, "points": item.points, "status": status,
                         "tries": entry.get("tries", 0), "solved": entry.get("solved") or ""})  # fmt: skip
    return rows
