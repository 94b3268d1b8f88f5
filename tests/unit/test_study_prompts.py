"""The explorer of prompts: how a prompt becomes a picture, and what a reader sees in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from course_lib.devices import SampleNoise
from course_lib.guidance import cfg
from course_lib.sample import sample
from course_lib.study.scenes import START, PromptExplorer, _place, _png, _sheet, described, scene
from course_lib.worlds.scenes import draw
from course_lib.worlds.scenes.attributes import ORIENTED, SIZES
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.labels import Labels, labels, obeyed
from course_lib.zoo import ZooError
from course_lib.zoo.pretrained import wrap
from course_lib.zoo.readers import SceneReader
from course_lib.zoo.recipes import mini_sd, scenes_reader
from tests import pipelines
from tests.shown import REDRAW, SLACK, crop, decode, inside_and_apart, levels, seconds

PROMPT = "a small red cube on grass, lit from the left"


@pytest.fixture(scope="module")
def model():
    """The untrained mini-sd."""
    torch.manual_seed(0)
    net = mini_sd.network()
    return wrap(net.pipeline(), "mini-sd", frozenset(net.words))


class Told(SceneReader):
    """Reads the labels that it is told, whatever the picture; keeps the picture."""

    def __init__(self, told: Labels):
        self.told = told

    def read(self, pictures):
        self.picture = pictures
        return self.told


@pytest.fixture(scope="module")
def prompt_shown(model):
    return PromptExplorer(model)


@pytest.fixture
def asked(prompt_shown):
    """The explorer at its first values."""
    for name, value in {"prompt": PROMPT, "guidance": 3.0, "steps": 8, "seed": 0}.items():
        prompt_shown.controls[name].value = value
    return prompt_shown


def walk(model, prompt, guidance, steps, seed):
    """The run by hand: levels, what D believes at each, and the last latents."""
    D = cfg(model.denoiser.given(**model.embed(prompt)), model.denoiser.given(**model.embed("")), guidance)
    sigmas = model.sigmas(steps)
    x = model.start(SampleNoise(seed)(torch.empty(1, *model.shape)), sigmas[0])
    states = [x]
    last = sample(D, x, sigmas, on_step=lambda x, sigma: states.append(x))
    with torch.no_grad():
        beliefs = [D(x, sigma) for x, sigma in zip(states[:-1], sigmas, strict=False)]
    return sigmas, beliefs, model.finish(last, sigmas[-1])


@pytest.mark.parametrize("guidance, steps", [(3.0, 8), (1.0, 4), (0.0, 11)])
def test_the_picture_is_that_of_the_loop_and_the_small_ones_are_what_D_believes(model, asked, guidance, steps):
    """Pictures are decoded together, not one by one, so that rounding differs: by less than one of 255 levels."""
    asked.controls["guidance"].value, asked.controls["steps"].value = guidance, steps
    sigmas, beliefs, last = walk(model, PROMPT, guidance, steps, 0)
    chosen = [i * steps // 4 for i in range(4)]
    assert [title.get_text() for _, title in asked._beliefs] == [f"D(x, σ) at σ = {float(sigmas[i]):.2g}" for i in chosen]
    for (image, _), i in zip(asked._beliefs, chosen, strict=True):
        expected = levels(model.decode(beliefs[i])[0])
        assert np.abs(image.get_array().astype(int) - expected.astype(int)).max() <= 1
    seen = crop(asked.poster(), 486, 98, 384)[::6, ::6].astype(int)
    assert np.abs(seen - levels(model.decode(last)[0]).astype(int)).max() <= 1
    assert asked._settings.get_text() == f"after {steps} steps, guidance {guidance:g}"


@pytest.mark.parametrize("name, value", [("prompt", "a large blue ball"), ("guidance", 6.0), ("steps", 12), ("seed", 1)])
def test_each_control_of_the_prompt_changes_the_picture_and_back(asked, name, value):
    before, first = asked.poster(), asked.values[name]
    asked.controls[name].value = value
    assert asked.message.value == ""
    assert not np.array_equal(crop(asked.poster(), 486, 98, 384), crop(before, 486, 98, 384))
    asked.controls[name].value = first
    assert asked.poster() == before


def test_the_prompt_is_taken_when_it_is_finished_and_shown_below(asked):
    assert asked.controls["prompt"].continuous_update is False
    assert asked._foot.get_text() == f"prompt: {PROMPT}"
    asked.controls["prompt"].value = ""
    assert asked._foot.get_text() == "prompt: (empty)"


def test_dollar_signs_are_no_formula(asked):
    asked.controls["prompt"].value = r"a red cube for $\frac$ and $"
    assert "never saw" in asked.message.value and "Error" not in asked.message.value
    assert r"$\frac$" in asked._foot.get_text()


def test_another_model_shows_its_own_pixels():
    """Stable Diffusion's classes at 16 px, with a tokenizer that spells any word."""
    other = wrap(pipelines.stable_diffusion(), "tiny")
    shown = PromptExplorer(other, prompt="a red cube", steps=4)
    _, _, last = walk(other, "a red cube", 3.0, 4, 0)
    seen = crop(shown.poster(), 486, 98, 384).astype(int)
    assert np.abs(seen - levels(other.decode(last)[0], 24)).max() <= 1 and shown.message.value == ""


