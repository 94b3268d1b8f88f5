"""Judging an answer: from arrays to a verdict that names the mistake."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from course_lib.devices import one_thread
from course_lib.grading.items import Case, Item, NotAttempted, Outputs, Unacceptable, find, without

CORRECT, WRONG, NOT_ATTEMPTED, CRASHED = "correct", "wrong", "not attempted", "crashed"
TIMED_OUT, OUT_OF_MEMORY, MISSING, UNREADABLE = "timed out", "out of memory", "missing", "unreadable"
INFRASTRUCTURE = "infrastructure error"
REDRAWS = 50


@dataclass(frozen=True)
class Result:
    """What became of one item: status, what is said to the student, the mistake's name where it is known."""

    item: str
    status: str
    message: str = ""
    mistake: str = ""

    @property
    def correct(self) -> bool:
        """Whether the answer is right."""
        return self.status == CORRECT


def same(a: Outputs, b: Outputs, tolerance: float) -> bool:
    """Whether two answers agree in names and shapes, and in values to `tolerance` times the largest number of `b`."""
    if a.keys() != b.keys():
        return False
    for name, right_answer in b.items():
        if a[name].shape != right_answer.shape or not np.isfinite(a[name]).all():
            return False
        scale = max(1e-12, float(np.abs(right_answer).max(initial=0.0)))
        if float(np.abs(a[name] - right_answer).max(initial=0.0)) > tolerance * scale:
            return False
    return True


@dataclass(frozen=True)
class Exam:
    """The drawn cases of an item with the answers of the reference and of every known mistake."""

    cases: list[Case]
    expected: list[Outputs]
    wrong: dict[str, list[Outputs]]


@lru_cache(maxsize=64)
def exam(item_id: str, seed: int) -> Exam:
    """Draw cases, again and again until the reference and all known mistakes differ from one another.

    They differ where on some case their outputs are apart by more than 100 tolerances.
    """
    item = find(item_id)
    for attempt in range(REDRAWS):
        rng = np.random.default_rng([seed, attempt])
        with one_thread():
            cases = item.cases(rng)
            answers = {"": [item.drive(item.reference, case) for case in cases]}
            answers |= {m.name: [item.drive(m.fn, case) for case in cases] for m in item.mistakes}
        names = list(answers)
        apart = (
            any(not same(p, q, 100 * item.tolerance) for p, q in zip(answers[a], answers[b], strict=True))
            for i, a in enumerate(names)
            for b in names[i + 1 :]
        )
        if all(apart):
            return Exam(cases, answers.pop(""), answers)
    raise RuntimeError(
        f"item {item_id}: known mistakes could not be told apart in {REDRAWS} draws; change cases() or the mistakes"
    )


def run_drive(item: Item, fn: Callable[..., Any], cases: list[Case]) -> tuple[str, str, list[Outputs]]:
    """Drive a student's function through the cases: (status or '', message, outputs). Never raises for the student's faults."""
    outputs = []
    try:
        with one_thread():
            for case in cases:
                with without(item.answers):
                    outputs.append(item.drive(fn, case))
    except NotAttempted:
        return NOT_ATTEMPTED, "", []
    except Unacceptable as error:
        return WRONG, str(error), []
    except MemoryError:
        return OUT_OF_MEMORY, "the function asked for more memory than it may have", []
    except Exception as error:  # whatever a student's code raises is an answer, not a fault of ours
        if "can't allocate memory" in str(error):  # how torch says MemoryError
            return OUT_OF_MEMORY, "the function asked for more memory than it may have", []
        return CRASHED, _crash(error, fn), []
    return "", "", outputs


def _crash(error: Exception, fn: Callable[..., Any]) -> str:
    code = getattr(fn, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    here = (code.co_filename, code.co_name) if code is not None else None  # not a helper that stands beside it in the cell
    mine = [frame for frame in frames if (frame.filename, frame.name) == here]
    first = code.co_firstlineno if code is not None else 1
    where = f" in line {mine[-1].lineno - first + 1} of {fn.__name__}" if mine and mine[-1].lineno else ""
    said = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}{where}: {said}"


def verdict(item: Item, exam: Exam, outputs: list[Outputs]) -> Result:
    """Compare arrays with the reference; name the known mistake that they equal, else the first law that fails."""
    if len(outputs) != len(exam.cases):
        return Result(item.id, CRASHED, f"{len(outputs)} of {len(exam.cases)} cases were answered")
    if all(same(got, expected, item.tolerance) for got, expected in zip(outputs, exam.expected, strict=True)):
        return Result(item.id, CORRECT)
    for known in item.mistakes:
        if all(same(got, wrong, item.tolerance) for got, wrong in zip(outputs, exam.wrong[known.name], strict=True)):
            return Result(item.id, WRONG, known.diagnosis, known.name)
    for got, expected in zip(outputs, exam.expected, strict=True):
        for name, right_answer in expected.items():
            if name not in got:
                return Result(item.id, WRONG, f"{name} is missing from what the function returns")
            if got[name].shape != right_answer.shape:
                return Result(item.id, WRONG, f"{name} has shape {got[name].shape}; expected {right_answer.shape}")
            if not np.isfinite(got[name]).all():
                return Result(
                    item.id,
                    WRONG,
                    f"{name} has values that are not finite; look for a division by 0 or a root of a negative number",
                )
    for case, got in zip(exam.cases, outputs, strict=True):
        for one in item.laws:
            if not one.holds(case, got):
                return Result(item.id, WRONG, one.words)
    return Result(item.id, WRONG, _farthest(exam, outputs))


def _farthest(exam: Exam, outputs: list[Outputs]) -> str:
    """Say where an unforeseen wrong answer is farthest from the right one, without giving the answer."""
    gaps = [
        (float(np.abs(got[name] - expected[name]).max()) / max(1e-12, float(np.abs(expected[name]).max())), name, number)
        for number, (got, expected) in enumerate(zip(outputs, exam.expected, strict=True), 1)
        for name in expected
    ]
    gap, name, number = max(gaps)
    place = f"in case {number} of {len(outputs)}"
    return f"{name} is off by {gap:.1%} of its largest value {place}; none of the known mistakes gives this"


def judge(item_id: str, fn: Callable[..., Any], seed: int = 0) -> Result:
    """Cases, drive and verdict in one process: what `check` does in a notebook."""
    item, drawn = find(item_id), exam(item_id, seed)
    status, message, outputs = run_drive(item, fn, drawn.cases)
    return Result(item_id, status, message) if status else verdict(item, drawn, outputs)
