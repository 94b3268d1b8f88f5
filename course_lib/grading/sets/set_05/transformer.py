"""Items 05.4 and 05.5: the adaLN-zero block of a diffusion transformer, and pictures as tokens."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, named
from course_lib.nets import dit


class _Branch:
    """A stand-in for attention or MLP, (B, N, C) -> the same; attention mixes the tokens, and what either was asked is kept."""

    def __init__(self, weight: Tensor, mixes: bool):
        self.weight, self.mixes, self.asked = weight, mixes, []

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[-1] != len(self.weight):
            raise Unacceptable(
                f"{'attention' if self.mixes else 'mlp'} is called on shape {tuple(x.shape)}; expected (B, N, {len(self.weight)})"
            )
        self.asked.append(x.detach())
        h = torch.tanh(x @ self.weight)
        return h + 0.5 * h.roll(1, 1) if self.mixes else h


def _six(emb: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """shift1, scale1, gate1, shift2, scale2, gate2, (B, 1, C) each."""
    return (F.silu(emb) @ weight.T + bias)[:, None].chunk(6, -1)


def _norm(x: Tensor, dim: int = -1) -> Tensor:
    """Mean 0 and variance 1 along `dim`, without weights."""
    return (x - x.mean(dim, keepdim=True)) / (x.var(dim, correction=0, keepdim=True) + 1e-6).sqrt()


def _branch(x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, fn) -> Tensor:
    return x + gate * fn(_norm(x) * (1 + scale) + shift)


def _block(x: Tensor, six: tuple[Tensor, ...], attention, mlp) -> Tensor:
    return _branch(_branch(x, *six[:3], attention), *six[3:], mlp)


@item(
    "05.4", title="An adaLN-zero block", function="adaln_block", points=2, minutes=25, difficulty=2,
    answers=("course_lib.nets.dit.DiTBlock", "course_lib.nets.dit.modulate"),
    tolerance=1e-4,  # 1e-5 or 1e-6 under the root of the norm are both right
    hints=(
        "The six come from one product: torch.nn.functional.silu(emb) @ weight.T + bias is (B, 6C); chunk(6, 1) cuts it in the order of the text.",
        "Each is (B, C) and is to meet all tokens of x, (B, N, C): one[:, None]. The norm is over C and has no weights: layer_norm(x, x.shape[-1:]).",
        "x = x + gate1 * attention(norm(x) * (1 + scale1) + shift1), and then the same with the other three and mlp, on the *new* x.",
    ),
)  # fmt: skip
class AdaLNBlock:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(B: int, N: int, C: int, start: bool = False) -> Case:
            size = 0.0 if start else 0.6
            values = {"x": 1.0 + 1.5 * rng.normal(size=(B, N, C)), "emb": 1.5 * rng.normal(size=(B, 5))}
            values |= {"weight": size * rng.normal(size=(6 * C, 5)), "bias": size * rng.normal(size=6 * C)}
            return values | {"attention": rng.normal(size=(C, C)), "mlp": rng.normal(size=(C, C))}

        # as many tokens as samples, and as channels, so that a vector on the wrong axis meets it in silence
        return [case(3, 4, 6), case(4, 4, 4), case(2, 3, 6, start=True)]

    def drive(fn, case: Case) -> Outputs:
        attention, mlp = (_Branch(T(case[name]), name == "attention") for name in ("attention", "mlp"))
        given = (T(case[name]) for name in ("x", "emb", "weight", "bias"))
        out = arrays(out=call(fn, *given, attention, mlp))
        if len(attention.asked) != 1 or len(mlp.asked) != 1:
            raise Unacceptable(
                f"attention is called {len(attention.asked)} times and mlp {len(mlp.asked)} times; expected once each"
            )
        return out | arrays(attention_is_asked=attention.asked[0], mlp_is_asked=mlp.asked[0])

    def reference(x: Tensor, emb: Tensor, weight: Tensor, bias: Tensor, attention, mlp) -> Tensor:
        block = dit.DiTBlock(x.shape[-1], 1).double()
        del block.attention, block.mlp  # stand-ins are no modules
        block.attention, block.mlp = attention, mlp
        block.adaln.weight.data, block.adaln.bias.data = weight, bias
        return block(x, emb)

    @mistake("scale multiplies by itself, not by 1 + scale: at the start, where it is 0, the branch sees nothing of x")
    def one_plus_forgotten(x, emb, weight, bias, attention, mlp):
        s1, c1, g1, s2, c2, g2 = _six(emb, weight, bias)
        return _block(x, (s1, c1 - 1, g1, s2, c2 - 1, g2), attention, mlp)

    @mistake("the gates are missing: the branches are added whole, and the block is not the identity at the start")
    def no_gates(x, emb, weight, bias, attention, mlp):
        s1, c1, _, s2, c2, _ = _six(emb, weight, bias)
        return _block(x, (s1, c1, torch.ones_like(s1), s2, c2, torch.ones_like(s2)), attention, mlp)

    @mistake(
        "the branches are multiplied by 1 + gate: only the *scale* counts from 1; a gate counts from 0, and so does the block"
    )
    def one_plus_gate(x, emb, weight, bias, attention, mlp):
        s1, c1, g1, s2, c2, g2 = _six(emb, weight, bias)
        return _block(x, (s1, c1, 1 + g1, s2, c2, 1 + g2), attention, mlp)

    @mistake(
        "shift and scale have changed places in the order of the six: shift, scale, gate for attention, and again for the MLP"
    )
    def shift_and_scale_swapped(x, emb, weight, bias, attention, mlp):
        s1, c1, g1, s2, c2, g2 = _six(emb, weight, bias)
        return _block(x, (c1, s1, g1, c2, s2, g2), attention, mlp)

    @mistake("the six are read with the gates first; the order is shift, scale, gate for attention, and again for the MLP")
    def gates_first(x, emb, weight, bias, attention, mlp):
        g1, s1, c1, g2, s2, c2 = _six(emb, weight, bias)
        return _block(x, (s1, c1, g1, s2, c2, g2), attention, mlp)

    @mistake(
        "the six are read in pairs, both shifts, both scales, both gates; first come the three of attention, then those of the MLP"
    )
    def in_pairs(x, emb, weight, bias, attention, mlp):
        s1, s2, c1, c2, g1, g2 = _six(emb, weight, bias)
        return _block(x, (s1, c1, g1, s2, c2, g2), attention, mlp)

    @mistake("the first three serve the MLP and the last three attention; it is the other way round")
    def branches_swapped(x, emb, weight, bias, attention, mlp):
        six = _six(emb, weight, bias)
        return _block(x, (*six[3:], *six[:3]), attention, mlp)

    @mistake("the six are cut from the last axis in strides, every sixth number; each is C numbers side by side: chunk(6, 1)")
    def in_strides(x, emb, weight, bias, attention, mlp):
        all_six = torch.cat(_six(emb, weight, bias), -1)
        return _block(x, tuple(all_six[..., k::6] for k in range(6)), attention, mlp)

    @mistake("silu is missing before the linear layer")
    def no_silu(x, emb, weight, bias, attention, mlp):
        return _block(x, (emb @ weight.T + bias)[:, None].chunk(6, -1), attention, mlp)

    @mistake("silu comes after the linear layer; it is applied to emb, before it")
    def silu_after(x, emb, weight, bias, attention, mlp):
        return _block(x, F.silu(emb @ weight.T + bias)[:, None].chunk(6, -1), attention, mlp)

    @mistake("x is not normalised before it is modulated")
    def no_norm(x, emb, weight, bias, attention, mlp):
        s1, c1, g1, s2, c2, g2 = _six(emb, weight, bias)
        x = x + g1 * attention(x * (1 + c1) + s1)
        return x + g2 * mlp(x * (1 + c2) + s2)

    @mistake("x is modulated first and normalised then: the norm takes shift and scale mostly back")
    def norm_after(x, emb, weight, bias, attention, mlp):
        s1, c1, g1, s2, c2, g2 = _six(emb, weight, bias)
        x = x + g1 * attention(_norm(x * (1 + c1) + s1))
        return x + g2 * mlp(_norm(x * (1 + c2) + s2))

    @mistake("the norm runs over the tokens, dim 1; each token is normalised by itself, over its C channels")
    def norm_over_tokens(x, emb, weight, bias, attention, mlp):
        s1, c1, g1, s2, c2, g2 = _six(emb, weight, bias)
        x = x + g1 * attention(_norm(x, 1) * (1 + c1) + s1)
        return x + g2 * mlp(_norm(x, 1) * (1 + c2) + s2)

    @mistake("the residual is missing: gate * branch *replaces* x; add it to x")
    def no_residual(x, emb, weight, bias, attention, mlp):
        s1, c1, g1, s2, c2, g2 = _six(emb, weight, bias)
        x = g1 * attention(_norm(x) * (1 + c1) + s1)
        return g2 * mlp(_norm(x) * (1 + c2) + s2)

    @mistake("the MLP is asked about the x from before attention: both branches side by side; it comes second, on the new x")
    def side_by_side(x, emb, weight, bias, attention, mlp):
        six = _six(emb, weight, bias)
        return _branch(x, *six[:3], attention) + _branch(x, *six[3:], mlp) - x

    @law("with weight and bias 0, as at the start, the block must give x back")
    def identity_at_the_start(case: Case, out: Outputs) -> bool:
        return bool(case["weight"].any()) or close(out["out"], case["x"])

    @law("attention is not asked about norm(x) * (1 + scale1) + shift1")
    def attention_is_asked(case: Case, out: Outputs) -> bool:
        return _near(out["attention_is_asked"], _asked(case, T(case["x"]), 0))

    @law(
        "attention is asked as it should be; the MLP is not asked about norm(x) * (1 + scale2) + shift2, with x + gate1 attention(...) as x"
    )
    def mlp_is_asked(case: Case, out: Outputs) -> bool:
        return _near(out["mlp_is_asked"], _asked(case, _after_attention(case), 3))

    @law("both branches are asked as they should be; the result is not x + gate1 attention(...) + gate2 mlp(...)")
    def sum_of_branches(case: Case, out: Outputs) -> bool:
        gate, said = _of(case)[5], _Branch(T(case["mlp"]), False)(T(out["mlp_is_asked"]))
        return _near(out["out"], _after_attention(case) + gate * said)


def _near(found: np.ndarray, wanted: Tensor) -> bool:
    return bool(np.abs(found - wanted.numpy()).max() < 1e-4)


def _of(case: Case) -> tuple[Tensor, ...]:
    return _six(*(T(case[name]) for name in ("emb", "weight", "bias")))


def _asked(case: Case, x: Tensor, first: int) -> Tensor:
    shift, scale = _of(case)[first : first + 2]
    return _norm(x) * (1 + scale) + shift


def _after_attention(case: Case) -> Tensor:
    return _branch(T(case["x"]), *_of(case)[:3], _Branch(T(case["attention"]), True))


# --- 05.5 ----------------------------------------------------------------------------------------------


def _cut(x: Tensor, size: int, order: tuple[int, ...] = (0, 2, 4, 1, 3, 5)) -> Tensor:
    """Tokens of x, its axes (B, C, row, y, column, x) put in this order; the last three are those of a token."""
    B, C, H, W = x.shape
    parts = x.reshape(B, C, H // size, size, W // size, size).permute(order)
    return parts.reshape(B, -1, C * size**2)


def _paste(tokens: Tensor, size: int, like: Tensor, sizes: str = "rkcyx") -> Tensor:
    """The picture of tokens; `sizes` names what the axes of (B, N, C size^2) count: row r, column k, channel c, y and x."""
    H, W = like.shape[-2:]
    lengths = {"r": H // size, "k": W // size, "c": tokens.shape[-1] // size**2, "y": size, "x": size}
    parts = tokens.reshape(len(tokens), *(lengths[name] for name in sizes))
    return parts.permute(0, *(1 + sizes.index(name) for name in "crykx")).reshape(len(tokens), -1, H, W)


@item(
    "05.5", title="Pictures as tokens, and back", function="patches", points=1, minutes=15, difficulty=2,
    answers=("course_lib.nets.dit.patchify", "course_lib.nets.dit.unpatchify"),
    hints=(
        "Cut both long axes in two: x.reshape(B, C, H // size, size, W // size, size) is (B, C, row, y, column, x).",
        "A token's place is (row, column) and its numbers are (C, y, x): permute to (B, row, column, C, y, x), then flatten the two and the three.",
        "The way back is the same in reverse: reshape to (B, row, column, C, y, x), permute(0, 3, 1, 4, 2, 5), and join the axes in pairs.",
    ),
)  # fmt: skip
class Patches:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, int, int, int], size: int) -> Case:
            B, C, H, W = shape
            tokens = rng.normal(size=(B, H * W // size**2, C * size**2))
            return {"x": rng.normal(size=shape), "tokens": tokens, "size": size}

        return [case((2, 3, 4, 6), 2), case((1, 2, 9, 6), 3), case((2, 4, 4, 4), 2), case((2, 2, 2, 3), 1)]

    def drive(fn, case: Case) -> Outputs:
        return arrays(**named(call(fn, T(case["x"]), T(case["tokens"]), case["size"]), "cut", "pasted"))

    def reference(x: Tensor, tokens: Tensor, size: int) -> tuple[Tensor, Tensor]:
        return dit.patchify(x, size), dit.unpatchify(tokens, size, x.shape[-2:])

    @mistake("the tokens go column by column, and so does the way back: each undoes the other, but tokens run row by row")
    def column_by_column(x, tokens, size):
        return _cut(x, size, (0, 4, 2, 1, 3, 5)), _paste(tokens, size, x, "krcyx")

    @mistake(
        "within a token the channel comes *last*, (y, x, C), both ways: that is the order of some published weights, not of this item: (C, y, x)"
    )
    def channel_last(x, tokens, size):
        return _cut(x, size, (0, 2, 4, 3, 5, 1)), _paste(tokens, size, x, "rkyxc")

    @mistake("patches are transposed, (C, x, y) in a token: y, the row within the patch, comes before x")
    def patch_transposed(x, tokens, size):
        return _cut(x, size, (0, 2, 4, 1, 5, 3)), _paste(tokens, size, x, "rkcxy")

    @mistake(
        "x and the tokens are only reshaped: the numbers of a token are then neighbours in memory, pieces of single rows, and not a square; permute"
    )
    def only_reshaped(x, tokens, size):
        return x.reshape(tokens.shape), tokens.reshape(x.shape)

    @mistake(
        "a token holds every (H / size)-th row and (W / size)-th column, spread over the picture: cut an axis as (row, y), long part first, not as (y, row)"
    )
    def spread_over_the_picture(x, tokens, size):
        B, C, H, W = x.shape
        cut = x.reshape(B, C, size, H // size, size, W // size).permute(0, 3, 5, 1, 2, 4).reshape(tokens.shape)
        parts = tokens.reshape(B, H // size, W // size, C, size, size)
        return cut, parts.permute(0, 3, 4, 1, 5, 2).reshape(x.shape)

    @mistake("x is cut as it should be; on the way back the tokens are only reshaped: undo the permutation as well")
    def way_back_not_permuted(x, tokens, size):
        return _cut(x, size), tokens.reshape(x.shape)

    @mistake("x is cut as it should be; on the way back the tokens are laid out column by column")
    def back_by_columns(x, tokens, size):
        return _cut(x, size), _paste(tokens, size, x, "krcyx")

    @mistake(
        "x is cut as it should be; the way back takes the channel of a token's numbers last, (y, x, C): both must agree on (C, y, x)"
    )
    def back_with_channel_last(x, tokens, size):
        return _cut(x, size), _paste(tokens, size, x, "rkyxc")

    @mistake("x is cut as it should be; on the way back each patch is transposed")
    def back_with_patches_transposed(x, tokens, size):
        return _cut(x, size), _paste(tokens, size, x, "rkcxy")

    @mistake("the way back is right; x is cut column by column, so that the two no longer undo one another")
    def cut_by_columns(x, tokens, size):
        return _cut(x, size, (0, 4, 2, 1, 3, 5)), _paste(tokens, size, x)

    @mistake("the way back is right; x is cut with the channel last, (y, x, C): both must agree on (C, y, x)")
    def cut_with_channel_last(x, tokens, size):
        return _cut(x, size, (0, 2, 4, 3, 5, 1)), _paste(tokens, size, x)

    @mistake("the pair is turned round: return the tokens of x first, then the picture of `tokens`")
    def pair_turned(x, tokens, size):
        return _paste(tokens, size, x), _cut(x, size)

    @law("the tokens of x must hold the same numbers as x, in another order")
    def same_numbers(case: Case, out: Outputs) -> bool:
        return close(np.sort(out["cut"].ravel()), np.sort(case["x"].ravel()))

    @law("the first token of x must be its upper left patch, with the numbers in the order (C, y, x)")
    def first_patch(case: Case, out: Outputs) -> bool:
        size = case["size"]
        return close(out["cut"][:, 0], case["x"][:, :, :size, :size].reshape(len(case["x"]), -1))

    @law("the second token of x must be the patch to the *right* of the first: row by row")
    def second_patch(case: Case, out: Outputs) -> bool:
        size = case["size"]
        return close(out["cut"][:, 1], case["x"][:, :, :size, size : 2 * size].reshape(len(case["x"]), -1))

    @law("the first tokens of x are right; the others are not its patches, row by row")
    def all_patches(case: Case, out: Outputs) -> bool:
        return close(out["cut"], _cut(T(case["x"]), case["size"]).numpy())

    @law("x is cut as it should be; the picture of `tokens`, cut in the same way, must give `tokens` back")
    def inverse(case: Case, out: Outputs) -> bool:
        return close(_cut(T(out["pasted"]), case["size"]).numpy(), case["tokens"])
