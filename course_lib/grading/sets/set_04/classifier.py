"""Items 04.1 and 04.2: Bayes' rule for scores, and the gradient of a classifier."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import NULL, Labelled, classes, close, factors, level, levels, noised
from course_lib.grading.sets.tools import T, named


def _bayes_case(rng: np.random.Generator, shape: tuple[int, ...]) -> Case:
    sigma = float(rng.uniform(0.4, 0.8) if rng.uniform() < 0.5 else rng.uniform(1.4, 2.5))  # sigma = 1 would hide its power
    return {"x": noised(rng, shape, sigma), "sigma": sigma, "x0": rng.normal(size=shape), "g": rng.normal(size=shape)}


@item(
    "04.1", title="Bayes' rule for scores", function="bayes", points=1, minutes=10, difficulty=1,
    answers=("course_lib.guidance.classifiers.classifier_guidance",),
    hints=(
        "Take the gradient in x of log p(x | c) = log p(x) + log p(c | x) - log p(c). Which term does not depend on x?",
        "The score without a condition is (x0_hat - x) / sigma^2, by Tweedie's formula; add g.",
        "Tweedie's formula once more, the other way: x0_c = x + sigma^2 score_c. Put the sum in, and see what is left of x.",
    ),
)  # fmt: skip
class Bayes:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [_bayes_case(rng, (3, 2)), _bayes_case(rng, (2, 1, 3, 3))]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, T(case["x"]), level(case["sigma"]), T(case["x0"]), T(case["g"]))
        return arrays(**named(result, "score", "x0_c"))

    def reference(x: Tensor, sigma: Tensor, x0_hat: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return (x0_hat - x) / sigma**2 + g, x0_hat + sigma**2 * g

    @mistake("g is subtracted; x is to move where the classifier sees the class *more*, so its gradient is added")
    def sign_of_g(x, sigma, x0_hat, g):
        return (x0_hat - x) / sigma**2 - g, x0_hat - sigma**2 * g

    @mistake("the score is right; in the estimate g has the factor sigma, and Tweedie's formula has sigma^2")
    def sigma_for_its_square(x, sigma, x0_hat, g):
        return (x0_hat - x) / sigma**2 + g, x0_hat + sigma * g

    @mistake("the score is right; in the estimate g stands without a factor: a score becomes a distance in x0 by sigma^2")
    def no_factor(x, sigma, x0_hat, g):
        return (x0_hat - x) / sigma**2 + g, x0_hat + g

    @mistake("the score is right; in the estimate g is divided by sigma^2: x0 = x + sigma^2 score multiplies")
    def divided(x, sigma, x0_hat, g):
        return (x0_hat - x) / sigma**2 + g, x0_hat + g / sigma**2

    @mistake(
        "the estimate is x0_hat - sigma g: that is the rule for the *noise*, eps - sigma g (Dhariwal and Nichol 2021, Algorithm 2), and you have x0"
    )
    def rule_of_the_noise(x, sigma, x0_hat, g):
        return (x0_hat - x) / sigma**2 + g, x0_hat - sigma * g

    @mistake("the score has the wrong sign before the classifier comes in: it points from x to x0_hat, (x0_hat - x) / sigma^2")
    def score_turned(x, sigma, x0_hat, g):
        return (x - x0_hat) / sigma**2 + g, x0_hat + sigma**2 * g

    @mistake("x0_hat - x is divided by sigma: that is the noise with its sign turned; the score is divided by sigma^2")
    def score_over_sigma(x, sigma, x0_hat, g):
        return (x0_hat - x) / sigma + g, x0_hat + sigma**2 * g

    @mistake("x0_hat - x is not divided at all; the score is that over sigma^2")
    def score_not_divided(x, sigma, x0_hat, g):
        return x0_hat - x + g, x0_hat + sigma**2 * g

    @mistake("x0_hat is taken for the score; it is an estimate of the clean sample, and the score is (x0_hat - x) / sigma^2")
    def estimate_for_score(x, sigma, x0_hat, g):
        score = x0_hat + g
        return score, x + sigma**2 * score

    @mistake("the score is that of the classifier alone; Bayes' rule *adds* it to the score without a condition")
    def classifier_alone(x, sigma, x0_hat, g):
        return g, x + sigma**2 * g

    @mistake("x0_hat is counted twice: the conditional score already has it inside; go from x, not from x0_hat")
    def from_the_estimate(x, sigma, x0_hat, g):
        score = (x0_hat - x) / sigma**2 + g
        return score, x0_hat + sigma**2 * score

    @mistake("the score is multiplied by g: probabilities multiply, and their logarithms add")
    def multiplied(x, sigma, x0_hat, g):
        score = (x0_hat - x) / sigma**2 * g
        return score, x + sigma**2 * score

    @mistake("the pair is turned round: return the score first, then the estimate")
    def pair_turned(x, sigma, x0_hat, g):
        return x0_hat + sigma**2 * g, (x0_hat - x) / sigma**2 + g

    @law("the score is not a weighted sum of x0_hat - x and g")
    def sum_of_two(case: Case, out: Outputs) -> bool:
        return factors(out["score"], case["x0"] - case["x"], case["g"]) is not None

    @law("the factor of g in the score must be 1: log p(x | c) is log p(x) + log p(c | x) and a constant")
    def factor_of_g(case: Case, out: Outputs) -> bool:
        return close(factors(out["score"], case["x0"] - case["x"], case["g"])[1], 1)

    @law("without the classifier the score must be Tweedie's, (x0_hat - x) / sigma^2")
    def tweedie(case: Case, out: Outputs) -> bool:
        return close(out["score"] - case["g"], (case["x0"] - case["x"]) / case["sigma"] ** 2)

    @law("score and estimate do not belong together: Tweedie's formula holds for the conditional pair too")
    def consistent(case: Case, out: Outputs) -> bool:
        return close(out["x0_c"], case["x"] + case["sigma"] ** 2 * out["score"])


# --- 04.2 ----------------------------------------------------------------------------------------------


class _Reader:
    """Logits (B, classes) of a small network of x and sigma, in which no two samples meet."""

    def __init__(self, case: Case) -> None:
        self.A, self.b, self.out = T(case["A"]), T(case["b"]), T(case["out"])

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        s = levels(sigma, x).reshape(len(x), 1)
        return torch.tanh(x.flatten(1) @ self.A + self.b * s) @ self.out


def _leaf(x: Tensor) -> Tensor:
    """x as a leaf of its own graph."""
    return x.detach().clone().requires_grad_()


def _slope(classifier, x: Tensor, sigma: Tensor, label: Tensor, of=None, asked=None) -> Tensor:
    """grad_x of the sum of of(log p(label | x)), where nothing else is said; `asked(x)` is what the classifier sees."""
    with torch.enable_grad():
        at = _leaf(x)
        logits = classifier(at if asked is None else asked(at), sigma)
        chosen = (torch.log_softmax(logits, 1) if of is None else of(logits)).gather(1, label[:, None])
        return torch.autograd.grad(chosen.sum(), at)[0]


def _guided(D, x: Tensor, sigma: Tensor, w: float, g: Tensor) -> tuple[Tensor, Tensor]:
    return g, D(x, sigma) + w * sigma**2 * g


@item(
    "04.2", title="The gradient of a classifier", function="classifier_guided", points=2, minutes=20, difficulty=2,
    answers=("course_lib.guidance.classifiers.classifier_guidance", "course_lib.guidance.classifiers._slope"),
    hints=(
        "log p(label | x) of one sample: torch.log_softmax(logits, 1), in row b the column label[b]; gather, or index by [torch.arange(B), label].",
        "autograd wants one number: the *sum* over the samples. No sample sees another, so row b of the gradient is that of sample b.",
        "The sampler runs under no_grad: open `with torch.enable_grad():`, take x.detach().requires_grad_() as the leaf, and torch.autograd.grad(total, leaf)[0].",
        "Ask D about x itself, outside of that block, so that no graph hangs on the result: D + w sigma^2 g, the rule of 04.1 with g multiplied by w.",
    ),
)  # fmt: skip
class ClassifierGuided:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], grad: bool) -> Case:
            d, sigma = int(np.prod(shape[1:])), float(rng.uniform(0.5, 0.8) if grad else rng.uniform(1.3, 2.0))
            return {
                "x": noised(rng, shape, sigma),
                "sigma": sigma,
                "label": classes(rng, shape[0]),
                "w": float(rng.uniform(1.6, 3.0)),
                "grad": grad,
                "A": rng.normal(size=(d, 6)) / d**0.5,
                "b": rng.normal(size=6),
                "out": rng.normal(size=(6, NULL)),
            }

        return [case((4, 2), True), case((3, 1, 2, 2), False)]

    def drive(fn, case: Case) -> Outputs:
        D = Labelled().given(NULL)
        seen = []

        @functools.wraps(fn)
        def watched(*given):
            seen.append(given[2])
            return fn(*given)

        given = D, _Reader(case), T(case["x"]), level(case["sigma"]), T(case["label"]), case["w"]
        try:
            with torch.set_grad_enabled(case["grad"]):
                result = call(watched, *given)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise Unacceptable(
                "autograd finds no graph: nothing that was computed is marked, or it was computed under the sampler's no_grad; "
                "open gradients for the classifier yourself"
            ) from None
        pair = named(result, "gradient", "guided")
        graph = [float(isinstance(one, Tensor) and one.requires_grad) for one in pair.values()]
        return arrays(**pair, graph=np.array(graph), marked=float(seen[0].requires_grad))

    def reference(D, classifier, x: Tensor, sigma: Tensor, label: Tensor, w: float) -> tuple[Tensor, Tensor]:
        return _guided(D, x, sigma, w, _slope(classifier, x, sigma, label))

    @mistake(
        "the mean over the batch is differentiated: every row is B times too small, and guidance depends on the batch; take the sum"
    )
    def mean_over_the_batch(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, w, _slope(classifier, x, sigma, label) / len(x))

    @mistake(
        "the gradient is that of cross_entropy, a loss to be made *small*: it points away from the class, and its default is the mean over the batch"
    )
    def of_the_loss(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, w, -_slope(classifier, x, sigma, label) / len(x))

    @mistake("the gradient points away from the class: log p is to grow, while the cross entropy is -log p")
    def downhill(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, w, -_slope(classifier, x, sigma, label))

    @mistake("the gradient is right, but it is subtracted from D; it is added, as in 04.1")
    def subtracted(D, classifier, x, sigma, label, w):
        g = _slope(classifier, x, sigma, label)
        return g, D(x, sigma) - w * sigma**2 * g

    @mistake("this is the gradient of the *logit*; a logit is no log-probability until the others are taken off: log_softmax")
    def of_the_logit(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, w, _slope(classifier, x, sigma, label, lambda logits: logits))

    @mistake("this is the gradient of the probability; the logarithm is missing, and where p is small, guidance is weakest")
    def of_the_probability(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, w, _slope(classifier, x, sigma, label, lambda logits: logits.softmax(1)))

    @mistake("the softmax runs over the *samples* (dim 0); it runs over the classes, dim 1, each sample by itself")
    def over_the_samples(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, w, _slope(classifier, x, sigma, label, lambda logits: logits.log_softmax(0)))

    @mistake("every sample is led to the class of the first; sample b has its own, label[b]")
    def label_of_the_first(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, w, _slope(classifier, x, sigma, label[:1].expand(len(label))))

    @mistake(
        "log_p[:, label] takes all columns that the batch names, in every row, so that samples are led to one another's classes; take one column a row"
    )
    def all_columns(D, classifier, x, sigma, label, w):
        g = sum(_slope(classifier, x, sigma, one.expand(len(label))) for one in label)
        return _guided(D, x, sigma, w, g)

    @mistake("each sample is led to the class that the classifier finds likeliest anyway; you were asked for `label`")
    def likeliest(D, classifier, x, sigma, label, w):
        with torch.no_grad():
            found = classifier(x, sigma).argmax(1)
        return _guided(D, x, sigma, w, _slope(classifier, x, sigma, found))

    @mistake("the classifier is asked as if x were clean, at sigma = 0; it was trained on noisy pictures and wants their level")
    def blind_to_noise(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, w, _slope(classifier, x, torch.zeros_like(sigma), label))

    @mistake(
        "the classifier is asked about D(x), and the gradient goes through D: that is guidance by a reader of *clean* pictures; this classifier wants x"
    )
    def through_D(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, w, _slope(classifier, x, sigma, label, asked=lambda at: D(at, sigma)))

    @mistake("the gradient is taken at D(x, sigma), in place of x; the rule needs it where the sample is now")
    def at_the_estimate(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, w, _slope(classifier, D(x, sigma), sigma, label))

    @mistake(
        "the gradient is scaled to length 1 for each sample; its length says how sure the classifier is, and goes to 0 when it is"
    )
    def normalised(D, classifier, x, sigma, label, w):
        g = _slope(classifier, x, sigma, label)
        return _guided(D, x, sigma, w, g / g.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1)))

    @mistake("the scale w is left out of the guided estimate")
    def scale_forgotten(D, classifier, x, sigma, label, w):
        return _guided(D, x, sigma, 1.0, _slope(classifier, x, sigma, label))

    @mistake("w is in the returned gradient already; return the gradient itself, and D + w sigma^2 times it")
    def scaled_gradient(D, classifier, x, sigma, label, w):
        g = w * _slope(classifier, x, sigma, label)
        return g, D(x, sigma) + sigma**2 * g

    @mistake("the gradient is right; in the estimate it has the factor w without sigma^2 (see 04.1)")
    def no_sigma(D, classifier, x, sigma, label, w):
        g = _slope(classifier, x, sigma, label)
        return g, D(x, sigma) + w * g

    @mistake(
        "the gradient is right; in the estimate it has the factor w sigma, and a change of score becomes one of x0 by sigma^2"
    )
    def sigma_for_its_square(D, classifier, x, sigma, label, w):
        g = _slope(classifier, x, sigma, label)
        return g, D(x, sigma) + w * sigma * g

    @mistake(
        "the numbers are right, but a graph hangs on both results (create_graph, or no detach): over a whole run it grows until memory is full"
    )
    def graph_kept(D, classifier, x, sigma, label, w):
        g, guided = _guided(D, x, sigma, w, _slope(classifier, x, sigma, label))
        with torch.enable_grad():
            tie = 0 * _leaf(x)
            return g + tie, guided + tie

    @mistake(
        "the numbers are right, but D was asked about the leaf, with gradients on: its graph hangs on the guided estimate; ask D about x, outside of enable_grad"
    )
    def D_on_the_graph(D, classifier, x, sigma, label, w):
        return _guided(D, _leaf(x), sigma, w, _slope(classifier, x, sigma, label))

    @mistake(
        "the numbers are right, but x.requires_grad_() marks the *caller's* x, and all that the sampler does with it from now on is recorded; mark a detached copy"
    )
    def callers_x_marked(D, classifier, x, sigma, label, w):
        return _guided(D, x.requires_grad_(), sigma, w, _slope(classifier, x, sigma, label))

    @law(
        "the gradient is not that of log p(label | x): nudge one number of x, and the log-probability of the sample's own class changes by another amount"
    )
    def finite_difference(case: Case, out: Outputs) -> bool:
        return bool(np.allclose(out["gradient"], _by_differences(case), rtol=1e-5, atol=1e-7))

    @law("the gradient is right, but the guided estimate is not D plus a multiple of it")
    def along_the_gradient(case: Case, out: Outputs) -> bool:
        return factors(out["guided"] - _unguided(case), out["gradient"]) is not None

    @law("the gradient is right, but its factor in the guided estimate is not that of 04.1 times w")
    def factor_of_the_gradient(case: Case, out: Outputs) -> bool:
        return close(factors(out["guided"] - _unguided(case), out["gradient"])[0], case["w"] * case["sigma"] ** 2)

    @law("a graph hangs on what comes back, or on x itself: mark a detached copy of x, and ask D outside of enable_grad")
    def detached(case: Case, out: Outputs) -> bool:
        return not out["graph"].any() and not out["marked"]


def _unguided(case: Case) -> np.ndarray:
    return Labelled()(T(case["x"]), case["sigma"], NULL).numpy()


def _by_differences(case: Case, h: float = 1e-5) -> np.ndarray:
    """The gradient of log p(label | x) by central differences, which meet neither autograd nor log_softmax."""
    x, reader, rows = T(case["x"]), _Reader(case), torch.arange(len(case["x"]))

    def log_p(at: Tensor) -> Tensor:
        logits = reader(at, case["sigma"])
        return logits[rows, T(case["label"])] - logits.exp().sum(1).log()

    out = torch.empty_like(x).flatten(1)
    for i in range(out.shape[1]):
        nudge = torch.zeros_like(out)
        nudge[:, i] = h
        nudge = nudge.reshape(x.shape)
        out[:, i] = (log_p(x + nudge) - log_p(x - nudge)) / (2 * h)
    return out.reshape(x.shape).numpy()
