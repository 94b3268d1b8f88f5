"""The parts of the comparison, and the command that measures them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from course_lib.zoo import compare, stored
from course_lib.zoo.compare import autoencoders, cascades, latents
from course_lib.zoo.compare.latents import NETWORKS, RATES, SEEDS

PARTS: stored.Parts = {
    "kl": (autoencoders.measure_kl, [{"weight": weight, "seed": seed} for seed in SEEDS for weight in autoencoders.WEIGHTS]),
    "tuning": (latents.tune, [{"network": network, "lr": lr} for network in NETWORKS for lr in RATES]),
    "networks": (latents.measure_network, [{"network": network, "seed": seed} for seed in SEEDS for network in NETWORKS]),
    "starts": (latents.measure_start, [{"zero": zero, "seed": seed} for seed in SEEDS for zero in (True, False)]),
    "experts": (latents.measure_experts, [{"seed": seed} for seed in SEEDS]),
    "scales": (latents.measure_scale, [{"scale": scale, "seed": seed} for seed in SEEDS for scale in (1.0, 5.0, 0.2)]),
    "cascade": (
        cascades.measure_cascade,
        [{"augmented": on, "seed": seed, "first": n} for seed in SEEDS for on in (True, False) for n in cascades.FIRST],
    ),
    "sizes": (cascades.measure_sizes, [{"told": told, "seed": seed} for seed in SEEDS for told in (True, False)]),
}


def main(parts: Sequence[str]) -> None:
    """Measure what is missing of the named parts, or of all; ValueError for a part that there is not."""
    stored.run(compare.STORED, compare.COMMAND, PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
