"""Pictures of built notebooks: smaller, as the eye saw them, the same on each run; what is no still PNG stays as it is."""

import base64
import io

import nbformat
import numpy as np
import pytest
from PIL import Image, ImageDraw

from course_lib.grading import build
from course_lib.grading.pictures import BLOCK, WHOLE, WORST, errors, smaller


def png(picture: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", **options)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def page() -> Image.Image:
    """A white page with text, a line of one colour and a colour map."""
    picture = Image.new("RGB", (320, 200), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 10), "sigma = 0.18", fill="black", font_size=24)
    draw.line([(10, 60), (300, 60)], fill=(255, 140, 0), width=2)
    for x in range(256):
        draw.line([(30 + x, 90), (30 + x, 180)], fill=(x, x // 2, 255 - x))
    return picture


def noise(side: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_a_figure_takes_a_palette_that_keeps_its_page_and_lines_exact():
    original = page()
    small = opened(smaller(png(original, optimize=True)))
    assert small.mode == "P" and len(small.getcolors()) <= 256
    whole, worst = errors(small, original)
    assert 0 < whole <= WHOLE and worst <= WORST
    assert small.convert("RGB").getpixel((0, 0)) == (255, 255, 255) and small.convert("RGB").getpixel((50, 60)) == (255, 140, 0)
    assert len(smaller(png(original, optimize=True))) < len(png(original, optimize=True))


@pytest.mark.parametrize("colours", [2, 16, 40])
def test_few_colours_stay_exact(colours):
    rng = np.random.default_rng(colours)
    table = rng.integers(0, 256, (colours, 3), dtype=np.uint8)
    original = Image.fromarray(table[rng.integers(0, colours, (64, 64))].repeat(4, 0).repeat(4, 1))
    small = smaller(png(original))
    assert errors(opened(small), original)[1] <= WORST and len(small) <= len(png(original, optimize=True))
    if colours <= 16:
        assert np.array_equal(np.asarray(opened(small).convert("RGB")), np.asarray(original))


def test_where_no_palette_does_each_channel_moves_by_at_most_two_levels():
    original = noise()
    small = opened(smaller(png(original)))
    moved = np.asarray(small, np.int16) - np.asarray(original, np.int16)
    assert small.mode == "RGB" and 0 < np.abs(moved).max() <= 2


def test_a_photograph_on_a_large_white_page_is_bounded_by_itself():
    original = Image.new("RGB", (1200, 1200), "white")
    original.paste(noise(), (16, 16))
    moved = np.asarray(opened(smaller(png(original))).convert("RGB"), np.int16) - np.asarray(original, np.int16)
    # 256 colours for the noise err by 22 levels there, which is less than WHOLE over the page
    assert np.sqrt((moved[16:64, 16:64] ** 2.0).mean()) <= WORST


def test_the_errors_are_root_mean_squares_of_the_picture_and_of_its_worst_block():
    black, other = Image.new("RGB", (3 * BLOCK, BLOCK + 5)), Image.new("RGB", (3 * BLOCK, BLOCK + 5))
    other.paste((10, 10, 10), (BLOCK, 0, 2 * BLOCK, BLOCK))
    share = BLOCK * BLOCK / (3 * BLOCK * (BLOCK + 5))
    assert errors(other, black) == pytest.approx((10 * share**0.5, 10.0))


def test_what_was_transparent_is_white_and_opaque():
    original = page().convert("RGBA")
    original.putalpha(Image.new("L", original.size, 255))
    original.paste((10, 20, 30, 0), (0, 185, 320, 200))
    small = opened(smaller(png(original)))
    assert not small.has_transparency_data and small.convert("RGB").getpixel((100, 195)) == (255, 255, 255)
    assert len(smaller(png(original))) < len(png(original))


def test_two_runs_give_the_same_bytes_and_never_more_of_them():
    for original in (page(), noise(), page().convert("L"), page().quantize(7), Image.new("RGB", (1, 1), "red")):
        data = png(original, optimize=True)
        assert smaller(data) == smaller(data) and len(smaller(data)) <= len(data)


def test_animations_other_formats_and_deep_channels_stay_as_they_are():
    frames = [page().quantize(64), page().transpose(Image.Transpose.FLIP_LEFT_RIGHT).quantize(64)]
    film = png(frames[0], save_all=True, append_images=frames[1:], duration=80, loop=0)
    jpeg = io.BytesIO()
    page().save(jpeg, "JPEG")
    deep = png(Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256)))
    assert opened(film).n_frames == 2 and opened(deep).mode.startswith("I")
    for data in (film, jpeg.getvalue(), deep):
        assert smaller(data) == data


def test_a_build_stores_the_smaller_picture():
    data = png(page())
    output = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(data).decode(), "text/plain": "<Figure>"})
    assert base64.b64decode(build._strip(output).data["image/png"]) == smaller(data)
