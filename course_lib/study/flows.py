"""The explorer of flows: paths from noise to data in few steps, before and after they were made straight."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as widgets
import torch
from torch import Tensor

from course_lib import metrics
from course_lib.devices import generator
from course_lib.flows import flow_paths, straightness
from course_lib.gaussians import Mixture
from course_lib.steps import ddim
from course_lib.study import pictures, style
from course_lib.study.explorer import Explorer
from course_lib.study.points import density, scatter
from course_lib.types import Denoiser


class FlowExplorer(Explorer):
    """Flows in the plane, each walked by Euler's method in t: the paths of some points, and where a thousand of them end.

    mixture  a `Mixture` in the plane: what the ends ought to be
    flows    name -> Denoiser of that flow, fp32: `from_flow(v)`

    The distance is the sliced Wasserstein distance of SET ends to as many exact points, beside what two exact sets have; S is
    the straightness of the flow itself, by a hundred steps of a better rule. Raises ValueError for a mixture that is not in the
    plane, and for no flow.
    """

    SET, SHOWN, MOST = 1000, 40, 32
    HALF = 2.9  # of the plane that is shown

    def __init__(self, mixture: Mixture, flows: Mapping[str, Denoiser]):
        if mixture.dim != 2:
            raise ValueError(f"mixture is in {mixture.dim} dimensions; expected 2")
        if not flows:
            raise ValueError("flows is empty; expected at least one Denoiser by name")
        self._mixture, self._flows = mixture, dict(flows)
        self._floor, _ = metrics.sliced_wasserstein_floor(lambda n, source: mixture.sample(n, source), self.SET)
        self._figure = pictures.canvas(900, 460)
        super().__init__(
            {
                "flow": widgets.Dropdown(options=list(self._flows), description="flow"),
                "steps": widgets.IntSlider(2, min=1, max=self.MOST, description="steps"),
                "seed": widgets.BoundedIntText(0, min=0, max=2**31 - 1, description="seed"),
            }
        )

    @torch.no_grad()
    def measure(self, flow: str, steps: int, seed: int) -> tuple[Tensor, float, float]:
        """Euler's paths (steps + 1, SET, 2) of this flow, the distance of their ends to exact points, and the straightness."""
        eps = torch.randn(self.SET, 2, generator=generator(seed))
        _, paths = flow_paths(self._flows[flow], eps, steps, ddim)
        exact = self._mixture.sample(self.SET, generator(seed, 1))
        bend = straightness(*flow_paths(self._flows[flow], eps[: 4 * self.SHOWN]))
        return paths, metrics.sliced_wasserstein(paths[-1], exact), float(bend.mean())

    def draw(self, flow: str, steps: int, seed: int) -> bytes:
        """Paths at the left, ends at the right, after this number of Euler steps from the noise of this seed."""
        paths, distance, bend = self.measure(flow, steps, seed)
        self._figure.clear()
        left, right = self._figure.subplots(1, 2)
        some = paths[:, : self.SHOWN]
        for ax in (left, right):
            density(ax, self._mixture.log_prob, (-self.HALF, self.HALF) * 2)
        left.plot(*some.permute(2, 0, 1).numpy(), color=style.COLOURS["muted"], linewidth=1)
        scatter(left, some[0], colour=style.COLOURS["noise"], size=14, label="noise")
        scatter(left, some[-1], colour=style.COLOURS["model"], size=14, label="its end")
        left.set_title(f"{flow}: straightness S = {bend:.3f}")
        left.legend(loc="lower right", fontsize=12)
        scatter(right, paths[-1], colour=style.COLOURS["model"], size=5)
        right.set(
            title=f"{steps} step{'s' if steps > 1 else ''}: {distance:.3f} from the blobs\n(two exact sets: {self._floor:.3f})",
            ylabel="",
        )
        return pictures.render(self._figure)
