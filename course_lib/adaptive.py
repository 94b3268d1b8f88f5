"""Sampling that chooses its own steps: a loop of its own, since a step may be refused."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from course_lib.types import Denoiser, Noise, check_sigma, right


class Adapted(NamedTuple):
    """What `sample_adaptive` returns: x (B, ...), calls of D, and the accepted levels of each sample, first to last."""

    x: Tensor
    calls: int
    levels: list[Tensor]


@torch.no_grad()
def sample_adaptive(
    D: Denoiser,
    x: Tensor,
    sigma_max: float,
    sigma_min: float,
    noise: Noise | None = None,
    rtol: float = 0.05,
    atol: float = 0.0078,
    first: float = 0.01,
    safety: float = 0.9,
    exponent: float = 0.9,
    redraw: bool = False,
    max_calls: int = 10_000,
    progress: bool = False,
) -> Adapted:
    """Gotta Go Fast, Algorithm 1: the reverse SDE with steps as long as a tolerance allows (Jolicoeur-Martineau et al. 2021).

    In the VE SDE's time, h = log(sigma / sigma'), from x at sigma_max (B, ...) down to sigma_min > 0:
    x1 = x + 2 h (D(x, sigma) - x) + sqrt(2) sigma dW           Euler-Maruyama, dW ~ N(0, h)
    x2 = x + 2 h (D(x1, sigma') - x1) + sqrt(2) sigma' dW       the same from its end, with the same noise
    error = rms((x1 - x_new) / max(atol, rtol max(|x1|, |x1 before|))),  x_new = (x1 + x2) / 2
    x <- x_new where error <= 1, else the step is refused;  h <- min(what is left, safety h error^-exponent)

    noise    None solves the probability-flow ODE instead: h for 2 h, no dW, so that x_new is Heun's method in log sigma
    rtol     the paper's dial, 0.01 (exact) to 0.5 (fast); atol, in units of x, is one grey level of 256 in [-1, 1]
    first    the first step, as a share of log(sigma_max / sigma_min)
    redraw   True draws new noise for a step that was refused, as published. The error grows with |dW|, so that what is
             accepted is then not Gaussian, and in a few dimensions, where |dW| varies, the law is far off. The default keeps
             the path and cuts it by a Brownian bridge

    Each sample has steps of its own, so that it does not change with its batch; D is called on the whole batch, twice a
    round, until the last sample arrives. The result is at sigma_min: D(x, sigma_min) removes the rest.
    Raises ValueError for levels or tolerances out of range, FloatingPointError, naming sigma, where x stops being finite,
    and RuntimeError after `max_calls` calls.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}; expected 0 < sigma_min < sigma_max")
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"rtol = {rtol}, atol = {atol}; expected tolerances >= 0, at least one of them above 0")
    for name, value in (("first", first), ("safety", safety), ("exponent", exponent)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} = {value}; expected a number in (0, 1]")
    check_sigma(sigma_max, "sigma_max")
    span = math.log(sigma_max / sigma_min)
    left = torch.full((len(x),), span, dtype=torch.float64)  # of log sigma, for each sample
    h, sigma, before, calls = first * left, sigma_min * left.exp(), x, 0
    levels, path = [[float(s)] for s in sigma], None if noise is None else _Path(x, noise)
    with tqdm(total=round(span, 2), desc="adaptive sampling", unit="log sigma", disable=not progress) as bar:
        while bool((left > 0).any()):
            if calls + 2 > max_calls:
                raise RuntimeError(
                    f"max_calls = {max_calls} is spent at sigma = {float(sigma.max()):.6g}; expected to arrive at "
                    f"{sigma_min:g}: loosen rtol or atol, or allow more calls"
                )
            (h, dW) = (h, None) if path is None else path.step(x, h)
            sigma_next = sigma_min * (left - h).exp()
            rate = right(h if path is None else 2 * h, x)
            x1 = x + rate * (D(x, sigma) - x)
            if path is not None:
                x1 = x1 + right(2**0.5 * sigma, x) * dW
            x2 = x + rate * (D(x1, sigma_next) - x1)
            if path is not None:
                x2 = x2 + right(2**0.5 * sigma_next, x) * dW
            calls += 2
            x_new = (x1 + x2) / 2
            allowed = (rtol * torch.maximum(x1.abs(), before.abs())).clamp_min(atol)
            error = ((x1 - x_new) / allowed).double().square().flatten(1).mean(1).sqrt().cpu()  # (B,)
            if not bool(torch.isfinite(error).all()):
                bad = float(sigma[~torch.isfinite(error)][0])
                raise FloatingPointError(
                    f"x is not finite after the step at sigma = {bad:.6g}; expected finite numbers: check the network's "
                    "output at this noise level, and its precision"
                )
            accept = (error <= 1) & (left > 0)
            keep = right(accept, x).bool()
            x, before = torch.where(keep, x_new, x), torch.where(keep, x1, before)
            left, sigma = torch.where(accept, (left - h).clamp_min(0), left), torch.where(accept, sigma_next, sigma)
            if path is not None:
                path.drop(error <= 1)  # samples that have arrived, too: their pieces have no length
                path.drop((error > 1) & redraw, everything=True)
            h = torch.minimum(left, safety * h * error.clamp_min(1e-12) ** -exponent)
            for i in accept.nonzero().flatten().tolist():
                levels[i].append(float(sigma[i]))
            bar.update(round(span - float(left.max()), 2) - bar.n)
    return Adapted(x, calls, [torch.tensor(row, dtype=torch.float64) for row in levels])


class _Path:
    """A Brownian path in log sigma for each sample, drawn where it is asked for and kept where a step is refused.

    What is known lies on a stack of pieces (length, increment), the next one on top: a shorter step cuts the top piece by a
    Brownian bridge, a longer one is not given (Rackauckas and Nie 2017, rejection sampling with memory).
    """

    def __init__(self, x: Tensor, noise: Noise):
        self.noise, self.rows = noise, torch.arange(len(x))
        self.depth = torch.zeros(len(x), dtype=torch.long)
        self.lengths = torch.zeros(0, len(x), dtype=torch.float64)
        self.pieces = x.new_zeros(0, *x.shape)

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The next piece, (B,) lengths of at most h and (B, ...) increments; it is on top afterwards."""
        if int(self.depth.max()) + 1 >= len(self.lengths):
            self.lengths = torch.cat([self.lengths, self.lengths.new_zeros(4, len(x))])
            self.pieces = torch.cat([self.pieces, self.pieces.new_zeros(4, *x.shape)])
        known, top = self.depth > 0, (self.depth - 1).clamp_min(0)
        p, W = self.lengths[top, self.rows], self.pieces[top, self.rows]
        whole = known & (h >= p * (1 - 1e-6))  # nothing is left worth a step of its own
        length, p = torch.where(whole, p, h), torch.where(known, p, h.clamp_min(1e-300))
        spread = torch.where(known, length * (p - length).clamp_min(0) / p, h).sqrt()
        increment = right(torch.where(known, length / p, 0.0), x) * W + right(spread, x) * self.noise(x)
        self.lengths[top, self.rows] = torch.where(known, p - length, 0.0)  # the rest, below the new piece
        self.pieces[top, self.rows] = W - increment
        self.depth = torch.where(whole, self.depth, self.depth + 1)
        self.lengths[self.depth - 1, self.rows], self.pieces[self.depth - 1, self.rows] = length, increment
        return length, increment

    def drop(self, rows: Tensor, everything: bool = False) -> None:
        """Take the top piece, or all that is known, from the samples in the mask `rows`."""
        self.depth = torch.where(rows, 0 if everything else self.depth - 1, self.depth)
