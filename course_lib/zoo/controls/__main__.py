"""The parts of the comparison, and the command that measures them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from course_lib.zoo import controls, stored
from course_lib.zoo.controls.measure import ALL, LITTLE, SEEDS, SOME, begin, blank, end, measure, tune
from course_lib.zoo.controls.train import METHODS

BESIDE = ("ControlNet", "concatenation")
ZEROS = ("ControlNet", "no zero convolutions")
PARTS: stored.Parts = {
    "ends": (end, [{"of": "renders", "seed": 0}, *({"of": "mini-sd", "seed": seed} for seed in SEEDS)]),
    "rates": (tune, [{"method": method, "scenes": ALL} for method in METHODS]),
    "variants": (measure, [{"method": method, "scenes": ALL, "seed": seed} for seed in SEEDS for method in METHODS]),
    "rates for little data": (tune, [{"method": method, "scenes": LITTLE} for method in BESIDE]),
    "little data": (measure, [{"method": method, "scenes": LITTLE, "seed": seed} for seed in SEEDS for method in BESIDE]),
    "some data": (measure, [{"method": "ControlNet", "scenes": SOME, "seed": seed} for seed in SEEDS]),
    "start": (
        begin,
        [{"method": method, "step": step, "seed": seed} for seed in SEEDS for method in ZEROS for step in (0, 50)],
    ),
    "blank": (blank, [{"method": "concatenation", "scenes": n, "seed": seed} for seed in SEEDS for n in (LITTLE, ALL)]),
}


def main(parts: Sequence[str]) -> None:
    """Measure what is missing of the named parts, or of all; ValueError for a part that there is not."""
    stored.run(controls.STORED, controls.COMMAND, PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
