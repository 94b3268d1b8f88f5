"""The one loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from tqdm.auto import tqdm

from course_lib.steps import ddim
from course_lib.types import Denoiser, Step, check_grid

OnStep = Callable[[Tensor, Tensor], None]


@torch.no_grad()  # not inference_mode: guidance opens gradients inside
def sample(
    D: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    step: Step = ddim,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Tensor:
    """Carry x along the grid `sigmas`, one `step` at a time; returns x at the last level.

    x       (B, ...), at level sigmas[0]: draw it with `SampleNoise(seed).start(shape, sigmas[0])`
    sigmas  strictly monotone grid, (n + 1,): falling to sample, rising to invert
    step    how to move; on_step(x, sigma) is called after each

    Raises ValueError for a grid that is none, and FloatingPointError, naming sigma, where x stops being finite.
    """
    sigmas = check_grid(sigmas)
    memory, finite = None, []
    levels = list(pairwise(sigmas))
    for sigma, sigma_next in tqdm(levels, desc="sampling", unit="step", disable=not progress):
        x, memory = step(D, x, sigma, sigma_next, memory)
        finite.append(torch.isfinite(x).all())
        if x.device.type == "cpu" and not finite[-1]:
            break
        if on_step is not None:
            on_step(x, sigma_next)
    ok = torch.stack(finite).tolist()  # on a GPU the loop's only host sync
    if not all(ok):
        sigma = float(sigmas[ok.index(False)])
        raise FloatingPointError(
            f"x is not finite after the step at sigma = {sigma:.6g}; expected finite numbers: check the network's "
            "output at this noise level, its precision, and the size of the guidance"
        )
    return x


class Trajectory:
    """Records a run for plots: `sample(..., on_step=Trajectory(x, sigmas[0]))`; `.x` is (n + 1, B, ...) on the CPU."""

    def __init__(self, x: Tensor, sigma: Tensor | float):
        self.states, self.sigmas = [x.detach().cpu()], [float(sigma)]

    def __call__(self, x: Tensor, sigma: Tensor) -> None:
        self.states.append(x.detach().cpu())
        self.sigmas.append(float(sigma))

    @property
    def x(self) -> Tensor:
        """All states, first to last."""
        return torch.stack(self.states)
