"""AnimateDiff's motion module beside diffusers': one module, one network and a pipeline taken apart give the same."""

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNetMotionModel
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

from course_lib import zoo
from course_lib.denoisers import from_diffusers as denoiser_of
from course_lib.guidance import cfg
from course_lib.nets import lora, mini_sd
from course_lib.nets.temporal import MotionModule, sinusoids
from course_lib.sample import sample
from course_lib.steps import ddim
from course_lib.video.animatediff import from_diffusers, motion_lora, motion_of, to_diffusers
from course_lib.video.inflation import Inflated, inflated
from tests.stable_like import CLOSE, stable_like

B, T, STEPS, GUIDANCE = 2, 5, 4, 3.0
PROMPTS = ["a red cube", "a blue ball"]


@pytest.fixture(scope="module")
def model():
    return zoo.load("mini-sd", device="cpu")


UNETS = {
    "mini-sd": lambda model: model.net,
    "like Stable Diffusion 1.5": lambda model: stable_like(),
    "other heads at each level": lambda model: stable_like(attention_head_dim=(2, 4, 4), use_linear_projection=True),
}
SETTINGS = {
    "plain": {},
    "two blocks, longer": {"motion_transformer_layers_per_block": 2, "motion_max_seq_length": 24},
    "without a middle": {"use_motion_mid_block": False},
    "two blocks in the middle": {"motion_transformer_layers_per_mid_block": (2,)},
    "other groups, which diffusers overrules": {"motion_norm_num_groups": 2},
}
unets = pytest.mark.parametrize("kind", UNETS)
settings = pytest.mark.parametrize("option", SETTINGS)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(net, by=0.1, seed=0):
    """Every weight moved, so that none is at the zero at which it starts; frozen."""
    for k, p in enumerate(net.parameters()):
        p.data += by * normal(*p.shape, seed=1000 * seed + k)
    return net.requires_grad_(False).eval()


def adapter_of(unet, seed=0, **options):
    """A tiny MotionAdapter of random weights, none zero, that fits a U-Net."""
    torch.manual_seed(seed)
    widths, groups = unet.config.block_out_channels, unet.config.norm_num_groups
    plain = {"block_out_channels": widths, "motion_layers_per_block": unet.config.layers_per_block,
             "motion_num_attention_heads": 2, "motion_norm_num_groups": groups, "motion_max_seq_length": 16}  # fmt: skip
    return moved(MotionAdapter(**plain | options), by=0.05, seed=seed)


def inputs(unet):
    return normal(B, T, 4, 8, 8, seed=1), torch.tensor([17.0, 650.0]), normal(B, 7, unet.config.cross_attention_dim, seed=3)


def theirs_of(unet, adapter):
    """Their network of clips, whose frames come after channels and whose text is given for each frame."""
    x, time, text = inputs(unet)
    net = UNetMotionModel.from_unet2d(unet, adapter).eval()
    with torch.no_grad():
        return net(x.transpose(1, 2), time, text.repeat_interleave(T, 0), return_dict=False)[0].transpose(1, 2)


def net_of(unet):
    return denoiser_of(unet, mini_sd.scheduler()).net


def ours_of(unet, motion):
    x, time, text = inputs(unet)
    with torch.no_grad():
        return Inflated(net_of(unet), motion)(x, time, encoder_hidden_states=text)


