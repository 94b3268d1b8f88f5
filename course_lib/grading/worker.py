"""The process in which a submission's code runs: it drives items and writes arrays, and judges nothing.

`python -m course_lib.grading.worker FOLDER` reads one job name per line; job K reads FOLDER/K.json and
K.npz and leaves K.out.json and K.out.npz, the former last, so that its presence means the job is done.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from course_lib.grading import verdicts
from course_lib.grading.items import Case, Outputs, find

READY = "ready"
MEMORY = 3 << 30  # bytes of address space


def pack(cases: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Write the arrays of `cases` to an npz file and return the rest, for JSON."""
    arrays = {
        f"{i}.{name}": value for i, case in enumerate(cases) for name, value in case.items() if isinstance(value, np.ndarray)
    }
    np.savez(path, **arrays)
    return [{name: value for name, value in case.items() if not isinstance(value, np.ndarray)} for case in cases]


def unpack(rest: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Undo `pack`; no pickles. Raises ValueError where the file holds anything but arrays of numbers."""
    cases = [dict(one) for one in rest]
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            index, _, name = key.partition(".")
            value = arrays[key]
            if value.dtype.kind not in "fiub" or not index.isdigit() or int(index) >= len(cases):
                raise ValueError(f"{key} of type {value.dtype}; expected an array of numbers")
            cases[int(index)][name] = value
    return cases


def run(folder: Path, job: str) -> None:
    """Do one job: define the student's function, drive it, write what it returned."""
    request = json.loads((folder / f"{job}.json").read_text())
    item = find(request["item"])
    cases: list[Case] = unpack(request["cases"], folder / f"{job}.npz")
    outputs: list[Outputs] = []
    space: dict[str, Any] = {"__name__": "submission"}
    try:
        exec(compile(request["code"], f"<{item.id}>", "exec"), space)
    except MemoryError:
        status, message = verdicts.OUT_OF_MEMORY, "the cell asked for more memory than it may have"
    except Exception as error:
        status, message = (
            verdicts.CRASHED,
            f"{type(error).__name__} when the cell runs: {str(error).splitlines()[0] if str(error) else ''}",
        )
    else:
        status, message, outputs = verdicts.run_drive(item, space[item.function], cases)
    rest = pack(outputs, folder / f"{job}.out.npz")
    temporary = folder / f"{job}.tmp"
    temporary.write_text(json.dumps({"status": status, "message": message, "outputs": rest}))
    os.replace(temporary, folder / f"{job}.out.json")


def main() -> None:
    """Read job names from standard input until it closes."""
    import torch

    torch.set_num_threads(1)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    folder = Path(sys.argv[1])
    (folder / READY).touch()
    for line in sys.stdin:
        run(folder, line.strip())


if __name__ == "__main__":
    main()
