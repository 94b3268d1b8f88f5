"""Where the parts of the course lie, and how a user's name for one of them is understood."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import course_lib


class CourseError(ValueError):
    """Something a user can mend; the message is one line that says how."""


ROOT = Path(course_lib.__file__).resolve().parents[1]
_NUMBER = re.compile(r"(\d\d[a-z]?)_")
KINDS = ("lectures", "solutions", "exercises")


def root() -> Path:
    """The folder that holds lectures/, solutions/ and exercises/; CourseError where it is not beside the package."""
    if not (ROOT / "lectures").is_dir():
        raise CourseError(f"no lectures/ beside {Path(course_lib.__file__).parent}; install from a clone with `pip install -e .`")
    return ROOT


def sources(kind: str, base: Path | None = None) -> dict[str, Path]:
    """The sources of lectures or solution sets by number: {'01': .../01_forward_process.py}; a second part is '03b'."""
    folder = (base or root()) / kind
    return {found[1]: path for path in sorted(folder.glob("*.py")) if (found := _NUMBER.match(path.name))}


def number_of(name: str) -> str:
    """Turn '1', '01' or '01_forward_process' into '01', and '3b' into '03b'; CourseError where there is none."""
    known = sources("lectures") | sources("solutions")
    number, underscore, _ = name.partition("_")
    number = f"0{number}" if number[:1].isdigit() and not number[1:2].isdigit() else number
    stems = [path.stem for path in known.values()]
    if number not in known or (underscore and name not in stems):
        near = difflib.get_close_matches(name, [*known, *stems], n=1, cutoff=0.4)
        raise CourseError(
            f"lecture = {name!r}; expected one of {', '.join(stems)}" + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    return number


def one_thread_env() -> dict[str, str]:
    """The environment in which notebooks run: one thread each, since two run side by side."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
