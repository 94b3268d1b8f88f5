"""The index of what the course teaches: course_lib/catalog.toml, one entry per method."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("catalog.toml")


@dataclass(frozen=True)
class System:
    """One method: where it comes from, where it is taught, what stands behind it, and what was measured."""

    id: str
    name: str
    paper: str
    authors: str
    year: int
    arxiv: str
    lecture: str
    functions: list[str]
    tests: list[str]
    claim: str
    measured: str


def systems(path: Path = PATH) -> list[System]:
    """All entries, in the file's order; ValueError names an entry and the field that is missing or unknown."""
    wanted = {field.name for field in fields(System)}
    result = []
    for number, entry in enumerate(tomllib.loads(path.read_text()).get("system", []), 1):
        wrong = wanted ^ entry.keys()
        if wrong:
            raise ValueError(
                f"{path.name}, entry {number} ({entry.get('id', 'no id')}): missing or unknown {', '.join(sorted(wrong))}"
            )
        result.append(System(**entry))
    return result


def rows() -> list[dict[str, Any]]:
    """All entries as plain dictionaries, for JSON."""
    return [vars(system) for system in systems()]
