"""An inflated network as samplers, guidance and controls use it: what it is told, what it costs, and what it refuses."""

import warnings

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.testing import assert_close

from course_lib.denoisers import batched
from course_lib.devices import SampleNoise
from course_lib.guidance import cfg
from course_lib.nets.control import controlled
from course_lib.nets.temporal import TemporalAttention, TimeConv
from course_lib.nets.unet import UNet
from course_lib.sample import sample
from course_lib.singlestep import heun
from course_lib.steps import ddim
from course_lib.video.animatediff import motion_of
from course_lib.video.inflation import (
    Inflated,
    check_clip,
    clip_of,
    factorised_of,
    inflated,
    mixed,
    pseudo_3d_of,
    temporal_of,
    video_ldm_of,
)
from course_lib.video.pairs import pairs, unet_of
from tests.control_bases import F64, B, base, random_mini_sd, randomised
from tests.draws import normal
from tests.video_bases import SIGMAS, WAYS, T, clips, frame_by_frame, gap, kinds, multiply_adds, video, ways

# --- conditions ------------------------------------------------------------------------------------------------------------


@kinds
@ways
def test_conditions_once_a_clip_or_for_each_frame(kind, way):
    D, image, x = video(kind, way, learnt=True, dtype=F64)
    of, (sigma, each) = base(kind, F64), (SIGMAS["a clip"], SIGMAS["a frame"])
    ((name, once),) = of.given[0].items()
    frames = once[:, None].expand(-1, T, *once.shape[1:]).clone()
    with torch.no_grad():
        assert_close(D.given(**{name: frames})(x, sigma[:, None].expand(B, T)), D(x, sigma), rtol=0, atol=1e-12)
        one = once[:1]
        assert_close(D.given(**{name: one})(x, sigma), D.given(**{name: one.expand_as(once)})(x, sigma), rtol=0, atol=1e-12)
        frames[1, 2] = of.given[1][name][1]
        own = D.given(**{name: frames})
        assert gap(own(x, sigma), D(x, sigma)) > 1e-4
        with mixed(D.net, 0.0):
            found = own(x, each)
        for t in range(T):
            assert_close(found[:, t], image.given(**{name: frames[:, t]})(x[:, t], each[:, t]), rtol=0, atol=1e-10)


def test_as_many_words_or_classes_as_frames_are_still_of_a_clip():
    of = base("text", F64)
    D = inflated(of.D, randomised(factorised_of(of.D.net), seed=1))
    text = normal(B, T, 128, seed=4)  # T words
    with torch.no_grad(), mixed(D.net, 0.0):
        found = D.given(encoder_hidden_states=text)(clips(of), of.sigma)
        expected = frame_by_frame(of.D.given(encoder_hidden_states=text), clips(of), of.sigma)
    assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_network_with_a_control_is_inflated_too_and_takes_a_map_for_each_frame():
    of = base("text", F64)
    D = controlled(of.of(), edge=of.control(learnt=True))
    D_video = inflated(D, factorised_of(D.net))
    maps = torch.rand(B, T, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=F64)
    with torch.no_grad():
        found = D_video.given(edge=maps)(clips(of), of.sigma)
        for t in range(T):
            expected = D.given(edge=maps[:, t])(clips(of)[:, t], of.sigma)
            assert_close(found[:, t], expected, rtol=0, atol=1e-10)
        once = D_video.given(edge=maps[:, 0])(clips(of), of.sigma)
        assert_close(once[:, 0], found[:, 0], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"edge has values from .* to 2; expected a condition map in \[0, 1\]"):
        D_video.given(edge=2 * torch.ones_like(maps))


# --- what is done with Denoisers -------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("step", [ddim, heun])
def test_samplers_take_clips(kind, step):
    D, image, x = video(kind, "Video LDM", dtype=F64)
    sigmas = torch.tensor([5.0, 1.0, 0.3, 0.0], dtype=F64)
    start = SampleNoise(3).start(x.shape, sigmas[0], F64)
    found = sample(D, start, sigmas, step)
    for t in range(T):
        assert_close(found[:, t], sample(image, start[:, t], sigmas, step), rtol=0, atol=1e-9)


