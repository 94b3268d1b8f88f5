"""The explorer of spatial control: what it shows is the loop's, decided by its controls alone; and the maps of a drawing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from course_lib import zoo
from course_lib.devices import SampleNoise
from course_lib.guidance import cfg
from course_lib.nets.control import control_of, controlled, guess
from course_lib.sample import sample
from course_lib.steps import ddim
from course_lib.study import control as module
from course_lib.study.canvas import Drawing, Stroke
from course_lib.study.control import CELL, EMPTY, GAP, HEAD, HEIGHT, SHEET, TOP, WIDTH, ControlExplorer, Result
from course_lib.study.control_maps import KINDS, NOTHING, PHOTOS, SCENES, SHAKY, SKETCHED, Asked, asked, cards, starts
from course_lib.study.scenes import START, scene
from course_lib.worlds.scenes.attributes import SHAPES
from course_lib.worlds.scenes.maps import CLASSES
from course_lib.worlds.scenes.render import render
from course_lib.zoo.map_judge import Maps, errors
from tests.shown import decode, inside_and_apart, levels, seconds

PROMPT = "a large red mug on grass"
TRIANGLE = [(20.0, 45.0), (32.0, 15.0), (44.0, 45.0), (20.0, 45.0)]
CELLS = [(GAP + i * (CELL + GAP), TOP + HEAD + j * (CELL + HEAD)) for j in (0, 1) for i in (0, 1, 2)]


@pytest.fixture(scope="module")
def parts():
    """mini-sd, controls of it whose convolutions are drawn and not learned, so that each does something, and the readers."""
    model = zoo.load("mini-sd", device="cpu")
    controls = {kind: control_of(model.denoiser.net, seed=i) for i, kind in enumerate(KINDS)}
    source = torch.Generator().manual_seed(0)
    for control in controls.values():
        for layer in (control.hint.conv_out, *control.zeros):
            layer.weight.data = 0.2 * torch.randn(layer.weight.shape, generator=source) / layer.in_channels**0.5
        control.eval().requires_grad_(False)
    return model, controls, zoo.load("scenes-maps", device="cpu"), zoo.load("scenes-reader", device="cpu")


@pytest.fixture
def explorer(parts):
    return ControlExplorer(*parts, prompt=PROMPT, start="mug", steps=4)


class Watched(nn.Module):
    """A control that notes how many rows it is given at each call."""

    def __init__(self, control):
        super().__init__()
        self.control, self.rows = control, []
        self.zeros, self.channels = control.zeros, control.channels

    def forward(self, x, time, c, **condition):
        self.rows.append(len(x))
        return self.control(x, time, c, **condition)


def results(explorer):
    """Without control, and with it."""
    plain, told = explorer.settings(**explorer.values)
    return explorer.plain(plain), explorer.told(plain, told)


def panel(explorer, place):
    x, y = CELLS[place]
    return decode(explorer.picture.value)[y + 3 : y + CELL - 3, x + 3 : x + CELL - 3].astype(int)  # without its frame


def close(seen, image):
    """The PNG has a palette."""
    return np.abs(seen - levels(image, 3)[3:-3, 3:-3]).mean() < 2


# --- what is computed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guessing", [False, True])
def test_the_pictures_are_those_of_the_loop_by_hand(parts, explorer, guessing):
    model, controls, _, _ = parts
    explorer.controls["guess"].value = guessing
    explorer.controls["scale"].value = 0.75
    net, c = controls["edge"], asked("edge", "mug", Drawing()).map
    sigmas = model.sigmas(4)
    x = model.start(SampleNoise(0)(torch.empty(1, *model.shape)), sigmas[0])
    texts = [model.embed("" if guessing else PROMPT), model.embed("")]
    weights = [torch.full((1,), 0.75)] * 2
    if guessing:
        weights = [guess(len(net.zeros), 0.75), torch.zeros(1, len(net.zeros))]
    D = controlled(model.denoiser, edge=net)
    halves = [D.given(edge=c, edge_scale=s, **text) for s, text in zip(weights, texts, strict=True)]
    expected = model.decode(model.finish(sample(cfg(*halves, 3.0), x, sigmas, ddim), sigmas[-1]))
    plain = cfg(*(model.denoiser.given(**text) for text in texts), 3.0)
    without = model.decode(model.finish(sample(plain, x, sigmas, ddim), sigmas[-1]))
    base, under = results(explorer)
    assert torch.equal(base.picture, without) and torch.equal(under.picture, expected)
    assert not torch.equal(without, expected)


@pytest.mark.parametrize("guessing", [False, True])
def test_at_scale_zero_it_is_the_picture_without_control_though_the_control_is_asked(parts, guessing):
    model, controls, judge, reader = parts
    watched = Watched(controls["edge"])
    explorer = ControlExplorer(model, {"edge": watched}, judge, reader, PROMPT, steps=4)
    explorer.controls["guess"].value = guessing
    watched.rows.clear()
    explorer.controls["scale"].value = 0.0
    base, under = results(explorer)
    assert torch.equal(base.picture, under.picture) and watched.rows == [2] * 4
    assert np.array_equal(panel(explorer, 1), panel(explorer, 2))
    explorer.controls["scale"].value = 1.0
    assert not np.array_equal(panel(explorer, 1), panel(explorer, 2))


def test_the_control_is_asked_once_a_step_for_both_halves_and_what_did_not_change_is_kept(parts, monkeypatch):
    model, controls, judge, _ = parts
    watched, runs = Watched(controls["edge"]), []
    monkeypatch.setattr(module, "sample", lambda *args: runs.append(args) or sample(*args))
    explorer = ControlExplorer(model, {"edge": watched}, judge, prompt=PROMPT, steps=5)
    assert watched.rows == [2] * 5 and len(runs) == 2
    explorer.controls["scale"].value = 0.5
    assert watched.rows == [2] * 10 and len(runs) == 3, "the picture without control is kept"
    explorer.controls["scale"].value = 1.0
    explorer.controls["drawn"].value = "car"
    assert watched.rows == [2] * 10 and len(runs) == 3, "edges have no class"
    explorer.controls["guidance"].value = 1.0
    assert watched.rows == [2] * 10 + [1] * 5 and len(runs) == 5


@pytest.mark.parametrize("begin, end, calls", [(0.0, 1.0, 8), (0.25, 0.75, 4), (0.0, 0.25, 2), (0.3, 1.0, 5), (0.0, 0.6, 4)])
def test_the_control_acts_in_the_steps_that_lie_between_its_ends(parts, begin, end, calls):
    """Step i of 8 where i / 8 >= begin and (i + 1) / 8 <= end, as in diffusers."""
    model, controls, judge, _ = parts
    watched = Watched(controls["edge"])
    explorer = ControlExplorer(model, {"edge": watched}, judge, prompt=PROMPT, steps=8)
    plain, told = explorer.settings(**explorer.values | {"begin": begin, "end": end})
    watched.rows.clear()
    explorer.told.cache_clear()
    explorer.told(plain, told)
    assert len(watched.rows) == calls


def test_an_interval_without_a_step_is_told_and_the_picture_stays(explorer):
    before = explorer.picture.value
    explorer.controls["end"].value = 0.1
    assert "ValueError: start = 0 and end = 0.1 have no whole step of 4" in explorer.message.value
    assert explorer.picture.value == before
    explorer.controls["end"].value = 1.0
    assert explorer.message.value == "" and explorer.picture.value == before


# --- what is shown --------------------------------------------------------------------------------------------------------


def test_every_control_changes_the_picture_and_back_and_nothing_else_decides(parts, explorer):
    assert explorer.main_name == "scale" and decode(explorer.picture.value).shape == (HEIGHT, WIDTH, 3)
    first = explorer.picture.value
    changed = {"scale": 0.5, "prompt": "a small green cube", "control": "depth", "start": "car", "guess": True, "begin": 0.5,
               "end": 0.5, "guidance": 1.5, "steps": 6, "seed": 3}  # fmt: skip
    for name, value in changed.items():
        explorer.controls[name].value = value
        assert explorer.message.value == "" and explorer.picture.value != first, name
        explorer.controls[name].value = {"scale": 1.0, "prompt": PROMPT, "control": "edge", "start": "mug", "guess": False,
                                         "begin": 0.0, "end": 1.0, "guidance": 3.0, "steps": 4, "seed": 0}[name]  # fmt: skip
        assert explorer.picture.value == first, name
    explorer.canvas.stroke(TRIANGLE)
    drawn = explorer.picture.value
    assert drawn != first
    explorer.canvas.clear()
    assert explorer.picture.value == first
    for one in (explorer.asked, explorer.embedded, explorer.plain, explorer.told):
        one.cache_clear()
    assert explorer.draw(**explorer.values) == first
    other = ControlExplorer(*parts, prompt=PROMPT, start="mug", steps=4)
    other.canvas.stroke(TRIANGLE)
    assert other.picture.value == drawn


def test_values_have_nine_digits(explorer):
    explorer.controls["scale"].value = 0.3
    before = explorer.picture.value
    explorer.controls["scale"].value = 0.1 + 0.2
    assert explorer.values["scale"] == 0.3 != 0.1 + 0.2 and explorer.picture.value == before


def test_the_six_panels_are_what_their_titles_say(explorer):
    base, under = results(explorer)
    wanted = asked("edge", "mug", Drawing())
    images = [2 * wanted.map, base.picture + 1, under.picture + 1, wanted.compared(under.found) + 1,
              wanted.shown(base.found) + 1, wanted.shown(under.found) + 1]  # fmt: skip
    assert all(close(panel(explorer, place), image[0] - 1) for place, image in enumerate(images))
    titles = [title.get_text() for title in explorer._titles]
    assert titles[0] == "map: edges\nmug" and titles[3] == "asked against read"
    assert titles[1].startswith("without control\n") and titles[2].startswith("with control, scale 1\n")
    assert titles[4:] == [f"lines read in it\n1 − F1 = {wanted.error(one.found):.2f}" for one in (base, under)]
    assert [text.get_text() for text in explorer._legend] == ["read", "missed", "extra"]


def test_a_prompt_against_the_drawing_is_said(explorer):
    """Of a render it is known what it shows."""
    of = Result(render(scene(**{**START, "shape": "mug"})).rgb, None)
    assert explorer._verdict(PROMPT, of) == "\nas prompted"
    assert explorer._verdict("a small blue cube on sand", of) == "\nnot as prompted"
    assert explorer._verdict("a dragon", of) == explorer._verdict("", of) == ""
    assert explorer._read(of).startswith("read: large red mug, ")
    assert explorer._heading.get_text() == explorer._read(results(explorer)[1])


def test_an_empty_sheet_is_told_in_one_line_beside_the_picture_without_control(explorer):
    explorer.controls["start"].value = NOTHING
    assert EMPTY in explorer.message.value and "\n" not in explorer.message.value
    assert close(panel(explorer, 1), results(explorer)[0].picture[0])
    for place in (2, 3, 5):
        assert len(np.unique(panel(explorer, place))) == 1
    explorer.canvas.stroke([(-9.0, -9.0), (90.0, -9.0)], brush=2)
    assert EMPTY in explorer.message.value, "a stroke beside the paper"
    explorer.canvas.stroke(TRIANGLE)
    assert explorer.message.value == "" and close(panel(explorer, 2), results(explorer)[1].picture[0])
    explorer.canvas.clear()
    assert EMPTY in explorer.message.value
    explorer.controls["prompt"].value = "a red dragon"
    assert EMPTY + "; model " in explorer.message.value and "never saw" in explorer.message.value


def test_words_that_the_model_never_saw_are_told_while_they_are_read(explorer):
    explorer.controls["prompt"].value = "a <wild> dragon"
    assert "never saw &#x27;&lt;&#x27;" in explorer.message.value
    explorer.controls["scale"].value = 0.5
    assert "dragon" in explorer.message.value
    explorer.controls["guess"].value = True  # which has no prompt
    assert explorer.message.value == "" and explorer._foot.get_text() == "no prompt (guess mode)"
    explorer.controls["guess"].value = False
    explorer.controls["prompt"].value = PROMPT
    assert explorer.message.value == ""


def test_a_control_offers_its_starts_and_keeps_the_one_that_it_has_too(parts, explorer):
    start, control, drawn = (explorer.controls[name] for name in ("start", "control", "drawn"))
    assert [value for _, value in control.options] == list(KINDS) and list(start.options) == starts("edge")
    assert drawn.layout.display == "none"
    control.value = "seg"
    assert start.value == "mug" and list(start.options) == [NOTHING, *SCENES] and drawn.layout.display is None
    control.value = "edge"
    assert start.value == "mug"
    start.value = next(iter(PHOTOS))
    control.value = "depth"
    assert start.value == NOTHING and EMPTY in explorer.message.value
    only = ControlExplorer(parts[0], {"depth": parts[1]["depth"]}, parts[2], steps=4)
    assert [value for _, value in only.controls["control"].options] == ["depth"]
    assert only._heading.get_text() == "" and only._titles[1].get_text() == "without control"


def test_the_sheet_shows_what_is_drawn_on_and_the_poster_shows_it_beside_the_picture(explorer):
    paper = asked("edge", "mug", Drawing()).paper[0]
    assert_close(explorer.canvas.picture, paper, atol=1 / 127, rtol=0)
    explorer.controls["control"].value = "depth"
    assert_close(explorer.canvas.picture, asked("depth", "mug", Drawing()).paper[0], atol=1 / 127, rtol=0)
    poster, canvas = decode(explorer.poster()), decode(explorer.canvas.poster())
    assert poster.shape == (HEIGHT, SHEET + 2 + WIDTH, 3)
    assert np.abs(poster[TOP + HEAD : TOP + HEAD + SHEET, 1 : SHEET + 1].astype(int) - canvas).mean() < 2
    assert explorer.canvas not in explorer.children[0].children and explorer.controls["drawing"] is explorer.canvas
    assert "image/png" in explorer._repr_mimebundle_()


def test_texts_are_legible_and_apart_and_a_redraw_leaves_no_artist_behind(explorer):
    assert inside_and_apart(explorer)
    count = len(explorer._figure.findobj())
    for control in KINDS:
        explorer.controls["control"].value = control
        for start in (NOTHING, max(starts(control), key=len)):
            explorer.draw(**explorer.values | {"start": start, "guess": True, "scale": 0.95})
            assert inside_and_apart(explorer)
    assert len(explorer._figure.findobj()) == count


def test_from_a_drawing_to_the_picture_is_in_time(parts):
    """At the default size, with nothing kept but the picture without control: processor time on one thread."""
    explorer = ControlExplorer(*parts)

    def draw(**values):
        explorer.told.cache_clear()
        explorer.asked.cache_clear()
        return ControlExplorer.draw(explorer, **values)

    explorer.draw = draw
    assert seconds(explorer) < 1.5


# --- maps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_start_has_a_map_of_its_own(kind):
    maps = {start: asked(kind, start, Drawing()) for start in starts(kind)}
    assert all(one.map.shape == (1, 3, 64, 64) and 0 <= one.map.min() <= one.map.max() <= 1 for one in maps.values())
    assert len({one.layer.numpy().tobytes() for one in maps.values()}) == len(maps)
    edges = {*SHAKY, *SKETCHED, *PHOTOS}
    assert edges <= set(maps) if kind == "edge" else not edges & set(maps)


def test_a_drawing_is_lines_or_what_they_enclose():
    square = Drawing((Stroke(((10.5, 20.5), (30.5, 20.5), (30.5, 50.5), (10.5, 50.5), (10.5, 20.5)), 2.0),))
    start, drawn = asked("edge", "car", Drawing()).layer, asked("edge", "car", square).layer
    assert torch.equal(drawn, torch.maximum(start, torch.from_numpy(square.ink(64, 64))))
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[20:51, 10:31] = True
    ink = torch.from_numpy(square.ink(64, 64) >= 0.5)
    for kind in ("depth", "seg"):
        bare, found = asked(kind, NOTHING, Drawing()).layer, asked(kind, NOTHING, square, "cone").layer
        assert torch.equal((bare != found).flatten(0, -3)[0], (inside | ink) & (bare != found).flatten(0, -3)[0])
        if kind == "seg":
            assert bool((found[0][inside] == CLASSES.index("cone")).all())
    kept = asked("seg", "house", Drawing()).layer
    assert set(kept.unique().tolist()) == {0, 1, CLASSES.index("house")}


def test_a_card_stands_where_its_lowest_pixel_meets_the_ground_and_hides_what_is_farther():
    ground = torch.linspace(-0.5, 1, 16)[:, None].expand(16, 12).clamp(min=0)  # a horizon after five rows
    drawn = torch.zeros(16, 12, dtype=torch.bool)
    drawn[2:13, 1:4], drawn[6:9, 6:8], drawn[0:3, 10] = True, True, True
    near = cards(drawn, ground)
    assert_close(near[2:13, 1:4], ground[12, 0].expand(11, 3))
    assert_close(near[6:9, 6:8], ground[8, 0].expand(3, 2))
    assert_close(near[0:3, 10], ground[ground > 0].min().expand(3)), "in the sky, at the horizon"
    assert float(near[~drawn].abs().max()) == 0
    house = asked("depth", "house", Drawing()).layer
    behind = asked("depth", "house", Drawing((Stroke(((28.0, 12.0), (28.0, 20.0)), 6.0),))).layer
    before = asked("depth", "house", Drawing((Stroke(((28.0, 20.0), (28.0, 58.0)), 6.0),))).layer
    assert bool((behind >= house).all()) and torch.equal(behind[..., 40, 28], house[..., 40, 28])
    assert bool((before >= house).all()) and float(before[..., 30, 28]) > float(house[..., 30, 28])


def test_errors_are_the_judges_and_colours_say_where(parts):
    """Against `map_judge.errors`, where the other maps are asked for as they were read; and 0 where all is as asked."""
    of = {kind: asked(kind, "car", Drawing()) for kind in KINDS}
    exact = Maps(of["edge"].layer >= 0.5, of["depth"].layer, of["seg"].layer)
    other = {kind: asked(kind, "house", Drawing()).layer for kind in KINDS}
    found = Maps(other["edge"] >= 0.5, other["depth"], other["seg"])
    expected = errors(found, exact)
    for kind, one in of.items():
        assert round(one.error(found), 4) == expected[kind] > 0 and one.error(exact) == pytest.approx(0, abs=1e-6)
        assert torch.equal(one.shown(exact), one.paper) and not torch.equal(one.compared(found), one.compared(exact))
    assert bool((of["depth"].compared(exact) == 1).all()) and bool((of["seg"].compared(exact) == 1).all())
    right = of["edge"].compared(exact)[0].ne(1).any(0)
    assert torch.equal(right, exact.lines[0, 0])
    assert bool((Asked("seg", exact.classes).compared(found)[0].ne(1).any(0) == (exact.classes != found.classes)[0]).all())


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"scale": 1.6}, r"scale = 1.6; expected a number from 0 to 1.5"),
        ({"guidance": float("nan")}, r"guidance = nan; expected a number from 0 to 8"),
        ({"steps": 3}, r"steps = 3; expected a number from 4 to 30"),
        ({"seed": -1}, r"seed = -1; expected a number from 0"),
        ({"control": "pose"}, r"control = 'pose'; expected one of edge, depth, seg"),
        ({"start": "cat"}, r"start = 'cat'; expected one of nothing, mug, "),
        ({"control": "depth", "start": "photo: cat"}, r"start = 'photo: cat'; expected one of nothing, mug"),
    ],
)
def test_values_that_are_not_offered_are_named(parts, explorer, values, message):
    with pytest.raises(ValueError, match=message):
        ControlExplorer(*parts, **values)
    with pytest.raises(ValueError, match=message):
        explorer.draw(**explorer.values | values)


def test_other_bad_input_is_named(parts, explorer):
    model, controls, judge, _ = parts
    with pytest.raises(ValueError, match=r"controls = \[\]; expected at least one of edge, depth, seg"):
        ControlExplorer(model, {}, judge)
    with pytest.raises(ValueError, match=r"controls = \['pose'\]; expected at least one of edge, depth, seg"):
        ControlExplorer(model, {"pose": controls["edge"]}, judge)
    with pytest.raises(ValueError, match="drawn = 'dragon'; expected one of sphere, cube"):
        explorer.draw(**explorer.values | {"control": "seg", "drawn": "dragon"})
    with pytest.raises(ValueError, match="begin = 2; expected a number from 0 to 1"):
        explorer.draw(**explorer.values | {"begin": 2})
    assert SHAPES[0] == explorer.settings(**explorer.values | {"drawn": "car"})[1].drawn
