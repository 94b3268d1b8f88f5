"""Guidance on the embedded models: the classifier of noisy digits, and what is stored about adherence, diversity and negation."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from course_lib import bench, bench_guidance, zoo
from course_lib.denoisers import from_edm
from course_lib.devices import SampleNoise
from course_lib.guidance import classifier_guidance, noise_blind
from course_lib.sample import sample
from course_lib.worlds import digits
from course_lib.worlds.scenes.captions import parse
from course_lib.worlds.scenes.labels import OF_SCENE
from course_lib.zoo import judge_guidance
from course_lib.zoo.recipes import digits as recipe
from course_lib.zoo.recipes.digits_classifier import reading
from tests.draws import normal

# --- the classifier ---------------------------------------------------------------------------------------------------


def test_the_card_of_the_classifier_is_what_it_does():
    card = zoo.card("digits-classifier")["metrics"]
    for sigma in (0.1, 0.8, 3.2):
        accuracy, nats = reading(zoo.load("digits-classifier", device="cpu"), "test", sigma)
        k = card["sigmas"].index(sigma)
        assert abs(accuracy - card["aware"]["accuracy_held_out"][k]) < 0.003  # half weights: a digit at the border may turn
        assert abs(nats - card["aware"]["nats_held_out"][k]) < 0.01


def test_the_classifier_knows_noise_and_the_reader_of_clean_digits_does_not():
    card = zoo.card("digits-classifier")["metrics"]
    aware, blind = card["aware"], card["blind"]
    at = card["sigmas"].index
    assert aware["accuracy_held_out"][at(0.1)] > 0.95
    assert aware["accuracy_held_out"][at(0.8)] > blind["accuracy_held_out"][at(0.8)] + 0.2
    assert aware["nats_held_out"][at(6.4)] < card["nats_of_a_guess"] + 0.02 < 2.4 < blind["nats_held_out"][at(6.4)]
    assert aware["gradient_cosine"][at(0.8)] > blind["gradient_cosine"][at(0.8)] + 0.2


@pytest.mark.slow
def test_the_classifier_makes_an_unconditional_model_obey():
    """40 digits in 12 steps, judged by a reader that did not guide: 40 right by chance in ten are not to be mistaken for it."""
    D, label = zoo.load("digits", device="cpu"), torch.arange(40) % 10
    sigmas = recipe.grid(12)
    x = SampleNoise(5).start((40, *digits.SHAPE), sigmas[0])
    judge, aware = zoo.load("digits-reader-2", device="cpu"), zoo.load("digits-classifier", device="cpu")
    blind = noise_blind(zoo.load("digits-reader", device="cpu"))
    obeyed = {
        name: float((judge(sample(guided, x, sigmas).clamp(-1, 1)).argmax(1) == label).float().mean())
        for name, guided in (
            ("none", D),
            ("aware", classifier_guidance(D, aware, label, 4.0)),
            ("blind", classifier_guidance(D, blind, label, 4.0)),
        )
    }
    assert obeyed["none"] < 0.4 < 0.85 <= obeyed["aware"]
    assert obeyed["aware"] > obeyed["blind"]


# --- what is measured, on sets whose answer is known ------------------------------------------------------------------


def test_spread_is_the_mean_distance_within_groups():
    features = torch.tensor([[0.0], [2.0], [10.0], [10.0], [16.0]])
    groups = torch.tensor([0, 0, 1, 1, 1])
    assert judge_guidance.spread(features, groups) == pytest.approx((2 + 4) / 2)  # 2; and (0 + 6 + 6) / 3
    many = normal(4000, 3)
    assert judge_guidance.spread(many, torch.zeros(4000)) == pytest.approx(4 / torch.pi**0.5, rel=0.03)  # sqrt(2) E chi_3


def test_clipped_counts_pixels_well_beyond_the_range():
    assert judge_guidance.clipped(torch.tensor([[-1.05, 0.0], [1.2, -3.0]])) == 0.5


def test_open_prompts_name_an_object_and_nothing_of_its_scene():
    prompts = judge_guidance.open_prompts(20, 9_300)
    for said in map(parse, prompts):
        (thing,) = said.objects
        assert set(thing) == {"shape", "colour", "size"} and said.ground is None and said.light is None
    assert len(set(prompts)) > 10
    for attribute, value, phrase in judge_guidance.NEGATED:
        assert getattr(parse(f"{prompts[0]} {phrase}"), attribute) == value


def test_a_negative_prompt_is_counted_beside_the_empty_one():
    """A world that draws grass, and with any negative prompt something else: what is read is then known."""

    class Reader:
        def read(self, pictures):
            ground = torch.where(pictures[:, 0] > 0, OF_SCENE["ground"].index("grass"), -1)
            return SimpleNamespace(ground=ground, light=ground)

        def obeys(self, pictures, wanted):
            return {"all": torch.ones(len(wanted))}

    class World:
        reader = Reader()

        def draw(self, method, w, prompts, seed, negative=None):
            return torch.full((len(prompts), 1), 1.0 if negative is None else -1.0)

    first, *_, last = judge_guidance.measure_negative(World(), 3.0, 8)
    assert (first["read_without"], first["read_with"], first["ratio"], first["form"]) == (8, 0, 0.0, "phrase")
    assert last["form"] == "whole" and last["phrase"] == first["phrase"]


def test_the_frechet_distance_at_an_adherence_lies_between_its_rows(monkeypatch):
    stored = {"digits": {"cfg": [{"w": w, "adherence": [a, 0], "frechet": [f, 0]} for w, a, f in ((2, 0.9, 3.0), (1, 0.8, 1.0))]}}
    monkeypatch.setattr(judge_guidance, "read", lambda: stored)
    assert [row["w"] for row in judge_guidance.rows("digits", "cfg")] == [1, 2]
    assert judge_guidance.frechet_at("digits", "cfg", 0.85) == pytest.approx(2.0)  # half way from (0.8, 1) to (0.9, 3)
    assert judge_guidance.frechet_at("digits", "cfg", 0.95) != judge_guidance.frechet_at("digits", "cfg", 0.95)  # nan
    with pytest.raises(ValueError, match="'apg' on 'digits' is not in guidance.json; expected one of cfg"):
        judge_guidance.rows("digits", "apg")


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cfg", "classifier"])
def test_on_digits_adherence_rises_to_99_percent_and_diversity_falls(method):
    """From w = 1 on. A fall within the error bars is no rise beyond three standard errors of the difference."""
    rows = [row for row in judge_guidance.rows("digits", method) if row["w"] >= 1]
    adherence = [row["adherence"][0] for row in rows]
    assert max(adherence) >= 0.99 and max(adherence) > adherence[0]
    for a, b in pairwise(rows):
        (before, s), (after, t) = a["diversity"], b["diversity"]
        assert after - before <= 3 * (s**2 + t**2) ** 0.5
    assert rows[-1]["diversity"][0] < rows[0]["diversity"][0] - 3 * (rows[0]["diversity"][1] + rows[-1]["diversity"][1])


def test_a_reader_of_clean_pictures_guides_and_less_than_a_classifier_that_knows_the_noise():
    reader, classifier = (
        {row["w"]: row["adherence"] for row in judge_guidance.rows("digits", of)} for of in ("reader", "classifier")
    )
    for a, b in pairwise(sorted(reader)):
        assert reader[b][0] > reader[a][0] + 3 * (reader[a][1] ** 2 + reader[b][1] ** 2) ** 0.5
    for w, (adherence, error) in reader.items():
        assert classifier[w][0] > adherence + 3 * (error**2 + classifier[w][1] ** 2) ** 0.5


@pytest.mark.parametrize("world", ["digits", "mini-sd"])
def test_self_attention_guidance_is_no_better_than_the_page_says(world):
    """The distance grows with w, by more than three standard errors from the first scale to the last."""
    first, *_, last = judge_guidance.rows(world, "sag")
    assert last["frechet"][0] > first["frechet"][0] + 3 * (first["frechet"][1] ** 2 + last["frechet"][1] ** 2) ** 0.5


def test_a_negative_prompt_leaves_at_most_a_tenth():
    rows = judge_guidance.negative()
    assert len([row for row in rows if row["form"] == "phrase"]) >= 2
    for row in rows:
        if row["form"] == "whole":
            continue  # the form that loses the object: no recommendation
        assert row["samples"] >= 1000 and row["read_without"] >= 0.05 * row["samples"]
        assert row["read_with"] <= row["read_without"] / 10
        without, with_ = row["object_obeyed_without_and_with"]
        assert with_ > without - 0.1  # and the object is still the one that was asked for


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_benchmark_times_one_call_beside_two(monkeypatch):
    calls = []

    def net(x, time, label):
        calls.append(len(x))
        return x + label[:, None]

    D, x = from_edm(net), normal(3, 2)
    pair = D.given(label=torch.ones(3)), D.given(label=torch.zeros(3))
    monkeypatch.setattr(bench_guidance, "pairs", lambda: iter([("some, batch 3", *pair, x)]))
    (name, together, apart), n = next(bench_guidance.runs()), bench_guidance.CALLS
    together()
    assert calls == [6] * n
    calls.clear()
    apart()
    assert calls == [3] * (2 * n) and name == "some, batch 3"
    (row,) = bench.bench_guidance(rounds=2)
    assert row["name"] == "CFG in one call, some, batch 3" and row["other"] == "two calls in turn" and row["limit"] == 0.9
    assert row["ours_s"] > 0 and row["other_s"] > 0
