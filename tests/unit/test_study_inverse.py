"""The explorer of inverse problems: what it says is measured on what it shows, and nothing but the controls decides."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from course_lib import metrics, zoo
from course_lib.operators import Grey, Mask
from course_lib.restoring import SOLVERS
from course_lib.study import inverse
from course_lib.study.canvas import Drawing
from course_lib.study.inverse import DRAWN, OPERATORS, InverseExplorer
from course_lib.worlds import digits
from tests.shown import SLACK, decode, levels, seconds

IMAGES = digits.load("test")[0][:5]
TOP = inverse.HEAD
RIGHT, DOWN = inverse.GAP * 2 + inverse.SIDE, TOP + inverse.SIDE + inverse.HEAD  # of the second column and row


@pytest.fixture(scope="module")
def digit():
    return zoo.load("digits", device="cpu").given(label=torch.tensor([digits.CLASSES]))


@pytest.fixture
def explorer(digit):
    return InverseExplorer(digit, IMAGES, calls=6)


def shrink(x, sigma):
    """The posterior mean of pixels N(0, 1/4), which is exact and quick."""
    return x * 0.25 / (0.25 + sigma**2)


def panel(explorer, column, row):
    """One of the four pictures as it is shown."""
    y, x = (TOP, DOWN)[row], (inverse.GAP, RIGHT)[column]
    return decode(explorer.picture.value)[y : y + inverse.SIDE, x : x + inverse.SIDE].astype(int)


def close(seen, image, scale=16):
    return np.abs(seen - levels(image, scale)).max() <= 4  # the PNG has a palette


def test_it_draws_what_is_chosen(explorer):
    assert decode(explorer.picture.value).shape == (2 * (256 + 46) + 26, 2 * 256 + 3 * 16, 3)
    changed = {"operator": "blur", "sigma_y": 0.2, "first": "CCDF", "second": "DDNM+", "calls": 8, "picture": 3, "seed": 4}
    for name, value in changed.items():
        before, old = explorer.picture.value, explorer.controls[name].value
        explorer.controls[name].value = value
        assert explorer.message.value == "" and explorer.picture.value != before, name
        explorer.controls[name].value = old
        assert explorer.picture.value == before, name  # with its seconds: what did not change is not computed again


def test_the_four_pictures_are_what_their_titles_say(explorer):
    problem = explorer.problem(**explorer.values)
    A, y = explorer.measured(problem)
    assert torch.equal(A.observed, ~explorer.canvas.mask[None]) and not A.observed.all()
    hidden = (~A.observed[0]).numpy().repeat(16, 0).repeat(16, 1)
    seen = panel(explorer, 0, 0)
    assert (np.abs(seen - levels(y[0], 16)).max(-1) <= 4)[~hidden].all()
    assert len(np.unique(seen[hidden], axis=0)) == 1
    assert close(panel(explorer, 1, 0), IMAGES[0])
    for column, name in enumerate(("DDRM", "replacement")):
        result = explorer.solved(problem, name, 6)
        assert close(panel(explorer, column, 1), result.picture[0])
        assert result.psnr == metrics.psnr(result.picture[0], IMAGES[0]) and result.calls == 6 and result.seconds > 0
        assert explorer._titles[2 + column].get_text() == f"{name}\n{result.said}"
        assert f"{result.psnr:.1f} dB, {result.seconds:.2f} s, 6 calls" == result.said
    assert explorer._titles[0].get_text() == f"measurement\n$A^+ y$: {metrics.psnr(y[0].clamp(-1, 1), IMAGES[0]):.1f} dB"


def test_a_stroke_hides_pixels_and_chooses_the_drawn_mask(explorer):
    explorer.controls["operator"].value = "blur"
    before = explorer.picture.value
    explorer.canvas.stroke([(3, 3), (12, 3)], brush=3)
    assert explorer.controls["operator"].value == DRAWN and explorer.picture.value != before
    A, _ = explorer.measured(explorer.problem(**explorer.values))
    assert torch.equal(~A.observed[0], explorer.canvas.mask) and not A.observed[0, 3, 8]
    drawn = explorer.picture.value
    explorer.canvas.clear()
    A, _ = explorer.measured(explorer.problem(**explorer.values))
    assert explorer.picture.value != drawn and bool(A.observed.all())
    explorer.controls["operator"].value = "blur"
    assert explorer.picture.value == before  # it does not read the drawing
    explorer.canvas.value = Drawing()  # as the stage resets all controls
    assert explorer.controls["operator"].value == "blur"


def test_all_hidden_is_told_below_and_the_picture_stays(explorer):
    before = explorer.picture.value
    explorer.canvas.stroke([(8, 8)], brush=40)
    assert "mask is False everywhere; expected at least one observed pixel" in explorer.message.value
    assert explorer.picture.value == before
    explorer.canvas.clear()
    assert explorer.message.value == ""


def test_the_canvas_shows_the_picture_that_is_measured(explorer):
    assert_close(explorer.canvas.picture[:1], IMAGES[0], rtol=0, atol=1 / 127)
    explorer.controls["picture"].value = 2
    assert_close(explorer.canvas.picture[:1], IMAGES[2], rtol=0, atol=1 / 127)
    assert close(panel(explorer, 1, 0), IMAGES[2])
    poster, canvas = decode(explorer.poster()), decode(explorer.canvas.poster())
    assert poster.shape == (630, 320 + 560, 3)
    assert np.abs(poster[TOP : TOP + 320, :320].astype(int) - canvas).max() <= 4
    assert explorer.canvas not in explorer.children[0].children and explorer.controls["drawing"] is explorer.canvas


def test_noise_is_the_seeds_alone(explorer):
    """y at two levels differs by the noise's own change, and another operator or solver leaves it alone."""
    one, other = (explorer.measured(explorer.problem(**{**explorer.values, "sigma_y": s}))[1] for s in (0.1, 0.3))
    clean = explorer.measured(explorer.problem(**{**explorer.values, "sigma_y": 0.0}))[1]
    assert_close((one - clean) * 3, other - clean, rtol=1e-4, atol=1e-6)
    random = {**explorer.values, "operator": next(name for name in OPERATORS if "random" in name)}
    first, again, new = (explorer.measured(explorer.problem(**{**random, **more}))[0].observed
                         for more in ({}, {"sigma_y": 0.2, "picture": 1}, {"seed": 1}))  # fmt: skip
    assert torch.equal(first, again) and not torch.equal(first, new)
    assert float(first.float().mean()) == pytest.approx(inverse.SEEN, abs=1 / 512)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_every_solver_takes_every_operator_at_no_more_calls_than_asked(operator, shape):
    """No two end alike; DDRM, DDNM+ and CCDF keep what a mask shows, whose noise is 0.02."""
    source = torch.Generator().manual_seed(1)
    images = (0.5 * torch.randn(2, *shape, generator=source)).clamp(-1, 1)
    if operator == "colourise" and shape[0] == 1:
        with pytest.raises(ValueError, match="operator = 'colourise'; expected one of drawn mask, "):
            InverseExplorer(shrink, images, operator=operator)
        return
    explorer = InverseExplorer(shrink, images, operator=operator, sigma_y=0.02)
    problem = explorer.problem(**explorer.values)
    A, y = explorer.measured(problem)
    assert tuple(y.shape[1:]) == tuple(A.out)
    found = {}
    for name in SOLVERS:
        result = explorer.solved(problem, name, 20)
        assert 0 < result.calls <= 20, name
        if result.picture is None:  # a blur's pseudo-inverse makes noise of y: those that take all of it diverge
            assert operator == "blur" and "diverged" in result.trouble, name
        else:
            assert result.picture.shape == (1, *shape) and result.picture.abs().max() <= 1
            found[name] = result.picture.numpy().tobytes()
    assert len(found) >= 6 and len(set(found.values())) == len(found)
    if isinstance(A, Mask):
        for name in ("DDRM", "DDNM+", "CCDF"):
            x = explorer.solved(problem, name, 20).picture
            assert float((x - images[:1])[A.observed[None]].square().mean().sqrt()) < 0.05, name


