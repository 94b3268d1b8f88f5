"""The explorer of guidance: what it says is measured on what it shows."""

import pytest
import torch

from course_lib import zoo
from course_lib.devices import generator
from course_lib.gaussians import Mixture
from course_lib.guidance import bayes_classifier, classifier_guidance
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.study.guidance import ALL, BAYES, FREE, GuidanceExplorer
from course_lib.worlds import toys
from tests.shown import decode

PARTS = toys.three_classes()


@pytest.fixture(scope="module")
def explorer():
    D, *others = (zoo.load(name, device="cpu") for name in ("digits", "digits-classifier", "digits-reader"))
    return GuidanceExplorer(PARTS, D, *others)


def test_it_draws_what_is_chosen(explorer):
    assert decode(explorer.picture.value).shape == (470, 900, 3)
    for name, value in {"w": 6.0, "kind": BAYES, "part": 2, "levels": (0.2, 2.0), "seed": 5}.items():
        before, old = explorer.picture.value, explorer.controls[name].value
        explorer.controls[name].value = value
        assert explorer.message.value == "" and explorer.picture.value != before, name
        explorer.controls[name].value = old
        assert explorer.picture.value == before, name  # nothing but the control decides


def test_both_kinds_of_guidance_are_one_field_in_the_plane(explorer):
    """By Bayes' rule; the explorer walks the classifier-free one."""
    x = explorer.HIGH * torch.randn(explorer.SET, 2, generator=generator(3), dtype=torch.float64)
    D = classifier_guidance(toys.of_classes(PARTS).denoiser, bayes_classifier(PARTS), 1, 3.0)
    found = sample(D, x, karras(40, explorer.LOW, explorer.HIGH, to_zero=False), dpm_solver_pp_2m)
    torch.testing.assert_close(explorer.points(3.0, 1, seed=3), found, rtol=0, atol=1e-7)


def test_adherence_rises_and_diversity_falls(explorer):
    """At w = 1 both are the class's own: 500 draws, four and a half standard errors."""
    exact = PARTS[0].sample(20_000, generator(4), explorer.LOW)
    sure, spread = explorer.measure(explorer.points(1.0, 0), 0)
    own = torch.softmax(bayes_classifier(PARTS)(exact, torch.tensor(explorer.LOW)), 1)[:, 0]
    assert abs(sure - float(own.mean())) < 4.5 * float(own.std()) / explorer.SET**0.5
    assert abs(spread - 1) < 4.5 / explorer.SET**0.5  # of a spread in two dimensions at most 1 / sqrt(n)
    sures, spreads = explorer.curve(0, ALL)
    assert sures == sorted(sures) and sures[-1] > 0.999
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 0.7


def test_no_guidance_at_w_1_and_none_of_the_class_at_w_0(explorer):
    label = torch.arange(10)
    D, x, sigma = explorer._D, torch.randn(10, 1, 16, 16, generator=generator(5)), torch.tensor(1.0)
    null = D.given(label=torch.full_like(label, 10))
    assert torch.equal(explorer.guided(label, 1.0, FREE, ALL)(x, sigma), D.given(label=label)(x, sigma))
    for kind in (FREE, BAYES):
        assert torch.equal(explorer.guided(label, 0.0, kind, ALL)(x, sigma), null(x, sigma))
    inside = explorer.guided(label, 4.0, BAYES, (0.2, 2.0))(x, sigma)
    torch.testing.assert_close(inside, explorer.guided(label, 4.0, BAYES, ALL)(x, sigma), rtol=1e-4, atol=1e-4)


def test_bad_input_is_named(explorer):
    with pytest.raises(ValueError, match="a class is in 3 dimensions; expected 2"):
        GuidanceExplorer([Mixture.gaussian(torch.zeros(3), torch.eye(3))], explorer._D, None, None)
