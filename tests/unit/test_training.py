"""Training: published losses, the averaged network, the known optimum, and runs that resume bit for bit."""

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from course_lib import training
from course_lib.denoisers import from_edm, from_eps, from_flow, from_v, from_x0
from course_lib.devices import generator
from course_lib.gaussians import Mixture
from course_lib.nets.mlp import MLP
from course_lib.schedules import Linear
from course_lib.training import EMA, denoising_loss, fit, learning_rate, lognormal_sigmas, write_atomically

SE = 4.5  # standard errors
F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def curve(x, t):
    """Some network."""
    return torch.sin(2 * x) + x.flip(-1) * torch.cos(t).reshape(-1, *[1] * (x.ndim - 1))


# --- the published losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
def test_each_weight_is_the_plain_loss_of_its_prediction(kind):
    """The mean squared error of the network's own output in its own coordinates, one number per sample."""
    schedule, x0, eps = Linear(), normal(5, 3, 2), normal(5, 3, 2, seed=1)
    if kind == "flow":  # x_t = (1 - t) x0 + t eps, target eps - x0 (Liu et al. 2023)
        t = torch.tensor([0.01, 0.3, 0.5, 0.8, 0.99], dtype=F64)
        each = t.reshape(-1, 1, 1)
        plain = (curve((1 - each) * x0 + each * eps, t) - (eps - x0)) ** 2
        D, sigma = from_flow(curve), t / (1 - t)
    else:  # x_t = alpha x0 + std eps; Ho et al. 2020, Eq. 14, and Salimans and Ho 2022, App. D
        t = torch.tensor([0.01, 0.2, 0.5, 0.8, 1.0], dtype=F64)
        alpha, std = (value.reshape(-1, 1, 1) for value in (schedule.alpha(t), schedule.std(t)))
        target = {"eps": eps, "x0": x0, "v": alpha * eps - std * x0}[kind]
        plain = (curve(alpha * x0 + std * eps, t) - target) ** 2
        D = {"eps": from_eps, "x0": from_x0, "v": from_v}[kind](curve, schedule.t_of_sigma)
        sigma = schedule.sigma(t)
    found = denoising_loss(D, x0, sigma, eps, kind)
    assert found.shape == (5,)
    assert_close(found.double(), plain.flatten(1).mean(1), rtol=1e-5, atol=0)  # the loss is in single precision


def test_edms_weight_is_the_plain_loss_of_its_network():
    """|F - (x0 - c_skip x) / c_out|^2, Karras et al. 2022, Eq. 8."""
    sd, x0, eps = 0.6, normal(4, 3), normal(4, 3, seed=1)
    sigma = torch.tensor([0.01, 0.3, 2.0, 50.0], dtype=F64)
    s = sigma[:, None]
    x, root = x0 + s * eps, (s**2 + sd**2).sqrt()
    target = (x0 - sd**2 / root**2 * x) / (s * sd / root)
    plain = (curve(x / root, 250 * sigma.log()) - target) ** 2
    found = denoising_loss(from_edm(curve, sd), x0, sigma, eps, training.edm_weight(sd))
    assert_close(found.double(), plain.mean(1), rtol=1e-5, atol=0)


def test_errors_of_the_loss():
    D, x = (lambda x, s: x), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="weight = 'epsilon'; expected one of x0, eps, v, flow or a function"):
        denoising_loss(D, x, torch.ones(2), x, "epsilon")
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"sigma has the value {bad:.6g}; expected finite sigma > 0"):
            denoising_loss(D, x, torch.tensor([1.0, bad]), x)


def test_emphasis_weighs_the_elements():
    """Ones change nothing, zeros leave an element out, and the weights are those of the mean."""
    x0, sigma = torch.randn(2, 3, generator=generator(1)), torch.ones(2)
    eps, D = torch.ones(2, 3), lambda x, s: torch.zeros_like(x)
    assert torch.equal(denoising_loss(D, x0, sigma, eps, "x0", torch.ones(2, 1)), denoising_loss(D, x0, sigma, eps, "x0"))
    found = denoising_loss(D, x0, sigma, eps, "x0", torch.tensor([[3.0, 0.0, 1.0]]))
    assert_close(found, (3 * x0[:, 0] ** 2 + x0[:, 2] ** 2) / 3)


