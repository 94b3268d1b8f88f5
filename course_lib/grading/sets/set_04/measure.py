"""Items 04.8 and 04.10: what guidance is not, in closed form, and what it gives and takes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.gaussians import Mixture
from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close, level
from course_lib.grading.sets.tools import T, named
from course_lib.guidance.free import cfg
from course_lib.guidance.tilted import tilted_gaussian

TILTED = ("tilted_gaussian", "Tilted.__init__", "Tilted.score", "Tilted.denoiser", "tilt_gap")


def _score(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The score of N(mean, variance)."""
    return (mean - x) / variance


def _guided(x: Tensor, sigma: Tensor, m_c, s_c, m_r, s_r, w: float) -> Tensor:
    """(1 - w) and w times the scores of the two noised Gaussians."""
    return (1 - w) * _score(x, m_r, s_r**2 + sigma**2) + w * _score(x, m_c, s_c**2 + sigma**2)


def _tilted(m_c, s_c, m_r, s_r, w: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of p_c^w p_r^(1 - w)."""
    precision = w / s_c**2 + (1 - w) / s_r**2
    return (w * m_c / s_c**2 + (1 - w) * m_r / s_r**2) / precision, 1 / precision


@item(
    "04.8", title="What guidance is not", function="two_scores", points=3, minutes=25, difficulty=3,
    answers=(
        *(f"course_lib.guidance.tilted.{name}" for name in TILTED), "course_lib.guidance.free.cfg", "course_lib.gaussians.Mixture.score",
    ),
    hints=(
        "A noised Gaussian is N(m, s^2 + sigma^2), and the score of N(m, v) is (m - x) / v. That is all you need, twice.",
        "First: noise both, then combine: (1 - w) times the one score and w times the other.",
        "Second: combine at sigma = 0, where log densities add: the precisions w / s_c^2 and (1 - w) / s_r^2 add up to 1 / s^2, and m / s^2 = w m_c / s_c^2 + (1 - w) m_r / s_r^2.",
        "Then noise the result: the score of N(m, s^2 + sigma^2), where s^2 is 1 over the summed precision.",
    ),
)  # fmt: skip
class TwoScores:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(sigma: float, same_width: bool = False) -> Case:
            s_r = float(rng.uniform(0.8, 1.4))
            s_c = s_r if same_width else s_r * float(rng.uniform(0.35, 0.7))
            m_c, m_r = (float(sign * rng.uniform(0.4, 1.2)) for sign in (1, -1))
            w = float(rng.uniform(1.6, 4))
            return {"x": rng.normal(size=5) * 2, "sigma": sigma, "m_c": m_c, "s_c": s_c, "m_r": m_r, "s_r": s_r, "w": w}

        return [case(float(rng.uniform(0.5, 0.8))), case(float(rng.uniform(1.3, 2.0))), case(0.7, True), case(0.0)]

    def drive(fn, case: Case) -> Outputs:
        numbers = [level(case[name]) for name in ("sigma", "m_c", "s_c", "m_r", "s_r")]
        return arrays(**named(call(fn, T(case["x"]), *numbers, case["w"]), "guided", "tilted"))

    def reference(
        x: Tensor, sigma: Tensor, m_c: Tensor, s_c: Tensor, m_r: Tensor, s_r: Tensor, w: float
    ) -> tuple[Tensor, Tensor]:
        cond, ref = (Mixture.gaussian(m[None], s[None, None] ** 2) for m, s in ((m_c, s_c), (m_r, s_r)))
        at = x[:, None]
        scores = cfg(cond.score, ref.score, w)(at, sigma), tilted_gaussian(cond, ref, w).score(at, sigma)
        return tuple(score[:, 0] for score in scores)

    @mistake(
        "both are the guided field: you noised the two densities, then combined them, twice; the tilted density is made first, at sigma = 0, and noised afterwards"
    )
    def taken_for_the_same(x, sigma, m_c, s_c, m_r, s_r, w):
        guided = _guided(x, sigma, m_c, s_c, m_r, s_r, w)
        return guided, guided.clone()

    @mistake(
        "both are the score of the noised tilted density; guidance never sees that one: it adds the scores of the two *noised* densities"
    )
    def both_tilted(x, sigma, m_c, s_c, m_r, s_r, w):
        m, v = _tilted(m_c, s_c, m_r, s_r, w)
        return _score(x, m, v + sigma**2), _score(x, m, v + sigma**2)

    @mistake(
        "the tilted density is not noised: its score is asked for at the level sigma, where its variance is larger by sigma^2"
    )
    def not_noised(x, sigma, m_c, s_c, m_r, s_r, w):
        return _guided(x, sigma, m_c, s_c, m_r, s_r, w), _score(x, *_tilted(m_c, s_c, m_r, s_r, w))

    @mistake("no noise anywhere: both scores are those of sigma = 0; each variance grows by sigma^2")
    def no_noise(x, sigma, m_c, s_c, m_r, s_r, w):
        score = _score(x, *_tilted(m_c, s_c, m_r, s_r, w))
        return score, score.clone()

    @mistake(
        "the variances of the tilted density are mixed, w s_c^2 + (1 - w) s_r^2; in a product of Gaussians the *precisions* add, 1 / s^2"
    )
    def variances_mixed(x, sigma, m_c, s_c, m_r, s_r, w):
        m, _ = _tilted(m_c, s_c, m_r, s_r, w)
        return _guided(x, sigma, m_c, s_c, m_r, s_r, w), _score(x, m, w * s_c**2 + (1 - w) * s_r**2 + sigma**2)

    @mistake(
        "the means of the tilted density are mixed with w and 1 - w; each mean has the weight of its precision: m_c w / s_c^2"
    )
    def means_mixed(x, sigma, m_c, s_c, m_r, s_r, w):
        _, v = _tilted(m_c, s_c, m_r, s_r, w)
        return _guided(x, sigma, m_c, s_c, m_r, s_r, w), _score(x, w * m_c + (1 - w) * m_r, v + sigma**2)

    @mistake(
        "means *and* variances of the tilted density are mixed with w and 1 - w; that is no product of densities: precisions add, and weigh the means"
    )
    def moments_mixed(x, sigma, m_c, s_c, m_r, s_r, w):
        score = _score(x, w * m_c + (1 - w) * m_r, w * s_c**2 + (1 - w) * s_r**2 + sigma**2)
        return _guided(x, sigma, m_c, s_c, m_r, s_r, w), score

    @mistake(
        "sigma^2 is added to the *precision* of the tilted density; noise adds to the variance: 1 over the precision, then + sigma^2"
    )
    def noise_on_the_precision(x, sigma, m_c, s_c, m_r, s_r, w):
        m, v = _tilted(m_c, s_c, m_r, s_r, w)
        return _guided(x, sigma, m_c, s_c, m_r, s_r, w), _score(x, m, 1 / (1 / v + sigma**2))

    @mistake(
        "the mean of the tilted density is not divided by the summed precision: w m_c / s_c^2 + (1 - w) m_r / s_r^2 is m / s^2"
    )
    def mean_not_divided(x, sigma, m_c, s_c, m_r, s_r, w):
        m, v = _tilted(m_c, s_c, m_r, s_r, w)
        return _guided(x, sigma, m_c, s_c, m_r, s_r, w), _score(x, m / v, v + sigma**2)

    @mistake("the standard deviations are taken for variances: s_c and s_r are to be squared")
    def not_squared(x, sigma, m_c, s_c, m_r, s_r, w):
        a, b = s_c.sqrt(), s_r.sqrt()
        m, v = _tilted(m_c, a, m_r, b, w)
        return _guided(x, sigma, m_c, a, m_r, b, w), _score(x, m, v + sigma**2)

    @mistake("s + sigma stands for the deviation of a noised Gaussian; variances add: s^2 + sigma^2")
    def deviations_added(x, sigma, m_c, s_c, m_r, s_r, w):
        m, v = _tilted(m_c, s_c, m_r, s_r, w)
        guided = (1 - w) * _score(x, m_r, (s_r + sigma) ** 2) + w * _score(x, m_c, (s_c + sigma) ** 2)
        return guided, _score(x, m, (v.sqrt() + sigma) ** 2)

    @mistake("both scores have the wrong sign: the score of N(m, v) points to its mean, (m - x) / v")
    def signs_turned(x, sigma, m_c, s_c, m_r, s_r, w):
        m, v = _tilted(m_c, s_c, m_r, s_r, w)
        return -_guided(x, sigma, m_c, s_c, m_r, s_r, w), -_score(x, m, v + sigma**2)

    @mistake("the scale is that of the paper, less by 1: the factors are w for the condition and 1 - w for the reference")
    def scale_of_the_paper(x, sigma, m_c, s_c, m_r, s_r, w):
        m, v = _tilted(m_c, s_c, m_r, s_r, 1 + w)
        return _guided(x, sigma, m_c, s_c, m_r, s_r, 1 + w), _score(x, m, v + sigma**2)

    @mistake("condition and reference have changed places in both: w belongs to the condition")
    def swapped(x, sigma, m_c, s_c, m_r, s_r, w):
        m, v = _tilted(m_c, s_c, m_r, s_r, 1 - w)
        return _guided(x, sigma, m_c, s_c, m_r, s_r, 1 - w), _score(x, m, v + sigma**2)

    @mistake("the pair is turned round: return the guided field first, then the score of the noised tilted density")
    def pair_turned(x, sigma, m_c, s_c, m_r, s_r, w):
        m, v = _tilted(m_c, s_c, m_r, s_r, w)
        return _score(x, m, v + sigma**2), _guided(x, sigma, m_c, s_c, m_r, s_r, w)

    @law("at sigma = 0 both must be the same: without noise there is nothing that could fail to commute")
    def same_without_noise(case: Case, out: Outputs) -> bool:
        return case["sigma"] > 0 or close(out["guided"], out["tilted"])

    @law("where both Gaussians are equally wide, both fields must be the same: noise then widens all by the same factor")
    def same_for_equal_widths(case: Case, out: Outputs) -> bool:
        return case["s_c"] != case["s_r"] or close(out["guided"], out["tilted"])

    @law("both fields must be straight lines in x: all densities here are Gaussian")
    def straight(case: Case, out: Outputs) -> bool:
        return all(close(np.polyval(np.polyfit(case["x"], out[name], 1), case["x"]), out[name]) for name in ("guided", "tilted"))

    @law("the guided field is not (1 - w) times the score of the noised reference plus w times that of the noised condition")
    def adds_the_noised(case: Case, out: Outputs) -> bool:
        return close(out["guided"], _by_hand(case, case["sigma"]))

    @law("the zero of the second score is the mean of the tilted density, and stays where it is at sigma = 0")
    def keeps_its_mean(case: Case, out: Outputs) -> bool:
        slope, offset = np.polyfit(case["x"], _by_hand(case, 0.0), 1)
        return close(np.polyval(np.polyfit(case["x"], out["tilted"], 1), -offset / slope), 0)

    @law("the slope of the second score is -1 over the variance: that of the tilted density at sigma = 0, plus sigma^2")
    def widens(case: Case, out: Outputs) -> bool:
        clean, noised = (np.polyfit(case["x"], y, 1)[0] for y in (_by_hand(case, 0.0), out["tilted"]))
        return close(-1 / noised, -1 / clean + case["sigma"] ** 2)


def _by_hand(case: Case, sigma: float) -> np.ndarray:
    """The guided field at a level; at 0 it is the score of the tilted density."""
    parts = ((1 - case["w"], case["m_r"], case["s_r"]), (case["w"], case["m_c"], case["s_c"]))
    return sum(share * (m - case["x"]) / (s**2 + sigma**2) for share, m, s in parts)


# --- 04.10 ---------------------------------------------------------------------------------------------


def _pairs(features: Tensor) -> Tensor:
    """Distances of all pairs of two different samples, (n (n - 1) / 2,)."""
    i, j = torch.triu_indices(len(features), len(features), 1)
    return (features[i] - features[j]).norm(dim=1)


def _by_class(features: Tensor, label: Tensor, of=lambda rows: _pairs(rows).mean()) -> Tensor:
    """The mean of `of` over the classes."""
    return torch.stack([of(features[label == c]) for c in label.unique()]).mean()


def _share(logits: Tensor, label: Tensor) -> Tensor:
    return (logits.argmax(1) == label).double().mean()


@item(
    "04.10", title="What it gives and what it takes", function="adherence_and_diversity", points=2, minutes=15, difficulty=2,
    hints=(
        "Adherence: logits.argmax(1) is what the classifier sees in each sample. How often is that the label?",
        "Diversity, for one class: the samples that were asked for it, features[label == c], and the distance of each pair of two *different* ones; torch.pdist gives these.",
        "Then the mean of the pairs of a class, and of that the mean over the classes that occur, label.unique(): a large class counts no more than a small one.",
    ),
)  # fmt: skip
class AdherenceAndDiversity:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(sizes: tuple[int, ...], d: int) -> Case:
            label = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
            n = len(label)
            logits = rng.normal(size=(n, len(sizes) + 1))
            logits[np.arange(n), label] += rng.choice([3.0, -3.0], n, p=[0.7, 0.3])
            wide = rng.uniform(0.3, 2.0, len(sizes))
            features = rng.normal(size=(len(sizes), d))[label] * 2 + wide[label, None] * rng.normal(size=(n, d))
            return {"logits": logits, "label": label, "features": features}

        return [case((3, 6, 4), 2), case((2, 5, 7, 4), 5)]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, T(case["logits"]), T(case["label"]), T(case["features"]))
        return arrays(**named(result, "adherence", "diversity"))

    def reference(logits: Tensor, label: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        within = [torch.pdist(features[label == c]).mean() for c in label.unique()]
        return (logits.argmax(1) == label).double().mean(), torch.stack(within).mean()

    @mistake(
        "adherence is the mean *probability* of the label; the share of samples that the classifier reads as their label is asked for: argmax"
    )
    def mean_probability(logits, label, features):
        return logits.softmax(1).gather(1, label[:, None]).mean(), _by_class(features, label)

    @mistake("adherence is a number of samples; divide by how many there are")
    def counted(logits, label, features):
        return _share(logits, label) * len(label), _by_class(features, label)

    @mistake("adherence is the share that the classifier reads as *another* class; it is 1 less that")
    def error_rate(logits, label, features):
        return 1 - _share(logits, label), _by_class(features, label)

    @mistake("the argmax runs over the samples (dim 0), not over the classes of each, dim 1")
    def argmax_over_samples(logits, label, features):
        best = logits.argmax(0)
        return (label[best] == torch.arange(logits.shape[1])).double().mean(), _by_class(features, label)

    @mistake(
        "the diversity has every sample paired with itself, at distance 0: the mean is too small, most of all in small classes"
    )
    def paired_with_itself(logits, label, features):
        of = lambda rows: (rows[:, None] - rows).norm(dim=2).mean()
        return _share(logits, label), _by_class(features, label, of)

    @mistake("the diversity is taken over all samples at once: distances *between* the classes then hide that each has collapsed")
    def over_all(logits, label, features):
        return _share(logits, label), _pairs(features).mean()

    @mistake(
        "the samples are sorted by what the classifier *sees*; sort by what they were asked for, label, or outliers go to other classes"
    )
    def by_the_reading(logits, label, features):
        seen = logits.argmax(1)
        of = lambda rows: _pairs(rows).mean() if len(rows) > 1 else rows.new_zeros(())
        return _share(logits, label), _by_class(features, seen, of)

    @mistake(
        "only samples of the right class count for the diversity; a measure that leaves out what went wrong rises when more goes wrong"
    )
    def only_the_right_ones(logits, label, features):
        right = logits.argmax(1) == label
        of = lambda rows: _pairs(rows).mean() if len(rows) > 1 else rows.new_zeros(())
        return _share(logits, label), _by_class(features[right], label[right], of)

    @mistake(
        "all pairs of all classes are averaged at once: a class of twice the size counts four times; first the mean of each class, then of those"
    )
    def pairs_pooled(logits, label, features):
        return _share(logits, label), torch.cat([_pairs(features[label == c]) for c in label.unique()]).mean()

    @mistake("the diversity is the mean *squared* distance; take the distance itself")
    def squared(logits, label, features):
        return _share(logits, label), _by_class(features, label, lambda rows: _pairs(rows).square().mean())

    @mistake("the diversity is the distance to the mean of the class; it is that of two samples from one another")
    def to_the_centre(logits, label, features):
        return _share(logits, label), _by_class(features, label, lambda rows: (rows - rows.mean(0)).norm(dim=1).mean())

    @mistake("the classes' diversities are added; take their mean")
    def classes_added(logits, label, features):
        return _share(logits, label), _by_class(features, label) * len(label.unique())

    @mistake("the pair is turned round: return the adherence first, then the diversity")
    def pair_turned(logits, label, features):
        return _by_class(features, label), _share(logits, label)

    @law("adherence is a share, from 0 to 1")
    def is_a_share(case: Case, out: Outputs) -> bool:
        return 0 <= out["adherence"] <= 1

    @law("adherence must be the number of samples whose largest logit is that of their label, over the number of all")
    def right_ones(case: Case, out: Outputs) -> bool:
        return close(out["adherence"], np.mean(case["logits"].argmax(1) == case["label"]))

    @law("adherence is right; the diversity lies outside of what single pairs of one class are apart")
    def within_the_pairs(case: Case, out: Outputs) -> bool:
        return _distances(case).min() <= out["diversity"] <= _distances(case).max()

    @law(
        "adherence is right; the diversity is not the mean, over the classes, of the mean distance of two different samples of a class"
    )
    def mean_of_means(case: Case, out: Outputs) -> bool:
        means = [_distances(case, c).mean() for c in np.unique(case["label"])]
        return close(out["diversity"], np.mean(means))


def _distances(case: Case, of: int | None = None) -> np.ndarray:
    """Distances of different samples of one class, of all classes where none is named."""
    found = []
    for c in np.unique(case["label"]) if of is None else [of]:
        rows = case["features"][case["label"] == c]
        found += [float(np.linalg.norm(a - b)) for i, a in enumerate(rows) for b in rows[:i]]
    return np.array(found)
