"""Training stops where it breaks: losses that grow without end, and pictures off their range."""

import math

import pytest
import torch
from torch import nn

from course_lib.training import check_data, check_losses, fit

F64 = torch.float64


def square_error(net, x, y):
    return (net(x) - y).square().mean(1)


def short(net=None, loss=square_error, **options):
    def draw(g):
        x = torch.randn(32, 2, generator=g)
        return x, x.roll(1, 1) ** 2

    options = {"steps": 40, "warmup": 5, "save_every": 10, "progress": False, "half": False, "device": "cpu"} | options
    return fit(nn.Linear(2, 2) if net is None else net, draw, loss, **options)


def scripted(values):
    """A loss that takes these values whatever the network does."""
    following = iter(values)
    return lambda net, x, y: 0 * square_error(net, x, y) + next(following)


@pytest.mark.parametrize("first", [1.0, 0.01, 40.0, -3.0])
def test_a_loss_that_grows_without_end_stops_the_run_and_names_the_step(first):
    """Above 100 max(1, |first|) from step 31 on; seen at the first report with 25 such losses, step 60."""
    bound = 100 * max(1, abs(first))
    values = [first] * 30 + [bound * 1.01**k for k in range(1, 60)]
    said = rf"above {bound:g} .*since step 31 and is .* at step 60; the first was {first:g} .*: lower the learning rate"
    with pytest.raises(FloatingPointError, match=said):
        short(loss=scripted(values), steps=80)
    assert len(short(loss=scripted(values), steps=80, diverged=math.inf).losses) == 80


def test_a_learning_rate_far_too_high_is_stopped():
    """No script: Adam's steps of 100 take a small network from a loss of 2 to 1e10 within 12 steps, finite throughout."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))

    with pytest.raises(FloatingPointError, match=r"since step [2-9] and is .* lower the learning rate"):
        short(network(), steps=200, lr=100.0)
    losses = short(network(), steps=200, lr=100.0, diverged=math.inf).losses
    assert all(math.isfinite(value) for value in losses)
    assert len(short(network(), steps=200, lr=0.01).losses) == 200


def test_a_run_that_explodes_at_once_is_measured_against_its_first_loss():
    """From step 2 on it only falls, by less than a tenth a step: against its own early mean it would look well."""
    with pytest.raises(FloatingPointError, match="since step 2 "):
        short(loss=scripted([1.0] + [1e12 * 0.95**k for k in range(60)]), steps=50)


def test_a_breaking_run_does_not_write_over_a_good_checkpoint(tmp_path):
    """Above the bound from step 15 on; step 10 is the last sound save, and the alarm is raised after step 39."""
    path = tmp_path / "run.pt"
    with pytest.raises(FloatingPointError, match="since step 15 "):
        short(loss=scripted([1.0] * 14 + [1e4] * 60), steps=60, checkpoint=path)
    state = torch.load(path, weights_only=True)
    assert state["step"] == 10 and state["losses"] == [1.0] * 10


def wandering() -> dict[str, list[float]]:
    """Losses of runs that are well, 2,000 steps each."""
    n, z = 2000, torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=F64).tolist()
    walk = torch.tensor(z, dtype=F64).cumsum(0)
    return {
        "a learned model": [1 / (1 + k / 20) + 0.02 * z[k] for k in range(n)],
        "a warm-up that shakes": [1 + 30 * math.exp(-((k - 60) ** 2) / 800) for k in range(n)],
        "heavy-tailed weights": [math.exp(3 * value) for value in z],  # a batch in a thousand is 10,000 times the median
        "spikes, each shorter than 25": [1e6 if k % 200 < 24 else 1.0 for k in range(1, n + 1)],
        "a copy of its teacher, at 0": [50 * (1 - math.exp(-k / 300)) for k in range(n)],
        "a game between two networks": (0.7 + 0.3 * walk).tolist(),  # reaches tens, of either sign
        "nats of a density, below 0": [-3.0 - k / 100 + value for k, value in enumerate(z)],
        "squared error summed over a picture": [800.0 / (1 + k / 100) for k in range(n)],
        "a penalty switched on slowly": [1e-6 + min(1.0, k / 1000) * 20 for k in range(n)],
    }


@pytest.mark.parametrize("name", wandering())
def test_ordinary_losses_set_nothing_off(name):
    """Seen 25 at a time, as `fit` does."""
    losses = wandering()[name]
    for end in range(25, len(losses) + 1, 25):
        check_losses(losses[:end], 25)


def test_a_sound_loss_is_within_its_bound():
    assert check_losses([2.0, 200.0], 2) and not check_losses([2.0, 200.1], 2)
    assert check_losses([0.0, 100.0], 2) and not check_losses([0.0, 100.1], 2) and check_losses([0.0, 900.0], 2, diverged=1e3)
    check_losses([1.0] + [101.0] * 24, 25)
    with pytest.raises(FloatingPointError, match="since step 2 and is 101 at step 26"):
        check_losses([1.0] + [101.0] * 25, 1)


@pytest.mark.parametrize(
    ("x0", "said"),
    [
        (torch.tensor([0, 255], dtype=torch.uint8), r"from 0 to 255; expected pictures in \[-1, 1\]: map them by x0 / 127.5 - 1"),
        (torch.tensor([0, 90], dtype=torch.uint8), "from 0 to 90; .* by x0 / 127.5 - 1"),
        (torch.tensor([0.0, 254.0]), "from 0 to 254; .* by x0 / 127.5 - 1"),
        (torch.tensor([0.0, 1.0]), r"from 0 to 1; .* by 2 \* x0 - 1"),
        (torch.tensor([0.2, 0.6]), r"from 0.2 to 0.6; .* by 2 \* x0 - 1"),
        (torch.tensor([0.0, 16.0]), "from 0 to 16; .* by x0 / 8 - 1 if 16 is the scale's white"),
        (torch.tensor([-2.1, 2.6]), r"from -2.1 to 2.6; .* by x0 / 2.6$"),
        (torch.tensor([-4.0, 0.5]), r"from -4 to 0.5; .* by x0 / 4$"),
        (torch.tensor([0.0, float("nan")]), "x0 has a value that is not finite"),
    ],
)
def test_pictures_off_their_range_are_refused_with_the_map_that_fits(x0, said):
    with pytest.raises(ValueError, match=said):
        check_data(x0)


def test_the_map_that_is_named_brings_the_pictures_into_range():
    for x0 in (torch.tensor([0, 7, 255], dtype=torch.uint8), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0, 16.0]),
               torch.tensor([-2.1, 2.6])):  # fmt: skip
        with pytest.raises(ValueError, match="by ") as refused:
            check_data(x0, "x0")
        check_data(eval(str(refused.value).split("map them by ")[1].split(" if ")[0], {"x0": x0}))
    with pytest.raises(ValueError, match=r"images has values .* map them by 2 \* images - 1"):
        check_data(torch.tensor([0.0, 1.0]), "images")


def test_pictures_in_range_pass_as_they_are():
    for values in ([-1.0, 1.0], [-0.3, 0.2], [-1.0004, 1.0004], [0.0, 0.0], [-1.0, -1.0]):
        x0 = torch.tensor(values)
        assert check_data(x0) is x0
