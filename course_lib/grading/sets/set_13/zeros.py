"""Item 13.1: a convolution that starts at zero, and its gradients by hand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_13.common import AUTOGRAD
from course_lib.grading.sets.tools import T, named

PARTS = ("y", "by_W", "by_b", "by_x")


def _y(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("oi,bihw->bohw", W, x) + b[:, None, None]


def _by_W(x: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("bohw,bihw->oi", g, x)


def _by_b(g: Tensor) -> Tensor:
    return g.sum((0, 2, 3))


def _by_x(W: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("oi,bohw->bihw", W, g)


def _all(x: Tensor, W: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The right answer."""
    return _y(x, W, b), _by_W(x, g), _by_b(g), _by_x(W, g)


@item(
    "13.1", title="The zero convolution", function="zero_convolution", points=2, minutes=20, difficulty=2, answers=AUTOGRAD,
    hints=(
        "A 1 x 1 convolution is the same matrix at each pixel: y[:, o] = sum_i W[o, i] x[:, i] + b[o]. torch.einsum('oi,bihw->bohw', W, x) + b[:, None, None].",
        "W[o, i] acts at every pixel of every sample, so its gradient is the sum over all of them of g[o] x[i]; that of b[o] is the sum of g[o]. x[i] acts through all W[o, i].",
        "by_W = einsum('bohw,bihw->oi', g, x), by_b = g.sum((0, 2, 3)), by_x = einsum('oi,bohw->bihw', W, g). With W = 0 only by_x is 0.",
    ),
)  # fmt: skip
class ZeroConvolution:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], size: float) -> Case:
            C = shape[1]
            W, b = size * rng.normal(size=(C, C)), size * rng.normal(size=C)
            return {"x": rng.normal(size=shape), "W": W, "b": b, "g": rng.normal(size=shape)}

        return [case((2, 3, 2, 4), 1.0), case((3, 2, 3, 2), 0.0)]

    def drive(fn, case: Case) -> Outputs:
        return arrays(**named(call(fn, *(T(case[name]) for name in ("x", "W", "b", "g"))), *PARTS))

    def reference(x: Tensor, W: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _all(x, W, b, g)

    @mistake(
        "the gradient by W has W as a factor, and is 0 at W = 0: then a zero convolution could never learn. y is linear in W, so its derivative by W is x, whatever W is"
    )
    def dead_at_zero(x, W, b, g):
        return _y(x, W, b), W * _by_W(x, g), _by_b(g), _by_x(W, g)

    @mistake("the gradient by W has the layer's *output* y in it; W[o, i] multiplies the input x[i]")
    def output_for_input(x, W, b, g):
        return _y(x, W, b), _by_W(_y(x, W, b), g), _by_b(g), _by_x(W, g)

    @mistake("the gradient by W is transposed: its rows belong to outputs, as those of W do")
    def weight_transposed(x, W, b, g):
        return _y(x, W, b), _by_W(x, g).T, _by_b(g), _by_x(W, g)

    @mistake("the way back goes through W where it goes through its transpose: x[i] hears from all outputs o by W[o, i]")
    def way_back_not_transposed(x, W, b, g):
        return _y(x, W, b), _by_W(x, g), _by_b(g), _by_x(W.T, g)

    @mistake("the gradient by x is g itself: it has to come through the layer, W^T g; at W = 0 nothing comes")
    def passed_through(x, W, b, g):
        return _y(x, W, b), _by_W(x, g), _by_b(g), g

    @mistake(
        "g is added to the gradient by x, as if y were x + W x: that is a residual block; here nothing goes round the convolution"
    )
    def residual_block(x, W, b, g):
        return _y(x, W, b), _by_W(x, g), _by_b(g), g + _by_x(W, g)

    @mistake(
        "x is added to y: that is a residual block; a zero convolution gives 0 at first, and what it is added to comes later"
    )
    def identity_at_first(x, W, b, g):
        return x + _y(x, W, b), _by_W(x, g), _by_b(g), _by_x(W, g)

    @mistake("the gradients by W and b are averaged over the samples: L is one number, and each sample adds its share to them")
    def mean_over_samples(x, W, b, g):
        return _y(x, W, b), _by_W(x, g) / len(x), _by_b(g) / len(x), _by_x(W, g)

    @mistake("the gradients by W and b are averaged over the pixels: the same W acts at each, and their shares are added")
    def mean_over_pixels(x, W, b, g):
        pixels = x[0, 0].numel()
        return _y(x, W, b), _by_W(x, g) / pixels, _by_b(g) / pixels, _by_x(W, g)

    @mistake("the gradients by W and b are those of the first sample alone; sum over all")
    def first_sample(x, W, b, g):
        return _y(x, W, b), _by_W(x[:1], g[:1]), _by_b(g[:1]), _by_x(W, g)

    @mistake(
        "g and x are summed over the pixels *before* they are multiplied: the gradient by W is the sum of products, not the product of sums"
    )
    def product_of_sums(x, W, b, g):
        return _y(x, W, b), torch.einsum("bo,bi->oi", g.sum((2, 3)), x.sum((2, 3))), _by_b(g), _by_x(W, g)

    @mistake("the gradient by b has b as a factor, and is 0 at b = 0: y is b plus something, so its derivative by b is 1")
    def bias_dead_at_zero(x, W, b, g):
        return _y(x, W, b), _by_W(x, g), b * _by_b(g), _by_x(W, g)

    @mistake("the bias is forgotten in y")
    def bias_forgotten(x, W, b, g):
        return _y(x, W, 0 * b), _by_W(x, g), _by_b(g), _by_x(W, g)

    @mistake("the layer multiplies by the transpose of W: y[:, o] = sum_i W[o, i] x[:, i]; the gradients are those of W itself")
    def forward_transposed(x, W, b, g):
        return _y(x, W.T, b), _by_W(x, g), _by_b(g), _by_x(W, g)

    @mistake("the gradients have the other sign: these are the directions in which a step goes; a gradient points uphill")
    def directions_of_a_step(x, W, b, g):
        return _y(x, W, b), -_by_W(x, g), -_by_b(g), -_by_x(W, g)

    @law("y must be sum_i W[o, i] x[i] + b[o] at each pixel")
    def is_the_layer(case: Case, out: Outputs) -> bool:
        return close(out["y"], _y(*(T(case[name]) for name in ("x", "W", "b"))).numpy())

    @law("at W = 0 the gradient by x must be 0, and that by W must not: g is not 0, and x is not")
    def alive_at_zero(case: Case, out: Outputs) -> bool:
        return bool(case["W"].any()) or (close(out["by_x"], 0.0) and bool(out["by_W"].any()))

    @law("moving b alone changes L by the sum of g, over samples and pixels, times that move: by_b is something else")
    def by_bias(case: Case, out: Outputs) -> bool:
        return close(out["by_b"], case["g"].sum((0, 2, 3)))

    @law("moving W along x changes y, and L by g: the product of by_W and W must be the sum of g times (y - b)")
    def by_weight(case: Case, out: Outputs) -> bool:
        linear = _y(T(case["x"]), T(case["W"]), T(0 * case["b"])).numpy()
        return close((out["by_W"] * case["W"]).sum(), (case["g"] * linear).sum())
