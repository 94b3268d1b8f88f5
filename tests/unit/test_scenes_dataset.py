"""Scenes as a data set: the pictures and captions of its scenes, whether rendered, streamed or read from disk."""

from __future__ import annotations

import itertools
import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from course_lib.worlds.scenes import captions, dataset, draw, render
from course_lib.worlds.scenes.dataset import CHUNK, SceneDataset, cache_folder

BYTE = 0.5 / 127.5 + 1e-6
"""Half a step of 8 bits in [-1, 1]. The fp32 on the way, 127.5 x + 127.5 and b / 127.5 - 1, rounds four times numbers below
256 in units of 1 / 127.5, by at most 4 * 256 * 2^-24 / 127.5 < 5e-7."""
N = CHUNK + 12  # two chunks, the second not full
SIZE = 8


def small(**changed: object) -> SceneDataset:
    return SceneDataset(**{"n": N, "seed": 5, "size": SIZE, "objects": (1, 2), "split": "train", **changed})


def refuse(*_: object) -> None:
    raise AssertionError("rendered, where a file should have been read")


def interrupted(after: int):
    """A `render` that is interrupted at its call number `after` (from 0)."""
    calls = []

    def broken(*arguments: object):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return render(*arguments)

    return broken


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def all_of(data: SceneDataset) -> Tensor:
    return data.pictures(torch.arange(len(data)))


@pytest.mark.parametrize(("objects", "split"), [(1, "train"), (2, "held out"), ((1, 2), "train")])
def test_an_item_is_the_picture_of_its_scene(objects: int | tuple[int, ...], split: str) -> None:
    data = small(n=10, objects=objects, split=split)
    scenes = draw(10, 5, objects, split)
    assert torch.equal(data.scenes.shape, scenes.shape) and torch.equal(data.scenes.position, scenes.position)
    for i in (0, 3, 9):
        picture, row = data[i]
        assert row == i and picture.shape == (3, SIZE, SIZE)
        torch.testing.assert_close(picture, render(scenes[i], SIZE).rgb[0])
    assert len(data) == 10 and len(list(itertools.islice(data, 12))) == 10  # iteration ends
    assert data.captions(3) == captions(scenes, 3)
    assert data.captions(None) == captions(scenes, None) != data.captions(3)


def test_an_index_counts_from_either_end_and_no_further() -> None:
    data = small(n=4)
    assert data[-1][1] == 3 and torch.equal(data[-1][0], data[3][0])
    for i in (4, -5):
        with pytest.raises(IndexError, match=f"i = {i}; expected a number from -4 to 3"):
            data[i]


@pytest.mark.parametrize("changed", [{"n": -1}, {"objects": 3}, {"split": "test"}, {"seed": 0.5}])
def test_what_cannot_be_drawn_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changed))} = "):
        small(**changed)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_has_every_picture_once_and_in_order(workers: int) -> None:
    data = small(n=2 * CHUNK + 1)
    pieces = list(data.stream(workers))
    assert [len(rows) for _, rows in pieces] == [CHUNK, CHUNK, 1]
    assert torch.equal(torch.cat([rows for _, rows in pieces]), torch.arange(len(data)))
    torch.testing.assert_close(torch.cat([pictures for pictures, _ in pieces]), all_of(data))


def test_a_cache_holds_what_is_streamed_but_for_eight_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small()
    kept = data.cached(tmp_path, workers=0)
    expected = all_of(data)
    monkeypatch.setattr(dataset, "render", refuse)
    found = all_of(kept)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    error = (found - expected).abs()
    assert float(error.max()) <= BYTE
    assert float(error.mean()) > BYTE / 8  # the bytes are not the pictures themselves: the bound is put to the test
    assert kept.captions(2) == data.captions(2) and torch.equal(kept.scenes.shape, data.scenes.shape)
    picture, row = kept[-2]
    assert row == N - 2 and torch.equal(picture, found[-2])
    some = torch.tensor([N - 1, 0, 7, 7])
    assert torch.equal(kept.pictures(some), found[some])
    with pytest.raises(AssertionError, match="rendered"):
        data[0]  # the data set that was not cached still renders


def test_a_cache_is_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = all_of(small().cached(tmp_path, workers=0))
    monkeypatch.setattr(dataset, "render", refuse)
    assert torch.equal(all_of(small().cached(tmp_path, workers=0)), first)
    assert torch.equal(all_of(small().cached(tmp_path, workers=0).cached(tmp_path, workers=0)), first)


