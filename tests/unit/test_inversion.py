"""Inversion is `sample` on a rising grid: to noise and back, on a mixture at the solver's order, on trained digits to 1e-3."""

import math

import pytest
import torch

from course_lib import zoo
from course_lib.devices import SampleNoise
from course_lib.flows import flow_grid
from course_lib.multistep import unipc
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.singlestep import heun
from course_lib.steps import ddim, ddim_eta
from course_lib.worlds import digits
from course_lib.worlds.toys import three_blobs
from tests.draws import noise_of, normal

HIGH, LOW = 15.0, 0.02


def levels(n: int) -> torch.Tensor:
    """n steps from HIGH down to LOW."""
    return karras(n, LOW, HIGH, to_zero=False)


def round_trip(D, x, n, step):
    """Where n steps up and n steps down lead: the noise, and x again."""
    up = sample(D, x, levels(n).flip(0), step)
    return up, sample(D, up, levels(n), step)


@pytest.mark.parametrize("step, order, trip", [(ddim, 1, 1), (heun, 2, 3)], ids=["ddim", "heun"])
def test_on_the_exact_flow_noise_and_round_trip_have_their_orders(step, order, trip):
    """Up, a step of length h misses by C h^(p + 1), and down by C (-h)^(p + 1): for p = 1 the two add up, for p = 2 they cancel
    and leave the next order. Medians, since a point on a border between blobs may come back in another. From 200 to 400
    steps the next order still shows by less than 0.01.
    """
    blobs = three_blobs()
    x = blobs.sample(32, torch.Generator().manual_seed(0), LOW)
    latent = blobs.reference_flow(x, LOW, HIGH, tolerance=1e-12)

    def gaps(n: int) -> tuple[float, float]:
        up, back = round_trip(blobs.denoiser, x, n, step)
        return float((up - latent).norm(dim=1).median()), float((back - x).norm(dim=1).median())

    (noise, there_and_back), (finer_noise, finer_trip) = gaps(200), gaps(400)
    assert math.log2(noise / finer_noise) == pytest.approx(order, abs=0.05)
    assert math.log2(there_and_back / finer_trip) == pytest.approx(trip, abs=0.05)


def test_digits_come_back_from_their_noise(record_property):
    """100 Heun steps each way bring the model's own samples back to 1e-3 (rms over pixels, median), and much nearer than as
    many steps of DDIM. Held-out digits, which nobody promises, are reported. The noise that is found has the size of noise.
    """
    D = zoo.load("digits", device="cpu")
    own = sample(D, SampleNoise(3).start((4, *digits.SHAPE), HIGH), levels(32), unipc(3))
    held_out = digits.load("test")[0][:2]
    x = torch.cat([own, held_out + LOW * SampleNoise(25)(held_out)])
    rms = lambda back: (back - x).square().flatten(1).mean(1).sqrt()
    up, back = round_trip(D, x, 100, heun)
    record_property("own", float(rms(back)[:4].median()))
    record_property("held_out", float(rms(back)[4:].median()))
    assert float(rms(back)[:4].median()) <= 1e-3
    by_ddim = round_trip(D, x[:2], 100, ddim)[1]
    assert float((by_ddim - x[:2]).square().mean().sqrt()) > 1e-3
    size = (up[:4] / HIGH).square().mean()  # 1 + the digits' variance / 15^2, and the deviation of 1,024 normal numbers
    assert float(size) == pytest.approx(1, abs=4.5 * math.sqrt(2 / up[:4].numel()) + 0.01)


def test_a_grid_that_no_inversion_can_take_is_refused():
    blobs, x = three_blobs(), normal(4, 2)
    with pytest.raises(ValueError, match=r"sigmas\[0\] = 0 in a rising grid; expected inversion to start above 0, for example"):
        sample(blobs.denoiser, x, karras(10).flip(0), heun)
    with pytest.raises(ValueError, match=r"sigmas\[0\] = 0 in a rising grid"):
        sample(blobs.denoiser, x, flow_grid(10).flip(0))
    infinite = torch.tensor([0.1, 1.0, math.inf], dtype=torch.float64)  # the flow's t = 1
    for sigmas, place in ((infinite, 2), (infinite.flip(0), 0)):
        with pytest.raises(ValueError, match=rf"sigmas\[{place}\] = inf; expected finite noise levels"):
            sample(blobs.denoiser, x, sigmas)
    with pytest.raises(ValueError, match="a stochastic step cannot invert, use ddim"):
        sample(blobs.denoiser, x, levels(10).flip(0), ddim_eta(1.0, noise_of(0)))
