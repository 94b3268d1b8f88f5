"""ControlNet beside diffusers': the same residuals from the same weights, and a pipeline taken apart gives the same latents."""

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
)
from torch import nn

from course_lib import zoo
from course_lib.guidance import cfg
from course_lib.guidance.controls import sigma_interval, within
from course_lib.nets import mini_sd
from course_lib.nets.control import Controlled, control_of, controlled, from_diffusers, guess, scaled, to_diffusers
from course_lib.nets.unet import UNet
from course_lib.sample import sample
from course_lib.steps import ddim
from tests import pipelines
from tests.stable_like import CLOSE, stable_like

B, STEPS, GUIDANCE, SCALE = 2, 5, 3.0, 0.7
PROMPTS = ["a red cube", "a blue ball"]

UNETS = {
    "like Stable Diffusion 1.5": stable_like,
    "like Stable Diffusion 2.1": lambda: stable_like(attention_head_dim=(2, 4, 4), use_linear_projection=True),
    "plain blocks first": lambda: stable_like(
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "mini-sd": lambda: mini_sd.unet((32, 64)).eval(),
}
unets = pytest.mark.parametrize("kind", UNETS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(n, seed=0, side=64):
    """Squares of one colour, since what differs from pixel to pixel is lost in a random hint encoder."""
    return (
        torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        .repeat_interleave(side // 4, 2)
        .repeat_interleave(side // 4, 3)
    )


def moved(net: nn.Module, by=0.1, seed=0) -> nn.Module:
    """Every weight moved, the zero convolutions too; frozen."""
    for k, p in enumerate(net.parameters()):
        p.data += by * normal(*p.shape, seed=1000 * seed + k)
    return net.requires_grad_(False).eval()


def inputs(unet):
    text = normal(B, 5, unet.config.cross_attention_dim, seed=3)
    return normal(B, 4, 8, 8, seed=1), torch.tensor([17.0, 650.0]), text, maps(B)


def theirs_of(model, unet, **options):
    x, time, text, c = inputs(unet)
    down, middle = model(x, time, encoder_hidden_states=text, controlnet_cond=c, return_dict=False, **options)
    return [*down, middle]


def ours_of(control, unet):
    x, time, text, c = inputs(unet)
    return control(x, time, c, encoder_hidden_states=text)


def same(found, expected, close=CLOSE):
    """Of each tensor, relative to its largest entry."""
    for a, b in zip(found, expected, strict=True):
        a, b = a.detach(), b.detach()
        assert a.shape == b.shape and float(b.abs().max()) > 0
        assert float((a - b).abs().max()) < close * float(b.abs().max())


# --- the network -------------------------------------------------------------------------------------------------------


@unets
def test_ours_as_theirs(kind):
    unet = UNETS[kind]()
    control = moved(control_of(unet))
    model = to_diffusers(control, unet)
    assert isinstance(model, ControlNetModel)
    same(ours_of(control, unet), theirs_of(model, unet))
    x, time, text, c = inputs(unet)
    with pytest.raises(AssertionError):  # each sample has its own map
        same(control(x, time, c.flip(0), encoder_hidden_states=text), theirs_of(model, unet))
    assert sum(p.numel() for p in control.parameters()) == sum(p.numel() for p in model.parameters())


@unets
@pytest.mark.parametrize("widths", [(16, 32, 96, 256), (4, 8, 8, 12)])
def test_theirs_as_ours_and_back(kind, widths, tmp_path):
    """One that diffusers made and saved, with the hint encoder of Stable Diffusion's controls and with another."""
    unet = UNETS[kind]()
    moved(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths), seed=4).save_pretrained(tmp_path)
    model = ControlNetModel.from_pretrained(tmp_path).requires_grad_(False).eval()
    control = from_diffusers(model)
    assert (control.channels, control.factor) == (3, 8)
    expected = theirs_of(model, unet)
    same(ours_of(control, unet), expected)
    again = to_diffusers(control, unet)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    same(theirs_of(again, unet), expected)


def test_maps_of_one_channel():
    unet = stable_like()
    control = moved(control_of(unet, channels=1))
    x, time, text, c = inputs(unet)
    down, middle = to_diffusers(control, unet)(x, time, text, c[:, :1], return_dict=False)
    same(control(x, time, c[:, :1], encoder_hidden_states=text), [*down, middle])


@unets
def test_the_comparison_sees_a_zero_convolution_in_another_place(kind):
    """Exchanging two that have the same width is a mistake that no shape tells."""
    unet = UNETS[kind]()
    control = moved(control_of(unet))
    model = to_diffusers(control, unet)
    first, second = control.zeros[0], control.zeros[1]
    control.zeros[0], control.zeros[1] = second, first
    with pytest.raises(AssertionError):
        same(ours_of(control, unet), theirs_of(model, unet))


@unets
def test_guess_mode_has_their_scales(kind):
    unet = UNETS[kind]()
    control = moved(control_of(unet))
    model = to_diffusers(control, unet)
    expected = theirs_of(model, unet, guess_mode=True, conditioning_scale=SCALE)
    same(scaled(ours_of(control, unet), guess(len(control.zeros), SCALE)), expected)


@unets
def test_their_network_is_controlled_as_they_control_it(kind):
    unet = moved(UNETS[kind](), by=0.01)
    control = moved(control_of(unet))
    down, middle = (r := theirs_of(to_diffusers(control, unet), unet, conditioning_scale=SCALE))[:-1], r[-1]
    x, time, text, c = inputs(unet)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    expected = unet(x, time, text, return_dict=False, **residuals)[0]
    D = zoo_denoiser(unet)
    ours = controlled(D, edge=control).given(edge=c, edge_scale=torch.tensor([SCALE]), encoder_hidden_states=text)
    assert isinstance(ours.net, Controlled)
    with torch.no_grad():
        same([ours.net(x, time, **ours.condition)], [expected])


def zoo_denoiser(unet):
    from course_lib.denoisers import from_diffusers as denoiser_of

    return denoiser_of(unet, DDIMScheduler())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"controlnet_conditioning_channel_order": "bgr"}, "controlnet_conditioning_channel_order = 'bgr'; expected 'rgb'"),
        ({"global_pool_conditions": True}, "global_pool_conditions = True; expected False"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'; expected None"),
        ({"encoder_hid_dim": 7}, "encoder_hid_dim = 7; expected None"),
    ],
)
def test_controls_of_other_kinds_are_refused(options, said):
    settings = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
    }
    with pytest.raises(ValueError, match=f"model has {said}"):
        from_diffusers(ControlNetModel(**settings, **options))


