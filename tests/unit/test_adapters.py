"""The alternatives to ControlNet: where they add, what they are at the start, and that all of them learns."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import T2IAdapter as Theirs
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser, batched, from_diffusers
from course_lib.nets import mini_sd
from course_lib.nets.adapters import adapted, concat_of, gaussian_of, light_of, t2i_of, told
from course_lib.nets.control import control_of
from course_lib.nets.unet import UNet
from tests.control_bases import random_mini_sd

OF = {"light": light_of, "gaussian": gaussian_of, "concat": concat_of, "t2i": t2i_of}
ZERO = ("light", "concat")
"""Those that start as the base. A T2I-Adapter does not: it has no layer that starts at zero."""
SIGMA = torch.tensor([0.3, 5.0])


@pytest.fixture(scope="module")
def base() -> NetworkDenoiser:
    return random_mini_sd()


@pytest.fixture(scope="module")
def seen() -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(4)
    return {
        "x": torch.randn(2, 4, 8, 8, generator=source),
        "map": torch.rand(2, 3, 64, 64, generator=source),
        "text": torch.randn(2, 5, mini_sd.WIDTH, generator=source),
    }


def weights(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def result(D: NetworkDenoiser, seen: dict[str, Tensor], **condition: Tensor) -> Tensor:
    with torch.no_grad():
        return D.given(encoder_hidden_states=seen["text"], **condition)(seen["x"], SIGMA)


@pytest.mark.parametrize("name", OF)
def test_without_a_map_each_is_the_base_to_the_last_bit(base, seen, name) -> None:
    assert torch.equal(result(told(base, OF[name](base.net)), seen), result(base, seen))


@pytest.mark.parametrize("name", OF)
def test_what_starts_at_zero_starts_as_the_base_and_the_others_do_not(base, seen, name) -> None:
    out, expected = result(told(base, OF[name](base.net)), seen, map=seen["map"]), result(base, seen)
    assert torch.equal(out, expected) == (name in ZERO)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("name", "first"), [("light", 2), ("gaussian", 1), ("concat", 1), ("t2i", 1)])
def test_all_of_it_learns_and_the_base_does_not(base, seen, name, first) -> None:
    """From step `first` on: where the last convolutions are zero, only they have a gradient at step 1."""
    before = copy.deepcopy(base.net.state_dict())
    module = OF[name](base.net)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(1, first + 1):
        optimizer.zero_grad()
        D = told(base, module).given(map=seen["map"], encoder_hidden_states=seen["text"])
        D(seen["x"], SIGMA).square().mean().backward()
        without = [key for key, p in module.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert bool(without) == (step < first), without[:3]
        optimizer.step()
    after = base.net.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(p.requires_grad or p.grad is not None for p in base.net.parameters())


def test_what_a_concatenation_learns_first_is_what_it_is_told(base, seen) -> None:
    """The new weights are zero, but not their gradient."""
    module = concat_of(base.net)
    D = told(base, module).given(map=seen["map"], encoder_hidden_states=seen["text"])
    D(seen["x"], SIGMA).square().mean().backward()
    new = module.net.unet.conv_in.new
    assert not bool(new.weight.any())
    assert bool(new.weight.grad.any())


@pytest.mark.parametrize("name", OF)
def test_the_map_matters_after_a_step_and_rows_stay_apart(base, seen, name) -> None:
    module = OF[name](base.net)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    D, other = told(base, module), seen["map"].clone()
    other[1] = 1 - other[1]
    one, two = result(D, seen, map=seen["map"]), result(D, seen, map=other)
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


def test_how_many_weights_each_has(base) -> None:
    """Of `mini-sd`: the copy costs half of the U-Net, the concatenation all of it and the new channels' weights."""
    found = {name: weights(of(base.net)) for name, of in OF.items()} | {"control": weights(control_of(base.net))}
    assert found == {"light": 312_624, "t2i": 383_776, "control": 1_386_032, "gaussian": 1_386_032, "concat": 2_949_860}
    assert found["concat"] == weights(base.net) + (3 * 8 * 8) * 64 * 3 * 3


# --- T2I-Adapter -----------------------------------------------------------------------------------------------------


def theirs_of(adapter: nn.Module) -> Theirs:
    """diffusers' adapter with the same weights."""
    made = Theirs(in_channels=3, channels=[64, 96], num_res_blocks=2, downscale_factor=8)
    made.load_state_dict({f"adapter.{key}": value for key, value in adapter.state_dict().items()})
    return made


