"""Item 08.8: a low-rank change of a linear layer, beside it and merged into it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_08.common import slopes
from course_lib.grading.sets.tools import T, named


def _both(x: Tensor, W: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the weight, with this change of W."""
    return x @ (W + change).T, W + change


@item(
    "08.8", title="A low-rank layer", function="lora_layer", points=2, minutes=15, difficulty=1,
    hints=(
        "A leads down, from d to r, B up again, from r to d: with samples as rows that is x @ A.T, and then @ B.T.",
        "The scale is alpha / r, where r is the number of rows of A: y = x @ W.T + alpha / r * (x @ A.T @ B.T).",
        "Merged, it is one matrix that gives the same y: W + alpha / r * (B @ A). Check: x @ merged.T is y.",
    ),
)  # fmt: skip
class LowRank:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(d: int, r: int, rows: tuple[int, ...], alpha: float) -> Case:
            return {"x": rng.normal(size=(*rows, d)), "W": rng.normal(size=(d, d)), "A": rng.normal(size=(r, d)),
                    "B": rng.normal(size=(d, r)), "alpha": alpha * float(rng.uniform(0.9, 1.1))}  # fmt: skip

        return [case(6, 3, (4,), 5.0), case(5, 2, (2, 3), 1.5)]

    def drive(fn, case: Case) -> Outputs:
        with torch.enable_grad():
            A, B = (T(case[name]).requires_grad_() for name in ("A", "B"))
            pair = named(call(fn, T(case["x"]), T(case["W"]), A, B, case["alpha"]), "y", "merged")
            out = arrays(**pair)
            by_A, by_B = slopes((pair["y"] ** 2).sum(), A, B) if isinstance(pair["y"], Tensor) else (A, B)
        return out | arrays(by_A=by_A, by_B=by_B)  # what A and B learn by

    def reference(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        return _both(x, W, alpha / len(A) * B @ A)

    @mistake("the scale is alpha: it is alpha / r, so that another rank does not need another learning rate")
    def alpha_itself(x, W, A, B, alpha):
        return _both(x, W, alpha * B @ A)

    @mistake("the scale is missing in both: W + alpha / r B A")
    def no_scale(x, W, A, B, alpha):
        return _both(x, W, B @ A)

    @mistake("the scale is alpha / sqrt(r), that of rank-stabilised LoRA (2023); here it is alpha / r, LoRA's own")
    def rank_stabilised(x, W, A, B, alpha):
        return _both(x, W, alpha / len(A) ** 0.5 * B @ A)

    @mistake("alpha is divided by d and not by r: the rank is the *short* side, the rows of A and the columns of B")
    def divided_by_the_width(x, W, A, B, alpha):
        return _both(x, W, alpha / len(B) * B @ A)

    @mistake("the scale is upside down, r / alpha")
    def scale_upside_down(x, W, A, B, alpha):
        return _both(x, W, len(A) / alpha * B @ A)

    @mistake("both halves have the scale, so that it counts twice: (alpha / r)²")
    def scaled_twice(x, W, A, B, alpha):
        return _both(x, W, (alpha / len(A)) ** 2 * B @ A)

    @mistake(
        "the change is transposed, (B A)^T = A^T B^T: shapes agree where W is square, the layer is another one. Down by A first, then up by B"
    )
    def change_transposed(x, W, A, B, alpha):
        return _both(x, W, alpha / len(A) * (B @ A).T)

    @mistake(
        "y is right, but the merged weight has the change transposed, A^T B^T: as W is (out, in), the change is B A, (out, r) times (r, in)"
    )
    def merged_transposed(x, W, A, B, alpha):
        return _both(x, W, alpha / len(A) * B @ A)[0], W + alpha / len(A) * (B @ A).T

    @mistake("W is not transposed in x @ W: shapes agree where W is square; a linear layer is x @ W.T")
    def weight_not_transposed(x, W, A, B, alpha):
        change = alpha / len(A) * B @ A
        return x @ (W + change.T), W + change

    @mistake("y is right, but the merged weight has no scale: what was trained at alpha / r is merged at 1")
    def merged_without_scale(x, W, A, B, alpha):
        return _both(x, W, alpha / len(A) * B @ A)[0], W + B @ A

    @mistake("the merged weight is the change alone, without W: that is what is saved in a file, not what is used")
    def change_alone(x, W, A, B, alpha):
        return _both(x, W, alpha / len(A) * B @ A)[0], alpha / len(A) * B @ A

    @mistake("W is forgotten in y: the low-rank branch stands *beside* the layer, x @ W.T + ...")
    def layer_forgotten(x, W, A, B, alpha):
        change = alpha / len(A) * B @ A
        return x @ change.T, W + change

    @mistake("the branch takes the layer's *output*, in series; it takes its input x, beside the layer")
    def in_series(x, W, A, B, alpha):
        change = alpha / len(A) * B @ A
        return x @ W.T + x @ W.T @ change.T, W + change

    @mistake("the branch is added to x and goes through W: (x + change) @ W.T; it is added to what W makes of x")
    def before_the_layer(x, W, A, B, alpha):
        change = alpha / len(A) * B @ A
        return (x + x @ change.T) @ W.T, W + change

    @mistake("W itself is scaled too: alpha / r stands before B A alone, and W stays as it was trained")
    def weight_scaled(x, W, A, B, alpha):
        scale = alpha / len(A)
        return x @ (scale * (W + B @ A)).T, scale * (W + B @ A)

    @mistake("the sign is turned: this is how a merged change is taken out again, W - alpha / r B A")
    def unmerged(x, W, A, B, alpha):
        return _both(x, W, -alpha / len(A) * B @ A)

    @law("the merged weight must make the same y: x @ merged.T")
    def agree(case: Case, out: Outputs) -> bool:
        return close(case["x"] @ out["merged"].T, out["y"])

    @law(
        "y must be right in its graph too: A and B learn by the derivative of y, so detach neither, and convert nothing to numbers"
    )
    def learns(case: Case, out: Outputs) -> bool:
        with torch.enable_grad():
            A, B = (T(case[name]).requires_grad_() for name in ("A", "B"))
            y, _ = _both(T(case["x"]), T(case["W"]), case["alpha"] / len(A) * B @ A)
            expected = slopes((y**2).sum(), A, B)
        right_values = close(out["y"], y.detach().numpy())
        return not right_values or all(close(out[n], one.numpy()) for n, one in zip(("by_A", "by_B"), expected, strict=True))

    @law("what is added to W must have at most the rank r of A and B")
    def low_rank(case: Case, out: Outputs) -> bool:
        values = np.linalg.svd(out["merged"] - case["W"], compute_uv=False)
        return bool((values[len(case["A"]) :] < 1e-8 * max(1.0, values[0])).all())