def test_a_control_of_the_readable_unet_has_no_like_there():
    unet = UNet(widths=(16,), blocks=1)
    with pytest.raises(ValueError, match="control copies a UNet; expected one of diffusers' UNet2DConditionModel"):
        to_diffusers(control_of(unet), unet)


# --- the pipeline --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return zoo.load("mini-sd", device="cpu")


@pytest.fixture(scope="module")
def controls(model):
    """Two controls of mini-sd, pushed so far from 0 that their pictures are others, and others for another map."""
    made = [moved(control_of(model.net, seed=seed), by=0.03, seed=seed) for seed in (1, 2)]
    for control in made:
        moved(control.hint, by=0.15)
    return made


def pipeline(model, controls):
    made = [to_diffusers(control, model.net) for control in controls]
    parts = {name: part for name, part in model.components.items() if name != "image_encoder"}
    chosen = made[0] if len(made) == 1 else MultiControlNetModel(made)
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=chosen, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def called(model, controls, noise, c, output_type="latent", scale=SCALE, **options):
    """The latents, or the pictures, of their pipeline."""
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "controlnet_conditioning_scale": scale, **options}
    given = c if len(controls) > 1 else c[0]
    return pipeline(model, controls)(PROMPTS, image=given, latents=noise.clone(), output_type=output_type, **settings).images


def drawn(model, controls, noise, c, scales=None, references=None, start=0.0, end=1.0):
    """The same as the course draws them: control k is 'control_k', its scale (1,) or (1, L) in each half of the guidance."""
    names = [f"control_{k}" for k in range(len(controls))]
    scales = scales or [torch.tensor([SCALE])] * len(names)
    D = controlled(model.denoiser, **dict(zip(names, controls, strict=True)))
    given = dict(zip(names, c, strict=True))
    halves = []
    for text, factors in ((PROMPTS, scales), ([""] * B, references or scales)):
        factors = {f"{name}_scale": s for name, s in zip(names, factors, strict=True)}
        halves.append(model.embed(text) | given | factors)
    sigmas = model.sigmas(STEPS)
    with_control = cfg(*(D.given(**half) for half in halves), GUIDANCE)
    without = cfg(*(model.denoiser.given(**model.embed(text)) for text in (PROMPTS, [""] * B)), GUIDANCE)
    moving = within(with_control, without, *sigma_interval(sigmas, start, end))
    return model.finish(sample(moving, model.start(noise, sigmas[0]), sigmas, ddim), sigmas[-1])