def test_lognormal_levels():
    n = 40_000
    log = lognormal_sigmas(n, -1.2, 1.2, generator(0)).double().log()
    assert abs(float(log.mean()) + 1.2) < SE * 1.2 / math.sqrt(n)
    assert abs(float(log.std()) / 1.2 - 1) < SE / math.sqrt(2 * n)


# --- the averaged network and the learning rate -------------------------------------------------------------------------


def test_ema_is_its_recursion():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    ema, expected = EMA(net, 0.9), [p.detach().clone() for p in net.parameters()]
    for k in range(200):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(normal(*p.shape, seed=k))
            net(normal(8, 2, seed=k))  # moves the running statistics
        ema.update(net, k)
        d = min(0.9, (1 + k) / (10 + k))
        expected = [d * old + (1 - d) * p.detach() for old, p in zip(expected, net.parameters(), strict=True)]
    assert_close([p.detach() for p in ema.net.parameters()], expected, rtol=1e-10, atol=1e-10)
    assert_close(list(ema.net.buffers()), list(net.buffers()), rtol=0, atol=0)
    assert not ema.net.training and not any(p.requires_grad for p in ema.net.parameters())


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 1000, 2e-3, 100) for step in range(1000)]
    assert max(rates) == rates[99] == 2e-3 and rates[0] == pytest.approx(2e-5)
    assert all(b > a for a, b in pairwise(rates[:100]))
    assert all(b < a for a, b in pairwise(rates[100:]))
    assert rates[550] == pytest.approx(1e-3)  # half-way down
    assert 0 < rates[-1] < 1e-8
    assert learning_rate(0, 10, 1.0, 0) == 1.0


# --- the optimum is known ---------------------------------------------------------------------------------------------------


def gaussian() -> Mixture:
    root = torch.tensor([[0.8, 0.0], [0.4, 0.3]], dtype=F64)
    return Mixture.gaussian(torch.tensor([0.5, -0.3]), root @ root.T)


def posterior_variance(cov: torch.Tensor, sigma: float) -> float:
    """tr Cov[x0 | x] / d = sum_i v_i sigma^2 / (v_i + sigma^2) / d: what no denoiser can go below on average."""
    v = torch.linalg.eigvalsh(cov)
    return float((v * sigma**2 / (v + sigma**2)).mean())


def test_a_linear_network_finds_the_wiener_filter():
    """At one level the optimum is affine: C (C + s^2 I)^-1, reached by a convex fit.

    Regression from n samples errs by sqrt(posterior variance / (n * input variance)), each entry; a rate that
    falls to 0 averages over about half the 200,000 samples.
    """
    data, sigma = gaussian(), 0.7
    cov, eye = data.cov, torch.eye(2, dtype=F64)

    class Affine(nn.Linear):
        def forward(self, x, time):
            return super().forward(x)

    def draw(g):
        return data.sample(400, g).float(), torch.full((400,), sigma), torch.randn(400, 2, generator=g)

    torch.manual_seed(0)
    loss = lambda net, x0, s, eps: denoising_loss(from_x0(net, lambda s: s), x0, s, eps, "x0")
    done = fit(Affine(2, 2), draw, loss, steps=500, lr=0.05, warmup=10, ema_decay=0.95, progress=False, half=False, device="cpu")
    gain = cov @ torch.linalg.inv(cov + sigma**2 * eye)
    weight = done.net.weight.double() / math.sqrt(1 + sigma**2)  # the input is x / sqrt(1 + sigma^2)
    least = float(torch.linalg.eigvalsh(cov + sigma**2 * eye)[0])
    error = SE * math.sqrt(2 * posterior_variance(cov, sigma) / (100_000 * least))
    assert float((weight - gain).abs().max()) < error
    assert float((done.net.bias.double() - (eye - gain) @ data.mean).abs().max()) < 2 * error  # |mean| and the gain's error add
    spread = SE * posterior_variance(cov, sigma) * math.sqrt(2 / 400 / 100)
    assert abs(sum(done.losses[-100:]) / 100 - posterior_variance(cov, sigma)) < spread


