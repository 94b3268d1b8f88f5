"""Training: one loss, one loop.

Every published loss is the denoising loss under a weight lambda(sigma):
L = E lambda(sigma) |D(x0 + sigma eps, sigma) - x0|^2 / d.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from course_lib.devices import autocast, channels_last, generator, pick_device
from course_lib.types import Denoiser, right

Rows = tuple[Tensor, ...]

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "x0": lambda s: torch.ones_like(s),
    "eps": lambda s: s**-2,
    "v": lambda s: (1 + s**2) / s**2,
    "flow": lambda s: (1 + s) ** 2 / s**2,
}
"""lambda(sigma) that turns the denoising loss into the mean squared error of x0, eps, v or the flow's velocity."""


def edm_weight(sigma_data: float) -> Callable[[Tensor], Tensor]:
    """lambda = (sigma^2 + sd^2) / (sigma sd)^2: unit loss at every sigma at the start (Karras et al. 2022, Tab. 1)."""
    return lambda s: (s**2 + sigma_data**2) / (s * sigma_data) ** 2


def check_data(x0: Tensor, name: str = "x0") -> Tensor:
    """Return pictures x0 as they are; raise ValueError, which says how to map them, where they do not fill [-1, 1].

    Schedules, noise levels and clipping are set for pictures in [-1, 1]. Values beyond it by more than 1e-3 are an
    error, and so is a set without a single value below 0: it lies in [0, 1], where half the range is never used.
    Points in the plane may lie where they like and are not to be checked.
    """
    if not bool(torch.isfinite(x0).all()):
        raise ValueError(f"{name} has a value that is not finite; expected pictures in [-1, 1]")
    low, high = float(x0.min()), float(x0.max())
    if low >= 0 and high > 0:
        if x0.dtype == torch.uint8 or 128 <= high <= 255:
            remedy = f"{name} / 127.5 - 1"
        elif high <= 1.001:
            remedy = f"2 * {name} - 1"
        else:
            remedy = f"{name} / {high / 2:.6g} - 1 if {high:.6g} is the scale's white"
    elif low < -1.001 or high > 1.001:
        remedy = f"{name} / {max(-low, high):.6g}"
    else:
        return x0
    raise ValueError(f"{name} has values from {low:.6g} to {high:.6g}; expected pictures in [-1, 1]: map them by {remedy}")


def denoising_loss(
    D: Denoiser,
    x0: Tensor,
    sigma: Tensor,
    eps: Tensor,
    weight: str | Callable[[Tensor], Tensor] = "eps",
    emphasis: Tensor | float = 1.0,
) -> Tensor:
    """lambda(sigma) mean(emphasis |D(x0 + sigma eps, sigma) - x0|^2) for each sample, (B,).

    x0 and eps (B, ...), sigma (B,) > 0. `weight` is 'x0', 'eps', 'v', 'flow' or a function of sigma;
    'eps' gives DDPM's L_simple (Ho et al. 2020, Eq. 14). `emphasis` weighs the elements, and broadcasts to x0; the minimum
    stays E[x0 | x] where it is a function of x. Raises ValueError for another name or sigma <= 0.
    """
    if isinstance(weight, str):
        if weight not in WEIGHTS:
            raise ValueError(f"weight = {weight!r}; expected one of {', '.join(WEIGHTS)} or a function of sigma")
        weight = WEIGHTS[weight]
    if not bool(((sigma > 0) & sigma.isfinite()).all()):
        wrong = sigma[~((sigma > 0) & sigma.isfinite())].flatten()[0]
        raise ValueError(f"sigma has the value {float(wrong):.6g}; expected finite sigma > 0 in training")
    x = x0 + right(sigma, x0) * eps
    error = (emphasis * (D(x, sigma) - x0).float().square()).flatten(1).mean(1)
    return weight(sigma).to(error) * error


