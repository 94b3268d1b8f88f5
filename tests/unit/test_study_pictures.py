"""Style and pictures: what is drawn is legible, and pictures show the very pixels they are given."""

from __future__ import annotations

import importlib
import io
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2lab

from course_lib.study import pictures, style
from tests.shown import decode, levels

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


@pytest.mark.parametrize("scale", [1, 2, 5])
@pytest.mark.parametrize("name", ["DPM-Solver++(2M)", "WWWWWWWW", "milli illi", "$x_t$ at $\\sigma$ = 3", "two\nlines of text"])
def test_strip_does_not_clip_the_names_of_rows(name, scale):
    figure = pictures.strip([torch.zeros(2, 1, 16, 16)], [name], scale=scale)
    seen = decode(pictures.render(figure))
    # a pixel for the edge of a letter that reaches beyond its box
    assert figure.axes[0].texts[0].get_window_extent().x0 >= figure.bbox.x0 + 1
    assert (seen[:, 0] == 255).all(), "ink at the very edge has lost what lies beyond"
    assert (seen[:, : seen.shape[1] // 2] < 128).any()


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