@pytest.mark.parametrize("changed", [{"n": N + 1}, {"seed": 6}, {"size": SIZE + 4}, {"objects": 1}, {"split": "held out"}])
def test_other_scenes_have_another_file(changed: dict[str, object], tmp_path: Path) -> None:
    small().cached(tmp_path, workers=0)
    data = small(**changed)
    found = all_of(data.cached(tmp_path, workers=0))
    assert sorted(path.suffix for path in files(tmp_path)) == [".json", ".json", ".npy", ".npy"]
    assert float((found - all_of(data)).abs().max()) <= BYTE


def test_one_object_and_only_one_object_are_one_data_set(tmp_path: Path) -> None:
    for objects in (1, (1,)):
        small(n=2, objects=objects).cached(tmp_path, workers=0)
    assert len(files(tmp_path)) == 2


def test_a_cache_of_an_older_world_is_rebuilt_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = all_of(small().cached(tmp_path, workers=0))
    assert capsys.readouterr().out == ""

    def darker(*arguments: object):
        seen = render(*arguments)
        seen.rgb = seen.rgb / 2 - 0.5
        return seen

    version = dataset.VERSION
    monkeypatch.setattr(dataset, "VERSION", version + 1)
    monkeypatch.setattr(dataset, "render", darker)
    new = all_of(small().cached(tmp_path, workers=0))
    assert float((new - (old / 2 - 0.5)).abs().max()) <= 1.5 * BYTE + 1e-6  # half a step of the new one, a quarter of the old
    said = capsys.readouterr().out
    assert f"holds version {version} of the scene world; rendering version {version + 1}" in said and said.count("\n") == 1
    assert len(files(tmp_path)) == 2
    monkeypatch.setattr(dataset, "render", refuse)
    assert torch.equal(all_of(small().cached(tmp_path, workers=0)), new)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("chunk", [0, 1])
def test_an_interrupted_build_leaves_nothing(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "render", interrupted(chunk))
    with pytest.raises(KeyboardInterrupt):
        small().cached(tmp_path, workers=0)
    assert list((tmp_path / "scenes").iterdir()) == []
    monkeypatch.setattr(dataset, "render", render)
    assert float((all_of(small().cached(tmp_path, workers=0)) - all_of(small())).abs().max()) <= BYTE


def test_an_interrupted_rebuild_leaves_the_old_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small().cached(tmp_path, workers=0)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    monkeypatch.setattr(dataset, "VERSION", dataset.VERSION + 1)
    monkeypatch.setattr(dataset, "render", interrupted(1))
    with pytest.raises(KeyboardInterrupt):
        small().cached(tmp_path, workers=0)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_a_cache_without_the_whole_of_its_facts_is_begun_anew(tmp_path: Path) -> None:
    """As an interruption between the two files would leave it."""
    data = small(n=3)
    expected = all_of(data.cached(tmp_path, workers=0))
    about, pictures = (next(tmp_path.rglob(f"*.{suffix}")) for suffix in ("json", "npy"))
    pictures.write_bytes(pictures.read_bytes()[:-10])  # to be noticed if it were read
    about.unlink()
    assert torch.equal(all_of(data.cached(tmp_path, workers=0)), expected)
    pictures.unlink()
    assert torch.equal(all_of(data.cached(tmp_path, workers=0)), expected)
    assert json.loads(about.read_text()) == {
        "version": dataset.VERSION, "n": 3, "seed": 5, "size": SIZE, "split": "train", "objects": [1, 2]
    }  # fmt: skip


def test_the_facts_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption while they are written leaves a data set that the next call builds, not a file that it cannot read."""
    data, write = small(n=3), Path.write_text

    def cut(path: Path, text: str) -> None:
        write(path, text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        data.cached(tmp_path, workers=0)
    monkeypatch.setattr(Path, "write_text", write)
    assert float((all_of(data.cached(tmp_path, workers=0)) - all_of(data)).abs().max()) <= BYTE


def test_a_full_disk_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """N pictures of 3 SIZE^2 bytes; a tenth of what is free stays free."""
    usage, need = namedtuple("usage", ("total", "used", "free")), 3 * N * SIZE**2
    monkeypatch.setattr(dataset, "render", refuse)
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: usage(0, 0, need))
    with pytest.raises(OSError, match=rf"{N} scenes of {SIZE} px take .* MB; .*scenes has .* MB free"):
        small().cached(tmp_path, workers=0)
    assert files(tmp_path) == []
    monkeypatch.setattr(dataset, "render", render)
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: usage(0, 0, int(need / 0.9) + 2))
    small().cached(tmp_path, workers=0)


def test_caches_lie_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COURSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "diffusion_course"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "user" / "diffusion_course"
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "course"))
    assert cache_folder() == tmp_path / "course"
    small(n=2).cached(workers=0)
    assert len(files(tmp_path)) == len(files(tmp_path / "course" / "scenes")) == 2