def lognormal_sigmas(n: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """ln sigma ~ N(mean, std^2), (n,) (Karras et al. 2022, Tab. 1, where mean = -1.2 and std = 1.2)."""
    return (mean + std * torch.randn(n, generator=generator)).exp()


class EMA:
    """An exponential moving average of the weights: the model that samples.

    w_ema <- d w_ema + (1 - d) w, with d = min(decay, (1 + k) / (10 + k)) at update k, so that the random
    start is soon forgotten.
    """

    def __init__(self, net: nn.Module, decay: float = 0.999):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, net: nn.Module, k: int) -> None:
        """Take in the weights of `net` after its k-th update."""
        d = min(self.decay, (1 + k) / (10 + k))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - d)
        for average, current in zip(self.net.buffers(), net.buffers(), strict=True):
            average.copy_(current)


@dataclass
class Fit:
    """What training returns: the averaged network, in evaluation mode, the loss of each step, and the time that they took.

    `stages` says where that time went, by the name of the stage, in a run of several.
    """

    net: nn.Module
    losses: list[float]
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    net: nn.Module,
    draw: Callable[[torch.Generator], Rows],
    loss: Callable[..., Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    warmup: int = 100,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    clip: float = 1.0,
    ema_decay: float = 0.999,
    seed: int = 0,
    half: bool = True,
    nhwc: bool = True,
    device: str | None = None,
    checkpoint: Path | str | None = None,
    save_every: int = 500,
    stop_at: int | None = None,
    diverged: float = 100.0,
    on_step: Callable[[int, nn.Module], None] = lambda step, ema: None,
    progress: bool = True,
) -> Fit:
    """Minimise `loss(net, *rows).mean()` over the batches that `draw(generator)` returns.

    draw    returns tensors with one row per sample; its generator is a function of (seed, step) alone, so
            that a resumed run is the same run, bit for bit, and several processes share one batch
    loss    returns one number per sample, (B,)
    steps   length of the whole run, which fixes the learning rate; `stop_at` ends this call earlier
    betas   memory of AdamW's averages of the gradient and of its square; a GAN wants less than 0.9
    half    bfloat16 where the hardware has it
    nhwc    channels-last layout, with `half`; convolutions of few channels at many pixels are faster without
    checkpoint  file to resume from and to save to, every `save_every` steps and at the end
    diverged  how many times the first loss is too much, see `check_losses`; math.inf where the loss measures nothing
    on_step called with the step's number (from 1) and the averaged network

    AdamW, warm-up and cosine decay, clipped gradients, EMA; runs on one device, or on several through
    `accelerate launch`. Raises ValueError for a checkpoint of a run with other settings, and FloatingPointError where the
    loss is not finite or has diverged; the last checkpoint stays.
    """
    from accelerate import Accelerator

    where = pick_device(device)
    accelerator = Accelerator(cpu=where.type == "cpu")
    where = accelerator.device
    net = channels_last(net, where) if half and nhwc else net.to(where)
    fused = where.type in ("cpu", "cuda")  # one kernel for all weights: a third of a small network's step
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    ema, losses, first, spent = EMA(net, ema_decay), [], 0, 0.0
    checkpoint = Path(checkpoint) if checkpoint is not None else None
    settings = {"steps": steps, "seed": seed, "lr": lr, "warmup": warmup, "betas": tuple(betas), "weight_decay": weight_decay,
                "clip": clip, "ema_decay": ema_decay}  # fmt: skip
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=where, weights_only=True)
        for name, value in settings.items():
            if (saved := state.get("settings", {}).get(name)) != value:
                raise ValueError(
                    f"checkpoint = {checkpoint} belongs to a run with {name} = {saved}; expected {name} = {value}: "
                    "delete it, or ask for the same run"
                )
        net.load_state_dict(state["net"])
        ema.net.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        losses, first, spent = state["losses"], state["step"], state["seconds"]
    begun = time.perf_counter() - spent

    def save(step: int) -> None:
        if checkpoint is not None and accelerator.is_main_process:
            state = {"step": step, "settings": settings, "losses": losses, "seconds": time.perf_counter() - begun}
            state |= {"net": plain.state_dict(), "ema": ema.net.state_dict(), "optimizer": optimizer.state_dict()}
            write_atomically(checkpoint, lambda path: torch.save(state, path))

    wrapped, optimizer = accelerator.prepare(net, optimizer)
    plain = accelerator.unwrap_model(wrapped)
    wrapped.train()
    warmup = min(warmup, steps // 10)
    rank, world = accelerator.process_index, accelerator.num_processes
    cuda = [where] if where.type == "cuda" else []
    last = steps if stop_at is None else min(stop_at, steps)
    bar = tqdm(range(first, last), initial=first, total=steps, desc="training", unit="step", mininterval=1.0,
               disable=not (progress and accelerator.is_main_process))  # fmt: skip
    pending: list[Tensor] = []
    for step in bar:
        batch = draw(generator(seed, step))
        if len(batch[0]) % world:
            raise ValueError(f"draw returned {len(batch[0])} rows; expected a multiple of {world}, the number of processes")
        rows = tuple(row[rank::world].to(where, non_blocking=True) for row in batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup)
        with torch.random.fork_rng(cuda):  # dropout too is a function of the step
            _seed(generator(seed, step, rank).initial_seed(), cuda)
            with autocast(where, half):
                value = loss(wrapped, *rows).mean()
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(value)
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), clip)
        optimizer.step()
        ema.update(plain, step)
        pending.append(value.detach() + 0 * norm.detach())  # nan where either is not finite
        done = step + 1
        if len(pending) == 25 or done % save_every == 0 or done == last:
            losses += accelerator.reduce(torch.stack(pending), "mean").float().tolist()  # the only host sync, every 25 steps
            sound = check_losses(losses, len(pending), diverged)
            pending = []
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}")
        if (done % save_every == 0 or done == last) and sound:  # never over a good checkpoint with a run that is breaking
            save(done)
        on_step(done, ema.net)
    return Fit(ema.net, losses, time.perf_counter() - begun)


