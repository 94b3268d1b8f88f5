"""The loop of score distillation: the way back through g, checkpoints that resume bit for bit, and what it refuses."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from course_lib.denoisers import from_edm
from course_lib.devices import SampleNoise, bf16_pays, generator
from course_lib.distill import Companions, checkpointed, distill, falling, log_uniform, of_score, sds, vsd
from course_lib.distill.exact import Points, robbins_monro
from course_lib.distill.second import SecondScore
from course_lib.metrics import peak_bytes
from course_lib.nets.mlp import MLP
from course_lib.training import fit
from tests.draws import normal

F64 = torch.float64
LEVELS = log_uniform(0.1, 3.0)


def D(x, sigma):
    """The Denoiser of N(1, 0.5^2) in each coordinate."""
    level = sigma if sigma.ndim == 0 else sigma.reshape(-1, *[1] * (x.ndim - 1))
    return (1 + 0.25 / (0.25 + level**2) * (x - 1)).to(x.dtype)


class Curved(nn.Module):
    """g(theta) = tanh(A theta) of each row."""

    def __init__(self):
        super().__init__()
        self.A, self.theta = nn.Parameter(normal(3, 2, seed=1)), nn.Parameter(normal(4, 2))

    def forward(self):
        return (self.theta @ self.A.T).tanh()


class Centre:
    """A companion: a running mean of the pictures, noisy, so that its draws matter too."""

    def __init__(self):
        self.mean, self.told = torch.zeros(2, dtype=F64), []

    def __call__(self, x, sigma):
        return self.mean.expand_as(x)

    def learn(self, x0, progress, draws):
        self.mean = 0.9 * self.mean + 0.1 * x0.mean(0) + 0.01 * torch.randn(2, generator=draws, dtype=F64)
        self.told.append((x0.clone(), progress))

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def run(render=None, rule=None, steps=12, lr=0.1, adam=True, **options):
    """A short run; returns where it ended and what it moved."""
    render = Points(normal(5, 2)) if render is None else render
    kind = torch.optim.Adam if adam else torch.optim.SGD
    rule, levels = rule or sds(D, of_score), options.pop("levels", LEVELS)
    return distill(render, rule, levels, kind(render.parameters(), lr=lr), steps, **options), render


def first_gradient(rule, x0, seed):
    """What the rule says in the first step of a run."""
    draws = generator(seed, 0)
    return rule(x0, LEVELS(0.0, len(x0), draws), SampleNoise(draws.initial_seed()))


@pytest.mark.parametrize("encode", [None, lambda x: x**3 + x[:, :1], checkpointed(lambda x: x**3 + x[:, :1])])
def test_one_step_is_the_rules_vector_pulled_back_through_g(encode):
    """theta - lr times the gradient of <gradient, encode(g(theta))>, the gradient a constant."""
    rule, before = sds(D, of_score), Curved()
    x0 = before() if encode is None else encode(before())
    gradient = first_gradient(rule, x0.detach(), seed=4)
    grads = torch.autograd.grad((gradient * x0).sum(), list(before.parameters()))
    end, after = run(Curved(), rule, steps=1, adam=False, seed=4, encode=encode)
    for old, new, grad in zip(before.parameters(), after.parameters(), grads, strict=True):
        assert_close(new, old - 0.1 * grad, rtol=0, atol=1e-12)
        assert float((new - old).detach().abs().max()) > 1e-4
    assert torch.equal(end, after()) and not end.requires_grad  # pictures come back, not their codes


def test_the_rule_opens_no_gradient_of_its_networks():
    net, seen = nn.Linear(2, 2).double(), []

    def network(x, sigma):
        seen.append((torch.is_grad_enabled(), x.requires_grad))
        return net(x)

    run(rule=sds(network), steps=2)
    assert seen == [(False, False)] * 2 and net.weight.grad is None


def test_steps_are_told_as_they_were_rendered():
    """Numbers from 1, progress from 0 to 1, and pictures that do not move on with theta."""
    shown, shares, companion = [], [], Centre()

    def levels(progress, rows, draws):
        shares.append(progress)
        return LEVELS(progress, rows, draws)

    end, _ = run(steps=5, levels=levels, companion=companion, on_step=lambda step, x0: shown.append((step, x0)))
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0] == [share for _, share in companion.told]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5]
    assert torch.equal(shown[0][1], normal(5, 2))
    for (_, x0), (told, _) in zip(shown, companion.told, strict=True):
        assert torch.equal(x0, told) and not x0.requires_grad
    assert not any(torch.equal(x0, end) for _, x0 in shown)
    run(steps=1, levels=levels)
    assert shares[-1] == 0.0  # a single step is the start


def test_a_particle_is_the_same_in_any_batch():
    for levels in (LEVELS, falling(3.0, 0.1, 2.0)):
        few, many = (run(Points(normal(20, 2)[:n]), adam=False, levels=levels)[0] for n in (3, 20))
        assert torch.equal(few, many[:3])
    assert not torch.equal(few, run(Points(normal(20, 2)[:3]), adam=False, levels=levels, seed=1)[0])


def test_half_precision_is_the_networks_alone():
    net, seen = nn.Linear(2, 2), []

    def network(x, sigma):
        out = net(x)
        seen.append((x.dtype, out.dtype))
        return out

    points = Points(normal(5, 2).float())
    end, _ = run(points, sds(network), half=True, steps=3)
    half = torch.bfloat16 if bf16_pays("cpu") else torch.float32
    assert seen == [(torch.float32, half)] * 3
    assert end.dtype == points.theta.dtype == points.theta.grad.dtype == torch.float32


# --- memory ------------------------------------------------------------------------------------------------------------


def test_a_checkpointed_encoder_has_the_same_gradient_and_less_in_memory():
    """What the encoder keeps lies there while the rule runs, unless checkpointed: a sum of two peaks becomes the larger one.

    Sixteen layers keep at least one picture each; the rule fills twenty. Without: over 36 pictures; with: what each
    alone takes, and some for the way back.
    """
    picture = 16 * 64 * 64 * 4
    torch.manual_seed(0)
    layers = nn.Sequential(*(part for _ in range(16) for part in (nn.Conv2d(16, 16, 1), nn.Tanh()))).requires_grad_(False)

    def rule(x0, sigma, noise):
        return sum(torch.stack([x0] * 20)) / 20 - 1

    def of(encode):
        pixels = Points(normal(1, 16, 64, 64).float())
        run(pixels, rule, steps=1, adam=False, encode=encode)
        return pixels.theta.grad

    assert torch.equal(of(layers), of(checkpointed(layers)))
    plain, less = (peak_bytes(lambda e=e: of(e)) / picture for e in (layers, checkpointed(layers)))
    assert plain > 36 and less < 0.8 * plain


class Full:
    """A Denoiser for which there is no memory."""

    def __init__(self, error):
        self.error = error

    def __call__(self, x, sigma):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_make_smaller(error, monkeypatch):
    expected = "step 1 does not fit into memory; take fewer particles, smaller pictures, or checkpointed\\(\\)"
    with pytest.raises(torch.OutOfMemoryError, match=expected) as caught:
        run(rule=sds(Full(error)))
    assert caught.value.__cause__ is error and "\n" not in str(caught.value)
    companion = Centre()
    monkeypatch.setattr(companion, "learn", lambda x0, progress, draws: Full(error)(x0, progress))
    with pytest.raises(torch.OutOfMemoryError, match=expected):
        run(companion=companion)


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        run(rule=sds(Full(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))))
    assert not isinstance(caught.value, torch.OutOfMemoryError)


# --- resuming ----------------------------------------------------------------------------------------------------------


def whole(path=None, stop_at=None, with_companion=True, seed=2):
    """A run of 12 steps of VSD, with all the state that there can be: Adam's, a companion's, a falling rate."""
    points, companion = Points(normal(5, 2)), Centre()
    optimizer = torch.optim.Adam(points.parameters(), lr=0.1)
    rule = vsd(D, companion, of_score) if with_companion else sds(D, of_score)
    companions = Companions(companion, Centre()) if with_companion else None
    options = {"seed": seed, "companion": companions, "on_step": robbins_monro(optimizer, 5), "save_every": 4}
    return distill(points, rule, LEVELS, optimizer, 12, checkpoint=path, stop_at=stop_at, **options)


@pytest.mark.parametrize("with_companion", [False, True])
@pytest.mark.parametrize("stops", [(4,), (5,), (3, 7, 11), (12,)])
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path, stops, with_companion):
    path = tmp_path / "run.pt"
    for stop in stops:
        part = whole(path, stop, with_companion)
        assert torch.equal(part, whole(path, stop, with_companion))  # nothing is left to do
    end = whole(with_companion=with_companion)
    assert torch.equal(whole(path, None, with_companion), end)
    assert torch.equal(whole(path, None, with_companion), end)  # a finished run is returned as it is
    assert (stops == (12,)) == torch.equal(part, end)


def test_a_second_score_resumes_with_its_optimiser(tmp_path):
    """VSD with a LoRA that learns: its weights, AdamW's averages and its losses are in the checkpoint."""
    torch.manual_seed(0)
    teacher, path = from_edm(MLP(2, 16, 1).eval()), tmp_path / "run.pt"

    def part(checkpoint=None, stop_at=None):
        second = SecondScore(teacher, LEVELS, rank=2, targets=("1", "last"), lr=1e-2)
        points = Points(normal(5, 2).float())
        end, _ = run(points, vsd(D, second), companion=second, checkpoint=checkpoint, stop_at=stop_at)
        return end, second.losses, torch.cat([p.detach().flatten() for p in second.net.parameters() if p.requires_grad])

    part(path, 5)
    (resumed, *state), (end, *whole_state) = part(path), part()
    assert torch.equal(resumed, end) and state[0] == whole_state[0] and torch.equal(state[1], whole_state[1])
    assert len(state[0]) == 12 and not any(p.requires_grad and p.grad is not None for p in teacher.net.parameters())


