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


def solved_function(number: str, item_id: str):
    """The student's function of the solution notebook, defined as the notebook defines it."""
    space: dict = {}
    exec("import torch\nfrom torch import Tensor\n" + answer_cell(built(number, "solved"), item_id).source, space)
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
    exec("import torch\nfrom torch import Tensor\n" + answer_cell(built(number, "blank"), item_id).source, space)
    assert verdicts.judge(item_id, space[find(item_id).function]).status == verdicts.NOT_ATTEMPTED


@pytest.mark.parametrize(("number", "item_id"), ITEMS, ids=IDS)
def test_unforeseen_wrong_answers_are_rejected(number, item_id):
    right = solved_function(number, item_id)

    def shifted(*args):
        out = right(*args)
        return tuple(value + 0.01 for value in out) if isinstance(out, tuple) else out + 0.01

    def flattened(*args):
        out = right(*args)
        return tuple(value.sum() for value in out) if isinstance(out, tuple) else out.sum()

    def unfinished(*args):
        out = right(*args)
        return tuple(value * float("nan") for value in out) if isinstance(out, tuple) else out * float("nan")

    for wrong in (shifted, flattened, unfinished, lambda *args: None, lambda *args: "42"):
        result = verdicts.judge(item_id, wrong)
        assert result.status == verdicts.WRONG and result.message and not result.mistake


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
