"""Benchmarks: rows of both kinds, limits that fail, the classroom's swiss roll, and every rule of a sampler."""

import inspect
import json
import math
import re
import time

import ipywidgets as widgets
import pytest
import scipy.stats
import torch
from sklearn.datasets import make_swiss_roll
from torch.testing import assert_close
from typer.testing import CliRunner

from course_lib import bench, bench_rules, cli, langevin, multistep, sdes, singlestep, steps, stochastic
from course_lib.bench_rules import PEERS, RULES, beside, in_samplers
from course_lib.denoisers import Counted
from course_lib.stage.demos import Demo
from course_lib.study import Explorer
from course_lib.worlds.toys import classroom_roll, three_blobs
from tests.draws import normal

SE = 4.5  # standard errors
F64 = torch.float64
RATIO = {"name": "r", "ours_s": 2.0, "other_s": 1.0, "other": "peer", "ratio": 2.0, "limit": 1.5}
VALUE = {"name": "v", "value": 7.25, "unit": "m", "beside": "twice the floor", "limit": 8.0}


def test_over_compares_the_figure_of_either_kind_of_row():
    rows = [RATIO, VALUE, RATIO | {"limit": 2.0}, VALUE | {"limit": 7.0}, VALUE | {"limit": None}, RATIO | {"limit": None}]
    assert [bench.figure(row) for row in rows[:2]] == [2.0, 7.25]
    assert bench.over(rows) == [rows[0], rows[3]]
    assert bench.over([VALUE | {"value": math.nan}]) and not bench.over([VALUE | {"value": math.nan, "limit": None}])


@pytest.mark.parametrize(("rows", "code"), [([RATIO | {"limit": None}, VALUE], 0), ([VALUE | {"limit": 7.0}], 1), ([RATIO], 1)])
def test_the_command_prints_both_kinds_and_fails_over_a_limit(rows, code, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "BENCHMARKS", {"some": lambda: rows})
    file = tmp_path / "rows.json"
    result = CliRunner().invoke(cli.app, ["bench", "some", "--json", str(file)])
    assert result.exit_code == code
    assert ("ratios" in result.output) == any("ratio" in row for row in rows)
    assert ("7.250" in result.output) == ("values" in result.output) == any("value" in row for row in rows)
    written = json.loads(file.read_text())
    assert [{key: row[key] for key in row if key not in ("hardware", "versions")} for row in written] == rows
    assert all("torch" in row["versions"] for row in written)
    if code:
        assert str(result.exception) == f"over the limit: {rows[0]['name']}"


def test_the_classroom_roll_is_scikit_learns():
    """On the spiral once the standardisation is undone, by moments from quadrature; and the angles are scikit-learn's.

    Kolmogorov's distance of two sets of n exceeds 2.6 sqrt(2 / n) with probability 2 exp(-2 * 2.6^2) = 3e-6.
    """
    n = 20_000
    angle = 1.5 * math.pi + 3 * math.pi * (torch.arange(300_000, dtype=F64) + 0.5) / 300_000
    share = torch.tensor([3.0, 2.0, 3.0], dtype=F64).repeat_interleave(100_000) / 8 / 100_000
    entries = torch.stack([angle * angle.cos(), angle * angle.sin()])
    mean = float((share * entries).sum() / 2)
    std = math.sqrt(float((share * entries**2).sum() / 2) - mean**2)
    ours = classroom_roll(n, torch.Generator().manual_seed(0))
    assert ours.shape == (n, 2) and ours.dtype == torch.float32
    back = ours.double() * std / 2 + mean
    t = back.norm(dim=1)
    assert_close(back, torch.stack([t * t.cos(), t * t.sin()], -1), rtol=0, atol=1e-4)  # fp32 near 14
    theirs = make_swiss_roll(n, noise=0.0, hole=True, random_state=0)[1]
    assert scipy.stats.ks_2samp(t.numpy(), theirs).statistic < 2.6 * math.sqrt(2 / n)


def test_a_short_swiss_roll_has_every_row_and_an_untrained_network_fails():
    rows = bench.bench_swissroll(seeds=1, steps=30, points=200)
    assert [row["name"] for row in rows] == [
        "swiss roll: two exact sets",
        "swiss roll, seed 0: training",
        "swiss roll, seed 0: DDPM, 1000 steps",
        "swiss roll, seed 0: DDIM, 50 steps",
    ]
    floor, training, ddpm, ddim = rows
    assert floor["limit"] is None and (training["limit"], ddpm["limit"], ddim["limit"]) == (30.0, 18.0, 60.0)
    assert bench.over(rows) == [ddpm, ddim]
    assert ddpm["beside"] == f"{ddpm['value'] / floor['value']:.1f} times the floor"


