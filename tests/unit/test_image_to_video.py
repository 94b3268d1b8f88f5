"""Image to video with TRIP's prior and without: the law of training, how clips are drawn and judged, and what the rows claim."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from course_lib.training import denoising_loss
from course_lib.video.conditioning import decay, trip
from course_lib.video.inflation import inflated
from course_lib.video.masks import context, first
from course_lib.video.noise import covariance
from course_lib.zoo import image_to_video
from course_lib.zoo.control_data import tokens
from course_lib.zoo.image_to_video import METHODS, begun, coherence, loss_of, lowest, model, prior, shared, shown, start
from course_lib.zoo.recipes.video import encoded
from course_lib.zoo.video_data import FRAMES
from tests import seeds
from tests.draws import normal

T = FRAMES
over_seeds = seeds.over_seeds(image_to_video, image_to_video.SEEDS)


@pytest.fixture(scope="module")
def rows():
    """Two clips of noise with levels, noise and words."""
    words = [tokens([one, another]) for one, another in (("a red cube", "a blue cone"), ("spinning", "sliding right"))]
    x0, eps = (normal(2, *model().shape, seed=seed).float() for seed in (0, 1))
    return x0, torch.tensor([0.5, 8.0]), eps, torch.zeros(2, T, dtype=torch.bool), *words


@torch.no_grad()
def told(temporal, x0, scene, motion):
    """The Denoiser with these temporal layers, told the first frame and the words."""
    image = model().image
    words = {"encoder_hidden_states": image.pipeline.text_encoder(scene)[0], "motion": encoded(image, motion)}
    return inflated(image.denoiser, temporal).given(**words, context=context(x0, first(T, 1)))


# --- the law of training -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_its_prior_the_loss_is_the_plain_one(rows):
    """Of all frames, the first as well, since nothing is written over what is drawn."""
    x0, sigma, eps, _, scene, motion = rows
    temporal = start()
    plain = denoising_loss(told(temporal, x0, scene, motion), x0, sigma, eps, "v")
    off = decay(T, 0.0)
    for method in (METHODS["plain"], partial(trip, shares=off), partial(shared, shares=off)):
        found = loss_of(method)(temporal, *rows)
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_with_it_the_loss_is_that_of_the_merged_noise(rows):
    """eps = lambda (x - z1) / sigma + (1 - lambda) Delta eps, and v's error is that of eps times sqrt(1 + sigma^2)."""
    x0, sigma, eps, _, scene, motion = rows
    temporal, wide, lam = start(), sigma.view(2, 1, 1, 1, 1), decay(T).float().view(-1, 1, 1, 1)
    x = x0 + wide * eps
    residual = (x - told(temporal, x0, scene, motion)(x, sigma)) / wide
    merged = lam * (x - x0[:, :1]) / wide + (1 - lam) * residual
    expected = (1 + sigma**2) * (merged - eps).square().flatten(1).mean(1)
    found = loss_of(METHODS["TRIP"])(temporal, *rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # eps is a difference of numbers 1 / sigma as large


@torch.no_grad()
def test_what_is_known_of_the_first_frame_is_not_to_be_learnt(rows):
    """Another first frame in D changes the plain loss, and neither of the others."""
    x0, z1 = rows[0], rows[0][:, 0]
    D = lambda x, sigma: 0.5 * x
    wrong = lambda x, sigma: torch.cat([x[:, :1], 0.5 * x[:, 1:]], 1)
    for name, method in METHODS.items():
        one, other = (denoising_loss(method(each, z1), x0, rows[1], rows[2], "v") for each in (D, wrong))
        assert torch.equal(one, other) == (name != "plain")


# --- the prior under shared noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.0, 2.0, 40.0])
@pytest.mark.parametrize("sigma", [0.3, 5.0, 200.0])
def test_the_prior_is_the_exact_posterior_mean_of_gaussian_moves(a, sigma):
    """By the joint covariance of (x0_i; x_1, x_i) around z^1, where only the i-th frame has moved."""
    z1, x, tau = normal(2, 4, 2, 2, seed=1), normal(2, T, 4, 2, 2), torch.linspace(0, 1.4, T, dtype=torch.float64)
    found = prior(x, z1, torch.tensor(sigma, dtype=torch.float64), a, tau)
    for i in range(1, T):
        noise, move = sigma**2 * covariance(T, a)[[0, i]][:, [0, i]], float(tau[i]) ** 2
        seen = noise + torch.tensor([[0.0, 0.0], [0.0, move]], dtype=torch.float64)
        weights = torch.linalg.solve(seen, torch.tensor([0.0, move], dtype=torch.float64))
        expected = z1 + weights[0] * (x[:, 0] - z1) + weights[1] * (x[:, i] - z1)
        torch.testing.assert_close(found[:, i], expected, rtol=0, atol=1e-8)
    assert torch.equal(found[:, 0], z1)


def test_without_moves_the_prior_is_trips():
    x, z1, sigma = normal(2, T, 4, 2, 2), normal(2, 4, 2, 2, seed=1), torch.tensor([0.3, 9.0])
    still = prior(x, z1, sigma, 40.0, torch.zeros(T))
    assert torch.equal(still, z1[:, None].expand_as(x))
    D = lambda x, sigma: 0.3 * x
    merged = torch.lerp(D(x, sigma), still, decay(T).view(-1, 1, 1, 1))
    torch.testing.assert_close(METHODS["TRIP"](D, z1)(x, sigma), merged, rtol=0, atol=1e-12)


# --- levels, drawing and judging ---------------------------------------------------------------------------------------------


def test_both_learn_the_levels_that_the_sampler_asks_and_no_lower_one():
    sigmas, asked = image_to_video.levels(), model().sigmas(image_to_video.STEPS)
    assert float(sigmas.min()) >= lowest() == float(asked[-2])
    assert float(sigmas.min()) < 1.02 * lowest() and float(sigmas.max()) == pytest.approx(float(asked[0]), rel=1e-6)


def test_a_clip_begins_with_its_picture_by_the_prior_alone():
    """The sampler ends at its last level, sigma, not at 0: what is left is sigma / sqrt(1 + sigma^2) of the first noise, and the
    picture over sqrt(1 + sigma^2). Without the prior it is another picture."""
    z1, words = normal(2, *model().image.shape, seed=3).float(), ["a red cube, spinning", "a blue cone, bouncing"]
    last = float(model().sigmas(2)[-1])
    left = {}
    for method in METHODS:
        z = begun(model(), method, words, z1, steps=2)
        assert z.shape == (2, *model().shape)
        left[method] = float((z[:, 0] * (1 + last**2) ** 0.5 - z1).square().mean().sqrt())
    for method in ("TRIP", "TRIP, shared noise"):
        assert left[method] == pytest.approx(last, rel=5 / 1024**0.5)  # five errors of the deviation of 512 numbers
    assert left["plain"] > 3 * left["TRIP"]
    # without the prior the picture is only told, and yet it is heard: the words and the noise are the same
    assert float((begun(model(), "plain", words, -z1, steps=2) - begun(model(), "plain", words, z1, steps=2)).abs().mean()) > 0.1


def test_true_clips_are_the_measure_of_all():
    """Through the VAE, as those that are drawn; a frozen clip has no flicker, and is caught by the flow and on the object."""
    same = shown(6)[1]
    row, frozen = (coherence(x) for x in (same, same[:, :1].expand(-1, T, -1, -1, -1)))
    assert row["kept"] == frozen["kept"] == pytest.approx(120)  # dB, the most that is told
    assert [row[name] for name in ("jump", "later", "flickers", "warped")] == [1, 1, 1, 1]
    assert [frozen[name] for name in ("jump", "later", "flickers")] == [0, 0, 0]
    assert frozen["warped"] > 1.2 and frozen["object"] < row["object"] - 5


# --- what is stored ----------------------------------------------------------------------------------------------------------


def test_the_first_frame_is_kept_better_by_the_prior():
    """In each of three seeds by 6 dB and more: half the error. No frame is written over."""
    for seed in image_to_video.SEEDS:
        kept = {row["method"]: row["kept"] for row in image_to_video.rows("clips") if row["seed"] == seed}
        assert min(kept["TRIP"], kept["TRIP, shared noise"]) > kept["plain"] + 6


def test_each_has_the_rate_that_was_best_on_validation_clips():
    for row in image_to_video.rows("clips"):
        tried = [one for one in image_to_video.rows("rates") if one["method"] == row["method"]]
        assert len(tried) == len(image_to_video.RATES) and len({one["steps"] for one in tried}) == 1
        assert row["lr"] == min(tried, key=lambda one: one["loss"])["lr"]
    assert len({row["steps"] for row in image_to_video.rows("clips")}) == 1


def test_what_the_noise_of_the_first_frame_tells_halves_nearly_the_error():
    """The validation loss of the prior for shared noise is below 0.7 of the plain one; that of TRIP, which takes clips for still
    ones at all noise levels, is above it."""
    loss = {name: over_seeds("clips", "loss", method=name) for name in METHODS}
    assert loss["TRIP, shared noise"][0] < 0.7 * loss["plain"][0]
    assert seeds.surely_less(loss["TRIP, shared noise"], loss["plain"]) and seeds.surely_less(loss["plain"], loss["TRIP"])


def test_untrained_the_noise_of_the_first_frame_makes_clips_go_on_from_it():
    """The same network, prompts and noise, the prior on and off: less of a jump, nearer to the flow, still the same thing, and it
    moves as asked more often."""
    of = lambda measure: [over_seeds("untrained", measure, method=name) for name in ("TRIP, shared noise", "plain")]
    for measure in ("jump", "warped"):
        assert seeds.surely_less(*of(measure))
    for measure in ("identity", "word", "object"):
        assert seeds.surely_less(*reversed(of(measure)))
    assert of("jump")[0][0] > 1  # not by standing still


def test_one_lambda_for_all_noise_levels_holds_the_clip_back():
    """TRIP's clips hardly leave the first frame at first, and are read as moving as asked less often than the plain ones."""
    assert over_seeds("clips", "jump", method="TRIP")[0] < 0.5 < 1 < over_seeds("clips", "jump", method="plain")[0]
    assert seeds.surely_less(*(over_seeds("clips", "word", method=name) for name in ("TRIP", "plain")))


def test_trained_the_noise_of_the_first_frame_lessens_the_jump_and_leaves_more_flicker():
    """Less of a jump from the picture to the next frame than plain, more motion as asked; and noise that plain clips have not."""
    of = lambda measure: [over_seeds("clips", measure, method=name) for name in ("TRIP, shared noise", "plain")]
    assert seeds.surely_less(*of("jump")) and of("jump")[0][0] > 1
    assert of("word")[0][0] > of("word")[1][0]
    for measure in ("flickers", "warped"):
        assert seeds.surely_less(*reversed(of(measure)))
