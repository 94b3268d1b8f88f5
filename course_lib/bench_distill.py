"""What the benchmark `distill` times: an iteration of SDS and of VSD on `mini-sd`, and the network work that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from course_lib import metrics
from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import generator, pick_device
from course_lib.distill import Rule, checkpointed, distill, sds, uniform_times, vsd
from course_lib.distill.second import SecondScore
from course_lib.guidance import cfg
from course_lib.nets.pixels import Pixels

PARTICLES, GUIDANCE, ITERATIONS = 8, 7.5, 5
PROMPT = "a small red cube on grass"


class Run(NamedTuple):
    """`distil()` is some iterations of distillation; `parts` do as often, one after the other, what the networks do in them."""

    name: str
    iterations: int
    distil: Callable[[], Any]
    parts: dict[str, Callable[[], Any]]
    networks: dict[str, nn.Module]


def runs(particles: int = PARTICLES, iterations: int = ITERATIONS) -> Iterator[Run]:
    """SDS, whose work is one call for prompt and reference; VSD, which adds the second score's call and its training step."""
    from course_lib import zoo

    device = pick_device()
    model = zoo.load("mini-sd", device=str(device))
    D, ref = (model.denoiser.given(**model.embed([prompt] * particles)) for prompt in (PROMPT, ""))
    guided, levels = cfg(D, ref, GUIDANCE), uniform_times(model.schedule)
    second = SecondScore(D, levels)
    latents = Pixels(model.shape, particles, spread=1.0).to(device)
    optimizer = torch.optim.Adam(latents.parameters(), lr=0.01, fused=True)
    x, sigma = latents.theta.detach().clone(), levels(0.5, particles, generator(0))

    def repeated(part: Callable[[], Any]) -> Callable[[], Any]:
        def parts() -> None:
            for _ in range(iterations):
                part()

        return parts

    def call(D: NetworkDenoiser, times: int = 1) -> Callable[[], Any]:
        """The network alone, with the numbers that its adapter would hand it, `times` the rows in one call."""
        time = D.c_noise(sigma).to(device, x.dtype)
        condition = {name: torch.cat([value] * times) for name, value in D.condition.items()}

        def part() -> None:
            with torch.no_grad():
                D.net(torch.cat([x] * times), torch.cat([time] * times), **condition)

        return part

    def training_step() -> None:
        time = second.D.c_noise(sigma).to(device, x.dtype)
        loss = (second.D.net(x, time, **second.D.condition) - x).square().mean()
        second.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        second.optimizer.step()

    def distilled(rule: Rule, companion: SecondScore | None = None) -> Callable[[], Tensor]:
        return lambda: distill(latents, rule, levels, optimizer, iterations, companion=companion)

    one = {f"a call of {2 * particles} rows": repeated(call(D, 2))}
    yield Run("SDS", iterations, distilled(sds(guided)), one, {"teacher": model.net})
    more = {
        f"a call of {particles} rows with LoRA": repeated(call(second.D)),
        f"a training step of {particles} rows": repeated(training_step),
    }
    networks = {"teacher": model.net, "second score": second.net}
    yield Run("VSD", iterations, distilled(vsd(guided, second), second), one | more, networks)


def rows_of_calls(run: Callable[[], Any], networks: dict[str, nn.Module]) -> dict[str, list[int]]:
    """The rows of every call that `run()` makes of each of the networks, in order."""
    counted: dict[str, list[int]] = {name: [] for name in networks}
    hooks = [
        net.register_forward_pre_hook(lambda _, inputs, name=name: counted[name].append(len(inputs[0])))
        for name, net in networks.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return counted


def pictures(particles: int = PARTICLES) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """An iteration of SDS on pictures: the encoder keeps what its way back needs, or computes it again."""
    from course_lib import zoo

    device = pick_device()
    model = zoo.load("mini-sd", device=str(device))
    D, ref = (model.denoiser.given(**model.embed([prompt] * particles)) for prompt in (PROMPT, ""))
    size = model.shape[1] * model.factor
    pixels = Pixels((3, size, size), particles).to(device)
    optimizer = torch.optim.Adam(pixels.parameters(), lr=0.01)
    rule, levels = sds(cfg(D, ref, GUIDANCE)), uniform_times(model.schedule)
    for name, encode in (("through the encoder", model.encode), ("through checkpointed(encode)", checkpointed(model.encode))):
        yield name, lambda encode=encode: distill(pixels, rule, levels, optimizer, 1, encode=encode)


def peak_mebibytes(run: Callable[[], Any]) -> float:
    """The most memory that `run()` holds at one time beyond what was there, of the device on which it computes."""
    if not torch.cuda.is_available():
        return metrics.peak_bytes(run) / 2**20
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
