"""Item 06.9: a step of a sampler that can be run backwards, wired as a coupling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, named

Body = Callable[[Tensor], Tensor]


class _Body:
    """A map that keeps the shape, and has no inverse: several pictures give the same."""

    def __init__(self, weight: np.ndarray):
        self.weight = T(weight)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] != len(self.weight):
            raise Unacceptable(f"f is asked with shape {tuple(x.shape)}; expected that of a, (B, {len(self.weight)})")
        return torch.sin(2 * x @ self.weight) + x.abs()


def _ahead(f: Body, a: Tensor, b: Tensor, v: float) -> tuple[Tensor, Tensor]:
    return (1 - v) * f(a) + v * b, a.clone()


def _back(f: Body, c: Tensor, d: Tensor, v: float) -> tuple[Tensor, Tensor]:
    return d.clone(), (c - (1 - v) * f(d)) / v


@item(
    "06.9", title="A reversible step", function="wired", points=2, minutes=20, difficulty=2,
    answers=("course_lib.nets.reversible.Coupling", "course_lib.nets.reversible.couple"),
    hints=(
        "Ahead: the new first one is (1 - v) f(a) + v b, the new second one is a as it was.",
        "Back: (c, d) came of some (a, b). d is what a was, so a = d, and f can be asked about it: f need not be inverted.",
        "c = (1 - v) f(a) + v b gives b = (c - (1 - v) f(d)) / v.",
    ),
)  # fmt: skip
class Wired:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(B: int, n: int, v: float) -> Case:
            draws = rng.normal(size=(4, B, n))
            return {"weight": rng.normal(size=(n, n)), "v": v, **dict(zip("abcd", draws, strict=True))}

        there_and_back = case(2, 4, float(rng.uniform(0.25, 0.4)))
        c, d = _ahead(_Body(there_and_back["weight"]), T(there_and_back["a"]), T(there_and_back["b"]), there_and_back["v"])
        return [case(3, 5, float(rng.uniform(0.6, 0.8))), there_and_back | {"c": c.numpy(), "d": d.numpy()}]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, _Body(case["weight"]), *(T(case[name]) for name in "abcd"), case["v"])
        return arrays(**named(result, "a_ahead", "b_ahead", "a_back", "b_back"))

    def reference(f: Body, a: Tensor, b: Tensor, c: Tensor, d: Tensor, v: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *_ahead(f, a, b, v), *_back(f, c, d, v)

    @mistake("the weights are exchanged, v f(a) + (1 - v) b, ahead and back; v is the share of b, by which the way back divides")
    def weights_exchanged(f, a, b, c, d, v):
        return *_ahead(f, a, b, 1 - v), *_back(f, c, d, 1 - v)

    @mistake("the weight 1 - v of f is missing, ahead and back: f(a) + v b")
    def weight_forgotten(f, a, b, c, d, v):
        return f(a) + v * b, a.clone(), d.clone(), (c - f(d)) / v

    @mistake(
        "v is not used, f(a) + b: that is the plain additive coupling (Gomez et al. 2017); here the two are mixed, 1 - v and v"
    )
    def plain_coupling(f, a, b, c, d, v):
        return f(a) + b, a.clone(), d.clone(), c - f(d)

    @mistake("ahead, f is asked about b and a is mixed in: (1 - v) f(b) + v a; f moves a, the newer of the two")
    def body_of_the_older(f, a, b, c, d, v):
        return (1 - v) * f(b) + v * a, a.clone(), *_back(f, c, d, v)

    @mistake("ahead, the second one stays b: a is then lost, and no way leads back; it becomes the a of before")
    def newer_lost(f, a, b, c, d, v):
        return (1 - v) * f(a) + v * b, b.clone(), *_back(f, c, d, v)

    @mistake("back, f is asked about c; only d is known to be what f has seen: a = d")
    def body_of_c(f, a, b, c, d, v):
        return *_ahead(f, a, b, v), d.clone(), (c - (1 - v) * f(c)) / v

    @mistake("back, the division by v is missing: c - (1 - v) f(d) is v b")
    def division_forgotten(f, a, b, c, d, v):
        return *_ahead(f, a, b, v), d.clone(), c - (1 - v) * f(d)

    @mistake("back, the difference is divided by 1 - v; it is b's own share, v, that has to go")
    def divided_by_the_other(f, a, b, c, d, v):
        return *_ahead(f, a, b, v), d.clone(), (c - (1 - v) * f(d)) / (1 - v)

    @mistake("back, (1 - v) f(d) is added; ahead it was added, back it is taken off")
    def sign_turned(f, a, b, c, d, v):
        return *_ahead(f, a, b, v), d.clone(), (c + (1 - v) * f(d)) / v

    @mistake("back, the weight 1 - v of f is missing: (c - f(d)) / v")
    def weight_missing_on_the_way_back(f, a, b, c, d, v):
        return *_ahead(f, a, b, v), d.clone(), (c - f(d)) / v

    @mistake("back, only c is divided by v: the whole difference is, (c - (1 - v) f(d)) / v")
    def bracket_forgotten(f, a, b, c, d, v):
        return *_ahead(f, a, b, v), d.clone(), c / v - (1 - v) * f(d)

    @mistake("back, the two come in the wrong order: first a = d, then b")
    def back_exchanged(f, a, b, c, d, v):
        return *_ahead(f, a, b, v), *reversed(_back(f, c, d, v))

    @mistake("ahead, the two come in the wrong order: first what is new, (1 - v) f(a) + v b, then a")
    def ahead_exchanged(f, a, b, c, d, v):
        return *reversed(_ahead(f, a, b, v)), *_back(f, c, d, v)

    @mistake("the way back is the way ahead once more, of (c, d); it has to undo it")
    def ahead_twice(f, a, b, c, d, v):
        return *_ahead(f, a, b, v), *_ahead(f, c, d, v)

    @law("ahead, the second one must be a, as it was")
    def newer_kept(case: Case, out: Outputs) -> bool:
        return close(out["b_ahead"], case["a"])

    @law("ahead, the first one must be (1 - v) f(a) + v b")
    def mixed(case: Case, out: Outputs) -> bool:
        said = _Body(case["weight"])(T(case["a"])).numpy()
        return close(out["a_ahead"], (1 - case["v"]) * said + case["v"] * case["b"])

    @law("the way ahead is right; the way back must give a pair that it takes to (c, d)")
    def undone(case: Case, out: Outputs) -> bool:
        c, d = _ahead(_Body(case["weight"]), T(out["a_back"]), T(out["b_back"]), case["v"])
        return close(c.numpy(), case["c"]) and close(d.numpy(), case["d"])
