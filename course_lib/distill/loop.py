"""The optimiser of score distillation: theta moves so that g(theta) follows a rule's gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm.auto import tqdm

from course_lib.devices import SampleNoise, autocast, generator, short_of_memory
from course_lib.distill.levels import Levels
from course_lib.distill.rules import Rule
from course_lib.training import write_atomically


class Companion(Protocol):
    """What learns beside theta, such as VSD's second score: told of the pictures after each step, saved with the run."""

    def learn(self, x0: Tensor, progress: float, draws: torch.Generator) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def distill(
    render: nn.Module,
    rule: Rule,
    levels: Levels,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    seed: int = 0,
    companion: Companion | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    half: bool = False,
    on_step: Callable[[int, Tensor], None] = lambda step, x0: None,
    checkpoint: Path | str | None = None,
    save_every: int = 100,
    stop_at: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Move the parameters of `render` along dx0/dtheta^T rule(x0, sigma, noise), and return the last render() (B, ...).

    render    theta as a module: `render()` is x0 = g(theta), (B, ...), one row a particle
    levels    draws sigma for each row
    optimizer over render.parameters(): its gradient is the rule's, pulled back through g
    companion learns from x0 after each step
    encode    from pictures to what the Denoiser takes; the gradient comes back through it (Pretrained.encode: latents)
    half      the rule's networks in bfloat16 where the hardware has it; theta and g stay in fp32
    on_step   called with the number of the step, from 1, and what was rendered in it

    The rule runs under no_grad: what it says is a vector and no loss. Noise of step k is a function of (seed, k) alone, so a
    run that resumes from `checkpoint` is the same run, bit for bit; `stop_at` ends this call earlier. Raises
    FloatingPointError, with sigma, where a gradient is not finite, before or after its way back through g: theta stays as it
    was; ValueError for a checkpoint of another run; torch.OutOfMemoryError with what to make smaller.
    """
    settings = {"steps": steps, "seed": seed}
    path, first = None if checkpoint is None else Path(checkpoint), 0
    if path is not None and path.exists():
        first = _resume(path, settings, render, optimizer, companion)
    last = steps if stop_at is None else min(stop_at, steps)
    bar = tqdm(range(first, last), initial=first, total=steps, desc="distilling", unit="step", disable=not progress)
    for step in bar:
        draws = generator(seed, step)
        noise, share = SampleNoise(draws.initial_seed()), step / max(steps - 1, 1)
        optimizer.zero_grad(set_to_none=True)
        advice = f"step {step + 1} does not fit into memory; take fewer particles, smaller pictures, or checkpointed()"
        with short_of_memory(advice):
            image = render().clone()  # where it is theta itself, theta moves on and what was shown stays
            x0 = image if encode is None else encode(image)
            sigma = levels(share, len(x0), draws)
            with torch.no_grad(), autocast(x0.device, half):
                gradient = rule(x0.detach(), sigma, noise).to(x0.dtype)
            _check(gradient, sigma, step)
            x0.backward(gradient)
            _check_theta(optimizer, sigma, step)
            optimizer.step()
            if companion is not None:
                companion.learn(x0.detach(), share, draws)
        done = step + 1
        on_step(done, image.detach())
        if path is not None and (done % save_every == 0 or done == last):
            _save(path, done, settings, render, optimizer, companion)
    with torch.no_grad():
        return render().clone()


class Companions:
    """Several companions as one; each learns in turn, with draws of its own."""

    def __init__(self, *companions: Companion):
        self.companions = companions

    def learn(self, x0: Tensor, progress: float, draws: torch.Generator) -> None:
        for one in self.companions:
            one.learn(x0, progress, draws)

    def state_dict(self) -> dict[str, Any]:
        return {str(k): one.state_dict() for k, one in enumerate(self.companions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for k, one in enumerate(self.companions):
            one.load_state_dict(state[str(k)])


def checkpointed(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, which keeps only its input for the way back and computes the rest again (Chen et al. 2016).

    What it would keep is then not there while the rule's networks run: the peak is the larger of the two and not their sum.
    """
    return lambda x: recomputed(encode, x, use_reentrant=False)


def _check(gradient: Tensor, sigma: Tensor, step: int) -> None:
    sound = gradient.flatten(1).isfinite().all(1).cpu()
    if not bool(sound.all()):
        where = sigma.expand(len(sound))[~sound]
        raise FloatingPointError(
            f"the gradient of step {step + 1} is not finite at sigma = {', '.join(f'{one:.4g}' for one in where[:3].tolist())} "
            f"({len(where)} of {len(sound)} rows); expected finite numbers: look at D at this level, and at its guidance scale"
        )


def _check_theta(optimizer: torch.optim.Optimizer, sigma: Tensor, step: int) -> None:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not bool(torch.stack([grad.sum() for grad in grads]).isfinite().all()):  # one wait for the device, however many weights
        levels = sigma.reshape(-1)
        where = ", ".join(f"{one:.4g}" for one in levels[:3].tolist())
        raise FloatingPointError(
            f"the gradient of step {step + 1} is finite with respect to x0 and not with respect to theta, at sigma = {where}"
            f"{', ...' if len(levels) > 3 else ''}; expected finite numbers: look at render() and encode"
        )


def _save(
    path: Path, step: int, settings: dict[str, int], render: nn.Module, optimizer: Any, companion: Companion | None
) -> None:
    state = {"step": step, "settings": settings, "render": render.state_dict(), "optimizer": optimizer.state_dict()}
    if companion is not None:
        state["companion"] = companion.state_dict()
    write_atomically(path, lambda file: torch.save(state, file))


def _resume(path: Path, settings: dict[str, int], render: nn.Module, optimizer: Any, companion: Companion | None) -> int:
    state = torch.load(path, weights_only=True)
    for name, value in settings.items():
        if (saved := state.get("settings", {}).get(name)) != value:
            raise ValueError(
                f"checkpoint = {path} belongs to a run with {name} = {saved}; expected {name} = {value}: delete it, or ask for "
                "the same run"
            )
    if ("companion" in state) != (companion is not None):
        raise ValueError(
            f"checkpoint = {path} has {'a' if 'companion' in state else 'no'} companion; expected the same run: delete it"
        )
    theta = state.get("render", {})
    shapes, saved = ({name: tuple(value.shape) for name, value in of.items()} for of in (render.state_dict(), theta))
    if shapes != saved:
        raise ValueError(f"checkpoint = {path} has a theta of shapes {saved}; expected those of render, {shapes}: delete it")
    render.load_state_dict(theta)
    optimizer.load_state_dict(state["optimizer"])
    if companion is not None:
        companion.load_state_dict(state["companion"])
    return int(state["step"])
