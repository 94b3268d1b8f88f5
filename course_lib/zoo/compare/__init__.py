"""Small diffusion models that are trained to be compared: on the latents of `mini-sd`, with the same batches.

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
    file = stored.read(STORED, f"{COMMAND} {part}")
    if not file.get(part):
        there = ", ".join(name for name in file if name != "hardware")
        raise ValueError(f"{part!r} is not in {STORED.name}, which has {there}; run `{COMMAND} {part}`")
    return file[part]
