"""Faults made on purpose: what the debugger is shown and must name."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from course_lib.debugging.conventions import RANGES, READINGS, TIMES, ranged, same
from course_lib.debugging.diagnosis import FAULTS
from course_lib.denoisers import NetworkDenoiser

F64 = torch.float64


def plant(name: str, D: NetworkDenoiser, seed: int = 0) -> NetworkDenoiser:
    """Give a right Denoiser the fault of this name, a key of FAULTS; `raw` of its diagnosis is then `D.net`.

    prediction  eps is read for x0, any other output for eps
    scaling     x goes in as it is
    schedule    the times are those of a cosine table, or of a linear one where D uses the cosine
    time        every level gets the time of sigma = 1
    range       the network is one of the data mapped by (x + 1) / 2, as after a forgotten 2 x - 1
    ema         an average with decay 0.9999 after 2,000 steps: 82 % of the random start, 18 % of the trained weights
    untrained   the random start itself

    The random start is drawn from `seed`; every layer of the network must have `reset_parameters`, as torch's have.
    Raises ValueError for another name, and where there are no weights to start anew.
    """
    if name not in FAULTS:
        raise ValueError(f"name = {name!r}; expected one of {', '.join(FAULTS)}")
    if name in ("ema", "untrained") and not isinstance(D.net, nn.Module):
        raise ValueError(f"D.net is a {type(D.net).__name__}; expected a torch module for {name!r}, which exchanges its weights")
    sigmas = torch.logspace(-1, 1, 9, dtype=F64)
    if name == "prediction":
        is_eps = all(same(a, b) for a, b in zip(D.coefficients(sigmas), READINGS["eps"](sigmas), strict=True))
        return replace(D, coefficients=READINGS["x0" if is_eps else "eps"])
    if name == "scaling":
        return replace(D, coefficients=lambda s: (*D.coefficients(s)[:2], torch.ones_like(s)))
    if name == "schedule":
        is_cosine = same(D.c_noise(sigmas), TIMES["cosine"](sigmas))
        return replace(D, c_noise=TIMES["linear" if is_cosine else "cosine"])
    if name == "time":
        return replace(D, c_noise=lambda s: D.c_noise(torch.ones_like(s)))
    if name == "range":

        def net(x: Tensor, sigma: Tensor, **condition: object) -> Tensor:
            return ranged(D.given(**condition), *RANGES["2 x - 1"])(x, sigma)

        as_it_is = lambda s: (torch.zeros_like(s), torch.ones_like(s), torch.ones_like(s))
        return NetworkDenoiser(net, as_it_is, lambda s: s, D.condition)
    return replace(D, net=_young(D.net, 0.9999**2000 if name == "ema" else 1.0, seed))


def _young(net: nn.Module, share: float, seed: int) -> nn.Module:
    """The average of weights in which `share` of the random start is left."""
    start = copy.deepcopy(net)
    cuda = {weight.device for weight in net.parameters() if weight.is_cuda}
    with torch.random.fork_rng(list(cuda)), torch.no_grad():
        torch.manual_seed(seed)
        for module in start.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for old, new in zip(start.parameters(), net.parameters(), strict=True):
            old.lerp_(new, 1 - share)
    return start
