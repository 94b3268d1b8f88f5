"""The explorers of the scene world: the scene that the controls say, its exact maps, and how a prompt becomes a picture."""

from __future__ import annotations

import io
import itertools
import time

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from course_lib.devices import SampleNoise
from course_lib.guidance import cfg
from course_lib.sample import sample
from course_lib.study import pictures
from course_lib.study.scenes import (
    ANGLES,
    CHOICES,
    DEPTHS,
    SEGMENTS,
    START,
    PromptExplorer,
    SceneExplorer,
    _place,
    _png,
    _sheet,
    described,
    scene,
)
from course_lib.worlds.scenes import captions, draw, edges, render
from course_lib.worlds.scenes.attributes import ORIENTED, RELATIONS, SHAPES, SIZES, VIEWS
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.labels import Labels, labels, obeyed
from course_lib.worlds.scenes.sampling import gaps, margins, relations, views
from course_lib.worlds.scenes.tracing import FAR
from course_lib.zoo import ZooError
from course_lib.zoo.pretrained import wrap
from course_lib.zoo.readers import SceneReader
from course_lib.zoo.recipes import mini_sd, scenes_reader
from tests import pipelines

REDRAW = 0.2  # s that a redraw may take
SLACK = (
    2  # times as long while other programs use the same caches: beside two that kept both cores busy 0.5 and 1.0 were measured
)

PROMPT = "a small red cube on grass, lit from the left"


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))


def crop(data: bytes, x: int, y: int, side: int) -> np.ndarray:
    return decode(data)[y : y + side, x : x + side]


