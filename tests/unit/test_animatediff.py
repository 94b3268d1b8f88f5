"""AnimateDiff: one motion module for many image models, MotionLoRA on top of it, and what MotionAdapter cannot hold."""

import pytest
import torch
from diffusers import MotionAdapter
from torch import nn

from course_lib.denoisers import NetworkDenoiser
from course_lib.nets import lora
from course_lib.nets.lora import add_lora, lora_state, scaled, with_lora, without_lora
from course_lib.nets.unet import UNet
from course_lib.training import denoising_loss
from course_lib.video.animatediff import from_diffusers, motion_lora, motion_of, to_diffusers
from course_lib.video.inflation import Temporal, inflated, mixed, video_ldm_of
from course_lib.video.pairs import pairs, unet_of
from tests.control_bases import base, randomised
from tests.draws import normal

T = 4
kinds = pytest.mark.parametrize("kind", ["classes", "text"])


def clips(of, seed=7):
    return normal(2, T, *of.x.shape[1:], seed=seed).to(of.x)


def learnt_motion(kind) -> Temporal:
    return randomised(motion_of(base(kind).D.net), seed=1)


@torch.no_grad()
def called(D: NetworkDenoiser, kind):
    of = base(kind)
    return of.of(D=D)(clips(of), of.sigma)


def gap(a, b):
    """The greatest difference, relative to the greatest number."""
    return float((a - b).abs().max() / b.abs().max())


def personalised(kind) -> NetworkDenoiser:
    """The base model with a LoRA that has learnt something."""
    D = base(kind).D
    net = with_lora(D.net, 2)
    for k, one in enumerate(lora.loras(net).values()):
        one.up.data = 0.3 * normal(*one.up.shape, seed=k).to(one.up)
    return NetworkDenoiser(net, D.coefficients, D.c_noise)


# --- the module ----------------------------------------------------------------------------------------------------------


@kinds
def test_a_module_follows_each_pair_but_the_last_of_the_middle(kind):
    net = base(kind).D.net
    motion, found = motion_of(net), pairs(unet_of(net))
    middle = [pair for pair in found if pair.block.startswith("mid")]
    assert [pair.seat is None for pair in middle] == [False, True] and all(pair.seat for pair in found if pair not in middle)
    assert len(motion.after) == len(found) - 1
    for pair in found:
        if pair.seat:
            assert motion.after[pair.attention or pair.block] == pair.seat
            assert motion.get_submodule(pair.seat).channels == pair.channels


@kinds
def test_the_motion_module_of_the_base_moves_a_personalised_model(kind):
    """One module in two models: the style is that of the image model, exactly, where mixing is off."""
    motion, styled = learnt_motion(kind), personalised(kind)
    on_base, on_style = inflated(base(kind).D, motion), inflated(styled, motion)
    assert gap(called(on_style, kind), called(on_base, kind)) > 1e-3
    with mixed(on_style.net, 0.0), mixed(on_base.net, 0.0):
        still = called(on_base, kind)
        assert gap(called(on_style, kind), still) > 1e-3
        of = base(kind)
        image = of.of(D=styled)
        told = {name: value.repeat_interleave(T, 0) for name, value in image.condition.items()}
        with torch.no_grad():
            frames = image.given(**told)(clips(of).flatten(0, 1), of.sigma.repeat_interleave(T)).view_as(clips(of))
        assert torch.equal(called(on_style, kind), frames)
    start = inflated(styled, motion_of(base(kind).D.net))
    assert torch.equal(called(start, kind), frames)


@kinds
def test_a_domain_adapter_is_switched_off_and_gone(kind):
    motion = learnt_motion(kind)
    adapted = inflated(personalised(kind), motion)
    plain = called(inflated(base(kind).D, motion), kind)
    assert gap(called(adapted, kind), plain) > 1e-3
    with without_lora(adapted.net.net):
        assert torch.equal(called(adapted, kind), plain)


# --- MotionLoRA ------------------------------------------------------------------------------------------------------------


