"""Clips that play, filmstrips and files of them: each pixel, time and title, and what is refused."""

from __future__ import annotations

import io
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib.study import clips
from course_lib.study.pictures import render
from course_lib.worlds.scenes.clips import draw_clips, render_clips
from tests.shown import decode, levels, shots

FRAMES = 4


def noisy(*shape, seed=0):
    """Clips that need all colours."""
    return (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1).float()


@pytest.fixture(scope="module")
def scenes():
    """Two rendered clips (2, T, 3, 64, 64)."""
    return render_clips(draw_clips(2, 5, "slide", objects=1, frames=FRAMES)).rgb


# --- clips that play ------------------------------------------------------------------------------------------------------


def test_every_pixel_of_every_frame_is_the_clips_and_it_plays_for_ever():
    x = 1.2 * noisy(3, 5, 3, 6, 8)
    found, stays, loop = shots(clips.animated_png(x, fps=20, scale=2, columns=2))
    gap = clips.GAP
    assert found.shape == (5, 2 * 12 + gap, 2 * 16 + gap, 3) and stays == [50.0] * 5 and loop == 0
    for k in range(5):
        for n, (y, left) in enumerate([(0, 0), (0, 16 + gap), (12 + gap, 0)]):
            assert np.array_equal(found[k, y : y + 12, left : left + 16], levels(x[n, k], 2)), (n, k)
    assert (found[:, 12 + gap :, 16:] == 255).all() and (found[:, :12, 16 : 16 + gap] == 255).all()


def test_scenes_have_one_palette_that_the_eye_does_not_see(scenes):
    png = clips.animated_png(scenes, scale=3)
    found = shots(png)[0].astype(int)
    assert Image.open(io.BytesIO(png)).mode == "P" and len(png) < 0.5 * len(clips.animated_png(noisy(*scenes.shape)))
    for n in (0, 1):
        left = n * (192 + clips.GAP)
        off = np.abs(found[:, :, left : left + 192] - np.stack([levels(frame, 3) for frame in scenes[n]]))
        assert off.mean() < clips.UNSEEN


def test_titles_stand_above_their_clips_inside_and_apart(scenes):
    titles = ["a title that is far wider than its clip", "b\n$c$", "d"]
    x = torch.cat([scenes, scenes[:1]])
    found = shots(clips.animated_png(x, scale=1, columns=3, titles=titles))[0]
    top = clips.LINE * 2 + 4
    assert (found[0] == found[1])[:top].all(), "titles stand still"
    starts = [int(c) for c in (found[0, :top] < 128).any((0, 2)).nonzero()[0]]
    words = np.split(starts, np.flatnonzero(np.diff(starts) > clips.GAP) + 1)
    assert len(words) == 3 and words[0][0] >= 0 and words[-1][-1] < found.shape[2] - 1
    pictures = (found[0, top:] < 250).all((0, 2)).nonzero()[0]
    middles = [run.mean() for run in np.split(pictures, np.flatnonzero(np.diff(pictures) > 1) + 1)]
    assert len(middles) == 3 and all(abs(word[[0, -1]].mean() - at) < 3 for word, at in zip(words, middles, strict=True))


def test_equal_clips_give_equal_bytes_and_play_shows_them(scenes):
    png = clips.animated_png(scenes, titles=["a", "b"])
    assert clips.animated_png(scenes.double(), titles=["a", "b"]) == png
    shown = clips.play(scenes, titles=["a", "b"])
    assert shown.data == png and shown.format == "png"
    assert clips.animated_png(scenes[0]) == clips.animated_png(scenes[:1])


def test_a_clip_that_stands_still_lasts_as_long():
    still = noisy(1, 1, 3, 8, 8).expand(1, 4, 3, 8, 8).clone()
    still[:, 3] = -still[:, 3]
    assert sum(shots(clips.animated_png(still, fps=8))[1]) == 500.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clips": torch.zeros(2, 3, 8)}, r"clips has shape \(2, 3, 8\); expected \(N, T, 3, H, W\) or \(T, 3, H, W\)"),
        ({"clips": torch.zeros(1, 4, 1, 8, 8)}, r"clips has shape \(1, 4, 1, 8, 8\); expected"),
        ({"clips": torch.zeros(1, 0, 3, 8, 8)}, r"clips has shape \(1, 0, 3, 8, 8\); expected"),
        ({"clips": torch.full((1, 2, 3, 8, 8), float("nan"))}, r"not finite, first in frame 0 of clip 0; expected numbers"),
        ({"fps": 0}, r"fps = 0; expected a positive number"),
        ({"scale": 1.5}, r"scale = 1.5; expected a whole number, at least 1"),
        ({"columns": 0}, r"columns = 0; expected a whole number, at least 1"),
        ({"titles": ["a"]}, r"titles has 1 entries; expected one for each of the 2 clips"),
    ],
)
def test_what_cannot_be_played_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        clips.animated_png(**{"clips": torch.zeros(2, 4, 3, 8, 8)} | options)


