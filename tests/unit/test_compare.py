"""The comparisons on latents: what is drawn, what is counted, and what is stored."""

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from course_lib import zoo
from course_lib.zoo import compare, latent_scenes
from course_lib.zoo.compare import __main__ as command
from course_lib.zoo.compare import cascades
from course_lib.zoo.compare import latents as compared
from course_lib.zoo.compare.latents import NETWORKS, SCHEDULE, SEEDS, flops, levels, losses
from tests.draws import normal


class Nothing(nn.Module):
    """Predicts v = 0 and counts its calls by the times that it was told."""

    def __init__(self):
        super().__init__()
        self.times = []

    def forward(self, x, time, label=None):
        self.times.append(time)
        return torch.zeros_like(x)


@pytest.fixture
def few(monkeypatch):
    """Forty latents in the place of the scenes'."""
    x0, label = normal(40, 4, 8, 8).float(), torch.arange(40) % compared.CLASSES
    monkeypatch.setattr(compared, "latents", lambda split: (x0, label))
    return x0


def test_the_networks_have_equal_numbers_of_weights():
    counts = [zoo.parameters(build()) for build in NETWORKS.values()]
    assert max(counts) / min(counts) < 1.04


def test_operations_are_counted_of_one_picture():
    """A linear layer from 5 to 7 numbers: 5 * 7 multiplications and additions."""
    layer = nn.Linear(256, 7, bias=False)

    class Flat(nn.Module):
        def forward(self, x, time, label):
            return layer(x.flatten(1))

    assert flops(Flat()) == 2 * 256 * 7


def test_levels_lie_one_in_each_part_of_the_time():
    time = SCHEDULE.t_of_sigma(levels(8))
    assert_close(time, (torch.arange(8, dtype=torch.float64) + 0.5) / 8, rtol=0, atol=1e-5)
    half = SCHEDULE.t_of_sigma(levels(100, 0.5, 1.0, torch.Generator().manual_seed(1)))
    part = ((half - 0.5) / 0.5 * 100).floor()
    assert torch.equal(part, torch.arange(100, dtype=torch.float64))


def test_each_expert_is_asked_in_its_own_half(few):
    low, high = Nothing(), Nothing()
    found = losses([low, high], "held out")
    times = [torch.cat(net.times) for net in (low, high)]
    assert float(times[0].max()) < 500 < float(times[1].min())
    # v = alpha eps - std x0 of independent standard normals has variance 1; 40 * 256 squares of deviation sqrt(2)
    assert found == pytest.approx([1, 1], abs=4.5 * (2 / few.numel()) ** 0.5)


def test_batches_are_scaled_and_within_their_part_of_the_time(few):
    x0, sigma, eps, label = compared.batches(3.0, 0.5, 1.0)(torch.Generator().manual_seed(2))
    assert len(x0) == len(sigma) == len(eps) == len(label) == compared.BATCH
    assert float(SCHEDULE.t_of_sigma(sigma).min()) >= 0.5
    assert any(torch.equal(x0[0], 3 * row) for row in few)


def test_a_run_that_was_interrupted_goes_on(monkeypatch, tmp_path):
    done = []

    def measure(seed):
        done.append(seed)
        return {"seed": seed, "value": 10 * seed}

    monkeypatch.setattr(compare, "STORED", tmp_path / "rows.json")
    monkeypatch.setattr(command, "PARTS", {"some": (measure, [{"seed": seed} for seed in SEEDS])})
    (tmp_path / "rows.json").write_text(json.dumps({"some": [{"seed": 1, "value": 10}]}))
    with pytest.raises(ValueError, match="'other'; expected some of some"):
        command.main(["other"])
    command.main([])
    assert done == [0, 2] and [row["value"] for row in compare.rows("some")] == [10, 0, 20]
    with pytest.raises(ValueError, match="'none' is not in rows.json, which has some; run"):
        compare.rows("none")


