"""`course lab` on a copy of the course, and a headless Chromium that reaches nothing but this machine."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from playwright.sync_api import Page, Route, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("course_lib", "lectures", "solutions", "exercises")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Lab:
    """A running `course lab`: `base` is the copy that it serves, `url` the address that it opens, with its token."""

    base: Path
    url: str


@dataclass
class Watched:
    """A page, and what must not happen on it."""

    page: Page
    foreign: list[str] = field(default_factory=list)  # requests that would have left this machine
    errors: list[str] = field(default_factory=list)  # uncaught errors, and those on the console


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the system's Chromium; without one CI fails, and elsewhere the test is skipped."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        missing = (
            "chromium is missing, so that JupyterLab is not tested: install it (Debian and Ubuntu: apt-get install chromium)"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return path


@pytest.fixture
def lab(chromium: str, tmp_path: Path) -> Iterator[Lab]:
    """`course lab`, started on a copy of the course by a user whose home folder is empty."""
    base, home, log = tmp_path / "course", tmp_path / "home", tmp_path / "lab.log"
    for part in PARTS:
        shutil.copytree(ROOT / part, base / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    (home / "config").mkdir(parents=True)
    # Jupyter refuses to serve as root, and in a container the tests may run as root.
    (home / "config" / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}')
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "JPY_"))} | {
        "PYTHONPATH": str(base),
        "HOME": str(home),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "OMP_NUM_THREADS": "1",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "course_lib.cli", "lab", "--no-browser", "--port", str(port)]
    with log.open("wb") as out:
        course = subprocess.Popen(
            command, cwd=base, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield Lab(base, _address(course, port, log))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(course.pid, signal.SIGTERM)
        course.wait(15)
        _, left = psutil.wait_procs(_at_home(home), timeout=15)
        for process in left:
            process.kill()
        assert not left, f"these ran on after `course lab` was told to end: {left}"


def _address(course: subprocess.Popen, port: int, log: Path) -> str:
    """The address that the server prints once it listens; `course lab` may take 60 s to get there."""
    end = time.monotonic() + 60
    while time.monotonic() < end and course.poll() is None:
        if found := re.search(rf"http://127\.0\.0\.1:{port}/\S+\?token=\w+", log.read_text(errors="replace")):
            return found[0]
        time.sleep(0.1)
    pytest.fail(
        f"`course lab` printed no address (exit status {course.poll()}):\n{log.read_text(errors='replace')}", pytrace=False
    )


def _at_home(home: Path) -> list[psutil.Process]:
    """The processes with this HOME: a kernel leads a process group of its own, and may have lost its parent."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # another user's, or gone
            if process.environ().get("HOME") == str(home):
                found.append(process)
    return found


@pytest.fixture
def watched(chromium: str, tmp_path: Path) -> Iterator[Watched]:
    """A page in a new browser profile, where a request to another machine is recorded and fails."""
    with sync_playwright() as playwright:
        env = {**os.environ, "HOME": str(tmp_path / "browser")}
        browser = playwright.chromium.launch(executable_path=chromium, args=QUIET, env=env)
        context = browser.new_context(viewport={"width": 1400, "height": 1000}, service_workers="block")
        seen = Watched(context.new_page())

        def stay(route: Route) -> None:
            url = urlsplit(route.request.url)
            if url.scheme in ("data", "blob") or url.hostname in ("127.0.0.1", "localhost"):
                route.continue_()
            else:
                seen.foreign.append(route.request.url)
                route.abort()

        context.route("**/*", stay)
        context.on("weberror", lambda error: seen.errors.append(f"uncaught: {error.error}"))
        context.on("console", lambda line: seen.errors.append(f"console: {line.text}") if line.type == "error" else None)
        yield seen
        browser.close()