@kinds
def test_guidance_is_one_call(kind):
    of = base(kind, F64)
    D = inflated(of.D, randomised(video_ldm_of(of.D.net), seed=1))
    pair, x = [of.of(k, D) for k in (0, 1)], clips(of)
    calls = []
    hook = unet_of(D.net.net).register_forward_hook(lambda module, inputs, y: calls.append(len(inputs[0])))
    with hook, torch.no_grad():
        together = batched(*pair)(x, of.sigma)
        assert calls == [2 * B * T]
        for found, one in zip(together, pair, strict=True):
            assert_close(found, one(x, of.sigma), rtol=0, atol=1e-10)
        guided = cfg(*pair, 3.0)(x, of.sigma)
        assert_close(guided, together[1] + 3.0 * (together[0] - together[1]), rtol=0, atol=1e-9)


# --- cost ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "share"), [("factorised", 0.076), ("pseudo-3D", 0.225), ("Video LDM", 0.132), ("AnimateDiff", 0.393)]
)
def test_the_share_of_multiply_adds_at_8_frames_of_mini_sd(way, share):
    net = random_mini_sd().net
    inflated_net, x = Inflated(net, WAYS[way](net)), torch.zeros(1, 8, 4, 8, 8)
    told = {"time": torch.tensor(5.0), "encoder_hidden_states": torch.zeros(1, 32, 128)}
    on = multiply_adds(lambda: inflated_net(x, **told))
    with mixed(inflated_net, 0.0):
        off = multiply_adds(lambda: inflated_net(x, **told))
    alone = {**told, "encoder_hidden_states": torch.zeros(8, 32, 128)}
    assert off == multiply_adds(lambda: net(x[0], **alone))
    assert on / off - 1 == pytest.approx(share, abs=5e-4)


def test_multiply_adds_of_convolutions_are_linear_in_frames_and_those_of_attention_are_not():
    of = base("classes")

    def added(temporal, T):
        net = Inflated(of.D.net, temporal)
        count = []
        for m in (1.0, 0.0):
            with mixed(net, m):
                count.append(multiply_adds(lambda: net(torch.zeros(1, T, 2, 8, 8), torch.tensor(5.0))))
        return count[0] - count[1]

    convs = temporal_of(of.D.net, conv=TimeConv)
    assert added(convs, 8) == 2 * added(convs, 4) == 8 * added(convs, 1) > 0
    places = sum(pair.channels * 4 * 4 for pair in pairs(of.D.net) if pair.attention)  # at half the side
    attention = temporal_of(of.D.net, attention=TemporalAttention)
    assert added(attention, 8) - 2 * added(attention, 4) == 2 * (8**2 - 2 * 4**2) * places  # of q k^T and of the mean of v


# --- mistakes --------------------------------------------------------------------------------------------------------------


