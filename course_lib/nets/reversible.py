"""Networks that are run backwards in training: activations are computed again from the output instead of being stored.

A coupling layer maps a pair of equal shape, (a, b) -> ((1 - v) f(a) + v b, a), and is inverted without inverting f
(Gomez et al. 2017, Sec. 3.2; with the weights v and 1 - v, Chen et al. 2024). A stack of them stores its last
pair alone, whatever its depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from course_lib.nets.embedding import TimeEmbedding
from course_lib.nets.unet import ResBlock, groups, zero

Pair = tuple[Tensor, Tensor]


class Coupling(nn.Module):
    """(a, b) -> ((1 - v) f(a) + v b, a), with v learned; the inverse is a = b', b = (a' - (1 - v) f(b')) / v.

    `body` is f(a, *context), deterministic, and keeps the shape of a. Inverting multiplies rounding errors by up to 1 / v:
    a stack of n layers loses n log2(1 / v) bits. Raises ValueError unless 0 < v < 1.
    """

    def __init__(self, body: nn.Module, v: float = 0.5):
        super().__init__()
        if not 0 < v < 1:
            raise ValueError(f"v = {v}; expected a weight between 0, which cannot be inverted, and 1, which skips the body")
        self.body, self.v = body, nn.Parameter(torch.tensor(float(v)))

    def move(self, a: Tensor, *context: Tensor) -> Tensor:
        """(1 - v) f(a): all of the layer that is not linear."""
        return (1 - self.v) * self.body(a, *context)

    def forward(self, a: Tensor, b: Tensor, *context: Tensor) -> Pair:
        return self.move(a, *context) + self.v * b, a

    @torch.no_grad()
    def inverse(self, a: Tensor, b: Tensor, *context: Tensor) -> Pair:
        """The pair that `forward` maps to (a, b)."""
        return b, (a - self.move(b, *context)) / self.v


class _RunBackwards(torch.autograd.Function):
    """A stack of couplings whose backward pass walks down it, one layer's graph at a time.

    autograd must see every tensor that the result depends on, so that the context and the parameters are arguments too.
    """

    @staticmethod
    def forward(ctx: Any, layers: Sequence[Coupling], n: int, a: Tensor, b: Tensor, *rest: Tensor) -> Pair:
        context = rest[:n]
        with torch.autocast(a.device.type, enabled=False):  # the inverse needs all the digits
            for layer in layers:
                a, b = layer(a, b, *context)
        if len(layers) == 1:
            b = b.clone()  # an input, which may not be returned as it is
        ctx.layers, ctx.n = layers, n
        ctx.save_for_backward(a, b, *context)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor, db: Tensor) -> tuple[Any, ...]:
        a, b, *context = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]  # of the context, then of the parameters
        parameters = unique(ctx.layers)
        total: list[Tensor | None] = [None] * len(wanted)
        for layer in reversed(ctx.layers):
            with torch.enable_grad(), torch.autocast(a.device.type, enabled=False):
                before = b.detach().requires_grad_()
                given = [c.detach().requires_grad_(want) for c, want in zip(context, wanted, strict=False)]
                moved = layer.move(before, *given)
            leaves = [before, *(leaf for leaf, want in zip([*given, *parameters], wanted, strict=True) if want)]
            d_before, *found = torch.autograd.grad(moved, leaves, da, allow_unused=True)
            a, b = before.detach(), (a - moved.detach()) / layer.v.detach()
            _add(total, [k for k, want in enumerate(wanted) if want], found)
            place = ctx.n + next(k for k, parameter in enumerate(parameters) if parameter is layer.v)
            if wanted[place]:
                _add(total, [place], [(b * da).sum()])  # v's other part, that of v b
            da, db = db if d_before is None else d_before + db, layer.v.detach() * da
        return None, None, da, db, *total


def _add(total: list[Tensor | None], places: Iterable[int], found: Iterable[Tensor | None]) -> None:
    """Add what was found to the sums at these places; None is zero."""
    for place, gradient in zip(places, found, strict=True):
        if gradient is not None:
            total[place] = gradient if total[place] is None else total[place] + gradient


def unique(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of several modules, each once, in order: layers may share a body."""
    return list({id(p): p for layer in layers for p in layer.parameters()}.values())


def couple(layers: Sequence[Coupling], a: Tensor, b: Tensor, *context: Tensor, stored: bool = False) -> Pair:
    """Run a stack of couplings; `stored` keeps every activation (plain backpropagation), else they are computed again.

    a, b (B, ...) of one shape; `context` are further tensors that every body is given, after a. The gradients are those
    of plain backpropagation within rounding, of a, b, the context and the layers' parameters; a tensor with a gradient
    that a body sees in another way gets none. Costs one more evaluation of each body in training.

    Raises ValueError for a and b of different shapes, and for dropout, which would draw another mask the second time.
    """
    if a.shape != b.shape:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; expected the same")
    if stored:
        for layer in layers:
            a, b = layer(a, b, *context)
        return a, b
    if any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for layer in layers for m in layer.modules()):
        raise ValueError("a layer has dropout in training mode; expected deterministic layers: call eval(), or set p = 0")
    return _RunBackwards.apply(tuple(layers), len(context), a, b, *context, *unique(layers))


