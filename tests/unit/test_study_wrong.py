"""Pages of wrong pictures: those that the reader calls wrong, each with what was asked and what was read."""

from __future__ import annotations

import csv

import pytest
import torch
from PIL import Image

from course_lib import zoo
from course_lib.study import wrong
from course_lib.study.scenes import described
from course_lib.worlds.scenes import parse
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.labels import labels, obeyed
from course_lib.zoo import judge_scenes


class Knows:
    """Reads a picture by the number in its first pixel: the scene of that number, of those whose captions are asked."""

    def __init__(self, scenes):
        self.true = labels(scenes)

    def read(self, pictures):
        rows = pictures[:, 0, 0, 0].long()
        return type(self.true)(**{name: value[rows] for name, value in vars(self.true).items()})

    def obeys(self, pictures, prompts):
        return obeyed(self.read(pictures), prompts)


@pytest.fixture
def half_right(monkeypatch):
    """A model that draws what is asked for even prompts, and for odd ones what the prompt before asks."""
    monkeypatch.setattr(judge_scenes, "BATCH", 20)

    def generate(model, prompts, w, seed):
        assert (w, seed) == (2.5, 0)
        number = torch.arange(len(prompts)) // 2 * 2
        return number[:, None, None, None].expand(-1, 3, 8, 8) * torch.ones(1)

    monkeypatch.setattr(judge_scenes, "generate", generate)
    return Knows(SceneDataset(20, wrong.SEED, objects=1, split="train").scenes)


def test_the_wrong_ones_are_found_with_what_was_asked_and_read(half_right):
    pictures, rows, drawn = wrong.find(None, half_right, 2.5, 7)
    prompts = SceneDataset(20, wrong.SEED, objects=1, split="train").captions(judge_scenes.WORDING)
    assert drawn == 20 and len(pictures) == len(rows) == 7
    for picture, row in zip(pictures, rows, strict=True):
        number = int(picture[0, 0, 0])
        assert row["prompt"] == prompts[number + 1]
        found = half_right.obeys(picture[None], [parse(row["prompt"])])
        assert row["wrong"].split(", ") == [name for name, right in found.items() if right[0] == 0 and name != "all"] != []
        assert row["read"] == described(half_right.read(picture[None]))


def test_pages_and_table_are_written(half_right, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wrong, "PAGE", (2, 2))
    monkeypatch.setattr(zoo, "card", lambda name: {"metrics": {"guidance": 2.5, "prompts": {}}})
    monkeypatch.setattr(zoo, "load", lambda name: half_right)
    paths = wrong.write("mini-sd", tmp_path / "new", 6)
    assert [path.name for path in paths] == ["wrong-1.png", "wrong-2.png", "wrong.csv"]
    assert all(Image.open(path).width > 800 for path in paths[:2])
    rows = list(csv.DictReader(paths[2].open()))
    assert [row["number"] for row in rows] == list("123456") and all(row["wrong"] for row in rows)
    assert capsys.readouterr().out == "6 wrong pictures among 20\n"


def test_a_model_without_prompts_of_the_world_is_refused():
    with pytest.raises(ValueError, match="name = 'digits'; expected a text-to-image model of the scene world"):
        wrong.write("digits", None)
