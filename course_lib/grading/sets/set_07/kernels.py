"""Item 07.10: the kernel's turn in an alternation between picture and kernel."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T


def _columns(x: Tensor, shape: tuple[int, int], way: int = 1, middle: bool = True) -> Tensor:
    """Row by row of the kernel, all pixels of x moved by (u, v) from the middle, around the edges: (N, kh kw)."""
    u0, v0 = (shape[0] // 2, shape[1] // 2) if middle else (0, 0)
    moves = [(way * (u - u0), way * (v - v0)) for u in range(shape[0]) for v in range(shape[1])]
    return torch.stack([x.roll(move, (-2, -1)).flatten() for move in moves], 1)


def _padded(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """As `_columns`, with 0 beyond the edges."""
    kh, kw = shape
    large = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2))
    return (
        _columns(large, shape).reshape(*large.shape, -1)[..., kh // 2 : -(kh // 2), kw // 2 : -(kw // 2), :].reshape(-1, kh * kw)
    )


def _solved(X: Tensor, y: Tensor, k: Tensor, ridge: float) -> Tensor:
    """The k' of least |y - X k'|^2 + ridge |k' - k|^2, in the shape of k."""
    normal = X.T @ X + ridge * torch.eye(X.shape[1], dtype=X.dtype)
    return torch.linalg.solve(normal, X.T @ y.flatten() + ridge * k.flatten()).reshape(k.shape)


def _kernel(k: Tensor) -> Tensor:
    """Nothing below 0, and sum 1."""
    k = k.clamp_min(0)
    return k / k.sum()


