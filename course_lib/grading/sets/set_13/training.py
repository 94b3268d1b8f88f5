"""Item 13.9: one step in which a control learns and the network does not."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_08.common import one_number
from course_lib.grading.sets.set_13.common import WORDS, Control, Descent, Net
from course_lib.grading.sets.tools import T, right

ROWS = ("x0", "sigma", "eps", "text", "empty", "c", "u")


def _told(text: Tensor, empty: Tensor, dropped: Tensor) -> Tensor:
    """The empty text in the rows of `dropped`."""
    return torch.where(dropped[:, None], empty, text)


def _noised(x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    return x0 + right(sigma, x0) * eps


def _loss(net, control, x0: Tensor, sigma: Tensor, eps: Tensor, told: Tensor, c: Tensor) -> Tensor:
    """Mean of the squared error of the noise, as the network tells it under the control."""
    x = _noised(x0, sigma, eps)
    return (net(x, sigma, told, control(x, sigma, told, c)) - eps).square().mean()


def _step(net, optimiser, loss: Tensor) -> Tensor:
    """Step down this loss, with the network locked; the loss before it."""
    net.requires_grad_(False)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    net.zero_grad()
    return loss.detach()


@item(
    "13.9", title="A training step", function="control_step", points=2, minutes=25, difficulty=2,
    answers=("course_lib.training.denoising_loss", "course_lib.training.fit"),
    hints=(
        "Lock the network first: net.requires_grad_(False). Not torch.no_grad() around its call: the loss reaches the control *through* the network's decoder.",
        "told = torch.where((u < 0.5)[:, None], empty, text), for the network *and* the control. The map is never dropped. x = x0 + sigma eps, with sigma as (B, 1, 1, 1).",
        "loss = ((net(x, sigma, told, control(x, sigma, told, c)) - eps) ** 2).mean(); then zero_grad, backward, step, and return loss.detach().",
    ),
)  # fmt: skip
class TrainingStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(B: int, C: int, H: int, W: int) -> Case:
            u = np.array([[*rng.uniform(0, 0.5, 2), *rng.uniform(0.5, 1, B - 2)] for _ in range(2)])
            return {
                "x0": rng.normal(size=(2, B, C, H, W)),
                "sigma": rng.uniform(0.4, 1.6, (2, B)),
                "eps": rng.normal(size=(2, B, C, H, W)),
                "text": rng.normal(size=(2, B, WORDS)),
                "empty": np.broadcast_to(rng.normal(size=WORDS), (2, B, WORDS)).copy(),
                "c": rng.uniform(0, 1, (2, B, 1, H, W)),
                "u": rng.permuted(u, axis=1),
                "lr": float(rng.uniform(0.3, 0.6)),
            }

        return [case(4, 2, 2, 2), case(5, 2, 1, 3)]

    def drive(fn, case: Case) -> Outputs:
        net, control = Net(), Control()
        optimiser = Descent(control.parameters(), case["lr"])
        before, losses, stored = net.gain.detach().clone(), [], 0.0
        with torch.enable_grad():
            for i in range(2):
                try:
                    losses.append(one_number(call(fn, net, control, optimiser, *(T(case[name])[i] for name in ROWS))).detach())
                except RuntimeError as error:
                    if "does not require grad" not in str(error):
                        raise
                    raise Unacceptable(
                        "the loss has no graph back to the control: its residuals were detached, or the network was called under "
                        "torch.no_grad(). Lock the network by net.requires_grad_(False): the loss comes back *through* its decoder"
                    ) from None
                stored += 0.0 if net.gain.grad is None else float(net.gain.grad.abs().sum())
        learnt = torch.cat([weight.detach().flatten() for weight in control.parameters()])
        moved = float((net.gain.detach() - before).abs().max())
        return arrays(losses=torch.stack(losses), control=learnt, moved=1.0 + moved, stored=1.0 + min(stored, 1.0))

    def reference(
        net, control, optimiser, x0: Tensor, sigma: Tensor, eps: Tensor, text: Tensor, empty: Tensor, c: Tensor, u: Tensor
    ) -> Tensor:
        return _step(net, optimiser, _loss(net, control, x0, sigma, eps, _told(text, empty, u < 0.5), c))

    @mistake(
        "no prompt is dropped: where a text says all, the control need not learn to read the map; half of the prompts are empty"
    )
    def nothing_dropped(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        return _step(net, optimiser, _loss(net, control, x0, sigma, eps, text, c))

    @mistake("the texts are *kept* where u < 0.5; there they are dropped")
    def others_dropped(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        return _step(net, optimiser, _loss(net, control, x0, sigma, eps, _told(text, empty, u >= 0.5), c))

    @mistake("one draw decides for the whole batch; each row is dropped or kept by itself, with its own u")
    def whole_batch(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        return _step(net, optimiser, _loss(net, control, x0, sigma, eps, _told(text, empty, (u[:1] < 0.5).expand(len(u))), c))

    @mistake(
        "the map is dropped together with the text: the control then learns what to add where it is told nothing; without a prompt the map must say what there is, so it stays"
    )
    def map_dropped_too(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        seen = c * right((u >= 0.5).to(c), c)
        return _step(net, optimiser, _loss(net, control, x0, sigma, eps, _told(text, empty, u < 0.5), seen))

    @mistake("the *map* is dropped, and the text stays; it is the other way round")
    def map_dropped(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        return _step(net, optimiser, _loss(net, control, x0, sigma, eps, text, c * right((u >= 0.5).to(c), c)))

    @mistake("dropped texts become zeros: the network is never told that; use the empty text, `empty`")
    def zeros_for_empty(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        return _step(net, optimiser, _loss(net, control, x0, sigma, eps, _told(text, 0 * empty, u < 0.5), c))

    @mistake(
        "the control still hears the texts that the network is not told: both get the same, or the prompt comes in by the back door"
    )
    def control_hears_all(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        x = _noised(x0, sigma, eps)
        said = net(x, sigma, _told(text, empty, u < 0.5), control(x, sigma, text, c))
        return _step(net, optimiser, (said - eps).square().mean())

    @mistake("only the control is told the empty text, and the network still the prompt: both get the same")
    def net_hears_all(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        x = _noised(x0, sigma, eps)
        said = net(x, sigma, text, control(x, sigma, _told(text, empty, u < 0.5), c))
        return _step(net, optimiser, (said - eps).square().mean())

    @mistake("the control is shown the clean x0: when it is used there is none; it sees the same noisy x as the network")
    def control_sees_the_picture(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        told = _told(text, empty, u < 0.5)
        said = net(_noised(x0, sigma, eps), sigma, told, control(x0, sigma, told, c))
        return _step(net, optimiser, (said - eps).square().mean())

    @mistake("the answer is compared with x0; this network tells the noise")
    def compared_with_the_picture(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        x, told = _noised(x0, sigma, eps), _told(text, empty, u < 0.5)
        return _step(net, optimiser, (net(x, sigma, told, control(x, sigma, told, c)) - x0).square().mean())

    @mistake("the loss is a sum: its gradient grows with the batch, and so does the step; take the mean")
    def summed(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        loss = _loss(net, control, x0, sigma, eps, _told(text, empty, u < 0.5), c)
        return _step(net, optimiser, loss * eps.numel())

    @mistake("rows without a prompt are left out of the loss; they are what teaches the control to read the map")
    def dropped_rows_left_out(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        x, kept = _noised(x0, sigma, eps), u >= 0.5
        said = net(x, sigma, text, control(x, sigma, text, c))
        return _step(net, optimiser, (said - eps)[kept].square().mean())

    @mistake("gradients of the step before are still there: optimiser.zero_grad() before backward")
    def gradients_pile_up(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        net.requires_grad_(False)
        loss = _loss(net, control, x0, sigma, eps, _told(text, empty, u < 0.5), c)
        loss.backward()
        optimiser.step()
        return loss.detach()

    @mistake("nothing is learned: optimiser.step() is missing, or the gradients are set to 0 just before it")
    def no_step(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        net.requires_grad_(False)
        return _loss(net, control, x0, sigma, eps, _told(text, empty, u < 0.5), c).detach()

    @mistake("the loss comes back as it is *after* the step; return the one that was stepped down")
    def loss_after_the_step(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        told = _told(text, empty, u < 0.5)
        _step(net, optimiser, _loss(net, control, x0, sigma, eps, told, c))
        return _loss(net, control, x0, sigma, eps, told, c).detach()

    @mistake(
        "the network is not locked: it does not move, but backward stores a gradient for each of its weights, which costs memory and time; net.requires_grad_(False)"
    )
    def not_locked(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        optimiser.zero_grad()
        loss = _loss(net, control, x0, sigma, eps, _told(text, empty, u < 0.5), c)
        loss.backward()
        optimiser.step()
        return loss.detach()

    @mistake("the network learns too: an optimiser of its own moved it; only the control learns")
    def network_learns(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        optimiser.zero_grad()
        loss = _loss(net, control, x0, sigma, eps, _told(text, empty, u < 0.5), c)
        loss.backward()
        optimiser.step()
        Descent(net.parameters(), optimiser.rate).step()
        net.zero_grad()
        return loss.detach()

    @law("the network has moved: it is locked, and only the control learns")
    def locked(case: Case, out: Outputs) -> bool:
        return close(out["moved"], 1.0)

    @law("gradients are stored in the locked network: net.requires_grad_(False) before the loss is made")
    def nothing_stored(case: Case, out: Outputs) -> bool:
        return close(out["stored"], 1.0)

    @law("the loss of the first step, when nothing has been learned yet, is another: look at what the network is told and asked")
    def first_loss(case: Case, out: Outputs) -> bool:
        return close(out["losses"][0], float(_at_first(case)))

    @law("the loss is right, but the control does not learn by it as it should: look at zero_grad, backward and step")
    def learns(case: Case, out: Outputs) -> bool:
        return close(out["losses"][1], float(_after_one(case)))


def _of(case: Case, net: Net, control: Control, i: int) -> Tensor:
    x0, sigma, eps, text, empty, c, u = (T(case[name])[i] for name in ROWS)
    return _loss(net, control, x0, sigma, eps, _told(text, empty, u < 0.5), c)


def _at_first(case: Case) -> Tensor:
    """The loss of the first batch under the untrained control."""
    with torch.no_grad():
        return _of(case, Net(), Control(), 0)


def _after_one(case: Case) -> Tensor:
    """The loss of the second batch after a right first step."""
    net, control = Net(), Control()
    with torch.enable_grad():
        _step(net, Descent(control.parameters(), case["lr"]), _of(case, net, control, 0))
    with torch.no_grad():
        return _of(case, net, control, 1)