def gap(found, expected):
    """The greatest difference, relative to the greatest number."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# --- one module ----------------------------------------------------------------------------------------------------------


def test_positions_are_theirs_bit_for_bit():
    assert torch.equal(sinusoids(24, 96), SinusoidalPositionalEmbedding(96, 24).pe[0])


@pytest.mark.parametrize(("heads", "blocks"), [(2, 1), (4, 2), (1, 1)])
def test_one_module(heads, blocks):
    torch.manual_seed(4)
    theirs = AnimateDiffTransformer3D(
        heads,
        16 // heads,
        in_channels=16,
        num_layers=blocks,
        norm_num_groups=4,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=8,
    )
    moved(theirs.eval(), seed=4)
    ours = MotionModule(16, heads, blocks, groups=4, frames=8)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = normal(B, T, 16, 3, 4, seed=5)
    with torch.no_grad():
        expected = theirs(x.flatten(0, 1), num_frames=T).view_as(x)
        assert gap(ours(x), expected) < CLOSE < 1e-2 < gap(x, expected)
        assert gap(ours(x.flip(1)).flip(1), expected) > 1e-3  # positions count


# --- one network -----------------------------------------------------------------------------------------------------------


@unets
@settings
def test_theirs_as_ours_and_back(kind, option, model, tmp_path):
    """One that diffusers made and saved."""
    unet = UNETS[kind](model)
    adapter_of(unet, seed=6, **SETTINGS[option]).save_pretrained(tmp_path)
    adapter = MotionAdapter.from_pretrained(tmp_path).eval()
    expected = theirs_of(unet, adapter)
    motion = from_diffusers(adapter, net_of(unet))
    assert gap(ours_of(unet, motion), expected) < CLOSE
    assert gap(ours_of(unet, motion_of(net_of(unet))), expected) > 1e-2  # the motion does something
    again, state = to_diffusers(motion), adapter.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert gap(theirs_of(unet, again), expected) < CLOSE


@unets
def test_ours_as_theirs(kind, model, tmp_path):
    unet = UNETS[kind](model)
    motion = moved(motion_of(net_of(unet), heads=4, blocks=2, frames=9), by=0.05, seed=7)
    to_diffusers(motion).save_pretrained(tmp_path)
    adapter = MotionAdapter.from_pretrained(tmp_path).eval()
    assert adapter.config.motion_max_seq_length == 9
    assert gap(theirs_of(unet, adapter), ours_of(unet, motion)) < CLOSE
    assert sum(p.numel() for p in motion.parameters()) == sum(p.numel() for p in adapter.parameters())


def test_the_start_is_theirs_too(model):
    """With proj_out at zero their network is their image model, frame by frame."""
    motion = motion_of(net_of(model.net))
    assert gap(theirs_of(model.net, to_diffusers(motion)), ours_of(model.net, motion)) < CLOSE


def test_the_comparison_sees_a_module_in_another_place(model):
    """Exchanging two of the same width is a mistake that no shape tells."""
    motion = moved(motion_of(net_of(model.net)), by=0.05, seed=7)
    expected = theirs_of(model.net, to_diffusers(motion))
    one, other = "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"
    motion.after |= {one: motion.after[other], other: motion.after[one]}
    assert gap(ours_of(model.net, motion), expected) > 1e-3


# --- MotionLoRA ------------------------------------------------------------------------------------------------------------


def test_a_motion_lora_is_read_by_their_network(model, tmp_path):
    motion = moved(motion_of(net_of(model.net)), by=0.05, seed=7)
    panning = motion_lora(motion, rank=3, alpha=6.0)
    for k, one in enumerate(lora.loras(panning).values()):
        one.up.data = 0.3 * normal(*one.up.shape, seed=k)
    lora.save(panning, tmp_path / "panning.safetensors")
    x, time, text = inputs(model.net)
    net = UNetMotionModel.from_unet2d(model.net, to_diffusers(motion)).eval()
    net.load_lora_adapter(tmp_path, weight_name="panning.safetensors", prefix="unet")
    with torch.no_grad():
        expected = net(x.transpose(1, 2), time, text.repeat_interleave(T, 0), return_dict=False)[0].transpose(1, 2)
    assert gap(ours_of(model.net, panning), expected) < CLOSE
    assert gap(ours_of(model.net, motion), expected) > 1e-3


# --- the pipeline ----------------------------------------------------------------------------------------------------------


def test_the_pipeline(model):
    """Guidance multiplies the rounding of a call, 5e-7, by up to 2 GUIDANCE - 1 = 5, and STEPS add up: 2e-5, of the largest."""
    motion = moved(motion_of(model.denoiser.net), by=0.03, seed=7)
    noise = normal(B, T, *model.shape, seed=8)
    parts = {name: model.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = AnimateDiffPipeline(**parts, motion_adapter=to_diffusers(motion))
    pipe.set_progress_bar_config(disable=True)
    options = {"num_frames": T, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    expected = pipe(PROMPTS, latents=noise.transpose(1, 2).clone(), **options).frames.transpose(1, 2)
    D, sigmas = inflated(model.denoiser, motion), model.sigmas(STEPS)
    guided = cfg(*(D.given(**model.embed(text)) for text in (PROMPTS, [""] * B)), GUIDANCE)
    found = model.finish(sample(guided, model.start(noise, sigmas[0]), sigmas, ddim), sigmas[-1])
    assert gap(found, expected) < 2e-5
    still = cfg(*(model.denoiser.given(**model.embed(text)) for text in (PROMPTS, [""] * B)), GUIDANCE)
    first = model.finish(sample(still, model.start(noise[:, 0], sigmas[0]), sigmas, ddim), sigmas[-1])
    assert gap(first, expected[:, 0]) > 1e-2
