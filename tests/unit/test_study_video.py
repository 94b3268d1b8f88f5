"""The video explorer: its clips are the library's, what is read in them is said, and what is not offered is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from course_lib import zoo
from course_lib.devices import SampleNoise, autocast
from course_lib.guidance import cfg
from course_lib.nets import mini_sd
from course_lib.sample import sample
from course_lib.study import clips
from course_lib.study import video as module
from course_lib.study.video import CELL, GAP, HEIGHT, MOTIONS, SILENT, TOP, WIDTH, VideoExplorer, asked, motion_name, said
from course_lib.video.inflation import video_ldm_of
from course_lib.worlds.scenes.clip_captions import PHRASES, motion_captions
from course_lib.worlds.scenes.clips import draw_clips, render_clips
from course_lib.zoo.video import clips_of, wrap
from tests.control_bases import randomised
from tests.shown import inside_and_apart, levels, shots

PROMPT = "a large red car on grass"
LONG = "a large turquoise snowman on top of a small turquoise snowman on a checkered floor, with light from the left"
FRAMES = 4  # the least that a motion is read in


# --- the explorer: what is computed ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    """mini-sd with temporal layers that are drawn and not learned, so that each does something, and the readers."""
    image = zoo.load("mini-sd", device="cpu")
    temporal = randomised(video_ldm_of(image.denoiser.net, 16, told=mini_sd.WIDTH, seen=5), seed=1)
    model = wrap(image, temporal.eval().requires_grad_(False), "mini-video", frames=FRAMES)
    return model, zoo.load("scenes-motion", device="cpu"), zoo.load("scenes-reader", device="cpu")


@pytest.fixture(scope="module")
def kept():
    """Clips that were sampled, for all explorers of these tests: the sampler itself is tested beside its loop by hand."""
    return {}


@pytest.fixture
def explorer(parts, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "clips_of", counted(kept))
    return VideoExplorer(*parts, steps=4, folder=tmp_path)


def counted(kept, calls=None):
    def run(model, prompts, w, seed, steps, shared):
        m = model.denoiser.net.mixing
        if calls is not None:
            calls.append((*prompts, w, seed, steps, shared, m))
        key = (*prompts, w, seed, steps, shared, m)
        if key not in kept:
            kept[key] = clips_of(model, prompts, w, seed, steps, shared)
        return kept[key]

    return run


def both(explorer):
    """The clip, and the image model frame by frame."""
    return [explorer.clip(of) for of in explorer.settings(**explorer.values)]


def panel(explorer, place):
    """What plays at a place: (T, CELL, CELL, 3)."""
    x = GAP + place * (CELL + GAP)
    return shots(explorer.picture.value)[0][:, TOP : TOP + CELL, x : x + CELL].astype(int)


def words(explorer):
    """Titles and readings, left and right."""
    return [[text.get_text() for text in pair] for pair in (explorer._titles, explorer._kept, explorer._motions)]


def test_the_clip_is_the_librarys_and_beside_it_is_the_image_model_frame_by_frame(parts, explorer):
    model = parts[0]
    clip, plain = both(explorer)
    expected = clips_of(model, [f"{PROMPT}, sliding left"], 2.0, 0, 4, 40.0)[0]
    assert torch.equal(clip, expected) and not torch.equal(clip, plain) and model.denoiser.net.mixing == 1.0
    image, sigmas = model.image, model.image.sigmas(4)
    noise = SampleNoise(0)(torch.empty(1, *model.shape))[0]  # that of each frame
    D = cfg(*(image.denoiser.given(**image.embed([text] * FRAMES)) for text in (PROMPT, "")), 2.0)
    with autocast("cpu"), torch.no_grad():
        z = image.finish(sample(D, image.start(noise, sigmas[0]), sigmas), sigmas[-1]).float()
        assert torch.equal(plain, image.decode(z).float())


def test_at_mixing_zero_and_without_shared_noise_both_are_the_image_models_frames(parts, explorer):
    explorer.controls["mixing"].value = 0.0
    clip, plain = both(explorer)
    assert not torch.equal(clip, plain), "the noise is shared still"
    explorer.controls["shared"].value = 0.0
    clip, plain = both(explorer)
    assert torch.equal(clip, plain) and np.array_equal(panel(explorer, 0), panel(explorer, 1))
    assert words(explorer)[0][0] == "mixing 0: the image model\nnoise: each frame its own"
    explorer.controls["mixing"].value = 0.5
    assert not torch.equal(*both(explorer)) and not np.array_equal(panel(explorer, 0), panel(explorer, 1))


def test_only_what_changed_is_computed(parts, kept, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "clips_of", counted(kept, calls))
    explorer = VideoExplorer(*parts, steps=4)
    told = f"{PROMPT}, sliding left"
    assert calls == [(told, 2.0, 0, 4, 40.0, 1.0), (PROMPT, 2.0, 0, 4, 0.0, 0.0)]
    read = explorer.seen.cache_info().misses

    def fresh(**changes):
        calls.clear()
        for name, value in changes.items():
            explorer.controls[name].value = value
        assert explorer.message.value == ""
        return list(calls)

    assert fresh(mixing=0.5) == [(told, 2.0, 0, 4, 40.0, 0.5)]
    assert fresh(mixing=1.0) == [] and explorer.seen.cache_info().misses == read + 1
    assert fresh(shared=2.0) == [(told, 2.0, 0, 4, 2.0, 1.0)]
    assert fresh(motion="spinning") == [(f"{PROMPT}, spinning", 2.0, 0, 4, 2.0, 1.0)], "the image model is told of no motion"
    assert len(fresh(mixing=0.0)) == 1 and fresh(motion="bouncing", mixing=0.0) == []
    assert fresh(seed=1) == [(PROMPT, 2.0, 1, 4, 2.0, 0.0), (PROMPT, 2.0, 1, 4, 0.0, 0.0)]


def test_every_menu_has_a_value_and_every_motion_is_one_that_the_model_hears(parts, explorer):
    assert [name for name, control in explorer.controls.items() if getattr(control, "index", 0) is None] == []
    assert explorer.main_name == "mixing" and explorer.main.value + explorer.main.step <= explorer.main.max
    assert list(explorer.controls["motion"].options) == list(MOTIONS) and len(MOTIONS) == 1 + len(PHRASES)
    named = {motion_name(*key): key for key in PHRASES}
    for name in MOTIONS:
        assert asked(said(PROMPT, name)) == (asked(PROMPT)[0], named.get(name))
    assert asked(said(f"{PROMPT}, spinning", "bouncing"))[1] == ("bounce", ""), "the menu goes before what is typed"
    assert asked(said(f"{PROMPT}, spinning", SILENT))[1] == ("spin", "")
    assert said("", "bouncing") == "" and asked("") == asked("a dragon") == (None, None)
    heard = explorer.settings(**explorer.values | {"prompt": f"{PROMPT}, spinning", "motion": SILENT})
    assert [of.prompt for of in heard] == [f"{PROMPT}, spinning", PROMPT]


# --- the explorer: what is shown ------------------------------------------------------------------------------------------


def test_both_play_enlarged_for_ever_and_the_poster_is_their_first_frame(explorer):
    assert explorer._heading.get_text() == f"asked: {PROMPT}, sliding left"
    found, stays, loop = shots(explorer.picture.value)
    assert found.shape == (FRAMES, HEIGHT, WIDTH, 3) and stays == [125.0] * FRAMES and loop == 0
    for place, clip in enumerate(both(explorer)):
        expected = np.stack([levels(frame, CELL // 64) for frame in clip])
        assert np.abs(panel(explorer, place) - expected).mean() < clips.UNSEEN
    still, *rest = shots(explorer.poster())[0]
    assert not rest and np.array_equal(still, found[0]) and "image/png" in explorer._repr_mimebundle_()
    assert explorer.draw(**explorer.values) == explorer.picture.value


def test_what_is_read_is_said_beside_what_was_asked(parts, explorer):
    """Of rendered clips it is known what they show."""
    of = draw_clips(1, 3, "zoom", objects=1, frames=8)
    caption, (true,) = motion_captions(of, 3)[0], render_clips(of).rgb
    scene, key = asked(caption)
    name, other = motion_name(*key), next(name for name in MOTIONS if name not in (SILENT, motion_name(*key)))
    explorer.clip = lambda of: true
    prompt = caption.rpartition(", ")[0]

    def shown(**values):
        explorer.seen.cache_clear()
        explorer.draw(**explorer.values | values)
        return [pair[0] for pair in words(explorer)[1:]] + [explorer._motions[0].get_color()]

    right, wrong = (module.style.COLOURS[role] for role in ("model", "warn"))
    assert scene is not None and shown(prompt=prompt, motion=name) == [
        "shape and colour as asked: 8 of 8 frames", f"motion: {name}, as asked", right,
    ]  # fmt: skip
    assert explorer._heading.get_text().endswith(f", {MOTIONS[name]}"), "the motion is never cut"
    assert shown(prompt=prompt, motion=other)[1:] == [f"motion: {name}, not as asked", wrong]
    assert shown(prompt=prompt, motion=SILENT)[1:] == [f"motion: {name}", "black"]
    thing = scene.objects[0]
    differs = "a large blue cone" if thing["colour"] != "blue" else "a large red cone"
    assert shown(prompt=differs, motion=name)[0] == "shape and colour as asked: 0 of 8 frames"
    assert shown(prompt="a dragon", motion=SILENT)[0] == f"read: {thing['colour']} {thing['shape']} in 8 of 8 frames"
    true[:] = true[:1].clone()
    assert shown(prompt=prompt, motion=name)[1:] == ["motion: none is read, not as asked", wrong]


def test_words_that_the_model_never_saw_and_a_motion_that_it_does_not_hear_are_told(explorer):
    explorer.controls["prompt"].value = "a <wild> dragon"
    message = explorer.message.value
    assert "never saw &#x27;&lt;&#x27;" in message and "; the prompt is no scene that captions can name" in message
    assert "do not hear &#x27;sliding left&#x27;" in message and "\n" not in message
    assert [of.prompt for of in explorer.settings(**explorer.values)] == ["a <wild> dragon"] * 2
    explorer.controls["motion"].value = SILENT
    assert "never saw" in explorer.message.value and "do not hear" not in explorer.message.value
    explorer.controls["prompt"].value = PROMPT
    assert explorer.message.value == ""


def test_texts_are_legible_and_apart_and_a_redraw_leaves_no_artist_behind(explorer):
    count = len(explorer._figure.findobj())
    longest = max(MOTIONS, key=len)
    for values in ({}, {"motion": longest, "mixing": 0.95}, {"prompt": LONG}):
        explorer.draw(**explorer.values | values)
        for name in MOTIONS:  # the longest that can be read
            explorer._motions[0].set_text(f"motion: {name}, not as asked")
            assert inside_and_apart(explorer)
        clip_tops = TOP, TOP + CELL
        for text in explorer._axes.texts:
            box = text.get_window_extent()
            high, low = HEIGHT - box.y1, HEIGHT - box.y0  # from above
            assert low <= clip_tops[0] or high >= clip_tops[1], text.get_text()
    assert len(explorer._figure.findobj()) == count


# --- the explorer: a file, and bad input ----------------------------------------------------------------------------------


def test_a_clip_is_saved_under_a_name_of_its_own_and_it_is_said_where(explorer, tmp_path, monkeypatch):
    name = "a_large_red_car_on_grass_sliding_left"
    assert explorer.save in explorer.children[0].children and explorer.saved in explorer.children
    monkeypatch.setenv("PATH", "")
    explorer.save.click()
    first = tmp_path / f"{name}_1.png"
    assert explorer.saved.value == f"ffmpeg is missing, so an animated PNG was saved: {first}"
    assert first.read_bytes() == clips.animated_png(both(explorer)[0], scale=CELL // 64)
    monkeypatch.undo()
    explorer.save.click()
    assert len(list(tmp_path.glob(f"{name}_2.*"))) == 1 and f"{tmp_path}/{name}_2." in explorer.saved.value
    (tmp_path / "file").write_text("")
    explorer._folder = tmp_path / "file"
    explorer.save.click()
    assert "not saved: " in explorer.saved.value and "\n" not in explorer.saved.value


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mixing": 1.6}, r"mixing = 1.6; expected a number from 0 to 1.5"),
        ({"guidance": float("nan")}, r"guidance = nan; expected a number from 1 to 8"),
        ({"steps": 3}, r"steps = 3; expected a number from 4 to 20"),
        ({"seed": -1}, r"seed = -1; expected a number from 0"),
        ({"shared": 3.0}, r"shared = 3.0; expected one of 0, 2, 10, 40"),
        ({"motion": "flying"}, r"motion = 'flying'; expected one of nothing said, sliding left"),
    ],
)
def test_values_that_are_not_offered_are_named(parts, explorer, values, message):
    with pytest.raises(ValueError, match=message):
        VideoExplorer(*parts, **values)
    with pytest.raises(ValueError, match=message):
        explorer.draw(**explorer.values | values)


def test_a_model_that_can_be_told_no_motion_draws_the_whole_prompt(parts, kept):
    """As a motion module without a text of its own: the words go to the spatial layers."""
    model = parts[0]
    untold = wrap(model.image, video_ldm_of(model.image.denoiser.net, 16), "untold", frames=FRAMES)
    explorer = VideoExplorer(replace(untold, shared=0.0), *parts[1:], steps=4, guidance=1.0, shared=0.0, motion=SILENT)
    assert torch.equal(*both(explorer)), "layers that have learnt nothing are the identity"
