"""Item 13.2: a locked block, a trainable copy of it, and a zero convolution on either side of the copy."""

from __future__ import annotations

import copy as copying

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_13.common import Descent
from course_lib.grading.sets.tools import T

CHANNELS, STEPS = 2, 3


def _layer(W: np.ndarray, b: np.ndarray) -> nn.Conv2d:
    """A 1 x 1 convolution with these weights."""
    layer = nn.Conv2d(W.shape[1], W.shape[0], 1).double()
    with torch.no_grad():
        layer.weight.copy_(T(W)[:, :, None, None])
        layer.bias.copy_(T(b))
    return layer


def _built(case: Case) -> tuple[nn.Module, nn.Conv2d, nn.Conv2d]:
    """The case's block, Z1 and Z2, anew."""
    first, second, Z1, Z2 = (_layer(case[f"{name}_W"], case[f"{name}_b"]) for name in ("first", "second", "Z1", "Z2"))
    return nn.Sequential(first, nn.Tanh(), second), Z1, Z2


def _trained(forward, learns, loss, target, optimiser_of, steps, forget=True) -> Tensor:
    """`forward()` before each step and after the last, (steps + 1, ...)."""
    optimiser, seen = optimiser_of(learns), []
    for _ in range(steps):
        y = forward()
        seen.append(y.detach())
        if forget:
            optimiser.zero_grad()
        loss(y, target).backward()
        optimiser.step()
    return torch.stack([*seen, forward().detach()])


def _mse(y: Tensor, target: Tensor) -> Tensor:
    return ((y - target) ** 2).mean()


def _weights(*modules: nn.Module) -> list[Tensor]:
    return [weight for module in modules for weight in module.parameters()]


