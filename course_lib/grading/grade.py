"""`course grade`: each item of a submission driven in a plain subprocess, judged here, written to a score sheet.

The subprocess shields the grader from crashes, endless loops and memory bombs, one item each. It does not
shield the machine from hostile code, so that untrusted work is refused.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from course_lib.grading import submission, verdicts
from course_lib.grading.items import Item, items_of
from course_lib.grading.paths import one_thread_env
from course_lib.grading.verdicts import Result
from course_lib.grading.worker import READY, pack, unpack
from course_lib.training import write_atomically

SECONDS = 20.0
START_SECONDS = 60.0


class Worker:
    """A subprocess that drives items; it is started anew after a loop or a crash, which then costs one item."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="course-grade-")
        self.folder = Path(self._folder.name)
        self.process: subprocess.Popen | None = None
        self.jobs = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
        self._folder.cleanup()

    def stop(self) -> None:
        """End the subprocess, if one runs."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def start(self) -> None:
        """Start the subprocess and wait until it has imported the library; RuntimeError where it does not come up."""
        ready = self.folder / READY
        ready.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "course_lib.grading.worker", str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
            cwd=self.folder, env=one_thread_env(),
        )  # fmt: skip
        if self._wait(ready, START_SECONDS) != 0:
            self.stop()
            raise RuntimeError("the worker process did not start")

    def _wait(self, file: Path, seconds: float) -> int | None:
        """Wait for a file: 0 when it is there, None when time is up, the exit status (or 1) when the process ended first."""
        deadline = time.monotonic() + seconds
        while not file.exists():
            status = self.process.poll()
            if status is not None and not file.exists():
                return status or 1
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)
        return 0

    def drive(self, item: Item, code: str, cases: list[dict[str, Any]], seconds: float = SECONDS) -> tuple[str, str, list[dict]]:
        """Drive one item: (status or '', message, outputs)."""
        if self.process is None:
            self.start()
        self.jobs += 1
        job = str(self.jobs)
        rest = pack(cases, self.folder / f"{job}.npz")
        (self.folder / f"{job}.json").write_text(json.dumps({"item": item.id, "code": code, "cases": rest}))
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(job + "\n")
            self.process.stdin.flush()
        done = self.folder / f"{job}.out.json"
        status = self._wait(done, seconds)
        if status is None:
            self.stop()
            return verdicts.TIMED_OUT, f"no answer within {seconds:.0f} s; look for a loop without end", []
        if status != 0:
            self.stop()
            if status == -signal.SIGKILL:
                return verdicts.OUT_OF_MEMORY, "the process was killed; it asked for too much memory", []
            return verdicts.CRASHED, f"the function ended the process (exit status {status})", []
        try:
            answer = json.loads(done.read_text())
            return answer["status"], answer["message"], unpack(answer["outputs"], self.folder / f"{job}.out.npz")
        except (ValueError, KeyError, OSError) as error:
            return verdicts.CRASHED, f"the answer cannot be read back ({error})", []


@dataclass
class Sheet:
    """The score sheet of one submission."""

    name: str
    set: str
    points: int
    out_of: int
    results: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def text(self) -> str:
        """The sheet for people: a line per item, then the sum."""
        lines = [f"{self.name}: {self.points} of {self.out_of} points"]
        if self.error:
            lines.append(f"  {self.error}")
        for row in self.results:
            note = f": {row['message']}" if row["message"] else ""
            lines.append(f"  {row['item']}  {row['points']}/{row['out_of']}  {row['status']}{note}")
        return "\n".join(lines)


def collect(given: list[Path]) -> dict[Path, str]:
    """The notebooks in files and folders (searched to the bottom), each with a name that no other has."""
    paths = [p for one in given for p in (sorted(one.rglob("*.ipynb")) if one.is_dir() else [one])]
    paths = list(dict.fromkeys(path for path in paths if ".ipynb_checkpoints" not in path.parts))
    names: dict[Path, str] = {}
    for path in paths:
        parts, depth = path.resolve().with_suffix("").parts, 1
        while any(other != path and other.resolve().with_suffix("").parts[-depth:] == parts[-depth:] for other in paths):
            depth += 1
        names[path] = "-".join(parts[-depth:])
    return names


def grade(
    path: Path, seed: int | None = None, seconds: float = SECONDS, worker: Worker | None = None, name: str | None = None
) -> Sheet:
    """Grade one notebook, on cases from `seed` or from a secret one.

    An item at which the grader itself fails is an 'infrastructure error', to be graded again.
    """
    try:
        notebook = submission.read(path)
        number = submission.guess_set(Path(path), notebook)
    except submission.Unreadable as error:
        return Sheet(name or Path(path).stem, "", 0, 0, error=f"{verdicts.UNREADABLE}: {error}")
    seed = secrets.randbits(32) if seed is None else seed
    items = items_of(number)
    answers = submission.answers(notebook, number)
    sheet = Sheet(name or Path(path).stem, number, 0, sum(item.points for item in items.values()))
    with contextlib.ExitStack() as stack:
        worker = worker or stack.enter_context(Worker())
        for item in items.values():
            result = _grade_item(item, answers[item.id], worker, seed, seconds)
            points = item.points if result.correct else 0
            sheet.points += points
            sheet.results.append({**asdict(result), "title": item.title, "points": points, "out_of": item.points})
    return sheet


def _grade_item(item: Item, answer: submission.Answer, worker: Worker, seed: int, seconds: float) -> Result:
    if answer.missing:
        return Result(item.id, verdicts.MISSING, answer.missing)
    try:
        drawn = verdicts.exam(item.id, seed)
        status, message, outputs = worker.drive(item, answer.code, drawn.cases, seconds)
        return Result(item.id, status, message) if status else verdicts.verdict(item, drawn, outputs)
    except Exception as error:  # the grader's own fault must not cost the student a point in silence
        return Result(item.id, verdicts.INFRASTRUCTURE, f"{type(error).__name__}: {error}; grade this item again")


def write(sheet: Sheet, folder: Path) -> Path:
    """Write NAME.json and NAME.txt into `folder`; returns the path of the JSON."""
    target = Path(folder) / f"{sheet.name}.json"
    write_atomically(target, lambda path: path.write_text(json.dumps(asdict(sheet), indent=2) + "\n"))
    write_atomically(Path(folder) / f"{sheet.name}.txt", lambda path: path.write_text(sheet.text() + "\n"))
    return target
