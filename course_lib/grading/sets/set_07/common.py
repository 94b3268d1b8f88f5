"""What several items of set 07 share: measurements by name, gradients, and what is said where a graph is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays
from course_lib.grading.sets.tools import T

Measure = Callable[[Tensor], Tensor]
NOT_FINITE = "there are values that are not finite; look for a division by 0, an exponential that is 0, or a logarithm of 0"


def measure(case: Case) -> Measure:
    """The case's A: rows times a matrix, the squares of that, or the means of 2 x 2 pixels."""
    if case["A"] == "means":
        return lambda x: F.avg_pool2d(x, 2)
    matrix = T(case["matrix"])
    return (lambda x: x @ matrix.T) if case["A"] == "matrix" else (lambda x: (x @ matrix.T) ** 2)


def differentiated(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of the sum of f at x, of the shape of x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x).sum(), x)[0]


@contextmanager
def as_in_the_loop() -> Iterator[None]:
    """Run under no_grad, as the course's loop does; say in words where a gradient is asked of a graph that is not there."""
    try:
        with torch.no_grad():
            yield
    except RuntimeError as error:
        if "does not require grad" in str(error):
            raise Unacceptable(
                "there is no graph to differentiate: the loop runs under torch.no_grad(). Inside `with torch.enable_grad():` "
                "let x require a gradient *before* D is asked, and detach nothing on the way to the result"
            ) from None
        if "have been used in the graph" in str(error):
            raise Unacceptable(
                "what you differentiate does not depend on the tensor by which you differentiate: something was detached, "
                "or D was asked about another tensor"
            ) from None
        raise


def flat_squares(r: Tensor) -> Tensor:
    """|r|^2 of each sample, (B,)."""
    return (r**2).flatten(1).sum(1)


def with_gaps(**values: object) -> Outputs:
    """Arrays with 0 where they are not finite, and a map of where they are: so that 0 / 0 can be a known mistake."""
    out = arrays(**values)
    finite = {f"{name}_finite": np.asarray(np.isfinite(one), dtype=float) for name, one in out.items()}
    return {name: np.where(np.isfinite(one), one, 0.0) for name, one in out.items()} | finite


def all_finite(out: Outputs) -> bool:
    """Whether `with_gaps` found no gap."""
    return all(bool(one.all()) for name, one in out.items() if name.endswith("_finite"))
