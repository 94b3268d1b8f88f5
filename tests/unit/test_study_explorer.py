"""The base class of the explorers: it never draws a stale value, and shows errors where the picture is."""

from __future__ import annotations

import asyncio
import base64
import io
import time

import ipywidgets as widgets
import pytest
from PIL import Image

from course_lib.study import explorer
from course_lib.study.explorer import Explorer
from tests.shown import decode


class Toy(Explorer):
    """A grey square of the level that the slider says."""

    def __init__(self, cost: float = 0.0):
        self.cost, self.drawn = cost, []
        super().__init__({"level": widgets.IntSlider(0, min=0, max=255), "note": widgets.Text("")})

    def draw(self, level: int, note: str) -> bytes:
        time.sleep(self.cost)
        if level == 13:
            raise ValueError("level = 13; expected a number\nthat is <lucky>")
        self.drawn.append(level)
        out = io.BytesIO()
        Image.new("L", (2, 2), level).save(out, "PNG")
        return out.getvalue()


def test_without_a_loop_a_change_is_drawn_at_once_and_in_place():
    toy = Toy()
    picture = toy.picture
    toy.controls["level"].value = 40
    assert toy.redraws == 1 and toy.drawn == [0, 40]
    assert toy.picture is picture and picture in toy.children and (decode(picture.value) == 40).all()


def test_a_value_that_a_browser_has_rounded_is_the_same_value():
    """Its slider snaps to min + n step: for 0.3 it answers 0.2999999999999998, which would be another setting to a cache."""

    class Level(Explorer):
        def __init__(self):
            self.drawn = []
            super().__init__({"y": widgets.FloatSlider(0.3, min=-2, max=2, step=0.1), "tiny": widgets.FloatText(1.23456789e-12)})

        def draw(self, **values):
            self.drawn.append(values)
            return b""

    level = Level()
    level.controls["y"].value = -2 + 23 * 0.1
    assert level.controls["y"].value != 0.3 and level.drawn[-1] == level.drawn[0] == {"y": 0.3, "tiny": 1.23456789e-12}
    assert level.redraws == 1, "the first value is no redraw, and its echo is the first value again"


@pytest.mark.parametrize("between, pause", [(0, explorer.PAUSE), (0.001, 0.2)])
def test_rapid_changes_do_not_queue_and_the_last_wins(monkeypatch, between, pause):
    monkeypatch.setattr(explorer, "PAUSE", pause)  # the longer one allows for a machine on which 1 ms takes 10
    toy = Toy(cost=0.03)

    async def drag():
        for level in range(101, 121):
            toy.controls["level"].value = level
            await asyncio.sleep(between)
        await asyncio.sleep(pause + 0.1)

    asyncio.run(drag())
    assert 1 <= toy.redraws <= 3
    assert toy.drawn[-1] == 120 and (decode(toy.picture.value) == 120).all()


def test_one_redraw_waits_however_many_changes_come(monkeypatch):
    toy, waiting = Toy(), []

    async def drag():
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda delay, call: waiting.append(call))
        for level in range(1, 21):
            toy.controls["level"].value = level

    asyncio.run(drag())
    assert len(waiting) == 1
    waiting[0]()
    assert toy.drawn == [0, 20]


def test_changes_that_queued_behind_a_redraw_are_one_redraw():
    """The kernel reads the messages that came during a redraw one by one, each in a turn of the loop."""
    toy = Toy(cost=0.05)

    async def drag():
        toy.controls["level"].value = 1
        await asyncio.sleep(explorer.PAUSE + 0.1)
        for level in range(2, 12):
            asyncio.get_running_loop().call_later(0.001 * level, setattr, toy.controls["level"], "value", level)
        await asyncio.sleep(explorer.PAUSE + 0.2)

    asyncio.run(drag())
    assert toy.drawn == [0, 1, 11]


def test_a_loop_that_ended_early_does_not_block_the_next():
    toy = Toy()

    async def leave():
        toy.controls["level"].value = 5

    asyncio.run(leave())
    assert toy.redraws == 0

    async def stay():
        toy.controls["level"].value = 6
        await asyncio.sleep(explorer.PAUSE + 0.05)

    asyncio.run(stay())
    assert toy.drawn == [0, 6]


def test_an_error_is_one_line_below_the_picture_until_the_next_success():
    toy = Toy()
    toy.controls["level"].value = 12
    before = toy.picture.value
    toy.controls["level"].value = 13
    assert "ValueError: level = 13; expected a number that is &lt;lucky&gt;" in toy.message.value
    assert toy.picture.value == before and toy.message in toy.children
    toy.controls["level"].value = 14
    assert toy.message.value == ""


def test_the_first_error_is_raised():
    class Broken(Toy):
        def draw(self, **values):
            raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        Broken()
    with pytest.raises(NotImplementedError, match=r"Explorer must define draw\(t\)"):
        Explorer({"t": widgets.FloatSlider()})


def test_the_display_holds_the_view_and_a_poster_of_the_newest_values():
    toy = Toy()

    async def show():
        toy.controls["level"].value = 77
        return toy._repr_mimebundle_()  # before the loop has drawn it

    bundle = asyncio.run(show())
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == toy.model_id
    assert (decode(base64.b64decode(bundle["image/png"])) == 77).all()
    assert bundle["text/plain"] == "Toy(level=77, note='')"
    assert toy.redraws == 1
