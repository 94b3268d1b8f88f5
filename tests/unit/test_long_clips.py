"""The world of swings, its exact measures and the exact law of a cascade's windows, and what the stored rows claim."""

from __future__ import annotations

import math

import pytest
import torch

from course_lib.devices import generator
from course_lib.video.masks import every
from course_lib.zoo import long_clips
from course_lib.zoo.long_clips import (
    CENTRE,
    EVERY,
    FRAMES,
    FREQUENCIES,
    KEYS,
    WINDOWS,
    Swings,
    choices,
    exact_windows,
    frames_at,
    judged,
    see,
    spline,
    swing_of,
    swings,
)
from tests import seeds

over_seeds = seeds.over_seeds(long_clips, long_clips.SEEDS)


def film(of):
    """All of the clips of these swings."""
    return frames_at(of.along(torch.arange(FRAMES)))


# --- the world and its measures ---------------------------------------------------------------------------------------------


def test_a_blob_has_its_mass_its_place_and_its_width_wherever_it_lies():
    i = torch.arange(8, dtype=torch.float64)
    for p in torch.linspace(1, 6, 23, dtype=torch.float64):
        w = spline(i - p)
        assert float(w.sum()) == pytest.approx(1, abs=1e-12)
        assert float((w * i).sum()) == pytest.approx(float(p), abs=1e-12)
        assert float((w * (i - p) ** 2).sum()) == pytest.approx(1 / 3, abs=1e-12)


