"""Item 05.3: cross-attention of a picture to a text, with a mask for padded words."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T
from course_lib.nets.crossattention import CrossAttention


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads), the channels of a head side by side."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(h: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads d)."""
    return h.transpose(1, 2).flatten(2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int, root: float | None = None) -> Tensor:
    """The answer, with the scores divided by `root`, or by that of the head size."""
    q, k, v = (_split(part, heads) for part in (q, k, v))
    scores = q @ k.transpose(-1, -2) / (q.shape[-1] ** 0.5 if root is None else root)
    return _merge(scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ v)


def _scores(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """q k^T / sqrt(d), (B, heads, N, L)."""
    q, k = _split(q, heads), _split(k, heads)
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


@item(
    "05.3", title="Cross-attention with padded words", function="cross_attention", points=2, minutes=25, difficulty=2,
    answers=("course_lib.nets.crossattention.CrossAttention",),
    hints=(
        "Heads first: (B, N, C) -> (B, N, heads, d) -> (B, heads, N, d), by unflatten or reshape and then transpose(1, 2); k and v likewise.",
        "scores = q @ k.transpose(-1, -2) / sqrt(d), (B, heads, N, L). Where mask, as (B, 1, 1, L), is False, put -inf there *before* the softmax over L.",
        "softmax(-1) @ v is (B, heads, N, d). Go back the way you came: transpose(1, 2), then flatten the last two axes.",
    ),
)  # fmt: skip
class CrossAttended:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(B: int, N: int, L: int, heads: int, d: int) -> Case:
            real = rng.integers(2, L, B)
            real[0], real[1] = 2, L  # the second text fills its places
            q, k = (1.6 * rng.normal(size=(B, n, heads * d)) for n in (N, L))
            v, other = rng.normal(size=(B, L, heads * d)), rng.normal(size=(2, B, L, heads * d))
            return {"q": q, "k": k, "v": v, "mask": np.arange(L) < real[:, None], "heads": heads, "other": other}

        return [case(3, 4, 5, 2, 3), case(2, 6, 6, 3, 2), case(2, 3, 4, 1, 4)]

    def drive(fn, case: Case) -> Outputs:
        q, k, v, mask = (T(case[name]) for name in ("q", "k", "v", "mask"))
        out = call(fn, q, k, v, mask, case["heads"])
        padded = ~mask[..., None]
        k, v = (torch.where(padded, new, old) for new, old in zip(T(case["other"]), (k, v), strict=True))
        return arrays(out=out, other_padding=call(fn, q, k, v, mask, case["heads"]))

    def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int) -> Tensor:
        C = q.shape[-1]
        layer = CrossAttention(C, 2 * C, heads).double()
        layer.norm, none, one = torch.nn.Identity(), torch.zeros(C, C), torch.eye(C)
        with torch.no_grad():  # projections that hand q, k and v through, with k and v side by side as the text
            for part, weight in (("q", one), ("k", torch.cat([one, none], 1)), ("v", torch.cat([none, one], 1)), ("out", one)):
                getattr(layer, part).weight.copy_(weight)
            return layer(q, torch.cat([k, v], -1), mask) - q

    @mistake("the mask is not used: padded words take part in the softmax like all others")
    def not_masked(q, k, v, mask, heads):
        return _attend(q, k, v, torch.ones_like(mask), heads)

    @mistake("the mask is turned round: True marks the words that *are* there, and yours keeps only the padding")
    def mask_turned(q, k, v, mask, heads):
        scores = _scores(q, k, heads).masked_fill(mask[:, None, None], -1e9)
        return _merge(scores.softmax(-1) @ _split(v, heads))

    @mistake(
        "padded words are taken out *after* the softmax: they have had their share by then, and the weights add up to less than 1; put -inf into the scores"
    )
    def masked_after(q, k, v, mask, heads):
        weights = _scores(q, k, heads).softmax(-1).masked_fill(~mask[:, None, None], 0)
        return _merge(weights @ _split(v, heads))

    @mistake("the scores of padded words are set to 0, and exp(0) = 1 is a weight like others; set them to -inf")
    def score_zero(q, k, v, mask, heads):
        scores = _scores(q, k, heads).masked_fill(~mask[:, None, None], 0)
        return _merge(scores.softmax(-1) @ _split(v, heads))

    @mistake("the mask of the first text serves for all; each sample has its own")
    def mask_of_the_first(q, k, v, mask, heads):
        return _attend(q, k, v, mask[:1].expand_as(mask), heads)

    @mistake(
        "the softmax runs over the *places* of the picture, dim -2: each word divides itself up; each place is to divide itself among the words, dim -1"
    )
    def softmax_over_places(q, k, v, mask, heads):
        weights = _scores(q, k, heads).softmax(-2).masked_fill(~mask[:, None, None], 0)
        return _merge(weights @ _split(v, heads))

    @mistake("the softmax runs over the heads, dim 1; it runs over the words, dim -1")
    def softmax_over_heads(q, k, v, mask, heads):
        weights = _scores(q, k, heads).softmax(1).masked_fill(~mask[:, None, None], 0)
        return _merge(weights @ _split(v, heads))

    @mistake("the scores are not divided by sqrt(d): they grow with the head size, and the softmax hardens")
    def not_scaled(q, k, v, mask, heads):
        return _attend(q, k, v, mask, heads, root=1.0)

    @mistake("the scores are divided by d, not by its root")
    def divided_by_d(q, k, v, mask, heads):
        return _attend(q, k, v, mask, heads, root=q.shape[-1] / heads)

    @mistake("d is taken as the whole width C; q and k of a head have C / heads numbers, and d is that")
    def root_of_the_width(q, k, v, mask, heads):
        return _attend(q, k, v, mask, heads, root=q.shape[-1] ** 0.5)

    @mistake("all channels are one head; split them into `heads`, each with weights of its own")
    def one_head(q, k, v, mask, heads):
        return _attend(q, k, v, mask, 1)

    @mistake(
        "a head takes every heads-th channel; published weights have the channels of a head side by side: split C as (heads, d), not as (d, heads)"
    )
    def interleaved(q, k, v, mask, heads):
        q, k, v = (part.unflatten(-1, (-1, heads)).transpose(-1, -2).flatten(-2) for part in (q, k, v))
        return _attend(q, k, v, mask, heads).unflatten(-1, (heads, -1)).transpose(-1, -2).flatten(-2)

    @mistake(
        "(B, N, C) is reshaped straight to (B, heads, N, d): numbers of different places get mixed; reshape to (B, N, heads, d), then transpose"
    )
    def split_without_transposing(q, k, v, mask, heads):
        parts = (part.reshape(len(part), heads, part.shape[1], -1) for part in (q, k, v))
        return _attend(*(_merge(part) for part in parts), mask, heads)

    @mistake("(B, heads, N, d) is reshaped straight to (B, N, C): heads and places get mixed; transpose(1, 2) first")
    def merged_without_transposing(q, k, v, mask, heads):
        return _split(_attend(q, k, v, mask, heads), heads).reshape(q.shape)

    @mistake("k and v have changed places: keys are compared with q, values are what comes out")
    def keys_for_values(q, k, v, mask, heads):
        return _attend(q, v, k, mask, heads)

    @law("what stands in the places of padded words must have no effect")
    def padding_is_silent(case: Case, out: Outputs) -> bool:
        return close(out["out"], out["other_padding"])

    @law(
        "an answer is a mean of values: it must lie between the least and the largest value that the real words have in its channel"
    )
    def within_the_values(case: Case, out: Outputs) -> bool:
        v, real = case["v"], case["mask"][..., None]
        low, high = np.where(real, v, np.inf).min(1), np.where(real, v, -np.inf).max(1)
        return bool(((out["out"] >= low[:, None] - 1e-9) & (out["out"] <= high[:, None] + 1e-9)).all())

    @law(
        "padding is silent and the answers are means of values, but with other weights than softmax(q k^T / sqrt(d)) in each head"
    )
    def weights(case: Case, out: Outputs) -> bool:
        given = (T(case[name]) for name in ("q", "k", "v", "mask"))
        return close(out["out"], _attend(*given, case["heads"]).numpy())
