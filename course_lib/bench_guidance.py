"""What the benchmark `guidance` times: the two evaluations of CFG merged into one call, and one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from course_lib.denoisers import batched
from course_lib.devices import SampleNoise, pick_device
from course_lib.worlds import digits

BATCHES = (1, 2, 3, 4)
PROMPT = "a small red cube on grass"
CALLS = 20
"""Evaluations of a run, as many as a short sampling has steps."""


def pairs() -> Iterator[tuple[str, Any, Any, torch.Tensor]]:
    """Of each embedded network and batch: its name, the conditional Denoiser, the reference, and one x at sigma = 1."""
    from course_lib import zoo

    device = pick_device()
    D, model = zoo.load("digits"), zoo.load("mini-sd")
    for n in BATCHES:
        label = torch.arange(n, device=device) % digits.CLASSES
        x = SampleNoise(0).start((n, *digits.SHAPE), 1.0, device=device)
        yield f"digits, batch {n}", D.given(label=label), D.given(label=torch.full_like(label, digits.CLASSES)), x
        cond, ref = (model.denoiser.given(**model.embed([prompt] * n)) for prompt in (PROMPT, ""))
        yield f"mini-sd, batch {n}", cond, ref, SampleNoise(0).start((n, *model.shape), 1.0, device=device)


def runs() -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """Of each pair: its name, CALLS evaluations of both in one call, and the same as two calls in turn."""
    sigma = torch.tensor(1.0, dtype=torch.float64)
    for name, cond, ref, x in pairs():
        both = batched(cond, ref)

        def together(both: Any = both, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                for _ in range(CALLS):
                    both(x, sigma)

        def apart(cond: Any = cond, ref: Any = ref, x: torch.Tensor = x) -> None:
            with torch.no_grad():
                for _ in range(CALLS):
                    cond(x, sigma), ref(x, sigma)

        yield name, together, apart
