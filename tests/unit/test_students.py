"""The students of `digits`: what their cards promise, and fresh digits from the committed weights."""

import math

import pytest
import torch

from course_lib import zoo
from course_lib.worlds import digits
from course_lib.zoo.recipes import digits as teacher_recipe
from course_lib.zoo.recipes import digits_students as recipe

PROGRESSIVE, CONSISTENCY = (zoo.card(name)["metrics"] for name in ("digits-progressive", "digits-consistency"))


def test_they_are_children_of_the_embedded_digits():
    """Their weights are changes of those of `digits`, which is to be trained first."""
    for card in (PROGRESSIVE, CONSISTENCY):
        assert card["teacher_sha256"] == zoo.card("digits")["sha256"]


def test_four_calls_do_what_sixty_four_do():
    """Consistency draws nearer to the real digits than its teacher; progressive within a fifth, and nearer than in 20 steps."""
    student, teacher = PROGRESSIVE["student"]["4"], PROGRESSIVE["teacher"]["64"]
    assert CONSISTENCY["student"]["4"]["frechet"] <= teacher["frechet"]
    assert PROGRESSIVE["frechet_4_over_64"] <= 1.2 and student["frechet"] <= PROGRESSIVE["teacher"]["20"]["frechet"]
    assert PROGRESSIVE["frechet_4_over_64"] == pytest.approx(student["frechet"] / teacher["frechet"], rel=0.01)
    low, high = PROGRESSIVE["frechet_4_over_64_interval"]
    assert low < PROGRESSIVE["frechet_4_over_64"] < high


def test_training_brings_what_the_same_steps_of_the_teacher_do_not():
    """Progressive distillation off: DDIM along the student's grid. And the student follows the teacher's own path."""
    for calls in map(str, recipe.KEPT):
        student, teacher = PROGRESSIVE["student"][calls], PROGRESSIVE["teacher"][calls]
        assert student["frechet"] < teacher["frechet"] / 2
        assert PROGRESSIVE["rms_from_64_steps"][calls] < PROGRESSIVE["rms_from_64_steps_of_the_teacher"][calls] / 2


def test_classes_are_read_as_asked():
    for card in (PROGRESSIVE, CONSISTENCY):
        for row in card["student"].values():
            assert min(row["class_read_as_asked"].values()) >= 0.95


@pytest.mark.parametrize("calls", recipe.KEPT)
def test_fresh_digits_of_the_progressive_students(calls):
    """100 digits: classes as the card says, less 4.5 standard errors, and nearer to 20 steps of the teacher than its own few."""
    teacher, D = zoo.load("digits", device="cpu"), zoo.load("digits-progressive", device="cpu")[calls]
    asked = torch.arange(100) % digits.CLASSES
    samples = recipe.draw(D, asked, recipe.grid(calls), seed=55)
    share = float((zoo.load("digits-reader", device="cpu")(samples).argmax(1) == asked).double().mean())
    assert share >= 0.95 - 4.5 * math.sqrt(0.95 * 0.05 / 100)
    goal = recipe.draw(teacher, asked, teacher_recipe.grid(20), seed=55)
    plain = recipe.draw(teacher, asked, recipe.grid(calls), seed=55)
    assert (samples - goal).square().mean() < (plain - goal).square().mean()


@pytest.mark.parametrize("calls", recipe.CALLS)
def test_fresh_digits_of_the_consistency_function(calls):
    f, asked = zoo.load("digits-consistency", device="cpu"), torch.arange(100) % digits.CLASSES
    samples = recipe.draw(f, asked, recipe.levels(calls), seed=56, step=recipe.consistency)
    share = float((zoo.load("digits-reader", device="cpu")(samples).argmax(1) == asked).double().mean())
    assert share >= 0.95 - 4.5 * math.sqrt(0.95 * 0.05 / 100)
    x = digits.load("test")[0][:4]
    assert torch.allclose(f.given(label=asked[:4])(x, torch.tensor(recipe.SIGMA_MIN)), x, atol=1e-6)  # the boundary


def test_a_digit_does_not_depend_on_its_batch():
    f, asked = zoo.load("digits-consistency", device="cpu"), torch.arange(6)
    whole = recipe.draw(f, asked, recipe.levels(2), seed=57, step=recipe.consistency)
    part = recipe.draw(f, asked[:3], recipe.levels(2), seed=57, step=recipe.consistency)
    assert (whole[:3] - part).abs().max() < 0.05  # bf16 sums in another order, three digits


def test_other_steps_are_refused():
    with pytest.raises(ValueError, match="steps = 3; expected one of 64, 32, 16, 8, 4, 2, 1"):
        recipe.grid(3)
    with pytest.raises(ValueError, match="calls = 3; expected one of 1, 2, 4"):
        recipe.levels(3)
    for n in recipe.ROUNDS:
        assert torch.equal(recipe.grid(n), recipe.grid(2 * n)[::2])
