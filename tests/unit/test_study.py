"""Plots and explorers: pictures show the very pixels they are given, and an explorer never draws a stale value."""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import math
import time

import ipywidgets as widgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2lab

from course_lib import schedules
from course_lib.devices import SampleNoise
from course_lib.gaussians import Empirical, Mixture
from course_lib.sample import sample
from course_lib.steps import ddpm
from course_lib.study import explorer, pictures, points, style
from course_lib.study.explorer import Explorer
from course_lib.study.explorers import ReverseExplorer, ScheduleExplorer
from course_lib.worlds import digits, toys


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))


def levels(image: torch.Tensor, scale: int) -> np.ndarray:
    """What (C, H, W) in [-1, 1] must look like on the screen: (scale H, scale W, 3)."""
    rgb = np.round((image.clamp(-1, 1).numpy() + 1) * 127.5).astype(np.uint8)
    rgb = np.broadcast_to(rgb, (3, *rgb.shape[1:])).transpose(1, 2, 0)
    return rgb.repeat(scale, 0).repeat(scale, 1)


# --- style ----------------------------------------------------------------------------------------


def test_use_applies_the_style_and_leaves_the_backend():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        backend = matplotlib.get_backend()
        importlib.reload(style)
        assert matplotlib.rcParams["font.size"] == matplotlib.rcParamsDefault["font.size"], "importing changed the style"
        style.use()
        sizes = [
            matplotlib.font_manager.FontProperties(size=matplotlib.rcParams[name]).get_size_in_points()
            for name in matplotlib.rcParams
            if name.endswith(("fontsize", "labelsize", "titlesize", "font.size")) and name != "legend.title_fontsize"
        ]
        assert len(sizes) > 5 and min(sizes) >= 12
        assert matplotlib.rcParams["figure.constrained_layout.use"]
        assert matplotlib.get_backend() == backend


def test_context_restores_what_was_set():
    with matplotlib.rc_context({"font.size": 7}):
        with style.context():
            assert matplotlib.rcParams["font.size"] >= 12
        assert matplotlib.rcParams["font.size"] == 7


# Machado et al. 2009, severity 1: what linear RGB becomes for an eye without red, or without green, cones.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "none": np.eye(3).tolist(),
}


def smallest_gap(colours: list[str], eye: str) -> float:
    """The least distance between two of the colours as this eye sees them, in CIE 1976; 2.3 is just noticeable."""
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.array(BLIND[eye]).T
    linear = linear.clip(0, 1)
    seen = rgb2lab(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))
    return float(np.linalg.norm(seen[:, None] - seen, axis=-1)[np.triu_indices(len(seen), 1)].min())


def test_named_colours_differ_for_colour_blind_eyes():
    ours, usual = (
        [smallest_gap(colours, eye) for eye in BLIND]
        for colours in (list(style.COLOURS.values()), list(matplotlib.colors.TABLEAU_COLORS.values()))
    )
    assert min(ours) > 10
    assert min(usual) < 5, "the test must be able to fail: matplotlib's own cycle does"


