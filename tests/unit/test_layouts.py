"""Layouts of scenes as `mini-sd` is told them, and what the stored rows claim."""

import math

import pytest
import torch

from course_lib import zoo
from course_lib.worlds.scenes.boxes import boxes
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.render import render
from course_lib.zoo import layouts
from course_lib.zoo.control_data import tokens
from tests import seeds
from tests.seeds import surely_less

CHANCE = 2.0
"""Standard errors by which a difference is sure."""


over_seeds = seeds.over_seeds(layouts, layouts.SEEDS)


def test_a_layout_names_what_is_in_each_box(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    of = SceneDataset(6, 31, objects=(1, 2))
    laid = layouts.layouts(of)
    found, there = boxes(render(of.scenes, of.size), layouts.OBJECTS)
    assert torch.equal(laid[..., :4], found)
    assert torch.equal(laid[..., 4] > 0, there)
    assert torch.equal(layouts.layouts(of), laid)
    model, told = zoo.load("mini-sd", device="cpu"), layouts.condition(laid)
    for n, k in there.nonzero().tolist():
        sizes, colours, shapes = (list(names) for names in (layouts.SIZES, layouts.COLOURS, layouts.SHAPES))
        scene = of.scenes
        name = f"a {sizes[scene.size[n, k]]} {colours[scene.colour[n, k]]} {shapes[scene.shape[n, k]]}"
        ids = tokens([name])
        end = int((ids[0] == model.components["text_encoder"].config.eos_token_id).int().argmax())
        with torch.no_grad():
            expected = model.components["text_encoder"](ids)[0][0, end]
        torch.testing.assert_close(told["phrases"][n, k], expected, rtol=1e-4, atol=1e-4)


def test_without_a_prompt_the_boxes_alone_say_what_is_where():
    """Many times better than chance, and far from renders, read through the same judge."""
    told, chance = over_seeds("layouts", "iou", tau=1.0, text=False), over_seeds("without", "iou", text=False)
    assert told[0] > 4 * chance[0] and surely_less(chance, told)
    (floor,) = layouts.rows("floor")
    assert told[0] < floor["iou"]


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.2])
def test_beside_a_prompt_the_boxes_change_little(tau):
    """The prompts say where things are; what so short a training adds cannot be told from chance, either way."""
    told, alone = over_seeds("layouts", "iou", tau=tau, text=True), over_seeds("without", "iou", text=True)
    assert not surely_less(told, alone) and not surely_less(alone, told)


def test_prompts_are_obeyed_as_before():
    (told, error), (alone, other) = (
        over_seeds("layouts", "obeyed", tau=1.0, text=True),
        over_seeds("without", "obeyed", text=True),
    )
    assert told > alone - 0.05 - CHANCE * math.hypot(error, other)


def test_the_stored_rows_are_measured():
    """One again: hardware of another precision moves a picture, by less than the seed does."""
    again = layouts.without(0, True, "test")
    stored = next(row for row in layouts.rows("without") if row["seed"] == 0 and row["text"])
    assert again["iou"] == pytest.approx(stored["iou"], abs=0.01)
    assert again["obeyed"] == pytest.approx(stored["obeyed"], abs=0.02)
