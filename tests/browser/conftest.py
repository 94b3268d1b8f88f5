"""`course lab` on a copy of the course, and a headless Chromium that reaches nothing but this machine."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"

Lab = namedtuple("Lab", "base url")  # the copy that is served, and the address to open, with its token
Watched = namedtuple("Watched", "page foreign errors")  # requests to other machines; uncaught and console errors


@pytest.fixture(scope="session")
def chromium():
    """The path of the system's Chromium; without one CI fails, and elsewhere the test is skipped."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        missing = "chromium is missing, and JupyterLab is not tested without it (Debian and Ubuntu: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return path


@pytest.fixture
def lab(chromium, tmp_path):
    """`course lab`, started on a copy of the course by a user whose home folder is empty."""
    base, home, log = tmp_path / "course", tmp_path / "home", tmp_path / "lab.log"
    for part in ("course_lib", "lectures", "solutions", "exercises"):
        shutil.copytree(ROOT / part, base / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    (home / "config").mkdir(parents=True)
    # Jupyter refuses to serve as root, and in a container the tests may run as root.
    (home / "config" / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}')
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "JPY_"))}
    env |= {f"JUPYTER_{name.upper()}_DIR": str(home / name) for name in ("config", "data", "runtime")}
    env |= {"PYTHONPATH": str(base), "HOME": str(home), "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "course_lib.cli", "lab", "--no-browser", "--port", str(port)]
    with log.open("wb") as out:
        files = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
        course = subprocess.Popen(command, cwd=base, env=env, start_new_session=True, **files)
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


def _address(course, port, log):
    """The address that the server prints once it listens."""
    end = time.monotonic() + 60
    while time.monotonic() < end and course.poll() is None:
        if found := re.search(rf"http://127\.0\.0\.1:{port}/\S+\?token=\w+", log.read_text(errors="replace")):
            return found[0]
        time.sleep(0.1)
    pytest.fail(f"no address from `course lab` (exit status {course.poll()}):\n{log.read_text(errors='replace')}", pytrace=False)


def _at_home(home):
    """The processes with this HOME: a kernel leads a process group of its own, and may have lost its parent."""
    return [one for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get("HOME") == str(home)]


@pytest.fixture
def watched(chromium, tmp_path):
    """A page in a new browser profile, where a request to another machine is recorded and fails."""
    with sync_playwright() as playwright:
        env = {**os.environ, "HOME": str(tmp_path / "browser")}
        switches = [f"--{switch}" for switch in SWITCHES.split()]
        browser = playwright.chromium.launch(executable_path=chromium, args=switches, env=env)
        context = browser.new_context(viewport={"width": 1400, "height": 1000}, service_workers="block")
        page, foreign, errors = context.new_page(), [], []

        def stay(route):
            url = urlsplit(route.request.url)
            if url.scheme in ("data", "blob") or url.hostname in ("127.0.0.1", "localhost"):
                return route.continue_()
            foreign.append(route.request.url)
            return route.abort()

        context.route("**/*", stay)
        context.on("weberror", lambda error: errors.append(f"uncaught: {error.error}"))
        context.on("console", lambda line: errors.append(f"console: {line.text}") if line.type == "error" else None)
        yield Watched(page, foreign, errors)
        browser.close()
