"""Items 02.3 and 02.7: a training step with averaged weights, condition dropout."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.tools import T


class _Descent:
    """Plain gradient descent with the interface of torch.optim.SGD, whose first use imports a compiler for two seconds."""

    RATE = 0.3

    def __init__(self, net: nn.Module):
        self.parameters = list(net.parameters())

    def zero_grad(self, set_to_none: bool = True) -> None:
        for w in self.parameters:
            w.grad = None if set_to_none or w.grad is None else torch.zeros_like(w.grad)

    @torch.no_grad()
    def step(self) -> None:
        for w in self.parameters:
            if w.grad is not None:
                w -= self.RATE * w.grad


def _regression(net: nn.Module, batch: Tensor) -> Tensor:
    """The loss of the drive: rows hold three inputs and two targets."""
    return (net(batch[:, :3]) - batch[:, 3:]).square().mean()


def _numbers(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def _descend(net: nn.Module, optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def _average(ema: nn.Module, net: nn.Module, keep: float, take: float) -> None:
    """e <- keep e + take w."""
    for e, w in zip(ema.parameters(), net.parameters(), strict=True):
        e.copy_(keep * e + take * w)


@item(
    "02.3", title="One training step", function="train_step", points=2, minutes=20, difficulty=2,
    answers=("course_lib.training.EMA.__init__", "course_lib.training.fit"),
    hints=(
        "Four lines of every training loop: the loss; optimizer.zero_grad(); loss.backward(); optimizer.step().",
        "Then walk through both networks at once: for e, w in zip(ema.parameters(), net.parameters()).",
        "`e = ...` only gives a new meaning to the name e. Change the tensor itself: e.mul_(decay).add_(w, alpha=1 - decay), or e.lerp_(w, 1 - decay).",
        "Averaging is no part of the loss: put it under `with torch.no_grad():`.",
    ),
)  # fmt: skip
class TrainStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {
                "weight": rng.normal(size=(2, 3)),
                "bias": rng.normal(size=2),
                "batches": rng.normal(size=(4, 6, 5)),
                "decay": float(rng.uniform(0.55, 0.85)),
            }
            for _ in range(2)
        ]

    def drive(fn, case: Case) -> Outputs:
        net = nn.utils.skip_init(nn.Linear, 3, 2, dtype=torch.float64)  # takes nothing from the global generator
        net.load_state_dict({"weight": T(case["weight"]), "bias": T(case["bias"])})
        ema = copy.deepcopy(net).requires_grad_(False)
        optimizer = _Descent(net)
        losses, weights, averages = [], [_numbers(net)], [_numbers(ema)]
        for batch in T(case["batches"]):
            losses.append(arrays(loss=call(fn, net, ema, optimizer, _regression, batch, case["decay"]))["loss"])
            weights.append(_numbers(net))
            averages.append(_numbers(ema))
        if {loss.shape for loss in losses} != {()}:
            raise Unacceptable(f"the loss has shape {losses[0].shape}; expected one number")
        graph = float(any(p.grad_fn is not None for p in ema.parameters()))
        return arrays(losses=np.stack(losses), weights=torch.stack(weights), ema=torch.stack(averages), ema_graph=graph)

    def reference(net: nn.Module, ema: nn.Module, optimizer, loss_fn, batch: Tensor, decay: float) -> Tensor:
        loss = _descend(net, optimizer, loss_fn(net, batch))
        _average(ema, net, decay, 1 - decay)
        return loss

    @mistake("the gradients are never reset: each backward() adds to those of all steps before; call optimizer.zero_grad()")
    def gradients_add_up(net, ema, optimizer, loss_fn, batch, decay):
        loss = loss_fn(net, batch)
        loss.backward()
        optimizer.step()
        _average(ema, net, decay, 1 - decay)
        return loss.detach()

    @mistake(
        "the weights never change: backward() or optimizer.step() is missing, or zero_grad() stands between backward() and step() and wipes out the gradient"
    )
    def weights_stand_still(net, ema, optimizer, loss_fn, batch, decay):
        loss = loss_fn(net, batch)
        loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        _average(ema, net, decay, 1 - decay)
        return loss.detach()

    @mistake("the average is taken before the step and lags by one: first optimizer.step(), then e <- d e + (1 - d) w")
    def average_too_early(net, ema, optimizer, loss_fn, batch, decay):
        _average(ema, net, decay, 1 - decay)
        return _descend(net, optimizer, loss_fn(net, batch))

    @mistake("the decay is turned round: it is the share of the *old* average that stays; the new weights come in with 1 - decay")
    def decay_turned(net, ema, optimizer, loss_fn, batch, decay):
        loss = _descend(net, optimizer, loss_fn(net, batch))
        _average(ema, net, 1 - decay, decay)
        return loss

    @mistake("the new weights are added whole: the shares must add up to 1, decay and 1 - decay")
    def shares_exceed_one(net, ema, optimizer, loss_fn, batch, decay):
        loss = _descend(net, optimizer, loss_fn(net, batch))
        _average(ema, net, decay, 1)
        return loss

    @mistake("ema is a copy of net and averages nothing; keep the share `decay` of what it was")
    def copied(net, ema, optimizer, loss_fn, batch, decay):
        loss = _descend(net, optimizer, loss_fn(net, batch))
        ema.load_state_dict(net.state_dict())
        return loss

    @mistake(
        "ema never changes: it is left out, or `e = decay * e + ...` gives the name e to a new tensor and leaves the parameter as it was; write into it (lerp_, mul_ and add_, copy_)"
    )
    def name_rebound(net, ema, optimizer, loss_fn, batch, decay):
        loss = _descend(net, optimizer, loss_fn(net, batch))
        for e, w in zip(ema.parameters(), net.parameters(), strict=True):
            e = decay * e + (1 - decay) * w
        return loss

    @mistake(
        "the numbers are right, but the average is taken with gradients on, and drags the graph of all steps along until memory is full; put it under torch.no_grad()"
    )
    def average_keeps_graph(net, ema, optimizer, loss_fn, batch, decay):
        loss = _descend(net, optimizer, loss_fn(net, batch))
        for e, w in zip(ema.parameters(), net.parameters(), strict=True):
            e.mul_(decay).add_((1 - decay) * w)
        return loss

    @mistake("net is overwritten by the average and goes on from there; ema only watches, and training never sees it")
    def net_overwritten(net, ema, optimizer, loss_fn, batch, decay):
        loss = _descend(net, optimizer, loss_fn(net, batch))
        _average(ema, net, decay, 1 - decay)
        net.load_state_dict(ema.state_dict())
        return loss

    @mistake("the loss that is returned is computed anew after the step; return the one whose gradient was taken")
    def loss_after(net, ema, optimizer, loss_fn, batch, decay):
        _descend(net, optimizer, loss_fn(net, batch))
        _average(ema, net, decay, 1 - decay)
        return loss_fn(net, batch).detach()

    @mistake("the loss that is returned is that of ema; training watches the loss of net, whose gradient was taken")
    def loss_of_ema(net, ema, optimizer, loss_fn, batch, decay):
        _descend(net, optimizer, loss_fn(net, batch))
        _average(ema, net, decay, 1 - decay)
        return loss_fn(ema, batch).detach()

    @mistake("only the weight matrices are averaged; the biases, one-dimensional, belong to the network as well")
    def biases_left_out(net, ema, optimizer, loss_fn, batch, decay):
        loss = _descend(net, optimizer, loss_fn(net, batch))
        with torch.no_grad():
            for e, w in zip(ema.parameters(), net.parameters(), strict=True):
                if w.ndim > 1:
                    e.lerp_(w, 1 - decay)
        return loss

    @law("the loss of the first step must be that of the weights before it")
    def first_loss(case: Case, out: Outputs) -> bool:
        return bool(np.isclose(out["losses"][0], (_first_error(case) ** 2).mean()))

    @law("the average does not follow e <- d e + (1 - d) w, with w the weights after the step")
    def follows(case: Case, out: Outputs) -> bool:
        wanted = case["decay"] * out["ema"][:-1] + (1 - case["decay"]) * out["weights"][1:]
        return bool(np.allclose(out["ema"][1:], wanted))

    @law("the weights after the first step are not those of one optimizer.step() with the gradient of the loss")
    def one_step(case: Case, out: Outputs) -> bool:
        error = 2 / 12 * _first_error(case)
        gradient = np.concatenate([(error.T @ case["batches"][0][:, :3]).ravel(), error.sum(0)])
        return bool(np.allclose(out["weights"][1], out["weights"][0] - _Descent.RATE * gradient))

    @law("the parameters of ema carry the graph of all steps; take the average under torch.no_grad()")
    def no_graph(case: Case, out: Outputs) -> bool:
        return float(out["ema_graph"]) == 0


def _first_error(case: Case) -> np.ndarray:
    """Answers less targets of the first batch, (6, 2), at the first weights."""
    batch = case["batches"][0]
    return batch[:, :3] @ case["weight"].T + case["bias"] - batch[:, 3:]


@item(
    "02.7", title="Condition dropout", function="drop_labels", points=1, minutes=5, difficulty=1,
    answers=(),
    hints=(
        "u is uniform in [0, 1): the event u < p has probability p, for each sample by itself.",
        "Where it happens the label becomes `null`; elsewhere it stays.",
        "torch.where(condition, null, labels), or labels.masked_fill(condition, null).",
    ),
)  # fmt: skip
class DropLabels:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {"labels": rng.integers(0, 10, 40), "u": rng.uniform(0, 1, 40), "p": float(rng.uniform(0.2, 0.4)), "null": 10}
            for _ in range(4)
        ]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, T(case["labels"]), T(case["u"]), case["p"], case["null"])
        if isinstance(result, Tensor) and result.dtype != torch.int64:
            raise Unacceptable(f"the labels come back as {result.dtype}; expected torch.int64, as they were given")
        return arrays(labels=result)

    def reference(labels: Tensor, u: Tensor, p: float, null: int) -> Tensor:
        return labels.masked_fill(u < p, null)

    @mistake("the labels are kept with probability p and dropped with 1 - p; p is the share that is *dropped*: u < p")
    def kept_with_p(labels, u, p, null):
        return labels.masked_fill(u >= p, null)

    @mistake("the dropped labels are those with u above 1 - p: the right number of them, but the event asked for is u < p")
    def upper_end(labels, u, p, null):
        return labels.masked_fill(u > 1 - p, null)

    @mistake("one number decides for the whole batch; each sample is dropped or kept by itself")
    def whole_batch(labels, u, p, null):
        return torch.full_like(labels, null) if u[0] < p else labels.clone()

    @mistake("dropped labels become 0, which is a class of its own; the network knows the null class by the index `null`")
    def zero(labels, u, p, null):
        return labels * (u >= p)

    @mistake("dropped labels become -1, and an embedding has no row of that number; use `null`")
    def minus_one(labels, u, p, null):
        return labels.masked_fill(u < p, -1)

    @mistake("exactly the share p of the batch is dropped, those of least u; each sample has its own coin, and the number varies")
    def exact_share(labels, u, p, null):
        return labels.masked_fill(u.argsort().argsort() < round(p * len(u)), null)

    @mistake(
        "the first labels of the batch are dropped whatever u says; then the same rows of an ordered batch are always without condition"
    )
    def first_rows(labels, u, p, null):
        return labels.masked_fill(torch.arange(len(u)) < p * len(u), null)

    @mistake("no label is dropped: masked_fill and where return a new tensor, which has to be returned")
    def result_thrown_away(labels, u, p, null):
        labels.masked_fill(u < p, null)
        return labels.clone()

    @law("a label with u >= p must stay what it was")
    def stays(case: Case, out: Outputs) -> bool:
        kept = case["u"] >= case["p"]
        return bool((out["labels"][kept] == case["labels"][kept]).all())

    @law("a label with u < p must become null")
    def becomes_null(case: Case, out: Outputs) -> bool:
        return bool((out["labels"][case["u"] < case["p"]] == case["null"]).all())
