"""Low-rank changes of a trained network (LoRA, Hu et al. 2022): children that weigh a fraction of their parent."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call


class LowRank(nn.Module):
    """A convolution or linear layer with the weight W + up down, which starts as W (Hu et al. 2022, Eq. 3).

    W is frozen and not part of the state; up (c_out, r), at first 0, down (r, c_in k k) and the bias (c_out,) learn.
    Raises ValueError for a rank below 1.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, rank: int):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank = {rank}; expected at least 1")
        W, inputs = layer.weight.detach(), layer.weight[0].numel()
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.up = nn.Parameter(W.new_zeros(len(W), rank))
        self.down = nn.Parameter(torch.randn(rank, inputs, dtype=W.dtype) * inputs**-0.5)
        self.layer = layer
        for name in ("weight", "bias"):
            delattr(layer, name)
        layer.register_buffer("weight", W, persistent=False)
        layer.bias = None

    def forward(self, x: Tensor) -> Tensor:
        W = self.layer.weight
        return functional_call(self.layer, {"weight": W + (self.up @ self.down).reshape(W.shape), "bias": self.bias}, (x,))


def low_rank(net: nn.Module, rank: int) -> nn.Module:
    """A copy of `net` that computes the same and in which only a low-rank change of each weight matrix learns.

    Biases, normalisations and embeddings, which are small, learn in full. The state holds what learns and nothing else:
    load it into a child of the same parent.
    """
    child = copy.deepcopy(net).requires_grad_(True)
    for module in list(child.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                setattr(module, name, LowRank(layer, rank))
    return child
