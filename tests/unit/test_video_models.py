"""The models of lecture 11: what their cards say, what they cost, and that what is known of a clip comes back as it was."""

from __future__ import annotations

import pytest
import torch
from diffusers import MotionAdapter

from course_lib import zoo
from course_lib.nets import lora
from course_lib.video import measures
from course_lib.video.animatediff import to_diffusers
from course_lib.video.conditioning import enlarged
from course_lib.video.inflation import mixed
from course_lib.video.masks import every
from course_lib.worlds.scenes.clips import render_clips
from course_lib.zoo import judge_decoder, judge_motion, judge_video, video
from course_lib.zoo.recipes import motion as motion_recipe
from course_lib.zoo.recipes import video as video_recipe
from tests.draws import normal
from tests.video_bases import multiply_adds

LORAS = tuple(motion_recipe.LORAS)
MODELS = ("mini-video", "mini-video-decoder", "mini-video-upsampler", "mini-motion", *LORAS, "scenes-motion")
SHORT = 4
"""Steps of DDIM where nothing is judged."""


@pytest.fixture(scope="module")
def model():
    return zoo.load("mini-video", device="cpu")


def metrics(name):
    return zoo.card(name)["metrics"]


def test_the_models_take_five_megabytes_together_and_an_hour_of_two_cores_each():
    """The cards tell the seconds of one thread, of which two cores have two."""
    assert sum(zoo.card(name)["bytes"] for name in MODELS) <= 5e6
    for name in MODELS:
        assert "1 thread" in zoo.card(name)["hardware"] and zoo.card(name)["seconds"] <= 2 * 60 * 60


# --- mini-video ----------------------------------------------------------------------------------------------------------


def test_the_card_says_that_clips_are_what_was_asked_and_hold_together():
    card = metrics("mini-video")
    true, alone, ours = card["true clips"], card["frame by frame"], card["seed 0"]
    assert card["clips"] == 200
    assert ours["shape"] >= 0.9 and ours["colour"] >= 0.9
    assert ours["flicker"] <= 1.5 * true["flicker"] < alone["flicker"]
    assert 3 * ours["frechet"] <= alone["frechet"]
    assert ours["word"] >= 0.75 > 5 * alone["word"]


@torch.no_grad()
def test_temporal_layers_cost_a_third_and_frames_cost_alike(model):
    """Multiply-adds, counted. Only attention's maps over time grow faster than the number of frames."""
    told = {name: value[:1] for name, value in model.embed(["a red cube, spinning"]).items()}

    def cost(frames, m=1.0):
        x, known = normal(1, frames, *model.image.shape).float(), torch.zeros(1, frames, 5, 8, 8)
        D = model.denoiser.given(**told, context=known)
        with mixed(D.net, m):
            return multiply_adds(lambda: D(x, torch.tensor(1.0)))

    alone, whole = cost(8, 0.0), cost(8)
    assert whole <= 1.35 * alone
    added = [cost(frames) - cost(frames, 0.0) for frames in (4, 8, 16)]
    assert abs(added[2] / added[1] - 2) < 0.05 and abs(added[1] / added[0] - 2) < 0.05


def test_clips_of_a_prompt_hold_together_where_frames_by_themselves_do_not(model):
    """Two clips suffice: without the temporal layers each frame is another picture."""
    prompts = ["a large red car on grass, sliding right", "a small blue cube on sand, as the camera comes closer"]
    with mixed(model.denoiser.net, 0.0):
        alone = measures.flicker(video.clips_of(model, prompts, steps=8, shared=0.0))
    assert bool((2 * measures.flicker(video.clips_of(model, prompts, steps=8)) < alone).all())


