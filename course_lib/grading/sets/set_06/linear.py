"""Items 06.1 and 06.2: the adjoint of a blur and block average, and the projection onto a measurement."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T
from course_lib.operators import BlockAverage, Blur, Matrix


def _filtered(x: Tensor, kernel: Tensor, way: int = 1) -> Tensor:
    """The sum of k_uv times x moved by (u, v) from the middle, around the edges; way = -1 moves the other way."""
    rows, columns = kernel.shape
    return sum(
        kernel[u, v] * x.roll((way * (u - rows // 2), way * (v - columns // 2)), (-2, -1))
        for u in range(rows)
        for v in range(columns)
    )


def _repeated(y: Tensor, factor: int) -> Tensor:
    """Each number of y in all pixels of its block."""
    return y.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _into_the_corner(y: Tensor, factor: int) -> Tensor:
    """Each number of y in the first pixel of its block, and 0 in the others."""
    corner = torch.zeros(factor, factor, dtype=y.dtype)
    corner[0, 0] = 1
    return torch.kron(y, corner)


@item(
    "06.1", title="The adjoint of a measurement", function="adjoint", points=2, minutes=25, difficulty=2,
    answers=("course_lib.operators.means.Means.adjoint", "course_lib.operators.means.Means.pinv",
             "course_lib.operators.blur.Blur.adjoint", "course_lib.operators.base.LinearOperator.adjoint"),
    hints=(
        "A is two maps, first the blur and then the averages: A = M K. The adjoint of a product has the factors in the other order, A^T = K^T M^T.",
        "A mean weighs each of its factor² pixels with 1 / factor²: M^T gives each of them y / factor². Repeat with repeat_interleave along both axes.",
        "K is a sum of k_uv times a shift. The transpose of a shift is the shift *back*: x.roll((-(u - kh // 2), -(v - kw // 2)), (-2, -1)).",
    ),
)  # fmt: skip
class Adjoint:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(y: tuple[int, ...], kernel: tuple[int, int], factor: int) -> Case:
            k = rng.uniform(0, 1, kernel)
            k[kernel[0] // 2, kernel[1] // 2] += (
                0.6 * k.sum()
            )  # the middle outweighs the rest, so that a division by K(f) is finite
            probe = rng.normal(size=(*y[:-2], y[-2] * factor, y[-1] * factor))
            return {"y": 0.5 + rng.normal(size=y), "kernel": k / k.sum(), "factor": factor, "probe": probe}

        return [case((2, 1, 3, 4), (3, 3), 2), case((1, 2, 2, 3), (3, 5), 3), case((2, 1, 6, 5), (5, 3), 1)]

    def drive(fn, case: Case) -> Outputs:
        return arrays(x=call(fn, T(case["y"]), T(case["kernel"]), case["factor"]))

    def reference(y: Tensor, kernel: Tensor, factor: int) -> Tensor:
        shape = (*y.shape[1:-2], y.shape[-2] * factor, y.shape[-1] * factor)
        return Blur(kernel, shape).adjoint(BlockAverage(shape, factor).adjoint(y))

    @mistake(
        "the factor 1 / factor² is missing: each pixel gets all of y. Repeating alone is A^+ of the averages, not their adjoint"
    )
    def factor_forgotten(y, kernel, factor):
        return _filtered(_repeated(y, factor), kernel, -1)

    @mistake("a block has factor² pixels, not factor: its mean weighs each with 1 / factor²")
    def side_for_area(y, kernel, factor):
        return _filtered(_repeated(y, factor) / factor, kernel, -1)

    @mistake("the kernel is not turned: this blurs once more, K in place of K^T. The transpose of a shift is the shift back")
    def kernel_not_turned(y, kernel, factor):
        return _filtered(_repeated(y, factor) / factor**2, kernel)

    @mistake("the kernel is transposed as a matrix, k_vu; it is the *places* (u, v) that change sign, along both axes")
    def kernel_transposed(y, kernel, factor):
        return _filtered(_repeated(y, factor) / factor**2, kernel.T)

    @mistake("the kernel is turned along one axis only; both (u, v) change sign")
    def turned_along_one_axis(y, kernel, factor):
        return _filtered(_repeated(y, factor) / factor**2, kernel.flip(1))

    @mistake("the order is that of A: the adjoint undoes the last map first, so spread the numbers of y, and filter then")
    def order_of_A(y, kernel, factor):
        return _repeated(_filtered(y, kernel, -1), factor) / factor**2

    @mistake("y is put into one pixel of each block and 0 into the others: the adjoint of *picking* a pixel, not of a mean")
    def adjoint_of_picking(y, kernel, factor):
        return _filtered(_into_the_corner(y, factor), kernel, -1)

    @mistake(
        "y is enlarged bilinearly: a mean knows nothing of other blocks, and its adjoint gives all pixels of a block the same"
    )
    def bilinear(y, kernel, factor):
        return _filtered(F.interpolate(y, scale_factor=factor, mode="bilinear") / factor**2, kernel, -1)

    @mistake("the filter is *inverted*, a division by K(f): that is K^-1; the adjoint multiplies by the conjugate of K(f)")
    def inverse_for_adjoint(y, kernel, factor):
        x = _repeated(y, factor) / factor**2
        point = torch.zeros_like(x[:1, :1])
        point[..., 0, 0] = 1
        return torch.fft.ifft2(torch.fft.fft2(x) / torch.fft.fft2(_filtered(point, kernel))).real

    @mistake("the edges are padded with 0; this blur goes around the edges, and so does its adjoint")
    def padded_with_zeros(y, kernel, factor):
        x = _repeated(y, factor) / factor**2
        rows, columns = kernel.shape
        flat = F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None], padding=(rows // 2, columns // 2))
        return flat.reshape(x.shape)

    @mistake("the blur is left out: this is the adjoint of the averages alone")
    def blur_forgotten(y, kernel, factor):
        return _repeated(y, factor) / factor**2

    @law(
        "the kernel sums to 1 and means keep means, so <A 1, y> = <1, A^T y> says: the numbers of A^T y must add up to those of y"
    )
    def sum_kept(case: Case, out: Outputs) -> bool:
        return close(out["x"].sum(), case["y"].sum())

    @law("<A x, y> and <x, A^T y> must be equal for every x, and are not")
    def adjoint(case: Case, out: Outputs) -> bool:
        measured = F.avg_pool2d(_filtered(T(case["probe"]), T(case["kernel"])), case["factor"]).numpy()
        return close((measured * case["y"]).sum(), (case["probe"] * out["x"]).sum())


# --- 06.2 ----------------------------------------------------------------------------------------------


@item(
    "06.2", title="Projection onto a measurement", function="projection", points=1, minutes=15, difficulty=1,
    answers=("course_lib.operators.base.LinearOperator.project", "course_lib.operators.base.Matrix.pinv",
             "course_lib.operators.base.LinearOperator.solve"),
    hints=(
        "Rows are samples: A x of all of them is x @ A.T, (B, m).",
        "What is missing of the measurement is y - A x. A^+ brings it back to pictures, and x gets it: x + A^+ (y - A x).",
        "torch.linalg.pinv(A) is A^+, (n, m), for a matrix of any rank; for rows of samples multiply by its transpose.",
    ),
)  # fmt: skip
class Projection:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(m: int, n: int, B: int) -> Case:
            A = rng.normal(size=(m, n))
            return {"A": A, "x": rng.normal(size=(B, n)), "y": rng.normal(size=(B, m))}

        twice = case(4, 7, 2)
        twice["A"][3] = twice["A"][0] + twice["A"][1]  # dependent rows: not every y can be measured
        return [case(3, 6, 4), twice]

    def drive(fn, case: Case) -> Outputs:
        return arrays(x=call(fn, T(case["A"]), T(case["x"]), T(case["y"])))

    def reference(A: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return Matrix(A).project(x, y)

    @mistake(
        "A^T stands in place of A^+: the residual goes back without its scale, and A x' is not y. They agree only where A A^T = I"
    )
    def adjoint_for_inverse(A, x, y):
        return x + (y - x @ A.T) @ A

    @mistake("this is one gradient step of length 1 / |A|²; many of them lead to the projection, A^+ does it at once")
    def one_gradient_step(A, x, y):
        return x + (y - x @ A.T) @ A / torch.linalg.matrix_norm(A, 2) ** 2

    @mistake("each row of A is treated by itself, divided by its own square; rows are not orthogonal, and measurements overlap")
    def rows_by_themselves(A, x, y):
        return x + ((y - x @ A.T) / (A**2).sum(1)) @ A

    @mistake("A x is not taken off: x + A^+ y measures A x too much; what is added is A^+ of the residual y - A x")
    def residual_forgotten(A, x, y):
        return x + y @ torch.linalg.pinv(A).T

    @mistake("x has no part in it: A^+ y is the picture of least norm, the projection of 0; project x")
    def least_norm(A, x, y):
        return y @ torch.linalg.pinv(A).T

    @mistake("the sign of the residual is turned: this goes away from the measurement, which is now twice as far off")
    def sign_turned(A, x, y):
        return x - (y - x @ A.T) @ torch.linalg.pinv(A).T

    @mistake("this is the correction A^+ (y - A x) alone; add it to x")
    def correction_alone(A, x, y):
        return (y - x @ A.T) @ torch.linalg.pinv(A).T

    @mistake("the wrong part of x is kept, A^+ A x: that is what A sees, and y tells that; keep x - A^+ A x")
    def range_kept(A, x, y):
        return (y + x @ A.T) @ torch.linalg.pinv(A).T

    @mistake("the inverse is regularised, A^T (A A^T + I)^-1: that allows y to have noise of size 1; here A x' is to be y")
    def ridge(A, x, y):
        return x + torch.linalg.solve(A @ A.T + torch.eye(len(A), dtype=A.dtype), (y - x @ A.T).T).T @ A

    @mistake("the first m numbers of x are overwritten by y: right for a mask of just these, where A is rows of the identity")
    def overwritten(A, x, y):
        return torch.cat([y, x[:, len(A) :]], 1)

    @law("A x' must be y, or, where no x has this y, the nearest measurement that some x has")
    def measured(case: Case, out: Outputs) -> bool:
        A = case["A"]
        return close(out["x"] @ A.T, case["y"] @ (A @ np.linalg.pinv(A, rcond=1e-10)).T)

    @law("A x' is right, but x' is not the nearest such picture: what A does not see of x has changed")
    def nearest(case: Case, out: Outputs) -> bool:
        moved, A = out["x"] - case["x"], case["A"]
        return close(moved, moved @ (np.linalg.pinv(A, rcond=1e-10) @ A).T)
