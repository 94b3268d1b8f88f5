"""Ways of telling `mini-sd` a map of edges, trained alike: ControlNet beside what it was compared with, and on little data.

`python -m course_lib.zoo.controls` (or `... tuning variants`) measures what `controls.json` has not yet, row by row, so that it
goes on where it was interrupted; `rows(part)` reads it.
"""

from __future__ import annotations

from pathlib import Path

from course_lib.zoo import stored
from course_lib.zoo.stored import Row

STORED = Path(__file__).parents[1] / "controls.json"
COMMAND = "python -m course_lib.zoo.controls"


def rows(part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)
