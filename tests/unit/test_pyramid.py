"""Coarse to fine with one network: exact on a Gaussian where the noise hides what is missing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from course_lib import metrics, pyramid, zoo
from course_lib.denoisers import Counted
from course_lib.devices import SampleNoise
from course_lib.nets.positioned import OCTAVES, Positioned, positions
from course_lib.operators import BlockAverage
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.zoo import pyramid as compared
from tests.draws import normal

F64 = torch.float64
LARGE, SMALL = 8, 4


def covariance() -> torch.Tensor:
    """Of pictures of 8 x 8 pixels whose correlation falls with the distance, (64, 64)."""
    where = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).to(F64)
    return 0.25 * torch.exp(-torch.cdist(where, where) / 4)


def of_size() -> dict[int, torch.Tensor]:
    """Covariance of the pictures of each size: the small ones are means of blocks."""
    P = BlockAverage((1, 8, 8), 2)(torch.eye(64, dtype=F64).view(64, 1, 8, 8)).flatten(1).T  # (16, 64)
    return {LARGE: covariance(), SMALL: P @ covariance() @ P.T}


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[x0 | x] of the Gaussian of the size of x."""
    C = of_size()[x.shape[-1]]
    gain = torch.linalg.solve(C + sigma**2 * torch.eye(len(C), dtype=F64), C)
    return (x.flatten(1) @ gain).view_as(x)


def error(sigma_0: float) -> float:
    """Of the covariance of refined pictures whose small ones are exact, relative and in Frobenius's norm: no samples are drawn.

    Refining is x = M s + N z, linear in the small picture s and in the noise z: unit vectors give both matrices.
    """
    grid, C = karras(400, 0.01, sigma_0), of_size()
    s = torch.cat([torch.eye(16, dtype=F64), torch.zeros(64, 16, dtype=F64)]).view(80, 1, 4, 4)
    z = torch.cat([torch.zeros(16, 64, dtype=F64), torch.eye(64, dtype=F64)]).view(80, 1, 8, 8)
    both = pyramid.refine(gaussian, s, [grid], lambda x: z).flatten(1)
    M, N = both[:16].T, both[16:].T
    found = M @ C[SMALL] @ M.T + N @ N.T
    return float((found - C[LARGE]).norm() / C[LARGE].norm())


def test_refining_is_exact_where_the_noise_hides_what_the_small_picture_lacks():
    """Little noise keeps the blur of the enlarged picture; much of it forgets everything, and 400 steps err by about 1 %."""
    errors = [error(sigma_0) for sigma_0 in (0.05, 0.2, 1.0, 20.0)]
    assert errors[0] > 0.05 and errors == sorted(errors, reverse=True) and errors[-1] < 0.02, errors


def test_one_grid_is_plain_sampling_and_each_further_one_doubles_the_size():
    D = Counted(gaussian)
    start, grid = SampleNoise(0).start((3, 1, 4, 4), 20.0, dtype=F64), karras(5, 0.01, 20.0)
    assert_close(pyramid.draw(D, start, [grid], SampleNoise(1)), sample(gaussian, start, grid))
    assert pyramid.draw(D, start, [grid, karras(3, 0.01, 1.0)], SampleNoise(1)).shape == (3, 1, 8, 8)
    assert D.rows == 3 * (5 + 5 + 3)


def test_a_measured_picture_has_the_means_that_were_measured():
    y = normal(2, 1, 4, 4)
    x = pyramid.refine(gaussian, y, [karras(5, 0.01, 1.0)], SampleNoise(0), y=y)
    assert_close(BlockAverage((1, 8, 8), 2)(x), y, rtol=0, atol=1e-12)


def test_a_measurement_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"y has shape \(2, 1, 3, 3\); expected .* divide \(8, 8\)"):
        pyramid.refine(gaussian, normal(2, 1, 4, 4), [karras(2, 0.01, 1.0)], SampleNoise(0), y=normal(2, 1, 3, 3))


# --- the network ------------------------------------------------------------------------------------------------------------


def test_positions_are_of_pixel_centres_and_tell_the_resolution():
    """Four pixels lie at -3/4 ... 3/4; in a larger picture neighbours are nearer to each other."""
    small = positions(4, 4)
    assert small.shape == (4 * OCTAVES, 4, 4)
    u = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    assert_close(small[0, :, 0], (torch.pi * u).sin())
    assert_close(small[OCTAVES + 1, :, 2], (2 * torch.pi * u).cos())
    assert_close(small[2 * OCTAVES, 3], (torch.pi * u).sin())  # columns after rows

    def step(where: torch.Tensor) -> float:
        return float(where.diff(dim=1).norm(dim=0).mean())

    assert step(positions(32, 32)) < 0.7 * step(positions(16, 16))


