"""Item 11.10: MotionLoRA, a change of low rank of what looks along time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_11.common import Attention, put, said_without_graph
from course_lib.grading.sets.set_13.common import Descent
from course_lib.grading.sets.tools import T

CHANNELS, RANK, STEPS = 4, 2, 2
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
NO_GRAPH = "the loss has no graph back to what shall learn: lock the weights of net, and let A and B act in the layer each time it is called"
Place = tuple[nn.Module, str]


class Block(nn.Module):
    """Attention over space, attention over time and a layer for each number alone: clips [b, t, c, h, w], shape kept."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = Attention(CHANNELS), Attention(CHANNELS)
        self.mix = nn.Linear(CHANNELS, CHANNELS, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        h = x.permute(0, 1, 3, 4, 2)  # [b, t, h, w, c]
        h = h + self.space(h.flatten(2, 3).flatten(0, 1)).view_as(h)
        along = h.permute(0, 2, 3, 1, 4)  # [b, h, w, t, c]
        along = along + self.time(along.flatten(0, 2)).view_as(along)
        h = along.permute(0, 3, 1, 2, 4)
        return (h + torch.tanh(self.mix(h))).permute(0, 1, 4, 2, 3)


class Net(nn.Module):
    """net(x) of clips: `blocks`, one after the other."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        put(self, seed, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _start_of(net: Net, seed: int) -> Callable[[nn.Module], Tensor]:
    """layer -> where its A starts, (RANK, CHANNELS), for each linear layer of the network as it came."""
    rng = np.random.default_rng([seed, 1])
    table = {layer: T(0.4 * rng.normal(size=(RANK, CHANNELS))) for layer in net.modules() if isinstance(layer, nn.Linear)}

    def start(layer: nn.Module) -> Tensor:
        if layer not in table:
            raise Unacceptable(
                f"start(layer) is asked about a {type(layer).__name__}; expected a linear layer of net, as it came"
            )
        return table[layer].clone()

    return start


class Changed(nn.Module):
    """layer(x) + scale B A x; A and B are what learns."""

    def __init__(self, layer: nn.Module, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * x @ self.A.T @ self.B.T


class Transposed(Changed):
    """layer(x) + scale (B A)^T x."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * x @ self.B @ self.A


class Instead(Changed):
    """scale B A x alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x @ self.A.T @ self.B.T


class Through(Changed):
    """layer(x + scale B A x)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.scale * x @ self.A.T @ self.B.T)


def _places(net, parts: Sequence[str] = ("time",), names: Sequence[str] = PROJECTIONS) -> list[Place]:
    """Projections of these parts in all blocks, as (module, name)."""
    return [(getattr(block, part), name) for block in net.blocks for part in parts for name in names]


def _by_rank(alpha: float) -> Callable[[int], float]:
    """r -> alpha / r."""
    return lambda r: alpha / r


def _changed(net, start, places: list[Place], scale, kind: type[Changed] = Changed, B=None, A=None) -> list[Tensor]:
    """Lock the network, put a change in each place, times scale(rank); what learns. A and B make both of start(layer)."""
    net.requires_grad_(False)
    learns = []
    for module, name in places:
        layer = getattr(module, name)
        first = start(layer)
        first, last = (A or (lambda a: a))(first), (B or (lambda a: torch.zeros_like(a.T)))(first)
        made = kind(layer, first, last, scale(len(first)))
        setattr(module, name, made)
        learns += [made.A, made.B]
    return learns


def _trained(net, learns: Sequence[Tensor], x: Tensor, target: Tensor, optimiser_of, steps: int) -> Tensor:
    """net(x) before each step and after the last, (steps + 1, ...)."""
    optimiser, seen = optimiser_of(list(learns)), []
    for _ in range(steps):
        y = net(x)
        seen.append(y.detach())
        optimiser.zero_grad()
        ((y - target) ** 2).mean().backward()
        optimiser.step()
    return torch.stack([*seen, net(x).detach()])


