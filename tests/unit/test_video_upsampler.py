"""The spatial stage of a cascade of clips: what it is told, what it is without its temporal layers, and what its card says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from course_lib import zoo
from course_lib.denoisers import from_edm
from course_lib.devices import SampleNoise, autocast
from course_lib.sample import sample
from course_lib.video.conditioning import enlarged
from course_lib.worlds.scenes.clips import draw_clips, render_clips
from course_lib.zoo import judge_video
from course_lib.zoo.judge_upsampler import MORE, SEEDS, S, detail, measured
from course_lib.zoo.recipes import video_upsampler as recipe
from course_lib.zoo.upsampler import LEVELS, SIGMA_DATA, TOLD, told
from course_lib.zoo.video import frames_of, latents_of
from course_lib.zoo.video_data import pictures
from tests.draws import normal


@pytest.fixture(scope="module")
def upsampler():
    return zoo.load("mini-video-upsampler", device="cpu")


@pytest.fixture(scope="module")
def low(upsampler):
    """Latents of two small clips."""
    with torch.no_grad():
        return torch.stack([upsampler.model.encode(clip) for clip in judge_video.true_clips("validation")[:2]])


def test_what_is_told_is_the_enlarged_picture_its_pixels_its_latents_and_the_level(upsampler, low):
    model, s, eps = upsampler.model, torch.tensor([0.0, 0.5]), normal(*low.shape).float()
    found = told(model, low, s, eps)
    z = torch.stack([low[0], low[1] + 0.5 * eps[1]])
    with torch.no_grad(), autocast("cpu"):
        x = model.decode(z.flatten(0, 1)).float()
        e = model.encode(F.interpolate(x, scale_factor=2, mode="bilinear")).float()
    assert found.shape == (2, 8, TOLD, 16, 16)
    assert torch.equal(found[:, :, :4].flatten(0, 1), e)
    assert torch.equal(F.pixel_shuffle(found[:, :, 4:52], 4).flatten(0, 1), x)
    assert torch.equal(found[:, :, 52:56, ::2, 1::2], z)
    assert torch.equal(found[:, :, 56].amax((1, 2, 3)), s) and torch.equal(found[:, :, 56].amin((1, 2, 3)), s)


def test_without_its_temporal_layers_it_draws_frame_by_frame(upsampler, low):
    condition = told(upsampler.model, low, torch.zeros(2), torch.zeros_like(low))
    e = condition[:, :, :4]
    D = from_edm(upsampler.denoiser.net.net, SIGMA_DATA, low=condition.flatten(0, 1))
    x = SampleNoise(0)(e) * LEVELS[0].float()
    with torch.no_grad(), autocast("cpu"):
        alone = e + sample(D, x.flatten(0, 1), LEVELS).float().view_as(e)
    assert torch.equal(upsampler(low, m=0.0), alone)
    assert not torch.equal(upsampler(low), alone)


def test_a_clip_depends_on_its_seed_and_level_and_not_on_its_batch(upsampler, low):
    both = upsampler(low)
    assert both.shape == (2, 8, 4, 16, 16)
    assert torch.allclose(upsampler(low[:1]), both[:1], atol=0.05)  # bfloat16 rounds by the batch
    for other in (upsampler(low, seed=5), upsampler(low, s=0.4), upsampler(low, s=0.4, behind=True)):
        assert (other - both).abs().max() > 0.1


def test_what_is_no_clip_of_latents_is_an_error(upsampler):
    with pytest.raises(ValueError, match=r"low has shape \(4, 8, 8\); expected clips of latents \(N, T, 4, H, W\)"):
        upsampler(torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match=r"s\[0\] = -1; expected finite noise levels"):
        upsampler(torch.zeros(1, 8, 4, 8, 8), s=-1.0)
    with pytest.raises(ValueError, match=rf"low has shape None; expected \(N, {TOLD}, H, W\)"):
        upsampler.denoiser.net.net.check_condition()


def test_blur_has_less_detail():
    x = judge_video.true_clips("validation")[:2]
    blurred = enlarged(F.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2]), 2)
    assert (detail(blurred) < 0.6 * detail(x)).all()


def test_the_card_says_what_is_gained_and_what_is_lost():
    """Detail comes back, at some loss of PSNR; temporal layers make frames agree; and noise goes where it is told of."""
    facts = zoo.card("mini-video-upsampler")
    card = facts["metrics"]
    assert facts["bytes"] <= 700_000 and facts["seconds"] <= 20 * 60
    for seed in SEEDS:
        alone, ours = card[f"frame by frame, seed {seed}"], card[f"with temporal layers, seed {seed}"]
        assert ours["detail"] > 0.8 > 1.5 * card["bilinear"]["detail"]
        assert ours["psnr"] > card["bilinear"]["psnr"] - 0.5
        assert ours["still_flicker"] < alone["still_flicker"] and ours["warp_error"] < alone["warp_error"]
        alone, ours = (card[f"four steps, {how}, seed {seed}"] for how in ("frame by frame", "with temporal layers"))
        assert ours["still_flicker"] < 0.9 * alone["still_flicker"] and ours["warp_error"] < 0.9 * alone["warp_error"]
        untold, more, of_noise = (card[f"wrong latents, {how}, seed {seed}"] for how in ("s = 0", f"s = {S}", "told of it"))
        assert of_noise["psnr"] > untold["psnr"] + 0.5 and of_noise["warp_error"] < 0.8 * untold["warp_error"]
        assert more["psnr"] < untold["psnr"]  # noise over noise hides more than it helps


@torch.no_grad()
def test_clips_measured_again_have_detail_and_their_frames_agree(upsampler):
    """By four steps, of the first clips of the card: where more is drawn, temporal layers have more to do."""
    of, model = judge_video.clips("test").of[:4], upsampler.model
    true, small = render_clips(of, 128), pictures(of)
    z = torch.stack([model.encode(clip) for clip in small])
    with autocast("cpu"):
        drawn = (upsampler(z, m=m, levels=MORE) for m in (0.0, 1.0))
        alone, ours = (measured(torch.stack([model.decode(clip).float() for clip in x]), true) for x in drawn)
    assert ours["warp_error"] < alone["warp_error"] and ours["still_flicker"] < alone["still_flicker"]
    assert ours["detail"] > 1.5 * measured(enlarged(small, 2), true)["detail"]


@torch.no_grad()
def test_from_a_prompt_to_a_large_clip(upsampler):
    """What `mini-video` draws, at twice the size: the same clip where four pixels are one, with detail that enlargement lacks."""
    model = zoo.load("mini-video", device="cpu")
    z = latents_of(model, judge_video.clips("validation").captions[:2], seed=3, steps=10)
    small = frames_of(model, z)
    with autocast("cpu"):
        large = model.decode(upsampler(z)).float()
    assert large.shape == (2, 8, 3, 128, 128)
    error = F.avg_pool2d(large.flatten(0, 1), 2) - small.flatten(0, 1)
    assert float((10 * torch.log10(4 / error.square().mean((1, 2, 3)))).mean()) > 30
    assert (detail(large) > 2 * detail(enlarged(small, 2))).all()


def test_a_frame_is_rendered_as_in_its_clip():
    of = draw_clips(3, 5, objects=1, frames=8)
    rows, frame = torch.tensor([2, 0, 2]), torch.tensor([7, 3, 0])
    assert torch.equal(recipe.large_pictures(of, rows, frame), pictures(of, 128)[rows, frame])


def test_a_step_of_each_stage_moves_its_weights(monkeypatch):
    of = draw_clips(2, 5, objects=1, frames=8)
    low, high = normal(2, 8, TOLD, 16, 16).half(), normal(2, 8, 4, 16, 16, seed=1).float()
    monkeypatch.setattr(recipe, "pairs", lambda *_: (low, high, of))
    monkeypatch.setattr(recipe, "STAGES", {name: stage | {"steps": 1} for name, stage in recipe.STAGES.items()})
    before = recipe.network()
    run = recipe.train(progress=False, device="cpu", ema_decay=0.0)
    assert list(run.stages) == list(recipe.STAGES)
    for part in ("frames", "temporal"):
        pairs = zip(run.net[part].parameters(), before[part].parameters(), strict=True)
        assert any(not torch.equal(new, old) for new, old in pairs), part
