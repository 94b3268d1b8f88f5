"""The diffusion transformer of clips: patches of space and time, positions, its start, and clips of any length."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from course_lib.nets import video_dit
from course_lib.nets.dit import DiT
from course_lib.nets.dit import positions as of_pictures
from course_lib.nets.video_dit import VideoDiT, patchify, positions, unpatchify
from tests.draws import normal

TIME = torch.tensor([3.0, 700.0])


def stirred(net):
    """The network with all weights drawn anew, so that nothing is 0."""
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net.eval()


def test_patches_are_boxes_in_order_of_time_row_and_column_and_come_back():
    x = torch.arange(2 * 6 * 3 * 4 * 8.0).reshape(2, 6, 3, 4, 8)
    tokens = patchify(x, (3, 2))
    assert tokens.shape == (2, 2 * 2 * 4, 3 * 3 * 4)
    assert torch.equal(tokens[1, 8 + 4 + 2], x[1, 3:, :, 2:, 4:6].flatten())  # the second three frames, second row, third column
    assert torch.equal(unpatchify(tokens, (3, 2), (6, 4, 8)), x)
    assert torch.equal(patchify(x, (1, 1)), x.permute(0, 1, 3, 4, 2).flatten(1, 3))


@torch.no_grad()
def test_the_start_is_zero_and_every_block_the_identity():
    net, x = VideoDiT(), normal(2, 8, 3, 8, 8).float()
    assert float(net(x, TIME).abs().max()) == 0
    h, emb = normal(2, 5, 64).float(), normal(2, 64, seed=1).float()
    assert all(torch.equal(block(h, emb), h) for block in net.blocks)


@torch.no_grad()
def test_positions_alone_tell_tokens_apart(monkeypatch):
    """Without positions, clips whose patches are exchanged come out with their patches exchanged; with them, they do not."""
    net, x = stirred(VideoDiT(width=32)), normal(2, 8, 3, 8, 8).float()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def exchanged(clip):
        return unpatchify(patchify(clip, net.patch)[:, order], net.patch, (8, 8, 8))

    assert float((net(exchanged(x), TIME) - exchanged(net(x, TIME))).abs().max()) > 0.01
    monkeypatch.setattr(video_dit, "positions", lambda grid, width, base: torch.zeros(1))
    torch.testing.assert_close(net(exchanged(x), TIME), exchanged(net(x, TIME)), rtol=1e-4, atol=1e-4)


def test_positions_tell_every_patch_apart_in_time_and_in_place():
    p = positions((16, 2, 3), 64, 3)
    assert p.shape == (96, 64)
    assert float(torch.cdist(p, p).fill_diagonal_(1).min()) > 0.1
    grid = p.reshape(16, 6, 64)
    assert torch.equal(grid[:, :1, :32].expand(-1, 6, -1), grid[..., :32])  # the time, whatever the place
    assert torch.equal(grid[5, :, 32:], of_pictures((2, 3), 32, 3))
    longer = positions((20, 2, 3), 64, 3)
    assert torch.equal(longer[:96], p)  # a longer clip goes on where a shorter one ends


@torch.no_grad()
def test_one_frame_is_a_picture_with_a_vector_added_to_its_positions():
    """On one frame the network is the picture's DiT, its positions those of the place beside the sinusoids of time 0."""
    net = stirred(VideoDiT(width=64, patch=(1, 4)))
    still = stirred(DiT(3, width=64, depth=2, heads=4, patch=4, side=2))
    still.time = net.time
    for name in ("embed", "blocks", "last_adaln", "last"):
        getattr(still, name).load_state_dict(getattr(net, name).state_dict())
    x = normal(2, 1, 3, 8, 8).float()
    h = positions((1, 2, 2), 64, 2) - of_pictures((2, 2), 64, 2)
    handle = still.embed.register_forward_hook(lambda _, __, out: out + h)
    expected = still(x[:, 0], TIME)
    handle.remove()
    torch.testing.assert_close(net(x, TIME)[:, 0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("t", [2, 14, 40])
def test_any_length_and_every_frame_sees_all(t):
    net, x = stirred(VideoDiT(width=32)), normal(1, t, 3, 8, 8).float()
    out = net(x, torch.tensor(5.0))
    assert out.shape == x.shape
    other = x.clone()
    other[:, 0] += 1
    assert float((net(other, torch.tensor(5.0)) - out).abs().amax((0, 2, 3, 4)).min()) > 1e-5


def test_what_does_not_fit_is_named():
    net, time = VideoDiT(width=32), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"\(1, 3, 3, 8, 8\); expected clips \(B, T, C, H, W\), T a multiple of the patch's 2"):
        net(torch.zeros(1, 3, 3, 8, 8), time)
    with pytest.raises(ValueError, match="expected height and width divisible by the patch size, 4"):
        net(torch.zeros(1, 4, 3, 8, 6), time)
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 5, 96\); expected 8 of a multiple of 32 numbers"):
        unpatchify(torch.zeros(1, 5, 96), (2, 4), (4, 8, 8))
    with pytest.raises(ValueError, match="width = 20; expected a multiple of 8"):
        positions((2, 2, 2), 20, 2)