def enlarged(rgb: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 by whole screen pixels."""
    scale = side // len(rgb)
    return rgb.repeat(scale, 0).repeat(scale, 1)


def levels(x: torch.Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] as (H, W, 3) uint8."""
    return pictures.to_rgb(x[None], "x")[0]


def seconds(shown: PromptExplorer | SceneExplorer) -> float:
    """Processor time of one redraw on one thread, the least of five: other programs only ever add to it."""
    took = []
    for _ in range(5):
        start = time.process_time()
        shown.draw(**shown.values)
        took.append(time.process_time() - start)
    print(f"{type(shown).__name__}: {1000 * min(took):.0f} ms")
    return min(took)


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_a_scene_has_the_attributes_that_are_asked():
    made = scene(**{**START, "shape": "house", "colour": "cyan", "size": "small", "ground": "sand", "light": "front"})
    assert captions(made, None) == ["a small cyan house, seen from the front, on sand, lit from the front"]
    assert (float(made.azimuth), float(made.elevation), float(made.yaw)) == (START["azimuth"], START["elevation"], 0)
    assert made.shape.shape == (1, 1)


def test_the_turn_of_the_object_and_the_way_of_the_camera_change_the_side_that_is_seen():
    for azimuth, turn in itertools.product((0, 90, 180, 270), (0, 90, 180, 270)):
        side = views(scene(**{**START, "azimuth": azimuth, "turn": turn}))[0, 0]
        assert VIEWS[side] == VIEWS[(azimuth - turn) // 90 % 4]


@pytest.mark.parametrize("azimuth", [0.0, START["azimuth"]])
@pytest.mark.parametrize("second", RELATIONS)
def test_the_relation_is_the_one_of_the_menu_from_azimuth_0_and_at_the_start(second, azimuth):
    for size in SIZES:
        made = scene(**{**START, "second": second, "size": size, "azimuth": azimuth})
        assert RELATIONS[relations(made)[0]] == second
        assert f"a {size} red car, seen from the front, {second} a large blue cube" in captions(made, None)[0]


def test_the_objects_stay_while_the_camera_goes_round_and_their_relation_turns():
    made = [scene(**{**START, "second": "left of", "azimuth": azimuth}) for azimuth in (0, 90, 180, 270)]
    assert all(torch.equal(one.position, made[0].position) for one in made)
    assert [RELATIONS[relations(one)[0]] for one in made] == ["left of", "behind", "right of", "in front of"]


@pytest.mark.parametrize("second", CHOICES["second"])
def test_objects_fit_the_picture_and_do_not_meet(second):
    """The ball around a shape does, at every corner of the sliders; shapes differ in the height of its centre alone."""
    elevations = (*ANGLES["elevation"], 25.0)
    for shape, size, azimuth, elevation in itertools.product(SHAPES, SIZES, range(0, 360, 30), elevations):
        made = scene(**{**START, "shape": shape, "size": size, "azimuth": azimuth, "elevation": elevation, "second": second})
        assert float(margins(made).min()) > 0 and float(gaps(made)) > 0


@pytest.mark.parametrize(
    "values, message",
    [
        ({"shape": "teapot"}, "shape = 'teapot'; expected one of sphere, cube, "),
        ({"colour": "mauve"}, "colour = 'mauve'; expected one of red, orange, "),
        ({"size": "tiny"}, "size = 'tiny'; expected one of small, large"),
        ({"ground": "snow"}, "ground = 'snow'; expected one of grey, "),
        ({"light": "back"}, "light = 'back'; expected one of left, right, front"),
        ({"second": "under"}, "second = 'under'; expected one of none, left of, "),
        ({"azimuth": 361.0}, r"azimuth = 361.0; expected degrees from 0 to 360"),
        ({"elevation": 5.0}, r"elevation = 5.0; expected degrees from 10 to 40"),
        ({"turn": float("nan")}, r"turn = nan; expected degrees from 0 to 360"),
    ],
)
def test_values_outside_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        scene(**{**START, **values})
    with pytest.raises(ValueError, match=message):
        SceneExplorer(**values)


# --- SceneExplorer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes_shown():
    return SceneExplorer()


@pytest.fixture
def shown(scenes_shown):
    """The explorer at its first values."""
    for name, value in START.items():
        scenes_shown.controls[name].value = value
    return scenes_shown


def test_the_pictures_are_those_of_the_world_by_whole_screen_pixels(shown):
    values = {**START, "second": "left of", "ground": "checkered", "elevation": 15.0}
    for name, value in values.items():
        shown.controls[name].value = value
    made, seen = scene(**values), shown.poster()
    assert np.array_equal(crop(seen, 10, 30, 384), enlarged(levels(render(made, 128).rgb[0]), 384))

    maps = render(made, 96)
    things = maps.segmentation[0, 0].numpy() + 1
    assert set(things.flatten()) == {0, 1, 2, 3}
    assert np.array_equal(shown._segments.get_array(), matplotlib.colors.to_rgba_array(SEGMENTS)[things][..., :3])
    lines = edges(maps.depth, maps.normal, maps.segmentation)
    assert np.array_equal(crop(seen, 698, 248, 192), enlarged(levels(2 * lines[0] - 1), 192))

    # A direction is a colour, (n + 1) / 2, to the nearest of 255 levels; matplotlib rounds down.
    normals = crop(seen, 698, 30, 192)[::2, ::2] / 127.5 - 1
    assert np.abs(normals - maps.normal[0].permute(1, 2, 0).numpy())[things > 0].max() <= 1 / 127.5 + 1e-6

    # The colours of depth are those of the scale beside it, and there is none where there is no surface.
    depth = shown._depth.get_array()
    assert np.array_equal(depth.mask, things == 0) and np.array_equal(depth.data, maps.depth[0, 0].numpy())
    scale = decode(seen)[30 : 30 + 192, 424 + 192 + 8 + 6].astype(int)
    at = ((maps.depth[0, 0].numpy().clip(*DEPTHS) - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]) * 191).round().astype(int)
    colours = crop(seen, 424, 30, 192)[::2, ::2].astype(int)
    assert np.abs(colours - scale[at])[things > 0].max() <= 4, "one of 192 levels is at most 4 of 255 in viridis"
    assert (np.abs(colours - 0xD9)[things == 0] == 0).all()


def test_no_depth_lies_before_the_scale():
    near = [
        render(scene(**{**START, "shape": shape, "elevation": elevation, "azimuth": azimuth, "second": second}), 24).depth.min()
        for shape, elevation, azimuth, second in itertools.product(
            ("snowman", "car"), ANGLES["elevation"], (0.0, 90.0), CHOICES["second"]
        )
    ]
    assert DEPTHS[0] < float(min(near)) < DEPTHS[0] + 0.5 and DEPTHS[1] < FAR


CHANGES = {
    "shape": "mug", "colour": "green", "size": "small", "ground": "sand", "light": "right", "second": "behind",
    "azimuth": 130.0, "elevation": 12.0, "turn": 180.0,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_each_control_changes_the_picture_and_back(shown, name):
    before = shown.poster()
    shown.controls[name].value = CHANGES[name]
    assert shown.message.value == "" and shown.poster() != before
    large = crop(shown.poster(), 10, 30, 384)
    assert np.array_equal(large, enlarged(levels(render(scene(**{**START, name: CHANGES[name]}), 128).rgb[0]), 384))
    shown.controls[name].value = START[name]
    assert shown.poster() == before


def test_the_caption_and_the_side_are_below(shown):
    assert shown._caption.get_text() == "a large red car, seen from the front, on grass, lit from the left"
    assert shown._view.get_text() == "view: front"
    shown.controls["turn"].value = 180.0
    assert "seen from the back" in shown._caption.get_text() and shown._view.get_text() == "view: back"
    shown.controls["shape"].value, shown.controls["second"].value = "cone", "right of"
    assert shown._caption.get_text().replace("\n", " ") == captions(scene(**shown.values), None)[0]
    assert shown._view.get_text().split("      ") == ["view: none, a cone has no front", "relation, as seen: right of"]


def test_text_neither_overlaps_nor_leaves_the_figure(shown):
    """With the longest caption of a scene."""
    longest = {"shape": "snowman", "colour": "orange", "ground": "plain", "light": "right", "second": "in front of"}
    for name, value in longest.items():
        shown.controls[name].value = value
    assert inside_and_apart(shown)


def inside_and_apart(shown) -> bool:
    texts = [text for text in shown._axes.texts if text.get_text()]
    boxes, whole = [text.get_window_extent() for text in texts], shown._axes.figure.bbox
    images = [image.get_window_extent() for image in shown._axes.images]
    assert min(text.get_fontsize() for text in texts) >= 12
    for i, box in enumerate(boxes):
        name = texts[i].get_text()
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, name
        assert not any(box.overlaps(other) for other in (*boxes[:i], *images)), name
    return True


def test_a_redraw_leaves_no_artists_behind_and_is_in_time(shown):
    count = len(shown._axes.figure.findobj())
    assert seconds(shown) < SLACK * REDRAW
    assert len(shown._axes.figure.findobj()) == count


def test_the_poster_is_a_small_png(shown):
    bundle = shown._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} < set(bundle)
    assert bytes(shown.poster()).startswith(b"\x89PNG") and decode(shown.poster()).shape == (540, 900, 3)
    assert len(shown.poster()) < 100_000


# --- PromptExplorer ---------------------------------------------------------------------------------------------------


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
    assert np.abs(seen - enlarged(levels(other.decode(last)[0]), 384)).max() <= 1 and shown.message.value == ""


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
