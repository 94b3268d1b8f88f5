"""Solvers of inverse problems beside each other: equal calls of one network, tuned alike on a validation split, three seeds.

`python -m course_lib.zoo.inverse` (or `... tuning solvers`) measures what `inverse.json` has not yet, run by run, so that it goes
on where it was interrupted; `rows(part)` reads it and `course bench inverse` prints it.
"""

from __future__ import annotations

from pathlib import Path

from course_lib.zoo import stored
from course_lib.zoo.stored import Row

STORED = Path(__file__).parents[1] / "inverse.json"
COMMAND = "python -m course_lib.zoo.inverse"


def rows(part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)
