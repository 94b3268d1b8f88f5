"""Guidance on networks: conditions that a model does not know, and one call for two."""

import pytest
import torch
from torch.testing import assert_close

from course_lib.denoisers import from_edm, from_flow
from course_lib.devices import SampleNoise
from course_lib.nets.unet import UNet
from tests.draws import level

# --- conditions that a model does not know ----------------------------------------------------------------------------


def small(classes: int) -> UNet:
    torch.manual_seed(0)
    return UNet(channels=1, widths=(32,), blocks=1, attention=(), classes=classes)


def test_an_unconditional_model_refuses_a_condition_in_one_line():
    for D, name in ((from_edm(small(0)), "label"), (from_edm(small(0)), "text"), (from_flow(lambda x, t: x), "label")):
        with pytest.raises(ValueError, match=r"network without classes|is not taken by the network; expected") as caught:
            D.given(**{name: torch.tensor([1])})
        assert "\n" not in str(caught.value)


def test_a_class_that_the_model_does_not_know_is_refused():
    D = from_edm(small(10))
    assert D.given(label=torch.tensor([0, 10])) and D.given(label=None)
    for label, said in ((torch.tensor([3, 11]), "label = 11"), (torch.tensor(-1), "label = -1")):
        with pytest.raises(ValueError, match=rf"{said}; expected from 0 to 9, or 10 for no class"):
            D.given(label=label)
    with pytest.raises(ValueError, match="condition 'text' is not taken by the network; expected one of label"):
        D.given(text=torch.zeros(1))


def test_a_diffusers_network_names_what_it_takes():
    from diffusers import DDPMScheduler, UNet2DModel

    from course_lib.denoisers import from_diffusers

    unet = UNet2DModel(8, 1, 1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    D = from_diffusers(unet.eval(), DDPMScheduler())
    with pytest.raises(
        ValueError, match="condition 'encoder_hidden_states' is not taken by the network; expected one of class_labels"
    ):
        D.given(encoder_hidden_states=torch.zeros(1, 3, 8))


# --- one call, on the embedded networks -------------------------------------------------------------------------------


def pair(name: str, batch: int):
    """The two Denoisers of guidance of an embedded model, and one x."""
    from course_lib import zoo

    if name == "digits":
        D = zoo.load("digits", device="cpu")
        label = torch.arange(batch) % 10
        return D.given(label=label), D.given(label=torch.full_like(label, 10)), SampleNoise(0).start((batch, 1, 16, 16), 1.0)
    model = zoo.load("mini-sd", device="cpu")
    prompts = ["a red cube on grass", "a blue ball on sand", "a small green cone", "a big yellow car"][:batch]
    cond, ref = (model.denoiser.given(**model.embed(some)) for some in (prompts, [""] * batch))
    return cond, ref, SampleNoise(0).start((batch, *model.shape), 1.0)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["digits", "mini-sd"])
@torch.no_grad()
def test_one_call_gives_what_two_calls_give(name, batch):
    """To 1e-5 in fp32: sums of some hundred products are taken in another order for another batch, 1e-7 each."""
    from course_lib.denoisers import batched

    cond, ref, x = pair(name, batch)
    for sigma in (0.1, 1.0, 5.0):
        together = batched(cond, ref)(sigma * x, level(sigma))
        for found, D in zip(together, (cond, ref), strict=True):
            assert_close(found, D(sigma * x, level(sigma)), rtol=0, atol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-2  # the two do differ
