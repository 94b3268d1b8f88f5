"""The same LoRA as peft's: outputs, gradients, merged weights, and files that go from one to the other through diffusers."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.testing import assert_close

from course_lib.devices import generator
from course_lib.nets import lora, mini_sd
from course_lib.nets.lora import ATTENTION, lora_state, merge, unmerge, with_lora
from tests.draws import normal

F64 = torch.float64
TEXT_TO_IMAGE = list(ATTENTION[:4])
ABSOLUTE = {torch.float32: 1e-6, F64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", ABSOLUTE, ids=["float32", "float64"])


class Convolution(nn.Module):
    """A strided convolution behind a name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


def unet_called(net, dtype):
    x, text = (normal(*shape, seed=k).to(dtype) for k, shape in enumerate(((2, 4, 8, 8), (2, 5, mini_sd.WIDTH))))
    return net(x, torch.tensor([3, 700]), encoder_hidden_states=text, return_dict=False)[0]


NETS = {  # what it is, its targets, how it is called
    "mini-sd": (mini_sd.unet, TEXT_TO_IMAGE, unet_called),
    "mini-sd with convolutions": (mini_sd.unet, ["to_q", "conv1", "conv_shortcut", "linear_1"], unet_called),
    "convolution": (Convolution, ["conv"], lambda net, dtype: net(normal(2, 4, 7, 7).to(dtype))),
}
nets = pytest.mark.parametrize("kind", NETS)


def pair(kind, dtype, rank=3, alpha=6.0):
    """The same network twice, with our LoRA and with peft's, of the same learnt weights; and how either is called."""
    make, targets, call = NETS[kind]
    torch.manual_seed(0)
    net = make().eval().to(dtype)
    ours = with_lora(net, rank, targets, alpha)
    for k, one in enumerate(lora.loras(ours).values()):
        one.up.data = 0.1 * torch.randn(one.up.shape, generator=generator(1, k)).to(dtype)
    theirs = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), copy.deepcopy(net))
    result = set_peft_model_state_dict(theirs, {name: value.clone() for name, value in lora_state(ours).items()})
    assert not result.unexpected_keys
    assert len(get_peft_model_state_dict(theirs)) == len(lora_state(ours)) > 0
    return net, ours, theirs, lambda one: call(one, dtype)


def tuned(net):
    """The layers that peft has changed."""
    return {name: module for name, module in net.named_modules() if isinstance(module, LoraLayer)}


@dtypes
@nets
def test_outputs_and_gradients(kind, dtype):
    net, ours, theirs, call = pair(kind, dtype)
    assert float((call(ours) - call(net)).abs().max().detach()) > 1e-2  # there is something to compare
    assert_close(call(ours), call(theirs), rtol=0, atol=ABSOLUTE[dtype])
    for one in (ours, theirs):
        call(one).square().sum().backward()
    of_theirs = dict(theirs.named_parameters())
    assert sum(p.requires_grad for p in ours.parameters()) == sum(p.requires_grad for p in theirs.parameters())
    for name, one in lora.loras(ours).items():
        for factor, key in ((one.down, "A"), (one.up, "B")):
            expected = of_theirs[f"{name}.lora_{key}.default.weight"].grad.reshape(factor.shape)
            # a gradient sums over the batch and its pixels: relative to its largest entry
            assert_close(factor.grad, expected, rtol=0, atol=10 * ABSOLUTE[dtype] * max(1.0, float(expected.abs().max())))
        assert of_theirs[f"{name}.base_layer.weight"].grad is None and one.layer.weight.grad is None


@dtypes
@nets
def test_merged_weights_and_those_after_unmerging(kind, dtype):
    net, ours, theirs, call = pair(kind, dtype)
    merge(ours)
    for module in tuned(theirs).values():
        module.merge()
    assert set(tuned(theirs)) == set(lora.loras(ours))
    for name, one in lora.loras(ours).items():
        assert_close(one.layer.weight, tuned(theirs)[name].base_layer.weight, rtol=0, atol=ABSOLUTE[dtype])
    assert_close(call(ours), call(theirs), rtol=0, atol=ABSOLUTE[dtype])
    unmerge(ours)
    for module in tuned(theirs).values():
        module.unmerge()
    for name, one in lora.loras(ours).items():
        W = net.get_submodule(name).weight
        assert torch.equal(one.layer.weight, W)  # theirs subtracts, and is off by the rounding
        assert_close(tuned(theirs)[name].base_layer.weight, W, rtol=0, atol=ABSOLUTE[dtype])


