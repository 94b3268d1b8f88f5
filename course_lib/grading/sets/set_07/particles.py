"""Items 07.7 and 07.8: the weight of a particle that was drawn by a guided step, and systematic resampling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.set_07.common import NOT_FINITE, all_finite, with_gaps
from course_lib.grading.sets.tools import T, named


def _log_normal(x: Tensor, mean: Tensor, variance: float) -> Tensor:
    """log N(x; mean, variance I) of each row, up to a number that is the same for all."""
    return -((x - mean) ** 2).sum(-1) / (2 * variance)


def _step_ratio(x_next: Tensor, mean: Tensor, guided: Tensor, std: float) -> Tensor:
    """log of what the prior's step gives to x' over what the guided step gave."""
    return _log_normal(x_next, mean, std**2) - _log_normal(x_next, guided, std**2)


def _size(W: Tensor) -> Tensor:
    """1 / sum W^2."""
    return 1 / (W**2).sum()


def _weighed(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised weights, and their effective sample size."""
    W = torch.softmax(logs, 0)
    return W, _size(W)


@item(
    "07.7", title="The weight of a particle", function="particle_weights", points=2, minutes=25, difficulty=2,
    answers=("course_lib.posterior.particles.tds", "course_lib.posterior.particles.mcgdiff", "course_lib.posterior.particles.effective_sample_size"),
    hints=(
        "x' was drawn from the guided step, and should count as if drawn from the prior's: its weight has p(x' | x) / q(x' | x). Both are Gaussians with the same std, so log p - log q = (|x' - guided|² - |x' - mean|²) / (2 std²).",
        "The guess of the likelihood is exchanged: the new one comes in, the old one, which earlier weights have, goes out. log_w + log p - log q + log_y_next - log_y.",
        "torch.softmax of these logarithms over the particles: weights that sum to 1, however small their densities. Effective sample size: 1 / sum of W².",
    ),
)  # fmt: skip
class ParticleWeights:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(N: int, d: int, offset: float) -> Case:
            mean, std = rng.normal(size=(N, d)), float(rng.uniform(0.4, 0.7))
            guided = mean + 0.4 * rng.normal(size=(N, d))
            return {"log_w": rng.normal(size=N) + offset, "x_next": guided + std * rng.normal(size=(N, d)), "mean": mean,
                    "guided": guided, "std": std, "log_y": rng.normal(size=N), "log_y_next": rng.normal(size=N)}  # fmt: skip

        return [case(6, 3, 0.5), case(5, 2, -2000.0)]  # the weights of the second are all 0 as floating-point numbers

    def drive(fn, case: Case) -> Outputs:
        names = ("log_w", "x_next", "mean", "guided", "std", "log_y", "log_y_next")
        result = call(fn, *(T(case[name]) if name != "std" else case[name] for name in names))
        return with_gaps(**named(result, "W", "ess"))

    def reference(
        log_w: Tensor, x_next: Tensor, mean: Tensor, guided: Tensor, std: float, log_y: Tensor, log_y_next: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _weighed(log_w + _step_ratio(x_next, mean, guided, std) + log_y_next - log_y)

    @mistake(
        "exponentials are taken before they are normalised: all are 0 where the logarithms are very negative, and 0 / 0 is left; subtract the largest first, or use softmax"
    )
    def outside_the_logarithm(log_w, x_next, mean, guided, std, log_y, log_y_next):
        w = (log_w + _step_ratio(x_next, mean, guided, std) + log_y_next - log_y).exp()
        return w / w.sum(), _size(w / w.sum())

    @mistake("the guided step is not corrected for: x' was drawn from q and not from p, and needs p(x' | x) / q(x' | x)")
    def proposal_forgotten(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(log_w + log_y_next - log_y)

    @mistake("the ratio of the steps is turned, q / p: where the guided step draws often, a particle must count *less*")
    def ratio_turned(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(log_w - _step_ratio(x_next, mean, guided, std) + log_y_next - log_y)

    @mistake("only p(x' | x) is there: the density q(x' | x) from which x' was drawn has to be divided by")
    def not_divided_by_the_proposal(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(log_w + _log_normal(x_next, mean, std**2) + log_y_next - log_y)

    @mistake("the old guess log_y stays in: it would count at every step again; it goes out as the new one comes in")
    def old_guess_stays(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(log_w + _step_ratio(x_next, mean, guided, std) + log_y_next)

    @mistake("the old guess is *added*; it is divided by, log_y_next - log_y")
    def old_guess_added(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(log_w + _step_ratio(x_next, mean, guided, std) + log_y_next + log_y)

    @mistake("old and new guess are exchanged: the new one comes in, log_y_next - log_y")
    def guesses_exchanged(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(log_w + _step_ratio(x_next, mean, guided, std) - log_y_next + log_y)

    @mistake("the measurement is left out: the ratio of the steps alone leads back to the prior")
    def measurement_forgotten(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(log_w + _step_ratio(x_next, mean, guided, std))

    @mistake("the earlier weights log_w are forgotten; weights multiply from step to step until the particles are resampled")
    def earlier_weights_forgotten(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(_step_ratio(x_next, mean, guided, std) + log_y_next - log_y)

    @mistake("the squares are divided by 2 std; a Gaussian has 2 std² there")
    def deviation_for_variance(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(log_w + _step_ratio(x_next, mean, guided, std**0.5) + log_y_next - log_y)

    @mistake("the half is missing: log N is - |x' - mean|² / (2 std²)")
    def half_forgotten(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(log_w + 2 * _step_ratio(x_next, mean, guided, std) + log_y_next - log_y)

    @mistake(
        "the squares are averaged over the numbers of a particle; independent numbers multiply their densities, so the squares are summed"
    )
    def averaged_over_numbers(log_w, x_next, mean, guided, std, log_y, log_y_next):
        return _weighed(log_w + _step_ratio(x_next, mean, guided, std) / x_next.shape[-1] + log_y_next - log_y)

    @mistake("softmax is taken of the weights and not of their logarithms: softmax takes the exponential itself")
    def exponential_twice(log_w, x_next, mean, guided, std, log_y, log_y_next):
        logs = log_w + _step_ratio(x_next, mean, guided, std) + log_y_next - log_y
        return _weighed((logs - logs.max()).exp())

    @mistake(
        "the weights are not normalised: divided by their sum they are probabilities, and only then is 1 / sum W² a number of particles"
    )
    def not_normalised(log_w, x_next, mean, guided, std, log_y, log_y_next):
        logs = log_w + _step_ratio(x_next, mean, guided, std) + log_y_next - log_y
        w = (logs - logs.max()).exp()
        return w, _size(w)

    @mistake("the logarithms of the weights are returned; take their exponentials")
    def logarithms_returned(log_w, x_next, mean, guided, std, log_y, log_y_next):
        logs = log_w + _step_ratio(x_next, mean, guided, std) + log_y_next - log_y
        return torch.log_softmax(logs, 0), _size(torch.softmax(logs, 0))

    @mistake("the effective sample size is not inverted: sum W² is 1 / N for equal weights; take 1 / sum W², which is N")
    def size_not_inverted(log_w, x_next, mean, guided, std, log_y, log_y_next):
        W, ess = _weighed(log_w + _step_ratio(x_next, mean, guided, std) + log_y_next - log_y)
        return W, 1 / ess

    @mistake("the effective sample size is given as a share of the particles; return the number, 1 / sum W²")
    def share_for_number(log_w, x_next, mean, guided, std, log_y, log_y_next):
        W, ess = _weighed(log_w + _step_ratio(x_next, mean, guided, std) + log_y_next - log_y)
        return W, ess / len(W)

    @mistake("this is 1 / max W, which looks at one particle; the effective sample size is 1 / sum W²")
    def largest_alone(log_w, x_next, mean, guided, std, log_y, log_y_next):
        W, _ = _weighed(log_w + _step_ratio(x_next, mean, guided, std) + log_y_next - log_y)
        return W, 1 / W.max()

    @mistake("this is the exponential of the entropy: it counts particles too, but the effective sample size is 1 / sum W²")
    def entropy_for_size(log_w, x_next, mean, guided, std, log_y, log_y_next):
        W, _ = _weighed(log_w + _step_ratio(x_next, mean, guided, std) + log_y_next - log_y)
        return W, torch.special.entr(W).sum().exp()

    @law(NOT_FINITE)
    def finite(case: Case, out: Outputs) -> bool:
        return all_finite(out)

    @law("the weights must not be negative and must sum to 1 over the particles")
    def normalised(case: Case, out: Outputs) -> bool:
        return bool((out["W"] >= 0).all()) and close(out["W"].sum(), 1)

    @law("the effective sample size must be 1 / sum W² of the weights that you return")
    def size(case: Case, out: Outputs) -> bool:
        return close(out["ess"], 1 / (out["W"] ** 2).sum())

    @law("the ratio of two weights must be that of w p(x' | x) p(y | x') / (q(x' | x) p(y | x))")
    def ratios(case: Case, out: Outputs) -> bool:
        mean, guided = (((case["x_next"] - case[name]) ** 2).sum(1) for name in ("mean", "guided"))
        logs = case["log_w"] + (guided - mean) / (2 * case["std"] ** 2) + case["log_y_next"] - case["log_y"]
        w = np.exp(logs - logs.max())
        return close(out["W"], w / w.sum())


# --- 07.8 ----------------------------------------------------------------------------------------------


def _positions(W: Tensor, u: float) -> Tensor:
    """(i + u) / N."""
    return (torch.arange(len(W), dtype=W.dtype) + u) / len(W)


def _found(W: Tensor, positions: Tensor) -> Tensor:
    """The particle in whose interval of the cumulated weights each position lies."""
    return torch.searchsorted(W.cumsum(0), positions.contiguous()).clamp_max(len(W) - 1)


def _equal(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen particles, and equal weights."""
    return x[index], torch.full((len(x),), 1 / len(x), dtype=x.dtype)


def _filled(W: Tensor, copies: Tensor) -> Tensor:
    """As many copies of each as asked, cut or filled up with the heaviest particle to N."""
    index = torch.repeat_interleave(torch.arange(len(W)), copies.long())[: len(W)]
    return torch.cat([index, W.argmax().expand(len(W) - len(index))])


@item(
    "07.8", title="Systematic resampling", function="systematic", points=2, minutes=20, difficulty=2,
    answers=("course_lib.posterior.particles.systematic", "course_lib.posterior.particles.multinomial"),
    hints=(
        "Lay the weights end to end on the line from 0 to 1: particle k has the interval between W.cumsum(0)[k - 1] and W.cumsum(0)[k].",
        "N positions, 1 / N apart, all moved by the *same* u: (i + u) / N for i = 0 ... N - 1. Each takes the particle in whose interval it lies.",
        "index = torch.searchsorted(W.cumsum(0), positions), at most N - 1 (the sum may come out below 1). Return x[index], and weights 1 / N: the copies carry what the weights said.",
    ),
)  # fmt: skip
class Systematic:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(N: int, spread: float, shape: tuple[int, ...], u: float) -> Case:
            w = np.exp(spread * rng.normal(size=N))
            w[rng.integers(1, N - 1)] = 0.0
            return {"x": rng.normal(size=(N, *shape)), "W": w / w.sum(), "u": u}

        low, middle, high = rng.uniform(0.1, 0.3), rng.uniform(0.4, 0.6), rng.uniform(0.7, 0.9)
        return [case(9, 1.0, (2,), float(low)), case(12, 0.6, (1, 2, 2), float(high)), case(10, 0.8, (3,), float(middle)),
                case(8, 1.2, (2,), float(high))]  # fmt: skip

    def drive(fn, case: Case) -> Outputs:
        chosen, weights = named(call(fn, T(case["x"]), T(case["W"]), case["u"]), "x_next", "W_next").values()
        rows = arrays(x_next=chosen)["x_next"]
        if rows.shape != case["x"].shape:
            raise Unacceptable(f"x_next has shape {rows.shape}; expected particles, as x: {case['x'].shape}")
        same = (rows[:, None] == case["x"]).reshape(len(rows), len(rows), -1).all(-1)  # the order of the copies is free
        if not same.any(1).all():
            raise Unacceptable("x_next has a row that is none of x's: resampling copies particles and does not move them")
        return {"copies": same.sum(0).astype(float), **arrays(W_next=weights)}

    def reference(x: Tensor, W: Tensor, u: float) -> tuple[Tensor, Tensor]:
        return _equal(x, _found(W, _positions(W, u)))

    @mistake("every position is u: all particles become copies of one; spread the positions, (i + u) / N")
    def one_position(x, W, u):
        return _equal(x, _found(W, torch.full_like(W, u)))

    @mistake("the positions are i + u, not divided by N: from the second on they lie beyond the sum of the weights")
    def not_divided(x, W, u):
        return _equal(x, _found(W, _positions(W, u) * len(W)))

    @mistake("u is not used: positions i / N always favour the same particles, and the result is biased")
    def no_offset(x, W, u):
        return _equal(x, _found(W, _positions(W, 0.0)))

    @mistake("u is used as it is, i / N + u: it is one N-th of it by which all positions move")
    def offset_not_divided(x, W, u):
        return _equal(x, _found(W, _positions(W, 0.0) + u))

    @mistake(
        "the positions are counted from 1, (i + 1 + u) / N: the last one lies beyond 1, and the first particles are passed over"
    )
    def counted_from_one(x, W, u):
        return _equal(x, _found(W, _positions(W, u + 1)))

    @mistake("the positions are (i + 1 - u) / N: with the given u that moves them the other way")
    def offset_turned(x, W, u):
        return _equal(x, _found(W, _positions(W, 1 - u)))

    @mistake("the positions run from u to 1: they lie closer than 1 / N, and the first weights are passed over")
    def squeezed(x, W, u):
        return _equal(x, _found(W, u + (1 - u) * _positions(W, 0.0)))

    @mistake(
        "the index is one too high: searchsorted gives the first k whose cumulated weight reaches the position, and that k is the particle"
    )
    def one_too_high(x, W, u):
        return _equal(x, (_found(W, _positions(W, u)) + 1).clamp_max(len(W) - 1))

    @mistake("the index is one too low: the interval of particle k *ends* at the k-th cumulated weight, so no 1 is subtracted")
    def one_too_low(x, W, u):
        return _equal(x, (_found(W, _positions(W, u)) - 1).clamp_min(0))

    @mistake("the weights are sorted first and the indices not mapped back: the copies go to the wrong particles")
    def sorted_and_lost(x, W, u):
        return _equal(x, _found(W.sort(descending=True).values, _positions(W, u)))

    @mistake("the weights are not used: every particle is kept once")
    def weights_ignored(x, W, u):
        return _equal(x, torch.arange(len(W)))

    @mistake("every particle becomes the best one: nothing is left of the others' share of the posterior")
    def best_alone(x, W, u):
        return _equal(x, W.argmax().expand(len(W)))

    @mistake("the better half is kept twice: that is selection, not resampling; a particle must come N W times on average")
    def better_half(x, W, u):
        return _equal(x, W.argsort(descending=True)[torch.arange(len(W)) // 2])

    @mistake(
        "floor(N W) copies, and the rest to the best: light particles die out for certain, so the average of copies is not N W"
    )
    def cut(x, W, u):
        return _equal(x, _filled(W, (len(W) * W).floor()))

    @mistake(
        "round(N W) copies, cut or filled up to N: without a random number light particles always die, and the average of copies is not N W"
    )
    def rounded(x, W, u):
        return _equal(x, _filled(W, (len(W) * W).round()))

    @mistake("the root of the weights is used: the copies then tell only half of what the weights said, in the logarithm")
    def tempered(x, W, u):
        return _equal(x, _found(W.sqrt() / W.sqrt().sum(), _positions(W, u)))

    @mistake(
        "the old weights stay: x_next has heavy particles several times *and* with a large weight, which counts twice; they are 1 / N now"
    )
    def old_weights_stay(x, W, u):
        return x[_found(W, _positions(W, u))], W.clone()

    @mistake("the copies take their weights along: they count twice then; after resampling each weight is 1 / N")
    def weights_taken_along(x, W, u):
        index = _found(W, _positions(W, u))
        return x[index], W[index] / W[index].sum()

    @mistake("the new weights are 1 each: they must sum to 1, 1 / N each")
    def weights_of_one(x, W, u):
        return x[_found(W, _positions(W, u))], torch.ones_like(W)

    @law("after resampling every weight must be 1 / N")
    def equal(case: Case, out: Outputs) -> bool:
        return close(out["W_next"], 1 / len(case["W"]))

    @law(
        "positions that lie 1 / N apart meet a particle floor(N W) or ceil(N W) times; this has others. (N independent draws, as by torch.multinomial, vary more)"
    )
    def spread_evenly(case: Case, out: Outputs) -> bool:
        share = len(case["W"]) * case["W"]
        return bool((np.abs(out["copies"] - share) < 1).all())

    @law("the numbers of copies are possible ones, but not those of the positions (i + u) / N")
    def from_this_u(case: Case, out: Outputs) -> bool:
        ends = len(case["W"]) * case["W"].cumsum() - case["u"]  # i <= ends for the positions up to a particle's end
        last = np.clip(np.floor(ends) + 1, 0, len(ends))
        return close(out["copies"], np.diff(last, prepend=0))
