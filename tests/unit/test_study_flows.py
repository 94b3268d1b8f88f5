"""The explorer of flows shows the flow that is chosen, and measures what it says."""

from __future__ import annotations

import pytest
import torch

from course_lib import metrics
from course_lib.devices import generator
from course_lib.flows import reflow_pairs
from course_lib.gaussians import Mixture
from course_lib.steps import ddim
from course_lib.study.flows import FlowExplorer
from course_lib.worlds import toys
from tests.shown import decode

BLOBS = toys.three_blobs()
EXACT = {"exact": BLOBS.denoiser, "to the mean": lambda x, sigma: BLOBS.mean.to(x).expand_as(x)}


@pytest.fixture(scope="module")
def explorer():
    return FlowExplorer(BLOBS, EXACT)


def test_it_draws_what_is_chosen(explorer):
    assert decode(explorer.picture.value).shape == (460, 900, 3)
    before = explorer.picture.value
    explorer.controls["steps"].value = 20
    assert explorer.message.value == "" and explorer.picture.value != before and explorer.redraws == 1
    left, right = explorer._figure.axes
    assert "20 steps" in right.get_title() and left.get_title().startswith("exact: straightness")
    explorer.controls["flow"].value = "to the mean"
    assert explorer._figure.axes[0].get_title().startswith("to the mean: straightness S = 0.000")  # straight lines to a point
    explorer.controls["flow"].value, explorer.controls["steps"].value = "exact", 2


def test_it_measures_what_it_says(explorer):
    """Euler's ends are those of `reflow_pairs`, and more steps come nearer: 32 are within three times the floor, 1 is not."""
    paths, distance, _ = explorer.measure("exact", 32, seed=3)
    eps = torch.randn(explorer.SET, 2, generator=generator(3))
    ends, _ = reflow_pairs(BLOBS.denoiser, eps, 32, ddim)
    assert paths.shape == (33, explorer.SET, 2) and torch.allclose(paths[-1], ends, atol=1e-5)
    assert distance == metrics.sliced_wasserstein(ends, BLOBS.sample(explorer.SET, generator(3, 1)))
    assert distance < 3 * explorer._floor < explorer.measure("exact", 1, seed=3)[1]
    assert explorer.measure("exact", 8, seed=4)[2] > 0.1  # the paths of the blobs bend


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="mixture is in 3 dimensions; expected 2"):
        FlowExplorer(Mixture.gaussian(torch.zeros(3), torch.eye(3)), EXACT)
    with pytest.raises(ValueError, match="flows is empty; expected at least one"):
        FlowExplorer(BLOBS, {})