class Stack(nn.Module):
    """Couplings between one tensor and another: x -> (x, s x) -> layers -> a + m b, with s = 1 and m = 0 learned.

    At the start of training it is the identity where the bodies are. x (B, ...), and `context` as in `couple`; `stored`
    chooses plain backpropagation.
    """

    def __init__(self, layers: Iterable[Coupling], stored: bool = False):
        super().__init__()
        self.layers, self.stored = nn.ModuleList(layers), stored
        self.s, self.m = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        a, b = couple(self.layers, x, self.s * x, *context, stored=self.stored)
        return a + self.m * b


class ReversibleUNet(nn.Module):
    """A U-Net of which each level is a `Stack` of residual blocks: net(x (B, C, H, W), time (B,) or 0-d) -> the same shape.

    What is stored is one tensor for each change of size, not one for each layer. `widths` are the channels of each level,
    `blocks` the couplings of each stack; H and W halve from a level to the next.
    """

    def __init__(self, channels: int = 1, widths: tuple[int, ...] = (32, 64), blocks: int = 4, v: float = 0.5):
        super().__init__()
        if any(width % 8 for width in widths):
            raise ValueError(f"widths = {widths}; expected multiples of 8")
        emb = 4 * widths[0]
        self.factor = 2 ** (len(widths) - 1)

        def stack(width: int) -> Stack:
            return Stack(Coupling(ResBlock(width, width, emb, 0.0), v) for _ in range(blocks))

        self.time = TimeEmbedding(emb)
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(stack(width) for width in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 3, 1, 1) for a, b in pairwise(widths))
        self.merge = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for width in widths[:-1])
        self.up = nn.ModuleList(stack(width) for width in widths[:-1])
        self.last_norm, self.last = groups(widths[0]), zero(nn.Conv2d(widths[0], channels, 3, padding=1))

    def store(self, stored: bool) -> ReversibleUNet:
        """Choose plain backpropagation through every stack, or running them backwards; returns self."""
        for module in self.modules():
            if isinstance(module, Stack):
                module.stored = stored
        return self

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected height and width divisible by {self.factor}")
        emb = self.time(time.expand(len(x))).to(x.dtype)
        h, kept = self.first(x), []
        for level, stack in enumerate(self.down):
            if level:
                kept.append(h)
                h = self.shrink[level - 1](h)
            h = stack(h, emb)
        for level in reversed(range(len(self.up))):
            h = self.grow[level](F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = self.up[level](self.merge[level](torch.cat([h, kept.pop()], 1)), emb)
        return self.last(F.silu(self.last_norm(h)))