def test_an_interruption_costs_at_most_the_steps_since_the_last_save(tmp_path):
    """The rule breaks in step 7; the checkpoint of step 4 is there, and from it the run ends as if nothing had been."""
    path, calls = tmp_path / "run.pt", []

    def broken(x0, sigma, noise):
        calls.append(1)
        return x0 * math.nan if len(calls) == 7 else sds(D, of_score)(x0, sigma, noise)

    with pytest.raises(FloatingPointError, match="step 7"):
        run(rule=broken, checkpoint=path, save_every=4)
    assert torch.load(path)["step"] == 4
    assert torch.equal(run(checkpoint=path)[0], run()[0])


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(checkpoint=path)
    for options, message in (
        ({"steps": 13}, "steps = 12; expected steps = 13: delete it, or ask for the same run"),
        ({"seed": 1}, "seed = 0; expected seed = 1"),
        ({"companion": Centre()}, "has no companion"),
        ({"render": Points(normal(6, 2))}, r"shapes \{'theta': \(5, 2\)\}; expected those of render, \{'theta': \(6, 2\)\}"),
        ({"render": Curved()}, "'A': "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            run(checkpoint=path, **options)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    run(checkpoint=(other := tmp_path / "companion.pt"), companion=Centre())
    with pytest.raises(ValueError, match="has a companion"):
        run(checkpoint=other)


def test_what_training_saved_is_no_checkpoint_of_a_distillation(tmp_path):
    path, net = tmp_path / "net.pt", nn.Linear(2, 2)
    options = {"steps": 12, "half": False, "device": "cpu", "progress": False, "checkpoint": path}
    fit(net, lambda draws: (torch.randn(4, 2, generator=draws),), lambda net, x: net(x).square().mean(1), **options)
    with pytest.raises(ValueError, match=r"has a theta of shapes \{\}"):
        run(checkpoint=path)


# --- gradients that are not finite -------------------------------------------------------------------------------------


def test_a_gradient_that_is_nan_names_its_level_and_leaves_theta():
    """Rows above sigma = 1 break; neither theta nor the companion learns of it."""

    def broken(x, sigma):
        return torch.where(sigma[:, None] > 1, math.nan, D(x, sigma))

    levels = lambda progress, rows, draws: torch.tensor([0.2, 1.5, 0.3, 0.4, 2.5], dtype=F64)
    points, companion = Points(normal(5, 2)), Centre()
    with pytest.raises(FloatingPointError) as caught:
        run(points, sds(broken), levels=levels, companion=companion)
    message = "the gradient of step 1 is not finite at sigma = 1.5, 2.5 (2 of 5 rows); expected finite numbers"
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert torch.equal(points.theta, normal(5, 2)) and not companion.told


def test_one_level_for_all_rows_is_named_too():
    levels = lambda progress, rows, draws: torch.tensor(0.7, dtype=F64)
    with pytest.raises(FloatingPointError, match=r"sigma = 0.7 \(1 of 5 rows\)|sigma = 0.7, 0.7, 0.7 \(5 of 5 rows\)"):
        run(rule=sds(lambda x, sigma: x * math.inf), levels=levels)


@pytest.mark.parametrize("encode", [None, lambda x: x.abs().sqrt()])
def test_a_gradient_that_breaks_on_its_way_back_leaves_theta(encode):
    """The root of 0 has an infinite slope: in the encoder, or in g itself."""

    class Root(Points):
        def forward(self):
            return self.theta if encode else self.theta.abs().sqrt()

    start = normal(5, 2)
    start[2, 1] = 0
    points = Root(start)
    with pytest.raises(FloatingPointError, match="with respect to x0 and not with respect to theta, at sigma = .*, [.]{3}; "):
        run(points, sds(D), encode=encode)
    assert torch.equal(points.theta, start)
