"""What a text-to-image model of the scene world has learned: its VAE, and how well its pictures obey their prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from course_lib import zoo
from course_lib.devices import SampleNoise, autocast
from course_lib.guidance import cfg
from course_lib.metrics import frechet_distance, precision_recall, psnr
from course_lib.sample import sample
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.labels import labels
from course_lib.zoo.pretrained import Pretrained
from course_lib.zoo.readers import SceneReader, correct

STEPS = 30
BATCH = 50
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALIDATION = ("seen combinations", 200, 9_100, 1, "train")
TESTS = (
    ("one object", 500, 9_101, 1, "train"),
    ("one object, held-out combination", 500, 9_102, 1, "held out"),
    ("two objects", 500, 9_103, 2, "train"),
)
"""Name, number of prompts, seed, objects and split of each set of prompts; no training scene has these seeds."""
WORDING = 77
REAL = 2_000


def generate(
    model: Pretrained,
    prompts: Sequence[str],
    w: float,
    seed: int = 0,
    steps: int = STEPS,
    progress: bool = False,
    condition: Mapping[str, Tensor] | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] of these prompts: DDIM in `steps` steps under classifier-free guidance `w`.

    condition  what `model.denoiser` is given beside the text, such as a control's maps, one row for each prompt
    reference  the same for the half of the guidance without text; as `condition` where it is None

    Picture i depends on prompt i, its conditions and (seed, i), not on its batch.
    """
    sigmas, pictures = model.sigmas(steps), []
    halves = [condition or {}, (condition if reference is None else reference) or {}]
    for first in tqdm(range(0, len(prompts), BATCH), desc=f"generating at w = {w:g}", unit="batch", disable=not progress):
        some = list(prompts[first : first + BATCH])
        rows = [{name: value[first : first + BATCH].to(model.device) for name, value in half.items()} for half in halves]
        texts = (some, [""] * len(some))
        pair = [model.denoiser.given(**model.embed(text), **given) for text, given in zip(texts, rows, strict=True)]
        x = model.start(SampleNoise(seed, first)(torch.empty(len(some), *model.shape, device=model.device)), sigmas[0])
        with autocast(model.device), torch.no_grad():
            found = model.finish(sample(cfg(*pair, w), x, sigmas), sigmas[-1])
            pictures.append(model.decode(found).float().cpu())
    return torch.cat(pictures)


def _rates(found: dict[str, Tensor]) -> dict[str, float]:
    """The share of right pictures of each attribute, among those whose prompt names it."""
    return {name: round(float(value.nanmean()), 4) for name, value in found.items() if not bool(value.isnan().all())}


def choose_guidance(model: Pretrained, reader: SceneReader) -> dict[str, Any]:
    """The scale of GUIDANCES with the most pictures that obey, on prompts of their own (VALIDATION)."""
    _, n, seed, objects, split = VALIDATION
    prompts = SceneDataset(n, seed, objects=objects, split=split).captions(WORDING)
    wanted = [parse(prompt) for prompt in prompts]
    scores = {}
    for w in GUIDANCES:
        obey = reader.obeys(generate(model, prompts, w, seed=1, progress=True), wanted)["all"]
        scores[w] = round(float(obey.mean()), 4)
    best = max(scores, key=lambda w: scores[w])
    return {"guidance": best, "validation": {f"{w:g}": score for w, score in scores.items()}}


def judge_vae(model: Pretrained, readers: Sequence[SceneReader]) -> dict[str, Any]:
    """PSNR and reading of reconstructions of held-out scenes, one or two objects."""
    sets = [SceneDataset(1_000, 9_001, objects=(1, 2)), SceneDataset(500, 9_002, objects=(1, 2), split="held out")]
    metrics: dict[str, Any] = {}
    for name, of in zip(("seen combinations", "held-out combinations"), sets, strict=True):
        x = of.pictures(torch.arange(len(of)))
        y = reconstruct(model, x)
        each = torch.tensor([psnr(a, b) for a, b in zip(y, x, strict=True)])
        read = correct(readers[0].read(y), labels(of.scenes))
        metrics[name] = {
            "psnr_db": round(float(each.mean()), 2),
            **{k: round(float(v.double().mean()), 4) for k, v in read.items()},
        }
    return metrics


def reconstruct(model: Pretrained, x: Tensor) -> Tensor:
    """decode(encode(x)), (N, 3, H, W), with the mean of the latents."""
    with autocast(model.device), torch.no_grad():
        pieces = [model.decode(model.encode(batch.to(model.device))).float().cpu() for batch in x.split(BATCH)]
    return torch.cat(pieces)


def judge_prompts(model: Pretrained, readers: Sequence[SceneReader], w: float) -> dict[str, Any]:
    """How many pictures obey, on every set of TESTS: drawn wordings and plain ones, both readers, and renders for comparison."""
    metrics: dict[str, Any] = {}
    for name, n, seed, objects, split in TESTS:
        of = SceneDataset(n, seed, objects=objects, split=split)
        prompts, plain = of.captions(WORDING), of.captions(None)
        wanted = [parse(prompt) for prompt in prompts]
        pictures = generate(model, prompts, w, seed=2, progress=True)
        renders = of.pictures(torch.arange(n))
        ceiling = readers[0].obeys(reconstruct(model, renders), wanted)["all"]
        obey, confirm = (reader.obeys(pictures, wanted) for reader in readers)
        worded = readers[0].obeys(generate(model, plain, w, seed=2, progress=True), wanted)["all"]
        metrics[name] = {
            "obeyed": _rates(obey),
            "obeyed_by_second_reader": _rates(confirm)["all"],
            "readers_agree": round(float((obey["all"] == confirm["all"]).double().mean()), 4),
            "reader_on_reconstructed_renders": round(float(ceiling.mean()), 4),
            "ratio": round(float(obey["all"].mean() / ceiling.mean()), 4),
            "plain_wording": round(float(worded.mean()), 4),
        }
    return metrics


def judge_distribution(model: Pretrained, readers: Sequence[SceneReader], w: float) -> dict[str, Any]:
    """Frechet distance, precision and recall in the reader's features, of generated and of other real pictures."""
    real, other = (SceneDataset(REAL, seed, objects=(1, 2)) for seed in (9_104, 9_105))
    a, b = (readers[0].features(of.pictures(torch.arange(REAL))) for of in (real, other))
    prompts = other.captions(WORDING)
    metrics: dict[str, Any] = {}
    for name, features in (
        ("generated", readers[0].features(generate(model, prompts, w, seed=3, progress=True))),
        ("reconstructed", readers[0].features(reconstruct(model, other.pictures(torch.arange(REAL))))),
        ("real", b),
    ):
        precision, recall = precision_recall(a, features)
        metrics[name] = {
            "frechet": round(frechet_distance(a, features), 4), "precision": round(precision, 4), "recall": round(recall, 4)
        }  # fmt: skip
    return metrics


def judge(model: Pretrained) -> dict[str, Any]:
    """All of it, with both readers, at the guidance that the validation prompts prefer; and seconds per picture."""
    readers = [zoo.load(name, str(model.device)) for name in ("scenes-reader", "scenes-reader-2")]
    chosen = choose_guidance(model, readers[0])
    w = chosen["guidance"]
    begun = time.perf_counter()
    generate(model, ["a small red cube on grass"], w)
    return {
        "steps": STEPS,
        **chosen,
        "seconds_for_one_picture": round(time.perf_counter() - begun, 2),
        "vae": judge_vae(model, readers),
        "prompts": judge_prompts(model, readers, w),
        "distribution": judge_distribution(model, readers, w),
    }
