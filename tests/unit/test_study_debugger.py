"""The explorer of the sampling debugger: it shows the samples and the diagnosis of the very fault that is chosen."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from course_lib import study
from course_lib.debugging import FAULTS, diagnose, plant
from course_lib.denoisers import NetworkDenoiser, from_eps
from course_lib.nets.mlp import MLP
from course_lib.schedules import Discrete, linear_betas
from course_lib.study.debugger import DebugExplorer
from course_lib.worlds import toys

SCHEDULE = Discrete(linear_betas())


def exact() -> tuple[NetworkDenoiser, Tensor]:
    """The network that would have learned three blobs exactly, and points of them."""
    mixture = toys.three_blobs()

    def net(x: Tensor, time: Tensor) -> Tensor:
        sigma = SCHEDULE.sigma(time.double()).expand(len(x))[:, None]
        x = x.double() * (1 + sigma**2).sqrt()
        return ((x - mixture.denoiser(x, sigma[:, 0])) / sigma).float()

    return from_eps(net, SCHEDULE.t_of_sigma), mixture.sample(400, torch.Generator().manual_seed(0)).float()


@pytest.fixture(scope="module")
def explorer() -> DebugExplorer:
    return DebugExplorer({"three blobs": exact()}, ("prediction", "time"), n=100, rows=64, steps=10)


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))


def test_it_is_exported_and_leaves_a_poster(explorer):
    assert study.DebugExplorer is DebugExplorer
    poster = base64.b64decode(explorer._repr_mimebundle_()["image/png"])
    assert decode(poster).shape == (540, 900, 3)


def test_each_fault_shows_its_own_diagnosis_and_errors(explorer):
    D, data = exact()
    for fault in ("none", "prediction", "time"):
        explorer.controls["fault"].value = fault
        assert explorer.message.value == ""
        found = diagnose(D if fault == "none" else plant(fault, D), data, n=64)
        assert found.faults == (() if fault == "none" else (fault,))
        shown = explorer._words.get_text()
        assert " ".join(shown.split("\n")[1:]) == found.words
        for curve, values in zip(explorer._curves, (found.errors, found.best, found.linear), strict=True):
            assert np.array_equal(curve.get_ydata(), values.numpy())


def test_the_samples_are_right_without_a_fault_and_follow_the_seed(explorer):
    """Without a fault DDIM's samples have the mean of the data, within 4 standard errors of both sets."""
    _, data = exact()
    explorer.controls["fault"].value = "none"
    seen = []
    for seed in (0, 1, 0):
        explorer.controls["seed"].value = seed
        seen.append(np.array(explorer._samples.get_offsets()))
    assert np.array_equal(seen[0], seen[2]) and not np.array_equal(seen[0], seen[1])
    both = np.concatenate(seen[:2])
    error = data.std(0).numpy() * (1 / np.sqrt(len(both)) + 1 / np.sqrt(len(data)))
    assert (np.abs(both.mean(0) - data.mean(0).numpy()) < 4 * error).all()


def test_words_and_axes_stay_in_the_picture_and_are_legible(explorer):
    for fault in ("none", "prediction", "time"):
        explorer.controls["fault"].value = fault
        figure = explorer._figure
        figure.canvas.draw()
        box = explorer._words.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
        assert box.y1 <= explorer._right.xaxis.label.get_window_extent().y0, "the words run into the axis"
        assert explorer._words.get_fontsize() >= 13


def test_images_are_shown_as_a_sheet():
    """A linear network of tiny images; the sheet has six columns."""
    generator = torch.Generator().manual_seed(0)
    data = 0.5 * torch.randn(100, 1, 4, 4, generator=generator)

    def net(x: Tensor, time: Tensor) -> Tensor:
        sigma = SCHEDULE.sigma(time.double()).expand(len(x)).reshape(-1, 1, 1, 1)
        return (x * (1 + sigma**2).sqrt() * sigma / (0.25 + sigma**2)).float()  # eps = x sigma / (v + sigma^2)

    shown = DebugExplorer({"noise": (from_eps(net, SCHEDULE.t_of_sigma), data)}, ("prediction",), n=12, rows=32, steps=5)
    assert shown._samples.get_array().shape[:2] == (2 * 5 - 1, 6 * 5 - 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda D: DebugExplorer({}), "models is empty"),
        (lambda D: DebugExplorer({"a": (D, torch.zeros(100, 3))}), r"data has the shapes \[\(100, 3\)\]; expected points"),
        (lambda D: DebugExplorer({"a": (D, torch.randn(100, 2))}, n=0), "n = 0; expected at least one sample"),
        (lambda D: DebugExplorer({"a": (D, torch.randn(100, 2))}, ("noise",)), "faults holds 'noise'; expected keys of FAULTS"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(from_eps(MLP(width=8), SCHEDULE.t_of_sigma))


def test_every_fault_can_be_chosen():
    D = from_eps(MLP(width=8), SCHEDULE.t_of_sigma)
    made = DebugExplorer({"a": (D, exact()[1])}, n=20, rows=32, steps=3)
    assert made.controls["fault"].options == ("none", *FAULTS)
