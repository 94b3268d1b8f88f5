"""The parts of the comparison, and the command that measures them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from course_lib.zoo import compare, stored
from course_lib.zoo.compare import cascades, latents
from course_lib.zoo.compare.latents import NETWORKS, RATES, SEEDS
from course_lib.zoo.stored import Row

PARTS: dict[str, tuple[Callable[..., Row], list[dict[str, Any]]]] = {
    "tuning": (latents.tune, [{"network": network, "lr": lr} for network in NETWORKS for lr in RATES]),
    "networks": (latents.measure_network, [{"network": network, "seed": seed} for seed in SEEDS for network in NETWORKS]),
    "experts": (latents.measure_experts, [{"seed": seed} for seed in SEEDS]),
    "scales": (latents.measure_scale, [{"scale": scale, "seed": seed} for seed in SEEDS for scale in (1.0, 5.0, 0.2)]),
    "cascade": (cascades.measure_cascade, [{"augmented": on, "seed": seed} for seed in SEEDS for on in (True, False)]),
    "sizes": (cascades.measure_sizes, [{"told": told, "seed": seed} for seed in SEEDS for told in (True, False)]),
}
"""Part -> what measures one row, and what identifies each row."""


def main(parts: Sequence[str]) -> None:
    """Measure what is missing of the named parts, or of all; ValueError for a part that there is not."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"{unknown[0]!r}; expected some of {', '.join(PARTS)}")
    for part in parts or PARTS:
        measure, keys = PARTS[part]
        for key in keys:
            file = stored.read(compare.STORED, compare.COMMAND) if compare.STORED.exists() else {}
            done = file.setdefault(part, [])
            if not any(key.items() <= row.items() for row in done):
                done.append(measure(**key))
                print(part, done[-1], flush=True)
                stored.keep(compare.STORED, file)


if __name__ == "__main__":
    main(sys.argv[1:])
