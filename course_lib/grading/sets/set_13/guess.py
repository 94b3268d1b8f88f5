"""Item 13.6: guess mode, where there is no prompt and the map must say all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close, factors
from course_lib.grading.sets.set_13.common import LAYERS, Control, Net, asked_case, tensors, times
from course_lib.grading.sets.tools import T, named


def _weights(L: int, lowest: float) -> Tensor:
    """From lowest to 1, even in logarithm, (L,)."""
    return torch.logspace(float(np.log10(lowest)), 0, L, dtype=torch.float64)


def _pair(net, control, x: Tensor, t: Tensor, c: Tensor, empty: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What the network says with these shares of the residuals, and without any."""
    return net(x, t, empty, times(control(x, t, empty, c), weights)), net(x, t, empty)


def _guided(told: Tensor, untold: Tensor, w: float) -> Tensor:
    return untold + w * (told - untold)


def _with(weights: Tensor, net, control, x: Tensor, t: Tensor, c: Tensor, empty: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """The weights, and the answer that they give."""
    return weights, _guided(*_pair(net, control, x, t, c, empty, weights), w)


@item(
    "13.6", title="Guess mode", function="guess_mode", points=2, minutes=15, difficulty=2,
    answers=("course_lib.nets.control.guess", "course_lib.nets.control.scaled", "course_lib.guidance.free.cfg"),
    hints=(
        "Even in logarithm: the *ratio* of neighbours is the same. weights[i] = lowest ** (1 - i / (L - 1)), from lowest at i = 0 to 1 at the middle.",
        "Both halves have the empty text, and so has the control. told: net with the weighted residuals; untold: net without residuals.",
        "residuals = [w_i * r for w_i, r in zip(weights, control(x, t, empty, c))]; untold + w * (told - untold).",
    ),
)  # fmt: skip
class GuessMode:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...]) -> Case:
            scales = {"w": float(rng.uniform(2.0, 5.0)), "lowest": float(rng.uniform(0.05, 0.3))}
            return asked_case(rng, shape) | scales

        return [case((2, 2, 2, 3)), case((3, 3, 2, 2))]

    def drive(fn, case: Case) -> Outputs:
        with torch.no_grad():
            result = call(fn, Net(), Control(), *tensors(case, "x", "t", "c", "empty"), case["w"], case["lowest"])
        return arrays(**named(result, "weights", "prediction"))

    def reference(net, control, x: Tensor, t: Tensor, c: Tensor, empty: Tensor, w: float, lowest: float) -> tuple[Tensor, Tensor]:
        residuals = control(x, t, empty, c)  # of any network: the notebook's cells use this until the student's is right
        weights = _weights(len(residuals), lowest)
        told = net(x, t, empty, times(residuals, [s.to(residuals[0]) for s in weights]))
        return weights, _guided(told, net(x, t, empty), w)

    @mistake("the weights are evenly spaced themselves; it is their *logarithms* that are: lowest ** (1 - i / (L - 1))")
    def evenly_spaced(net, control, x, t, c, empty, w, lowest):
        return _with(torch.linspace(lowest, 1, LAYERS).double(), net, control, x, t, c, empty, w)

    @mistake("the weights run the other way: the finest feature, residual 0, gets the lowest, and the middle 1")
    def other_way(net, control, x, t, c, empty, w, lowest):
        return _with(_weights(LAYERS, lowest).flip(0), net, control, x, t, c, empty, w)

    @mistake("torch.logspace takes exponents of 10, and `lowest` is no exponent: torch.logspace(math.log10(lowest), 0, L)")
    def lowest_as_exponent(net, control, x, t, c, empty, w, lowest):
        return _with(torch.logspace(lowest, 0, LAYERS, dtype=torch.float64), net, control, x, t, c, empty, w)

    @mistake(
        "the exponents are those of e and the base is 10: torch.logspace with math.log; take math.log10, or torch.linspace(...).exp()"
    )
    def natural_exponents(net, control, x, t, c, empty, w, lowest):
        weights = torch.logspace(float(np.log(lowest)), 0, LAYERS, dtype=torch.float64)
        return _with(weights, net, control, x, t, c, empty, w)

    @mistake("the middle does not get 1: with L weights there are L - 1 ratios between them, lowest ** (1 - i / (L - 1))")
    def never_one(net, control, x, t, c, empty, w, lowest):
        return _with(_weights(LAYERS + 1, lowest)[:-1], net, control, x, t, c, empty, w)

    @mistake("the finest feature does not get `lowest`, but the next of the row: i counts from 0")
    def never_lowest(net, control, x, t, c, empty, w, lowest):
        return _with(_weights(LAYERS + 1, lowest)[1:], net, control, x, t, c, empty, w)

    @mistake(
        "the kept features share the row from lowest to 1 among them, and the middle has 1 as well; it is the last of *one* row"
    )
    def middle_apart(net, control, x, t, c, empty, w, lowest):
        weights = torch.cat([_weights(LAYERS - 1, lowest), torch.ones(1).double()])
        return _with(weights, net, control, x, t, c, empty, w)

    @mistake("the weights are divided by their sum: they are shares of each residual, not of one whole; the middle keeps 1")
    def normalised(net, control, x, t, c, empty, w, lowest):
        weights = _weights(LAYERS, lowest)
        return _with(weights / weights.sum(), net, control, x, t, c, empty, w)

    @mistake("the weights are right, but not used: the residuals are added in full")
    def not_used(net, control, x, t, c, empty, w, lowest):
        prediction = _guided(*_pair(net, control, x, t, c, empty, torch.ones(LAYERS)), w)
        return _weights(LAYERS, lowest), prediction

    @mistake(
        "both halves are told the map: they are the same then, since the text is too, and w multiplies 0. The map is the only thing that guidance could strengthen: only one half gets it"
    )
    def both_halves(net, control, x, t, c, empty, w, lowest):
        weights = _weights(LAYERS, lowest)
        return weights, _pair(net, control, x, t, c, empty, weights)[0]

    @mistake("the halves are exchanged: guidance leads *away* from the map; untold + w (told - untold)")
    def away_from_the_map(net, control, x, t, c, empty, w, lowest):
        weights = _weights(LAYERS, lowest)
        return weights, _guided(*reversed(_pair(net, control, x, t, c, empty, weights)), w)

    @mistake("this is told + w (told - untold), in which w = 0 gives told; here w = 1 does")
    def other_convention(net, control, x, t, c, empty, w, lowest):
        weights = _weights(LAYERS, lowest)
        return weights, _guided(*_pair(net, control, x, t, c, empty, weights), w + 1)

    @mistake("the *residuals* are multiplied by w, and the network is asked once: guidance extrapolates its answers")
    def residuals_guided(net, control, x, t, c, empty, w, lowest):
        weights = _weights(LAYERS, lowest)
        return weights, _pair(net, control, x, t, c, empty, w * weights)[0]

    @mistake(
        "the other half is told an empty map, of zeros: that is a map like others (nothing anywhere); it gets no residuals at all"
    )
    def blank_map(net, control, x, t, c, empty, w, lowest):
        weights = _weights(LAYERS, lowest)
        told, blank = (_pair(net, control, x, t, one, empty, weights)[0] for one in (c, 0 * c))
        return weights, _guided(told, blank, w)

    @mistake("the other half has no weights, and the whole control: it gets no residuals at all")
    def unweighted_reference(net, control, x, t, c, empty, w, lowest):
        weights = _weights(LAYERS, lowest)
        told, full = (_pair(net, control, x, t, c, empty, one)[0] for one in (weights, torch.ones(LAYERS)))
        return weights, _guided(told, full, w)

    @law("the weights must rise from `lowest` to 1 by the same ratio from each to the next")
    def one_ratio(case: Case, out: Outputs) -> bool:
        ratios = out["weights"][1:] / out["weights"][:-1]
        return close(ratios, ratios.mean()) and close(out["weights"][[0, -1]], [case["lowest"], 1])

    @law("the prediction must be made of two answers: with the weighted residuals and without any, both to the empty text")
    def made_of_two(case: Case, out: Outputs) -> bool:
        return factors(out["prediction"], *_answers(case)) is not None

    @law("the factors of the two answers do not fit: w before that with the map, 1 - w before the other")
    def guidance_fits(case: Case, out: Outputs) -> bool:
        found = factors(out["prediction"], *_answers(case))
        return found is None or close(found, [case["w"], 1 - case["w"]])


def _answers(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What the network says with the right residuals and without any."""
    with torch.no_grad():
        weights = _weights(LAYERS, case["lowest"])
        pair = _pair(Net(), Control(), *(T(case[name]) for name in ("x", "t", "c", "empty")), weights)
    return pair[0].numpy(), pair[1].numpy()
