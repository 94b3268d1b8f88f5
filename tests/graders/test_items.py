"""Every item of every set: right answers pass, the stub earns nothing, each known mistake is rejected and named."""

import time

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


def test_editing_an_input_is_said():
    def edits(x_prev, beta, eps):
        x_prev *= (1 - beta).sqrt()
        return x_prev + beta.sqrt() * eps

    result = verdicts.judge("01.1", edits)
    assert result.status == verdicts.WRONG and "x_prev in place" in result.message


def test_a_crash_names_the_line():
    def helper(y):
        return y.no_such_method()

    def crashes(x_prev, beta, eps):
        y = x_prev
        return y.no_such_method()

    def asks(x_prev, beta, eps):
        return helper(x_prev)

    for answer, line in ((crashes, "line 3 of crashes"), (asks, "line 2 of asks")):  # not the helper's, above the answer
        result = verdicts.judge("01.1", answer)
        assert result.status == verdicts.CRASHED
        assert f"AttributeError in {line}" in result.message


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
