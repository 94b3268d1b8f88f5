"""An image network that takes clips: at the start, and with mixing off always, it is the image network, frame by frame."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn
from torch.testing import assert_close

from course_lib.denoisers import from_diffusers
from course_lib.nets import mini_sd
from course_lib.nets.temporal import TemporalAttention, TimeConv, inflate_conv
from course_lib.training import denoising_loss
from course_lib.video.inflation import (
    Inflated,
    Temporal,
    factorised_of,
    inflated,
    mixed,
    temporal_of,
)
from tests.control_bases import F64, B, base, random_mini_sd, randomised
from tests.draws import normal
from tests.video_bases import SIGMAS, WAYS, T, clips, frame_by_frame, gap, kinds, video, ways

# --- the image model ---------------------------------------------------------------------------------------------------


@kinds
@ways
@pytest.mark.parametrize("levels", SIGMAS)
def test_at_the_start_it_is_the_image_model_frame_by_frame(kind, way, levels):
    D, image, x = video(kind, way)
    sigma = SIGMAS[levels]
    with torch.no_grad():
        found = D(x, sigma)
        folded = sigma.repeat_interleave(T) if sigma.ndim == 1 else sigma.flatten() if sigma.ndim else sigma
        told = {name: value.repeat_interleave(T, 0) for name, value in image.condition.items()}
        assert torch.equal(found, image.given(**told)(x.flatten(0, 1), folded).view_as(x))
    assert gap(found, frame_by_frame(image, x, sigma)) < 1e-6
    moved, _, _ = video(kind, way, learnt=True)
    with torch.no_grad():
        assert gap(moved(x, sigma), found) > 1e-3  # so the comparison sees temporal layers that do something


@kinds
@ways
def test_at_the_start_in_half_precision_too(kind, way):
    D, image, x = video(kind, way)
    told = {name: value.repeat_interleave(T, 0) for name, value in image.condition.items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = D(x, torch.tensor(0.7))
        assert torch.equal(found, image.given(**told)(x.flatten(0, 1), torch.tensor(0.7)).view_as(x))


@ways
def test_an_unconditional_network_of_diffusers_and_one_without_a_middle(way):
    torch.manual_seed(4)
    widths = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    plain = UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, attention_head_dim=8, **widths,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    hollow = UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, cross_attention_dim=12, attention_head_dim=2, mid_block_type=None, **widths,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    x, told = normal(B, T, 2, 8, 8, seed=7).float(), {"encoder_hidden_states": normal(B, 5, 12, seed=8).float()}
    for unet, text in ((plain, {}), (hollow, told)):
        image = from_diffusers(unet.eval().requires_grad_(False), mini_sd.scheduler(), **text)
        D = inflated(image, WAYS[way](image.net))
        with torch.no_grad():
            assert gap(D(x, SIGMAS["a clip"]), start := frame_by_frame(image, x, SIGMAS["a clip"])) < 1e-6
            randomised(D.net.temporal, seed=1)
            assert gap(D(x, SIGMAS["a clip"]), start) > 1e-3


@kinds
@ways
def test_after_training_it_is_the_image_model_with_mixing_off_and_spatial_weights_have_not_moved(kind, way):
    D, image, x = video(kind, way)
    sigma = SIGMAS["a clip"]
    weights = {name: p.clone() for name, p in image.net.named_parameters()}
    with torch.no_grad():
        before = D(x, sigma)
    optimizer = torch.optim.Adam([p for p in D.net.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        denoising_loss(D, clips(base(kind), seed=10 + step), sigma, clips(base(kind), seed=20 + step)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert gap(D(x, sigma), before) > 1e-3
        with mixed(D.net, 0.0):
            assert torch.equal(D(x, sigma), before)
        assert gap(D(x, sigma), before) > 1e-3
    for name, p in image.net.named_parameters():
        assert torch.equal(p, weights[name]) and p.grad is None
    for name, p in D.net.net.named_parameters():
        assert torch.equal(p, weights[name]) and p.grad is None


@kinds
@ways
def test_frames_depend_on_each_other_with_mixing_on_and_not_with_mixing_off(kind, way):
    D, _, x = video(kind, way, learnt=True)
    other = x.clone()
    other[0, 3] = clips(base(kind), seed=8)[0, 3]
    sigma = SIGMAS["a clip"]
    with torch.no_grad():
        change = (D(other, sigma) - D(x, sigma)).abs().amax((2, 3, 4))
        with mixed(D.net, 0.0):
            alone = (D(other, sigma) - D(x, sigma)).abs().amax((2, 3, 4))
    assert bool((change[0] > 1e-5).all()) and not change[1].any()
    assert alone[0, 3] > 1e-2 and not alone[0, :3].any() and not alone[1].any()


def test_mixing_goes_from_the_image_model_to_the_video_model():
    """After the last layer, of which D is a linear function, it is the straight line between both."""
    of = base("classes", F64)
    D, x = of.of(D=inflated(of.D, randomised(Temporal({"last": TimeConv(2).double()}), seed=1))), clips(of)
    results = {}
    for m in (0.0, 0.3, 1.0, -0.5):
        with torch.no_grad(), mixed(D.net, m):
            results[m] = D(x, of.sigma)
    assert D.net.mixing == 1
    for m, found in results.items():
        assert_close(found, results[0.0] + m * (results[1.0] - results[0.0]), rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="on the way"), mixed(D.net, 0.5):
        raise RuntimeError("on the way")
    assert D.net.mixing == 1


def test_folding_frames_into_the_batch_is_inflating_every_convolution():
    """Video Diffusion Models makes each 3 x 3 convolution one of 1 x 3 x 3: here that is done, layer by layer."""

    class OverClips(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = inflate_conv(conv)

        def forward(self, h):  # [b t, c, h, w], as one clip of b t frames
            return self.conv(h.transpose(0, 1)[None])[0].transpose(0, 1)

    of = base("classes", F64)
    net, x = copy.deepcopy(of.D.net), clips(of)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                setattr(module, name, OverClips(child))
    with torch.no_grad():
        D = of.of(D=inflated(of.D, factorised_of(of.D.net)))
        found = net(x.flatten(0, 1), torch.tensor(5.0), of.given[0]["label"].repeat_interleave(T))
        assert_close(found, D.net(x, torch.tensor(5.0), **D.condition).flatten(0, 1), rtol=0, atol=1e-10)


# --- weights -------------------------------------------------------------------------------------------------------------


@kinds
@ways
def test_weights_are_shared_and_only_temporal_ones_learn(kind, way):
    net = copy.deepcopy(base(kind).D.net).requires_grad_(True)
    names = [name for name, _ in net.named_modules()]
    temporal = WAYS[way](net)
    net_video = Inflated(net, temporal)
    learning = {id(p) for p in net_video.parameters() if p.requires_grad}
    assert learning == {id(p) for p in temporal.parameters()} and learning
    shared = dict(net_video.net.named_parameters())
    for name, p in net.named_parameters():
        assert p.data_ptr() == shared[name].data_ptr() and p.requires_grad and not shared[name].requires_grad
    assert [name for name, _ in net.named_modules()] == names
    of = base(kind)
    told = {name: value.repeat_interleave(T, 0) for name, value in of.given[0].items()}
    x = clips(of)
    net_video(x, torch.tensor(3.0), **of.given[0]).sum().backward()
    for module in (*net.modules(), *net_video.modules()):
        assert not module._forward_hooks
    with torch.no_grad():
        next(net.parameters()).add_(0.1)  # of both, since it is one weight
        assert torch.equal(
            net_video(x, torch.tensor(3.0), **of.given[0]).flatten(0, 1), net(x.flatten(0, 1), torch.tensor(3.0), **told)
        )


@kinds
@ways
def test_what_learns_at_the_start(kind, way):
    """Step 1: what ends in zero, or is the identity. Step 2: all, alpha too; relative positions have a gradient where used."""
    D, _, _ = video(kind, way)
    optimizer = torch.optim.SGD(D.net.temporal.parameters(), lr=0.1)
    x0, eps = (clips(base(kind), seed=seed) for seed in (8, 9))
    ends = ("conv.weight", "conv.bias", "to_out.0.weight", "to_out.0.bias", "proj_out.weight", "proj_out.bias")
    every = {name for name, _ in D.net.temporal.named_parameters()}
    first = {name for name in every if name.endswith(ends) and "transformer_blocks" not in name}
    for expected in (first, every):
        optimizer.zero_grad()
        denoising_loss(D, x0, SIGMAS["a clip"], eps).mean().backward()
        assert {name for name, p in D.net.temporal.named_parameters() if p.grad.any()} == expected
        optimizer.step()
    assert first < every


@kinds
@ways
def test_a_file_of_temporal_layers_is_enough_and_the_start_is_a_function_of_the_seed(kind, way):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    net = base(kind).D.net
    temporal, again, other = (WAYS[way](net, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(p, q) for p, q in zip(temporal.parameters(), again.parameters(), strict=True)]
    assert all(same) and not all(torch.equal(p, q) for p, q in zip(temporal.parameters(), other.parameters(), strict=True))
    D, _, x = video(kind, way, learnt=True)
    other.load_state_dict(D.net.temporal.state_dict())
    D_again = base(kind).of(D=inflated(base(kind).D, other))
    with torch.no_grad():
        assert torch.equal(D_again(x, SIGMAS["one"]), D(x, SIGMAS["one"]))


@ways
def test_a_deep_copy_is_a_network_of_its_own(way):
    """What an average of the weights is made of."""
    D, _, x = video("classes", way, learnt=True)
    twin = copy.deepcopy(D.net)
    time, told = torch.tensor(3.0), D.condition
    with torch.no_grad():
        before = D.net(x, time, **told)
        assert torch.equal(twin(x, time, **told), before)
        randomised(twin.temporal, seed=5)
        assert torch.equal(D.net(x, time, **told), before) and not torch.equal(twin(x, time, **told), before)


# --- the order of frames -----------------------------------------------------------------------------------------------


@kinds
def test_without_positions_permuted_frames_give_permuted_frames(kind):
    of, order = base(kind, F64), torch.tensor([2, 0, 3, 1])
    x = clips(of)
    attention, factorised = temporal_of(of.D.net, attention=TemporalAttention), factorised_of(of.D.net)
    randomised(attention, seed=1)
    randomised(factorised, seed=1)
    moved = copy.deepcopy(factorised)
    for layer in factorised.layers().values():
        layer.attn.a.data.zero_()  # all distances alike
    for temporal, blind in ((attention, True), (factorised, True), (moved, False)):
        D = of.of(D=inflated(of.D, temporal))
        with torch.no_grad():
            change = gap(D(x[:, order], of.sigma), D(x, of.sigma)[:, order])
            with mixed(D.net, 0.0):
                assert gap(D(x[:, order], of.sigma), D(x, of.sigma)[:, order]) < 1e-10
        assert change < 1e-10 if blind else change > 1e-4


@pytest.mark.parametrize("way", ["pseudo-3D", "Video LDM", "AnimateDiff"])
def test_convolutions_and_sinusoids_know_the_order(way):
    D, _, x = video("classes", way, learnt=True)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        assert gap(D(x[:, order], SIGMAS["one"]), D(x, SIGMAS["one"])[:, order]) > 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_gradients_do_not_depend_on_how_the_image_model_lies_in_memory(way):
    """`zoo.load` keeps weights channels-last, where group normalisation without a copy would end the process."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        D = random_mini_sd()
        D.net.to(memory_format=layout)
        temporal = randomised(WAYS[way](D.net), seed=1)
        x, text = normal(2, 3, 4, 8, 8, seed=2).float(), normal(2, 5, 128, seed=3).float()
        inflated(D, temporal).given(encoder_hidden_states=text)(x, torch.tensor([0.4, 2.0])).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in temporal.parameters()]))
    # fp32 kernels of two layouts add in another order: some ten layers there and back, 2^-21 each, and room for cancellation
    assert float((found[0] - found[1]).abs().max()) < 1e-4 * float(found[0].abs().max())
