"""Grading whole notebooks in a subprocess: full marks, zero, each mistake named, and every way to go wrong costs one item."""

import json

import nbformat
import pytest

from course_lib.grading import grade as grader
from course_lib.grading import submission, verdicts
from course_lib.grading.items import find, items_of, set_names
from tests.graders.tools import answer_cell, built, mistaken, save

SETS = pytest.mark.parametrize("number", set_names(), ids=[f"set_{number}" for number in set_names()])


def grade(notebook, folder, worker, **options):
    sheet = grader.grade(save(notebook, folder), worker=worker, **options)
    return sheet, {row["item"]: row for row in sheet.results}


@SETS
def test_solved_set_scores_full_marks(number, tmp_path, worker):
    sheet, rows = grade(built(number, "solved"), tmp_path, worker)
    assert sheet.points == sheet.out_of == sum(item.points for item in items_of(number).values())
    assert {row["status"] for row in rows.values()} == {verdicts.CORRECT}


@SETS
def test_blank_set_scores_zero_and_nothing_is_attempted(number, tmp_path, worker):
    sheet, rows = grade(built(number, "blank"), tmp_path, worker)
    assert sheet.points == 0 and sheet.out_of > 0
    assert {row["status"] for row in rows.values()} == {verdicts.NOT_ATTEMPTED}


@SETS
def test_mutation_score_is_one_hundred_per_cent(number, tmp_path, worker):
    """Every known mistake of every item, written into a notebook: wrong, and named."""
    items = items_of(number)
    rounds = max(len(item.mistakes) for item in items.values())
    for k in range(rounds):
        notebook = built(number, "solved")
        chosen = {item_id: item.mistakes[k % len(item.mistakes)] for item_id, item in items.items()}
        for item_id, known in chosen.items():
            answer_cell(notebook, item_id).source = mistaken(items[item_id], known.name)
        sheet, rows = grade(notebook, tmp_path, worker, seed=3)  # one seed: the cases are drawn once
        assert sheet.points == 0
        for item_id, known in chosen.items():
            assert (rows[item_id]["status"], rows[item_id]["mistake"]) == (verdicts.WRONG, known.name), rows[item_id]


FAULTS = {
    "loop in the function": ("def noising_step(x_prev, beta, eps):\n    while True:\n        pass", verdicts.TIMED_OUT),
    "exit": ("import os\ndef noising_step(x_prev, beta, eps):\n    os._exit(0)", verdicts.CRASHED),
    "memory": ("import torch\ndef noising_step(x_prev, beta, eps):\n    return torch.zeros(10**11)", verdicts.OUT_OF_MEMORY),
    "raises": ("def noising_step(x_prev, beta, eps):\n    raise KeyError('no')", verdicts.CRASHED),
    "syntax": ("def noising_step(x_prev, beta, eps)\n    return x_prev", verdicts.MISSING),
    "other name": ("def something_else(x_prev, beta, eps):\n    return x_prev", verdicts.MISSING),
    "object": ("def noising_step(x_prev, beta, eps):\n    return [1, 2]", verdicts.WRONG),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_one_item(fault, tmp_path, worker):
    code, status = FAULTS[fault]
    notebook = built("01", "solved")
    answer_cell(notebook, "01.1").source = code
    sheet, rows = grade(notebook, tmp_path, worker, seconds=2)
    assert rows["01.1"]["status"] == status, rows["01.1"]
    assert sheet.points == sheet.out_of - find("01.1").points


def test_a_loop_elsewhere_in_the_notebook_costs_nothing(tmp_path, worker):
    notebook = built("01", "solved")
    answer_cell(notebook, "01.2").source += "\nwhile True:\n    pass"
    notebook.cells.insert(0, nbformat.v4.new_code_cell("while True:\n    pass"))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("1 / 0"))
    sheet, _ = grade(notebook, tmp_path, worker, seconds=5)
    assert sheet.points == sheet.out_of


