"""Item 11.4: a temporal block that is the identity at first, and can learn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_11.common import Attention, put, said_without_graph
from course_lib.grading.sets.tools import T

CHANNELS = 3
NO_GRAPH = "the answer has no graph back to the layers: only the zeroing belongs under torch.no_grad(), not the answer itself"


def _built(case: Case) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The case's norm, attention and output layer, anew."""
    made = nn.LayerNorm(CHANNELS).double(), Attention(CHANNELS), nn.Linear(CHANNELS, CHANNELS).double()
    return tuple(put(module, case["seed"] + k, 0.8) for k, module in enumerate(made))


def _zero(*weights: Tensor) -> None:
    for weight in weights:
        nn.init.zeros_(weight)


@item(
    "11.4", title="The identity at first", function="new_block", points=2, minutes=20, difficulty=2,
    answers=("course_lib.nets.temporal.TemporalAttention", "course_lib.nets.temporal.ConvBlock", "course_lib.nets.unet.zero"),
    hints=(
        "x + out(...) is x where `out` gives 0, whatever it is given: so its weight *and* its bias are 0.",
        "Nothing else may be 0. The gradient of out's weight is a product with what out is given; if that is 0 too, nothing ever learns.",
        "torch.nn.init.zeros_(out.weight); torch.nn.init.zeros_(out.bias); return x + out(attend(norm(x))).",
    ),
)  # fmt: skip
class NewBlock:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...]) -> Case:
            return {"x": rng.normal(size=shape), "g": rng.normal(size=shape), "seed": int(rng.integers(2**31))}

        return [case((2, 4, CHANNELS)), case((3, 2, CHANNELS))]

    def drive(fn, case: Case) -> Outputs:
        modules = _built(case)
        out = list(modules[-1].parameters())
        inner = [weight for module in modules[:-1] for weight in module.parameters()]
        with torch.enable_grad():
            y = call(fn, T(case["x"]), *modules)
            answer = arrays(y=y)
            if not isinstance(y, Tensor) or tuple(y.shape) != case["x"].shape:
                raise Unacceptable(f"y has shape {answer['y'].shape}; expected {case['x'].shape}, that of x")
            with said_without_graph(NO_GRAPH):
                y.backward(T(case["g"]))
        return answer | arrays(by_out=_gradients(out), by_inner=_gradients(inner), weights=_flat([*inner, *out]))

    def reference(x: Tensor, norm, attend, out) -> Tensor:
        _zero(out.weight, out.bias)
        return x + out(attend(norm(x)))

    @mistake("nothing is set to 0: the first answer is the image model's plus noise, and what it was trained for is lost")
    def as_drawn(x, norm, attend, out):
        return x + out(attend(norm(x)))

    @mistake(
        "the attention is 0 as well as `out`: it is the identity, and stays so. The gradient of out's weight is a product with what `out` is given, that of the attention one with out's weight: both are 0 for ever"
    )
    def dead(x, norm, attend, out):
        _zero(out.weight, out.bias, *attend.parameters())
        return x + out(attend(norm(x)))

    @mistake(
        "to_v is 0 as well as `out`, and each hides the gradient of the other: all but out's bias is stuck. One zero is enough, the last"
    )
    def values_zero_too(x, norm, attend, out):
        _zero(out.weight, out.bias, attend.to_v.weight)
        return x + out(attend(norm(x)))

    @mistake(
        "to_q and to_k are 0 too: all frames weigh alike, and stay so, since the gradient of each is a product with what the other gives; leave them as drawn"
    )
    def queries_zero_too(x, norm, attend, out):
        _zero(out.weight, out.bias, attend.to_q.weight, attend.to_k.weight)
        return x + out(attend(norm(x)))

    @mistake("the attention is 0 and `out` is not: out's bias is then added to every frame at once")
    def attention_for_out(x, norm, attend, out):
        _zero(*attend.parameters())
        return x + out(attend(norm(x)))

    @mistake("the norm's weight is 0: what attends is then the norm's bias in all frames, and `out` makes something of it")
    def norm_zero(x, norm, attend, out):
        _zero(norm.weight)
        return x + out(attend(norm(x)))

    @mistake(
        "norm and `out` are 0: the attention is given nothing, and gives nothing; then the gradient of out's weight is 0, and so is that of the norm: stuck"
    )
    def norm_zero_too(x, norm, attend, out):
        _zero(out.weight, out.bias, norm.weight, norm.bias)
        return x + out(attend(norm(x)))

    @mistake("out's bias is not 0: it is added to every frame from the start; zero the weight *and* the bias")
    def bias_left(x, norm, attend, out):
        _zero(out.weight)
        return x + out(attend(norm(x)))

    @mistake("only out's bias is 0: its weight, as drawn, adds noise to every frame")
    def weight_left(x, norm, attend, out):
        _zero(out.bias)
        return x + out(attend(norm(x)))

    @mistake("the residual is missing: a layer that gives 0 erases what the image model has found; x + out(...)")
    def no_residual(x, norm, attend, out):
        _zero(out.weight, out.bias)
        return out(attend(norm(x)))

    @mistake("the residual is norm(x): the image model's features come out normalised, not as they were; x + out(...)")
    def residual_of_the_norm(x, norm, attend, out):
        _zero(out.weight, out.bias)
        h = norm(x)
        return h + out(attend(h))

    @mistake(
        "the norm stands around the whole, norm(x + ...): then the block is no identity, whatever is 0; norm what attends alone"
    )
    def norm_last(x, norm, attend, out):
        _zero(out.weight, out.bias)
        return norm(x + out(attend(x)))

    @mistake("x is not normalised before it attends: norm, then attend, then out")
    def norm_left_out(x, norm, attend, out):
        _zero(out.weight, out.bias)
        return x + out(attend(x))

    @mistake(
        "the block is x, and stays x: it is made 0 by something that the optimiser does not have, a factor that is the *number* 0 or a new layer in place of `out`. Set the weights of `out` itself to 0"
    )
    def out_of_reach(x, norm, attend, out):
        return x + 0 * out(attend(norm(x)))

    @law("the first answer must be x itself")
    def identity(case: Case, out: Outputs) -> bool:
        return close(out["y"], case["x"])

    @law("the gradient of out's weight is 0: the block can never learn; `out` must be given something")
    def can_learn(case: Case, out: Outputs) -> bool:
        return bool(out["by_out"][: CHANNELS**2].any())

    @law("all but `out` must stay as drawn")
    def rest_as_drawn(case: Case, out: Outputs) -> bool:
        drawn = _flat([weight for module in _built(case)[:-1] for weight in module.parameters()]).numpy()
        return close(out["weights"][: len(drawn)], drawn)


def _flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in weights])


def _gradients(weights: list[Tensor]) -> Tensor:
    """The gradients of all weights in one row, 0 where none has come."""
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])
