"""Pictures that a reader calls wrong, on pages to look at: is it the model that errs, the reader, or the prompt?"""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from course_lib import zoo
from course_lib.study.pictures import png
from course_lib.study.scenes import described
from course_lib.training import write_atomically
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.zoo import judge_scenes
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.readers import SceneReader

SEED = 9_106
"""Of the scenes whose captions are the prompts; neither training nor a score of the card has seen it."""
PAGE = (5, 10)
WIDTH = 32


def find(model: Pretrained, reader: SceneReader, w: float, n: int) -> tuple[Tensor, list[dict[str, str]], int]:
    """The first n pictures that do not show all of their prompt, a row about each, and how many pictures were drawn.

    Prompts name one object and two in turn. A row has the prompt, the attributes that are wrong, and what was read.
    """
    pictures, rows, drawn = [], [], 0
    with tqdm(total=n, desc="looking for wrong pictures", unit="picture") as bar:
        while len(rows) < n:
            of = SceneDataset(judge_scenes.BATCH, SEED + drawn, objects=1 + drawn // judge_scenes.BATCH % 2, split="train")
            prompts = of.captions(judge_scenes.WORDING)
            made = judge_scenes.generate(model, prompts, w, seed=drawn)
            found = reader.obeys(made, [parse(prompt) for prompt in prompts])
            drawn += len(prompts)
            for i in (found["all"] == 0).nonzero()[: n - len(rows), 0].tolist():
                wrong = ", ".join(name for name, right in found.items() if name != "all" and right[i] == 0)
                read = described(reader.read(made[i : i + 1]))
                rows.append({"number": str(len(rows) + 1), "prompt": prompts[i], "wrong": wrong, "read": read})
                pictures.append(made[i])
                bar.update()
    return torch.stack(pictures), rows, drawn


def write(name: str, folder: Path, n: int = 200) -> list[Path]:
    """Pages of the first n wrong pictures of this text-to-image model, and wrong.csv with a row for each."""
    metrics = zoo.card(name)["metrics"]
    if "prompts" not in metrics:
        raise ValueError(f"name = {name!r}; expected a text-to-image model of the scene world, whose card tells of its prompts")
    pictures, rows, drawn = find(zoo.load(name), zoo.load("scenes-reader"), metrics["guidance"], n)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    each = PAGE[0] * PAGE[1]
    for first in range(0, n, each):
        path = folder / f"wrong-{first // each + 1}.png"
        data = png(_page(pictures[first : first + each], rows[first : first + each]))
        write_atomically(path, lambda temporary, data=data: temporary.write_bytes(data))
        written.append(path)

    def table(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(folder / "wrong.csv", table)
    print(f"{n} wrong pictures among {drawn}")
    return [*written, folder / "wrong.csv"]


def _page(pictures: Tensor, rows: list[dict[str, str]]) -> plt.Figure:
    figure, axes = plt.subplots(*PAGE, figsize=(15, 14), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, row in zip(axes.flat, pictures, rows, strict=False):
        axis.imshow((picture.permute(1, 2, 0).clamp(-1, 1) + 1) / 2, interpolation="nearest")
        lines = (f"{row['number']}. {row['prompt']}", f"WRONG: {row['wrong']}", row["read"])
        axis.set_title("\n".join(textwrap.fill(line, WIDTH) for line in lines), fontsize=6, loc="left")
    return figure
