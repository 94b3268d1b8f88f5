"""Measurements that a lecture loads: a file of rows beside the command that measures what it has not yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from course_lib import devices
from course_lib.training import write_atomically

Row = dict[str, Any]


def read(path: Path, command: str) -> dict[str, Any]:
    """Everything that is stored; ValueError, with the command that measures it, where nothing is."""
    if not path.exists():
        raise ValueError(f"{path.name} is missing; run `{command}`")
    return json.loads(path.read_text())


def keep(path: Path, stored: dict[str, Any]) -> None:
    """Write what is measured so far, and on what hardware, so that a run that is interrupted goes on from there."""
    stored["hardware"] = devices.describe()
    write_atomically(path, lambda file: file.write_text(json.dumps(stored, indent=1) + "\n"))