@torch.no_grad()
def test_latents_are_of_unit_size_and_attributes_of_their_scenes():
    from course_lib.worlds.scenes.dataset import SceneDataset

    of = SceneDataset(20, 5)
    z, values = latent_scenes.encode(of), latent_scenes.attributes(of)
    assert z.shape == (20, 4, 8, 8) and 0.5 < float(z.std()) < 1.5
    assert torch.equal(z, latent_scenes.encode(of))
    names = [tuple(options)[k] for options, k in zip(latent_scenes.ATTRIBUTES.values(), values[0].tolist(), strict=True)]
    assert all(name in of.captions(None)[0] for name in names[:2])  # the shape and the colour are always said


# --- cascades and sizes ---------------------------------------------------------------------------------------------------


def test_the_refiner_sees_the_coarse_latent_and_its_noise():
    torch.manual_seed(0)
    net, label = cascades.Refiner(), torch.tensor([0, 1])
    nn.init.normal_(net.dit.last.weight)
    for block in net.dit.blocks:
        nn.init.normal_(block.adaln.weight, std=0.1)
    x, coarse, noise = normal(2, 4, 8, 8).float(), normal(2, 4, 4, 4, seed=1).float(), torch.tensor([0.1, 0.2])
    with torch.no_grad():
        base = net(x, torch.tensor(500.0), label, coarse, noise)
        assert base.shape == x.shape
        for other in (
            net(x, torch.tensor(500.0), label, coarse + 1, noise),
            net(x, torch.tensor(500.0), label, coarse, 5 * noise),
        ):
            assert float((other - base).abs().max()) > 1e-3


@pytest.mark.parametrize("augmented", [True, False])
def test_only_an_augmented_refiner_learns_from_noisy_coarse_latents(augmented, few, monkeypatch):
    monkeypatch.setattr(cascades, "latents", compared.latents)
    seen = {}
    monkeypatch.setattr(cascades, "_fit", lambda net, draw, loss, seed: seen.update(draw=draw))
    cascades.refiner(augmented, 0)
    x0, _, _, _, coarse, noise = seen["draw"](torch.Generator().manual_seed(1))
    gap = (coarse - nn.functional.avg_pool2d(x0, 2)).flatten(1)
    if augmented:  # 64 numbers a row: its deviation is known to 9 %, at 4.5 standard errors 40 %
        assert_close(gap.std(1), noise, rtol=0.4, atol=1e-6)
        assert float(noise.min()) >= 0 and 0.5 < float(noise.max()) <= cascades.STRONGEST
    else:
        assert float(gap.abs().max()) == 0 == float(noise.max())


def test_small_pictures_lose_what_sharpness_measures():
    x = normal(4, 3, 64, 64).float().clamp(-1, 1)
    small = cascades.enlarged(x)
    assert small.shape == x.shape and cascades.sharpness(small) < 0.01 * cascades.sharpness(x)


# --- what is stored -------------------------------------------------------------------------------------------------------


def test_at_equal_weights_and_steps_the_unet_has_the_least_loss_on_every_seed():
    """The convolutions' bias pays on 8 x 8 latents after 2,000 steps; U-ViT, without it and without adaLN, comes last.

    Each gap of neighbours in the order is at least three times the largest deviation over three seeds.
    """
    runs = compare.rows("networks")
    found = {name: torch.tensor([run["loss"] for run in runs if run["network"] == name]) for name in NETWORKS}
    assert all(len(losses) == len(SEEDS) for losses in found.values())
    best, *_, last = sorted(found, key=lambda name: float(found[name].mean()))
    assert (best, last) == ("U-Net", "U-ViT, patch 2")
    noise = max(float(losses.std()) for losses in found.values())
    for name in NETWORKS:
        if name != best:
            assert float(found[name].mean() - found[best].mean()) > 3 * noise
        if name != last:
            assert float(found[last].mean() - found[name].mean()) > 3 * noise
    of = {run["network"]: run["flops"] for run in runs}
    assert of["DiT, patch 2"] < 0.5 * of["U-Net"] < 0.5 * of["DiT, patch 1"]  # per operation the order is another


def test_the_learning_rates_were_chosen_with_the_same_budget():
    rows = compare.rows("tuning")
    for name in NETWORKS:
        tried = [row["lr"] for row in rows if row["network"] == name]
        assert sorted(tried) == sorted(compared.RATES)
        assert all(row["lr"] == compared.rate(name) for row in compare.rows("networks") if row["network"] == name)
    assert len({row["steps"] for row in rows}) == 1
