"""The explorer of latent diffusion: the pictures of both prompts at its ends, maps of the words, and controls that count."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from course_lib import study, zoo
from course_lib.zoo.judge_scenes import generate
from tests.shown import decode

FIRST, OTHER = "a large red mug on grass", "a large blue mug on sand"


@pytest.fixture(scope="module")
def explorer():
    return study.LatentExplorer(zoo.load("mini-sd", device="cpu"), FIRST, OTHER, steps=4)


def test_it_draws_what_is_chosen(explorer):
    assert decode(explorer.picture.value).shape == (376, 900, 3)
    changed = {"between": 0.5, "prompt": "a small green cone", "word": 4, "guidance": 1.0, "steps": 5, "seed": 3}
    for name, value in changed.items():
        before, old = explorer.picture.value, explorer.controls[name].value
        explorer.controls[name].value = value
        assert explorer.message.value == "" and explorer.picture.value != before, name
        explorer.controls[name].value = old
        assert explorer.picture.value == before, name  # nothing but the control decides


def test_its_ends_are_the_pictures_of_the_prompts(explorer):
    """As `generate` draws them from the same noise; there the network runs in half precision, which moves a pixel by 0.05."""
    model = explorer._model
    for prompt, between in ((FIRST, 0.0), (OTHER, 1.0)):
        found, latent, _ = explorer.walk(FIRST, OTHER, between, 3.0, 4, 0)
        assert float((generate(model, [prompt], 3.0, 0, 4)[0] - found).abs().mean()) < 0.05
        with torch.no_grad():
            assert_close(model.decode(latent[None])[0], found, rtol=0, atol=1e-4)


def test_the_maps_are_shares_of_the_tokens_and_the_hooks_are_gone(explorer):
    _, _, maps = explorer.walk(FIRST, OTHER, 0.0, 3.0, 4, 0)
    assert_close(maps.sum(0), torch.ones(64, 64), rtol=0, atol=1e-3)
    assert explorer.words(FIRST) == FIRST.split()
    tokens = explorer._model.components["tokenizer"](FIRST).input_ids
    assert len(tokens) == len(explorer.words(FIRST)) + 2  # the marks of start and end: word k has map k
    assert not any("Recorder" in type(one).__name__ for one in explorer._model.components["unet"].attn_processors.values())


def test_the_object_listens_to_its_colour():
    """Over the pixels that are red, the word "red" has more of the attention than elsewhere, for three seeds."""
    explorer = study.LatentExplorer(zoo.load("mini-sd", device="cpu"), FIRST, OTHER)
    for seed in range(3):
        picture, _, maps = explorer.walk(FIRST, OTHER, 0.0, 3.0, 8, seed)
        red = (picture[0] - picture[1:].amax(0) > 0.5).numpy()
        assert 0.02 < red.mean() < 0.6
        of_red = maps[explorer.words(FIRST).index("red") + 1].numpy()
        assert np.mean(of_red[red]) > 1.2 * np.mean(of_red[~red])


def test_a_word_beyond_the_last_is_the_last_and_an_empty_prompt_is_drawn(explorer):
    explorer.controls["prompt"].value = "a red cube"
    explorer.controls["word"].value = 3
    last = explorer.picture.value
    explorer.controls["word"].value = 20
    assert explorer.picture.value == last
    explorer.controls["prompt"].value = ""
    assert explorer.message.value == "" and explorer.picture.value != last
    explorer.controls["prompt"].value = "a cube " * 40
    assert "ZooError" in explorer.message.value  # longer than the text encoder takes
    explorer.controls["prompt"].value, explorer.controls["word"].value = FIRST, 3