def test_a_network_comes_near_the_optimum_at_every_level():
    """The loss cannot be below the posterior variance, and 400 steps bring its excess under a twentieth of it."""
    data, levels = gaussian(), (0.2, 0.5, 1.0, 2.0)

    def draw(g):
        sigma = torch.tensor(levels)[torch.randint(4, (512,), generator=g)]
        return data.sample(512, g).float(), sigma, torch.randn(512, 2, generator=g)

    torch.manual_seed(0)
    net = MLP(width=32, depth=1)
    loss = lambda net, x0, s, eps: denoising_loss(from_edm(net, 0.7), x0, s, eps, training.edm_weight(0.7))
    done = fit(net, draw, loss, steps=400, lr=1e-2, warmup=20, ema_decay=0.98, progress=False, half=False, device="cpu")
    n, g = 20_000, torch.Generator().manual_seed(1)
    for sigma in levels:
        x0 = data.sample(n, g)
        x = x0 + sigma * torch.randn(n, 2, generator=g, dtype=F64)
        level = torch.tensor(sigma, dtype=F64)
        with torch.no_grad():
            D = from_edm(done.net, 0.7)(x.float(), level).double()
        optimum = posterior_variance(data.cov, sigma)
        each = (D - x0).square().mean(1)
        assert float(each.mean()) > optimum - SE * float(each.std()) / math.sqrt(n)
        excess = float((D - data.denoiser(x, level)).square().mean())  # the exact excess, free of the noise in x0
        assert excess < optimum / 20, sigma
    assert sum(done.losses[-20:]) < sum(done.losses[:20])


# --- a resumed run is the same run ----------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """A network with dropout and running statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 2))

    def forward(self, x):
        return self.body(x)


def points(g):
    x = torch.randn(32, 2, generator=g)
    return x, x.roll(1, 1) ** 2


def square_error(net, x, y):
    return (net(x) - y).square().mean(1)


def short(net=None, loss=square_error, draw=points, **options):
    options = {"steps": 40, "warmup": 5, "save_every": 10, "progress": False, "half": False, "device": "cpu"} | options
    return fit(Dropping() if net is None else net, draw, loss, **options)


@pytest.mark.parametrize("stops", [[20], [7, 13, 33]])
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path, stops):
    whole = short()
    for stop in stops:
        torch.manual_seed(stop)  # whatever the state of the global generator
        short(checkpoint=tmp_path / "run.pt", stop_at=stop)
    net = Dropping()
    resumed = short(net, checkpoint=tmp_path / "run.pt")
    assert resumed.losses == whole.losses and len(whole.losses) == 40
    for (name, a), (_, b) in zip(resumed.net.state_dict().items(), whole.net.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_finished_run_is_returned_as_it_is(tmp_path):
    first = short(checkpoint=tmp_path / "run.pt")
    again = short(checkpoint=tmp_path / "run.pt", loss=lambda *rows: pytest.fail("no step is left"))
    assert again.losses == first.losses
    assert_close(list(again.net.parameters()), list(first.net.parameters()), rtol=0, atol=0)


def test_another_run_does_not_continue_this_one(tmp_path):
    path = tmp_path / "run.pt"
    short(checkpoint=path, stop_at=10)
    for name, was, other in (
        ("steps", 40, 50),
        ("seed", 0, 1),
        ("lr", 0.001, 0.1),
        ("warmup", 5, 0),
        ("betas", r"\(0.9, 0.99\)", (0.5, 0.9)),
        ("weight_decay", 0.0, 0.1),
        ("clip", 1.0, 2.0),
        ("ema_decay", 0.999, 0.9),
    ):
        with pytest.raises(ValueError, match=f"run.pt belongs to a run with {name} = {was}; expected {name} = "):
            short(checkpoint=path, **{name: other})
    assert len(short(checkpoint=path).losses) == 40


def test_batches_and_dropout_are_functions_of_the_step():
    seen = []

    def loss(net, x, y):
        seen.append((x.clone(), torch.rand(4)))
        return square_error(net, x, y)

    torch.manual_seed(1)
    short(loss=loss, steps=3)
    state = torch.random.get_rng_state()
    short(loss=loss, steps=3)
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is left alone
    for (x, u), (x_again, u_again) in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(x, x_again) and torch.equal(u, u_again)
    assert not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])