def test_a_figure_of_900_pixels_is_under_60_kB():
    with style.context():
        figure, axes = plt.subplots(1, 3)
        for ax in axes:
            ax.plot(np.linspace(0, 1, 300), np.sin(np.outer(np.linspace(0, 9, 300), [1, 2])), label="a line")
            ax.set(xlabel="time t", ylabel="density", title="three panels")
            ax.legend(ncols=2)
        plain = io.BytesIO()
        figure.savefig(plain)
        small = pictures.png(figure)
    assert decode(small).shape[1] == 900
    assert len(plain.getvalue()) < 60_000
    assert len(small) < len(plain.getvalue()) / 1.5


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (4, 3, 12, 20), (2, 1, 5, 31)])
@pytest.mark.parametrize("scale", [1, 7])
def test_grid_shows_each_pixel_as_a_square_of_whole_screen_pixels(shape, scale):
    images = torch.rand(shape) * 2.4 - 1.2  # beyond [-1, 1], which is clipped
    seen = decode(pictures.png(pictures.grid(images, columns=2, scale=scale)))
    gap = math.ceil(6 / scale) * scale
    _, _, H, W = shape
    for i, image in enumerate(images):
        y, x = (i // 2) * (H * scale + gap), (i % 2) * (W * scale + gap)
        assert np.array_equal(seen[y : y + H * scale, x : x + W * scale], levels(image, scale)), f"image {i}"
    rest = 3 if shape[0] % 2 else 0
    if rest:  # the place without an image is white
        assert (seen[-H * scale :, -W * scale :] == 255).all()


def test_grid_takes_lists_and_keeps_rows_even():
    images = torch.rand(12, 16, 16) * 2 - 1
    listed, batch = pictures.grid(list(images)), pictures.grid(images[:, None])
    assert pictures.png(listed) == pictures.png(batch)
    assert decode(pictures.render(batch)).shape[1] <= 900
    H, W = decode(pictures.render(batch)).shape[:2]
    assert abs(W / H - 3) < 0.2, "12 images: two rows of 6, not 10 and 2"


def test_titles_neither_overlap_nor_leave_the_figure():
    figure = pictures.grid(
        torch.zeros(5, 1, 8, 8), titles=[f"quite a long title {i}" for i in range(5)], title="A heading " * 6, columns=5, scale=4
    )
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 6 and min(text.get_fontsize() for text in figure.axes[0].texts) >= 12
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_strip_names_rows_and_columns():
    rows = [torch.full((3, 1, 8, 8), value) for value in (-1.0, 0.0)]
    figure = pictures.strip(rows, ["black", "grey"], ["a", "b", "c"], scale=5)
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b", "c", "black", "grey"]
    seen = decode(pictures.png(figure))
    assert (seen[-40:, -40:] == 128).all() and (seen[-90:-50, -40:] == 0).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pictures.grid(torch.zeros(4, 2, 8, 8)), r"images has shape \(4, 2, 8, 8\); expected \(N, 1, H, W\)"),
        (lambda: pictures.grid(torch.zeros(4, 8, 8)), r"images has shape \(4, 8, 8\); expected"),
        (lambda: pictures.grid(torch.zeros(0, 1, 8, 8)), r"images has shape \(0, 1, 8, 8\)"),
        (lambda: pictures.grid([]), r"images holds images of the shapes \[\]"),
        (lambda: pictures.grid([torch.zeros(1, 8, 8), torch.zeros(1, 9, 9)]), "all of one shape"),
        (
            lambda: pictures.grid(torch.tensor([0.0, math.nan]).reshape(2, 1, 1, 1)),
            r"images\[1\] holds values that are not finite",
        ),
        (lambda: pictures.grid(torch.zeros(2, 1, 8, 8), titles=["one"]), "titles has 1 entries; expected one for each of the 2"),
        (lambda: pictures.grid(torch.zeros(2, 1, 8, 8), scale=1.5), "scale = 1.5; expected a whole number"),
        (lambda: pictures.grid(torch.zeros(2, 1, 8, 8), columns=0), "columns = 0; expected a whole number"),
        (lambda: pictures.strip([]), "rows is empty"),
        (lambda: pictures.strip([torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8)]), r"rows\[1\] holds 3 images .* expected 2"),
        (lambda: pictures.strip([torch.zeros(2, 1, 8, 8)], ["a", "b"]), "row_titles has 2 entries"),
        (lambda: pictures.strip([torch.zeros(2, 1, 8, 8)], None, ["a"]), "column_titles has 1 entries"),
        (lambda: pictures.animate(torch.zeros(2, 5, 8, 8)), r"frames has shape \(2, 5, 8, 8\)"),
        (lambda: pictures.animate([np.zeros((4, 4, 3))]), r"frames\[0\] is float64 of shape \(4, 4, 3\); expected uint8"),
        (lambda: pictures.animate(torch.zeros(2, 8, 8), fps=0), "fps = 0; expected a positive number"),
    ],
)
def test_bad_pictures_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tile_places_images_row_by_row():
    images = torch.rand(5, 3, 4, 6)
    sheet = pictures.tile(images, columns=3, gap=2)
    assert sheet.shape == (3, 10, 22)
    for i, image in enumerate(images):
        y, x = (i // 3) * 6, (i % 3) * 8
        assert torch.equal(sheet[:, y : y + 4, x : x + 6], image)
    assert (sheet[:, 4:6] == 1).all() and (sheet[:, 6:, 16:] == 1).all()


def test_png_closes_and_render_does_not():
    figure, ax = plt.subplots()
    ax.plot([0, 1])
    first = pictures.render(figure)
    assert plt.fignum_exists(figure.number)
    assert pictures.png(figure) == first and first.startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)


