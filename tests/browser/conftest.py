"""`course lab` on a copy of the course, `course demo` of every lecture, and a Chromium that reaches nothing but this machine."""

import os
import shutil
import sys
from collections import namedtuple

import pytest

from course_lib.stage.demos import DEMOS
from tests.browser.tools import ROOT, find_chromium, free_port, running, said, stranger, watching

Lab = namedtuple("Lab", "base url")  # the copy that is served, and the address to open, with its token
Stage = namedtuple("Stage", "course log base folder")  # the process, what it prints, its address, the notebooks that it serves


@pytest.fixture(scope="session")
def chromium():
    """The path of the system's Chromium; without one CI fails, and elsewhere the test is skipped."""
    path = find_chromium()
    if path is None:
        missing = "chromium is missing, and JupyterLab is not tested without it (Debian and Ubuntu: apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    return path


@pytest.fixture
def lab(chromium, tmp_path):
    """`course lab`, started on a copy of the course by a user whose home folder is empty."""
    base, log, port = tmp_path / "course", tmp_path / "lab.log", free_port()
    for part in ("course_lib", "lectures", "solutions", "exercises"):
        shutil.copytree(ROOT / part, base / part, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    env = stranger(tmp_path / "home") | {"PYTHONPATH": str(base)}
    command = [sys.executable, "-m", "course_lib.cli", "lab", "--no-browser", "--port", str(port)]
    with running(command, base, env, log) as course:
        yield Lab(base, said(course, log, rf"http://127\.0\.0\.1:{port}/\S+\?token=\w+")[0])


@pytest.fixture(scope="module")
def stage(chromium, tmp_path_factory):
    """`course demo` of all lectures that have one, started by a user whose home folder is empty."""
    base, port = tmp_path_factory.mktemp("stage"), free_port()
    env = stranger(base / "home") | {"TMPDIR": str(base)}
    command = [sys.executable, "-m", "course_lib.cli", "demo", *DEMOS, "--no-browser", "--port", str(port)]
    with running(command, ROOT, env, base / "log") as course:
        said(course, base / "log", "Ctrl-C")
        (folder,) = base.glob("course-demo-*")
        yield Stage(course, base / "log", f"http://127.0.0.1:{port}/voila/render", folder)
    assert not folder.exists()


@pytest.fixture
def watched(chromium, tmp_path):
    """A page in a new browser profile, where a request to another machine is recorded and fails."""
    with watching(chromium, tmp_path / "browser") as page:
        yield page


@pytest.fixture(scope="module")
def hall(chromium, tmp_path_factory):
    """The same page for all tests of a module, as large as a projector's."""
    with watching(chromium, tmp_path_factory.mktemp("hall"), 1920, 1080) as page:
        yield page