def test_a_filmstrip_has_a_row_for_each_clip_its_frames_in_order_and_their_numbers(scenes):
    figure = clips.filmstrip(scenes, ["one", "the other of the two"], every=2)
    (axes,) = figure.axes
    sheet, texts = decode(render(figure)).astype(int), {text.get_text(): text for text in axes.texts}
    assert set(texts) == {"one", "the other of the two", "frame", "0", "2"}
    side = clips.SIDE // 64 * 64
    for k, number in enumerate((0, 2)):
        middle = round(float(texts[str(number)].get_window_extent().get_points()[:, 0].mean()))
        for n in (0, 1):
            y, x = n * (side + 4), middle - side // 2
            off = [
                np.abs(sheet[y : y + side, x + d : x + d + side] - levels(scenes[n, number], side // 64)).mean()
                for d in (-1, 0, 1)
            ]
            assert min(off) < 2, (n, k)
    boxes, whole = [text.get_window_extent() for text in axes.texts], figure.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1 for box in boxes)
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
    assert (
        max(box.x1 for text, box in zip(axes.texts, boxes, strict=True) if text.get_ha() == "right")
        < figure.bbox.width - 2 * side
    )
    assert min(text.get_fontsize() for text in axes.texts) >= 12
    wide = clips.filmstrip(noisy(8, 3, 64, 64), ["x" * 30])
    assert min(text.get_fontsize() for text in wide.axes[0].texts) >= 12 * wide.bbox.width / 900
    with pytest.raises(ValueError, match="every = 0; expected a whole number"):
        clips.filmstrip(scenes, every=0)
    with pytest.raises(ValueError, match="row_titles has 1 entries; expected one for each of the 2 clips"):
        clips.filmstrip(scenes, ["one"])


# --- files ----------------------------------------------------------------------------------------------------------------


def test_an_mp4_has_every_frame_even_sides_and_no_file_beside(scenes, tmp_path):
    if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
        pytest.skip(
            "ffmpeg or ffprobe is missing, and MP4 is not tested without them (Debian and Ubuntu: apt-get install ffmpeg)"
        )
    path = clips.mp4(scenes[0, :, :, :63, :61], tmp_path / "new" / "clip.mp4", fps=5)
    assert path == tmp_path / "new" / "clip.mp4" and [one.name for one in path.parent.iterdir()] == ["clip.mp4"]
    asks = ["-v", "error", "-count_frames", "-show_entries", "stream=codec_name,width,height,pix_fmt,r_frame_rate,nb_read_frames"]
    said = subprocess.run(["ffprobe", *asks, "-of", "csv=p=0", path], capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"h264,62,64,yuv420p,5/1,{FRAMES}"
    raw = ["-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    read = subprocess.run(["ffmpeg", *raw], capture_output=True, check=True).stdout
    seen = np.frombuffer(read, np.uint8).reshape(FRAMES, 64, 62, 3)[:, :63, :61].astype(int)
    true = np.stack([levels(frame[:, :63, :61]) for frame in scenes[0]])
    assert np.abs(seen - true).mean() < 0.5 * np.abs(seen - true[::-1]).mean(), "frames in their order"
    assert np.abs(seen - true).mean() < 8  # colours are stored for two by two pixels


def test_without_ffmpeg_an_animated_png_is_written_beside_and_it_is_said(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    path = clips.mp4(scenes[0], str(tmp_path / "clip.mp4"), fps=4, scale=2)
    assert path == tmp_path / "clip.png" and list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == clips.animated_png(scenes[0], fps=4, scale=2)
    assert capsys.readouterr().out == f"ffmpeg is missing, so an animated PNG was saved: {path}\n"


def test_an_ffmpeg_that_fails_is_told_in_one_line_and_leaves_the_old_file(scenes, tmp_path, monkeypatch):
    broken, path = tmp_path / "bin" / "ffmpeg", tmp_path / "clip.mp4"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nread -r _\necho no codec >&2\necho libx264 >&2\nexit 3\n")
    broken.chmod(0o755)
    path.write_text("old")
    monkeypatch.setenv("PATH", str(broken.parent))
    with pytest.raises(RuntimeError, match=r"ffmpeg could not write '.*clip\.mp4': no codec libx264$"):
        clips.mp4(scenes[0], path)
    assert path.read_text() == "old" and sorted(one.name for one in tmp_path.iterdir()) == ["bin", "clip.mp4"]
    with pytest.raises(ValueError, match=r"path = 'clip.gif'; expected a name that ends in .mp4"):
        clips.mp4(scenes[0], "clip.gif")
    with pytest.raises(ValueError, match=r"clip has shape \(2, 4, 3, 64, 64\); expected one clip \(T, 3, H, W\)"):
        clips.mp4(scenes, path)
