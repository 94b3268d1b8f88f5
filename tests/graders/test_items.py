"""Every item of every set: right answers pass, the stub earns nothing, each known mistake is rejected and named."""

import time

import numpy as np
import pytest
import torch

from course_lib.grading import source, verdicts
from course_lib.grading.items import find, items_of, set_names
from course_lib.grading.paths import sources
from tests.graders.tools import IDS, ITEMS, answer_cell, built

SEEDS = (0, 1, 2)
IMPORTS = "import math\nimport torch\nfrom torch import Tensor\n"


def solved_function(number: str, item_id: str):
    """The student's function of the solution notebook, defined as the notebook defines it."""
    space: dict = {}
    exec(IMPORTS + answer_cell(built(number, "solved"), item_id).source, space)
    return space[find(item_id).function]


@pytest.mark.parametrize(("number", "item_id"), ITEMS, ids=IDS)
def test_solution_is_right(number, item_id):
    for seed in SEEDS:
        result = verdicts.judge(item_id, solved_function(number, item_id), seed)
        assert result.correct, result.message


@pytest.mark.parametrize(("number", "item_id"), ITEMS, ids=IDS)
def test_each_known_mistake_is_named(number, item_id):
    item = find(item_id)
    assert len(item.mistakes) >= 5
    for seed in SEEDS:
        for known in item.mistakes:
            result = verdicts.judge(item_id, known.fn, seed)
            assert (result.status, result.mistake) == (verdicts.WRONG, known.name)
            assert result.message == known.diagnosis


@pytest.mark.parametrize(("number", "item_id"), ITEMS, ids=IDS)
def test_stub_is_not_attempted(number, item_id):
    space: dict = {}
    exec(IMPORTS + answer_cell(built(number, "blank"), item_id).source, space)
    assert verdicts.judge(item_id, space[find(item_id).function]).status == verdicts.NOT_ATTEMPTED


@pytest.mark.parametrize(("number", "item_id"), ITEMS, ids=IDS)
def test_unforeseen_wrong_answers_are_rejected(number, item_id):
    right = solved_function(number, item_id)

    def altered(change):
        def wrong(*args):
            out = right(*args)
            values = [change(torch.as_tensor(value)) for value in (out if isinstance(out, tuple) else (out,))]
            return tuple(values) if isinstance(out, tuple) else values[0]

        return wrong

    shifted = altered(lambda value: value + 0.01)
    flattened = altered(lambda value: value.sum() if value.ndim else value[None])  # a single number becomes a row
    unfinished = altered(lambda value: value * float("nan"))

    for wrong in (shifted, flattened, unfinished, lambda *args: None, lambda *args: "42"):
        result = verdicts.judge(item_id, wrong)
        assert result.status == verdicts.WRONG and result.message and not result.mistake


@pytest.mark.parametrize(("number", "item_id"), ITEMS, ids=IDS)
def test_laws_hold_for_the_right_answer(number, item_id):
    """A law that the right answer breaks would be said to students whose fault is another."""
    for seed in range(10):
        drawn = verdicts.exam(item_id, seed)
        for case, out in zip(drawn.cases, drawn.expected, strict=True):
            assert [one.words for one in find(item_id).laws if not one.holds(case, out)] == []


@pytest.mark.parametrize(("number", "item_id"), ITEMS, ids=IDS)
def test_check_answers_within_a_second(number, item_id):
    right = solved_function(number, item_id)
    verdicts.exam.cache_clear()
    start = time.perf_counter()
    verdicts.judge(item_id, right)
    assert time.perf_counter() - start < 1


def test_a_right_answer_written_in_another_way_passes_set_01():
    def by_precision(x, sigma, mean, std):
        data, prior = 1 / sigma**2, 1 / std**2
        return (data * x + prior * mean) / (data + prior)

    def by_tweedie(x, sigma, mean, std):
        return x + sigma**2 * (mean - x) / (std**2 + sigma**2)

    def in_a_loop(x_prev, beta, eps):
        out = torch.empty_like(x_prev)
        for i in range(len(x_prev)):
            out[i] = np.sqrt(1 - float(beta)) * x_prev[i] + float(beta) ** 0.5 * eps[i]
        return out

    assert verdicts.judge("01.7", by_precision).correct
    assert verdicts.judge("01.7", by_tweedie).correct
    assert verdicts.judge("01.1", in_a_loop).correct


