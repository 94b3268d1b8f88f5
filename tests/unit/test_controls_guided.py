"""`mini-sd` guided by a sketch, and begun from noise priors: what the stored rows claim, with errors over seeds."""

import math
import statistics
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

from course_lib.zoo import controls_guided as guided
from course_lib.zoo import judge_controls, judge_scenes
from tests import seeds
from tests.seeds import surely_less

over_seeds = seeds.over_seeds(guided, guided.SEEDS)


# --- the machinery ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5, 20, 50])
def test_levels_from_the_last_time_are_the_schedulers(steps):
    assert_close(guided.levels(steps, guided.LAST), guided.model().sigmas(steps))
    later = guided.levels(steps, 799)
    assert len(later) == steps + 1 and later[0] == guided.model().schedule.sigma(torch.tensor(799.0))


def test_the_usual_start_gives_the_pictures_of_the_judge(monkeypatch):
    """In fp32, since two kernels of attention differ in bf16 by more than what a mistake might."""
    monkeypatch.setattr(judge_controls, "STEPS", 2)
    for module in (guided, judge_scenes):
        monkeypatch.setattr(module, "autocast", lambda device: nullcontext())
    model = guided.model()
    expected = judge_controls.pictures_of(model, "validation", seed=4)
    labels = guided.labels_of(guided.scenes("validation"))
    plain = lambda rows, noise, sigma: guided.priors()["plain"].start(labels[rows], sigma, noise)
    for begin in (guided.usual, plain):
        assert_close(guided.pictures("validation", 4, model.sigmas(2), begin=begin), expected, rtol=0, atol=1e-3)


def test_the_trained_predictors_are_small():
    assert guided.WEIGHTS.stat().st_size < 150_000


# --- sketch guidance --------------------------------------------------------------------------------------------------


def test_lines_are_read_from_noisy_latents_and_better_from_less_noisy_ones():
    rows = guided.rows("predictor")
    for code in guided.CODES:
        left = [row[f"{code}_left"] for row in rows]
        assert all(value < 1 for value in left)  # more is known than the mean drawing, also at the last level
        assert left[-1] > left[len(left) // 2] > left[1]
    assert rows[0]["lines_f1"] > rows[-1]["lines_f1"]


def test_a_sketch_guides_without_a_control():
    none = over_seeds("sketch", "edge", method="none")
    for code in guided.CODES:
        assert surely_less(over_seeds("sketch", "edge", method=code), none)


def test_the_strength_was_chosen_on_the_validation_scenes():
    tried = guided.rows("sketch tuning")
    plain = next(row for row in tried if row["beta"] == 0)
    for code in guided.CODES:
        chosen = guided.chosen_sketch(code)
        row = next(row for row in tried if chosen.items() <= row.items())
        assert row["obeyed"] > plain["obeyed"] - guided.KEPT - 1e-9 and row["edge"] < plain["edge"]


# --- noise priors -----------------------------------------------------------------------------------------------------


def paired(part, measure, a, b, **key):
    """Mean and standard error over the seeds of what prior b has more than prior a, of the same noise and scenes."""
    values = {(row["prior"], row["seed"]): row[measure] for row in guided.rows(part) if key.items() <= row.items()}
    more = [values[b, seed] - values[a, seed] for seed in guided.SEEDS]
    return statistics.mean(more), statistics.stdev(more) / math.sqrt(len(more))


def test_the_usual_start_is_not_what_x_is_there():
    """The more is known of class and place the truer the start; the mismatch is small where the schedule ends, and grows."""
    rows = {row["t"]: row for row in guided.rows("mismatch")}
    for row in rows.values():
        assert row["nats"]["joint"] > max(row["nats"]["spatial"], row["nats"]["categorical"]) > 0
    last = rows[guided.LAST]
    assert last["alpha_bar"] == pytest.approx(float(guided.model().scheduler.alphas_cumprod[-1]), abs=1e-6)
    assert last["nats"]["joint"] < 0.2 < 1 < rows[799]["nats"]["joint"] < 10 < rows[399]["nats"]["joint"]


def test_the_mismatch_is_as_stored():
    again, row = guided.mismatch(guided.LAST), next(row for row in guided.rows("mismatch") if row["t"] == guided.LAST)
    assert again["nats"]["joint"] == pytest.approx(row["nats"]["joint"], abs=2e-3)  # latents are encoded in bf16
    assert again["shift"] == pytest.approx(row["shift"], abs=2e-3)


def test_with_two_steps_the_frechet_distance_falls_with_the_joint_prior():
    """Begun where the schedule ends by little, for there the usual start is nearly right; begun later by a fifth."""
    last, late = (paired(part, "frechet", "plain", "joint", steps=2) for part in ("priors", "late priors"))
    assert last[0] + 2 * last[1] < 0
    assert late[0] + 2 * late[1] < 0 and late[0] < 2 * last[0]
    assert surely_less(
        over_seeds("late priors", "frechet", prior="joint", steps=2), over_seeds("priors", "frechet", prior="plain", steps=2)
    )
    for measure, sign in (("seg", 1), ("depth", 1), ("obeyed", -1)):
        more, error = paired("late priors", measure, "plain", "joint", steps=2)
        assert sign * more + 2 * error < 0


def test_with_five_steps_the_priors_change_little():
    """The network has room to forget where it began: under a tenth of the distance, from either start."""
    for part in ("priors", "late priors"):
        plain, _ = over_seeds(part, "frechet", prior="plain", steps=5)
        assert abs(paired(part, "frechet", "plain", "joint", steps=5)[0]) < 0.1 * plain
