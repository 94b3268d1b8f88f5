"""GLIGEN: boxes, grounding tokens and gated self-attention, against diffusers' and exact answers."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from torch import Tensor, nn

from course_lib.denoisers import NetworkDenoiser, from_diffusers
from course_lib.nets import mini_sd
from course_lib.nets.gligen import GatedSelfAttention, fourier, grounded, layout_of, scheduled
from course_lib.worlds.scenes import sampling
from course_lib.worlds.scenes.boxes import boxes, extent, in_place, iou
from course_lib.worlds.scenes.maps import classes
from course_lib.worlds.scenes.render import render
from tests.control_bases import random_mini_sd

SIGMA = torch.tensor([0.3, 5.0])
LAID = ("boxes", "phrases", "masks")


@pytest.fixture(scope="module")
def base() -> NetworkDenoiser:
    return random_mini_sd()


@pytest.fixture(scope="module")
def seen() -> dict[str, Tensor]:
    """x and conditions of two pictures; the second has one object, the first two."""
    source = torch.Generator().manual_seed(4)
    corners = torch.rand(2, 2, 2, 2, generator=source).sort(2).values
    return {
        "x": torch.randn(2, 4, 8, 8, generator=source),
        "encoder_hidden_states": torch.randn(2, 5, mini_sd.WIDTH, generator=source),
        "boxes": corners.flatten(2),
        "phrases": torch.randn(2, 2, mini_sd.WIDTH, generator=source),
        "masks": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
    }


def opened(base: NetworkDenoiser) -> nn.Module:
    """A layout whose gates are open."""
    layout = layout_of(base.net, hidden=32)
    with torch.no_grad():
        for layer in layout.layers:
            layer.alpha_attn.fill_(0.7)
            layer.alpha_dense.fill_(-0.4)
    return layout


def result(D: NetworkDenoiser, seen: dict[str, Tensor], **changed: Tensor) -> Tensor:
    condition = {key: value for key, value in (seen | changed).items() if key != "x"}
    with torch.no_grad():
        return D.given(**condition)(seen["x"], SIGMA)


def plain(base: NetworkDenoiser, seen: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return base.given(encoder_hidden_states=seen["encoder_hidden_states"])(seen["x"], SIGMA)


# --- the layers ------------------------------------------------------------------------------------------------------


def test_the_gated_layer_is_that_of_diffusers() -> None:
    ours, theirs = GatedSelfAttention(32, 12, 4), GatedSelfAttentionDense(32, 12, 4, 8)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    theirs.load_state_dict(ours.state_dict())
    v, h = torch.randn(2, 16, 32), torch.randn(2, 3, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(v, h), theirs(v, h), rtol=1e-5, atol=1e-5)
        assert float((ours(v, h) - ours(v, -h)).abs().max()) > 1e-3


def test_a_network_with_a_layout_is_diffusers_unet_with_gated_attention(base, seen) -> None:
    layout = layout_of(base.net)  # diffusers' tokens are 512 wide within
    with torch.no_grad():
        for p in layout.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    config = {key: value for key, value in base.net.unet.config.items() if not key.startswith("_")}
    theirs = UNet2DConditionModel.from_config({**config, "attention_type": "gated"}).eval()
    names = [name for name, module in theirs.named_modules() if name.endswith(".fuser")]
    state = {**base.net.unet.state_dict(), **{f"position_net.{k}": v for k, v in layout.tokens.state_dict().items()}}
    order = [name for name, module in base.net.unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"]
    assert names == [f"{name}.fuser" for name in order]
    for name, layer in zip(names, layout.layers, strict=True):
        state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    theirs.load_state_dict(state)
    with torch.no_grad():
        given = {"boxes": seen["boxes"], "masks": seen["masks"], "positive_embeddings": seen["phrases"]}
        text, time = seen["encoder_hidden_states"], torch.tensor([400.0])
        expected = theirs(seen["x"], time, text, cross_attention_kwargs={"gligen": given}).sample
        out = grounded(base, layout).net(seen["x"], time, encoder_hidden_states=text, **{name: seen[name] for name in LAID})
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert float((out - plain(base, seen)).abs().max()) > 1e-2


def test_fourier_features_of_boxes_are_those_of_diffusers(seen) -> None:
    assert torch.equal(fourier(seen["boxes"]), get_fourier_embeds_from_boundingbox(8, seen["boxes"]))


def test_with_gates_closed_and_without_boxes_the_network_is_the_base_to_the_last_bit(base, seen) -> None:
    expected = plain(base, seen)
    assert torch.equal(result(grounded(base, layout_of(base.net)), seen), expected)
    D = grounded(base, opened(base))
    assert torch.equal(plain(D, seen), expected)
    assert not torch.equal(result(D, seen), expected)


def test_the_gates_learn_first_and_all_else_from_the_second_step_on(base, seen) -> None:
    before = copy.deepcopy(base.net.state_dict())
    layout = layout_of(base.net, hidden=32)
    optimizer = torch.optim.SGD(layout.parameters(), lr=0.5)
    for step in (1, 2):
        optimizer.zero_grad()
        condition = {key: value for key, value in seen.items() if key != "x"}
        grounded(base, layout).given(**condition)(seen["x"], SIGMA).square().mean().backward()
        learns = {name for name, p in layout.named_parameters() if p.grad is not None and bool(p.grad.any())}
        gates = {name for name, _ in layout.named_parameters() if "alpha" in name}
        assert learns == (gates if step == 1 else {name for name, _ in layout.named_parameters()})
        optimizer.step()
    after = base.net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(p.requires_grad or p.grad is not None for p in base.net.parameters())


def test_the_layers_leave_their_seats_also_upon_an_error(base, seen) -> None:
    D = grounded(base, opened(base))
    names = list(base.net.state_dict())
    with pytest.raises(RuntimeError):
        result(D, seen, encoder_hidden_states=torch.zeros(2, 5, 3))
    assert list(base.net.state_dict()) == names
    assert not any("fuser" in vars(module) or "position_net" in vars(module) for module in base.net.modules())


def test_the_order_of_the_objects_does_not_matter_and_an_object_that_is_masked_is_not_seen(base, seen) -> None:
    D = grounded(base, opened(base))
    out = result(D, seen)
    turned = result(D, seen, **{name: seen[name].flip(1) for name in LAID})
    torch.testing.assert_close(turned, out, rtol=1e-5, atol=1e-5)
    other = {name: seen[name].clone() for name in ("boxes", "phrases")}
    other["boxes"][1, 1], other["phrases"][1, 1] = torch.tensor([0.0, 0.0, 1.0, 1.0]), 3.0
    assert torch.equal(result(D, seen, **other), out)
    other["boxes"][0, 1] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert not torch.equal(result(D, seen, **other)[0], out[0])


def test_how_many_weights_a_layout_has(base) -> None:
    assert sum(p.numel() for p in layout_of(base.net).parameters()) == 1_296_142


def test_scheduled_sampling_takes_the_layout_in_the_first_share_of_the_steps() -> None:
    sigmas, calls = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.0]), []

    def one(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(True)
        return x

    def two(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(False)
        return x

    for tau, expected in ((0.0, 0), (0.4, 2), (1.0, 5)):
        calls.clear()
        D = scheduled(one, two, sigmas, tau)
        for sigma in sigmas[:-1]:
            D(torch.zeros(1), sigma)
        assert calls == [True] * expected + [False] * (5 - expected)
    with pytest.raises(ValueError, match=r"tau = 1.5; expected a share"):
        scheduled(one, two, sigmas, 1.5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"boxes": torch.zeros(2, 4)}, r"boxes = \(2, 4\); expected \(B, K, 4\)"),
        ({"boxes": torch.tensor([[[0.5, 0.0, 0.2, 1.0]] * 2] * 2)}, "boxes has a box that is none"),
        ({"boxes": torch.full((2, 2, 4), 12.0)}, "boxes has a box that is none"),
        ({"phrases": torch.zeros(2, 2, 7)}, r"phrases = \(2, 2, 7\); expected \(2, 2, 128\)"),
        ({"masks": None}, r"masks = None; expected \(2, 2\)"),
    ],
)
def test_bad_layouts_are_refused_in_one_line(base, seen, changed, said) -> None:
    with pytest.raises(ValueError, match=said) as error:
        result(grounded(base, layout_of(base.net, hidden=8)), seen, **changed)
    assert "\n" not in str(error.value)


def test_networks_without_attention_and_layouts_of_other_networks_are_refused(base) -> None:
    with pytest.raises(ValueError, match="net is a Linear without transformer blocks"):
        layout_of(nn.Linear(2, 2))
    other = from_diffusers(mini_sd.unet((32, 64)), mini_sd.scheduler())
    with pytest.raises(ValueError, match="layout was made for transformer blocks of"):
        grounded(other, layout_of(base.net, hidden=8))


# --- boxes -----------------------------------------------------------------------------------------------------------


def test_boxes_of_masks_are_the_least_that_hold_their_pixels() -> None:
    mask = torch.zeros(3, 8, 16, dtype=torch.bool)
    mask[0, 2:5, 4:12] = True
    mask[1, 7, 0] = True
    found, there = extent(mask)
    assert there.tolist() == [True, True, False]
    assert found.tolist() == [[4 / 16, 2 / 8, 12 / 16, 5 / 8], [0, 7 / 8, 1 / 16, 1], [0, 0, 0, 0]]


def test_boxes_of_a_render_hold_every_pixel_of_their_object_and_none_could_be_smaller() -> None:
    scenes = sampling.draw(6, 5, (1, 2))
    seen = render(scenes, 32)
    found, there = boxes(seen, 2)
    assert torch.equal(there, torch.stack([(seen.segmentation == k).flatten(1).any(1) for k in (1, 2)], 1))
    assert not bool(there[~scenes.present].any())
    for n, k in there.nonzero().tolist():
        rows, columns = (seen.segmentation[n, 0] == k + 1).nonzero().unbind(1)
        exact = [columns.min() / 32, rows.min() / 32, (columns.max() + 1) / 32, (rows.max() + 1) / 32]
        assert found[n, k].tolist() == pytest.approx([float(value) for value in exact])
    with pytest.raises(ValueError, match="K = 0; expected"):
        boxes(seen, 0)


def test_iou_of_boxes() -> None:
    a = torch.tensor([[0.0, 0.0, 0.5, 0.5]] * 4)
    b = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.0, 0.75, 0.5], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    assert iou(a, b).tolist() == pytest.approx([1, 1 / 3, 0, 1 / 4])
    assert torch.equal(iou(a, b), iou(b, a))
    assert float(iou(torch.zeros(4), torch.zeros(4))) == 0


def test_exact_maps_have_their_objects_in_place_and_moved_ones_do_not() -> None:
    """Objects of other shapes than their neighbours: their own part of the map is their mask, if nothing stands before it."""
    scenes = sampling.draw(24, 5, (1, 2))
    seen = render(scenes, 48)
    asked, there = boxes(seen, 2)
    labels = classes(seen, scenes)
    found = in_place(labels, torch.where(there, scenes.shape, -1), asked)
    apart = there & (scenes.shape[:, :1] != scenes.shape[:, 1:])
    assert torch.equal(found.isnan(), ~there)
    assert float(found[apart].median()) == 1
    assert float((found[apart] == 1).double().mean()) > 0.8
    moved = in_place(labels.flip(-1), torch.where(there, scenes.shape, -1), asked)
    assert float(moved[apart].mean()) < 0.7 * float(found[apart].mean())


def test_a_shape_that_is_not_in_the_picture_is_not_in_place_and_specks_are_none() -> None:
    labels, asked = torch.zeros(1, 16, 16, dtype=torch.long), torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.75, 0.75]]])
    labels[0, 8:12, 8:12], labels[0, 0, 0] = 2 + 3, 2 + 3
    assert in_place(labels, torch.tensor([[1, 3]]), asked).tolist() == [[0.0, 1.0]]
