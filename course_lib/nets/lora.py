"""Low-rank adaptation (Hu et al. 2022): what a trained network learns anew is a small file beside its frozen weights.

`with_lora(net, rank)` is the way in: a network that shares the weights of `net`, leaves `net` as it is, and learns a
change of rank r of some layers. Names and shapes in files are those of peft, so diffusers reads what `save` writes.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from course_lib.devices import generator

Layer = nn.Linear | nn.Conv2d
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "attention.qkv", "attention.proj")
"""How the names of attention's matrices end: in diffusers' networks, and in those of nets/unet.py and nets/dit.py."""
METADATA = "lora_adapter_metadata"
"""Where diffusers looks, in the header of a safetensors file, for the settings of a LoRA."""


class _Changed(nn.Module):
    """A layer and the two factors of a change of its weight W: up (c_out, rank), at first 0, and down (rank, c_in k k)."""

    def __init__(self, layer: Layer, rank: int):
        super().__init__()
        if not isinstance(layer, Layer) or getattr(layer, "groups", 1) != 1:
            raise ValueError(f"layer = {layer}; expected an nn.Linear, or an nn.Conv2d with groups = 1")
        if rank < 1:
            raise ValueError(f"rank = {rank}; expected at least 1")
        W = layer.weight.detach()
        # AdamW cannot count in half precision: its steps are smaller than the spacing of the numbers
        dtype = torch.promote_types(W.dtype, torch.float32)
        self.rank, self.layer = rank, layer
        self.up = nn.Parameter(W.new_zeros(len(W), rank, dtype=dtype))
        self.down = nn.Parameter(W.new_empty(rank, W[0].numel(), dtype=dtype))

    def change(self) -> Tensor:
        """up down in the shape of W."""
        return (self.up @ self.down).reshape(self.layer.weight.shape)


class LoRA(_Changed):
    """A frozen linear layer or convolution beside which a change of low rank learns (Hu et al. 2022, Eq. 3).

        y = W x + b + scale (alpha / rank) up down x

    down (rank, c_in k k) is uniform in +-(c_in k k)^-1/2, as the paper's authors and peft draw it, so that learning rates
    carry over; up (c_out, rank) is 0 and y at first that of the layer. `alpha` is the rank where it is None. `scale` may
    be set at any time: 0 gives the layer, exactly. Raises ValueError for a rank below 1, alpha <= 0, another kind of layer.
    """

    def __init__(self, layer: Layer, rank: int, alpha: float | None = None, source: torch.Generator | None = None):
        super().__init__(layer, rank)
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha = {alpha}; expected more than 0")
        layer.requires_grad_(False)
        self.alpha, self.scale = float(rank if alpha is None else alpha), 1.0
        bound = self.down.shape[1] ** -0.5
        start = torch.empty(self.down.shape, dtype=self.down.dtype).uniform_(-bound, bound, generator=source)
        self.down.data.copy_(start)  # drawn on the CPU: the same on every device
        self.register_buffer("parent", None, persistent=False)  # W, while the layer holds W + the change

    @property
    def strength(self) -> float:
        """What multiplies up down: scale alpha / rank, or 0 while W has it merged in."""
        return 0.0 if self.parent is not None else self.scale * self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.strength == 0:
            return y
        # beside W and not added to it: in half precision W would round a small change away
        h = x.to(self.down.dtype)
        if isinstance(self.layer, nn.Linear):
            h = F.linear(F.linear(h, self.down), self.up)
        else:
            kernels = self.down.reshape(self.rank, *self.layer.weight.shape[1:])
            h = F.conv2d(self.layer._conv_forward(h, kernels, None), self.up[:, :, None, None])
        return y + self.strength * h.to(y.dtype)


# --- into a network and out of it ----------------------------------------------------------------------------------------


def sharing(net: nn.Module) -> nn.Module:
    """A network with the weights of `net`, held once, which have no gradient there; `net` stays as it is. Buffers are copied."""
    return copy.deepcopy(net, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()})


def with_lora(
    net: nn.Module, rank: int, targets: Sequence[str] = ATTENTION, alpha: float | None = None, seed: int = 0
) -> nn.Module:
    """A network that computes the same as `net`, shares its weights and learns a LoRA; `net` stays as it is.

    Only the LoRAs of the layers whose names end in one of `targets` have a gradient. No weight is held twice: a change
    of `net` in place is one of both, until one of them is moved to another device. Buffers are copied. Errors as `add_lora`.
    """
    if not isinstance(net, nn.Module):
        raise ValueError(f"net is a {type(net).__name__}; expected an nn.Module, of a pretrained pipeline `model.net`")
    child = sharing(net)
    add_lora(child, rank, targets, alpha, seed)
    return child


def add_lora(
    net: nn.Module, rank: int, targets: Sequence[str] = ATTENTION, alpha: float | None = None, seed: int = 0
) -> list[nn.Parameter]:
    """Put a LoRA, in place, on each layer whose name ends in one of `targets`, freeze all else; returns what learns.

    A layer of c_in k k inputs and c_out outputs adds rank (c_in k k + c_out) weights. Raises ValueError where no linear
    layer or convolution has such a name or one has a LoRA already, for alpha <= 0, and for a rank below 1 or above a side
    of W, where up down is no smaller than W.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    fitting = [(name, m) for name, m in net.named_modules() if any(f".{name}".endswith(f".{end}") for end in targets)]
    layers = {name: m for name, m in fitting if isinstance(m, Layer)}
    taken = [name for name, m in fitting if isinstance(m, LoRA)]
    if taken:
        raise ValueError(f"targets = {targets} name {_some(taken)} already with a LoRA; expected layers without")
    if not layers:
        ends = {_end(name) for name, m in net.named_modules() if isinstance(m, Layer)}
        raise ValueError(
            f"targets = {targets}, in which no linear layer or convolution ends; expected some of {', '.join(sorted(ends))}"
        )
    for name, layer in layers.items():
        if rank > (most := min(layer.weight.flatten(1).shape)):
            raise ValueError(f"rank = {rank}; expected at most {most}, the smaller side of the weight of {name}")
    added = {name: LoRA(layer, rank, alpha, generator(seed, k)) for k, (name, layer) in enumerate(layers.items())}
    net.requires_grad_(False)
    for name, lora in added.items():
        above, _, last = name.rpartition(".")
        setattr(net.get_submodule(above), last, lora.requires_grad_(True))
        lora.layer.requires_grad_(False)
    return [p for lora in added.values() for p in (lora.up, lora.down)]