@item(
    "13.2", title="A locked block and its copy", function="train_copy", points=2, minutes=25, difficulty=2,
    hints=(
        "copy = copy.deepcopy(block) has weights of its own. Copy first, lock afterwards: a copy of a locked block is locked too. (Or lock nothing, and give the optimiser only what shall learn.)",
        "y_c = block(x) + Z2(copy(x + Z1(c))). optimiser = optimiser_of([*copy.parameters(), *Z1.parameters(), *Z2.parameters()]).",
        "In each step: y_c, keep y_c.detach(), zero_grad, loss = ((y_c - target) ** 2).mean(), backward, step. After the last step y_c once more; torch.stack them all.",
    ),
)  # fmt: skip
class TrainCopy:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], size: float) -> Case:
            made = {name: rng.normal(size=shape) for name in ("x", "c", "target")} | {"lr": float(rng.uniform(0.4, 0.6))}
            for name, scale in (("first", 1.0), ("second", 1.0), ("Z1", size), ("Z2", size)):
                made[f"{name}_W"] = scale * rng.normal(size=(CHANNELS, CHANNELS))
                made[f"{name}_b"] = scale * rng.normal(size=CHANNELS)
            return made

        return [case((2, CHANNELS, 2, 3), 0.0), case((3, CHANNELS, 2, 2), 0.6)]

    def drive(fn, case: Case) -> Outputs:
        block, Z1, Z2 = _built(case)
        before = [weight.detach().clone() for weight in block.parameters()]
        given = (T(case[name]) for name in ("x", "c", "target"))
        with torch.enable_grad():
            seen = call(fn, block, Z1, Z2, *given, lambda weights: Descent(weights, case["lr"]), STEPS)
        moved = max(float((a - b).detach().abs().max()) for a, b in zip(before, block.parameters(), strict=True))
        return arrays(y=seen, moved=1.0 + moved)

    def reference(block, Z1, Z2, x: Tensor, c: Tensor, target: Tensor, optimiser_of, steps: int) -> Tensor:
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x) + Z2(copy(x + Z1(c))), _weights(copy, Z1, Z2), _mse, target, optimiser_of, steps)

    @mistake("the block learns as well: it is to stay as it was trained; the optimiser gets copy, Z1 and Z2 alone")
    def block_learns_too(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x) + Z2(copy(x + Z1(c))), _weights(block, copy, Z1, Z2), _mse, target, optimiser_of, steps)

    @mistake(
        "copy = block is a second name for the same weights: what the copy learns the locked block learns too; copy.deepcopy(block)"
    )
    def second_name(block, Z1, Z2, x, c, target, optimiser_of, steps):
        return _trained(lambda: block(x) + Z2(block(x + Z1(c))), _weights(block, Z1, Z2), _mse, target, optimiser_of, steps)

    @mistake(
        "only the zero convolutions learn: the copy was made *after* the block was locked, and is locked too, or it is missing in the optimiser, or copied anew at each step"
    )
    def copy_locked_too(block, Z1, Z2, x, c, target, optimiser_of, steps):
        return _trained(lambda: block(x) + Z2(block(x + Z1(c))), _weights(Z1, Z2), _mse, target, optimiser_of, steps)

    @mistake("the zero convolutions do not learn: then Z2 stays 0, and the copy is never heard; give them to the optimiser")
    def zeros_left_out(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x) + Z2(copy(x + Z1(c))), _weights(copy), _mse, target, optimiser_of, steps)

    @mistake("Z1 does not learn: it stays 0, and the copy never sees the map")
    def first_zero_left_out(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x) + Z2(copy(x + Z1(c))), _weights(copy, Z2), _mse, target, optimiser_of, steps)

    @mistake("Z2 does not learn: it stays 0, and with it all gradients of what stands before it")
    def last_zero_left_out(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x) + Z2(copy(x + Z1(c))), _weights(copy, Z1), _mse, target, optimiser_of, steps)

    @mistake("the locked block is shown the map too, block(x + Z1(c)): it was never trained on that; only the copy sees it")
    def block_sees_the_map(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x + Z1(c)) + Z2(copy(x + Z1(c))), _weights(copy, Z1, Z2), _mse, target, optimiser_of, steps)

    @mistake("the map is added *after* the copy, Z2(copy(x) + Z1(c)): the copy never sees it; copy(x + Z1(c))")
    def map_after_the_copy(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x) + Z2(copy(x) + Z1(c)), _weights(copy, Z1, Z2), _mse, target, optimiser_of, steps)

    @mistake("the copy sees the map alone, copy(Z1(c)): it is an encoder of x, told the map beside it, copy(x + Z1(c))")
    def map_alone(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x) + Z2(copy(Z1(c))), _weights(copy, Z1, Z2), _mse, target, optimiser_of, steps)

    @mistake("the copy is put behind the block, copy(block(x) + Z1(c)); it stands beside it, and sees x")
    def in_series(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x) + Z2(copy(block(x) + Z1(c))), _weights(copy, Z1, Z2), _mse, target, optimiser_of, steps)

    @mistake("Z2 is missing: the copy's answer is added as it is, and y_c begins at twice the block's; block(x) + Z2(copy(...))")
    def no_last_zero(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x) + copy(x + Z1(c)), _weights(copy, Z1), _mse, target, optimiser_of, steps)

    @mistake("Z1 is missing: the map is added to x as it is, and the copy begins on inputs that it does not know; x + Z1(c)")
    def no_first_zero(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: block(x) + Z2(copy(x + c)), _weights(copy, Z2), _mse, target, optimiser_of, steps)

    @mistake("the locked block is missing: what it knows is lost, and all has to be learned anew; block(x) + Z2(...)")
    def block_forgotten(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(lambda: Z2(copy(x + Z1(c))), _weights(copy, Z1, Z2), _mse, target, optimiser_of, steps)

    @mistake("gradients of former steps are still there: zero_grad before backward")
    def gradients_pile_up(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        return _trained(
            lambda: block(x) + Z2(copy(x + Z1(c))), _weights(copy, Z1, Z2), _mse, target, optimiser_of, steps, forget=False
        )

    @mistake(
        "the branch alone is compared with the target, without the block: it learns all that the block knows already; compare y_c"
    )
    def branch_compared(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        loss = lambda y, aim: _mse(y - block(x).detach(), aim)
        return _trained(lambda: block(x) + Z2(copy(x + Z1(c))), _weights(copy, Z1, Z2), loss, target, optimiser_of, steps)

    @mistake("the loss is a sum: its gradient grows with the picture, and so does the step; take the mean")
    def summed(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        loss = lambda y, aim: ((y - aim) ** 2).sum()
        return _trained(lambda: block(x) + Z2(copy(x + Z1(c))), _weights(copy, Z1, Z2), loss, target, optimiser_of, steps)

    @mistake("Z1 and Z2 are set to zero once more: they come as they are, at zero at first, or trained; go on from there")
    def zeroed_again(block, Z1, Z2, x, c, target, optimiser_of, steps):
        copy = copying.deepcopy(block)
        with torch.no_grad():
            for weight in _weights(Z1, Z2):
                weight.zero_()
        return _trained(lambda: block(x) + Z2(copy(x + Z1(c))), _weights(copy, Z1, Z2), _mse, target, optimiser_of, steps)

    @law("the weights of the locked block have moved: it must be as it was when training ends")
    def locked(case: Case, out: Outputs) -> bool:
        return close(out["moved"], 1.0)

    @law("before the first step y_c must be block(x) + Z2(block(x + Z1(c))): the copy's weights are still the block's")
    def begins_at_the_block(case: Case, out: Outputs) -> bool:
        return close(out["y"][0], _right(case)[0])

    @law("the first step is another: look at the loss, the mean of (y_c - target)², and at what the optimiser is given")
    def first_step(case: Case, out: Outputs) -> bool:
        return close(out["y"][1], _right(case)[1])

    @law("the first step is right, and a later one is not: is the copy the same in all, and are gradients set to 0 before each?")
    def later_steps(case: Case, out: Outputs) -> bool:
        return close(out["y"], _right(case))


def _right(case: Case) -> np.ndarray:
    """The right answer, once more."""
    block, Z1, Z2 = _built(case)
    copy, (x, c, target) = copying.deepcopy(block), (T(case[name]) for name in ("x", "c", "target"))
    learns, rate = _weights(copy, Z1, Z2), case["lr"]
    with torch.enable_grad():
        y = _trained(lambda: block(x) + Z2(copy(x + Z1(c))), learns, _mse, target, lambda w: Descent(w, rate), STEPS)
    return y.numpy()
