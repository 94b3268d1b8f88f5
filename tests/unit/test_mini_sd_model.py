"""The embedded `mini-sd`: what its card must say, one picture by two programs, and a fresh draw that obeys as the card says."""

from __future__ import annotations

import math
import time

import pytest
import torch
from diffusers import StableDiffusionPipeline

from course_lib import zoo
from course_lib.devices import SampleNoise
from course_lib.guidance import cfg
from course_lib.sample import sample
from course_lib.worlds.scenes import captions, draw, parse
from course_lib.zoo import judge_scenes

NAME = "mini-sd"


@pytest.fixture(scope="module")
def card() -> dict:
    return zoo.card(NAME)


@pytest.fixture(scope="module")
def model():
    return zoo.load(NAME, "cpu")


def test_the_vae_keeps_what_there_is_to_see(card) -> None:
    for name in ("seen combinations", "held-out combinations"):
        row = card["metrics"]["vae"][name]
        assert row["psnr_db"] >= 30
        # its decoder has seen no yellow snowman, and draws some of them orange
        least = 0.98 if name == "seen combinations" else 0.94
        assert all(row[key] >= least for key in ("count", "ground", "light", "relation", "shape", "colour", "size")), row


def test_pictures_show_what_was_asked(card) -> None:
    """In one object nearly what the VAE lets through; of two, small ones are mostly seen from another side than asked."""
    prompts = card["metrics"]["prompts"]
    one, held_out, two = (prompts[name] for name in ("one object", "one object, held-out combination", "two objects"))
    assert one["ratio"] >= 0.97
    assert held_out["obeyed"]["all"] >= 0.87 and held_out["ratio"] >= 0.97
    assert two["obeyed"]["all"] >= 0.71 and two["obeyed"]["relation"] >= 0.99 and two["obeyed"]["view"] >= 0.55
    for row in prompts.values():
        assert row["plain_wording"] - row["obeyed"]["all"] <= 0.03  # synonyms and word order
        apart = row["obeyed"]["all"] - row["obeyed_by_second_reader"]
        assert abs(apart) <= 3 * math.sqrt((1 - row["readers_agree"]) / 500)  # the pictures on which they disagree, as coins


def test_the_distribution_is_held_against_real_pictures(card) -> None:
    """Two sets of renders are the floor; what passes through the VAE has more, and generated pictures no more than twice that."""
    rows = card["metrics"]["distribution"]
    assert rows["real"]["frechet"] < rows["generated"]["frechet"] < 2 * rows["reconstructed"]["frechet"]
    assert rows["generated"]["precision"] >= 0.8 and rows["generated"]["recall"] >= 0.8


def test_it_is_small_and_its_failures_were_looked_at(card) -> None:
    assert card["bytes"] <= 10e6
    assert card["looked_at"]["pictures"] == 200 and card["looked_at"]["sha256"] == card["sha256"]
    assert sum(card["looked_at"]["found"].values()) == 200


def test_diffusers_draws_the_same_picture(model) -> None:
    """fp32, 25 guided DDIM steps of some forty layers. A divisor of 1,000: else the DDIM of diffusers steps to other levels
    than it visits next."""
    prompts, steps, w = ["a small red cube on grass", "a large house, seen from the left, left of a blue ball"], 25, 3.0
    noise = SampleNoise(3)(torch.empty(2, *model.shape))
    theirs = StableDiffusionPipeline.from_pretrained(zoo.WEIGHTS / NAME, local_files_only=True).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(prompts, latents=noise.clone(), num_inference_steps=steps, guidance_scale=w, output_type="pt").images
    sigmas = model.sigmas(steps)
    D = cfg(*(model.denoiser.given(**model.embed(some)) for some in (prompts, [""] * 2)), w)
    with torch.no_grad():
        found = model.decode(model.finish(sample(D, model.start(noise, sigmas[0]), sigmas), sigmas[-1])) / 2 + 0.5
    assert float((found - expected).abs().max()) <= 1e-3
    assert float((found[0] - found[1]).abs().max()) > 0.3


def test_a_first_picture_takes_less_than_ten_seconds(model) -> None:
    begun = time.process_time()
    judge_scenes.generate(model, ["a large red mug on grass, seen from the front"], 3.0)
    assert time.process_time() - begun < 10


def test_a_fresh_draw_obeys_as_the_card_says(model, card) -> None:
    """40 prompts that no score of the card has seen, of 500 that it has: less 3 standard errors of the smaller draw."""
    n, share = 40, card["metrics"]["prompts"]["one object"]["obeyed"]["all"]
    prompts = captions(draw(n, seed=9_200), seed=1)
    pictures = judge_scenes.generate(model, prompts, card["metrics"]["guidance"], seed=5)
    right = zoo.load("scenes-reader", "cpu").obeys(pictures, [parse(prompt) for prompt in prompts])["all"]
    assert float(right.mean()) >= share - 3 * math.sqrt(share * (1 - share) / n)
    shuffled = zoo.load("scenes-reader", "cpu").obeys(pictures, [parse(prompt) for prompt in prompts[1:] + prompts[:1]])["all"]
    assert float(shuffled.mean()) <= 0.2  # each picture beside its neighbour's prompt