def loras(net: nn.Module) -> dict[str, LoRA]:
    """The LoRAs of a network by their names. Raises ValueError where there is none."""
    found = {name: module for name, module in net.named_modules() if isinstance(module, LoRA)}
    if not found:
        raise ValueError(f"net is a {type(net).__name__} without a LoRA; expected one of with_lora or add_lora")
    return found


def _separate(net: nn.Module) -> dict[str, LoRA]:
    """The LoRAs of a network; ValueError where they are merged."""
    found = loras(net)
    if any(lora.parent is not None for lora in found.values()):
        raise ValueError("the LoRAs of net are merged into its weights; expected unmerge(net) before")
    return found


@contextlib.contextmanager
def scaled(net: nn.Module, value: float) -> Iterator[None]:
    """Within, every LoRA of `net` has this scale: 0 gives the parent, exactly, 1 what was learnt; afterwards as before."""
    found = _separate(net).values()
    before = [lora.scale for lora in found]
    try:
        for lora in found:
            lora.scale = value
        yield
    finally:
        for lora, scale in zip(found, before, strict=True):
            lora.scale = scale


def without_lora(net: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within, `net` is its parent: teacher and student in one network, without a second copy of the weights."""
    return scaled(net, 0.0)


@torch.no_grad()
def merge(net: nn.Module) -> None:
    """W <- W + scale (alpha / rank) up down in every layer with a LoRA: the outputs stay, but for rounding, at the cost of W's.

    The changed weights are new tensors: a network that shares the old ones keeps them. Raises ValueError where they are merged.
    """
    for lora in _separate(net).values():
        W, change = lora.layer.weight.data, lora.strength * lora.change()
        lora.layer.weight.data = (W + change).to(W.dtype)
        lora.parent = W


def unmerge(net: nn.Module) -> None:
    """Undo `merge`, bit for bit: W was kept. Raises ValueError where nothing is merged."""
    found = loras(net)
    if any(lora.parent is None for lora in found.values()):
        raise ValueError("the LoRAs of net are not merged into its weights; expected merge(net) before")
    for lora in found.values():
        lora.layer.weight.data, lora.parent = lora.parent, None


# --- states and files ----------------------------------------------------------------------------------------------------


def lora_state(net: nn.Module) -> dict[str, Tensor]:
    """What the LoRAs of `net` have learnt, by the names and in the shapes of peft, sharing memory with them.

    NAME.lora_A.weight is down, (rank, c_in) or (rank, c_in, k, k), and NAME.lora_B.weight is up, (c_out, rank) or
    (c_out, rank, 1, 1).
    """
    state = {}
    for name, lora in loras(net).items():
        pixels = (1, 1) if isinstance(lora.layer, nn.Conv2d) else ()
        state[f"{name}.lora_A.weight"] = lora.down.detach().reshape(lora.rank, *lora.layer.weight.shape[1:])
        state[f"{name}.lora_B.weight"] = lora.up.detach().reshape(*lora.up.shape, *pixels)
    return state


@torch.no_grad()
def load_lora(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put a state of `lora_state` into the LoRAs of `net`; alpha is no part of it, as in peft.

    Raises ValueError, and changes nothing, for missing and unexpected names, for another rank and another shape.
    """
    _separate(net)
    own = lora_state(net)
    if missing := own.keys() - state.keys():
        raise ValueError(f"state lacks {_some(missing)}; expected each of the {len(own)} names of lora_state(net)")
    if unexpected := state.keys() - own.keys():
        raise ValueError(f"state has {_some(unexpected)}; expected only the {len(own)} names of lora_state(net)")
    for name, value in own.items():
        ranks = [len(one) if name.endswith("A.weight") else one.shape[1] for one in (state[name], value)]
        if ranks[0] != ranks[1]:
            raise ValueError(f"state has rank {ranks[0]} at {name}; expected {ranks[1]}, that of the LoRA of net")
        if state[name].shape != value.shape:
            raise ValueError(f"state has shape {tuple(state[name].shape)} at {name}; expected {tuple(value.shape)}")
    for name, value in own.items():
        value.copy_(state[name])


def save(net: nn.Module, path: Path | str, prefix: str = "unet") -> None:
    """Write what the LoRAs of `net` have learnt, and their ranks and alphas, to a safetensors file.

    `prefix` stands before each name and says which part of a pipeline `net` is, so that diffusers reads the file with
    `pipeline.load_lora_weights(folder, weight_name=...)` and `unet.load_lora_adapter(folder, weight_name=..., prefix="unet")`.
    An interruption breaks an old file, but not under `training.write_atomically(path, lambda path: lora.save(net, path))`.
    """
    found = loras(net)
    first = next(iter(found.values()))
    settings = {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {f"^{name}": lora.rank for name, lora in found.items() if lora.rank != first.rank},
        "alpha_pattern": {f"^{name}": lora.alpha for name, lora in found.items() if lora.alpha != first.alpha},
        "target_modules": list(found),
    }
    header = {"format": "pt", METADATA: json.dumps({f"{prefix}.{key}": value for key, value in settings.items()})}
    state = {f"{prefix}.{name}": value.cpu() for name, value in lora_state(net).items()}
    save_file(state, path, header)


def load(net: nn.Module, path: Path | str, prefix: str = "unet") -> None:
    """Put a file of `save` or of diffusers into the LoRAs of `net`, with its alphas, which are the rank where it names none.

    Raises ValueError as `load_lora`, and for a file that is no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:  # no mapping: without keys() it cannot be walked over
            header, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path = {path} is no safetensors file ({error}); expected one of save(net, path)") from None
    load_lora(net, {name.removeprefix(f"{prefix}."): value for name, value in state.items()})
    settings = {key.removeprefix(f"{prefix}."): value for key, value in json.loads(header.get(METADATA, "{}")).items()}
    patterns = settings.get("alpha_pattern", {})
    for name, lora in loras(net).items():
        alpha = settings.get("lora_alpha", lora.rank)
        lora.alpha = float(patterns.get(f"^{name}", patterns.get(name, alpha)))


def _some(names: Iterable[str]) -> str:
    """The first of these names, and how many more there are."""
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first


def _end(name: str) -> str:
    """The last part of a name, with the one before where it is a number."""
    *before, last = name.split(".")
    return f"{before[-1]}.{last}" if last.isdigit() and before else last


# --- children whose state is all that they add to their parent -----------------------------------------------------------


class LowRank(_Changed):
    """A convolution or linear layer with the weight W + up down, which starts as W, and a bias of its own.

    W is frozen and not part of the state; up (c_out, rank), at first 0, down (rank, c_in k k), normal with variance
    1 / (c_in k k), and the bias (c_out,) learn. Raises ValueError for a rank below 1.
    """

    def __init__(self, layer: Layer, rank: int):
        super().__init__(layer, rank)
        self.bias = nn.Parameter(layer.bias.detach().clone())
        W, inputs = layer.weight.detach(), self.down.shape[1]
        self.down.data.copy_(torch.randn(rank, inputs, dtype=W.dtype) * inputs**-0.5)
        for name in ("weight", "bias"):
            delattr(layer, name)
        layer.register_buffer("weight", W, persistent=False)
        layer.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.layer, {"weight": self.layer.weight + self.change(), "bias": self.bias}, (x,))


def low_rank(net: nn.Module, rank: int) -> nn.Module:
    """A copy of `net` that computes the same and in which only a low-rank change of each weight matrix learns.

    Biases, normalisations and embeddings, which are small, learn in full. The state holds what learns and nothing else:
    load it into a child of the same parent.
    """
    child = copy.deepcopy(net).requires_grad_(True)
    for module in list(child.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, Layer):
                setattr(module, name, LowRank(layer, rank))
    return child
