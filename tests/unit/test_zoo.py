"""The zoo: loading is hash-checked and says in one line what is wrong; cards hold what they must; recipes run and resume."""

import json
import math
import re
import shutil

import pytest
import torch

from course_lib import zoo
from course_lib.schedules import karras
from course_lib.worlds import digits
from course_lib.zoo.recipes import digits as recipe
from course_lib.zoo.train import train


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The zoo's files in a folder that a test may damage."""
    for kind in ("WEIGHTS", "CARDS"):
        folder = tmp_path / kind
        shutil.copytree(getattr(zoo, kind), folder)
        monkeypatch.setattr(zoo, kind, folder)
    monkeypatch.setattr(zoo.weights_path, "__defaults__", (tmp_path / "WEIGHTS",))
    monkeypatch.setattr(zoo.card, "__defaults__", (tmp_path / "CARDS",))
    return tmp_path / "WEIGHTS"


@pytest.mark.parametrize("name", zoo.names())
def test_models_load_and_their_cards_are_complete(name):
    zoo.load(name, device="cpu")
    card = zoo.card(name)
    for key in ("name", "command", "data", "parameters", "steps", "seconds", "hardware", "date", "metrics", "sha256", "bytes"):
        assert card[key], key
    assert card["command"].startswith(f"course train {name}")
    threads = int(re.search(r"(\d+) threads?", card["hardware"])[1])
    stages = card.get("seconds_of_stages", {"all": card["seconds"]})  # of a model of several networks, each
    assert max(stages.values()) * threads <= 2 * 60 * 60 * card["command"].count("course train")  # an hour on two cores each
    assert sum(stages.values()) == pytest.approx(card["seconds"], abs=len(stages))
    assert card["parameters"] == zoo.parameters(zoo.read(name))


def test_every_recipe_has_its_model():
    """A card that is lost would take its model out of every other test."""
    assert set(zoo.RECIPES) == set(zoo.names())


def test_a_model_without_a_card_says_how_to_train_it(copy):
    (copy.parent / "CARDS" / "digits.json").unlink()
    with pytest.raises(zoo.ZooError, match=r"'digits' has no card at .*; run `course train digits`"):
        zoo.load("digits")


def test_readers_read_held_out_digits_and_confirm_each_other():
    accuracy = []
    images, labels = digits.load("test")
    for name in ("digits-reader", "digits-reader-2"):
        reader = zoo.load(name, device="cpu")
        with torch.no_grad():
            accuracy.append(float((reader(images).argmax(1) == labels).double().mean()))
        assert accuracy[-1] == pytest.approx(zoo.card(name)["metrics"]["accuracy_held_out"], abs=0.003)  # one image of 360
    assert accuracy[0] >= 0.95
    assert abs(accuracy[0] - accuracy[1]) <= 0.02
    assert type(zoo.load("digits-reader")) is not type(zoo.load("digits-reader-2"))


def reaches(quality):
    """Precise, diverse, and no copy."""
    return quality["precision"] >= 0.88 and quality["recall"] >= 0.85 and quality["nearest_training_distance_ratio"] >= 0.85


def test_digits_card_reaches_what_it_must():
    """The numbers that the recipe measured; `test_digits_samples` draws afresh."""
    m = zoo.card("digits")["metrics"]
    assert m["guidance"] == 1.0 and "50 steps" in m["sampler"]
    assert all(share >= 0.95 for share in m["class_read_as_asked"].values())
    quality, references = m["quality_at_guidance_1"], m["references"]
    assert reaches(quality)
    assert quality["frechet"] <= references["real half against half"]["frechet"]
    low, high = quality["frechet_interval"]
    assert low < quality["frechet"] < high
    # both references pass for real by Frechet distance, and each falls to another judge
    for name, fault in (("Gaussian per class", "precision"), ("kernel density", "nearest_training_distance_ratio")):
        assert references[name]["frechet"] <= references["real half against half"]["frechet"]
        assert not reaches(references[name]) and references[name][fault] < quality[fault] - 0.1
    histogram = torch.tensor(m["unconditional_class_histogram"])
    assert histogram.sum() >= 5000 and float(histogram.min() / histogram.sum()) > 0.05  # a tenth each, half of it at the least
    for train_loss, test_loss in zip(m["loss_train"], m["loss_held_out"], strict=True):
        assert test_loss <= 1.5 * train_loss  # no sigma at which the training set is known by heart
    empirical = zip(m["loss_empirical_denoiser_train"][:3], m["loss_empirical_denoiser_held_out"][:3], strict=True)
    assert all(test_loss > 10 * train_loss for train_loss, test_loss in empirical)  # the control is known by heart


