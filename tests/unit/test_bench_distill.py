"""The benchmark of score distillation: what an iteration asks of the networks, by count, and that its parts ask the same."""

import functools

from course_lib import bench, bench_distill
from course_lib.bench_distill import peak_mebibytes, pictures, rows_of_calls, runs

PARTICLES, ITERATIONS = 2, 3


def test_sds_is_one_batched_call_and_vsd_adds_a_call_and_a_training_step():
    """Prompt and reference make one call of twice the rows; the second score is asked once, and trained once."""
    found = {run.name: rows_of_calls(run.distil, run.networks) for run in runs(PARTICLES, ITERATIONS)}
    teacher = [2 * PARTICLES] * ITERATIONS
    assert found == {"SDS": {"teacher": teacher}, "VSD": {"teacher": teacher, "second score": [PARTICLES] * 2 * ITERATIONS}}


def test_an_iteration_is_held_against_the_work_that_it_does():
    for run in runs(PARTICLES, ITERATIONS):
        counts = [rows_of_calls(part, run.networks) for part in run.parts.values()]
        whole = rows_of_calls(run.distil, run.networks)
        for name in run.networks:
            assert sum(sum(count[name]) for count in counts) == sum(whole[name])


def test_a_checkpointed_encoder_lowers_the_peak():
    plain, checkpointed = (peak_mebibytes(run) for _, run in pictures(PARTICLES))
    assert checkpointed < plain


def test_rows_of_the_benchmark(monkeypatch):
    """Whether the ratios keep their limit depends on the machine, and `make bench` asks."""
    monkeypatch.setattr(bench_distill, "runs", functools.partial(runs, 1, 1))
    monkeypatch.setattr(bench_distill, "pictures", functools.partial(pictures, 1))
    rows = bench.bench_distill(rounds=2)
    assert [row["name"] for row in rows] == [
        "distill: SDS, 1 iterations",
        "distill: SDS, work",
        "distill: SDS, peak memory",
        "distill: VSD, 1 iterations",
        "distill: VSD, work",
        "distill: VSD, peak memory",
        "distill: SDS through the encoder, peak memory",
        "distill: SDS through checkpointed(encode), peak memory",
    ]
    ratios = [row for row in rows if "ratio" in row]
    assert all(row["limit"] >= 1.05 and row["ours_s"] > 0 and row["other_s"] > 0 for row in ratios)
    assert [row["value"] for row in rows if row["name"].endswith("work")] == [2, 4]
    assert rows[5]["value"] > rows[2]["value"] > 0  # a training step keeps what the way back needs
    assert bench.BENCHMARKS["distill"] is bench.bench_distill
