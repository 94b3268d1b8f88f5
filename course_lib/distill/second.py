"""Scores that learn beside the pictures: VSD's second score, and BSD's bootstrapped teacher. Both are LoRAs of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import SampleNoise, autocast
from course_lib.distill.levels import Levels
from course_lib.nets.lora import ATTENTION, load_lora, lora_state, with_lora
from course_lib.sample import sample
from course_lib.schedules import exponential
from course_lib.training import denoising_loss
from course_lib.types import Denoiser, Noise, right


class Learner:
    """The teacher with a LoRA that learns to denoise the pictures it is shown, with an AdamW of its own.

    D       the teacher under its prompt, without guidance; its weights are shared and stay as they are
    levels  draws the noise levels of its training
    rank, targets  of the LoRA, see `with_lora`
    steps   of its optimiser at each call of `learn`; losses holds the mean loss of each

    It is a Denoiser, which is the teacher at first, and a companion of `distill`. The loss is that of DDPM,
    E |eps_hat(x, sigma) - eps|^2 with x = x0 + sigma eps (Ho et al. 2020, Eq. 14).
    """

    def __init__(
        self,
        D: NetworkDenoiser,
        levels: Levels,
        *,
        rank: int = 4,
        targets: Sequence[str] = ATTENTION,
        lr: float = 1e-3,
        steps: int = 1,
        half: bool = False,
        seed: int = 0,
    ):
        self.net = with_lora(D.net, rank, targets, seed=seed)
        self.D, self.levels, self.steps, self.half = replace(D, net=self.net), levels, steps, half
        learns = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learns, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.losses: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.D(x, sigma)

    def given(self, **condition: Any) -> NetworkDenoiser:
        """The same network, LoRA included, under another condition."""
        return self.D.given(**condition)

    def learn(self, x0: Tensor, progress: float, draws: torch.Generator) -> None:
        """Move the LoRA `steps` times towards the Denoiser of x0 (B, ...)."""
        for _ in range(self.steps):
            sigma = self.levels(progress, len(x0), draws).to(x0.device)
            eps = torch.randn(x0.shape, generator=draws).to(x0)
            with torch.enable_grad(), autocast(x0.device, self.half):
                loss = denoising_loss(self.D, x0, sigma, eps).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.losses.append(float(loss.detach()))

    def state_dict(self) -> dict[str, Any]:
        return {"lora": lora_state(self.net), "optimizer": self.optimizer.state_dict(), "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_lora(self.net, state["lora"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])


class SecondScore(Learner):
    """The Denoiser of the particles, learnt as they move (Wang, Lu et al. 2023, Sec. 3.2): `vsd(cfg(D, D_ref, 7.5), second)`."""


class Bootstrapped(Learner):
    """A teacher that is fitted to better versions of the pictures themselves (BSD; DreamCraft3D, Sun et al. 2024, Sec. 3.3).

    Every `every` steps the pictures are noised to the level `strength(progress)` and denoised again by `D_guided` in `calls`
    steps; between, the LoRA learns what came of it, as DreamBooth does a subject (Ruiz et al. 2023). Teacher and pictures
    improve in turn: `vsd(cfg(boot.D, D_ref, w), second)` with `Companions(boot, second)`.
    """

    def __init__(
        self,
        D: NetworkDenoiser,
        D_guided: Denoiser,
        levels: Levels,
        strength: Callable[[float], float],
        every: int = 50,
        calls: int = 10,
        **options: Any,
    ):
        super().__init__(D, levels, **options)
        self.D_guided, self.strength, self.every, self.calls = D_guided, strength, every, calls
        self.shown, self.references = 0, torch.empty(0)

    def learn(self, x0: Tensor, progress: float, draws: torch.Generator) -> None:
        if self.shown % self.every == 0:
            noise = SampleNoise(draws.initial_seed(), first=len(x0))  # not the rows of the rule's own noise
            with autocast(x0.device, self.half):
                self.references = renoised(self.D_guided, x0, self.strength(progress), noise, self.calls)
        self.shown += 1
        super().learn(self.references, progress, draws)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "shown": self.shown, "references": self.references}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.shown, self.references = state["shown"], state["references"]


def renoised(D: Denoiser, x0: Tensor, sigma: float, noise: Noise, calls: int = 10, low: float = 0.05) -> Tensor:
    """x0 noised to level sigma and denoised along a geometric grid (SDEdit, Meng et al. 2022): a likelier picture near x0."""
    x = x0 + right(torch.tensor(sigma), x0) * noise(x0)
    return sample(D, x, exponential(calls, low, sigma)).to(x0.dtype)
