"""The models of lecture 13: what their cards say, that diffusers reads the controls, and how `mini-style` is `mini-sd`."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import ControlNetModel

from course_lib import zoo
from course_lib.nets.control import to_diffusers
from course_lib.nets.lora import loras
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.maps import cut_outs
from course_lib.worlds.scenes.render import render
from course_lib.zoo import judge_controls, judge_style
from course_lib.zoo.recipes import control as recipe
from course_lib.zoo.recipes import style

CONTROLS = {"mini-control-edge": "edge", "mini-control-depth": "depth", "mini-control-seg": "seg"}
MODELS = (*CONTROLS, "mini-style")


def test_all_controls_and_the_style_take_nine_megabytes_and_each_forty_five_minutes() -> None:
    assert sum(zoo.card(name)["bytes"] for name in MODELS) <= 9e6
    assert max(zoo.card(name)["seconds"] for name in MODELS) <= 45 * 60


@pytest.mark.parametrize("name", CONTROLS)
def test_diffusers_reads_a_control_and_it_is_the_zoos(name: str) -> None:
    folder = zoo.WEIGHTS / name
    theirs = ControlNetModel.from_pretrained(folder, local_files_only=True).float()
    ours = to_diffusers(zoo.load(name, device="cpu"), zoo.load("mini-sd", device="cpu").net).state_dict()
    assert theirs.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items())
    config = json.loads((folder / "config.json").read_text())
    assert config["conditioning_channels"] == 3 and config["block_out_channels"] == [64, 96]
    assert "_name_or_path" not in config or "/" not in config["_name_or_path"]


def test_a_training_step_leaves_the_base_as_it_is(tmp_path) -> None:
    model = zoo.load("mini-sd", device="cpu")
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    of = recipe.mapped(16, 9_699)
    draw = recipe.batches(of, ("lines", "canny"), model.schedule.sigma(torch.arange(1000)), batch=4)
    net = recipe.network("mini-control-edge")
    done = recipe.fit(net, draw, recipe.loss_of(model), steps=2, lr=1e-3, progress=False, ema_decay=0.0, device="cpu")
    assert all(torch.equal(value, before[key]) for key, value in model.net.state_dict().items())
    assert all(float(Z.weight.abs().max()) > 0 for Z in done.net.zeros)


def test_half_of_the_prompts_are_empty_and_maps_come_from_every_layer() -> None:
    of, layers, n = recipe.mapped(16, 9_699), ("lines", "canny"), 400
    sigmas = zoo.load("mini-sd", device="cpu").schedule.sigma(torch.arange(1000))
    x0, sigma, eps, ids, maps = recipe.batches(of, layers, sigmas, batch=n)(torch.Generator().manual_seed(0))
    blank = (ids == recipe.tokens([""])).all(1)
    assert abs(float(blank.double().mean()) - recipe.DROPPED) < 4 * (0.25 / n) ** 0.5
    of_lines = (maps[:, None] == of.condition("lines", torch.arange(16))[None]).flatten(2).all(2).any(1)
    assert abs(float(of_lines.double().mean()) - 0.5) < 4 * (0.25 / n) ** 0.5
    assert x0.shape == eps.shape == (n, 4, 8, 8) and sigma.shape == (n,) and maps.shape == (n, 3, 64, 64)


def test_mini_style_is_mini_sd_with_its_lora_merged() -> None:
    model, base = zoo.load("mini-style", device="cpu"), zoo.load("mini-sd", device="cpu")
    net = zoo.read("mini-style")
    told = model.embed(["a red cube"])["encoder_hidden_states"]
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([300])
    with torch.no_grad():
        merged, beside = (unet(x, t, encoder_hidden_states=told).sample for unet in (model.net, net))
        plain = base.net(x, t, encoder_hidden_states=told).sample
    assert torch.allclose(merged, beside, atol=1e-5 * float(beside.abs().max()))
    assert float((merged - plain).abs().max()) > 1e-2
    assert type(model.net) is type(base.net) and not any("lora" in name for name, _ in model.net.named_modules())
    assert set(loras(net)) and zoo.card("mini-style")["bytes"] < 3e5
    assert next(iter(loras(net).values())).rank == style.RANK


def test_the_white_sheet_tells_cut_outs_from_renders() -> None:
    of = SceneDataset(64, 9_698, objects=(1, 2))
    seen = render(of.scenes, 64)
    around = seen.segmentation[:, 0] <= 0
    assert float(judge_style.sheet(cut_outs(of.scenes), around).min()) > judge_style.SHEET
    found = judge_style.sheet(seen.rgb, around)
    grey = (seen.rgb[0].mean(0)[around[0]] + 1) / 2
    below, up_to = (float(share.double().mean()) for share in (grey < found[0], grey <= found[0]))
    assert below <= judge_style.DARKEST + 1 / len(grey) and up_to >= judge_style.DARKEST - 1 / len(grey)
    assert float((found > judge_style.SHEET).double().mean()) < 0.2
    assert float(judge_style.sheet(seen.rgb, torch.zeros_like(around)).min()) == 1


def test_mini_style_keeps_its_style_and_obeys() -> None:
    found = zoo.card("mini-style")["metrics"]
    assert found["renders in the style"]["styled"] >= 0.95  # of the judge itself, which finds the objects
    assert found["mini-style"]["styled"] >= 0.9 > 0.3 > found["mini-sd"]["styled"]
    n = judge_style.SCENES[0]
    noise = 2 * (2 * 0.25 / n) ** 0.5  # twice the standard error of a difference of two shares, at most
    obeyed = {name: found[name]["obeyed"]["all"] for name in ("mini-style", "mini-sd")}
    assert obeyed["mini-style"] >= obeyed["mini-sd"] - noise
    assert found["mini-style"]["frechet"] < found["mini-sd"]["frechet"]


FOLLOWED = 1 / 3
"""What is left of the gap between no control and the floor of the judge, at most; measured, a tenth to a seventh."""


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_followed_and_prompts_are_still_obeyed(name: str) -> None:
    """The floor is what the judge reads in reconstructed renders of the very scenes: no picture of `mini-sd`'s VAE is below."""
    found, error = zoo.card(name)["metrics"], CONTROLS[name]
    floor, without = found["reconstructed renders"], found["without control"]
    noise = 2 * (2 * without["obeyed"] * (1 - without["obeyed"]) / found["scenes"]) ** 0.5  # of a difference of two shares
    for layer in judge_controls.MAPS[error]:
        for how in ("", " beside the prompt alone"):
            given = found[f"given {layer}{how}"]
            limit = FOLLOWED if how else 1 / 2
            assert given[error] - floor[error] <= limit * (without[error] - floor[error]), (layer, how)
            assert given["obeyed"] >= without["obeyed"] - 0.03 - noise, (layer, how)
        assert found[f"given {layer} without a prompt"][error] < found["without control or prompt"][error]


@pytest.mark.parametrize("name", ["mini-control-edge", "mini-control-depth"])
def test_the_error_is_a_third_of_that_without_control(name: str) -> None:
    """Of classes it is .177 of .435: a third is .1451, where the judge errs by .1401 on reconstructed renders."""
    found, error = zoo.card(name)["metrics"], CONTROLS[name]
    for layer in judge_controls.MAPS[error]:
        assert 3 * found[f"given {layer} beside the prompt alone"][error] <= found["without control"][error], layer