def test_a_grid_shows_itself_once_and_pyplot_does_not_keep_it():
    before = plt.get_fignums()
    figure = pictures.grid(torch.zeros(2, 1, 8, 8))
    assert plt.get_fignums() == before
    assert figure._repr_png_() == pictures.render(figure)


def test_animate_shows_the_frames_and_stays_small_on_the_worst_case():
    noise = torch.randn(40, 8, 1, 16, 16)  # pixels of noise do not compress
    frames = torch.stack([pictures.tile(batch, columns=4) for batch in noise])
    out = pictures.animate(frames, fps=10)
    assert len(out.data) < 200_000
    film = Image.open(io.BytesIO(out.data))
    assert film.n_frames == 40 and film.size == (67 * 8, 33 * 8)
    assert film.info["loop"] == 0 and film.info["duration"] == pytest.approx(100)
    for i in (0, 17, 39):
        film.seek(i)
        seen = np.asarray(film.convert("RGB")).astype(int)
        assert np.abs(seen - levels(frames[i], 8)).max() <= 4, f"frame {i}"
    assert film.info["duration"] == pytest.approx(1000)
    assert "image/png" in out._repr_mimebundle_()[0], "nbconvert drops image/gif"


def test_animate_takes_grey_frames_figures_and_arrays():
    grey = torch.rand(3, 6, 8) * 2 - 1
    assert pictures.animate(grey).data == pictures.animate(grey[:, None]).data
    figures = []
    for i in range(3):
        figure, ax = plt.subplots(figsize=(2, 1))
        ax.plot([0, i])
        figures.append(figure)
    shown = pictures.animate(figures)
    assert Image.open(io.BytesIO(shown.data)).n_frames == 3
    assert not any(plt.fignum_exists(figure.number) for figure in figures)
    arrays = [np.full((5, 7, 3), 40 * i, np.uint8) for i in range(3)]
    assert Image.open(io.BytesIO(pictures.animate(arrays).data)).size == (7, 5)


# --- explorer -------------------------------------------------------------------------------------


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


# --- explorers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schedule_explorer():
    return ScheduleExplorer()


