"""The sampling debugger: each fault, planted in networks that it has not seen, is named, and no healthy network is accused.

The rule and its constants were set on networks of moons, swiss_roll and ring, and on random ones; three_blobs was looked at
with seeds 2 to 4. Every network here is another: checkerboard, a data set that no constant was set on, and three_blobs, with
seeds 7 and 8, judged on other points than it was trained on; and the digits of the zoo.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from course_lib import zoo
from course_lib.debugging import FAULTS, diagnose, plant
from course_lib.debugging.conventions import PRACTICAL
from course_lib.denoisers import NetworkDenoiser, from_edm, from_eps, from_flow, from_v, from_x0
from course_lib.gaussians import Mixture
from course_lib.nets.mlp import MLP
from course_lib.schedules import TABLES, Discrete
from course_lib.training import EMA, denoising_loss, edm_weight, fit
from course_lib.worlds import digits, toys

Adapter = Callable[[nn.Module], NetworkDenoiser]
TABLE = {name: Discrete(betas()) for name, betas in TABLES.items()}
LEVELS = {name: table.sigma(torch.arange(1000).double()) for name, table in TABLE.items()}
LINEAR, COSINE = TABLE["linear"].t_of_sigma, TABLE["cosine"].t_of_sigma
WORLDS, SEEDS = ("three_blobs", "checkerboard"), (7, 8)


def points(world: str, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if world == "three_blobs":
        return toys.three_blobs().sample(n, generator).float()
    corner = torch.randint(4, (n, 2), generator=generator)  # of a square of 4 x 4, where the black ones are kept
    corner[:, 1] += (corner.sum(1) % 2) * (1 - 2 * (corner[:, 1] % 2))
    return (corner + torch.rand(n, 2, generator=generator)) / 2 - 1


def unscaled(net: nn.Module) -> NetworkDenoiser:
    D = from_eps(net, LINEAR)
    return replace(D, coefficients=lambda s: (*D.coefficients(s)[:2], torch.ones_like(s)))


# name -> the adapter under which the network is trained, the weight of its loss, and the schedule of its levels
CONVENTIONS: dict[str, tuple[Adapter, str | Callable[[Tensor], Tensor], str]] = {
    "eps": (lambda net: from_eps(net, LINEAR), "eps", "linear"),
    "x0": (lambda net: from_x0(net, LINEAR), "x0", "linear"),
    "v": (lambda net: from_v(net, LINEAR), "v", "linear"),
    "cosine": (lambda net: from_eps(net, COSINE), "eps", "cosine"),
    "unscaled": (unscaled, "eps", "linear"),
    "no time": (lambda net: from_eps(net, torch.zeros_like), "eps", "linear"),
    "flow": (from_flow, "flow", "flow"),
    "edm": (lambda net: from_edm(net, 0.5), edm_weight(0.5), "edm"),
}


@dataclass
class Trained:
    """A network, its exponential averages at a fitting and at a far too slow decay, and its raw weights."""

    net: nn.Module
    young: nn.Module
    raw: nn.Module


def levels(name: str, n: int, generator: torch.Generator) -> Tensor:
    if name == "flow":
        t = 0.998 * torch.rand(n, generator=generator, dtype=torch.float64) + 0.001
        return t / (1 - t)
    if name == "edm":
        return (1.2 * torch.randn(n, generator=generator, dtype=torch.float64) - 0.8).exp()
    return LEVELS[name][torch.randint(1000, (n,), generator=generator)]


class SideBySide(nn.Module):
    """Networks of one shape, trained at once, since a small one costs little beside its loop: row block k goes to network k."""

    def __init__(self, nets: list[nn.Module]):
        super().__init__()
        self.one = [nets[0]]  # in a list, so that its own weights are no part of this network
        stacked, _ = torch.func.stack_module_state(nets)
        self.names = list(stacked)
        self.weights = nn.ParameterList(stacked[name].detach() for name in self.names)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        weights = dict(zip(self.names, self.weights, strict=True))
        call = lambda weights, x, time: torch.func.functional_call(self.one[0], weights, (x, time))
        blocks = (rows.unflatten(0, (len(self.weights[0]), -1)) for rows in (x, time))
        return torch.func.vmap(call)(weights, *blocks).flatten(0, 1)

    def apart(self) -> list[nn.Module]:
        """The networks, each for itself."""
        nets = [copy.deepcopy(self.one[0]) for _ in self.weights[0]]
        for k, net in enumerate(nets):
            net.load_state_dict({name: weight[k].detach() for name, weight in zip(self.names, self.weights, strict=True)})
        return nets


def train(convention: str, *keys: tuple[str, int], steps: int = 500, n: int = 128) -> list[Trained]:
    """A network for each world and seed."""
    adapter, weight, schedule = CONVENTIONS[convention]
    data = [points(world, 2000, seed) for world, seed in keys]
    nets = []
    for _, seed in keys:
        torch.manual_seed(seed)
        nets.append(MLP(width=64, depth=2))
    net = SideBySide(nets)
    slow = EMA(net, 0.9999)

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        x0 = torch.cat([one[torch.randint(len(one), (n,), generator=generator)] for one in data])
        return x0, levels(schedule, len(x0), generator), torch.randn(x0.shape, generator=generator)

    done = fit(
        net,
        draw,
        lambda net, x0, sigma, eps: denoising_loss(adapter(net), x0, sigma, eps, weight),
        steps=steps,
        lr=3e-3,
        ema_decay=0.99,
        seed=seed,
        half=False,
        device="cpu",
        progress=False,
        on_step=lambda step, _: slow.update(net, 10**9),  # so late that the warm-up of the decay is over
    )
    return [Trained(*three) for three in zip(done.net.apart(), slow.net.apart(), net.apart(), strict=True)]


@pytest.fixture(scope="module")
def trained() -> Callable[[str, str, int], Trained]:
    """Networks by convention, world and seed; all of a convention are trained when one is wanted."""

    @functools.cache
    def all_of(convention: str) -> dict[tuple[str, int], Trained]:
        keys = list(itertools.product(WORLDS, SEEDS))
        return dict(zip(keys, train(convention, *keys), strict=True))

    return lambda convention, world, seed: all_of(convention)[world, seed]


# what happened -> the convention of training, how the sampler reads the network, which weights, and what must be found
eps_linear = CONVENTIONS["eps"][0]
CASES: dict[str, tuple[str, Adapter, tuple[str, ...]]] = {
    **{f"healthy {name}": (name, CONVENTIONS[name][0], ()) for name in ("eps", "x0", "v", "cosine", "unscaled")},
    "x0 read as eps": ("x0", eps_linear, ("prediction",)),
    "v read as eps": ("v", eps_linear, ("prediction",)),
    "eps read as x0": ("eps", lambda net: from_x0(net, LINEAR), ("prediction",)),
    "eps read as v": ("eps", lambda net: from_v(net, LINEAR), ("prediction",)),
    "cosine read as linear": ("cosine", eps_linear, ("schedule",)),
    "times from 0 to 1": ("eps", lambda net: from_eps(net, lambda s: LINEAR(s) / 1000), ("schedule",)),
    "sampler scales alone": ("unscaled", eps_linear, ("scaling",)),
    "training scales alone": ("eps", unscaled, ("scaling",)),
    "sampler passes no time": ("eps", lambda net: from_eps(net, torch.zeros_like), ("time",)),
    "training passed no time": ("no time", eps_linear, ("time",)),
    "neither passes a time": ("no time", CONVENTIONS["no time"][0], ("time",)),
    "two at once": ("x0", lambda net: from_eps(net, torch.zeros_like), ("prediction", "time")),
}


def confusion(rows: list[tuple[str, tuple[str, ...], tuple[str, ...]]]) -> str:
    """Planted against found, with the number of networks; * marks a wrong diagnosis."""
    counts: dict[tuple[str, str], int] = {}
    for _, planted, found in rows:
        key = "+".join(sorted(planted)) or "none", "+".join(sorted(found)) or "none"
        counts[key] = counts.get(key, 0) + 1
    table = "\n".join(f"{' ' if a == b else '*'} {a:18s} -> {b:18s} {n:3d}" for (a, b), n in sorted(counts.items()))
    wrong = [f"{name}: planted {planted}, found {found}" for name, planted, found in rows if set(planted) != set(found)]
    return "\n".join([table, *wrong])


@pytest.mark.slow
def test_every_fault_is_named_and_no_healthy_network_is_accused(trained, capsys):
    rows = []
    for world, seed in itertools.product(WORLDS, SEEDS):
        data = points(world, 1000, seed + 100)
        for name, (convention, adapter, planted) in CASES.items():
            nets = trained(convention, world, seed)
            rows.append(
                (f"{name}, {world} {seed}", planted, diagnose(adapter(nets.net), data, None if planted else nets.raw).faults)
            )
        nets = trained("eps", world, seed)
        rows.append((f"young average, {world} {seed}", ("ema",), diagnose(eps_linear(nets.young), data, nets.raw).faults))
        torch.manual_seed(seed)
        rows.append((f"untrained, {world} {seed}", ("untrained",), diagnose(eps_linear(MLP()), data).faults))
    with capsys.disabled():
        print("\n" + confusion(rows))
    assert all(set(planted) == set(found) for _, planted, found in rows), confusion(rows)


def test_a_wrong_schedule_is_named_exactly_where_it_costs(trained):
    """The linear schedule read as cosine: the same noise shows in both diagnoses, so that their cost is exact."""
    verdicts = set()
    for world, seed in itertools.product(WORLDS, SEEDS):
        net, data = trained("eps", world, seed).net, points(world, 1000, seed + 100)
        wrong, right = diagnose(from_eps(net, COSINE), data), diagnose(eps_linear(net), data)
        cost = float((wrong.errors / right.errors).log().mean())
        assert wrong.faults == (("schedule",) if cost > math.log(PRACTICAL) else ()), (world, seed, cost)
        verdicts.add(wrong.faults)
    assert len(verdicts) == 2, "both sides of the threshold must be met"


@pytest.mark.parametrize("convention", ["flow", "edm"])
def test_other_families_are_healthy_as_they_are_and_one_fault_when_read_as_eps(trained, convention):
    """What comes with the family, its times and its scaling, is no fault of its own."""
    for world, seed in itertools.product(WORLDS, SEEDS):
        net, data = trained(convention, world, seed).net, points(world, 1000, seed + 100)
        assert diagnose(CONVENTIONS[convention][0](net), data).faults == (), (world, seed)
        assert diagnose(eps_linear(net), data).faults == ("prediction",), (world, seed)


@pytest.mark.parametrize("convention", ["eps", "edm"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_mended(trained, convention, name):
    """Under the convention found, the errors are those of the right Denoiser on the same noise."""
    D = CONVENTIONS[convention][0](trained(convention, "three_blobs", 7).net)
    data = points("three_blobs", 1000, 107)
    found = diagnose(plant(name, D), data, D.net if name == "ema" else None)
    assert found.faults == (name,)
    if name != "untrained":
        right = diagnose(D, data)
        # rounding alone: x and D are of size 10 at most, so known to 1e-6, and |D - x0| is at least 0.05 at the lowest level
        torch.testing.assert_close(found.best, right.errors, rtol=1e-4, atol=0)
        x, sigma = 2 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
        torch.testing.assert_close(found.mended(x, sigma), D(x, sigma), rtol=0, atol=1e-5)


# --- against exact answers ------------------------------------------------------------------------


def exact_eps(mixture: Mixture) -> NetworkDenoiser:
    """The network that would have learned the noise exactly: eps = (x - D(x, sigma)) / sigma."""

    def net(x: Tensor, time: Tensor) -> Tensor:
        sigma = TABLE["linear"].sigma(time.double())[:, None]
        x = x.double() * (1 + sigma**2).sqrt()
        return ((x - mixture.denoiser(x, sigma[:, 0])) / sigma).float()

    return from_eps(net, LINEAR)


def test_errors_are_those_of_the_exact_denoiser_and_of_the_wiener_filter():
    """For a Gaussian both are (1/d) sum_i v_i sigma^2 / (v_i + sigma^2), v_i the variances of the data."""
    mixture = Mixture.gaussian(torch.tensor([0.3, -0.2]), torch.tensor([[1.0, 0.0], [0.0, 0.09]]))
    data = mixture.sample(8000, torch.Generator().manual_seed(0)).float()
    found = diagnose(exact_eps(mixture), data, n=4000)
    assert found.faults == ()
    v = torch.tensor([1.0, 0.09], dtype=torch.float64)
    expected = (v * found.sigmas[:, None] ** 2 / (v + found.sigmas[:, None] ** 2)).mean(1)
    # squares of a Gaussian spread by sqrt(2); at worst one of the two axes holds all the error: 4 standard errors of 4,000
    bound = 4 * math.sqrt(2 / 4000)
    assert float((found.errors / expected).log().abs().max()) < bound
    assert float((found.linear / expected).log().abs().max()) < bound
    assert torch.equal(found.best, found.errors)


def test_the_exact_network_beats_the_affine_one_where_the_data_are_no_gaussian():
    mixture = toys.three_blobs()
    found = diagnose(exact_eps(mixture), points("three_blobs", 1000, 0))
    assert found.faults == () and float((found.errors / found.linear).min()) < 0.7
    misread = diagnose(from_x0(exact_eps(mixture).net, LINEAR), points("three_blobs", 1000, 0))
    assert misread.faults == ("prediction",)
    torch.testing.assert_close(misread.best, found.errors, rtol=1e-5, atol=0)
    assert "from_eps" in misread.words and "x0" in misread.words


def test_a_condition_goes_with_its_row():
    """A network that is told the clean sample of its row has no error; of another row, a large one."""
    data = points("three_blobs", 200, 0)

    def net(x: Tensor, time: Tensor, clean: Tensor) -> Tensor:
        return clean + 1e-3 * x  # so that its output is no constant

    found = diagnose(from_x0(net, LINEAR, clean=data), data)
    assert float(found.errors.max()) < 1e-5


class Table(nn.Module):
    """A network with a table of embeddings of its 1000 times: another time is an IndexError."""

    def __init__(self, D: NetworkDenoiser):
        super().__init__()
        self.D = D

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.D.net(x, torch.arange(1000.0)[time.expand(len(x)).round().long()])


def test_times_that_the_network_refuses_are_no_convention_of_its():
    """250 ln sigma is below -1000 at sigma = 0.01 and above 1000 at 100, beyond both ends of the table."""
    D, data = exact_eps(toys.three_blobs()), points("three_blobs", 400, 0)
    sigmas = torch.logspace(-2, 2, 9, dtype=torch.float64)
    table = Table(D)
    with pytest.raises(IndexError):
        from_eps(table, lambda s: 250 * s.log())(data, sigmas[0])
    assert diagnose(from_eps(table, LINEAR), data, sigmas=sigmas).faults == ()
    assert diagnose(from_x0(table, LINEAR), data, sigmas=sigmas).faults == ("prediction",)


@pytest.mark.parametrize("level", [0.0, 1.0, 3.0])
def test_a_network_that_is_not_finite_is_no_healthy_one(level):
    """At all levels, or above one only."""
    D, data = exact_eps(toys.three_blobs()), points("three_blobs", 400, 0)

    def broken(x: Tensor, time: Tensor) -> Tensor:
        return D.net(x, time).where(time.expand(len(x))[:, None] < LINEAR(torch.tensor(level)), math.nan)

    sigmas = diagnose(D, data).sigmas
    first = float(sigmas[sigmas >= level][0])
    with pytest.raises(ValueError, match=f"D returns values that are not finite at sigma = {first:.3g}, and no other"):
        diagnose(from_eps(broken, LINEAR), data)


def test_a_reading_that_overflows_is_a_fault_and_not_an_error():
    """Unscaled inputs of 200 in place of at most 4 overflow: read as it should be, the network is right."""
    right, data = exact_eps(toys.three_blobs()), points("three_blobs", 400, 0)
    net = lambda x, time: right.net(x, time) + 0 * (x**2).exp()
    sigmas = torch.logspace(-1, 2, 8, dtype=torch.float64)
    assert diagnose(from_eps(net, LINEAR), data, sigmas=sigmas).faults == ()
    found = diagnose(plant("scaling", from_eps(net, LINEAR)), data, sigmas=sigmas)
    assert found.faults == ("scaling",) and float(found.errors[-1]) == math.inf and bool(torch.isfinite(found.best).all())


def test_layers_that_drop_or_learn_statistics_must_be_in_evaluation_mode():
    data = points("three_blobs", 100, 0)

    class Net(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 8), layer, nn.Linear(8, 2))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.body(x)

    for layer in (nn.Dropout(0.1), nn.BatchNorm1d(8)):
        net = Net(layer)
        said = rf"is in training mode, with a {type(layer).__name__} at 'body.1'; expected"
        with pytest.raises(ValueError, match=f"^D.net {said} D.net.eval"):
            diagnose(eps_linear(net), data)
        with pytest.raises(ValueError, match=f"^raw {said} raw.eval"):
            diagnose(eps_linear(MLP(width=8)), data, raw=net)
        assert net.training and diagnose(eps_linear(net.eval()), data).faults == ("untrained",)
    net = Net(nn.Dropout(0.0))
    assert diagnose(eps_linear(net), data).faults == ("untrained",) and net.training


def test_a_diagnosis_is_a_function_of_its_seed():
    D, data = exact_eps(toys.three_blobs()), points("three_blobs", 400, 0)
    first, again, other = (diagnose(D, data, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.errors, again.errors) and first.words == again.words
    assert not torch.equal(first.errors, other.errors)


@pytest.mark.slow
def test_the_digits_are_healthy_and_found_out_when_read_as_eps():
    """Few rows and levels, since the network is slow; the difference is of many standard errors all the same."""
    D, (images, _) = zoo.load("digits", device="cpu"), digits.load("test")
    sigmas = torch.tensor([0.15, 0.3, 0.6, 1.2])
    assert diagnose(D, images, n=16, sigmas=sigmas).faults == ()
    misread = diagnose(from_eps(D.net, LINEAR), images, n=16, sigmas=sigmas)
    assert misread.faults == ("prediction",) and "from_edm with sigma_data = 0.7" in misread.words


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda D, x: diagnose(toys.three_blobs().denoiser, x), "D is a method; expected a NetworkDenoiser"),
        (lambda D, x: diagnose(D, x[:, 0]), r"data is a tensor of torch.float32, shape \(100,\); expected a floating-point"),
        (lambda D, x: diagnose(D, x.long()), "data is a tensor of torch.int64"),
        (lambda D, x: diagnose(D, x.tolist()), "data is a list; expected a floating-point tensor"),
        (lambda D, x: diagnose(D, x[:63]), "data has 63 rows; expected at least 64"),
        (lambda D, x: diagnose(D, x.where(x != x[3, 0], math.nan)), r"data\[3\] holds values that are not finite"),
        (lambda D, x: diagnose(D, torch.ones(100, 2)), "data has the same value in all rows"),
        (lambda D, x: diagnose(D, x.repeat(1, 2)), r"data has rows of shape \(4,\); expected rows that the network of D takes"),
        (lambda D, x: diagnose(D, x, raw={}), "raw is a dict; expected a network"),
        (lambda D, x: diagnose(D, x, n=15), "n = 15; expected at least 16"),
        (lambda D, x: diagnose(D, x, sigmas=torch.tensor([1.0, 0.5, 0.2, 0.1])), "sigmas = .* expected at least four rising"),
        (lambda D, x: plant("noise", D), "name = 'noise'; expected one of prediction, scaling"),
        (lambda D, x: plant("ema", exact_eps(toys.three_blobs())), "D.net is a function; expected a torch module for 'ema'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(eps_linear(MLP(width=8)), points("three_blobs", 100, 0))


def test_points_beyond_one_are_no_error():
    assert float(points("three_blobs", 200, 0).abs().max()) > 1.5
    assert diagnose(eps_linear(MLP(width=8)), points("three_blobs", 200, 0)).faults == ("untrained",)