def test_the_families_took_the_same_time_to_train():
    """A row for each family of each world; times depend on the machine, so that they are judged by `make bench` alone."""
    rows = bench.bench_families(steps=2)
    assert [row["name"].split(":")[0] for row in rows[:4]] == ["ring, GAN", "ring, VAE", "ring, flow", "ring, diffusion"]
    assert len(rows) == 8 and all(row["value"] > 0 and row["limit"] > 0 for row in rows)


# --- the rules ---------------------------------------------------------------------------------------------------------


def rules_of(module) -> set[str]:
    """The public steps of a module and its functions that make one."""
    functions = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    signatures = {n: inspect.signature(f) for n, f in functions.items() if not n.startswith("_")}
    is_step = lambda s: list(s.parameters)[:5] == ["D", "x", "sigma", "sigma_next", "memory"]
    return {n for n, s in signatures.items() if s.return_annotation == "Step" or is_step(s)}


def test_no_rule_is_left_out():
    found = [rules_of(module) for module in (steps, singlestep, multistep, stochastic, langevin, sdes)]
    assert all(found) and set().union(*found) == set(RULES)


CALLS = {"heun": 2, "dpm_solver_2": 2, "dpm_solver_3": 3, "dpm_solver_pp_2s": 2, "edm_stochastic": 2, "dpm_solver_sde": 2}


def test_a_rule_is_held_against_as_many_calls_as_it_makes():
    """Rules of several evaluations make one in the step to 0; PLMS begins with two, and a correction has one of its own."""
    D, walks = Counted(three_blobs().denoiser), 6
    for name, run, calls in in_samplers(D, normal(4, 2), walks):
        if name != "sample_adaptive":
            extra = {"plms": 1, "predictor_corrector": walks - 1}.get(name, 0)
            assert calls == (walks - 1) * CALLS.get(name, 1) + 1 + extra, name
        D.calls = 0
        run()
        assert D.calls == calls > 0, name


@pytest.mark.parametrize("name", PEERS)
def test_both_sides_walk_afresh_each_time(name):
    """They spend the same calls, but for schedulers that count a level inside a step among their steps."""
    ours, calls, theirs, their_calls = beside(PEERS[name], normal(2, 3, 4, 4).float(), 6)
    if PEERS[name].scheduler == "DPMSolverSinglestepScheduler":
        assert their_calls == 6 < calls
    else:
        assert their_calls - calls == (name == "predictor_corrector")  # theirs corrects before the first step, too
    assert theirs() == their_calls  # a scheduler that had kept its history would run beyond its last step
    ours()


def test_rows_of_the_rules(monkeypatch):
    """A row for each rule of each kind; whether they keep their limits depends on the machine, and `make bench` asks."""
    monkeypatch.setattr(bench_rules, "RULES", {name: RULES[name] for name in ("ddim", "plms")})
    monkeypatch.setattr(bench_rules, "PEERS", {"heun": PEERS["heun"]})
    *alone, adaptive, beside_theirs = bench.bench_rules(steps=2, walks=4, rounds=2)
    assert [(row["name"], row["other"]) for row in (*alone, adaptive)] == [
        ("sample(digits), ddim", "2 bare network calls"),
        ("sample(digits), plms", "3 bare network calls"),
        ("sample(digits), sample_adaptive", adaptive["other"]),
    ]
    assert all(row["limit"] >= 1.05 for row in (*alone, adaptive))
    assert beside_theirs["name"] == "rule alone: heun, 1,000 calls"
    assert beside_theirs["other"] == "diffusers HeunDiscreteScheduler" and beside_theirs["limit"] >= 1
    assert all(row["ours_s"] > 0 and row["other_s"] > 0 for row in (*alone, adaptive, beside_theirs))


def test_a_redraw_is_timed_from_the_move_to_the_picture(monkeypatch):
    class Slow(Explorer):
        def __init__(self):
            super().__init__({"level": widgets.IntSlider(5, max=10, description="level")})

        def draw(self, level):
            time.sleep(0.02 if level < 9 else 0.1)
            return b""

    monkeypatch.setattr("course_lib.stage.demos.DEMOS", {"07": Demo("A toy", {"slow": Slow})})
    (row,) = bench.bench_redraw(moves=11)
    assert row["name"] == "redraw: 07, slow" and 0.02 <= row["value"] < 0.1
    assert float(re.search(r"95th percentile (\S+) s of 11 moves of level", row["beside"])[1]) >= 0.1