def test_true_clips_are_read_exactly():
    of = swings(50, generator(0))
    seen, t = see(film(of)), torch.arange(FRAMES)
    torch.testing.assert_close(seen.p[..., 0], CENTRE + of.along(t), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.p[..., 1], torch.full((50, FRAMES), CENTRE, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.sharpness, torch.ones(50, FRAMES, dtype=torch.float64), rtol=0, atol=1e-5)
    assert float(seen.unlike.max()) < 1e-5
    apart, f, axis = swing_of(seen.p)
    assert float(apart.max()) < 0.01  # half a step of f over half a clip: 2.5 * 2 pi * 5e-5 * 16 at the most
    assert float((f - of.f).abs().max()) < 1.1e-4
    torch.testing.assert_close(axis, of.a, rtol=0, atol=0.02)
    assert torch.equal(FREQUENCIES[choices(seen.p)], of.f[:, None].expand(-1, WINDOWS))


def mirrored(of):
    """The same key frames at the other frequency."""
    return Swings(of.a, 1 / EVERY - of.f, -of.phi)


def test_measures_know_what_is_wrong():
    """A clip that changes its period, stands still, leaves the middle row, or is blurred is not a swing, or is said to be so."""
    of = swings(20, generator(1))
    x, half = film(of), FRAMES // 2
    changed = torch.cat([x[:, :half], film(mirrored(of))[:, half:]], 1)
    assert judged(changed)["one swing"] == judged(changed)["one period"] == 0 and judged(changed)["residual"] > 0.5
    assert judged(changed)["agree"] == pytest.approx(1 - 1 / (WINDOWS - 1), abs=1e-4)
    still = x[:, :1].expand_as(x)
    assert judged(still)["residual"] < 1e-6 and judged(still)["one swing"] == 0
    leaving = torch.cat([x[:, :half], x[:, half:].roll(1, -2)], 1)
    assert judged(leaving)["one swing"] == 0 and judged(leaving)["agree"] < 1
    blurred = (x + x.roll(1, -1) + x.roll(-1, -1)) / 3
    assert judged(blurred)["sharpness"] < 0.8 and judged(blurred)["unlike"] > 0.3
    dim = judged(0.8 * x)
    # `judged` rounds to four digits
    assert dim["sharpness"] == pytest.approx(0.64, abs=1e-4) and dim["unlike"] == pytest.approx(0.2, abs=1e-4)
    assert dim["consistent"] == 1


def test_every_fourth_frame_cannot_tell_one_frequency_from_the_other():
    of = swings(100, generator(3))
    mirror = mirrored(of)
    assert set(mirror.f.tolist()) == set(of.f.tolist()) == set(FREQUENCIES.tolist())
    torch.testing.assert_close(of.along(KEYS), mirror.along(KEYS))
    assert float((of.along(KEYS + 1) - mirror.along(KEYS + 1)).abs().mean()) > 0.5


# --- the exact law of a window ----------------------------------------------------------------------------------------------


def test_two_key_frames_leave_two_motions_as_likely_as_each_other():
    """By rejection: of many swings, those that are near 1 and -0.5 at the ends of a window are half of each frequency."""
    of = swings(400_000, generator(4))
    x = of.along(torch.arange(EVERY + 1))
    near = ((x[:, 0] - 1.5).abs() < 0.05) & ((x[:, 4] + 0.8).abs() < 0.05)
    fast, middle = (of.f[near] == FREQUENCIES[1]), x[near, 2]
    assert near.sum() > 200
    assert abs(float(fast.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(int(near.sum()))
    for kind, sign in ((~fast, 1), (fast, -1)):  # a cos(phi + pi/4) and a cos(-phi + 3 pi/4), with a sin(phi) = 0.8
        expected = sign * (1.5 - 0.8) / math.sqrt(2)
        assert float((middle[kind] - expected).abs().max()) <= 0.1 / math.sqrt(2) + 1e-6


def test_exact_windows_keep_key_frames_and_toss_a_coin_for_each_window():
    of = swings(400, generator(5))
    x = exact_windows(of, generator(6))
    assert torch.allclose(x[:, every(FRAMES, EVERY)], film(of)[:, every(FRAMES, EVERY)], atol=1e-6)
    chosen = choices(see(x).p)
    assert abs(float(chosen.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(chosen.numel())
    assert abs(judged(x)["agree"] - 0.5) < 4 * 0.5 / math.sqrt(400 * (WINDOWS - 1))
    found = judged(x)
    assert found["one period"] == found["consistent"] <= found["one swing"]  # near phi = pi / 4 the two motions lie close
    assert found["one period"] < 1 / 128 + 4 * math.sqrt(1 / 128 / 400)


# --- networks ---------------------------------------------------------------------------------------------------------------


def test_methods_have_equal_weights():
    nets = long_clips.NETWORKS
    weights = [sum(p.numel() for name in names for p in nets[name]().parameters()) for names in long_clips.METHODS.values()]
    assert max(weights) < 1.05 * min(weights)


def test_a_cascade_keeps_its_key_frames():
    torch.manual_seed(0)
    keys, windows = (long_clips.NETWORKS[name]() for name in long_clips.METHODS["cascade"])
    of = swings(2, generator(9))
    z = frames_at(of.along(KEYS))
    x = long_clips.cascade(keys, windows, 2, 0, z)
    assert x.shape == (2, FRAMES, 1, 8, 8)
    assert torch.equal(x[:, every(FRAMES, EVERY)], z[:, :-1])
    assert torch.equal(long_clips.cascade(keys, windows, 2, 0)[:, ::EVERY], long_clips.draw(keys, len(KEYS), 2, 0)[:, :-1])


@pytest.mark.parametrize("network", long_clips.NETWORKS)
def test_a_few_steps_run_again_are_the_same_and_learn(network):
    first, again = (long_clips.train(network, 0, 6) for _ in range(2))
    assert first.losses == again.losses
    assert min(first.losses[-3:]) < first.losses[0]


# --- what is stored ---------------------------------------------------------------------------------------------------------


def test_the_measures_call_true_clips_perfect():
    for measure, best in (("consistent", 1), ("agree", 1), ("sharpness", 1), ("unlike", 0), ("residual", 0)):
        assert over_seeds("bounds", measure, what="true")[0] == pytest.approx(best, abs=0.005)


def test_windows_drawn_from_their_exact_law_lose_the_period():
    """One clip in 128 keeps it, whatever the networks: 2 (1/2)^8, by chance of 1500 clips."""
    mean, _ = over_seeds("bounds", "consistent", what="exact windows")
    assert mean == over_seeds("bounds", "one period", what="exact windows")[0]
    assert abs(mean - 1 / 128) < 4 * math.sqrt(1 / 128 / (500 * len(long_clips.SEEDS)))
    assert over_seeds("bounds", "residual", what="exact windows")[0] > 0.5


def test_the_bounds_are_measured():
    stored = next(row for row in long_clips.rows("bounds") if row["what"] == "exact windows")
    assert long_clips.bounds("exact windows", stored["seed"]) == pytest.approx(stored, abs=1e-3)


def row_of(part, **key):
    """The one stored row with this key."""
    [found] = [row for row in long_clips.rows(part) if key.items() <= row.items()]
    return found


def clips_error(n):
    """A standard error of the mean, over n clips, of a number that lies within [0, 1]: no more than this."""
    return 0.5 / math.sqrt(n)


@pytest.mark.parametrize("seed", long_clips.SEEDS)
@pytest.mark.parametrize("method", ["space-time U-Net", "video DiT"])
def test_all_frames_at_once_keep_the_period_that_windows_lose(method, seed):
    """In each training, by four standard errors: better than the trained cascade, than exact windows, and than chance.

    Chance is for windows that choose by themselves, one as often fast as this method's are: fast^2 + (1 - fast)^2 of neighbours
    agree. Its own error is |4 fast - 2| <= 2 times that of `fast`.
    """
    row, cascade = row_of("clips", method=method, seed=seed), row_of("clips", method="cascade", seed=seed)
    exact, fast = row_of("bounds", what="exact windows", seed=seed), row["fast"]
    for measure in ("agree", "one period", "consistent"):
        for other, n in ((cascade, long_clips.CLIPS), (exact, 500)):
            assert row[measure] - other[measure] > 4 * math.hypot(clips_error(long_clips.CLIPS), clips_error(n))
    error = clips_error(long_clips.CLIPS)
    assert row["agree"] - fast**2 - (1 - fast) ** 2 > 4 * (1 + abs(4 * fast - 2)) * error


@pytest.mark.parametrize("seed", long_clips.SEEDS)
def test_a_trained_cascade_is_no_more_consistent_than_exact_windows(seed):
    """Not with its own key frames, and not with true ones, which shows that it is the windows that lose the period."""
    row, exact = row_of("clips", method="cascade", seed=seed), row_of("bounds", what="exact windows", seed=seed)
    for measure in ("one period", "consistent"):
        for found in (row, row["from true key frames"]):
            assert found[measure] - exact[measure] < 4 * math.hypot(clips_error(long_clips.CLIPS), clips_error(500))


def test_every_method_had_as_many_seconds():
    """Within the tenth by which one training's seconds differ on a busy processor."""
    seconds = [over_seeds("clips", "seconds", method=method)[0] for method in long_clips.METHODS]
    assert max(seconds) < 1.1 * min(seconds)
