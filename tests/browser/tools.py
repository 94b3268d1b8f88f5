"""What the tests of JupyterLab share: menus, waiting, and running a notebook from top to bottom."""

import time
from urllib.parse import urlsplit

import nbformat

WRONG = '[data-mime-type="application/vnd.jupyter.error"], .jupyter-widgets-error-widget, mjx-merror, .jp-Dialog'
ALL_RAN = """() => {
    const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(prompt => prompt.textContent);
    return prompts.some(text => /\\d/.test(text)) && !prompts.some(text => text.includes("*"));
}"""


def choose(page, menu, command):
    """Choose a command from a menu of JupyterLab."""
    page.locator(".lm-MenuBar-item").get_by_text(menu, exact=True).click()
    page.locator(f'.lm-Menu-item[data-command="{command}"]').click()


def until(page, holds, seconds, what):
    """Wait until `holds()`, while the page lives on."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        page.wait_for_timeout(50)


def idle(page):
    """Whether the server has one kernel, and that kernel is idle."""
    at = urlsplit(page.url)
    kernels = page.request.get(f"{at.scheme}://{at.netloc}/api/kernels").json()
    return [kernel["execution_state"] for kernel in kernels] == ["idle"]


def run_all(page, path, seconds=90):
    """Clear and run the notebook that is open, save it, and return its code cells; no cell may have failed."""
    until(page, lambda: idle(page), 30, "a kernel")
    choose(page, "Edit", "editmenu:clear-all")
    start = time.monotonic()
    choose(page, "Run", "runmenu:run-all")
    page.wait_for_function(ALL_RAN, timeout=1000 * seconds)
    until(page, lambda: idle(page), 10, "an idle kernel")
    print(f"\nRun All: {time.monotonic() - start:.1f} s")
    with page.expect_response(lambda answer: answer.request.method == "PUT" and path.name in answer.url):
        choose(page, "File", "docmanager:save")
    cells = [one for one in nbformat.read(path, as_version=4).cells if one.cell_type == "code"]
    outputs = [output for one in cells for output in one.outputs]
    assert [output for output in outputs if output.output_type == "error" or "Traceback" in output.get("text", "")] == []
    assert [one.execution_count for one in cells] == list(range(1, len(cells) + 1))
    assert page.locator(WRONG).count() == 0
    return cells