def test_known_frames_come_back_as_they_are_and_a_clip_does_not_depend_on_its_batch(model):
    prompts = ["a red cube, sliding right", "a blue cone, bouncing"]
    z, known = normal(2, *model.shape, seed=1).float(), every(8, 3)
    both = video.latents_of(model, prompts, steps=SHORT, known=known, z=z)
    assert torch.equal(both[:, known], z[:, known]) and not torch.equal(both[:, ~known], z[:, ~known])
    one = video.latents_of(model, prompts[:1], steps=SHORT, known=known, z=z[:1])
    # bf16 networks on other batch sizes differ by its rounding, 2^-8 of numbers of a few units
    torch.testing.assert_close(one[0], both[0], rtol=0, atol=0.1)
    other = video.latents_of(model, prompts, steps=SHORT, known=known, z=-z)
    assert float((other - both)[:, ~known].abs().mean()) > 0.05


def test_a_long_clip_is_drawn_in_windows_and_says_so(model):
    with pytest.warns(UserWarning, match="the clip has 11 frames; expected at most 8.*windows of 8 are used"):
        x = video.long_clips(model, ["a red cube, sliding right"], 11, steps=2)
    assert x.shape == (1, 11, 3, 64, 64)
    torch.testing.assert_close(x[:, :8], video.clips_of(model, ["a red cube, sliding right"], steps=2), rtol=0, atol=0)
    assert video.long_clips(model, ["a red cube, sliding right"], 3, steps=2).shape == (1, 3, 3, 64, 64)


def test_the_words_of_a_prompt_go_where_they_are_heard(model):
    whole, scene = (model.embed([text]) for text in ("a red cube, sliding right", "a red cube"))
    assert torch.equal(whole["encoder_hidden_states"], scene["encoder_hidden_states"])
    assert not torch.equal(whole["motion"], scene["motion"])
    assert video.split("a red cube, spinning") == ("a red cube", "spinning")
    assert video.split("a red cube, on sand") == ("a red cube, on sand", "")


def test_what_cannot_be_known_is_an_error(model):
    z = torch.zeros(1, *model.shape)
    with pytest.raises(ValueError, match="known is not given and z is"):
        video.latents_of(model, ["a red cube"], z=z)
    with pytest.raises(ValueError, match="known is given and z is not"):
        video.latents_of(model, ["a red cube"], known=every(8, 2))
    deaf = zoo.load("mini-motion", device="cpu")
    with pytest.raises(ValueError, match="'mini-motion' can be told of no frames; expected one that hears `context`"):
        video.latents_of(deaf, ["a red cube"], known=every(8, 2), z=z)


def test_sampling_starts_where_noise_in_common_hides_what_moves(model):
    """Frames differ by noise of sigma / sqrt(1 + a^2): at the first level it is ten times the latents, of deviation 1."""
    own, sigmas = model.image.sigmas(SHORT), model.sigmas(SHORT)
    assert torch.equal(sigmas[-len(own) :], own) and bool((sigmas.diff() < 0).all())
    assert sigmas[0] / (1 + model.shared**2) ** 0.5 > 10 > own[0] / (1 + model.shared**2) ** 0.5
    trained = video_recipe.levels(model.image, 200)
    assert len(trained) == 1200 and bool((trained.diff() > 0).all()) and trained[-1] == pytest.approx(float(sigmas[0]))
    assert torch.equal(trained[:1000], model.image.schedule.sigma(torch.arange(1000)))


def test_a_training_step_leaves_the_image_model_as_it_is():
    image = zoo.load("mini-sd", device="cpu")
    before = {key: value.clone() for key, value in image.net.state_dict().items()}
    of = video_recipe.filmed(8, 9_799)
    draw = video_recipe.batches(of, image.schedule.sigma(torch.arange(1000)), batch=2, none=0.5)
    net = video_recipe.network()
    options = {"steps": 2, "lr": 1e-3, "progress": False, "ema_decay": 0.0, "device": "cpu", "nhwc": False}
    done = video_recipe.fit(net, draw, video_recipe.loss_of(image), **options)
    assert all(torch.equal(value, before[key]) for key, value in image.net.state_dict().items())
    assert any(float(value.abs().max()) > 0 for key, value in done.net.state_dict().items() if key.endswith("mix.weight"))