@kinds
@ways
def test_what_is_no_clip_is_refused(kind, way):
    D, _, x = video(kind, way)
    c = x.shape[2]
    for wrong, said in (
        (x[:, 0], r"x has shape \(2, ., 8, 8\); expected clips \(B, T, C, H, W\) of at least one frame"),
        (x[:, :0], r"x has shape \(2, 0, ., 8, 8\); expected clips \(B, T, C, H, W\) of at least one frame"),
        (x[None], r"x has shape \(1, 2, 4, ., 8, 8\); expected clips"),
        (
            torch.cat([x, x, x], 1).transpose(1, 2),
            rf"x has shape \(2, ., 12, 8, 8\); expected \(B, T, {c}, H, W\): frames before",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            D(wrong, torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"x is a list; expected a tensor of clips \(B, T, C, H, W\): see clip_of"):
        check_clip(list(x))


def test_frames_of_several_sizes_are_refused():
    frames = [normal(3, 8, 8, seed=k) for k in range(T)]
    assert torch.equal(clip_of(frames), torch.stack(frames))
    assert clip_of(torch.stack(frames)).shape == (T, 3, 8, 8)
    for wrong, said in (
        ([*frames, normal(3, 8, 9)], r"frames\[4\] has shape \(3, 8, 9\); expected \(3, 8, 8\), that of frames\[0\]"),
        ([normal(2, 3, 8, 8)], r"frames\[0\] has shape \(2, 3, 8, 8\); expected \(C, H, W\)"),
        ([], "frames is empty; expected at least one frame"),
    ):
        with pytest.raises(ValueError, match=said):
            clip_of(wrong)


def test_conditions_of_other_clips_are_refused():
    of = base("text")
    D, x = inflated(of.D, factorised_of(of.D.net)), clips(of)
    for shape, said in (
        ((3, 5, 128), r"encoder_hidden_states has shape \(3, 5, 128\); expected 2 rows, one a clip, or one for all"),
        ((B * T, 5, 128), r"encoder_hidden_states has shape \(8, 5, 128\); expected 2 rows"),
        ((B, T + 1, 5, 128), r"encoder_hidden_states has shape \(2, 5, 5, 128\); expected \(2, 4, ...\) for 2 clips of 4 frames"),
    ):
        with pytest.raises(ValueError, match=said):
            D.given(encoder_hidden_states=torch.zeros(shape))(x, of.sigma)
    with pytest.raises(ValueError, match="condition 'texts' is not taken by the network; expected one of"):
        D.given(texts=torch.zeros(B, 5, 128))
    labelled = inflated(base("classes").D, factorised_of(base("classes").D.net))
    with pytest.raises(ValueError, match="label = 9; expected from 0 to 2"):
        labelled.given(label=torch.tensor([[0, 1, 2, 9], [0, 0, 0, 0]]))


def test_factorised_attention_needs_spatial_attention():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (16, 32)}
    unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=8, add_attention=False, **blocks)
    with pytest.raises(ValueError, match="net is a UNet2DModel without spatial attention; expected layers that the temporal"):
        factorised_of(unet)
    assert video_ldm_of(unet).after and pseudo_3d_of(unet).after and "mid_block.motion_modules.0" not in motion_of(unet).after


@ways
def test_layers_of_another_network_are_refused(way):
    of = base("classes")
    other = UNet(channels=2, widths=(32, 64), blocks=1, attention=(1,), classes=3)
    deeper = UNet(channels=2, widths=(16, 32), blocks=3, attention=(1,), classes=3)
    theirs = base("text").D.net
    for net, said in (
        (other, r"temporal has a layer of (32|64) channels after .*; this network has (16|32) channels there"),
        (deeper, r"temporal has a layer of .. channels after .*; this network has (no such layer|.. channels there)"),
        (theirs, r"temporal has a layer of 32 channels after .*; this network has no such layer"),
    ):
        with pytest.raises(ValueError, match=said):
            inflated(of.D, WAYS[way](net))


def test_other_mistakes_are_named():
    of = base("classes")
    with pytest.raises(ValueError, match="D is a function; expected a NetworkDenoiser: inflate first, then guide"):
        inflated(lambda x, sigma: x, factorised_of(of.D.net))
    with pytest.raises(ValueError, match="D is inflated already; expected the Denoiser of an image model"):
        inflated(inflated(of.D, factorised_of(of.D.net)), factorised_of(of.D.net))
    with pytest.raises(ValueError, match="net is a Linear without a U-Net; expected a UNet of this course"):
        factorised_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="net is a UNet; expected an inflated one"), mixed(of.D.net, 0.0):
        pass


def test_a_longer_clip_than_the_positions_is_said_once_a_layer_and_runs():
    of = base("classes")
    D, x = of.of(D=inflated(of.D, factorised_of(of.D.net, frames=3))), clips(of)
    with pytest.warns(UserWarning, match="the clip has 4 frames; expected at most 3, .* take windows of 3"), torch.no_grad():
        assert D(x, of.sigma).shape == x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        D(x[:, :3], of.sigma)
        with mixed(D.net, 0.0):
            D(x, of.sigma)
    motion = of.of(D=inflated(of.D, motion_of(of.D.net, frames=3)))
    with pytest.raises(ValueError, match="the clip has 4 frames; expected at most 3"):
        motion(x, of.sigma)
    for module in motion.net.modules():
        assert not module._forward_hooks  # after an error too
