"""`mini-sd-any-scale`: pictures of 32 to 256 pixels from the latents of `mini-sd`, by a local implicit image function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from course_lib import metrics, zoo
from course_lib.nets.any_scale import AnyScale, AnyScaleDecoder, enlarged, queries
from course_lib.training import Fit, fit
from course_lib.worlds.scenes.dataset import SceneDataset

DATA = "the scene world: 1,000 training scenes of seed 41, one or two objects, at 32, 64, 96, 128, 192 and 256 px"
SCENES, HELD = (1_000, 41), (100, 42)
SIZES = (32, 64, 96, 128, 192, 256)
JUDGED = (32, 48, 64, 96, 128, 160, 256)
"""Two of them were never trained on."""
STEPS, BATCH, POINTS, RATE, SEED = 5_000, 4, 1_024, 1e-3, 8


def network(name: str = "mini-sd-any-scale") -> AnyScale:
    """The untrained function: bicubic enlargement."""
    return AnyScale()


def wrap(net: AnyScale) -> AnyScaleDecoder:
    """What `zoo.load` returns: the function beside the model whose latents it decodes."""
    return AnyScaleDecoder(net, zoo.load("mini-sd", device="cpu"))


def train(
    name: str = "mini-sd-any-scale",
    net: nn.Module | None = None,
    steps: int = STEPS,
    lr: float = RATE,
    seed: int = SEED,
    **options: Any,
) -> Fit:
    """The squared error of random pixels of renders, of one random size a step; the latents are those of 64 px."""
    of = {size: SceneDataset(*SCENES, size, objects=(1, 2)).cached() for size in SIZES}
    decoder = wrap(network())
    every = torch.arange(SCENES[0])
    with torch.no_grad():
        latents = torch.cat([decoder.model.encode(of[64].pictures(rows)) for rows in every.split(100)])

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(SCENES[0], (BATCH,), generator=source)
        size = SIZES[int(torch.randint(len(SIZES), (), generator=source))]
        features = decoder.features(latents[rows])
        at, cell, lack = queries(features, of[size].pictures(rows), POINTS, source)
        return features, lack, at.expand(BATCH, -1, -1), cell.expand(BATCH, -1)

    def loss(net: AnyScale, features: Tensor, lack: Tensor, at: Tensor, cell: Tensor) -> Tensor:
        return (net(features, at[0], cell[0]).float() - lack).square().flatten(1).mean(1)

    if net is None:
        torch.manual_seed(seed)
        net = network(name)
    return fit(net, draw, loss, steps=steps, lr=lr, seed=seed, **options)


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """PSNR against held-out renders of each size, beside the bicubic enlargement of the decoded 64 px."""
    decoder, of = wrap(net), SceneDataset(*HELD, objects=(1, 2))
    with torch.no_grad():
        z = decoder.model.encode(of.pictures(torch.arange(len(of))))
        plain = decoder.model.decode(z, clamp=False)
    found = []
    for size in JUDGED:
        target = SceneDataset(*HELD, size, objects=(1, 2)).pictures(torch.arange(len(of)))
        ours = torch.cat([decoder.decode(part, size) for part in z.split(10)])
        pairs = ours, enlarged(plain, (size, size)).clamp(-1, 1)
        each = torch.tensor([[metrics.psnr(x, y) for x, y in zip(of_, target, strict=True)] for of_ in pairs])
        gain = each[0] - each[1]
        found.append({
            "size": size, "psnr": round(float(each[0].mean()), 3), "bicubic": round(float(each[1].mean()), 3),
            "gain": [round(float(gain.mean()), 3), round(float(gain.std() / len(gain) ** 0.5), 3)],
        })  # fmt: skip
    return {"pictures": HELD[0], "sizes": found, "never_trained": [size for size in JUDGED if size not in SIZES]}
