"""`course demo`: serves lectures' explorers with Voilà, from generated notebooks in a folder that ends with the server."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import tempfile
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat

from course_lib.grading.paths import CourseError

TEMPLATES = Path(__file__).parent / "jupyter"  # a Jupyter data folder: Voilà's template "course", and a kernel
KERNEL = {"name": "course", "display_name": "The course", "language": "python"}  # in TEMPLATES: one that does not chat
HOST = "127.0.0.1"  # this machine only
FRONT_END = ["@jupyter-widgets/jupyterlab-manager", "anywidget", "ipycanvas", "@voila-dashboards/widgets-manager8"]
"""The parts of JupyterLab that a page loads: others want modules that a page of Voilà does not have."""


def notebook(number: str, title: str) -> nbformat.NotebookNode:
    """The two cells that are served: they import the explorer, not the lecture."""
    cells = ["from course_lib.stage.show import show", f"show({number!r})"]
    metadata = {"title": f"{number} {title}", "kernelspec": KERNEL, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=metadata)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]


def check_port(port: int) -> None:
    """CourseError where the port is taken, or is none."""
    with socket.socket() as tried:
        if os.name == "posix":  # a port whose last connections still close can be served on
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except (OSError, OverflowError) as error:
            why = "is taken" if isinstance(error, OSError) else "is none"
            raise CourseError(f"port = {port} {why}; choose another, or leave --port out for a free one") from None


def serve(pages: dict[str, str], port: int | None = None, browser: bool = True, say: Callable[[str], None] = print) -> None:
    """Serve the explorers of these lectures, number -> title, until Ctrl-C; the folder and all kernels end with it.

    `say` is told the addresses once they answer. CourseError for a port that is taken, and without Voilà.
    """
    if importlib.util.find_spec("voila") is None:
        raise CourseError("the stage needs Voilà, which is not installed; `pip install -c constraints.txt voila` brings it")
    if port is not None:
        check_port(port)
    port = free_port() if port is None else port
    os.environ["JUPYTER_PATH"] = os.pathsep.join([str(TEMPLATES), *filter(None, [os.environ.get("JUPYTER_PATH")])])
    from tornado.ioloop import IOLoop  # takes a second, as does Voilà
    from voila.app import Voila

    with tempfile.TemporaryDirectory(prefix="course-demo-") as folder:
        for number, title in pages.items():
            nbformat.write(notebook(number, title), Path(folder) / f"{number}.ipynb")
        addresses = [f"http://{HOST}:{port}/voila/render/{number}.ipynb" for number in pages]

        def ready() -> None:
            for address, (number, title) in zip(addresses, pages.items(), strict=True):
                say(f"{number} {title}: {address}")
            say("Ctrl-C ends it.")
            if browser:
                webbrowser.open(addresses[0])

        logging.getLogger("tornado.general").setLevel(logging.ERROR)  # it remarks on Voilà's settings
        app = Voila()
        app.initialize([folder, *_options(port, folder)])
        app.voila_configuration.extension_allowlist = FRONT_END
        # a page that closes has its kernel ended, which it asks for without the cookie that is checked against forgery
        app.tornado_settings = {"disable_check_xsrf": True}
        IOLoop.current().add_callback(ready)
        app.start()


def _options(port: int, folder: str) -> Sequence[str]:
    """Voilà's settings: our template and nothing of the user's, this port or none, no kernel without a page."""
    return [
        f"--port={port}",
        "--no-browser",
        f"--Voila.ip={HOST}",
        "--Voila.port_retries=0",
        "--Voila.log_level=40",
        f"--Voila.connection_dir_root={folder}",
        "--VoilaConfiguration.template=course",
        "--VoilaConfiguration.allow_template_override=NO",
        "--VoilaConfiguration.classic_tree=True",
        "--VoilaConfiguration.show_tracebacks=True",
        "--MappingKernelManager.cull_idle_timeout=300",  # s; a page that crashed could not say that it closed
        "--MappingKernelManager.cull_interval=60",
    ]
