"""The table of solvers on one problem in the plane: what is stored is what is measured, and what it shows."""

import pytest
import torch

from course_lib.devices import generator
from course_lib.zoo import posteriors
from course_lib.zoo.posteriors import SEEDS, SOLVERS, N, floor, judge, posterior, samples, table

TABLE = {row["solver"]: row for row in table()}
SAMPLERS = ["CSGM", "DAPS", "DiffPIR", "DPS", "DPS, score form", "MCGdiff", "PiGDM", "RealNVP", "SNIPS", "TDS"]


def test_every_solver_is_tuned_and_measured_with_each_seed():
    assert set(TABLE) == set(SOLVERS)
    assert sorted((row["solver"], row["seed"]) for row in posteriors.rows()) == sorted((s, k) for s in SOLVERS for k in SEEDS)
    for row in posteriors.rows("tuning"):
        best = min(one["w1"] for one in row["tried"] if one["w1"] is not None)
        assert {**row["chosen"], "w1": best} in row["tried"]


def test_exact_points_are_at_the_floor():
    """A ninth set of exact points is within 4.5 deviations of the mean of eight; its width is 1 within 4.5 / sqrt(4 N), the
    standard error of a root mean square of N squared normal lengths in the plane."""
    found, (mean, deviation) = judge(posterior().sample(N, generator(99, 9))), floor()
    assert found["w1"] < mean + 4.5 * deviation
    assert abs(found["width"] - 1) < 4.5 / (4 * N) ** 0.5 + 0.01  # points near a border belong to the other mode
    assert found["tv"] < 4.5 * len(posterior().weights) / (4 * N) ** 0.5


@pytest.mark.parametrize("solver", ["DiffPIR", "CSGM", "PnP-Flow"])
def test_what_is_stored_is_what_is_measured(solver):
    """Another processor rounds apart by 1e-12 in a step, and a hundred of them amplify it at most between modes."""
    for row in posteriors.rows():
        if row["solver"] == solver and row["seed"] == 0:
            x, cost = samples(solver, 0, **row["setting"])
            assert judge(x, 0)["w1"] == pytest.approx(row["w1"], abs=1e-3)
            assert (cost["calls"], cost["rows"]) == (row["calls"], row["rows"])


def test_the_table_tells_samplers_from_points():
    """Particles are nearest. RED-diff's runs all end in one mode, so that the others' weight is its error; the points of PnP-flow
    reach all modes, and are too near the middle of each."""
    assert {"MCGdiff", "TDS"} == set(list(TABLE)[:2])
    assert TABLE["RED-diff"]["tv"] > 0.5
    assert TABLE["RED-diff"]["w1"] > 3 * max(TABLE[name]["w1"] for name in SAMPLERS)
    assert TABLE["PnP-Flow"]["width"] < 0.8 < min(TABLE[name]["width"] for name in SAMPLERS if name != "DiffPIR")
    assert all(row["calls"] <= posteriors.CALLS for name, row in TABLE.items() if name != "RealNVP")


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="solver = 'magic'; expected one of replacement"):
        samples("magic")
    with pytest.raises(ValueError, match="'magic' has no setting in posteriors.json; run `python -m course_lib.zoo.posteriors`"):
        posteriors.chosen("magic")


def test_samples_are_a_function_of_their_seed():
    first, again, other = (samples("RealNVP", seed, 50, steps=3)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