def test_digits_samples():
    """A fresh draw from the committed weights: 200 digits, read as asked in at least 95 % less 3 standard errors."""
    from course_lib.zoo.judge_digits import copying, draw, grey

    D, reader = zoo.load("digits", device="cpu"), zoo.load("digits-reader", device="cpu")
    asked = torch.arange(200) % 10
    samples = draw(D, asked, recipe.grid(), guidance=recipe.GUIDANCE, seed=77)
    share = float((reader(samples).argmax(1) == asked).double().mean())
    assert share >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 200)
    assert 0.7 <= copying(grey(samples)) <= 1.2
    assert copying(grey(digits.load("train")[0][:200])) == 0  # copies are seen


def test_the_grid_shrinks_samples_less():
    """What the recipe says of its grid: DDIM multiplies a Gaussian's deviation by prod (s^2 + sigma sigma') / (s^2 + sigma^2)."""

    def kept(sigmas, s):
        product = 1.0
        for a, b in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            product *= (s * s + a * b) / (s * s + a * a)
        return product / math.sqrt(s * s / (s * s + float(sigmas[0]) ** 2))

    s = float(digits.load("train")[0].std())
    assert 1 - kept(recipe.grid(50), s) == pytest.approx(0.035, abs=0.003)
    assert 1 - kept(karras(50, 0.002, 40.0), s) == pytest.approx(0.05, abs=0.003)


def test_damaged_weights_are_one_clear_line(copy):
    path = copy / "digits-reader.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(zoo.ZooError, match="sha256 .* the file is damaged or replaced; run `git checkout") as error:
        zoo.load("digits-reader")
    assert "\n" not in str(error.value)


def test_truncated_weights_with_a_matching_hash_are_one_clear_line(copy):
    import hashlib

    path = copy / "digits-reader.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    card_path = copy.parent / "CARDS" / "digits-reader.json"
    card = json.loads(card_path.read_text())
    card_path.write_text(json.dumps({**card, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    with pytest.raises(zoo.ZooError, match="not a safetensors file") as error:
        zoo.load("digits-reader")
    assert "\n" not in str(error.value)


def test_missing_weights_and_unknown_names(copy):
    (copy / "digits.safetensors").unlink()
    assert not zoo.available("digits")
    with pytest.raises(zoo.ZooError, match="missing .* `course train digits`"):
        zoo.load("digits")
    with pytest.raises(zoo.ZooError, match="did you mean 'digits-reader'"):
        zoo.load("digit-reader")


def test_saving_is_atomic(copy, monkeypatch):
    before = (copy / "digits-reader.safetensors").read_bytes()
    net = zoo.read("digits-reader")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        zoo.save("digits-reader", net, {}, copy, copy.parent / "CARDS")
    assert (copy / "digits-reader.safetensors").read_bytes() == before
    assert not list(copy.glob(".*tmp"))


@pytest.mark.parametrize("name", [name for name in zoo.names() if name != "mini-sd"])
def test_recipes_resume_bit_for_bit(name, tmp_path, monkeypatch):
    """Six steps at once equal three steps, an interruption, and three more. Of mini-sd `steps` counts the last stage alone.

    A recipe that first renders and encodes all of its scenes or clips, for minutes, draws here from the first few of them.
    """
    module, options = zoo.recipe(name), {"steps": 6, "progress": False}
    for owner in (module, zoo.recipe("mini-video")):
        for constant, few in (("SCENES", 200), ("CLIPS", 40), ("LORA_CLIPS", 40)):
            if isinstance(getattr(owner, constant, None), int):
                monkeypatch.setattr(owner, constant, few)
    whole = module.train(name, **options)
    module.train(name, **options, stop_at=3, checkpoint=tmp_path / "run.ckpt")
    resumed = module.train(name, **options, checkpoint=tmp_path / "run.ckpt")
    assert whole.losses == resumed.losses and len(whole.losses) == 6
    for a, b in zip(whole.net.state_dict().values(), resumed.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_train_command_writes_weights_and_card_beside_the_zoo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = train("digits-reader", steps=4)
    card = json.loads((path.parent / "digits-reader.json").read_text())
    assert path.is_relative_to("runs") and card["command"] == "course train digits-reader --steps 4" and card["steps"] == 4
    assert not (tmp_path / "runs" / "digits-reader.ckpt").exists()
    before = zoo.card("digits-reader")
    path = train("digits-reader", steps=2, start="zoo", out=tmp_path)
    card = json.loads((tmp_path / "digits-reader.json").read_text())
    assert card["command"] == "course train digits-reader && course train digits-reader --from zoo --steps 2"
    assert card["steps"] == before["steps"] + 2 and card["metrics"]["accuracy_held_out"] > 0.9
    with pytest.raises(ValueError, match="expected 'zoo'"):
        train("digits-reader", start="elsewhere")
