"""Item 13.7: a control under classifier-free guidance, in one call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close, factors
from course_lib.grading.sets.set_13.common import Control, Net, asked_case, tensors, times

Residuals = list[Tensor]


def _none(residuals: Residuals) -> Residuals:
    return [torch.zeros_like(r) for r in residuals]


def _guided(cond: Tensor, ref: Tensor, w: float) -> Tensor:
    return ref + w * (cond - ref)


def _once(net, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, cond: Residuals, ref: Residuals) -> tuple[Tensor, Tensor]:
    """Both answers by one call: that to the text with the residuals `cond`, that to the empty one with `ref`."""
    residuals = [torch.cat(pair) for pair in zip(cond, ref, strict=True)]
    return net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, empty]), residuals).chunk(2)


def _found(control, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, c: Tensor, both: bool) -> tuple[Residuals, Residuals]:
    """The residuals of both halves."""
    cond, ref = control(x, t, text, c), control(x, t, empty, c)
    return cond, ref if both else _none(ref)


@item(
    "13.7", title="Control under guidance", function="controlled_cfg", points=2, minutes=20, difficulty=2,
    answers=("course_lib.nets.control.Controlled.forward", "course_lib.nets.control.scaled", "course_lib.guidance.free.cfg"),
    hints=(
        "Twice as many rows: torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, empty]), torch.cat([c, c]). The control hears in each row the same text as the network.",
        "Where `both` is False the rows of the empty text get no control: their residuals times 0, and not a map of zeros. scale = torch.cat([ones, ones if both else zeros]) as (2 B, 1, 1, 1).",
        "cond, ref = net(...).chunk(2), in the order in which you put them together; ref + w * (cond - ref).",
    ),
)  # fmt: skip
class UnderGuidance:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], both: bool) -> Case:
            return asked_case(rng, shape) | {"both": int(both), "w": float(rng.uniform(2.0, 5.0))}

        return [case((2, 2, 2, 3), True), case((3, 3, 2, 2), False)]

    def drive(fn, case: Case) -> Outputs:
        net = Net()
        with torch.no_grad():
            given = tensors(case, "x", "t", "text", "empty", "c")
            said = call(fn, net, Control(), *given, case["w"], bool(case["both"]))
        return arrays(prediction=said, calls=net.calls)

    def reference(
        net, control, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, c: Tensor, w: float, both: bool
    ) -> Tensor:  # fmt: skip
        return _guided(*_once(net, x, t, text, empty, *_found(control, x, t, text, empty, c, both)), w)

    @mistake(
        "the halves come back in the other order than they were put in: guidance leads away from the text (and from the map)"
    )
    def halves_exchanged(net, control, x, t, text, empty, c, w, both):
        return _guided(*reversed(_once(net, x, t, text, empty, *_found(control, x, t, text, empty, c, both))), w)

    @mistake(
        "the map is in both halves, whatever `both` says: where it is False guidance is to strengthen the map too, and the half of the empty text gets no residuals"
    )
    def always_both(net, control, x, t, text, empty, c, w, both):
        return _guided(*_once(net, x, t, text, empty, *_found(control, x, t, text, empty, c, True)), w)

    @mistake("the map is in one half, whatever `both` says: where it is True the half of the empty text gets residuals too")
    def always_one(net, control, x, t, text, empty, c, w, both):
        return _guided(*_once(net, x, t, text, empty, *_found(control, x, t, text, empty, c, False)), w)

    @mistake("`both` is read the wrong way round")
    def flag_turned(net, control, x, t, text, empty, c, w, both):
        return _guided(*_once(net, x, t, text, empty, *_found(control, x, t, text, empty, c, not both)), w)

    @mistake("where the map is in one half alone, it is in that of the *empty* text: guidance then leads away from it")
    def in_the_wrong_half(net, control, x, t, text, empty, c, w, both):
        cond, ref = _found(control, x, t, text, empty, c, True)
        return _guided(*_once(net, x, t, text, empty, cond if both else _none(cond), ref), w)

    @mistake(
        "the half without control is given a map of zeros: that is a map too, and the control answers it; its *residuals* must be 0"
    )
    def blank_map(net, control, x, t, text, empty, c, w, both):
        cond, ref = control(x, t, text, c), control(x, t, empty, c if both else 0 * c)
        return _guided(*_once(net, x, t, text, empty, cond, ref), w)

    @mistake("the control hears the text in both halves: in each row it is asked with the same text as the network")
    def control_hears_the_text(net, control, x, t, text, empty, c, w, both):
        return _guided(*_once(net, x, t, text, empty, *_found(control, x, t, text, text, c, both)), w)

    @mistake("the control hears the empty text in both halves: in each row it is asked with the same text as the network")
    def control_hears_nothing(net, control, x, t, text, empty, c, w, both):
        return _guided(*_once(net, x, t, text, empty, *_found(control, x, t, empty, empty, c, both)), w)

    @mistake("the answers of the two halves are right, but from two calls; put the rows together, and ask once")
    def two_calls(net, control, x, t, text, empty, c, w, both):
        cond, ref = _found(control, x, t, text, empty, c, both)
        return _guided(net(x, t, text, cond), net(x, t, empty, ref), w)

    @mistake("this is cond + w (cond - ref), in which w = 0 gives cond; here w = 1 does")
    def other_convention(net, control, x, t, text, empty, c, w, both):
        return _guided(*_once(net, x, t, text, empty, *_found(control, x, t, text, empty, c, both)), w + 1)

    @mistake("there is no guidance: this is the answer to the text alone, as with w = 1")
    def no_guidance(net, control, x, t, text, empty, c, w, both):
        return _once(net, x, t, text, empty, *_found(control, x, t, text, empty, c, both))[0]

    @mistake(
        "the rows are interleaved on the way in (repeat_interleave), and cut into halves on the way out: samples and halves are mixed up; torch.cat([x, x])"
    )
    def interleaved(net, control, x, t, text, empty, c, w, both):
        x, t, c = (one.repeat_interleave(2, 0) for one in (x, t, c))
        told = torch.stack([text, empty], 1).flatten(0, 1)
        on = torch.tensor([1.0, float(both)]).double().repeat(len(x) // 2)
        return _guided(*net(x, t, told, times(control(x, t, told, c), [on[:, None, None, None]] * 4)).chunk(2), w)

    @mistake("the *residuals* are guided, and the network is asked once with the text: guidance extrapolates its answers")
    def residuals_guided(net, control, x, t, text, empty, c, w, both):
        cond, ref = _found(control, x, t, text, empty, c, both)
        return net(x, t, text, [_guided(*pair, w) for pair in zip(cond, ref, strict=True)])

    @mistake("what the control adds to the half of the text is multiplied by w as well: w acts on the answers alone")
    def scaled_by_w(net, control, x, t, text, empty, c, w, both):
        cond, ref = _found(control, x, t, text, empty, c, both)
        return _guided(*_once(net, x, t, text, empty, [w * r for r in cond], ref), w)

    @mistake("the text is in both halves, and only the map differs: the other half has the empty text")
    def text_in_both(net, control, x, t, text, empty, c, w, both):
        return _guided(*_once(net, x, t, text, text, *_found(control, x, t, text, text, c, both)), w)

    @law("the network must be called once, with 2 B rows")
    def called_once(case: Case, out: Outputs) -> bool:
        return out["calls"] == 1

    @law(
        "the prediction must be made of two answers: to the text, with the control, and to the empty text, with the control where `both` is true"
    )
    def made_of_two(case: Case, out: Outputs) -> bool:
        return factors(out["prediction"], *_answers(case)) is not None

    @law("the factors of the two answers do not fit: w before that to the text, 1 - w before the other")
    def guidance_fits(case: Case, out: Outputs) -> bool:
        found = factors(out["prediction"], *_answers(case))
        return found is None or close(found, [case["w"], 1 - case["w"]])


def _answers(case: Case) -> list[np.ndarray]:
    """The two right answers."""
    x, t, text, empty, c = tensors(case, "x", "t", "text", "empty", "c")
    with torch.no_grad():
        return [one.numpy() for one in _once(Net(), x, t, text, empty, *_found(Control(), x, t, text, empty, c, case["both"]))]