def test_helpers_and_imports_elsewhere_are_found(tmp_path, worker):
    notebook = built("01", "solved")
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import math as m\nHALF = 0.5\ndef root(v):\n    return v ** HALF"))
    answer_cell(
        notebook, "01.1"
    ).source = "def noising_step(x_prev, beta, eps):\n    return m.sqrt(1 - float(beta)) * x_prev + root(beta) * eps"
    sheet, _ = grade(notebook, tmp_path, worker)
    assert sheet.points == sheet.out_of


def test_cells_are_found_by_name_when_ids_are_lost(tmp_path, worker):
    notebook = built("01", "solved")
    for k, cell in enumerate(notebook.cells):
        cell["id"] = f"lost-{k}"
    sheet, _ = grade(notebook, tmp_path, worker)
    assert sheet.points == sheet.out_of


def test_the_students_own_checks_and_tags_count_for_nothing(tmp_path, worker):
    notebook = built("01", "blank")
    for cell in notebook.cells:
        cell.metadata["tags"] = ["raises-exception", "skip-execution"]
        if cell.cell_type == "code" and "check(" in cell.source:
            cell.source = "print('01.1 correct: 1 point')"
    sheet, _ = grade(notebook, tmp_path, worker)
    assert sheet.points == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"nbformat": 4, "cells": "no"}'])
def test_unreadable_files_say_so(content, tmp_path, worker):
    path = tmp_path / "01_broken.ipynb"
    path.write_bytes(content)
    sheet = grader.grade(path, worker=worker)
    assert sheet.error.startswith(verdicts.UNREADABLE) and sheet.points == 0
    with pytest.raises(submission.Unreadable):
        submission.read(path)


def test_a_fault_of_ours_is_never_a_zero_in_silence(tmp_path, worker, monkeypatch):
    monkeypatch.setattr(grader.verdicts, "exam", lambda *_: 1 / 0)
    _, rows = grade(built("01", "solved"), tmp_path, worker)
    assert {row["status"] for row in rows.values()} == {verdicts.INFRASTRUCTURE}


def test_score_sheet_is_written_as_text_and_json(tmp_path, worker):
    sheet, _ = grade(built("01", "blank"), tmp_path, worker)
    path = grader.write(sheet, tmp_path / "scores")
    assert json.loads(path.read_text())["points"] == 0
    assert "0 of 17 points" in path.with_suffix(".txt").read_text()


def test_submissions_of_one_name_get_sheets_of_their_own(tmp_path):
    for student in ("ada", "bea"):
        (tmp_path / student / ".ipynb_checkpoints").mkdir(parents=True)
        save(built("01", "blank"), tmp_path / student)
        save(built("01", "blank"), tmp_path / student / ".ipynb_checkpoints")
    names = grader.collect([tmp_path, tmp_path / "ada"])
    assert sorted(names.values()) == ["ada-01_forward_process", "bea-01_forward_process"]
    assert list(grader.collect([tmp_path / "ada"]).values()) == ["01_forward_process"]


def test_secret_seeds_differ_and_answers_by_table_fail(tmp_path, worker):
    """A function that answers the notebook's public cases from a table earns nothing under another seed."""
    drawn = verdicts.exam("01.4", 0)
    table = [(case["alpha_bar"].tolist(), out["log_snr"].tolist()) for case, out in zip(drawn.cases, drawn.expected, strict=True)]
    notebook = built("01", "solved")
    answer_cell(notebook, "01.4").source = (
        f"import torch\nTABLE = {table!r}\n"
        "def log_snr(alpha_bar):\n"
        "    best = min(TABLE, key=lambda row: sum(abs(a - b) for a, b in zip(row[0], alpha_bar.tolist())))\n"
        "    return torch.tensor(best[1], dtype=torch.float64)"
    )
    assert grade(notebook, tmp_path, worker, seed=0)[1]["01.4"]["status"] == verdicts.CORRECT
    assert grade(notebook, tmp_path, worker)[1]["01.4"]["status"] == verdicts.WRONG
