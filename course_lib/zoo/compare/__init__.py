"""Small models that are trained to be compared: diffusion on the latents of `mini-sd`, and autoencoders of digits.

`python -m course_lib.zoo.compare` (or `... networks experts`) trains and measures what `latents.json` has not yet, run by run, so
that it goes on where it was interrupted; `rows(part)` reads it. The models are too small to draw well.
"""

from __future__ import annotations

from pathlib import Path

from course_lib.zoo import stored
from course_lib.zoo.stored import Row

STORED = Path(__file__).parents[1] / "latents.json"
COMMAND = "python -m course_lib.zoo.compare"


def rows(part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    return stored.rows(STORED, COMMAND, part)