def equal(found, theirs):
    """Guidance multiplies the rounding of a call, 5e-7, by up to 2 GUIDANCE - 1 = 5, and STEPS add up: 2e-5, of the largest."""
    return found.shape == theirs.shape and float((found - theirs).abs().max()) < 2e-5 * max(1.0, float(theirs.abs().max()))


def test_one_control(model, controls):
    noise, c = normal(B, *model.shape, seed=7), [maps(B, seed=8)]
    expected = called(model, controls[:1], noise, c)
    found = drawn(model, controls[:1], noise, c)
    assert equal(found, expected)
    plain = drawn(model, controls[:1], noise, c, scales=[torch.zeros(1)])
    assert float((found - plain).abs().max()) > 0.1  # the control does something
    wrong = drawn(model, controls[:1], noise, [c[0].flip(0)])
    assert not equal(wrong, expected)  # and each picture has its own map
    pictures = called(model, controls[:1], noise, c, output_type="pt")
    assert float((model.decode(found) / 2 + 0.5 - pictures).abs().max()) < 1e-3


def test_one_map_for_all(model, controls):
    noise, c = normal(B, *model.shape, seed=7), [maps(1, seed=8)]
    assert equal(drawn(model, controls[:1], noise, c), called(model, controls[:1], noise, c))


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.6), (0.4, 1.0), (0.2, 0.8)])
def test_in_a_part_of_the_steps(model, controls, start, end):
    noise, c = normal(B, *model.shape, seed=7), [maps(B, seed=8)]
    expected = called(model, controls[:1], noise, c, control_guidance_start=start, control_guidance_end=end)
    assert equal(drawn(model, controls[:1], noise, c, start=start, end=end), expected)
    assert not equal(drawn(model, controls[:1], noise, c), expected)


def test_guess_mode_controls_the_half_with_text_alone(model, controls):
    noise, c = normal(B, *model.shape, seed=7), [maps(B, seed=8)]
    expected = called(model, controls[:1], noise, c, guess_mode=True)
    layers = len(controls[0].zeros)
    s = guess(layers, SCALE)
    assert equal(drawn(model, controls[:1], noise, c, [s], [torch.zeros(1, layers)]), expected)
    assert not equal(drawn(model, controls[:1], noise, c, [s]), expected)


def test_two_controls(model, controls):
    noise, c = normal(B, *model.shape, seed=7), [maps(B, seed=8), maps(B, seed=9)]
    expected = called(model, controls, noise, c, scale=[SCALE, 0.4])
    assert equal(drawn(model, controls, noise, c, [torch.tensor([SCALE]), torch.tensor([0.4])]), expected)
    assert not equal(drawn(model, controls, noise, c[::-1], [torch.tensor([SCALE]), torch.tensor([0.4])]), expected)


def test_two_controls_in_guess_mode(model, controls):
    noise, c = normal(B, *model.shape, seed=7), [maps(B, seed=8), maps(B, seed=9)]
    expected = called(model, controls, noise, c, scale=[SCALE, 0.4], guess_mode=True)
    layers = len(controls[0].zeros)
    found = drawn(model, controls, noise, c, [guess(layers, SCALE), guess(layers, 0.4)], [torch.zeros(1, layers)] * 2)
    assert equal(found, expected)


def test_on_a_pipeline_with_the_blocks_of_stable_diffusion(tmp_path):
    """epsilon, the last level above 0, and a VAE of two pixels a latent, for which the hint encoder halves once."""
    pipelines.stable_diffusion().save_pretrained(tmp_path)
    model = zoo.load(str(tmp_path), device="cpu")
    control = moved(control_of(model.net, widths=(4, 8)), by=0.2)
    assert control.factor == model.factor == 2
    noise, c = normal(B, *model.shape, seed=7), [maps(B, seed=8, side=16)]
    expected = called(model, [control], noise, c)
    assert equal(drawn(model, [control], noise, c), expected)
    assert not equal(drawn(model, [control], noise, [c[0].flip(0)]), expected)