def test_the_adapter_is_that_of_diffusers(base, seen) -> None:
    adapter = t2i_of(base.net)
    ours, theirs = adapter(seen["map"]), theirs_of(adapter)(seen["map"])
    assert [tuple(f.shape) for f in ours] == [(2, 64, 8, 8), (2, 96, 4, 4)]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_its_features_enter_the_network_where_diffusers_pipeline_puts_them(base, seen) -> None:
    """As StableDiffusionAdapterPipeline calls the U-Net, at half its scale."""
    adapter, time = t2i_of(base.net), torch.tensor([500.0])
    with torch.no_grad():
        kept = [0.5 * f for f in theirs_of(adapter)(seen["map"])]
        expected = base.net.unet(seen["x"], time, seen["text"], down_intrablock_additional_residuals=kept).sample
        net = told(base, adapter).net
        out = net(seen["x"], time, map=seen["map"], map_scale=torch.full((2,), 0.5), encoder_hidden_states=seen["text"])
    assert torch.equal(out, expected)


def test_the_features_change_the_encoder_itself_not_only_what_the_decoder_is_handed(base, seen) -> None:
    """F_enc^i + F_c^i: block 2 of the encoder sees what was added at block 1."""
    adapter, entered = t2i_of(base.net), []
    handle = base.net.unet.down_blocks[1].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        result(base, seen)
        result(told(base, adapter), seen, map=seen["map"])
    finally:
        handle.remove()
    first = base.net.unet.down_blocks[0].downsamplers[0].conv
    with torch.no_grad():
        added = F.conv2d(adapter(seen["map"])[0], first.weight, stride=2, padding=1)
    torch.testing.assert_close(entered[1] - entered[0], added, rtol=1e-4, atol=1e-4)


def test_features_computed_once_give_the_same_and_the_adapter_is_not_called_again(base, seen) -> None:
    adapter, calls = t2i_of(base.net), []
    adapter.register_forward_hook(lambda *_: calls.append(1))
    D = told(base, adapter)
    with torch.no_grad():
        features = D.net.once(map=seen["map"])
    given = D.given(encoder_hidden_states=seen["text"], **features)
    with torch.no_grad():
        kept = [given(seen["x"], torch.tensor(sigma)) for sigma in (8.0, 2.0, 0.5)]
    assert len(calls) == 1
    every = D.given(encoder_hidden_states=seen["text"], map=seen["map"])
    with torch.no_grad():
        for out, sigma in zip(kept, (8.0, 2.0, 0.5), strict=True):
            assert torch.equal(out, every(seen["x"], torch.tensor(sigma)))
    assert len(calls) == 4


def test_features_go_through_both_halves_of_guidance_in_one_call(base, seen) -> None:
    D = told(base, t2i_of(base.net))
    features = D.net.once(map=seen["map"])
    pair = [D.given(encoder_hidden_states=text, **features) for text in (seen["text"], torch.zeros_like(seen["text"]))]
    with torch.no_grad():
        for out, alone in zip(batched(*pair)(seen["x"], torch.tensor(2.0)), pair, strict=True):
            torch.testing.assert_close(out, alone(seen["x"], torch.tensor(2.0)), rtol=1e-5, atol=1e-5)


def test_features_of_several_adapters_add_up_and_a_scale_of_zero_takes_one_away(base, seen) -> None:
    one, two = t2i_of(base.net, seed=0), t2i_of(base.net, seed=1)
    both, inverted = adapted(base, edge=one, depth=two), 1 - seen["map"]
    only = result(adapted(base, edge=one), seen, edge=seen["map"])
    weighted = result(both, seen, edge=seen["map"], depth=inverted, depth_scale=torch.zeros(2))
    assert torch.equal(only, weighted)
    with torch.no_grad():
        total = [a + 2 * b for a, b in zip(one(seen["map"]), two(inverted), strict=True)]
    expected = result(base, seen, down_intrablock_additional_residuals=total)
    out = result(both, seen, edge=seen["map"], depth=inverted, depth_scale=torch.full((2,), 2.0))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# --- the ablations ---------------------------------------------------------------------------------------------------