def _seed(seed: int, cuda: list[torch.device]) -> None:
    """Seed torch's global generators; `torch.manual_seed` would also queue a call for each GPU that there might be."""
    torch.default_generator.manual_seed(seed)
    for device in cuda:
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


WINDOW = 25
"""So many losses in a row make a divergence; fewer are a spike."""


def check_losses(losses: list[float], new: int, diverged: float = 100.0) -> bool:
    """Whether the last loss is sound; FloatingPointError, which names the step, where a run has broken.

    losses  one number a step, from step 1; the last `new` have not been seen yet

    Broken is a loss that is not finite, or 25 losses in a row above the bound `diverged` * max(1, |first loss|); a loss
    above it is not sound. The first loss is the untrained network's, before any update, so that a run that explodes
    within a few steps is measured against what it left. *Every* one of 25 must exceed the bound, so that heavy-tailed
    weights, spikes and a loss that wanders set nothing off. And since published losses are near 1 untrained, a loss
    that starts near 0 (a network that starts as a copy of its teacher, a penalty that is switched on slowly) may rise
    to `diverged` itself; the price is that a loss in very small units must grow more before it is stopped.
    """
    for step, value in enumerate(losses[len(losses) - new :], len(losses) - new + 1):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step}; expected a finite number: lower the learning rate, "
                "clip the gradient, or look for sigma = 0 and data outside [-1, 1]"
            )
    unity = max(1.0, abs(losses[0]))
    bound = diverged * unity
    start = len(losses)  # the losses since this one are all above the bound
    while start and losses[start - 1] > bound:
        start -= 1
    if len(losses) - start >= WINDOW:
        raise FloatingPointError(
            f"the loss has been above {bound:.4g} ({diverged:g} times {unity:.4g}) since step {start + 1} and is "
            f"{losses[-1]:.4g} at step {len(losses)}; the first was {losses[0]:.4g} and it was expected to fall: lower the "
            "learning rate, lengthen the warm-up, clip the gradient, or look for data and weights of the wrong size"
        )
    return start == len(losses)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it: an interruption leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
