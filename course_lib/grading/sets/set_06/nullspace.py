"""Item 06.4: the estimate of a denoiser, with its range part taken from the measurement."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import DENOISERS, ask, level, noised
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T
from course_lib.operators import BlockAverage, LinearOperator, Mask, Matrix
from course_lib.posterior import null_space


def _operator(case: Case) -> LinearOperator:
    """The case's operator: a matrix, a mask, or the means of 2 x 2 pixels."""
    if case["operator"] == "matrix":
        return Matrix(T(case["array"]))
    return Mask(T(case["array"])) if case["operator"] == "mask" else BlockAverage((1, 4, 4), 2)


@item(
    "06.4", title="The null space from the network", function="null_space_estimate", points=1, minutes=15, difficulty=1,
    answers=("course_lib.posterior.ddnm.null_space", "course_lib.operators.base.LinearOperator.project"),
    hints=(
        "Ask the network first: x0 = D(x, sigma). x itself is noisy, and A of it says nothing about y.",
        "It is 06.2 with x0 in the place of x: x0 + A^+ (y - A x0), with A(x0) and A.pinv(...).",
    ),
)  # fmt: skip
class NullSpace:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(operator: str, D: str, shape: tuple[int, ...], array: np.ndarray) -> Case:
            sigma = float(rng.uniform(0.6, 1.6))
            case = {"operator": operator, "D": D, "x": noised(rng, shape, sigma), "sigma": sigma, "array": array}
            y = _operator(case)(T(rng.normal(size=shape)))
            return case | {"y": y.numpy()}

        mask = rng.permuted(np.arange(16) < 7).reshape(1, 4, 4)
        return [
            case("matrix", "turned", (3, 6), rng.normal(size=(3, 6))),
            case("means", "turned", (3, 1, 4, 4), np.zeros(0)),
            case("mask", "peaks", (2, 1, 4, 4), mask),
        ]

    def drive(fn, case: Case) -> Outputs:
        x0_hat = call(fn, DENOISERS[case["D"]], _operator(case), T(case["y"]), T(case["x"]), level(case["sigma"]))
        return arrays(x0_hat=x0_hat)

    def reference(D, A: LinearOperator, y: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return null_space(D, A, y)(x, sigma)

    @mistake("it is the noisy x that is projected; project the estimate D(x, sigma): the null space comes from the network")
    def noisy_projected(D, A, y, x, sigma):
        return x + A.pinv(y - A(x))

    @mistake("x is projected *before* the network sees it: a part of its noise goes, and the result need not agree with y")
    def projected_before(D, A, y, x, sigma):
        return D(x + A.pinv(y - A(x)), sigma)

    @mistake("A^T stands in place of A^+: A of the result is not y, unless A A^T = I as for a mask")
    def adjoint_for_inverse(D, A, y, x, sigma):
        x0 = D(x, sigma)
        return x0 + A.adjoint(y - A(x0))

    @mistake("A^+ y is added and nothing is taken off: the range part counts twice; subtract A^+ A x0")
    def counted_twice(D, A, y, x, sigma):
        return D(x, sigma) + A.pinv(y)

    @mistake("this is A^+ y alone: the network has no part in it, and the null space stays empty")
    def least_norm(D, A, y, x, sigma):
        return A.pinv(y) + 0 * D(x, sigma)

    @mistake("the wrong part of x0 is kept, A^+ A x0: that is what y tells; keep the rest, x0 - A^+ A x0")
    def range_kept(D, A, y, x, sigma):
        return A.pinv(y + A(D(x, sigma)))

    @mistake("the sign of the residual is turned: y - A x0 is to be added")
    def sign_turned(D, A, y, x, sigma):
        x0 = D(x, sigma)
        return x0 - A.pinv(y - A(x0))

    @mistake("the residual is that of the noisy x, y - A x; it is the estimate's, y - A x0, that has to vanish")
    def residual_of_x(D, A, y, x, sigma):
        return D(x, sigma) + A.pinv(y - A(x))

    @mistake("the null-space part is taken from the noisy x and not from the estimate: A^+ y + x - A^+ A x0 mixes the two")
    def null_space_of_x(D, A, y, x, sigma):
        return x + A.pinv(y - A(D(x, sigma)))

    @mistake("every sample gets the measurement of the first one; each has its own")
    def first_measurement(D, A, y, x, sigma):
        x0 = D(x, sigma)
        return x0 + A.pinv(y[:1] - A(x0))

    @mistake("the network's estimate is returned as it is: y is not used")
    def not_used(D, A, y, x, sigma):
        return D(x, sigma)

    @law("A of the estimate must be y")
    def consistent(case: Case, out: Outputs) -> bool:
        return close(_operator(case)(T(out["x0_hat"])).numpy(), case["y"])

    @law("the estimate agrees with y; its null-space part must be that of D(x, sigma)")
    def null_space_kept(case: Case, out: Outputs) -> bool:
        A, x0 = _operator(case), ask(case, case["x"], case["sigma"])
        moved = T(out["x0_hat"] - x0)
        return close(moved.numpy(), A.pinv(A(moved)).numpy())