def test_the_library_is_no_answer_set_01():
    from course_lib.gaussians import Mixture
    from course_lib.gaussians import Mixture as Renamed

    def by_library(x, sigma, weights, means, std):
        return Mixture.isotropic(means, std, weights).denoiser(x, sigma)

    def renamed(x, sigma, weights, means, std):
        return Renamed(weights, means, std**2 * torch.eye(2).expand(3, 2, 2)).denoiser(x, sigma)

    for fn in (by_library, renamed):
        result = verdicts.judge("01.8", fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message


def test_a_right_answer_written_in_another_way_passes_set_02():
    def by_precision(x0, x_t, t, betas):
        a = torch.cumprod(1 - betas, 0)
        before = torch.where(t > 0, a[t - 1], 1.0)
        prior, reading = 1 / (1 - before), (1 - betas[t]) / betas[t]  # of N(sqrt(before) x0, ...) and of x_t / sqrt(1 - beta)
        share = torch.where(before < 1, prior / (prior + reading), 1.0).reshape(-1, 1, 1, 1)
        signal, kept = before.sqrt().reshape(-1, 1, 1, 1), (1 - betas[t]).sqrt().reshape(-1, 1, 1, 1)
        return share * signal * x0 + (1 - share) * x_t / kept, torch.where(before < 1, 1 / (prior + reading), 0.0)

    def float_loss(net, ema, optimizer, loss_fn, batch, decay):
        optimizer.zero_grad(set_to_none=False)
        loss = loss_fn(net, batch)
        loss.backward()
        optimizer.step()
        for e, w in zip(ema.parameters(), net.parameters(), strict=True):
            e.data = decay * e.data + (1 - decay) * w.data
        return loss.item()

    @torch.no_grad()
    def by_the_posterior(net, x_T, betas, noise):
        a, x = torch.cumprod(1 - betas, 0), x_T.clone()
        for t in range(len(betas) - 1, -1, -1):
            before = a[t - 1] if t else torch.ones(())
            x0 = (x - (1 - a[t]).sqrt() * net(x, t)) / a[t].sqrt()
            x = (before.sqrt() * betas[t] * x0 + (1 - betas[t]).sqrt() * (1 - before) * x) / (1 - a[t])
            x += (t > 0) * betas[t].sqrt() * noise(x)  # a draw at t = 0 too, which is not used
        return x

    def all_at_once(real, fake, k):
        def share(points, centres):
            nearest = (centres[:, None] - centres).norm(dim=-1).sort(1).values
            return np.mean([(p - centres).norm(dim=-1).le(nearest[:, k]).any() for p in points])

        return [share(fake, real), share(real, fake)]

    def by_distributions(x, mean, std):
        return -torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2, 3)) / np.log(2)

    @torch.no_grad()
    def in_sigma(net, x_T, betas, noise, times, eta):
        a = torch.cumprod(1 - betas, 0)[times]
        sigmas = [*((1 - a) / a).sqrt(), torch.zeros(())]
        x = x_T / a[0].sqrt()
        for t, sigma, after in zip(times, sigmas[:-1], sigmas[1:], strict=True):
            eps = net(x / (1 + sigma**2).sqrt(), torch.tensor([t]))
            s = eta * after * (1 - (after / sigma) ** 2).sqrt()
            x = x - sigma * eps + (after**2 - s**2).sqrt() * eps + s * noise(x)
        return x

    for item_id, fn in {"02.1": by_precision, "02.3": float_loss, "02.6": by_the_posterior, "02.8": all_at_once,
                        "02.9": by_distributions, "02.11": in_sigma}.items():  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.correct, (item_id, result.message)


def test_noise_of_ones_own_is_said_set_02():
    def draws_itself(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas))):
            x = x - betas[t] * net(x, t) + betas[t].sqrt() * torch.randn_like(x)
        return x

    def draws_on_and_on(net, x_T, betas, noise):
        return sum(noise(x_T) for _ in range(100))

    for fn, said in ((draws_itself, "two runs on the same noise"), (draws_on_and_on, "is called more than")):
        result = verdicts.judge("02.6", fn)
        assert result.status == verdicts.WRONG and said in result.message


def test_the_library_is_no_answer_set_02():
    from course_lib.likelihood import variational_bound
    from course_lib.metrics import precision_recall
    from course_lib.sample import sample
    from course_lib.steps import ddpm
    from course_lib.training import EMA

    def by_sample(net, x_T, betas, noise):
        alpha_bar = torch.cumprod(1 - betas, 0)
        sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt().flip(0), torch.zeros(1)])
        D = lambda x, sigma: x - sigma * net(x / (1 + sigma**2).sqrt(), 0)
        return sample(D, x_T / alpha_bar[-1].sqrt(), sigmas, ddpm(noise, "large"))

    def by_bound(x0, x0_hat, sigma, sigma_next):
        return variational_bound(lambda x, s: x0_hat, x0, torch.stack([sigma, sigma_next]), torch.zeros_like).diffusion

    def by_ema(net, ema, optimizer, loss_fn, batch, decay):
        return EMA(net, decay)

    for item_id, fn in {"02.3": by_ema, "02.6": by_sample, "02.8": precision_recall, "02.10": by_bound}.items():
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message, (item_id, result)


def test_editing_an_input_is_said():
    def edits(x_prev, beta, eps):
        x_prev *= (1 - beta).sqrt()
        return x_prev + beta.sqrt() * eps

    result = verdicts.judge("01.1", edits)
    assert result.status == verdicts.WRONG and "x_prev in place" in result.message


def test_a_crash_names_the_line():
    def crashes(x_prev, beta, eps):
        y = x_prev
        return y.no_such_method()

    result = verdicts.judge("01.1", crashes)
    assert result.status == verdicts.CRASHED
    assert "AttributeError in line 3 of crashes" in result.message


@pytest.mark.parametrize("number", set_names(), ids=[f"set_{number}" for number in set_names()])
def test_set_is_complete(number):
    items = items_of(number)
    assert len(items) >= 8
    assert all(item.hints and item.points > 0 and 1 <= item.difficulty <= 3 and item.minutes > 0 for item in items.values())
    text = sources("solutions")[number].read_text()
    total = sum(item.points for item in items.values())
    assert f"**{total}**" in text, "the table of points in the set's introduction"
    assert all(f"| {item_id} " in text for item_id in items)


def test_unknown_items_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean '01\.2'"):
        find("01.02")
    with pytest.raises(ValueError, match="expected one of"):
        items_of("77")


def test_items_whose_mistakes_cannot_be_told_apart_are_an_error(monkeypatch):
    from dataclasses import replace

    item = find("01.1")
    twin = replace(item.mistakes[0], name="twin")
    monkeypatch.setattr(verdicts, "find", lambda _: replace(item, mistakes=(*item.mistakes, twin)))
    with pytest.raises(RuntimeError, match="could not be told apart"):
        verdicts.exam.__wrapped__("01.1", 0)


def test_marks_must_pair():
    with pytest.raises(ValueError, match="do not pair"):
        source.blank("def f():\n    ### BEGIN SOLUTION\n    return 1\n")
