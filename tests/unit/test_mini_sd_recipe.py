"""The recipe of `mini-sd` in small, from scenes to a pipeline that diffusers reads, and how what it draws is judged."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.testing import assert_close

from course_lib import zoo
from course_lib.guidance import cfg
from course_lib.nets import mini_sd as nets
from course_lib.sample import sample
from course_lib.worlds.scenes import captions, draw, render, vocabulary
from course_lib.zoo import folders, judge_scenes, pretrained
from course_lib.zoo.pretrained import wrap
from course_lib.zoo.recipes import mini_sd as recipe

NAME = "mini-sd"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the recipe in small -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """`recipe.train` of 64 scenes and two steps a stage; a few seconds."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_CACHE", str(folder))
        patch.setattr(recipe, "SCENES", 64)
        patch.setattr(recipe, "WORDINGS", 1)
        patch.setattr(recipe, "VAE_STAGES", {stage: {**rest, "steps": 2} for stage, rest in recipe.VAE_STAGES.items()})
        for settings in (recipe.TEXT, recipe.UNET):
            for key, value in {"steps": 2, "batch": 16}.items():
                patch.setitem(settings, key, value)

        def train(**options: object):
            return recipe.train(NAME, device="cpu", progress=False, **options)

        yield train


@pytest.fixture(scope="module")
def done(small):
    return small()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_trains_everything(done) -> None:
    before = recipe.network(NAME)
    assert len(done.losses) == 10 and done.seconds > 0
    assert isinstance(done.net, nets.MiniSD) and not any(module.training for module in done.net.modules())
    assert not any(p.requires_grad for p in done.net.parameters())
    old, new = before.state_dict(), done.net.state_dict()
    assert old.keys() == new.keys()
    still = [key for key in old if torch.equal(old[key], new[key]) and "position_ids" not in key]
    # The key's bias of an attention moves all its logits alike, so its gradient is rounding, or nothing.
    assert all(key.endswith(("to_k.bias", "k_proj.bias")) for key in still), still


def test_an_interrupted_run_goes_on_to_the_same_weights(small, done, tmp_path: Path) -> None:
    """Interrupted in every stage, after a step that is and is not the stage's last; latents are not found twice."""
    checkpoint, calls, stops = tmp_path / f"{NAME}.ckpt", [], [1, 2, 3, 5, 7, 9]

    def on_step(step: int, ema: nn.Module) -> None:
        calls.append(step)
        if stops and len(calls) == stops[0]:
            del stops[0]
            raise KeyboardInterrupt

    while stops:
        with pytest.raises(KeyboardInterrupt):
            small(checkpoint=checkpoint, save_every=1, on_step=on_step)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == [f"{NAME}.{stage}.ckpt" for stage in ("latents", "text", "unet", "vae.crops", "vae.fine", "vae.whole")]
    written = (tmp_path / f"{NAME}.latents.ckpt").stat().st_mtime_ns
    resumed = small(checkpoint=checkpoint, save_every=1, on_step=on_step)
    assert calls == [1, 2] * 5
    assert (tmp_path / f"{NAME}.latents.ckpt").stat().st_mtime_ns == written
    assert resumed.losses == done.losses and same_weights(resumed.net, done.net)


def test_a_run_from_given_weights_keeps_their_vae_and_text_encoder(small, done) -> None:
    net = copy.deepcopy(done.net)
    on = small(net=net.requires_grad_(True), lr=3e-4, seed=9, steps=1)
    assert len(on.losses) == 1
    assert same_weights(on.net.vae, done.net.vae)
    assert not same_weights(on.net.generator.unet, done.net.generator.unet)
    assert same_weights(on.net.generator.text_encoder, done.net.generator.text_encoder)
    assert not any(p.requires_grad for p in on.net.parameters())