def test_the_light_encoder_sees_neither_x_nor_time_nor_text(base, seen) -> None:
    module = light_of(base.net)
    with torch.no_grad():
        for Z in module.zeros:
            nn.init.normal_(Z.weight)
        one = module(seen["x"], torch.tensor(1.0), seen["map"], encoder_hidden_states=seen["text"])
        two = module(-seen["x"], torch.tensor(9.0), seen["map"], encoder_hidden_states=-seen["text"])
    assert [tuple(r.shape[1:]) for r in one] == [(64, 8, 8), (64, 8, 8), (64, 4, 4), (96, 4, 4), (96, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(bool(r.any()) for r in one)


def test_the_light_encoder_fits_the_courses_own_unet_too() -> None:
    net = UNet(1, (8, 16, 16), attention=(), blocks=1)
    x = torch.randn(2, 1, 16, 16)
    residuals = light_of(net)(x, torch.zeros(2), torch.rand(2, 3, 16, 16))
    features = net.encode(x, torch.zeros(2))
    assert [r.shape for r in residuals] == [f.shape for f in features]


def test_without_zero_convolutions_the_residuals_are_gaussian_of_the_size_of_the_features(base, seen) -> None:
    """A convolution whose n weights have the variance 1 / fan-in keeps the mean square of what it is given, on average.

    The mean of n squares of N(0, 1) has the standard error sqrt(2 / n). Channels of a feature are not alike, so of the
    residuals a mean square between a half and twice that of the features is asked for, against 0 with zero convolutions.
    """
    control, ours = control_of(base.net), gaussian_of(base.net)
    for key, value in control.copy.state_dict().items():
        assert torch.equal(ours.copy.state_dict()[key], value)
    for Z in (*ours.zeros, ours.hint.conv_out):
        assert not bool(Z.bias.any())
        fan, found = Z.weight[0].numel(), float(Z.weight.detach().square().mean())
        assert abs(found * fan - 1) < 5 * (2 / Z.weight.numel()) ** 0.5
    with torch.no_grad():
        features = ours.copy.encode(seen["x"], SIGMA[0], hint=ours.hint(seen["map"]), encoder_hidden_states=seen["text"])
        for r, f in zip(ours(seen["x"], SIGMA[0], seen["map"], encoder_hidden_states=seen["text"]), features, strict=True):
            assert 0.5 < float(r.square().mean() / f.square().mean()) < 2


# --- concatenation ---------------------------------------------------------------------------------------------------


def test_a_concatenation_is_diffusers_unet_with_more_channels(base, seen) -> None:
    """W [x, m] = W_x x + W_m m: one convolution with both weights side by side."""
    module = concat_of(base.net)
    conv = module.net.unet.conv_in
    with torch.no_grad():
        conv.new.weight.normal_(0, 0.05)
    wide = UNet2DConditionModel.from_config({**base.net.unet.config, "in_channels": 4 + 3 * 64}).eval()
    state = dict(base.net.unet.state_dict())
    state["conv_in.weight"] = torch.cat([conv.own.weight, conv.new.weight], 1).detach()
    wide.load_state_dict(state)
    told_more = torch.cat([seen["x"], F.pixel_unshuffle(seen["map"], 8)], 1)
    time = torch.tensor([300.0])
    with torch.no_grad():
        expected = wide(told_more, time, seen["text"]).sample
        out = module(seen["x"], time, map=seen["map"], encoder_hidden_states=seen["text"])
        assert float((out - module(seen["x"], time, encoder_hidden_states=seen["text"])).abs().max()) > 0.01
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_concatenation_takes_the_courses_own_unet_too() -> None:
    net = UNet(1, (8, 16), attention=(), blocks=1)
    nn.init.normal_(net.last.weight, std=0.1)
    x, c = torch.randn(2, 1, 8, 8), torch.rand(2, 3, 8, 8)
    module = concat_of(net)
    assert torch.equal(module(x, torch.ones(2), map=c), net(x, torch.ones(2)))
    nn.init.normal_(module.net.first.new.weight)
    assert not torch.equal(module(x, torch.ones(2), map=c), net(x, torch.ones(2)))


# --- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF)
def test_a_map_of_another_range_or_shape_is_refused_in_one_line(base, seen, name) -> None:
    D = told(base, OF[name](base.net))
    with pytest.raises(ValueError, match=r"map has values from .*; expected a condition map in \[0, 1\]") as error:
        D.given(map=2 * seen["map"] - 1)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"map = \(2, 1, 64, 64\); expected a condition map \(B, 3, H, W\)"):
        D.given(map=seen["map"][:, :1])
    with pytest.raises(ValueError, match=r"'edges' is not taken"):
        D.given(edges=seen["map"])


@pytest.mark.parametrize("name", ["light", "concat", "t2i"])
def test_a_map_of_another_size_than_the_picture_is_refused(base, seen, name) -> None:
    D = told(base, OF[name](base.net)).given(map=seen["map"][..., :32], encoder_hidden_states=seen["text"])
    with pytest.raises(ValueError, match=r"has 64 x 32 pixels; expected 64 x 64 for x of shape"):
        D(seen["x"], SIGMA)


@pytest.mark.parametrize("of", OF.values())
def test_another_kind_of_network_is_refused(of) -> None:
    with pytest.raises(ValueError, match="net is a Linear; expected"):
        of(nn.Linear(2, 2))


def test_a_module_that_is_none_of_these_is_refused(base) -> None:
    with pytest.raises(ValueError, match="module is a Linear; expected"):
        told(base, nn.Linear(2, 2))


def test_an_adapter_of_other_widths_and_a_network_that_halves_too_early_are_refused(base) -> None:
    wide = from_diffusers(mini_sd.unet((32, 64)), mini_sd.scheduler())
    with pytest.raises(ValueError, match=r"'map' has features of \(64, 96\) channels; .* \(32, 64\)"):
        told(wide, t2i_of(base.net))
    with pytest.raises(ValueError, match="no adapter was given"):
        adapted(base)
    early = UNet2DConditionModel(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
                                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
                                 up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    with pytest.raises(ValueError, match=r"block 0 of net.*halves"):
        t2i_of(early)
