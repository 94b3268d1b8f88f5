"""The space-time U-Net: what it is at first, by the image U-Net that it is made of, and what it sees once it has learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from course_lib.denoisers import from_edm
from course_lib.nets.space_time import SpaceTimeUNet, TimeDown, TimeUp
from course_lib.nets.unet import UNet
from tests.draws import normal

TIME = torch.tensor([3.0, 700.0])


def image_unet(**options):
    """A small image U-Net of three levels, its zeros replaced, so that nothing is the identity by chance."""
    torch.manual_seed(0)
    net = UNet(3, (8, 16, 24), blocks=1, attention=(2,), **options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net.eval()


def clips(t, b=2):
    return normal(b, t, 3, 8, 8).float()


def stirred(net):
    """The same network with every weight along time moved away from its start."""
    for name, p in net.named_parameters():
        if not name.startswith("image."):
            p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return net


def test_halvings_and_doublings_of_time_start_as_nearest_neighbour():
    x = normal(2, 7, 5, 3, 2).float()
    assert torch.equal(TimeDown(5)(x), x[:, ::2])
    assert torch.equal(TimeUp(5)(x), x[:, torch.arange(14) // 2])


@torch.no_grad()
@pytest.mark.parametrize("halved", [0, 1, 2])
def test_at_first_whole_steps_of_time_and_still_clips_are_the_image_unets(halved):
    image, x = image_unet(), clips(8)
    net = SpaceTimeUNet(image, halved)
    alone = torch.stack([image(frame, TIME) for frame in x.unbind(1)], 1)
    step = 2**halved
    torch.testing.assert_close(net(x, TIME)[:, ::step], alone[:, ::step], rtol=1e-5, atol=1e-5)
    still = x[:, :1].expand_as(x)
    torch.testing.assert_close(net(still, TIME), alone[:, :1].expand_as(x), rtol=1e-5, atol=1e-5)
    if halved:  # the frames between are given partly what was before
        assert float((net(x, TIME) - alone)[:, 1].abs().max()) > 0.1


@torch.no_grad()
def test_at_first_a_frame_sees_itself_and_where_the_steps_of_time_began():
    net, x = SpaceTimeUNet(image_unet()), clips(12, 1)
    for frame, seen_by in ((4, [4, 5, 6, 7]), (6, [6, 7]), (7, [7])):
        other = x.clone()
        other[:, frame] += 1
        changed = (net(other, TIME[:1]) - net(x, TIME[:1])).abs().amax((0, 2, 3, 4))
        assert (changed > 1e-3).nonzero().flatten().tolist() == seen_by


@torch.no_grad()
def test_once_it_has_learned_every_frame_sees_all_of_the_clip():
    net, x = stirred(SpaceTimeUNet(image_unet())), clips(32, 1)
    for frame in (0, 17, 31):
        other = x.clone()
        other[:, frame] += 1
        changed = (net(other, TIME[:1]) - net(x, TIME[:1])).abs().amax((0, 2, 3, 4))
        assert float(changed.min()) > 1e-5


def frames_of_attention(net, x):
    """Sequences of frames that temporal attention is given, by (number, length, channels)."""
    seen = []
    for name, module in net.named_modules():
        if name.endswith(".attn"):
            module.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    net(x, torch.tensor(1.0))
    return seen


@torch.no_grad()
def test_only_the_coarsest_level_attends_over_time_where_frames_are_few():
    x = clips(16)
    assert set(frames_of_attention(SpaceTimeUNet(image_unet()), x)) == {(2 * 2 * 2, 4, 24)}
    assert set(frames_of_attention(SpaceTimeUNet(image_unet(), 0), x)) == {(2 * 2 * 2, 16, 24)}


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other():
    net, x = stirred(SpaceTimeUNet(image_unet())), clips(8)
    torch.testing.assert_close(net(x, TIME)[1:], net(x[1:], TIME[1:]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_context_is_unheard_at_first_and_heard_when_its_weights_move():
    image, x, told = image_unet(), clips(8), normal(2, 8, 4, 8, 8, seed=1).float()
    net = SpaceTimeUNet(image, told=4)
    assert torch.equal(net(x, TIME, context=told), net(x, TIME))
    nn.init.normal_(net.context.conv.weight)
    assert float((net(x, TIME, context=told) - net(x, TIME)).abs().max()) > 0.1
    D = from_edm(net).given(context=told)
    assert D(x, torch.tensor(1.0)).shape == x.shape
    with pytest.raises(ValueError, match=r"context has shape \(2, 8, 3, 8, 8\); expected \(B, T, 4, H, W\)"):
        D.given(context=x)
    with pytest.raises(ValueError, match="condition 'context' is not taken"):
        from_edm(SpaceTimeUNet(image)).given(context=told)


def test_all_weights_learn():
    net = stirred(SpaceTimeUNet(image_unet(), told=4))
    net(clips(8), TIME, context=normal(2, 8, 4, 8, 8).float()).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@torch.no_grad()
def test_any_length_that_is_halved_evenly():
    net = SpaceTimeUNet(image_unet())
    for t in (4, 12, 32):
        assert net(clips(t), torch.tensor(5.0)).shape == (2, t, 3, 8, 8)
    with pytest.warns(UserWarning, match="the clip has 9 frames; expected at most 8"):
        net(clips(36), TIME)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="halved = 3; expected from 0 to 2"):
        SpaceTimeUNet(image_unet(), 3)
    net = SpaceTimeUNet(image_unet())
    with pytest.raises(ValueError, match=r"\(2, 6, 3, 8, 8\); expected clips \(B, T, C, H, W\), T a multiple of 4"):
        net(clips(6), TIME)
    with pytest.raises(ValueError, match="expected height and width divisible by 4"):
        net(normal(2, 8, 3, 8, 6).float(), TIME)
    with pytest.raises(ValueError, match="label was given to a network without classes"):
        from_edm(net).given(label=torch.tensor([1, 2]))
