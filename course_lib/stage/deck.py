"""`course slides`: one HTML file with a lecture's slides, reveal.js and MathJax inside, from its executed notebook."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import nbformat
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from course_lib.grading.paths import CourseError, number_of, sources
from course_lib.stage.demos import DEMOS
from course_lib.study.style import COLOURS
from course_lib.training import write_atomically

STATIC = Path(__file__).parent / "static"
PAGES = Path(__file__).parent / "slides"  # our template, style and script
MATHJAX = "sphinx-mathjax-offline"  # the package that brings MathJax as files; we use nothing else of it
WIDTH, HEIGHT = 1280, 720  # of a slide, in its own pixels; a browser scales it to its window
LINES = 28  # of code or print that fill a slide
SHOWN, ENLARGED, TALL = 0.85 * 900, 3, 560  # slide pixels that a picture claims across and down


@dataclass
class Block:
    """A part of a slide that is not cut; `begins` where it begins a slide, `heading` where it may not end one."""

    html: str
    heading: bool = False
    begins: bool = False


def write(name: str, out: Path | None = None) -> Path:
    """Write the slides of this lecture; CourseError where its notebook is not built."""
    number = number_of(name)
    source = sources("lectures").get(number)
    if source is None or not source.with_suffix(".ipynb").exists():
        raise CourseError(f"the notebook of lecture {number} is not built; `course build {number}` makes it")
    path = source.with_suffix(".ipynb")
    out = Path(f"{path.stem}.slides.html") if out is None else out
    if out.is_dir():
        raise CourseError(f"out = {str(out)!r} is a folder; expected a file, for example {path.stem}.slides.html")
    page = render(nbformat.read(path, as_version=4), number, path.parent)
    write_atomically(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return out


def render(notebook: NotebookNode, number: str, folder: Path) -> str:
    """The page of a notebook; `folder` is where pictures that its text names are looked for."""
    first = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    title = re.search(r"^# (.+)$", first, re.M)
    read = lambda file: (STATIC / file).read_text(encoding="utf-8")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGES), undefined=jinja2.StrictUndefined, autoescape=False)
    return environment.get_template("deck.html.j2").render(
        title=html.escape(title[1] if title else number),
        blocks=list(blocks(notebook, number, folder)),
        width=WIDTH,
        height=HEIGHT,
        colours=COLOURS,
        highlighting=HtmlFormatter(style="friendly").get_style_defs(".highlight"),
        reveal_style=read("reveal/reset.css") + read("reveal/reveal.css"),
        reveal=read("reveal/reveal.js").partition("//# sourceMappingURL")[0],
        mathjax=mathjax(),
    )


def mathjax() -> str:
    """MathJax as one script: TeX with all its packages in, SVG out; CourseError where it is not installed."""
    try:
        script = importlib.metadata.distribution(MATHJAX).locate_file(f"{MATHJAX}/static/mathjax/tex-svg-full.js")
        return Path(str(script)).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise CourseError(f"slides need MathJax: `pip install -c constraints.txt {MATHJAX}` brings it") from None


def blocks(notebook: NotebookNode, number: str, folder: Path) -> Iterator[Block]:
    """The parts of a notebook in order, as its cells' slide types say; the page fills slides with as many as fit."""
    for cell in notebook.cells:
        kind = cell.metadata.get("slideshow", {}).get("slide_type", "")
        if kind in ("skip", "notes"):
            continue
        begins = kind in ("slide", "subslide")
        for block in _parts(cell, number, folder):
            if kind == "fragment":
                block.html = f'<div class="fragment">{block.html}</div>'
            block.begins, begins = begins, False
            yield block


def _parts(cell: NotebookNode, number: str, folder: Path) -> Iterator[Block]:
    if cell.cell_type == "markdown":
        yield from _text(cell.source, folder)
    elif cell.cell_type == "code":
        yield from _code(cell.source)
        for output in cell.outputs:
            yield from _output(output, number, folder)


# --- text ---------------------------------------------------------------------------------------------


def _markdown(text: str, folder: Path) -> str:
    renderer = IPythonRenderer(escape=False, exclude_anchor_links=True, embed_images=True, path=str(folder))
    return MarkdownWithMath(renderer=renderer).render(text).strip()


def _text(source: str, folder: Path) -> Iterator[Block]:
    """The paragraphs, tables, lists and formulas of a cell."""
    for part in _parted(source):
        yield Block(_markdown(part, folder), heading=part.startswith("#") and "\n" not in part)


def _parted(source: str) -> Iterator[str]:
    """Markdown cut at its empty lines, headings and list items, but not within code, nor before what is indented."""
    part: list[str] = []
    for line in source.strip().splitlines():
        fenced = sum(one.startswith("```") for one in part) % 2 == 1
        item = line.startswith("- ") and part and part[0].startswith("- ")  # a list may be longer than a slide
        ends = part and (line.startswith("#") or part[-1].startswith("#") or not part[-1].strip() or item)
        if ends and not fenced and line.strip() and not line.startswith(" "):
            yield "\n".join(part).strip()
            part = []
        part.append(line)
    if part:
        yield "\n".join(part).strip()


# --- code and what it printed -------------------------------------------------------------------------


def _code(source: str) -> Iterator[Block]:
    """A cell's code, cut where it is longer than a slide: at empty lines, else between statements."""
    lines = source.rstrip().splitlines()
    while lines:
        cut = len(lines)
        if cut > LINES:
            here = range(LINES // 2, LINES + 1)
            empty = [i for i in here if not lines[i].strip()]
            statements = [i for i in here if lines[i] and not lines[i].startswith((" ", ")", "]", "}", "#", "el", "exc"))]
            cut = max(empty or statements or [LINES])
        piece, lines = lines[:cut], lines[cut:]
        while lines and not lines[0].strip():
            lines.pop(0)
        shown = highlight("\n".join(piece), PythonLexer(stripnl=False), HtmlFormatter())
        yield Block(f'<div class="code">{shown}</div>')


def _output(output: NotebookNode, number: str, folder: Path) -> Iterator[Block]:
    """What a cell left: a picture before a text; of a live widget its poster, and the command that shows it live."""
    data = output.get("data", {})
    if "image/png" in data:
        png = "".join(data["image/png"]).replace("\n", "")
        width, height = Image.open(io.BytesIO(base64.b64decode(png))).size
        tall = min(height * min(SHOWN / width, ENLARGED), TALL)  # it takes more where there is room
        wide = max(1.6 * width, min(ENLARGED * width, 900))
        picture = f'<img alt="" style="max-width: min(100%, {wide:.0f}px)" src="data:image/png;base64,{png}">'
        live = re.match(r"\w+Explorer\(", "".join(data.get("text/plain", "")))
        words = f'<p class="live">live: <code>course demo {number}</code></p>' if live and number in DEMOS else ""
        yield Block(f'<div class="figure" style="--tall: {tall:.0f}px">{picture}</div>{words}')
    elif "text/markdown" in data:
        text = "".join(data["text/markdown"])
        fenced = re.fullmatch(r"\s*```python\n(.*?)\n?```\s*", text, re.S)
        yield from _code(fenced[1]) if fenced else _text(text, folder)
    elif output.output_type == "error":
        yield Block(f'<pre class="printed">{html.escape(output.ename)}: {html.escape(output.evalue)}</pre>')
    else:
        text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
        for lines in _pages(text.splitlines()):
            yield Block(f'<pre class="printed">{html.escape(chr(10).join(lines))}</pre>')


def _pages(lines: list[str]) -> Iterator[list[str]]:
    for begin in range(0, len(lines), LINES):
        yield lines[begin : begin + LINES]