@pytest.mark.parametrize("t", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("name", schedules.CONTINUOUS)
def test_schedule_explorer_shows_the_schedule(schedule_explorer, name, t):
    shown, schedule, time = schedule_explorer, schedules.get(name), torch.tensor(t, dtype=torch.float64)
    shown.controls["schedule"].value, shown.controls["t"].value = name, t
    assert shown.message.value == ""
    assert decode(shown.picture.value).shape == (380, 900, 3)

    x0 = digits.load("train")[0][:1].double()
    eps = SampleNoise(0)(torch.empty(1, 1, 16, 16, dtype=torch.float64))
    expected = (schedule.alpha(time) * x0 + schedule.std(time) * eps).clamp(-1, 1)
    assert np.allclose(shown._picture.get_array(), expected[0, 0])

    text = shown._line.get_text()
    for symbol, value in [
        ("α", schedule.alpha(time)),
        ("std", schedule.std(time)),
        ("σ", schedule.sigma(time)),
        ("SNR", (schedule.alpha(time) / schedule.std(time)) ** 2),
    ]:
        assert f"{symbol} = {'∞' if value == math.inf else f'{float(value) + 0.0:.3g}'}" in text
    at, height = (float(axis[0]) for axis in shown._point.get_data())
    assert at == t and height == pytest.approx(float(schedule.log_snr(time).clamp(-shown.LIMIT, shown.LIMIT)))

    density, edges, _ = shown._bars.get_data()
    mass = float((density * np.diff(edges)).sum())
    assert mass == pytest.approx(1) and density.max() <= shown._pixels.get_ylim()[1]
    assert shown._pixels.get_xlim()[1] == edges[-1] >= float(schedule.alpha(time) + 3 * schedule.std(time))
    assert shown._normal[0].get_visible() == (name != "edm"), "only EDM keeps its signal"


def test_at_the_end_of_a_variance_preserving_schedule_the_pixels_are_standard_normal(schedule_explorer):
    schedule_explorer.controls["schedule"].value, schedule_explorer.controls["t"].value = "linear", 1.0
    density, edges, _ = schedule_explorer._bars.get_data()
    count = schedule_explorer.DRAWS * 256
    width = edges[1] - edges[0]
    p = np.exp(-((edges[1:] + edges[:-1]) ** 2) / 8) / math.sqrt(2 * math.pi)
    error = (density - p) / np.sqrt(np.maximum(p, 1e-3) / (count * width))  # standard errors of a histogram
    assert np.abs(error).max() < 5


def test_redraws_leave_no_artists_behind(schedule_explorer):
    def count():
        return len(schedule_explorer._figure.findobj())

    schedule_explorer.draw(t=0.3, schedule="edm")
    before = count()
    for t in (0.1, 0.3):
        schedule_explorer.draw(t=t, schedule="edm")
    assert count() == before


def test_schedule_explorer_names_a_wrong_image():
    with pytest.raises(ValueError, match=r"image has shape \(16, 16\); expected \(1, H, W\)"):
        ScheduleExplorer(torch.zeros(16, 16))


class Counted:
    """The exact denoiser of the real digits, which counts its calls."""

    def __init__(self):
        self.exact, self.calls = Empirical(digits.load("train")[0]), 0

    def __call__(self, x, sigma):
        self.calls += 1
        return self.exact(x, sigma)


def test_reverse_explorer_calls_the_denoiser_once_a_level_and_not_to_scrub():
    D = Counted()
    shown = ReverseExplorer(D, "exact", n=2)
    assert D.calls == 20
    for level in range(21):
        shown.controls["level"].value = level
    assert D.calls == 20 and shown.message.value == ""
    shown.controls["seed"].value = 1
    assert D.calls == 40
    shown.controls["steps"].value = 5
    assert D.calls == 45 and shown.controls["level"].value == 5
    shown.controls["steps"].value = 8
    assert D.calls == 53 and shown.controls["level"].value == 8, "the level stays at the end"


def test_reverse_explorer_walks_as_sample_does_whatever_the_step_asks_of_the_denoiser():
    def curious(D, x, sigma, sigma_next, memory=None):
        believed = (D(x, sigma) + D(x, 2 * sigma) + D(0.9 * x, 2 * sigma)) / 3  # other levels and other states
        return believed + sigma_next / sigma * (x - believed), None

    D, grid = Empirical(digits.load("train")[0]), schedules.karras(6)
    shown = ReverseExplorer(D, "exact", n=2, sigmas=grid, step=curious)
    start = SampleNoise(0).start((2, 1, 16, 16), grid[0])
    assert torch.equal(shown._record.states[-1], sample(D, start, grid, curious))


def test_reverse_explorer_shows_the_state_and_the_belief():
    train = digits.load("train")[0]
    D = Empirical(train)
    shown = ReverseExplorer(D, "exact", n=3)
    level = 8
    shown.controls["level"].value = level
    sigma = float(schedules.karras(20)[level])
    assert f"σ = {sigma:.3g}" in shown._heading.get_text() and "exact" in shown._heading.get_text()

    x = shown._record.states[level]
    for row, images in zip(shown._rows, (x / math.sqrt(1 + sigma**2), D(x, torch.tensor(sigma))), strict=True):
        for i, image in enumerate(images):
            assert np.abs(row.get_array()[:, 17 * i : 17 * i + 16].astype(int) - levels(image, 1).astype(int)).max() <= 1
    distance = torch.cdist(shown._record.states[-1].flatten(1), train.flatten(1)).min(1).values
    assert (distance < 1e-2).all(), "samples of the memorising denoiser are training digits"
    assert 600 < decode(shown.picture.value).shape[1] <= 900


def test_reverse_explorer_image_does_not_depend_on_n():
    D = Empirical(digits.load("train")[0])
    few, many = (ReverseExplorer(D, "exact", n=n)._record.states[-1] for n in (2, 4))
    assert torch.allclose(few, many[:2], atol=1e-4)


def test_reverse_explorer_takes_grids_and_stochastic_steps():
    D = Empirical(digits.load("train")[0])
    grid = torch.tensor([80.0, 10.0, 1.0, 0.5])  # ends above 0, where D still speaks
    shown = ReverseExplorer(D, "exact", n=1, sigmas=grid, noisy_step=ddpm)
    assert "steps" not in shown.controls and shown.controls["level"].max == 3
    last = shown._record
    assert torch.allclose(last.estimates[-1], D(last.states[-1], torch.tensor(0.5)))
    first = last.states[-1]
    shown.controls["seed"].value = 1
    assert not torch.allclose(shown._record.states[-1], first)
    shown.controls["seed"].value = 0
    assert torch.equal(shown._record.states[-1], first), "a seed gives its run again"


def test_reverse_explorer_tells_of_a_run_that_fails():
    exact, works = Empirical(digits.load("train")[0]), [True]
    shown = ReverseExplorer(lambda x, sigma: exact(x, sigma) if works else x * math.nan, "exact", n=1)
    before = shown.picture.value
    works.clear()
    shown.controls["seed"].value = 1
    assert "FloatingPointError: x is not finite after the step at sigma = 80" in shown.message.value
    assert shown.picture.value == before
    works.append(True)
    shown.controls["seed"].value = 2
    assert shown.message.value == "" and shown.picture.value != before


# --- points ---------------------------------------------------------------------------------------

EXTENT = (-3.0, 3.0, -2.0, 2.0)


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_density_fills_the_contours_of_the_mixture(ax):
    blob = Mixture.gaussian(torch.zeros(2), torch.eye(2))
    shown = points.density(ax, blob.log_prob, EXTENT, n=201, levels=4)
    peak = 1 / (2 * math.pi)
    assert np.allclose(shown.levels, peak * np.array([1, 4, 9, 16]) / 16)
    outer = np.concatenate([path.vertices for path in shown.get_paths()[:1]])
    radius = np.linalg.norm(outer, axis=1)  # between the contours of p = peak/16 and peak/4
    assert radius.min() == pytest.approx(math.sqrt(2 * math.log(4)), abs=0.01)
    assert np.abs(outer[:, 1]).max() <= 2
    assert ax.get_aspect() == 1 and ax.get_xlabel() == "$x_1$" and ax.get_ylabel() == "$x_2$"
    assert ax.get_xlim() == EXTENT[:2] and ax.get_ylim() == EXTENT[2:]


def test_scatter_puts_points_where_they_are(ax):
    x = toys.moons(50)
    shown = points.scatter(ax, x, style.COLOURS["model"], label="moons")
    assert np.allclose(shown.get_offsets(), x)
    assert ax.get_aspect() == 1 and ax.get_xlabel() and ax.get_ylabel()


def test_field_arrows_point_along_the_vectors_and_the_longest_are_cut(ax):
    mixture = toys.three_blobs()
    arrows = points.field(ax, lambda x: mixture.score(x, 0.5), EXTENT, n=12)
    place = torch.tensor(arrows.XY)
    score = mixture.score(place, 0.5)
    drawn = torch.tensor(np.stack([arrows.U, arrows.V], -1))
    length, wanted = drawn.norm(dim=1), score.norm(dim=1)
    assert torch.allclose((drawn * score).sum(1), length * wanted, rtol=1e-6), "not parallel"
    cut = wanted > wanted.quantile(0.8)
    assert torch.allclose(length[cut], length.max()) and 0 < cut.sum() < len(cut)
    ratio = length[~cut] / wanted[~cut]
    assert torch.allclose(ratio, ratio[0])
    assert len(place) == 12 * 8 and ax.get_aspect() == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda ax: points.scatter(ax, torch.zeros(5, 3)), r"points has shape \(5, 3\); expected \(N, 2\)"),
        (lambda ax: points.density(ax, lambda x: x, EXTENT, n=4), r"log_prob returned shape \(16, 2\)"),
        (lambda ax: points.density(ax, lambda x: x[:, 0] - math.inf, EXTENT), "expected a density there"),
        (lambda ax: points.density(ax, lambda x: x[:, 0], (1, 0, 0, 1)), r"extent = \(1, 0, 0, 1\); expected \(left, right"),
        (lambda ax: points.field(ax, lambda x: x[:, :1], EXTENT), r"vector_fn returned shape \(\d+, 1\)"),
    ],
)
def test_bad_points_are_named(ax, call, message):
    with pytest.raises(ValueError, match=message):
        call(ax)
