"""Scenes as a data set: streamed, or rendered once and kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from course_lib.worlds.scenes.attributes import Scenes
from course_lib.worlds.scenes.captions import captions
from course_lib.worlds.scenes.render import render
from course_lib.worlds.scenes.sampling import draw

VERSION = 1
"""Of the world: raised whenever a scene, a picture or a caption of a seed changes, so that older caches are rebuilt."""

CHUNK = 128  # scenes rendered at a time


def cache_folder() -> Path:
    """Where rendered scenes are kept: $COURSE_CACHE, or `diffusion_course` in the user's cache folder."""
    given = os.environ.get("COURSE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "diffusion_course"


class SceneDataset(Dataset):
    """The scenes 0, ..., n - 1 of a seed with their pictures: item i is (picture (3, size, size) in [-1, 1], i).

    `scenes` holds what is in them, `captions(seed)` words them. A picture is rendered when it is asked for; after
    `cached()` it is read from a file of bytes (8 bits a channel) instead, which makes epochs after the first cheap.
    Arguments are those of `draw` and `render`, which raise ValueError for what they do not take.
    """

    def __init__(self, n: int, seed: int, size: int = 64, objects: int | tuple[int, ...] = 1, split: str = "train"):
        self.n, self.seed, self.size, self.objects, self.split = n, seed, size, objects, split
        self.scenes: Scenes = draw(n, seed, objects, split)
        self._bytes: np.ndarray | None = None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not -self.n <= i < self.n:
            raise IndexError(f"i = {i}; expected a number from {-self.n} to {self.n - 1}")
        return self.pictures(torch.tensor([i % self.n]))[0], i % self.n

    def pictures(self, rows: Tensor) -> Tensor:
        """The pictures of these scenes, (len(rows), 3, size, size) in [-1, 1]."""
        if self._bytes is None:
            return render(self.scenes[rows], self.size).rgb
        return torch.from_numpy(self._bytes[rows.numpy()]).float() / 127.5 - 1

    def captions(self, seed: int | None) -> list[str]:
        """A caption of each scene; another seed words them otherwise, see `captions`."""
        return captions(self.scenes, seed)

    def stream(self, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """All pictures in order, rendered CHUNK at a time by so many processes: yields (pictures, rows)."""
        loader = DataLoader(_Chunks(self), batch_size=None, num_workers=workers)
        yield from loader

    def cached(self, folder: Path | None = None, workers: int | None = None) -> SceneDataset:
        """This data set with its pictures on disk, under `folder` or `cache_folder()`; renders them where they are not yet.

        A cache of an older version of the world is rebuilt, and said; an interrupted one is begun anew, since a cache
        gets its name only when it is whole. `workers` processes render, as many as there are processors unless given.
        Raises OSError, before any work, where the disk has too little room.
        """
        folder = Path(folder or cache_folder()) / "scenes"
        facts = {key: getattr(self, key) for key in ("n", "seed", "size", "split")} | {
            "objects": np.atleast_1d(self.objects).tolist()
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        path, about = folder / f"{key}.npy", folder / f"{key}.json"
        found = json.loads(about.read_text())["version"] if about.exists() and path.exists() else None
        if found != VERSION:
            if found is not None:
                print(f"{path} holds version {found} of the scene world; rendering version {VERSION}")
            self._build(path, workers, json.dumps({"version": VERSION, **facts}, indent=1) + "\n")
        done = SceneDataset(self.n, self.seed, self.size, self.objects, self.split)
        done._bytes = np.load(path, mmap_mode="r")
        return done

    def _build(self, path: Path, workers: int | None, about: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        need, free = 3 * self.n * self.size**2, shutil.disk_usage(path.parent).free
        if need > 0.9 * free:
            raise OSError(
                f"{self.n} scenes of {self.size} px take {need / 1e6:.0f} MB; {path.parent} has {free / 1e6:.0f} MB free"
            )
        workers = (os.cpu_count() or 1) if workers is None else workers
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            part = Path(temporary) / path.name
            out = np.lib.format.open_memmap(part, "w+", np.uint8, (self.n, 3, self.size, self.size))
            with tqdm(total=self.n, desc="rendering scenes", unit="scene") as bar:
                for pictures, rows in self.stream(workers):
                    out[rows.numpy()] = (pictures * 127.5 + 127.5).round().to(torch.uint8).numpy()
                    bar.update(len(rows))
            out.flush()
            del out
            path.with_suffix(".json").unlink(missing_ok=True)  # an old cache is not to be taken for the new one
            os.replace(part, path)
            part.with_suffix(".json").write_text(about)
            os.replace(part.with_suffix(".json"), path.with_suffix(".json"))


@dataclasses.dataclass
class _Chunks(Dataset):
    """The data set CHUNK scenes at a time."""

    of: SceneDataset

    def __len__(self) -> int:
        return -(-len(self.of) // CHUNK)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        rows = torch.arange(i * CHUNK, min((i + 1) * CHUNK, len(self.of)))
        return render(self.of.scenes[rows], self.of.size).rgb, rows