@pytest.fixture(scope="module")
def saved(done, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("zoo")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of diffusers, at a scheduler that it would have otherwise
        target = zoo.save(NAME, zoo.as_kept(NAME, copy.deepcopy(done.net)), {"steps": 6}, folder, folder)
    assert target == folder / NAME
    return folder, json.loads((folder / f"{NAME}.json").read_text())


def test_a_saved_pipeline_has_every_file_on_its_card(saved) -> None:
    folder, card = saved
    there = {path.relative_to(folder / NAME).as_posix() for path in (folder / NAME).rglob("*") if path.is_file()}
    assert set(card["files"]) == there >= {"model_index.json", "unet/diffusion_pytorch_model.safetensors"}
    folders.verify_folder(folder / NAME, card["files"])
    assert card["name"] == NAME and card["steps"] == 6 and card["words"] == vocabulary()
    assert card["bytes"] == sum((folder / NAME / path).stat().st_size for path in there) < 10e6
    assert folders.missing_files(folder / NAME) == [] and not any(path.endswith(".bin") for path in there)


PROMPTS = ["a small red cube on grass", "a large house, seen from the left, left of a blue ball"]
STEPS, GUIDANCE = 4, 4.0  # a divisor of 1,000: else the DDIM of diffusers steps to other levels than it visits next


def drawn_by_the_course(model: pretrained.Pretrained, noise: Tensor) -> Tensor:
    sigmas = model.sigmas(STEPS)
    D = cfg(*(model.denoiser.given(**model.embed(prompts)) for prompts in (PROMPTS, [""] * 2)), GUIDANCE)
    return model.decode(model.finish(sample(D, model.start(noise, sigmas[0]), sigmas), sigmas[-1])) / 2 + 0.5


def drawn_by_diffusers(pipeline: StableDiffusionPipeline, noise: Tensor) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    return pipeline(PROMPTS, latents=noise.clone(), **options).images


def test_diffusers_and_the_zoo_draw_the_same_from_the_saved_folder(saved, done) -> None:
    """fp32: some forty layers and four guided steps carry roundings of 2^-24 to some 1e-6; two pictures differ by far more."""
    folder, card = saved
    noise = normal(2, 4, 8, 8, seed=5)
    theirs = StableDiffusionPipeline.from_pretrained(folder / NAME, local_files_only=True).to(torch.float32)
    model = pretrained.load(folder / NAME, NAME, "cpu", frozenset(card["words"]))
    expected = drawn_by_diffusers(theirs, noise)
    found = drawn_by_the_course(model, noise)
    assert found.shape == (2, 3, 64, 64) and model.pixels == 64
    assert_close(found, expected, rtol=0, atol=1e-4)
    assert float((found[0] - found[1]).abs().max()) > 0.05
    net = recipe.read(model)
    assert same_weights(net, zoo.as_kept(NAME, copy.deepcopy(done.net))) and net.words == done.net.words


def test_the_embedded_model_loads_by_its_name(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, card = saved
    monkeypatch.setitem(zoo.RECIPES, NAME, recipe.__name__)
    monkeypatch.setattr(zoo, "WEIGHTS", folder)
    monkeypatch.setattr(zoo, "CARDS", folder)
    monkeypatch.setattr(zoo.card, "__defaults__", (folder,))
    model = zoo.load(NAME, "cpu")
    assert isinstance(model, pretrained.Pretrained) and model.words == frozenset(card["words"])
    assert isinstance(zoo.read(NAME), nets.MiniSD) and zoo.available(NAME)
    with pytest.warns(UserWarning, match="never saw 'zebra'"):
        model.embed(["a zebra"])
    path = folder / NAME / "vae" / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(zoo.ZooError, match="vae/diffusion_pytorch_model.safetensors .* has sha256"):
        zoo.load(NAME, "cpu")
    path.write_bytes(data)


# --- judging -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(done) -> pretrained.Pretrained:
    return wrap(copy.deepcopy(done.net).pipeline(), NAME, frozenset(vocabulary()))


SIX = captions(draw(6, 8, (1, 2)), 1)


@pytest.mark.parametrize("half", [False, True])
def test_a_picture_does_not_depend_on_its_batch(half: bool, model, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 kernels may add up in another order: 1e-4. In bfloat16 a unit is 2^-8, which guidance at 3 times 2 steps carry to
    2 * 3 - 1 units a step; pictures lie in [-1, 1], and another noise or prompt changes them by tenths."""
    if not half:
        monkeypatch.setattr(judge_scenes, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    whole = judge_scenes.generate(model, SIX, 3.0, seed=4, steps=2)
    assert whole.shape == (6, 3, 64, 64) and whole.dtype == torch.float32
    assert float(whole.min()) >= -1 and float(whole.max()) <= 1
    monkeypatch.setattr(judge_scenes, "BATCH", 4)
    tolerance = 2 * 5 * 2**-8 if half else 1e-4
    pieces = judge_scenes.generate(model, SIX, 3.0, seed=4, steps=2)
    assert float((pieces - whole).abs().max()) <= tolerance
    other = judge_scenes.generate(model, SIX[:1], 3.0, seed=5, steps=2)
    assert float((other[0] - whole[0]).abs().max()) > 2 * tolerance
    apart = (whole[:, None] - whole[None]).abs().amax((2, 3, 4))[~torch.eye(6, dtype=torch.bool)]
    assert float(apart.min()) > 2 * tolerance


def test_reconstructions_are_those_of_the_mean(model) -> None:
    x = render(draw(3, 4)).rgb
    found = judge_scenes.reconstruct(model, x)
    with torch.no_grad():
        expected = model.decode(model.encode(x))
    assert found.shape == x.shape and found.dtype == torch.float32
    assert float((found - expected).abs().max()) <= 20 * 2**-8  # bfloat16, some twenty layers deep


def test_rates_leave_out_what_no_prompt_names() -> None:
    nan = float("nan")
    found = {"shape": torch.tensor([1.0, 0.0, nan]), "view": torch.tensor([nan, nan, nan]), "all": torch.tensor([1.0, 0.0, 0.0])}
    assert judge_scenes._rates(found) == {"shape": 0.5, "all": 0.3333}


def test_guidance_is_chosen_by_the_share_of_pictures_that_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures stand for their guidance here; the reader finds more of them right at 2 than anywhere else."""
    monkeypatch.setattr(judge_scenes, "VALIDATION", ("some", 8, 9_100, 1, "train"))
    monkeypatch.setattr(judge_scenes, "generate", lambda model, prompts, w, **_: torch.full((len(prompts),), w))

    def obeys(pictures: Tensor, wanted: list) -> dict[str, Tensor]:
        right = 6 if float(pictures[0]) == 2 else 4
        assert len(pictures) == len(wanted) == 8
        return {"all": (torch.arange(8) < right).float()}

    chosen = judge_scenes.choose_guidance(None, SimpleNamespace(obeys=obeys))
    assert chosen["guidance"] == 2.0
    assert chosen["validation"] == {f"{w:g}": 0.75 if w == 2 else 0.5 for w in judge_scenes.GUIDANCES}
