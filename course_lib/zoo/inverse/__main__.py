"""The parts of the comparison, and the command that measures them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from course_lib.zoo import inverse, stored
from course_lib.zoo.inverse.measure import SEEDS, SETTINGS, keys, measure, memory, published_snips, takes, tune
from course_lib.zoo.inverse.problems import PROBLEMS

PARTS: stored.Parts = {
    "tuning": (tune, keys()),
    "solvers": (measure, [{**key, "seed": seed} for seed in SEEDS for key in keys()]),
    "published SNIPS": (
        published_snips,
        [{"problem": problem, "seed": seed} for seed in SEEDS for problem in ("super-resolution", "deblurring")],
    ),
    "memory": (memory, [{"solver": solver} for solver in SETTINGS if takes(solver, PROBLEMS["scenes", "box"]())]),
}


def main(parts: Sequence[str]) -> None:
    """Measure what is missing of the named parts, or of all; ValueError for a part that there is not."""
    stored.run(inverse.STORED, inverse.COMMAND, PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
