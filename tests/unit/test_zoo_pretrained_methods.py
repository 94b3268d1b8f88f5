"""What a loaded pipeline does: prompts, pictures and noise levels.

That the numbers are those of diffusers is tests/parity/test_pipelines.py.
"""

import warnings

import pytest
import torch
from torch.testing import assert_close

from course_lib import zoo
from course_lib.zoo import pretrained
from tests import pipelines
from tests.pipelines import PROMPTS, TOKENS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One folder for each kind, for tests that only read."""
    return pipelines.save_each(tmp_path_factory.mktemp("pipelines"))


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


def test_latents_that_the_model_cannot_decode(saved):
    model = zoo.load(str(saved / "sd"), device="cpu")
    z = torch.randn(1, *model.shape)
    with pytest.raises(zoo.ZooError, match=r"latents has shape .*; expected \(B, 4, h, w\) for model"):
        model.decode(z[:, :3])
    with pytest.raises(zoo.ZooError, match=r"latents is on meta, .* on cpu; expected one device"):
        model.decode(z.to("meta"))
    with pytest.warns(UserWarning, match=r"latents has the deviation .*; expected about 1, as `encode`") as caught:
        model.decode(5.5 * torch.ones_like(z))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.decode(z)


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