@item(
    "11.10", title="MotionLoRA", function="motion_lora", points=3, minutes=30, difficulty=3,
    answers=(
        "course_lib.nets.lora.LoRA", "course_lib.nets.lora.add_lora", "course_lib.nets.lora.with_lora",
        "course_lib.video.animatediff.motion_lora",
    ),
    hints=(
        "Write a module that holds the old layer, A = nn.Parameter(start(layer)) and B = nn.Parameter of zeros (c_out, r), and gives layer(x) + alpha / r * x @ A.T @ B.T.",
        "net.requires_grad_(False) first. Then for block in net.blocks, for name in ('to_q', 'to_k', 'to_v', 'to_out'): setattr(block.time, name, your module of getattr(block.time, name)). block.space and block.mix stay.",
        "optimiser = optimiser_of([all A and all B]). In each step: y = net(x), keep y.detach(), zero_grad, ((y - target) ** 2).mean().backward(), step. net(x) once more after the last, torch.stack.",
    ),
)  # fmt: skip
class MotionLoRA:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(alpha: float, *shape: int) -> Case:
            return {"x": rng.normal(size=shape), "target": 0.7 * rng.normal(size=shape), "seed": int(rng.integers(2**31)),
                    "alpha": alpha, "lr": float(rng.uniform(0.1, 0.15))}  # fmt: skip

        return [
            case(float(rng.uniform(2.5, 3.5)), 2, 3, CHANNELS, 1, 2),
            case(float(rng.uniform(0.8, 1.5)), 1, 4, CHANNELS, 2, 1),
        ]

    def drive(fn, case: Case) -> Outputs:
        net = Net(case["seed"])
        before = [(weight, weight.detach().clone()) for weight in net.parameters()]
        descent = lambda weights: Descent(weights, case["lr"])
        with torch.enable_grad(), said_without_graph(NO_GRAPH):
            given = net, _start_of(net, case["seed"]), case["alpha"], T(case["x"]), T(case["target"]), descent, STEPS
            seen = call(fn, *given)
        moved = max(float((now.detach() - then).abs().max()) for now, then in before)
        return arrays(y=seen, moved=1.0 + moved)

    def reference(net, start, alpha: float, x: Tensor, target: Tensor, optimiser_of, steps: int) -> Tensor:
        return _trained(net, _changed(net, start, _places(net), _by_rank(alpha)), x, target, optimiser_of, steps)

    @mistake("the change sits in the attention over *space*: that learns how things look; motion is in the attention over time")
    def in_space(net, start, alpha, x, target, optimiser_of, steps):
        learns = _changed(net, start, _places(net, ("space",)), _by_rank(alpha))
        return _trained(net, learns, x, target, optimiser_of, steps)

    @mistake("the attention over space changes as well: then a motion brings the look of its training clips with it; time alone")
    def in_both(net, start, alpha, x, target, optimiser_of, steps):
        learns = _changed(net, start, _places(net, ("space", "time")), _by_rank(alpha))
        return _trained(net, learns, x, target, optimiser_of, steps)

    @mistake("only to_q and to_v change, as in the first paper on LoRA; here all four projections do, to_k and to_out too")
    def queries_and_values(net, start, alpha, x, target, optimiser_of, steps):
        learns = _changed(net, start, _places(net, names=("to_q", "to_v")), _by_rank(alpha))
        return _trained(net, learns, x, target, optimiser_of, steps)

    @mistake("to_out is left out: it is a projection too, the one by which frames are changed")
    def without_out(net, start, alpha, x, target, optimiser_of, steps):
        learns = _changed(net, start, _places(net, names=PROJECTIONS[:3]), _by_rank(alpha))
        return _trained(net, learns, x, target, optimiser_of, steps)

    @mistake("`mix` changes as well, which sees each number alone: the attention over time only")
    def mix_too(net, start, alpha, x, target, optimiser_of, steps):
        places = _places(net) + [(block, "mix") for block in net.blocks]
        return _trained(net, _changed(net, start, places, _by_rank(alpha)), x, target, optimiser_of, steps)

    @mistake("only the first block changes: every attention over time of the network does")
    def first_block(net, start, alpha, x, target, optimiser_of, steps):
        places = _places(net)[: len(PROJECTIONS)]
        return _trained(net, _changed(net, start, places, _by_rank(alpha)), x, target, optimiser_of, steps)

    @mistake("the change is multiplied by r / alpha; by alpha / r, so that a larger rank does not learn faster")
    def scale_turned(net, start, alpha, x, target, optimiser_of, steps):
        return _trained(net, _changed(net, start, _places(net), lambda r: r / alpha), x, target, optimiser_of, steps)

    @mistake("the change is multiplied by alpha alone; by alpha / r, so that a larger rank does not learn faster")
    def not_by_rank(net, start, alpha, x, target, optimiser_of, steps):
        return _trained(net, _changed(net, start, _places(net), lambda r: alpha), x, target, optimiser_of, steps)

    @mistake("the change has no factor: it is alpha / r times B A")
    def no_factor(net, start, alpha, x, target, optimiser_of, steps):
        return _trained(net, _changed(net, start, _places(net), lambda r: 1.0), x, target, optimiser_of, steps)

    @mistake(
        "A and B have changed places. A layer gives W x, in torch x @ W.T, so B A x is x @ A.T @ B.T: either (B A)^T x was added, x @ B @ A, or A starts at 0 and B as start(layer) says; B is the one that is 0"
    )
    def transposed(net, start, alpha, x, target, optimiser_of, steps):
        learns = _changed(net, start, _places(net), _by_rank(alpha), Transposed)
        return _trained(net, learns, x, target, optimiser_of, steps)

    @mistake("A and B are both 0: the gradient of each is a product with the other, and nothing ever learns; only B is 0")
    def both_zero(net, start, alpha, x, target, optimiser_of, steps):
        learns = _changed(net, start, _places(net), _by_rank(alpha), A=torch.zeros_like)
        return _trained(net, learns, x, target, optimiser_of, steps)

    @mistake("B is not 0 at first: the network is another before it has learned anything")
    def none_zero(net, start, alpha, x, target, optimiser_of, steps):
        learns = _changed(net, start, _places(net), _by_rank(alpha), B=lambda A: A.T.clone())
        return _trained(net, learns, x, target, optimiser_of, steps)

    @mistake("W is gone: the layer gives B A x alone, which is 0 at first; W x + (alpha / r) B A x")
    def layer_lost(net, start, alpha, x, target, optimiser_of, steps):
        learns = _changed(net, start, _places(net), _by_rank(alpha), Instead)
        return _trained(net, learns, x, target, optimiser_of, steps)

    @mistake("the change goes *through* W: W (x + (alpha / r) B A x); it is added beside it")
    def through_the_layer(net, start, alpha, x, target, optimiser_of, steps):
        learns = _changed(net, start, _places(net), _by_rank(alpha), Through)
        return _trained(net, learns, x, target, optimiser_of, steps)

    @mistake("only B learns: A stays as drawn, and what can change stays in the plane that chance chose; both learn")
    def only_B(net, start, alpha, x, target, optimiser_of, steps):
        learns = _changed(net, start, _places(net), _by_rank(alpha))
        return _trained(net, learns[1::2], x, target, optimiser_of, steps)

    @mistake("the weights of the projections learn too: they stay as they were trained, and the file holds A and B alone")
    def weights_learn_too(net, start, alpha, x, target, optimiser_of, steps):
        W = [getattr(module, name).weight for module, name in _places(net)]
        learns = _changed(net, start, _places(net), _by_rank(alpha))
        for weight in W:
            weight.requires_grad_(True)
        return _trained(net, [*learns, *W], x, target, optimiser_of, steps)

    @mistake("the whole network learns, without any A and B: that is fine-tuning, and its file is as large as the network")
    def fine_tuned(net, start, alpha, x, target, optimiser_of, steps):
        return _trained(net, list(net.parameters()), x, target, optimiser_of, steps)

    @law("a weight of the network has moved: only A and B learn")
    def locked(case: Case, out: Outputs) -> bool:
        return close(out["moved"], 1.0)

    @law("before the first step the answer must be the network's own")
    def own_at_first(case: Case, out: Outputs) -> bool:
        with torch.no_grad():
            return close(out["y"][0], Net(case["seed"])(T(case["x"])).numpy())

    @law("it does not learn: the answers stay as they were; look at what the optimiser is given, and at which of A and B is 0")
    def learns_at_all(case: Case, out: Outputs) -> bool:
        return not close(out["y"][0], out["y"][-1])

    @law("after the first step the answer is another: look at which layers are changed, and at the factor alpha / r")
    def first_step(case: Case, out: Outputs) -> bool:
        net = Net(case["seed"])
        with torch.enable_grad():
            learns = _changed(net, _start_of(net, case["seed"]), _places(net), _by_rank(case["alpha"]))
            seen = _trained(net, learns, T(case["x"]), T(case["target"]), lambda w: Descent(w, case["lr"]), 1)
        return close(out["y"][1], seen[1].numpy())
