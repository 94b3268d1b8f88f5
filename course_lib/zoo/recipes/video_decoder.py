"""`mini-video-decoder`: temporal layers for the decoder of `mini-sd`'s VAE (Video LDM; Blattmann et al. 2023, Sec. 3.1.1).

The encoder and the spatial layers of the decoder are frozen. The loss is the squared error of frames and, so that what is left of
it does not flicker, of the changes from frame to frame; Video LDM has a discriminator of clips beside the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from course_lib import zoo
from course_lib.training import Fit, fit
from course_lib.video.decoder import VideoDecoder, decoder_layers
from course_lib.video.inflation import Temporal
from course_lib.zoo import judge_decoder
from course_lib.zoo.recipes import video
from course_lib.zoo.recipes.settings import settings
from course_lib.zoo.video_data import filmed, pictures

DATA = video.DATA
TRAINING: dict[str, Any] = {"steps": 1_500, "lr": 3e-3, "seed": 75}
BATCH = 2
CHANGES = 2.0
"""Weight of the error of changes from frame to frame."""
LAYERS: dict[str, Any] = {"kernel": (3, 1, 1)}


def network(name: str = "mini-video-decoder") -> Temporal:
    """The untrained temporal layers."""
    return decoder_layers(zoo.load("mini-sd", device="cpu").vae, **LAYERS, seed=TRAINING["seed"])


def errors(found: Tensor, x: Tensor, changes: float = CHANGES) -> Tensor:
    """mean (x^ - x)^2 + changes mean (d x^ - d x)^2, d the difference of neighbouring frames, of clips (B, T, C, H, W): (B,)."""
    error = (found - x).float()
    return error.square().flatten(1).mean(1) + changes * error.diff(dim=1).square().flatten(1).mean(1)


def train(
    name: str = "mini-video-decoder",
    net: nn.Module | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Fit:
    """Minimise `errors` of true clips that are decoded from the means of their latents."""
    model, of = zoo.load("mini-sd", device), filmed(video.CLIPS, video.SEED)

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(of), (BATCH,), generator=source)
        return of.mean[rows], pictures(of.of[rows])

    def loss(temporal: Temporal, z: Tensor, x: Tensor) -> Tensor:
        return errors(VideoDecoder(model.vae, temporal)(z), x)

    chosen = settings(TRAINING, steps=steps, lr=lr, seed=seed)
    return fit(network(name) if net is None else net, draw, loss, nhwc=False, device=device, **chosen, **options)


def wrap(net: nn.Module) -> VideoDecoder:
    """What `zoo.load` returns: the decoder of `mini-sd` with the temporal layers."""
    return VideoDecoder(zoo.load("mini-sd", device=str(next(net.parameters()).device)).vae, net).eval()


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """Flicker and PSNR beside the image decoder's, see `judge_decoder`."""
    return judge_decoder.judge(wrap(net))
