"""`figures`: a regressor of poses from keypoints, and a score prior over poses that is conditioned on the same keypoints.

Two small networks on the articulated figures of `worlds/figures.py`. The regressor starts ScoreHMR (Stathopoulos, Han and
Metaxas 2024), the prior refines: there the condition is a feature of the picture, here the detector's keypoints. Where no
joint is seen the keypoints are all zero and the prior is unconditional: a tenth of the batch has it so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser, from_edm
from course_lib.devices import generator
from course_lib.nets.mlp import MLP
from course_lib.training import Fit, denoising_loss, edm_weight, fit, lognormal_sigmas
from course_lib.worlds import figures

DATA = (
    "frames of eight motions of `worlds.figures`, drawn without end, seen from all sides; keypoints with noise and missing joints"
)
READ = 3 * len(figures.JOINTS)
SIGMA_DATA = 0.5
SIGMA_MEAN, SIGMA_STD = -1.2, 1.3
BATCH, STEPS, LR, SEED = 128, 9000, 2e-3, 0
BLIND = 0.1
"""Share of the batch for which nothing is seen."""
HELD_OUT = (7, 1)
"""The key of the generator of the figures that the card judges; training draws with other keys."""


class PosePrior(MLP):
    """net(x (B, 25), time, observed (B, 54)) -> (B, 25): the keypoints join the input; nothing seen where they are None."""

    def __init__(self, width: int = 160, depth: int = 3):
        super().__init__(figures.DIM + READ, width, depth, out=figures.DIM)

    def forward(self, x: Tensor, time: Tensor, observed: Tensor | None = None) -> Tensor:
        observed = x.new_zeros(len(x), READ) if observed is None else observed.to(x)
        return super().forward(torch.cat((x, observed), -1), time)


class Networks(nn.Module):
    """Both networks; `Networks()(keypoints.flat())` is the regressor's pose, (B, 54) -> (B, 25)."""

    def __init__(self):
        super().__init__()
        self.regressor = MLP(READ, 128, 3, out=figures.DIM, timed=False)
        self.prior = PosePrior()

    def forward(self, observed: Tensor) -> Tensor:
        return self.regressor(observed)


class Figures(NamedTuple):
    """What `zoo.load` returns: `regressor(keypoints.flat())`, a pose, and `prior`, a Denoiser of poses.

    `prior.given(observed=keypoints.flat())` is p(pose | keypoints); without a condition it is p(pose).
    """

    regressor: nn.Module
    prior: NetworkDenoiser


def network(name: str = "figures") -> Networks:
    """The untrained networks."""
    return Networks()


def wrap(net: Networks) -> Figures:
    """The networks in the form that `zoo.load` returns."""
    net.eval()
    return Figures(net.regressor, from_edm(net.prior, SIGMA_DATA))


def shares(n: int, source: torch.Generator) -> Tensor:
    """The share of joints that a figure misses, (n, 1): evenly from none to 2 MISSING, or all."""
    share = 2 * figures.MISSING * torch.rand(n, 1, generator=source)
    return torch.where(torch.rand(n, 1, generator=source) < BLIND, 2.0, share)  # above every draw of [0, 1)


def train(
    name: str = "figures", net: Networks | None = None, steps: int = STEPS, lr: float = LR, seed: int = SEED, **options: Any
) -> Fit:
    """Train both at once on the same figures: EDM's loss for the prior, joint and pose error for the regressor."""

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        pose = figures.draw_poses(BATCH, source)
        joints = figures.forward(pose)
        read = figures.detect(figures.project(joints), source, missing=shares(BATCH, source)).flat()
        sigma = lognormal_sigmas(BATCH, SIGMA_MEAN, SIGMA_STD, source)
        return pose, joints, read, sigma, torch.randn(pose.shape, generator=source)

    def loss(net: Networks, x0: Tensor, joints: Tensor, read: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        guess = net(read)
        away = (figures.forward(guess) - joints).norm(dim=-1).mean(-1)
        prior = denoising_loss(from_edm(net.prior, SIGMA_DATA, observed=read), x0, sigma, eps, edm_weight(SIGMA_DATA))
        return prior + away + (guess - x0).square().mean(-1)

    torch.manual_seed(seed)
    return fit(Networks() if net is None else net, draw, loss, steps=steps, lr=lr, seed=seed, **{"half": False, **options})


def judge(name: str, net: Networks) -> dict[str, Any]:
    """The numbers of the card, on 1,024 held-out figures: the regressor's joint error, and the prior's error at four levels."""
    models, source = wrap(net), generator(*HELD_OUT)
    pose = figures.draw_poses(1024, source)
    read = figures.observe(pose, source).flat()
    eps = torch.randn(pose.shape, generator=source)
    middle = figures.draw_poses(4096, generator(7, 2)).mean(0).expand_as(pose)
    with torch.no_grad():
        error = lambda D, s: float((D(pose + s * eps, torch.tensor(s)) - pose).square().mean().sqrt())
        return {
            "joint_error_mm": round(float(figures.joint_error(models.regressor(read), pose).mean()), 1),
            "joint_error_of_the_mean_pose_mm": round(float(figures.joint_error(middle, pose).mean()), 1),
            "sigmas": [0.05, 0.2, 0.8, 3.2],
            "rms_given_keypoints": [round(error(models.prior.given(observed=read), s), 4) for s in (0.05, 0.2, 0.8, 3.2)],
            "rms_unconditional": [round(error(models.prior, s), 4) for s in (0.05, 0.2, 0.8, 3.2)],
        }