@kinds
def test_a_motion_lora_starts_as_the_motion_learns_alone_and_is_switched_off(kind):
    motion = learnt_motion(kind)
    before = {name: value.clone() for name, value in motion.state_dict().items()}
    plain = called(inflated(base(kind).D, motion), kind)
    panning = motion_lora(motion, rank=2)
    D = inflated(base(kind).D, panning)
    assert torch.equal(called(D, kind), plain)
    learning = [p for p in D.net.parameters() if p.requires_grad]
    modules = len(motion.after)
    assert len(lora.loras(panning)) == modules * 2 * 4 and len(learning) == 2 * modules * 2 * 4
    assert all(name.rpartition(".attn")[2][:1] in "12" for name in lora.loras(panning))
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    of = base(kind)
    for step in range(2):
        optimizer.zero_grad()
        denoising_loss(of.of(D=D), clips(of, seed=10 + step), of.sigma, clips(of, seed=20 + step)).mean().backward()
        optimizer.step()
    assert gap(called(D, kind), plain) > 1e-4
    with scaled(panning, 0.0):
        assert torch.equal(called(D, kind), plain)
    assert torch.equal(called(inflated(base(kind).D, motion), kind), plain)
    assert all(torch.equal(value, before[name]) for name, value in motion.state_dict().items())
    shared = {p.data_ptr() for p in panning.parameters()}
    assert all(p.data_ptr() in shared and p.requires_grad for p in motion.parameters())


def test_a_file_of_a_motion_lora_names_layers_as_their_network_does(tmp_path):
    motion = learnt_motion("text")
    panning = motion_lora(motion, rank=2, alpha=4.0)
    for k, one in enumerate(lora.loras(panning).values()):
        one.up.data = normal(*one.up.shape, seed=k).to(one.up)
    lora.save(panning, tmp_path / "panning")
    again = motion_lora(motion, rank=2, seed=3)
    lora.load(again, tmp_path / "panning")
    D = base("text").D
    assert torch.equal(called(inflated(D, again), "text"), called(inflated(D, panning), "text"))
    assert "up_blocks.1.motion_modules.0.transformer_blocks.0.attn2.to_out.0.lora_B.weight" in lora_state(panning)


# --- mistakes --------------------------------------------------------------------------------------------------------------


def adapter(**options):
    plain = {"block_out_channels": (32, 64), "motion_layers_per_block": 1, "motion_num_attention_heads": 2}
    return MotionAdapter(**plain | {"motion_norm_num_groups": 8} | options)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: adapter(block_out_channels=(32, 96)),
            r"adapter has motion modules of \(32, 96, 96, 96, 96, 32, 32\) channels; this network has "
            r"\(32, 64, 64, 64, 64, 32, 32\): expected an adapter that was made for a network of the same widths",
        ),
        (
            lambda: adapter(motion_layers_per_block=2),
            r"adapter has motion modules of \(32, 32, 64, .*this network has \(32, 64, ",
        ),
        (lambda: adapter(block_out_channels=(32, 64, 64)), r"adapter has motion modules of \(32, 64, 64, .*this network has"),
        (lambda: adapter(conv_in_channels=9), "adapter has conv_in_channels = 9; expected None"),
        (lambda: nn.Linear(2, 2), "adapter is a Linear; expected diffusers' MotionAdapter"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        from_diffusers(make(), base("text").D.net)
    with pytest.raises(ValueError, match="adapter"):
        from_diffusers(make(), UNet(channels=2, widths=(32, 64), blocks=1))


def test_what_a_motion_adapter_cannot_hold():
    net = base("text").D.net
    with_its_lora = motion_of(net)
    add_lora(with_its_lora, 2)
    for motion, said in (
        (motion_of(base("classes").D.net), "motion has down.0, for which MotionAdapter has no place; expected motion_of"),
        (video_ldm_of(net), "motion has down_blocks.0.resnets.0, for which MotionAdapter has no place"),
        (with_its_lora, "motion has a LoRA or layers of several sizes; expected the motion module alone"),
    ):
        with pytest.raises(ValueError, match=said):
            to_diffusers(motion)


def test_heads_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="heads = 5; expected a divisor of the 32 channels"):
        motion_of(base("text").D.net, heads=5)
