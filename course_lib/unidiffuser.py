"""UniDiffuser (Bao et al. 2023b): one network for the joint density of two things, with a noise level for each.

"One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale": the level of what is given is 0, of what is
unknown it is the highest, where nothing is left of it. So one network holds the joint density, both conditionals and both
marginals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.denoisers import NetworkDenoiser, from_v
from course_lib.nets.joint import LAST, JointViT, vectors
from course_lib.schedules import VariancePreserving


class UniDiffuser:
    """The Denoisers that a `JointViT` holds. Pictures are x (B, C, H, W), attributes a (B, d).

    schedule  turns sigma into the time in [0, 1] that the network is told, times 1,000; it preserves the variance

    joint()          of y (B, C H W + d), both side by side, at one level
    pictures(a)      of x given a;           pictures(None, noise) the marginal, for any standard normal `noise` in place of a
    attributes(x)    of a given x;           attributes(None, noise) likewise

    Attributes are read as `values(a)`, the largest of each group; `vectors(values)` makes them, 1 for the value and -1 for the
    others.
    """

    def __init__(self, net: JointViT, schedule: VariancePreserving):
        self.net, self.schedule = net, schedule
        self.shape = (net.channels, net.patch * net.side, net.patch * net.side)

    def _time(self, sigma: Tensor) -> Tensor:
        return LAST * self.schedule.t_of_sigma(sigma)

    def joint(self) -> NetworkDenoiser:
        """D(y, sigma), with y as `split` takes it apart."""

        def both(y: Tensor, time: Tensor) -> Tensor:
            v_x, v_a = self.net(*self.split(y), time, time)
            return torch.cat([v_x.flatten(1), v_a], 1)

        return from_v(both, self._time)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, C H W + d) as x (B, C, H, W) and a (B, d)."""
        x, a = y.split([y.shape[1] - sum(self.net.sizes), sum(self.net.sizes)], 1)
        return x.reshape(-1, *self.shape), a

    def pictures(self, a: Tensor | None, noise: Tensor | None = None) -> NetworkDenoiser:
        """D(x, sigma) given a, or of pictures alone. Raises ValueError unless one of the two is given."""
        other, time = _known(a, noise, "a")
        return from_v(lambda x, t: self.net(x, other, t, time)[0], self._time)

    def attributes(self, x: Tensor | None, noise: Tensor | None = None) -> NetworkDenoiser:
        """D(a, sigma) given x, or of attributes alone. Raises ValueError unless one of the two is given."""
        other, time = _known(x, noise, "x")
        return from_v(lambda a, t: self.net(other, a, time, t)[1], self._time)

    def values(self, a: Tensor) -> Tensor:
        """The value of each attribute, (B, number of attributes) long."""
        return torch.stack([part.argmax(1) for part in a.split(self.net.sizes, 1)], 1)

    def vectors(self, values: Tensor) -> Tensor:
        """Values (B, number of attributes) long as a (B, d)."""
        return vectors(values, self.net.sizes)


def _known(given: Tensor | None, noise: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """What the network is told of the other, and its time: as it is at time 0, or noise alone at the last."""
    if (given is None) == (noise is None):
        raise ValueError(f"both {name} and noise are {'missing' if noise is None else 'given'}; expected one of them")
    other = noise if given is None else given
    return other, torch.tensor(LAST if given is None else 0.0, device=other.device)
