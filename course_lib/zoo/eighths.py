"""Weights in 8 bits each: a whole number from -127 to 127 and, for each row of a matrix or filter of a convolution, its unit.

w_ij ~ s_i q_ij,  s_i = max_j |w_ij| / 127: off by s_i / 2 at most. Half the size of half precision.
"""

from __future__ import annotations

from torch import Tensor

LARGEST = 127
UNIT = ".unit"
"""What follows the name of a weight in the name of its units."""


def packed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of two axes or more as int8 with units in half precision, all else in half precision."""
    kept: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.is_floating_point() and value.ndim >= 2:
            unit = (value.float().flatten(1).abs().amax(1) / LARGEST).half()
            along = unit.float().clamp(min=1e-12).view(-1, *[1] * (value.ndim - 1))  # a row of zeros has unit 0
            kept[name] = (value.float() / along).round().clamp(-LARGEST, LARGEST).char()
            kept[name + UNIT] = unit
        else:
            kept[name] = value.half() if value.is_floating_point() else value
    return kept


def unpacked(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `packed` kept, those in 8 bits in single precision; a state without units as it is."""
    state = {name: value for name, value in kept.items() if not (name.endswith(UNIT) and name.removesuffix(UNIT) in kept)}
    for name, value in state.items():
        if (unit := kept.get(name + UNIT)) is not None:
            state[name] = value.float() * unit.float().view(-1, *[1] * (value.ndim - 1))
    return state
