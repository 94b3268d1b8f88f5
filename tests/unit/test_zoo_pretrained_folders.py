"""Pipelines from a folder: what is loaded, what is refused and in which words."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from course_lib import zoo
from course_lib.denoisers import from_diffusers
from course_lib.zoo import folders, pretrained
from tests import pipelines
from tests.pipelines import STABLE


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder for each kind, for tests that only read."""
    return pipelines.save_each(tmp_path_factory.mktemp("pipelines"))


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
    assert shown.out + shown.err == ""


def test_loading_says_nothing_and_other_warnings_stay(saved):
    """In a process of its own: what transformers says when diffusers imports it is said once in a process."""
    code = f"""
import logging
from course_lib import zoo
for name in ("sd", "xl", "sd3"):
    zoo.load({str(saved)!r} + "/" + name, device="cpu")
logging.getLogger("transformers.utils.import_utils").warning("another warning")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == "[transformers] another warning\n"


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
