"""Condition maps: what the renderer knows, drawn; what a judge says of them, where the answer is exact; what is kept of them."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.feature import canny as skimage_canny
from sklearn.metrics import jaccard_score
from torch.testing import assert_close

from course_lib import zoo
from course_lib.devices import autocast
from course_lib.nets.control import control_of
from course_lib.worlds.scenes import draw, edges, render
from course_lib.worlds.scenes.attributes import LIGHTS, SHAPES
from course_lib.worlds.scenes.maps import (
    CLASSES,
    NEAR,
    PALETTE,
    as_map,
    canny,
    classes,
    cut_outs,
    depth_map,
    edge_map,
    nearness,
    segmentation_map,
    selective_colour,
)
from course_lib.worlds.scenes.tracing import FAR
from course_lib.zoo import control_data, map_judge
from course_lib.zoo.control_data import LAYERS, WORDINGS, mapped
from course_lib.zoo.map_judge import Maps, edge_f1, errors, mean_iou, nearness_rmse, of_objects, truth
from tests.draws import normal

N = 12


@pytest.fixture(scope="module")
def world():
    scenes = draw(N, 5, (1, 2))
    return scenes, render(scenes, 64)


# --- maps of scenes ------------------------------------------------------------------------------------------------------


def test_the_map_of_edges_is_the_line_drawing_in_three_channels(world):
    _, seen = world
    found = edge_map(seen)
    lines = edges(seen.depth, seen.normal, seen.segmentation)
    assert found.shape == (N, 3, 64, 64) and set(found.unique().tolist()) == {0.0, 1.0}
    assert all(torch.equal(found[:, k : k + 1], lines) for k in range(3))


def test_nearness_is_near_over_depth_and_the_background_is_black(world):
    _, seen = world
    found, background = nearness(seen.depth), seen.segmentation < 0
    assert bool(background.any()) and not found[background].any()
    assert_close(found[~background], NEAR / seen.depth[~background], rtol=1e-6, atol=0)
    assert float(found[~background].min()) > 0 and float(found.max()) < 1  # no camera is as near as NEAR
    exact = nearness(torch.tensor([[[[NEAR, 2 * NEAR, 8 * NEAR, NEAR / 4, FAR]]]]))
    assert exact.flatten().tolist() == [1.0, 0.5, 0.125, 1.0, 0.0]
    assert torch.equal(depth_map(seen), found.expand(-1, 3, -1, -1))


def test_a_map_of_classes_can_be_read_back_by_its_palette(world):
    scenes, seen = world
    labels = classes(seen, scenes)
    colours = segmentation_map(labels)
    assert colours.shape == (N, 3, 64, 64) and len(PALETTE) == len(CLASSES) == len(set(PALETTE)) == 2 + len(SHAPES)
    away = (colours[:, None] - torch.tensor(PALETTE)[:, :, None, None]).abs().sum(2)  # (N, classes, H, W)
    assert torch.equal(away.argmin(1), labels) and not away.amin(1).any()
    for n in range(N):
        for thing in seen.segmentation[n].unique().tolist():
            name = "background" if thing < 0 else "ground" if thing == 0 else SHAPES[int(scenes.shape[n, thing - 1])]
            assert {CLASSES[k] for k in labels[n][seen.segmentation[n, 0] == thing].tolist()} == {name}
    every = torch.arange(len(CLASSES)).view(1, 2, -1)
    assert torch.equal(segmentation_map(every).permute(0, 2, 3, 1).reshape(-1, 3), torch.tensor(PALETTE))


@pytest.mark.parametrize("labels", [torch.tensor([[[len(CLASSES)]]]), torch.tensor([[[-1]]]), torch.zeros(4, 4).long()])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels of shape .* run from .* expected \(N, H, W\) from 0 to 9"):
        segmentation_map(labels)


# --- maps of any picture ---------------------------------------------------------------------------------------------------


def test_canny_is_skimages_of_the_luminance(world):
    _, seen = world
    weights = np.array([0.299, 0.587, 0.114])  # of Rec. 601
    found = canny(seen.rgb[:3], sigma=1.5, low=0.1, high=0.5)  # where the contrast decides
    assert found.shape == (3, 1, 64, 64) and found.dtype == seen.rgb.dtype and bool(found.any())
    contrast = 0
    for one, picture in zip(found, seen.rgb[:3], strict=True):
        grey = ((picture.permute(1, 2, 0).double().numpy() + 1) / 2) @ weights
        expected = torch.from_numpy(skimage_canny(grey, 1.5, 0.1, 0.5))
        assert float((one[0].bool() != expected).double().mean()) < 1e-3  # float32 and float64 may part at a tie
        contrast += int((one[0].bool().numpy() != skimage_canny(2 * grey - 1, 1.5, 0.1, 0.5)).sum())
    assert contrast > 3 * 64**2 * 1e-3  # so a picture that is taken for one in [0, 1] is seen


def test_canny_finds_the_border_of_a_square_and_nothing_in_a_plain_picture():
    square = torch.full((1, 1, 32, 32), -1.0)
    square[..., 8:24, 8:24] = 1
    found = canny(square)[0, 0].bool()
    rows, columns = found.nonzero().unbind(1)
    beside = torch.zeros(32, 32, dtype=torch.bool)
    beside[7:25, 7:25] = True
    beside[9:23, 9:23] = False  # a pixel to either side of the border
    assert bool(beside[rows, columns].all()) and len(rows) >= 4 * 12
    assert not canny(torch.zeros(2, 3, 16, 16)).any()
    assert torch.equal(canny(square.expand(-1, 3, -1, -1)), canny(square))
    for wrong in (torch.zeros(3, 16, 16), torch.zeros(1, 2, 16, 16)):
        with pytest.raises(ValueError, match=r"pictures has shape .*; expected \(N, 1 or 3, H, W\) in \[-1, 1\]"):
            canny(wrong)


def test_selective_colour_leaves_objects_as_they_are_and_all_else_grey(world):
    scenes, seen = world
    found, thing = selective_colour(scenes, seen.rgb.shape[-1]), (seen.segmentation > 0).expand(-1, 3, -1, -1)
    assert torch.equal(found[thing], seen.rgb[thing])
    rest = found.permute(0, 2, 3, 1)[~thing[:, 0]]  # (pixels, 3)
    assert torch.equal(rest, rest[:, :1].expand(-1, 3))
    weights = torch.tensor([0.299, 0.587, 0.114])
    assert_close(rest[:, 0], seen.rgb.permute(0, 2, 3, 1)[~thing[:, 0]] @ weights, rtol=0, atol=1e-6)
    assert float(found.abs().max()) <= 1 and torch.equal(as_map(found[:, :1])[:, 2], found[:, 0])


def test_cut_outs_stand_on_white_without_shadows_and_their_colours_do_not_turn_with_the_light(world):
    scenes, seen = world
    size = seen.rgb.shape[-1]
    found, ground = cut_outs(scenes, size), seen.segmentation[:, 0] == 0
    turned = dataclasses.replace(scenes, light=(scenes.light + 1) % len(LIGHTS))
    assert torch.equal(cut_outs(turned, size), found)
    assert float((render(turned, size).rgb - seen.rgb).abs().max()) > 0.1
    inner = F.max_pool2d((~ground).float()[:, None], 3, 1, 1)[:, 0] == 0  # no pixel that an object shares
    assert float(found.permute(0, 2, 3, 1)[inner & ground].min()) > 0.8


# --- the judge -------------------------------------------------------------------------------------------------------------


def line(column, rows=slice(None), side=16):
    drawing = torch.zeros(1, 1, side, side, dtype=torch.bool)
    drawing[..., rows, column] = True
    return drawing


def test_f1_of_lines_within_a_reach():
    """A line one pixel off is found, one two pixels off is not, and both are with a reach of two."""
    asked = line(5)
    for off, reach, f1 in ((0, 1, 1.0), (1, 1, 1.0), (-1, 1, 1.0), (2, 1, 0.0), (2, 2, 1.0), (1, 0, 0.0), (0, 0, 1.0)):
        assert float(edge_f1(line(5 + off), asked, reach)) == pytest.approx(f1)
    assert float(edge_f1(asked | line(12), asked)) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    half = line(5, slice(0, 8))  # of 16 rows those up to the ninth are within reach: recall 9/16
    assert float(edge_f1(half, asked)) == pytest.approx(2 * (9 / 16) / (1 + 9 / 16))
    assert float(edge_f1(asked, half)) == pytest.approx(2 * (9 / 16) / (1 + 9 / 16))
    corner = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    corner[..., 0, 0] = True
    assert float(edge_f1(corner, corner.roll((1, 1), (2, 3)))) == 1  # along each axis, so across a diagonal too


def test_f1_of_empty_drawings():
    nothing = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    assert float(edge_f1(nothing, nothing)) == 1
    assert float(edge_f1(nothing, line(3))) == float(edge_f1(line(3), nothing)) == 0
    found, asked = torch.cat([nothing, line(3), line(3)]), torch.cat([nothing, nothing, line(4)])
    assert edge_f1(found, asked).tolist() == pytest.approx([1, 0, 1])


def test_mean_iou_is_scikit_learns_jaccard_over_the_classes_that_are_there():
    source = torch.Generator().manual_seed(1)
    a, b = torch.randint(0, 5, (2, 4, 8, 8), generator=source) * 2
    a[0] = b[0] = 3
    a[1], b[1] = 0, 1
    found = mean_iou(a, b)
    for n in range(4):
        there = sorted({*a[n].flatten().tolist(), *b[n].flatten().tolist()})
        expected = jaccard_score(b[n].flatten(), a[n].flatten(), labels=there, average="macro")
        assert float(found[n]) == pytest.approx(expected, rel=1e-6)
    assert found[:2].tolist() == [1.0, 0.0]
    assert not torch.equal(a[2], b[2]) and 0 < float(found[2]) < 1


def test_rmse_of_nearness():
    near = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    off = near.clone()
    off[1] += 0.25
    off[2, 0, 0, 0] += 0.8
    assert nearness_rmse(off, near).tolist() == pytest.approx([0.0, 0.25, 0.8 / 8], rel=1e-5)


def test_errors_are_0_where_the_maps_are_those_asked_for():
    labels = torch.randint(0, 10, (2, 16, 16), generator=torch.Generator().manual_seed(3))
    exact = Maps(torch.cat([line(3), line(9)]), torch.rand(2, 1, 16, 16), labels)
    assert errors(exact, exact) == {"edge": 0.0, "depth": 0.0, "seg": 0.0}
    wrong = Maps(torch.cat([line(3), line(12)]), exact.nearness + 0.1, labels)
    assert errors(wrong, exact) == {"edge": 0.5, "depth": 0.1, "seg": 0.0}
    assert torch.equal(exact[1:].lines, line(9)) and len(exact[1:].classes) == len(exact[torch.tensor([1])].nearness) == 1


def test_lines_of_objects_leave_out_the_horizon():
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[:, 8:] = 1
    labels[:, 4:12, 6:10] = 2
    horizon = torch.zeros(1, 16, 16, dtype=torch.bool)
    horizon[:, 7] = True
    kept = of_objects(horizon, labels)
    assert kept[0, 7].nonzero().flatten().tolist() == list(range(5, 11))  # the object's columns, and one to each side


def test_the_judge_reads_any_number_of_pictures_as_it_reads_each():
    class Brightness(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            grey = self.gain * x.mean(1, keepdim=True)
            return grey, 2 * grey, torch.cat([grey, -grey] + [grey - 9] * 8, 1)

    judge, pictures = map_judge.MapJudge(Brightness()), normal(map_judge.BATCH + 3, 3, 8, 8).float()
    found = judge.read(pictures)
    with torch.no_grad():
        lines, near, labels = judge.net(pictures)
    assert len(found.lines) == map_judge.BATCH + 3
    assert torch.equal(found.lines, lines > 0) and found.lines.dtype == torch.bool
    assert torch.equal(found.nearness, near.clamp(0, 1)) and torch.equal(found.classes, labels.argmax(1))


# --- what controls are trained on --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    return tmp_path / "controls"


def test_data_are_the_world_and_what_the_vae_makes_of_it(cache):
    of = mapped(6, 41)
    scenes, rows = draw(6, 41, (1, 2)), torch.arange(6)
    seen, model = render(scenes, 64), zoo.load("mini-sd", device="cpu")
    with torch.no_grad(), autocast("cpu"):
        expected = model.vae.encode(seen.rgb).latent_dist
    assert torch.equal(of.mean, expected.mean.half().float()) and torch.equal(of.std, expected.std.half().float())
    noise = normal(6, 4, 8, 8).float()
    assert_close(of.latents(rows, noise), model.encode(seen.rgb, noise), rtol=0, atol=0.1)  # bfloat16, of numbers up to 4
    assert set(of.maps) == set(LAYERS) and all(layer.dtype == torch.uint8 for layer in of.maps.values())
    assert torch.equal(of.condition("lines", rows), edge_map(seen))
    assert_close(of.condition("near", rows), depth_map(seen), rtol=0, atol=0.5 / 255 + 1e-6)
    assert torch.equal(of.condition("classes", rows), segmentation_map(classes(seen, scenes)))
    assert torch.equal(of.condition("canny", rows), as_map(canny(seen.rgb)))
    assert float(of.condition("scribbles", rows).max()) <= 1
    exact = truth(of, rows)
    assert torch.equal(exact.classes, classes(seen, scenes))
    assert torch.equal(exact.lines[:, 0], of_objects(edge_map(seen)[:, 0].bool(), exact.classes))
    assert of.ids.shape == (6, WORDINGS, 32)
    assert torch.equal(of.ids[:, 1], control_data.tokens(of.of.captions(1)))


def test_data_are_a_function_of_the_seed_and_of_no_batch(cache, monkeypatch):
    first = mapped(5, 42)
    shutil.rmtree(cache)
    monkeypatch.setattr(control_data, "CHUNK", 2)
    again, other, styled = mapped(5, 42), mapped(5, 43), mapped(5, 42, style="cut-outs")
    for a, b in zip((first.ids, *first.maps.values()), (again.ids, *again.maps.values()), strict=True):
        assert torch.equal(a, b)
    assert_close(again.mean, first.mean, rtol=0, atol=0.05)  # the VAE in bfloat16 may round otherwise in another batch
    assert not torch.equal(other.mean, first.mean)
    assert all(torch.equal(styled.maps[name], first.maps[name]) for name in LAYERS)
    assert float((styled.mean - first.mean).abs().max()) > 0.1
    assert len({path.name for path in cache.iterdir()}) == 3


def test_an_interrupted_cache_is_no_cache(cache, monkeypatch):
    built, save = [], torch.save
    build = control_data._build
    monkeypatch.setattr(control_data, "_build", lambda *args: (built.append(1), build(*args))[1])

    def broken(value, path):
        save(value, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        mapped(2, 44)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(torch, "save", save)
    first, second = mapped(2, 44), mapped(2, 44)
    assert len(built) == 2 and torch.equal(first.mean, second.mean)


def test_sketches_are_of_three_hands_in_turn(world):
    """Scene i has the hand i mod 3, whatever the batch that it is drawn in."""
    scenes, seen = world
    whole = control_data.sketch(seen, 5, 0)
    later = control_data.sketch(render(scenes[4:], 64), 5, 4)
    assert torch.equal(whole[4:], later)
    steady = whole[0::3].flatten(1).sum(1).mean()
    assert float(whole[2::3].flatten(1).sum(1).mean()) < float(steady)  # the shakiest hand leaves out three tenths


# --- how a control is kept -----------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A control that has learnt something, saved as the zoo saves it, and the zoo's folders elsewhere."""
    control = control_of(zoo.load("mini-sd", device="cpu").net)
    for k, p in enumerate(control.parameters()):
        p.data += 0.05 * normal(*p.shape, seed=k).float()
    folder = zoo.save("mini-control-edge", control, {"steps": 1}, tmp_path / "weights", tmp_path / "cards")
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(zoo.card, "__defaults__", (tmp_path / "cards",))
    return control, folder


def test_a_control_is_kept_in_half_precision_and_opened_again(kept):
    control, folder = kept
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = zoo.load("mini-control-edge", device="cpu")
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    found, expected = again.state_dict(), zoo.as_kept("mini-control-edge", control).state_dict()
    assert found.keys() == expected.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, expected[name]) for name, value in found.items())
    x, text, c = normal(2, 4, 8, 8).float(), normal(2, 5, 128, seed=1).float(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = (net(x, torch.tensor(3.0), c, encoder_hidden_states=text) for net in (control, again))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)
    card = zoo.card("mini-control-edge")
    assert card["bytes"] == sum(path.stat().st_size for path in folder.iterdir()) and len(card["files"]) == 2
    assert str(folder.parent) not in (folder / "config.json").read_text()


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_damaged_control_is_refused_in_one_line(kept, file):
    path = kept[1] / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(zoo.ZooError, match=rf"file {file} of .* has sha256 .* damaged or replaced") as error:
        zoo.load("mini-control-edge", device="cpu")
    assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(zoo.ZooError, match=f"file {file} of .* is missing"):
        zoo.load("mini-control-edge", device="cpu")
