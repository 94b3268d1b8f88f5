"""What an exercise item is: three functions, wrong implementations with their diagnoses, and a ladder of hints.

An item is written as a class used as a namespace:

    @item("01.1", title="...", function="noising_step", points=1, minutes=5, difficulty=1, hints=(...))
    class NoisingStep:
        def cases(rng): ...                 # draws arrays and names: a list of Case
        def drive(fn, case): ...            # calls the student's function, returns named arrays
        def reference(...): ...             # the right answer, from the library or a closed form
        @mistake("You ...")                 # a wrong implementation that a student would defend
        def forgot_the_root(...): ...
        @law("...")                         # a property in words, for wrong answers that nobody foresaw
        def keeps_variance(case, outputs): ...

`drive` is all that meets the student's code; verdicts see arrays only.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch

Case = dict[str, Any]
"""Arrays (numpy), numbers and names: whatever JSON and an npz file can carry."""
Outputs = dict[str, np.ndarray]


class NotAttempted(Exception):
    """The stub's `...` came back."""


class Unacceptable(Exception):
    """The student's function broke a rule of the item; the message says which."""


@dataclass(frozen=True)
class Mistake:
    """A known wrong implementation and what is said to the student who made it."""

    name: str
    diagnosis: str
    fn: Callable[..., Any]


@dataclass(frozen=True)
class Law:
    """A property of a right answer, in words; `holds(case, outputs)` tests it on arrays."""

    words: str
    holds: Callable[[Case, Outputs], bool]


@dataclass(frozen=True)
class Item:
    """One graded question. See the module's docstring; `answers` names the library functions that would answer it."""

    id: str
    title: str
    function: str
    points: int
    minutes: int
    difficulty: int
    hints: tuple[str, ...]
    answers: tuple[str, ...]
    tolerance: float
    cases: Callable[[np.random.Generator], list[Case]]
    drive: Callable[[Callable[..., Any], Case], Outputs]
    reference: Callable[..., Any]
    mistakes: tuple[Mistake, ...]
    laws: tuple[Law, ...]

    @property
    def set(self) -> str:
        """The number of the set, '01'."""
        return self.id.split(".")[0]


def mistake(diagnosis: str) -> Callable[[Callable[..., Any]], Mistake]:
    """Mark a function of an item's class as a known wrong answer."""
    return lambda fn: Mistake(fn.__name__, diagnosis, fn)


def law(words: str) -> Callable[[Callable[..., bool]], Law]:
    """Mark a function of an item's class as a property of right answers; `words` say what failed."""
    return lambda holds: Law(words, holds)


def item(
    id: str,
    *,
    title: str,
    function: str,
    points: int,
    minutes: int,
    difficulty: int,
    hints: tuple[str, ...],
    answers: tuple[str, ...] = (),
    tolerance: float = 1e-6,
) -> Callable[[type], Item]:
    """Turn a class into an `Item`. `tolerance` is relative to the largest number of the right answer."""

    def build(spec: type) -> Item:
        members = list(vars(spec).values())
        return Item(
            id, title, function, points, minutes, difficulty, hints, answers, tolerance,
            cases=spec.cases, drive=spec.drive, reference=spec.reference,
            mistakes=tuple(m for m in members if isinstance(m, Mistake)),
            laws=tuple(m for m in members if isinstance(m, Law)),
        )  # fmt: skip

    return build


# --- finding items ---------------------------------------------------------------------------------


def set_names() -> list[str]:
    """The numbers of the exercise sets that exist, sorted."""
    from course_lib.grading import sets

    return sorted(m.name.removeprefix("set_") for m in pkgutil.iter_modules(sets.__path__) if m.name.startswith("set_"))


def items_of(number: str) -> dict[str, Item]:
    """The items of one set by id, in order; ValueError for a set that does not exist."""
    if number not in set_names():
        raise ValueError(f"set = {number!r}; expected one of {', '.join(set_names())}")
    module = importlib.import_module(f"course_lib.grading.sets.set_{number}")
    found = [value for value in vars(module).values() if isinstance(value, Item)]
    return {one.id: one for one in sorted(found, key=lambda one: [int(part) for part in one.id.split(".")])}


def find(item_id: str) -> Item:
    """The item of this id; ValueError, with the nearest id, where there is none."""
    number = str(item_id).split(".")[0]
    items = items_of(number) if number in set_names() else {}
    if item_id not in items:
        known = [one for name in set_names() for one in items_of(name)]
        near = difflib.get_close_matches(str(item_id), known, n=1)
        raise ValueError(f"item = {item_id!r}; expected an id such as '01.1'" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return items[item_id]


# --- calling a student's function -------------------------------------------------------------------


def call(fn: Callable[..., Any], *args: Any) -> Any:
    """Call `fn` on copies of the tensors in `args`.

    Raises NotAttempted where it returns the stub's `...`, and Unacceptable where it edits its inputs.
    """
    given = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    result = fn(*given)
    if result is ...:
        raise NotAttempted
    for position, (before, after) in enumerate(zip(args, given, strict=True)):
        if isinstance(before, torch.Tensor) and not torch.equal(before, after):
            names = list(inspect.signature(fn).parameters)
            name = names[position] if position < len(names) else f"number {position + 1}"
            raise Unacceptable(f"the function changes its argument {name} in place; work on a copy and return that")
    return result


def arrays(**values: Any) -> Outputs:
    """Turn what a student's function returned into arrays; Unacceptable where a value is no tensor or number."""
    out: Outputs = {}
    for name, value in values.items():
        if value is ...:
            raise NotAttempted
        if isinstance(value, torch.Tensor):
            out[name] = value.detach().cpu().double().numpy()
        elif isinstance(value, (int, float, np.ndarray, np.number)) and not isinstance(value, bool):
            out[name] = np.asarray(value, dtype=np.float64)
        else:
            raise Unacceptable(f"{name} is {_kind(value)}; expected a tensor")
    return out


def _kind(value: Any) -> str:
    return "None (is a return missing?)" if value is None else f"of type {type(value).__name__}"


@contextmanager
def without(names: tuple[str, ...]) -> Iterator[None]:
    """Make Python calls of the named library functions raise Unacceptable: they would be the answer itself.

    Functions are recognised by their code, so it does not matter how they were imported.
    """
    forbidden = {code: name for name in names for code in _codes(name)}
    if not forbidden:
        yield
        return

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in forbidden:
            raise Unacceptable(f"{forbidden[frame.f_code]} is the answer itself; write it out")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


def _codes(dotted: str) -> list[CodeType]:
    """Code objects behind a dotted name: a function, a method, or all methods of a class."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            target: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            target = getattr(target, part)
        break
    else:
        raise ValueError(f"{dotted} cannot be imported")
    if inspect.isclass(target):
        return [inspect.unwrap(value).__code__ for value in vars(target).values() if isinstance(value, FunctionType)]
    return [inspect.unwrap(target).__code__]  # a decorator's own code is shared by all that it decorates