@torch.no_grad()
def test_the_network_takes_every_size_and_sees_where_pixels_lie():
    torch.manual_seed(0)
    net, blind = (Positioned(3, (16, 32), on, blocks=1, attention=(1,)) for on in (True, False))
    blind.load_state_dict(net.state_dict())
    for one in (net, blind):
        torch.manual_seed(1)
        nn.init.normal_(one.folded.unet.last.weight)
    time = torch.tensor(100.0)
    for size in (8, 16, 32):
        x = normal(2, 3, size, size).float()
        assert net(x, time).shape == x.shape
        assert float((net(x, time) - blind(x, time)).abs().max()) > 1e-3
    flat = torch.zeros(1, 3, 8, 8)
    inner = slice(2, 6)  # clear of the edges, where padding tells a network without positions where it is
    assert float(net(flat, time)[..., inner, inner].std()) > float(blind(flat, time)[..., inner, inner].std())


# --- what is stored ---------------------------------------------------------------------------------------------------------


def test_the_card_claims_a_denoiser_and_a_sampler():
    """As of `scenes-prior`: noise of deviation sigma leaves 20 log10(2 / sigma) dB."""
    card = zoo.card("scenes-pyramid")["metrics"]
    gains = [db - 20 * math.log10(2 / float(sigma)) for sigma, db in card["psnr_of_denoised"].items()]
    assert gains == sorted(gains) and gains[0] > 5
    assert card["frechet_of_real"] < card["frechet"]


def test_coarse_to_fine_costs_less_than_half_and_comes_nearer_to_real_pictures():
    """Than full size with 30 steps, by two errors of the difference on average; and, on each seed, than at the same cost."""
    gains = []
    runs = {(row["way"], row["seed"]): row for row in compared.rows("sampling")}
    for seed in compared.SEEDS:
        fine, full = runs["coarse to fine", seed], runs["full", seed]
        assert fine["flops"] == compared.cost(compared.STEPS) < 0.5 * full["flops"] == 0.5 * compared.cost({32: compared.FULL})
        assert fine["flops"] <= runs["full, equal cost", seed]["flops"]
        assert fine["frechet"] < min(full["frechet"], runs["full, equal cost", seed]["frechet"])
        gains.append((full["frechet"] - fine["frechet"]) / math.hypot(fine["error"], full["error"]))
    assert sum(gains) / len(gains) > 2
    tried = compared.rows("tuning")
    assert [row["start"] for row in tried] == list(compared.STARTS)
    assert fine["start"] == min(tried, key=lambda row: row["frechet"])["start"]


def test_enlarging_by_two_and_by_four_beats_bicubic_on_every_seed():
    """The mean of four samples, also where bicubic enlargement is brought to the measured means; a sample alone is farther."""
    for factor in (2, 4):
        runs = [row for row in compared.rows("enlarging") if row["factor"] == factor]
        assert [row["seed"] for row in runs] == list(compared.SEEDS)
        for row in runs:
            psnr = row["psnr"]
            assert psnr["mean"] > psnr["bicubic, its means as measured"] + 0.3 > psnr["bicubic"] + 0.3
            assert psnr["mean"] > psnr["sample"] + 0.5


def test_of_whole_pictures_the_positions_say_nothing_that_the_network_needs():
    """After 1,000 steps it denoises better without them, on each seed and at each size: the lecture says so."""
    told, blind = ([row["psnr"] for row in compared.rows("positions") if row["positioned"] is on] for on in (True, False))
    assert len(told) == len(blind) == len(compared.SEEDS)
    assert all(a[size] < b[size] for a, b in zip(told, blind, strict=True) for size in a)


def test_the_stored_enlargement_is_what_the_code_gives():
    """All 64 pictures; without bf16 the mean differs by a few hundredths of a dB."""
    row = next(row for row in compared.rows("enlarging") if row["factor"] == 2 and row["seed"] == 0)
    x, y = compared.small("held out", 2)
    found = compared.enlarged(zoo.load("scenes-pyramid", device="cpu"), y, row["start"], 0)
    assert abs(metrics.mean_psnr(found.mean(0), x) - row["psnr"]["mean"]) < 0.1