def test_dropout_is_independent_of_the_batch():
    """Were both drawn from one seed, noise in the loss would repeat the data's own random numbers."""

    def draw(g):
        return (torch.randn(8, 2, generator=g),)

    def loss(net, x):
        assert not torch.equal(torch.randn(8, 2), x)
        return net(x).square().mean(1)

    short(draw=draw, loss=loss, steps=3)


# --- what can go wrong -----------------------------------------------------------------------------------------------------


def failing_from(step: int):
    """A loss that is nan from this step on (counted from 1)."""
    count = iter(range(1, 10_000))
    return lambda net, x, y: square_error(net, x, y) * (float("nan") if next(count) >= step else 1.0)


@pytest.mark.parametrize("step", [1, 10, 24, 25, 26, 37])
def test_a_loss_that_is_nan_is_named_and_the_checkpoint_stays(tmp_path, step):
    path = tmp_path / "run.pt"
    with pytest.raises(FloatingPointError, match=rf"loss is nan at step {step};"):
        short(loss=failing_from(step), checkpoint=path)
    last = 10 * ((step - 1) // 10)
    assert path.exists() == (last > 0)
    if last:
        state = torch.load(path, weights_only=True)
        assert state["step"] == last and len(state["losses"]) == last
        assert all(bool(torch.isfinite(value).all()) for value in (*state["net"].values(), *state["ema"].values()))


def test_a_gradient_that_is_nan_never_reaches_the_checkpoint(tmp_path):
    """The loss of step 20 is finite and its gradient is not, and step 20 saves."""
    path, count = tmp_path / "run.pt", iter(range(1, 100))

    def loss(net, x, y):
        value = square_error(net, x, y)
        return value + (value - value).clamp_min(0).sqrt() if next(count) == 20 else value

    with pytest.raises(FloatingPointError, match="step 2[01]"):
        short(loss=loss, checkpoint=path)
    state = torch.load(path, weights_only=True)
    assert all(bool(torch.isfinite(value).all()) for value in state["net"].values())


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def broken(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, broken)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


@pytest.mark.gpu
def test_the_device_asked_for_is_the_device_used():
    """One notebook may train on the GPU and then on the CPU, in either order; Accelerate keeps its first state."""
    for device in ("cpu", "cuda", "cpu"):
        assert next(short(steps=2, device=device).net.parameters()).device.type == device


# --- several processes --------------------------------------------------------------------------------------------------------

TWO = """
import sys, torch
from accelerate import debug_launcher
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)

def train(path):
    from test_training import small_run
    rows = []
    done = small_run(rows)
    if torch.distributed.get_rank() == 0:
        torch.save((done.net.state_dict(), done.losses, rows), path)

if __name__ == "__main__":
    debug_launcher(train, ({path!r},), num_processes=2)
"""


def small_run(rows: list[int]):
    """30 steps; `rows` collects how many rows of each batch this process sees."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2))

    def loss(net, x, y):
        rows.append(len(x))
        return square_error(net, x, y)

    return short(net, loss, steps=30, lr=1e-2)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The run's weights, losses and rows as the first of two processes has them."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "two.py"
    script.write_text(TWO.format(tests=str(Path(__file__).parent), path=str(folder / "two.pt")))
    env = {**os.environ, "PYTHONPATH": str(Path(training.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "two.pt", weights_only=True)


def test_two_processes_give_the_weights_of_one(two_processes):
    """Each takes every second row of the same batch of 32; gradients are averaged, so the weights are those of one."""
    weights, _, rows = two_processes
    assert rows == [16] * 30
    for name, value in small_run([]).net.state_dict().items():
        assert_close(weights[name], value, rtol=0, atol=1e-5)


def test_two_processes_report_the_loss_of_the_whole_batch(two_processes):
    """Not of the first one's share of it."""
    assert_close(torch.tensor(two_processes[1]), torch.tensor(small_run([]).losses), rtol=0, atol=1e-5)
