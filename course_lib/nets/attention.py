"""Self-attention layers by name, and a way to look at them or to switch their mixing off, without a change to the network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from course_lib.nets.unet import Attention


def _values_of_ours(layer: Attention, x: Tensor) -> Tensor:
    """x + proj(v)."""
    return x + layer.proj(layer.qkv(layer.norm(x)).chunk(3, 1)[2])


def _values_of_theirs(layer: Any, x: Tensor) -> Tensor:
    """Tokens (B, N, C) within a transformer block of diffusers -> out(v)."""
    x = layer.to_v(x)
    for part in layer.to_out:
        x = part(x)
    return x / layer.rescale_output_factor


def self_attention(net: nn.Module) -> dict[str, nn.Module]:
    """The self-attention layers of a network by their names: `Attention` of nets/unet.py, and `attn1` of diffusers' blocks."""
    from diffusers.models.attention import BasicTransformerBlock

    found: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        if isinstance(module, Attention):
            found[name] = module
        elif isinstance(module, BasicTransformerBlock) and not module.only_cross_attention:
            found[f"{name}.attn1"] = module.attn1
    return found


def named(net: nn.Module, layers: str | None) -> dict[str, nn.Module]:
    """Those whose names contain `layers`; None for all. Raises ValueError, with the names, where there is none."""
    every = self_attention(net)
    found = {name: layer for name, layer in every.items() if layers is None or layers in name}
    if not found:
        names = ", ".join(every) or "no self-attention at all"
        raise ValueError(f"layers = {layers!r} is in the name of no self-attention layer; the network has {names}")
    return found


def maps(layer: nn.Module, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of a layer of either kind at its input, the mean over the heads: (B, N, N), rows sum to 1."""
    if isinstance(layer, Attention):
        q, k = layer.qkv(layer.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)[:2]  # (B, N, C) each
    else:
        q, k = layer.to_q(x), layer.to_k(x)
    q, k = (h.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for h in (q, k))  # (B, heads, N, C / heads)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)


@contextlib.contextmanager
def observed(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the maps of each call of this layer are appended to the list; its output stays as it is."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda layer, inputs, _: kept.append(maps(layer, inputs[0])))
    try:
        yield kept
    finally:
        handle.remove()


@contextlib.contextmanager
def replaced(layers: dict[str, nn.Module], output: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Within, each layer returns output(layer, x) instead of its own result; afterwards, also upon an error, as before."""
    handles = [layer.register_forward_hook(lambda layer, inputs, _: output(layer, inputs[0])) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def values(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer of either kind gives where its attention map softmax(q k^T / sqrt(d)) is the identity."""
    return _values_of_ours(layer, x) if isinstance(layer, Attention) else _values_of_theirs(layer, x)


def identity_attention(net: nn.Module, layers: str | None = "mid") -> contextlib.AbstractContextManager[None]:
    """A context in which the attention maps of the named layers are the identity (Ahn et al. 2024, Sec. 4).

    `layers` is a part of their names, None all. Raises ValueError as `named`.
    """
    return replaced(named(net, layers), values)