@item(
    "07.10", title="The kernel's turn", function="kernel_update", points=3, minutes=35, difficulty=3,
    hints=(
        "y is linear in the kernel too: y = sum of k_uv times x.roll((u - kh // 2, v - kw // 2), (-2, -1)). Each of these moved pictures, flattened, is a column of a matrix X, (pixels, kh kw), in the order of k.flatten().",
        "Least squares with a ridge towards the old kernel: (X^T X + ridge I) k' = X^T y + ridge k. torch.linalg.solve; all pictures of the batch are rows of one X.",
        "What comes out need be no kernel: clamp_min(0) first, and *then* divide by the sum.",
    ),
)  # fmt: skip
class KernelUpdate:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, int], size: tuple[int, int], B: int) -> Case:
            true = np.where(rng.uniform(size=shape) < 0.5, rng.uniform(0.3, 1, shape), 0.0)
            true[shape[0] // 2, 0] += 1.0  # off the middle, so that it has a direction
            x = rng.normal(size=(B, 1, *size))
            y = (_columns(T(x), shape) @ T(true / true.sum()).flatten()).reshape(x.shape).numpy()
            old = rng.uniform(0.2, 1, shape)
            return {"k": old / old.sum(), "x": x, "y": y + 0.4 * rng.normal(size=x.shape), "ridge": float(rng.uniform(4, 8))}

        return [case((3, 3), (6, 5), 2), case((3, 5), (6, 7), 2), case((5, 3), (8, 6), 1)]

    def drive(fn, case: Case) -> Outputs:
        return arrays(k=call(fn, T(case["k"]), T(case["x"]), T(case["y"]), case["ridge"]))

    def reference(k: Tensor, x: Tensor, y: Tensor, ridge: float) -> Tensor:
        return _kernel(_solved(_columns(x, k.shape), y, k, ridge))

    @mistake(
        "the kernel is turned by 180 degrees: the pictures are moved *back*, x.roll(-(u - u0), ...), which is correlation; a convolution moves them by + (u - u0)"
    )
    def correlation(k, x, y, ridge):
        return _kernel(_solved(_columns(x, k.shape, -1), y, k, ridge))

    @mistake(
        "the middle is forgotten: x is moved by (u, v) from the corner, so that the kernel comes out beside its place; move by (u - kh // 2, v - kw // 2)"
    )
    def middle_forgotten(k, x, y, ridge):
        return _kernel(_solved(_columns(x, k.shape, middle=False), y, k, ridge))

    @mistake("rows and columns are exchanged: u moves the rows, axis -2, and v the columns")
    def axes_exchanged(k, x, y, ridge):
        return _kernel(_solved(_columns(x.mT, k.shape), y.mT, k, ridge))

    @mistake("the columns come in the order of the transposed kernel: k.flatten() runs through a row, v, first")
    def order_of_columns(k, x, y, ridge):
        kh, kw = k.shape
        X = _columns(x, k.shape).reshape(-1, kh, kw).mT.reshape(-1, kh * kw)
        return _kernel(_solved(X, y, k, ridge))

    @mistake("what is below 0 stays: a blur gathers light, and has no negative weights")
    def negative_kept(k, x, y, ridge):
        k = _solved(_columns(x, k.shape), y, k, ridge)
        return k / k.sum()

    @mistake("the absolute value is taken: noise that came out below 0 becomes weight; set it to 0")
    def absolute_value(k, x, y, ridge):
        k = _solved(_columns(x, k.shape), y, k, ridge).abs()
        return k / k.sum()

    @mistake("the kernel's sum is not 1: it would make pictures darker or brighter; divide by the sum")
    def not_normalised(k, x, y, ridge):
        return _solved(_columns(x, k.shape), y, k, ridge).clamp_min(0)

    @mistake("the sum is made 1 *before* the negative weights are set to 0, and is no longer 1 after it")
    def normalised_too_early(k, x, y, ridge):
        k = _solved(_columns(x, k.shape), y, k, ridge)
        return (k / k.sum()).clamp_min(0)

    @mistake(
        "softmax makes the weights positive and their sum 1, but by exponentials: zeros become weights, and the shape is lost"
    )
    def softmax(k, x, y, ridge):
        return torch.softmax(_solved(_columns(x, k.shape), y, k, ridge).flatten(), 0).reshape(k.shape)

    @mistake("the kernel is divided by its norm, sqrt(sum k²); brightness is kept by the *sum*")
    def unit_norm(k, x, y, ridge):
        k = _solved(_columns(x, k.shape), y, k, ridge).clamp_min(0)
        return k / k.norm()

    @mistake("the kernel is divided by its largest weight; brightness is kept by the *sum*")
    def largest_is_one(k, x, y, ridge):
        k = _solved(_columns(x, k.shape), y, k, ridge).clamp_min(0)
        return k / k.max()

    @mistake("the ridge is forgotten: with a poor estimate of the picture plain least squares fits the noise")
    def ridge_forgotten(k, x, y, ridge):
        return _kernel(_solved(_columns(x, k.shape), y, k, 0.0))

    @mistake("the ridge pulls towards 0 and not towards the old kernel: ridge k is missing on the right-hand side")
    def ridge_towards_zero(k, x, y, ridge):
        return _kernel(_solved(_columns(x, k.shape), y, torch.zeros_like(k), ridge))

    @mistake("ridge² stands where ridge belongs: rows that are appended to X carry its *root*, sqrt(ridge) I")
    def ridge_squared(k, x, y, ridge):
        return _kernel(_solved(_columns(x, k.shape), y, k, ridge**2))

    @mistake("the matrix has the ridge, the right-hand side has k without it: (X^T X + ridge I) k' = X^T y + ridge k")
    def ridge_on_one_side(k, x, y, ridge):
        return _kernel(_solved(_columns(x, k.shape), y, k / ridge, ridge))

    @mistake("beyond the edges there is 0; this blur goes around the edges, as x.roll does")
    def zeros_beyond_the_edges(k, x, y, ridge):
        return _kernel(_solved(_padded(x, k.shape), y, k, ridge))

    @mistake("x and y are exchanged: this is the kernel that would make the sharp picture of the blurred one")
    def exchanged(k, x, y, ridge):
        return _kernel(_solved(_columns(y, k.shape), x, k, ridge))

    @mistake(
        "each picture finds its own kernel, and these are averaged; one kernel has blurred them all: put their pixels into one system"
    )
    def averaged(k, x, y, ridge):
        halves = [_solved(_columns(a, k.shape), b, k, ridge) for a, b in zip(x, y, strict=True)]
        return _kernel(torch.stack(halves).mean(0))

    @mistake("this is one gradient step from the old kernel, of length 1 / |X|²; least squares goes all the way at once")
    def one_gradient_step(k, x, y, ridge):
        X = _columns(x, k.shape)
        moved = X.T @ (y.flatten() - X @ k.flatten()) / torch.linalg.matrix_norm(X, 2) ** 2
        return _kernel(k + moved.reshape(k.shape))

    @mistake(
        "the moved pictures are taken for orthogonal, k' = (X^T y + ridge k) / (|column|² + ridge): neighbouring pixels are alike, and X^T X is a full matrix"
    )
    def columns_taken_for_orthogonal(k, x, y, ridge):
        X = _columns(x, k.shape)
        raw = (X.T @ y.flatten() + ridge * k.flatten()) / ((X**2).sum(0) + ridge)
        return _kernel(raw.reshape(k.shape))

    @law("a kernel has no weight below 0")
    def not_negative(case: Case, out: Outputs) -> bool:
        return bool((out["k"] >= 0).all())

    @law("the weights of the kernel must sum to 1")
    def sums_to_one(case: Case, out: Outputs) -> bool:
        return close(out["k"].sum(), 1)

    @law("the new kernel must explain the blurred pictures better than the old one: |y - k' * x| has to fall")
    def explains_more(case: Case, out: Outputs) -> bool:
        X, y = _columns(T(case["x"]), case["k"].shape).numpy(), case["y"].ravel()
        return bool(np.linalg.norm(y - X @ out["k"].ravel()) < np.linalg.norm(y - X @ case["k"].ravel()))

    @law("where the new kernel is above 0 it must be that of (X^T X + ridge I) k' = X^T y + ridge k, up to one factor")
    def shape(case: Case, out: Outputs) -> bool:
        raw = _solved(_columns(T(case["x"]), case["k"].shape), T(case["y"]), T(case["k"]), case["ridge"]).clamp_min(0).numpy()
        return close(out["k"] / out["k"].sum(), raw / raw.sum())