def test_judges_read_true_clips_and_not_shuffled_ones():
    true = judge_video.true_clips("validation")[:24]
    right = judge_video.judged(true, "validation")
    wrong = judge_video.judged(true[:, torch.tensor([3, 0, 6, 1, 7, 4, 2, 5])], "validation")
    assert right["word"] >= 0.75 and wrong["word"] <= 0.25 and wrong["flicker"] > 1.5 * right["flicker"]
    assert right["identity"] == wrong["identity"] > 0.9


# --- the decoder ---------------------------------------------------------------------------------------------------------


def test_the_spatial_stage_is_nearer_to_large_clips_than_bilinear_enlargement():
    """Clip by clip, and nothing in it is drawn."""
    of, scaled = judge_video.clips("test").of[:4], zoo.load("mini-sd-any-scale", device="cpu")
    small, large = (render_clips(of, side).rgb for side in (64, 128))
    with torch.no_grad():
        z = torch.stack([scaled.model.encode(clip) for clip in small])
        found = (
            enlarged(torch.stack([scaled.model.decode(clip) for clip in z]), 2),
            torch.stack([scaled.decode(clip, 128) for clip in z]),
        )
    bilinear, ours = (10 * torch.log10(4 / (x - large).square().mean((2, 3, 4))).mean(1) for x in found)
    assert ours.shape == (4,) and (ours > bilinear + 0.2).all()


def test_the_decoder_flickers_less_at_no_loss():
    card = metrics("mini-video-decoder")
    image, ours = card["image decoder"], card["video decoder"]
    assert ours["psnr"] >= image["psnr"]
    assert ours["flicker"] < image["flicker"]  # that of true clips is above: a VAE blurs what moves
    for name in ("still_flicker", "warp_error"):
        assert card["true"][name] < ours[name] < image[name]
    again = judge_decoder.judge(zoo.load("mini-video-decoder", device="cpu"), n=8)
    assert again["video decoder"]["psnr"] > again["image decoder"]["psnr"]


# --- AnimateDiff ---------------------------------------------------------------------------------------------------------


def test_the_module_moves_the_personalised_model_and_keeps_its_style():
    card = metrics("mini-motion")
    for base in judge_motion.BASES:
        moved, alone = card[base], card[f"{base}, frame by frame"]
        assert moved["flicker"] < 0.6 * alone["flicker"] and moved["smoothness"] > alone["smoothness"]
        assert moved["identity"] >= 0.9
    assert card["mini-style"]["style"] >= 0.9


@pytest.mark.parametrize("name", LORAS)
def test_a_motion_lora_gives_its_motion_on_both_bases(name):
    """Ten points, and two standard errors of the difference of two shares of a hundred clips."""
    base, style = (metrics(name)[one] for one in judge_motion.BASES)
    assert style["style"] >= 0.9
    for what in ("word", "direction"):
        error = (sum(one[what] * (1 - one[what]) for one in (base, style)) / judge_motion.CLIPS) ** 0.5
        assert abs(base[what] - style[what]) <= 0.1 + 2 * error


def test_diffusers_takes_the_module_and_its_loras(tmp_path):
    motion = zoo.load("mini-motion", device="cpu").temporal
    adapter = to_diffusers(motion)
    adapter.save_pretrained(tmp_path)
    again = MotionAdapter.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in adapter.state_dict().items())
    for name in LORAS:
        panning = zoo.load(name, device="cpu").temporal
        assert lora.loras(panning) and all(
            torch.equal(value, panning.state_dict()[key])
            for key, value in motion.state_dict().items()
            if key in panning.state_dict()
        )


def test_the_prompt_of_a_module_that_hears_no_motion_is_all_scene():
    model = zoo.load("mini-motion", device="cpu")
    assert set(model.embed(["a red cube, spinning"])) == {"encoder_hidden_states"}
    assert model.on(zoo.load("mini-style", device="cpu")).name == "mini-motion on mini-style"
