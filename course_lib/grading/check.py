"""What a student types in a notebook: `check("01.2", my_function)`, `hint("01.2")`, `solution("01.2")`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from course_lib.grading import paths, verdicts
from course_lib.grading.items import find
from course_lib.training import write_atomically

PROGRESS = ".progress.json"
_rungs: dict[str, int] = {}


def check(item_id: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Judge `fn`, print the verdict, and return the function to use from here on.

    That is `fn` where it is right, and the library's answer until then, so that Run All passes on a
    blank set. Raises ValueError for an unknown item or something that is not a function.
    """
    item = find(item_id)
    if not callable(fn):
        raise ValueError(f"fn is {type(fn).__name__}; expected the function {item.function}, without parentheses")
    if fn is item.reference:  # a check cell run twice: the name now holds what the first check returned
        print(f"{item_id} this is the library's {item.function}; run the cell that defines yours, then check again")
        return fn
    result = verdicts.judge(item_id, fn)
    _remember(item_id, result)
    if result.correct:
        print(f"{item_id} correct: {item.points} point{'s' if item.points > 1 else ''}")
        return fn
    if result.status == verdicts.NOT_ATTEMPTED:
        print(f"{item_id} not attempted; the cells below use the library's {item.function} until your own is right")
    else:
        print(f"{item_id} {result.status}: {result.message}")
        print(f'      Stuck? hint("{item_id}"). Until yours is right, the cells below use the library\'s {item.function}.')
    return item.reference


def hint(item_id: str) -> None:
    """Print the next hint of an item; each call climbs one rung of its ladder."""
    item = find(item_id)
    rung = min(_rungs.get(item_id, 0), len(item.hints) - 1)
    _rungs[item_id] = rung + 1
    print(f"{item_id} hint {rung + 1} of {len(item.hints)}: {item.hints[rung]}")
    if rung + 1 == len(item.hints):
        print(f'      That was the last one. solution("{item_id}") shows the answer.')


def solution(item_id: str) -> None:
    """Print the solution of an item, from the set's source."""
    from course_lib.grading import source  # jupytext is slow to import, and few ask

    item = find(item_id)
    print(source.solution_of(paths.sources("solutions")[item.set], item_id))


# --- progress in my_course/ --------------------------------------------------------------------------


def read_progress(folder: Path) -> dict[str, dict[str, Any]]:
    """What `check` recorded in a student's folder: {item id: {status, tries, solved}}; empty where there is nothing yet."""
    path = folder / PROGRESS
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise paths.CourseError(f"{path} is not readable ({error}); delete it and run your checks again") from None


def _remember(item_id: str, result: verdicts.Result) -> None:
    """Record a verdict where the notebook runs in a student's own folder, which has a progress file."""
    folder = Path.cwd()
    if not (folder / PROGRESS).exists() or result.status == verdicts.NOT_ATTEMPTED:
        return
    progress = read_progress(folder)
    entry = progress.setdefault(item_id, {"tries": 0, "solved": None})
    entry["tries"] += 1
    entry["status"] = result.status
    if result.correct and entry["solved"] is None:
        entry["solved"] = datetime.date.today().isoformat()
    write_atomically(folder / PROGRESS, lambda path: path.write_text(json.dumps(progress, indent=2)))
