"""Temporal layers that are told what moves: `Told`, and the condition `motion` of an inflated network."""

import pytest
import torch
from torch.testing import assert_close

from course_lib.nets.temporal import TemporalAttention, Told, sinusoids
from course_lib.video.inflation import inflated, mixed, video_ldm_of
from tests.control_bases import F64, B, base, randomised
from tests.draws import normal
from tests.video_bases import clips, frame_by_frame, gap, kinds

WIDTH = 6


def told(kind, learnt=False):
    """A Denoiser of clips whose temporal layers can be told a motion, and the image Denoiser that it was made of."""
    of = base(kind, F64)
    temporal = video_ldm_of(of.D.net, told=WIDTH)
    return of.of(D=inflated(of.D, randomised(temporal, seed=1) if learnt else temporal)), of.of(), clips(of)


def test_each_frame_is_told_by_its_number_and_the_text():
    one = randomised(Told(WIDTH, 8)).double()
    c = normal(3, WIDTH, seed=2).double()
    e = one(c, 5)
    assert e.shape == (3, 5, 8)
    p = sinusoids(5, 8).double()
    for i in range(5):
        h = one.of_text(c) + one.of_frame(p[i])
        assert_close(e[:, i], one.out(h * h.sigmoid()), rtol=0, atol=1e-12)


def test_attention_that_is_told_nothing_is_the_plain_one():
    """The same weights; a text then changes every frame, and each clip hears its own."""
    plain, layer = (TemporalAttention(8, positions="sinusoidal", told=width).double() for width in (0, WIDTH))
    randomised(layer)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x, c = normal(2, 4, 8, 3, 3, seed=3), normal(2, WIDTH, seed=4)
    assert torch.equal(layer(x), plain(x))
    heard = layer(x, c)
    assert float((heard - plain(x)).flatten(3).abs().amax(-1).min()) > 0
    assert_close(heard[1:], layer(x[1:], c[1:]), rtol=0, atol=1e-12)


@kinds
def test_at_the_start_a_motion_changes_nothing_and_later_it_does(kind):
    D, image, x = told(kind)
    c, sigma = normal(B, WIDTH, seed=5).double(), torch.tensor(0.7)
    with torch.no_grad():
        assert gap(D.given(motion=c)(x, sigma), frame_by_frame(image, x, sigma)) < 1e-12
        D, image, x = told(kind, learnt=True)
        still, moved = D(x, sigma), D.given(motion=c)(x, sigma)
        assert gap(moved, still) > 1e-4
        assert_close(D.given(motion=c[:1])(x, sigma)[0], moved[0], rtol=0, atol=1e-10)
        with mixed(D.net, 0.0):
            assert gap(D.given(motion=c)(x, sigma), frame_by_frame(image, x, sigma)) < 1e-12


@kinds
def test_a_motion_of_another_width_and_one_for_layers_that_hear_none_are_errors(kind):
    D, _, _ = told(kind)
    with pytest.raises(ValueError, match=rf"motion has shape \(2, 5\); expected \(B, {WIDTH}\), a text for each clip"):
        D.given(motion=torch.zeros(B, 5))
    of = base(kind, F64)
    deaf = of.of(D=inflated(of.D, video_ldm_of(of.D.net)))
    with pytest.raises(ValueError, match="motion"):
        deaf.given(motion=torch.zeros(B, WIDTH))
