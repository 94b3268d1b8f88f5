"""Measurements that a lecture loads: a file of rows beside the command that measures what it has not yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from course_lib import devices
from course_lib.training import write_atomically

Row = dict[str, Any]
Parts = Mapping[str, tuple[Callable[..., Row], list[dict[str, Any]]]]
"""Part -> what measures one row, and what identifies each row."""


def read(path: Path, command: str) -> dict[str, Any]:
    """Everything that is stored; ValueError, with the command that measures it, where nothing is."""
    if not path.exists():
        raise ValueError(f"{path.name} is missing; run `{command}`")
    return json.loads(path.read_text())


def keep(path: Path, stored: dict[str, Any]) -> None:
    """Write what is measured so far, and on what hardware, so that a run that is interrupted goes on from there."""
    stored["hardware"] = devices.describe()
    write_atomically(path, lambda file: file.write_text(json.dumps(stored, indent=1) + "\n"))


def rows(path: Path, command: str, part: str) -> list[Row]:
    """The rows of one part; ValueError, with the command, where it was not measured."""
    file = read(path, f"{command} {part}")
    if not file.get(part):
        there = ", ".join(name for name in file if name != "hardware")
        raise ValueError(f"{part!r} is not in {path.name}, which has {there}; run `{command} {part}`")
    return file[part]


def run(path: Path, command: str, parts: Parts, asked: Sequence[str]) -> None:
    """Measure what is missing of the parts asked for, or of all, row by row; ValueError for a part that there is not."""
    if unknown := [part for part in asked if part not in parts]:
        raise ValueError(f"{unknown[0]!r}; expected some of {', '.join(parts)}")
    for part in asked or parts:
        measure, keys = parts[part]
        for key in keys:
            file = read(path, command) if path.exists() else {}
            done = file.setdefault(part, [])
            if not any(key.items() <= row.items() for row in done):
                done.append(measure(**key))
                print(part, done[-1], flush=True)
                keep(path, file)
