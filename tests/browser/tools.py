"""What the browser tests share: servers that end with all they started, pages that reach nothing but this machine, and
JupyterLab's menus, waiting, and running a notebook from top to bottom.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import namedtuple
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import nbformat
import psutil
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SHOTS = Path(os.environ.get("SHOTS", ROOT / "runs" / "browser"))  # where screenshots are left, to look at
SWITCHES = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"

Watched = namedtuple("Watched", "page foreign errors")  # requests to other machines; uncaught and console errors

WRONG = '[data-mime-type="application/vnd.jupyter.error"], .jupyter-widgets-error-widget, mjx-merror, .jp-Dialog'
ALL_RAN = """() => {
    const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(prompt => prompt.textContent);
    return prompts.some(text => /\\d/.test(text)) && !prompts.some(text => text.includes("*"));
}"""


def choose(page, menu, command):
    """Choose a command from a menu of JupyterLab."""
    page.locator(".lm-MenuBar-item").get_by_text(menu, exact=True).click()
    page.locator(f'.lm-Menu-item[data-command="{command}"]').click()


def until(page, holds, what, seconds=30):
    """Wait until `holds()`, while the page lives on; speed is asserted elsewhere, and other tests share the machine."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        page.wait_for_timeout(50)


def idle(page):
    """Whether the server has one kernel, and that kernel is idle."""
    at = urlsplit(page.url)
    answer = page.request.get(f"{at.scheme}://{at.netloc}/api/kernels")
    # while a kernel of the page before is being ended, the server may answer that it is not found
    return answer.ok and [kernel["execution_state"] for kernel in answer.json()] == ["idle"]


def open_code(page, lab, name, source):
    """Open a new notebook with this one cell in JupyterLab; the path of its file."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, lab.base / name)
    page.goto(urlunsplit(urlsplit(lab.url)._replace(path=f"/lab/tree/{name}")))
    page.locator(".jp-CodeCell").wait_for(timeout=60_000)
    return lab.base / name


def title(plot):
    """What stands above a plot of plotly."""
    return plot.locator(".gtitle").text_content()


def run_all(page, path, seconds=90):
    """Clear and run the notebook that is open, save it, and return its code cells; no cell may have failed."""
    until(page, lambda: idle(page), "a kernel")
    choose(page, "Edit", "editmenu:clear-all")
    start = time.monotonic()
    choose(page, "Run", "runmenu:run-all")
    page.wait_for_function(ALL_RAN, timeout=1000 * seconds)
    until(page, lambda: idle(page), "an idle kernel")
    print(f"\nRun All: {time.monotonic() - start:.1f} s")
    with page.expect_response(lambda answer: answer.request.method == "PUT" and path.name in answer.url):
        choose(page, "File", "docmanager:save")
    cells = [one for one in nbformat.read(path, as_version=4).cells if one.cell_type == "code"]
    outputs = [output for one in cells for output in one.outputs]
    assert [output for output in outputs if output.output_type == "error" or "Traceback" in output.get("text", "")] == []
    assert [one.execution_count for one in cells] == list(range(1, len(cells) + 1))
    assert page.locator(WRONG).count() == 0
    return cells


# --- a server, a browser ------------------------------------------------------------------------------


def find_chromium():
    """The path of the system's Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def stranger(home):
    """The environment of a user whose home folder is empty."""
    (home / "config").mkdir(parents=True)
    # Jupyter refuses to serve as root, and in a container the tests may run as root.
    (home / "config" / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}')
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "JPY_"))}
    env |= {f"JUPYTER_{name.upper()}_DIR": str(home / name) for name in ("config", "data", "runtime")}
    return env | {"HOME": str(home), "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def running(command, cwd, env, log, end=signal.SIGTERM):
    """A server in a session of its own; told to end by `end`, it must take along whatever it started."""
    with log.open("wb") as out:
        files = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
        course = subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **files)
    try:
        yield course
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(course.pid, end)
        course.wait(30)
        _, left = psutil.wait_procs(_at_home(env["HOME"]), timeout=15)
        for process in left:
            process.kill()
        assert not left, f"these ran on after `{' '.join(command[1:5])}` was told to end: {left}"


def _at_home(home):
    """The processes with this HOME: a kernel leads a process group of its own, and may have lost its parent."""
    return [one for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get("HOME") == home]


def said(course, log, pattern, seconds=60):
    """What the server prints and this pattern finds, once it does; AssertionError where it ends or stays silent."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and course.poll() is None:
        if found := re.search(pattern, log.read_text(errors="replace")):
            return found
        time.sleep(0.1)
    raise AssertionError(f"no {pattern!r} from the server (exit status {course.poll()}):\n{log.read_text(errors='replace')}")


@contextlib.contextmanager
def watching(chromium, home, width=1400, height=1000):
    """A page in a new browser profile, where a request to another machine is recorded and fails."""
    with sync_playwright() as playwright:
        env = {**os.environ, "HOME": str(home)}
        switches = [f"--{switch}" for switch in SWITCHES.split()]
        browser = playwright.chromium.launch(executable_path=chromium, args=switches, env=env)
        context = browser.new_context(viewport={"width": width, "height": height}, service_workers="block")
        page, foreign, errors = context.new_page(), [], []

        def ours(request):
            url = urlsplit(request.url)
            opened = url.scheme == "file" and request.is_navigation_request()  # a file that the test opens, and no other
            return opened or url.scheme in ("data", "blob") or url.hostname in ("127.0.0.1", "localhost")

        context.route("**/*", lambda route: route.continue_() if ours(route.request) else route.abort())
        context.on("request", lambda request: None if ours(request) else foreign.append(request.url))
        context.on("weberror", lambda error: errors.append(f"uncaught: {error.error}"))
        context.on("console", lambda line: errors.append(f"console: {line.text}") if line.type == "error" else None)
        yield Watched(page, foreign, errors)
        browser.close()