def test_the_start_has_the_spread_of_theirs():
    """down: the second moment of 39 thousand draws, each uniform; up: 0."""
    torch.manual_seed(2)
    net = nn.ModuleDict({"layer": nn.Linear(600, 80)})
    ours = lora_state(with_lora(net, 64, ["layer"]))
    theirs = get_peft_model_state_dict(inject_adapter_in_model(LoraConfig(r=64, target_modules=["layer"]), net))
    assert ours.keys() == theirs.keys()
    a, b = (state["layer.lora_A.weight"].double() for state in (ours, theirs))
    assert a.shape == b.shape and not torch.equal(a, b)
    share = float(a.square().mean() / b.square().mean())
    assert abs(share - 1) < 4.5 * (2 * (9 / 5 - 1) / a.numel()) ** 0.5  # E u^4 = 9/5 (E u^2)^2
    assert float(a.abs().max() / b.abs().max()) == pytest.approx(1, abs=1e-3)
    assert not ours["layer.lora_B.weight"].any() and not theirs["layer.lora_B.weight"].any()


def test_the_state_that_peft_gives_is_one_of_ours():
    _, ours, theirs, call = pair("mini-sd", torch.float32)
    for module in tuned(theirs).values():
        nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    lora.load_lora(ours, get_peft_model_state_dict(theirs))
    assert_close(call(ours), call(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", [TEXT_TO_IMAGE, ["to_q", "conv1"]], ids=["attention", "convolutions"])
def test_diffusers_reads_our_file_and_we_read_theirs(tmp_path, targets):
    """alpha = 6 of rank 3, so that a reader who forgets alpha is wrong by a factor of two."""
    torch.manual_seed(0)
    net = mini_sd.unet().eval()
    ours = with_lora(net, 3, targets, 6.0)
    for k, one in enumerate(lora.loras(ours).values()):
        one.up.data = 0.1 * torch.randn(one.up.shape, generator=generator(1, k))
    expected = unet_called(ours, torch.float32)
    lora.save(ours, tmp_path / "ours.safetensors")
    theirs = copy.deepcopy(net)
    theirs.load_lora_adapter(tmp_path, weight_name="ours.safetensors", prefix="unet", adapter_name="style")
    assert_close(unet_called(theirs, torch.float32), expected, rtol=0, atol=1e-6)
    theirs.save_lora_adapter(tmp_path, adapter_name="style", weight_name="theirs.safetensors")
    again = with_lora(net, 3, targets)
    lora.load(again, tmp_path / "theirs.safetensors")
    assert torch.equal(unet_called(again, torch.float32), expected)


def test_a_pipeline_reads_our_file(tmp_path):
    """As a reader of Stable Diffusion's styles does; `set_adapters` at 0.5 is our scale of 0.5."""
    torch.manual_seed(0)
    words = ["a", "red", "cube"]
    encoder = mini_sd.text_encoder(len(mini_sd.tokenizer(words)))
    pipeline = mini_sd.MiniSD(mini_sd.vae(), mini_sd.TextToLatent(mini_sd.unet(), encoder), words).pipeline()
    ours = with_lora(pipeline.unet, 3, alpha=6.0)
    for k, one in enumerate(lora.loras(ours).values()):
        one.up.data = 0.1 * torch.randn(one.up.shape, generator=generator(1, k))
    lora.save(ours, tmp_path / "ours.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(tmp_path, weight_name="ours.safetensors", adapter_name="style")
    for scale in (1.0, 0.5):
        pipeline.set_adapters(["style"], [scale])
        with lora.scaled(ours, scale):
            assert_close(unet_called(pipeline.unet, torch.float32), unet_called(ours, torch.float32), rtol=0, atol=1e-6)
