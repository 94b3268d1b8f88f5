"""Invertible diffusion models: a sampler of few steps, trained end to end without storing its activations.

Chen et al. 2024 (IDM) wire the steps of a sampler as couplings, each mixed with the state before the last, so that the
whole sampling runs backwards (the first level), and do the same inside the network (the second; `nets.reversible`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser
from course_lib.nets.reversible import Coupling, couple
from course_lib.operators import LinearOperator
from course_lib.steps import ddim
from course_lib.types import check_grid


class Measured(nn.Module):
    """One sampling step that knows a measurement: x' = x0* + (sigma' / sigma) (x - x0), x0* = x0 + A^+ (y - A x0).

    x0 = D(x, sigma). The noise's direction is that of x0, as in DDNM (Wang et al. 2023, Eq. 13) and in IDM's step; with no
    operator it is DDIM. x (B, *shape), y (B, *out).
    """

    def __init__(self, D: NetworkDenoiser, sigma: Tensor, sigma_next: Tensor, operator: LinearOperator | None):
        super().__init__()
        self.net = D.net if isinstance(D.net, nn.Module) else None  # registered, so that its parameters are found
        self.D, self.levels, self.operator = D, (sigma, sigma_next), operator

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x0 = self.D(x, self.levels[0])
        moved, _ = ddim(lambda x, sigma: x0, x, *self.levels)
        return moved if self.operator is None else moved + self.operator.pinv(y - self.operator(x0))


class InvertibleSampler(nn.Module):
    """n sampling steps wired as couplings: x_{k+1} = (1 - v_k) step(x_k) + v_k x_{k-1} (Chen et al. 2024).

    It starts from (x, s x) and returns x_n + m x_{n-1}, where v_k, s = 1 and m = 0 are learned with the network. `stored`
    keeps all activations, as plain backpropagation does. Inverting a step multiplies rounding errors by up to 1 / v, so
    that the pair is kept every `every` steps: n / 12 pairs of pictures beside the activations of one step.

    forward: x (B, *shape) at sigmas[0], or None for A^+ y, where IDM starts; y (B, *out) where there is an operator.
    Noise levels are fixed here; IDM learns them too, and feeds y to the network's blocks, which `ReversibleUNet` does not.
    Raises ValueError for a grid that does not fall, `every` < 1, v outside (0, 1), and for y without an operator.
    """

    def __init__(
        self,
        D: NetworkDenoiser,
        sigmas: Tensor,
        operator: LinearOperator | None = None,
        v: float = 0.5,
        every: int = 12,
        stored: bool = False,
    ):
        super().__init__()
        sigmas = check_grid(sigmas)
        if sigmas[1] > sigmas[0]:
            raise ValueError(f"sigmas rises from {sigmas[0]:.6g} to {sigmas[1]:.6g}; expected a falling grid, of sampling")
        if every < 1:
            raise ValueError(f"every = {every}; expected at least one step between two kept pairs")
        self.steps = nn.ModuleList(Coupling(Measured(D, *levels, operator), v) for levels in pairwise(sigmas))
        self.s, self.m = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.operator, self.every, self.stored = operator, every, stored

    def forward(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        if (y is None) != (self.operator is None):
            given, has = ("no y", "an operator") if y is None else ("y", "no operator")
            raise ValueError(f"{given} was given to a sampler with {has}; expected both, or neither")
        if x is None:
            if y is None:
                raise ValueError("x = None without a measurement; expected x at the first noise level")
            x = self.operator.pinv(y)
        context = () if y is None else (y,)
        a, b = x, self.s * x
        for first in range(0, len(self.steps), self.every):
            a, b = couple(list(self.steps[first : first + self.every]), a, b, *context, stored=self.stored)
        return a + self.m * b


class _Held:
    """A tensor that autograd keeps; its bytes are counted for as long as it lives."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for the backward pass: `with SavedBytes(net.parameters()) as saved: loss.backward()`.

    `peak` is the most at one time, of the forward and the backward pass if both run inside, each storage counted once;
    `excluded` tensors, such as parameters, are there anyway. The peak, not the sum: a network that is run backwards saves
    each layer's activations again in the backward pass, one layer at a time.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()):
        super().__init__(self._pack, lambda held: held.tensor)
        self.now = self.peak = 0
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._users: dict[int, int] = {}

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Any:
        held, storage = _Held(tensor), tensor.untyped_storage()
        place = storage.data_ptr()
        if place in self._excluded:
            return held
        size = storage.nbytes()
        self._users[place] = self._users.get(place, 0) + 1
        if self._users[place] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        finalize(held, self._release, place, size)
        return held

    def _release(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            self.now -= size
