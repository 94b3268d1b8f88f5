"""`scenes-prior`: what its card claims, and that the committed weights do it."""

import math

import pytest
import torch

from course_lib import metrics, zoo
from course_lib.devices import SampleNoise, autocast
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.zoo.recipes import scenes_prior as recipe


def test_its_card_claims_a_denoiser_and_a_sampler():
    """Noise of deviation sigma leaves 20 log10(2 / sigma) dB; the denoiser gains at every level, the more the more noise."""
    card = zoo.card("scenes-prior")["metrics"]
    gains = [db - 20 * math.log10(2 / float(sigma)) for sigma, db in card["psnr_of_denoised"].items()]
    assert gains == sorted(gains) and gains[0] > 6
    assert card["frechet_of_real"] < card["frechet"] < 0.2


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_the_committed_weights_do_what_the_card_says(sigma):
    """The card's own pictures and noise. Where there is no bf16 the picture is 0.11 dB better at sigma = 1, 0.01 dB at 0.1."""
    n, seed = recipe.SCENES["held out"]
    x0, D = SceneDataset(n, seed, recipe.SIZE).pictures(torch.arange(256)), zoo.load("scenes-prior", device="cpu")
    with autocast("cpu"):
        again = D(x0 + sigma * SampleNoise(1)(x0), torch.tensor(sigma))
    assert abs(metrics.psnr(again, x0) - zoo.card("scenes-prior")["metrics"]["psnr_of_denoised"][f"{sigma:g}"]) < 0.15


def test_a_grid_ends_at_zero_and_starts_in_noise():
    sigmas = recipe.grid()
    assert len(sigmas) == 31 and sigmas[-1] == 0 and float(sigmas[0]) == pytest.approx(40)
    assert float(recipe.SIGMA_DATA / sigmas[0]) < 0.02  # of the data's deviation little is left
