"""The command `course`. Heavy imports stand inside the commands, so that `course --help` answers at once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
                  help="The diffusion course: notebooks, checks, grading, models.")  # fmt: skip
console = Console()
Numbers = Annotated[list[str] | None, typer.Argument(help="Lecture numbers or names, for example 01. All of them when left out.")]


def _numbers(names: list[str] | None) -> list[str]:
    from course_lib.grading.paths import number_of, sources

    return [number_of(name) for name in names] if names else sorted(sources("lectures") | sources("solutions"))


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


@app.command()
def lab(
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
    port: Annotated[int | None, typer.Option(help="Port to serve on; a free one when left out.")] = None,
) -> None:
    """Open JupyterLab on the lectures; exercise sets are copied to my_course/ at first use.

    Example: `course lab --no-browser --port 8899`
    """
    from course_lib.grading import student
    from course_lib.grading.paths import root, sources

    base = root()
    for path in student.prepare(base):
        console.print(f"your copy: {path.relative_to(base)}")
    first = next(iter(sources("lectures").values())).with_suffix(".ipynb")
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={base}"]
    command += [f"--LabApp.default_url=/lab/tree/lectures/{first.name}"]
    # nothing may ask the network: no news, no search for updates, no catalogue of extensions
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]
    command += ["--LabApp.extension_manager=readonly", f"--LabApp.app_settings_dir={Path(__file__).parent / 'jupyter'}"]
    command += [] if browser else ["--no-browser"]
    command += [] if port is None else [f"--port={port}"]
    os.chdir(base)
    if os.name == "posix":  # the server takes this process's place, and so its Ctrl-C
        os.execv(command[0], command)
    raise typer.Exit(subprocess.call(command))


@app.command()
def demo(
    numbers: Annotated[list[str] | None, typer.Argument(help="Lectures, for example 02; left out, the demos are listed.")] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
    port: Annotated[int | None, typer.Option(help="Port to serve on; a free one when left out.")] = None,
) -> None:
    """Show lectures' explorers full screen; arrow keys or a presenter's remote move the main slider. Ctrl-C ends it.

    Example: `course demo 02`
    """
    from course_lib.stage import demos, server

    if numbers:
        say = lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
        server.serve(demos.titles(numbers), port=port, browser=browser, say=say)
        return
    rows = [[number, one.title, ", ".join(one.explorers)] for number, one in demos.DEMOS.items()]
    _table("course demo NN", ["lecture", "title", "explorers"], rows)


@app.command()
def slides(
    number: Annotated[str, typer.Argument(help="A lecture, for example 02.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; NN_name.slides.html in this folder when left out.")] = None,
) -> None:
    """Write a lecture's slides as one file that any browser shows, with no network.

    Example: `course slides 02 --out 02.html`
    """
    from course_lib.stage import deck

    console.print(f"written: {deck.write(number, out)}")


@app.command()
def build(
    numbers: Numbers = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; report what is missing, edited or stale.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite notebooks that were edited by hand.")] = False,
) -> None:
    """Build and execute notebooks from their sources; the only writer of lectures/, solutions/ and exercises/ notebooks.

    Example: `course build 01`
    """
    from course_lib.grading import build as builder

    found = []
    for number in _numbers(numbers):
        if check:
            found += builder.problems(number)
        else:
            builder.build(number, force=force, say=console.print)
    if found:
        raise ValueError("\n".join(found))
    if check:
        console.print("all notebooks are as their sources make them")


@app.command()
def readme() -> None:
    """Write the README's pictures and tables anew, from the models, the cards and the catalog.

    Example: `course readme`
    """
    from course_lib import readme as writer

    writer.write()
    console.print("written: README.md and its pictures")


@app.command()
def check(numbers: Numbers = None) -> None:
    """Run what CI runs on a lecture: build check, its notebooks under nbval, and the tests of its exercise set, if it has one.

    Example: `course check 01`
    """
    from course_lib.grading.items import set_names
    from course_lib.grading.paths import root

    if importlib.util.find_spec("pytest") is None:
        raise ValueError("`course check` runs pytest, which is missing; run `pip install -c constraints.txt -e '.[test]'`")
    base = root()
    for number in _numbers(numbers):
        notebooks = sorted(
            str(path) for kind in ("lectures", "solutions", "exercises") for path in (base / kind).glob(f"{number}_*.ipynb")
        )
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        status = 0
        if number in set_names():
            status = subprocess.call([*command, "tests/graders", "-k", f"set_{number}"], cwd=base)
        status = subprocess.call([*command, "--nbval-lax", *notebooks], cwd=base) or status
        if status:
            raise typer.Exit(1)


@app.command()
def update() -> None:
    """Put new versions of exercise sets beside your copies in my_course/, as NAME.new.ipynb.

    Example: `course update`
    """
    from course_lib.grading import student
    from course_lib.grading.paths import root

    written = student.update(root())
    for path in written:
        console.print(f"new: {path.relative_to(root())}")
    if not written:
        console.print("my_course/ is up to date")


@app.command()
def progress() -> None:
    """List which exercises you have solved.

    Example: `course progress`
    """
    from course_lib.grading import student
    from course_lib.grading.paths import root

    rows = student.progress(root())
    earned = sum(row["points"] for row in rows if row["status"] == "correct")
    _table(f"{earned} of {sum(row['points'] for row in rows)} points", ["item", "title", "points", "status", "tries", "solved"],
           [[str(value) for value in row.values()] for row in rows])  # fmt: skip


@app.command()
def grade(
    submissions: Annotated[list[Path], typer.Argument(help="Notebooks, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the score sheets, as text and JSON.")] = Path("scores"),
    trust_submissions: Annotated[bool, typer.Option("--trust-submissions", help="Run the code without a sandbox.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the inputs; secret when left out.")] = None,
) -> None:
    """Grade exercise notebooks: points, verdicts, diagnoses.

    Example: `course grade my_course/01_forward_process.ipynb --trust-submissions --out scores`
    """
    from course_lib.grading import grade as grader

    if not trust_submissions:
        raise ValueError(
            "grading runs the submissions' code, and this version has no sandbox; "
            "grade only what you trust, with --trust-submissions"
        )
    paths = grader.collect(submissions)
    if not paths:
        raise ValueError(f"no notebooks in {', '.join(map(str, submissions))}; expected files that end in .ipynb")
    console.print("[yellow]trusted: the code of these submissions runs with your rights[/]")
    with grader.Worker() as worker:
        for path, name in paths.items():
            sheet = grader.grade(path, seed=seed, worker=worker, name=name)
            console.print(sheet.text(), markup=False, highlight=False, soft_wrap=True)
            console.print(f"written: {grader.write(sheet, out)}")


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="An embedded model; `course zoo` lists them.")],
    steps: Annotated[int | None, typer.Option(help="Another length than the recipe's; the result goes to runs/.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="'zoo': begin with the embedded weights.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the best present when left out.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore the checkpoint of an interrupted run.")] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="Train nothing; judge the embedded weights and renew their card.")
    ] = False,
) -> None:
    """Train a model by its recipe, judge it, and write its weights and card. Interrupted? The same command goes on.

    Example: `course train digits`
    """
    from course_lib.zoo import train as trainer

    if judge:
        console.print(f"written: {trainer.judge(name)} and its card")
        return
    console.print(f"written: {trainer.train(name, steps=steps, start=start, device=device, fresh=fresh)}")


@app.command()
def tune(
    world: Annotated[
        str, typer.Argument(help="ring or digits, where the four families of lecture 02 are compared; or mini-sd, for its size.")
    ],
) -> None:
    """Try six settings of each of the four families for equal time, or two sizes of mini-sd, and store the scores.

    Example: `course tune ring`
    """
    from course_lib.zoo import trial
    from course_lib.zoo import tune as tuner

    if world == "mini-sd":
        console.print(f"written: {trial.run(say=console.print)}")
        return
    console.print(f"written: {tuner.tune(world, say=console.print)}")


@app.command()
def zoo(
    name: Annotated[str | None, typer.Argument(help="Print the card of this model.")] = None,
    wrong: Annotated[
        Path | None, typer.Option(help="Of a text-to-image model: a folder for 200 pictures that its reader calls wrong.")
    ] = None,
) -> None:
    """List the embedded models, or print the card of one, or show where it fails.

    Example: `course zoo digits`
    """
    from course_lib import zoo as models

    if wrong is not None:
        from course_lib.study import wrong as pages

        if name is None:
            raise ValueError("--wrong needs the name of a text-to-image model, such as mini-sd")
        for path in pages.write(name, wrong):
            console.print(f"written: {path}")
        return
    if name is not None:
        console.print_json(json.dumps(models.card(name)))
        return
    cards = [models.card(one) for one in models.names()]
    rows = [[c["name"], f"{c['parameters']:,}", f"{c['bytes'] / 1e6:.2f}", f"{c['seconds']} s", c["hardware"]] for c in cards]
    _table("embedded models", ["name", "parameters", "MB", "trained in", "on"], rows)


@app.command()
def catalog(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List every method that the course teaches, with its paper, lecture, test and measurement.

    Example: `course catalog --json`
    """
    from course_lib import catalog as index

    if as_json:
        console.print_json(json.dumps(index.rows()))
        return
    _table("what the course teaches", ["lecture", "method", "paper", "measured"],
           [[s.lecture, s.name, f"{s.authors} {s.year}", s.measured] for s in index.systems()])  # fmt: skip


