"""`mini-control-edge`, `-depth` and `-seg`: ControlNets of `mini-sd`, for lines, nearness and classes (Zhang et al. 2023).

`mini-sd` is locked; the copy of its encoder, the hint encoder and the zero convolutions learn by the loss that `mini-sd` was
trained with. Half of the prompts are empty, so that the map alone must say what there is (Sec. 3.3). The control of edges sees
exact lines, sketches from steady to shaky, and Canny's lines of the picture, a third of the time each, and serves them all.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib import zoo
from course_lib.nets.control import ControlNet, control_of, controlled, from_diffusers, to_diffusers
from course_lib.training import Fit, denoising_loss, fit
from course_lib.zoo import judge_controls
from course_lib.zoo.control_data import Mapped, mapped, tokens
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.recipes.settings import settings

DATA = "24,000 training scenes of seed 62, one or two objects, with captions and condition maps"
SCENES, SEED = 24_000, 62
DROPPED = 0.5
TRAINING: dict[str, Any] = {"lr": 3e-3, "seed": 62}
STEPS = {"edge": 5_000, "depth": 2_000, "seg": 4_000}
BATCH = 48


def kind(name: str) -> str:
    """'edge', 'depth' or 'seg', the control that a model of this name is."""
    return name.removeprefix("mini-control-")


def network(name: str = "mini-control-edge") -> ControlNet:
    """The untrained control."""
    return control_of(zoo.load("mini-sd", device="cpu").denoiser.net, seed=TRAINING["seed"])


def batches(of: Mapped, layers: tuple[str, ...], sigmas: Tensor, batch: int = BATCH, dropped: float = DROPPED) -> Any:
    """What `fit` draws from: (x0, sigma, eps, tokens, map), with noise levels even in t, one in each of `batch` strata.

    dropped  the share of prompts that are left empty; without layers there is no map
    """
    empty = tokens([""])

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(of), (batch,), generator=source)
        ids = of.ids[rows, torch.randint(of.ids.shape[1], (batch,), generator=source)]
        blank = torch.rand(batch, 1, generator=source) < dropped
        posterior, eps = torch.randn(2, batch, *of.mean.shape[1:], generator=source)
        t = (torch.arange(batch) + torch.rand(batch, generator=source)) / batch * len(sigmas)
        sigma = sigmas[t.long().clamp(max=len(sigmas) - 1)]
        learnt = of.latents(rows, posterior), sigma, eps, torch.where(blank, empty, ids)
        if not layers:
            return learnt
        which = torch.randint(len(layers), (batch,), generator=source)
        maps = torch.stack([of.condition(layer, rows) for layer in layers])[which, torch.arange(batch)]
        return *learnt, maps

    return draw


def attention_of(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU plain attention: the backward pass of the fused one takes a third of a step of sequences as short as these."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def loss_of(model: Pretrained) -> Any:
    """What `fit` minimises: the denoising loss of v of `model` under the control that is trained."""

    def loss(control: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor, ids: Tensor, maps: Tensor) -> Tensor:
        with attention_of(x0.device):
            with torch.no_grad():
                text = model.pipeline.text_encoder(ids)[0]
            D = controlled(model.denoiser, map=control).given(map=maps, encoder_hidden_states=text)
            return denoising_loss(D, x0, sigma, eps, "v")

    return loss


def train(
    name: str,
    net: nn.Module | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Fit:
    """Minimise `loss_of` over `batches`."""
    model = zoo.load("mini-sd", device)
    draw = batches(mapped(SCENES, SEED), judge_controls.MAPS[kind(name)], model.schedule.sigma(torch.arange(1000)))
    chosen = settings(TRAINING | {"steps": STEPS[kind(name)]}, steps=steps, lr=lr, seed=seed)
    return fit(network(name) if net is None else net, draw, loss_of(model), device=device, **chosen, **options)


def wrap(net: nn.Module) -> ControlNet:
    """What `zoo.load` returns: the control itself, for `nets.control.controlled`."""
    return net.eval()


def exported(net: ControlNet) -> Any:
    """The control as diffusers' ControlNetModel, which is how it is kept."""
    return to_diffusers(net.cpu().float(), zoo.load("mini-sd", device="cpu").net)


def opened(folder: Path) -> ControlNet:
    """The control that `exported` wrote to a folder, frozen, in fp32."""
    from diffusers import ControlNetModel

    return from_diffusers(ControlNetModel.from_pretrained(folder, local_files_only=True).float()).eval().requires_grad_(False)


def read(net: ControlNet) -> ControlNet:
    """The network of what `zoo.load` returned: itself."""
    return net


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """Control error, adherence and Frechet distance, with the control and without, see `judge_controls`."""
    return judge_controls.judge(kind(name), net)
