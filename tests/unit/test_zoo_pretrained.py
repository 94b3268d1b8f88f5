"""Pipelines from a folder: what is loaded, what is refused and in which words, prompts, pictures and noise levels.

That the numbers are those of diffusers is tests/parity/test_pipelines.py.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from course_lib import zoo
from course_lib.denoisers import from_diffusers
from course_lib.zoo import folders, pretrained
from tests import pipelines
from tests.pipelines import PROMPTS, STABLE, TOKENS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder for each kind, for tests that only read."""
    folder = tmp_path_factory.mktemp("pipelines")
    pipelines.stable_diffusion().save_pretrained(folder / "sd")
    pipelines.stable_diffusion_xl().save_pretrained(folder / "xl")
    pipelines.stable_diffusion_3().save_pretrained(folder / "sd3")
    pipelines.ddpm().save_pretrained(folder / "ddpm")
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the first that a test may damage."""
    return shutil.copytree(saved / "sd", tmp_path / "sd")


def refused(folder, *said):
    with pytest.raises(zoo.ZooError) as info:
        zoo.load(str(folder), device="cpu")
    message = str(info.value)
    assert "\n" not in message
    for words in said:
        assert words in message, message


# --- what is loaded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "pixels", "parts"),
    [
        ("sd", (4, 8, 8), 16, {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}),
        ("xl", (4, 8, 8), 16, {"unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}),
        ("sd3", (4, 8, 8), 16, {"transformer", "vae", "text_encoder_3", "tokenizer_3", "scheduler"}),
        ("ddpm", (3, 8, 8), 8, {"unet", "scheduler"}),
    ],
)
def test_a_folder_loads(name, shape, pixels, parts, saved):
    model = zoo.load(str(saved / name), device="cpu")
    assert model.shape == shape and model.pixels == pixels
    assert parts <= {part for part, value in model.components.items() if value is not None}
    for part in model.components.values():
        if isinstance(part, torch.nn.Module):
            assert not part.training
            assert all(p.dtype == torch.float32 and not p.requires_grad for p in part.parameters())
    assert model.to("cpu") is model and model.device == torch.device("cpu")
    assert model.net is model.components["transformer" if name == "sd3" else "unet"]
    table = model.scheduler.alphas_cumprod.double()[-1] if name != "sd3" else None
    assert model.sigma_max == (1e6 if table is None else pytest.approx(float(((1 - table) / table).sqrt()), rel=1e-9))


def test_a_pipeline_in_memory_is_frozen():
    """As one is that was just trained."""
    pipeline = pipelines.stable_diffusion()
    pipeline.unet.train()
    model = pretrained.wrap(pipeline, "trained")
    assert model.net is pipeline.unet and not model.net.training
    assert not any(p.requires_grad for p in model.net.parameters())


def test_half_precision_is_read_to_single(saved, tmp_path):
    """The embedded pipeline is stored so; what is loaded are its half-precision numbers, in fp32."""
    pipeline = pipelines.stable_diffusion()
    for part in ("unet", "vae", "text_encoder"):
        getattr(pipeline, part).half()
    pipeline.save_pretrained(tmp_path)
    model = zoo.load(str(tmp_path), device="cpu")
    full = zoo.load(str(saved / "sd"), device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        expected = full.components[part].state_dict()
        for key, value in model.components[part].state_dict().items():
            assert_close(value, expected[key].half().float() if value.is_floating_point() else expected[key], rtol=0, atol=0)
    assert folders.memory_needed(tmp_path) == folders.memory_needed(saved / "sd")


@pytest.mark.parametrize("name", ["sd", "xl", "sd3", "ddpm"])
def test_memory_is_that_of_all_weights(name, saved):
    parts = zoo.load(str(saved / name), device="cpu").components.values()
    networks = [part for part in parts if isinstance(part, torch.nn.Module)]
    count = sum(p.numel() for net in networks for p in net.parameters())
    buffers = sum(b.numel() for net in networks for b in net.buffers())  # some are saved, some are not
    assert 4 * count <= folders.memory_needed(saved / name) <= 4 * (count + buffers)


def test_weights_in_parts(damaged):
    """Large networks are saved in several files and an index."""
    unet = zoo.load(str(damaged), device="cpu").components["unet"]
    whole = folders.memory_needed(damaged)
    (damaged / "unet/diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(damaged / "unet", max_shard_size="20KB")
    parts = sorted((damaged / "unet").glob("*.safetensors"))
    assert len(parts) > 1
    assert folders.memory_needed(damaged) == whole
    again = zoo.load(str(damaged), device="cpu").components["unet"]
    assert_close(again.state_dict(), unet.state_dict(), rtol=0, atol=0)
    parts[1].unlink()
    refused(damaged, f"has no unet/{parts[1].name}")


def test_importing_the_zoo_is_light():
    code = (
        "import sys, course_lib.zoo, course_lib.zoo.hub, course_lib.zoo.folders, course_lib.zoo.pretrained; "
        "print(*sorted({'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_loading_shows_no_progress_bar(saved, capfd):
    zoo.load(str(saved / "sd"), device="cpu")
    shown = capfd.readouterr()
    assert "it/s" not in shown.out + shown.err


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_pipeline(tmp_path, damaged):
    refused(tmp_path, "is no pipeline: it has no model_index.json", "save_pretrained")
    (damaged / "model_index.json").write_text("{")
    refused(damaged, "model_index.json", "is damaged")
    refused(tmp_path / "absent", "is a path where no folder is")


def test_a_pipeline_of_another_class(damaged):
    index = json.loads((damaged / "model_index.json").read_text())
    (damaged / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    refused(damaged, "is a KandinskyPipeline; expected one of", *pretrained.SUPPORTED)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "has no unet/diffusion_pytorch_model.safetensors"),
        ("text_encoder/model.safetensors", "has no text_encoder/model.safetensors"),
        ("unet/config.json", "cannot be read"),
    ],
)
def test_missing_files(lost, said, damaged):
    (damaged / lost).unlink()
    refused(damaged, said)


def test_a_missing_component(damaged):
    shutil.rmtree(damaged / "vae")
    refused(damaged, "has no vae/")


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_damaged_weights(kept, damaged):
    """Cut to nothing, inside the length of the header, inside the header, and by one byte."""
    path = damaged / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(damaged, "vae" if kept >= 0 else "cannot be read")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor(part, damaged):
    """Both libraries would go on, with random numbers or none in its place."""
    path = next((damaged / part).glob("*.safetensors"))
    state = load_file(path)
    gone = sorted(key for key in state if key.endswith("weight"))[3]
    save_file({key: value for key, value in state.items() if key != gone}, path, {"format": "pt"})
    refused(damaged, f"the weights of {part} lack 1 tensors, the first {gone}")


def test_too_little_memory(saved, monkeypatch):
    needed = folders.memory_needed(saved / "sd")
    monkeypatch.setattr(folders, "memory_free", lambda: needed)
    zoo.load(str(saved / "sd"), device="cpu")
    monkeypatch.setattr(folders, "memory_free", lambda: needed - 1)
    refused(saved / "sd", "GB of memory in fp32", "are free", "zoo.load('mini-sd')")


def test_memory_free_is_what_the_system_says():
    total = 2**40
    assert 2**20 < folders.memory_free() < total


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler"),
        (DDIMScheduler(**STABLE, rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
        (DDIMScheduler(**{**STABLE, "prediction_type": "noise"}), "prediction_type = 'noise'"),
        (EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type = 'continuous'"),
    ],
)
def test_a_scheduler_that_no_adapter_takes(scheduler, said, damaged):
    shutil.rmtree(damaged / "scheduler")
    pipeline = pipelines.stable_diffusion(scheduler=scheduler)
    pipeline.save_pretrained(damaged)
    refused(damaged, "cannot be a Denoiser", said)


def test_a_network_that_is_told_its_guidance():
    pipeline = pipelines.stable_diffusion()
    pipeline.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(zoo.ZooError, match="time_cond_proj_dim"):
        pretrained.wrap(pipeline, "distilled")


def test_times_that_are_not_those_of_the_trained_steps():
    with pytest.raises(ValueError, match="timestep_type = 'continuous'; expected 'discrete'"):
        from_diffusers(pipelines.unet(16), EulerDiscreteScheduler(timestep_type="continuous"))


def test_an_unknown_name_is_no_hub_id():
    with pytest.raises(zoo.ZooError, match="did you mean 'digits'"):
        zoo.load("digitz")
    assert not zoo.available("digitz")


# --- hashes, and the embedded pipeline ---------------------------------------------------------------------------------


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_file_is_verified(damaged):
    files = hashes(damaged)
    folders.verify_folder(damaged, files)
    for name in files:
        path = damaged / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(zoo.ZooError, match=f"file {name} of .* damaged or replaced"):
            folders.verify_folder(damaged, files)
        path.unlink()
        with pytest.raises(zoo.ZooError, match=f"file {name} of .* is missing"):
            folders.verify_folder(damaged, files)
        path.write_bytes(data)


@pytest.fixture
def embedded(saved, tmp_path, monkeypatch):
    """The zoo with one embedded pipeline, `pocket`."""
    weights, cards = tmp_path / "weights", tmp_path / "cards"
    shutil.copytree(saved / "sd", weights / "pocket")
    cards.mkdir()
    facts = {"name": "pocket", "files": hashes(weights / "pocket"), "words": ["a", "red", "cube"]}
    (cards / "pocket.json").write_text(json.dumps(facts))
    monkeypatch.setitem(zoo.RECIPES, "pocket", "course_lib.zoo.recipes.digits")
    monkeypatch.setattr(zoo, "WEIGHTS", weights)
    monkeypatch.setattr(zoo, "CARDS", cards)
    monkeypatch.setattr(zoo.weights_path, "__defaults__", (weights,))
    monkeypatch.setattr(zoo.card, "__defaults__", (cards,))
    return weights / "pocket"


def test_an_embedded_pipeline(embedded):
    assert zoo.available("pocket")
    model = zoo.load("pocket", device="cpu")
    assert model.name == "pocket" and model.words == {"a", "red", "cube"}
    (embedded / "unet/config.json").write_text("{}")
    with pytest.raises(zoo.ZooError, match=r"file unet/config.json of .* sha256"):
        zoo.load("pocket", device="cpu")
    shutil.rmtree(embedded)
    assert not zoo.available("pocket")


# --- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("sd", {"encoder_hidden_states": (2, TOKENS, 16)}),
        ("xl", {"encoder_hidden_states": (2, TOKENS, 32), "text_embeds": (2, 16), "time_ids": (2, 6)}),
        ("sd3", {"encoder_hidden_states": (2, TOKENS + 256, 40), "pooled_projections": (2, 32)}),
    ],
)
def test_the_condition_is_flat(name, shapes, saved):
    model = zoo.load(str(saved / name), device="cpu")
    found = model.embed(PROMPTS)
    assert {key: tuple(value.shape) for key, value in found.items()} == shapes
    one = model.embed(PROMPTS[0])
    assert all(value.shape[0] == 1 for value in one.values())
    x = torch.randn(2, *model.shape)
    D = model.denoiser.given(**found)(x, torch.tensor(3.0))
    assert_close(D[:1], model.denoiser.given(**one)(x[:1], torch.tensor(3.0)), rtol=1e-4, atol=1e-5)


def test_the_empty_prompt_of_xl(saved):
    model = zoo.load(str(saved / "xl"), device="cpu")
    found = model.embed(["", "a red cube"])
    for key in ("encoder_hidden_states", "text_embeds"):
        assert not bool(found[key][0].any()) and bool(found[key][1].any())
    assert found["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert model.embed([""], size=(32, 24))["time_ids"].tolist() == [[32, 24, 0, 0, 32, 24]]


@pytest.mark.parametrize("name", ["sd", "xl", "sd3"])
def test_a_prompt_is_never_cut(name, saved):
    model = zoo.load(str(saved / name), device="cpu")
    fits = "red " * (TOKENS - 2)
    model.embed([fits])
    with pytest.raises(zoo.ZooError, match=f"has {TOKENS + 1} tokens .* at most {TOKENS} for the tokenizer of model") as info:
        model.embed(["a red cube", fits + "red"])
    assert isinstance(info.value, ValueError) and "\n" not in str(info.value)


def test_the_second_and_third_tokenizers_have_their_own_limits(saved, monkeypatch):
    xl = zoo.load(str(saved / "xl"), device="cpu")
    xl.components["tokenizer_2"].model_max_length = 5
    with pytest.raises(zoo.ZooError, match="has 6 tokens .* at most 5 for the tokenizer_2"):
        xl.embed(["red red red red"])
    monkeypatch.setattr(pretrained, "T5_TOKENS", 7)
    with pytest.raises(zoo.ZooError, match="has .* at most 7 for the tokenizer_3"):
        zoo.load(str(saved / "sd3"), device="cpu").embed(["red cube"])


def test_a_model_without_text(saved):
    model = zoo.load(str(saved / "ddpm"), device="cpu")
    with pytest.raises(zoo.ZooError, match="takes no text"):
        model.embed(["a red cube"])


def test_words_that_the_tokenizer_never_saw(saved):
    model = pretrained.load(saved / "sd", "pocket", "cpu", words=frozenset({"a", "red", "cube", ","}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.embed(["A red cube, a cube", ""])
    with pytest.warns(UserWarning, match="'pocket' never saw 'dog', 'purple'; the words that it knows: a, cube, red") as caught:
        model.embed(["a purple dog"])
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        model.embed(["a purple dog"])
        zoo.load(str(saved / "sd"), device="cpu").embed(["a purple dog"])  # a tokenizer that spells any word
    with pytest.warns(UserWarning, match="never saw 'cat';"):
        model.embed(["a purple cat"])


# --- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "xl", "sd3"])
def test_decode_undoes_the_scaling_of_encode(name, saved):
    """Between them is the VAE alone: decode(encode(x)) is its own reconstruction."""
    model = zoo.load(str(saved / name), device="cpu")
    images = torch.randn(2, 3, 16, 16).clamp(-1, 1)
    z = model.encode(images)
    assert z.shape == (2, *model.shape)
    expected = model.vae(images, sample_posterior=False).sample
    # the latent is shifted, scaled and taken back in fp32, and what is lost, 2^-23 of it, passes the decoder
    assert_close(model.decode(z, clamp=False), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert_close(model.decode(z), expected.clamp(-1, 1), rtol=0, atol=1e-5)
    posterior, noise = model.vae.encode(images).latent_dist, torch.randn(2, *model.shape)
    scale = model.vae.config.scaling_factor
    assert_close(model.encode(images, noise) - z, scale * posterior.std * noise, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_both(saved):
    """Score distillation goes back through the encoder, guidance by a picture through the decoder."""
    model = zoo.load(str(saved / "sd"), device="cpu")
    images = torch.zeros(1, 3, 16, 16, requires_grad=True)
    model.decode(model.encode(images), clamp=False).sum().backward()
    assert bool(images.grad.abs().sum() > 0)


@pytest.mark.parametrize("shape", [(1, 3, 16, 15), (1, 3, 17, 16), (3, 16, 16)])
def test_sides_that_the_vae_cannot_take(shape, saved):
    model = zoo.load(str(saved / "sd"), device="cpu")
    with pytest.raises(zoo.ZooError, match=r"images has shape .* multiples of 2"):
        model.encode(torch.zeros(shape))
    model.encode(torch.zeros(1, 3, 18, 22))


def test_pixels_are_left_alone(saved):
    model = zoo.load(str(saved / "ddpm"), device="cpu")
    images = torch.randn(2, 3, 8, 8)
    assert model.factor == 1 and model.vae is None
    assert_close(model.encode(images), images, rtol=0, atol=0)
    assert_close(model.decode(images, clamp=False), images, rtol=0, atol=0)
    assert_close(model.decode(images), images.clamp(-1, 1), rtol=0, atol=0)


# --- noise levels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -3, 1001])
def test_as_many_steps_as_were_trained(n, saved):
    model = zoo.load(str(saved / "sd"), device="cpu")
    with pytest.raises(ValueError, match=f"n = {n}; expected from 1 to 1000 steps"):
        model.sigmas(n)


def test_all_trained_steps(saved):
    """Stable Diffusion's offset of one time puts the first of 1000 steps beyond the table: it counts as the last entry."""
    model = zoo.load(str(saved / "sd"), device="cpu")
    assert_close(model.sigmas(1000), model.schedule.sigma(torch.arange(1000)).flip(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sd", "sd3", "ddpm"])
def test_start_and_finish_are_inverse(name, saved):
    """Without a step in between the pipeline would return its own noise."""
    model = zoo.load(str(saved / name), device="cpu")
    noise = torch.randn(2, *model.shape)
    top = model.sigmas(10)[0]
    assert_close(model.finish(model.start(noise, top), top), noise)
    assert model.start(noise, top).std() > 0.9 * float(top)  # x = x0 + sigma eps: nearly all is noise
    assert_close(model.finish(noise, 0.0), noise, rtol=0, atol=0)


def test_the_models_own_scheduler_is_left_as_it_was(saved):
    model = zoo.load(str(saved / "sd"), device="cpu")
    before = model.scheduler.timesteps.clone()
    model.sigmas(7)
    assert torch.equal(model.scheduler.timesteps, before)
