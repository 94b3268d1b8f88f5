"""The command `course`: help with an example everywhere, one-line errors, the student's folder, doctor, catalog."""

import json

import nbformat
import pytest
from typer.testing import CliRunner

from course_lib import catalog, cli, doctor, readme
from course_lib.grading import check as checking
from course_lib.grading import paths, student

COMMANDS = (
    "lab",
    "demo",
    "slides",
    "build",
    "check",
    "update",
    "progress",
    "grade",
    "train",
    "zoo",
    "catalog",
    "doctor",
    "bench",
    "readme",
)
run = CliRunner().invoke


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = run(cli.app, [command, "--help"])
    assert result.exit_code == 0 and "Example" in result.output and f"course {command}" in result.output


def test_the_list_of_commands():
    result = run(cli.app, ["--help"])
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "02_forward_proces"], "did you mean '01_forward_process'"),
        (["train", "digit"], "did you mean 'digits'"),
        (["zoo", "digist"], "did you mean 'digits'"),
        (["bench", "smpler"], "did you mean 'sampler'"),
        (["grade", "nothing.ipynb"], "--trust-submissions"),
        (["train", "digits", "--device", "tpu"], "cannot be used"),
    ],
)
def test_errors_are_one_line(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["course", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("course: ") and said in error and error.count("\n") == 1


def test_grade_command_writes_sheets(tmp_path):
    exercise = paths.root() / "exercises" / "01_forward_process.ipynb"
    result = run(cli.app, ["grade", str(exercise), "--trust-submissions", "--out", str(tmp_path)])
    assert result.exit_code == 0 and "0 of 17 points" in result.output and "not attempted" in result.output
    assert json.loads((tmp_path / "01_forward_process.json").read_text())["out_of"] == 17


def test_numbers_and_names_of_lectures():
    assert paths.number_of("1") == paths.number_of("01") == paths.number_of("01_forward_process") == "01"
    for name in ("99", "02_reverse", "1c", "1_"):
        with pytest.raises(paths.CourseError, match=f"lecture = '{name}'; expected one of"):
            paths.number_of(name)


def test_a_lecture_may_have_a_second_part(tmp_path, monkeypatch):
    (tmp_path / "lectures").mkdir()
    for name in ("01_one.py", "01b_more.py", "notes.py"):
        (tmp_path / "lectures" / name).touch()
    assert list(paths.sources("lectures", tmp_path)) == ["01", "01b"]
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert paths.number_of("1b") == paths.number_of("01b") == paths.number_of("01b_more") == "01b"


# --- my_course/ ---------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    """A course with one exercise set."""
    (tmp_path / "exercises").mkdir()
    write_set(tmp_path, "one")
    return tmp_path


def write_set(base, content):
    notebook = nbformat.v4.new_notebook(metadata={"course": {"content": content}})
    nbformat.write(notebook, base / "exercises" / "01_set.ipynb")


def test_sets_are_copied_once_and_never_overwritten(base):
    assert [path.name for path in student.prepare(base)] == ["01_set.ipynb"]
    mine = base / student.FOLDER / "01_set.ipynb"
    work = nbformat.read(mine, as_version=4)
    work.cells.append(nbformat.v4.new_code_cell("my = 'work'"))
    nbformat.write(work, mine)
    assert student.prepare(base) == [] and student.update(base) == []
    write_set(base, "two")
    assert student.prepare(base) == []
    assert [path.name for path in student.update(base)] == ["01_set.new.ipynb"]
    assert "work" in mine.read_text()


def test_checks_are_recorded_in_the_students_folder(base, monkeypatch, capsys):
    student.prepare(base)
    monkeypatch.chdir(base / student.FOLDER)
    checking.check("01.5", lambda alpha_bar: (1 - alpha_bar).sqrt())
    checking.check("01.5", lambda alpha_bar: (1 / alpha_bar - 1).sqrt())
    checking.check("01.4", lambda alpha_bar: ...)
    rows = {row["item"]: row for row in student.progress(base)}
    assert rows["01.5"]["status"] == "correct" and rows["01.5"]["tries"] == 2 and rows["01.5"]["solved"]
    assert rows["01.4"]["status"] == "open" and rows["01.4"]["tries"] == 0
    (base / student.FOLDER / checking.PROGRESS).write_text("{")
    with pytest.raises(paths.CourseError, match="not readable"):
        student.progress(base)


def test_check_returns_what_to_use(capsys):
    from course_lib.grading.items import find

    def right(alpha_bar):
        return (1 / alpha_bar - 1).sqrt()

    assert checking.check("01.5", right) is right
    assert checking.check("01.5", lambda alpha_bar: alpha_bar) is find("01.5").reference
    assert checking.check("01.5", lambda alpha_bar: ...) is find("01.5").reference
    printed = capsys.readouterr().out
    assert "01.5 correct: 1 point" in printed and "01.5 wrong" in printed and "01.5 not attempted" in printed
    assert checking.check("01.5", find("01.5").reference) is find("01.5").reference  # a check cell run twice
    assert "this is the library's sigma_of" in capsys.readouterr().out
    with pytest.raises(ValueError, match="without parentheses"):
        checking.check("01.5", 3.0)


def test_hints_climb_a_ladder_and_the_solution_follows(capsys):
    checking._rungs.clear()
    for _ in range(4):
        checking.hint("01.1")
    checking.solution("01.1")
    printed = capsys.readouterr().out
    assert "hint 1 of 3" in printed and "hint 3 of 3" in printed and "hint 4" not in printed
    assert "(1 - beta).sqrt() * x_prev" in printed and "BEGIN SOLUTION" not in printed


# --- doctor and catalog -------------------------------------------------------------------------------


def test_doctor_names_what_is_missing(monkeypatch):
    rows = {what: (finding, fine) for what, finding, fine in doctor.report()}
    assert rows["torch"][1] and "sha256" in rows["model digits"][0]
    monkeypatch.setattr("shutil.which", lambda _: None)
    rows = {what: (finding, fine) for what, finding, fine in doctor.report()}
    assert rows["bwrap"] == ("missing; needed for the sandbox of `course grade`; `apt-get install bubblewrap`", False)


def test_catalog_as_json():
    result = run(cli.app, ["catalog", "--json"])
    assert len(json.loads(result.output)) == len(catalog.systems())


# --- README -------------------------------------------------------------------------------------------


def test_readme_is_what_the_code_writes():
    text = (paths.root() / "README.md").read_text()
    assert readme.render(text) == text, "run `course readme`"
    for picture in (readme.PICTURE, readme.GALLERY):
        assert (paths.root() / picture).exists() and f"]({picture})" in text
    with pytest.raises(paths.CourseError, match="begin lectures"):
        readme.render("nothing")


def test_readme_names_commands_and_files_that_exist():
    import re

    text = (paths.root() / "README.md").read_text()
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    for word in re.findall(r"`(?:\.venv/bin/)?course ([a-z]+)", text):
        assert word in known, word
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (paths.root() / target).exists(), target
    for target in re.findall(r"(?:`|^)make ([a-z]+)(?:`|$)", text, re.M):
        assert re.search(rf"^{target}:", (paths.root() / "Makefile").read_text(), re.M), target