def test_a_picture_that_is_too_large_is_smoothed():
    """A checkerboard of single pixels, two to a screen pixel, is grey; every second pixel of it would be black or white."""
    axes = _sheet(400)
    picture, _ = _place(axes, 10, 10, 192, 384)
    board = (np.indices((384, 384)).sum(0) % 2 * 255).astype(np.uint8)
    picture.set_data(board[..., None].repeat(3, -1))
    assert np.abs(crop(_png(axes), 20, 20, 172).astype(int) - 127.5).max() < 16


def test_embeddings_and_noise_are_kept(model, monkeypatch):
    shown, calls = PromptExplorer(model), []
    kind = type(model)
    embed = kind.embed
    monkeypatch.setattr(kind, "embed", lambda self, prompts: calls.append(prompts) or embed(self, prompts))
    shown.controls["guidance"].value = 2.0
    assert calls == []
    shown.controls["prompt"].value = "a green mug"
    shown.controls["prompt"].value = PROMPT
    assert calls == [["a green mug"]]
    for i in range(2 * shown.KEPT):
        shown._embed("red " * (i % 25) + "cube " * (i // 25))
    assert len(shown._embedded) <= shown.KEPT


def test_words_that_the_model_never_saw_stay_below_while_the_prompt_holds_them(model):
    shown = PromptExplorer(model, prompt="a <wild> dragon")
    words = (
        "model &#x27;mini-sd&#x27; never saw &#x27;&lt;&#x27;, &#x27;&gt;&#x27;, &#x27;dragon&#x27;, &#x27;wild&#x27;; the words"
    )
    assert words in shown.message.value and shown.message in shown.children
    shown.controls["guidance"].value = 2.0
    shown._repr_mimebundle_()
    assert words in shown.message.value, "it must not vanish when something else changes"
    shown.controls["prompt"].value = PROMPT
    assert shown.message.value == ""
    shown.controls["prompt"].value = "a red dragon"
    assert "&#x27;dragon&#x27;; the words" in shown.message.value, "said again for another prompt with the same word"
    shown.controls["prompt"].value = "a red dragon " * 40
    assert "ZooError: prompt" in shown.message.value and "never saw" not in shown.message.value
    shown.controls["prompt"].value = "a red dragon"
    assert "&#x27;dragon&#x27;; the words" in shown.message.value


@pytest.mark.parametrize(
    "values, message",
    [
        ({"guidance": 8.5}, r"guidance = 8.5; expected a number from 0 to 8"),
        ({"guidance": float("nan")}, r"guidance = nan; expected a number from 0 to 8"),
        ({"steps": 3}, r"steps = 3; expected a number from 4 to 30"),
        ({"steps": 31}, r"steps = 31; expected a number from 4 to 30"),
        ({"seed": -1}, r"seed = -1; expected a whole number, at least 0"),
    ],
)
def test_values_of_a_prompt_outside_are_named(model, asked, values, message):
    with pytest.raises(ValueError, match=message):
        PromptExplorer(model, **values)
    with pytest.raises(ValueError, match=message):
        asked.draw(**{**asked.values, **values})


def test_a_model_without_text_is_refused():
    with pytest.raises(ZooError, match="model 'pixels' takes no text"):
        PromptExplorer(wrap(pipelines.ddpm(), "pixels"))


def test_a_redraw_of_a_prompt_leaves_no_artists_behind_and_is_in_time(model):
    shown = PromptExplorer(model, SceneReader(scenes_reader.network("scenes-reader")))
    count = len(shown._axes.figure.findobj())
    assert seconds(shown) < SLACK * REDRAW
    assert len(shown._axes.figure.findobj()) == count


def test_the_poster_of_a_prompt_is_a_png(asked):
    assert bytes(asked.poster()).startswith(b"\x89PNG") and decode(asked.poster()).shape == (570, 900, 3)
    assert "image/png" in asked._repr_mimebundle_()


# --- what is read -----------------------------------------------------------------------------------------------------


def test_what_is_read_is_said_in_words_that_are_true():
    """Every attribute is named, and the words, parsed back, are obeyed by the labels that they came from."""
    of = draw(200, seed=5, objects=(1, 2))
    read = labels(of)
    for i in range(len(of)):
        one = Labels(**{name: value[i : i + 1] for name, value in vars(read).items()})
        text = described(one)
        for size in SIZES:
            text = text.replace(f"{size} ", f"a {size} ")
        wanted = parse(text)
        assert wanted.ground and wanted.light and (wanted.relation is not None) == (len(wanted.objects) == 2)
        for thing in wanted.objects:
            assert {"shape", "colour", "size"} <= set(thing) and ("view" in thing) == (thing["shape"] in ORIENTED)
        assert obeyed(one, [wanted])["all"].item() == 1


@pytest.mark.parametrize(
    "prompt, verdict",
    [
        (PROMPT, "; as asked: yes"),
        ("a red block", "; as asked: yes"),
        ("a large green cube on sand", "; as asked: no (colour, size, ground)"),
        ("a small red cube left of a large blue ball", "; as asked: no (count, "),
        ("a small red dragon", ""),
        ("", ""),
        ("on grass", ""),
    ],
)
def test_the_title_says_what_is_read_and_whether_it_was_asked(model, prompt, verdict):
    reader = Told(labels(scene(**{**START, "shape": "cube", "size": "small"})))
    shown = PromptExplorer(model, reader, prompt)
    heading = shown._heading.get_text().replace("\n", " ")
    assert heading.startswith("read: small red cube on grass, lit from the left" + verdict)
    assert verdict or "as asked" not in heading
    assert inside_and_apart(shown)
    seen = crop(shown.poster(), 486, 98, 384)[::6, ::6].astype(int)
    assert np.abs(seen - levels(reader.picture[0]).astype(int)).max() <= 1, "the reader reads the last picture"


def test_long_readings_and_prompts_stay_inside(model):
    longest = {"shape": "snowman", "colour": "orange", "ground": "plain", "light": "right", "second": "left of"}
    prompt = "a large yellow snowman, seen from the right, farther than a little turquoise cottage, viewed from the left"
    shown = PromptExplorer(model, Told(labels(scene(**{**START, **longest}))), prompt)
    assert "as asked: no (shape, " in shown._heading.get_text()
    assert inside_and_apart(shown)
