"""Where the parts of the course lie, and how a user's name for one of them is understood."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import course_lib


class CourseError(ValueError):
    """Something a user can mend; the message is one line that says how."""


ROOT = Path(course_lib.__file__).resolve().parents[1]
KINDS = ("lectures", "solutions", "exercises")


def root() -> Path:
    """The folder that holds lectures/, solutions/ and exercises/; CourseError where it is not beside the package."""
    if not (ROOT / "lectures").is_dir():
        raise CourseError(f"no lectures/ beside {Path(course_lib.__file__).parent}; install from a clone with `pip install -e .`")
    return ROOT


def sources(kind: str, base: Path | None = None) -> dict[str, Path]:
    """The sources of lectures or solution sets by number: {'01': .../01_forward_process.py}."""
    folder = (base or root()) / kind
    return {path.stem[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.py"))}


def number_of(name: str) -> str:
    """Turn '1', '01' or '01_forward_process' into '01'; CourseError, with the nearest name, where there is none."""
    known = sources("lectures") | sources("solutions")
    number = name[:2] if name[:2] in known else name.zfill(2)
    stems = [path.stem for path in known.values()]
    if number not in known or (len(name) > 2 and name not in stems):
        near = difflib.get_close_matches(name, [*known, *stems], n=1, cutoff=0.4)
        raise CourseError(
            f"lecture = {name!r}; expected one of {', '.join(stems)}" + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    return number


def one_thread_env() -> dict[str, str]:
    """The environment in which notebooks run: one thread each, since two run side by side."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
