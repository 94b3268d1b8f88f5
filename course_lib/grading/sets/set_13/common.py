"""What several items of set 13 share: a small network and small controls that refuse what real ones would, and their rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.grading.items import Case, Unacceptable
from course_lib.grading.sets.tools import T, right

LAYERS = 4
"""Features that the decoder of `Net` is given: three of its encoder, finest first, and the middle's."""
WORDS = 3
"""Numbers of a text."""
AUTOGRAD = (
    "torch.autograd.grad", "torch.autograd.backward", "torch.Tensor.backward", "torch.autograd.functional.vjp",
    "torch.autograd.functional.jacobian", "torch.func.vjp", "torch.nn.grad.conv2d_weight", "torch.nn.grad.conv2d_input",
)  # fmt: skip


def blended(h: Tensor, k: int) -> Tensor:
    """A fixed linear map of (B, C, H, W), the k-th: channels meet, and each pixel its neighbour."""
    C = h.shape[1]
    row, column = torch.meshgrid(torch.arange(C), torch.arange(C), indexing="ij")
    matrix = torch.sin(1.0 + 1.3 * k + 1.7 * row + 0.6 * column * row + 0.9 * column).to(h)
    return torch.einsum("oc,bchw->bohw", matrix, h + 0.4 * h.roll(1, -1)) / C**0.5


def _heard(text: Tensor, like: Tensor) -> Tensor:
    """A text (B, WORDS) as one number for each row, (B, 1, 1, 1)."""
    return right(torch.tanh(text) @ torch.tensor([0.5, -0.8, 0.6]).to(text), like)


def _refuse(who: str, x: Tensor, t: Tensor, text: Tensor, c: Tensor | None = None) -> None:
    """Raise Unacceptable for what a real network would not take: rows that do not fit those of x."""
    wanted = {"t": (t, (len(x),)), "text": (text, (len(x), WORDS))}
    if c is not None:
        wanted["c"] = (c, (len(x), 1, *x.shape[2:]))
    for name, (value, shape) in wanted.items():
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise Unacceptable(f"{who} is asked about {len(x)} rows of x with {name} = {got}; expected {shape}")


class Net(nn.Module):
    """net(x, t, text, residuals) -> (B, C, H, W), with two weights; residuals, LAYERS of them, are added where they belong."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.9, 0.4]).double())
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, text: Tensor, residuals: Sequence[Tensor] | None = None) -> Tensor:
        _refuse("net", x, t, text)
        self.calls += 1
        told = _heard(text, x) + 0.3 * right(t, x)
        features = [x]
        for k in range(LAYERS):
            features.append(torch.tanh(blended(features[-1], k) + told))
        features = features[1:]
        if residuals is not None:
            features = [f + r for f, r in zip(features, _checked(residuals, x), strict=True)]
        *kept, h = features
        while kept:
            h = torch.tanh(blended(h, 10 + len(kept)) + blended(kept.pop(), 20))
        return self.gain[0] * h + self.gain[1] * x


def _checked(residuals: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """The residuals, where there is one for each feature and each fits; Unacceptable elsewhere."""
    if not isinstance(residuals, (list, tuple)) or len(residuals) != LAYERS:
        got = f"{len(residuals)} of them" if isinstance(residuals, (list, tuple)) else f"a {type(residuals).__name__}"
        raise Unacceptable(f"net is given residuals: {got}; expected a list of {LAYERS}")
    for i, r in enumerate(residuals):
        if not isinstance(r, Tensor) or r.shape != x.shape:
            got = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
            raise Unacceptable(f"net is given residuals[{i}] = {got} for features of {tuple(x.shape)}")
    return list(residuals)


class Control(nn.Module):
    """control(x, t, text, c) -> LAYERS residuals (B, C, H, W), with a weight for each and one for the map c (B, 1, H, W)."""

    def __init__(self, kind: int = 0) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.weight = nn.Parameter(torch.linspace(0.5, 0.9, LAYERS).double())
        self.hint = nn.Parameter(torch.tensor(0.8).double())

    def forward(self, x: Tensor, t: Tensor, text: Tensor, c: Tensor) -> list[Tensor]:
        _refuse("control", x, t, text, c)
        self.calls += 1
        told = _heard(text, x) + 0.2 * right(t, x) + 0.3
        h, found = x + self.hint * torch.sin(2 * c + self.kind), []
        for k in range(LAYERS):
            h = torch.tanh(blended(h, 30 + 7 * self.kind + k) + told)
            found.append(self.weight[k] * h)
        return found


def asked_case(rng: np.random.Generator, shape: tuple[int, ...], maps: int | None = None) -> Case:
    """x, t, a text and the empty one, and a map, or `maps` of them."""
    B, _, H, W = shape
    return {
        "x": rng.normal(size=shape),
        "t": rng.uniform(0.3, 1.5, B),
        "text": rng.normal(size=(B, WORDS)),
        "empty": np.repeat(rng.normal(size=(1, WORDS)), B, 0),
        "c": rng.uniform(0, 1, (B, 1, H, W) if maps is None else (maps, B, 1, H, W)),
    }


def tensors(case: Case, *names: str) -> list[Tensor]:
    """The case's arrays of these names."""
    return [T(case[name]) for name in names]


def times(residuals: Sequence[Tensor], scales: Sequence[float | Tensor] | Tensor) -> list[Tensor]:
    """Each residual times its own scale."""
    return [s * r for s, r in zip(scales, residuals, strict=True)]


class Descent:
    """Plain gradient descent with the interface of torch.optim.SGD, whose first use imports a compiler for two seconds."""

    def __init__(self, weights: Iterable[Tensor], rate: float) -> None:
        self.weights, self.rate = list(weights), rate
        if not all(isinstance(one, Tensor) for one in self.weights):
            raise Unacceptable(f"the optimiser is given a {type(self.weights[0]).__name__}; expected a list of parameters")

    def zero_grad(self, set_to_none: bool = True) -> None:
        for w in self.weights:
            w.grad = None if set_to_none or w.grad is None else torch.zeros_like(w.grad)

    @torch.no_grad()
    def step(self) -> None:
        for w in self.weights:
            if w.grad is not None:
                w -= self.rate * w.grad


@contextmanager
def unchanged(*groups: Sequence[Tensor | None]) -> Iterator[None]:
    """Raise Unacceptable where a tensor of these lists was changed in place: `call` sees to tensors that are not in lists."""
    before = [[None if one is None else one.clone() for one in group] for group in groups]
    yield
    for then, now in zip(before, groups, strict=True):
        if any(a is not None and not torch.equal(a, b) for a, b in zip(then, now, strict=True)):
            raise Unacceptable("the function changes a tensor of a list that it was given in place; work on copies")