def test_a_solver_that_refuses_says_so_in_its_place(digit):
    explorer = InverseExplorer(digit, IMAGES, first="SNIPS", sigma_y=0.0, calls=6)
    assert explorer.message.value == ""
    assert "sigma_y = 0; snips divides by it" in explorer._troubles[2].get_text().replace("\n", " ")
    assert explorer._titles[2].get_text() == "SNIPS\nno picture" and len(np.unique(panel(explorer, 0, 1)[:40, :, 0])) == 1
    assert close(panel(explorer, 1, 1), explorer.solved(explorer.problem(**explorer.values), "replacement", 6).picture[0])
    explorer.controls["sigma_y"].value = 0.1
    assert explorer._troubles[2].get_text() == "" and "dB" in explorer._titles[2].get_text()


def test_ddrm_fills_a_box_better_than_nothing_does(digit):
    """On five digits the mean gain over the measurement, whose hidden pixels are grey, is several decibels."""
    explorer = InverseExplorer(digit, IMAGES, operator="box mask")
    gains = []
    for picture in range(len(IMAGES)):
        problem = explorer.problem(**{**explorer.values, "picture": picture})
        A, y = explorer.measured(problem)
        gains.append(explorer.solved(problem, "DDRM", 20).psnr - metrics.psnr(A.pinv(y)[0].clamp(-1, 1), IMAGES[picture]))
    print(f"gains: {', '.join(f'{gain:.1f}' for gain in gains)} dB")
    assert np.mean(gains) > 1


def test_a_redraw_takes_less_than_a_second(digit):
    explorer = InverseExplorer(digit, IMAGES)

    def draw(**values):
        explorer.solved.cache_clear()
        explorer.measured.cache_clear()
        return InverseExplorer.draw(explorer, **values)

    explorer.draw = draw
    assert seconds(explorer) < SLACK * 1.0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"images has shape \(1, 16, 16\); expected \(N, 1, H, W\)"):
        InverseExplorer(shrink, IMAGES[0])
    with pytest.raises(ValueError, match="low = 2, high = 1; expected 0 < low < high"):
        InverseExplorer(shrink, IMAGES, low=2, high=1)
    with pytest.raises(ValueError, match="second = 'magic'; expected one of replacement, RePaint"):
        InverseExplorer(shrink, IMAGES, second="magic")
    assert isinstance(OPERATORS["colourise"]((3, 16, 16), torch.zeros(16, 16), None), Grey)
