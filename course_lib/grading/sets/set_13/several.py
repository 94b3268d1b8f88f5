"""Item 13.5: several controls of one network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_13.common import Control, Net, asked_case, tensors, times, unchanged
from course_lib.grading.sets.tools import T, fit

Maps = Sequence[Tensor | None]


def _found(controls, x: Tensor, t: Tensor, text: Tensor, maps: Maps) -> list[list[Tensor] | None]:
    """The residuals of each control that is given a map."""
    return [None if c is None else control(x, t, text, c) for control, c in zip(controls, maps, strict=True)]


def _sum(found: Sequence[list[Tensor] | None], weights: Sequence[float]) -> list[Tensor] | None:
    """sum_k w_k r_ki for each i; None where nothing was found."""
    given = [times(residuals, [w] * len(residuals)) for residuals, w in zip(found, weights, strict=True) if residuals is not None]
    return [sum(parts) for parts in zip(*given, strict=True)] or None


@item(
    "13.5", title="Several controls", function="composed", points=2, minutes=15, difficulty=2,
    answers=("course_lib.nets.control.Controlled.forward", "course_lib.nets.control.scaled"),
    hints=(
        "Each control that has a map gives a list of residuals, one for each feature. They are added feature by feature, and the network is called once, with the sums.",
        "total = None; for control, c, w in zip(controls, maps, weights): where c is None, continue. Then residuals = [w * r for r in control(x, t, text, c)].",
        "total = residuals if total is None else [a + b for a, b in zip(total, residuals)]; net(x, t, text, total). Nothing is divided by the number of controls.",
    ),
)  # fmt: skip
class Several:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], *given: bool) -> Case:
            drawn = asked_case(rng, shape, len(given))
            return drawn | {
                "given": [int(one) for one in given],
                "weights": [float(w) for w in rng.uniform(0.4, 1.2, len(given))],
            }

        return [case((2, 2, 2, 3), True, True), case((3, 2, 2, 2), True, False, True), case((2, 3, 2, 2), False, False)]

    def drive(fn, case: Case) -> Outputs:
        net, controls = Net(), [Control(k) for k in range(len(case["given"]))]
        maps = [c.clone() if one else None for c, one in zip(T(case["c"]), case["given"], strict=True)]
        with torch.no_grad(), unchanged(maps):
            said = call(fn, net, controls, maps, case["weights"], *tensors(case, "x", "t", "text"))
        return arrays(prediction=said, calls=net.calls)

    def reference(net, controls, maps: Maps, weights: Sequence[float], x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return net(x, t, text, _sum(_found(controls, x, t, text, maps), weights))

    @mistake(
        "the *answers* are averaged, one for each control: each of them knows nothing of the others; add the residuals, and ask once"
    )
    def answers_averaged(net, controls, maps, weights, x, t, text):
        each = [
            None if r is None else times(r, [w] * len(r))
            for r, w in zip(_found(controls, x, t, text, maps), weights, strict=True)
        ]
        given = [r for r in each if r is not None] or [None]
        return sum(net(x, t, text, r) for r in given) / len(given)

    @mistake(
        "the *answers* are composed, the plain one and w times what each control changes in it: that is guidance, and asks the network once more for each; add the residuals"
    )
    def answers_composed(net, controls, maps, weights, x, t, text):
        plain = net(x, t, text)
        found = zip(_found(controls, x, t, text, maps), weights, strict=True)
        return plain + sum(w * (net(x, t, text, r) - plain) for r, w in found if r is not None)

    @mistake("the sums are divided by the number of controls: with each further one all others grow weaker; add them")
    def residuals_averaged(net, controls, maps, weights, x, t, text):
        n = max(1, sum(c is not None for c in maps))
        return net(x, t, text, _sum(_found(controls, x, t, text, maps), [w / n for w in weights]))

    @mistake("the weights are divided by their sum: they are scales, each of its own control, and need not add up to 1")
    def weights_normalised(net, controls, maps, weights, x, t, text):
        total = sum(w for w, c in zip(weights, maps, strict=True) if c is not None)
        return net(x, t, text, _sum(_found(controls, x, t, text, maps), [w / (total or 1) for w in weights]))

    @mistake("the weights are not used")
    def weights_ignored(net, controls, maps, weights, x, t, text):
        return net(x, t, text, _sum(_found(controls, x, t, text, maps), [1.0] * len(weights)))

    @mistake("the *maps* are multiplied by the weights: half a map is another map, in grey; the residuals are")
    def maps_weighted(net, controls, maps, weights, x, t, text):
        paler = [None if c is None else w * c for c, w in zip(maps, weights, strict=True)]
        return net(x, t, text, _sum(_found(controls, x, t, text, paler), [1.0] * len(weights)))

    @mistake(
        "a control without a map is given an empty one, of zeros: that is a statement too (here is no edge; all is far away), and it answers. Leave it out"
    )
    def blank_map(net, controls, maps, weights, x, t, text):
        blank = x.new_zeros(len(x), 1, *x.shape[2:])
        full = [blank if c is None else c for c in maps]
        return net(x, t, text, _sum(_found(controls, x, t, text, full), weights))

    @mistake(
        "None is dropped from the maps and not from the weights: behind it each control has the weight of another; zip all three first, then skip"
    )
    def weights_slip(net, controls, maps, weights, x, t, text):
        found = [r for r in _found(controls, x, t, text, maps) if r is not None]
        return net(x, t, text, _sum(found, weights[: len(found)]))

    @mistake(
        "None is dropped from the maps and not from the controls: behind it each map goes to the control of another; zip all three first, then skip"
    )
    def controls_slip(net, controls, maps, weights, x, t, text):
        given = [c for c in maps if c is not None]
        found = _found(controls[: len(given)], x, t, text, given)
        return net(x, t, text, _sum(found, [w for w, c in zip(weights, maps, strict=True) if c is not None]))

    @mistake("only the last control is heard: each overwrites the one before; add them up")
    def last_one(net, controls, maps, weights, x, t, text):
        found = [(r, w) for r, w in zip(_found(controls, x, t, text, maps), weights, strict=True) if r is not None]
        return net(x, t, text, _sum(*zip(*found[-1:], strict=True)) if found else None)

    @mistake("only the first control is heard; add them all up")
    def first_one(net, controls, maps, weights, x, t, text):
        found = [(r, w) for r, w in zip(_found(controls, x, t, text, maps), weights, strict=True) if r is not None]
        return net(x, t, text, _sum(*zip(*found[:1], strict=True)) if found else None)

    @mistake("the residuals are multiplied with each other: where one is 0 the others are lost; add them")
    def multiplied(net, controls, maps, weights, x, t, text):
        found = zip(_found(controls, x, t, text, maps), weights, strict=True)
        given = [times(r, [w] * len(r)) for r, w in found if r is not None]
        product = [torch.stack(parts).prod(0) for parts in zip(*given, strict=True)]
        return net(x, t, text, product or None)

    @mistake("all maps go to the first control: each belongs to the control that was trained on maps of its kind")
    def one_control_for_all(net, controls, maps, weights, x, t, text):
        return net(x, t, text, _sum(_found([controls[0]] * len(maps), x, t, text, maps), weights))

    @mistake("the middle's residual, the last of each list, is left out: add up all of them")
    def middle_forgotten(net, controls, maps, weights, x, t, text):
        total = _sum(_found(controls, x, t, text, maps), weights)
        return net(x, t, text, None if total is None else [*total[:-1], torch.zeros_like(x)])

    @law("the network must be called once, whatever the number of controls")
    def called_once(case: Case, out: Outputs) -> bool:
        return out["calls"] == 1

    @law("without any map the answer must be the network's own")
    def nothing_given(case: Case, out: Outputs) -> bool:
        return any(case["given"]) or close(out["prediction"], _plain(case))

    @law("this is a blend of answers, each with one of the controls: what is to be added are residuals, before the decoder")
    def no_blend_of_answers(case: Case, out: Outputs) -> bool:
        if sum(case["given"]) < 2:
            return True
        with torch.no_grad():
            x, t, text = tensors(case, "x", "t", "text")
            alone = [
                Net()(x, t, text, times(Control(k)(x, t, text, T(case["c"][k])), [w] * 4)).numpy()
                for k, w in enumerate(case["weights"])
                if case["given"][k]
            ]
        return fit(out["prediction"], _plain(case), *alone)[1] > 1e-8


def _plain(case: Case) -> np.ndarray:
    """The network's own answer."""
    with torch.no_grad():
        return Net()(*tensors(case, "x", "t", "text")).numpy()