@app.command()
def doctor() -> None:
    """Print versions, device, models and tools, and the command that brings what is missing.

    Example: `course doctor`
    """
    from course_lib.doctor import report

    rows = [[("ok" if fine else "missing"), what, finding] for what, finding, fine in report()]
    _table("this machine", ["", "what", "finding"], rows)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks; all of them when left out.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Time the library beside its peers, and measure what settings reach; fails where a limit is exceeded.

    Example: `course bench sampler --json bench.json`
    """
    from course_lib import bench as benchmarks

    rows = benchmarks.run(names or None)
    limits = ["" if row["limit"] is None else f"{row['limit']:.3f}" for row in rows]
    ratios = [
        [r["name"], f"{r['ours_s']:.4f} s", f"{r['other_s']:.4f} s  {r['other']}", f"{r['ratio']:.3f}", limit]
        for r, limit in zip(rows, limits, strict=True)
        if "ratio" in r
    ]
    values = [
        [r["name"], f"{r['value']:.3f}", limit, r["unit"], r["beside"]]
        for r, limit in zip(rows, limits, strict=True)
        if "value" in r
    ]
    if ratios:
        _table("ratios: ours over other", ["benchmark", "ours", "other", "ratio", "limit"], ratios)
    if values:
        _table("values", ["benchmark", "value", "limit", "unit", "beside"], values)
    if json_file is not None:
        from course_lib.training import write_atomically

        write_atomically(json_file, lambda path: path.write_text(json.dumps(rows, indent=2) + "\n"))
    over = [row["name"] for row in benchmarks.over(rows)]
    if over:
        raise ValueError(f"over the limit: {', '.join(over)}")


def main() -> None:
    """Run a command; an error that a user can mend is one line, not a traceback."""
    try:
        app(standalone_mode=True)
    except (ValueError, FloatingPointError, OSError) as error:
        Console(stderr=True).print(f"course: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
